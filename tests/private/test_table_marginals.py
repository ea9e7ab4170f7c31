"""The plan of a table's budget, noisy marginals, the estimate from them, and even samples. Docstrings name the faults
that each test is there for."""

import inspect
import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
from scipy.optimize import minimize

from data.tables.marginals import distances, parity_table, satisfied, total_variation
from mixdpo.private.accountant import noise_multiplier
from mixdpo.private.keys import Key
from mixdpo.tabular import dp_tbart, marginals
from mixdpo.tabular.columns import columns_of
from mixdpo.tabular.dp_tbart import TableConfig, draw, fit, look
from mixdpo.tabular.marginals import Marginals, choose, count, even, mean, scored
from mixdpo.tabular.plan import ALONE, LEAST, MOST, NOISE, SETS, THIN, WORTH, plan_of, sets_of

SIZES = [3, 2, 4]
KEY = Key.public(7)


def columns(sizes):
    return columns_of([{"name": f"c{j}", "type": "category", "values": [*map(str, range(n))]}
                       for j, n in enumerate(sizes)])


def chain(rows, rng, sizes=SIZES):
    """Codes (rows,d); each column depends on the one before."""
    codes = np.stack([rng.integers(0, n, rows) for n in sizes], axis=1)
    for j in range(1, len(sizes)):
        copied = rng.random(rows) < 0.6
        codes[copied, j] = codes[copied, j - 1] % sizes[j]
    return codes


# --- the plan ---------------------------------------------------------------------------------------------------------


def test_the_plan_depends_on_public_facts_only():
    """The rule gets numbers and options. A table with other rows of the same number has the same plan. Fault: a rule
    that looks at rows."""
    assert [*inspect.signature(plan_of).parameters] == ["rows", "sizes", "config"]
    rng, config = np.random.default_rng(0), TableConfig(epsilon=3.0)
    plans = {look(columns(SIZES), codes, config, Key.public(seed)).plan for seed, codes in enumerate(
        (chain(500, rng), rng.integers(0, SIZES, (500, 3)), np.zeros((500, 3), dtype=np.int64)))}
    assert len(plans) == 1
    fewer = replace(config, examples=500)
    assert look(columns(SIZES), chain(499, rng), fewer, KEY).plan in plans


@pytest.mark.parametrize("rows, sizes, epsilon, pairs, steps", [
    (700, [6] * 21, 1.0, False, False), (700, [6] * 21, 10.0, True, False), (5000, [5] * 12, 1.0, True, False),
    (30_000, [15] * 15, 1.0, True, False), (20_000, [2] * 8, 10.0, True, True), (20_000, [2] * 8, 1.0, True, False),
    (20_000, [2] * 8, math.inf, True, True), (50, [2], 1.0, False, False)])
def test_few_rows_get_marginals_and_many_get_steps(rows, sizes, epsilon, pairs, steps):
    """Faults: pairs measured whose noise exceeds all that they could say; steps of noise; shares that sum to more than
    the budget, or to less without any step."""
    plan = plan_of(rows, sizes, TableConfig(epsilon=epsilon))
    assert sum(share for _, share in plan.rounds) == pytest.approx(plan.pairs)
    spent = plan.ones + plan.scores + plan.pairs
    assert (plan.pairs > 0) == (plan.scores > 0) == pairs and (plan.steps > 0) == steps
    assert spent < 1 if steps else spent == pytest.approx(1)
    if steps and plan.sigma:
        parameters = 12 * 64**2 + (2 * sum(sizes) + len(sizes)) * 64
        noise = plan.sigma * math.sqrt(plan.steps * parameters / (1 - spent)) / rows
        assert plan.steps >= LEAST and noise <= NOISE


def test_dp_sgd_alone_has_steps():
    """As in the paper: nothing else learns the table. Fault: the least number of steps, which are too few."""
    alone = plan_of(5000, [5] * 12, TableConfig(first_look=0.0))
    assert alone.steps == ALONE and not alone.rounds and alone.ones == 0
    assert plan_of(5000, [5] * 12, TableConfig(first_look=0.0, steps=7)).steps == 7
    assert plan_of(5000, [5] * 12, TableConfig(first_look=0.5)).steps == LEAST


def test_shares_are_of_the_budget():
    """A share of 1 has the noise of one release. Faults: shares of epsilon; sqrt(f) for f; sqrt(d) left out."""
    plan = plan_of(700, [6] * 21, TableConfig())
    assert plan.ones == 1 and plan.deviation(1, 1) == pytest.approx(noise_multiplier(1.0, 1e-5, 1.0, 1), rel=1e-5)
    assert plan.deviation(0.25, 9) == pytest.approx(6 * plan.sigma)
    tree = 0.4 * 36 * plan.sigma * math.sqrt(20 / 0.8) / 700
    assert tree > WORTH and f"{tree:.3f}" in plan.why


@pytest.mark.parametrize("rows, sizes, epsilon, way", [
    (20_000, [2] * 5, 1.0, 5), (20_000, [2] * 11, 1.0, 3), (20_000, [2] * 11, math.inf, 4), (5000, [5] * 12, 1.0, 2),
    (700, [5] * 21, math.inf, 2), (20_000, [40, 30, 50], 1.0, 2), (20_000, [6] * 5, math.inf, 3),
    (20_000, [2] * 60, math.inf, 2), (9, [2], 1.0, 2)])
def test_larger_sets_are_scored_where_their_scores_cost_little(rows, sizes, epsilon, way):
    """Faults: scores that take more than their share; sets with more cells than rows; more sets than can be counted;
    a second round without larger sets."""
    plan = plan_of(rows, sizes, TableConfig(epsilon=epsilon))
    sets = [sets_of(rows, sizes, found) for found, _ in plan.rounds]
    assert plan.way == way and len(plan.rounds) == (0 if not plan.pairs else 2 if way > 2 else 1)
    if way > 2:
        count = sum(map(len, sets))
        assert count <= SETS and count * (100 * plan.sigma / rows) ** 2 <= MOST[1]
        assert max(map(len, sets[1])) == way > 2 and {*sets[0]} <= {*sets[1]}
    for found in sets:
        for columns in found:
            cells = math.prod(sizes[j] for j in columns)
            assert cells <= rows and (len(columns) < 4 or THIN * cells <= rows)


# --- what is measured -------------------------------------------------------------------------------------------------


def test_one_row_moves_each_marginal_by_one_and_each_score_by_at_most_one(monkeypatch):
    """That is the sensitivity for which the noise is scaled. Faults: expected tables with the actual number of rows,
    which move scores by 2; a table counted twice; noise that depends on the number of rows."""
    rng = np.random.default_rng(1)
    codes, config = chain(3000, rng), TableConfig(epsilon=10.0, examples=3000)
    monkeypatch.setattr(marginals, "choose", lambda scores, *_: [c for c in [(0, 1), (1, 2), (0, 1, 2)] if c in scores])
    monkeypatch.setattr(Marginals, "estimate", lambda found, _: setattr(found, "pool", codes[:100]))
    noisy, released = marginals.noisy, []
    for rows in (codes, codes[1:], np.delete(codes, 700, 0)):
        seen = []
        monkeypatch.setattr(marginals, "noisy", lambda *about, seen=seen: seen.append(noisy(*about)) or seen[-1])
        found = look(columns(SIZES), rows, config, KEY)
        released.append([*(y for y, _ in found.marginals.measured.values()), *seen])
    for other in released[1:]:
        assert len(other) == len(released[0]) == 6 + 6                      # 3 columns, 2 pairs and all three
        for a, b in zip(released[0], other):
            assert np.allclose(np.sort(np.abs(a - b)), [0] * (len(a) - 1) + [1], atol=1e-9)
    for pool in (np.empty((0, 0), np.int64), codes[:100]):
        found = Marginals(SIZES, 3000, [np.full(n, -math.log(n)) for n in SIZES], {}, pool=pool)
        expected = found.expected(sets_of(3000, SIZES, 3))
        assert all(rows.sum() == pytest.approx(3000) for rows in expected.values()) and len(expected) == 4
        before = scored(codes, expected, SIZES, 2.0, np.random.default_rng(4))
        moves = []
        for row in range(0, 3000, 300):
            after = scored(np.delete(codes, row, 0), expected, SIZES, 2.0, np.random.default_rng(4))
            moves += [abs(after[columns] - score) for columns, score in before.items()]
        assert 0.5 < max(moves) <= 1 + 1e-9


def test_the_noise_of_all_rounds_is_the_budget(monkeypatch):
    """1 / s^2, summed over all that one row moves by 1, is the budget. Faults: each round has the budget of all; scores
    of one round only are counted; a share that is left over."""
    codes, config, spent = chain(20_000, np.random.default_rng(1)), TableConfig(epsilon=1.0), []
    noisy, scores = marginals.noisy, marginals.scored
    for choice in (lambda scores, *_: [*scores][:2], lambda *_: []):
        spent.clear()
        monkeypatch.setattr(marginals, "choose", choice)
        monkeypatch.setattr(marginals, "noisy", lambda *about: spent.append(about[3]) or noisy(*about))
        monkeypatch.setattr(marginals, "scored", lambda *about: spent.extend([about[3]] * len(about[1])) or scores(
            *about))
        monkeypatch.setattr(dp_tbart, "noisy", lambda *about: spent.append(about[3]) or noisy(*about))
        plan = look(columns(SIZES), codes, config, KEY).plan
        assert len(plan.rounds) == 2
        total = plan.sigma**2 * sum(1 / s**2 for s in spent)
        assert 0.98 < total <= 1 + 1e-9                                     # what was measured is not scored again


def test_pairs_are_chosen_net_of_noise():
    """Faults: a pair of many cells, whose noise exceeds its score; pairs without dependence; more pairs than pay."""
    sizes = [2, 2, 40, 40]
    scores = {(0, 1): 500.0, (0, 2): 600.0, (0, 3): 20.0, (1, 2): 30.0, (1, 3): 30.0, (2, 3): 900.0}
    expected = {(a, b): np.full(sizes[a] * sizes[b], 10_000 / sizes[a] / sizes[b]) for a, b in scores}
    assert choose(scores, expected, 3.0, 4) == [(0, 1)] or choose(scores, expected, 3.0, 4) == [(0, 1), (0, 2)]
    assert choose(scores, expected, 0.01, 4)[:2] == [(2, 3), (0, 2)]
    assert choose(scores, expected, 300.0, 4) == []
    assert len(choose(dict.fromkeys(scores, 1.0), expected, 0.0, 4)) == 6
    assert sets_of(1000, sizes, 2) == [*scores][:5]                         # (2, 3) has more cells than rows


def test_two_measurements_are_one():
    """Fault: weights by deviation instead of precision."""
    rng = np.random.default_rng(0)
    y, s = mean((rng.normal(size=100_000), 1.0), (4 * rng.normal(size=100_000), 4.0))
    assert s == pytest.approx(4 / math.sqrt(17)) and y.std() == pytest.approx(s, rel=0.02)
    assert mean((np.ones(2), 0.0), (np.zeros(2), 0.0))[1] == 0


# --- the estimate -----------------------------------------------------------------------------------------------------


def best(found):
    """The minimum of the objective over all tables of all 24 rows, by a general optimiser."""
    rows = np.array([*itertools.product(*map(range, SIZES))])
    log_q = sum(found.log_q[j][rows[:, j]] for j in range(3))
    log_q = log_q - np.log(np.exp(log_q).sum())

    def objective(logits):
        log_p = logits - np.logaddexp.reduce(logits)
        p, value = np.exp(log_p), marginals.PRIOR * found.rows * (np.exp(log_p) * (log_p - log_q)).sum()
        for pair, (y, s) in found.measured.items():
            now = np.bincount(marginals.cells(rows, pair, SIZES), found.rows * p, len(y))
            value += ((y - now) ** 2).sum() / (2 * s * s)
        return value

    logits = minimize(objective, log_q, method="BFGS", options={"maxiter": 5000}).x
    return rows, np.exp(logits - np.logaddexp.reduce(logits))


@pytest.mark.parametrize("larger", [[], [(0, 1, 2)]])
@pytest.mark.parametrize("s", [15.0, 60.0])
def test_the_estimate_minimises_its_objective(s, larger, monkeypatch):
    """Each of 24 rows has the probability of the optimum, up to the pool's sampling error. Faults: no prior; a prior
    without its square of s; Gibbs steps with the wrong axis of a table; weights that are not reset."""
    rng, N = np.random.default_rng(3), 1000
    codes = chain(N, rng)
    monkeypatch.setattr(marginals, "PRIOR", 0.3)
    sets = [(0,), (1,), (2,), (0, 1), (1, 2), (0, 2), *larger]
    measured = {c: (count(codes, c, SIZES) + s * rng.normal(size=math.prod(SIZES[j] for j in c)), s) for c in sets}
    found = Marginals(SIZES, N, [marginals.log_shares(measured[(j,)][0], N) for j in range(3)], measured)
    found.estimate(rng)
    rows, p = best(found)
    share = count(found.pool, (0, 1, 2), SIZES) / len(found.pool)
    assert len(found.pool) == marginals.POOL and np.abs(share - p).max() < 5 * math.sqrt(0.1 / marginals.POOL)
    share = count(found.moved(found.pool, rng), (0, 1, 2), SIZES) / len(found.pool)
    assert np.abs(share - p).max() < 0.01                                   # Gibbs steps keep the distribution
    q = np.exp(sum(found.log_q[j][rows[:, j]] for j in range(3)))
    assert np.abs(q - p).sum() > 20 * np.abs(share - p).mean()              # far from independent columns


def test_the_estimate_holds_columns_that_determine_each_other():
    """With nearly exact counts of columns that are functions of one another, and Gibbs steps that keep the marginals.
    Fault: a correction that changes theta, with which Gibbs steps drift."""
    rng = np.random.default_rng(8)
    first = rng.choice(6, 5000, p=[0.4, 0.3, 0.1, 0.1, 0.05, 0.05])
    codes = np.stack([(first + j) % 6 // (1 + j % 2) for j in range(8)], axis=1)
    flipped = rng.random(codes.shape) < 0.02
    codes[flipped] = 0
    sizes = [int(n) for n in codes.max(0) + 1]
    measured = {c: (count(codes, c, sizes), 0.5) for c in [*((j,) for j in range(8)), *sets_of(5000, sizes, 2)]}
    found = Marginals(sizes, 5000, [marginals.log_shares(measured[(j,)][0], 5000) for j in range(8)], measured)
    found.estimate(rng)
    assert distances(codes, found.pool, sizes)[2] < 0.015
    codes_moved = found.moved(found.pool, rng)
    before = {columns: theta.copy() for columns, theta in found.theta.items()}
    found.corrected(codes_moved)
    assert distances(codes, codes_moved, sizes)[2] < 0.03
    assert all((found.theta[columns] == theta).all() for columns, theta in before.items())


def test_parity_is_learned_at_epsilon_1():
    """Of 20,000 rows of five bits, of which no pair, triple or four depend on each other. Faults: no second round; sets
    of three columns at most; Gibbs steps that leave out larger sets."""
    codes = parity_table(20_000, 5, np.random.default_rng(0))
    config = TableConfig(width=16, heads=2, pretrain=0)
    table = look(columns([2] * 5), codes, config, KEY)
    made = draw(table, fit(table, config, KEY), 5000, np.random.default_rng(1))
    assert (0, 1, 2, 3, 4) in table.marginals.measured and satisfied(made) > 0.95


def test_rows_of_a_model_are_weighted_to_the_measurements():
    """Uniform rows get the exact marginals of a table. Fault: weights of unmeasured columns."""
    rng = np.random.default_rng(5)
    codes, pool = chain(5000, rng), rng.integers(0, SIZES, (20_000, 3))
    measured = {c: (count(codes, c, SIZES), 0.0) for c in [(0,), (1,), (2,), (0, 1), (1, 2)]}
    found = Marginals(SIZES, 5000, [marginals.log_shares(measured[(j,)][0], 5000) for j in range(3)], measured)
    w = np.exp(found.corrected(pool, own=False))
    for c, (y, _) in measured.items():
        now = np.bincount(marginals.cells(pool, c, SIZES), w / w.sum(), len(y))
        assert np.abs(now - y / 5000).max() < 2e-3, c


def test_a_bin_of_quantiles_has_the_noise_of_all_its_fine_bins():
    """64 fine bins each, of one column, which is measured once; against the true counts of the bins, for 30 keys.
    Fault: the deviation of one fine bin, so that a noisy column passed for an exact one."""
    column, = columns_of([{"name": "x", "type": "number", "low": 0, "high": 1, "quantiles": 4}])
    codes, errors = np.random.default_rng(0).integers(0, column.size, (3000, 1)), []
    for seed in range(30):
        table = look([column], codes, TableConfig(), Key.public(seed))
        (y, s), = table.marginals.measured.values()
        assert s == pytest.approx(table.plan.deviation(table.plan.ones, 1) * math.sqrt(column.size / len(y)))
        errors += ((y - np.bincount(table.codes[:, 0], minlength=len(y))) / s).tolist()
    assert np.std(errors) == pytest.approx(1, abs=0.2)


# --- even rows --------------------------------------------------------------------------------------------------------


def test_an_even_sample_is_closer_to_its_pool_than_independent_rows():
    """By a factor of 3 in each pair of columns, with the weights of the pool. Faults: expected counts without weights;
    an exchange that makes things worse is accepted; rows that are not of the pool; rows in the order of the pool."""
    rng, sizes = np.random.default_rng(2), [3, 4, 5, 6]
    pool = np.sort(chain(8000, rng, sizes), axis=0)
    rng.shuffle(pool[:, 1])
    log_w = np.where(pool[:, 0] == 2, 1.0, 0.0)
    many = pool[marginals.resampled(log_w, 200_000, rng)]
    p = np.exp(log_w) / np.exp(log_w).sum()
    made, plain = even(pool, log_w, 500, sizes, rng), pool[rng.choice(len(pool), 500, p=p)]
    assert set(map(tuple, made)) <= set(map(tuple, pool)) and made.shape == (500, 4)
    a, b = (total_variation(many, x, sizes, 2) for x in (made, plain))
    assert (a < b / 3).all()
    assert abs(np.corrcoef(made[:, 0], np.arange(500))[0, 1]) < 0.2
    assert even(pool[:, :1], log_w, 5, sizes[:1], rng).shape == (5, 1)      # one column has no pair


@pytest.mark.parametrize("options", [dict(), dict(steps=12, batch=500), dict(first_look=0.0, steps=12, batch=500)])
def test_a_table_has_the_dependence_that_was_measured(options):
    """Faults: rows in the model's order of columns; rows of a model that are not weighted."""
    codes = chain(20_000, np.random.default_rng(0))
    config = TableConfig(width=16, heads=2, pretrain=30, order="random", seed=1, **options)
    table = look(columns(SIZES), codes, config, KEY)
    if not options:
        table = replace(table, plan=replace(table.plan, steps=0))
    made = draw(table, fit(table, config, KEY), 3000, np.random.default_rng(1))
    found = distances(codes, made, SIZES)
    assert found[2] < (0.02 if config.first_look else 0.4)


def test_later_rows_have_the_marginals_too(monkeypatch):
    """Of a table that is drawn in parts, with an estimate that has not converged, whose Gibbs steps drift from its
    measurements. Fault: rows after Gibbs steps that are not weighted anew."""
    monkeypatch.setattr(dp_tbart, "PART", 600)
    codes, config = chain(20_000, np.random.default_rng(0)), TableConfig(width=16, heads=2, pretrain=0)
    table = look(columns(SIZES), codes, config, KEY)
    table = replace(table, plan=replace(table.plan, steps=0))
    for theta in table.marginals.theta.values():
        theta *= 0.8
    made = draw(table, fit(table, config, KEY), 3000, np.random.default_rng(1))
    assert distances(codes, made[2400:], SIZES)[2] < 0.02
