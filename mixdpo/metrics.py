"""What to look at while a mixture trains, and how to say whether it found anything.

    bound               ELBO of each visit of a step, its mean in nats (M6, M11): what EM maximises. A visit is a pair,
                        or with one latent a user all of a user's pairs; parameters before the update, the q in use
    effective experts   exp(entropy of the mean responsibilities): K when all are used alike, 1 when one does all
    information         I(z; x) = entropy of the mean weights less the mean entropy of the weights: what the gate knows
    alarms              posterior collapse: q = w in every batch, nothing is learnt about who judged;
                        expert collapse: gate or responsibilities on one expert, the others starve
    ELBO gap            log p - ELBO(q) = KL(q || posterior) >= 0 for the q in use; 0 right after an exact E-step
    ARI                 adjusted Rand index (Hubert & Arabie 1985): 1 for the same partition, 0 on average by chance
    matched accuracy    share assigned rightly under the best one-to-one naming of experts
    standard errors     of means over clusters: pairs on one prompt share texts and even judgements, so they are not
                        independent; residuals are summed within a prompt first (Liang & Zeger 1986, with C / (C - 1)).
                        Where a figure uses each user's own weights, a user's pairs are not independent either: two-way,
                        V = V_prompts + V_users - V_both (Cameron, Gelbach & Miller 2011), and never less than either
                        one-way variance
"""

import math
from collections import Counter

import torch

from mixdpo.dpo import accuracy, mixture_accuracy
from mixdpo.mixture import balance, elbo, entropy, expert_loss, gate_loss, log_marginal


def effective_experts(log_q: torch.Tensor) -> float:
    """exp of the entropy of the mean responsibilities: (N,K) -> number in 1..K."""
    return math.exp(entropy(log_q.exp().mean(0).log()))


@torch.no_grad()
def step_summary(log_q: torch.Tensor, log_w: torch.Tensor, h: torch.Tensor) -> dict:
    """A step's figures from its trained pairs: log_q (B,K) as the M-step used it, log_w (B,K) the gate's,
    h (B,K) before the update.

    loss is M8 a pair; log_marginal M5 a pair, one type a pair, whatever the latent unit; elbo is for the q in use.
    """
    log_p = log_marginal(log_w, h)
    return {
        "loss": expert_loss(log_q, h).mean().item(),
        "log_marginal": log_p.mean().item(),
        "elbo": elbo(log_q, log_w, h).mean().item(),
        "accuracy": accuracy(h).mean(0).tolist(),                           # of each expert on all pairs of the step
        "accuracy_mbt": mixture_accuracy(log_p).mean().item(),              # of the mixture of Bradley-Terry: p > 1/2
        "margin": h.mean(0).tolist(),
        "q": log_q.exp().mean(0).tolist(),
        "q_entropy": entropy(log_q).mean().item(),
        "q_gain": gate_loss(log_q, log_w).mean().item(),                    # KL(q || w): what the pairs tell of z
        "effective_experts": effective_experts(log_q),
        "w": log_w.exp().mean(0).tolist(),
        "gate_entropy": entropy(log_w).mean().item(),                       # of a pair's weights, on average
        "gate_information": balance(log_w).item() - entropy(log_w).mean().item(),          # I(z; x): what x tells of z
    }


WINDOW = 20     # steps that an alarm looks back


def alarms(metrics, experts: int, start_steps: int, window: int = WINDOW) -> dict[str, str]:
    """Name -> what is wrong and what to do, from the last `window` steps behind the start's; none while they are fewer.
    Steps without pairs, which DP-SGD's sampling may draw, have no figures and do not count.

    Posterior collapse: responsibilities move from the weights by less than a hundredth of ln K, these are no sharper
    than half of it. Expert collapse: one expert has over 0.95 of all weight, or of all responsibilities.
    """
    recent = [step for step in metrics if step["step"] > start_steps and step.get("pairs", 1)][-window:]
    if experts == 1 or len(recent) < window:
        return {}

    def share(key) -> float:
        return sum(key(step) for step in recent) / window / math.log(experts)

    found = {}
    if share(lambda step: step["q_gain"]) < 0.01 and share(lambda step: step["gate_entropy"]) > 0.5:
        found["posterior collapse"] = (
            f"responsibilities have stayed at the prior for {window} steps: the experts say the same of every pair. "
            "Raise --beta or the learning rates if margins are small, start with --start linear, and check that the "
            "data hold distinct tastes at all (one type a user tells more than one a pair)")
    if max(sum(step[what][k] for step in recent) / window for what in ("w", "q") for k in range(experts)) > 0.95:
        found["expert collapse"] = (
            f"one expert has had nearly all weight for {window} steps, and the others learn nothing. Raise "
            "--gate-entropy or --gate-balance, begin with --gate-temperature above 1, or lower --gate-lr")
    return found


def one_way_variance(influence: torch.Tensor, cluster: list | None) -> float:
    """Variance of a sum of centred terms (N,), of which those with equal entries in `cluster` (N) depend on each other;
    None: all independent. NaN for a single cluster."""
    if cluster is None:
        sums = influence
    else:
        place = {name: n for n, name in enumerate(dict.fromkeys(cluster))}
        index = torch.tensor([place[name] for name in cluster])
        sums = influence.new_zeros(len(place)).index_add(0, index, influence)               # (C,)
    C = len(sums)
    return C / (C - 1) * float(sums.square().sum()) if C > 1 else math.nan


def clustered_se(influence: torch.Tensor, *clusters: list) -> float:
    """Standard error of a sum of centred terms (N,): independent ones, or clustered in one or two ways, a list of N
    names each. NaN where a way has a single cluster.

    Two-way, the difference V_1 + V_2 - V_both may fall below V_1 or V_2 by chance, even below 0. In expectation it does
    not unless terms of one cluster are negatively correlated, so the larger one-way variance is the floor: it errs on
    the side of a larger error.
    """
    if len(clusters) < 2:
        return math.sqrt(one_way_variance(influence, *(clusters or [None])))
    first, second = (one_way_variance(influence, cluster) for cluster in clusters)
    both = one_way_variance(influence, list(zip(*clusters, strict=True)))
    return math.sqrt(max(first + second - both, first, second))             # NaN in front of max stays NaN


def mean_se(values, *clusters: list) -> dict:
    """Mean and its standard error: (N,) -> {"mean", "se", "n"}. clusters: none, or one or two lists of N, say the
    prompts and the users (clustered_se)."""
    values = torch.as_tensor(values, dtype=torch.float64)
    mean = values.mean()
    return {"mean": mean.item(), "se": clustered_se((values - mean) / len(values), *clusters), "n": len(values)}


def difference_se(values, first: torch.Tensor, *clusters: list) -> dict:
    """Mean of the values where `first` (N,) bool, less that of the others, and its standard error. A cluster may lie
    on both sides: what it adds to both means is then counted as one."""
    values = torch.as_tensor(values, dtype=torch.float64)
    a, b = values[first].mean(), values[~first].mean()
    influence = torch.where(first, (values - a) / first.sum(), (b - values) / (~first).sum())
    return {"mean": (a - b).item(), "se": clustered_se(influence, *clusters)}


def contingency(found: list, truth: list) -> torch.Tensor:
    """Counts n_ij of units with found label i and true label j."""
    rows, columns = sorted(set(found)), sorted(set(truth))
    table = torch.zeros(len(rows), len(columns), dtype=torch.int64)
    for f, t in zip(found, truth, strict=True):
        table[rows.index(f), columns.index(t)] += 1
    return table


def adjusted_rand_index(found: list, truth: list) -> float:
    """ARI of two labellings of the same units. Both trivial (one class, or all singletons): 1."""
    table = contingency(found, truth)

    def pairs(counts: torch.Tensor) -> float:
        return (counts * (counts - 1) // 2).sum().item()

    together, a, b, all_pairs = pairs(table), pairs(table.sum(1)), pairs(table.sum(0)), math.comb(len(found), 2)
    expected, largest = a * b / max(all_pairs, 1), (a + b) / 2
    return 1.0 if largest == expected else (together - expected) / (largest - expected)


def best_assignment(value: list[list[int]]) -> list[int]:
    """The column of each row, all different, whose values have the largest sum: R rows, C >= R columns, O(R^2 C).
    The Hungarian algorithm (Kuhn 1955) with potentials: rows are added one by one, each by a shortest augmenting path
    in the reduced costs -value - u - v >= 0. Row and column 0 are sentinels."""
    R, C = len(value), len(value[0])
    u, v, row_of, before = [0] * (R + 1), [0] * (C + 1), [0] * (C + 1), [0] * (C + 1)
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
        while at:                                                           # turn the path round
            row_of[at], at = row_of[before[at]], before[at]
    return [row_of.index(row, 1) - 1 for row in range(1, R + 1)]


def matched_accuracy(found: list[int], truth: list, experts: int) -> tuple[float, dict[int, object]]:
    """Share of units assigned rightly under the best one-to-one naming of experts,
    and that naming {expert: true label}; None: the expert stands for nobody. Of equal namings of more experts than
    labels, the one that names the first experts."""
    kinds, counts = sorted(set(truth)), Counter(zip(found, truth))
    columns = max(experts, len(kinds))                                      # those beyond the kinds: None
    value = [[counts[k, kinds[a]] * experts**2 + experts - k if a < len(kinds) else 0 for a in range(columns)]
             for k in range(experts)]                                       # the second term only decides ties
    naming = {k: kinds[a] if a < len(kinds) else None for k, a in enumerate(best_assignment(value))}
    return sum(counts[pair] for pair in naming.items()) / len(truth), naming


def bayes_posterior(units: list[list[dict]], annotators: list[str]) -> torch.Tensor:
    """Posterior over annotators of each unit, from the annotators' own scores:
    what assignment could reach at best. (G,A) float64.

    units: for each group the scores {annotator: [chosen, rejected]} of its pairs.
    An annotator chooses the higher score, and either of two equal ones with probability one half; the prior is uniform.
    That a pair was shown to its judge at all is not used: with three types it would tell a little more.
    If no annotator can have made the choices (labels are noisy), the posterior is uniform.
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
