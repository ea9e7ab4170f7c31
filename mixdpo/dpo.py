"""Direct Preference Optimization (Rafailov et al. 2023, arXiv 2305.18290) for one expert.

    h    = beta [ (log pi - log pi_ref)(y+ | x) - (log pi - log pi_ref)(y- | x) ]          (M4, the margin)
    log p(y+ > y- | x) = log sigma(h)                                                      (Bradley-Terry)
    loss = - log sigma(h)                                                                  (M8 with K = 1)

The expert's reward is r = beta log(pi / pi_ref) + beta log Z(x) (M3). Z depends on the prompt only, so it cancels in h.
The E-step, the bound and the losses all use `log_likelihood`. To try another likelihood of a choice, change that one
function: the same p must be in all three, or EM does not maximise the bound.

Noisy labels (variants/label_noise.py) are written as other margins, so this function stays. Left out: IPO, which is a
loss and not a likelihood, and length normalisation, which is another margin.
"""

import math

import torch
import torch.nn.functional as F


def margins(logp: torch.Tensor, ref_logp: torch.Tensor, beta: float) -> torch.Tensor:
    """Margins h in nats (M4).

    logp, ref_logp: (..., 2) summed response log-probs in nats, index 0 chosen, 1 rejected;
    they broadcast against each other, so that one reference (B, 1, 2) serves K experts (B, K, 2). Returns (...).
    They must be float32 or float64: in bfloat16 the spacing at 300 nats is 2 nats.
    """
    assert logp.shape[-1] == ref_logp.shape[-1] == 2, \
        f"the last axis is the pair: got {tuple(logp.shape)} and {tuple(ref_logp.shape)}, want (..., 2)"
    assert {logp.dtype, ref_logp.dtype} <= {torch.float32, torch.float64}, \
        f"got {logp.dtype} and {ref_logp.dtype}, want float32 or float64"
    log_ratio = logp - ref_logp                                             # (..., 2)  M3: reward / beta - log Z(x)
    return beta * (log_ratio[..., 0] - log_ratio[..., 1])                   # (...)  M4


def log_likelihood(h: torch.Tensor) -> torch.Tensor:
    """log p(y+ > y- | x) under one expert, log sigma(h), in nats: (...) -> (...)."""
    assert h.dtype in (torch.float32, torch.float64), f"margins are {h.dtype}, want float32 or float64"
    return F.logsigmoid(h)


def log_odds(log_p: torch.Tensor) -> torch.Tensor:
    """The margin of a choice with log-probability log_p < 0 nats: log p - log(1 - p), the inverse of log_likelihood."""
    return log_p - torch.log(-torch.expm1(log_p))


def dpo_loss(h: torch.Tensor) -> torch.Tensor:
    """Loss per pair, -log sigma(h), in nats: (B,) -> (B,); ln 2 if the policy equals the reference."""
    return -log_likelihood(h)                                               # M8, K = 1


def accuracy(h: torch.Tensor) -> torch.Tensor:
    """Accuracy per pair: 1 if h > 0, 0 if h < 0, one half for a tie, NaN if h is NaN. (...) -> (...) float32."""
    return ((1 + torch.sign(h).float()) / 2).masked_fill(h.isnan(), math.nan)           # sign(NaN) is 0


def mixture_accuracy(log_p: torch.Tensor) -> torch.Tensor:
    """Accuracy of a mixture from log p of each choice (M5): 1 if p > 1/2. p = 1/2 up to rounding is a tie: log p is a
    sum of rounded terms, so exactly opposed experts give 1/2 only up to some units in the last place."""
    above = log_p + math.log(2)
    return accuracy(above.masked_fill(above.abs() <= 16 * torch.finfo(log_p.dtype).eps, 0.0))
