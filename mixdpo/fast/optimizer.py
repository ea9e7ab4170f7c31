"""AdamW, its schedule, and its state as named tensors.

    m <- b1 m + (1 - b1) g,  v <- b2 v + (1 - b2) g^2,  p <- p - lr (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)

No weight decay: the reference is the regulariser. torch's fused AdamW; or, for less memory,
moments in bfloat16 with stochastic rounding (RoundedAdamW).
"""

import math
from collections.abc import Callable

import numpy as np
import torch

BETAS, EPS = (0.9, 0.99), 1e-8


def make_optimizer(module: torch.nn.Module, lr: float, head_lr: float = 0.0,
                   gate: tuple[torch.nn.Module, float] | None = None, moments: str = "float32", seed: int = 0,
                   norm: Callable | None = None):
    """AdamW, and the names of its parameters in its order. Low-rank factors, which are the parameters named A, B, A_0
    and B_0, learn at head_lr, the others at lr. gate: a module and its learning rate. norm(gradient norm of the
    parameters that learn at lr) -> that of all processes, of which each has others of them, or none."""
    named = [(n, p) for n, p in module.named_parameters() if p.requires_grad]
    factors = {n for n, _ in named if n.rpartition(".")[2] in ("A", "B", "A_0", "B_0")}
    low, rest = [(n, p) for n, p in named if n in factors], [(n, p) for n, p in named if n not in factors]
    of_gate = [(f"gate.{n}", p) for n, p in gate[0].named_parameters() if p.requires_grad] if gate else []
    plain, sharded = [(n, p) for n, p in rest if not is_sharded(p)], [(n, p) for n, p in rest if is_sharded(p)]
    sets = [(plain, lr, norm or float), (sharded, lr, norm_of_shards), (low, head_lr, float),
            (of_gate, gate[1] if gate else 0.0, float)]
    groups = [{"params": [p for _, p in part], "lr": peak, "peak": peak, "norm": whole}
              for part, peak, whole in sets if part or whole is norm]       # norm is called in every process
    names = [n for part, _, _ in sets for n, _ in part]
    if moments == "bfloat16":
        return RoundedAdamW(groups, seed), names
    return torch.optim.AdamW(groups, weight_decay=0.0, betas=BETAS, eps=EPS, fused=True), names


class RoundedAdamW(torch.optim.Optimizer):
    """AdamW without weight decay whose moments are bfloat16: half the memory. They are rounded at random and unbiased;
    rounded to nearest, a moment would not change if its change is below a 256th of it. The noise belongs to (seed,
    step, number of the parameter), so a resumed run draws the same noise."""

    PIECE = 2**24                       # elements in float32 at a time

    def __init__(self, groups, seed: int):
        super().__init__(groups, {})
        self.seed = seed

    @torch.no_grad()
    def step(self):
        place = -1
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
                noise = torch.Generator(p.device)
                noise.manual_seed(mixed(self.seed, int(state["step"]), place))
                self.update(p, p.grad, state, group["lr"], noise)

    def update(self, p: torch.Tensor, grad: torch.Tensor, state: dict, lr: float,
               noise: torch.Generator) -> None:
        """One parameter's step, PIECE elements at a time; changes p and its moments."""
        (b1, b2), t = BETAS, int(state["step"])
        flat = [x.view(-1).split(self.PIECE) for x in (p, grad.contiguous(), state["exp_avg"], state["exp_avg_sq"])]
        for x, g, m16, v16 in zip(*flat):
            m = m16.float().lerp_(g, 1 - b1)
            v = v16.float().mul_(b2).addcmul_(g, g, value=1 - b2)
            x.addcdiv_(m, (v / (1 - b2**t)).sqrt_().add_(EPS), value=-lr / (1 - b1**t))
            m16.copy_(rounded(m, noise))
            v16.copy_(rounded(v, noise))


def mixed(*numbers: int) -> int:
    """One seed of 32 bits for torch.Generator from all the numbers, each 0 or more. A generator on a CPU uses only the
    low 32 bits of its seed, so shifted or multiplied numbers would be lost."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def rounded(x: torch.Tensor, noise: torch.Generator) -> torch.Tensor:
    """float32 -> bfloat16 by stochastic rounding: to one of the two neighbours, unbiased. A random number below the
    last place of bfloat16 is added to the bits, which are then truncated."""
    bits = x.view(torch.int32) + torch.randint(2**16, x.shape, dtype=torch.int32, device=x.device, generator=noise)
    return bits.bitwise_and_(-(2**16)).view(torch.float32).bfloat16()


def clip_and_step(optimizer, loss: float, clip: float) -> float:
    """Clips the accumulated gradients, steps, and clears them; returns their norm before.

    Raises: FloatingPointError, and changes no parameter, if the loss or the norm is NaN or infinite.
    """
    kinds: dict[Callable, list] = {}                                        # by what makes the norm of all processes
    for group in optimizer.param_groups:
        kinds.setdefault(group.get("norm", float), []).extend(p for p in group["params"] if p.grad is not None)
    norm = math.hypot(*(of_all(torch.nn.utils.get_total_norm([p.grad for p in some]))
                        for of_all, some in kinds.items()))
    if not math.isfinite(loss) or not math.isfinite(norm):
        raise FloatingPointError(f"loss {loss}, gradient norm {norm}")
    if norm > clip:
        for some in kinds.values():                                         # no operation takes plain and sharded ones
            torch.nn.utils.clip_grads_with_norm_(some, clip, torch.tensor(norm))
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm


def set_rate(optimizer, t: int, total: int, warmup: int) -> None:
    """Linear warm-up to the peak over `warmup` steps, then linear decay to a tenth at the last step, t = total - 1."""
    scale = (t + 1) / warmup if t < warmup else 1 - 0.9 * (t - warmup + 1) / max(total - warmup, 1)
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * scale


def is_sharded(x: torch.Tensor) -> bool:
    """Whether each of several processes has a part of it (a DTensor, runs/distributed.py)."""
    return hasattr(x, "full_tensor")


def norm_of_shards(x) -> float:
    """A norm whose square is the sum over several processes (or 0, which is not sharded)."""
    return float(x.full_tensor() if is_sharded(x) else x)


def optimizer_state(optimizer, names: list[str], complete=lambda x: x) -> dict[str, torch.Tensor]:
    """AdamW's moments and step counts as named tensors. complete: makes a tensor of a sharded one."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    assert len(params) == len(names), f"got {len(names)} names for {len(params)} parameters"
    return {f"optimizer.{key}.{name}": complete(value)
            for name, p in zip(names, params) for key, value in optimizer.state[p].items()}


@torch.no_grad()
def load_optimizer_state(optimizer, names: list[str], tensors: dict[str, torch.Tensor],
                         placed=lambda value, p: value.to(p.device).clone()) -> None:
    """The inverse of optimizer_state, exact to the bit. placed: a moment as a copy where its parameter is."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for name, p in zip(names, params):
        for key in ("step", "exp_avg", "exp_avg_sq"):
            value = tensors[f"optimizer.{key}.{name}"]
            optimizer.state[p][key] = value.to(p.device).clone() if key == "step" else placed(value, p)
