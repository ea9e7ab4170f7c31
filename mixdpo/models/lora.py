"""Low-rank adapters in a frozen model (LoRA: Hu et al. 2021, arXiv 2106.09685), K of them side by side.

    y = W x + b + SCALE (B_k A_k + B_0 A_0) x      in the rows of expert k

B_0 A_0 is an adapter that all experts share (optional). All experts' pairs train it, so what people have in common is
learnt once, from all pairs, and the other adapters learn the differences (the paper's Case 1: a shared encoder with
parts of each expert). Left out: dropout, biases that learn, and alpha as an option.
"""

import copy
import math
from typing import TypeVar

import torch
from torch import nn

from mixdpo.config import InputError

# alpha / rank. Fixed, because with Adam it acts like the learning rate (Hu et al., section 4.1).
SCALE = 2.0

# The projections that have adapters by default: of GPT-2, and of Llama.
TARGETS = ("c_attn", "q_proj", "v_proj")

Module = TypeVar("Module", bound=nn.Module)


class LoRALinear(nn.Module):
    """A frozen projection W with K adapters, and one that all K experts share if `shared` is not 0:
    y = W x + b + SCALE (B_k A_k + B_0 A_0) x in the rows of expert k.

    The adapters have rank R, the shared one has rank S. A (K,R,in) and A_0 (S,in) are uniform in +-1/sqrt(in), which is
    kaiming_uniform with a = sqrt(5); B (K,out,R) and B_0 (out,S) are 0.
    """

    def __init__(self, linear: nn.Linear, experts: int, rank: int, generator: torch.Generator, shared: int = 0):
        super().__init__()
        self.linear, W = linear, linear.weight                              # (out,in)
        self.A, self.B = factors(W, (experts, rank), generator)                        # (K,R,in), (K,out,R)
        self.A_0: nn.Parameter | None = None                                           # (S,in)
        self.B_0: nn.Parameter | None = None                                           # (out,S)
        if shared:
            self.A_0, self.B_0 = factors(W, (shared,), generator)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(K*N,T,in) -> (K*N,T,out): the first N rows belong to expert 0. One product with W serves all experts."""
        low = x.reshape(len(self.A), -1, x.shape[-1]) @ self.A.mT           # (K,N*T,R)
        y = self.linear(x)
        y = y + (SCALE * low @ self.B.mT).view(y.shape)
        return y if self.A_0 is None or self.B_0 is None else y + SCALE * (x @ self.A_0.mT) @ self.B_0.mT

    def of_expert(self, k: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Expert k's part and the shared part as one adapter: A (R+S,in), B (out,R+S). The product B A is their sum."""
        if self.A_0 is None or self.B_0 is None:
            return self.A[k], self.B[k]
        return torch.cat([self.A[k], self.A_0]), torch.cat([self.B[k], self.B_0], dim=1)

    @torch.no_grad()
    def merged(self, k: int) -> nn.Linear:
        """A plain projection with the weight of expert k, W + SCALE (B_k A_k + B_0 A_0), in new memory."""
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
    """The linear layers of the model's blocks whose name is one of `targets` (comma-separated; empty: those of TARGETS
    that it has), as paths like "h.0.attn.c_attn". Raises: InputError naming an unknown one and the known ones."""
    linear = [path for path, module in model.named_modules() if isinstance(module, nn.Linear) and "." in path]
    known = sorted({path.rpartition(".")[2] for path in linear})            # no dot: the unembedding, outside of blocks
    wanted = targets.split(",") if targets else [name for name in TARGETS if name in known]
    unknown = [name for name in wanted if name not in known]
    if unknown:
        raise InputError(f"got {unknown[0]!r}, wanted some of {', '.join(known)}", option="targets")
    return [path for path in linear if path.rpartition(".")[2] in wanted]
