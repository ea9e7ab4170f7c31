"""The plan of a run: which pairs share one latent z, which are context pairs, and which make up each step.

    pairs -> units (one pair, or all pairs of a user) -> context pairs of each unit -> visits (a unit, or a slice of it)
          -> visits shuffled into steps -> micro-batches -> chunks whose logits are in memory at the same time

Context pairs are for the E-step: language models memorise the pairs that they are trained on, and responsibilities of
these pairs then say nothing. Once all passes over the other pairs are done, the responsibilities are final, and a last
part of the run trains on the context pairs with them, as often as on the others. So a mixture learns from as many pairs
as DPO does. Without --estep context they are pairs like all others. A visit is never divided between steps or
micro-batches. It is a complete unit, so the E-step that pools a user's pairs (M11) is exact. Exceptions: with em =
incremental a visit is a slice of a user (variants/incremental.py), and in the last part it is a pair. Within a step,
visits are sorted by their longest text, so that micro-batches have little padding; the order does not change the sum.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise

import numpy as np
import torch

from mixdpo.config import InputError
from mixdpo.preferences import Batch, Pair, collate, groups


@dataclass(frozen=True)
class Visit:
    """A unit, or a slice of a unit, in one step."""

    unit: int
    trained: list[int]                  # pairs of the M-step, and of the E-step if there are no context pairs
    context: list[int]                  # context pairs, which the E-step reads instead


@dataclass(frozen=True)
class Plan:
    """A run's pairs, the units that share one latent z, and the visits of every optimizer step. Visits from number
    len(visits) - closing on are those of the last part of the run, which trains on the context pairs."""

    pairs: list[Pair]
    units: list[list[int]]              # the pairs of each unit
    visits: list[Visit]
    steps: list[tuple[int, list[int]]]  # epoch and visits of each step
    owner: torch.Tensor | None = None   # (V,) the example (DP-SGD) of each visit
    closing: int = 0                    # number of visits whose responsibilities are final: of context pairs
    parts: Callable = lambda ids: [0] * len(ids)        # the part of the step that each of its visits belongs to

    @cached_property
    def unit_of(self) -> torch.Tensor:
        """(V,) the unit of each visit."""
        return torch.tensor([visit.unit for visit in self.visits])

    @cached_property
    def share(self) -> torch.Tensor:
        """(V,) each visit's fraction of its unit, in each part of the run: 1, or one over the number of slices."""
        place = self.unit_of + len(self.units) * (torch.arange(len(self.visits)) >= self.inferred)
        return 1 / place.bincount()[place]

    @property
    def inferred(self) -> int:
        """E: the number of visits with an E-step, which come first in `visits`."""
        return len(self.visits) - self.closing

    @cached_property
    def last_part(self) -> int:
        """The number of steps before the last part, which trains on context pairs."""
        return next((t for t, (_, ids) in enumerate(self.steps) if ids and ids[0] >= self.inferred), len(self.steps))

    def pooled(self, loglik: torch.Tensor) -> torch.Tensor:
        """Log-likelihoods summed over each unit's visits; NaN (not visited yet) counts as 0: (E,K) -> (U,K)  (M11)."""
        known = loglik.masked_fill(loglik.isnan(), 0.0)
        return loglik.new_zeros(len(self.units), loglik.shape[1]).index_add(0, self.unit_of[: len(loglik)], known)


@dataclass(frozen=True)
class Micro:
    """Whole visits for one forward pass. Its batches are made when they are first read."""

    pairs: list[Pair]                   # of the plan
    own: list[Visit]                    # the G visits
    visits: torch.Tensor                # (G,) their numbers
    first: int                          # place in the step of the first visit
    ends_example: bool = True           # the last micro-batch of its example (DP-SGD)
    part: int = 0                       # the part of the step that it belongs to

    @cached_property
    def train(self) -> Batch:               # the pairs that are trained on
        return gathered(self.pairs, [visit.trained for visit in self.own])

    @cached_property
    def context(self) -> Batch | None:      # the pairs that only the E-step looks at
        return gathered(self.pairs, [visit.context for visit in self.own]) if self.own[0].context else None

    @property
    def places(self) -> slice:              # of the visits in the step
        return slice(self.first, self.first + len(self.visits))


def make_plan(pairs: list[Pair], config, shuffled=None, schedule=None) -> Plan:
    """All steps of a run; config: a TrainConfig. Raises: InputError naming a user with too few or too many pairs.

    shuffled(pairs, group): the pairs of one user in random order, of which the first become context; default: by
    config.seed. schedule(visits, pairs, config): (epoch, visits) of each step; default: passes over shuffled visits.
    """
    reads_context = config.estep == "context"
    pairs = mark_context(pairs, config.context, config.seed, shuffled) if reads_context else pairs
    units = groups(pairs, config.latent)
    trained = [[i for i in unit if not (reads_context and pairs[i].context)] for unit in units]
    visits = [visit for u, (unit, learns) in enumerate(zip(units, trained))
              for visit in visits_of(u, unit, learns, config.em == "incremental")]
    if schedule is not None:
        return Plan(pairs, units, visits, schedule(visits, pairs, config))
    closing = [Visit(visit.unit, [i], []) for visit in visits for i in visit.context]
    steps = passes(visits, pairs, config)
    if closing:
        steps += passes(closing, pairs, config, first=len(visits))
    return Plan(pairs, units, visits + closing, steps, closing=len(closing))


def passes(visits: list[Visit], pairs: list[Pair], config, first: int = 0) -> list[tuple[int, list[int]]]:
    """Every visit once in each epoch, in shuffled batches; within a batch the shortest texts come first. first: the
    number of the first of these visits in the plan."""
    longest = [max(pairs[i].longest() for i in visit.trained) for visit in visits]
    return [(epoch, [first + v for v in sorted(ids, key=longest.__getitem__)]) for epoch in range(config.epochs)
            for ids in batches([visit.trained for visit in visits], config.batch, config.seed, epoch, pairs)]


def visits_of(u: int, unit: list[int], trained: list[int], sliced: bool) -> list[Visit]:
    """Unit u as one visit; or sliced: as many visits as it has training pairs, or context pairs if they are fewer, each
    with its share of both (M11, incremental)."""
    context = sorted(set(unit) - set(trained))
    count = min(len(trained), len(context) or len(trained)) if sliced else 1
    slices = (np.array_split(np.array(part, dtype=int), count) for part in (trained, context))
    return [Visit(u, some.tolist(), others.tolist()) for some, others in zip(*slices)]


def mark_context(pairs: list[Pair], count: int, seed: int, shuffled=None) -> list[Pair]:
    """The pairs, of which `count` of each user are marked as context pairs: the first of shuffled(pairs, group), or of
    a permutation by `seed`.

    If any line of a user has the field `context`, the lines of this user are not changed. Raises: InputError unless
    every user then has a context pair (without one, the E-step gives the prior) and a training pair.
    """
    generator, marked = np.random.default_rng(seed), list(pairs)
    shuffled = shuffled or (lambda pairs, group: generator.permutation(group).tolist())
    for group in groups(pairs, "user"):
        drawn = set(shuffled(pairs, group)[:count])
        if all(pairs[i].context is None for i in group):
            for i in group:
                marked[i] = replace(pairs[i], context=i in drawn)
        count_context = sum(bool(marked[i].context) for i in group)
        if not 0 < count_context < len(group):
            remedy = f"use --context 1 to {len(group) - 1}" if len(group) > 1 else "remove that user"
            if any(pairs[i].context is not None for i in group):
                remedy = "its lines have the field `context`, which replaces --context: change some of them"
            user = pairs[group[0]].user
            raise InputError(f"user {user!r} has {len(group)} pairs, {count_context} for context; each user needs "
                             f"at least one context pair and one training pair; {remedy}",
                             pairs[group[0]].file, pairs[group[0]].line, option="context")
    return marked


def batches(groups: list[list[int]], size: int, seed: int, epoch: int, pairs: Sequence[Pair] = ()) -> list[list[int]]:
    """One epoch as lists of indices into `groups`, shuffled by (seed, epoch); every group is in one batch.

    A batch has at most `size` pairs and ends if the next group would not fit, so batches differ in size.
    Raises: InputError if a group is larger than a batch; it names the user if `pairs` is given.
    """
    assert groups and all(groups), f"got {len(groups)} groups, {groups.count([])} of them empty; wanted pairs in each"
    largest = max(range(len(groups)), key=lambda g: len(groups[g]))
    if (needed := len(groups[largest])) > size:
        first = pairs[groups[largest][0]] if pairs else None
        name, file, line = f"group {largest}", None, None
        if first:
            name, file, line = f"user {first.user!r}", first.file, first.line
        raise InputError(f"{name} has {needed} pairs, and a batch holds {size}; choose --batch {needed} or more, or "
                         "--em incremental, which visits a user in slices", file, line, "batch")
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
    """The visits `ids` in micro-batches of at most config.micro trained pairs; a larger visit has one of its own.
    No micro-batch has visits of two examples, or of two parts of the step."""
    runs: list[list[int]] = []              # places in `ids`
    owner = [0] * len(ids) if plan.owner is None else plan.owner[ids].tolist()
    size, kinds = 0, [*zip(owner, plan.parts(ids))]                         # example and part of each
    for place, v in enumerate(ids):
        count = len(plan.visits[v].trained)
        if not runs or size + count > config.micro or kinds[place] != kinds[place - 1]:
            runs.append([])
            size = 0
        runs[-1].append(place)
        size += count
    ends = [a != b for a, b in pairwise([*(owner[run[0]] for run in runs), None])]
    return [Micro(plan.pairs, [plan.visits[ids[place]] for place in run], torch.tensor([ids[place] for place in run]),
                  run[0], last, kinds[run[0]][1]) for run, last in zip(runs, ends)]


def gathered(pairs: list[Pair], groups: list[list[int]]) -> Batch:
    """The pairs of some groups as one batch; group n gets the number n."""
    return collate(pairs, [i for group in groups for i in group], [g for g, group in enumerate(groups) for _ in group])
