"""What each of several processes does (distributed.py has their exchange):

    step       the examples of a step are divided into contiguous parts of about equal cost, one for each process. Then
               gradients are summed once, before clipping, and log q, h and texts (metrics.chosen_and_rejected) of
               every pair are gathered. So all processes have equal figures, tables and weights, and make equal steps
    passes     reference, E-step on all pairs, validation, evaluation, sampling: each process its part; the results are
               gathered

The core does not know it: `divider` is plan.Plan.parts, `accumulate` is train.EM.accumulate. With expert parallelism
(expert_parallel.py) the parts are those of teams of K processes, whose members compute the same; else team = 1.
"""

import contextlib
import itertools
import math
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from mixdpo.config import InputError, to_json
from mixdpo.fast.optimizer import is_sharded
from mixdpo.fast.texts import logp_of_pairs
from mixdpo.files.atomic import lock_folder
from mixdpo.plan import Micro, Plan
from mixdpo.preferences import Pair
from mixdpo.runs.distributed import everyone, gathered, rank, summed, world
from mixdpo.runs.log import Progress


def must_agree(facts: dict) -> None:
    """Raises: InputError unless `facts`, which JSON can hold, are equal in all processes; it names what differs."""
    found = everyone({key: to_json(value) for key, value in facts.items()})
    for number, other in enumerate(found):
        if differ := [key for key in found[0] if other[key] != found[0][key]]:
            what = "; ".join(f"{key} {other[key]:.200}, not {found[0][key]:.200}" for key in differ)
            raise InputError(f"process {number} differs from process 0: {what}. Start all processes with the same "
                             "program, command and files")


def from_first(make: Callable):
    """make() of process 0."""
    return everyone(make() if rank() == 0 else None)[0]


def first_alone(make: Callable):
    """make(), in process 0 before the others: files are fetched once."""
    made = make() if rank() == 0 else None
    everyone(None)
    return made if rank() == 0 else make()


def locked(folder: Path):
    """atomic.lock_folder, in process 0."""
    return lock_folder(folder) if rank() == 0 else contextlib.nullcontext()


# --- passes -----------------------------------------------------------------------------------------------------------


def in_parts(items: Sequence, of_part: Callable, team: int = 1) -> list:
    """of_part(some items) of each team that has any, in the order of items."""
    first, last = (len(items) * r // (world() // team) for r in (rank() // team, rank() // team + 1))
    mine = of_part(items[first:last]) if first < last else None
    return [found for found in everyone(None if rank() % team else mine) if found is not None]


def logp_in_parts(experts, pairs: list[Pair], name: str, check: Callable = lambda: None, temperature: float = 1.0,
                  known: dict | None = None) -> torch.Tensor:
    """texts.logp_of_pairs of all pairs, of which each process computes a part; with sharded parameters, which are
    exchanged in every pass, each computes all. name: for the progress line. check(): called after each batch in a run
    of one process; several would not stop together."""
    progress = Progress(name, after=check if world() == 1 else lambda: None)

    def of_part(part: Sequence[Pair]) -> torch.Tensor:
        return logp_of_pairs(experts, list(part), progress, temperature=temperature, known=known)

    if any(is_sharded(p) for p in experts.parameters()):
        return of_part(pairs)
    return torch.cat(in_parts(pairs, of_part, team_of(experts)))


def team_of(experts) -> int:
    """The number of processes that have the experts together: 1, or K with expert parallelism."""
    return len(getattr(experts, "elsewhere", [])) + 1


def sum_gradients(parameters: list, total: Callable = summed) -> None:
    """Each gradient becomes the sum of those of all processes; None counts as 0. total(gradients): their sums."""
    if world() > 1:
        sums = total([torch.zeros_like(p) if p.grad is None else p.grad for p in parameters])
        for p, of_all in zip(parameters, sums):
            p.grad = of_all


# --- a step -----------------------------------------------------------------------------------------------------------


def divider(plan: Plan, team: int = 1) -> Callable:
    """plan.Plan.parts: the process, or the team, of each visit of a step. Parts are contiguous, about equal in cost,
    and divide no example of DP-SGD. A token that is trained on costs three times one that is only read."""
    size = [len(pair.prompt) + sum(map(len, pair.responses)) for pair in plan.pairs]
    cost = [3 * sum(size[i] for i in visit.trained) + sum(size[i] for i in visit.context) for visit in plan.visits]
    example = range(len(cost)) if plan.owner is None else plan.owner.tolist()

    def parts(ids: list[int]) -> list[int]:
        total, before, found = sum(cost[v] for v in ids), 0, []
        for _, group in itertools.groupby(ids, example.__getitem__):
            own = [cost[v] for v in group]
            found += [int((before + sum(own) / 2) / total * (world() // team))] * len(own)
            before += sum(own)
        return found

    return parts


def accumulate(variants, inner: Callable | None, team: int = 1, total: Callable = summed) -> Callable:
    """train.EM.accumulate of several processes: each calls gradient on its own micro-batches, with the number of all
    pairs of the step. inner: a private run's own, which sums gradients itself (private/step.py). variants: those of the
    run (variants/choose.py), which note what the processes have seen. total(gradients): their sums. Of a team, the
    first member's figures are gathered."""
    parameters, widths = variants.parameters, [variants.config.experts] * 2 + [4]                   # of log q, h, texts
    copied = [p for p in parameters if not is_sharded(p)]                   # FSDP2 sums the gradients of the others

    def of_step(gradient: Callable, micros: list[Micro]) -> list:
        sizes, counts = [len(visit.trained) for micro in micros for visit in micro.own], [0] * world()
        for micro in micros:
            counts[micro.part * team] += sum(len(visit.trained) for visit in micro.own)     # pairs of each process
        mine = [micro for micro in micros if micro.part == rank() // team]
        if inner is None:
            seen = [gradient(mine, sum(counts))] if mine else []
            if len(copied) < len(parameters):                               # all pass through the sharded trunk equally
                passes = Counter(micro.part for micro in micros)            # often; a loss divided by infinity is 0
                for _ in range(max(passes.values()) - passes[rank()]):
                    gradient(micros[:1], math.inf)
            sum_gradients(copied, total)
        else:
            seen = inner(gradient, mine)
        place = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes, dtype=torch.int64))      # (B,)
        visits = torch.cat([place[:0], *(micro.visits for micro in micros)])[place]                     # (B,)
        device, first = "cuda" if torch.cuda.is_available() else "cpu", sum(counts[: rank()])
        noted = variants.noted(visits[first : first + counts[rank()]]).to(device)                       # (b,D)
        own = torch.cat([torch.empty(0, sum(widths), device=device), *(torch.cat(s[1:], dim=1) for s in seen)])
        rows = gathered(torch.cat([own[: counts[rank()]], noted], dim=1), counts)
        log_q, h, texts, noted = rows.split([*widths, noted.shape[1]], dim=1)
        variants.note(visits, log_q, h, noted)
        return [(place.to(device), log_q, h, texts)]

    return of_step
