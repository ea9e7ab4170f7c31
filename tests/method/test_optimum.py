"""What the mixture optimises, on a toy with 6 outcomes: the decoupled and the joint objective have different optima,
and MBT (M5) is not BT on M2.

Decoupled: sum_k w_k ( E_pi_k[r_k] - beta KL(pi_k || ref_k) ), maximised by tilting reference k with its own r_k (M3).
Joint:     sum_k w_k ( E_pi_k[r]   - beta KL(pi_k || ref_k) ) with the mixture reward r = log sum_k w_k exp r_k (M2),
maximised by tilting every reference with r. Each closed form is held against a numerical maximiser that knows neither.
"""

import math

import brute
import numpy as np
import torch

from mixdpo.dpo import margins
from mixdpo.mixture import log_marginal, mixture_reward

V, K, BETA = 6, 2, 0.5
RNG = np.random.default_rng(4)
REFERENCE, REWARD, WEIGHT = RNG.dirichlet(np.ones(V), size=K), RNG.normal(size=(K, V)) * 1.5, np.array([0.35, 0.65])


def reward_of_the_mixture():
    """M2 in plain loops."""
    return np.array([math.log(sum(WEIGHT[k] * math.exp(REWARD[k][y]) for k in range(K))) for y in range(V)])


def objective(policies, rewards):
    """sum_k w_k (E_pi_k[rewards_k] - beta KL(pi_k || ref_k)) by loops; policies and rewards (K, V)."""
    expected = [sum(policies[k][y] * rewards[k][y] for y in range(V)) for k in range(K)]
    return sum(WEIGHT[k] * (expected[k] - BETA * brute.kl(policies[k], REFERENCE[k])) for k in range(K))


def tilt(rewards):
    """pi_k proportional to ref_k exp(rewards_k / beta): the closed form under test."""
    weights = REFERENCE * np.exp(np.asarray(rewards) / BETA)
    return weights / weights.sum(1, keepdims=True)


def maximise(rewards):
    """Brute force: L-BFGS on the logits of both policies, the best of four random starts. Knows no closed form."""
    reference, reward, w = torch.tensor(REFERENCE), torch.tensor(rewards), torch.tensor(WEIGHT)
    found = []
    for seed in range(4):
        logits = torch.randn(K, V, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).requires_grad_()
        optimizer = torch.optim.LBFGS([logits], max_iter=300, tolerance_grad=1e-10, tolerance_change=0,
                                      line_search_fn="strong_wolfe")

        def loss():
            optimizer.zero_grad()
            policies = torch.softmax(logits, 1)
            value = -(w[:, None] * policies * (reward - BETA * (policies.log() - reference.log()))).sum()
            value.backward()
            return value

        optimizer.step(loss)
        policies = torch.softmax(logits.detach(), 1).numpy()
        found.append((objective(policies, rewards), policies))
    return max(found, key=lambda pair: pair[0])


def test_decoupled_optimum_tilts_each_expert_by_its_own_reward():
    """M3. Catches (in the documentation's claim): the closed form put at the joint objective's optimum. Value: sum_k
    w_k beta log Z_k."""
    closed = tilt(REWARD)
    log_z = [math.log(sum(REFERENCE[k][y] * math.exp(REWARD[k][y] / BETA) for y in range(V))) for k in range(K)]
    assert math.isclose(objective(closed, REWARD), sum(WEIGHT[k] * BETA * log_z[k] for k in range(K)), abs_tol=1e-12)
    value, policies = maximise(REWARD)
    assert abs(value - objective(closed, REWARD)) < 1e-9 and np.allclose(policies, closed, atol=1e-4)
    h = margins(torch.tensor(np.log(closed[:, [0, 3]])), torch.tensor(np.log(REFERENCE[:, [0, 3]])), BETA)
    assert np.allclose(h.numpy(), REWARD[:, 0] - REWARD[:, 3], atol=1e-12)  # it reads the expert's own reward back


def test_joint_optimum_tilts_every_expert_by_the_mixture_reward():
    """M2 as the package computes it. Catches: a weighted mean or a max of rewards for log sum w exp r; the joint
    optimum equated with M3's."""
    reward = mixture_reward(torch.tensor(WEIGHT).log(), torch.tensor(REWARD).T)  # (V,)
    assert np.allclose(reward.numpy(), reward_of_the_mixture(), atol=1e-13)
    shared = np.stack([reward_of_the_mixture()] * K)
    closed = tilt(shared)
    value, policies = maximise(shared)
    assert abs(value - objective(closed, shared)) < 1e-9 and np.allclose(policies, closed, atol=1e-4)


def test_the_two_optima_differ():
    """Catches: "the closed form solves the joint objective". Each objective prefers its own tilt, by far, and the
    policies are different ones."""
    shared = np.stack([reward_of_the_mixture()] * K)
    own, joint = tilt(REWARD), tilt(shared)
    assert objective(own, REWARD) > objective(joint, REWARD) + 0.05
    assert objective(joint, shared) > objective(own, shared) + 0.05
    assert np.abs(own - joint).max() > 0.1
    assert abs(objective(own, REWARD) - objective(joint, shared)) > 0.05  # nor are the optimal values equal


def test_mixture_of_bradley_terry_is_not_bradley_terry_of_the_mixture():
    """M5 against sigma of the difference of M2. Catches: log_marginal computed from the mixture reward. They agree for
    one expert, or for equal ones."""
    log_w = torch.tensor(WEIGHT).log()
    reward = mixture_reward(log_w, torch.tensor(REWARD).T)
    largest = 0.0
    for chosen in range(V):
        for rejected in range(V):
            difference = REWARD[:, chosen] - REWARD[:, rejected]
            mbt = log_marginal(log_w, torch.tensor(difference)[None]).exp().item()
            bt = brute.sigma(reward_of_the_mixture()[chosen] - reward_of_the_mixture()[rejected])
            assert math.isclose(mbt, brute.marginal(WEIGHT, [difference])[0], abs_tol=1e-14)
            assert math.isclose(bt, torch.sigmoid(reward[chosen] - reward[rejected]).item(), abs_tol=1e-14)
            largest = max(largest, abs(mbt - bt))
    assert largest > 0.05
    same = torch.tensor(REWARD[:1].repeat(K, 0))
    bt = torch.sigmoid(mixture_reward(log_w, same.T)[0] - mixture_reward(log_w, same.T)[1])
    assert math.isclose(log_marginal(log_w, (same[:, 0] - same[:, 1])[None]).exp().item(), bt.item(), abs_tol=1e-14)


def test_two_opposed_annotators_say_nothing():
    """M5 = 1/2 for every pair when two experts of equal weight are exactly opposed. Catches: weights or signs that
    break the symmetry."""
    h = torch.randn(50, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 4
    log_p = log_marginal(torch.tensor([0.5, 0.5], dtype=torch.float64).log(), torch.cat([h, -h], 1))
    assert torch.allclose(log_p, torch.full((50,), math.log(0.5), dtype=torch.float64), atol=1e-14)
