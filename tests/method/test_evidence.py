"""The linear start as a part of the E-step: mixdpo/start.py's fold_margins, start_evidence and make_start.
What each test catches stands in its docstring."""

import dataclasses
import types

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from small import config as config_of

from mixdpo import start
from mixdpo.gates import Gate, Inputs
from mixdpo.linear import LinearOptions, linear_mixture
from mixdpo.preferences import Pair
from mixdpo.start import fold_margins, make_start, start_evidence

SEED = 3


def world(users=12, each=7, width=3, seed=SEED):
    """Users of two types by turns, whose choices follow opposed linear rewards in the first feature: x (B,D) float64,
    group (B,). Pairs of a user do not stand together."""
    rng = np.random.default_rng(seed)
    group = np.arange(users * each) % users
    x = rng.normal(size=(users * each, width)) * 0.7
    x[:, 0] += np.where(group % 2, 1.0, -1.0)
    return torch.tensor(x), torch.tensor(group)


def fitted(x, q, l2):
    """theta (D,) that maximises sum_i q_i log sigma(theta . x_i) - l2/2 |theta|^2, by autograd from 0."""
    theta = torch.zeros(x.shape[1], dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([theta], max_iter=200, tolerance_grad=1e-11, tolerance_change=1e-14,
                                  line_search_fn="strong_wolfe")

    def loss():
        optimizer.zero_grad()
        value = -(q * F.logsigmoid(x @ theta)).sum() + 0.5 * l2 * theta.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    return theta.detach()


def test_no_pair_is_scored_by_rewards_that_saw_it():
    """A pair with its choice inverted is scored by the same rewards, so its margin changes its sign; pairs of other
    folds are scored by others. Caught: scores of the fit on all pairs; folds that overlap; a pair's own fold in its
    fit."""
    x, group = world()
    fit = linear_mixture(x, group, 2)
    before = fold_margins(x, group, fit)
    assert before.shape == (len(x), 2) and before.any(1).all()
    for i in (0, 17, 40, len(x) - 1):
        turned = x.clone()
        turned[i] *= -1
        after = fold_margins(turned, group, fit)
        assert torch.allclose(before[i], -after[i], rtol=0, atol=1e-9)
        changed = ((after - before).abs() > 1e-12).any(1)
        assert changed.sum() > 0.7 * len(x), "the fits of all other folds have changed"


def test_scores_are_those_of_rewards_fitted_to_the_other_folds():
    """Against a fit by autograd on four fifths of every user's pairs, from 0. Caught: folds by place in the file, which
    leave some users out; another penalty; the responsibilities of another group; a fit that is not finished
    and still knows the pairs that it began from; pairs in another order."""
    x, group = world()
    l2 = 2.0
    fit = linear_mixture(x, group, 2, LinearOptions(l2))
    got, q = F.logsigmoid(fold_margins(x, group, fit)), fit.log_q.exp()[group]
    place = [sum(int(group[j]) == int(group[i]) for j in range(i)) for i in range(len(x))]
    fold = torch.tensor(place) % start.FOLDS
    for n in range(start.FOLDS):
        kept = fold != n
        for k in range(2):
            theta = fitted(x[kept], q[kept, k], l2)
            assert torch.allclose(got[~kept, k], F.logsigmoid(x[~kept] @ theta), rtol=0, atol=1e-5)
    far = dataclasses.replace(fit, theta=torch.zeros_like(fit.theta))
    assert torch.allclose(F.logsigmoid(fold_margins(x, group, far)), got, rtol=0, atol=1e-3)
    own = F.logsigmoid(x @ fit.theta.T)                                     # of pairs that the fit has seen
    right = q.argmax(1)[:, None]
    assert got.gather(1, right).mean() < own.gather(1, right).mean() - 1e-3, "not as sure as of its own pairs"


def plan_of(units, context=()):
    """Units as they are, of pairs that say no more than whether they are context pairs."""
    pairs = [Pair([1], [2], [3], context=i in context) for i in range(sum(map(len, units)))]
    return types.SimpleNamespace(units=units, pairs=pairs)


def linear(**options):
    return config_of(start="linear", latent="user", estep="context", **options)


def test_evidence_sums_a_units_training_pairs(monkeypatch):
    """Each pair's log-likelihood is a power of 2, so a sum tells its terms. Caught: context pairs counted twice, here
    and in the E-step; pairs in the order of the file for those of the units; another unit's; margins of other pairs."""
    monkeypatch.setattr(start, "fold_margins", lambda x, group, fit, choice: torch.stack(
        [2.0 ** torch.arange(len(x)), -(2.0 ** torch.arange(len(x)))], 1).double())
    monkeypatch.setattr(start.F, "logsigmoid", lambda h: h)
    monkeypatch.setattr(start, "fit_linear", lambda *_: types.SimpleNamespace(log_q=torch.zeros(3, 2)))
    monkeypatch.setattr(start, "differ", lambda fit: True)
    features = torch.tensor(np.random.default_rng(0).normal(size=(7, 2, 3)), dtype=torch.float32)
    units = [[0, 3, 6], [5, 1], [2, 4]]                                     # their pairs have the numbers 0, ..., 6
    got, margins = start_evidence(linear(), plan_of(units, context={3, 5, 2}), features, None)
    assert got.tolist() == [[5.0, -5.0], [16.0, -16.0], [64.0, -64.0]] and got.dtype == torch.float32
    assert margins[:, 0].tolist() == [0, 0, 32, 2, 0, 8, 0] and torch.equal(margins[:, 1], -margins[:, 0])


def features_of(x):
    """(P,2,D) features whose difference is x."""
    return torch.stack([x, torch.zeros_like(x)], 1).float()


@pytest.mark.parametrize("gate", ["uniform", "given", "update"])
def test_planted_users_are_assigned_by_evidence_and_weights(gate):
    """make_start: no first responsibilities, and evidence under which users have their types. Caught: first steps on
    the start's responsibilities; evidence of the other type; the weights counted in the evidence, and so twice."""
    x, group = world(users=20, each=8)
    units = [[i for i in range(len(x)) if int(group[i]) == u] for u in range(20)]
    plan = plan_of(units, context={unit[0] for unit in units})
    log_w = torch.tensor([0.2, 0.8] if gate == "given" else [0.5, 0.5]).log()
    weights = {"uniform": "uniform", "given": "0.2,0.8", "update": "update"}[gate]
    none = Inputs(torch.zeros(20, 0), torch.zeros(20, dtype=torch.int64))
    config = linear(weights=weights)
    log_q, evidence, margins = make_start(Gate("fixed", 2, none, log_w), none, plan, features_of(x), config)
    assert log_q is None and evidence.shape == (20, 2) and margins.any(1).sum() == 20
    found, truth = torch.softmax(log_w + evidence, 1), torch.arange(20) % 2
    right = found.argmax(1) == truth
    assert right.all() or not right.any()
    sure = found.max(1).values
    assert sure.min() > 0.7
    context = plan_of(units, context={i for i in range(len(x)) if i not in {unit[0] for unit in units}})
    fewer = make_start(Gate("fixed", 2, none, log_w), none, context, features_of(x), config)[1]
    assert fewer.abs().max() < evidence.abs().max() / 2, "one pair says less than seven"


@pytest.mark.parametrize("options", [dict(estep="all"), dict(start="dirichlet"), dict(start="none"), dict(experts=1)],
                         ids=str)
def test_other_starts_have_no_evidence(options):
    """Caught: evidence of a start whose responsibilities are those of the first steps; or neither."""
    x, group = world()
    units = [[i for i in range(len(x)) if int(group[i]) == u] for u in range(12)]
    config = dataclasses.replace(linear(), **options)
    none = Inputs(torch.zeros(12, 0), torch.zeros(12, dtype=torch.int64))
    gate = Gate("fixed", config.experts, none, torch.full((config.experts,), 1 / config.experts).log())
    log_q, evidence, margins = make_start(gate, none, plan_of(units), features_of(x), config)
    assert evidence.shape == (12, config.experts) and not evidence.any() and not margins.any()
    assert (log_q is None) == (config.start == "none" or config.experts == 1)


def test_no_pair_of_a_ranking_is_scored_by_rewards_that_saw_another_of_it():
    """Two pairs of one ranking with their choices inverted, as above. Caught: pairs of a ranking in different folds; a
    fold of rankings that is counted over all users."""
    x, group = world(each=8)
    x, group = x[torch.argsort(group)], group.sort().values                 # a user's pairs stand together
    fit, choice = linear_mixture(x, group, 2), torch.arange(len(x)) // 2
    assert torch.equal(group[::2], group[1::2])
    before = fold_margins(x, group, fit, choice)
    for i in (0, 18, 40):
        turned = x.clone()
        turned[i : i + 2] *= -1
        after = fold_margins(turned, group, fit, choice)
        assert torch.allclose(before[i : i + 2], -after[i : i + 2], rtol=0, atol=1e-9)
        assert ((after - before).abs() > 1e-12).any(1).sum() > 0.7 * len(x)
