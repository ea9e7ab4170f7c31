"""Tables about users: accuracy by type, accuracy for new users, win rates, and the study of planted types.

    greatest regret         largest loss of a type against the run that serves the type best: max over types, per run
    where types disagree    pairs that two types order differently, scored by the expert of the type that judged
"""

import math

import numpy as np

from data.report.job import Job, annotators_of
from data.report.tables import NONE, escape, in_ses, measured, plain, pm, section, table
from mixdpo.evaluation.statistics import mean_se

WAYS = ("user", "pair, pooled", "pair, majority")  # how users are assigned to types (data/experiment/planted.py)


def types(job: Job) -> str:
    title, rows, kinds = "What each type of user gets", job.results["preferences"], annotators_of(job)
    kinds = [kind for kind in kinds if all(kind in figures["types"] for figures in rows.values())]
    if not rows or len(kinds) < 2:
        return section(title, "Not measured: this needs held-out pairs of several annotators.")
    best = {kind: max(figures["types"][kind]["accuracy"]["mean"] for figures in rows.values()) for kind in kinds}
    by_accuracy, by_nats, by_expert = [], [], []
    dpo = next((figures for figures in rows.values() if figures["experts"] == 1), None)
    for run, figures in rows.items():
        of = figures["types"]
        for name, digits, body in (("accuracy", 3, by_accuracy), ("log_likelihood", 4, by_nats)):
            worst = min(kinds, key=lambda kind: (measured(of[kind][name]), of[kind][name]["mean"]))
            body.append([escape(run), *(pm(of[kind][name], digits) for kind in kinds), pm(of[worst][name], digits)])
        regrets = [best[kind] - of[kind]["accuracy"]["mean"] for kind in kinds]
        by_accuracy[-1].append(f"{max(regrets):.3f}" if all(map(math.isfinite, regrets)) else NONE)
        if found := figures["conflicts"]:
            less = [NONE, NONE]
            if dpo and dpo is not figures and measured(found):
                gap = np.subtract(*(np.array(of["conflicts_by_pair"], float) for of in (figures, dpo)))     # null: NaN
                less = [pm(gap := mean_se(gap, figures["conflicts_prompt"]), sign="+"), in_ses(gap)]
            own = [of[kind]["own_expert"] for kind in kinds]
            shares = [pm(f) for f in (*own, found)]
            by_expert.append([escape(run), *shares, *less, str(found["n"])])
    head = ["run", *map(escape, kinds), "worst type"]
    return section(
        title,
        "Look at the worst type: it is what a run guarantees. Accuracy uses each user's own weights; the greatest "
        "regret is the largest loss of a type against the run that serves the type best.",
        table([*head, "greatest regret"], by_accuracy),
        "Log-likelihood of the same pairs (nats a pair).", table(head, by_nats),
        by_expert and "Accuracy if each user's type were known. Look at the pairs on which types disagree, where DPO "
        "cannot be right for all. A cell is empty if no expert stands for the type.",
        by_expert and table(["run", *(f"{escape(kind)}, its expert" for kind in kinds), "where types disagree",
                         "minus DPO", "in SEs", "pairs"], by_expert))


def adaptation(job: Job) -> str:
    title, parts = "New users", []
    for name, runs in job.results["adapt"].items():
        shown, body = list(dict.fromkeys(point["shown"] for curve in runs.values() for point in curve)), []
        for run, curve in runs.items():
            for what in ("all", "worst type"):
                cells = {p["shown"]: pm(p["accuracy"] if what == "all" else min(
                    (of["accuracy"] for of in p["types"].values()), key=lambda f: f["mean"])) for p in curve}
                last = [pm(curve[-1]["rise"], sign="+"), in_ses(curve[-1]["rise"])] if what == "all" else [NONE, NONE]
                body.append([escape(run), what, *(cells.get(n, NONE) for n in shown), *last])
        users = ", ".join(f"{p['users']} at {p['shown']}" for p in next(iter(runs.values())))
        parts += [f"{escape(name)} (users: {users}):",
                  table(["run", "accuracy", *(f"{n} shown" for n in shown), f"rise at {shown[-1]}", "in SEs"], body,
                        left=2)]
    return section(
        title,
        "Look at the rise: accuracy on a new user's second half of pairs, given a posterior over experts from pairs of "
        "the first half. No weight is trained; the last two columns compare each user with no pairs shown.", *parts)


def win_rates(job: Job) -> str:
    found, columns, body = job.win_rates, job.win_rates["columns"], []

    def cell(f: dict) -> str:
        return f"{f['rate']:.3f} ({f['low']:.3f} to {f['high']:.3f})" if measured(f, "rate") else NONE

    for policy in next(iter(columns.values())):
        of = [rows[policy] for rows in columns.values()]
        ties, unjudged = (sum(f.get(what, 0) for f in of) / len(of) for what in ("ties", "unjudged"))
        worst = min(of, key=lambda f: (measured(f, "rate"), f["rate"]))
        body.append([escape(policy), *map(cell, of), cell(worst), f"{ties:.1f}", f"{unjudged:.1f}"])
    return section(
        "Win rates",
        f"Share of {found['prompts']} prompts on which {escape(found['judge'])} prefers a policy's completion to that "
        f"of {escape(found['against'])}, with a 95 % bootstrap interval. A tie counts one half; 0.5 is no difference.",
        table(["policy", *map(escape, columns), "worst", "ties", "not judged"], body))


# ---- planted types (data/experiment/planted.py)


def of_bayes(row: dict, way: str) -> dict:
    """Mean over worlds of ARI / Bayes-optimal ARI, with its SE; "reach": number of worlds with a ratio of 0.9 or more.
    """
    ratios = [world[way] / world["bayes"] for world in row["worlds"]]
    return mean_se(ratios) | {"reach": sum(ratio >= 0.9 for ratio in ratios)}


def planted(found: dict) -> str:
    rows = []
    for row in found["rows"]:
        cells = [f"{pm(of_bayes(row, way))}; {of_bayes(row, way)['reach']} of {len(row['worlds'])}" for way in WAYS]
        rows.append([str(row["types"]), str(row["each"]), str(row["users"]), pm(mean_se([w["bayes"] for w in
                                                                                        row["worlds"]])), *cells])
    return "# One type a pair or one a user\n\n" + "\n\n".join([
        f"`python -m data.experiment.planted` ({plain(found['config'])}). Look at how fast each way reaches 1. A cell "
        "is the adjusted Rand index of the users' assignment divided by that of Bayes-optimal assignment with the true "
        "rewards (mean over worlds ± SE), and the number of worlds in which the ratio is 0.9 or more.",
        "![ARI over the Bayes-optimal ARI by the pairs a user judges](planted.png)",
        table(["types", "pairs a user", "users", "Bayes-optimal ARI", *WAYS], rows)]) + "\n"
