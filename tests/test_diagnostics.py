"""diagnostics.py against brute force that shares no code with it. Docstrings name the faults seen."""

import itertools
import math

import numpy as np
import pytest
import torch

import brute
from mixdpo.diagnostics import (
    adjusted_rand_index, bayes_posterior, difference_se, effective_experts, entropy, matched_accuracy, mean_se,
    step_summary
)


def labels(seed, n=30, a=3, b=4):
    rng = np.random.default_rng(seed)
    found = rng.integers(0, a, n)
    truth = np.where(rng.random(n) < 0.6, found, rng.integers(0, b, n))      # related, else both are 0 on average
    return found.tolist(), truth.tolist()


@pytest.mark.parametrize("seed", range(20))
def test_ari_against_its_definition_over_all_pairs(seed):
    """Faults: pairs counted as n^2; the expected index left out (the plain Rand index);
    max instead of mean in the denominator."""
    found, truth = labels(seed)
    names = ["sentiment", "grammar", "length", "other"]
    want = brute.adjusted_rand(found, truth)
    assert adjusted_rand_index(found, [names[t] for t in truth]) == pytest.approx(want, abs=1e-12)
    assert adjusted_rand_index(truth, found) == pytest.approx(brute.adjusted_rand(found, truth), abs=1e-12)


def test_ari_at_its_ends():
    """Faults: 0/0 for trivial labellings; a renaming changes it."""
    assert adjusted_rand_index([0, 0, 1, 1], ["b", "b", "a", "a"]) == 1.0
    assert adjusted_rand_index([0, 0, 0], ["a", "a", "a"]) == 1.0
    assert adjusted_rand_index([0, 1, 2], ["a", "b", "c"]) == 1.0
    assert adjusted_rand_index([0, 0, 0, 0], ["a", "b", "a", "b"]) == 0.0
    with pytest.raises(ValueError):
        adjusted_rand_index([0, 1], ["a"])


@pytest.mark.parametrize("seed", range(8))
def test_matched_accuracy_is_the_best_of_all_namings(seed):
    """Faults: two experts get one name; the first naming is taken."""
    found, truth = labels(seed, a=3, b=3)
    share, naming = matched_accuracy(found, ["abc"[t] for t in truth], 3)
    assert share == pytest.approx(brute.best_matching(found, truth, 3))
    assert sorted(naming.values()) == ["a", "b", "c"]
    assert np.mean([naming[f] == "abc"[t] for f, t in zip(found, truth)]) == pytest.approx(share)


def test_more_experts_than_kinds_and_fewer():
    """Faults: a spare expert gets a second name; an error where kinds outnumber experts."""
    assert matched_accuracy([0, 2, 1, 1], ["a", "a", "b", "b"], 3) == (0.75, {0: "a", 1: "b", 2: None})
    assert matched_accuracy([0, 0, 0], ["a", "b", "b"], 1) == (2 / 3, {0: "b"})


def test_bayes_posterior_by_hand():
    """Faults: a tie counts as a win or a loss; a user's pairs averaged, not multiplied;
    noise that nobody explains gives NaN."""
    first, second, tie = {"a": [1, 0], "b": [0, 1]}, {"a": [0, 1], "b": [1, 0]}, {"a": [1, 0], "b": [2, 2]}
    got = bayes_posterior([[first], [tie], [tie, tie], [first, second], [tie, first]], ["a", "b"])
    want = [[1, 0], [2 / 3, 1 / 3], [0.8, 0.2], [0.5, 0.5], [1, 0]]
    assert torch.allclose(got, torch.tensor(want, dtype=torch.float64))


def test_effective_experts_and_entropy():
    """Faults: the mean of the entropies; 0 log 0 = NaN; the mean taken in log space."""
    certain = torch.tensor([[0.0, -torch.inf], [-torch.inf, 0.0]])
    assert effective_experts(certain) == pytest.approx(2.0) and entropy(certain).tolist() == [0.0, 0.0]
    assert effective_experts(certain[:1]) == pytest.approx(1.0)
    q = torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.1, 0.8]])
    mean = [0.3, 0.175, 0.525]
    assert effective_experts(q.log()) == pytest.approx(math.exp(-sum(p * math.log(p) for p in mean)), rel=1e-6)


def test_a_steps_figures_against_plain_python():
    """Faults: loss with live weights w for q; the mean over experts in accuracy;
    the bound at the posterior and not at the q in use."""
    rng = np.random.default_rng(0)
    h, q, w = rng.normal(size=(5, 2)), rng.dirichlet([1, 1], 5), [0.3, 0.7]
    h[2, 1] = 0.0                                                           # a tie counts one half
    got = step_summary(torch.tensor(q).log(), torch.tensor([w] * 5, dtype=torch.float64).log(), torch.tensor(h))
    p = brute.marginal(w, h)
    want = {
        "loss": np.mean([-sum(q[b][k] * math.log(brute.sigma(h[b][k])) for k in range(2)) for b in range(5)]),
        "log_marginal": np.mean(np.log(p)), "elbo": np.mean(brute.elbo(q, w, h)),
        "accuracy": [np.mean([(h[b, k] > 0) + 0.5 * (h[b, k] == 0) for b in range(5)]) for k in range(2)],
        "accuracy_mbt": np.mean([a > 0.5 for a in p]), "margin": h.mean(0), "q": q.mean(0),
        "q_entropy": np.mean([-sum(x * math.log(x) for x in row) for row in q]),
        "effective_experts": math.exp(-sum(x * math.log(x) for x in q.mean(0))),
        "q_gain": np.mean([brute.kl(row, w) for row in q]), "w": w,
        "gate_entropy": -sum(x * math.log(x) for x in w), "gate_information": 0.0,
    }
    assert got.keys() == want.keys()
    for name, value in want.items():
        assert got[name] == pytest.approx(value, rel=1e-6, abs=1e-12), name


def test_standard_errors_count_clusters():
    """Against the plain formulas, and against the spread of many draws in which users share a prompt's outcome.
    Faults: dependent values counted as independent; a prompt on both sides of a difference counted as two;
    residuals from the mean of all instead of each side's; no C / (C - 1)."""
    rng = np.random.default_rng(0)
    values = rng.normal(size=7)
    got = mean_se(values)
    assert got["se"] == pytest.approx(values.std(ddof=1) / math.sqrt(7)) and got["n"] == 7
    assert mean_se(values, list("abcdefg")) == pytest.approx(got)
    twice = mean_se(np.repeat(values, 2), [c for c in "abcdefg" for _ in range(2)])
    assert twice["se"] == pytest.approx(got["se"]) and twice["mean"] == pytest.approx(got["mean"])
    assert math.isnan(mean_se([1.0], None)["se"]) and math.isnan(mean_se([1.0, 2.0], ["a", "a"])["se"])
    first = torch.tensor([n % 2 == 0 for n in range(8)])
    apart = difference_se(rng.normal(size=8), first)
    assert apart["se"] > 0
    draws, told = [], []
    for _ in range(400):
        shared, prompts = rng.normal(size=30), [n // 4 for n in range(120)]
        drawn = np.repeat(shared, 4) + 0.1 * rng.normal(size=120)           # four pairs of each prompt
        side = torch.tensor([n % 4 == 0 or n >= 60 for n in range(120)])    # half of the prompts lie on both sides
        drawn = drawn + 3 * side.numpy()                                    # and the sides' means are far apart
        found = difference_se(drawn, side, prompts)
        draws.append(found["mean"])
        told.append(found["se"])
        assert found["mean"] == pytest.approx(drawn[side.numpy()].mean() - drawn[~side.numpy()].mean())
    assert np.mean(told) == pytest.approx(np.std(draws), rel=0.12)


def test_matching_of_many_experts_is_quick_and_right():
    """Faults: each expert's own favourite, so two share a name; a search over all namings, which ten experts stop."""
    rng = np.random.default_rng(1)
    for experts, kinds in ((2, 3), (4, 2), (3, 3)):
        found, truth = rng.integers(0, experts, 40).tolist(), rng.integers(0, kinds, 40).tolist()
        share, naming = matched_accuracy(found, truth, experts)
        orders = itertools.permutations(range(max(experts, kinds)), experts)
        assert share == pytest.approx(max(np.mean([order[f] == t for f, t in zip(found, truth)]) for order in orders))
        assert share == sum(naming[f] == t for f, t in zip(found, truth)) / 40
        given = [name for name in naming.values() if name is not None]
        assert len(set(given)) == len(given) == min(experts, kinds) and list(naming) == list(range(experts))
    found = list(range(12)) * 3
    assert matched_accuracy(found, [f"kind {11 - f}" for f in found], 12)[0] == 1.0
