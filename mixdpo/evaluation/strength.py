"""Policies between the reference and an expert: parameters reference + strength * (expert - reference).

One trained run gives policies at every KL between 0 and its own. So methods can be compared at equal KL, and a user can
choose how far a policy may go from the reference without training again. At strength 1 the expert is unchanged, at 0
it is the reference.
"""

import contextlib
import math
from collections.abc import Iterator

import torch
from torch import nn

from mixdpo.experts import Adapters, Heads, Models

FACTORS = {"A": Heads, "B": Adapters, "B_0": Adapters}      # the low-rank factors that are 0 in the reference


def strength_for(kl: float, reached: dict[float, float]) -> float | None:
    """A strength whose KL is about this, in nats; None unless the expert itself, at strength 1, is clearly farther from
    the reference. reached: strength -> KL, of strength 1 and of others that were evaluated.

    KL grows with a power of the strength, with its square near the reference: a line in logarithms, through the two
    points with the nearest KL."""
    if kl > 0.8 * reached[1.0]:
        return None
    near = sorted((abs(math.log(kl / own)), math.log(strength), math.log(own))
                  for strength, own in reached.items() if own > 0)
    (_, x, y), power = near[0], 2.0
    if len(near) > 1 and near[1][1] != x:
        power = min(max((near[1][2] - y) / (near[1][1] - x), 1.0), 3.0)     # KL of few prompts is noisy
    return min(math.exp(x + (math.log(kl) - y) / power), 0.99)


@contextlib.contextmanager
def at_strength(experts: Heads | Adapters | Models, references: list, strength: float) -> Iterator[None]:
    """Within it the experts' parameters are at this strength; afterwards they are as before, to the bit.
    references: the run's reference, or that of each expert."""
    moved = [] if strength == 1 else own_directions(experts, references)
    before = [p.detach().clone() for p, _ in moved]
    with torch.no_grad():
        for p, base in moved:
            p.lerp_(base, 1 - strength)
    try:
        yield
    finally:
        with torch.no_grad():
            for (p, _), value in zip(moved, before):
                p.copy_(value)


def own_directions(experts, references: list) -> list[tuple[nn.Parameter, torch.Tensor]]:
    """Every parameter that a run changes, with its value in the reference. Of two factors only the one that starts at 0
    is listed: their product is then linear in the strength."""
    found = []
    states = [dict(model.named_parameters()) | {"lm_head.weight": model.unembedding} for model in references]
    for name, p in experts.named_parameters():
        last = name.rpartition(".")[2]
        if isinstance(experts, FACTORS.get(last, ())):
            found.append((p, torch.zeros_like(p)))
        elif isinstance(experts, Models):
            _, k, own = name.split(".", 2)                                  # models.K.NAME
            found.append((p, states[int(k) % len(states)][own].detach()))
        elif last == "W_k":
            found.append((p, references[0].unembedding.detach().expand_as(p)))
        elif p.requires_grad and last not in ("A", "B", "A_0"):
            found.append((p, states[0][name.removeprefix("trunk.")].detach()))
    return found
