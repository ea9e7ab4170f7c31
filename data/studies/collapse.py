"""When a mixture collapses: a map over beta, the entropy bonus of the gate and the temperature of the E-step; and
whether the test of mixdpo/evaluation/collapse.py detects it.

The truth about each run is measured on half of the held-out pairs, the test is made on the other half. The truth knows
what the test does not: who judged, and the true probability of each choice.

    posterior   responsibilities say nothing about who judged: ARI below 0.05
    expert      one expert is the likeliest of the gate for over 95 % of prompts
    no slope    the slope of the test, expected by the true probabilities, is at most FLOOR
    no use      expected log-likelihood, by the true probabilities, is not above that of constant weights and of the
                best single expert by more than FLOOR
    needed      experts that are left by backward elimination on this expected log-likelihood

In the worlds without types all judges have the same rewards (agree = 1), so K = 1 is right by construction. FLOOR was
chosen on 98 runs of the map, each on its own world with a seed from 100 on; the level is 5 %.
"""

import math

import numpy as np
import torch

from data.report.pictures import maps
from data.studies.aggregate import by, mean_over, over, pm_of, se_over, table_of
from data.studies.study import Study
from data.studies.worlds import OWN, World, figures, fit, judged, look, oracle, write
from mixdpo.dpo import log_likelihood
from mixdpo.evaluation.collapse import FLOOR, collapse_figures, constant_weights
from mixdpo.evaluation.statistics import adjusted_rand_index, mean_se
from mixdpo.mixture import e_step, log_marginal

SEEDS = {"smoke": 1, "quick": 1, "full": 3}
BETAS, BONUSES = (0.02, 0.1, 0.5, 2.0), (0.0, 0.03, 0.1, 0.3, 1.0)
TEMPERATURES, KS = (0.25, 0.5, 1.0, 2.0), (2, 4, 8)
KINDS = ("expert", "posterior")
HALF = 2000                                 # held-out pairs of the truth, and of the test
NOISE = 2                                   # standard errors of an ARI within which 0.05 is not told from it
LEVELS = (1.645, 2.5, 3.5)                  # standard errors


def cells(preset: str) -> list[dict]:
    bonuses, temperatures, ks = (BONUSES, TEMPERATURES, KS) if preset != "smoke" else (BONUSES[::4], (0.5, 1.0), (2,))
    betas, seeds = BETAS if preset != "smoke" else BETAS[::2], range(SEEDS[preset])

    def cell(K: int, beta: float, s: int, bonus: float = 0.0, T: float = 1.0, agree: float = 0.0) -> dict:
        return {"experts": K, "beta": beta, "bonus": bonus, "temperature": T, "agree": agree, "seed": s}

    return [*(cell(1, beta, s) for beta in betas for s in seeds),
            *(cell(K, beta, s, bonus, T) for K in ks for T in temperatures for bonus in bonuses for beta in betas
              for s in seeds),
            *(cell(K, beta, s, agree=1.0) for K in ks for beta in betas for s in seeds)]


def measure(cell: dict, folder) -> dict:
    world = World(seed=cell["seed"], users=120, domains=True, agree=cell["agree"], heldout=2 * HALF)
    write(world, folder)
    options = {"experts": cell["experts"], "beta": cell["beta"], "seed": cell["seed"]}
    if cell["experts"] > 1:
        options |= {"gate": "linear", "gate_lr": 0.05, "gate_features": "mean", "gate_entropy": cell["bonus"]}
        if cell["temperature"] != 1:
            options |= {"variant": "tempered", "variant_temperature": cell["temperature"]}
    found = look(fit(folder, "run", **options), folder / "heldout.jsonl")
    result = figures(found) | {"oracle": oracle(world)["ll"], "expert": False, "posterior": False}
    if cell["experts"] == 1:
        return result
    h, log_w, kind = found.h.double(), found.log_w.double(), [pair.annotator for pair in found.pairs]
    prompt = [tuple(pair.prompt) for pair in found.pairs]
    truth, test = slice(0, HALF), slice(HALF, 2 * HALF)
    most = log_w[truth].argmax(1).bincount(minlength=cell["experts"]).max() / HALF
    z = e_step(log_w, h)[1].argmax(1).tolist()                              # by weights and choices
    ari = adjusted_rand_index(z[truth], kind[truth])
    exact = Exact(log_w[truth], h[truth], true_choices(world)[truth])
    return result | {
        "most": float(most), "ari": ari, "ari_se": ari_se(z[truth], kind[truth]),
        "ari_test": adjusted_rand_index(z[test], kind[test]),
        "expert": bool(most > 0.95), "posterior": ari < 0.05 or cell["agree"] == 1,
        "slope": exact.slope(), "use": exact.use(), "needed": exact.needed(),
        "test": collapse_figures(log_w[test], h[test], prompt[test])}


# ---- the truth


def ari_se(found: list, truth: list, blocks: int = 20) -> float:
    """Standard error of an ARI: the jackknife over blocks of units."""
    without = [adjusted_rand_index([x for n, x in enumerate(found) if n % blocks != b],
                                   [x for n, x in enumerate(truth) if n % blocks != b]) for b in range(blocks)]
    return math.sqrt((blocks - 1) * np.var(without))


def true_choices(world: World) -> torch.Tensor:
    """The true probability of each held-out choice, given its prompt: (N,)."""
    of = judged(world, heldout=True)
    own = torch.nn.functional.one_hot(torch.from_numpy(of.domain), world.types)
    w = torch.where(own == 1, OWN, (1 - OWN) / max(1, world.types - 1)).double()
    return log_marginal(w.log(), of.gaps(world.rewards())).exp()


class Exact:
    """Expected log-likelihoods of a mixture: log weights and margins (N,K), true probabilities of choices (N,)."""

    def __init__(self, log_w: torch.Tensor, h: torch.Tensor, p: torch.Tensor):
        self.log_w, self.h, self.p = log_w, h, p

    def expected(self, log_w: torch.Tensor) -> float:
        """Expectation over both choices of every pair, nats a pair."""
        return float((self.p * log_marginal(log_w, self.h) + (1 - self.p) * log_marginal(log_w, -self.h)).mean())

    def slope(self) -> float:
        """Expectation of the slope of collapse.py, over both choices of every pair."""
        w0 = constant_weights(self.log_w)
        both = [torch.expm1(log_marginal(self.log_w, h) - log_marginal(w0, h)) for h in (self.h, -self.h)]
        return float((self.p * both[0] + (1 - self.p) * both[1]).mean())

    def use(self) -> float:
        """Expected gain over the better of constant weights and the best single expert, nats a pair."""
        single = self.p[:, None] * log_likelihood(self.h) + (1 - self.p[:, None]) * log_likelihood(-self.h)
        return self.expected(self.log_w) - max(self.expected(constant_weights(self.log_w)), float(single.mean(0).max()))

    def needed(self) -> int:
        """How many experts are left if those are removed, one at a time, whose weight another can take for FLOOR nats
        at most."""
        w, left = self.log_w.exp(), list(range(self.h.shape[1]))
        while len(left) > 1:
            full, found = self.expected(w.log()), []
            for k in left:
                for j in left:
                    if j != k:
                        moved = w.clone()
                        moved[:, j] += moved[:, k]
                        moved[:, k] = 0
                        found.append((full - self.expected(moved.log()), k, moved))
            loss, k, moved = min(found, key=lambda of: of[0])
            if loss > FLOOR:
                break
            w = moved
            left.remove(k)
        return len(left)


# ---- the page


def rates(title: str, of: list[dict], true, said) -> list:
    """A row: how often the test says what is true."""
    counts = {t: [bool(said(f)) for f in of if bool(true(f)) == t] for t in (True, False)}

    def share(values: list[bool]) -> str:
        return f"{sum(values)} of {len(values)}" + (f" ({np.mean(values):.2f})" if values else "")

    return [title, share(counts[True]), share(counts[False])]


def clear(f: dict) -> bool:
    """Whether a run's ARI is above or below 0.05 by more than its noise."""
    return abs(f["ari"] - 0.05) > NOISE * f["ari_se"]


def slope_above(f: dict, level: float) -> bool:
    return f["test"]["slope"]["mean"] - level * f["test"]["slope"]["se"] > FLOOR


def collapsed(f: dict) -> bool:
    return f["test"]["verdict"] == "posterior collapse"


def verdicts(runs: list[dict], by_k: dict, typeless: list[dict]) -> str:
    """The tables on the test, and what they say."""
    sure = [f for f in runs if clear(f)]
    true = [f for f in runs if f["posterior"]]
    best = sorted(f["ari_test"] for f in runs if not f["posterior"])
    limit = best[int(0.05 * len(best))] if best else 0.0                    # 5 % of the runs without collapse are below
    missed = [f["ari"] for f in true if not collapsed(f)]
    by_slope = rates("", runs, lambda f: f["slope"] <= FLOOR, collapsed)
    body = [rates("posterior collapse; truth: ARI below 0.05", runs, lambda f: f["posterior"], collapsed),
            *(rates(f"… K = {K}", of, lambda f: f["posterior"], collapsed) for K, of in by_k.items()),
            rates(f"… ARI more than {NOISE} SE from 0.05", sure, lambda f: f["posterior"], collapsed),
            *(rates(f"… at {level:g} standard errors", runs, lambda f: f["posterior"],
                    lambda f, level=level: not slope_above(f, level)) for level in LEVELS[1:]),
            rates("… by annotators: ARI of the test's pairs", runs, lambda f: f["posterior"],
                  lambda f: f["ari_test"] < limit),
            ["posterior collapse; truth: no slope", *by_slope[1:]],
            rates("K experts are of no use", runs, lambda f: f["use"] <= FLOOR,
                  lambda f: f["test"]["verdict"] in ("posterior collapse", "no gain")),
            rates("one active expert; truth: one is needed", runs, lambda f: f["needed"] == 1,
                  lambda f: len(f["test"]["active"]) == 1),
            rates("one active expert; truth: over 95 % of prompts", runs, lambda f: f["expert"],
                  lambda f: len(f["test"]["active"]) == 1)]
    same = [len(f["test"]["active"]) - f["needed"] for f in runs]
    recall = np.mean([collapsed(f) for f in true]) if true else math.nan
    false = np.mean([collapsed(f) for f in runs if not f["posterior"]])
    informative = sum(f["slope"] > FLOOR for f in true if not collapsed(f))
    return "\n\n".join([
        f"**The test on held-out choices.** Posterior collapse is detected with recall {recall:.2f} at {false:.2f} "
        "false alarms (target: 0.90 at 0.05). "
        + (f"The {len(missed)} misses have an ARI of {min(missed):.3f} to {max(missed):.3f}, whose standard error is "
           f"{np.mean([f['ari_se'] for f in true]):.3f}; by the true probabilities of the choices, weights do predict "
           f"held-out choices in {informative} of them. " if missed else "")
        + "If collapse is defined by these probabilities, as an expected slope of at most "
        f"{FLOOR:g}, recall is {by_slope[1]} and false alarms are {by_slope[2]}. "
        + f"Runs whose ARI differs from 0.05 by more than {NOISE} standard errors: "
        + "recall {}, false alarms {}. ".format(*body[1 + len(by_k)][1:])
        + f"In the worlds without types {sum(map(collapsed, typeless))} of {len(typeless)} runs are called collapsed. "
        f"The number of active experts is the number needed in {sum(d == 0 for d in same)} of {len(same)} runs, "
        f"smaller in {sum(d < 0 for d in same)}, larger in {sum(d > 0 for d in same)}.",
        table_of(["the test says", "where it is true (recall)", "where it is not (false alarms)"], body),
        "The truth is measured on other held-out pairs than those of the test. *By annotators*: the truth predicted by "
        "the ARI of the test's pairs, with the limit that gives 5 % false alarms; this uses the annotators, so no test "
        "on choices is expected to do better. *At 2.5 and 3.5 standard errors*: stricter than the test's 1.645."])


def page(rows):
    dpo = {c["beta"]: f for c, f in rows if c["experts"] == 1}
    typeless = [f for c, f in rows if c["agree"] == 1]
    mixtures = [(c, f) for c, f in rows if c["experts"] > 1 and c["agree"] == 0]
    found = by(mixtures, "experts", "temperature", "bonus", "beta")
    ks, temperatures, bonuses, betas = (sorted({key[n] for key in found}) for n in range(4))
    pictures = {}
    labels = {"effective": "effective experts", "variance": "variance of q", "ll": "log-likelihood (nats)"}
    for what, label in labels.items():
        shown, marks = {}, {}
        for K in ks:
            for T in temperatures:
                title = f"K = {K}, temperature {T:g}"
                z = np.array([[over(found[K, T, bonus, beta], what)["mean"] for beta in betas] for bonus in bonuses])
                shown[title] = betas, bonuses, z
                marks[title] = [(i, j, "".join(sign for sign, kind in (("E", "expert"), ("P", "posterior"))
                                               if any(f[kind] for f in found[K, T, bonus, beta])))
                                for j, bonus in enumerate(bonuses) for i, beta in enumerate(betas)]
        pictures[what] = maps(shown, "beta", "entropy bonus", label, len(temperatures), marks=marks)
    body = [[K, f"{T:g}", f"{bonus:g}", f"{beta:g}", mean_over(fs, "effective", 2), mean_over(fs, "variance"),
             pm_of(fs[0]["ll"]), ", ".join(kind for kind in KINDS if any(f[kind] for f in fs)) or "–"]
            for (K, T, bonus, beta), fs in found.items() if T == 1]
    text = "\n\n".join([
        verdicts([f for _, f in mixtures], by(mixtures, "experts"), typeless),
        reading(found, dpo, ks, temperatures, bonuses, betas),
        "With the exact E-step (temperature 1); log-likelihood of held-out pairs (M5), nats, ± SE over pairs. "
        "Maps: E and P mark expert and posterior collapse.",
        table_of(["K", "temperature", "entropy bonus", "beta", "effective experts", "variance of q", "log-likelihood",
                  "collapse"], body)])
    return text, pictures


def reading(found, dpo, ks, temperatures, bonuses, betas) -> str:
    """The text on where mixtures collapse, and on settings to start with."""
    def share(kind: str, **fixed) -> float:
        names = ("experts", "temperature", "bonus", "beta")
        of = [f for key, fs in found.items() if fixed.items() <= dict(zip(names, key)).items() for f in fs]
        return sum(f[kind] for f in of) / len(of)

    def along(kind: str, name: str, values) -> str:
        return ", ".join(f"{share(kind, **{name: v}):.2f} at {v:g}" for v in values)

    exact = {(bonus, beta): np.mean([over(found[K, 1.0, bonus, beta], "ll")["mean"] for K in ks])
             for bonus in bonuses for beta in betas}
    best = max(exact, key=exact.get)
    slack = np.mean([se_over(f["ll"]) for K in ks for f in found[K, 1.0, *best]])
    near = [key for key, value in exact.items() if value >= exact[best] - slack]
    stable = [key for key, fs in found.items() if not any(f["expert"] or f["posterior"] for f in fs)]
    bounds = [f"{name} {min(k[n] for k in stable):g} to {max(k[n] for k in stable):g}" for n, name in
              ((3, "beta"), (2, "bonus"), (1, "temperature"))] if stable else []
    free = [bonus for bonus in bonuses if share("expert", bonus=bonus) + share("posterior", bonus=bonus) == 0]
    gap = mean_se([f["ll"]["mean"] - dpo[key[3]]["ll"]["mean"] for key in stable for f in found[key]])
    return (
        f"{len(stable)} of {len(found)} settings are stable"
        + (f"; they lie within {', '.join(bounds)}" if stable else "") + ". "
        f"Expert collapse, share of settings: by entropy bonus {along('expert', 'bonus', bonuses)}; by beta "
        f"{along('expert', 'beta', betas)}; by temperature {along('expert', 'temperature', temperatures)}. Posterior "
        f"collapse: by entropy bonus {along('posterior', 'bonus', bonuses)}; by beta "
        f"{along('posterior', 'beta', betas)}; by temperature {along('posterior', 'temperature', temperatures)}. "
        + (f"Without any collapse at every setting: bonus {', '.join(f'{b:g}' for b in free)}. " if free else
           "No bonus avoids collapse at every setting. ")
        + "To start with: the exact E-step has its best held-out log-likelihood, mean over K, at beta "
        f"{best[1]:g} with a bonus of {best[0]:g} ({exact[best]:.3f} nats a pair; DPO at that beta "
        f"{dpo[best[1]]['ll']['mean']:.3f}, the oracle {next(iter(dpo.values()))['oracle']['mean']:.3f}); within one "
        "standard error of it: "
        + ", ".join(f"beta {beta:g} with {bonus:g}" for bonus, beta in near)
        + f". Stable mixtures are {gap['mean']:+.3f} ± {se_over(gap):.3f} nats from DPO at the same beta.")


STUDY = Study(
    "Collapse: when experts stop differing",
    "A learnt linear gate on planted prompts of two domains (1,200 pairs), random first responsibilities, K = 2, 4 "
    "and 8: which betas, entropy bonuses and temperatures keep experts different, "
    "and does the test on held-out choices detect collapse?",
    cells, measure, page, version=2)
