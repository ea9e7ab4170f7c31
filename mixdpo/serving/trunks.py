"""The models that requests pass through, and each policy as a trunk, an adapter and a head.

    reference           trunk 0, no adapter, W
    expert k, heads     logits = W (h + A_k B_k h), or W_k h          one trunk; if it is frozen, the reference's
              lora      trunk 0 with adapter k, W                     one pass for all experts and the reference
              models    a trunk each, W
    dpo                 as an expert of its own run

A request has one policy (M13: draw k, then decode with it), so rows of different policies pass through a shared trunk
together. Weights are in the compute dtype, cast once; in float32 they are those of the run's experts, not copies.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from mixdpo.experts import Adapters, Heads, Models, Transformer
from mixdpo.models.attention import KVCache
from mixdpo.models.lora import SCALE, LoRALinear, frozen_twin
from mixdpo.runs.load_run import Run

LEAST = 4   # rows of a product in 16 bits, at least: with one row a CPU has another kernel, which rounds in another way


@dataclass(eq=False)
class RowWeights:
    """Which adapter each row of the next call uses, for all projections of a trunk."""

    of_rows: torch.Tensor | None = None     # (N,P): the weight of each of P ranks in each row; None: no row has one


class RowLoRA(nn.Module):
    """A projection with all adapters side by side, P ranks together: y_n = W x_n + SCALE B (w_n * A x_n), where w_n is
    the row's weight of each rank. Equals LoRALinear for rows of different experts. The other adapters' ranks are
    computed and multiplied by 0, which costs less than a pass for each expert."""

    def __init__(self, linear: nn.Linear, A: torch.Tensor, B: torch.Tensor, weights: RowWeights):
        super().__init__()
        self.linear, self.weights = linear, weights
        self.A, self.B = nn.Parameter(A.detach()), nn.Parameter(SCALE * B.detach())         # (P,in), (out,P)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N,T,in) -> (N,T,out)."""
        y, weight = self.linear(x), self.weights.of_rows
        return y if weight is None else y + (x @ self.A.T * weight[:, None]) @ self.B.T


def all_adapters(layer: LoRALinear) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """All adapters of a projection as one, A (P,in) and B (out,P), and the weight of each rank in expert k, (K,P)."""
    if layer.shared:
        return layer.joined()
    own = torch.eye(len(layer.A), dtype=layer.A.dtype, device=layer.A.device).repeat_interleave(layer.A.shape[1], dim=1)
    return layer.A.flatten(0, 1), torch.cat([*layer.B], dim=1), own


class Trunk:
    """A model without gradient, and adapters in it that each row chooses.

    model: in the compute dtype; adapters (1+K,P): the weight of each rank for adapter a, where a = 0 is none; None: the
    model has no adapters."""

    def __init__(self, model: Transformer, weights: RowWeights | None = None, adapters: torch.Tensor | None = None):
        self.model, self.weights, self.adapters = model, weights, adapters

    def __call__(self, ids: torch.Tensor, adapter: list[int], cache: KVCache | None = None) -> torch.Tensor:
        """ids (N,T), the adapter of each row -> (N,T,C), all positions."""
        if self.weights is not None and self.adapters is not None:
            self.weights.of_rows = self.adapters[adapter] if any(adapter) else None
        return self.model(ids, cache)


@dataclass(frozen=True, eq=False)
class Policy:
    """A policy as a part of its trunk."""

    trunk: Trunk
    head: torch.Tensor                                          # W or W_k: (V,C), in the compute dtype
    adapter: int = 0
    low_rank: tuple[torch.Tensor, torch.Tensor] | None = None   # A_k (C,R), B_k (R,C): the head is W (I + A_k B_k)


def turned(states: torch.Tensor, policy: Policy) -> torch.Tensor:
    """The states that the policy's head is multiplied with: h, or h + A_k B_k h. (N,C) -> (N,C). So heads of low rank
    share the product with W."""
    if policy.low_rank is None:
        return states
    A, B = policy.low_rank
    return states + product(product(states, B), A)


def product(x: torch.Tensor, W: torch.Tensor) -> torch.Tensor:
    """x W^T, (N,C), (V,C) -> (N,V). A row's result does not depend on the number of rows: see LEAST."""
    missing = LEAST - len(x) if x.dtype.itemsize < 4 else 0
    return x @ W.T if missing <= 0 else (F.pad(x, (0, 0, 0, missing)) @ W.T)[: len(x)]


def logits_of(states: torch.Tensor, policies: list[Policy]) -> torch.Tensor:
    """The logits of each row under its own policy, one product for each different head: (N,C) -> (N,V) float32."""
    low_rank: dict[int, list[int]] = {}
    heads: dict[int, list[int]] = {}
    for n, policy in enumerate(policies):
        heads.setdefault(id(policy.head), []).append(n)
        if policy.low_rank is not None:
            low_rank.setdefault(id(policy), []).append(n)
    if low_rank:
        states = states.clone()
        for rows in low_rank.values():
            states[rows] = turned(states[rows], policies[rows[0]])
    if len(heads) == 1:
        return product(states, policies[0].head).float()
    logits = states.new_empty(len(states), len(policies[0].head), dtype=torch.float32)
    for rows in heads.values():
        logits[rows] = product(states[rows], policies[rows[0]].head).float()
    return logits


# --- from a run to its policies ---------------------------------------------------------------------------------------


def cast(model: Transformer, dtype: torch.dtype) -> Transformer:
    """The model in the compute dtype, without gradient. It shares the weights that need no cast."""
    return frozen_twin(model).to(dtype).eval()


def lora_of(model: Transformer, path: str) -> LoRALinear:
    layer = model.get_submodule(path)
    assert isinstance(layer, LoRALinear), f"got {type(layer).__name__} at {path}, want LoRALinear"
    return layer


def without_adapters(experts: Adapters) -> Transformer:
    """The frozen model that the adapters are in; it shares its weights."""
    model = frozen_twin(experts.trunk)
    for path in experts.targets:
        model.set_submodule(path, lora_of(model, path).linear)
    return model


def adapted_trunk(several: list[Adapters]) -> Trunk:
    """The model that runs with the same targets adapt, with the adapters of all of them, numbered from 1."""
    model, weights = frozen_twin(several[0].trunk), RowWeights()
    for path in several[0].targets:
        A, B, of_expert = zip(*(all_adapters(experts.adapted(path)) for experts in several))
        model.set_submodule(path, RowLoRA(lora_of(model, path).linear, torch.cat(A), torch.cat(B, dim=1), weights))
    own = torch.block_diag(*of_expert).detach()                             # (all experts,P), the same at each path
    adapters = torch.cat([own.new_zeros(1, own.shape[1]), own]).to(several[0].dtype)
    return Trunk(model.to(several[0].dtype).eval().requires_grad_(False), weights, adapters)


def policies_of(run: Run, reference: Transformer, dpo: Run | None) -> dict[str, Policy]:
    """All policies by name: reference, expert-0, ..., and dpo. reference: the first expert's."""
    runs = [run] if dpo is None else [run, dpo]
    adapted = [each.experts for each in runs if isinstance(each.experts, Adapters)]
    together = [experts for experts in adapted if experts.targets == adapted[0].targets]
    frozen = adapted_trunk(together) if together else Trunk(cast(reference, run.experts.dtype))
    found, next_adapter = {"reference": Policy(frozen, frozen.model.unembedding)}, 1
    for each in runs:
        names = [f"expert-{k}" for k in range(each.experts.K)] if each is run else ["dpo"]
        if each.experts in together:
            policies = adapter_policies(frozen, next_adapter, each.experts.K)
            next_adapter += each.experts.K
        else:
            policies = policies_of_own(each, frozen)
        found |= dict(zip(names, policies))
    return found


def adapter_policies(trunk: Trunk, first: int, count: int) -> list[Policy]:
    return [Policy(trunk, trunk.model.unembedding, adapter=first + k) for k in range(count)]


def policies_of_own(run: Run, frozen: Trunk) -> list[Policy]:
    """The run's K policies, on trunks of its own, or heads on `frozen`, the reference's trunk."""
    experts, dtype = run.experts, run.experts.dtype
    if isinstance(experts, Adapters):
        return adapter_policies(adapted_trunk([experts]), 1, experts.K)
    if isinstance(experts, Models):
        trunks = [Trunk(cast(model, dtype)) for model in experts.models]
        return [Policy(trunk, trunk.model.unembedding) for trunk in trunks]
    trunk = Trunk(cast(experts.trunk, dtype)) if run.config.train_trunk else frozen
    return [Policy(trunk, *head_of(experts, k, trunk, dtype)) for k in range(experts.K)]


def head_of(experts: Heads, k: int, trunk: Trunk, dtype: torch.dtype) -> tuple:
    """Policy's fields head, adapter and low_rank of expert k."""
    W = trunk.model.unembedding
    if experts.rank > 0:
        return W, 0, (experts.A[k].detach().to(dtype), experts.B[k].detach().to(dtype))
    return (experts.W_k[k].detach().to(dtype) if experts.K > 1 else W), 0, None

