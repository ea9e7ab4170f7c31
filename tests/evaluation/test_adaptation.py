"""mixdpo/evaluation/adaptation.py: what each test catches stands in its docstring."""

import dataclasses
import math

import brute
import numpy as np
import pytest
import torch
from raising import raises_at

from mixdpo.evaluation.adaptation import adaptation_curve, bayes_flips, halves, posteriors_after
from mixdpo.evaluation.statistics import mean_se
from mixdpo.preferences import Pair


def planted(users=60, each=40, seed=0, sure=1.0):
    """Users of two types by turns, and margins under which each type's expert is right more often."""
    generator, pairs, h = torch.Generator().manual_seed(seed), [], []
    for n in range(users * each):
        u = n % users
        pairs.append(Pair([n // 2], [2], [3], user=f"u{u}", annotator=("a", "b")[u % 2]))
        noise = sure * torch.randn(2, generator=generator, dtype=torch.float64)
        h.append(noise + torch.tensor([0.8, -0.4])[[u % 2, 1 - u % 2]])
    return pairs, torch.stack(h)


def test_the_posterior_is_bayes_rule():
    """Each point against a loop over users in probabilities. Catches: a shown pair that is asked too, evidence of all
    shown pairs at every point, the prior counted once a pair, another user's pairs."""
    pairs, h = planted(users=3, each=7)
    log_w = torch.log_softmax(torch.randn(21, 2, generator=torch.Generator().manual_seed(3), dtype=torch.float64), 1)
    curve = adaptation_curve(pairs, h, log_w)
    assert [point["shown"] for point in curve] == [0, 1, 2] and all(point["users"] == 3 for point in curve)
    asked = 3 * (7 - 3)
    assert all(point["accuracy"]["n"] == asked for point in curve)
    seen = []                                                               # by hand, with the order of that seed
    order = np.random.default_rng([0, 31])
    for u in range(3):
        seen.append(order.permutation([i for i in range(21) if i % 3 == u]).tolist())
    for point in curve:
        total = 0.0
        for own in seen:
            for i in own[3:]:
                like = [math.prod(brute.sigma(float(h[j, k])) for j in own[: point["shown"]]) for k in range(2)]
                w = [math.exp(float(log_w[i, k])) * like[k] for k in range(2)]
                total += math.log(sum(w[k] / sum(w) * brute.sigma(float(h[i, k])) for k in range(2)))
        assert point["log_likelihood"]["mean"] == pytest.approx(total / asked, abs=1e-12)


def test_a_handful_of_pairs_tells_a_users_type():
    """Catches: a curve that does not rise, types mixed up, one expert (which shows nothing) that does rise; a rise
    whose error is that of two groups of users, not of the same."""
    pairs, h = planted()
    even = torch.full_like(h, 0.5).log()
    curve = adaptation_curve(pairs, h, even)
    assert [point["shown"] for point in curve] == [0, 1, 2, 4, 8, 16]
    of = [point["accuracy"]["mean"] for point in curve]
    assert of[-1] > of[0] + 0.08 and of[-1] > 0.75 and of[1] > of[0]
    assert set(curve[0]["types"]) == {"a", "b"} and curve[0]["types"]["a"]["accuracy"]["n"] == 600
    rise = curve[-1]["rise"]
    assert rise["mean"] == pytest.approx(of[-1] - of[0]) and rise["n"] == 60 and curve[0]["rise"]["mean"] == 0
    assert rise["se"] < 0.8 * math.hypot(curve[0]["accuracy"]["se"], curve[-1]["accuracy"]["se"])
    flat = adaptation_curve(pairs, h[:, :1], torch.zeros(len(h), 1))
    assert len({point["accuracy"]["mean"] for point in flat}) == 1


def test_users_of_few_pairs_count_where_they_can():
    """Catches: a user dropped from the first points too, or counted with fewer pairs than the point says."""
    pairs, h = planted(users=2, each=8)
    keep = [i for i, pair in enumerate(pairs) if pair.user == "u0" or i < 6]                # u1 has three pairs
    curve = adaptation_curve([pairs[i] for i in keep], h[keep], torch.full((len(keep), 2), 0.5).log())
    assert [(point["shown"], point["users"]) for point in curve] == [(0, 2), (1, 2), (2, 1), (4, 1)]
    assert [point["rise"]["n"] for point in curve] == [2, 2, 1, 1]
    with raises_at("1 of 1", line=0):
        adaptation_curve([Pair([1], [2], [3])], h[:1], h[:1])


def test_standard_errors_count_users_and_prompts():
    """By hand: users share prompts. Catches: users alone counted, whose pairs on one prompt are not independent of
    another user's; pairs shown among those that count."""
    pairs, h = planted(users=12, each=6)
    pairs = [dataclasses.replace(pair, prompt=[n // 12]) for n, pair in enumerate(pairs)]   # prompt p: each user's p-th
    point = adaptation_curve(pairs, h, torch.full_like(h, 0.5).log())[0]
    asked, order = [], np.random.default_rng([0, 31])
    for u in range(12):
        asked += order.permutation([i for i in range(72) if i % 12 == u]).tolist()[3:]
    right = (torch.sigmoid(h).mean(1) > 0.5).double().numpy()[asked]
    want = mean_se(right, [i % 12 for i in asked], [i // 12 for i in asked])
    assert point["accuracy"] == pytest.approx(want)
    assert want["se"] != pytest.approx(mean_se(right, [i % 12 for i in asked])["se"], rel=1e-3)


def test_a_ranking_is_not_divided():
    """Three rankings of three texts by one user, as nine pairs: the known ones are of other rankings than those that
    are predicted. Caught: a ranking that predicts itself, so that users without types seemed to have them. Pairs that
    are records of their own are divided as before rankings were kept together."""
    pairs = [Pair([r], [a], [b], user="u", line=r) for r in (1, 2, 3) for a, b in ((1, 2), (1, 3), (2, 3))]
    for seed in range(5):
        (known, predicted), = halves(pairs, seed)
        assert sorted(known + predicted) == list(range(9)) and len(known) == 3
        assert not {pairs[i].line for i in known} & {pairs[i].line for i in predicted}
    alone = [dataclasses.replace(pair, line=n + 1) for n, pair in enumerate(pairs)]
    assert halves(alone, 0) == halves([dataclasses.replace(pair, line=0) for pair in pairs], 0)
    shuffled = np.random.default_rng([0, 31]).permutation(range(9)).tolist()
    assert halves(alone, 0) == [(shuffled[:4], shuffled[4:])]


def test_posteriors_after_some_pairs_by_hand():
    """Only numbers of pairs that every user has; users in the order of the file, with their types. Caught: pairs of the
    half that is predicted; evidence without the weights; another order of pairs than the curve's; a number that one
    user does not have; types of other users."""
    pairs, h = planted(users=3, each=9)
    keep = [i for i, pair in enumerate(pairs) if pair.user != "u1" or i < 18]               # u1 has six pairs, not nine
    pairs, h = [pairs[i] for i in keep], h[keep]
    log_w = torch.tensor([0.3, 0.7], dtype=torch.float64).log().expand(len(keep), 2)
    found, order = posteriors_after(pairs, h, log_w, seed=2), np.random.default_rng([2, 31])
    assert list(found) == [0, 1, 2]                                         # half of six is three: not four
    seen = [order.permutation([i for i, pair in enumerate(pairs) if pair.user == f"u{u}"]).tolist() for u in range(3)]
    for n, (log_q, kinds) in found.items():
        assert kinds == ["a", "b", "a"] and log_q.shape == (3, 2)
        for u, own in enumerate(seen):
            like = [w * math.prod(brute.sigma(float(h[i, k])) for i in own[:n]) for k, w in enumerate((0.3, 0.7))]
            assert log_q[u].exp().tolist() == pytest.approx([x / sum(like) for x in like], abs=1e-12)


def test_flip_rate_is_counted_by_hand():
    """Predictions with the known labels as they are and reversed. Catches: predicted pairs reversed too, the
    prior reversed, one expert whose predictions flip."""
    pairs, h = planted(users=6, each=10)
    even = torch.full_like(h, 0.5).log()
    for point in adaptation_curve(pairs, h, even):
        changed = []
        for u in range(6):
            first, second = next((a, b) for a, b in halves(pairs, 0) if a[0] % 6 == u)
            for i in second:
                sides = []
                for sign in (1, -1):
                    like = [math.prod(brute.sigma(sign * float(h[j, k])) for j in first[: point["shown"]])
                            for k in (0, 1)]
                    sides.append(sum(like[k] / sum(like) * brute.sigma(float(h[i, k])) for k in (0, 1)) > 0.5)
                changed.append(sides[0] != sides[1])
        assert point["flips"]["mean"] == pytest.approx(np.mean(changed), abs=1e-12) and point["flips_bayes"] is None
    assert point["flips"]["mean"] > point["flips_chance"]["mean"] > 0
    assert adaptation_curve(pairs, h[:, :1], even[:, :1])[-1]["flips"]["mean"] == 0


def test_bayes_flips_by_the_types_own_scores():
    """Two opposed types: reversed labels name the other one, and every prediction flips. Catches: the scores of the
    predicted pairs reversed; the type with the lower score; half a flip for a whole one."""
    pairs, h = planted(users=4, each=10)
    pairs = [dataclasses.replace(p, scores={"a": [1.0, 0.0][:: 1 if p.annotator == "a" else -1],
                                            "b": [0.0, 1.0][:: 1 if p.annotator == "a" else -1]}) for p in pairs]
    curve = adaptation_curve(pairs, h, torch.full_like(h, 0.5).log())
    assert [point["flips_bayes"]["mean"] for point in curve] == [0, 1, 1, 1]
    same = [dataclasses.replace(p, scores={"a": [1.0, 0.0], "b": [1.0, 0.0]}) for p in pairs]
    assert adaptation_curve(same, h, torch.full_like(h, 0.5).log())[-1]["flips_bayes"]["mean"] == 0


def test_bayes_predicts_what_the_likelier_type_chooses():
    """The known pair: a is undecided, b agrees with the choice, so q = (1/3, 2/3); reversed (1, 0). Catches: votes that
    count by how much a type prefers a response."""
    known = Pair([1], [2], [3], scores={"a": [1.0, 1.0], "b": [1.0, 0.0]})
    predicted = Pair([1], [2], [3], scores={"a": [10.0, 0.0], "b": [0.0, 1.0]})
    assert bayes_flips([known, predicted], [0], [1], ["a", "b"]).tolist() == [1.0]
