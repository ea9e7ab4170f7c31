"""Rankings: from how many choices are types found, if each person judges once?

A planted world (worlds.py) in which every judge chooses once: the order of `size` random items by the rewards of the
judge's type, each next one with the probability of a softmax over the items that are left (Plackett and Luce). Size 2
is a pair. Rankings of three have more in them than pairs, so they are compared at equal numbers of judges and of texts.
What is learnt is tested on pairs of new users, ten each, who are explained well only if the experts are the types.
"""

from dataclasses import replace

import numpy as np
import torch

from data.experiment.stages import write_lines
from data.report.pictures import curves
from data.studies.aggregate import by, mean_over, over, pm_of, se_over, table_of
from data.studies.study import Study
from data.studies.worlds import ALPHABETS, ITEMS, ONE, World, figures, fit, look, oracle, prompt, write
from mixdpo.dpo import log_odds
from mixdpo.evaluation.statistics import adjusted_rand_index, mean_se
from mixdpo.mixture import e_step
from mixdpo.variants.rankings import ranking_log_likelihood

SIZES = {"smoke": (2, 4), "quick": (2, 3, 4), "full": (2, 3, 4, 6)}
JUDGES = {"smoke": (100,), "quick": (300, 1000, 3000), "full": (300, 1000, 3000, 10000)}
SEEDS = {"smoke": 1, "quick": 5, "full": 20}


def cells(preset: str) -> list[dict]:
    return [{"size": size, "judges": n, "seed": seed} for size in SIZES[preset] for n in JUDGES[preset]
            for seed in range(SEEDS[preset])]


def measure(cell: dict, folder) -> dict:
    world = World(seed=cell["seed"])
    write(world, folder)                                                    # the model, and the pairs of new users
    kinds, orders = judged(world, cell["judges"], cell["size"])
    rng = np.random.default_rng([cell["seed"], 6])
    write_lines(folder / "train.jsonl", (
        {"prompt": prompt(rng, "".join(ALPHABETS)), "ranking": [[ITEMS[item]] for item in order],
         "annotator": f"type {kind}"} for kind, order in zip(kinds, orders)))
    options = {"seed": cell["seed"], "batch": 50, "micro": 50}
    both = figures(look(fit(folder, "mixture", start="linear", **options), folder / "heldout.jsonl"))
    one = figures(look(fit(folder, "dpo", **ONE, **options), folder / "heldout.jsonl"))
    return {"ari": both["ari"], "ari_bayes": bayes_ari(world, kinds, orders), "ll": both["ll_user"]["mean"],
            "ll_one": one["ll_user"]["mean"], "ll_truth": oracle(replace(world, users=2))["ll_user"]["mean"]}


def judged(world: World, judges: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """The type of each judge (N,), and the items in the judge's order, best first (N,size). Adding a Gumbel variable
    to each reward and sorting gives Plackett and Luce's probabilities."""
    rng, rewards = np.random.default_rng([world.seed, size, 5]), world.rewards()
    kinds = rng.integers(world.types, size=judges)
    items = np.stack([rng.permutation(len(ITEMS))[:size] for _ in range(judges)])
    noisy = rewards[kinds[:, None], items] + rng.gumbel(size=items.shape)
    return kinds, np.take_along_axis(items, np.argsort(-noisy, axis=1), axis=1)


def bayes_ari(world: World, kinds: np.ndarray, orders: np.ndarray) -> float:
    """ARI of the assignment of each judge by the true rewards, the most that single choices can show."""
    rewards = torch.from_numpy(world.rewards()[:, orders]).transpose(0, 1)  # (N,K,size)
    log_p = ranking_log_likelihood(rewards, list(range(orders.shape[1])))   # (N,K)
    log_q = e_step(torch.full((world.types,), -np.log(world.types)).double(), log_odds(log_p))[1]
    return adjusted_rand_index(log_q.argmax(1).tolist(), kinds.tolist())


def page(rows):
    body, aris, gains, first = [], {}, {}, {}
    for (size, judges), found in by(rows, "size", "judges").items():
        gain = mean_se([f["ll"] - f["ll_one"] for f in found])
        share = mean_se([(f["ll"] - f["ll_one"]) / (f["ll_truth"] - f["ll_one"]) for f in found])
        body.append([size, judges, size * judges, mean_over(found, "ari"), mean_over(found, "ari_bayes"),
                     f"{over(found, 'll')['mean']:.3f}", pm_of(gain, "+"), pm_of(share)])
        name = "pairs" if size == 2 else f"rankings of {size}"
        for curve, figure in ((aris, over(found, "ari")), (gains, share)):
            curve.setdefault(name, []).append((size * judges, figure["mean"], se_over(figure)))
        if gain["mean"] > 2 * se_over(gain):
            first.setdefault(name, judges)
        else:
            first.pop(name, None)
    names = list(aris)
    reading = ("Every judge makes one choice. The smallest number of judges from which the mixture explains new users "
               "better than one policy by two standard errors: "
               + "; ".join(f"{name}: {first.get(name, 'none of those tried')}" for name in names) + ".")
    head = ["responses", "judges", "texts", "ARI of judges", "ARI, Bayes", "log-likelihood of new users",
            "less one policy's", "share of the truth's gain"]
    note = ("Log-likelihood: of ten pairs of a new user (M11), nats a pair. One policy is a low-rank head on the same "
            "trunk, on the same choices. Truth: the true rewards. Means over worlds ± SE.")
    return "\n\n".join([reading, table_of(head, body), note]), {
        "gain": curves({"": gains}, ("texts that were judged", "share of the truth's gain"), columns=1),
        "ari": curves({"": aris}, ("texts that were judged", "ARI of the judges"), columns=1)}


STUDY = Study(
    "Rankings",
    "If each person judges once, do rankings of three or four responses show the types of two kinds of people that "
    "pairs do not show?", cells, measure, page)
