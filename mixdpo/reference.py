"""The frozen reference policy's view of the data: log-probs and features of every pair,
computed once, cached on disk by content.

The log-probs come from the same functions, in the same dtype, as the policy's (experts.pair_logp's steps).
The features are the mean hidden states over each response, what the linear start (linear.py) looks at.
The cache key is a hash of the weights, the data, the tokenizer, the lengths, the dtype and the device:
another model or file can never be answered with these numbers.
"""

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from mixdpo.experts import Heads
from mixdpo.logprob import sum_responses
from mixdpo.preferences import Pair, collate, data_key, response_positions
from mixdpo.rundir import Progress
from mixdpo.weights import content_key


@dataclass(frozen=True)
class Reference:
    logp: torch.Tensor      # (P,2) float32 nats
    features: torch.Tensor  # (P,2,C) float32


@torch.no_grad()
def compute_reference(model, pairs: list[Pair], dtype: torch.dtype, size: int = 16, progress=None) -> Reference:
    """One pass over the pairs in file order, `size` pairs a batch, on the model's device; results on the CPU."""
    policy, device = Heads(model, 1, dtype=dtype), model.unembedding.device
    logps, features = [], []
    for start in range(0, len(pairs), size):
        batch = collate(pairs, range(start, min(start + size, len(pairs))), "pair").to(device)
        where, targets, sequence = response_positions(batch)
        hidden = policy.hidden(batch.ids.flatten(0, 1))                     # (2B,T,C)
        of_tokens = policy.token_logps(policy.rows(hidden, where), targets, 4096)           # (1,M)
        logps.append(sum_responses(of_tokens, sequence, len(batch.ids))[:, 0])
        read = policy.rows(hidden, where + 1).float()           # (M,C) states that have read each response token
        count = torch.bincount(sequence, minlength=2 * len(batch.ids)).clamp_min(1)
        mean = read.new_zeros(2 * len(batch.ids), read.shape[1]).index_add(0, sequence, read) / count[:, None]
        features.append(mean.view(len(batch.ids), 2, -1))
        if progress:
            progress(min(start + size, len(pairs)), len(pairs))
    return Reference(torch.cat(logps).cpu(), torch.cat(features).cpu())


def cached_reference(folder: Path, key: tuple, compute) -> Reference:
    """The reference for `key` (any tuple of strings and numbers that names its content),
    from `folder` or from compute()."""
    name = hashlib.sha256(repr(key).encode()).hexdigest()
    path = Path(folder) / f"{name}.safetensors"
    if not path.exists():
        made = compute()
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}.partial")
        save_file({"logp": made.logp, "features": made.features}, partial)
        os.replace(partial, path)                                           # whole or not at all
    return Reference(**load_file(path))


def reference_of(path, pairs: list[Pair], model, tokenizer, config, dtype: torch.dtype, folder: Path) -> Reference:
    """The reference of the pairs that were read from `path` with config's max_prompt, max_response and drop."""
    key = (content_key(model), data_key(path), tokenizer.key, config.max_prompt, config.max_response, config.drop,
           str(dtype), str(model.unembedding.device))
    progress = Progress(f"reference, {Path(path).stem}")
    return cached_reference(folder, key, lambda: compute_reference(model, pairs, dtype, progress=progress))
