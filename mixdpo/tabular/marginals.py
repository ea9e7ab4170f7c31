"""Noisy marginals of a table, a distribution that has them, and rows that follow it closely.

    measure     noisy counts of every column; scores of all pairs under noise; noisy tables of the best pairs, and the
                columns again, all with the same noise; then an estimate. If plan.py says so, a second round scores
                larger sets of columns, and the other pairs, against this estimate, and measures the best. plan.py
                divides the budget. Everything else reads released numbers only and costs no privacy
    score       of a set of columns: L1 distance, in rows, between its table and the expected one, which has independent
                columns in the first round and is the estimate's in the second. One row more changes a score by at most
                1, so m scores together have sensitivity sqrt(m), and Gaussian noise makes them one Gaussian mechanism.
                (AIM's exponential mechanism, McKenna et al. 2022, arXiv 2201.12677, scores again after each
                measurement; here all sets of a round are chosen at once.)
    choose      the m sets with the largest scores, net of CAUTION deviations of the score's noise and of the noise
                that the measurement would bring; m by the largest sum. Noise on a cell counts as at most the rows
                expected there, as no cell is negative
    estimate    the log-linear distribution p(x) ~ q(x) exp(sum over measured c of theta_c[x_c]) that minimises

                    lam N KL(p | q) + sum over c, cells (y_c - N p_c)^2 / (2 s_c^2)

                for the measurements y_c with noise of deviation s_c, where q has independent columns. The first term
                is a prior of lam N rows: it moves noisy cells towards independence. p is represented by a pool of rows:
                `tilt` changes theta and the rows' weights by a part of the step to the optimum, one marginal at a time;
                the rows are resampled, and Gibbs steps move them. This needs no junction tree, so any sets will do
    even        n rows from a weighted pool whose 2-way marginals are as close as possible to the pool's. Independent
                rows would add a sampling error to the noise

A table is codes (N,d), int64; column j holds 0..sizes[j]-1. Marginals are flat: cells in row-major order.
"""

import math
from dataclasses import dataclass, field
from functools import reduce
from itertools import combinations

import numpy as np

from mixdpo.tabular.plan import Plan, sets_of

CAUTION = 1.0       # deviations of a score's noise
MOST = 4            # sets for each column that are chosen in a round, at most
PRIOR = 0.05        # lam: the weight of independent columns, in tables of N rows
POOL = 20_000       # rows of a pool, at least; at most LARGEST; 2 N in between, so that few rows of a table are alike
LARGEST = 200_000
AT_ONCE = 4_000_000 # logits in memory
ROUNDS = 20         # of an estimate: a part of each change of theta, resampling, Gibbs steps
STEP = 0.3          # that part, in the first round; with larger ones theta diverges where columns determine each other
SWEEPS = 20         # whole changes of each theta, at the end
FINE = 4.0          # rows, for a model's rows: smaller deviations count as this, or few rows would get all the weight

Columns = tuple[int, ...]
Measured = dict[Columns, tuple[np.ndarray, float]]      # columns -> noisy counts of the cells, deviation of the noise


def simplex(x: np.ndarray, total: float) -> np.ndarray:
    """The non-negative vector with sum `total` that is closest to x: max(x - t, 0) for the right t."""
    largest = np.sort(x)[::-1]
    t = (largest.cumsum() - total) / np.arange(1, len(x) + 1)
    return np.maximum(x - t[max((largest > t).sum(), 1) - 1], 0)


def cells(codes: np.ndarray, columns: Columns, sizes: list[int]) -> np.ndarray:
    """The cell (N,) of each row in the marginal of some columns."""
    return np.ravel_multi_index(codes[:, list(columns)].T, [sizes[j] for j in columns])


def count(codes: np.ndarray, columns: Columns, sizes: list[int]) -> np.ndarray:
    """The marginal of some columns: the number of rows in each cell."""
    return np.bincount(cells(codes, columns, sizes), minlength=math.prod(sizes[j] for j in columns)).astype(float)


def noisy(codes: np.ndarray, columns: Columns, sizes: list[int], s: float, rng: np.random.Generator) -> np.ndarray:
    """The marginal with Gaussian noise of deviation s on each cell."""
    exact = count(codes, columns, sizes)
    return exact + s * rng.normal(size=len(exact)) if s else exact


# ---- which sets of columns


def scored(codes: np.ndarray, expected: dict[Columns, np.ndarray], sizes: list[int], s: float,
           rng: np.random.Generator) -> dict[Columns, float]:
    """Noisy scores of sets of columns. expected: rows in each of their cells, from released numbers, in all N as
    declared, because it must be the same for neighbours."""
    return {columns: float(np.abs(count(codes, columns, sizes) - rows).sum() + s * rng.normal())
            for columns, rows in expected.items()}


def choose(scores: dict[Columns, float], expected: dict[Columns, np.ndarray], sigma: float,
           others: int) -> list[Columns]:
    """The sets to measure. scores: net of CAUTION; sigma: noise multiplier of all measurements together, of which
    `others` are chosen already."""
    best, chosen = 0.0, []
    for m in range(1, min(len(scores), MOST * len({j for columns in scores for j in columns})) + 1):
        noise = 0.8 * sigma * math.sqrt(m + others)
        net = {columns: score - np.minimum(noise, expected[columns]).sum() for columns, score in scores.items()}
        top = sorted(net, key=net.__getitem__, reverse=True)[:m]
        if (value := sum(net[columns] for columns in top)) > best:
            best, chosen = value, top
    return chosen


# ---- the estimate


def tilt(codes: np.ndarray, sizes: list[int], measured: Measured, theta: dict, rows: int, sweeps: int,
         step: float = 1.0) -> np.ndarray:
    """Changes theta until the weighted pool has the measured marginals, up to their noise; -> log-weights (M,).

    step: the part of each change that is made. rows: N."""
    log_w = np.zeros(len(codes))
    place = {columns: cells(codes, columns, sizes) for columns in measured}
    for _ in range(sweeps):
        for columns, (y, s) in measured.items():
            w = np.exp(log_w - log_w.max())
            now, stiff = np.bincount(place[columns], w * (rows / w.sum()), len(y)), PRIOR * s * s
            move = np.zeros(len(y))                                         # Newton's method, every cell separately
            for _ in range(3):
                new = now * np.exp(move)
                move += np.clip((y - new - stiff * (theta[columns] + move)) / (new + stiff + rows / len(codes)), -1, 1)
            move = step * np.where(now > 0, move.clip(-2, 2), 0)            # the pool says nothing about empty cells
            theta[columns] = theta[columns] + move
            log_w += move[place[columns]]
    return log_w


def resampled(log_w: np.ndarray, n: int, rng: np.random.Generator) -> np.ndarray:
    """Indices (n,) of rows, each as often as its weight says, rounded up or down (systematic sampling)."""
    up_to = np.exp(log_w - log_w.max()).cumsum()
    return np.searchsorted(up_to, (np.arange(n) + rng.random()) / n * up_to[-1]).clip(max=len(log_w) - 1)


@dataclass
class Marginals:
    """What was measured of a table of N rows, and the distribution that was estimated from it."""

    sizes: list[int]
    rows: int                               # N
    log_q: list[np.ndarray]                 # log-probabilities of each column's values
    measured: Measured
    theta: dict[Columns, np.ndarray] = field(default_factory=dict)
    pool: np.ndarray = field(default_factory=lambda: np.empty((0, 0), np.int64))    # (M,d) rows of the distribution

    def expected(self, sets: list[Columns]) -> dict[Columns, np.ndarray]:
        """Rows in each cell of sets of columns: of the pool, or of independent columns if there is no pool yet."""
        if len(self.pool):
            return {columns: count(self.pool, columns, self.sizes) * (self.rows / len(self.pool)) for columns in sets}
        shares = [np.exp(q) for q in self.log_q]
        return {columns: self.rows * reduce(np.multiply.outer, [shares[j] for j in columns]).ravel()
                for columns in sets}

    def moved(self, codes: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Rows (M,d) after one Gibbs step for each column."""
        codes = codes.copy()
        for j in rng.permutation(len(self.sizes)):
            tables = []                                                     # of each set with j, which is its last axis
            for columns, theta in self.theta.items():
                if len(columns) > 1 and j in columns:
                    table = np.moveaxis(theta.reshape([self.sizes[i] for i in columns]), columns.index(j), -1)
                    tables.append((tuple(i for i in columns if i != j), table.reshape(-1, self.sizes[j])))
            for part in np.array_split(codes, -(-len(codes) * self.sizes[j] // AT_ONCE)):   # views: changed in place
                logits = np.tile(self.log_q[j] + self.theta[(j,)], (len(part), 1))
                for rest, table in tables:
                    logits += table[cells(part, rest, self.sizes)]
                up_to = np.exp(logits - logits.max(1, keepdims=True)).cumsum(1)
                u = rng.random((len(part), 1)) * up_to[:, -1:]
                part[:, j] = (up_to <= u).sum(1).clip(max=self.sizes[j] - 1)
        return codes

    def estimate(self, rng: np.random.Generator) -> None:
        """Sets theta and pool."""
        self.theta = {columns: np.zeros(len(y)) for columns, (y, _) in self.measured.items()}
        size = min(max(POOL, 2 * self.rows), LARGEST)
        codes = np.stack([rng.choice(len(q), size, p=np.exp(q) / np.exp(q).sum()) for q in self.log_q], axis=1)
        for r in range(ROUNDS * any(len(columns) > 1 for columns in self.measured)):
            log_w = tilt(codes, self.sizes, self.measured, self.theta, self.rows, 1, STEP / (1 + r / 10))
            codes = self.moved(codes[resampled(log_w, size, rng)], rng)
        self.pool = codes[resampled(self.corrected(codes), size, rng)]

    def corrected(self, codes: np.ndarray, own: bool = True) -> np.ndarray:
        """Log-weights (M,) with which rows have the measured marginals, up to their noise. own: they are rows of the
        estimate, and not of a model, which are weighted less exactly (FINE)."""
        theta, measured = dict(self.theta), self.measured
        if not own:
            theta = {columns: np.zeros(len(y)) for columns, (y, _) in measured.items()}
            measured = {columns: (y, max(s, FINE)) for columns, (y, s) in measured.items()}
        return tilt(codes, self.sizes, measured, theta, self.rows, SWEEPS)


def log_shares(counts: np.ndarray, rows: int) -> np.ndarray:
    """Log-probabilities of a column's values from noisy counts. + 0.5: no value has probability 0."""
    share = simplex(counts, rows) + 0.5
    return np.log(share / share.sum())


def measure(codes: np.ndarray, ones: list[tuple[np.ndarray, float]], plan: Plan, rows: int,
            rng: np.random.Generator) -> tuple[Marginals, list[float]]:
    """-> the marginals, and the noise multipliers of the scores and of the tables. ones: the noisy counts of columns,
    and the deviation of the noise. rows: N."""
    sizes, d = [len(y) for y, _ in ones], len(ones)
    found = Marginals(sizes, rows, [log_shares(y, rows) for y, _ in ones], {(j,): of for j, of in enumerate(ones)})
    rounds = [(sets_of(rows, sizes, way), share) for way, share in plan.rounds]
    s = plan.deviation(plan.scores, sum(len(sets) for sets, _ in rounds)) if rounds else 0.0
    for sets, share in rounds:
        expected = found.expected([columns for columns in sets if columns not in found.measured])
        again = [(j,) for j in range(d) if not len(found.pool)]             # columns, once more
        scores = scored(codes, expected, sizes, s, rng)
        chosen = choose({columns: score - CAUTION * s for columns, score in scores.items()}, expected,
                        plan.deviation(share, 1), len(again))
        measured = again + chosen or [*found.measured]                      # a share is never left over
        deviation = plan.deviation(share, len(measured))
        for columns in measured:
            y = (noisy(codes, columns, sizes, deviation, rng), deviation)
            found.measured[columns] = mean(found.measured[columns], y) if columns in found.measured else y
        found.log_q = [log_shares(found.measured[(j,)][0], rows) for j in range(d)]
        found.estimate(rng)
    if not rounds:
        found.estimate(rng)
    return found, [plan.deviation(plan.scores, 1), plan.deviation(plan.pairs, 1)] if rounds else []


def mean(first: tuple[np.ndarray, float], second: tuple[np.ndarray, float]) -> tuple[np.ndarray, float]:
    """Two measurements as one: the mean weighted by precision, and its deviation."""
    (x, s), (y, t) = first, second
    if not s * t:
        return first if not s else second
    return (x / s**2 + y / t**2) / (1 / s**2 + 1 / t**2), 1 / math.hypot(1 / s, 1 / t)


# ---- rows


def even(codes: np.ndarray, log_w: np.ndarray, n: int, sizes: list[int], rng: np.random.Generator,
         tries: int = 10) -> np.ndarray:
    """n rows of a weighted pool (M,d), in no order, whose 2-way marginals are close to the pool's.

    From a systematic sample, rows are exchanged for others of the pool where this lowers the sum over all cells of
    (count - expected)^2 / (expected + 1); each place is tried `tries` times. Pairs of more than 4 n cells are left out.
    """
    pairs = [pair for pair in combinations(range(len(sizes)), 2) if sizes[pair[0]] * sizes[pair[1]] <= 4 * n]
    chosen = resampled(log_w, n, rng)
    if pairs:
        start = np.cumsum([0, *(sizes[a] * sizes[b] for a, b in pairs)])
        place = np.stack([cells(codes, pair, sizes) + first for pair, first in zip(pairs, start)], axis=1)
        p = np.exp(log_w - log_w.max())
        p /= p.sum()
        expected = np.bincount(place.ravel(), np.repeat(n * p, len(pairs)), start[-1])
        over, weight = np.bincount(place[chosen].ravel(), minlength=start[-1]) - expected, 1 / (expected + 1)
        at_once = max(1, n // 64)                                           # exchanges that do not see each other
        for _ in range(tries * n // at_once):
            spot, other = rng.choice(n, at_once, replace=False), rng.choice(len(codes), at_once, p=p)
            old, new = place[chosen[spot]], place[other]                    # (at_once,pairs)
            change = weight[new] * (2 * over[new] + 1) - weight[old] * (2 * over[old] - 1)
            better = np.where(old == new, 0, change).sum(1) < 0
            np.subtract.at(over, old[better].ravel(), 1)
            np.add.at(over, new[better].ravel(), 1)
            chosen[spot[better]] = other[better]
    return codes[rng.permutation(chosen)]
