"""Distance between a synthetic and a real table, and the simplest generator as baseline.

A table is codes (N,d), int64; column j holds 0..sizes[j]-1. There are four measures; none of them is private:

    distance    total variation of k-way marginals: half the sum of |real share - synthetic share| over the cells of a
                contingency table, for every set of k columns; means for k = 1, 2, 3
    utility     train on synthetic, test on real: a classifier of one column, fitted to the synthetic table
    detector    AUROC of a classifier that tells synthetic from real rows: 1/2 if it cannot
    parity      share of rows with an even number of ones, if all real rows have one: every set of d - 1 columns of such
                a table is uniform, so a generator that uses fewer than d columns at once reaches 1/2 only

Two samples of one distribution have a distance near sum_c sqrt(p_c (1 - p_c) / (pi n)) for n rows each, not 0. So
compare the distance of a synthetic table with that of a second real table. The other baseline, a tree of pairs, is in
mst.py.
"""

from itertools import combinations
from math import prod

import numpy as np

MOST = 1_000_000    # largest number of cells in a dense count; larger tables count only cells that occur


def total_variation(a: np.ndarray, b: np.ndarray, sizes: list[int], way: int) -> np.ndarray:
    """Distances between tables a (N,d) and b (M,d), one for each set of `way` columns in the order of combinations."""
    a, b = np.ascontiguousarray(a.T), np.ascontiguousarray(b.T)             # (d,N) (d,M)
    found = []
    for columns in map(list, combinations(range(len(sizes)), way)):
        shape = [sizes[j] for j in columns]
        x, y, cells = np.ravel_multi_index(a[columns], shape), np.ravel_multi_index(b[columns], shape), prod(shape)
        if cells > MOST:
            both = np.unique(np.concatenate([x, y]), return_inverse=True)[1]
            x, y, cells = both[:len(x)], both[len(x):], both.max() + 1
        shares = [np.bincount(cell, minlength=cells) / len(cell) for cell in (x, y)]
        found.append(np.abs(shares[0] - shares[1]).sum() / 2)
    return np.array(found)


def distances(real: np.ndarray, synthetic: np.ndarray, sizes: list[int]) -> dict[int, float]:
    """Mean total variation of all 1-, 2- and 3-way marginals; k-way only if there are k columns."""
    return {way: float(total_variation(real, synthetic, sizes, way).mean()) for way in (1, 2, 3) if way <= len(sizes)}


# ---- train on synthetic, test on real


def utility(train: np.ndarray, test: np.ndarray, sizes: list[int], target: int, kinds: list[str]) -> dict:
    """{"logistic" | "boosting": {"accuracy", "auroc"}} of column `target` of test (M,d), from its other columns, by
    classifiers fitted to train (N,d). kinds (d): "category" or "number"; boosting treats them differently.

    AUROC is the mean over classes, each against the rest. A class that is missing in train gets probability 0. If train
    has one class only, nothing is fitted and AUROC is 1/2.
    """
    from sklearn.ensemble import HistGradientBoostingClassifier
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import OneHotEncoder

    rest = [j for j in range(len(sizes)) if j != target]
    categories = [kinds[j] == "category" and sizes[j] <= 255 for j in rest]                 # the limit of boosting
    one_hot = OneHotEncoder(categories=[np.arange(sizes[j]) for j in rest])
    models = {
        "logistic": make_pipeline(one_hot, LogisticRegression(max_iter=1000)),
        # no early stopping: it needs held-out rows of each class, and a synthetic table may have a single row of one
        "boosting": HistGradientBoostingClassifier(categorical_features=categories, early_stopping=False,
                                                   random_state=0),
    }
    found = {}
    for name, model in models.items():
        chance = np.zeros((len(test), sizes[target]))                       # (M, classes)
        classes = np.unique(train[:, target])
        if len(classes) == 1:
            chance[:, classes] = 1.0
        else:
            chance[:, classes] = model.fit(train[:, rest], train[:, target]).predict_proba(test[:, rest])
        found[name] = scores(chance, test[:, target])
    return found


def scores(chance: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    """chance (M, classes), truth (M,) -> accuracy, and AUROC over the classes in truth (NaN if there is one)."""
    from sklearn.metrics import roc_auc_score

    classes = np.unique(truth)
    each = [roc_auc_score(truth == k, chance[:, k]) for k in classes] if len(classes) > 1 else [np.nan]
    return {"accuracy": float((chance.argmax(1) == truth).mean()), "auroc": float(np.mean(each))}


def detector(real: np.ndarray, synthetic: np.ndarray, kinds: list[str], rows: int = 10_000, folds: int = 3) -> float:
    """AUROC of boosting that tells synthetic (M,d) from real rows (N,d): each row's score is from a model that was
    fitted without it (cross-validation). Of each kind the same number of rows is drawn at random, at most `rows`.

    1/2 is ideal; copies of real rows may reach less, because a row and its copy can be in different folds."""
    from sklearn.ensemble import HistGradientBoostingClassifier
    from sklearn.metrics import roc_auc_score
    from sklearn.model_selection import StratifiedKFold, cross_val_predict

    rng, n = np.random.default_rng(0), min(rows, len(real), len(synthetic))
    both = np.concatenate([table[rng.choice(len(table), n, replace=False)] for table in (real, synthetic)])
    label = np.repeat([0, 1], n)
    categories = [kind == "category" and int(x.max()) < 255 for kind, x in zip(kinds, both.T)]
    model = HistGradientBoostingClassifier(categorical_features=categories, early_stopping=False, random_state=0)
    split = StratifiedKFold(folds, shuffle=True, random_state=0)
    scores_of = cross_val_predict(model, both, label, cv=split, method="predict_proba")[:, 1]
    return float(roc_auc_score(label, scores_of))


# ---- independent columns


def independent(codes: np.ndarray, sizes: list[int], rows: int, rng: np.random.Generator,
                sigma: float = 0.0) -> np.ndarray:
    """A table (rows,d) of independent columns with the 1-way marginals of codes (N,d).

    sigma > 0 adds Gaussian noise of this deviation to each count, and clips negative counts to 0. Adding or removing a
    row changes one count of each column by one, and all counts by sqrt(d) in L2. So this is the Gaussian mechanism with
    noise multiplier sigma / sqrt(d), and rho = d / (2 sigma^2) in zCDP.
    """
    sampled = []
    for j, size in enumerate(sizes):
        counts = np.bincount(codes[:, j], minlength=size) + sigma * rng.normal(size=size)
        counts = np.maximum(counts, 0)
        share = counts / counts.sum() if counts.any() else np.full(size, 1 / size)
        sampled.append(rng.choice(size, size=rows, p=share))
    return np.stack(sampled, axis=1)


# ---- planted tables


def parity_table(rows: int, d: int, rng: np.random.Generator) -> np.ndarray:
    """Bits (rows,d) with an even sum, uniform among all such rows."""
    bits = rng.integers(2, size=(rows, d))
    bits[:, -1] = bits[:, :-1].sum(1) % 2
    return bits


def satisfied(codes: np.ndarray) -> float:
    """Share of rows (N,d) with an even sum."""
    return float((codes.sum(1) % 2 == 0).mean())


def xor_chain(rows: int, links: int, rng: np.random.Generator, flips: float = 0.05) -> np.ndarray:
    """Bits (rows, 2 links + 1): a coin, and then for each link a coin b and the bit a' = a xor b, flipped with
    probability `flips`. Every pair of columns is uniform; each a, b, a' in sequence is not."""
    columns = [rng.integers(2, size=rows)]
    for _ in range(links):
        coin = rng.integers(2, size=rows)
        columns += [coin, columns[-1] ^ coin ^ (rng.random(rows) < flips)]
    return np.stack(columns, axis=1)


def product_mixture(rows: int, d: int, rng: np.random.Generator, classes: int = 4, size: int = 4) -> np.ndarray:
    """Codes (rows,d) below `size`: given a hidden class, one of `classes`, all columns are independent, each with
    shares of its own, from Dirichlet(1/2). So every pair of columns is dependent, and no tree of pairs suffices."""
    shares = rng.dirichlet(np.full(size, 0.5), size=(classes, d))           # (classes, d, size)
    hidden = rng.integers(classes, size=rows)
    up_to = shares.cumsum(-1)[hidden, :, :-1]                               # (rows, d, size-1)
    return (rng.random((rows, d, 1)) >= up_to).sum(-1)
