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
import torch.nn.functional as F

from mixdpo.mixture import mixture_logp, require_precise

RUN = 256       # tokens summed together at first


@torch.no_grad()
def generate(
    model, prompts: list[list[int]], max_new: int, eos: int, temperature: float = 1.0, seed: int = 0, batch: int = 64,
    unembedding: torch.Tensor | list[torch.Tensor] | None = None, rows: list[int] | None = None, progress=None,
    expert: list[int] | None = None,
) -> list[list[int]]:
    """One expert's continuations of `prompts`. unembedding (V,C): its own head on this trunk, default the model's. Or
    K heads, and `expert` (N), the one that continues each prompt: heads of one trunk decode together, in one pass.
    The rest is as in `generate_tokenwise`."""
    heads = [model.unembedding if unembedding is None else unembedding] if expert is None else unembedding
    of = torch.zeros(len(prompts), dtype=torch.int64) if expert is None else torch.tensor(expert)

    def chooser(part):
        mine = [(of[part] == k).nonzero().squeeze(1).to(head.device) for k, head in enumerate(heads)]

        def choose(last, u):
            states = last[model]                                            # (N,C)
            logits = states.new_empty(len(part), len(heads[0]), dtype=torch.float32)
            for own, head in zip(mine, heads):
                logits[own] = (states[own].to(head.dtype) @ head.T).float()
            return draw(logits, temperature, u)

        return choose

    return in_batches([model], prompts, chooser, max_new, eos, temperature, seed, batch, rows, progress)


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
    N, K = len(prompts), len(policies)
    assert log_w.shape in ((K,), (N, K)), f"got log_w {tuple(log_w.shape)}, want ({K},) or ({N}, {K})"
    require_precise(log_w)
    log_w = torch.log_softmax(log_w.to(policies[0][1].device).double(), dim=-1).expand(N, K)
    assert not log_w.isnan().any(), "log_w holds NaN, or gives every expert of a prompt weight 0"

    def chooser(part):
        weights = log_w[part]                                               # (N,K), those of each prefix from here on

        def choose(last, u):
            nonlocal weights
            logits = [(last[model].to(head.dtype) @ head.T).float() for model, head in policies]    # K of (N,V)
            token, weights = next_token(logits, weights, temperature, u)
            return token

        return choose

    models = list(dict.fromkeys(model for model, _ in policies))            # a trunk that experts share, once
    return in_batches(models, prompts, chooser, max_new, eos, temperature, seed, batch, rows, progress)


def in_batches(models, prompts, chooser, max_new, eos, temperature, seed, batch, rows, progress) -> list[list[int]]:
    """Continues the prompts some at a time. chooser(part): for the prompts of these numbers, a function
    (model -> last states (N,C), uniforms (N,) or None) -> tokens (N,)."""
    rows, N = list(range(len(prompts))) if rows is None else rows, len(prompts)
    assert all(prompts), "an empty prompt has no position to predict from"
    longest, context = max(map(len, prompts), default=0) + max_new, min(model.config.context for model in models)
    assert longest <= context, f"prompt and continuation take {longest} tokens, the model's context is {context}"
    order = sorted(range(N), key=lambda n: (len(prompts[n]), prompts[n]))   # little padding, and equal ones together
    out: list[list[int]] = [[] for _ in prompts]
    for start in range(0, N, batch):
        part = order[start : start + batch]
        uniforms = None
        if temperature:
            uniforms = np.stack([np.random.default_rng([seed, rows[n]]).random(max_new) for n in part])  # (N,max_new)
        texts = decode(models, [prompts[n] for n in part], chooser(part), max_new, eos, uniforms)
        for n, ids in zip(part, texts):
            out[n] = ids
        if progress:
            progress(min(start + batch, N), N)
    return out


def decode(models, prompts, choose, max_new, eos, uniforms):
    """One batch: prefill right-padded prompts, each once however often it is asked for, then a token a step;
    padded slots lie beyond each row's length and are overwritten."""
    device, place = models[0].unembedding.device, {}
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
        caches[model] = cache.copies(row, ids.shape[1] + max_new)
        last[model] = hidden[row, lengths[row] - 1]                         # (N,C) the last true position
    tokens, ended = [], torch.zeros(len(prompts), dtype=torch.bool, device=device)
    for t in range(max_new):
        token = choose(last, None if uniforms is None else torch.from_numpy(uniforms[:, t]).to(device))
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
    """One token a row: argmax at temperature 0, else the inverse cumulative distribution at u (N,) in [0, 1):
    (N,V) -> (N,). Sums are float64; of the vocabulary only the run of tokens that u falls into is summed one by one."""
    if not temperature:
        return logits.argmax(-1)
    p = torch.softmax(logits if temperature == 1 else logits / temperature, dim=-1)
    runs = F.pad(p, (0, -p.shape[-1] % RUN)).unflatten(-1, (-1, RUN))       # (N,V/RUN,RUN)
    total = runs.sum(-1).cumsum(-1, dtype=torch.float64)                    # (N,V/RUN)
    run, rest = first_above(total, u * total[:, -1])
    own = runs[torch.arange(len(u), device=u.device), run].cumsum(-1, dtype=torch.float64)      # (N,RUN)
    return run * RUN + first_above(own, rest)[0]


def first_above(total: torch.Tensor, point: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The first place of each row's cumulative sums (N,M) that is above its point (N,), and how far the point is from
    the place before. Never a place that adds nothing: a point that rounding put at the end of all is moved below it."""
    point = torch.minimum(point, torch.nextafter(total[:, -1], torch.zeros_like(point)))
    place = torch.searchsorted(total, point[:, None], right=True)           # (N,1)
    return place.squeeze(1), point - F.pad(total, (1, 0)).gather(1, place).squeeze(1)


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
