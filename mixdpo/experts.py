"""K expert policies and what they share: the one place that knows.

    Heads      one trunk, K unembeddings: W_k (rank 0) or W + W A_k B_k (rank R)                (paper: Case 1)
    Adapters   one frozen model, K low-rank adapters in it: W + 2 B_k A_k in place of some projections W         (LoRA)
    Models     K independent models                                                                     (paper: Case 2)

All offer the same things, in the order in which a step uses them: `hidden` (the trunk's pass), `rows` (the states that
predict response tokens), `heads` (what these are multiplied with) and `token_logps` for all K experts; and, to sample
from, `policy(k)`: expert k as a model and an unembedding.
At the start every expert is the reference, exactly: W_k = W, a factor that is 0, or a copy. The reference itself is a
separate frozen object or a cached number (runs/reference.py), never a view of parameters that are trained.
Parameters are float32; products run in `dtype`. LoRA: Hu et al. 2021, arXiv 2106.09685; left out of it: dropout, biases
that learn, and alpha as an option.
"""

import copy
import dataclasses
import math
from pathlib import Path

import torch
from torch import nn

from mixdpo.config import InputError
from mixdpo.logprob import sum_responses, token_logps
from mixdpo.preferences import Batch, Rows, rows_of

# alpha / rank. Fixed, since Adam makes another one act like another learning rate (Hu et al., section 4.1).
SCALE = 2.0

# The projections that have adapters if nothing else is asked for: GPT-2's, and Llama's.
TARGETS = ("c_attn", "q_proj", "v_proj")


class Heads(nn.Module):
    """One trunk and K heads on it, W the trunk's unembedding (V,C):

        rank R > 0            W (1 + A_k B_k), with A_k = 0 (C,R) and B_k random (R,C); also for K = 1
        rank 0, K > 1         K full heads (V,C), which start as copies of W
        rank 0, K = 1         W: the experts are the model, with no parameters besides its own

    The factors turn the state, and W turns it into tokens: what is learnt of a word holds for words like it. Factors
    with a row of their own for every token, (V,R), learn the words of the training pairs by heart instead."""

    def __init__(
        self, trunk: nn.Module, experts: int, rank: int = 0, dtype: torch.dtype = torch.float32, seed: int = 0
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
            W.requires_grad_(trunk.config.tied)                             # untied, nothing reads it: no gradient

    def hidden(self, ids: torch.Tensor, window=None) -> torch.Tensor:
        """(N,T) -> (N,T,C): one pass for all experts. window: who sees whom, where not plainly causal."""
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
        """(M,C), (M,) -> (K,M) float32 nats. heads: those of self.heads() in `dtype`, for callers that come often."""
        W, *low_rank = [x.to(self.dtype) for x in self.heads()] if heads is None else heads
        logps = token_logps(rows, W, targets, tuple(low_rank) or None, tile)
        return logps if logps.ndim == 2 else logps[None]                    # (M,) where the one head is W

    @torch.no_grad()
    def policy(self, k: int) -> tuple[nn.Module, torch.Tensor]:
        """Expert k as (model, unembedding (V,C))."""
        W = self.trunk.unembedding
        if self.rank > 0:
            return self.trunk, W + W @ self.A[k] @ self.B[k]
        return self.trunk, self.W_k[k] if self.K > 1 else W


class LoRALinear(nn.Module):
    """A frozen projection W and K adapters on it: y = W x + b + SCALE B_k A_k x in the rows of expert k.

    A (K,R,in) is uniform in +-1/sqrt(in), as kaiming_uniform with a = sqrt(5) makes it; B (K,out,R) is 0.
    """

    def __init__(self, linear: nn.Linear, experts: int, rank: int, generator: torch.Generator):
        super().__init__()
        self.linear, W = linear, linear.weight                              # (out,in)
        noise = torch.rand(experts, rank, W.shape[1], generator=generator) * 2 - 1
        self.A = nn.Parameter(noise.to(W) / math.sqrt(W.shape[1]))                                # (K,R,in)
        self.B = nn.Parameter(W.new_zeros(experts, W.shape[0], rank))                             # (K,out,R)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(K*N,T,in) -> (K*N,T,out): the first N rows are expert 0's. One product with W for all."""
        low = x.reshape(len(self.A), -1, x.shape[-1]) @ self.A.mT           # (K,N*T,R)
        y = self.linear(x)
        return y + (SCALE * low @ self.B.mT).view(y.shape)

    @torch.no_grad()
    def merged(self, k: int) -> nn.Linear:
        """A plain projection with expert k's weight, W + SCALE B_k A_k, in new memory."""
        linear = copy.deepcopy(self.linear)
        linear.weight += SCALE * self.B[k] @ self.A[k]
        return linear


class Adapters(nn.Module):
    """One frozen model and K adapters of rank R on its `targets` (see projections). The base is never written to, so
    the model given may go on as the reference: here stand new modules around the same numbers."""

    def __init__(
        self, base: nn.Module, experts: int, rank: int, targets: str = "", dtype: torch.dtype = torch.float32,
        seed: int = 0,
    ):
        super().__init__()
        self.trunk, self.K, self.rank, self.dtype = frozen_twin(base), experts, rank, dtype
        self.targets, generator = projections(base, targets), torch.Generator().manual_seed(seed)
        for path in self.targets:
            linear = self.trunk.get_submodule(path)
            self.trunk.set_submodule(path, LoRALinear(linear, experts, rank, generator))

    def hidden(self, ids: torch.Tensor, window=None) -> torch.Tensor:
        """(N,T) -> (K,N,T,C): one pass over K*N rows, the rows once for each expert."""
        window = window and window.repeat(self.K)
        with torch.autocast(ids.device.type, self.dtype, enabled=self.dtype.itemsize < 4):
            hidden = self.trunk(ids.repeat(self.K, 1), window=window)       # (K*N,T,C)
        return hidden.unflatten(0, (self.K, -1)).to(self.dtype)

    def rows(self, hidden: torch.Tensor, where: torch.Tensor) -> torch.Tensor:
        """(K,N,T,C), flat positions (M,) -> (K,M,C)."""
        return hidden.flatten(1, 2)[:, where]

    def heads(self) -> tuple[torch.Tensor, ...]:
        """The one unembedding."""
        return (self.trunk.unembedding,)

    def token_logps(self, rows: torch.Tensor, targets: torch.Tensor, tile: int | None, heads=None) -> torch.Tensor:
        """(K,M,C), (M,) -> (K,M) float32 nats. heads: as for Heads."""
        (W,) = [x.to(self.dtype) for x in self.heads()] if heads is None else heads
        return torch.stack([token_logps(r, W, targets, tile=tile) for r in rows])

    def policy(self, k: int) -> tuple[nn.Module, torch.Tensor]:
        """Expert k as (model, unembedding (V,C)): a plain model with merged weights, which training does not change."""
        model = frozen_twin(self.trunk)
        for path in self.targets:
            model.set_submodule(path, self.trunk.get_submodule(path).merged(k))
        return model, model.unembedding


def frozen_twin(model: nn.Module) -> nn.Module:
    """New modules around the same numbers, which need no gradient: to replace a module here changes nothing there."""
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


class Models(nn.Module):
    """K independent models, of the same vocabulary and width."""

    def __init__(self, models: list[nn.Module], dtype: torch.dtype = torch.float32):
        super().__init__()
        self.models, self.K, self.dtype = nn.ModuleList(models), len(models), dtype

    def hidden(self, ids: torch.Tensor, window=None) -> torch.Tensor:
        """(N,T) -> (K,N,T,C)."""
        hidden = []
        for model in self.models:                                           # weights cast for one do not wait for all
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
        heads = [x.to(self.dtype) for x in self.heads()] if heads is None else heads
        return torch.stack([token_logps(r, W, targets, tile=tile) for r, W in zip(rows, heads)])

    def policy(self, k: int) -> tuple[nn.Module, torch.Tensor]:
        """Expert k as (model, unembedding (V,C))."""
        return self.models[k], self.models[k].unembedding

    @torch.no_grad()
    def untie(self, k: int) -> nn.Module:
        """Gives model k an unembedding of its own, which starts as its embedding; returns the model."""
        old = self.models[k]
        new = type(old)(dataclasses.replace(old.config, tied=False)).to(old.unembedding.device)
        new.load_state_dict(old.state_dict() | {"lm_head.weight": old.unembedding})
        self.models[k] = new
        return new


def trunks(experts: Heads | Adapters | Models) -> list[nn.Module]:
    """The models that ids pass through."""
    return list(experts.models) if isinstance(experts, Models) else [experts.trunk]


def once_a_step(experts: Heads | Adapters | Models) -> list[nn.Parameter]:
    """The parameters that get their whole gradient at one time, however a head's rows are cut: all but heads, which a
    tied embedding is too."""
    heads = {id(x) for x in experts.heads()}
    return [p for p in experts.parameters() if p.requires_grad and id(p) not in heads]


def make_experts(models: list[nn.Module], config, dtype: torch.dtype) -> Heads | Adapters | Models:
    """The experts of `config` (a TrainConfig) on top of `models`: one model for all experts, or one for each. The
    experts own these models from then on. One expert whose trunk learns is the model itself (DPO): --rank then has no
    effect. train_trunk false: the trunk is frozen, and each expert is a head on it, also where K = 1."""
    model = models[0]
    if config.sharing == "lora":
        return Adapters(model, config.experts, config.rank, config.targets, dtype, config.seed)
    if config.sharing == "models" and config.experts > 1:
        copies = [copy.deepcopy(model) for _ in range(config.experts - 1)] if len(models) == 1 else []
        return Models(models + copies, dtype)
    dpo = config.experts == 1 and config.train_trunk
    experts = Heads(model, config.experts, 0 if dpo else config.rank, dtype, config.seed)
    if not config.train_trunk:
        experts.trunk.requires_grad_(False)
    return experts


def predicting_states(experts: Heads | Adapters | Models, batch: Batch, text: Rows) -> torch.Tensor:
    """The states that predict the response tokens, (M,C), or (K,M,C) where each expert has its own: by a pass through
    the trunk, or known before where it is frozen."""
    if batch.states is not None:
        return batch.states.to(text.ids.device)
    return experts.rows(experts.hidden(text.ids, text.window), text.where)


def pair_logp(experts: Heads | Adapters | Models, batch: Batch, tile: int | None = 0,
              shared: bool | None = None, packed: bool = False, temperature: float = 1.0) -> torch.Tensor:
    """Summed response log-probs of every expert, with gradient: (B,K,2) float32 nats.
    The composable route, text ids to log-probs in three lines. shared, packed: as in
    preferences.rows_of. temperature: of the policies, whose logits are linear in the states."""
    text = rows_of(batch, shared, packed).to(experts.heads()[0].device)
    rows = predicting_states(experts, batch, text)                          # (M,C), or (K,M,C)
    logps = experts.token_logps(rows if temperature == 1 else rows / temperature, text.targets, tile)       # (K,M)
    return sum_responses(logps, text.sequence, len(batch.ids))              # (B,K,2)


# --- files ------------------------------------------------------------------------------------------------------------


def trained_state(experts: nn.Module) -> dict[str, torch.Tensor]:
    """The parameters that are not the reference's any more, as "experts." and their names, for safetensors."""
    return {f"experts.{name}": p.detach().contiguous() for name, p in own_parameters(experts)}


def own_parameters(experts: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Those that learn, and those that would if their expert were not frozen (runs/init_experts.py)."""
    return [(name, p) for name, p in experts.named_parameters() if p.requires_grad or getattr(p, "frozen", False)]


@torch.no_grad()
def load_state(experts: nn.Module, tensors: dict[str, torch.Tensor], path: Path) -> None:
    """Copies a saved state back. Raises: InputError naming every tensor that is missing, extra or of another shape."""
    if isinstance(experts, Models):
        for k, model in enumerate(experts.models):
            if model.config.tied and f"experts.models.{k}.lm_head.weight" in tensors:      # taken over
                experts.untie(k)
    own = {f"experts.{name}": p for name, p in own_parameters(experts)}
    state = {name: value for name, value in tensors.items() if name.startswith("experts.")}
    wrong = sorted(set(own) ^ set(state)) + [n for n in set(own) & set(state) if own[n].shape != state[n].shape]
    if wrong:
        raise InputError(f"its tensors do not fit this configuration: {', '.join(wrong[:8])}; resume with the "
                         "configuration it was written by", file=path)
    for name, p in own.items():
        p.copy_(state[name])
