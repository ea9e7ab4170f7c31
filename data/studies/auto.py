"""Chosen options: does train.py without options find how many types there are, and lose nothing by it?

Planted worlds (worlds.py) with one, two and three types of users. Options that are not about the mixture (learning
rates, batch, passes) are the same in both rows:

    chosen    --experts auto: K, the latent unit, context pairs and start are chosen from the file (evaluation/auto.py)
    by hand   the true number of types, one type per user, a linear start
"""

import dataclasses

from data.report.pictures import curves
from data.studies.aggregate import by, over, pm_of, se_over, table_of
from data.studies.study import Study
from data.studies.worlds import HEADS, ONE, STEPS, World, figures, fit, look, write
from mixdpo.evaluation import auto
from mixdpo.evaluation.statistics import mean_se

USERS, TYPES = {"smoke": (20,), "quick": (100,), "full": (40, 100, 300)}, (1, 2, 3)
SEEDS = {"smoke": 1, "quick": 20, "full": 20}
FIRST = 200         # the rule was written with other worlds (seeds 100 to 104)


def cells(preset: str) -> list[dict]:
    return [{"types": types, "users": users, "seed": FIRST + seed} for types in TYPES for users in USERS[preset]
            for seed in range(SEEDS[preset])]


def measure(cell: dict, folder) -> dict:
    world = World(seed=cell["seed"], types=cell["types"], users=cell["users"])
    write(world, folder)
    usual = {"seed": cell["seed"]} | {k: v for k, v in (STEPS | HEADS).items() if k != "start_steps"}
    words = ["--data", folder / "train.jsonl", "--model", folder / "model", "--out", folder / "chosen", "--sharing",
             "heads", "--shared-rank", 0, "--targets", ""]
    words += [word for name, value in usual.items() for word in (f"--{name.replace('_', '-')}", value)]
    config = auto.parse([str(word) for word in words], "train.py")
    K, own = config.experts, {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    own = {name: own[name] for name in ("latent", "em", "estep", "context", "start", "gate")} | {"experts": K}
    chosen = figures(look(fit(folder, "chosen", **ONE if K == 1 else own, seed=cell["seed"]), folder / "heldout.jsonl"))
    hand = {"experts": cell["types"], "latent": "user", "start": "linear"}
    by_hand = figures(look(fit(folder, "hand", **ONE if cell["types"] == 1 else hand, seed=cell["seed"]),
                           folder / "heldout.jsonl"))
    return {"experts": K, "chosen": chosen["ll_user"]["mean"], "hand": by_hand["ll_user"]["mean"]}


def page(rows):
    body, right, lines = [], {}, {}
    for (types, users), found in by(rows, "types", "users").items():
        picked = [f["experts"] for f in found]
        counts = [sum(K == k for K in picked) for k in range(1, auto.MOST + 1)]
        gap = mean_se([f["chosen"] - f["hand"] for f in found])
        body.append([types, users, *counts, f"{over(found, 'chosen')['mean']:.3f}",
                     f"{over(found, 'hand')['mean']:.3f}", pm_of(gap, "+")])
        right[types, users] = f"{counts[types - 1]} of {len(found)}"
        lines.setdefault(f"{types} type" + "s" * (types > 1), []).append((users, gap["mean"], se_over(gap)))
    reading = "The number of types is right in " + "; ".join(
        f"{n} worlds ({types} type{'s' * (types > 1)}, {users} users)" for (types, users), n in right.items()) + "."
    head = ["types", "users", *(f"K = {k}" for k in range(1, auto.MOST + 1)), "log-likelihood, chosen", "by hand",
            "difference"]
    note = ("K = 1 to 4: worlds in which it was chosen. Log-likelihood: of all ten choices of a new user (M11), nats a "
            "pair; by hand: with the true number of types. Means over worlds ± SE.")
    return "\n\n".join([reading, table_of(head, body, 2), note]), {
        "difference": curves({"": lines}, ("users", "log-likelihood, chosen minus by hand"), columns=1)}


STUDY = Study(
    "Chosen options",
    "Does `train.py --data FILE --model M --out RUN`, without other options, find how many types of users there are, "
    "and how much does it lose against options by hand?", cells, measure, page)
