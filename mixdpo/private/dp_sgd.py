"""Differential privacy by noise on clipped gradients (DP-SGD; Abadi et al. 2016, arXiv 1607.00133).

    examples of a step   each by itself with chance q: Poisson sampling, a step without any steps too
    g_i                  gradient of example i's loss, all parameters together; a tied weight's uses are summed first
    clipped              g_i min(1, C / (|g_i| + 1e-6))                one example moves the sum by C at most
    released             (sum_i clipped + N(0, (sigma C)^2)) / (q N)   divided by what is expected, not by what came

All that follows from what is released (Adam, averaging, sampling) costs nothing more. What it has cost in all is
accountant.py's to say. Neighbours differ in one example: a row, a pair, or a user with all that is theirs.

Three ways to the sum of clipped gradients, equal but for rounding:

    clipped_sum_slow    one example after another; the one to compare with
    clipped_sum         vmap over grad: all examples' gradients lie in memory at once
    ghost_clipped_sum   none does: norms and weighted sums come from what goes into layers and what comes back
                        (Goodfellow 2015, arXiv 1510.01799; Li et al. 2022, arXiv 2110.05679; one backward pass for
                        both, as Bu et al. 2023, arXiv 2210.00038)

and ClippedSum for a training loop that makes the gradient of one example (a user, say) at a time.
All random numbers come from the run's secret key (keys.py). What the guarantee leaves open: NOT_COVERED.
"""

from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from mixdpo.private.keys import Key

NOT_COVERED = (
    "the number of examples, from which the sampling rate and the number of steps are made: declared public",
    "the vocabulary: legal values and bounds of columns, and the tokenizer, are taken to be public",
    "choices made by looking at the data before: hyper-parameters, seeds, the schema, which of several runs to publish",
    "floating-point arithmetic: Gaussian noise in finite precision is not an exact Gaussian (Mironov 2012), and "
    "rounding depends on which examples share a product",
    "timing: a step takes longer if more examples take part in it",
    "the generator: Philox is not a cryptographic one; and whoever reads the secret key while the run is unfinished",
)


def clip_factors(norm: torch.Tensor, clip: float) -> torch.Tensor:
    """What each example's gradient is multiplied with: (N,) -> (N,)."""
    return (clip / (norm + 1e-6)).clamp(max=1.0)


# --- sums of clipped gradients ----------------------------------------------------------------------------------------


def per_example_gradients(loss, parameters: dict[str, torch.Tensor], *rows: torch.Tensor) -> dict[str, torch.Tensor]:
    """loss(parameters, *one example of rows) -> (); rows (N,...) each -> gradients (N, *shape) by name."""
    with sdpa_kernel(SDPBackend.MATH):                                      # the kernels have no rule for vmap
        return torch.func.vmap(torch.func.grad(loss), in_dims=(None, *[0] * len(rows)))(parameters, *rows)


def clipped_sum(loss, parameters, clip: float, *rows) -> dict[str, torch.Tensor]:
    """sum_i g_i min(1, clip / |g_i|) by name; arguments as above."""
    each = per_example_gradients(loss, parameters, *rows)
    norm = sum(g.flatten(1).square().sum(1) for g in each.values()).sqrt()                  # (N,)
    factor = clip_factors(norm, clip)
    return {name: torch.tensordot(factor, g, dims=1) for name, g in each.items()}


def clipped_sum_slow(loss, parameters, clip: float, *rows) -> dict[str, torch.Tensor]:
    """The same, one example after another."""
    total = {name: torch.zeros_like(p) for name, p in parameters.items()}
    for row in zip(*rows):
        one = torch.func.grad(loss)(parameters, *row)
        factor = clip_factors(torch.cat([g.flatten() for g in one.values()]).norm(), clip)
        for name, g in one.items():
            total[name] += factor * g
    return total


def ghost_clipped_sum(module: nn.Module, losses, clip: float) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """The same by name, and the losses (N,), detached. losses() -> (N,): of each example, from one forward pass in
    which every trained parameter is used by its Linear, Embedding or LayerNorm alone, on tensors whose first axis is
    the example. Two modules may share a parameter. Raises: TypeError on any other module that has parameters.
    """
    records, hooks = [], []
    for child in module.modules():
        own = [p for p in child.parameters(recurse=False) if p.requires_grad]
        if own and not isinstance(child, (nn.Linear, nn.Embedding, nn.LayerNorm)):
            raise TypeError(f"no rule for the gradients of {type(child).__name__}; wanted Linear, Embedding, LayerNorm")
        if own:
            hooks.append(child.register_forward_hook(lambda m, x, y: records.append((m, x[0].detach(), y))))
    try:
        with torch.enable_grad():
            loss = losses()
    finally:
        for hook in hooks:
            hook.remove()
    back = torch.autograd.grad(loss.sum(), [y for _, _, y in records])
    uses = {}                                                               # parameter -> how it was used
    for (child, x, _), g in zip(records, back):
        for p, use in uses_of(child, x, g):
            uses.setdefault(p, []).append(use)
    norm = sum(a.dot(b) for used in uses.values() for a in used for b in used).clamp(min=0).sqrt()      # (N,)
    factor = clip_factors(norm, clip)
    name_of = {p: name for name, p in module.named_parameters() if p.requires_grad}
    return {name: sum(use.total(factor, p) for use in uses[p]) if p in uses else torch.zeros_like(p)
            for p, name in name_of.items()}, loss.detach()


@dataclass
class Outer:
    """A weight (out,in) in y = x W^T: example n's gradient is sum_t back_nt x_nt^T."""

    back: torch.Tensor              # (N,T,out)
    x: torch.Tensor                 # (N,T,in)

    def dot(self, other) -> torch.Tensor:
        """Inner products of the gradients of two uses of a weight, example by example: (N,)."""
        if isinstance(other, Lookup):
            return other.dot(self)
        return ((self.back @ other.back.mT) * (self.x @ other.x.mT)).sum((1, 2))            # (N,T,T) each

    def total(self, factor: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
        """Their sum, weighted by factor (N,), as p is shaped."""
        return (self.back * factor[:, None, None]).flatten(0, 1).T @ self.x.flatten(0, 1)


@dataclass
class Lookup:
    """A table (V,C) of which row ids_nt was taken: example n's gradient has back_nt added there."""

    ids: torch.Tensor               # (N,T)
    back: torch.Tensor              # (N,T,C)

    def dot(self, other) -> torch.Tensor:
        if isinstance(other, Outer):                                        # a tied unembedding: other.back is (N,S,V)
            at = other.back.gather(2, self.ids[:, None].expand(-1, other.back.shape[1], -1))            # (N,S,T)
            return (at * (other.x @ self.back.mT)).sum((1, 2))
        same = self.ids[:, :, None] == other.ids[:, None]                   # (N,T,T)
        return ((self.back @ other.back.mT) * same).sum((1, 2))

    def total(self, factor: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(p).index_add(0, self.ids.flatten(), (self.back * factor[:, None, None]).flatten(0, 1))


@dataclass
class Whole:
    """A small parameter, of which each example's gradient is made."""

    each: torch.Tensor              # (N, *shape)

    def dot(self, other) -> torch.Tensor:
        return (self.each * other.each).flatten(1).sum(1)

    def total(self, factor: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
        return torch.tensordot(factor, self.each, dims=1)


def uses_of(module: nn.Module, x: torch.Tensor, back: torch.Tensor) -> list[tuple[nn.Parameter, object]]:
    """The parameters of a layer that was given x, and whose output has the gradient `back`, with how it used each."""
    back = back.reshape(len(back), -1, back.shape[-1])                      # (N,T,out)
    if isinstance(module, nn.Embedding):
        found = [(module.weight, Lookup(x.reshape(len(x), -1), back))]
    elif isinstance(module, nn.Linear):
        found = [(module.weight, Outer(back, x.reshape(len(x), -1, x.shape[-1])))]
    else:
        normal = F.layer_norm(x, module.normalized_shape, eps=module.eps).view_as(back)
        found = [(module.weight, Whole((back * normal).sum(1)))]
    bias = getattr(module, "bias", None)
    found += [(bias, Whole(back.sum(1)))] if bias is not None else []
    return [(p, use) for p, use in found if p.requires_grad]


# --- sampling and noise -----------------------------------------------------------------------------------------------


def participants(key: Key, examples: list[str], rate: float, steps: int) -> list[np.ndarray]:
    """Poisson sampling: of each step the examples that take part, as indices in order, perhaps none. Each takes part by
    itself with chance `rate`, by numbers that depend on the key and its own name alone."""
    takes = [np.flatnonzero(key.generator("sampling", name).random(steps) < rate) for name in examples]
    step, example = np.concatenate([np.empty(0, int), *takes]), np.repeat(np.arange(len(takes)), [*map(len, takes)])
    order = np.argsort(step, kind="stable")
    return np.split(example[order], np.bincount(step, minlength=steps).cumsum()[:-1])


@dataclass(frozen=True)
class Noise:
    """What is added to a sum of clipped gradients, and what that is divided by."""

    sigma: float                    # noise multiplier; 0: none, and no privacy
    clip: float                     # C
    expected: float                 # examples in a step, on average: q N
    key: Key

    def release(self, total: list[torch.Tensor], t: int) -> list[torch.Tensor]:
        """The mean of step t, noised: of one shape and device with each of `total`, which may be of an empty step."""
        generator, scale = self.key.generator("noise", t), self.sigma * self.clip
        made = [torch.from_numpy(generator.standard_normal(g.shape)) for g in total]        # float64
        return [(g + (scale * noise).to(g)) / self.expected for g, noise in zip(total, made)]


@dataclass
class ClippedSum:
    """Sums the gradients in .grad over step t, one example at a time: add() takes each, release() ends the step."""

    parameters: list[nn.Parameter]
    noise: Noise
    t: int
    total: list[torch.Tensor] = field(init=False)
    norms: list[float] = field(init=False)

    def __post_init__(self):
        self.total, self.norms = [torch.zeros_like(p) for p in self.parameters], []

    @torch.no_grad()
    def add(self) -> None:
        """Takes one example's gradient and clears it. Raises: FloatingPointError if it is not finite."""
        there = [(s, p.grad) for s, p in zip(self.total, self.parameters) if p.grad is not None]
        norm = torch.nn.utils.get_total_norm([g for _, g in there])
        if not norm.isfinite():
            raise FloatingPointError(f"gradient norm {float(norm)} of one example")
        for s, g in there:
            s.add_(g * clip_factors(norm, self.noise.clip))
        self.norms.append(float(norm))
        for p in self.parameters:
            p.grad = None

    def release(self) -> None:
        """Puts the step's noised mean into .grad of every parameter, and 0 where a parameter is frozen."""
        for p, g in zip(self.parameters, self.noise.release(self.total, self.t)):
            p.grad = g * getattr(p, "learns", 1.0)
