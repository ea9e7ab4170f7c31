"""Sampling from one expert or from the mixture, with a key-value cache, in batches of prompts of any lengths.

The mixture has one law and two samplers (M13, M14):

    sequence by sequence    z ~ w(x), then the whole text from expert z: `choose_expert`, then `generate`
    token by token          y_t ~ sum_k w_k(x, y_<t) pi_k(y_t | x, y_<t): `generate_tokenwise`
                            w_k(x, y_<t) proportional to w_k(x) prod_{s<t} pi_k(y_s | x, y_<s)

The second runs all experts for every token and draws no z. With w(x) at every token, the product left out, its law
is another.
Temperature tau > 0 puts pi_k(. | prefix)^(1/tau), normalised, for every expert's pi_k(. | prefix), in the product too:
the samplers agree at any tau. Temperature 0 takes the likeliest token of the mixture at temperature 1.

A row's randomness is its own: the uniforms of row n come from (seed, n) alone, and a token is drawn by inverting
the cumulative distribution at the row's next uniform. So a prompt gets the same text alone and in a batch
(up to the rounding of the products), and two experts on the same seed are compared on the same noise.
Left out: top-k, top-p, beams. They change the policy that is evaluated.
"""

import numpy as np
import torch

from mixdpo.mixture import mixture_logp, require_precise


def generate(
    model, prompts: list[list[int]], max_new: int, eos: int, temperature: float = 1.0, seed: int = 0, batch: int = 64,
    unembedding: torch.Tensor | None = None, rows: list[int] | None = None, progress=None,
) -> list[list[int]]:
    """One expert's continuations of `prompts`. unembedding (V,C): its own head on this trunk, default the model's.
    The rest is as in `generate_tokenwise`, of which this is the case K = 1."""
    head = model.unembedding if unembedding is None else unembedding
    return generate_tokenwise([(model, head)], torch.zeros(1), prompts, max_new, eos, temperature, seed, batch, rows,
                              progress)


@torch.no_grad()
def generate_tokenwise(
    policies: list[tuple[torch.nn.Module, torch.Tensor]], log_w: torch.Tensor, prompts: list[list[int]], max_new: int,
    eos: int, temperature: float = 1.0, seed: int = 0, batch: int = 64, rows: list[int] | None = None, progress=None,
) -> list[list[int]]:
    """Continuations of `prompts` by the mixture, token by token (M13, M14): lists of new token ids, ending with `eos`
    where it was produced, else max_new long.

    policies: K experts as (model, unembedding (V,C)), from experts.policy; a model that several experts share runs
    once a token. log_w: (K,) or (N,K) for N prompts, nats, normalised here; -inf leaves an expert out.
    temperature 0 decodes greedily.
    rows: the number from which each prompt's randomness is made, default its place in the list.
    progress(done, total) is called after each batch.
    Raises: AssertionError for an empty prompt, a text longer than a model's context, weights of another shape,
    in low precision, or with no expert for a prompt.
    """
    rows = list(range(len(prompts))) if rows is None else rows
    assert all(prompts), "an empty prompt has no position to predict from"
    longest = max(map(len, prompts), default=0) + max_new
    context = min(model.config.context for model, _ in policies)
    assert longest <= context, f"prompt and continuation take {longest} tokens, the model's context is {context}"
    N, K = len(prompts), len(policies)
    assert log_w.shape in ((K,), (N, K)), f"got log_w {tuple(log_w.shape)}, want ({K},) or ({N}, {K})"
    require_precise(log_w)
    log_w = torch.log_softmax(log_w.to(policies[0][1].device).double(), dim=-1).expand(N, K)
    assert not log_w.isnan().any(), "log_w holds NaN, or gives every expert of a prompt weight 0"
    order = sorted(range(N), key=lambda n: len(prompts[n]))                 # similar lengths together: little padding
    out: list[list[int]] = [[] for _ in prompts]
    for start in range(0, N, batch):
        part = order[start : start + batch]
        uniforms = None
        if temperature:
            uniforms = np.stack([np.random.default_rng([seed, rows[n]]).random(max_new) for n in part])  # (N,max_new)
        texts = decode(policies, log_w[part], [prompts[n] for n in part], max_new, eos, temperature, uniforms)
        for n, ids in zip(part, texts):
            out[n] = ids
        if progress:
            progress(min(start + batch, N), N)
    return out


def decode(policies, log_w, prompts, max_new, eos, temperature, uniforms):
    """One batch: prefill right-padded prompts, then a token a step;
    padded slots lie beyond each row's length and are overwritten."""
    device = policies[0][1].device
    lengths = torch.tensor([len(p) for p in prompts], device=device)        # (N,)
    ids = torch.zeros(len(prompts), int(lengths.max()), dtype=torch.int64, device=device)
    for n, prompt in enumerate(prompts):
        ids[n, : len(prompt)] = torch.tensor(prompt)
    caches, last = {}, {}                                                   # by model: a shared trunk has one of each
    for model in dict.fromkeys(model for model, _ in policies):
        caches[model] = model.new_cache(len(prompts), ids.shape[1] + max_new)
        hidden = model(ids, caches[model])                                  # (N,T,C)
        caches[model].length.copy_(lengths)
        last[model] = hidden[torch.arange(len(prompts), device=device), lengths - 1]    # (N,C) the last true position
    tokens, ended = [], torch.zeros(len(prompts), dtype=torch.bool, device=device)
    for t in range(max_new):
        logits = [(last[model].to(head.dtype) @ head.T).float() for model, head in policies]    # K of (N,V)
        u = None if uniforms is None else torch.from_numpy(uniforms[:, t]).to(device)
        token, log_w = next_token(logits, log_w, temperature, u)
        tokens.append(torch.where(ended, eos, token))
        ended |= token == eos
        if ended.all() or t + 1 == max_new:
            break
        last = {model: model(token[:, None], cache)[:, 0] for model, cache in caches.items()}   # (N,C) each
    return [until(row, eos) for row in torch.stack(tokens, dim=1).tolist()]


def next_token(logits: list[torch.Tensor], log_w: torch.Tensor, temperature: float, u: torch.Tensor | None):
    """A token from sum_k w_k(prefix) pi_k(. | prefix), and the weights after it: K of (N,V), (N,K), (N,)
    -> (N,), (N,K).

    mixture.prefix_log_weights one token at a time (M14): log w_k + log pi_k(token), normalised over k.
    """
    if len(logits) == 1:
        return draw(logits[0], temperature, u), log_w                       # the same without its rounding
    logps = torch.log_softmax(torch.stack(logits) / (temperature or 1.0), dim=-1).movedim(0, -1)    # (N,V,K)
    token = draw(mixture_logp(log_w[:, None], logps), 1.0 if temperature else 0.0, u)               # (N,)
    taken = logps[torch.arange(len(token), device=token.device), token]     # (N,K)
    return token, torch.log_softmax(log_w + taken, dim=-1)                  # M14


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
