"""What to look at while a mixture trains, and how to say whether it found anything.

    effective experts   exp(entropy of the mean responsibilities): K when all are used alike, 1 when one does all
    information         I(z; x) = entropy of the mean weights less the mean entropy of the weights: what the gate knows
    alarms              posterior collapse: q = w in every batch, nothing is learnt about who judged;
                        expert collapse: gate or responsibilities on one expert, the others starve
    ELBO gap            log p - ELBO(q) = KL(q || posterior) >= 0 for the q in use; 0 right after an exact E-step
    ARI                 adjusted Rand index (Hubert & Arabie 1985): 1 for the same partition, 0 on average by chance
    matched accuracy    share assigned rightly under the best one-to-one naming of experts
    standard errors     of means over clusters: pairs on one prompt share texts and even judgements, so they are not
                        independent; residuals are summed within a prompt first (Liang & Zeger 1986, with C / (C - 1))
"""

import math
from collections import Counter

import torch

from mixdpo.dpo import accuracy
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
        "accuracy_mbt": accuracy(log_p + math.log(2)).mean().item(),        # of the mixture of Bradley-Terry: p > 1/2
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

    Posterior collapse: responsibilities move from the weights by less than a hundredth of ln K, these are no sharper
    than half of it. Expert collapse: one expert has over 0.95 of all weight, or of all responsibilities.
    """
    recent = [step for step in metrics if step["step"] > start_steps][-window:]
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


def clustered_se(influence: torch.Tensor, cluster: list | None) -> float:
    """Standard error of a sum of centred terms (N,), of which those with equal entries in `cluster` (N) depend on each
    other; NaN for a single cluster."""
    if cluster is None:
        sums = influence
    else:
        place = {name: n for n, name in enumerate(dict.fromkeys(cluster))}
        index = torch.tensor([place[name] for name in cluster])
        sums = influence.new_zeros(len(place)).index_add(0, index, influence)               # (C,)
    C = len(sums)
    return math.sqrt(C / (C - 1) * float(sums.square().sum())) if C > 1 else math.nan


def mean_se(values, cluster: list | None = None) -> dict:
    """Mean and its standard error: (N,) -> {"mean", "se", "n"}. cluster (N): say, its prompt; None: all apart."""
    values = torch.as_tensor(values, dtype=torch.float64)
    mean = values.mean()
    return {"mean": mean.item(), "se": clustered_se((values - mean) / len(values), cluster), "n": len(values)}


def difference_se(values, first: torch.Tensor, cluster: list | None = None) -> dict:
    """Mean of the values where `first` (N,) bool, less that of the others, and its standard error. A cluster may lie
    on both sides: what it adds to both means is then counted as one."""
    values = torch.as_tensor(values, dtype=torch.float64)
    a, b = values[first].mean(), values[~first].mean()
    influence = torch.where(first, (values - a) / first.sum(), (b - values) / (~first).sum())
    return {"mean": (a - b).item(), "se": clustered_se(influence, cluster)}


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


def matched_accuracy(found: list[int], truth: list, experts: int) -> tuple[float, dict[int, object]]:
    """Share of units assigned rightly under the best one-to-one naming of experts,
    and that naming {expert: true label}; None: the expert stands for nobody."""
    kinds = sorted(set(truth))
    counts = Counter(zip(found, truth))
    best = {0: (0, ())}                     # the kinds taken, as bits: most units named rightly so far, and the naming
    for k in range(experts):
        after = {}
        for taken, (right, naming) in best.items():
            for a in (*(a for a in range(len(kinds)) if not taken >> a & 1), None):
                key = taken if a is None else taken | 1 << a
                option = (right + (0 if a is None else counts[k, kinds[a]]), (*naming, None if a is None else kinds[a]))
                if key not in after or option[0] > after[key][0]:
                    after[key] = option
        best = after
    right, naming = max(best.values(), key=lambda option: (option[0], sum(name is not None for name in option[1])))
    return right / len(truth), dict(enumerate(naming))


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
