"""A privacy audit with canaries: an empirical lower bound on epsilon, to compare with the accountant's upper bound.

One-run auditing (Steinke, Nasr & Jagielski 2023, arXiv 2305.08846): m canaries are examples made for the audit. A fair
coin decides whether each is in the training file. The auditor observes one private run and guesses the coins of
the r most certain canaries; v guesses are right. If the run is (epsilon, delta)-DP,

    P(V >= v) <= P(W >= v) + 2 m delta max_i P(v > W >= v - i) / i,     W ~ Binomial(r, e^epsilon / (1 + e^epsilon))

    epsilon_lower   the largest epsilon rejected at 95 % confidence. It assumes nothing about the mechanism.
    epsilon_fit     the same with a parametric test (Nasr et al. 2023, arXiv 2302.07956): a sampled Gaussian mechanism
                    with unknown noise, and independent canaries. Nearly tight, but only as good as these assumptions.

The auditor sees the noisy gradient of every step and knows the gradient of every canary. This is the adversary that
the accountant assumes. Runs are those of train.run, or ClippedSum, Noise and participants with gradients that the
adversary chooses. Several runs, each with separate coins, count as one: a coin affects its own run only.
The learning rate is 1e-9: the parameters stay in place, so a canary has the same gradient in every step and the auditor
computes it once. A guarantee for every learning rate holds for this one too.

Many runs with and without one canary (Jagielski et al. 2020, arXiv 2006.07709) would give a higher epsilon_lower; at
half a second a run, 10,000 of them take more than an hour. Left out: DP-TBART, and attacks on the final weights, which
have less information.
"""

import contextlib
import json
import math
from dataclasses import replace
from unittest.mock import patch

import numpy as np
import torch
from scipy.stats import beta, binom

import train
from data.experiment.stages import write_lines
from data.report.pictures import curves
from data.studies.aggregate import table_of
from data.studies.study import Study
from data.studies.worlds import make_model
from mixdpo.private import budget
from mixdpo.private import dp_sgd as privacy
from mixdpo.private.accountant import SEARCH, Mechanism, both_ways, epsilon_of, noise_multiplier
from mixdpo.private.dp_sgd import ClippedSum, Noise
from mixdpo.private.keys import Key

DELTA = 1e-6            # small, since the theorem adds 2 m delta times a probability to each p-value
ERROR = 0.05            # 1 - confidence, of either bound
SHARES = (0.02, 0.1, 0.4)                           # of the canaries: how many are guessed to be in, and to be out
CUTS = (0.05, 0.2, 0.5)                             # share of the canaries above the threshold of epsilon_fit's tests
LEAST_SIGMA, MOST_SIGMA = 0.25, 64.0                # noise multipliers of epsilon_fit: it ends at the least one
RIDGE = 1.0                                         # of the decoder, in units of a canary's squared gradient norm
LETTERS = [chr(c) for c in range(33, 127)]          # of canaries, a token each
STILL = 1e-9                                        # learning rate
CHOSEN = "chosen gradients"
WAYS = {                                            # name -> options of train.py, pairs of a canary
    CHOSEN: None,
    "DPO, pairs": ({"experts": 1}, 1),
    "DPO, users": ({"experts": 1, "privacy_unit": "user"}, 2),
    "MoE-DPO, pairs": ({"head_lr": STILL, "gate": "linear", "gate_lr": STILL, "start": "none"}, 1),
    "Mix-DPO, users": ({"head_lr": STILL, "latent": "user", "privacy_unit": "user", "start": "none"}, 2),
}
SAMPLING = {CHOSEN: (1 / 16, 32)}                    # sampling rate and steps; of all others (0.5, 2)


# ---- statistics


def p_value(m: int, r: int, v: int, epsilon: float, delta: float) -> float:
    """Chance of v or more right guesses out of r, for m canaries, if the run is (epsilon, delta)-DP: an upper bound
    (Steinke et al. 2023, section 5; their code is in appendix D)."""
    q = 1 / (1 + math.exp(-epsilon))
    below = np.cumsum(binom.pmf(np.arange(v - 1, -1, -1), r, q))            # P(v > W >= v - i), i = 1 ... v
    return min(1.0, float(binom.sf(v - 1, r, q) + 2 * m * delta * max(below / np.arange(1, v + 1), default=0.0)))


def largest(rejected, high: float = 64.0) -> float:
    """The largest x from 0 to `high` with rejected(x), which holds up to some x and not beyond; 0 if for none."""
    low = 0.0
    for _ in range(40 if rejected(0.0) else 0):
        low, high = ((low + high) / 2, high) if rejected((low + high) / 2) else (low, (low + high) / 2)
    return low


def lower_bound(scores: list[np.ndarray], inside: np.ndarray, delta: float) -> float:
    """epsilon_lower. scores: (m,) each, of all runs, higher if a canary seems to be in the file; inside (m,): whether
    it is. Several scores and numbers of guesses are tried; the error probability is divided among them (Bonferroni)."""
    m, counts = len(inside), []
    for score in scores:
        ranked = inside[np.argsort(-score, kind="stable")]
        for n in (round(share * m) for share in SHARES):
            right = int(ranked[:n].sum())
            counts += [(n, right), (2 * n, right + n - int(ranked[m - n :].sum()))]
    return max(largest(lambda epsilon: p_value(m, r, v, epsilon, delta) <= ERROR / len(counts)) for r, v in counts)


def rates(score: np.ndarray, inside: np.ndarray, share: float, error: float) -> tuple[float, float]:
    """Clopper-Pearson bounds of the test "score among the highest `share`": true positive rate at least, false positive
    rate at most."""
    above = score > np.quantile(score, 1 - share)
    hits, misses, false, right = (int((a & b).sum()) for b in (inside, ~inside) for a in (above, ~above))
    return (float(beta.ppf(error, hits, misses + 1)) if hits else 0.0,
            float(beta.ppf(1 - error, false + 1, right)) if right else 1.0)


def fitted_bound(scores: list[np.ndarray], inside: np.ndarray, mechanism: Mechanism, delta: float) -> float:
    """epsilon_fit: the epsilon of the mechanism with the largest sigma that the tests allow.

    A test with these rates is possible if TPR <= e^epsilon FPR + delta(epsilon) for all epsilon, also below 0: the
    trade-off function of the sampled Gaussian mechanism (Dong, Roth & Su 2019, arXiv 1905.02383)."""
    error, epsilons = ERROR / (2 * len(scores) * len(CUTS)), np.linspace(-20, 20, 161)
    found = [rates(score, inside, share, error) for score in scores for share in CUTS]

    def rejected(sigma: float) -> bool:
        losses = both_ways([replace(mechanism, sigma=sigma)], 100 * SEARCH)[0]
        most = np.array([losses.delta(epsilon) for epsilon in epsilons])
        return any((high > np.exp(epsilons) * low + most).any() for high, low in found)

    if not rejected(MOST_SIGMA):
        return 0.0
    low, high = LEAST_SIGMA, MOST_SIGMA
    while high > 1.005 * low:
        middle = math.sqrt(low * high)
        low, high = (low, middle) if rejected(middle) else (middle, high)
    return epsilon_of([replace(mechanism, sigma=high)], delta)


# ---- what the auditor sees


def decode(directions: torch.Tensor, sums: torch.Tensor) -> np.ndarray:
    """Estimates which canaries take part in which step, 1 or 0 and noise: (T,m).

    directions (m,D): gradients of norm 1; sums (T,D): noisy sums of clipped gradients, in units of the clip norm. Ridge
    regression removes most of what other canaries add, since gradients are not quite orthogonal."""
    gram = (directions @ directions.T).double()
    solve = torch.linalg.inv(gram + RIDGE * torch.eye(len(gram)).double())
    x = solve @ (directions @ sums.T).double()                              # (m,T)
    return (x / (solve @ gram).diag()[:, None]).T.numpy()


def scores_of(x: np.ndarray, mechanism: Mechanism) -> list[np.ndarray]:
    """From estimates (T,m): the log-likelihood ratio under the claimed mechanism; the sum, which is better if the same
    examples take part in every step; the variance over steps, which is better if they have the same noise."""
    q, s = mechanism.rate, mechanism.sigma
    with np.errstate(divide="ignore"):
        ratio = np.logaddexp(np.log1p(-q), math.log(q) + (2 * x - 1) / (2 * s * s))
    return [ratio.sum(0), x.sum(0), x.var(0)]


def gradient(parameters) -> torch.Tensor:
    """All gradients in one vector."""
    return torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in parameters])


@contextlib.contextmanager
def observing(method: str):
    """Collects gradients: of an example, before ClippedSum.add; or of a step, after ClippedSum.release, as a noisy sum
    in units of the clip norm."""
    found, original = [], getattr(ClippedSum, method)

    def observed(self):
        if method == "add":
            found.append(gradient(self.parameters))
        original(self)
        if method == "release":
            found.append(gradient(self.parameters) * self.noise.expected / self.noise.clip)

    with patch.object(ClippedSum, method, observed):
        yield found


def canaries(m: int, each: int) -> list[list[dict]]:
    """m users with `each` pairs of random letters."""
    rng = np.random.default_rng(31)
    return [[{"user": f"canary-{n}"} | {name: "".join(rng.choice(LETTERS, size))
             for name, size in (("prompt", 4), ("chosen", 6), ("rejected", 6))} for _ in range(each)] for n in range(m)]


class Runs:
    """Private runs of one way on the same m canaries, each run with coins of its own."""

    def __init__(self, way: str, m: int, folder):
        self.way, self.m, self.folder, self.count = way, m, folder, 0
        self.rate, self.steps = SAMPLING.get(way, (0.5, 2))
        if way != CHOSEN:
            make_model(folder / "model")
            self.rows = canaries(m, WAYS[way][1])
            with observing("add") as found:                                 # every canary takes part in one step
                self.train(self.rows, 1.0, Key.public(0), 1.0, 1)
            assert len(found) == m, f"got {len(found)} gradients, want {m}"
            self.directions = torch.stack([g / g.norm() for g in found])    # (m,D)

    def train(self, rows: list[list[dict]], epsilon: float, key: Key, rate: float, steps: int):
        """train.run on a file of these canaries; the directory of the run."""
        self.count += 1
        name, (options, each) = f"run-{self.count}", WAYS[self.way]
        write_lines(self.folder / f"{name}.jsonl", [row for pairs in rows for row in pairs])
        paths = [str(self.folder / part) for part in (f"{name}.jsonl", "model", name)]
        usual = {"lr": STILL, "beta": 0.5, "clip": 1.0, "dtype": "float32", "save_minutes": 1e9}
        return train.run(train.TrainConfig(
            *paths, **usual | options, epsilon=epsilon, delta=DELTA, examples=self.m, micro=each,
            batch=round(rate * self.m), epochs=round(rate * steps)), key)

    def observe(self, inside: np.ndarray, epsilon: float, key: Key) -> tuple[np.ndarray, Mechanism, float]:
        """One run with the canaries `inside` (m,): estimates (T,m), the mechanism and the epsilon of the accountant."""
        if self.way == CHOSEN:
            return chosen_gradients(inside, epsilon, key, self.rate, self.steps)
        rows = [pairs for pairs, there in zip(self.rows, inside) if there]
        with observing("release") as found:
            path = self.train(rows, epsilon, key, self.rate, self.steps)
        facts = json.loads((path / "privacy.json").read_text())
        mechanism = Mechanism(facts["noise_multiplier"], facts["rate"], facts["steps"])
        return decode(self.directions, torch.stack(found)), mechanism, facts["epsilon"]


def chosen_gradients(inside: np.ndarray, epsilon: float, key: Key, rate: float, steps: int):
    """The parts of DP-SGD with the worst gradients: each canary has one coordinate to itself, and ten times the clip
    norm there."""
    m, parameter = len(inside), torch.nn.Parameter(torch.zeros(len(inside)))
    mechanism = Mechanism(noise_multiplier(epsilon, DELTA, rate, steps), rate, steps)
    noise, there, seen = Noise(mechanism.sigma, 1.0, rate * m, key), np.flatnonzero(inside), []
    for t, taking in enumerate(budget.participants(key, [f"canary {n}" for n in there], rate, steps)):
        clipped = ClippedSum([parameter], noise, t)
        for n in there[taking]:
            parameter.grad = torch.zeros(m)
            parameter.grad[n] = 10.0
            clipped.add()
        clipped.release()
        seen.append(parameter.grad.double().numpy() * noise.expected)
    return np.stack(seen), mechanism, epsilon_of([mechanism], DELTA)


# ---- faults


def half_noise(self, total, t):
    return RELEASE(replace(self, sigma=self.sigma / 2), total, t)


def same_examples(key, examples, rate, steps):
    return PARTICIPANTS(key, examples, rate, 1) * steps


RELEASE, PARTICIPANTS, NONE = Noise.release, privacy.participants, "none"
FAULTS = {                                          # name -> what is replaced, where, by what
    "no noise": (Noise, "release", lambda self, total, t: [g / self.expected for g in total]),
    "half the noise": (Noise, "release", half_noise),
    "the same noise in every step": (Noise, "release", lambda self, total, t: RELEASE(self, total, 0)),
    "no clipping": (privacy, "clip_factors", lambda norm, clip: torch.ones_like(norm)),
    "the same examples in every step": (budget, "participants", same_examples),
}


def audit(runs: Runs, count: int, epsilon: float, seed: int, fault: str = NONE) -> dict:
    """`count` private runs: {"claimed", "lower", "fit"}, three epsilons at DELTA."""
    inside = np.random.default_rng([seed, 32]).random((count, runs.m)) < 0.5
    with patch.object(*FAULTS[fault]) if fault != NONE else contextlib.nullcontext():
        found = [runs.observe(row, epsilon, Key.public(1000 * seed + n)) for n, row in enumerate(inside)]
    x, (_, mechanism, claimed), inside = np.concatenate([x for x, *_ in found], axis=1), found[0], inside.ravel()
    scores = scores_of(x, mechanism)
    return {"claimed": claimed, "lower": lower_bound(scores, inside, DELTA),
            "fit": fitted_bound(scores, inside, mechanism, DELTA)}


# ---- the study


EPSILONS = {"smoke": (4.0,), "quick": (1.0, 2.0, 4.0, 8.0), "full": (1.0, 2.0, 4.0, 8.0)}
MADE = {"smoke": (1, 1000), "quick": (1, 10_000), "full": (1, 40_000)}      # runs, canaries in each: chosen gradients
TRAINED = {"smoke": (1, 100), "quick": (20, 100), "full": (80, 100)}        # and train.run: few, as they interfere
FAULTY = 2.0            # the epsilon claimed by runs with a fault


def cells(preset: str) -> list[dict]:
    ways = (CHOSEN, "DPO, pairs") if preset == "smoke" else WAYS
    repeat = "the same examples in every step"      # costs most at a low rate: only there it can be seen
    faults = {CHOSEN: [*FAULTS], "DPO, pairs": [f for f in FAULTS if f != repeat],
              "Mix-DPO, users": [f for f in FAULTS if f != repeat]}
    return [{"way": way, "runs": runs, "canaries": m, "epsilons": list(EPSILONS[preset]), "faults": faults.get(way, [])}
            for way in ways for runs, m in [(MADE if way == CHOSEN else TRAINED)[preset]]]


def measure(cell: dict, folder) -> dict:
    runs = Runs(cell["way"], cell["canaries"], folder)
    settings = [(epsilon, NONE) for epsilon in cell["epsilons"]] + [(FAULTY, fault) for fault in cell["faults"]]
    return {"rows": [{"fault": fault} | audit(runs, cell["runs"], epsilon, n, fault)
                     for n, (epsilon, fault) in enumerate(settings, 1)]}


def shown(row: dict) -> list[str]:
    return [f"{row[name]:.2f}" for name in ("claimed", "lower", "fit")]


def page(rows):
    sound = [(c, row) for c, f in rows for row in f["rows"] if row["fault"] == NONE]
    faulty = [(c, row) for c, f in rows for row in f["rows"] if row["fault"] != NONE]
    lines = {"lower": {}, "fit": {}}
    for name, of in lines.items():
        of["the accountant"] = [(round(row["claimed"], 2), row["claimed"], 0.0) for c, row in sound
                                if c["way"] == CHOSEN]
        for c, row in sound:
            if c["faults"]:                         # the other lines would lie on these
                of.setdefault(c["way"], []).append((round(row["claimed"], 2), row[name], 0.0))
    above, fit_above, caught, fit_caught = (sum(row[name] > row["claimed"] for _, row in some)
                                            for some in (sound, faulty) for name in lines)
    text = (f"Of {len(sound)} audits of the program as it is, {above} gave an epsilon_lower above the accountant's "
            f"epsilon, and {fit_above} gave such an epsilon_fit. Of {len(faulty)} audits with a fault put in, "
            f"epsilon_lower found {caught} and epsilon_fit {fit_caught}.")
    head = ["what is audited", "runs x canaries", "epsilon", "epsilon_lower", "epsilon_fit"]
    body = [[c["way"], f"{c['runs']} x {c['canaries']:,}", *shown(row)] for c, row in sound]
    finders = [" and ".join(f"epsilon_{name}" for name in lines if row[name] > row["claimed"]) for _, row in faulty]
    broken = [[c["way"], row["fault"], *shown(row), by or "nothing"] for (c, row), by in zip(faulty, finders)]
    faults = ("Faults put into the program, and which bound exceeds the claimed epsilon. epsilon_lower cannot find a "
              "fault that is small beside the distance to the accountant's epsilon; epsilon_fit can.")
    return "\n\n".join([text, table_of(head, body, 2), faults,
                        table_of([head[0], "fault", *head[2:], "found by"], broken, 2)]), {
        "epsilon": curves({f"epsilon_{name}": of for name, of in lines.items()},
                          ("epsilon of the accountant (delta 1e-6)", "from the audit"), log=2, columns=2)}


STUDY = Study(
    "Privacy audit: a lower bound on epsilon",
    "Canaries, examples made for the audit, are in the training file or not by a fair coin each. An auditor sees the "
    "noisy gradients of private runs and guesses the coins. `epsilon_lower` is what the guesses prove with 95 % "
    "confidence, whatever the mechanism is (Steinke, Nasr & Jagielski 2023, arXiv 2305.08846). `epsilon_fit` is "
    "sharper and assumes Gaussian noise and independent canaries (Nasr et al. 2023, arXiv 2302.07956). Both must stay "
    "below the accountant's epsilon at delta 1e-6, and must exceed it when the mechanism is broken. Chosen gradients: "
    "the parts of DP-SGD with one coordinate for each canary, sampling rate 1/16, 32 steps. All others: `train.py` on "
    "a small random model, rate 1/2, 2 steps. A lower bound far below epsilon does not prove that epsilon is too "
    "large.",
    cells, measure, page)
