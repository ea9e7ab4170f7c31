"""K expert policies, and how they share parameters.

    Heads      one trunk, K unembeddings: W_k (rank 0) or W + W A_k B_k (rank R)                (paper: Case 1)
    Adapters   one frozen model, K low-rank adapters in it: W + 2 B_k A_k in place of some projections W         (LoRA);
               with a shared one, W + 2 (B_0 A_0 + B_k A_k - mean_j B_j A_j)                    (paper: Case 1)
    Models     K independent models                                                                     (paper: Case 2)

All three have the same methods, in the order in which a step calls them: `hidden` (the pass through the trunk), `rows`
(the states that predict response tokens), `heads` (the unembeddings) and `token_logps` of all K experts. For sampling,
`policy(k)` gives expert k as a model and an unembedding. At the start every expert equals the reference exactly: W_k =
W, a low-rank factor that is 0, or a copy. The reference is a separate frozen model or cached log-probs
(runs/reference.py), never a view of trained parameters. The 2 is LoRA's scale.
Parameters are float32; matrix products run in `dtype`.
"""

import copy
import math
from typing import Any

import torch
from torch import nn

from mixdpo.fast.casts import cast_once
from mixdpo.logprob import sum_responses, token_logps
from mixdpo.models.gpt2 import GPT2
from mixdpo.models.llama import Llama
from mixdpo.models.lora import LoRALinear, frozen_twin, projections
from mixdpo.preferences import Batch, Rows, rows_of

Transformer = GPT2 | Llama          # what an expert is made of


class Heads(nn.Module):
    """One trunk and K heads on it, W the trunk's unembedding (V,C):

        rank R > 0            W (I + A_k B_k), with A_k = 0 (C,R) and B_k random (R,C); also for K = 1
        rank 0, K > 1         K full heads (V,C), which start as copies of W
        rank 0, K = 1         W: the experts are the model, with no parameters besides its own

    The factors change the state, and W maps it to tokens, so similar words change together. Factors with one row for
    each token, (V,R), would memorise the words of the training pairs."""

    def __init__(
        self, trunk: Transformer, experts: int, rank: int = 0, dtype: torch.dtype = torch.float32, seed: int = 0
    ):
        super().__init__()
        self.trunk, self.K, self.rank, self.dtype = trunk, experts, rank, dtype
        W = trunk.unembedding                                               # (V,C)
        if rank > 0:
            noise = torch.randn(experts, rank, W.shape[1], generator=torch.Generator().manual_seed(seed))
            self.A = nn.Parameter(W.new_zeros(experts, W.shape[1], rank))                             # (K,C,R)
            self.B = nn.Parameter(noise.to(W) / math.sqrt(W.shape[1]))                                # (K,R,C)
        elif experts > 1:
            self.W_k = nn.Parameter(W.detach().expand(experts, -1, -1).clone())                       # (K,V,C)
            W.requires_grad_(trunk.config.tied)                             # if untied, W is not used: no gradient

    def hidden(self, ids: torch.Tensor, window=None) -> torch.Tensor:
        """(N,T) -> (N,T,C): one pass for all experts. window: which tokens attend to which, if not plainly causal."""
        with torch.autocast(ids.device.type, self.dtype, enabled=self.dtype.itemsize < 4):
            return self.trunk(ids, window=window).to(self.dtype)

    def rows(self, hidden: torch.Tensor, where: torch.Tensor) -> torch.Tensor:
        """(N,T,C), flat positions (M,) -> (M,C)."""
        return hidden.flatten(0, 1)[where]

    def heads(self) -> tuple[torch.Tensor, ...]:
        """What token_logps multiplies with, in float32: W (V,C), or W_k (K,V,C), or W, W A_k (K,V,R), B_k (K,R,C)."""
        W = self.trunk.unembedding
        if self.rank > 0:
            return W, W @ self.A, self.B
        return (self.W_k if self.K > 1 else W,)

    def token_logps(self, rows: torch.Tensor, targets: torch.Tensor, tile: int | None, heads=None) -> torch.Tensor:
        """(M,C), (M,) -> (K,M) float32 nats. heads: those of self.heads() in `dtype`, to avoid a cast at each call."""
        W, *low_rank = [cast_once(x, self.dtype) for x in self.heads()] if heads is None else heads
        logps = token_logps(rows, W, targets, tuple(low_rank) or None, tile)
        return logps if logps.ndim == 2 else logps[None]                    # (M,) where the one head is W

    @torch.no_grad()
    def policy(self, k: int) -> tuple[Transformer, torch.Tensor]:
        """Expert k as (model, unembedding (V,C))."""
        W = self.trunk.unembedding
        if self.rank > 0:
            return self.trunk, W + W @ self.A[k] @ self.B[k]
        return self.trunk, self.W_k[k] if self.K > 1 else W


class Adapters(nn.Module):
    """One frozen model and K adapters of rank R on its `targets` (see lora.projections), and one of rank `shared` for
    all experts together, if it is not 0. The modules are new but share the base's weights and never change them, so the
    base can still be the reference."""

    def __init__(
        self, base: Transformer, experts: int, rank: int, targets: str = "", dtype: torch.dtype = torch.float32,
        seed: int = 0, shared: int = 0,
    ):
        super().__init__()
        self.trunk, self.K, self.rank, self.dtype, self.shared = frozen_twin(base), experts, rank, dtype, shared
        self.targets, generator = projections(base, targets), torch.Generator().manual_seed(seed)
        for path in self.targets:
            linear = self.trunk.get_submodule(path)
            assert isinstance(linear, nn.Linear), f"got {type(linear).__name__} at {path}, want Linear"
            self.trunk.set_submodule(path, LoRALinear(linear, experts, rank, generator, shared))

    def adapted(self, path: str) -> LoRALinear:
        """The projection at `path`, one of `targets`, with its adapters."""
        layer = self.trunk.get_submodule(path)
        assert isinstance(layer, LoRALinear), f"got {type(layer).__name__} at {path}, want LoRALinear"
        return layer

    def hidden(self, ids: torch.Tensor, window=None) -> torch.Tensor:
        """(N,T) -> (K,N,T,C): one pass over K*N rows, a copy of the rows for each expert."""
        window = window and window.repeat(self.K)
        with torch.autocast(ids.device.type, self.dtype, enabled=self.dtype.itemsize < 4):
            hidden = self.trunk(ids.repeat(self.K, 1), window=window)       # (K*N,T,C)
        return hidden.unflatten(0, (self.K, -1)).to(self.dtype)

    def rows(self, hidden: torch.Tensor, where: torch.Tensor) -> torch.Tensor:
        """(K,N,T,C), flat positions (M,) -> (K,M,C)."""
        return hidden.flatten(1, 2)[:, where]

    def heads(self) -> tuple[torch.Tensor, ...]:
        """The unembedding, which all experts share."""
        return (self.trunk.unembedding,)

    def token_logps(self, rows: torch.Tensor, targets: torch.Tensor, tile: int | None, heads=None) -> torch.Tensor:
        """(K,M,C), (M,) -> (K,M) float32 nats. heads: as for Heads."""
        (W,) = [cast_once(x, self.dtype) for x in self.heads()] if heads is None else heads
        return torch.stack([token_logps(r, W, targets, tile=tile) for r in rows])

    def policy(self, k: int) -> tuple[Transformer, torch.Tensor]:
        """Expert k as (model, unembedding (V,C)): a plain model with merged weights; further training does not change
        it."""
        model = frozen_twin(self.trunk)
        for path in self.targets:
            model.set_submodule(path, self.adapted(path).merged(k))
        return model, model.unembedding


class Models(nn.Module):
    """K independent models, of the same vocabulary and width."""

    models: Any                     # nn.ModuleList of K Transformers; for mypy its items would be any Module

    def __init__(self, models: list[Transformer], dtype: torch.dtype = torch.float32):
        super().__init__()
        self.models, self.K, self.dtype = nn.ModuleList(models), len(models), dtype

    def hidden(self, ids: torch.Tensor, window=None) -> torch.Tensor:
        """(N,T) -> (K,N,T,C)."""
        hidden = []
        for model in self.models:                                        # leaving autocast frees the cast weights
            with torch.autocast(ids.device.type, self.dtype, enabled=self.dtype.itemsize < 4):
                hidden.append(model(ids, window=window).to(self.dtype))
        return torch.stack(hidden)

    def rows(self, hidden: torch.Tensor, where: torch.Tensor) -> torch.Tensor:
        """(K,N,T,C), flat positions (M,) -> (K,M,C)."""
        return hidden.flatten(1, 2)[:, where]

    def heads(self) -> tuple[torch.Tensor, ...]:
        """Each model's unembedding."""
        return tuple(model.unembedding for model in self.models)

    def token_logps(self, rows: torch.Tensor, targets: torch.Tensor, tile: int | None, heads=None) -> torch.Tensor:
        """(K,M,C), (M,) -> (K,M) float32 nats. heads: as for Heads."""
        heads = [cast_once(x, self.dtype) for x in self.heads()] if heads is None else heads
        return torch.stack([token_logps(r, W, targets, tile=tile) for r, W in zip(rows, heads)])

    def policy(self, k: int) -> tuple[Transformer, torch.Tensor]:
        """Expert k as (model, unembedding (V,C))."""
        return self.models[k], self.models[k].unembedding


def trunks(experts: Heads | Adapters | Models) -> list[Transformer]:
    """The models that the ids pass through."""
    return list(experts.models) if isinstance(experts, Models) else [experts.trunk]


def make_experts(models: list[Transformer], config, dtype: torch.dtype) -> Heads | Adapters | Models:
    """The experts of `config` (a TrainConfig) on top of `models`: one model for all experts, or one for each. The
    experts own these models from then on. One expert whose trunk learns is the model itself (DPO), and --rank is
    ignored. train_trunk false (heads only): the trunk is frozen, and each expert is a head on it, for K = 1 too."""
    model = models[0]
    if config.sharing == "lora":
        return Adapters(model, config.experts, config.rank, config.targets, dtype, config.seed, config.shared_rank)
    if config.sharing == "models" and config.experts > 1:
        copies = [copy.deepcopy(model) for _ in range(config.experts - 1)] if len(models) == 1 else []
        return Models(models + copies, dtype)
    dpo = config.experts == 1 and config.train_trunk
    experts = Heads(model, config.experts, 0 if dpo else config.rank, dtype, config.seed)
    if not config.train_trunk:
        experts.trunk.requires_grad_(False)
    return experts


def predicting_states(experts: Heads | Adapters | Models, batch: Batch, text: Rows) -> torch.Tensor:
    """The states that predict the response tokens: (M,C), or (K,M,C) if each expert has its own. By a pass through the
    trunk, or from the batch if they are cached (a frozen trunk)."""
    if batch.states is not None:
        return batch.states.to(text.ids.device)
    return experts.rows(experts.hidden(text.ids, text.window), text.where)


def pair_logp(experts: Heads | Adapters | Models, batch: Batch, rows_of=rows_of, tile: int | None = 0,
              temperature: float = 1.0) -> torch.Tensor:
    """Summed response log-probs of every expert, with gradient: (B,K,2) float32 nats. rows_of: the batch's layout;
    fast/packing.py has others. temperature: of the policies; it divides the states, because logits are linear in
    them."""
    text = rows_of(batch).to(next(experts.parameters()).device)
    rows = predicting_states(experts, batch, text)                          # (M,C), or (K,M,C)
    logps = experts.token_logps(rows if temperature == 1 else rows / temperature, text.targets, tile)       # (K,M)
    return sum_responses(logps, text.sequence, *batch.ids.shape[:2])        # (B,K,2)
