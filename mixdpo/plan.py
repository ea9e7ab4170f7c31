"""Who is trained on when: which pairs share one latent z, which are set aside for the E-step, and the groups of a step.

    pairs -> units (a pair alone, or a user's) -> some of each set aside -> visits (a unit, or a slice of one)
          -> visits shuffled into steps -> micro-batches -> chunks, whose logits are in memory together

A context pair is never trained on, whatever the E-step looks at: where it does not look at context, they are left out.
A visit is never cut, neither by a step nor by a micro-batch, and it is a whole unit, so that the E-step that pools a
user's pairs (M11) is exact; but with em = incremental a user's slices are visited apart, and the E-step of one looks up
what the others said when they were visited last (variants/latent.py). There are as many slices as pairs for the E-step.
Within a step, whose sum has no order, visits stand by their longest text: micro-batches then hold little padding.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise

import numpy as np
import torch

from mixdpo.config import InputError
from mixdpo.preferences import Batch, Pair, collate, groups


@dataclass(frozen=True)
class Visit:
    """What a step takes of a unit: all of it, or a slice."""

    unit: int
    trained: list[int]                  # pairs that the M-step sees
    context: list[int]                  # and those for the E-step, if it has some of its own


@dataclass(frozen=True)
class Plan:
    """A run's pairs, the units that share one latent z, and the visits of every optimizer step."""

    pairs: list[Pair]
    units: list[list[int]]              # the pairs of each unit
    visits: list[Visit]
    steps: list[tuple[int, list[int]]]  # epoch and visits of each step
    owner: torch.Tensor | None = None   # (V,) the example of each visit, if examples are clipped one by one

    @cached_property
    def unit_of(self) -> torch.Tensor:
        """(V,) the unit of each visit."""
        return torch.tensor([visit.unit for visit in self.visits])

    @cached_property
    def share(self) -> torch.Tensor:
        """(V,) what a visit is of its unit: 1, or one over the number of slices."""
        return 1 / self.unit_of.bincount()[self.unit_of]

    def pooled(self, loglik: torch.Tensor) -> torch.Tensor:
        """Log-likelihoods summed over each unit's visits, NaN counted as 0: (V,K) -> (U,K)  (M11)."""
        return loglik.new_zeros(len(self.units), loglik.shape[1]).index_add(0, self.unit_of, loglik.nan_to_num(0.0))


@dataclass(frozen=True)
class Micro:
    """Whole visits for one forward pass."""

    train: Batch                        # the pairs that are trained on
    context: Batch | None               # the pairs that only the E-step looks at
    visits: torch.Tensor                # (G,) numbers of the visits
    first: int                          # place of the first in the step
    ends_example: bool = True           # the last of its example, if examples are clipped one by one

    @property
    def places(self) -> slice:
        """The visits' places in the step."""
        return slice(self.first, self.first + len(self.visits))


def make_plan(pairs: list[Pair], config, shuffled=None, schedule=None) -> Plan:
    """All steps of a run (config: train.py's). Raises: InputError naming a user with too few or too many pairs.

    shuffled(pairs, group): the pairs of one user in the order in which they become context; default: by config.seed.
    schedule(visits, pairs, config): (epoch, visits) of each step; default: passes over shuffled visits.
    """
    apart = config.estep == "context"
    pairs = mark_context(pairs, config.context, config.seed, shuffled) if apart else pairs
    units = groups(pairs, config.latent)
    trained = [[i for i in unit if not pairs[i].context] for unit in units]
    if not apart:
        units = trained = sorted(filter(None, trained))
    if not units:
        raise InputError(f"all {len(pairs)} pairs are context pairs; wanted others to train on: mark fewer of them",
                         file=config.data)
    visits = [visit for u, (unit, learns) in enumerate(zip(units, trained))
              for visit in visits_of(u, unit, learns, config.em == "incremental")]
    return Plan(pairs, units, visits, (schedule or passes)(visits, pairs, config))


def passes(visits: list[Visit], pairs: list[Pair], config) -> list[tuple[int, list[int]]]:
    """Every visit once an epoch, in shuffled batches. Within a step, which is a sum, the shortest texts come first."""
    longest = [max(pairs[i].longest() for i in visit.trained) for visit in visits]
    return [(epoch, sorted(ids, key=longest.__getitem__)) for epoch in range(config.epochs)
            for ids in batches([visit.trained for visit in visits], config.batch, config.seed, epoch, pairs)]


def visits_of(u: int, unit: list[int], trained: list[int], sliced: bool) -> list[Visit]:
    """Unit u as one visit; or as many as it has pairs for the E-step, each with its share of the trained ones (M11,
    incremental)."""
    context = sorted(set(unit) - set(trained))
    count = min(len(trained), len(context) or len(trained)) if sliced else 1
    learns, looks = (np.array_split(np.array(part, dtype=int), count) for part in (trained, context))
    return [Visit(u, some.tolist(), others.tolist()) for some, others in zip(learns, looks)]


def mark_context(pairs: list[Pair], count: int, seed: int, shuffled=None) -> list[Pair]:
    """The pairs, with `count` of each user's as context pairs, which the E-step alone looks at: the first of
    shuffled(pairs, group), or of a permutation by `seed`.

    A user for whom the file says context, on any line, is left as the file has it. Raises: InputError unless every
    user then has a context pair, without which its E-step is the prior, and another pair to train on.
    """
    generator, marked = np.random.default_rng(seed), list(pairs)
    shuffled = shuffled or (lambda pairs, group: generator.permutation(group).tolist())
    for group in groups(pairs, "user"):
        drawn = set(shuffled(pairs, group)[:count])
        if all(pairs[i].context is None for i in group):
            for i in group:
                marked[i] = replace(pairs[i], context=i in drawn)
        aside = sum(bool(marked[i].context) for i in group)
        if not 0 < aside < len(group):
            remedy = f"set 1 to {len(group) - 1} aside" if len(group) > 1 else "take that user out"
            raise InputError(f"user {pairs[group[0]].user!r} has {len(group)} pairs, {aside} of them for context; "
                             f"wanted one or more for --context, and one or more to train on: {remedy}",
                             line=pairs[group[0]].line, option="context")
    return marked


def batches(groups: list[list[int]], size: int, seed: int, epoch: int, pairs: Sequence[Pair] = ()) -> list[list[int]]:
    """One epoch as lists of indices into `groups`: whole groups, shuffled by (seed, epoch), none left out.

    A batch holds at most `size` pairs and ends where the next group would not fit, so batches are ragged.
    Raises: InputError if a group is larger than a batch; it names the user if `pairs` is given.
    """
    assert groups and all(groups), f"got {len(groups)} groups, {groups.count([])} of them empty; wanted pairs in each"
    largest = max(range(len(groups)), key=lambda g: len(groups[g]))
    if (needed := len(groups[largest])) > size:
        first = pairs[groups[largest][0]] if pairs else None
        name, line = (f"user {first.user!r}", first.line) if first else (f"group {largest}", None)
        raise InputError(f"{name} has {needed} pairs, and a batch holds {size}; choose --batch {needed} or more, or "
                         "--em incremental, which visits a user in slices", line=line, option="batch")
    out: list[list[int]] = []
    room = 0
    for g in np.random.default_rng([seed, epoch]).permutation(len(groups)).tolist():
        if len(groups[g]) > room:
            out.append([])
            room = size
        out[-1].append(g)
        room -= len(groups[g])
    return out


def micro_batches(plan: Plan, ids: list[int], config) -> list[Micro]:
    """The visits `ids` in runs with about config.micro trained pairs each. No run holds visits of two examples."""
    runs: list[list[int]] = []              # places in `ids`
    size, owner = 0, [0] * len(plan.visits) if plan.owner is None else plan.owner.tolist()
    for place, v in enumerate(ids):
        count = len(plan.visits[v].trained)
        if not runs or size + count > config.micro or owner[v] != owner[ids[runs[-1][-1]]]:
            runs.append([])
            size = 0
        runs[-1].append(place)
        size += count
    ends = [a != b for a, b in pairwise([*(owner[ids[run[0]]] for run in runs), None])]
    out = []
    for run, last in zip(runs, ends):
        visits = [plan.visits[ids[place]] for place in run]
        train = gathered(plan.pairs, [visit.trained for visit in visits])
        context = gathered(plan.pairs, [visit.context for visit in visits]) if visits[0].context else None
        out.append(Micro(train, context, torch.tensor([ids[place] for place in run]), run[0], last))
    return out


def gathered(pairs: list[Pair], groups: list[list[int]]) -> Batch:
    """The pairs of these groups, numbered as they stand here."""
    return collate(pairs, [i for group in groups for i in group], [g for g, group in enumerate(groups) for _ in group])
