"""Noisy labels: a known share e of all choices is taken to be wrong, at random.

The likelihood of an observed choice is then p = e + (1 - 2e) sigma(h). That is sigma of another margin, so E-steps,
losses and held-out likelihoods stay as they are and take `flipped_margins` in the place of the margins h (M4).
"""

import math

import torch
import torch.nn.functional as F

from mixdpo.dpo import margins


def flipped_margins(h: torch.Tensor, share: float) -> torch.Tensor:
    """The margins h' with sigma(h') = share + (1 - 2 share) sigma(h): (...) -> (...), within
    +-log((1 - share) / share). share: of the choices that are wrong, 0 to below 1/2."""
    if share == 0:
        return h
    floor, kept = h.new_tensor(math.log(share)), math.log1p(-2 * share)
    return torch.logaddexp(floor, kept + F.logsigmoid(h)) - torch.logaddexp(floor, kept + F.logsigmoid(-h))


def noisy_margins(share: float):
    """The `margins` of train.EM for choices of which `share` is wrong."""
    return lambda logp, ref_logp, beta, order: flipped_margins(margins(logp, ref_logp, beta), share)
