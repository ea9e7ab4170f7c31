"""Modular deployment: experts from finished runs, new experts, and experts that are not trained.

    --init-experts runs/a:0,runs/b:1,fresh     expert 0 starts as expert 0 of run a, ..., the third as the reference
    --freeze 0,1 (or all)                       these experts stay bit-identical; the others and the gate are trained

Heads can start as heads of the same rank on the same frozen trunk, adapters as adapters of the same rank and
projections on the same base, and models (--sharing models) as an expert of any run. The reference must be the same in
both runs, because an expert's margins (M3, M4) are relative to its reference.
"""

from pathlib import Path

import torch

from mixdpo.config import InputError
from mixdpo.experts import Adapters, Heads, Models
from mixdpo.runs.checkpoint import untie
from mixdpo.runs.load_run import load_experts


def init_experts(experts: Heads | Adapters | Models, config, keys: list[str]) -> None:
    """Applies --init-experts and --freeze. keys: the content key of each reference. Raises: InputError naming the run
    that does not fit, and why."""
    begun, sources = config.init_experts.split(",") if config.init_experts else [], {}
    for k, entry in enumerate(begun):
        if entry == "fresh":
            continue
        path, _, number = entry.rpartition(":")
        if not path or not number.isdigit():
            raise InputError(f"got {entry!r}, wanted RUN:k, a run directory and the number of an expert",
                             option="init_experts")
        if path not in sources:
            sources[path] = load_experts(Path(path), "cpu", config.data_folder)
        its, source, _, state = sources[path]
        if int(number) >= source.K:
            raise InputError(f"got {entry!r}, but that run has the experts 0 to {source.K - 1}; choose one of these",
                             option="init_experts")
        if state["config"]["model_key"] != keys[k % len(keys)]:
            raise InputError(f"got {entry!r}, which was trained against another reference, {its.model}, than expert "
                             f"{k} has here, {config.models[k % len(keys)]}; name its model in --model",
                             option="init_experts")
        if k not in getattr(experts, "elsewhere", []):                      # expert parallelism: in other processes
            take_over(experts, k, source, int(number), entry)
    if config.frozen:
        freeze(experts, config.frozen)


@torch.no_grad()
def take_over(experts, k: int, source, j: int, entry: str) -> None:
    """Copies the source's expert j into expert k."""
    if isinstance(experts, Models):
        model, head = source.policy(j)
        own = experts.models.get_submodule(str(k))
        if head is not model.unembedding and own.config.tied:
            own = untie(experts, k)
        given = model.state_dict() | ({"lm_head.weight": head} if not own.config.tied else {})
        for name, value in own.state_dict().items():
            value.copy_(given[name])
        return
    if isinstance(source, Adapters) and source.shared:
        raise InputError(f"got {entry!r}, whose experts have a shared adapter, which cannot be taken over; use "
                         "--sharing models, which takes any expert over", option="init_experts")
    wanted = {name: value.shape[1:] for name, value in experts.named_parameters() if is_factor(name)}
    given = {name: value for name, value in source.named_parameters() if is_factor(name)}
    if type(source) is not type(experts) or {name: value.shape[1:] for name, value in given.items()} != wanted:
        raise InputError(f"got {entry!r}, which is no {type(experts).__name__[:-1].lower()} of the same kind and rank "
                         "as those here; choose that run's --sharing, --rank and --targets, or --sharing models, which "
                         "takes any expert over", option="init_experts")
    if isinstance(source, Heads) and any(p.requires_grad for p in source.trunk.parameters()):
        raise InputError(f"got {entry!r}, whose trunk has learnt too, and its heads fit no other trunk; take it over "
                         "with --sharing models", option="init_experts")
    for name, value in experts.named_parameters():
        if is_factor(name):
            value[k] = given[name][j]


def freeze(experts, frozen: list[int]) -> None:
    """Keeps these experts bit-identical: Adam without weight decay does not change what never has a gradient."""
    all_frozen = len(frozen) == experts.K
    for name, p in experts.named_parameters():
        if isinstance(experts, Models):
            kept = int(name.split(".")[1]) in frozen                        # models.K.NAME
        else:
            kept = all_frozen
        if kept and p.requires_grad:
            p.requires_grad_(False)
            p.frozen = True                                                 # a checkpoint still holds it
        elif p.requires_grad and not isinstance(experts, Models):
            others = torch.ones(experts.K, *[1] * (p.ndim - 1), device=p.device)
            others[frozen] = 0
            p.register_hook(lambda grad, others=others: grad * others)
            p.learns = others                                     # for what is added to gradients later: DP-SGD's noise


def is_factor(name: str) -> bool:
    """Whether a parameter has one row an expert: the factors A and B, or the full heads."""
    return name.rpartition(".")[2] in ("A", "B", "W_k")
