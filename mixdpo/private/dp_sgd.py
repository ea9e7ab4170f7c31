"""Differential privacy by noise on clipped gradients (DP-SGD; Abadi et al. 2016, arXiv 1607.00133).

    examples of a step   each example independently with probability q: Poisson sampling; an empty step is a step too
    g_i                  gradient of example i's loss, all parameters together; a tied weight's uses are summed first
    clipped              g_i min(1, C / (|g_i| + 1e-6))                one example moves the sum by at most C
    released             (sum_i clipped + N(0, (sigma C)^2)) / (q N)   divided by the expected, not the actual number

Everything computed from released values (Adam, averaging, sampling) costs no more privacy. accountant.py computes the
total cost. Neighbours differ in one example: a row, a pair, or a user with all of their pairs.

There are three ways to compute the sum of clipped gradients; they are equal up to rounding:

    clipped_sum_slow    one example after another; the reference for tests
    clipped_sum         vmap over grad: the gradients of all examples are in memory at once
    ghost_clipped_sum   no example's gradient is in memory: norms and weighted sums are computed from the inputs of the
                        layers and the gradients of their outputs (Goodfellow 2015, arXiv 1510.01799; Li et al. 2022,
                        arXiv 2110.05679; with one backward pass for both, as Bu et al. 2023, arXiv 2210.00038)

ClippedSum is for a training loop that computes the gradient of one example (for instance, one user) at a time.
All random numbers come from the run's secret key (keys.py). NOT_COVERED lists what the guarantee does not cover.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from mixdpo.private.keys import Key

NOT_COVERED = (
    "the number of examples, which determines the sampling rate and the number of steps: declared public",
    "the vocabulary: legal values and bounds of columns, and the tokenizer, are taken to be public",
    "choices made after looking at the data: hyper-parameters, seeds, the schema, which of several runs to publish",
    "floating-point arithmetic: Gaussian noise in finite precision is not an exact Gaussian (Mironov 2012), and "
    "rounding depends on which examples share a product",
    "timing: a step takes longer if more examples take part in it",
    "the generator: Philox is not cryptographic; and anyone who reads the secret key while the run is unfinished",
)


def clip_factors(norm: torch.Tensor, clip: float) -> torch.Tensor:
    """The factor for each example's gradient: norms (N,) -> (N,)."""
    return (clip / (norm + 1e-6)).clamp(max=1.0)


# --- sums of clipped gradients ----------------------------------------------------------------------------------------


def per_example_gradients(loss, parameters: dict[str, torch.Tensor], *rows: torch.Tensor) -> dict[str, torch.Tensor]:
    """loss(parameters, *one example of rows) -> (); rows (N,...) each -> gradients (N, *shape) by name."""
    with sdpa_kernel(SDPBackend.MATH):                                      # the other kernels do not support vmap
        return torch.func.vmap(torch.func.grad(loss), in_dims=(None, *[0] * len(rows)))(parameters, *rows)


def clipped_sum(loss, parameters, clip: float, *rows) -> dict[str, torch.Tensor]:
    """sum_i g_i min(1, clip / |g_i|) by name; arguments as for per_example_gradients."""
    each = per_example_gradients(loss, parameters, *rows)
    norm = sum((g.flatten(1).square().sum(1) for g in each.values()), start=torch.zeros(())).sqrt()     # (N,)
    factor = clip_factors(norm, clip)
    return {name: torch.tensordot(factor, g, dims=1) for name, g in each.items()}


def clipped_sum_slow(loss, parameters, clip: float, *rows) -> dict[str, torch.Tensor]:
    """Equals clipped_sum, one example after another."""
    total = {name: torch.zeros_like(p) for name, p in parameters.items()}
    for row in zip(*rows):
        gradients = torch.func.grad(loss)(parameters, *row)
        factor = clip_factors(torch.cat([g.flatten() for g in gradients.values()]).norm(), clip)
        for name, g in gradients.items():
            total[name] += factor * g
    return total


def ghost_clipped_sum(module: nn.Module, losses, clip: float) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Equals clipped_sum without per-example gradients -> ({name: sum}, the losses (N,), detached).

    losses() -> (N,): the loss of each example, from one forward pass. In it every trained parameter belongs to a
    Linear, Embedding or LayerNorm and is used by that module only, on tensors whose first axis is the example. Two
    modules may share a parameter. Raises: TypeError on any other module with parameters.
    """
    records, hooks = [], []
    for child in module.modules():
        own = [p for p in child.parameters(recurse=False) if p.requires_grad]
        if own and not isinstance(child, (nn.Linear, nn.Embedding, nn.LayerNorm)):
            raise TypeError(f"cannot clip gradients of {type(child).__name__}; wanted Linear, Embedding or LayerNorm")
        if own:
            hooks.append(child.register_forward_hook(lambda m, x, y: records.append((m, x[0].detach(), y))))
    try:
        with torch.enable_grad():
            loss = losses()
    finally:
        for hook in hooks:
            hook.remove()
    back = torch.autograd.grad(loss.sum(), [y for _, _, y in records])
    uses: dict[torch.Tensor, list[Use]] = {}                                # by parameter
    for (child, x, _), g in zip(records, back):
        for p, use in uses_of(child, x, g):
            uses.setdefault(p, []).append(use)
    dots = (a.dot(b) for used in uses.values() for a in used for b in used)
    norm = sum(dots, start=torch.zeros(())).clamp(min=0).sqrt()             # (N,)
    factor = clip_factors(norm, clip)
    name_of = {p: name for name, p in module.named_parameters() if p.requires_grad}
    total = {name: sum((use.total(factor, p) for use in uses[p]), start=torch.zeros(())) if p in uses else
             torch.zeros_like(p) for p, name in name_of.items()}
    return total, loss.detach()


@dataclass
class Outer:
    """A use of a weight (out,in) in y = x W^T: example n's gradient is sum_t back_nt x_nt^T."""

    back: torch.Tensor              # (N,T,out) gradient of y
    x: torch.Tensor                 # (N,T,in)

    def dot(self, other) -> torch.Tensor:
        """For each example, the inner product of the gradients from two uses of a weight: (N,)."""
        if isinstance(other, Lookup):
            return other.dot(self)
        return ((self.back @ other.back.mT) * (self.x @ other.x.mT)).sum((1, 2))            # (N,T,T) each

    def total(self, factor: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
        """The sum of the examples' gradients, weighted by factor (N,), in the shape of p."""
        return (self.back * factor[:, None, None]).flatten(0, 1).T @ self.x.flatten(0, 1)


@dataclass
class Lookup:
    """A use of rows ids_nt of a table (V,C): example n's gradient is the sum of back_nt at row ids_nt."""

    ids: torch.Tensor               # (N,T)
    back: torch.Tensor              # (N,T,C) gradient of the rows

    def dot(self, other) -> torch.Tensor:
        """As Outer.dot."""
        if isinstance(other, Outer):                                        # a tied unembedding: other.back is (N,S,V)
            at = other.back.gather(2, self.ids[:, None].expand(-1, other.back.shape[1], -1))            # (N,S,T)
            return (at * (other.x @ self.back.mT)).sum((1, 2))
        same = self.ids[:, :, None] == other.ids[:, None]                   # (N,T,T)
        return ((self.back @ other.back.mT) * same).sum((1, 2))

    def total(self, factor: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
        """As Outer.total."""
        return torch.zeros_like(p).index_add(0, self.ids.flatten(), (self.back * factor[:, None, None]).flatten(0, 1))


@dataclass
class Direct:
    """A use of a small parameter, for which every example's gradient is computed."""

    each: torch.Tensor              # (N, *shape)

    def dot(self, other) -> torch.Tensor:
        """As Outer.dot."""
        return (self.each * other.each).flatten(1).sum(1)

    def total(self, factor: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
        """As Outer.total."""
        return torch.tensordot(factor, self.each, dims=1)


Use = Outer | Lookup | Direct


def uses_of(module: nn.Module, x: torch.Tensor, back: torch.Tensor) -> list[tuple[torch.Tensor, Use]]:
    """The parameters of a layer and their uses. x: the layer's input (N,...); back: the gradient of its output."""
    back = back.reshape(len(back), -1, back.shape[-1])                      # (N,T,out)
    found: list[tuple[torch.Tensor, Use]]
    if isinstance(module, nn.Embedding):
        found = [(module.weight, Lookup(x.reshape(len(x), -1), back))]
    elif isinstance(module, nn.Linear):
        found = [(module.weight, Outer(back, x.reshape(len(x), -1, x.shape[-1])))]
    else:
        assert isinstance(module, nn.LayerNorm), f"got {type(module).__name__}, want Linear, Embedding or LayerNorm"
        normal = F.layer_norm(x, module.normalized_shape, eps=module.eps).view_as(back)
        found = [(module.weight, Direct((back * normal).sum(1)))]
    bias = getattr(module, "bias", None)
    found += [(bias, Direct(back.sum(1)))] if bias is not None else []
    return [(p, use) for p, use in found if p.requires_grad]


# --- sampling and noise -----------------------------------------------------------------------------------------------


def participants(key: Key, examples: list[str], rate: float, steps: int) -> list[np.ndarray]:
    """Poisson sampling: for each step, the sorted indices of the examples that take part; there may be none.

    Each example independently takes part with probability `rate`. Its draws depend only on the key and its name."""
    takes = [np.flatnonzero(key.generator("sampling", name).random(steps) < rate) for name in examples]
    step, example = np.concatenate([np.empty(0, int), *takes]), np.repeat(np.arange(len(takes)), [*map(len, takes)])
    order = np.argsort(step, kind="stable")
    return np.split(example[order], np.bincount(step, minlength=steps).cumsum()[:-1])


@dataclass(frozen=True)
class Noise:
    """The noise for a sum of clipped gradients, and the divisor of the result."""

    sigma: float                    # noise multiplier; 0: no noise and no privacy
    clip: float                     # C
    expected: float                 # expected number of examples in a step: q N
    key: Key

    def release(self, total: list[torch.Tensor], t: int) -> list[torch.Tensor]:
        """The noisy mean of step t: a tensor for each in `total`, on the same device. total: the sums, 0 in an empty
        step."""
        generator, scale = self.key.generator("noise", t), self.sigma * self.clip
        made = [torch.from_numpy(generator.standard_normal(g.shape)) for g in total]        # float64
        return [(g + (scale * noise).to(g)) / self.expected for g, noise in zip(total, made)]


@dataclass
class ClippedSum:
    """Sums clipped gradients over step t. add() takes one example's gradient from .grad; release() ends the step."""

    parameters: list[nn.Parameter]
    noise: Noise
    t: int
    over_processes: Callable = lambda tensors: tensors      # their sums, if several processes have examples of the step
    total: list[torch.Tensor] = field(init=False)
    norms: list[float] = field(init=False)                  # of this process's examples
    counts: torch.Tensor = field(init=False)                # (2,) examples whose gradient was longer than allowed; all

    def __post_init__(self):
        self.total, self.norms = [torch.zeros_like(p) for p in self.parameters], []
        self.counts = torch.zeros(2, device=self.parameters[0].device if self.parameters else None)

    @torch.no_grad()
    def add(self) -> None:
        """Adds one example's gradient, clipped, and clears .grad. Raises: FloatingPointError if it is not finite."""
        present = [(s, p.grad) for s, p in zip(self.total, self.parameters) if p.grad is not None]
        norm = torch.nn.utils.get_total_norm([g for _, g in present])
        if not norm.isfinite():
            raise FloatingPointError(f"gradient norm {float(norm)} of one example")
        for s, g in present:
            s.add_(g * clip_factors(norm, self.noise.clip))
        self.norms.append(float(norm))
        self.counts += self.counts.new_tensor([self.norms[-1] > self.noise.clip, 1])
        for p in self.parameters:
            p.grad = None

    def release(self) -> None:
        """Stores the noisy mean of the step in .grad of every parameter; 0 where a parameter is frozen (`learns`). The
        noise is added once, to the sum over all processes: the key gives each of them the same."""
        *self.total, self.counts = self.over_processes([*self.total, self.counts])
        for p, g in zip(self.parameters, self.noise.release(self.total, self.t)):
            p.grad = g * getattr(p, "learns", 1.0)
