"""EM as a whole, in tiny worlds whose every number is known: the saddle and the way out of it, and a likelihood that
never falls."""

import math

import brute
import numpy as np
import pytest
import torch

from mixdpo.dpo import margins
from mixdpo.linear import random_responsibilities
from mixdpo.mixture import e_step, expert_loss, update_weights

FP64 = torch.float64
V, BETA = 6, 0.5  # outcomes of the one prompt; DPO's beta


def tabular_world(seed=0, users=60, pairs_each=6):
    """Two types of user with independent rewards over V outcomes. Returns pairs (B, 2) of outcomes, group (B,) and each
    user's type (G,)."""
    rng = np.random.default_rng(seed)
    reward = rng.normal(size=(2, V)) * 2
    types = rng.integers(0, 2, users)
    pairs, group = [], []
    for user in range(users):
        for _ in range(pairs_each):
            a, b = rng.choice(V, 2, replace=False)
            chosen_first = rng.random() < brute.sigma(reward[types[user]][a] - reward[types[user]][b])
            pairs.append([a, b] if chosen_first else [b, a])
            group.append(user)
    return np.array(pairs), np.array(group), types


def reference_logits():
    return torch.randn(V, generator=torch.Generator().manual_seed(1), dtype=FP64)


def tabular_margins(logits, pairs):
    """Softmax policies (K, V) and their common reference -> h (B, K), through the package's margin."""
    logp = torch.log_softmax(logits, -1)[:, pairs].transpose(0, 1)  # (B, K, 2)
    return margins(logp, torch.log_softmax(reference_logits(), -1)[pairs][:, None], BETA)


def em(K, pairs, group, steps, rate, warm=0, seed=0):
    """Full-batch EM by gradient steps; the first `warm` steps use one random draw of responsibilities. Returns logits
    (K, V), log_w, log_q."""
    pairs, group = torch.tensor(pairs), torch.tensor(group)
    logits = reference_logits().repeat(K, 1).requires_grad_()
    log_w = torch.full((K,), -math.log(K), dtype=FP64)
    start = random_responsibilities(int(group.max()) + 1, K, torch.Generator().manual_seed(seed)).to(FP64)
    for step in range(steps):
        h = tabular_margins(logits, pairs)
        log_q = start if step < warm else e_step(log_w, h, group)[1]
        log_w = update_weights(log_q)
        gradient, = torch.autograd.grad(expert_loss(log_q[group], h).sum(), logits)
        logits = (logits - rate * gradient).detach().requires_grad_()
    return logits.detach(), log_w, log_q


def plain_dpo(pairs, steps, rate):
    """DPO on one softmax policy with the gradient written by hand: the log-normaliser cancels in the margin, so each
    pair moves two logits."""
    logits, start = reference_logits().tolist(), reference_logits().tolist()
    for _ in range(steps):
        change = [0.0] * V
        for chosen, rejected in pairs:
            h = BETA * ((logits[chosen] - logits[rejected]) - (start[chosen] - start[rejected]))
            change[chosen] += rate * BETA * brute.sigma(-h)
            change[rejected] -= rate * BETA * brute.sigma(-h)
        logits = [a + c for a, c in zip(logits, change)]
    return np.array(logits)


@pytest.mark.parametrize("K", [2, 3])
def test_equal_experts_stay_equal_and_are_dpo(K):
    """The symmetric saddle: q = w and equal gradients for ever, and the common path is plain DPO's (each expert with
    1/K of the gradient). Catches: a tie silently broken inside the E-step or the loss (noise, argmax), weights that
    leave 1/K, a loss scaled by anything but q."""
    pairs, group, _ = tabular_world()
    logits, log_w, log_q = em(K, pairs, group, steps=100, rate=0.02 * K)
    uniform = torch.full_like(log_q, -math.log(K))
    assert torch.allclose(log_q, uniform, atol=1e-9) and torch.allclose(log_w, uniform[0], atol=1e-9)
    for k in range(K):
        assert torch.allclose(logits[k], logits[0], atol=1e-9)
        assert np.allclose(logits[k].numpy(), plain_dpo(pairs, steps=100, rate=0.02), atol=1e-9)
    assert (logits[0] - reference_logits()).abs().max() > 0.5  # it did learn


def test_random_responsibilities_leave_the_saddle():
    """Five warm-up steps with Dirichlet responsibilities, then EM: the experts part, users find their type, the
    likelihood passes DPO's. Catches: equal or uniform responsibilities drawn, a tie-break that every pair of a user
    draws anew, evidence averaged over a user."""
    pairs, group, types = tabular_world()
    saddle, _, _ = em(2, pairs, group, steps=300, rate=0.04)
    logits, log_w, log_q = em(2, pairs, group, steps=300, rate=0.04, warm=5)
    assert (logits[0] - logits[1]).abs().max() > 1.0
    assert brute.best_matching(log_q.argmax(-1).tolist(), types.tolist(), 2) >= 0.9

    def likelihood(logits, w):
        h = tabular_margins(logits, torch.tensor(pairs)).tolist()
        return sum(math.log(p) for p in brute.user_posterior(w, h, group.tolist())[0])

    assert likelihood(logits, log_w.exp().tolist()) > likelihood(saddle, [0.5, 0.5]) + 20


@pytest.mark.parametrize("users", [False, True])
def test_full_batch_em_never_lowers_the_likelihood(users):
    """E-step, closed-form weights, and M-steps no longer than 1/L, from ten random starts of linear experts. The
    likelihood is a plain loop's. Catches: an M-step uphill, q of stale parameters' users, weights that are not the mean
    of q, a posterior that is not Bayes'."""
    rng = np.random.default_rng(3)
    B, D, K = 40, 3, 2
    x = rng.normal(size=(B, D)) * 1.5
    group = rng.permutation(B) // 4 if users else np.arange(B)
    features, index = torch.tensor(x), torch.tensor(group)
    rate = 1 / (0.25 * np.linalg.eigvalsh(x.T @ x).max())  # 1/L of the weighted logistic loss

    def likelihood(theta, log_w):
        h = [[math.fsum(theta[k, d].item() * x[b, d] for d in range(D)) for k in range(K)] for b in range(B)]
        return sum(math.log(p) for p in brute.user_posterior(log_w.exp().tolist(), h, group.tolist())[0])

    for start in range(10):
        theta = torch.tensor(np.random.default_rng(start).normal(size=(K, D)) * 2)
        log_w = torch.tensor([0.8, 0.2], dtype=FP64).log()
        path = [likelihood(theta, log_w)]
        for _ in range(12):
            log_q = e_step(log_w, features @ theta.T, index)[1]
            log_w = update_weights(log_q)
            path.append(likelihood(theta, log_w))
            for _ in range(3):
                theta.requires_grad_()
                gradient, = torch.autograd.grad(expert_loss(log_q[index], features @ theta.T).sum(), theta)
                theta = (theta - rate * gradient).detach()
            path.append(likelihood(theta, log_w))
        assert min(np.diff(path)) > -1e-9, f"start {start}: fell by {-min(np.diff(path)):.3g}"
        assert path[-1] > path[0] + 0.5
