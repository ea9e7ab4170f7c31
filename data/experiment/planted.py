"""One type a pair or one a user: what can be found where the truth is planted: `python -m data.experiment.planted`.

A world has K types with random linear rewards, theta ~ N(0, 1) in D features, and users of a random type who each judge
m pairs, x ~ N(0, 1), with logistic noise. All worlds have as many pairs, so the more a user judges, the fewer users.
Two mixtures with linear rewards (mixdpo/linear.py, its M-step is convex) are fitted to the same pairs, with one latent
a user (M11) or one a pair, and each assigns the users:

    user            by its own responsibilities
    pair, pooled    by its rewards, all pairs of a user taken together as if they had one type: M11 after the fact
    pair, majority  by the type that most of a user's pairs are given, which is all that it says itself

Reported: the adjusted Rand index of each over that of Bayes-optimal assignment with the true rewards. Writes
planted.json, and report.md with its picture where matplotlib is installed.
"""

import importlib.util
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from mixdpo.config import InputError, check_ranges, command, parse, to_json, write_whole
from mixdpo.files.atomic import must_be_own
from mixdpo.linear import linear_mixture
from mixdpo.metrics import adjusted_rand_index
from mixdpo.mixture import e_step
from mixdpo.runs.rundir import Progress


@dataclass(frozen=True)
class PlantedConfig:
    """Planted types of users: one latent a user beside one a pair."""

    out: str = "runs/planted"                       # folder of planted.json and the report
    types: tuple[int, ...] = (2, 4)                 # K
    each: tuple[int, ...] = (1, 2, 4, 8, 16)        # pairs a user judges
    pairs: int = 16000                              # in a world
    features: int = 8                               # D
    seeds: int = 10                                 # worlds of each kind
    starts: int = 5                                 # of a fit; the best bound is taken


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
    """ARI of the users' assignment in each way, and "bayes"."""
    x, group, z, theta = world(types, each, config, seed)
    even, alone = torch.zeros(types).double() - np.log(types), torch.arange(len(x))
    of_users = linear_mixture(x, group, types, starts=config.starts, seed=seed)
    of_pairs = linear_mixture(x, alone, types, starts=config.starts, seed=seed)
    votes = torch.zeros(len(z), types).index_put((group, of_pairs.log_q.argmax(1)), torch.tensor(1.0), accumulate=True)
    found = {"bayes": e_step(even, x @ theta.T, group)[1], "user": of_users.log_q,
             "pair, pooled": e_step(of_pairs.log_w, x @ of_pairs.theta.T, group)[1], "pair, majority": votes}
    return {way: adjusted_rand_index(table.argmax(1).tolist(), z.tolist()) for way, table in found.items()}


def main(argv: list[str]) -> list[dict]:
    config = parse(PlantedConfig, argv, "python -m data.experiment.planted")
    check_ranges(config, dict.fromkeys(("types", "each", "seeds", "starts", "features", "pairs"), "[1, inf)"))
    if config.pairs < (least := max(config.each) * max(config.types)):
        raise InputError(f"got {config.pairs}, wanted {least} or more: as many as a user of each type judges",
                         option="pairs")
    folder = Path(config.out)
    must_be_own(folder, [], "planted.json", {"config", "rows"})
    torch.set_num_threads(1)                                                # products of this size gain nothing by more
    kinds, rows = [(K, m) for K in config.types for m in config.each], []
    progress = Progress("worlds")
    for K, m in kinds:
        worlds = []
        for seed in range(config.seeds):
            worlds.append(assigned(K, m, config, seed))
            progress(len(rows) * config.seeds + seed + 1, len(kinds) * config.seeds)
        rows.append({"types": K, "each": m, "users": config.pairs // m, "worlds": worlds})
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / "planted.json", to_json({"config": asdict(config), "rows": rows}, indent=1) + "\n")
    if importlib.util.find_spec("matplotlib"):
        from data.report.page import planted_report

        print(f"report: {planted_report(folder)}")
    return rows


if __name__ == "__main__":
    command(main)
