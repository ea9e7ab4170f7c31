"""The result of a job: one sentence, and the table behind it.

    own reward      for each type, the type's reward on completions by the expert that stands for the type; mean over
                    types. DPO and the reference serve all types with one policy
    accuracy        share of held-out choices that a run predicts with the weights of the user who made them

More KL to the reference buys more reward with any method, so the table shows KL. The sentence compares one mixture with
DPO. The mixture is chosen by its options, not by its figures: the first run with one latent type for each user, else
the first with a learnt gate, else the first mixture. A job with domains has no own reward: there the prompt decides who
judges (domains.py).
"""

import math

import numpy as np

from data.report.job import Job, heads_of, rewards_of
from data.report.tables import NONE, escape, in_ses, pm, section, table
from mixdpo.evaluation.statistics import mean_se

CLEAR = 2.0     # standard errors; a smaller difference is not called one
LEARNT_GATES = ("linear", "mlp", "user", "prompt-user")


def own_rewards(job: Job) -> dict[str, dict]:
    """Run -> {"values": own reward of each prompt (N,), "kl": figure, mean over types in nats}, for "reference" and
    each run that has an expert for every type; {} where rewards were not measured or the job has domains."""
    rows, types, rewards = job.results["policies"], job.dataset.get("annotators", []), rewards_of(job)
    if not rows or not types or "domains" in job.dataset or not {*types} <= {*rewards}:
        return {}
    heads, found = heads_of(job), {}
    for run in ["reference", *job.results["preferences"]]:
        if run in rows:                                                     # one policy serves all types
            serves = dict.fromkeys(types, run)
        else:
            named = job.results["preferences"][run]["own"]                  # of each expert, its type or None
            serves = {kind: row for kind, row in zip(named, heads.get(run, [])) if kind}
        if {*serves} == {*types}:
            values = [np.array(rows[row]["values"])[:, rewards.index(kind)] for kind, row in serves.items()]
            kl = float(np.mean([rows[row]["kl"]["mean"] for row in serves.values()]))
            found[run] = {"values": np.mean(values, axis=0), "kl": {"mean": kl, "se": math.nan}}
    return found


def compared_runs(job: Job) -> tuple[str | None, str | None]:
    """The mixture that the sentence is about, and the DPO run that it is compared with; None where there is none."""
    of = job.results["preferences"]
    config = {run.name: run.config for run in job.runs}
    mixtures = [run for run, figures in of.items() if figures["experts"] > 1]
    by_user = [run for run in mixtures if config.get(run, {}).get("latent") == "user"]
    gated = [run for run in mixtures if config.get(run, {}).get("gate") in LEARNT_GATES]
    dpo = next((run for run, figures in of.items() if figures["experts"] == 1), None)
    return next(iter([*by_user, *gated, *mixtures]), None), dpo


def verdict(difference: float, se: float) -> str:
    """How two runs compare, in words. se: standard error of the difference."""
    if not math.isfinite(se) or abs(difference) <= CLEAR * se:
        return "does not differ clearly from"
    return "is better than" if difference > 0 else "is worse than"


def sentence(job: Job) -> str:
    """The result in one sentence of plain text."""
    of, (mixture, dpo) = job.results["preferences"], compared_runs(job)
    if not of:
        return "No held-out choices were evaluated."
    if mixture is None or dpo is None:
        run = mixture or dpo
        return (f"{run} predicts {pm(of[run]['accuracy_own'])} of the held-out choices; the job has no "
                f"{'DPO run' if dpo is None else 'mixture'} to compare it with.")
    ours, theirs = of[mixture]["accuracy_own"], of[dpo]["accuracy_own"]
    judged = verdict(ours["mean"] - theirs["mean"], math.hypot(ours["se"], theirs["se"]))
    text = (f"On held-out choices {mixture} {judged} {dpo}: with each user's own weights it predicts {pm(ours)} of "
            f"them, {dpo} {pm(theirs)}")
    own = own_rewards(job)
    if mixture in own and dpo in own:
        gap = mean_se(own[mixture]["values"] - own[dpo]["values"])
        text += (f"; its own reward is {dpo}'s {pm(gap, sign='+')}, at a KL of {pm(own[mixture]['kl'], 1)} nats "
                 f"against {pm(own[dpo]['kl'], 1)}")
    return text + "."


def headline(job: Job) -> tuple[list[str], list[list[str]]]:
    """Heading and rows of the table behind the sentence: a row a run, the reference first where it was sampled."""
    of, own, (_, dpo) = job.results["preferences"], own_rewards(job), compared_runs(job)
    kinds = [kind for kind in job.dataset.get("annotators", []) if all(kind in row["types"] for row in of.values())]
    head = ["run", "experts", "accuracy", *(f"accuracy, {kind}" for kind in kinds)]
    head += ["own reward", f"minus {dpo}", "in SEs", "KL (nats)"] if own else []
    rows = []
    for run in [*(["reference"] if "reference" in own else []), *of]:
        if run == "reference":
            row = [run, NONE, NONE, *[NONE] * len(kinds)]
        else:
            accuracy = [of[run]["accuracy_own"], *(of[run]["types"][kind]["accuracy"] for kind in kinds)]
            row = [run, str(of[run]["experts"]), *map(pm, accuracy)]
        if run in own:
            gap = mean_se(own[run]["values"] - own[dpo]["values"]) if dpo in own and run != dpo else None
            row += [pm(mean_se(own[run]["values"])), *([pm(gap, sign="+"), in_ses(gap)] if gap else [NONE, NONE]),
                    pm(own[run]["kl"], 2)]
        elif own:
            row += [NONE] * 4
        rows.append(row)
    return head, rows


def result(job: Job, *pictures: str) -> str:
    """The section that opens the report. pictures: Markdown links."""
    head, rows = headline(job)
    if not rows:
        return section("Result", sentence(job))
    note = "Accuracy is the share of held-out choices that a run predicts with the weights of the user who chose."
    if "own reward" in head:
        note += " Own reward is a type's reward on completions by the expert that serves it: compare it at similar KL."
    return section("Result", escape(sentence(job)), *pictures, note,
                   table([*map(escape, head)], [[*map(escape, row)] for row in rows]))
