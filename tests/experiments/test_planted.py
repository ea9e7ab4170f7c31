"""mixdpo.linear.linear_mixture on data whose truth is planted: the oracle's likelihood and assignments, for pairs and
for users."""

import math

import brute
import numpy as np
import pytest
import torch

from data.studies.starts import half_split_likelihood
from mixdpo.linear import LinearOptions, linear_mixture

D = 8


def sigma(a):
    return 1 / (1 + np.exp(-a))


def plant(rng, theta, w, units, pairs_each=1):
    """x (B, D) chosen minus rejected, group (B,), and the true annotator of each unit. The annotator judges by its own
    reward, with logistic noise."""
    annotator = rng.choice(len(theta), size=units, p=w)
    group = np.repeat(np.arange(units), pairs_each)
    x = rng.normal(size=(len(group), theta.shape[1]))
    first = rng.random(len(group)) < sigma((x * theta[annotator[group]]).sum(1))
    return np.where(first[:, None], x, -x), group, annotator


def fit(x, group, experts, **options):
    return linear_mixture(torch.tensor(x, dtype=torch.float32), torch.tensor(group), experts, LinearOptions(**options))


def per_pair(x, theta, w):
    """Probability of each pair and its posterior over annotators, by the definition; theta (K, D) and w (K,) are
    probabilities' business only."""
    joint = w * sigma(x @ theta.T)
    return joint.sum(1), joint / joint.sum(1, keepdims=True)


def learned(model):
    return model.theta.double().numpy(), model.log_w.double().exp().numpy()


def test_two_annotators_are_recovered_ten_seeds_of_ten():
    """4,000 pairs, 8 features, two independent random rewards: held-out log-likelihood within 0.005 nats a pair of the
    true rewards', assignments within 2 points; a single model stays further away, so the bar means something. Catches:
    experts stuck at the saddle, a worse start kept, responsibilities not used by the M-step, too few iterations, a
    penalty that shrinks."""
    short = []
    for seed in range(10):
        rng = np.random.default_rng(seed)
        theta, w = rng.normal(size=(2, D)), np.array([0.5, 0.5])
        x, group, _ = plant(rng, theta, w, 4000)
        held_out, _, annotator = plant(rng, theta, w, 20000)
        best, oracle_q = per_pair(held_out, theta, w)
        best, oracle = np.log(best).mean(), brute.best_matching(oracle_q.argmax(1), annotator, 2)
        p, q = per_pair(held_out, *learned(fit(x, group, 2, seed=seed)))
        gap = best - np.log(p).mean()
        assert gap < 0.005, f"seed {seed}: {gap:.4f} nats a pair below the oracle"
        found = brute.best_matching(q.argmax(1), annotator, 2)
        assert found > oracle - 0.02, f"seed {seed}: {found:.3f} of the pairs assigned rightly, the oracle {oracle:.3f}"
        single = per_pair(held_out, *learned(fit(x, group, 1, starts=1)))[0]
        short.append(best - np.log(single).mean())
    assert np.mean(short) > 0.010, f"a single model is only {np.mean(short):.4f} nats a pair short"


def test_users_are_found():
    """M11: 120 users of 20 pairs, weights 0.7 and 0.3. Catches: one latent a pair although users are given, evidence
    averaged, weights not learned."""
    for seed in range(3):
        rng = np.random.default_rng(100 + seed)
        theta, w = rng.normal(size=(2, D)), np.array([0.7, 0.3])
        x, group, annotator = plant(rng, theta, w, 120, pairs_each=20)
        shuffle = rng.permutation(len(x))  # a user's pairs need not be neighbours
        model = fit(x[shuffle], group[shuffle], 2, seed=seed)
        types = model.log_q.argmax(1).tolist()
        assert brute.adjusted_rand(types, annotator.tolist()) > 0.9
        major = int(model.log_w.argmax())
        assert abs(model.log_w[major].exp().item() - np.mean(annotator == 0)) < 0.03
        for found, truth in zip(learned(model)[0][[major, 1 - major]], theta):
            assert found @ truth > 0.97 * np.linalg.norm(found) * np.linalg.norm(truth)


@pytest.fixture(scope="module")
def small():
    rng = np.random.default_rng(7)
    return plant(rng, rng.normal(size=(2, D)) * 2, np.array([0.6, 0.4]), 60, pairs_each=8)


def log_marginals(x, theta, w):
    """Log-marginals of small's 60 users of 8 pairs, whose rows are neighbours: products of probabilities."""
    return np.log(sigma(x @ theta.T).reshape(60, 8, len(w)).prod(1) @ w)


def test_bound_belongs_to_the_parameters_returned(small):
    """Catches: a bound or log_q computed before the last M-step, a mean for the sum over groups, the penalty forgotten
    or added, another start's bound."""
    x, group, _ = small
    early = LinearOptions(iterations=4)                                     # a stale number shows
    model = linear_mixture(torch.tensor(x), torch.tensor(group), 2, early)
    theta, w = learned(model)
    assert model.theta.shape == (2, D) and model.log_w.shape == (2,) and model.log_q.shape == (60, 2)
    assert len(model.bounds) == 5 and model.bound == max(model.bounds) and isinstance(model.bound, float)
    assert math.isclose(w.sum(), 1.0, abs_tol=1e-6)
    penalty = sum(log_marginals(x, theta, w)) - model.bound
    factor = penalty / (1e-2 * (theta ** 2).sum())
    assert min(abs(factor - 0.5), abs(factor - 1.0)) < 1e-3, f"penalty is {factor} l2 |theta|^2, want 1/2 or 1"
    _, q = brute.user_posterior(list(w), (x @ theta.T).tolist(), list(group))
    assert np.allclose(model.log_q.double().exp().numpy(), q, atol=1e-5)


@pytest.mark.parametrize("l2", [1e-2, 3.0])
def test_fit_is_stationary_for_its_own_bound(small, l2):
    """At convergence the bound's gradient in theta vanishes and w = mean q. Catches: M-step and bound with different
    penalties, l2 ignored or scaled by the number of pairs, unweighted regressions."""
    x, group, _ = small
    model = linear_mixture(torch.tensor(x), torch.tensor(group), 2, LinearOptions(l2, 2, 400))
    theta, w = learned(model)
    factor = (sum(log_marginals(x, theta, w)) - model.bound) / (theta ** 2).sum()

    def bound(at):
        return sum(log_marginals(x, at, w)) - factor * (at ** 2).sum()

    here, at_zero = (np.abs(brute.numeric_gradient(bound, at)).max() for at in (theta, theta * 0))
    assert factor > 0.4 * l2 and here < 1e-3 * at_zero
    assert np.allclose(w, model.log_q.double().exp().numpy().mean(0), atol=1e-3)
    stronger = linear_mixture(torch.tensor(x), torch.tensor(group), 2, LinearOptions(10 * l2, 2, 50))
    assert stronger.theta.norm() < model.theta.norm()


def test_more_iterations_never_lower_the_bound(small):
    """EM's monotonicity, seen from outside: the same start, longer. Catches: an M-step that overshoots, a bound that
    mixes two iterations."""
    x, group, _ = small
    for seed in range(3):
        options = [LinearOptions(starts=1, iterations=n, seed=seed) for n in (1, 2, 3, 5, 8, 13, 21)]
        bounds = [linear_mixture(torch.tensor(x), torch.tensor(group), 2, own).bound for own in options]
        assert min(np.diff(bounds)) > -1e-6 and bounds[-1] > bounds[0] + 1, bounds


def test_one_expert_is_a_logistic_regression(small):
    """K = 1 is linear DPO. Catches: intercepts, rescaled features, weights other than one."""
    x, group, _ = small
    model = linear_mixture(torch.tensor(x), torch.tensor(group), 1, LinearOptions(starts=1, iterations=100))
    assert model.log_w.abs().max() < 1e-6 and model.log_q.abs().max() < 1e-6
    solutions = []
    for penalty in (1e-2, 5e-3):  # l2 |theta|^2, or half of it
        theta = np.zeros(D)
        for _ in range(50):  # Newton
            p = sigma(-(x @ theta))
            hessian = (x * (p * (1 - p))[:, None]).T @ x + 2 * penalty * np.eye(D)
            theta = theta + np.linalg.solve(hessian, x.T @ p - 2 * penalty * theta)
        solutions.append(np.allclose(model.theta[0].double().numpy(), theta, atol=2e-2))
    assert any(solutions)


def test_given_weights_are_kept(small):
    """Catches: log_w given by the caller and updated all the same, or used only at the start."""
    x, group, _ = small
    given = torch.tensor([0.9, 0.1], dtype=torch.float64).log()
    model = linear_mixture(torch.tensor(x), torch.tensor(group), 2, log_w=given)
    assert torch.allclose(model.log_w.double(), given, atol=1e-6)
    theta, w = learned(model)
    assert abs(sum(log_marginals(x, theta, w)) - model.bound) < 1.1e-2 * (theta ** 2).sum()  # and the bound uses them


def test_runs_repeat_and_leave_the_global_generator(small):
    """Catches: starts that are all alike, a seed ignored, randomness from the global generator."""
    x, group, _ = small
    before = torch.get_rng_state()
    first, second, other = (fit(x, group, 3, seed=seed, iterations=3) for seed in (1, 1, 2))
    assert torch.equal(first.theta, second.theta) and first.bounds == second.bounds
    assert len(set(first.bounds)) == 5 and not set(first.bounds) & set(other.bounds)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_precision_in_is_precision_out(small, dtype):
    """Catches: a fixed output dtype; then the bound is not that of the parameters returned, to the precision that was
    asked for."""
    x, group, _ = small
    model = linear_mixture(torch.tensor(x, dtype=dtype), torch.tensor(group), 2, LinearOptions(iterations=3))
    assert model.theta.dtype == model.log_w.dtype == model.log_q.dtype == dtype


def test_half_of_a_users_pairs_predicts_the_other_half():
    """Against the definition, and what it is for: with more features than pairs tell of, the ridge that predicts best
    finds more users' types than the least one. Catches: pairs asked that were trained on, halves of all pairs for
    halves of each user's, a penalty for all pairs on half of them, users mixed up."""
    rng = np.random.default_rng(0)
    theta = 0.25 * rng.normal(size=(2, 150))
    x, group, annotator = plant(rng, theta, np.array([0.5, 0.5]), 60, pairs_each=20)
    shuffle = rng.permutation(len(x))
    x, group = torch.tensor(x[shuffle], dtype=torch.float32), torch.tensor(group[shuffle])
    options = {ridge: LinearOptions(ridge * len(x), starts=2) for ridge in (0.001, 0.1)}
    predicted = {ridge: half_split_likelihood(x, group, 2, own) for ridge, own in options.items()}
    found = {ridge: brute.adjusted_rand(linear_mixture(x, group, 2, own).log_q.argmax(1).tolist(), annotator.tolist())
             for ridge, own in options.items()}
    assert predicted[0.1] > predicted[0.001] + 0.1 and found[0.1] > found[0.001] + 0.1, (predicted, found)
    learns, asked = [], []
    for user in range(60):
        own = [i for i in range(len(group)) if group[i] == user]
        learns += own[0::2]
        asked += own[1::2]
    model = linear_mixture(x[sorted(learns)], group[sorted(learns)], 2, LinearOptions(0.1 * len(x) / 2, 2))
    total = 0.0
    for user in range(60):
        own = [i for i in asked if group[i] == user]
        like = [math.prod(sigma(float(x[i].double() @ model.theta[k].double())) for i in own) for k in range(2)]
        total += math.log(sum(math.exp(float(model.log_q[user, k])) * like[k] for k in range(2)))
    assert predicted[0.1] == pytest.approx(total / len(asked), abs=1e-4)
