"""K expert policies and what they share: the one place that knows.

    Heads    one trunk, K unembeddings: W_k (rank 0) or W + A_k B_k (rank R); K = 1: the model itself    (paper: Case 1)
    Models   K independent models                                                                       (paper: Case 2)

Both offer the same things, in the order in which a step uses them: `hidden` (the trunk's pass), `rows` (the states that
predict response tokens), `heads` (what these are multiplied with) and `token_logps` for all K experts; and, to sample
from, `policy(k)`: expert k as a model and an unembedding.
At the start every expert is the reference, exactly: W_k = W, A_k = 0, or a copy. The reference itself is a separate
frozen object or a cached number (reference.py), never a view of these parameters.
Parameters are float32; products run in `dtype`.
"""

import copy
import math
from pathlib import Path

import torch
from torch import nn

from mixdpo.config import InputError
from mixdpo.logprob import sum_responses, token_logps
from mixdpo.preferences import Batch, response_positions


class Heads(nn.Module):
    """One trunk and K unembeddings. rank = 0: K full heads (V,C) that start as copies;
    rank > 0: W + A_k B_k with A_k = 0 and B_k random."""

    def __init__(
        self, trunk: nn.Module, experts: int, rank: int = 0, dtype: torch.dtype = torch.float32, seed: int = 0
    ):
        super().__init__()
        self.trunk, self.K, self.rank, self.dtype = trunk, experts, rank, dtype
        W = trunk.unembedding                                               # (V,C)
        if experts > 1 and rank == 0:
            self.W_k = nn.Parameter(W.detach().expand(experts, -1, -1).clone())                       # (K,V,C)
            W.requires_grad_(trunk.config.tied)                             # untied, nothing reads it: no gradient
        elif experts > 1:
            noise = torch.randn(experts, rank, W.shape[1], generator=torch.Generator().manual_seed(seed))
            self.A = nn.Parameter(W.new_zeros(experts, W.shape[0], rank))                             # (K,V,R)
            self.B = nn.Parameter(noise.to(W) / math.sqrt(W.shape[1]))                                # (K,R,C)

    def hidden(self, ids: torch.Tensor) -> torch.Tensor:
        """(N,T) -> (N,T,C): one pass for all experts."""
        with torch.autocast(ids.device.type, self.dtype, enabled=self.dtype.itemsize < 4):
            return self.trunk(ids).to(self.dtype)

    def rows(self, hidden: torch.Tensor, where: torch.Tensor) -> torch.Tensor:
        """(N,T,C), flat positions (M,) -> (M,C)."""
        return hidden.flatten(0, 1)[where]

    def heads(self) -> tuple[torch.Tensor, ...]:
        """What token_logps multiplies with, in `dtype`: W, or W_k, or W, A and B. Cast once for a pass's chunks."""
        if self.K > 1 and self.rank == 0:
            return (self.W_k.to(self.dtype),)
        W = self.trunk.unembedding.to(self.dtype)
        return (W,) if self.K == 1 else (W, self.A.to(self.dtype), self.B.to(self.dtype))

    def token_logps(self, rows: torch.Tensor, targets: torch.Tensor, tile: int | None, heads=None) -> torch.Tensor:
        """(M,C), (M,) -> (K,M) float32 nats. heads: what self.heads() gave."""
        W, *low_rank = self.heads() if heads is None else heads
        logps = token_logps(rows, W, targets, tuple(low_rank) or None, tile)
        return logps[None] if self.K == 1 else logps

    @torch.no_grad()
    def policy(self, k: int) -> tuple[nn.Module, torch.Tensor]:
        """Expert k as (model, unembedding (V,C))."""
        W = self.trunk.unembedding
        if self.K == 1:
            return self.trunk, W
        return self.trunk, (self.W_k[k] if self.rank == 0 else W + self.A[k] @ self.B[k])


class Models(nn.Module):
    """K independent models, each a copy of the one given."""

    def __init__(self, model: nn.Module, experts: int, dtype: torch.dtype = torch.float32):
        super().__init__()
        self.models = nn.ModuleList([model] + [copy.deepcopy(model) for _ in range(experts - 1)])
        self.K, self.dtype = experts, dtype

    def hidden(self, ids: torch.Tensor) -> torch.Tensor:
        """(N,T) -> (K,N,T,C)."""
        with torch.autocast(ids.device.type, self.dtype, enabled=self.dtype.itemsize < 4):
            return torch.stack([model(ids).to(self.dtype) for model in self.models])

    def rows(self, hidden: torch.Tensor, where: torch.Tensor) -> torch.Tensor:
        """(K,N,T,C), flat positions (M,) -> (K,M,C)."""
        return hidden.flatten(1, 2)[:, where]

    def heads(self) -> tuple[torch.Tensor, ...]:
        """Each model's unembedding, in `dtype`."""
        return tuple(model.unembedding.to(self.dtype) for model in self.models)

    def token_logps(self, rows: torch.Tensor, targets: torch.Tensor, tile: int | None, heads=None) -> torch.Tensor:
        """(K,M,C), (M,) -> (K,M) float32 nats. heads: what self.heads() gave."""
        heads = self.heads() if heads is None else heads
        return torch.stack([token_logps(r, W, targets, tile=tile) for r, W in zip(rows, heads)])

    def policy(self, k: int) -> tuple[nn.Module, torch.Tensor]:
        """Expert k as (model, unembedding (V,C))."""
        return self.models[k], self.models[k].unembedding


def make_experts(model: nn.Module, config, dtype: torch.dtype) -> Heads | Models:
    """The experts that `config` (a TrainConfig) asks for, on top of `model`, which becomes theirs.
    Freezes the trunk if asked."""
    if config.sharing == "models" and config.experts > 1:
        return Models(model, config.experts, dtype)
    experts = Heads(model, config.experts, config.rank, dtype, config.seed)
    if not config.train_trunk:
        experts.trunk.requires_grad_(False)
    return experts


def pair_logp(experts: Heads | Models, batch: Batch, tile: int | None = 4096) -> torch.Tensor:
    """Summed response log-probs of every expert, with gradient: (B,K,2) float32 nats.
    The composable route, text ids to log-probs in four lines."""
    where, targets, sequence = response_positions(batch)                    # (M,), (M,), (M,)
    rows = experts.rows(experts.hidden(batch.ids.flatten(0, 1)), where)     # (M,C) or (K,M,C)
    logps = experts.token_logps(rows, targets, tile)                        # (K,M)
    return sum_responses(logps, sequence, len(batch.ids))                   # (B,K,2)


# --- files ------------------------------------------------------------------------------------------------------------


def trained_state(experts: nn.Module) -> dict[str, torch.Tensor]:
    """The parameters that training may have changed, as "experts." and their names, for safetensors."""
    return {f"experts.{name}": p.detach().contiguous() for name, p in experts.named_parameters() if p.requires_grad}


@torch.no_grad()
def load_state(experts: nn.Module, tensors: dict[str, torch.Tensor], path: Path) -> None:
    """Copies a saved state back. Raises: InputError naming every tensor that is missing, extra or of another shape."""
    own = {f"experts.{name}": p for name, p in experts.named_parameters() if p.requires_grad}
    state = {name: value for name, value in tensors.items() if name.startswith("experts.")}
    wrong = sorted(set(own) ^ set(state)) + [n for n in set(own) & set(state) if own[n].shape != state[n].shape]
    if wrong:
        raise InputError(f"{path}: its tensors do not fit this configuration: {', '.join(wrong[:8])}; "
                         "resume with the configuration it was written by")
    for name, p in own.items():
        p.copy_(state[name])
