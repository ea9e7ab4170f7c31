"""How many experts: held-out log-likelihood by K for a known number of types, and a rule that picks K."""

import math

import numpy as np

from data.report.pictures import curves
from data.studies import texts
from data.studies.aggregate import by, mean_over, over, se_over, table_of
from data.studies.study import Study
from data.studies.worlds import ONE, World, figures, fit, look, of_new_users, oracle, write
from mixdpo.mixture import e_step, log_marginal
from mixdpo.preferences import groups

SEEDS = {"smoke": 1, "quick": 4, "full": 12}
KS, TYPES = {"smoke": (1, 2, 3)}, (1, 2, 3, 4)
TASTES = ("warm", "terse", "cold", "lavish")
RULES = {"ll_user": "all choices of a new user (M11)", "ll": "single pairs (M5)"}


def cells(preset: str) -> list[dict]:
    types = TYPES if preset != "smoke" else (1, 2)
    planted = [{"world": "planted", "types": t, "experts": K, "seed": seed}
               for t in types for K in KS.get(preset, range(1, 9)) for seed in range(SEEDS[preset])]
    return planted + [{"world": "texts", "types": t, "experts": K, "seed": seed, "preset": preset}
                      for t in types for K in KS.get(preset, range(1, 7)) for seed in range(SEEDS[preset])]


def measure(cell: dict, folder) -> dict:
    """Log-likelihoods of every new user, nats a pair, for both rules."""
    K, seed = cell["experts"], cell["seed"]
    if cell["world"] == "texts":
        found = texts.load(folder.parent.parent, cell["preset"])
        judges = texts.Judges(TASTES[: cell["types"]], 150, 20, seed)
        training, held = texts.judge(found, judges), texts.judge(found, judges, heldout=True)
        fitted = texts.fit(training, K, seed)
        h = held.x @ fitted.theta.double().T
        w = fitted.log_w.double().expand_as(h)
        pairs, users = log_marginal(w, h).reshape(-1, 20).mean(1), e_step(w, h, held.group)[0] / 20
        return {"ll": pairs.tolist(), "ll_user": users.tolist(), "ari": texts.figures(fitted, training, held)["ari"]}
    world = World(seed=seed, types=cell["types"], users=200)
    write(world, folder)
    options = ONE if K == 1 else {"experts": K, "latent": "user", "start": "linear", "weights": "update"}
    found = look(fit(folder, "run", seed=seed, **options), folder / "heldout.jsonl")
    log_p, units = log_marginal(found.log_w, found.h), groups(found.pairs, "user")
    return {"ll": [float(log_p[unit].mean()) for unit in units],
            "ll_user": of_new_users(found.pairs, found.h, found.log_w).tolist(), "ari": figures(found)["ari"],
            "oracle": oracle(world)["ll_user"]["mean"]}


def picked(by_k: dict[int, list[float]], paired: bool) -> int:
    """The smallest K whose mean is within one standard error of the best mean. paired: the SE of the paired difference
    over users; else the SE of the best mean, as usual."""
    values = {K: np.array(v) for K, v in by_k.items()}
    best = max(values, key=lambda K: values[K].mean())

    def slack(K: int) -> float:
        of = values[best] - values[K] if paired else values[best]
        return float(of.std(ddof=1) / math.sqrt(len(of)))

    return min(K for K, v in values.items() if K == best or values[best].mean() - v.mean() <= slack(K))


def page(rows):
    found, shown, body, right = by(rows, "world", "types", "seed"), {}, [], {}
    names = {"planted": "planted", "texts": "real sentences"}
    of_cell = {(c["world"], c["types"], c["seed"], c["experts"]): f for c, f in rows}
    for world, types in dict.fromkeys((w, t) for w, t, _ in found):
        seeds = sorted({s for w, t, s in found if (w, t) == (world, types)})
        ks = sorted({k for w, t, _, k in of_cell if (w, t) == (world, types)})
        for what in RULES:
            for paired in (True, False):
                took = [picked({K: of_cell[world, types, s, K][what] for K in ks}, paired) for s in seeds]
                tally = right.setdefault((world, what, paired), {})
                tally[types] = [sum(k == types for k in took), sum(k < types for k in took),
                                sum(k > types for k in took), took]
        for what in RULES:
            points = []
            for K in ks:
                f = over([{"v": float(np.mean(of_cell[world, types, s, K][what]))} for s in seeds], "v")
                points.append((K, f["mean"], se_over(f)))
            shown.setdefault(f"{names[world]}, {types} type" + "s" * (types > 1), {})[RULES[what]] = points
        for K in ks:
            of = [of_cell[world, types, s, K] for s in seeds]
            cells = [f"{over([{'v': float(np.mean(f[what]))} for f in of], 'v')['mean']:.4f}" for what in RULES]
            body.append([names[world], types, K, *cells, mean_over(of, "ari")])
    tallies = [[names[world], RULES[what], "paired" if paired else "the best's own",
                *(f"{r} / {few} / {many}" for r, few, many, _ in tally.values())]
               for (world, what, paired), tally in right.items()]

    def rate(world: str, what: str, paired: bool = True) -> str:
        tally = right[world, what, paired].values()
        return f"{sum(t[0] for t in tally)} of {sum(len(t[3]) for t in tally)}"

    few, many = (sum(t[n] for t in right["planted", "ll_user", True].values()) for n in (1, 2))
    reading = (
        "On planted types, whole users and the usual rule, one standard error of the best's own mean, are right in "
        f"{rate('planted', 'll_user', False)} worlds; one standard error of the paired difference, which is smaller, "
        f"is right in {rate('planted', 'll_user')} (too few experts in {few}, too many in {many}). By pairs alone they "
        f"are right in {rate('planted', 'll', False)} and {rate('planted', 'll')}. On real sentences: "
        f"{rate('texts', 'll_user', False)} and {rate('texts', 'll_user')} by users, {rate('texts', 'll', False)} and "
        f"{rate('texts', 'll')} by pairs.")
    types = sorted({t for _, t, _ in found})
    text = "\n\n".join([
        reading, "Right / too few / too many, of the worlds of each number of types:",
        table_of(["world", "by", "standard error", *(f"{t} type" + "s" * (t > 1) for t in types)], tallies, 3),
        "The rule: the smallest K whose held-out log-likelihood is within one standard error of the best one's. Mean "
        "log-likelihoods, nats a pair:",
        table_of(["world", "types", "K", "of new users (M11)", "of pairs (M5)", "ARI"], body)])
    return text, {"k": curves(shown, ("experts K", "held-out log-likelihood (nats a pair)"), columns=4,
                              one_scale=False)}


STUDY = Study(
    "How many experts",
    "Worlds of one to four planted types (200 users of 10 comparisons), and real sentences judged by one to four "
    "tastes (150 users of 20): does held-out log-likelihood say how many experts to take, and how often is the "
    "one-standard-error rule right?",
    cells, measure, page, texts.prepare)
