"""The frozen reference policy's view of the data: log-probs and features of every pair,
computed once, cached on disk by content.

The log-probs come from the same functions, in the same dtype, as the policy's (experts.pair_logp's steps).
The features are the mean hidden states over each response, what the linear start (linear.py) looks at, and of each
prompt the last and the mean hidden state, what a gate may look at (gates.py). And, where they are not too many, the
states that predict each response token: a trunk that is frozen need not be run again, in training or after it.
The cache key is a hash of the weights, the data, the tokenizer, the lengths, the dtype and the device:
another model or file can never be answered with these numbers.
"""

import dataclasses
import functools
import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch

from mixdpo.config import InputError
from mixdpo.experts import Heads, Transformer
from mixdpo.fast.packing import compact_rows
from mixdpo.files.atomic import Damaged, read_tensors, write_tensors
from mixdpo.logprob import sum_responses
from mixdpo.models.weights import content_key, load_model
from mixdpo.preferences import Pair, collate
from mixdpo.runs.log import Progress
from mixdpo.text.records import data_key
from mixdpo.text.tokenizer import Tokenizer, load_tokenizer

STATES = 2**29  # bytes of states of response tokens that are kept, at most
VERSION = 4     # part of every key: raise it when what is kept changes


@dataclass(frozen=True)
class Reference:
    logp: torch.Tensor      # (P,1,2) float32 nats, or (P,K,2) where each expert has a reference of its own
    features: torch.Tensor  # (P,2,C) float32, of the responses
    prompt: torch.Tensor    # (P,2,C) float32, of the prompt: last state, mean state
    states: torch.Tensor    # (M,C) in the products' dtype: that predict each response token; (0,C) where too many

    def with_states(self, pairs: list[Pair]) -> list[Pair]:
        """The pairs that this is of, each with its states, for experts on the same trunk, frozen. As they are, where
        states were not kept."""
        counts = [len(pair.chosen) + len(pair.rejected) for pair in pairs]
        if len(self.states) != sum(counts):
            return pairs
        return [dataclasses.replace(pair, states=own) for pair, own in zip(pairs, self.states.split(counts))]


def load_references(config, device) -> tuple[list[Transformer], Tokenizer]:
    """The run's models, one for all experts or one for each, and their tokenizer.
    Raises: InputError if they do not go together: experts share text, tokens and the width of their states."""
    folder, models, keys = config.data_folder or None, [], []
    for name in config.models:
        tokenizer = load_tokenizer(name, folder)
        models.append(load_model(name, device=device, data=folder))
        keys.append((tokenizer.key, tuple(models[-1].unembedding.shape)))
        if keys[-1] != keys[0]:
            raise InputError(f"{name} has another tokenizer, vocabulary or width than {config.models[0]}; experts of "
                             "one mixture want the same", option="model")
    return models, tokenizer


@torch.no_grad()
def compute_reference(model, pairs: list[Pair], dtype: torch.dtype, size: int = 16, progress=None,
                      most: int | None = None) -> Reference:
    """One pass over the pairs in file order, `size` pairs a batch, on the model's device; results on the CPU. States of
    response tokens are kept if all of them take no more than `most` bytes; default: STATES."""
    policy, device = Heads(model, 1, dtype=dtype), model.unembedding.device
    logps, features, prompts, states = [], [], [], []
    tokens = sum(len(pair.chosen) + len(pair.rejected) for pair in pairs)
    keep = tokens * model.config.width * dtype.itemsize <= (STATES if most is None else most)
    for start in range(0, len(pairs), size):
        batch = collate(pairs, range(start, min(start + size, len(pairs))))
        text, B = compact_rows(batch).to(device), len(batch.ids)
        hidden = policy.hidden(text.ids, text.window)                       # (2B,T,C), or (B,T,C): shared prompts
        predicting = policy.rows(hidden, text.where)                        # (M,C)
        states.append(predicting[: len(predicting) * keep].cpu())
        of_tokens = policy.token_logps(predicting, text.targets, 0)                        # (1,M)
        logps.append(sum_responses(of_tokens, text.sequence, B))            # (B,1,2)
        read = policy.rows(hidden, text.token).float()          # (M,C) states that have read each response token
        count = torch.bincount(text.sequence, minlength=2 * B).clamp_min(1)
        mean = read.new_zeros(2 * B, read.shape[1]).index_add(0, text.sequence, read) / count[:, None]
        features.append(mean.view(B, 2, -1))
        of_pairs = hidden[:: len(hidden) // B]                              # (B,T,C): a pair's rows begin the same
        prompts.append(states_of_prompts(of_pairs, batch.start.to(device)))
        if progress:
            progress(min(start + size, len(pairs)), len(pairs))
    made = Reference(*(torch.cat(column).cpu() for column in (logps, features, prompts, states)))
    broken = [pair.line for pair, row in zip(pairs, made.logp) if not row.isfinite().all()]
    if broken:
        raise InputError(f"the model's log-probs of {len(broken)} pairs are NaN or infinite in {dtype}, first in line "
                         f"{broken[0]}; wanted numbers: its weights are too large or damaged. Choose another model, or "
                         "--dtype float32", option="model")
    return made


def states_of_prompts(hidden: torch.Tensor, start: torch.Tensor) -> torch.Tensor:
    """The last and the mean hidden state of each prompt: (N,T,C), lengths (N,) -> (N,2,C) float32."""
    inside = torch.arange(hidden.shape[1], device=hidden.device) < start[:, None]           # (N,T)
    mean = hidden.float().masked_fill(~inside[..., None], 0.0).sum(1) / start[:, None]      # (N,C)
    return torch.stack([hidden[torch.arange(len(start), device=hidden.device), start - 1].float(), mean], dim=1)


@torch.no_grad()
def prompt_features(model, prompts: list[list[int]], dtype: torch.dtype, size: int = 64) -> torch.Tensor:
    """The same of prompts alone, which no response follows: (N,2,C) float32, on the CPU."""
    policy, device, out = Heads(model, 1, dtype=dtype), model.unembedding.device, []
    for first in range(0, len(prompts), size):
        part = prompts[first : first + size]
        ids = torch.zeros(len(part), max(map(len, part)), dtype=torch.int64)
        for row, prompt in zip(ids, part):
            row[: len(prompt)] = torch.tensor(prompt)
        lengths = torch.tensor([len(prompt) for prompt in part], device=device)
        out.append(states_of_prompts(policy.hidden(ids.to(device)), lengths).cpu())
    return torch.cat(out)


def cached_reference(folder: Path, key: tuple, compute) -> Reference:
    """The reference for `key` (any tuple of strings and numbers that names its content),
    from `folder` or from compute()."""
    name = hashlib.sha256(repr(key).encode()).hexdigest()
    path = Path(folder) / f"{name}.safetensors"
    if path.exists():
        try:
            return Reference(**read_tensors(path)[0])
        except Damaged as damaged:
            print(f"{damaged}; it is computed again")
    made = compute()
    path.parent.mkdir(parents=True, exist_ok=True)
    write_tensors(path, dataclasses.asdict(made), {})
    return made


def reference_of(path, pairs: list[Pair], models: list, tokenizer, config, dtype: torch.dtype,
                 folder: Path, between=lambda: None, alone: bool = False) -> Reference:
    """The reference of the pairs that were read from `path` with config's max_prompt, max_response and drop: one for
    each of the models. Features are the first's. between: called after each batch. alone: every pair passes by itself
    and no states are kept, so that a pair's figures do not depend on any other pair, to the bit."""
    found, bar = [], Progress(f"reference, {Path(path).stem}")
    size, most = (1, 0) if alone else (16, STATES)

    def progress(done: int, total: int) -> None:
        bar(done, total)
        between()

    for model in models:
        key = (VERSION, content_key(model), data_key(path), tokenizer.key, config.max_prompt, config.max_response,
               config.drop, str(dtype), str(model.unembedding.device)) + (("alone",) if alone else ())
        made = functools.partial(compute_reference, model, pairs, dtype, size, progress, most)
        found.append(cached_reference(folder, key, made))
    return dataclasses.replace(found[0], logp=torch.cat([each.logp for each in found], dim=1))
