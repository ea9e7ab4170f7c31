"""Passes without gradient over pairs, in which each different text is computed once.

A text is a prompt and a response. Users judge the same texts, so a file of pairs repeats them: 544 pairs of the quick
job hold 511 different texts, and not 1,088. Up to RESPONSES responses of a prompt share a row, behind the prompt:

    prompt response response response response          packing.compact_rows of a ranking

The log-probs are those of the same texts in other rows, up to rounding.
"""

import itertools
from collections.abc import Iterable, Iterator

import torch

from mixdpo.experts import pair_logp
from mixdpo.fast.packing import compact_rows
from mixdpo.preferences import Batch, Pair, collate

RESPONSES = 4   # in a row. More share a prompt further, but attention, quadratic in the row, then costs more than it

Text = tuple[tuple[int, ...], tuple[int, ...]]      # prompt, response


def texts_of(pair: Pair) -> list[Text]:
    """The texts of a pair, best first."""
    prompt = tuple(pair.prompt)
    return [(prompt, tuple(response)) for response in pair.responses]


def batches_of_texts(texts: Iterable[Text], size: int) -> Iterator[tuple[Batch, list[tuple[Text, int, int]]]]:
    """Batches of at most 2 * size texts, or one row, that together have each different text once. Yields a batch, and
    each of its texts with its row and its place in the row. Rows with as many responses are in the order of `texts`."""
    rows: list[list[Text]] = []
    row_of: dict[tuple[int, ...], list[Text]] = {}                          # of each prompt: the last one
    for text in dict.fromkeys(texts):
        row = row_of.get(text[0])
        if row is None or len(row) == RESPONSES:
            rows.append(row := [])
            row_of[text[0]] = row
        row.append(text)
    rows.sort(key=len)                                                      # stable
    start = 0
    while start < len(rows):
        end, room = start, 2 * size
        while end < len(rows) and (end == start or len(rows[end]) <= room):
            room -= len(rows[end])
            end += 1
        part, sides = rows[start:end], max(2, len(rows[end - 1]))
        pairs = [as_ranking(row, sides) for row in part]
        yield collate(pairs, range(len(pairs))), [(text, b, r) for b, row in enumerate(part)
                                                  for r, text in enumerate(row)]
        start = end


def as_ranking(row: list[Text], sides: int) -> Pair:
    """Texts of one prompt as a ranking of so many responses; of a single text, the second response is empty."""
    first, second, *more = [list(response) for _, response in row] + [[]] * (len(row) == 1)
    return Pair(list(row[0][0]), first, second, more=tuple(more), order=tuple(range(2 + len(more))), sides=sides)


@torch.no_grad()
def logp_of_texts(experts, texts: Iterable[Text], known: dict[Text, torch.Tensor], progress=None, size: int = 16,
                  temperature: float = 1.0) -> dict[Text, torch.Tensor]:
    """Adds to `known` the summed log-probs of the response of each text that it lacks, under every expert: (K,) float32
    nats, on the CPU; returns it. progress(done, texts): called after each batch, of at most 2 * size texts."""
    new = list(dict.fromkeys(text for text in texts if text not in known))
    done = 0
    for batch, of_batch in batches_of_texts(new, size):
        logp = pair_logp(experts, batch, compact_rows, temperature=temperature).cpu()       # (B,K,R)
        known |= {text: logp[b, :, r] for text, b, r in of_batch}
        done += len(of_batch)
        if progress:
            progress(done, len(new))
    return known


def logp_of_pairs(experts, pairs: list[Pair], progress=None, size: int = 16, temperature: float = 1.0,
                  known: dict | None = None) -> torch.Tensor:
    """Equals experts.pair_logp of all pairs, each different text once: (P,K,R) float32 nats, on the CPU. known: of
    logp_of_texts, under these experts at this temperature, from earlier calls; it is filled. Pairs with states, which
    need no pass through a trunk, are computed one by one."""
    if all(pair.states is not None for pair in pairs):
        return logp_from_states(experts, pairs, progress, size, temperature)
    texts = [texts_of(pair) for pair in pairs]
    known = logp_of_texts(experts, itertools.chain(*texts), {} if known is None else known, progress, size, temperature)
    none = torch.zeros(experts.K)                                           # a shorter ranking's missing responses
    return torch.stack([torch.stack([known[text] for text in row] + [none] * (pair.sides - len(row)), dim=-1)
                        for pair, row in zip(pairs, texts)])


@torch.no_grad()
def logp_from_states(experts, pairs: list[Pair], progress, size: int, temperature: float) -> torch.Tensor:
    """pair_logp of all pairs, `size` at a time, on the CPU."""
    found = []
    for start in range(0, len(pairs), size):
        batch = collate(pairs, range(start, min(start + size, len(pairs))))
        found.append(pair_logp(experts, batch, compact_rows, temperature=temperature).cpu())
        if progress:
            progress(start + len(batch.ids), len(pairs))
    return torch.cat(found)
