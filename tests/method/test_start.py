"""mixdpo/start.py: the start of a run with linear rewards, on planted users of several types."""

from types import SimpleNamespace

import brute
import numpy as np
import torch

from mixdpo.linear import LinearOptions, linear_mixture, log_evidence
from mixdpo.start import first_responsibilities


def planted(types, width, seed, users=100, each=10, deviation=2.8):
    """Features (P,2,D) of chosen and rejected responses, the pairs of each user, and the users' types: margins of the
    true rewards have this deviation in nats."""
    rng = np.random.default_rng([seed, types, width])
    theta = deviation / width**0.5 * rng.normal(size=(types, width))
    z = rng.integers(types, size=users)
    x = rng.normal(size=(users * each, width))
    first = rng.random(len(x)) < 1 / (1 + np.exp(-(x * theta[np.repeat(z, each)]).sum(1)))
    x = torch.from_numpy(np.where(first[:, None], x, -x)).float()
    scale = torch.from_numpy(np.exp(rng.normal(size=width))).float()        # the model's features have any size
    return torch.stack([x * scale, torch.zeros_like(x)], 1), torch.arange(len(x)).view(users, each).tolist(), z


def started(types, width, seed, **of):
    features, units, z = planted(types, width, seed, **of)
    config = SimpleNamespace(experts=types, start="linear", restarts=5, seed=seed)
    q = first_responsibilities(config, units, features).exp()
    return q, brute.adjusted_rand(q.argmax(1).tolist(), z.tolist())


def test_four_types_are_found_and_no_component_vanishes():
    """1,000 pairs of 100 users, four types. Catches: a penalty that grows with the number of pairs, with weights in
    closed form: then components vanish."""
    found = [started(4, 24, seed) for seed in range(3)]
    shares, aris = [q.mean(0).min().item() for q, _ in found], [ari for _, ari in found]
    print(shares, aris)
    assert min(shares) > 0.08 and np.mean(aris) > 0.5, (shares, aris)


def test_evidence_is_the_integral_over_rewards():
    """One expert and one feature: against a sum over theta on a fine grid. Catches: the sign or the half of the
    determinant, a prior that is not normalised, a curvature without its weights."""
    rng = np.random.default_rng(0)
    x = torch.from_numpy(rng.normal(size=(60, 1)) + 0.5)
    for l2 in (0.1, 1.0, 10.0):
        fit = linear_mixture(x, torch.arange(60), 1, LinearOptions(l2, starts=1))
        theta = np.linspace(-20, 20, 40001)
        log_p = -np.logaddexp(0, -x.numpy() @ theta[None]).sum(0) - l2 / 2 * theta**2 + 0.5 * np.log(l2 / 2 / np.pi)
        exact = np.log(np.exp(log_p - log_p.max()).sum() * (theta[1] - theta[0])) + log_p.max()
        assert abs(log_evidence(fit, x, torch.arange(60), l2) - exact) < 0.05, (l2, exact)


def test_evidence_counts_each_expert_by_its_responsibilities():
    """Two experts: the determinants by the definition. Catches: responsibilities of another group, or none."""
    rng = np.random.default_rng(1)
    x, group = torch.from_numpy(rng.normal(size=(40, 3))), torch.arange(10).repeat(4)
    fit, l2 = linear_mixture(x, group, 2, LinearOptions(2.0, starts=1)), 2.0
    wanted = fit.bound
    for k in range(2):
        H = l2 * np.eye(3)
        for n in range(40):
            p = 1 / (1 + np.exp(-float(x[n] @ fit.theta[k])))
            H += float(fit.log_q[group[n], k].exp()) * p * (1 - p) * np.outer(x[n], x[n])
        wanted -= 0.5 * np.log(np.linalg.det(H / l2))
    assert abs(log_evidence(fit, x, group, l2) - wanted) < 1e-6


def test_the_prior_follows_the_data_at_any_width_and_length(capsys):
    """Strong tastes choose a wide prior and weak tastes a narrow one, in 8 features and in 60. Catches: a penalty that
    does not scale with the features, the least evidence, one candidate for all."""
    for width in (8, 60):
        chosen = []
        for deviation in (3.0, 0.5):
            started(2, width, 0, deviation=deviation, users=60)
            line = next(n for n in capsys.readouterr().out.splitlines() if "log evidence" in n)
            values = [float(part.split(": ")[1]) for part in line.split("margin: ")[1].split(", ")]
            chosen.append(int(np.argmax(values)))
        assert chosen[0] < chosen[1], (width, chosen)
