"""AdamW, its schedule, and its state as named tensors.

    m <- b1 m + (1 - b1) g,  v <- b2 v + (1 - b2) g^2,  p <- p - lr (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)

No weight decay: the reference is the regulariser. torch's fused AdamW, a pass over each parameter; or, for less memory:
moments in bfloat16, rounded at random so that what is below their precision is kept on average (RoundedAdamW); steps in
the backward pass itself, so that gradients are not all there at once (InBackward).
"""

import numpy as np
import torch

BETAS, EPS = (0.9, 0.99), 1e-8


def make_optimizer(module: torch.nn.Module, lr: float, head_lr: float = 0.0, gate: torch.nn.Module | None = None,
                   gate_lr: float = 0.0, moments: str = "float32", seed: int = 0, in_backward: list = ()):
    """AdamW, the low-rank factors and the gate at their own rates; and the parameters' names in its order. Factors, of
    heads or adapters, are the parameters named A and B. in_backward: parameters that step as soon as their gradient is
    there."""
    named = [(n, p) for n, p in module.named_parameters() if p.requires_grad]
    factors = {n for n, _ in named if n.rpartition(".")[2] in ("A", "B")}
    low, rest = [(n, p) for n, p in named if n in factors], [(n, p) for n, p in named if n not in factors]
    of_gate = [(f"gate.{n}", p) for n, p in gate.named_parameters() if p.requires_grad] if gate else []
    sets = [(part, peak) for part, peak in ((rest, lr), (low, head_lr), (of_gate, gate_lr)) if part]
    groups = [{"params": [p for _, p in part], "lr": peak, "peak": peak} for part, peak in sets]

    def adamw(groups, place=0):
        if moments == "bfloat16":
            return RoundedAdamW(groups, seed, place)
        return torch.optim.AdamW(groups, weight_decay=0.0, betas=BETAS, eps=EPS, fused=True)

    optimizer = InBackward(groups, adamw, in_backward) if in_backward else adamw(groups)
    return optimizer, [n for part, _ in sets for n, _ in part]


class RoundedAdamW(torch.optim.Optimizer):
    """AdamW without weight decay whose moments are bfloat16: half the memory. Each is rounded up or down by chance, to
    itself on average: rounded to the nearest, a moment stands still when its change is below a 256th of it. The noise
    belongs to (seed, step, place of the parameter, counted from `first`): a resumed run draws the same."""

    PIECE = 2**24                       # elements worked on at a time, in float32

    def __init__(self, groups, seed: int, first: int = 0):
        super().__init__(groups, {})
        self.seed, self.first = seed, first

    @torch.no_grad()
    def step(self):
        place = self.first - 1
        for group in self.param_groups:
            for p in group["params"]:
                place += 1
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["step"] = torch.zeros(())
                    state |= {key: torch.zeros_like(p, dtype=torch.bfloat16) for key in ("exp_avg", "exp_avg_sq")}
                state["step"] += 1
                t, noise = int(state["step"]), torch.Generator(p.device)
                noise.manual_seed(mixed(self.seed, t, place))
                step_of(p, p.grad, state["exp_avg"], state["exp_avg_sq"], group["lr"], t, noise, self.PIECE)


def mixed(*numbers: int) -> int:
    """One seed of 32 bits for torch.Generator, made of all the numbers, each 0 or more. A generator on a CPU uses only
    the low 32 bits of its seed, so numbers that are shifted or multiplied together would be lost."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def step_of(p, g, m16, v16, lr: float, t: int, noise: torch.Generator, piece: int) -> None:
    """One parameter's step, `piece` elements at a time. All flat views of the same shape."""
    (b1, b2), flat = BETAS, [x.view(-1).split(piece) for x in (p, g.contiguous(), m16, v16)]
    for p, g, m16, v16 in zip(*flat):
        m = m16.float().lerp_(g, 1 - b1)
        v = v16.float().mul_(b2).addcmul_(g, g, value=1 - b2)
        p.addcdiv_(m, (v / (1 - b2**t)).sqrt_().add_(EPS), value=-lr / (1 - b1**t))
        m16.copy_(rounded(m, noise))
        v16.copy_(rounded(v, noise))


def rounded(x: torch.Tensor, noise: torch.Generator) -> torch.Tensor:
    """float32 -> bfloat16, to one of the two neighbours, each as likely as x is near to it: a random number below a
    bfloat16's last place is added to the bits, and what is below that place is cut off."""
    bits = x.view(torch.int32) + torch.randint(2**16, x.shape, dtype=torch.int32, device=x.device, generator=noise)
    return bits.bitwise_and_(-(2**16)).view(torch.float32).bfloat16()


class InBackward:
    """An optimizer whose parameters `early` step, and let their gradient go, as soon as backward has made it, each by
    an AdamW of its own: the gradients of a model never lie in memory all at once. Each early parameter may get its
    gradient once a step only, and nobody can scale it by the norm of all. The others step when they are told to."""

    def __init__(self, groups, adamw, early):
        self.each, self.param_groups = {}, []
        for group in groups:
            for p in group["params"]:
                self.each[p] = adamw([group | {"params": [p]}], len(self.each))
                self.param_groups += self.each[p].param_groups
        for p in early:
            p.register_post_accumulate_grad_hook(self.now)

    @property
    def state(self):
        """Moments and step count of each parameter, as torch's optimizers have them."""
        return {p: one.state[p] for p, one in self.each.items()}

    def now(self, p):
        self.each[p].step()
        p.grad = None

    def step(self):
        for one in self.each.values():                                      # without a gradient it does nothing
            one.step()

    def zero_grad(self, set_to_none: bool = True):
        for one in self.each.values():
            one.zero_grad(set_to_none)


def set_rate(optimizer, t: int, total: int, warmup: int) -> None:
    """Linear warm-up to the peak over `warmup` steps, then linear decay to a tenth at the last step, t = total - 1."""
    scale = (t + 1) / warmup if t < warmup else 1 - 0.9 * (t - warmup + 1) / max(total - warmup, 1)
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * scale


def optimizer_state(optimizer, names: list[str]) -> dict[str, torch.Tensor]:
    """AdamW's moments and step counts as named tensors."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    assert len(params) == len(names), f"got {len(names)} names for {len(params)} parameters"
    return {f"optimizer.{key}.{name}": value
            for name, p in zip(names, params) for key, value in optimizer.state[p].items()}


@torch.no_grad()
def load_optimizer_state(optimizer, names: list[str], tensors: dict[str, torch.Tensor]) -> None:
    """The inverse of optimizer_state, exact to the bit."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for name, p in zip(names, params):
        for key in ("step", "exp_avg", "exp_avg_sq"):
            value = tensors[f"optimizer.{key}.{name}"]
            optimizer.state[p][key] = value.to(p.device).clone()
