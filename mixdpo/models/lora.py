"""Low-rank adapters in a frozen model (LoRA: Hu et al. 2021, arXiv 2106.09685), K of them side by side.

    y = W x + b + SCALE B_k A_k x                                              in the rows of expert k
    y = W x + b + SCALE (B_0 A_0 + B_k A_k - mean_j B_j A_j) x                 with a shared adapter, B_0 A_0

The shared adapter is what the experts have in common (the paper's Case 1: a shared encoder, and parts of each expert),
and the others are deviations from it. Its gradient is the sum over the experts, as in DPO on all pairs, so what people
agree on is learnt once, from all pairs. The gradient of the deviations is the difference between experts, so they learn
only what people disagree on.
Left out: dropout, biases that learn, and alpha as an option.
"""

import copy
import math
from typing import TypeVar

import torch
from torch import nn

from mixdpo.config import InputError
from mixdpo.fast.lowrank import low_rank_linear

# alpha / rank. Fixed, because with Adam it acts like the learning rate (Hu et al., section 4.1).
SCALE = 2.0

# The projections that have adapters by default: of GPT-2, and of Llama and its relatives.
TARGETS = ("c_attn", "q_proj", "v_proj")

Module = TypeVar("Module", bound=nn.Module)


class LoRALinear(nn.Module):
    """A frozen projection W with K adapters of rank R, and a shared one of rank S if `shared` is not 0: the module's
    docstring has what they compute.

    A (K,R,in) and A_0 (S,in) are uniform in +-1/sqrt(in), which is kaiming_uniform with a = sqrt(5); B (K,out,R) and
    B_0 (out,S) are 0.
    """

    def __init__(self, linear: nn.Linear, experts: int, rank: int, generator: torch.Generator, shared: int = 0):
        super().__init__()
        self.linear, W = linear, linear.weight                              # (out,in)
        self.A, self.B = factors(W, (experts, rank), generator)             # (K,R,in), (K,out,R)
        if shared:
            self.A_0, self.B_0 = factors(W, (shared,), generator)           # (S,in), (out,S)
        self.shared = shared

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(K*N,T,in) -> (K*N,T,out): the first N rows belong to expert 0. One product with W serves all experts."""
        frozen = self.linear.weight, self.linear.bias
        if not self.shared:
            return low_rank_linear(x, *frozen, self.A, self.B, SCALE)
        A, B, weight = self.joined()
        return low_rank_linear(x, *frozen, A[None], B[None], SCALE * weight)            # one adapter for all experts

    def joined(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """All adapters as one, A (S+K*R,in) and B (out,S+K*R), and the weight of each of its ranks in expert k,
        (K,S+K*R): 1 in the shared one, 1 - 1/K in its own, -1/K in the others."""
        K, R = self.A.shape[:2]
        A, B = torch.cat([self.A_0, self.A.flatten(0, 1)]), torch.cat([self.B_0, *self.B], dim=1)
        own = torch.eye(K, dtype=A.dtype, device=A.device)
        deviation = (own - 1 / K).repeat_interleave(R, dim=1)               # (K,K*R)
        return A, B, torch.cat([deviation.new_ones(K, self.shared), deviation], dim=1)

    def of_expert(self, k: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Expert k's change of W as one adapter: A (R',in), B (out,R'), with R' = R, or S + K*R if one is shared."""
        if not self.shared:
            return self.A[k], self.B[k]
        A, B, weight = self.joined()
        return A, B * weight[k]

    @torch.no_grad()
    def merged(self, k: int) -> nn.Linear:
        """A plain projection with the weight of expert k, in new memory."""
        linear, (A, B) = copy.deepcopy(self.linear), self.of_expert(k)
        linear.weight += SCALE * B @ A
        return linear


def factors(W: torch.Tensor, shape: tuple[int, ...], generator: torch.Generator) -> tuple[nn.Parameter, nn.Parameter]:
    """The factors of adapters on W (out,in): A (*shape,in), random, and B, the same with its last two axes exchanged
    and `out` in the place of `in`, which is 0."""
    noise = torch.rand(*shape, W.shape[1], generator=generator) * 2 - 1
    A = nn.Parameter(noise.to(W) / math.sqrt(W.shape[1]))
    return A, nn.Parameter(W.new_zeros(*shape[:-1], W.shape[0], shape[-1]))


def frozen_twin(model: Module) -> Module:
    """New modules with the same weights, which need no gradient. Replacing a module in the twin does not change the
    model."""
    frozen = {id(p): nn.Parameter(p.detach(), requires_grad=False) for p in model.parameters()}
    return copy.deepcopy(model, frozen)                                     # takes these where it meets the parameters


def projections(model: nn.Module, targets: str) -> list[str]:
    """The linear layers of the model's blocks whose name is one of `targets` (comma-separated; all: every one; empty:
    those of TARGETS that it has), as paths like "h.0.attn.c_attn". Raises: InputError naming an unknown one and the
    known ones."""
    linear = [path for path, module in model.named_modules() if isinstance(module, nn.Linear) and "." in path]
    known = sorted({path.rpartition(".")[2] for path in linear})            # no dot: the unembedding, outside of blocks
    wanted = known if targets == "all" else targets.split(",") if targets else [n for n in TARGETS if n in known]
    unknown = [name for name in wanted if name not in known]
    if unknown:
        raise InputError(f"got {unknown[0]!r}, wanted all, or some of {', '.join(known)}", option="targets")
    return [path for path in linear if path.rpartition(".")[2] in wanted]
