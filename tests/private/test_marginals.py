"""Distances of tables, utility, independent columns, parity, and MST. Each docstring names what the test was seen to
catch."""

import math
from collections import Counter
from itertools import combinations

import numpy as np
import pytest

from data.tables import marginals, mst
from data.tables.marginals import distances, independent, parity_table, satisfied, scores, total_variation, utility
from data.tables.mst import closest, counted, estimate, marginal_method, sample, simplex, spanning_tree, zcdp

ensemble = pytest.importorskip("sklearn.ensemble", reason="scikit-learn is not installed (the `data` extra)")
optimize = pytest.importorskip("scipy.optimize", reason="scipy is not installed (scikit-learn brings it)")

A = np.array([[0, 0, 1], [0, 1, 1], [1, 1, 0], [1, 1, 2]])
B = np.array([[0, 0, 1], [0, 0, 1], [0, 0, 1], [1, 1, 0], [1, 0, 2]])


def noise(p, n: int) -> float:
    """Expected distance of n rows a side from one distribution p."""
    p = np.asarray(p)
    return float(np.sqrt(p * (1 - p) / (math.pi * n)).sum())


class Loaded:
    """Random numbers that are given; keeps the shares that are chosen by."""

    def __init__(self, normal):
        self.normal, self.shares = normal, []

    def choice(self, _, size, p):
        self.shares.append(p)
        return np.zeros(size, dtype=np.int64)


# ---- distances


def test_distances_by_hand():
    """Caught: half forgotten; counts for shares, where the tables differ in length; columns in another order."""
    assert total_variation(A, B, [2, 2, 3], 1).tolist() == pytest.approx([0.1, 0.55, 0.1])
    assert total_variation(A, B, [2, 2, 3], 2)[0] == pytest.approx((0.35 + 0.25 + 0.2 + 0.3) / 2)   # of four cells
    assert total_variation(A, B, [2, 2, 3], 3) == pytest.approx([(0.35 + 0.25 + 0.05 + 0.25 + 0.2) / 2])
    found = distances(A, B, [2, 2, 3])
    assert found.keys() == {1, 2, 3} and found[1] == pytest.approx(0.25) and found[3] == pytest.approx(0.55)
    assert distances(A[:, :2], B[:, :2], [2, 2]).keys() == {1, 2}


@pytest.mark.parametrize("most", [0, 1_000_000])
@pytest.mark.parametrize("way", [1, 2, 3])
def test_distances_are_those_of_counting(way, most, monkeypatch):
    """Caught: cells that run together, in both ways of counting; a set of columns left out."""
    monkeypatch.setattr(marginals, "MOST", most)
    rng, sizes = np.random.default_rng(0), [3, 5, 2, 7]
    a, b = (rng.integers(0, sizes, size=(n, 4)) for n in (60, 47))
    wanted = []
    for columns in combinations(range(4), way):
        counts = [Counter(map(tuple, table[:, columns].tolist())) for table in (a, b)]
        cells = {*counts[0], *counts[1]}
        wanted.append(sum(abs(counts[0][c] / 60 - counts[1][c] / 47) for c in cells) / 2)
    np.testing.assert_allclose(total_variation(a, b, sizes, way), wanted, atol=1e-12)


def test_equal_and_disjoint_tables_and_codes_outside():
    """Caught: order of rows that counts; a code beyond its column's size that counts as another cell."""
    assert distances(A, A[::-1], [2, 2, 3]) == {1: 0, 2: 0, 3: 0}
    assert distances(A * 0, A * 0 + 1, [2, 2, 3]) == {1: 1, 2: 1, 3: 1}
    with pytest.raises(ValueError):
        total_variation(A, B, [2, 2, 2], 2)


# ---- independent columns


def test_independent_columns_have_the_marginals_alone():
    """Caught: uniform columns; complete rows copied, so that pairs of columns agree too."""
    rng = np.random.default_rng(0)
    first = rng.choice(3, size=8000, p=[0.7, 0.2, 0.1])
    real = np.stack([first, first], axis=1)
    made = independent(real, [3, 3], 8000, rng)
    assert made.shape == (8000, 2) and made.dtype == np.int64
    assert total_variation(real, made, [3, 3], 1).max() < 3 * noise([0.7, 0.2, 0.1], 8000)
    expected = 0.7 * 0.3 + 0.2 * 0.8 + 0.1 * 0.9                            # the product's share off the diagonal
    assert total_variation(real, made, [3, 3], 2)[0] == pytest.approx(expected, abs=0.02)


def test_noise_on_counts_has_its_deviation():
    """Caught: noise on shares, variance for deviation, none at all, the same for every column."""
    real = np.repeat(np.arange(2000), 100)[:, None].repeat(2, axis=1)
    rng = np.random.default_rng(0)
    loaded = Loaded(lambda size: rng.normal(size=size))
    independent(real, [2000, 2000], 1, loaded, sigma=10.0)
    off = np.stack(loaded.shares) * 200_000 - 100
    assert off.std(axis=1) == pytest.approx([10, 10], rel=0.06) and abs(np.corrcoef(off)[0, 1]) < 0.1
    loaded = Loaded(lambda size: np.array([-9.0, 0, -2, 1])[:size])
    independent(np.array([[0, 0], [2, 0]]), [4, 1], 1, loaded, sigma=1.0)
    assert [p.tolist() for p in loaded.shares] == [[0, 0, 0, 1], [1]], "below 0 is 0; nothing left is uniform"


# ---- utility


def planted(rows: int, seed: int = 0) -> np.ndarray:
    """Two bits whose exclusive or is the target; a category that is noise; one that determines a third of the rows'
    target."""
    rng = np.random.default_rng(seed)
    a, b, c = rng.integers(2, size=rows), rng.integers(2, size=rows), rng.integers(300, size=rows)
    y = a ^ b
    return np.stack([a, y, b, c, np.where(rng.random(rows) < 1 / 3, y, 2)], axis=1)


def test_utility_on_a_planted_table():
    """Caught: the target among the features; a classifier's name for the other's; tested on what it was trained on;
    chance without a seed."""
    kinds, sizes = ["category", "category", "category", "category", "number"], [2, 2, 2, 300, 3]
    train, test = planted(1500), planted(1500, seed=1)
    found = utility(train, test, sizes, 1, kinds)
    assert found["boosting"]["accuracy"] > 0.99 and found["boosting"]["auroc"] > 0.99
    assert found["logistic"]["accuracy"] == pytest.approx(2 / 3, abs=0.04)
    assert found["logistic"]["auroc"] == pytest.approx(1 - (2 / 3)**2 / 2, abs=0.05)    # a coin if neither is known
    random_rows = independent(train, sizes, 1500, np.random.default_rng(0))
    coin = utility(random_rows, test, sizes, 1, kinds)
    assert all(0.4 < of["auroc"] < 0.6 for of in coin.values()) and coin == utility(random_rows, test, sizes, 1, kinds)


def test_boosting_knows_which_columns_are_categories(monkeypatch):
    """Caught: all columns as numbers, or none; the target's kind for another's; more categories than it takes."""
    calls, real = [], ensemble.HistGradientBoostingClassifier
    monkeypatch.setattr(ensemble, "HistGradientBoostingClassifier", lambda **o: calls.append(o) or real(**o))
    utility(planted(50), planted(50), [2, 2, 2, 300, 3], 1, ["number", "category", "category", "category", "number"])
    assert calls[0]["categorical_features"] == [False, True, False, False]


def test_one_class_and_classes_that_are_lacking():
    """Caught: a crash, the test's majority for the train's class, a missing class's probabilities in its neighbour's
    place."""
    train, test = planted(200), planted(200, seed=1)
    train[:, 1] = 0
    share = float((test[:, 1] == 0).mean())
    for found in utility(train, test, [2, 2, 2, 300, 3], 1, ["category"] * 5).values():
        assert found == {"accuracy": share, "auroc": 0.5}
    real = np.array([0, 1, 2] * 100)
    lacking = np.where(real == 1, 0, real)
    found = utility(np.stack([real, lacking], 1), np.stack([real, real], 1), [3, 3], 1, ["category"] * 2)["logistic"]
    assert found["accuracy"] == pytest.approx(2 / 3)                        # a 1 is taken for a 0
    assert found["auroc"] == pytest.approx((0.75 + 0.5 + 1) / 3)


def test_scores_by_hand():
    """Caught: AUROC of the wrong class; of two classes, another than the usual one; an AssertionError, at the very end,
    for a truth of one class, which has no AUROC."""
    chance = np.array([[0.9, 0.1], [0.6, 0.4], [0.65, 0.35], [0.2, 0.8]])
    assert scores(chance, np.array([0, 0, 1, 1])) == {"accuracy": 0.75, "auroc": 0.75}
    one = scores(chance, np.zeros(4, dtype=np.int64))
    assert one["accuracy"] == 0.75 and np.isnan(one["auroc"])


# ---- parity


def test_parity_tables_are_even_and_uniform_below():
    """Caught: an odd sum; a bit left at 0; satisfied counting odd rows."""
    for d in (2, 3, 5):
        table = parity_table(20_000, d, np.random.default_rng(d))
        assert table.shape == (20_000, d) and satisfied(table) == 1
        uniform = np.stack(np.unravel_index(np.arange(2**d), [2] * d), axis=1)          # each row once
        below = total_variation(table, uniform, [2] * d, d - 1)
        assert below.max() < 3 * noise([2**(1 - d)] * 2**(d - 1), 20_000)
        assert total_variation(table, uniform, [2] * d, d)[0] == pytest.approx(0.5, abs=0.02)
    assert satisfied(np.array([[1, 1, 0], [1, 0, 0], [0, 0, 0], [1, 1, 1]])) == 0.5


def test_a_tree_cannot_tell_parity():
    """Caught: a tree with larger cliques than pairs; missing dependence between two columns."""
    for d, epsilon, share in ((2, math.inf, 1), (5, math.inf, 0.5), (5, 1.0, 0.5)):
        real = parity_table(10_000, d, np.random.default_rng(0))
        made = marginal_method(real, [2] * d, epsilon, 1e-6, 10_000, np.random.default_rng(0))
        assert satisfied(made) == pytest.approx(share, abs=0.025)


# ---- MST: the budget


def test_the_conversion_is_the_smallest_over_alpha():
    """Caught: a factor of two in rho, the looser conversion rho + 2 sqrt(rho ln(1/delta)), alpha at its edge."""
    alpha = 1 + np.geomspace(1e-4, 1e5, 400_000)
    for epsilon, delta in ((1.0, 1e-5), (0.1, 1e-9), (10.0, 1e-6), (1000.0, 1e-9)):
        rho = zcdp(epsilon, delta)
        log = (alpha - 1) * (alpha * rho - epsilon) + alpha * np.log1p(-1 / alpha) - np.log(alpha - 1)
        assert log.min() == pytest.approx(math.log(delta), rel=1e-4)
        loose = (math.sqrt(math.log(1 / delta) + epsilon) - math.sqrt(math.log(1 / delta)))**2
        assert loose < rho < 2 * loose
    assert zcdp(math.inf, 1e-5) == math.inf


def test_a_measurement_costs_what_it_says():
    """Caught: 1 / rho for 1 / (2 rho); noise where there should be none; a table with its axes exchanged."""
    assert counted(A, [2, 2, 3], (0, 2), math.inf, np.random.default_rng(0)).tolist() == [[0, 2, 0], [1, 0, 1]]
    off = counted(A, [2, 2, 30_000], [2], 0.02, np.random.default_rng(0))
    assert off.std() == pytest.approx(5, rel=0.02)


def test_the_parts_add_up_to_the_budget(monkeypatch):
    """Caught: d marginals that each cost a third; a tree without cost; more than epsilon in total."""
    spent, spanning = [], spanning_tree
    monkeypatch.setattr(mst, "counted", lambda c, s, j, rho, g: spent.append(rho) or counted(c, s, j, rho, g))
    monkeypatch.setattr(mst, "spanning_tree", lambda c, s, o, rho, g: spent.append(rho) or spanning(c, s, o, rho, g))
    marginal_method(parity_table(100, 4, np.random.default_rng(0)), [2] * 4, 2.0, 1e-6, 10, np.random.default_rng(0))
    private = [rho for rho in spent if rho < math.inf]
    assert len(private) == 4 + 1 + 3 and sum(private) == pytest.approx(zcdp(2.0, 1e-6), rel=1e-9)
    assert len(spent) - len(private) == 6, "the true tables that the exponential mechanism scores"


def test_edges_are_chosen_with_the_exponential_mechanisms_chances():
    """Caught: epsilon for epsilon / 2, rho not divided among the edges, the error's sign, another epsilon from rho."""
    rng = np.random.default_rng(0)
    a = rng.integers(2, size=60)
    real = np.stack([a, np.where(rng.random(60) < 0.3, 1 - a, a), rng.integers(2, size=60)], axis=1)
    ones = [counted(real, [2] * 3, [j], math.inf, rng) for j in range(3)]
    error = {(i, j): np.abs(counted(real, [2] * 3, (i, j), math.inf, rng) - np.outer(ones[i], ones[j]) / 60).sum()
             for i, j in combinations(range(3), 2)}
    rho = 0.02                                                              # two edges: epsilon^2 / 8 = 0.01 each
    weights = {edge: math.exp(math.sqrt(0.08) * e / 2) for edge, e in error.items()}
    firsts = Counter(spanning_tree(real, [2] * 3, ones, rho, np.random.default_rng(n))[0] for n in range(1500))
    for edge, weight in weights.items():
        p = weight / sum(weights.values())
        assert firsts[edge] / 1500 == pytest.approx(p, abs=4 * math.sqrt(p * (1 - p) / 1500))


# ---- MST: estimation


def test_the_closest_vector_and_table():
    """Caught: clipping and rescaling instead of the projection; sums that do not hold, the total counted twice;
    projections without Dykstra's correction, which end at some table and not the closest."""
    assert simplex(np.array([5.0, 2.0, -4.0]), 5.0).tolist() == [4, 1, 0]
    assert simplex(np.array([1.0, 1.0]), 4.0).tolist() == [2, 2]
    assert simplex(np.array([1e20, -3e19]), 300.0).tolist() == [0, 0]       # 300 is lost in 1e20: once an IndexError
    assert closest(np.ones((2, 2)), np.array([4.0, 4.0]), np.array([4.0, 4.0])).tolist() == [[2, 2], [2, 2]]
    rng = np.random.default_rng(1)
    x, first, second = rng.normal(size=(3, 4)) * 3, np.array([6.0, 1.0, 3.0]), np.array([1.0, 4.0, 2.0, 3.0])
    found = closest(x, first, second)
    sums = [{"type": "eq", "fun": lambda t: t.reshape(3, 4).sum(1) - first},
            {"type": "eq", "fun": lambda t: (t.reshape(3, 4).sum(0) - second)[1:]}]     # one follows from the others
    best = optimize.minimize(lambda t: ((t - x.ravel())**2).sum(), np.outer(first, second).ravel() / 10,
                             bounds=[(0, None)] * 12, constraints=sums, method="SLSQP", options={"ftol": 1e-12})
    assert best.success and found.min() == 0
    np.testing.assert_allclose(found, best.x.reshape(3, 4), atol=1e-4)


def test_columns_are_estimated_from_all_that_was_measured():
    """Caught: a pair's table summed over the wrong axis; weights by size and not its inverse; tables that disagree."""
    pair = np.array([[6.0, 0.0, 0.0], [0.0, 3.0, 3.0]])
    margins, pairs = estimate([np.array([8.0, 4.0]), np.array([6.0, 3.0, 3.0])], {(0, 1): pair}, 12.0)
    # variances of a cell, for noise of equal rho: own 2, the pair's table 1, so a sum over three 3
    assert margins[0] == pytest.approx((np.array([8, 4]) / 2 + np.array([6, 6]) / 3) / (1 / 2 + 1 / 3))
    assert margins[1] == pytest.approx([6, 3, 3])
    assert pairs[0, 1].sum(1) == pytest.approx(margins[0]) and pairs[0, 1].sum(0) == pytest.approx(margins[1])


def test_rows_follow_the_tables():
    """Caught: a table read from its wrong side, an edge before its parent is known, a parent without rows dividing by
    zero."""
    margins = [np.array([4.0, 0.0, 6.0]), np.array([3.0, 7.0]), np.array([7.0, 3.0])]
    pairs = {(1, 2): np.array([[0.0, 3.0], [7.0, 0.0]]), (0, 1): np.array([[3.0, 1.0], [0.0, 0.0], [0.0, 6.0]])}
    rows = sample(margins, pairs, 20_000, np.random.default_rng(0))
    shares = {row: n / 20_000 for row, n in Counter(map(tuple, rows.tolist())).items()}
    assert shares.keys() == {(0, 0, 1), (0, 1, 0), (2, 1, 0)}
    assert [shares[0, 0, 1], shares[0, 1, 0], shares[2, 1, 0]] == pytest.approx([0.3, 0.1, 0.6], abs=0.015)
    nobody = [np.array([5.0, 5.0]), np.array([9.0, 1.0])]
    rows = sample(nobody, {(0, 1): np.array([[1.0, 0.0], [0.0, 0.0]])}, 20_000, np.random.default_rng(0))
    assert rows[rows[:, 0] == 1, 1].mean() == pytest.approx(0.1, abs=0.015)


def grown(rows: int, seed: int) -> np.ndarray:
    """Columns 3 - 0 - 2 - 4 and 2 - 1, each the one before it but for a fifth of the rows, over three values."""
    rng = np.random.default_rng(seed)
    table = np.zeros((rows, 5), dtype=np.int64)
    table[:, 3] = rng.choice(3, size=rows, p=[0.5, 0.3, 0.2])
    for parent, child in ((3, 0), (0, 2), (2, 4), (2, 1)):
        table[:, child] = np.where(rng.random(rows) < 0.2, rng.integers(3, size=rows), table[:, parent])
    return table


def test_a_tree_is_recovered_without_noise_and_nearly_with_it():
    """Caught: the smallest tree for the largest, circles, a column left alone, a seed without effect."""
    real, sizes, rng = grown(20_000, seed=0), [3] * 5, np.random.default_rng(0)
    ones = [counted(real, sizes, [j], math.inf, rng) for j in range(5)]
    assert set(spanning_tree(real, sizes, ones, math.inf, rng)) == {(0, 3), (0, 2), (2, 4), (1, 2)}
    by_chance = distances(real, grown(20_000, seed=1), sizes)
    baseline = distances(real, independent(real, sizes, 20_000, rng), sizes)
    for epsilon, factor in ((math.inf, 1.5), (1.0, 2.5)):
        made = marginal_method(real, sizes, epsilon, 1e-6, 20_000, np.random.default_rng(0))
        assert np.array_equal(made, marginal_method(real, sizes, epsilon, 1e-6, 20_000, np.random.default_rng(0)))
        assert not np.array_equal(made, marginal_method(real, sizes, epsilon, 1e-6, 20_000, np.random.default_rng(1)))
        found = distances(real, made, sizes)
        assert all(found[way] < factor * by_chance[way] for way in (1, 2, 3)) and found[2] < baseline[2] / 10
    noisy = distances(real, marginal_method(real, sizes, 0.005, 1e-6, 20_000, np.random.default_rng(0)), sizes)
    assert noisy[2] > 5 * by_chance[2]
    assert marginal_method(real[:, :1], [3], 1.0, 1e-6, 7, np.random.default_rng(0)).shape == (7, 1)
