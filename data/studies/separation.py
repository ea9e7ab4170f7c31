"""How experts and users separate: responsibilities in training, experts' updates and users in two dimensions."""

from unittest.mock import patch

import numpy as np
import torch
from sklearn.manifold import TSNE

from data.report.job import by_annotator, read_run
from data.report.pictures import curves, dots
from data.studies import texts
from data.studies.aggregate import by, mean_over, table_of
from data.studies.study import Study
from data.studies.worlds import ITEMS, World, figures, fit, judged, look, oracle, write
from mixdpo.evaluation.statistics import matched_accuracy
from mixdpo.runs import checkpoint

SEEDS = {"smoke": 1, "quick": 6, "full": 12}
LATENTS, TYPES = ("user", "pair"), (2, 4)
EVERY = 5                                   # steps between the updates in the picture
ITERATIONS = (1, 2, 3, 5, 8, 13, 21, 34)    # EM iterations of the linear mixture
TASTES = ("warm", "terse", "cold", "lavish")
USERS, EACH = 120, 10


def cells(preset: str) -> list[dict]:
    return [{"world": world, "types": types, "latent": latent, "seed": seed, "preset": preset}
            for world in ("planted", "texts") for types in TYPES for latent in LATENTS
            for seed in range(SEEDS[preset])]


def measure(cell: dict, folder) -> dict:
    if cell["world"] == "texts":
        return of_texts(cell, texts.load(folder.parent.parent, cell["preset"]))
    K, updates, real = cell["types"], [], checkpoint.save_checkpoint
    world = World(seed=cell["seed"], types=K, users=USERS, each=EACH)
    write(world, folder)

    def watched(run, tensors, state, keep):
        """Collects, from every checkpoint, the experts' updates A_k B_k without their common factor W."""
        if state["step"] % EVERY == 0 and not state["finished"]:
            updates.append((tensors["experts.A"] @ tensors["experts.B"]).flatten(1))          # (K, width^2)
        real(run, tensors, state, keep)

    with patch.object(checkpoint, "save_checkpoint", watched):
        path = fit(folder, "run", experts=K, latent=cell["latent"], start="dirichlet", seed=cell["seed"],
                   save_minutes=0.0 if cell["seed"] == 0 else 1e9)
    found, middles = look(path, folder / "heldout.jsonl"), by_annotator(read_run(path), 20)
    curves_of = {kind: (x.tolist(), means) for kind, (x, means) in sorted(middles.items())}
    result = figures(found) | {"bayes_ari": oracle(world)["ari" if cell["latent"] == "user" else "ari_pair"],
                               "by_type": own_shares(curves_of)}
    choices, margins = users_of(look(path, folder / "train.jsonl"), judged(world))
    kinds = judged(world).type[::EACH]
    result |= {"near_choices": near(choices, kinds), "near_margins": near(margins, kinds)}
    if cell["seed"] == 0:
        result["dots"] = pictured(torch.stack(updates), choices, margins, kinds, [f"type {t}" for t in range(K)])
    return result


def pictured(updates: torch.Tensor, choices: np.ndarray, margins: np.ndarray, kinds: np.ndarray, names) -> dict:
    """Panels of dots: experts' parameters (S,K,W), users' choices (U,V) and margins (U,K)."""
    return {"experts' updates, PCA": walks(updates, plane), "experts' updates, t-SNE": walks(updates, tsne),
            "users by choices, t-SNE": of_types(tsne(choices), kinds, names),
            "users by margins, PCA": of_types(plane(margins), kinds, names),
            "users by margins, t-SNE": of_types(tsne(margins), kinds, names)}


def near(x: np.ndarray, kinds: np.ndarray) -> float:
    """Share of users whose nearest other user has the same type."""
    distance = np.square(x[:, None] - x[None]).sum(-1) + np.diag(np.full(len(x), np.inf))
    return float((kinds[distance.argmin(1)] == kinds).mean())


def own_shares(shares: dict) -> dict[str, list]:
    """Type -> [(step, responsibility of the type's expert)]. Experts are named at the end, one type each."""
    kinds = list(shares)
    last = np.array([means[-1] for _, means in shares.values()])              # (T,K)
    units = [(k, kind) for n, kind in enumerate(kinds) for k in range(last.shape[1])
             for _ in range(round(1000 * float(np.nan_to_num(last[n, k]))))]
    naming = matched_accuracy([k for k, _ in units], [kind for _, kind in units], last.shape[1])[1]
    expert = {kind: k for k, kind in naming.items()}
    return {kind: [(x, float(q[expert[kind]])) for x, q in zip(xs, means)] for kind, (xs, means) in shares.items()
            if kind in expert}


def users_of(found, of) -> tuple[np.ndarray, np.ndarray]:
    """For each user: chosen minus rejected counts of items (U,V), and mean margins under each expert (U,K)."""
    items = np.eye(len(ITEMS))[of.chosen] - np.eye(len(ITEMS))[of.rejected]
    return items.reshape(USERS, EACH, -1).mean(1), found.h.double().numpy().reshape(USERS, EACH, -1).mean(1)


def of_texts(cell: dict, found: texts.Texts) -> dict:
    """The same with linear rewards on real sentences, by EM iterations."""
    K, tastes = cell["types"], TASTES[: cell["types"]]
    judges = texts.Judges(tastes, USERS, EACH, cell["seed"])
    training, held = texts.judge(found, judges), texts.judge(found, judges, heldout=True)
    by_user = cell["latent"] == "user"
    users, kinds = (training, training.type[::EACH]) if by_user else (texts.per_pair(training), training.type)
    fits = [texts.fit(users, K, cell["seed"], iterations=n) for n in ITERATIONS]
    q = [fit.log_q.exp().numpy() for fit in fits]
    shares = {taste: (list(map(float, ITERATIONS)), np.array([of[kinds == n].mean(0) for of in q]))
              for n, taste in enumerate(tastes)}
    result = texts.figures(fits[-1], users, held) | {"by_type": own_shares(shares)}
    margins = (training.x @ fits[-1].theta.double().T).numpy().reshape(USERS, EACH, -1).mean(1)
    choices, kinds = training.x.numpy().reshape(USERS, EACH, -1).mean(1), training.type[::EACH]
    result |= {"effective": float(np.exp(-(m := q[-1].mean(0)) @ np.log(m + 1e-12))),
               "near_choices": near(choices, kinds), "near_margins": near(margins, kinds)}
    if cell["seed"] == 0:
        result["dots"] = pictured(torch.stack([fit.theta for fit in fits]), choices, margins, kinds, tastes)
    return result


# ---- two dimensions


def plane(x) -> np.ndarray:
    """The first two principal components: (N,D) -> (N,2)."""
    x = np.asarray(x, dtype=float)
    U, s, _ = np.linalg.svd(x - x.mean(0), full_matrices=False)
    xy = U * s
    return np.pad(xy, ((0, 0), (0, max(0, 2 - xy.shape[1]))))[:, :2]


def tsne(x) -> np.ndarray:
    x = np.asarray(x, dtype=float)
    return TSNE(perplexity=min(30, (len(x) - 1) / 3), init="pca", random_state=0).fit_transform(x)


def walks(updates: torch.Tensor, flat) -> dict[str, list]:
    """Expert -> its way through the plane of all experts' parameters, (S,K,W) -> S points each."""
    S, K, _ = updates.shape
    xy = flat(updates.flatten(0, 1)).reshape(S, K, 2)
    return {f"expert {k}": xy[:, k].tolist() for k in range(K)}


def of_types(xy: np.ndarray, kinds: np.ndarray, names) -> dict[str, list]:
    return {names[n]: xy[kinds == n].tolist() for n in sorted(set(kinds.tolist()))}


# ---- the page


def page(rows):
    found, body, lines, pictures = by(rows, "world", "types", "latent"), [], {}, {}
    names = {"planted": "planted", "texts": "real sentences"}
    for (world, types, latent), of in found.items():
        body.append([names[world], types, latent, mean_over(of, "ari"), mean_over(of, "bayes_ari"),
                     mean_over(of, "effective", 2), f"{separation_of(of):.3f}", mean_over(of, "near_choices", 2),
                     mean_over(of, "near_margins", 2)])
        for kind in sorted({kind for f in of for kind in f["by_type"]}):
            curve = [f["by_type"][kind] for f in of if kind in f["by_type"]]
            steps = [x for x, _ in curve[0]]
            lines.setdefault(f"{names[world]}, {types} types, a {latent}", {})[kind] = [
                (x, float(np.mean([c[n][1] for c in curve])), 0.0) for n, x in enumerate(steps)]
        if latent == "user":
            pictures[f"{world}-{types}"] = dots(of[0]["dots"], columns=5)
    a, b = (found["planted", 4, latent] for latent in LATENTS)
    c, d = (found["texts", 4, latent] for latent in LATENTS)
    reading = (
        f"With one type a user the expert that stands for a type ends with "
        f"{separation_of(found['planted', 2, 'user']):.2f} of "
        f"its users' responsibilities (two planted types) and {separation_of(a):.2f} (four), and the users' ARI is "
        f"{mean_over(found['planted', 2, 'user'], 'ari')} and {mean_over(a, 'ari')} (by the true rewards "
        f"{mean_over(found['planted', 2, 'user'], 'bayes_ari')} and {mean_over(a, 'bayes_ari')}). With one type a pair "
        f"it is {mean_over(found['planted', 2, 'pair'], 'ari')} and {mean_over(b, 'ari')}, where the truth itself "
        f"would reach {mean_over(found['planted', 2, 'pair'], 'bayes_ari')} and {mean_over(b, 'bayes_ari')}. On real "
        f"sentences, four tastes: {mean_over(c, 'ari')} a user ({mean_over(c, 'bayes_ari')} by the truth) and "
        f"{mean_over(d, 'ari')} a pair. A user's nearest neighbour is of its own type for "
        f"{mean_over(a, 'near_choices', 2)} of them by what they chose, for {mean_over(a, 'near_margins', 2)} by their "
        "margins under the experts (four planted types, one type a user); on real sentences for "
        f"{mean_over(c, 'near_choices', 2)} and {mean_over(c, 'near_margins', 2)}.")
    head = ["world", "types", "one type a", "ARI", "ARI, Bayes", "effective experts", "own expert's share",
            "nearest alike, choices", "nearest alike, margins"]
    text = "\n\n".join([reading, table_of(head, body, 3),
                        "Curves: mean responsibility, through training, of the expert that stands for a type in the "
                        "end, on that type's units (the paper's Figure 1), by steps, or by iterations of EM for "
                        "sentences; mean over worlds. Dots, of one world: the experts' updates from the reference, "
                        "every fifth step; users by what they chose (items, or states of sentences), and by the mean "
                        "reward difference of their pairs under each expert."])
    return text, {"responsibilities": curves(lines, ("step", "own expert's q"), columns=4), **pictures}


def separation_of(of: list[dict]) -> float:
    """The own expert's share at the end, mean over types and worlds."""
    return float(np.mean([curve[-1][1] for f in of for curve in f["by_type"].values()]))


STUDY = Study(
    "Separation: who takes whose pairs",
    "Do experts part by judges, and when? Responsibilities by annotator through training, the experts' updates, and "
    "users by their vectors of reward differences, in planted worlds of two and four types (120 users of 10) from "
    "random responsibilities, and of linear rewards on real sentences.",
    cells, measure, page, texts.prepare)
