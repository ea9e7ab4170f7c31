"""mixdpo.mixture at the edges: margins of a thousand, experts of weight zero, experts renamed, precisions refused."""

import math

import pytest
import torch

from mixdpo.mixture import (
    e_step,
    elbo,
    expert_loss,
    gate_loss,
    log_marginal,
    mixture_logp,
    prefix_log_weights,
    update_weights,
)

INF = math.inf


def all_finite(*tensors):
    return all(bool(t.isfinite().all()) for t in tensors)


def test_margins_of_a_thousand():
    """fp32, every sign pattern. Catches: log(sigmoid(h)) and log(sum(exp)), which are -inf or NaN there, in value or in
    gradient."""
    h = torch.tensor([[1000.0, 1000.0], [1000.0, -1000.0], [-1000.0, 1000.0], [-1000.0, -1000.0]], requires_grad=True)
    log_w = torch.tensor([0.25, 0.75]).log().requires_grad_()
    log_p, log_q = e_step(log_w, h)
    assert log_p.tolist() == pytest.approx([0.0, math.log(0.25), math.log(0.75), -1000.0], abs=1e-4)
    assert log_q[1].tolist() == pytest.approx([0.0, math.log(3.0) - 1000.0], abs=1e-3)
    assert log_q[3].exp().tolist() == pytest.approx([0.25, 0.75], rel=1e-3)
    bound = elbo(log_q, log_w, h).tolist()
    assert bound == pytest.approx(log_p.tolist(), rel=1e-4, abs=1e-6)  # fp32 spacing at 1000 is 6e-5
    loss = expert_loss(log_q, h).sum() + gate_loss(log_q, log_w).sum()
    for total in (loss, -log_marginal(log_w, h).sum(), -elbo(log_q, log_w, h).sum()):
        by_h, by_w = torch.autograd.grad(total, (h, log_w), retain_graph=True)
        assert all_finite(total, by_h, by_w)
        hopeless = [0, 0, 0, 0, 0, 0, -0.25, -0.75]  # only the last pair, wrong for both experts, pushes
        assert by_h.flatten().tolist() == pytest.approx(hopeless, abs=1e-3)


def test_users_of_many_hopeless_pairs():
    """M11 where products of probabilities underflow. Catches: multiplying a user's probabilities instead of adding
    logs."""
    h = torch.full((50, 2), -1000.0)
    h[:, 1] = -999.0
    log_p, log_q = e_step(torch.tensor([0.5, 0.5]).log(), h, torch.zeros(50, dtype=torch.int64))
    assert log_p.item() == pytest.approx(-49950.0 + math.log(0.5), rel=1e-6)
    assert log_q[0].tolist() == pytest.approx([-50.0, 0.0], abs=0.01)


def test_an_expert_of_weight_zero_is_absent():
    """log_w = -inf. Catches: 0 * -inf = NaN in the bound, the losses or their gradients; an absent expert that still
    learns."""
    generator = torch.Generator().manual_seed(0)
    h = torch.randn(5, 3, generator=generator, dtype=torch.float64)
    group = torch.tensor([0, 1, 1, 0, 1])
    logits = torch.tensor([0.3, -0.2, -INF], dtype=torch.float64, requires_grad=True)
    two = torch.log_softmax(logits.detach()[:2], 0)
    for index in (None, group):
        log_p, log_q = e_step(torch.log_softmax(logits, 0), h, index)
        expected_p, expected_q = e_step(two, h[:, :2], index)
        assert torch.allclose(log_p, expected_p, atol=1e-14) and torch.allclose(log_q[:, :2], expected_q, atol=1e-14)
        assert (log_q[:, 2] == -INF).all()

    live = h.clone().requires_grad_()
    log_w = torch.log_softmax(logits, 0)
    for weights in (log_w, log_w.expand(5, 3)):
        log_p, log_q = e_step(weights, live)
        bound = elbo(log_q, weights, live)
        loss = expert_loss(log_q, live) + gate_loss(log_q, weights)
        assert torch.allclose(bound, log_p, atol=1e-12) and torch.allclose(loss, -log_p, atol=1e-12)
        reference = torch.autograd.grad(-log_marginal(weights, live).sum(), (live, logits), retain_graph=True)
        for total in (-bound.sum(), loss.sum()):
            by_h, by_logits = torch.autograd.grad(total, (live, logits), retain_graph=True)
            assert all_finite(by_h, by_logits) and not by_h[:, 2].any()
            assert torch.allclose(by_h, reference[0], atol=1e-12)
            assert torch.allclose(by_logits, reference[1], atol=1e-12)


def test_a_hard_responsibility_is_a_bound_too():
    """q one-hot (log_q = -inf elsewhere) with every weight alive. Catches: q log q taken as NaN at q = 0, or clamped to
    something else."""
    h, log_w = torch.tensor([[0.5, -1.5]], dtype=torch.float64), torch.tensor([0.4, 0.6], dtype=torch.float64).log()
    log_q = torch.tensor([[-INF, 0.0]], dtype=torch.float64)
    expected = math.log(0.6) + math.log(1 / (1 + math.exp(1.5)))
    assert elbo(log_q, log_w, h).item() == pytest.approx(expected, abs=1e-14)
    assert gate_loss(log_q, log_w).item() == pytest.approx(-math.log(0.6), abs=1e-14)
    assert expert_loss(log_q, h).item() == pytest.approx(math.log(1 + math.exp(1.5)), abs=1e-14)


def test_experts_can_be_renamed():
    """Renaming experts renames q and w and leaves pairs' numbers alone. Catches: a special expert (index 0, the last
    one), mixed-up axes."""
    generator = torch.Generator().manual_seed(1)
    h, gate, q = (torch.randn(6, 4, generator=generator, dtype=torch.float64) for _ in range(3))
    log_w, log_q = torch.log_softmax(gate, -1), torch.log_softmax(q, -1)
    order, group = [2, 0, 3, 1], torch.tensor([1, 0, 2, 2, 1, 0])
    logps = torch.log_softmax(torch.randn(6, 5, 4, generator=generator, dtype=torch.float64), -1)

    def same(a, b):
        assert torch.allclose(a, b, atol=1e-13)

    for index, weights in ((None, log_w), (group, log_w[group])):
        log_p, posterior = e_step(weights, h, index)
        renamed_p, renamed = e_step(weights[:, order], h[:, order], index)
        same(renamed_p, log_p)
        same(renamed, posterior[:, order])
    same(elbo(log_q[:, order], log_w[:, order], h[:, order]), elbo(log_q, log_w, h))
    same(expert_loss(log_q[:, order], h[:, order]), expert_loss(log_q, h))
    same(gate_loss(log_q[:, order], log_w[:, order]), gate_loss(log_q, log_w))
    same(log_marginal(log_w[:, order], h[:, order]), log_marginal(log_w, h))
    same(update_weights(log_q[:, order], prior=1.7), update_weights(log_q, prior=1.7)[order])
    same(mixture_logp(log_w[:, order], h[:, order]), mixture_logp(log_w, h))
    same(prefix_log_weights(log_w[:, order], logps[..., order]), prefix_log_weights(log_w, logps)[..., order])


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("position", [0, 1, 2])
def test_lower_precision_is_refused(low, position):
    """Everything over K is fp32 at least. Catches: bf16 margins or weights let through any one argument."""
    def arguments(count):
        return [torch.zeros(4, 2, dtype=low if i == position else torch.float32) for i in range(count)]

    calls = {e_step: 2, elbo: 3, expert_loss: 2, gate_loss: 2, log_marginal: 2, mixture_logp: 2, update_weights: 1}
    for function, count in calls.items():
        if position < count:
            with pytest.raises(AssertionError):
                function(*arguments(count))
    if position < 2:
        with pytest.raises(AssertionError):
            e_step(*arguments(2), torch.zeros(4, dtype=torch.int64))
    if position < 2:
        log_w, logps = arguments(2)
        with pytest.raises(AssertionError):
            prefix_log_weights(log_w[0], logps)
