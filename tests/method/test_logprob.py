"""Token log-probs against an oracle in NumPy float64 that shares no code with them, and against finite differences.

The one-head, the K-full-heads and the low-rank form, in tiles that divide V, do not, exceed it, and with kept logits.
"""

import math

import numpy as np
import pytest
import torch

from mixdpo.logprob import sum_responses, token_logps, token_logps_reference
from tests.allocations import peak

FORMS = ["one", "full", "low-rank"]
SHAPES = [(3, 5, 7), (47, 31, 123), (1, 3, 2), (5, 123, 47)]                # (N,C,V), none a multiple of a vector unit
K, R = 3, 2


def make(form, N, C, V, dtype=torch.float64, seed=0, scale=1.0):
    """hidden (N,C), weight, targets (N,), low_rank; the first and the last token are among the targets."""
    g = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return (torch.randn(*shape, generator=g, dtype=torch.float64) * scale).to(dtype)

    targets = torch.randint(V, (N,), generator=g)
    targets[0], targets[-1] = 0, V - 1
    weight = draw(K, V, C) if form == "full" else draw(V, C)
    return draw(N, C), weight, targets, (draw(K, V, R), draw(K, R, C)) if form == "low-rank" else None


def oracle(hidden, weight, targets, low_rank):
    """log softmax, row by row and expert by expert, from its definition: (N,) or (K,N) in NumPy float64."""
    h, W = hidden.detach().double().numpy(), weight.detach().double().numpy()
    heads = W if W.ndim == 3 else W[None]
    if low_rank is not None:
        heads = [W + A @ B for A, B in zip(*(factor.detach().double().numpy() for factor in low_rank))]
    out = np.empty((len(heads), len(h)))
    for k, head in enumerate(heads):
        for n, row in enumerate(h):
            logits = head @ row
            top = logits.max()
            out[k, n] = logits[targets[n]] - top - math.log(np.exp(logits - top).sum())
    return out if W.ndim == 3 or low_rank is not None else out[0]


def leaves(hidden, weight, low_rank):
    return [t.detach().requires_grad_() for t in (hidden, weight, *(low_rank or ()))]


def with_gradients(function, hidden, weight, targets, low_rank, seed=1, **options):
    """The log-probs, and their gradients under a random weighting: [hidden, weight, A, B]."""
    inputs = leaves(hidden, weight, low_rank)
    out = function(inputs[0], inputs[1], targets, tuple(inputs[2:]) or None, **options)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(out.dtype)
    return out.detach(), torch.autograd.grad(out, inputs, upstream)


# --- values and gradients ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_the_oracle_and_the_reference(form, shape):
    """Catches: a running maximum whose sum is not rescaled, a target looked for in the wrong tile or past its edges (<=
    for <), the last, shorter tile dropped, expert k's A with expert j's B, a tile's share of d_u or d_W overwritten."""
    args = make(form, *shape)
    want = oracle(*args)
    assert np.allclose(token_logps_reference(*args).numpy(), want, atol=1e-12)
    value, gradients = with_gradients(token_logps_reference, *args)
    for tile in (1, 2, 7, 50, 123, 4096, None):
        got, got_gradients = with_gradients(token_logps, *args, tile=tile)
        assert np.allclose(got.numpy(), want, atol=1e-12), tile
        assert all(torch.allclose(a, b, atol=1e-11) for a, b in zip(got_gradients, gradients, strict=True)), tile


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("tile", [1, 3, 5, 11, 64, None])
def test_gradcheck(form, tile):
    """Finite differences in float64. Catches: any wrong or missing term of the backward pass, of every input (the
    target's 1 in the wrong tile, the sum before the division, the low-rank part missing in the rows' gradient)."""
    hidden, weight, targets, low_rank = make(form, 3, 4, 11)
    inputs = leaves(hidden, weight, low_rank)
    assert torch.autograd.gradcheck(lambda h, W, *AB: token_logps(h, W, targets, AB or None, tile=tile), inputs)


@pytest.mark.parametrize("tile", [5, None])
def test_gradients_of_some_inputs(tile):
    """Frozen trunk, frozen base, frozen factors: each subset of the inputs gets the same gradient as in the whole.
    Catches: a gradient that is only computed if another one is asked for (d_u under need_A)."""
    args = make("low-rank", 6, 4, 13)
    inputs = leaves(args[0], args[1], args[3])
    out = token_logps_reference(inputs[0], inputs[1], args[2], tuple(inputs[2:]))
    whole = torch.autograd.grad(out.square().sum(), inputs)
    for subset in range(1, 16):
        asked = [bool(subset >> i & 1) for i in range(4)]
        some = [t.detach().requires_grad_(a) for t, a in zip(inputs, asked)]
        token_logps(some[0], some[1], args[2], (some[2], some[3]), tile=tile).square().sum().backward()
        for t, want, a in zip(some, whole, asked):
            assert torch.allclose(t.grad, want, atol=1e-11) if a else t.grad is None, asked


@pytest.mark.parametrize("form", ["one", "low-rank"])
@pytest.mark.parametrize("tile", [4, None])
def test_backward_twice_and_no_second_derivative(form, tile):
    """A kept graph gives its gradient again; inputs and upstream gradient are not written on; a second derivative is
    refused. Catches: kept logits overwritten by the first backward and read by the second; a second derivative that is
    a wrong number."""
    hidden, weight, targets, low_rank = make(form, 6, 4, 13)
    inputs = leaves(hidden, weight, low_rank)
    before = [t.detach().clone() for t in inputs]
    out = token_logps(inputs[0], inputs[1], targets, tuple(inputs[2:]) or None, tile=tile)
    upstream = torch.ones_like(out)
    first = torch.autograd.grad(out, inputs, upstream, retain_graph=True)
    second = torch.autograd.grad(out, inputs, upstream)
    assert all(torch.equal(a, b) for a, b in zip(first, second)) and torch.equal(upstream, torch.ones_like(out))
    assert all(torch.equal(a, b) for a, b in zip(before, inputs))
    out = token_logps(inputs[0], inputs[1], targets, tuple(inputs[2:]) or None, tile=tile)
    gradient, = torch.autograd.grad(out.square().sum(), inputs[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


# --- independence -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("tile", [16, None])
def test_a_row_depends_on_nothing_but_itself(form, tile):
    """Order, padding rows and the contents of neighbours (huge ones too) leave a row's log-prob and gradient alone, and
    rows without upstream gradient leave the weights' gradient alone. Catches: a maximum over all rows, a padding row in
    the weights' gradient, target n read for row m, 0 * inf from a neighbour."""
    hidden, weight, targets, low_rank = make(form, 9, 5, 37, torch.float32)
    value, gradients = with_gradients(token_logps, hidden, weight, targets, low_rank, tile=tile)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(3))
    in_order = token_logps(hidden[order], weight, targets[order], low_rank, tile)
    assert torch.allclose(in_order, value[..., order], atol=1e-5)
    alone = [token_logps(hidden[n : n + 1], weight, targets[n : n + 1], low_rank, tile) for n in range(9)]
    assert torch.allclose(torch.cat(alone, dim=-1), value, atol=1e-5)
    padding = torch.cat([torch.zeros(4, 5), 1e4 * torch.ones(4, 5)])
    padded, ids = torch.cat([hidden, padding]), torch.cat([targets, torch.zeros(8, dtype=torch.int64)])

    def first_nine(*args, **options):
        return token_logps(*args, **options)[..., :9]

    got, got_gradients = with_gradients(first_nine, padded, weight, ids, low_rank, tile=tile)
    assert torch.allclose(got, value, atol=1e-5)
    assert torch.allclose(got_gradients[0][:9], gradients[0], atol=1e-5) and not got_gradients[0][9:].any()
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(got_gradients[1:], gradients[1:]))


def test_any_leading_shape():
    """Catches: rows flattened in another order than targets, K put behind the rows."""
    for form in FORMS:
        hidden, weight, targets, low_rank = make(form, 12, 5, 37)
        flat = token_logps(hidden, weight, targets, low_rank)
        shaped = token_logps(hidden.view(2, 3, 2, 5), weight, targets.view(2, 3, 2), low_rank)
        assert shaped.shape == flat.shape[:-1] + (2, 3, 2) and torch.equal(shaped.flatten(-3), flat)
        shaped = token_logps_reference(hidden.view(2, 3, 2, 5), weight, targets.view(2, 3, 2), low_rank)
        assert torch.allclose(shaped.flatten(-3), flat, atol=1e-12)
        assert token_logps(hidden[:0], weight, targets[:0], low_rank).shape == flat.shape[:-1] + (0,)


def test_contracts_are_checked():
    """Catches: a mixed dtype, targets of another shape, full heads with factors, and a target outside the vocabulary
    that comes back as a plausible number (it must be nan, which no loss survives in silence)."""
    hidden, weight, targets, low_rank = make("low-rank", 4, 5, 7)
    with pytest.raises(AssertionError, match="one compute dtype"):
        token_logps(hidden.float(), weight, targets)
    with pytest.raises(AssertionError, match="targets"):
        token_logps(hidden, weight, targets[:3])
    with pytest.raises(AssertionError, match="share one"):
        token_logps(hidden, weight.expand(K, -1, -1), targets, low_rank)
    for tile in (3, None):
        out = token_logps(hidden, weight, torch.tensor([0, 7, -1, 6]), tile=tile)
        assert out.isnan().tolist() == [False, True, True, False]


# --- precision --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("tile", [256, None])
def test_error_budget(form, dtype, tile):
    """Against the float64 truth of the same rounded inputs, not worse than plain PyTorch in the same precision, values
    and gradients. Catches: the sum of exponentials or the rows' gradient accumulated in bfloat16, log-probs returned in
    it, a large maximum subtracted too late."""
    args = make(form, 64, 32, 3001, dtype, scale=0.45)
    hidden, weight, targets, low_rank = args
    exact = hidden.double(), weight.double(), targets, low_rank and tuple(factor.double() for factor in low_rank)
    truth, plain = (with_gradients(token_logps_reference, *inputs) for inputs in (exact, args))
    ours = with_gradients(token_logps, *args, tile=tile)
    assert ours[0].dtype == torch.float32 and [g.dtype for g in ours[1]] == [dtype] * len(ours[1])
    eps = torch.finfo(dtype).eps
    names, columns = ("logps", "hidden", "weight", "A", "B"), ((value, *grads) for value, grads in (truth, plain, ours))
    for name, t, p, o in zip(names, *columns):
        budget, spent = ((x.double() - t).abs() for x in (p, o))
        # sums over the vocabulary or the heads have one product a tile or head, each rounded: more of the same rounding
        summed = 1.6 if name in ("hidden", "B") else 1.05
        assert spent.mean() <= summed * budget.mean() + 1e-7, (name, spent.mean() / budget.mean())
        assert spent.max() <= summed * budget.max() + 0.1 * eps * t.abs().max(), (name, spent.max() / budget.max())


@pytest.mark.parametrize("tile", [3, 8, None])
def test_extreme_logits(tile):
    """Logits of +-16384: finite, right, and gradients finite and right. Catches: exp before the maximum is taken off, a
    maximum that starts from 0 instead of -inf, a maximum of the last tile only, ln V lost beside a large maximum."""
    V, big = 10, 2.0**14                                                     # exact in bfloat16 too
    logits = torch.zeros(6, V, dtype=torch.float64)
    logits[0, 4], logits[1, 4], logits[2], logits[3], logits[4, :5] = big, big, big, -big, -big
    logits[5] = torch.linspace(-1e4, 1e4, V)
    targets = torch.tensor([4, 9, 0, 3, 1, 0])
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        args = (logits.to(dtype), torch.eye(V, dtype=dtype), targets, None)                 # the rows are the logits
        value, gradients = with_gradients(token_logps, *args, tile=tile)
        truth, want = with_gradients(token_logps_reference, args[0].double(), args[1].double(), targets, None)
        assert torch.allclose(value.double(), torch.from_numpy(oracle(*args)), rtol=1e-7, atol=1e-6)
        assert value[1] == -big and abs(value[2] + math.log(V)) < 1e-6
        for got, right in zip(gradients, want):
            error = (got.double() - right).abs().max()
            assert got.isfinite().all() and error <= 4 * torch.finfo(dtype).eps * right.abs().max()


# --- memory -----------------------------------------------------------------------------------------------------------


def test_peak_memory():
    """Above the gradients that stay, one tile of logits lives at a time, of 4 MiB if nothing else is asked for, and two
    row gradients; plain PyTorch holds the logits nearly three times. Catches: tiles kept from forward to backward, a
    second tile, a gradient of the weight made in a second buffer, a tile that grows with the rows."""
    N, C, V = 1024, 64, 50257
    hidden, W, targets = torch.randn(N, C).requires_grad_(), torch.randn(V, C).requires_grad_(), torch.randint(V, (N,))
    one, logits = N * 4 / 2**20, N * V * 4 / 2**20                          # a column of logits, all of them
    for tile, rows in ((4096, N), (1000, N), (0, N), (0, N // 4)):
        used = peak(lambda h, W, y: token_logps(h[:rows], W, y[:rows], tile=tile).sum().backward(), hidden, W, targets)
        held = tile * one or 4
        assert 0.85 * held < used < held + 2.5, f"{used:.1f} MiB with tiles of {held:.1f} MiB"
        hidden.grad = W.grad = None
    used = peak(lambda h, W, y: token_logps_reference(h, W, y).sum().backward(), hidden, W, targets)
    assert used > 2.5 * logits, f"{used:.1f} MiB, the logits are {logits:.1f}: what is compared with is not plain"


# --- responses --------------------------------------------------------------------------------------------------------


def test_sum_responses():
    """Against a loop. Catches: pair and side exchanged in the view, a mean, experts' rows mixed, a response without a
    token that is nan, a sum in lower precision than the log-probs."""
    g = torch.Generator().manual_seed(0)
    sequence = torch.tensor([0, 0, 1, 2, 2, 2, 5, 5, 3])                    # response 4 has no token here
    for dtype in (torch.float32, torch.float64):
        logps = torch.randn(2, 9, generator=g, dtype=dtype).requires_grad_()
        out = sum_responses(logps, sequence, 3)
        assert out.shape == (3, 2, 2) and out.dtype == dtype
        for k in range(2):
            for s in range(6):
                want = sum(float(logps[k, m].detach()) for m in range(9) if sequence[m] == s)
                assert abs(float(out[s // 2, k, s % 2].detach()) - want) < 1e-6
        coefficients = torch.randn(out.shape, generator=g, dtype=dtype)
        gradient, = torch.autograd.grad(out, logps, coefficients)
        assert torch.equal(gradient, torch.stack([coefficients[sequence // 2, k, sequence % 2] for k in range(2)]))
