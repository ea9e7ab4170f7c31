"""The frozen reference policy: log-probs and features of every pair, computed once and cached on disk by content.

The log-probs come from the same functions as the policy's (experts.pair_logp), in the same dtype. The features are the
mean hidden state over each response, for the linear start (start.py), and the last and the mean hidden state of each
prompt, for a gate (gates.py). If they fit into STATES bytes, the states that predict the response tokens are kept too:
then a frozen trunk need not run again, in training or in evaluation.
The cache key is a hash of the weights, the data, the tokenizer, the lengths, the dtype and the device, so the numbers
of another model or file are never used.
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
from mixdpo.files.sources import short_name
from mixdpo.logprob import sum_responses
from mixdpo.models.weights import content_key, load_model
from mixdpo.preferences import Pair, collate
from mixdpo.runs.distributed import any_process, rank
from mixdpo.runs.log import Progress
from mixdpo.runs.options import TrainConfig
from mixdpo.runs.parallel import in_parts
from mixdpo.text.records import data_key
from mixdpo.text.tokenizer import Tokenizer, load_tokenizer

STATES = 2**29  # largest size in bytes of the kept states of response tokens
VERSION = 4     # part of every cache key; increase it if the kept values change


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


@torch.no_grad()
def compute_reference(model, pairs: list[Pair], dtype: torch.dtype, size: int = 16, progress=None,
                      most: int | None = None) -> Reference:
    """One pass over the pairs in file order, `size` pairs per batch, on the model's device; results on the CPU. States
    of response tokens are kept if they take at most `most` bytes; default: STATES."""
    policy, device = Heads(model, 1, dtype=dtype), model.unembedding.device
    logps, features, prompts, states = [], [], [], []
    tokens = sum(len(response) for pair in pairs for response in pair.responses)
    keep = tokens * model.config.width * dtype.itemsize <= (STATES if most is None else most)
    for start in range(0, len(pairs), size):
        batch = collate(pairs, range(start, min(start + size, len(pairs))))
        text, (B, R, _) = compact_rows(batch).to(device), batch.ids.shape
        hidden = policy.hidden(text.ids, text.window)                       # (R*B,T,C), or (B,T,C): shared prompts
        predicting = policy.rows(hidden, text.where)                        # (M,C)
        states.append(predicting[: len(predicting) * keep].cpu())
        of_tokens = policy.token_logps(predicting, text.targets, 0)                        # (1,M)
        logps.append(sum_responses(of_tokens, text.sequence, B, R))         # (B,1,R)
        read = policy.rows(hidden, text.token).float()          # (M,C) states that have read each response token
        count = torch.bincount(text.sequence, minlength=R * B).clamp_min(1)
        mean = read.new_zeros(R * B, read.shape[1]).index_add(0, text.sequence, read) / count[:, None]
        features.append(mean.view(B, R, -1))
        of_pairs = hidden[:: len(hidden) // B]                              # (B,T,C): a pair's rows begin the same
        prompts.append(states_of_prompts(of_pairs, batch.start.to(device)))
        if progress:
            progress(min(start + size, len(pairs)), len(pairs))
    made = Reference(*(torch.cat(column).cpu() for column in (logps, features, prompts, states)))
    broken = [pair for pair, row in zip(pairs, made.logp) if not row.isfinite().all()]
    if broken:
        where = f"{broken[0].line}" + f" of {broken[0].file}" * (broken[0].file is not None)
        raise InputError(f"the model's log-probs of {len(broken)} pairs are NaN or infinite in {dtype}, first in line "
                         f"{where}; its weights are damaged or too large for this dtype. Choose another model, or "
                         "--dtype float32", option="model")
    return made


def divided_reference(model, pairs: list[Pair], dtype: torch.dtype, size: int, progress, most: int) -> Reference:
    """Equals compute_reference; each process of the run passes over a part of the pairs."""
    tokens = sum(len(response) for pair in pairs for response in pair.responses)
    fits = tokens * model.config.width * dtype.itemsize <= most
    made = in_parts(pairs, size, lambda part: compute_reference(model, part, dtype, size, progress,
                                                                most if fits else -1))
    if len(made) == 1:
        return made[0]
    return Reference(*(torch.cat(columns) for columns in zip(*(vars(part).values() for part in made))))


def states_of_prompts(hidden: torch.Tensor, start: torch.Tensor) -> torch.Tensor:
    """The last and the mean hidden state of each prompt: (N,T,C), lengths (N,) -> (N,2,C) float32."""
    inside = torch.arange(hidden.shape[1], device=hidden.device) < start[:, None]           # (N,T)
    mean = hidden.float().masked_fill(~inside[..., None], 0.0).sum(1) / start[:, None]      # (N,C)
    return torch.stack([hidden[torch.arange(len(start), device=hidden.device), start - 1].float(), mean], dim=1)


@torch.no_grad()
def prompt_features(model, prompts: list[list[int]], dtype: torch.dtype, size: int = 64) -> torch.Tensor:
    """The last and the mean hidden state of prompts without responses: (N,2,C) float32, on the CPU."""
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
    """The reference for `key`, a tuple of strings and numbers that identifies its content: from `folder`, or from
    compute()."""
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
        write_tensors(path, dataclasses.asdict(made), {})
    return made


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
    found, bar, config = [], Progress(f"reference, {short_name(source.path)}"), source.config
    size, most = (1, 0) if source.one_by_one else (16, STATES)

    def progress(done: int, total: int) -> None:
        bar(done, total)
        after_batch()

    for model in models:
        key: tuple = (VERSION, content_key(model), data_key(source.path, config.columns), tokenizer.key,
               config.max_prompt, config.max_response, config.drop, str(dtype), model.unembedding.device.type)
        key += ("alone",) if source.one_by_one else ()
        key += ("rankings",) if source.pairs[0].sides > 2 else ()           # not as_pairs of the same file
        made = functools.partial(divided_reference, model, source.pairs, dtype, size, progress, most)
        found.append(cached_reference(cache, key, made))
    return dataclasses.replace(found[0], logp=torch.cat([each.logp for each in found], dim=1))
