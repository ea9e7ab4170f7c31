"""One latent type for each pair or for each user, where the types are planted: `python -m data.experiment.planted`.

A world has K types with random linear rewards, theta ~ N(0, 1) in D features. Each user has a random type and judges m
pairs, x ~ N(0, 1), with logistic noise. All worlds have the same number of pairs, so a larger m means fewer users. Two
mixtures with linear rewards (mixdpo/linear.py; the M-step is convex) are fitted to the same pairs, one with a latent
type for each user (M11), one with a latent type for each pair. Users are assigned in three ways:

    user            by the responsibilities of the user mixture
    pair, pooled    by the rewards of the pair mixture, with M11 applied to all pairs of a user after the fit
    pair, majority  by the most frequent type among the user's pairs under the pair mixture

Reported is the adjusted Rand index (ARI) of each way divided by that of Bayes-optimal assignment with the true rewards.
Writes planted.json, and report.md with its picture if matplotlib is installed.
"""

import importlib.util
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from mixdpo.config import InputError, check_ranges, command, parse, to_json, write_text
from mixdpo.evaluation.statistics import adjusted_rand_index
from mixdpo.files.atomic import must_be_own
from mixdpo.linear import LinearOptions, linear_mixture
from mixdpo.mixture import e_step
from mixdpo.runs.log import Progress


@dataclass(frozen=True)
class PlantedConfig:
    """Planted types of users: one latent type for each user compared with one for each pair."""

    out: str = "runs/planted"                       # folder for planted.json and the report
    types: tuple[int, ...] = (2, 4)                 # K, numbers of types
    each: tuple[int, ...] = (1, 2, 4, 8, 16)        # m, numbers of pairs that a user judges
    pairs: int = 16000                              # pairs in a world
    features: int = 8                               # D, number of features
    seeds: int = 10                                 # worlds of each setting
    starts: int = 5                                 # starts of a fit; the fit with the best bound is used


def world(types: int, each: int, config: PlantedConfig, seed: int):
    """x (B,D) chosen minus rejected, the user of each pair (B,), the type of each user (U,), theta (K,D)."""
    rng, users = np.random.default_rng([seed, types, each]), config.pairs // each
    theta, z = rng.normal(size=(types, config.features)), rng.integers(types, size=users)
    group = np.repeat(np.arange(users), each)
    x = rng.normal(size=(len(group), config.features))
    right = rng.random(len(group)) < 1 / (1 + np.exp(-(x * theta[z[group]]).sum(1)))
    x = np.where(right[:, None], x, -x)
    return torch.from_numpy(x), torch.from_numpy(group), torch.from_numpy(z), torch.from_numpy(theta)


def assigned(types: int, each: int, config: PlantedConfig, seed: int) -> dict[str, float]:
    """ARI of the users' assignment in each way, and of Bayes-optimal assignment ("bayes"), in one world."""
    x, group, z, theta = world(types, each, config, seed)
    even, single = torch.zeros(types).double() - np.log(types), torch.arange(len(x))
    of_users = linear_mixture(x, group, types, LinearOptions(starts=config.starts, seed=seed))
    of_pairs = linear_mixture(x, single, types, LinearOptions(starts=config.starts, seed=seed))
    votes = torch.zeros(len(z), types).index_put((group, of_pairs.log_q.argmax(1)), torch.tensor(1.0), accumulate=True)
    found = {"bayes": e_step(even, x @ theta.T, group)[1], "user": of_users.log_q,
             "pair, pooled": e_step(of_pairs.log_w, x @ of_pairs.theta.T, group)[1], "pair, majority": votes}
    return {way: adjusted_rand_index(table.argmax(1).tolist(), z.tolist()) for way, table in found.items()}


def sentence(rows: list[dict]) -> str:
    """The result in one sentence: mean ratios to Bayes-optimal ARI where users judge most pairs."""
    most = max(row["each"] for row in rows)
    worlds = [world for row in rows if row["each"] == most for world in row["worlds"]]
    user, pair = (np.mean([world[way] / world["bayes"] for world in worlds]) for way in ("user", "pair, pooled"))
    return (f"With {most} pairs a user, one latent type for each user recovers {user:.2f} of the Bayes-optimal ARI, "
            f"one for each pair {pair:.2f}.")


def main(argv: list[str]) -> list[dict]:
    """Fits all worlds, writes planted.json and the report, and prints the result. Returns the rows of planted.json."""
    config = parse(PlantedConfig, argv, "python -m data.experiment.planted")
    check_ranges(config, dict.fromkeys(("types", "each", "seeds", "starts", "features", "pairs"), "[1, inf)"))
    if config.pairs < (least := max(config.each) * max(config.types)):
        raise InputError(f"got {config.pairs}; wanted {least} or more, the pairs of one user of each type",
                         option="pairs")
    folder = Path(config.out)
    must_be_own(folder, [], "planted.json", {"config", "rows"})
    torch.set_num_threads(1)                                        # more threads do not speed up products of this size
    kinds, rows = [(K, m) for K in config.types for m in config.each], []
    progress = Progress("worlds")
    for K, m in kinds:
        worlds = []
        for seed in range(config.seeds):
            worlds.append(assigned(K, m, config, seed))
            progress(len(rows) * config.seeds + seed + 1, len(kinds) * config.seeds)
        rows.append({"types": K, "each": m, "users": config.pairs // m, "worlds": worlds})
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "planted.json", to_json({"config": asdict(config), "rows": rows}, indent=1) + "\n")
    if importlib.util.find_spec("matplotlib"):
        from data.report.page import planted_report

        print(f"report: {planted_report(folder)}")
    print(sentence(rows))
    return rows


if __name__ == "__main__":
    command(main)
