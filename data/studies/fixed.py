"""Fixed weights: EM without a gate, from a symmetric start and from starts that break the symmetry."""

import math

import torch

from data.report.pictures import curves
from data.studies import texts
from data.studies.aggregate import by, mean_over, over, pm_of, se_over, table_of
from data.studies.study import Study
from data.studies.worlds import World, figures, fit, look, oracle, write
from mixdpo.evaluation.statistics import mean_se

SEEDS = {"smoke": 1, "quick": 8, "full": 20}
STARTS = {"symmetric": "none", "random": "dirichlet", "linear": "linear"}
DPO = {"world": "planted", "latent": "-", "sharing": "-", "start": "DPO"}
TASTES = ("warm", "terse")                  # tastes of the judges of real sentences


def cells(preset: str) -> list[dict]:
    ways = [{"world": "planted", "latent": latent, "sharing": sharing, "start": start} for latent in ("user", "pair")
            for sharing in ("heads", "models") for start in STARTS]
    real = [{"world": "texts", "latent": latent, "experts": K, "preset": preset}
            for latent, K in (("user", 1), ("user", 2), ("pair", 2))]
    return [way | {"seed": seed} for seed in range(SEEDS[preset]) for way in (DPO, *ways, *real)]


def measure(cell: dict, folder) -> dict:
    if cell["world"] == "texts":
        return of_texts(cell, texts.load(folder.parent.parent, cell["preset"]))
    world = World(seed=cell["seed"])
    write(world, folder)
    options = {"experts": 1} if cell["start"] == "DPO" else {
        "latent": cell["latent"], "sharing": cell["sharing"], "start": STARTS[cell["start"]], "seed": cell["seed"]}
    found = look(fit(folder, "run", **options), folder / "heldout.jsonl")
    gain = [step["q_gain"] for step in found.metrics]
    return figures(found) | {"oracle": oracle(world), "gain": [sum(gain[i : i + 10]) / 10 for i in
                                                               range(0, len(gain) - 9, 10)]}


def of_texts(cell: dict, found: texts.Texts) -> dict:
    """The same with linear rewards on real sentences, random first responsibilities and uniform weights."""
    judges = texts.Judges(TASTES, 120, 20, cell["seed"])
    training, held = texts.judge(found, judges), texts.judge(found, judges, heldout=True)
    units = training if cell["latent"] == "user" else texts.per_pair(training)
    even = torch.full((cell["experts"],), -math.log(cell["experts"])).double()
    return texts.figures(texts.fit(units, cell["experts"], cell["seed"], log_w=even), units, held)


def page(rows):
    ways = by([(c, f) for c, f in rows if c["world"] == "planted"], "latent", "sharing", "start")
    real = by([(c, f) for c, f in rows if c["world"] == "texts"], "latent", "experts")
    body, shown = [], {}
    for (latent, sharing, start), found in ways.items():
        less = mean_se([f["ll_user"]["mean"] - o["ll_user"]["mean"] for f, o in zip(found, ways["-", "-", "DPO"])])
        bound = mean_se([f["ll_user"]["mean"] - f["oracle"]["ll_user"]["mean"] for f in found])
        ari = mean_se([f["ari"] / f["oracle"]["ari" if latent == "user" else "ari_pair"] for f in found])
        body.append([latent, sharing, start, mean_over(found, "own"), pm_of(less, "+"), pm_of(bound, "+"),
                     "–" if start == "DPO" else f"{ari['mean']:.3f}", mean_over(found, "effective", 2),
                     mean_over(found, "apart", 2)])
        if start != "DPO":
            line = [mean_se([f["gain"][n] for f in found]) for n in range(len(found[0]["gain"]))]
            shown.setdefault(f"one type a {latent}, {sharing}", {})[start] = [
                (10 * n + 10, f["mean"], se_over(f)) for n, f in enumerate(line)]

    def ll(latent, sharing, start) -> float:
        pairs = zip(ways[latent, sharing, start], ways["-", "-", "DPO"])
        return mean_se([f["ll_user"]["mean"] - o["ll_user"]["mean"] for f, o in pairs])["mean"]

    found = ways["user", "models", "symmetric"]
    reading = (
        f"Whole models that begin alike stay alike: their margins differ by {mean_over(found, 'apart', 3)} nats after "
        "all steps, and the mixture is DPO with K times the cost (log-likelihood "
        f"{ll('user', 'models', 'symmetric'):+.3f} nats a pair beside DPO's). From random responsibilities the same "
        f"experts gain {ll('user', 'models', 'random'):+.3f}, from the linear start "
        f"{ll('user', 'models', 'linear'):+.3f}. Low-rank heads have random factors of their own, so that their tie is "
        f"never exact: started as if symmetric they end at {ll('user', 'heads', 'symmetric'):+.3f}, from the linear "
        f"start at {ll('user', 'heads', 'linear'):+.3f}. With one type a pair the same file gives "
        f"{ll('pair', 'heads', 'random'):+.3f} and {ll('pair', 'heads', 'linear'):+.3f}: a single comparison hardly "
        "says who made it. No gate is needed for any of this: weights stay uniform throughout.")
    of_real = [[latent, K, mean_over(of, "ari"), mean_over(of, "bayes_ari"), pm_of(over(of, "ll_user")), pm_of(mean_se(
        [f["ll_user"]["mean"] - o["ll_user"]["mean"] for f, o in zip(of, real["user", 1])]), "+")]
        for (latent, K), of in real.items()]
    head = ["one type a", "experts", "start", "own accuracy", "log-likelihood less DPO's", "less the oracle's",
            "ARI / Bayes", "effective experts", "experts apart (nats)"]
    text = "\n\n".join([reading, table_of(head, body, 3),
                        "Log-likelihood of all choices of a new user (M11), nats a pair, mean over worlds ± SE; own "
                        "accuracy: of the expert that stands for the judge's type; ARI of the training units over "
                        "that of Bayes-optimal assignment. The picture: KL(q || w) by step, what the pairs tell of z.",
                        "Real sentences, 120 users of 20, warm and terse judges, linear rewards on SmolLM2's states:",
                        table_of(["one type a", "experts", "ARI", "ARI, Bayes", "log-likelihood", "less one reward's"],
                                 of_real)])
    return text, {"gain": curves(shown, ("step", "KL(q || w) (nats)"), columns=4)}


STUDY = Study(
    "Fixed weights: the E-step without a gate",
    "Two types of judges, 100 users of 10 comparisons each, uniform weights that never change. What do the E-step and "
    "the experts' updates find by themselves, and what does breaking the tie matter? Planted worlds, and real "
    "sentences.",
    cells, measure, page, texts.prepare)
