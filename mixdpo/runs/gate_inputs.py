"""What a run's gate reads of its units, and the gate of a run: a new one, or a saved one."""

import math

import torch

from mixdpo.gates import READS_PROMPT, Gate, Inputs, first_weights
from mixdpo.plan import Plan
from mixdpo.preferences import Pair
from mixdpo.runs.checkpoint import load_gate
from mixdpo.runs.reference import Reference


def make_gate(plan: Plan, reference: Reference, config, device) -> tuple[Gate, Inputs]:
    """A run's gate and its inputs, a row a unit of the plan. reference: that of the plan's pairs."""
    first = [unit[0] for unit in plan.units]                                # a unit has one prior: any pair will do
    prompts = reference.prompt[first, ("last", "mean").index(config.gate_features)]         # (U,C)
    inputs = gate_inputs(config.gate, [plan.pairs[i] for i in first], prompts, known_pairs(plan)).to(device)
    log_w, private = first_weights(config).to(device), config.epsilon < math.inf
    return Gate(config.gate, config.experts, inputs, log_w, config.seed, unit_rows=private).to(device), inputs


def gate_inputs(kind: str, pairs: list[Pair], prompts: torch.Tensor, known: list[Pair]) -> Inputs:
    """The gate's inputs for `pairs`, one a unit. prompts (N,C): features of their prompts; known: the training pairs,
    whose users and domains are the ones that have a place."""
    named = dict.fromkeys(p.user for p in known if p.user is not None)
    users: dict[str | None, int] = {user: n for n, user in enumerate(named, start=1)}
    user = torch.tensor([users.get(p.user, 0) for p in pairs], dtype=torch.int64)
    if kind == "domain":
        domains = domains_of(known)
        labels = torch.tensor([domains.index(p.domain) if p.domain in domains else -1 for p in pairs])
        return Inputs((labels[:, None] == torch.arange(len(domains))).float(), user)        # (N,D), a row of 0: unknown
    return Inputs(prompts if kind in READS_PROMPT else prompts[:, :0], user)


def known_pairs(plan: Plan) -> list[Pair]:
    """The training pairs whose user and domain are trained on: those have a place in a gate. Others are in the file
    alone, with context pairs that the E-step does not look at."""
    trained = [plan.pairs[i] for unit in plan.units for i in unit]
    users, domains = {pair.user for pair in trained}, {pair.domain for pair in trained}
    return [pair for pair in plan.pairs if pair.user in users and pair.domain in domains]


def domains_of(pairs: list[Pair]) -> list[str]:
    """Expert k of a `domain` gate is that of the k-th domain."""
    return sorted({p.domain for p in pairs if p.domain is not None})


def saved_gate(config, tensors: dict[str, torch.Tensor], known: list[Pair]) -> Gate:
    """The gate that checkpoint.gate_state saved, on the CPU. known: the pairs it was trained on."""
    width = len(domains_of(known)) if config.gate == "domain" else len(tensors.get("gate.mean", ()))
    sizes = Inputs(torch.zeros(1, width), torch.tensor([max(0, len(tensors.get("gate.E", ())) - 1)]))
    gate = Gate(config.gate, config.experts, sizes, first_weights(config), config.seed,
                unit_rows=config.epsilon < math.inf)
    load_gate(gate, {name: value.cpu() for name, value in tensors.items()})
    return gate
