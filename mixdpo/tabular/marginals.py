"""Noisy marginals of a table, a distribution that has them, and rows that follow it closely.

    measure     noisy counts of every column; scores of all pairs under noise; noisy tables of the best pairs, and the
                columns again, all with the same noise. plan.py divides the budget. Everything else reads released
                numbers only and costs no privacy
    score       of a pair: L1 distance, in rows, between its table and that of independent columns. One row more changes
                a score by at most 1, so all scores together have sensitivity sqrt(number of pairs), and Gaussian noise
                makes them one Gaussian mechanism. (AIM's exponential mechanism, McKenna et al. 2022, arXiv 2201.12677,
                scores again after each measurement; here all pairs are chosen at once.)
    choose      the m pairs with the largest scores, net of CAUTION deviations of the score's noise and of the noise
                that the measurement would bring; m by the largest sum. Noise on a cell counts as at most the rows
                expected there, as no cell is negative
    estimate    the log-linear distribution p(x) ~ q(x) exp(sum over measured c of theta_c[x_c]) that minimises

                    lam N KL(p | q) + sum over c, cells (y_c - N p_c)^2 / (2 s_c^2)

                for the measurements y_c with noise of deviation s_c, where q has independent columns. The first term
                is a prior of lam N rows: it moves noisy cells towards independence. p is represented by a pool of rows:
                `tilt` changes theta and the rows' weights, one marginal at a time; when the weights become uneven the
                rows are resampled, and Gibbs steps move them. This needs no junction tree, so any set of pairs will do
    even        n rows from a weighted pool whose 2-way marginals are as close as possible to the pool's. Independent
                rows would add a sampling error to the noise

A table is codes (N,d), int64; column j holds 0..sizes[j]-1. Marginals are flat: cells in row-major order.
"""

import math
from dataclasses import dataclass, field
from itertools import combinations

import numpy as np

from mixdpo.tabular.plan import Plan

CAUTION = 1.0       # deviations of a score's noise
PRIOR = 0.03        # lam: the weight of independent columns, in tables of N rows
POOL = 20_000       # rows of a pool, at least; at most LARGEST; 2 N in between, so that few rows of a table are alike
LARGEST = 200_000
AT_ONCE = 4_000_000 # logits in memory
ROUNDS = 8          # resampling rounds of an estimate
SWEEPS = 4          # changes of each theta in a round
EVEN = 0.3          # effective share of a pool's weights below which it is resampled

Columns = tuple[int, ...]
Measured = dict[Columns, tuple[np.ndarray, float]]      # columns -> noisy counts of the cells, deviation of the noise


def simplex(x: np.ndarray, total: float) -> np.ndarray:
    """The non-negative vector with sum `total` that is closest to x: max(x - t, 0) for the right t."""
    largest = np.sort(x)[::-1]
    t = (largest.cumsum() - total) / np.arange(1, len(x) + 1)
    return np.maximum(x - t[largest > t][-1], 0)


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


# ---- which pairs


def scored(codes: np.ndarray, shares: list[np.ndarray], rows: int, s: float,
           rng: np.random.Generator) -> dict[Columns, float]:
    """Noisy scores of all pairs. shares: probabilities of each column's values, from released counts; rows: N as
    declared, because the expected table must be the same for neighbours."""
    sizes = [len(p) for p in shares]
    found: dict[Columns, float] = {}
    for pair in combinations(range(len(sizes)), 2):
        expected = rows * np.outer(shares[pair[0]], shares[pair[1]]).ravel()
        found[pair] = float(np.abs(count(codes, pair, sizes) - expected).sum() + s * rng.normal())
    return found


def choose(scores: dict[Columns, float], shares: list[np.ndarray], rows: int, sigma: float) -> list[Columns]:
    """The pairs to measure. scores: net of CAUTION; sigma: noise multiplier of all measurements together."""
    d, best = len(shares), 0.0
    chosen: list[Columns] = []
    pairs = [pair for pair in scores if len(shares[pair[0]]) * len(shares[pair[1]]) <= rows]
    expected = {pair: rows * np.outer(shares[pair[0]], shares[pair[1]]) for pair in pairs}
    for m in range(1, min(len(pairs), 4 * d) + 1):
        noise = 0.8 * sigma * math.sqrt(m + d)
        net = {pair: scores[pair] - np.minimum(noise, expected[pair]).sum() for pair in pairs}
        top = sorted(net, key=net.__getitem__, reverse=True)[:m]
        if (value := sum(net[pair] for pair in top)) > best:
            best, chosen = value, top
    return chosen


# ---- the estimate


def tilt(codes: np.ndarray, sizes: list[int], measured: Measured, theta: dict, rows: int, sweeps: int,
         least: float = 0.0) -> np.ndarray:
    """Changes theta until the weighted pool has the measured marginals, up to their noise; -> log-weights (M,).

    It stops when the effective share of the weights is below `least`. rows: N."""
    log_w = np.zeros(len(codes))
    place = {columns: cells(codes, columns, sizes) for columns in measured}
    for _ in range(sweeps):
        for columns, (y, s) in measured.items():
            w = np.exp(log_w - log_w.max())
            now, stiff = np.bincount(place[columns], w * (rows / w.sum()), len(y)), PRIOR * s * s
            move = np.zeros(len(y))                                         # Newton's method, every cell separately
            for _ in range(3):
                new = now * np.exp(move)
                move += np.clip((y - new - stiff * (theta[columns] + move)) / (new + stiff + 1e-9), -1, 1)
            move = np.where(now > 0, move.clip(-2, 2), 0)                   # the pool says nothing about empty cells
            theta[columns] = theta[columns] + move
            log_w += move[place[columns]]
        w = np.exp(log_w - log_w.max())
        if w.sum() ** 2 / (w @ w) < least * len(w):
            break
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

    def moved(self, codes: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Rows (M,d) after one Gibbs step for each column."""
        codes = codes.copy()
        for j in rng.permutation(len(self.sizes)):
            for part in np.array_split(codes, -(-len(codes) * self.sizes[j] // AT_ONCE)):   # views: changed in place
                logits = np.tile(self.log_q[j] + self.theta[(j,)], (len(part), 1))
                for columns, theta in self.theta.items():
                    if len(columns) == 2 and j in columns:
                        a, b = columns
                        table = theta.reshape(self.sizes[a], self.sizes[b])
                        logits += table[part[:, a]] if j == b else table.T[part[:, b]]
                up_to = np.exp(logits - logits.max(1, keepdims=True)).cumsum(1)
                u = rng.random((len(part), 1)) * up_to[:, -1:]
                part[:, j] = (up_to <= u).sum(1).clip(max=self.sizes[j] - 1)
        return codes

    def estimate(self, rng: np.random.Generator) -> None:
        """Sets theta and pool."""
        self.theta = {columns: np.zeros(len(y)) for columns, (y, _) in self.measured.items()}
        size = min(max(POOL, 2 * self.rows), LARGEST)
        codes = np.stack([rng.choice(len(q), size, p=np.exp(q) / np.exp(q).sum()) for q in self.log_q], axis=1)
        for last in [False] * ROUNDS * any(len(columns) > 1 for columns in self.measured) + [True]:
            log_w = tilt(codes, self.sizes, self.measured, self.theta, self.rows, SWEEPS, EVEN)
            codes = codes[resampled(log_w, len(codes), rng)]
            codes = codes if last else self.moved(codes, rng)
        self.pool = codes

    def corrected(self, codes: np.ndarray) -> np.ndarray:
        """Log-weights (M,) with which rows of a model have the measured marginals, up to their noise."""
        theta = {columns: np.zeros(len(y)) for columns, (y, _) in self.measured.items()}
        return tilt(codes, self.sizes, self.measured, theta, self.rows, 20)


def log_shares(counts: np.ndarray, rows: int) -> np.ndarray:
    """Log-probabilities of a column's values from noisy counts. + 0.5: no value has probability 0."""
    share = simplex(counts, rows) + 0.5
    return np.log(share / share.sum())


def measure(codes: np.ndarray, ones: list[np.ndarray], plan: Plan, rows: int,
            rng: np.random.Generator) -> tuple[Marginals, list[float]]:
    """-> the marginals, and the noise multipliers of the scores and of the tables. ones: the noisy counts of columns.
    rows: N."""
    sizes, d = [len(y) for y in ones], len(ones)
    measured: Measured = {(j,): (y, plan.deviation(plan.ones, d)) for j, y in enumerate(ones)}
    spent: list[float] = []
    if plan.pairs:
        shares = [np.exp(log_shares(y, rows)) for y in ones]
        s = plan.deviation(plan.scores, d * (d - 1) // 2)
        scores = scored(codes, shares, rows, s, rng)
        chosen = choose({pair: score - CAUTION * s for pair, score in scores.items()}, shares, rows,
                        plan.deviation(plan.pairs, 1))
        s = plan.deviation(plan.pairs, len(chosen) + d)
        for columns in [*measured, *chosen]:
            y = noisy(codes, columns, sizes, s, rng)
            measured[columns] = mean(measured[columns], (y, s)) if columns in measured else (y, s)
        spent = [plan.deviation(plan.scores, 1), plan.deviation(plan.pairs, 1)]
    found = Marginals(sizes, rows, [log_shares(measured[(j,)][0], rows) for j in range(d)], measured)
    found.estimate(rng)
    return found, spent


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
