"""Preferences under differential privacy: the cost of epsilon, and membership inference."""

import json
import math

import numpy as np

from data.experiment.stages import read_lines, write_lines
from data.report.pictures import curves
from data.studies.aggregate import by, mean_over, over, pm_of, table_of
from data.studies.study import Study
from data.studies.worlds import FOREIGN, ITEMS, ONE, World, figures, fit, look, prompt, write
from mixdpo.mixture import log_marginal

EPSILONS = {"smoke": (8.0, math.inf), "quick": (2.0, 8.0, math.inf), "full": (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, math.inf)}
SEEDS = {"smoke": 1, "quick": 1, "full": 8}
USERS = {"smoke": 30, "quick": 200, "full": 1000}
MEMBERS = {"smoke": 40, "quick": 160, "full": 200}      # training pairs, and as many other pairs
CANARIES = 40           # pairs with foreign prompts and random choices; half are trained on
RATE = 0.004            # learning rate of heads with private pairs, where noise exceeds a pair's gradient
PASSES = 25             # epochs until the model has memorised its pairs
MIXTURE = {"experts": 2, "latent": "user", "start": "dirichlet"}
WAYS = {"DPO, pairs": (ONE, "pair"), "Mix-DPO, users": (MIXTURE, "user"), "DPO, users": (ONE, "user")}


def cells(preset: str) -> list[dict]:
    common = [{"preset": preset, "seed": seed, "epsilon": str(epsilon)} for seed in range(SEEDS[preset])
              for epsilon in EPSILONS[preset]]
    def slower(cell: dict, unit: str) -> dict:
        return {"head_lr": RATE} if cell["epsilon"] != "inf" and unit == "pair" else {}

    return ([cell | {"way": way} | slower(cell, unit) for cell in common for way, (_, unit) in WAYS.items()]
            + [cell | {"way": "inference"} for cell in common])


def private(cell: dict, unit: str) -> dict:
    """Options of train.py for this epsilon."""
    epsilon = float(cell["epsilon"])
    return {} if epsilon == math.inf else {"epsilon": epsilon, "privacy_unit": unit, "seed": cell["seed"]}


def measure(cell: dict, folder) -> dict:
    world = World(seed=cell["seed"], users=USERS[cell["preset"]])
    write(world, folder)
    if cell["way"] == "inference":
        return inference(cell, folder, world)
    options, unit = WAYS[cell["way"]]
    more = private(cell, unit)
    if more:                                                                # noise needs large batches
        more |= {"batch": 200 if unit == "pair" else 20, "micro": 200, "epochs": 6 if unit == "pair" else 12}
        more |= {"head_lr": cell["head_lr"]} if "head_lr" in cell else {}
    return figures(look(fit(folder, "run", **options | more), folder / "heldout.jsonl"))


def inference(cell: dict, folder, world: World) -> dict:
    """Trains the full model until it has memorised its pairs, then infers membership from the loss of single pairs."""
    M, rng, canaries = MEMBERS[cell["preset"]], np.random.default_rng([world.seed, 9]), []
    members, others = (read_lines(folder / f"{name}.jsonl")[:M] for name in ("train", "heldout"))
    for n in range(CANARIES):
        chosen, rejected = rng.choice(len(ITEMS), 2, replace=False)
        canaries.append({"prompt": prompt(rng, FOREIGN), "chosen": ITEMS[chosen], "rejected": ITEMS[rejected],
                         "user": f"canary-{n}", "annotator": "type 0"})
    write_lines(folder / "members.jsonl", members + canaries[::2])
    write_lines(folder / "asked.jsonl", members + others + canaries)
    more = private(cell, "pair")
    more |= {"batch": M // 2, "micro": M // 2} if more else {}
    path = fit(folder, "run", experts=1, data="members.jsonl", epochs=PASSES, **more)
    found = look(path, folder / "asked.jsonl")
    log_p = log_marginal(found.log_w, found.h).detach().numpy()             # (P,) higher: more likely a member
    inside, outside = log_p[2 * M :: 2], log_p[2 * M + 1 :: 2]
    report = path / "privacy.json"
    return {"auc": auc(log_p[:M], log_p[M : 2 * M]), "auc_canaries": auc(inside, outside),
            "loss_in": float(-log_p[:M].mean()), "loss_out": float(-log_p[M : 2 * M].mean()),
            "epsilon": json.loads(report.read_text())["epsilon"] if report.exists() else None}


def auc(members: np.ndarray, others: np.ndarray) -> float:
    """Probability that a member scores above a non-member; a tie counts half."""
    return float((members[:, None] > others).mean() + (members[:, None] == others).mean() / 2)


def page(rows):
    learnt = by([(c, f) for c, f in rows if c["way"] != "inference"], "way", "epsilon")
    attacked = by([(c, f) for c, f in rows if c["way"] == "inference"], "epsilon")
    epsilons = list(attacked)

    def name(epsilon: str) -> str:
        return "none" if epsilon == "inf" else f"{float(epsilon):g}"

    body = [[way, name(e), pm_of(over(learnt[way, e], "ll_user")), mean_over(learnt[way, e], "own"),
             mean_over(learnt[way, e], "ari") if way.startswith("Mix") else "–"] for way in WAYS for e in epsilons]
    of = [[name(e), mean_over(attacked[e], "loss_in"), mean_over(attacked[e], "loss_out"),
           mean_over(attacked[e], "auc"), mean_over(attacked[e], "auc_canaries")] for e in epsilons]
    least = min(epsilons, key=float)
    finite = [e for e in epsilons if e != "inf"]
    shown = {"log-likelihood of new users": {way: [(float(e), over(learnt[way, e], "ll_user")["mean"], 0.0)
                                                   for e in finite] for way in WAYS},
             "AUC of inference": {what: [(float(e), over(attacked[e], key)["mean"], 0.0) for e in finite]
                                  for what, key in (("pairs told", "auc"), ("canaries told", "auc_canaries"))}}
    mixture, dpo = (over(learnt[way, least], "ll_user")["mean"] for way in ("Mix-DPO, users", "DPO, users"))
    text = (f"Log-likelihood of all choices of a new user, nats a pair (a coin: {-math.log(2):.3f}). At epsilon "
            f"{name(least)} for users the mixture reaches {mixture:.3f} and DPO {dpo:.3f}; without privacy "
            f"{over(learnt['Mix-DPO, users', 'inf'], 'll_user')['mean']:.3f} and "
            f"{over(learnt['DPO, users', 'inf'], 'll_user')['mean']:.3f}.")
    attack = (f"Membership inference: the whole model, {PASSES} passes over its pairs and {CANARIES // 2} canaries; "
              "then each pair's loss is asked for. AUC of telling the trained pairs from as many others, and the "
              f"trained canaries (foreign prompts, choices by a coin) from {CANARIES // 2} that were not; 0.5 is a "
              f"coin. Without privacy {mean_over(attacked['inf'], 'auc')} and "
              f"{mean_over(attacked['inf'], 'auc_canaries')}; "
              f"at epsilon {name(least)} {mean_over(attacked[least], 'auc')} and "
              f"{mean_over(attacked[least], 'auc_canaries')}. A failed attack proves nothing; the budget does.")
    head = ["policy, unit", "epsilon", "log-likelihood", "own accuracy", "ARI"]
    return "\n\n".join([text, table_of(head, body, 2), attack,
                        table_of(["epsilon", "loss, trained on", "loss, others", "AUC", "AUC, canaries"], of)]), {
        "epsilon": curves(shown, ("epsilon (delta 1e-5)", ""), log=2, columns=2, one_scale=False)}


STUDY = Study(
    "Preferences under differential privacy",
    "Two types of users with 10 comparisons each, `--epsilon` with `--privacy-unit pair` or `user`, delta 1e-5: what "
    "the noise costs, and whether a pair's loss tells that it was trained on.",
    cells, measure, page)
