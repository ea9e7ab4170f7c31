"""Expert parallelism, --expert-parallel true: each process has one of the K experts of --sharing models.

    processes    0 .. K-1 are team 0, K .. 2K-1 are team 1, ...; process r has expert r mod K
    a step       is divided among the teams (parallel.py). The members of a team compute the same pairs, each under its
                 expert, and exchange the log-probs of response tokens. Each then has those of all K experts: so E-step,
                 loss and figures are computed in every member, as one process computes them
    backward     the gradient of the loss by a member's own log-probs goes into its expert, without any exchange
    gradients    of an expert are summed over the processes that have it, one of each team; of a gate, over the teams
    their norm   for clipping is that of all K experts and the gate
    checkpoints  are written by process 0 and hold all experts: those of one process

The steps are those of one process up to rounding. Left out: what runs/rules.py refuses.
"""

import math
from collections.abc import Callable

import torch
import torch.distributed as dist

from mixdpo.experts import Models, Transformer
from mixdpo.runs import distributed, parallel
from mixdpo.runs.distributed import everyone, rank, summed, world


class Exchange(torch.autograd.Function):
    """The rows (1,M) of all members of a team, in the order of experts: (K,M). Each member computes the same loss of
    all rows, so the gradient of its own row is complete, and the other rows' gradients are left to their members."""

    @staticmethod
    def forward(ctx, own, team):
        ctx.own = dist.get_rank(team)
        found = [torch.empty_like(own) for _ in range(dist.get_world_size(team))]
        dist.all_gather(found, own.contiguous(), team)
        return torch.cat(found)

    @staticmethod
    def backward(ctx, gradient):
        return gradient[ctx.own : ctx.own + 1], None


class OneOfModels(Models):
    """K independent models, of which this process has one: number `own`. Its parameters are named models.OWN.*, as they
    are in Models."""

    def __init__(self, model: Transformer, experts: int, dtype: torch.dtype):
        super().__init__([], dtype)
        self.K, self.own, teams = experts, rank() % experts, range(0, world(), experts)
        self.models.add_module(str(self.own), model)
        self.elsewhere = [k for k in range(experts) if k != self.own]      # the experts that other processes have
        self.team = own_group([[*range(first, first + experts)] for first in teams])
        self.twins = own_group([[first + k for first in teams] for k in range(experts)])    # they have the same expert

    def token_logps(self, rows: torch.Tensor, targets: torch.Tensor, tile: int | None, heads=None) -> torch.Tensor:
        """(1,M,C), (M,) -> (K,M) float32 nats, with gradient for this process's expert. heads: as for Heads."""
        return Exchange.apply(super().token_logps(rows, targets, tile, heads), self.team)

    # --- a step; see parallel.py ---

    def accumulate(self, variants, inner: None) -> Callable:
        """parallel.accumulate of teams."""
        return parallel.accumulate(variants, inner, self.K, self.total)

    def total(self, gradients: list[torch.Tensor]) -> list[torch.Tensor]:
        """The sums over teams of gradients in the optimizer's order: of the expert, then of a gate. A gate's come from
        the first member of each team, so all processes have the same bits."""
        count = sum(p.requires_grad for p in self.parameters())
        expert, gate = gradients[:count], gradients[count:]
        if dist.get_world_size(self.twins) > 1:
            expert = summed(expert, self.twins)
        return expert + summed([g if self.own == 0 else torch.zeros_like(g) for g in gate])

    def norm(self, own: torch.Tensor) -> float:
        """The gradient norm of all experts from that of this process's."""
        own = own.to(next(self.parameters()).device).reshape(1)
        found = [torch.empty_like(own) for _ in range(self.K)]
        dist.all_gather(found, own, self.team)
        return math.hypot(*map(float, found))


def own_group(groups: list[list[int]]):
    """The group of processes that this one belongs to. All processes make all groups."""
    return dist.new_subgroups_by_enumeration(groups, timeout=distributed.TIMEOUT)[0]


def make_one(models: list[Transformer], config, dtype: torch.dtype) -> OneOfModels:
    """experts.make_experts of a process that has one expert: no other is ever copied."""
    return OneOfModels(models[rank() % config.experts % len(models)], config.experts, dtype)


def collected(experts, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint: in process 0 with those that it has not itself, on the CPU, sent one by one by the
    other members of its team."""
    if not isinstance(experts, OneOfModels):
        return tensors
    named = everyone({name: (x.shape, x.dtype) for name, x in tensors.items()})
    received = {}
    for k in range(1, experts.K):
        for name, (shape, dtype) in named[k].items():
            if name not in named[0] and rank() == k:
                dist.send(tensors[name].cpu().contiguous(), 0)
            elif name not in named[0] and rank() == 0:
                received[name] = torch.empty(shape, dtype=dtype)
                dist.recv(received[name], k)
    return tensors | received
