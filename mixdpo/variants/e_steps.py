"""E-steps other than the exact one (M12): responsibilities for the M-step, made from the exact posterior log q.

    tempered      q^(1/temperature), normalised
    hard          all on the most likely expert; experts that tie share it equally
    monte-carlo   the shares among S samples of z; their mean is q
    gumbel        softmax((log q + Gumbel noise) / temperature); near hard samples as the temperature falls

q is a constant in the M-step, so the straight-through estimator is monte-carlo with one sample. Noise is for training
only. It belongs to (seed, step, visit), so a step may be cut into micro-batches anywhere.
"""

import numpy as np
import torch
import torch.nn.functional as F

SAMPLED = ("monte-carlo", "gumbel")
VARIANTS = ("exact", "tempered", "hard", *SAMPLED)
TIE = 1e-4      # nats: equal experts differ by the rounding of their log-probs


def vary(
    log_q: torch.Tensor, kind: str, uniform: torch.Tensor | None = None, temperature: float = 1.0
) -> torch.Tensor:
    """The responsibilities that the M-step uses instead of the exact posterior: (...,K) -> (...,K)  (M12).
    uniform: the noise of monte-carlo and gumbel, (S,...,K) in [0, 1); gumbel takes the first of the S."""
    assert kind in VARIANTS, f"E-step variant {kind!r}, want one of {', '.join(VARIANTS)}"
    if kind == "exact":
        return log_q
    if kind == "tempered":
        return torch.log_softmax(log_q / temperature, dim=-1)
    if kind == "hard":
        likeliest = (log_q >= log_q.amax(-1, keepdim=True) - TIE).to(log_q.dtype)           # argmax takes the first
        return (likeliest / likeliest.sum(-1, keepdim=True)).log()
    assert uniform is not None, f"got no uniform noise, want (S,...,K) for E-step variant {kind!r}"
    noisy = log_q.double() - torch.log(-torch.log(uniform.double().clamp(1e-300, 1 - 1e-16)))       # + Gumbel noise
    if kind == "gumbel":
        return torch.log_softmax(noisy[0] / temperature, dim=-1).to(log_q.dtype)
    samples = F.one_hot(noisy.argmax(-1), log_q.shape[-1])                  # (S,...,K): the argmax is a draw from q
    return samples.double().mean(0).log().to(log_q.dtype)


def visit_noise(seed: int, t: int, visits: torch.Tensor, draws: int, experts: int) -> torch.Tensor:
    """Uniform noise of step t for each of some visits (G,): (S,G,K) float64 in [0, 1), S = draws."""
    rows = [np.random.default_rng([seed, 13, t, v]).random((draws, experts)) for v in visits.tolist()]
    return torch.from_numpy(np.stack(rows, axis=1))
