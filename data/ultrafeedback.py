"""UltraFeedback-Personalized: four types of users, each of whom goes by another rating of the same answers: `python -m
data.ultrafeedback --preset quick` (data/judged.py).

openbmb/UltraFeedback (Cui et al. 2023) has, for each instruction, four completions, each rated from 1 to 5 for
helpfulness, honesty, instruction following and truthfulness. As in UF-P (Poddar et al. 2024, arXiv 2408.10075) a user
of a type prefers the completion that is rated higher on its attribute; of two that are rated alike, either, by a coin
that belongs to seed, instruction and type. Of an instruction's six pairs one is taken, drawn by seed. Pairs on which
types disagree are UF-P-4's (--conflicts true); they alone do not tell types apart better than all (README).

Sources, in this order: in the user's own folder ultrafeedback.jsonl, or any of the official files by their names; else
these from the hub, whose sums the hub names. A line: {"instruction": str, "completions": [{"response": str,
"annotations": {"helpfulness": {"Rating": "1" to "5" or "N/A"}, ...}}, ...], ...}.
data/sample holds a small made one: `make train DATASET=ultrafeedback PRESET=smoke DATA=data/sample`.
"""

import itertools
import json
from collections import Counter
from pathlib import Path

import numpy as np

from data.judged import Item, Judged, main
from data.presets import ULTRAFEEDBACK
from mixdpo import fetch
from mixdpo.config import InputError, command
from mixdpo.records import lines

REPOSITORY = "openbmb/UltraFeedback"
FILES = tuple(f"{name}.jsonl" for name in ("evol_instruct", "false_qa", "flan", "sharegpt", "truthful_qa", "ultrachat"))
OWN = ("ultrafeedback.jsonl", *FILES)
TYPES = {"helpfulness": "more helpful: right, clear and complete", "honesty": "more honest about what it does not know",
         "instruction_following": "closer to what the instruction asks for", "truthfulness": "more truthful"}


def prefers(a: dict, b: dict, coin) -> dict[str, int] | None:
    """Type -> the completion that is rated higher, 0 or 1; None if a rating is missing. coin(type) decides ties."""
    rated = {kind: [c["annotations"][kind]["Rating"] for c in (a, b)] for kind in TYPES}
    if any("N/A" in ratings for ratings in rated.values()):
        return None
    rated = {kind: list(map(float, ratings)) for kind, ratings in rated.items()}
    return {kind: coin(kind) if x == y else int(y > x) for kind, (x, y) in rated.items()}


def item_of(row: dict, seed: int, number: int, counts: Counter) -> Item | None:
    """One pair of a row's completions, judged; None, and counted, if it has none."""
    rng = np.random.default_rng([seed, 23, number])
    coins = dict(zip(TYPES, rng.integers(0, 2, len(TYPES)).tolist()))
    pairs = list(itertools.combinations(row["completions"], 2))
    if not pairs or not row["instruction"].strip():
        counts["fewer than two completions, or no instruction"] += 1
        return None
    a, b = pairs[rng.integers(len(pairs))]
    chosen = prefers(a, b, coins.__getitem__)
    if chosen is None:
        counts["a rating is missing"] += 1
        return None
    counts["ties"] += sum(a["annotations"][k]["Rating"] == b["annotations"][k]["Rating"] for k in TYPES)
    return Item([{"role": "user", "content": row["instruction"]}], (a["response"], b["response"]), chosen)


def load(data: str | None, preset: dict) -> tuple[list[Item], dict]:
    """All items, and what there was."""
    own = [Path(data) / name for name in OWN if data and (Path(data) / name).is_file()]
    paths, items, counts = own or [fetch.hub(REPOSITORY, name) for name in FILES], [], Counter()
    for path in paths:
        for number, raw in enumerate(lines(path), 1):
            counts["rows"] += 1
            try:
                item = item_of(json.loads(raw), preset["seed"], counts["rows"], counts)
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                wanted = "a line as data/ultrafeedback.py describes it"
                raise InputError(f"{path}:{number}: {error!r}; wanted {wanted}") from None
            items += [item] if item else []
    return items, {"source": [path.name for path in paths], "read": dict(counts)}


DATASET = Judged("ultrafeedback", TYPES, ULTRAFEEDBACK, OWN, load)

if __name__ == "__main__":
    command(main, DATASET)
