"""DP-SGD: three ways to compute the sum, noise of the right size everywhere, and tests that notice if a part of the
mechanism is removed. Docstrings name the faults that each test is there for."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mixdpo.models.gpt2 import Block, GPT2Config
from mixdpo.private import dp_sgd as privacy
from mixdpo.private.dp_sgd import (
    ClippedSum,
    Noise,
    clip_factors,
    clipped_sum,
    clipped_sum_slow,
    ghost_clipped_sum,
    participants,
    per_example_gradients,
)
from mixdpo.private.keys import Key

V, T, C = 11, 6, 8


class Tiny(nn.Module):
    """A transformer whose unembedding is its embedding, used by a separate Linear."""

    def __init__(self):
        super().__init__()
        config = GPT2Config(vocab=V, context=T, width=C, layers=2, heads=2)
        self.wte, self.wpe = nn.Embedding(V, C), nn.Embedding(T, C)
        self.h = nn.ModuleList(Block(config) for _ in range(2))
        self.ln_f, self.head = nn.LayerNorm(C), nn.Linear(C, V, bias=False)
        self.head.weight = self.wte.weight

    def forward(self, ids):
        x = self.wte(ids) + self.wpe(torch.arange(ids.shape[1]).expand(ids.shape))
        for layer, block in enumerate(self.h):
            x = block(x, layer, None, keep=True)
        return self.head(self.ln_f(x))


def losses_of(model, ids):
    return F.cross_entropy(model(ids[:, :-1]).transpose(1, 2), ids[:, 1:], reduction="none").sum(1)


@pytest.fixture
def tiny():
    """Model, ids, and the loss of one row as a function of parameters; in float64, so equal means equal to 1e-12."""
    torch.manual_seed(0)
    model = Tiny().double()
    ids = torch.randint(V, (9, T + 1))
    ids[0] = ids[0, 0]                                                      # one token again and again

    def loss(parameters, row):
        return losses_of(lambda x: torch.func.functional_call(model, parameters, (x,)), row[None])[0]

    return model, ids, loss, {name: p.detach() for name, p in model.named_parameters()}


def same(a, b, slack=1e-10):
    assert a.keys() == b.keys()
    return all(torch.allclose(a[name], b[name], rtol=0, atol=slack) for name in b)


def test_per_example_gradients_are_those_of_single_backward_passes(tiny):
    """In float32, to 1e-6 of the largest element. Faults: a mean for a sum over tokens, gradients
    of the batch divided by its size."""
    model, ids, loss, parameters = tiny
    model.float()
    each = per_example_gradients(loss, {name: p.detach() for name, p in model.named_parameters()}, ids)
    for n in range(len(ids)):
        model.zero_grad()
        losses_of(model, ids[n : n + 1]).sum().backward()
        for name, p in model.named_parameters():
            assert (each[name][n] - p.grad).abs().max() <= 1e-6 * max(1.0, float(p.grad.abs().max())), name


@pytest.mark.parametrize("clip", [0.5, 5.0, math.inf])
def test_three_ways_to_the_sum_of_clipped_gradients(tiny, clip):
    """Faults: the cross term of the tied weight left out; one use of it clipped separately; wpe without rows;
    LayerNorm's bias left out; tokens that occur twice counted once; clipping by layers instead of all together."""
    model, ids, loss, parameters = tiny
    slow = clipped_sum_slow(loss, parameters, clip, ids)
    assert same(clipped_sum(loss, parameters, clip, ids), slow)
    ghost, losses = ghost_clipped_sum(model, lambda: losses_of(model, ids), clip)
    assert same(ghost, slow) and torch.allclose(losses, losses_of(model, ids))
    assert all(g.any() for g in ghost.values())


def test_without_clipping_the_sum_is_the_gradient(tiny):
    model, ids, _, _ = tiny
    losses_of(model, ids).sum().backward()
    ghost, _ = ghost_clipped_sum(model, lambda: losses_of(model, ids), math.inf)
    assert same(ghost, {name: p.grad for name, p in model.named_parameters()})


def test_nobody_moves_the_sum_by_more_than_clip(tiny):
    """The sensitivity itself. Faults: no clipping; the norm of the batch in place of the example's; clip / norm above 1
    (small gradients blown up)."""
    model, ids, loss, parameters = tiny
    for clip in (0.3, 100.0):
        full_sum = clipped_sum(loss, parameters, clip, ids)
        for n in range(len(ids)):
            rest = torch.cat([ids[:n], ids[n + 1 :]])
            without = clipped_sum(loss, parameters, clip, rest)
            moved = math.sqrt(sum(float((full_sum[k] - without[k]).square().sum()) for k in full_sum))
            own = math.sqrt(sum(float(g.square().sum()) for g in torch.func.grad(loss)(parameters, ids[n]).values()))
            assert moved == pytest.approx(min(clip * own / (own + 1e-6), own), rel=1e-6)
    assert clip_factors(torch.tensor([0.5, 1.0, 4.0]), 1.0).tolist() == pytest.approx([1.0, 1 / (1 + 1e-6), 0.25])


def test_a_module_without_a_rule_is_refused():
    """Fault: without the error, the module's parameters would not be clipped."""
    model = nn.Sequential(nn.Linear(2, 2), nn.Conv1d(2, 2, 1))
    with pytest.raises(TypeError, match="Conv1d"):
        ghost_clipped_sum(model, lambda: model(torch.ones(3, 2)).sum(1), 1.0)


def test_a_frozen_parameter_takes_no_part(tiny):
    model, ids, _, _ = tiny
    model.h[0].requires_grad_(False)
    ghost, _ = ghost_clipped_sum(model, lambda: losses_of(model, ids), 1.0)
    assert ghost.keys() == {name for name, p in model.named_parameters() if p.requires_grad}


# --- sampling and noise -----------------------------------------------------------------------------------------------


def test_everybody_takes_part_by_chance_and_alone():
    """Poisson sampling: sizes are binomial, each probability is the rate, two examples are independent, a step may be
    empty. Faults: batches of fixed size, permutations cut into batches, the same draw for every step."""
    N, rate, steps, names = 40, 0.1, 4000, [f"example {n}" for n in range(40)]
    drawn = np.zeros((steps, N))
    for t, taking in enumerate(participants(Key.public(3), names, rate, steps)):
        drawn[t, taking] = 1
    sizes, slack = drawn.sum(1), 5 / math.sqrt(steps)
    assert abs(sizes.mean() / (N * rate) - 1) < slack and abs(sizes.var() / (N * rate * (1 - rate)) - 1) < 3 * slack
    assert (np.abs(drawn.mean(0) - rate) < slack).all() and (sizes == 0).any()
    together = np.corrcoef(drawn.T)[np.triu_indices(N, 1)]
    assert np.abs(together).max() < slack
    assert np.abs(np.corrcoef(drawn[:-1].ravel(), drawn[1:].ravel())[0, 1]) < slack         # of one step and the next
    assert len(participants(Key.public(3), names, 1.0, 2)[1]) == N
    again = participants(Key.public(3), names[:7] + names[8:], rate, steps)                 # without one of them
    assert all(np.array_equal(np.delete(row, 7), np.bincount(taking, minlength=N - 1))
               for row, taking in zip(drawn, again))


def test_noise_of_the_right_size_reaches_every_parameter():
    """Deviation sigma C / expected, zero mean, every element its own, another at every step. Faults: sigma without C;
    noise on the mean; one draw for all parameters; the same noise each step; a parameter left out."""
    noise = Noise(sigma=1.7, clip=0.3, expected=50.0, key=Key.public(4))
    total = [torch.zeros(300, 40), torch.zeros(12000), torch.ones(100, 120)]
    first, second = noise.release(total, 0), noise.release(total, 1)
    for zero, a, b in zip(total, first, second):
        a, b = ((x - zero / 50).flatten() for x in (a, b))
        assert abs(float(a.std()) * 50 / (1.7 * 0.3) - 1) < 0.04 and abs(float(a.mean())) * 50 < 0.03
        assert abs(float(torch.corrcoef(torch.stack([a, b]))[0, 1])) < 0.05
    flat = torch.stack([x.flatten() for x in first])
    assert (torch.corrcoef(flat) - torch.eye(3)).abs().max() < 0.05
    assert all(torch.equal(a, b) for a, b in zip(first, noise.release(total, 0)))           # a resumed run's, too
    assert float((Noise(0.0, 1.0, 4.0, Key.public(1)).release([torch.full((2,), 8.0)], 3)[0] - 2).abs().max()) == 0


def test_a_sum_of_examples_one_at_a_time(tiny):
    """ClippedSum is clipped_sum_slow and the noise. Faults: gradients not cleared between examples; those of the last
    example released; a parameter without gradient left without noise."""
    model, ids, loss, parameters = tiny
    extra = nn.Parameter(torch.zeros(5, dtype=torch.float64))               # no example says anything of it
    clipped = ClippedSum([*model.parameters(), extra], Noise(2.0, 0.5, 4.0, Key.public(7)), t=3)
    for n in range(len(ids)):
        losses_of(model, ids[n : n + 1]).sum().backward()
        clipped.add()
    clipped.release()
    slow = clipped_sum_slow(loss, parameters, 0.5, ids)
    wanted = Noise(2.0, 0.5, 4.0, Key.public(7)).release([*slow.values(), torch.zeros_like(extra)], 3)
    assert all(torch.allclose(p.grad, g, rtol=0, atol=1e-12) for p, g in zip([*model.parameters(), extra], wanted))
    assert extra.grad.any() and len(clipped.norms) == len(ids)
    assert clipped.norms[2] == pytest.approx(float(torch.cat([g.flatten() for g in torch.func.grad(loss)(
        parameters, ids[2]).values()]).norm()))


def test_an_example_without_a_finite_gradient_is_an_error(tiny):
    model, *_ = tiny
    clipped = ClippedSum(list(model.parameters()), Noise(1.0, 1.0, 1.0, Key.public(1)), 0)
    model.ln_f.weight.grad = torch.full_like(model.ln_f.weight, torch.nan)
    with pytest.raises(FloatingPointError):
        clipped.add()


def test_not_covered_lists_every_point():
    listed = " ".join(privacy.NOT_COVERED)
    for what in ("vocabulary", "bounds", "number of examples", "hyper-parameters", "floating-point", "timing", "key"):
        assert what in listed
