"""What a step knows of its latents before it looks at their pairs, and what it makes of a posterior.

    log q = posterior (M7, M11)  ->  varied: tempered, hard, sampled (M12)  ->  damped towards the visit before

All rows are groups: a pair, or a user. Noise belongs to (seed, step, group), so a step may be cut anywhere.
"""

from dataclasses import dataclass

import numpy as np
import torch

from mixdpo.gates import Inputs
from mixdpo.mixture import SAMPLED, damp, vary


@dataclass(frozen=True)
class Latent:
    """What is known of the latent of G groups before their pairs are looked at."""

    inputs: Inputs                  # (G,...) what the gate looks at
    log_w: torch.Tensor             # (G,K) what it makes of that, detached
    given: torch.Tensor | None      # (G,K) log q to take as it is
    kept: torch.Tensor | None       # (G,K) log q of the visit before, NaN at the first; only damping looks at it
    uniform: torch.Tensor | None    # (S,G,K) noise of the sampled variants: a group's own, however a step is cut
    weight: torch.Tensor | None = None  # (G,) of the pairs in the experts' loss; None: 1

    def __getitem__(self, part: slice) -> "Latent":
        rows = self.given, self.kept, self.weight
        given, kept, weight = (None if values is None else values[part] for values in rows)
        uniform = None if self.uniform is None else self.uniform[:, part]
        return Latent(self.inputs[part], self.log_w[part], given, kept, uniform, weight)


@torch.no_grad()
def latent_of(gate, inputs: Inputs, ids: list[int], given: torch.Tensor | None, table: torch.Tensor, t: int,
              config, log_v: torch.Tensor | None = None) -> Latent:
    """Of the groups `ids` at step t. inputs, table and given are of all groups: table holds the responsibilities of
    each one's visit before, given those to use, if none of the step's is NaN (all or none). log_v (U+1,): log weights
    of the users in the experts' loss."""
    own, device, uniform = inputs[ids], inputs.user.device, None
    if given is not None:
        given = None if given[ids].isnan().any() else given[ids].to(device)
    log_w = gate(own)                                                       # (G,K)
    if config.variant in SAMPLED:
        drawn = np.random.default_rng([config.seed, 13, t]).random((config.draws, *log_w.shape))
        uniform = torch.from_numpy(drawn).to(device)
    kept = table[ids].to(device) if config.damping else None
    return Latent(own, log_w, given, kept, uniform, None if log_v is None else log_v.exp()[own.user])


def settle(log_q: torch.Tensor, latent: Latent, config) -> torch.Tensor:
    """The responsibilities that the M-step uses, from the exact ones: (G,K) -> (G,K)  (M12)."""
    log_q = vary(log_q, config.variant, latent.uniform, config.variant_temperature)
    return damp(log_q, latent.kept, config.damping) if config.damping else log_q
