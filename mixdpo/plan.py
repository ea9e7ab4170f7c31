"""Who is trained on when: which pairs share one latent z, which are set aside for the E-step, and the groups of a step.

    pairs -> groups (a pair alone, or a user's) -> some of each set aside -> groups shuffled into steps -> micro-batches
          -> chunks, whose logits are in memory together

A context pair is never trained on, whatever the E-step looks at: where it does not look at context, they are left out.
A group is never cut, neither by a step nor by a micro-batch, so the E-step that pools a user's pairs (M11) is exact.
Within a step, whose sum has no order, groups stand by their longest text: micro-batches then hold little padding.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch

from mixdpo.config import InputError
from mixdpo.preferences import Batch, Pair, collate, groups


@dataclass(frozen=True)
class Plan:
    """A run's pairs, and the groups of every optimizer step."""

    pairs: list[Pair]
    units: list[list[int]]              # the pairs of each group
    trained: list[list[int]]            # those of them that the M-step sees
    steps: list[tuple[int, list[int]]]  # epoch and groups of each step


@dataclass(frozen=True)
class Micro:
    """Whole groups for one forward pass."""

    train: Batch                        # the pairs that are trained on
    context: Batch | None               # the pairs that only the E-step looks at
    groups: torch.Tensor                # (G,) the groups' numbers


def make_plan(pairs: list[Pair], config) -> Plan:
    """All steps of a run (config: train.py's). Raises: InputError naming a user with too few or too many pairs."""
    apart = config.estep == "context"
    pairs = mark_context(pairs, config.context, config.seed) if apart else pairs
    units = groups(pairs, config.latent)
    trained = [[i for i in unit if not pairs[i].context] for unit in units]
    if not apart:
        units = trained = sorted(filter(None, trained))
    if not units:
        raise InputError(f"all {len(pairs)} pairs are context pairs; wanted others to train on")
    longest = [max(pairs[i].longest() for i in unit) for unit in trained]
    steps = [(epoch, sorted(ids, key=longest.__getitem__)) for epoch in range(config.epochs)
             for ids in batches(trained, config.batch, config.seed, epoch, pairs)]
    return Plan(pairs, units, trained, steps)


def mark_context(pairs: list[Pair], count: int, seed: int) -> list[Pair]:
    """The pairs, with `count` of each user's drawn by `seed` as context pairs, which the E-step alone looks at.

    A user for whom the file says context, on any line, is left as the file has it. Raises: InputError unless every
    user then has a context pair, without which its E-step is the prior, and another pair to train on.
    """
    generator, marked = np.random.default_rng(seed), list(pairs)
    for group in groups(pairs, "user"):
        drawn = set(generator.permutation(group)[:count].tolist())
        if all(pairs[i].context is None for i in group):
            for i in group:
                marked[i] = replace(pairs[i], context=i in drawn)
        aside = sum(bool(marked[i].context) for i in group)
        if not 0 < aside < len(group):
            fits = f"1 to {len(group) - 1} would fit" if len(group) > 1 else "take that user out"
            raise InputError(
                f"user {pairs[group[0]].user!r} has {len(group)} pairs, {aside} of them for context; "
                f"one for context and one to train on are the least: {fits}"
            )
    return marked


def batches(groups: list[list[int]], size: int, seed: int, epoch: int, pairs: list[Pair] = ()) -> list[list[int]]:
    """One epoch as lists of indices into `groups`: whole groups, shuffled by (seed, epoch), none left out.

    A batch holds at most `size` pairs and ends where the next group would not fit, so batches are ragged.
    Raises: InputError if a group is larger than a batch; it names the user if `pairs` is given.
    """
    assert groups and all(groups), f"got {len(groups)} groups, {groups.count([])} of them empty; wanted pairs in each"
    largest = max(range(len(groups)), key=lambda g: len(groups[g]))
    if (needed := len(groups[largest])) > size:
        name = f"user {pairs[groups[largest][0]].user!r}" if pairs else f"group {largest}"
        raise InputError(f"{name} has {needed} pairs, and a batch holds {size}; choose a batch of {needed} or more")
    out, room = [], 0
    for g in np.random.default_rng([seed, epoch]).permutation(len(groups)).tolist():
        if len(groups[g]) > room:
            out.append([])
            room = size
        out[-1].append(g)
        room -= len(groups[g])
    return out


def micro_batches(plan: Plan, ids: list[int], config) -> list[Micro]:
    """The groups `ids` in runs of whole groups with about config.micro trained pairs each."""
    runs, size = [[]], 0
    for g in ids:
        if runs[-1] and size + len(plan.trained[g]) > config.micro:
            runs.append([])
            size = 0
        runs[-1].append(g)
        size += len(plan.trained[g])
    out = []
    for run in runs:
        train = [i for g in run for i in plan.trained[g]]
        held = [i for g in run for i in plan.units[g] if i not in plan.trained[g]]
        context = collate(plan.pairs, held, config.latent) if held else None
        out.append(Micro(collate(plan.pairs, train, config.latent), context, torch.tensor(run)))
    return out


KEPT = 2**30  # bytes of logits that a head micro-batch keeps for its backward pass


def fitting_rows(rows: torch.Tensor, head: torch.Tensor, dtype: torch.dtype) -> int:
    """How many response tokens' logits fit into KEPT: one row of the vocabulary for each of a token's states, of which
    experts may have their own, and for each head: (M,C) or (K,M,C), (V,C) or (K,V,C)."""
    products = rows.shape[:-2].numel() * head.shape[:-2].numel()
    return max(1, KEPT // (products * head.shape[-2] * dtype.itemsize))


def chunks(batch: Batch, head_rows: int, whole_groups: bool):
    """Cuts a micro-batch into runs of whole pairs (groups) of about head_rows response tokens; 0: no cut.

    Yields (first pair, one past the last, first token, one past the last).
    """
    ends = (batch.length.sum(1) - 2 * batch.start).cumsum(0).tolist()       # one past each pair's last token
    group, first, begin = batch.group.tolist(), 0, 0
    for b, end in enumerate(ends):
        last = b + 1 == len(ends)
        full = head_rows > 0 and not last and ends[b + 1] - begin > head_rows
        if last or full and not (whole_groups and group[b] == group[b + 1]):
            yield first, b + 1, begin, end
            first, begin = b + 1, end
