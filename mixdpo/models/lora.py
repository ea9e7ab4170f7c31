"""Low-rank adapters in a frozen model (LoRA: Hu et al. 2021, arXiv 2106.09685), K of them side by side.

    y = W x + b + SCALE B_k A_k x      in the rows of expert k

Left out: dropout, biases that learn, and alpha as an option.
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
    """A frozen projection W and K adapters on it: y = W x + b + SCALE B_k A_k x in the rows of expert k.

    A (K,R,in) is uniform in +-1/sqrt(in), which is kaiming_uniform with a = sqrt(5); B (K,out,R) is 0.
    """

    def __init__(self, linear: nn.Linear, experts: int, rank: int, generator: torch.Generator):
        super().__init__()
        self.linear, W = linear, linear.weight                              # (out,in)
        noise = torch.rand(experts, rank, W.shape[1], generator=generator) * 2 - 1
        self.A = nn.Parameter(noise.to(W) / math.sqrt(W.shape[1]))                                # (K,R,in)
        self.B = nn.Parameter(W.new_zeros(experts, W.shape[0], rank))                             # (K,out,R)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(K*N,T,in) -> (K*N,T,out): the first N rows belong to expert 0. One product with W serves all experts."""
        low = x.reshape(len(self.A), -1, x.shape[-1]) @ self.A.mT           # (K,N*T,R)
        y = self.linear(x)
        return y + (SCALE * low @ self.B.mT).view(y.shape)

    @torch.no_grad()
    def merged(self, k: int) -> nn.Linear:
        """A plain projection with the weight W + SCALE B_k A_k, in new memory."""
        linear = copy.deepcopy(self.linear)
        linear.weight += SCALE * self.B[k] @ self.A[k]
        return linear


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
