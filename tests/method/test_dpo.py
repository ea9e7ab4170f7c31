"""mixdpo.dpo against definitions: the margin (M4), the loss at K = 1, and the gradient that the DPO paper prints (arXiv
2305.18290, section 4)."""

import math

import numpy as np
import pytest
import torch
from brute import numeric_gradient, sigma

from mixdpo.dpo import accuracy, dpo_loss, margins
from mixdpo.variants.label_noise import flipped_margins

FP32, FP64 = torch.float32, torch.float64
TOLERANCE = {FP32: 2e-5, FP64: 1e-12}


def normal(*shape, seed=0, dtype=FP64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize("dtype", [FP32, FP64])
@pytest.mark.parametrize("beta", [0.1, 1.0, 2.5])
def test_margin_is_the_definition(dtype, beta):
    """M4. Catches: sign or order of chosen and rejected, reference added instead of subtracted, beta dropped, squared
    or divided by."""
    logp, ref = normal(7, 2, seed=1, dtype=dtype), normal(7, 2, seed=2, dtype=dtype)
    h = margins(logp, ref, beta)
    assert h.shape == (7,) and h.dtype == dtype
    for b in range(7):
        policy = float(logp[b, 0]) - float(logp[b, 1])
        reference = float(ref[b, 0]) - float(ref[b, 1])
        assert math.isclose(float(h[b]), beta * (policy - reference), abs_tol=TOLERANCE[dtype])


def test_margin_broadcasts_over_experts():
    """Catches: a margin that flattens or squeezes leading axes, or pairs expert k's policy with another pair's
    reference."""
    B, K = 4, 3
    logp, shared, own = normal(B, K, 2, seed=3), normal(B, 1, 2, seed=4), normal(B, K, 2, seed=5)
    with_shared, with_own = margins(logp, shared, 0.3), margins(logp, own, 0.3)
    assert with_shared.shape == (B, K) and with_own.shape == (B, K)
    assert margins(logp, shared[:1, 0], 0.3).shape == (B, K)  # (1, 2): one reference for all
    assert margins(normal(2), normal(2), 0.3).shape == ()
    for b in range(B):
        for k in range(K):
            assert torch.equal(with_shared[b, k], margins(logp[b, k], shared[b, 0], 0.3))
            assert torch.equal(with_own[b, k], margins(logp[b, k], own[b, k], 0.3))


def test_margin_forgets_the_normaliser():
    """M3, M4: pi_k made by tilting its own reference; Z_k, a constant of the prompt, cancels. Catches: a margin of one
    response alone, one expert's reference used for another, beta left out (the tilt is r/beta, so h is the reward
    difference itself)."""
    rng = np.random.default_rng(0)
    V, K, beta = 6, 3, 0.7
    reference = rng.dirichlet(np.ones(V), size=K)  # (K, V), one reference per expert
    reward = rng.normal(size=(K, V))
    logp, ref_logp = np.zeros((K, V)), np.log(reference)
    for k in range(K):
        weights = [reference[k][y] * math.exp(reward[k][y] / beta) for y in range(V)]
        for y in range(V):
            logp[k][y] = math.log(weights[y] / sum(weights))  # Z_k = sum(weights)
    for chosen in range(V):
        for rejected in range(V):
            pair = [chosen, rejected]
            h = margins(torch.tensor(logp[:, pair]), torch.tensor(ref_logp[:, pair]), beta)
            assert np.allclose(h.numpy(), reward[:, chosen] - reward[:, rejected], atol=1e-12)


def test_margin_refuses_a_pair_on_another_axis():
    """Catches: no shape contract, so that a (2, B) halving convention silently reads two pairs instead of B."""
    with pytest.raises(AssertionError):
        margins(normal(2, 5), normal(2, 5), 0.1)


@pytest.mark.parametrize("dtype", [FP32, FP64])
def test_loss_is_minus_log_sigma_of_each_pair(dtype):
    """Catches: -h for h, sigma without log, the mean or the sum taken inside (losses are per pair)."""
    h = normal(9, seed=6, dtype=dtype) * 3
    loss = dpo_loss(h)
    assert loss.shape == h.shape and loss.dtype == dtype
    for b in range(9):
        assert math.isclose(float(loss[b]), -math.log(sigma(float(h[b]))), rel_tol=TOLERANCE[dtype])
    assert dpo_loss(h.view(3, 3)).shape == (3, 3)


def test_loss_at_the_reference_is_ln_2():
    """The step-0 invariant. Catches: a policy that is its own reference getting any other loss."""
    logp = normal(5, 2, seed=7)
    assert torch.equal(margins(logp, logp, 0.1), torch.zeros(5, dtype=FP64))
    assert torch.allclose(dpo_loss(margins(logp, logp, 0.1)), torch.full((5,), math.log(2), dtype=FP64), atol=1e-15)


def test_loss_and_gradient_are_finite_at_a_thousand():
    """Catches: -log(sigmoid(h)), which is inf at -1000 and whose gradient is NaN there."""
    h = torch.tensor([1000.0, -1000.0, 0.0], requires_grad=True)
    loss = dpo_loss(h)
    loss.sum().backward()
    assert loss.tolist() == [0.0, 1000.0, pytest.approx(math.log(2))]
    assert h.grad.tolist() == [0.0, -1.0, -0.5]


def test_gradient_is_the_one_in_the_paper():
    """grad = -beta sigma(-h) (grad log pi(y+) - grad log pi(y-)), on a softmax policy whose score is written by hand.
    Catches: beta missing in the gradient, sigma(h) for sigma(-h), a policy log-prob detached by mistake, the rejected
    response left out."""
    V, beta = 5, 0.4
    logits, reference = normal(V, seed=8).requires_grad_(), torch.log_softmax(normal(V, seed=9), 0)
    chosen, rejected = 3, 1
    logp = torch.log_softmax(logits, 0)[[chosen, rejected]]
    h = margins(logp, reference[[chosen, rejected]], beta)
    dpo_loss(h).backward()

    pi = np.exp(logits.detach().numpy()) / np.exp(logits.detach().numpy()).sum()
    score = {y: np.eye(V)[y] - pi for y in (chosen, rejected)}  # d log pi(y) / d logits
    expected = -beta * sigma(-h.item()) * (score[chosen] - score[rejected])
    assert np.allclose(logits.grad.numpy(), expected, atol=1e-14)

    def loss(a):
        a = a - math.log(np.exp(a).sum())
        difference = (a[chosen] - a[rejected]) - (float(reference[chosen]) - float(reference[rejected]))
        return -math.log(sigma(beta * difference))

    assert np.allclose(logits.grad.numpy(), numeric_gradient(loss, logits.detach().numpy()), atol=1e-9)


def test_a_tie_is_half_right():
    """Catches: h >= 0 or h > 0 counted as accuracy, which makes the untrained policy right always or never."""
    assert accuracy(torch.tensor([[2.0, -1e-30], [0.0, 1000.0]])).tolist() == [[1.0, 0.0], [0.5, 1.0]]


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
def test_lower_precision_is_refused(low):
    """Catches: log-probs of hundreds of nats subtracted in bf16, whose spacing there is 2 nats."""
    with pytest.raises(AssertionError):
        margins(torch.zeros(3, 2, dtype=low), torch.zeros(3, 2, dtype=low), 0.1)
    with pytest.raises(AssertionError):
        margins(torch.zeros(3, 2), torch.zeros(3, 2, dtype=low), 0.1)
    with pytest.raises(AssertionError):
        dpo_loss(torch.zeros(3, dtype=low))


@pytest.mark.parametrize("share", [0.0, 0.05, 0.3, 0.49])
def test_flipped_margins_are_the_noisy_likelihoods(share):
    """By the definition, also far out, where sigma is 0 or 1. Catches: 1 - share for 1 - 2 share, a margin that turns
    round with the noise, an overflow."""
    h = torch.tensor([-700.0, -30.0, -2.0, -1e-3, 0.0, 0.5, 4.0, 700.0], dtype=FP64, requires_grad=True)
    noisy = flipped_margins(h, share)
    p = share + (1 - 2 * share) * torch.sigmoid(h)
    assert torch.allclose(torch.sigmoid(noisy), p, atol=1e-12)
    noisy.sum().backward()
    assert h.grad.isfinite().all() and (h.grad >= 0).all()
    if share:
        assert torch.autograd.gradcheck(lambda h: flipped_margins(h, share), normal(5, seed=8).requires_grad_())
