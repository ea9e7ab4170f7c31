"""MST: a private table from noisy marginals on a tree (McKenna, Miklau, Sheldon 2021, arXiv 2108.04978).

    1   measure all d 1-way marginals with Gaussian noise
    2   choose a spanning tree of the columns, edge by edge: among pairs that do not close a cycle, the exponential
        mechanism prefers pairs whose true table is far, in L1, from the product of the noisy 1-way marginals
    3   measure the d - 1 2-way marginals of the tree with Gaussian noise
    4   estimate the distribution p(root) prod p(child | parent) from all measurements, and sample independent rows

Each of 1-3 has a third of the budget, rho in zCDP. Neighbouring tables differ by one added or removed row. It changes
one cell of each marginal by one, so m marginals by sqrt(m) in L2, and the score of a pair by at most 1.

    1, 3    m marginals with sigma^2 = m / (2 rho / 3)              Gaussian mechanism: m / (2 sigma^2) = rho / 3
    2       d - 1 times with epsilon_i^2 / 8 = rho / 3 / (d - 1)    exponential mechanism: epsilon_i^2 / 8 each

Estimation (4) reads noisy measurements only. The paper maximises the likelihood of tree distributions by mirror
descent; this file uses least squares in two steps. A column's marginal is the mean of its own measurement and of the
sums of its pairs' tables, weighted by precision, projected to non-negative cells and the right total. Then each pair's
table is projected to the closest non-negative table whose sums are the marginals of its two columns, so that all tables
agree. The paper's merging of rare values is left out; the projections remove small cells instead.

rivals.py runs a package's implementation for comparison.
"""

import math
from itertools import combinations

import numpy as np

from mixdpo.tabular.dp_tbart import simplex

STEPS = 500         # steps of the projection of a pair's table


def marginal_method(codes: np.ndarray, sizes: list[int], epsilon: float, delta: float, rows: int,
                    rng: np.random.Generator) -> np.ndarray:
    """codes (N,d), column j in 0..sizes[j]-1 -> a table (rows,d), (epsilon, delta)-private. epsilon = inf: no noise."""
    d, third = len(sizes), zcdp(epsilon, delta) / 3
    ones = [counted(codes, sizes, [j], third / d, rng) for j in range(d)]
    total = max(np.average([one.sum() for one in ones], weights=1 / np.array(sizes)), 1.0)
    tree = spanning_tree(codes, sizes, [simplex(one, total) for one in ones], third, rng)
    pairs = {edge: counted(codes, sizes, edge, third / (d - 1), rng) for edge in tree}
    return sample(*estimate(ones, pairs, total), rows, rng)


def zcdp(epsilon: float, delta: float) -> float:
    """The largest rho that the conversion of Canonne, Kamath, Steinke (2020, arXiv 2004.00010, section 2.3) allows:
    delta = min over alpha > 1 of exp((alpha - 1)(alpha rho - epsilon)) (1 - 1 / alpha)^alpha / (alpha - 1)."""
    if epsilon == math.inf:
        return math.inf

    def log_delta(rho: float) -> float:
        most = (epsilon + 1) / (2 * rho) + 2                                # upper bound of the best alpha
        a = bisect(lambda a: (2 * a - 1) * rho - epsilon + math.log1p(-1 / a), 1 + 1e-9, most)
        return (a - 1) * (a * rho - epsilon) + a * math.log1p(-1 / a) - math.log(a - 1)

    return bisect(lambda rho: log_delta(rho) - math.log(delta), 1e-12, epsilon + 1)


def bisect(rising, low: float, high: float) -> float:
    """The root of an increasing function in [low, high], approached from below."""
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if rising(middle) <= 0 else (low, middle)
    return low


def counted(codes: np.ndarray, sizes: list[int], columns, rho: float, rng: np.random.Generator) -> np.ndarray:
    """A noisy contingency table of some columns; costs rho: each cell has noise of variance 1 / (2 rho)."""
    shape = [sizes[j] for j in columns]
    cells = np.ravel_multi_index(codes[:, list(columns)].T, shape)
    counts = np.bincount(cells, minlength=math.prod(shape)).reshape(shape)
    return counts + math.sqrt(1 / (2 * rho)) * rng.normal(size=shape)


def spanning_tree(codes, sizes, ones: list[np.ndarray], rho: float, rng: np.random.Generator) -> list[tuple[int, int]]:
    """d - 1 edges (a, b), a < b. ones: a noisy marginal for each column, all of one total. Costs rho."""
    d, none = len(sizes), math.inf                                          # rho = inf: true counts
    total = ones[0].sum()
    errors = {(a, b): np.abs(counted(codes, sizes, (a, b), none, rng) - np.outer(ones[a], ones[b]) / total).sum()
              for a, b in combinations(range(d), 2)}
    tree, part = [], list(range(d))                                         # part: the component of each column
    for _ in range(d - 1):
        epsilon = math.sqrt(8 * rho / (d - 1))
        open_edges = [edge for edge in errors if part[edge[0]] != part[edge[1]]]
        # probability proportional to exp(epsilon error / 2), by Gumbel noise; without noise the largest error
        noisy = [errors[edge] + 2 / epsilon * rng.gumbel() for edge in open_edges]
        a, b = open_edges[int(np.argmax(noisy))]
        tree.append((a, b))
        part = [part[a] if p == part[b] else p for p in part]
    return tree


# ---- estimation


def closest(x: np.ndarray, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """The closest table to x (A,B) with no negative cell and the sums first (A,) and second (B,), by Dykstra's
    alternating projections."""
    A, B = x.shape
    excess = np.zeros_like(x)
    for _ in range(STEPS):
        over, across = (first - x.sum(1))[:, None] / B, (second - x.sum(0)) / A
        x = x + over + across - across.sum() / B + excess                   # has the right sums, except for excess
        x, excess = np.maximum(x, 0), np.minimum(x, 0)
    return x


def estimate(ones: list[np.ndarray], pairs: dict, total: float) -> tuple[list[np.ndarray], dict]:
    """Marginals of columns and consistent tables of pairs, from noisy measurements."""
    d, margins = len(ones), []
    for j, one in enumerate(ones):
        measured, precision = [one], [1 / d]                                # precision of a cell, up to a common
        for (a, b), table in pairs.items():                                 # factor
            if j in (a, b):
                measured.append(table.sum(1 if j == a else 0))
                precision.append(1 / ((d - 1) * len(ones[b if j == a else a])))
        margins.append(simplex(np.average(measured, axis=0, weights=precision), total))
    return margins, {(a, b): closest(table, margins[a], margins[b]) for (a, b), table in pairs.items()}


def sample(margins: list[np.ndarray], pairs: dict, rows: int, rng: np.random.Generator) -> np.ndarray:
    """Independent rows (rows,d) from the tree's distribution."""
    out = np.empty((rows, len(margins)), dtype=np.int64)
    out[:, 0] = rng.choice(len(margins[0]), size=rows, p=margins[0] / margins[0].sum())
    known, left = {0}, dict(pairs)
    while left:
        a, b = next(edge for edge in left if known & set(edge))
        table = left.pop((a, b))
        parent, child, table = (a, b, table) if a in known else (b, a, table.T)
        table = np.where(table.sum(1, keepdims=True) > 0, table, margins[child])           # a parent value without rows
        up_to = (table / table.sum(1, keepdims=True)).cumsum(1)[:, :-1]     # (A, B-1)
        out[:, child] = (rng.random((rows, 1)) >= up_to[out[:, parent]]).sum(1)
        known.add(child)
    return out
