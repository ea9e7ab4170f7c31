"""Sampling from one expert or from the mixture, with a key-value cache, in batches of prompts of any lengths.

There are two samplers of the mixture. Both have the same distribution over texts (M13, M14):

    sequence by sequence    z ~ w(x), then the full text from expert z: `choose_expert`, then `generate`
    token by token          y_t ~ sum_k w_k(x, y_<t) pi_k(y_t | x, y_<t): `generate_tokenwise`, where
                            w_k(x, y_<t) is proportional to w_k(x) prod_{s<t} pi_k(y_s | x, y_<s)

The second sampler runs all experts for every token and draws no z. Without the product, that is with w(x) at every
token, its distribution would be another one.

At temperature tau > 0 each pi_k(. | prefix) is replaced by pi_k(. | prefix)^(1/tau), normalised, in the product too, so
the samplers agree at any tau. At temperature 0 the most likely token of the mixture at temperature 1 is taken.

The random numbers of row n depend on (seed, n) alone: a token is drawn by inverting the cumulative distribution at the
row's next uniform number. So a prompt gets the same text alone and in a batch, up to the rounding of the products, and
two experts with the same seed are compared on the same random numbers.
Left out: top-k, top-p and beam search, which change the policy that is evaluated.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from mixdpo.mixture import mixture_logp, require_precise

BLOCK = 256     # tokens of the vocabulary whose probabilities are first summed together
CACHE = {"cpu": 2**30, "cuda": 2**32}   # bytes of keys and values of the rows decoded together


@dataclass(frozen=True)
class Sampling:
    """How completions are sampled."""

    max_new: int                # new tokens, at most
    eos: int                    # the token that ends a completion
    temperature: float = 1.0    # 0: greedy
    seed: int = 0
    batch: int = 64             # rows decoded together


def rows_at_once(model, tokens: int) -> int:
    """How many rows of so many tokens have keys and values that fit into CACHE; at least one. The more rows, the less
    often the weights are read."""
    one = model.new_cache(1, min(tokens, model.config.context))
    return max(CACHE[model.unembedding.device.type] // (one.keys.nbytes + one.values.nbytes), 1)


@torch.no_grad()
def generate(model, prompts: list[list[int]], sampling: Sampling, unembedding: torch.Tensor | None = None,
             rows: list[int] | None = None, progress=None) -> list[list[int]]:
    """Completions of `prompts` by one expert: its trunk `model` and its unembedding (V,C), by default the model's.
    The other arguments and the result are as in `generate_tokenwise`."""
    head = model.unembedding if unembedding is None else unembedding

    def chooser(part):
        return lambda last, u: draw((last[model].to(head.dtype) @ head.T).float(), sampling.temperature, u)

    return in_batches([model], prompts, chooser, sampling, rows, progress)


@torch.no_grad()
def generate_heads(model, heads: list[torch.Tensor], prompts: list[list[int]], sampling: Sampling,
                   rows: Sequence[int] | None = None, progress=None) -> tuple[list[list[list[int]]], torch.Tensor]:
    """Completions of all N prompts by each of K heads (V,C) on one trunk: K lists of N lists of token ids, and the
    log-prob with which each was sampled, (K,N) float32 nats. rows, progress: as in `generate_tokenwise`.

    The texts equal [generate(model, prompts, sampling, head) for head in heads]. All heads are decoded in one pass of
    the trunk. At temperature 0 the log-probs are those of temperature 1.
    """
    N, K = len(prompts), len(heads)
    expert = torch.arange(K).repeat_interleave(N)                           # (K N,)
    logp = torch.zeros(K * N, sampling.max_new)                             # of each token

    def chooser(part):
        step = itertools.count()
        places = [(expert[part] == k).nonzero().squeeze(1).to(head.device) for k, head in enumerate(heads)]

        def choose(last, u):
            states = last[model]                                            # (rows,C)
            logits = states.new_empty(len(part), len(heads[0]), dtype=torch.float32)
            for own, head in zip(places, heads):
                logits[own] = (states[own].to(head.dtype) @ head.T).float() / (sampling.temperature or 1.0)
            token = draw(logits, 1.0 if sampling.temperature else 0.0, u)
            logp[part, next(step)] = (logits.gather(1, token[:, None])[:, 0] - logits.logsumexp(-1)).cpu()
            return token

        return choose

    ids = in_batches([model], prompts * K, chooser, sampling, [*(range(N) if rows is None else rows)] * K, progress)
    inside = torch.arange(sampling.max_new) < torch.tensor([[len(row)] for row in ids])     # not after its end
    return [ids[k * N : (k + 1) * N] for k in range(K)], (logp * inside).sum(1).view(K, N)


@torch.no_grad()
def generate_tokenwise(policies: list[tuple[torch.nn.Module, torch.Tensor]], log_w: torch.Tensor,
                       prompts: list[list[int]], sampling: Sampling, rows: list[int] | None = None, progress=None
                       ) -> list[list[int]]:
    """Completions of `prompts` by the mixture, token by token (M13, M14): for each prompt a list of new token ids. The
    list ends with sampling.eos, or has sampling.max_new tokens.

    policies: K experts as (model, unembedding (V,C)), from experts.policy; a model that several experts share runs
    once a token. log_w: (K,) or (N,K) for N prompts, nats, normalised here; -inf excludes an expert.
    rows: the number of each prompt that its random numbers depend on, by default its place in the list.
    progress: progress(done, total) is called after each batch.
    Raises: AssertionError if a prompt is empty, if a text is longer than a model's context, or if log_w has the wrong
    shape, low precision, or no expert for a prompt.
    """
    N, K = len(prompts), len(policies)
    assert log_w.shape in ((K,), (N, K)), f"got log_w {tuple(log_w.shape)}, want ({K},) or ({N}, {K})"
    require_precise(log_w)
    log_w = torch.log_softmax(log_w.to(policies[0][1].device).double(), dim=-1).expand(N, K)
    assert not log_w.isnan().any(), "log_w holds NaN, or gives every expert of a prompt weight 0"

    def chooser(part):
        weights = log_w[part]                                               # (rows,K), updated after each token

        def choose(last, u):
            nonlocal weights
            logits = [(last[model].to(head.dtype) @ head.T).float() for model, head in policies]    # K of (rows,V)
            token, weights = next_token(logits, weights, sampling.temperature, u)
            return token

        return choose

    models = list(dict.fromkeys(model for model, _ in policies))            # each shared trunk once
    return in_batches(models, prompts, chooser, sampling, rows, progress)


def in_batches(models, prompts, chooser, sampling: Sampling, rows, progress) -> list[list[int]]:
    """Completes the prompts in batches. chooser(part) gets the numbers of a batch's prompts and returns a function
    (model -> last states (N,C), uniforms (N,) or None) -> tokens (N,)."""
    rows, N, max_new = list(range(len(prompts))) if rows is None else rows, len(prompts), sampling.max_new
    assert all(prompts), "an empty prompt has no position to predict from"
    longest, context = max(map(len, prompts), default=0) + max_new, min(model.config.context for model in models)
    assert longest <= context, f"prompt and continuation take {longest} tokens, the model's context is {context}"
    order = sorted(range(N), key=lambda n: (len(prompts[n]), prompts[n]))   # little padding; equal prompts adjacent
    out: list[list[int]] = [[] for _ in prompts]
    for start in range(0, N, sampling.batch):
        part = order[start : start + sampling.batch]
        uniforms = None
        if sampling.temperature:
            random = (np.random.default_rng([sampling.seed, rows[n]]).random(max_new) for n in part)
            uniforms = np.stack(list(random))                               # (rows,max_new)
        texts = decode(models, [prompts[n] for n in part], chooser(part), sampling, uniforms)
        for n, ids in zip(part, texts):
            out[n] = ids
        if progress:
            progress(min(start + sampling.batch, N), N)
    return out


def decode(models, prompts, choose, sampling: Sampling, uniforms) -> list[list[int]]:
    """One batch. First each different prompt runs once, padded on the right; then all rows advance one token a step.
    Padded slots of the cache lie beyond a row's length and are overwritten."""
    device, eos = models[0].unembedding.device, sampling.eos
    place: dict[tuple[int, ...], int] = {}                                  # prompt -> its row
    row = torch.tensor([place.setdefault(tuple(p), len(place)) for p in prompts], device=device)    # (N,) of U prompts
    lengths = torch.tensor([len(p) for p in place], device=device)          # (U,)
    ids = torch.zeros(len(place), max(map(len, place)), dtype=torch.int64, device=device)
    for u, prompt in enumerate(place):
        ids[u, : len(prompt)] = torch.tensor(prompt)
    caches, last = {}, {}                                                   # of each model
    for model in models:
        cache = model.new_cache(*ids.shape)
        hidden = model(ids, cache)                                          # (U,T,C)
        cache.length.copy_(lengths)
        caches[model] = cache.copies(row, ids.shape[1] + sampling.max_new)
        last[model] = hidden[row, lengths[row] - 1]                         # (N,C) at the last prompt token
    tokens, ended = [], torch.zeros(len(prompts), dtype=torch.bool, device=device)
    for t in range(sampling.max_new):
        token = choose(last, None if uniforms is None else torch.from_numpy(uniforms[:, t]).to(device))
        tokens.append(torch.where(ended, eos, token))
        ended |= token == eos
        if ended.all() or t + 1 == sampling.max_new:
            break
        last = {model: model(token[:, None], cache)[:, 0] for model, cache in caches.items()}   # (N,C) each
    return [until(row, eos) for row in torch.stack(tokens, dim=1).tolist()]


def next_token(logits: list[torch.Tensor], log_w: torch.Tensor, temperature: float, u: torch.Tensor | None):
    """A token from sum_k w_k(prefix) pi_k(. | prefix), and the weights after it: K of (N,V), (N,K), (N,)
    -> (N,), (N,K).

    mixture.prefix_log_weights one token at a time (M14): log w_k + log pi_k(token), normalised over k.
    """
    if len(logits) == 1:
        return draw(logits[0], temperature, u), log_w                       # same distribution, without log-softmax
    logps = torch.log_softmax(torch.stack(logits) / (temperature or 1.0), dim=-1).movedim(0, -1)    # (N,V,K)
    token = draw(mixture_logp(log_w[:, None], logps), 1.0 if temperature else 0.0, u)               # (N,)
    chosen = logps[torch.arange(len(token), device=token.device), token]    # (N,K)
    return token, torch.log_softmax(log_w + chosen, dim=-1)                 # M14


def draw(logits: torch.Tensor, temperature: float, u: torch.Tensor | None) -> torch.Tensor:
    """One token a row, (N,V) -> (N,): argmax at temperature 0, else the inverse of the cumulative distribution at u
    (N,) in [0, 1). Sums are float64. Blocks of the vocabulary are summed first; only the block that u falls into is
    summed token by token."""
    if not temperature:
        return logits.argmax(-1)
    assert u is not None, "got no random numbers u, want (N,) at a temperature above 0"
    p = torch.softmax(logits if temperature == 1 else logits / temperature, dim=-1)
    blocks = F.pad(p, (0, -p.shape[-1] % BLOCK)).unflatten(-1, (-1, BLOCK))                 # (N,V/BLOCK,BLOCK)
    total = blocks.sum(-1).cumsum(-1, dtype=torch.float64)                  # (N,V/BLOCK)
    block, rest = first_above(total, u * total[:, -1])
    within = blocks[torch.arange(len(u), device=u.device), block].cumsum(-1, dtype=torch.float64)   # (N,BLOCK)
    return block * BLOCK + first_above(within, rest)[0]


def first_above(total: torch.Tensor, point: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The first place of each row's cumulative sums (N,M) that is above its point (N,), and the distance of the point
    from the sum before that place. A place that adds nothing is never returned: a point that rounding put at the end
    of the row is moved below it."""
    point = torch.minimum(point, torch.nextafter(total[:, -1], torch.zeros_like(point)))
    place = torch.searchsorted(total, point[:, None], right=True)           # (N,1)
    return place.squeeze(1), point - F.pad(total, (1, 0)).gather(1, place).squeeze(1)


def until(ids: list[int], eos: int) -> list[int]:
    """A row up to and including its first end of text."""
    return ids[: ids.index(eos) + 1] if eos in ids else ids


def choose_expert(log_w: torch.Tensor, prompts: int, mode: str, seed: int) -> torch.Tensor:
    """The expert of each prompt (M13): "mixture" draws z ~ w(x), "sparse" takes argmax w(x), an integer k takes k.
    (K,) or (B,K) -> (B,) int64."""
    log_w = log_w.expand(prompts, log_w.shape[-1])
    if mode == "sparse":
        return log_w.argmax(-1)                                             # the first of equal experts
    if mode == "mixture":
        u = torch.from_numpy(np.random.default_rng([seed, 2**31]).random(prompts)).to(log_w.device)
        return draw(log_w, 1.0, u)
    return torch.full((prompts,), int(mode), device=log_w.device)
