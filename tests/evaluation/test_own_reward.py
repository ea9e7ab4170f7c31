"""mixdpo/evaluation/own_reward.py: what each user is served, and comparisons at equal KL, against loops and brute
force. What each test catches stands in its docstring."""

import math

import numpy as np
import pytest
import torch

from mixdpo.evaluation import own_reward
from mixdpo.evaluation.own_reward import compare_frontiers, frontier_of, hull, serve
from mixdpo.evaluation.statistics import mean_se

# --- serve ------------------------------------------------------------------------------------------------------------


def made(K=3, N=5, T=2, users=7, by_prompt=False, seed=0):
    """Rewards (K,N,T), log-ratios (K,N,K), log q (U,K) or (U,N,K), types (U,), the reference's rewards (N,T). Experts
    differ on all prompts, so users do; types differ too."""
    generator = torch.Generator().manual_seed(seed)
    values, ratio, base = (torch.randn(*shape, generator=generator) for shape in ((K, N, T), (K, N, K), (N, T)))
    values += 2.0 * torch.arange(K)[:, None, None] + torch.tensor([0.0, 5.0])[:T]
    log_q = torch.log_softmax(2 * torch.randn(users, *[N] * by_prompt, K, generator=generator), -1)
    return values, ratio, log_q, torch.arange(users) % 3 % T, base


def by_hand(values, ratio, log_q, kind, base):
    """Loops over users, prompts and experts in probabilities: own reward (U,N) and KL (U,N)."""
    (K, N, _), U = values.shape, len(kind)
    own, kl = np.zeros((U, N)), np.zeros((U, N))
    for u in range(U):
        for n in range(N):
            q = [math.exp(float(log_q[u, n, k] if log_q.ndim == 3 else log_q[u, k])) for k in range(K)]
            for k in range(K):
                t = int(kind[u])
                own[u, n] += q[k] * (float(values[k, n, t]) - (0 if base is None else float(base[n, t])))
                mixed = sum(q[j] * math.exp(float(ratio[k, n, j])) for j in range(K))
                kl[u, n] += q[k] * math.log(mixed) if q[k] > 0 else 0.0
    return own, kl


def two_way(own, kind):
    """Standard error of the mean over types of the mean over users and prompts: V_prompts + V_users - V_both, and at
    least either of the first two."""
    U, N = own.shape
    T = int(max(kind)) + 1
    of_type = [[u for u in range(U) if int(kind[u]) == t] for t in range(T)]
    term = {(u, n): (own[u, n] - own[of_type[t]].mean()) / (T * len(of_type[t]) * N)
            for t in range(T) for u in of_type[t] for n in range(N)}

    def variance(cluster, means=1):
        sums = {}
        for place, value in term.items():
            sums[cluster(*place)] = sums.get(cluster(*place), 0.0) + value
        return len(sums) / (len(sums) - means) * sum(s * s for s in sums.values())

    users, prompts, both = variance(lambda u, n: u, T), variance(lambda u, n: n), variance(lambda u, n: (u, n))
    return math.sqrt(max(users + prompts - both, users, prompts))


@pytest.mark.parametrize("based", [True, False])
@pytest.mark.parametrize("by_prompt", [False, True])
@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("at_once", [1, 3, 64])
def test_serving_is_a_loop_over_users_prompts_and_experts(sparse, by_prompt, based, at_once, monkeypatch):
    """Caught: users of the last part left out, or the first ones' weights for all parts; the reward of another type;
    types weighted by their number of users; KL under another user's weights, of the expert alone, or with K and j
    exchanged; weights of prompt 0 for all; a weight of 0 that gives NaN; the reference's reward not subtracted; errors
    that cluster by prompts alone, or from the mean of all types."""
    monkeypatch.setattr(own_reward, "AT_ONCE", at_once)
    values, ratio, log_q, kind, base = made(by_prompt=by_prompt)
    if sparse:
        log_q = torch.nn.functional.one_hot(log_q.argmax(-1), 3).float().log()
        ratio[0, :, 1] = -math.inf                                          # expert 1 cannot write what expert 0 wrote
    base = base if based else None
    own, kl = by_hand(values, ratio, log_q, kind, base)
    got = serve(values, ratio, log_q, kind, base)
    of_type = [own[kind.numpy() == t] for t in range(2)]
    assert sum(len(rows) for rows in of_type) == 7 and len(of_type[0]) != len(of_type[1])
    for t in range(2):
        assert got.reward[t].tolist() == pytest.approx(of_type[t].mean(0).tolist(), abs=1e-6)
        of_users = {"mean": of_type[t].mean(), "se": two_way(of_type[t], torch.zeros(len(of_type[t]))), "n": 5}
        assert got.by_type[t] == pytest.approx(of_users, abs=1e-6)
    both = [kl[kind.numpy() == t].mean(0) for t in range(2)]
    assert got.kl.tolist() == pytest.approx(((both[0] + both[1]) / 2).tolist(), abs=1e-5)
    assert got.figure["mean"] == pytest.approx((of_type[0].mean() + of_type[1].mean()) / 2, abs=1e-6)
    assert got.figure["se"] == got.se == pytest.approx(two_way(own, kind), abs=1e-6) and got.figure["n"] == 5


def test_one_policy_for_all_has_the_error_of_its_prompts():
    """K = 1, one user a type: users of a type do not differ, so only prompts vary; the same for a single type. Caught:
    users counted as clusters where nothing is drawn, NaN for one type; types that are independent of each other."""
    values, ratio, _, _, base = made(K=1, N=9)
    got = serve(values, ratio, torch.zeros(2, 1), torch.arange(2), base)
    gain = (values[0] - base).double()                                      # (N,T)
    assert got.figure == pytest.approx(mean_se(gain.mean(1)), abs=1e-6)
    assert got.kl.tolist() == pytest.approx(ratio[0, :, 0].tolist(), abs=1e-6)
    single = serve(values[..., 1:], ratio, torch.zeros(1, 1), torch.zeros(1, dtype=torch.int64), base[:, 1:])
    assert single.figure["mean"] == pytest.approx(float(gain[:, 1].mean()), abs=1e-6)
    assert single.figure["se"] == pytest.approx(mean_se(gain[:, 1])["se"], abs=1e-6)


def test_errors_are_the_spread_over_new_users_and_prompts():
    """1,000 draws of 2 types of 3 users each and 30 prompts. Caught: the mean of each type subtracted from its users,
    but not counted, which makes the error too small by a tenth here; the error of a type's own reward by prompts alone,
    less than half of its spread."""
    rng, means, errors = np.random.default_rng(0), [], []
    kind = torch.arange(6) % 2
    for _ in range(1000):
        values = torch.from_numpy(np.eye(2)[:, None] + 0.4 * rng.normal(size=(2, 30, 2)))
        log_q = torch.log_softmax(torch.from_numpy(1.5 * rng.normal(size=(6, 2))), -1)
        got = serve(values, torch.zeros(2, 30, 2), log_q, kind)
        means.append([got.figure["mean"], *(f["mean"] for f in got.by_type)])
        errors.append([got.figure["se"], *(f["se"] for f in got.by_type)])
    ratio = np.sqrt(np.mean(np.square(errors), axis=0)) / np.std(means, axis=0)
    assert ratio == pytest.approx(1.0, abs=0.06), ratio


def test_every_type_has_users():
    """Caught: a mean over no users, which is NaN, and then the whole figure."""
    values, ratio, log_q, _, base = made()
    with pytest.raises(AssertionError, match=r"\[7, 0\]"):
        serve(values, ratio, log_q, torch.zeros(7, dtype=torch.int64), base)


def test_kl_is_that_of_the_mixture_by_enumeration():
    """Four tokens, probabilities in eighths: eight prompts hold each expert's completions in exactly its frequencies,
    so the mean is KL(sum_k q_k pi_k || pi_ref), summed over the vocabulary. Caught: the mean of the experts' KL, log of
    a mean of ratios under other weights, nats a prompt divided by the number of experts."""
    counts, ref = np.array([[5, 1, 1, 1], [1, 2, 2, 3]]), np.array([0.1, 0.2, 0.3, 0.4])
    drawn = [np.repeat(np.arange(4), row) for row in counts]                # (8,) tokens of each expert
    ratio = torch.tensor([[[math.log(counts[j, y] / 8 / ref[y]) for j in range(2)] for y in tokens]
                          for tokens in drawn])
    q = np.array([[0.3, 0.7], [0.9, 0.1], [1.0, 0.0]])
    got = serve(torch.zeros(2, 8, 1), ratio, torch.tensor(q).log(), torch.zeros(3, dtype=torch.int64))
    mixed = q @ counts / 8
    want = (mixed * np.log(mixed / ref)).sum(1)
    assert float(got.kl.mean()) == pytest.approx(want.mean(), abs=1e-6)
    experts = q @ (counts / 8 * np.log(counts / 8 / ref)).sum(1)
    assert want[0] < experts[0] - 0.05


# --- frontiers --------------------------------------------------------------------------------------------------------


def best_at(kl, gain, at):
    """The largest gain of two points and the reference, chosen at random, with a mean KL of at most `at`."""
    points = [(0.0, 0.0), *((x, y) for x, y in zip(kl, gain) if x >= 0)]
    best = 0.0
    for x, y in points:
        best = max(best, y) if x <= at else best
        for other, more in points:
            if x <= at < other:
                best = max(best, y + (more - y) * (at - x) / (other - x))
    return best


@pytest.mark.parametrize("seed", range(40))
def test_the_frontier_is_the_best_of_all_mixtures_of_two_points(seed):
    """Caught: points below a line between two others kept; a corner lost; a frontier that falls; points of less reward
    than the reference; KL below 0, which sampling may give; equal KL twice."""
    rng = np.random.default_rng(seed)
    count = seed % 8
    kl, gain = rng.uniform(-2 * (seed % 3 == 0), 4, count), rng.normal(0.3, 1, count)
    if seed % 4 == 1 and count > 2:
        kl[1] = kl[0]
    corners, gains = hull(kl, gain)
    assert (np.diff(corners) > 0).all() and (np.diff(gains) > 0).all()
    slopes = np.diff(gains) / np.diff(corners)
    assert (np.diff(slopes) < 1e-9).all(), "concave"
    for at in [*np.linspace(0, 5, 23), *kl[kl > 0]]:
        assert np.interp(at, corners, gains) == pytest.approx(best_at(kl, gain, at), abs=1e-9)
    other = kl + 0.3, 2 * gain - 0.1
    both = frontier_of([(kl, gain), other])
    assert (np.diff(both[0]) > 0).all() and (np.diff(both[1]) > 0).all(), "it can be inverted"
    for at in [*np.linspace(0, 5, 23), *kl[kl > 0]]:
        assert np.interp(at, *both) == pytest.approx((best_at(kl, gain, at) + best_at(*other, at)) / 2, abs=1e-9)


def sampled(rng, N, seeds=(1, 1), slope=(1.0, 0.6), noise=0.6, spread=0.0):
    """Two points of each seed of two methods on N prompts, whose rewards share a part by prompt: [(KL, gain)], each
    (2,N), of both methods. Both points of a seed are off by the same, with the standard deviation `spread`."""
    by_prompt, out = rng.normal(0, 1, N), []
    for s, S in zip(slope, seeds):
        kl = np.array([1.0, 3.0])[:, None, None] + 0.3 * rng.normal(size=(2, S, N))
        gain = s * np.array([1.0, 1.5])[:, None, None] + by_prompt + noise * rng.normal(size=(2, S, N))
        gain = gain + spread * rng.normal(size=(S, 1))
        out.append([(kl[:, n], gain[:, n]) for n in range(S)])
    return out


@pytest.mark.parametrize("seeds, spread", [((1, 1), 0.0), ((30, 25), 0.5), ((12, 9), 0.0)], ids=str)
def test_the_error_of_a_difference_is_the_spread_over_new_prompts_and_seeds(seeds, spread, monkeypatch):
    """400 data sets of 60 prompts. Caught: prompts drawn separately for both methods, whose common part then counts
    (twice the error); one point resampled and not all; the error of one method; another number of prompts drawn; seeds
    that are not drawn, or prompts drawn as seeds; as many seeds of theirs as of ours.
    With several seeds that do not differ, only the noise of single completions is left, and a bootstrap over prompts
    and seeds counts it up to three times (Owen 2007): the error is too large, by a factor of 3^0.5 at most."""
    monkeypatch.setattr(own_reward, "RESAMPLES", 150)
    rng, found, errors = np.random.default_rng(0), [], []
    for n in range(400):
        ours, theirs = sampled(rng, 60, seeds, spread=spread)
        of_seeds = ([np.interp(2.0, *hull(kl.mean(1), gain.mean(1))) for kl, gain in side] for side in (ours, theirs))
        found.append(np.mean(next(of_seeds)) - np.mean(next(of_seeds)))
        if n < 30:
            got = compare_frontiers(ours, theirs, 2.0, seed=n)
            assert got["difference"]["mean"] == pytest.approx(found[-1]) == pytest.approx(got["ours"] - got["theirs"])
            errors.append(got["difference"]["se"])
    error, most = math.sqrt(np.mean(np.square(errors))), 1.0 if spread or seeds == (1, 1) else math.sqrt(3)
    assert 0.88 * np.std(found) < error < 1.12 * most * np.std(found)
    assert got["difference"]["n"] == 60 and got["kl"] == 2.0


def test_frontiers_that_are_the_same_do_not_differ():
    """At a KL within the frontier, and beyond its last corner. Caught: draws that differ between the two; a ratio to
    the KL that was asked for where their frontier needs less for its gain."""
    points = sampled(np.random.default_rng(1), 40)[0]
    for kl in (0.5, 2.0, 50.0):
        got = compare_frontiers(points, points, kl)
        assert got["difference"]["mean"] == got["difference"]["se"] == 0.0 and got["ours"] == got["theirs"] > 0
        assert got["ratio"] == pytest.approx(1.0), kl


def test_the_ratio_of_kl_by_hand():
    """Ours reaches at KL 1 what theirs needs KL 2 for. Caught: the inverse ratio; our gain at their KL; the KL that was
    asked for, where theirs needs less; a division by 0 where theirs gains nothing."""
    flat = np.ones((1, 6))

    def point(kl, gain):
        return [(kl * flat, gain * flat)]

    got = compare_frontiers(point(4, 4), point(4, 2), 2.0)
    assert (got["ours"], got["theirs"], got["ratio"]) == pytest.approx((2.0, 1.0, 0.5))
    assert compare_frontiers(point(4, 4), point(4, 2), 16.0)["ratio"] == pytest.approx(0.5)
    assert math.isnan(compare_frontiers(point(4, 2), point(4, 4), 3.0)["ratio"])
    assert math.isnan(compare_frontiers(point(4, 2), point(4, -1), 3.0)["ratio"])
    got = compare_frontiers(point(2, 2) + point(4, 8), point(4, 2), 2.0)    # two seeds: gains 2 and 4
    assert (got["ours"], got["theirs"]) == pytest.approx((3.0, 1.0))


def test_the_error_of_few_seeds():
    """Three seeds that differ, on prompts that do not. Caught: as many seeds drawn as there are, so that the variance
    is too small by a third."""
    gains = [1.0, 2.0, 4.0]
    ours = [(np.ones((1, 50)), np.full((1, 50), gain)) for gain in gains]
    se = compare_frontiers(ours, [(np.ones((1, 50)), np.ones((1, 50)))], 1.0)["difference"]["se"]
    assert se == pytest.approx(np.std(gains, ddof=1) / math.sqrt(3), rel=0.05)
