"""How the privacy budget of a table is used: by public facts only, which are the number of rows N, the legal values of
each column, epsilon and delta. No function here gets a row.

All releases are Gaussian mechanisms. 1 / sigma^2 of several of them adds up, so a budget is divided by giving shares of
1 / sigma^2. Let sigma be the noise multiplier of one release that spends everything. A share f for m counts or tables
with L2 sensitivity sqrt(m) gives each cell the deviation

    s = sigma sqrt(m / f)

Total variation between a table and its noisy version is about 0.4 k s / N for k cells (a half of E|normal| = 0.8), and
between two samples of N rows 0.4 sqrt(k / N) or so. Four rules follow.

    need        A marginal needs no more precision than half of the sampling error: s <= sqrt(N / k) / 2. All columns,
                and all pairs, then need the share 4 sigma^2 K / N, where K is the sum of their cells. The scores that
                select sets of columns need a deviation of N / 100: 1 % of the rows. Where the budget is too small for
                all of these, it is divided as MOST says
    pairs       They are measured only if a tree of d - 1 pairs, all with the mean number of cells, has noise below
                WORTH in total variation. (A pair of real columns is 0.05 to 0.15 from independence. Chosen pairs are
                those with less noise and more dependence; on parts of the development tables, measuring them began to
                pay between 0.3 and 0.6.)
    larger      Sets of 3 columns and more are scored in a second round, which then has the share LATER of the tables'
                budget: all sets of up to w columns, for the largest w for which the scores need at most MOST[1] and are
                at most SETS. Without such a w there is one round
    steps       DP-SGD gets what the marginals do not need. T steps with share f have, in full batches, a noise of norm
                sigma sqrt(T P / f) / N in clip norms, for P parameters. T is the largest number that keeps this below
                NOISE, up to LONGEST and WORK. Fewer than LEAST steps are none: the marginals then get everything
"""

import math
from dataclasses import dataclass
from itertools import combinations

from mixdpo.config import SEEDS, InputError, check_choices, check_ranges
from mixdpo.private.accountant import noise_multiplier

ORDERS = ("given", "entropy", "random")
MOST = (0.1, 0.1, 0.8)      # largest shares of columns, scores and pairs, where they need more than there is
WORTH = 0.3                 # total variation
NOISE = 0.1                 # norm of a step's noise, in clip norms
LEAST = 20                  # steps
ALONE = 200                 # steps, at least, of DP-SGD without marginals
WORK = 1e7                  # values of rows that all steps see, at most
LONGEST = 3000              # steps, at most
SETS = 1000                 # sets of columns that are scored, at most
LATER = 0.25                # share of the tables' budget for the second round
THIN = 100                  # rows in a cell of sets of 4 columns or more, at least, on average; 1 for smaller ones


@dataclass(frozen=True)
class TableConfig:
    """Options for training on a table."""

    epsilon: float = 1.0            # privacy budget epsilon; inf: no noise and no privacy
    delta: float = 1e-5             # privacy budget delta; below 1 / number of rows
    first_look: float = -1.0        # share of the budget for noisy marginals, 0 to 1; 0: DP-SGD alone; -1: by rule
    order: str = "given"            # order of the columns: given, entropy (highest first), random
    width: int = 64                 # width of the hidden states
    layers: int = 1                 # transformer blocks
    heads: int = 4                  # attention heads
    pretrain: int = 300             # Adam steps on rows sampled from the noisy marginals; they cost no privacy
    batch: int = 4096               # expected number of rows in a step
    steps: int = 0                  # Adam steps on the table, by DP-SGD; 0: by rule, which may be none
    lr: float = 1e-2                # peak learning rate
    clip: float = 1.0               # largest norm of a row's gradient
    micro: int = 2048               # rows in a forward pass
    seed: int = 0                   # seed of initial weights and of a random order
    examples: int = 0               # number of rows, declared public; 0: the table's own number, which is then public
    save_minutes: float = 5.0       # minutes between checkpoints


def validate(config: TableConfig) -> None:
    """Raises: InputError on values out of range."""
    check_choices(config, {"order": ORDERS})
    sizes = dict.fromkeys(("width", "layers", "heads", "batch", "micro"), "[1, inf)")
    check_ranges(config, sizes | dict.fromkeys(("pretrain", "steps", "examples"), "[0, inf)") | {
        "epsilon": "(0, inf]", "delta": "[1e-11, 1)", "first_look": "[-1, 1]", "lr": "(0, inf)", "clip": "(0, inf)",
        "seed": SEEDS, "save_minutes": "[0, inf]"})
    if -1 < config.first_look < 0:
        raise InputError(f"got {config.first_look}, wanted 0 to 1, or -1 for the rule", option="first_look")
    if config.first_look == 1 and config.steps:
        raise InputError("got 1, which leaves no budget for --steps; lower it, or leave out --steps",
                         option="first_look")
    if config.order == "entropy" and not config.first_look:
        raise InputError("entropy is computed from noisy counts, which need --first-look above 0; set it, or choose "
                         "another order", option="order")
    if config.width % config.heads:
        raise InputError(f"got {config.width}, wanted a multiple of --heads {config.heads}", option="width")


@dataclass(frozen=True)
class Plan:
    """Shares of the budget, 1 / sigma^2, for noisy counts of columns, scores and tables of pairs. DP-SGD has the rest.
    """

    sigma: float            # noise multiplier of one release that spends everything; 0: no privacy
    ones: float
    scores: float           # 0: no pairs
    pairs: float
    way: int                # columns in the largest sets that are scored
    steps: int
    batch: int              # expected number of rows in a step
    why: str                # in words

    @property
    def rounds(self) -> list[tuple[int, float]]:
        """For each round of tables: the number of columns in the largest sets, and the share of the budget."""
        parts = [(2, 1 - LATER), (self.way, LATER)] if self.way > 2 else [(2, 1.0)]
        return [(way, part * self.pairs) for way, part in parts if self.pairs]

    def deviation(self, share: float, count: int) -> float:
        """Standard deviation of the noise on the cells of `count` marginals that have a share of the budget."""
        return self.sigma * math.sqrt(count / share) if self.sigma else 0.0


def plan_of(rows: int, sizes: list[int], config: TableConfig) -> Plan:
    """The plan for a table with so many rows, and sizes[j] legal values in column j."""
    d, columns = len(sizes), sum(sizes)
    cells = (columns**2 - sum(n * n for n in sizes)) // 2                   # of all pairs
    sigma = noise_multiplier(config.epsilon, config.delta, 1.0, 1) * (1 + 1e-6)     # more than the rounding of shares
    tree = 0.4 * cells / max(math.comb(d, 2), 1) * sigma * math.sqrt((d - 1) / MOST[2]) / rows
    measured = d > 1 and tree < WORTH
    score = (100 * sigma / rows) ** 2                                       # what one score needs
    way, count = largest(rows, sizes, MOST[1] / score if sigma else math.inf)
    need = [4 * sigma**2 * columns / rows, count * score, 4 * sigma**2 * cells / rows]
    need = [max(n, 1e-3) for n in need] if measured else [max(need[0], 1e-3), 0.0, 0.0]
    shares = need
    if sum(need) >= 1:                                                      # nothing is left for DP-SGD
        most = [min(n, part) for n, part in zip(need, MOST if measured else (1.0, 0.0, 0.0))]
        shares = [share / sum(most) for share in most]
    if config.first_look >= 0:
        shares = [config.first_look * share / sum(shares) for share in shares]
    parameters = 12 * config.layers * config.width**2 + (2 * columns + d) * config.width
    batch = min(config.batch, rows)
    steps = longest = min(LONGEST, max(LEAST, int(WORK / (batch * d))))
    if sigma:
        steps = min(longest, int(max(1 - sum(shares), 0) * (NOISE * rows / sigma) ** 2 / parameters))
    if config.steps or 0 <= config.first_look < 1:                          # a share that was asked for is kept
        steps = config.steps or max(steps, LEAST if config.first_look else ALONE)
    elif steps < LEAST or config.first_look == 1:
        steps = 0
    if not steps or config.steps and sum(shares) >= 0.6 and config.first_look < 0:
        total = 0.6 if steps else 1.0                                       # steps that were asked for get 0.4
        shares = [total * share / sum(shares) for share in shares]
    ones, scores, pairs = shares
    why = reasons(rows, sizes, shares, way, steps, tree, config)
    return Plan(sigma, ones, scores, pairs, way, steps, batch, why)


def sets_of(rows: int, sizes: list[int], way: int) -> list[tuple[int, ...]]:
    """All sets of 2 to `way` columns that have enough rows in a cell, on average (THIN)."""
    return [columns for k in range(2, way + 1) for columns in combinations(range(len(sizes)), k)
            if math.prod(sizes[j] for j in columns) * (THIN if k > 3 else 1) <= rows]


def largest(rows: int, sizes: list[int], most: float) -> tuple[int, int]:
    """-> the way of the last round, and the number of scores of all rounds, which is at most `most` and SETS if way is
    above 2."""
    pairs = len(sets_of(rows, sizes, 2))
    way, count = 2, pairs
    for k in range(3, len(sizes) + 1):
        if math.comb(len(sizes), k) > 10 * SETS or (more := len(sets_of(rows, sizes, k))) + pairs > min(most, SETS):
            break
        if more + pairs > count and more > pairs:
            way, count = k, more + pairs
    return way, count


def reasons(rows: int, sizes: list[int], shares: list[float], way: int, steps: int, tree: float,
            config: TableConfig) -> str:
    """The plan in words."""
    ones, scores, pairs = shares
    left = max(1 - sum(shares), 0)
    found = (f"{scores + pairs:.0%} for noisy tables of the pairs that depend most" +
             (f", then of sets of up to {way} columns" if way > 2 else "") if pairs else "not measured")
    return "\n".join([
        f"plan for {rows:,} rows and {len(sizes)} columns at epsilon {config.epsilon:g}, in shares of the budget:",
        f"  columns: {ones:.0%} for noisy counts of their values",
        f"  pairs of columns: {found}; their noise would be {tree:.3f} in total variation, of at most {WORTH}",
        f"  DP-SGD: {left:.0%} for {steps} steps" if steps else
        f"  DP-SGD: no steps; what is left is too little for {LEAST} steps with a noise below {NOISE} clip norms"])
