"""Gates: the mixture's weights w_k(x), from what is known of a pair before it is judged (M9, M10).

    fixed         log w                                             equal for all pairs: given, or closed form (M10)
    linear        log w(x)    = log softmax(W f(x) + b)             f(x): the frozen reference's states of the prompt
    mlp           log w(x)    = log softmax(W gelu(V f(x) + c) + b)
    user          log w(u)    = log softmax(E[u])                   E[0] is the generic user, for unknown users
    prompt-user   log w(x,u)  = log softmax(W f(x) + b + E[u])
    random        linear with random W, not trained
    domain        all weight on the expert of the pair's domain, a field of the file; uniform for an unknown domain

Each row of weights belongs to one unit: a pair, or a user, who has one prior (M11). Every trained gate starts uniform,
because W and E are 0. f is centred and scaled by the mean and deviation of the training units, which the gate stores;
with `unit_rows` each row is scaled to length 1 instead, so it depends on no other row. The softmax is of logits /
temperature; the temperature is 1 except while a run anneals it.
To add a kind: name it in the tuples below that apply, make its parameters in __init__, and add its logits in `logits`
or `forward`. What gates read is made in runs/gate_inputs.py.
Left out: gates that read the response. The weights are a prior; a response changes the posterior (M7).
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from mixdpo.config import InputError, convert
from mixdpo.mixture import balance, entropy, gate_loss

TRAINED = ("linear", "mlp", "user", "prompt-user")
KINDS = ("fixed", *TRAINED, "random", "domain")
READS_PROMPT = ("linear", "mlp", "prompt-user", "random")
READS_USER = ("user", "prompt-user")
HIDDEN = 64                         # width inside the mlp


def first_weights(config) -> torch.Tensor:
    """log w (K,) at the start (M10): uniform, or as given."""
    if config.weights in ("uniform", "update"):
        return torch.full((config.experts,), -math.log(config.experts))
    w = torch.tensor(convert(config.weights, tuple[float, ...], "--weights"))
    if len(w) != config.experts or not (w > 0).all() or not w.sum().isfinite():
        raise InputError(f"got {config.weights!r}, wanted uniform, update, or {config.experts} positive numbers",
                         option="weights")
    return torch.log(w / w.sum())


@dataclass(frozen=True)
class Inputs:
    """What a gate reads of N units."""

    features: torch.Tensor          # (N,D) float32: of the prompt; one-hot for `domain`; else D = 0 (gate_inputs.py)
    user: torch.Tensor              # (N,) int64: 0 for unknown, else the number of the training user, from 1

    def __getitem__(self, index) -> "Inputs":
        return Inputs(self.features[index], self.user[index])

    def to(self, device) -> "Inputs":
        return Inputs(self.features.to(device), self.user.to(device))


class Gate(nn.Module):
    """gate(inputs) -> log w (N,K) float32, rows normalised (M9; fixed: M10). inputs: those of the training units, for
    sizes and scale. Raises: InputError if a domain gate has not K domains, or if a user gate has no users.
    """

    log_w: torch.Tensor             # (K,) of a fixed gate
    mean: torch.Tensor              # (D,) and scale, (D,): of a gate that reads the prompt
    scale: torch.Tensor

    def __init__(self, kind: str, experts: int, inputs: Inputs, log_w: torch.Tensor, seed: int = 0,
                 unit_rows: bool = False):
        super().__init__()
        assert kind in KINDS, f"got gate {kind!r}, want one of {KINDS}"
        self.kind, self.K, self.temperature = kind, experts, 1.0            # the loop sets the temperature (train.py)
        self.unit_rows = unit_rows
        D, self.users = inputs.features.shape[1], int(inputs.user.max())    # known users
        generator = torch.Generator().manual_seed(seed)
        if kind == "fixed":
            self.register_buffer("log_w", log_w.clone())                                    # (K,)
        if kind == "domain" and D != experts:
            raise InputError(f"got domain, for {D} domains in the training pairs and {experts} experts; wanted "
                             'one domain an expert: {"domain": ...} on each line, and --experts of that number',
                             option="gate")
        if kind in READS_PROMPT:
            # with unit_rows: mean 0 and deviation 1, so nothing is taken from the data
            seen = inputs.features.new_tensor([[-1.0], [1.0]]).expand(2, D) if unit_rows else inputs.features
            self.register_buffer("mean", seen.mean(0))                                      # (D,)
            self.register_buffer("scale", seen.std(0, correction=0).clamp_min(1e-6) * math.sqrt(D))
            width = HIDDEN if kind == "mlp" else D
            self.W, self.b = nn.Parameter(torch.zeros(experts, width)), nn.Parameter(torch.zeros(experts))
        if kind == "mlp":                                            # f has length about 1, so V f has deviation 1
            self.V = nn.Parameter(torch.randn(HIDDEN, D, generator=generator))              # (H,D)
            self.c = nn.Parameter(torch.zeros(HIDDEN))
        if kind in READS_USER:
            if not self.users:
                raise InputError(f"got {kind}, and no line of the training pairs names a user; add users, or choose "
                                 "another gate", option="gate")
            self.E = nn.Parameter(torch.zeros(self.users + 1, experts))                          # (U+1,K)
        if kind == "random":
            self.W.data = torch.randn(experts, D, generator=generator)                      # logits of deviation 1
            self.requires_grad_(False)

    def logits(self, inputs: Inputs) -> torch.Tensor:
        """The part of the logits that depends on the prompt: (N,K), or 0, of shape (), if the gate does not read it."""
        if self.kind not in READS_PROMPT:
            return inputs.features.new_zeros(())
        f = F.normalize(inputs.features) * math.sqrt(inputs.features.shape[1]) if self.unit_rows else inputs.features
        f = (f - self.mean) / self.scale                                    # (N,D), of length 1, about
        return (F.gelu(f @ self.V.T + self.c) if self.kind == "mlp" else f) @ self.W.T + self.b

    def forward(self, inputs: Inputs) -> torch.Tensor:
        N = len(inputs.user)
        if self.kind == "fixed":
            return self.log_w.expand(N, self.K)
        if self.kind == "domain":
            known = inputs.features.any(1, keepdim=True)                    # (N,1)
            return torch.where(known, inputs.features.log(), -math.log(self.K))
        logits = self.logits(inputs)
        if self.kind in READS_USER:
            logits = logits + self.E[inputs.user]                           # (N,K)
        log_w = torch.log_softmax(logits / self.temperature, dim=-1)
        if log_w.isnan().any():
            raise FloatingPointError("weights of the gate that are NaN")
        return log_w

    def generic(self, inputs: Inputs) -> torch.Tensor:
        """forward with the generic user in every row; gradient flows to that user's row only. It is trained on the
        responsibilities of all users, so its optimum is their mean: the best weights for an unknown user."""
        logits = self.logits(inputs).detach()
        return torch.log_softmax((logits + self.E[0]).expand(len(inputs.user), -1) / self.temperature, dim=-1)


def gate_objective(gate: Gate, inputs: Inputs, log_q: torch.Tensor, config, share: torch.Tensor, step: Inputs
                   ) -> torch.Tensor:
    """The gate's loss, summed over G visits: M9 (a user gate: also for the generic user), minus the entropy bonuses.
    share (G,): each visit's fraction of its unit. step: the inputs of all visits of the step, which may be more.

    gate_entropy rewards flat weights w(x) of each unit. gate_balance rewards weights that use all experts on average
    over the step, however sharp each w(x) is.
    """
    log_w = gate(inputs)                                                    # (G,K), with gradient
    loss = gate_loss(log_q, log_w)                                          # (G,)  M9
    if gate.kind in READS_USER:
        loss = loss + gate_loss(log_q, gate.generic(inputs))
    loss = (share * (loss - config.gate_entropy * entropy(log_w))).sum()
    if not config.gate_balance:
        return loss
    of_step = log_w if len(step.user) == len(log_w) else gate(step)         # equal sums, however a step is divided
    return loss - config.gate_balance * share.sum() * balance(of_step)
