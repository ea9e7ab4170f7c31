"""evaluation/statistics.py and metrics.py against brute force that shares no code with them.
Docstrings name the faults seen."""

import itertools
import json
import math

import brute
import numpy as np
import pytest
import torch

from mixdpo.evaluation.statistics import (
    adjusted_rand_index,
    bayes_posterior,
    difference_se,
    matched_accuracy,
    mean_se,
)
from mixdpo.metrics import bound_summary, chosen_and_rejected, effective_experts, step_summary
from mixdpo.mixture import e_step, elbo, entropy


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
    """Faults: loss with live weights w for q; the mean over experts in accuracy; the bound at the posterior and not at
    the q in use; rewards without the reference, weighted by w, or of the rejected text where the chosen one's is meant;
    equal rewards of both texts counted as right or as wrong."""
    rng = np.random.default_rng(0)
    h, q, w = rng.normal(size=(5, 2)), rng.dirichlet([1, 1], 5), [0.3, 0.7]
    h[2, 1] = 0.0                                                           # a tie counts one half
    logp, ref = rng.normal(-30, 5, size=(5, 2, 2)), rng.normal(-30, 5, size=(5, 1, 2))
    q[3], logp[4] = [1.0, 0.0], logp[4, :, :1]                              # one expert has no weight; a tie
    ref[4] = ref[4, :, :1]
    r = 0.3 * (logp - ref)
    log_q, log_w = torch.tensor(q).log(), torch.tensor([w] * 5, dtype=torch.float64).log()
    texts = chosen_and_rejected(log_q, torch.tensor(logp), torch.tensor(ref), 0.3)
    got = step_summary(log_q, log_w, torch.tensor(h), texts)
    chosen, rejected, logps, worse = ([sum(q[b][k] * x[b, k, side] for k in range(2)) for b in range(5)]
                                      for x in (r, logp) for side in range(2))
    right = [(a > b) + 0.5 * (abs(a - b) < 1e-12) for a, b in zip(chosen, rejected)]
    p = brute.marginal(w, h)
    want = {
        "rewards/chosen": np.mean(chosen), "rewards/rejected": np.mean(rejected), "logps/chosen": np.mean(logps),
        "logps/rejected": np.mean(worse), "rewards/margins": np.mean(chosen) - np.mean(rejected),
        "rewards/accuracies": np.mean(right),
        "loss": np.mean([-sum(q[b][k] * math.log(brute.sigma(h[b][k])) for k in range(2)) for b in range(5)]),
        "log_marginal": np.mean(np.log(p)), "elbo": np.mean(brute.elbo(q, w, h)),
        "accuracy": [np.mean([(h[b, k] > 0) + 0.5 * (h[b, k] == 0) for b in range(5)]) for k in range(2)],
        "accuracy_mbt": np.mean([a > 0.5 for a in p]), "margin": h.mean(0), "q": q.mean(0),
        "q_entropy": np.mean([-sum(x * math.log(x) for x in row if x) for row in q]),
        "effective_experts": math.exp(-sum(x * math.log(x) for x in q.mean(0))),
        "q_gain": np.mean([brute.kl(row, w) for row in q]), "w": w,
        "gate_entropy": -sum(x * math.log(x) for x in w), "gate_information": 0.0,
    }
    assert got.keys() == want.keys()
    for name, value in want.items():
        assert got[name] == pytest.approx(value, rel=1e-6, abs=1e-12), name


def test_the_gap_is_what_the_bound_lacks_of_each_visits_log_marginal():
    """Against KL(q || posterior) by hand: visits of 1, 3 and 2 pairs. Faults: a gap per pair; the prior counted for
    each pair; q that is compared with the weights."""
    rng, group = np.random.default_rng(1), [0, 1, 1, 1, 2, 2]
    h, q, w = rng.normal(size=(6, 2)), rng.dirichlet([1, 1], 3), rng.dirichlet([1, 1], 3)
    apart = [brute.kl(q[g], own) for g, own in enumerate(brute.user_posterior(w[group], h, group)[1])]
    log_q, log_w, h, group = torch.tensor(q).log(), torch.tensor(w).log(), torch.tensor(h), torch.tensor(group)
    got = bound_summary(elbo(log_q, log_w, h, group), log_w, h, group)
    assert got["gap"] == pytest.approx(np.mean(apart), abs=1e-12) and min(apart) > 0.01
    exact = e_step(log_w[group], h, group)[1]
    assert bound_summary(elbo(exact, log_w, h, group), log_w, h, group)["gap"] == pytest.approx(0, abs=1e-12)


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
    assert math.isnan(mean_se([1.0])["se"]) and math.isnan(mean_se([1.0, 2.0], ["a", "a"])["se"])
    first = torch.tensor([n % 2 == 0 for n in range(8)])
    gap = difference_se(rng.normal(size=8), first)
    assert gap["se"] > 0
    draws, errors = [], []
    for _ in range(400):
        shared, prompts = rng.normal(size=30), [n // 4 for n in range(120)]
        drawn = np.repeat(shared, 4) + 0.1 * rng.normal(size=120)           # four pairs of each prompt
        side = torch.tensor([n % 4 == 0 or n >= 60 for n in range(120)])    # half of the prompts lie on both sides
        drawn = drawn + 3 * side.numpy()                                    # and the sides' means are far apart
        found = difference_se(drawn, side, prompts)
        draws.append(found["mean"])
        errors.append(found["se"])
        assert found["mean"] == pytest.approx(drawn[side.numpy()].mean() - drawn[~side.numpy()].mean())
    assert np.mean(errors) == pytest.approx(np.std(draws), rel=0.12)


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


@pytest.mark.parametrize("seed", range(6))
def test_matching_is_scipys_and_not_exponential(seed):
    """Against scipy's linear_sum_assignment. Catches: the greedy naming; a path turned round wrongly; the search over
    all namings, which took 40 s for 4 experts and 100 annotators and never ended for 8."""
    from scipy.optimize import linear_sum_assignment

    rng = np.random.default_rng(seed)
    for experts, kinds in ((8, 100), (100, 8), (8, 8), (1, 30), (40, 1), (13, 12)):
        found, truth = rng.integers(0, experts, 600), rng.integers(0, kinds, 600)
        counts = np.zeros((experts, kinds), int)
        np.add.at(counts, (found, truth), 1)
        share, naming = matched_accuracy(found.tolist(), truth.tolist(), experts)
        assert share == counts[linear_sum_assignment(counts, maximize=True)].sum() / 600
        given = [name for name in naming.values() if name is not None]
        assert len(set(given)) == len(given) == min(experts, len(set(truth.tolist())))


def hh_draw(rng, wrong=0.1):
    """Accuracy of each of 48 users' 27 held-out pairs on 865 prompts, some harder than others: a user with the wrong
    weights errs on all of its pairs. (values, prompts, users)."""
    easy = np.clip(rng.normal(0.75, 0.15, 865), 0, 1)
    prompts = np.concatenate([rng.choice(865, 27, replace=False) for _ in range(48)])
    users = np.repeat(np.arange(48), 27)
    fine = rng.random(48) >= wrong
    return (rng.random(48 * 27) < easy[prompts]) & fine[users], prompts.tolist(), users.tolist()


def test_two_way_standard_errors_are_those_of_many_draws():
    """In the sizes of the hh job. Catches: users who err as a whole counted as so many independent pairs, which halves
    the error; V_both added instead of taken away; each way's variance by itself."""
    rng = np.random.default_rng(0)
    means, both, one = [], [], []
    for _ in range(400):
        values, prompts, users = hh_draw(rng)
        means.append(values.mean())
        both.append(mean_se(values, prompts, users)["se"])
        one.append(mean_se(values, prompts)["se"])
    assert np.mean(both) == pytest.approx(np.std(means), rel=0.15)
    assert np.mean(one) < 0.6 * np.std(means), "prompts alone: too small"


def test_two_way_errors_where_prompts_are_what_is_shared_and_where_nothing_is():
    """Catches: prompts left out where users are counted; a variance that is counted twice; a floor above the truth."""
    rng = np.random.default_rng(1)
    prompts, users = [n % 60 for n in range(1200)], [n // 25 for n in range(1200)]          # 48 users
    for of_prompt in (1.0, 0.0):
        means, ses = [], []
        for _ in range(300):
            values = of_prompt * rng.normal(size=60)[prompts] + rng.normal(size=1200)
            means.append(values.mean())
            ses.append(mean_se(values, prompts, users)["se"])
        assert np.mean(ses) == pytest.approx(np.std(means), rel=0.15)


def test_a_two_way_variance_is_at_least_each_ways():
    """By hand, and where V_prompts + V_users - V_both is too small. Catches: the square root of a negative number; a
    smaller error than users alone have; the intersection's clusters by one of the two names."""
    first, second = [0, 0, 1, 1], ["a", "b", "a", "b"]
    # rows' sums 4 and -4: 2/1 32/16 = 4; columns' the same; all apart: 4/3 32/16; 4 + 4 - 8/3 is above each
    assert mean_se([4.0, 0.0, 0.0, -4.0], first, second)["se"] == pytest.approx(math.sqrt(16 / 3))
    # rows' sums 0: 0; columns' sums 4 and -4: 4; all apart: 4/3 16/16; 0 + 4 - 4/3 is below 4
    assert mean_se([2.0, -2.0, 2.0, -2.0], first, second)["se"] == pytest.approx(2.0)
    assert mean_se([1.0, -1.0, -1.0, 1.0], first, second)["se"] == 0.0      # sums of 0: below 0 without a floor
    values, side = [2.0, -1.0, -1.5, 0.5], torch.tensor([True, False, False, True])
    assert math.isnan(mean_se(values, [0] * 4, second)["se"]) and math.isnan(mean_se(values, first, [0] * 4)["se"])
    one_way = [difference_se(values, side, names)["se"] for names in (first, second)]
    assert difference_se(values, side, first, second)["se"] >= max(one_way)


def test_a_mixture_of_opposed_experts_is_a_tie():
    """Catches: rounding that decides whether p > 1/2 where experts are exactly opposed; a tie where there is none; NaN
    as a tie (accuracy 1/2)."""
    from mixdpo.dpo import accuracy, mixture_accuracy
    from mixdpo.mixture import log_marginal

    for dtype in (torch.float32, torch.float64):
        a = 10 * torch.randn(500, generator=torch.Generator().manual_seed(0), dtype=dtype)
        h = torch.stack([a, -a, a / 3, -a / 3], 1)
        even = torch.full((4,), -math.log(4), dtype=dtype)
        assert (mixture_accuracy(log_marginal(even, h)) == 0.5).all()
        assert step_summary(even.expand_as(h), even.expand_as(h), h, h)["accuracy_mbt"] == 0.5
        above = log_marginal(even, h + torch.tensor([1e-4 if dtype == torch.float32 else 1e-12, 0, 0, 0], dtype=dtype))
        assert (mixture_accuracy(above)[a.abs() < 1] == 1).all()
    lost = torch.tensor([math.nan, 1.0, -1.0, 0.0])
    assert torch.equal(accuracy(lost)[1:], torch.tensor([1.0, 0.0, 0.5])) and accuracy(lost)[0].isnan()
    assert mixture_accuracy(torch.tensor([math.nan, -0.1]))[0].isnan()


@pytest.mark.parametrize("stop", [10, 7], ids=["at once", "resumed"])
def test_the_log_of_a_run_with_empty_steps(stop, tmp_path, capsys):
    """NaN is null in metrics.jsonl, also if a run resumes, and the progress line shows how many experts are used.
    Catches: a bare NaN; a line lost at the resume; the number for a single expert."""
    from types import SimpleNamespace

    from mixdpo.runs.log import Log

    q = torch.zeros(0, 2)
    some = [{"step": n + 1, "loss": 0.5, "bound": -0.7, "accuracy": [0.5, 0.5], "effective_experts": 1.25}
            for n in range(10)]
    some[4] |= {"pairs": 0, "loss": math.nan, "accuracy": [math.nan] * 2, "effective_experts": math.nan}
    for first, last in ((0, stop), (stop, len(some))):
        log = Log(tmp_path, first, len(some), SimpleNamespace(experts=2))
        for n in range(first, last):
            log.step(some[n], [], q)
        log.close()
    assert "effective experts 1.25" in capsys.readouterr().err
    text = (tmp_path / "metrics.jsonl").read_text()
    kept = [json.loads(line, parse_constant=pytest.fail) for line in text.splitlines()]
    assert len(kept) == len(some) and kept[4]["loss"] is None and kept[4]["accuracy"] == [None, None]
    log = Log(tmp_path, 10, 10, SimpleNamespace(experts=1))
    log.step(some[0] | {"step": 10}, [], q)
    log.close()
    assert "effective" not in capsys.readouterr().err
