"""AdamW, its schedule, and its state as named tensors."""

import torch


def make_optimizer(module: torch.nn.Module, lr: float, head_lr: float = 0.0, gate: torch.nn.Module | None = None,
                   gate_lr: float = 0.0) -> tuple[torch.optim.AdamW, list[str]]:
    """AdamW without weight decay (the reference is the regulariser), the low-rank factors and the gate at their own
    rates; and the parameters' names in its order. Factors, of heads or adapters, are the parameters named A and B."""
    named = [(n, p) for n, p in module.named_parameters() if p.requires_grad]
    factors = {n for n, _ in named if n.rpartition(".")[2] in ("A", "B")}
    low, rest = [(n, p) for n, p in named if n in factors], [(n, p) for n, p in named if n not in factors]
    of_gate = [(f"gate.{n}", p) for n, p in gate.named_parameters() if p.requires_grad] if gate else []
    sets = [(part, peak) for part, peak in ((rest, lr), (low, head_lr), (of_gate, gate_lr)) if part]
    groups = [{"params": [p for _, p in part], "lr": peak, "peak": peak} for part, peak in sets]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0, betas=(0.9, 0.99), fused=True)
    return optimizer, [n for part, _ in sets for n, _ in part]


def set_rate(optimizer, t: int, total: int, warmup: int) -> None:
    """Linear warm-up to the peak over `warmup` steps, then linear decay to a tenth at the last step, t = total - 1."""
    scale = (t + 1) / warmup if t < warmup else 1 - 0.9 * (t - warmup + 1) / max(total - warmup, 1)
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * scale


def optimizer_state(optimizer: torch.optim.Optimizer, names: list[str]) -> dict[str, torch.Tensor]:
    """AdamW's moments and step counts as named tensors."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    assert len(params) == len(names), f"got {len(names)} names for {len(params)} parameters"
    return {f"optimizer.{key}.{name}": value
            for name, p in zip(names, params) for key, value in optimizer.state[p].items()}


@torch.no_grad()
def load_optimizer_state(optimizer: torch.optim.Optimizer, names: list[str], tensors: dict[str, torch.Tensor]) -> None:
    """The inverse of optimizer_state, exact to the bit."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for name, p in zip(names, params):
        for key in ("step", "exp_avg", "exp_avg_sq"):
            value = tensors[f"optimizer.{key}.{name}"]
            optimizer.state[p][key] = value.to(p.device).clone()
