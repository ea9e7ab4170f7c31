"""Preferences: text -> ids. A file of judged pairs becomes lists of token ids, and those become right-padded batches.

A row of ids is a prompt followed by a response. With start = len(prompt) and length = start + len(response):

    position      0 ... start-1 | start ... length-2    length-1 | length ... T-1
    token         prompt        | response              EOS      | padding, 0
    predicted at                | start-1 ... length-3  length-2 |

Prompt and response are tokenised separately and their ids joined. So no token crosses the boundary, and a response
has the same ids after every prompt. EOS is appended once, as an id; a response that is truncated at max_response ids
has none. Which tokens are response tokens follows from the lengths, never from the ids: padding is 0, and 0 is EOS in
one vocabulary and an ordinary token in another. Prompts may be conversations (text/chat.py); EOS is then the token that
ends a turn. Left out: attention masks; a causal model needs none under right padding.
"""

import itertools
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from mixdpo.config import InputError
from mixdpo.models.attention import Branches, Packed
from mixdpo.text.chat import encode_answer, encode_chat, template_of
from mixdpo.text.records import OPTIONAL, TEXTS, Fault, placed, suspicions, texts_of
from mixdpo.text.shapes import read_records


@dataclass(frozen=True)
class Pair:
    """One comparison as ids. A response ends with EOS if and only if it was not truncated."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]
    user: str | None = None
    annotator: str | None = None  # for evaluation only, as are the scores; neither reaches a Batch
    scores: dict[str, list[float]] | None = None
    context: bool | None = None  # True: the E-step may read it (plan.py). None: not given in the file
    domain: str | None = None  # topic of the prompt
    file: str | None = field(default=None, compare=False)
    line: int = 0  # number of the line or row in the file, from 1
    more: tuple[list[int], ...] = ()  # of a ranking: its other responses
    order: tuple[int, ...] = (0, 1)  # place of each response, 0 is the best; equally good ones have the same place;
    # records.REST: worse than these, in an unknown order
    sides: int = 2  # R: responses of the longest ranking of the file
    states: torch.Tensor | None = field(default=None, compare=False, repr=False)  # (M, C) of its M response tokens,
    # cached if the trunk (the model without its unembedding) is frozen

    @property
    def responses(self) -> tuple[list[int], ...]:
        """All responses, best first."""
        return self.chosen, self.rejected, *self.more

    def longest(self) -> int:
        return len(self.prompt) + max(map(len, self.responses))


@dataclass(frozen=True)
class Batch:
    """B pairs, right-padded with 0. Axis 1 is the pair: 0 chosen, 1 rejected. If the file has rankings, it has R
    responses, best first; a shorter ranking is filled up with responses of length 0."""

    ids: torch.Tensor  # (B, 2, T) int64; of rankings (B, R, T)
    start: torch.Tensor  # (B,) prompt lengths
    length: torch.Tensor  # (B, 2) prompt + response
    order: torch.Tensor  # (B, 2) place of each response: 0 chosen, 1 rejected; of rankings (B, R), -1: no response
    group: torch.Tensor  # (B,) number of each pair's unit, 0..G-1 (a pair, or a user)
    pair: torch.Tensor  # (B,) index into the list of pairs
    context: torch.Tensor  # (B,) bool
    states: torch.Tensor | None = None  # (M, C) hidden states that predict the response tokens, if they are cached


# ---- text -> ids


def read_preferences(path, tokenizer, max_prompt, max_response, drop=False, report=print, columns="") -> list[Pair]:
    """The pairs of one or several files (files/sources.py), in file order. columns: which columns of a file are which
    fields, NAME=COLUMN,...; needed if its shape is not a known one (text/shapes.py).

    A prompt keeps its last max_prompt ids; a response keeps its first max_response ids, EOS included. `report` receives
    one line with the number of truncated pairs, one for each kind of suspicion (text/records.py), and some lines on
    what was recognised in a file that is not in the project's own format.
    Raises: Fault with file and line, or InputError. With drop=True a line with a fault is skipped instead, and `report`
    receives the numbers of the skipped lines for each kind of fault. An unknown field is an error even then, because
    the format of the file is wrong.
    """
    for option, value in (("max_prompt", max_prompt), ("max_response", max_response)):
        if value < 1:
            raise InputError(f"got {value}; wanted at least 1", option=option)
    pairs, dropped = [], defaultdict(list)
    counted: defaultdict[str, list[str]] = defaultdict(list)
    for row, record, remarks in read_records(path, columns, report):
        place = str(row.number) if row.file == str(path) else f"{row.file}:{row.number}"
        try:
            if isinstance(record, Fault):
                raise record
            pair, more = read_pair(record, row.file, row.number, tokenizer, max_prompt, max_response)
            pairs.append(pair)
            for remark in remarks + more:
                counted[remark].append(place)
        except Fault as fault:
            if fault.kind == "unknown field" or not drop:
                remedy = "" if fault.kind == "unknown field" else " (train.py --drop true skips such lines)"
                raise Fault(fault.kind, fault.got, fault.remedy + remedy, row.file, row.number) from None
            dropped[fault.kind].append(place)
    for kind, places in dropped.items():
        report(f"{path}: dropped, {kind}: {len(places)} (line {', '.join(places)})")
    if not pairs:
        raise InputError(f"no pairs left in it; wanted one object with {', '.join(TEXTS)} a line", file=path)
    sides = max(pair.sides for pair in pairs)
    pairs = [pair if pair.sides == sides else replace(pair, sides=sides) for pair in pairs]
    for what, places in counted.items():
        report(f"{path}: {what}: {len(places)} (first: line {places[0]})")
    return pairs


def read_pair(record: dict, file: str, line: int, tokenizer, max_prompt: int, max_response: int
              ) -> tuple[Pair, list[str]]:
    """A record as a Pair, with a remark for each truncation and each suspicion. Raises: Fault."""
    if isinstance(record["prompt"], list):
        template_of(tokenizer)                                              # raises for a tokenizer without a template
    try:
        prompt, complete = encode_prompt(record["prompt"], tokenizer, max_prompt)
        responses = [encode_response(response, tokenizer) for _, response in placed(record)]
    except Fault:
        raise
    except InputError as error:
        raise Fault("no token for a character", error.message, "replace that character or remove the line") from None
    if any(response[-1] in response[:-1] for response in responses):
        raise Fault("EOS in a response", f"its text contains token {responses[0][-1]}", "remove it: EOS is appended")
    cut = [response[:max_response] for response in responses]               # a truncated response has no EOS
    names = [*texts_of(record)][1:]
    for a, b in itertools.combinations(range(len(cut)), 2):
        if responses[a] == responses[b]:
            got = f"{names[a]} and {names[b]} have the same ids"
            raise Fault("identical responses", got, "remove one, or the line")
        if cut[a] != cut[b]:
            continue
        got = f"the first {max_response} ids of {names[a]} and {names[b]} are the same"
        raise Fault("identical after truncation", got, "raise --max-response or remove the line")
    remarks = suspicions(record, tokenizer)
    if not complete and isinstance(record["prompt"], list):
        remarks.append(f"conversations whose oldest turns are removed to fit {max_prompt} ids")
    elif not complete:
        remarks.append(f"prompts truncated to their last {max_prompt} ids")
    if max(map(len, responses)) > max_response:
        remarks.append(f"pairs with a response truncated to its first {max_response} ids, without EOS")
    order = tuple(place for place, _ in placed(record))
    optional: dict[str, Any] = {name: record.get(name) for name in OPTIONAL}
    pair = Pair(prompt, cut[0], cut[1], file=file, line=line, **optional)
    return replace(pair, more=tuple(cut[2:]), order=order, sides=len(cut)), remarks


def encode_prompt(text: str | list, tokenizer, max_prompt: int) -> tuple[list[int], bool]:
    """The last max_prompt ids of a prompt, or the ids of the last turns of a conversation; and whether nothing was
    removed. A start token is counted and kept."""
    if isinstance(text, list):
        ids, turns_left_out = encode_chat(text, tokenizer, max_prompt)
        return ids, not turns_left_out
    start, ids = [] if tokenizer.bos is None else [tokenizer.bos], tokenizer.encode(text)
    extra = max(0, len(start) + len(ids) - max_prompt)
    return start + ids[extra:], extra == 0


def encode_response(response: str | list, tokenizer) -> list[int]:
    """The ids of a text, or of an answer of one turn, with the end token."""
    if isinstance(response, list):
        return encode_answer(response[0]["content"], tokenizer)
    return [*tokenizer.encode(response), tokenizer.eos]


def check_lengths(pairs: list[Pair], context: int, path) -> None:
    """Raises: InputError if a pair from the file `path` has more tokens than the model has positions."""
    worst = max(pairs, key=Pair.longest)
    if worst.longest() > context:
        raise InputError(
            f"prompt ({len(worst.prompt)} ids) and response ({worst.longest() - len(worst.prompt)}) are longer than "
            f"the model's context of {context}; choose --max-prompt and --max-response with a sum of at most {context}",
            file=worst.file or path, line=worst.line)


# ---- units that share one latent type


def groups(pairs: list[Pair], latent: str) -> list[list[int]]:
    """Indices of the pairs of each unit, in order of appearance: one pair, or all pairs of a user (M11)."""
    if latent == "pair":
        return [[i] for i in range(len(pairs))]
    if latent != "user":
        raise InputError(f"got {latent!r}; wanted pair or user", option="latent")
    if without_user := [pair for pair in pairs if pair.user is None]:
        raise InputError(f"has no user, like {len(without_user)} of {len(pairs)} pairs; wanted a user on every line: "
                         "add them, or use --latent pair", without_user[0].file, without_user[0].line)
    by_user = defaultdict(list)
    for i, pair in enumerate(pairs):
        by_user[pair.user].append(i)
    return list(by_user.values())


# ---- ids -> tensors


def collate(pairs: Sequence[Pair], index: Sequence[int], group: list[int] | None = None) -> Batch:
    """The pairs at `index`, in that order. group: the unit of each, 0..G-1; None: each pair is its own unit."""
    taken = [pairs[i] for i in index]
    sides = taken[0].sides
    ids = torch.zeros(len(taken), sides, max(map(Pair.longest, taken)), dtype=torch.int64)  # (B, R, T)
    start = torch.tensor([len(pair.prompt) for pair in taken])
    length = start[:, None].repeat(1, sides)
    for b, pair in enumerate(taken):
        for side, response in enumerate(pair.responses):
            length[b, side] = len(pair.prompt) + len(response)
            ids[b, side, : length[b, side]] = torch.tensor(pair.prompt + response)
    unit = torch.arange(len(taken)) if group is None else torch.tensor(group)
    context = torch.tensor([bool(pair.context) for pair in taken])
    known = [pair.states for pair in taken if pair.states is not None]
    states = torch.cat(known) if len(known) == len(taken) else None
    return Batch(ids, start, length, order_of(taken), unit, torch.tensor(index), context, states)


def order_of(pairs: Sequence[Pair]) -> torch.Tensor:
    """The place of each response: (P, R) int64, 0 is the best, -1 no response."""
    return torch.tensor([[*pair.order, *[-1] * (pair.sides - len(pair.order))] for pair in pairs])


@dataclass(frozen=True)
class Rows:
    """The rows of ids that pass through a model, and the positions of the M response tokens, EOS included."""

    ids: torch.Tensor  # (N, T): each response behind its prompt, N = 2B; or all behind one prompt, N = B
    window: Branches | Packed | None  # which tokens attend to which, if not plainly causal
    token: torch.Tensor  # (M,) position of each response token, in 0..N*T-1
    where: torch.Tensor  # (M,) position of the hidden state that predicts it
    targets: torch.Tensor  # (M,) its id
    sequence: torch.Tensor  # (M,) its response, in 0..2B-1; of rankings 0..R*B-1

    def to(self, device) -> "Rows":
        indices = (x.to(device) for x in (self.token, self.where, self.targets, self.sequence))
        return Rows(self.ids.to(device), self.window and self.window.to(device), *indices)


def rows_of(batch: Batch) -> Rows:
    """The batch as rows, one for each response after its prompt. fast/packing.py has layouts with fewer tokens."""
    T = batch.ids.shape[-1]
    position = torch.arange(T, device=batch.ids.device)
    is_response = (position >= batch.start[:, None, None]) & (position < batch.length[..., None])  # (B, 2, T)
    token = is_response.flatten().nonzero().squeeze(1)  # (M,) into B*2*T
    targets, sequence = batch.ids.flatten()[token], token // T
    return Rows(batch.ids.flatten(0, 1), None, token, token - 1, targets, sequence)  # no prompt is empty
