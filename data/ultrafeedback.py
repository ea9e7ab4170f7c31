"""UltraFeedback-Personalized: four types of users who follow four ratings of the same answers: `python -m
data.ultrafeedback --preset quick` (experiment/judged.py).

openbmb/UltraFeedback (Cui et al. 2023) has four completions of each instruction, rated from 1 to 5 for helpfulness,
honesty, instruction following and truthfulness. As in UF-P (Poddar et al. 2024, arXiv 2408.10075), a type of user
prefers the completion with the higher rating on its attribute. A tie is broken by a coin that depends on seed,
instruction and type. Each instruction gives one pair: the completion with the best mean rating, and another drawn at
random, as in the binarized UltraFeedback. `--conflicts true` keeps only pairs on which types disagree (UF-P-4); they
alone do not separate the types better than all pairs.

Sources, in this order: ultrafeedback.jsonl in the user's data folder, or any of the official files there; else the
official files from the hub, checked by the hub's checksums. A line: {"instruction": str, "completions": [{"response":
str, "annotations": {"helpfulness": {"Rating": "1" to "5" or "N/A"}, ...}}, ...], ...}. data/sample has a small
generated file: `make train DATASET=ultrafeedback PRESET=smoke DATA=data/sample`.
"""

import json
from collections import Counter
from pathlib import Path

import numpy as np

from data.experiment import leaderboard
from data.experiment.judged import Item, Judged, JudgedConfig, main
from data.experiment.presets import ULTRAFEEDBACK
from mixdpo.config import InputError, command, parse
from mixdpo.files import fetch
from mixdpo.text.records import lines

REPOSITORY = "openbmb/UltraFeedback"
FILES = tuple(f"{name}.jsonl" for name in ("evol_instruct", "false_qa", "flan", "sharegpt", "truthful_qa", "ultrachat"))
OWN = ("ultrafeedback.jsonl", *FILES)
TYPES = {"helpfulness": "more helpful: right, clear and complete", "honesty": "more honest about what it does not know",
         "instruction_following": "closer to what the instruction asks for", "truthfulness": "more truthful"}


def ratings_of(completion: dict) -> list[float] | None:
    """The ratings in the order of TYPES; None if one is missing."""
    ratings = [completion["annotations"][kind]["Rating"] for kind in TYPES]
    return None if "N/A" in ratings else list(map(float, ratings))


def item_of(row: dict, seed: int, number: int, counts: Counter) -> Item | None:
    """One judged pair of a row's completions; None if the row has none. Adds the reason to counts, in place."""
    rng = np.random.default_rng([seed, 23, number])
    coins = rng.integers(0, 2, len(TYPES)).tolist()
    rated = [(ratings, c["response"]) for c in row["completions"] if (ratings := ratings_of(c)) is not None]
    counts["completions without all ratings"] += len(row["completions"]) - len(rated)
    if len(rated) < 2 or not row["instruction"].strip():
        counts["fewer than two rated completions, or no instruction"] += 1
        return None
    order = [rated[n] for n in rng.permutation(len(rated))]
    best = max(order, key=lambda one: sum(one[0]))                          # the first among equals
    others = [one for one in order if one is not best]
    other = others[rng.integers(len(others))]
    chosen = {kind: coin if x == y else int(y > x) for kind, coin, x, y in zip(TYPES, coins, best[0], other[0])}
    counts["ties"] += sum(x == y for x, y in zip(best[0], other[0]))
    ties = frozenset(kind for kind, x, y in zip(TYPES, best[0], other[0]) if x == y)
    return Item([{"role": "user", "content": row["instruction"]}], (best[1], other[1]), chosen, ties)


def load(data: str | None, preset: dict) -> tuple[list[Item], dict]:
    """All items, and counts of the lines. Raises: InputError naming a malformed line."""
    own = [Path(data) / name for name in OWN if data and (Path(data) / name).is_file()]
    paths, items, counts = own or [fetch.hub(REPOSITORY, name) for name in FILES], [], Counter()
    for path in paths:
        for number, raw in enumerate(lines(path), 1):
            counts["rows"] += 1
            try:
                item = item_of(json.loads(raw), preset["seed"], counts["rows"], counts)
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                wanted = "a line as data/ultrafeedback.py describes it"
                raise InputError(f"{error!r}; wanted {wanted}", file=path, line=number) from None
            items += [item] if item else []
    return items, {"source": [path.name for path in paths], "read": dict(counts)}


DATASET = Judged("ultrafeedback", TYPES, ULTRAFEEDBACK, OWN, load)


def start(argv: list[str]) -> None:
    """The command. PRESET=leaderboard is a protocol of its own (experiment/leaderboard.py)."""
    config = parse(JudgedConfig, argv, "python -m data.ultrafeedback")
    if config.preset == "leaderboard":
        leaderboard.main(DATASET, config)
    else:
        main(DATASET, argv)


if __name__ == "__main__":
    command(start)
