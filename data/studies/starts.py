"""How a mixture starts: with linear rewards, at random, with hard assignments, or with the types known.

    Mix-DPO          --start linear as it is (mixdpo/start.py)
    earlier start    linear rewards, l2 of PER_PAIR nats a pair by half-split prediction, weights in closed form (M10)
    random start     --start dirichlet
    EM-DPO           hard assignments, from a random one, each round with as many passes as a mixture has in all
                     (data/studies/peers.py)
    known types      responsibilities are the true types in all steps: what a start can reach at most
    truth            true rewards and weights

All mixtures have one latent type for each user, full models as experts and weights in closed form, and the same pairs
and passes: so many that new users are explained best with known types, on other worlds (seeds 100 to 103). The policies
are those of data/studies/peers.py.
"""

import math
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import torch
import torch.nn.functional as F

from data.report.pictures import curves
from data.report.tables import NONE, in_ses
from data.studies.aggregate import by, over, pm_of, se_over, table_of
from data.studies.peers import em_dpo, one_run, truth
from data.studies.study import Study
from data.studies.worlds import World, judged, oracle, write
from mixdpo import start
from mixdpo.evaluation.statistics import mean_se
from mixdpo.linear import LinearOptions, linear_mixture
from mixdpo.mixture import e_step

WORLDS, TYPES, EACH = 20, (2, 3, 4), 10
PAIRS = {"smoke": (200,), "quick": (1000,), "full": (1000, 3000)}
PASSES = {200: 3, 1000: 3, 3000: 2}         # by pairs; of 1, 2, 3 and 5
MIX = {"latent": "user", "weights": "update", "sharing": "models"}
ALL_STEPS = 1_000_000                       # --start-steps: the whole run
PER_PAIR = (0.01, 0.1, 1.0)                 # candidates of the earlier start
OURS, EARLIER, RANDOM, HARD, ONE, KNOWN, TRUTH = (
    "Mix-DPO", "earlier start", "random start", "EM-DPO", "DPO", "known types", "truth")
COMPARED = (EARLIER, RANDOM, HARD, ONE)     # what Mix-DPO should be at least as good as
FIGURES = {"ll": "log-likelihood of new users", "ari": "ARI of training users"}


def cells(preset: str) -> list[dict]:
    types, seeds = (TYPES, WORLDS) if preset != "smoke" else (TYPES[-1:], 1)
    return [{"pairs": pairs, "types": K, "seed": seed} for pairs in PAIRS[preset] for seed in range(seeds)
            for K in types]


def measure(cell: dict, folder: Path) -> dict:
    """Row -> log-likelihood of new users (nats a pair, M11) and ARI of training users; None for one policy."""
    world = World(seed=cell["seed"], types=cell["types"], users=cell["pairs"] // EACH, each=EACH)
    usual = {"seed": world.seed, "epochs": PASSES[cell["pairs"]]}
    write(world, folder)

    def mixture(name: str, first=None, **options):
        """A run of train.py; first: replaces start.first_responsibilities."""
        replaced = patch.object(start, "first_responsibilities", first) if first else nullcontext()
        with replaced:
            return one_run(folder, name, experts=world.types, **usual, **MIX, **options)

    answers = {OURS: mixture("ours", start="linear"), EARLIER: mixture("earlier", earlier, start="linear"),
               RANDOM: mixture("random", start="dirichlet"), HARD: em_dpo(folder, world, "em", usual["epochs"]),
               ONE: one_run(folder, "dpo", experts=1, **usual),
               KNOWN: mixture("known", known(world), start="linear", start_steps=ALL_STEPS)}
    found = {}
    for name, answer in answers.items():
        h, log_w, ari = answer(folder / "heldout.jsonl")
        found[name] = {"ll": of_new_users(world, h, log_w), "ari": ari[-1] if ari else None}
    return found | {TRUTH: {"ll": of_new_users(world, *truth(world)), "ari": oracle(world)["ari"]}}


def of_new_users(world: World, h: torch.Tensor, log_w: torch.Tensor) -> float:
    """log p of all choices of each held-out user (M11), nats a pair: h and log_w (P,K)."""
    user = torch.from_numpy(judged(world, heldout=True).user)
    return e_step(log_w, h, user)[0].mean().item() / world.each


# ---- starts, with the arguments of mixdpo.start.first_responsibilities


def earlier(config, units: list[list[int]], features: torch.Tensor, *_) -> torch.Tensor:
    """log q (G,K) by the rule before: l2 grows with the number of pairs, and the weights are updated (M10)."""
    index = [i for unit in units for i in unit]
    group = torch.tensor([g for g, unit in enumerate(units) for _ in unit])
    x = features[index, 0] - features[index, 1]
    x = x / x.square().mean(0).sqrt().clamp_min(1e-6)

    options = {ridge: LinearOptions(ridge * len(x), config.restarts, seed=config.seed) for ridge in PER_PAIR}
    likelihood = {ridge: half_split_likelihood(x, group, config.experts, own) for ridge, own in options.items()}
    best = max(likelihood, key=likelihood.__getitem__)
    best = best if likelihood[best] > -math.log(2) else PER_PAIR[0]
    return linear_mixture(x, group, config.experts, options[best]).log_q


@torch.no_grad()
def half_split_likelihood(x: torch.Tensor, group: torch.Tensor, experts: int, options: LinearOptions) -> float:
    """How well half of each group's pairs predicts the other half: log-likelihood in nats a pair.

    linear_mixture is fitted to every second pair of each group. The remaining pairs i of a group are scored by
    log sum_k q_k prod_i sigma(h_ik), where q are the group's responsibilities from the fit. A group of one pair is only
    fitted. options.l2 is for all pairs; the fit has half of them and uses half of it.
    """
    order = torch.argsort(group, stable=True)
    nth = torch.arange(len(group)) - torch.searchsorted(group[order], group[order])         # place within its group
    fitted, scored = order[nth % 2 == 0], order[nth % 2 == 1]
    fit = linear_mixture(x[fitted], group[fitted], experts, replace(options, l2=options.l2 / 2))
    units, number = group[scored].unique(return_inverse=True)
    log_q = fit.log_q[units].double()[number]                                               # (B',K)
    return float(e_step(log_q, x[scored].double() @ fit.theta.double().T, number)[0].sum()) / len(scored)


def known(world: World):
    """A start with the users' true types."""
    types = torch.from_numpy(judged(world).type)                            # (P,), in the order of the file

    def first(config, units: list[list[int]], *_) -> torch.Tensor:
        own = F.one_hot(types[[unit[0] for unit in units]], world.types)    # (G,K)
        return torch.log_softmax(50.0 * own, dim=-1)
    return first


# ---- the page


def less(found: list[dict], name: str, what: str) -> dict:
    """Mean over worlds of the paired difference to Mix-DPO, with its SE."""
    return mean_se([f[name][what] - f[OURS][what] for f in found])


def rows_of(found: list[dict]) -> list[list[str]]:
    """The table of one kind of world."""
    body = []
    for name in found[0]:
        values, gaps = [], []
        for what in FIGURES:
            missing = found[0][name][what] is None
            values.append(NONE if missing else pm_of(over([f[name] for f in found], what)))
            gap = None if missing or name == OURS else less(found, name, what)
            gaps.append(NONE if gap is None else f"{pm_of(gap, '+')} ({in_ses(gap)})")
        body.append([name, *values, *gaps])
    return body


def reading(kinds: dict[str, list[dict]]) -> str:
    """Where Mix-DPO stands, and where it is not at least as good as another row; words follow from the figures."""
    parts, behind, level = [], [], []
    for kind, found in kinds.items():
        f = {name: {what: over([f[name] for f in found], what)["mean"] for what in FIGURES}
             for name in (OURS, KNOWN, TRUTH)}
        parts.append(f"{kind}: {f[OURS]['ll']:.3f} nats a pair, ARI {f[OURS]['ari']:.2f} (known types "
                     f"{f[KNOWN]['ll']:.3f}, truth {f[TRUTH]['ll']:.3f} and ARI {f[TRUTH]['ari']:.2f})")
        for name in COMPARED:
            gap = less(found, name, "ll")
            if gap["mean"] > 0:
                place = behind if gap["mean"] > 2 * se_over(gap) else level
                place.append(f"{name} with {kind} ({pm_of(gap, '+')})")
    text = f"Mix-DPO explains choices of new users. {'; '.join(parts)}. "
    text += (f"It is behind, by more than two standard errors: {'; '.join(behind)}. " if behind else
             f"By no more than two standard errors is it behind any of {', '.join(COMPARED)}. ")
    return text + (f"Also better than Mix-DPO, but within two standard errors: {'; '.join(level)}." if level else
                   "All other rows of these have a lower mean." if behind else "All of these have a lower mean.")


def page(rows):
    kinds = {f"{K} types, {pairs:,} pairs": found for (K, pairs), found in by(rows, "types", "pairs").items()}
    shown = {}
    for (pairs, K), found in sorted(by(rows, "pairs", "types").items()):
        for what, label in FIGURES.items():
            for name in (OURS, EARLIER, RANDOM, HARD, ONE, KNOWN):
                if found[0][name][what] is not None:
                    f = over([f[name] for f in found], what)
                    lines = shown.setdefault(what, {}).setdefault(f"{pairs:,} pairs", {})
                    lines.setdefault(name, []).append((K, f["mean"], se_over(f)))
    head = ["row", *FIGURES.values(), "log-likelihood less Mix-DPO's", "ARI less Mix-DPO's"]
    tables = [part for kind, found in kinds.items() for part in (f"**{kind}**", table_of(head, rows_of(found)))]
    worlds, sizes = max(len(found) for found in kinds.values()), sorted({cell["pairs"] for cell, _ in rows})
    notes = (f"Log-likelihood of all choices of a new user (M11), nats a pair. ARI: users by their likeliest expert at "
             f"the end of the run. Means over up to {worlds} worlds ± SE; differences are paired by world, in brackets "
             "in SEs. The penalty's candidates were chosen on other worlds (seeds 100 to 119), and so was the number "
             f"of passes ({', '.join(f'{PASSES[pairs]} over {pairs:,} pairs' for pairs in sizes)}; seeds 100 to 103, "
             "known types). EM-DPO trains so many in each of its rounds. Known types: responsibilities are the true "
             "types in all steps; its ARI is of the experts' own assignment.")
    return "\n\n".join([reading(kinds), *tables, notes]), {
        what: curves(of, ("types", FIGURES[what])) for what, of in shown.items()}


STUDY = Study(
    "Starts: how a mixture of several types begins",
    f"Two, three and four planted types of users with {EACH} pairs each: does the start with linear rewards find the "
    "types, is it at least as good as a random start and as hard assignments, and how far is it from known types?",
    cells, measure, page, version=2)
