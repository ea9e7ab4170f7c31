"""The frozen reference policy: log-probs and features of every pair, computed once and cached on disk by content.

The log-probs come from the same functions as the policy's (experts.pair_logp), in the same dtype. The features are the
mean hidden state over each response, for the linear start (start.py), and the last and the mean hidden state of each
prompt, for a gate (gates.py). If they fit into STATES bytes, the states that predict the response tokens are kept too:
then a frozen trunk need not run again, in training or in evaluation.
The cache key is a hash of the weights, the data, the tokenizer, the lengths, the dtype and the device, so the numbers
of another model or file are never used. Each different text is computed once, and not again if a file in the cache has
it with the same weights, tokenizer, lengths, dtype and device.
"""

import contextlib
import dataclasses
import functools
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from mixdpo.config import InputError
from mixdpo.experts import Heads, Transformer
from mixdpo.fast.casts import cast_linears
from mixdpo.fast.packing import compact_rows
from mixdpo.fast.texts import Text, batches_of_texts, texts_of
from mixdpo.files.atomic import Damaged, read_tensors, write_tensors
from mixdpo.files.sources import short_name
from mixdpo.logprob import sum_responses
from mixdpo.models.weights import content_key, load_model
from mixdpo.preferences import Batch, Pair
from mixdpo.runs.distributed import any_process, rank
from mixdpo.runs.log import Progress
from mixdpo.runs.options import TrainConfig
from mixdpo.runs.parallel import in_parts
from mixdpo.text.records import data_key
from mixdpo.text.tokenizer import Tokenizer, load_tokenizer

STATES = 2**29  # largest size in bytes of the kept states of response tokens
VERSION = 5     # part of every cache key; increase it if the kept values change


@dataclass(frozen=True)
class Reference:
    """Numbers of P pairs under the reference."""

    logp: torch.Tensor      # (P,1,2) float32 nats; (P,K,2) if each expert has its own reference. Of rankings: (P,1,R)
    features: torch.Tensor  # (P,2,C) float32: mean state over each response. Of rankings: (P,R,C)
    prompt: torch.Tensor    # (P,2,C) float32: last and mean state of the prompt
    states: torch.Tensor    # (M,C) in the compute dtype: predict the response tokens; (0,C) if they are too large

    def with_states(self, pairs: list[Pair]) -> list[Pair]:
        """These pairs with their states, for experts on the same frozen trunk; unchanged if states were not kept."""
        counts = [sum(map(len, pair.responses)) for pair in pairs]
        if len(self.states) != sum(counts):
            return pairs
        return [dataclasses.replace(pair, states=own) for pair, own in zip(pairs, self.states.split(counts))]


def load_references(config, device) -> tuple[list[Transformer], Tokenizer]:
    """The run's models, one for all experts or one for each, and their tokenizer. Raises: InputError if the models
    differ in tokenizer, vocabulary or width."""
    folder, models, keys = config.data_folder or None, [], []
    for name in config.models:
        tokenizer = load_tokenizer(name, folder)
        models.append(load_model(name, device=device, data=folder))
        keys.append((tokenizer.key, tuple(models[-1].unembedding.shape)))
        if keys[-1] != keys[0]:
            raise InputError(f"{name} has another tokenizer, vocabulary or width than {config.models[0]}; choose "
                             "models with the same", option="model")
    return models, tokenizer


@dataclass(frozen=True)
class OfText:
    """Numbers of one text, a prompt and a response, under the reference; as in Reference."""

    logp: torch.Tensor      # ()
    feature: torch.Tensor   # (C,)
    prompt: torch.Tensor    # (2,C)
    states: torch.Tensor    # (m,C) of its m response tokens; (0,C) if they are too large


@torch.no_grad()
def compute_reference(model, pairs: list[Pair], dtype: torch.dtype, size: int = 16, progress=None,
                      most: int | None = None, known: dict[str, OfText] | None = None) -> Reference:
    """One pass over the different texts of the pairs (fast/texts.py), about `size` pairs per batch, on the model's
    device; results on the CPU. known: text_key -> numbers of texts that need no pass; those that are computed are
    added. States of response tokens are kept if they take at most `most` bytes; default: STATES."""
    tokens = sum(len(response) for pair in pairs for response in pair.responses)
    keep = tokens * model.config.width * dtype.itemsize <= (STATES if most is None else most)
    known = {} if known is None else known
    texts = {text_key(text): text for pair in pairs for text in texts_of(pair)}
    new = [text for key, text in texts.items() if key not in known or keep and not len(known[key].states)]
    policy, done = Heads(cast_linears(model, dtype), 1, dtype=dtype), 0
    for batch, of_batch in batches_of_texts(new, size):
        known |= numbers_of(policy, batch, of_batch, keep)
        done += len(of_batch)
        if progress:
            progress(round(len(pairs) * done / len(new)), len(pairs))
    made = gathered(pairs, known, keep)
    broken = [pair for pair, row in zip(pairs, made.logp) if not row.isfinite().all()]
    if broken:
        where = f"{broken[0].line}" + f" of {broken[0].file}" * (broken[0].file is not None)
        raise InputError(f"the model's log-probs of {len(broken)} pairs are NaN or infinite in {dtype}, first in line "
                         f"{where}; its weights are damaged or too large for this dtype. Choose another model, or "
                         "--dtype float32", option="model")
    return made


def divided(pairs: list[Pair], compute) -> Reference:
    """compute(pairs), of which each process of the run computes a part."""
    made = in_parts(pairs, compute)
    if len(made) == 1:
        return made[0]
    return Reference(*(torch.cat(columns) for columns in zip(*(vars(part).values() for part in made))))


def numbers_of(policy: Heads, batch: Batch, texts: list, keep: bool) -> dict[str, OfText]:
    """The numbers of the texts of a batch of batches_of_texts, by text_key. keep: the states too."""
    text, (B, R, _) = compact_rows(batch).to(policy.trunk.unembedding.device), batch.ids.shape
    hidden = policy.hidden(text.ids, text.window)                           # (R*B,T,C), or (B,T,C): shared prompts
    predicting = policy.rows(hidden, text.where)                            # (M,C)
    logp = sum_responses(policy.token_logps(predicting, text.targets, 0), text.sequence, B, R)      # (B,1,R)
    read = policy.rows(hidden, text.token).float()              # (M,C) states that have read each response token
    count = torch.bincount(text.sequence, minlength=R * B)
    mean = read.new_zeros(R * B, read.shape[1]).index_add(0, text.sequence, read) / count.clamp_min(1)[:, None]
    of_rows = hidden[:: len(hidden) // B]                                   # (B,T,C): a prompt's rows begin the same
    prompt = states_of_prompts(of_rows, batch.start.to(hidden.device)).cpu()
    states = predicting.cpu().split(count.tolist())                         # of each response
    logp, mean = logp.cpu(), mean.cpu()
    kept = [(own if keep else own[:0]).clone() for own in states]
    return {text_key(of): OfText(logp[b, 0, r], mean[R * b + r], prompt[b], kept[R * b + r]) for of, b, r in texts}


def gathered(pairs: list[Pair], known: dict[str, OfText], keep: bool) -> Reference:
    """The numbers of pairs from those of their texts. A shorter ranking's missing responses have zeros."""
    found = [[known[text_key(text)] for text in texts_of(pair)] for pair in pairs]
    none, R = OfText(*(torch.zeros_like(x) for x in dataclasses.astuple(found[0][0]))), pairs[0].sides
    rows = [[*row, *[none] * (R - len(row))] for row in found]
    states = [text.states for row in found for text in row] if keep else [found[0][0].states[:0]]
    return Reference(torch.stack([torch.stack([text.logp for text in row]) for row in rows])[:, None],
                     torch.stack([torch.stack([text.feature for text in row]) for row in rows]),
                     torch.stack([row[0].prompt for row in rows]), torch.cat(states))


def text_key(text: Text) -> str:
    """A hash of a text's ids."""
    return hashlib.sha256(repr(text).encode()).hexdigest()[:32]




def states_of_prompts(hidden: torch.Tensor, start: torch.Tensor) -> torch.Tensor:
    """The last and the mean hidden state of each prompt: (N,T,C), lengths (N,) -> (N,2,C) float32."""
    inside = torch.arange(hidden.shape[1], device=hidden.device) < start[:, None]           # (N,T)
    mean = hidden.float().masked_fill(~inside[..., None], 0.0).sum(1) / start[:, None]      # (N,C)
    return torch.stack([hidden[torch.arange(len(start), device=hidden.device), start - 1].float(), mean], dim=1)


@torch.no_grad()
def prompt_features(model, prompts: list[list[int]], dtype: torch.dtype, size: int = 64) -> torch.Tensor:
    """The last and the mean hidden state of prompts without responses: (N,2,C) float32, on the CPU."""
    policy, device, out = Heads(cast_linears(model, dtype), 1, dtype=dtype), model.unembedding.device, []
    for first in range(0, len(prompts), size):
        part = prompts[first : first + size]
        ids = torch.zeros(len(part), max(map(len, part)), dtype=torch.int64)
        for row, prompt in zip(ids, part):
            row[: len(prompt)] = torch.tensor(prompt)
        lengths = torch.tensor([len(prompt) for prompt in part], device=device)
        out.append(states_of_prompts(policy.hidden(ids.to(device)), lengths).cpu())
    return torch.cat(out)


def compute_alone(model, pairs: list[Pair], dtype: torch.dtype, progress) -> Reference:
    """Equals compute_reference without states, up to rounding. Every pair passes through the model alone."""
    twin, found = cast_linears(model, dtype), []
    for n, pair in enumerate(pairs, 1):
        found.append(dataclasses.astuple(compute_reference(twin, [pair], dtype, most=0)))
        progress(n, len(pairs))
    return Reference(*map(torch.cat, zip(*found)))


def cached_reference(folder: Path, key: tuple, compute, pairs: Sequence[Pair] = (), context: str = "") -> Reference:
    """The reference for `key`, a tuple of strings and numbers that identifies its content: from `folder`, or from
    compute(). pairs, context: for known_texts, which finds the numbers of these pairs' texts in the file."""
    name = hashlib.sha256(repr(key).encode()).hexdigest()
    path, found = Path(folder) / f"{name}.safetensors", None
    if path.exists():
        try:
            found = Reference(**read_tensors(path)[0])
        except Damaged as damaged:
            print(f"warning: {damaged}; it is computed again")
    missing, = any_process(found is None)
    if found is not None and not missing:
        return found
    made = compute()
    if rank() == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        texts = [[(text_key(text), len(text[1])) for text in texts_of(pair)] for pair in pairs]
        write_tensors(path, dataclasses.asdict(made), {"context": context, "texts": texts})
    return made


def known_texts(folder: Path, context: str) -> dict[str, OfText]:
    """text_key -> numbers of all texts in the files of `folder` that were computed in this context: with the same
    weights, tokenizer, lengths, dtype and device. The files of a type, or of new users, repeat texts of others."""
    known: dict[str, OfText] = {}
    for path in sorted(Path(folder).glob("*.safetensors")):
        with contextlib.suppress(Damaged):
            tensors, facts = read_tensors(path)
            if facts.get("context") == context:
                made, texts = Reference(**tensors), facts["texts"]
                counts = [count for row in texts for _, count in row]
                states = iter(made.states.split(counts if len(made.states) else [0] * len(counts)))
                known |= {key: OfText(made.logp[n, 0, r], made.features[n, r], made.prompt[n], next(states))
                          for n, row in enumerate(texts) for r, (key, _) in enumerate(row)}
    return known


@dataclass(frozen=True)
class Source:
    """Pairs, and what they were read from: the file or files, and the max_prompt, max_response, drop and columns of a
    TrainConfig.

    one_by_one: every pair passes through the model alone and no states are kept, so a pair's figures do not depend on
    any other pair, to the bit (private runs)."""

    path: str | Path
    pairs: list[Pair]
    config: TrainConfig
    one_by_one: bool = False


def reference_of(source: Source, models: list, tokenizer, dtype: torch.dtype, cache: Path,
                 after_batch=lambda: None) -> Reference:
    """The reference of the source's pairs, with the log-probs of each model and the features of the first; from the
    folder `cache`, or computed. after_batch(): called after each batch."""
    found, config = [], source.config
    tokens = sum(len(response) for pair in source.pairs for response in pair.responses)
    most = STATES if tokens * models[0].config.width * dtype.itemsize <= STATES else -1     # of all processes together
    progress = Progress(f"reference, {short_name(source.path)}", after=after_batch)
    for model in models:
        context: tuple = (VERSION, content_key(model), tokenizer.key, config.max_prompt, config.max_response,
                          str(dtype), model.unembedding.device.type)
        key = *context, data_key(source.path, config.columns), config.drop
        key += ("alone",) if source.one_by_one else ()
        key += ("rankings",) if source.pairs[0].sides > 2 else ()           # not as_pairs of the same file
        if source.one_by_one:
            compute = functools.partial(compute_alone, model, dtype=dtype, progress=progress)
            found.append(cached_reference(cache, key, lambda: divided(source.pairs, compute)))
        else:
            found.append(cached_reference(cache, key, lambda: divided(source.pairs, functools.partial(
                compute_reference, model, dtype=dtype, progress=progress, most=most,
                known=known_texts(cache, repr(context)))), source.pairs, repr(context)))
    return dataclasses.replace(found[0], logp=torch.cat([each.logp for each in found], dim=1))
