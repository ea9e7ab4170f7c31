"""Statistics of results: standard errors, and how well experts match the annotators.

    standard error      of a mean over clusters. Pairs on one prompt share texts and even judgements, so they are not
                        independent: their residuals are summed within the prompt first (Liang & Zeger 1986, with the
                        factor C / (C - 1)). If a figure uses each user's own weights, the pairs of a user are not
                        independent either. The variance is then two-way, V_prompts + V_users - V_both (Cameron, Gelbach
                        & Miller 2011), and at least the larger one-way variance
    ARI                 adjusted Rand index (Hubert & Arabie 1985): 1 for the same partition, 0 on average by chance
    matched accuracy    share of units assigned correctly under the best one-to-one naming of experts
    Bayes posterior     the best possible assignment, from the annotators' own scores
"""

import math
from collections import Counter

import torch

NONE = "–"      # a cell without a number


def one_way_variance(influence: torch.Tensor, cluster: list | None) -> float:
    """Variance of a sum of centred terms (N,). Terms with equal entries in `cluster` (N) may be dependent; None means
    that all terms are independent. NaN for a single cluster."""
    if cluster is None:
        return variance_of_sum(influence)
    place = {name: n for n, name in enumerate(dict.fromkeys(cluster))}
    index = torch.tensor([place[name] for name in cluster])
    return variance_of_sum(influence.new_zeros(len(place)).index_add(0, index, influence))


def variance_of_sum(sums: torch.Tensor, means: int = 1) -> float:
    """Variance of the sum of C independent terms (C,), each the centred sum of a cluster; NaN for a single one. means:
    how many means were subtracted, one from each group of clusters."""
    C = len(sums)
    return C / (C - means) * float(sums.square().sum()) if C > means else math.nan


def clustered_se(influence: torch.Tensor, *clusters: list) -> float:
    """Standard error of a sum of centred terms (N,). clusters: no list if the terms are independent, or one or two
    lists of N names. NaN if a list has only one name.

    The two-way variance V_1 + V_2 - V_both can by chance be smaller than V_1 or V_2, even negative. Its expectation is
    not, unless the terms of a cluster are negatively correlated. So the larger one-way variance is used as the lower
    limit, which makes the error too large rather than too small.
    """
    if len(clusters) < 2:
        return math.sqrt(one_way_variance(influence, *(clusters or [None])))
    first, second = (one_way_variance(influence, cluster) for cluster in clusters)
    return two_way_se(first, second, one_way_variance(influence, list(zip(*clusters, strict=True))))


def two_way_se(first: float, second: float, both: float) -> float:
    """sqrt(V_1 + V_2 - V_both), and at least each way's own."""
    return math.sqrt(max(first + second - both, first, second))             # NaN in front of max stays NaN


def grid_se(influence: torch.Tensor, groups: int = 1) -> float:
    """`clustered_se` by row and by column of a table of centred terms (A,B), with one term in each cell. groups: of
    rows, each centred on its own mean."""
    of_rows = variance_of_sum(influence.sum(1), groups)
    return two_way_se(of_rows, *map(variance_of_sum, (influence.sum(0), influence.flatten())))


def mean_se(values, *clusters: list) -> dict:
    """Mean and standard error: (N,) -> {"mean", "se", "n"}. clusters: no list, or one or two lists of N names, for
    example the prompts and the users (clustered_se)."""
    values = torch.as_tensor(values, dtype=torch.float64)
    mean = values.mean()
    return {"mean": mean.item(), "se": clustered_se((values - mean) / len(values), *clusters), "n": len(values)}


def difference_se(values, first: torch.Tensor, *clusters: list) -> dict:
    """Mean of the values where `first` (N,) bool is true minus the mean of the others, and its standard error. A
    cluster may have values in both groups: its contributions to both means are then added before squaring."""
    values = torch.as_tensor(values, dtype=torch.float64)
    a, b = values[first].mean(), values[~first].mean()
    influence = torch.where(first, (values - a) / first.sum(), (b - values) / (~first).sum())
    return {"mean": (a - b).item(), "se": clustered_se(influence, *clusters)}


def contingency(found: list, truth: list) -> torch.Tensor:
    """Counts (I,J) int64 of units with found label i and true label j. Raises: ValueError if the lengths differ."""
    rows, columns = sorted(set(found)), sorted(set(truth))
    table = torch.zeros(len(rows), len(columns), dtype=torch.int64)
    for f, t in zip(found, truth, strict=True):
        table[rows.index(f), columns.index(t)] += 1
    return table


def adjusted_rand_index(found: list, truth: list) -> float:
    """ARI of two labellings of the same units; 1 if both are trivial (one class, or all singletons)."""
    table = contingency(found, truth)

    def pairs(counts: torch.Tensor) -> float:
        return (counts * (counts - 1) // 2).sum().item()

    together, a, b, all_pairs = pairs(table), pairs(table.sum(1)), pairs(table.sum(0)), math.comb(len(found), 2)
    expected, largest = a * b / max(all_pairs, 1), (a + b) / 2
    return 1.0 if largest == expected else (together - expected) / (largest - expected)


def best_assignment(value: list[list[int]]) -> list[int]:
    """A different column for each row, so that the sum of the values is largest: R rows, C >= R columns, O(R^2 C).

    The Hungarian algorithm (Kuhn 1955) with potentials u and v. Rows are added one at a time, each along a shortest
    augmenting path in the reduced costs -value - u - v >= 0. Row and column 0 are sentinels.
    """
    R, C = len(value), len(value[0])
    u: list[float] = [0] * (R + 1)          # integers, as the values are; only `slack` starts at infinity
    v: list[float] = [0] * (C + 1)
    row_of, before = [0] * (C + 1), [0] * (C + 1)
    for row in range(1, R + 1):
        row_of[0], at, done, slack = row, 0, {0}, [math.inf] * (C + 1)
        while row_of[at]:                                                   # until the path ends at a free column
            r = row_of[at]
            for c in set(range(1, C + 1)) - done:
                if (reduced := -value[r - 1][c - 1] - u[r] - v[c]) < slack[c]:
                    slack[c], before[c] = reduced, at
            at = min((c for c in range(1, C + 1) if c not in done), key=slack.__getitem__)
            step = slack[at]
            for c in range(C + 1):
                if c in done:
                    u[row_of[c]], v[c] = u[row_of[c]] + step, v[c] - step
                else:
                    slack[c] -= step
            done.add(at)
        while at:                                                           # reverse the path
            row_of[at], at = row_of[before[at]], before[at]
    return [row_of.index(row, 1) - 1 for row in range(1, R + 1)]


def matched_accuracy(found: list[int], truth: list, experts: int) -> tuple[float, dict[int, object]]:
    """Share of units assigned correctly under the best one-to-one naming of experts, and that naming
    {expert: true label or None}. An expert without a label has None. If several namings are equally good, the one that
    names the first experts is taken."""
    kinds, counts = sorted(set(truth)), Counter(zip(found, truth))
    columns = max(experts, len(kinds))                                      # columns beyond the kinds: None
    value = [[counts[k, kinds[a]] * experts**2 + experts - k if a < len(kinds) else 0 for a in range(columns)]
             for k in range(experts)]                                       # the second term only breaks ties
    naming = {k: kinds[a] if a < len(kinds) else None for k, a in enumerate(best_assignment(value))}
    return sum(counts[pair] for pair in naming.items()) / len(truth), naming


def bayes_posterior(units: list[list[dict]], annotators: list[str]) -> torch.Tensor:
    """Posterior over annotators of each unit, from the annotators' own scores: the best that an assignment can do.
    (G,A) float64.

    units: for each group the scores {annotator: [chosen, rejected]} of its pairs. The model: an annotator chooses the
    response with the higher score, and each of two equal ones with probability 1/2; the prior is uniform. How the pairs
    of an annotator were selected is not used; with three types it would add a little information. If no annotator can
    have made the choices, because labels are noisy, the posterior is uniform.
    """
    rows = []
    for unit in units:
        log_lik = torch.zeros(len(annotators), dtype=torch.float64)
        for scores in unit:
            chosen = [(1 + (scores[a][0] > scores[a][1]) - (scores[a][0] < scores[a][1])) / 2 for a in annotators]
            log_lik += torch.tensor(chosen, dtype=torch.float64).log()
        possible = log_lik.max() > -torch.inf
        rows.append(torch.softmax(log_lik, 0) if possible else torch.full_like(log_lik, 1 / len(annotators)))
    return torch.stack(rows)


# --- figures as text --------------------------------------------------------------------------------------------------


def pm(figure: dict, digits: int = 3, sign: str = "") -> str:
    """mean ± standard error; the mean alone if there is no standard error, "–" if there is no mean."""
    if not math.isfinite(figure["mean"]):
        return NONE
    mean = f"{figure['mean']:{sign}.{digits}f}"
    return f"{mean} ± {figure['se']:.{digits}f}" if math.isfinite(figure["se"]) else mean


def evidence(difference: dict) -> str:
    """A difference over its standard error, in words."""
    if not difference["se"] > 0:
        return "no standard error"
    ratio = abs(difference["mean"]) / difference["se"]
    return f"{ratio:.1f} standard errors" + ("" if ratio >= 2 else ": this may be chance")
