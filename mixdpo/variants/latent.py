"""What a step knows of its latents before it looks at their pairs, and what it makes of a posterior.

    log q = posterior (M7, M11)  ->  damped towards the visit before  ->  varied: tempered, hard, sampled (M12)

All rows are visits (plan.py): of a pair, of a user, or of a slice of a user's pairs. With em = incremental every visit
leaves its log-likelihoods, sum_i log sigma(h_ik), in a table; a user's slice then has the prior

    log w_k(u) + the log-likelihoods of the user's other slices at their last visit                 (M11, incremental)

so that its posterior is the user's, of log-likelihoods of which only its own are fresh (Neal & Hinton 1998).
Noise belongs to (seed, step, visit), so a step may be cut anywhere.
"""

from dataclasses import dataclass

import numpy as np
import torch

from mixdpo.gates import Inputs
from mixdpo.mixture import SAMPLED, damp, vary
from mixdpo.plan import Plan


@dataclass(frozen=True)
class Latent:
    """What is known of the latents of G visits before their pairs are looked at."""

    inputs: Inputs                  # (G,...) what the gate looks at
    log_w: torch.Tensor             # (G,K) what it makes of that, detached
    prior: torch.Tensor             # (G,K) the same, plus the log-likelihoods of a user's other slices
    given: torch.Tensor | None = None   # (G,K) log q to take as it is
    loglik: torch.Tensor | None = None  # (G,K) log-likelihoods at the visit before, up to a constant a row, NaN at the
                                        # first; `apply_variant` replaces them by this visit's
    uniform: torch.Tensor | None = None # (S,G,K) noise of the sampled variants: a visit's own, however a step is cut
    weight: torch.Tensor | None = None  # (G,) of the pairs in the experts' loss; None: 1
    share: torch.Tensor | None = None   # (G,) of its unit, in the gate's loss; None: 1

    def __getitem__(self, part: slice) -> "Latent":
        rows = (self.prior, self.given, self.loglik)
        prior, given, loglik = (None if values is None else values[part] for values in rows)
        uniform = None if self.uniform is None else self.uniform[:, part]
        weight, share = (None if values is None else values[part] for values in (self.weight, self.share))
        return Latent(self.inputs[part], self.log_w[part], prior, given, loglik, uniform, weight, share)


@torch.no_grad()
def latent_of(gate, inputs: Inputs, plan: Plan, ids: list[int], given: torch.Tensor | None, loglik: torch.Tensor,
              t: int, config, log_v: torch.Tensor | None = None) -> Latent:
    """Of the visits `ids` at step t. inputs and given are of all units: given holds the responsibilities to use, if
    none of the step's is NaN (all or none). loglik (V,K) is the table of all visits, log_v (U+1,) the log weights of
    the users in the experts' loss."""
    units, device = plan.unit_of[ids], inputs.user.device
    own, uniform, share, kept = inputs[units.to(device)], None, None, None
    if given is not None:
        given = None if given[units].isnan().any() else given[units].to(device)
    prior = log_w = gate(own)                                               # (G,K)
    if config.variant in SAMPLED:
        drawn = np.random.default_rng([config.seed, 13, t]).random((config.draws, *log_w.shape))
        uniform = torch.from_numpy(drawn).to(device)
    if config.em == "incremental":
        kept = loglik[ids].to(device)
        others = (pooled(loglik, plan)[units] - loglik[ids].nan_to_num(0.0)).to(device)       # 0 if a visit is a unit
        prior = torch.log_softmax(log_w + others, dim=-1)                   # (G,K)  M11
        share = (1 / plan.unit_of.bincount()[units]).to(device)
    weight = None if log_v is None else log_v.exp()[own.user]
    return Latent(own, log_w, prior, given, kept, uniform, weight, share)


def pooled(loglik: torch.Tensor, plan: Plan) -> torch.Tensor:
    """The log-likelihoods of each unit, summed over its visits; 0 for a visit that is still to come: (V,K) -> (U,K)."""
    return loglik.new_zeros(len(plan.units), loglik.shape[1]).index_add(0, plan.unit_of, loglik.nan_to_num(0.0))


def apply_variant(log_q: torch.Tensor, latent: Latent, config) -> torch.Tensor:
    """The responsibilities that the M-step uses, from the exact ones under latent.prior: (G,K) -> (G,K)  (M12)."""
    if latent.loglik is not None:
        now = (log_q - latent.prior).nan_to_num(0.0)                        # (G,K)  -inf - -inf: of weight 0
        latent.loglik.copy_(damp(now, latent.loglik, config.damping))
        log_q = torch.log_softmax(latent.prior + latent.loglik, dim=-1)
    return vary(log_q, config.variant, latent.uniform, config.variant_temperature)
