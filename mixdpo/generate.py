"""Sampling from one expert, with a key-value cache, in batches of prompts of any lengths.

A row's randomness is its own: the uniforms of row n come from (seed, n) alone, and a token is drawn by inverting
the cumulative distribution at the row's next uniform. So a prompt gets the same text alone and in a batch
(up to the rounding of the products), and two experts on the same seed are compared on the same noise.
Sampling from the mixture (M13) is a choice of expert per prompt, then this.
Left out: top-k, top-p, beams. They change the policy that is evaluated.
"""

import numpy as np
import torch


@torch.no_grad()
def generate(
    model, prompts: list[list[int]], max_new: int, eos: int, temperature: float = 1.0, seed: int = 0, batch: int = 64,
    unembedding: torch.Tensor | None = None, rows: list[int] | None = None, progress=None,
) -> list[list[int]]:
    """Continuations of `prompts`: lists of new token ids, ending with `eos` where it was produced, else max_new long.

    temperature 0 decodes greedily. unembedding (V,C): an expert's own head on this trunk, default the model's.
    rows: the number from which each prompt's randomness is made, default its place in the list.
    progress(done, total) is called after each batch.
    """
    head = model.unembedding if unembedding is None else unembedding
    rows = list(range(len(prompts))) if rows is None else rows
    assert all(prompts), "an empty prompt has no position to predict from"
    longest = max(map(len, prompts), default=0) + max_new
    assert longest <= model.config.context, \
        f"prompt and continuation take {longest} tokens, the model's context is {model.config.context}"
    order = sorted(range(len(prompts)), key=lambda n: len(prompts[n]))     # similar lengths together: little padding
    out: list[list[int]] = [[] for _ in prompts]
    for start in range(0, len(order), batch):
        part = order[start : start + batch]
        uniforms = None
        if temperature:
            uniforms = np.stack([np.random.default_rng([seed, rows[n]]).random(max_new) for n in part])  # (N,max_new)
        for n, ids in zip(part, decode(model, head, [prompts[n] for n in part], max_new, eos, temperature, uniforms)):
            out[n] = ids
        if progress:
            progress(min(start + batch, len(order)), len(order))
    return out


def decode(model, head, prompts, max_new, eos, temperature, uniforms):
    """One batch: prefill right-padded prompts, then a token a step;
    padded slots lie beyond each row's length and are overwritten."""
    device, lengths = head.device, torch.tensor([len(p) for p in prompts], device=head.device)
    ids = torch.zeros(len(prompts), int(lengths.max()), dtype=torch.int64, device=device)
    for n, prompt in enumerate(prompts):
        ids[n, : len(prompt)] = torch.tensor(prompt)
    cache = model.new_cache(len(prompts), ids.shape[1] + max_new)
    hidden = model(ids, cache)                                              # (N,T,C)
    cache.length.copy_(lengths)
    hidden = hidden[torch.arange(len(prompts), device=device), lengths - 1]  # (N,C) the last true position
    tokens, ended = [], torch.zeros(len(prompts), dtype=torch.bool, device=device)
    for t in range(max_new):
        logits = (hidden.to(head.dtype) @ head.T).float()                   # (N,V)
        u = None if uniforms is None else torch.from_numpy(uniforms[:, t]).to(device)
        token = draw(logits, temperature, u)
        tokens.append(torch.where(ended, eos, token))
        ended |= token == eos
        if ended.all() or t + 1 == max_new:
            break
        hidden = model(token[:, None], cache)[:, 0]                         # (N,C)
    return [until(row, eos) for row in torch.stack(tokens, dim=1).tolist()]


def draw(logits: torch.Tensor, temperature: float, u: torch.Tensor | None) -> torch.Tensor:
    """One token a row: argmax at temperature 0, else the inverse cumulative distribution
    at u (N,) in [0, 1): (N,V) -> (N,)."""
    if not temperature:
        return logits.argmax(-1)
    total = torch.softmax(logits / temperature, dim=-1).cumsum(-1, dtype=torch.float64)     # (N,V)
    drawn = torch.searchsorted(total, (u * total[:, -1])[:, None], right=True).squeeze(-1)      # (N,)
    return drawn.clamp_max(logits.shape[-1] - 1)


def until(ids: list[int], eos: int) -> list[int]:
    """A row up to and including its first end of text."""
    return ids[: ids.index(eos) + 1] if eos in ids else ids


def choose_expert(log_w: torch.Tensor, prompts: int, mode: str, seed: int) -> torch.Tensor:
    """The expert of each prompt (M13): "mixture" draws z ~ w(x), "sparse" takes argmax w(x), an integer k always k.
    (K,) or (B,K) -> (B,) int64."""
    log_w = log_w.expand(prompts, log_w.shape[-1])
    if mode == "sparse":
        return log_w.argmax(-1)                                             # ties go to the first expert
    if mode == "mixture":
        u = torch.from_numpy(np.random.default_rng([seed, 2**31]).random(prompts)).to(log_w.device)
        return draw(log_w, 1.0, u)
    return torch.full((prompts,), int(mode), device=log_w.device)
