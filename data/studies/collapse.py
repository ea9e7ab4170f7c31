"""When a mixture collapses: a map over beta, the entropy bonus of the gate and the temperature of the E-step.

Collapse is measured on held-out pairs, independently of the inputs of the warnings in training:

    expert      one expert is the likeliest of the gate for over 95 % of held-out prompts
    posterior   responsibilities of held-out pairs carry no information about who judged: ARI below 0.05

The warnings (alarms in mixdpo/metrics.py) are evaluated at every step, as in training.
"""

import numpy as np

from data.report.pictures import maps
from data.studies.aggregate import by, mean_over, over, pm_of, se_over, table_of
from data.studies.study import Study
from data.studies.worlds import World, figures, fit, look, oracle, write
from mixdpo.evaluation.statistics import adjusted_rand_index, mean_se
from mixdpo.metrics import WINDOW, alarms
from mixdpo.mixture import e_step

SEEDS = {"smoke": 1, "quick": 1, "full": 3}
BETAS, BONUSES = (0.02, 0.1, 0.5, 2.0), (0.0, 0.03, 0.1, 0.3, 1.0)
TEMPERATURES, KS = (0.25, 0.5, 1.0, 2.0), (2, 4, 8)
ALARMS = {"expert": "expert collapse", "posterior": "posterior collapse"}


def cells(preset: str) -> list[dict]:
    bonuses, temperatures, ks = (BONUSES, TEMPERATURES, KS) if preset != "smoke" else (BONUSES[::4], (0.5, 1.0), (2,))
    betas = BETAS if preset != "smoke" else BETAS[::2]
    return [{"experts": 1, "beta": beta, "bonus": 0.0, "temperature": 1.0, "seed": s}
            for beta in betas for s in range(SEEDS[preset])] + [
           {"experts": K, "beta": beta, "bonus": bonus, "temperature": T, "seed": s} for K in ks for T in temperatures
           for bonus in bonuses for beta in betas for s in range(SEEDS[preset])]


def measure(cell: dict, folder) -> dict:
    world = World(seed=cell["seed"], users=120, domains=True)
    write(world, folder)
    options = {"experts": cell["experts"], "beta": cell["beta"], "seed": cell["seed"]}
    if cell["experts"] > 1:
        options |= {"gate": "linear", "gate_lr": 0.05, "gate_features": "mean", "gate_entropy": cell["bonus"]}
        if cell["temperature"] != 1:
            options |= {"variant": "tempered", "variant_temperature": cell["temperature"]}
    found = look(fit(folder, "run", **options), folder / "heldout.jsonl")
    rung, steps = set(), found.metrics
    for t in range(WINDOW, len(steps) + 1):
        rung |= set(alarms(steps[t - WINDOW : t], cell["experts"], 10))
    first = found.log_w.argmax(1).bincount(minlength=cell["experts"]).max() / len(found.h)
    summary = figures(found)
    z = e_step(found.log_w, found.h)[1].argmax(1).tolist()                  # by weights and choices
    ari = adjusted_rand_index(z, [pair.annotator for pair in found.pairs])
    return summary | {"oracle": oracle(world)["ll"], "rung": sorted(rung), "most": float(first), "ari": ari,
                   "expert": bool(cell["experts"] > 1 and first > 0.95),
                   "posterior": bool(cell["experts"] > 1 and ari < 0.05)}


def page(rows):
    dpo = {c["beta"]: f for c, f in rows if c["experts"] == 1}
    found = by([(c, f) for c, f in rows if c["experts"] > 1], "experts", "temperature", "bonus", "beta")
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
    tally = []
    for kind, alarm in ALARMS.items():
        for K in ks:
            of = [f for key, fs in found.items() if key[0] == K for f in fs]
            counts = [sum(f[kind] == true and (alarm in f["rung"]) == rang for f in of)
                      for true, rang in ((True, True), (True, False), (False, True), (False, False))]
            tally.append([alarm, K, *counts])
    body = [[K, f"{T:g}", f"{bonus:g}", f"{beta:g}", mean_over(fs, "effective", 2), mean_over(fs, "variance"),
             pm_of(fs[0]["ll"]), ", ".join(kind for kind in ALARMS if any(f[kind] for f in fs)) or "–"]
            for (K, T, bonus, beta), fs in found.items() if T == 1]
    text = "\n\n".join([
        reading(found, dpo, ks, temperatures, bonuses, betas),
        "Warnings compared with collapse on held-out pairs, all settings:",
        table_of(["alarm", "K", "true, warned", "true, silent", "false, warned", "false, silent"], tally),
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
    "and do the two warnings detect collapse?",
    cells, measure, page)
