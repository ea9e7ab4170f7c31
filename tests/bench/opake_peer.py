"""opake-alignment: its accountant, and its private DPO on our model. Needs the packages of tests/peers.

    python -m tests.bench.opake_peer        epsilon and noise, both accountants; DPO trained by both; float32 clipping

Their loss is per-example: sequence_logp of whole logits, minus the reference, then sigmoid_loss; clipped_grad makes the
sum of clipped gradients by vmap. Importing their accountant fails on Python 3.11.7 ("__weakref__ slot disallowed") and
on 3.12.1, because dataclass(weakref_slot=True) adds a slot that the base class has. `accounting` imports it without
that argument; the class can be weakly referenced anyway.
"""

import dataclasses
import functools
import math
import time
import warnings
from types import SimpleNamespace
from unittest import mock

import numpy as np
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import train
from mixdpo.experts import make_experts
from mixdpo.fast.optimizer import set_rate
from mixdpo.gates import first_weights
from mixdpo.models.gpt2 import GPT2
from mixdpo.preferences import Pair
from mixdpo.private.accountant import Mechanism, epsilon_of, epsilon_rdp, noise_multiplier
from mixdpo.private.dp_sgd import ClippedSum, Noise, participants, per_example_gradients
from mixdpo.private.keys import Key, identities
from mixdpo.private.step import clip_examples
from mixdpo.runs.reference import compute_reference
from tests import small
from train import TrainConfig

SETTINGS = [  # noise multiplier, sampling rate, steps, delta
    (1.1, 0.01, 1000, 1e-5), (0.6, 0.01, 200, 1e-5), (1.0, 0.001, 10000, 1e-6), (5.0, 0.1, 5000, 1e-5),
    (30.0, 0.2, 20000, 1e-5), (10.0, 1.0, 100, 1e-5), (1.0, 0.01, 1000, 1e-10)]
BUDGETS = [(1.0, 0.01, 1000, 1e-5), (8.0, 0.0064, 470, 1e-5), (0.5, 0.05, 400, 1e-6)]    # epsilon, rate, steps, delta
VOCAB, BETA = 53, 0.3


# --- their functions --------------------------------------------------------------------------------------------------


@functools.cache
def accounting() -> SimpleNamespace:
    """Their gaussian, poisson, calibrate, epsilon_budget."""
    made = dataclasses.dataclass
    with mock.patch.object(dataclasses, "dataclass", lambda *a, weakref_slot=False, **k: made(*a, **k)):
        from opake.accounting import calibration
        from opake.dpsgd import accounting as steps
    return SimpleNamespace(gaussian=steps.gaussian, poisson=steps.poisson, calibrate=calibration.calibrate,
                           epsilon_budget=calibration.epsilon_budget)


def their_process(sigma: float, rate: float, steps: int):
    """All steps together."""
    theirs = accounting()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")                                     # below sigma 0.1
        one = theirs.gaussian(sigma)
    return (one if rate == 1 else theirs.poisson(one, sample_rate=rate)) * steps


def their_noise(epsilon: float, delta: float, rate: float, steps: int, tolerance=1e-4) -> float:
    """The noise multiplier that their search finds; it keeps epsilon, below it by a fraction of at most `tolerance`."""
    budget = accounting().epsilon_budget(epsilon, delta=delta)
    return accounting().calibrate(budget, lambda sigma: their_process(sigma, rate, steps), 0.4, 20.0,
                                  tolerance=tolerance).param


class Logits(nn.Module):
    """ids (N,T) -> logits (N,T,V) of a GPT-2, in a form that vmap and ghost clipping support: activations are kept,
    positions are rows like the tokens, and the unembedding is a Linear."""

    def __init__(self, model: GPT2):
        super().__init__()
        self.model, self.head = model, nn.Linear(*reversed(model.unembedding.shape), bias=False)
        self.head.weight = model.unembedding

    def forward(self, ids):
        model = self.model
        x = model.wte(ids) + model.wpe(torch.arange(ids.shape[1]).expand(ids.shape))
        for layer, block in enumerate(model.h):
            x = block(x, layer, None, keep=True)
        return self.head(model.ln_f(x))


def their_logp(model: GPT2):
    """logp(parameters, ids (N,T), mask (N,T)) -> (N,): sums over the masked tokens."""
    from opake.alignment.dpo.loss import sequence_logp

    module = Logits(model)
    return lambda parameters, ids, mask: sequence_logp(
        torch.func.functional_call(module, {f"model.{name}": p for name, p in parameters.items()}, (ids,)), ids, mask)


def their_loss(model: GPT2):
    """loss(parameters, ids (2,T), mask (2,T), reference (2,)) -> (): DPO's loss of one pair, chosen first."""
    from opake.alignment.dpo.loss import sigmoid_loss

    logp = their_logp(model)

    def loss(parameters, ids, mask, reference):
        ratio = logp(parameters, ids, mask) - reference
        return sigmoid_loss(ratio[0], ratio[1], beta=BETA)

    return loss


def their_batch(pairs: list[Pair], reference: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Rows of their_loss: ids (B,2,T) and masks (B,2,T) of the responses, EOS included; reference (P,1,2) -> (B,2)."""
    longest = max(len(p.prompt) + len(r) for p in pairs for r in (p.chosen, p.rejected))
    ids, mask = torch.zeros(len(pairs), 2, longest, dtype=torch.int64), torch.zeros(len(pairs), 2, longest).bool()
    for b, p in enumerate(pairs):
        for side, response in enumerate((p.chosen, p.rejected)):
            text = p.prompt + response
            ids[b, side, : len(text)] = torch.tensor(text)
            mask[b, side, len(p.prompt) : len(text)] = True
    return ids, mask, reference[:, 0]


def their_sum(loss, parameters: dict, clip: float, rows: tuple):
    """-> (their ClippedPytree, what they report of each example)."""
    from opake.dpsgd.clipping import clipped_grad

    gradient, state = clipped_grad(loss, clipping_norm=clip, batch_argnums=tuple(range(1, len(rows) + 1)),
                                   return_aux=True)
    with sdpa_kernel(SDPBackend.MATH):
        (total, seen), _ = gradient(parameters, *rows, state=state)
    return total, seen


# --- a planted job ----------------------------------------------------------------------------------------------------


def planted(count: int, seed: int) -> list[Pair]:
    """Pairs of unequal lengths. Preferred responses have more tokens of the lower half of the vocabulary; 0 is EOS."""
    rng = np.random.default_rng(seed)

    def response(share):
        low = rng.random(rng.integers(1, 9)) < share
        return [*np.where(low, rng.integers(1, VOCAB // 2, len(low)), rng.integers(VOCAB // 2, VOCAB, len(low))), 0]

    return [Pair(rng.integers(1, VOCAB, rng.integers(1, 6)).tolist(), [*map(int, response(0.7))],
                 [*map(int, response(0.3))], line=n + 1) for n in range(count)]


@dataclasses.dataclass
class Job:
    """Our DPO (K = 1) on some pairs. Every parameter has moved away from the reference by `moved` times a normal."""

    pairs: list[Pair]
    dtype: torch.dtype = torch.float32
    moved: float = 0.0
    peak: float = 1e-3              # learning rate

    def __post_init__(self):
        self.config = TrainConfig(data="", model="", out="", dtype="float32", experts=1, beta=BETA, warmup=0)
        model = small.model().to(self.dtype)
        self.reference = compute_reference(model, self.pairs, self.dtype).logp              # (P,1,2)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for p in model.parameters():
                p += self.moved * torch.randn(p.shape, generator=generator).to(p)
        self.experts = make_experts([model], self.config, self.dtype)
        self.model = self.experts.trunk
        self.named = dict(self.model.named_parameters())
        self.optimizer = torch.optim.AdamW([{"params": [*self.named.values()], "peak": self.peak}], weight_decay=0.0)

    @property
    def parameters(self) -> dict[str, torch.Tensor]:
        return {name: p.detach() for name, p in self.named.items()}

    def our_steps(self, drawn: list, noise: Noise) -> tuple[ClippedSum, torch.Tensor]:
        """train.py's private steps on the drawn pairs -> the last step's sum, and its margins (B,)."""
        problem = small.problem(self.config, self.pairs, self.reference)
        steps = [(0, list(map(int, ids))) for ids in drawn]
        plan = dataclasses.replace(problem.plan, steps=steps, owner=torch.arange(len(self.pairs)))
        problem = dataclasses.replace(problem, plan=plan)
        log_w = first_weights(self.config).to(self.dtype)
        state, seen = small.state(self.experts, problem, log_w, self.optimizer), []
        for t in range(len(steps)):
            clipped = ClippedSum([*self.named.values()], noise, t)
            accumulate = clip_examples(clipped, 1)

            def watched(gradient, micros, accumulate=accumulate):
                seen[:] = accumulate(gradient, micros)
                return seen

            train.step(state, problem, train.EM(accumulate=watched, clip=math.inf))
        return clipped, torch.cat([h for _, _, h, _ in seen])[:, 0]

    def their_steps(self, drawn: list, sigma: float, clip: float, expected: float, seed: int) -> None:
        """Their sums and noise, then the same AdamW and learning rates."""
        from opake.dpsgd.noise import gaussian_noise
        from opake.random import key

        add_noise, state = gaussian_noise(noise_multiplier=sigma, key=key(seed))
        rows, loss = their_batch(self.pairs, self.reference), their_loss(self.model)
        for t, ids in enumerate(drawn):
            total, _ = their_sum(loss, self.parameters, clip, tuple(x[ids] for x in rows))
            noisy, state = add_noise(total, state)
            for name, p in self.named.items():
                p.grad = noisy.pytree[name] / expected
            set_rate(self.optimizer, t, len(drawn), self.config.warmup)
            self.optimizer.step()

    @torch.no_grad()
    def loss(self) -> float:
        """Nats per pair."""
        loss, rows = their_loss(self.model), their_batch(self.pairs, self.reference)
        return torch.stack([loss(self.named, *row) for row in zip(*rows)]).mean().item()


# --- figures ----------------------------------------------------------------------------------------------------------


def show_accounting() -> None:
    """Epsilon for a noise multiplier, and the noise multiplier for an epsilon."""
    print("| sigma | rate | steps | delta | ours | theirs, grid 1e-4 | grid 1e-5 | ours, Renyi | s, ours | s, theirs |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for sigma, rate, steps, delta in SETTINGS:
        mechanism, theirs = Mechanism(sigma, rate, steps), their_process(sigma, rate, steps)
        times = [time.perf_counter()]
        ours = epsilon_of([mechanism], delta)
        times.append(time.perf_counter())
        coarse = theirs.epsilon_at(delta)
        times.append(time.perf_counter())
        fine, seconds = theirs.epsilon_at(delta, discretization=1e-5), np.diff(times)
        print(f"| {sigma:g} | {rate:g} | {steps} | {delta:g} | {ours:.6f} | {coarse:.6f} ({coarse / ours - 1:+.1e}) | "
              f"{fine:.6f} ({fine / ours - 1:+.1e}) | {epsilon_rdp([mechanism], delta):.4f} | {seconds[0]:.2f} | "
              f"{seconds[1]:.2f} |")
    print("\none Gaussian, mu 1: epsilon over the exact one - 1, by width of their grid (sigma 10, rate 1, 100 steps)")
    for delta in (1e-5, 1e-10):
        exact = exact_epsilon(delta)
        errors = [their_process(10.0, 1.0, 100).epsilon_at(delta, discretization=h) / exact - 1
                  for h in (1e-3, 1e-4, 1e-5, 1e-6)]
        print(f"delta {delta:g}: exact {exact:.9f}, theirs {', '.join(f'{e:+.1e}' for e in errors)}, "
              f"ours {epsilon_of([Mechanism(10.0, 1.0, 100)], delta) / exact - 1:+.1e}")
    print("sigma 30, rate 0.2, 20000 steps, delta 1e-5: theirs " + ", ".join(
        f"{their_process(30.0, 0.2, 20000).epsilon_at(1e-5, discretization=h):.6f}" for h in (1e-4, 1e-5, 1e-6)))
    print("\n| epsilon | rate | steps | delta | noise: ours | theirs |\n|---|---|---|---|---|---|")
    for epsilon, rate, steps, delta in BUDGETS:
        ours, theirs = noise_multiplier(epsilon, delta, rate, steps), their_noise(epsilon, delta, rate, steps, 1e-6)
        found = f"{ours:.6f} | {theirs:.6f} ({theirs / ours - 1:+.1e})"
        print(f"| {epsilon:g} | {rate:g} | {steps} | {delta:g} | {found} |")


def exact_epsilon(delta: float) -> float:
    """Of one Gaussian with mean shift 1 and variance 1, by bisection of its closed form in 30 digits (Balle & Wang
    2018, arXiv 1805.06530)."""
    import mpmath

    with mpmath.workdps(30):
        low, high, half = mpmath.mpf(0), mpmath.mpf(20), mpmath.mpf(1) / 2
        for _ in range(80):
            e = (low + high) / 2
            enough = mpmath.ncdf(half - e) - mpmath.exp(e) * mpmath.ncdf(-half - e) <= delta
            low, high = (low, e) if enough else (e, high)
        return float(high)


def show_clipping() -> None:
    """The longest clipped gradient of one pair in float32, over the clip norm: 1 is the bound."""
    print("\nlongest clipped gradient of one pair over the clip norm, minus 1, float32")
    job = Job(planted(60, seed=3), moved=0.05)
    rows, loss, parameters = their_batch(job.pairs, job.reference), their_loss(job.model), job.parameters
    for scale in (1, 1000):
        def scaled(*arguments, scale=scale):
            return scale * loss(*arguments)

        longest = {"ours": 0.0, "theirs": 0.0}
        for row in zip(*(x[:, None] for x in rows)):
            clipped = ClippedSum([*job.named.values()], Noise(0.0, 1.0, 1.0, Key.public(0)), 0)
            for p, g in zip(clipped.parameters, per_example_gradients(scaled, parameters, *row).values()):
                p.grad = g[0]
            clipped.add()
            theirs, _ = their_sum(scaled, parameters, 1.0, row)
            for name, total in [("ours", clipped.total), ("theirs", theirs.pytree.values())]:
                norm = math.sqrt(sum(float(g.double().square().sum()) for g in total))
                longest[name] = max(longest[name], norm)
        print(f"loss times {scale}: " + ", ".join(f"{name} {value - 1:+.1e}" for name, value in longest.items()))


def show_training(seeds=8, count=400, rate=0.1, steps=40, clip=1.0) -> None:
    """Held-out loss of the planted job, trained by both with the same noise multiplier."""
    from opake.dpsgd.sampling import PoissonSampler
    from opake.random import fold_in, key

    print(f"\nheld-out nats per pair (untrained: {math.log(2):.4f}), {count} pairs, rate {rate}, {steps} steps, clip "
          f"{clip:g}, mean and standard error over {seeds} seeds")
    for sigma in (0.0, 1.0, 4.0):
        found: dict[str, list[float]] = {"ours": [], "theirs": []}
        for seed in range(seeds):
            pairs, held_out = planted(count, seed), planted(400, 1000 + seed)
            for who in found:
                job, secret = Job(pairs, peak=3e-3), Key.public(seed)
                if who == "ours":
                    names = identities([(p.prompt, p.chosen, p.rejected) for p in pairs])
                    job.our_steps(participants(secret, names, rate, steps), Noise(sigma, clip, rate * count, secret))
                else:
                    sampler = PoissonSampler(pairs, sample_rate=rate, n_steps=steps, key=fold_in(key(seed), "data"))
                    job.their_steps([*sampler], sigma, clip, rate * count, seed)
                judge = Job(held_out)
                judge.model.load_state_dict(job.model.state_dict())
                found[who].append(judge.loss())
        print(f"sigma {sigma:g}: " + ", ".join(f"{who} {np.mean(x):.4f} ({np.std(x, ddof=1) / len(x) ** 0.5:.4f})"
                                               for who, x in found.items())
              + f", difference {np.mean(d := np.subtract(found['ours'], found['theirs'])):+.4f} "
              f"({np.std(d, ddof=1) / len(d) ** 0.5:.4f})", flush=True)


if __name__ == "__main__":
    show_accounting()
    show_clipping()
    show_training()
