"""Helpful or harmless: real pairs of answers, judged by one objective or by both: `python -m data.hh --preset quick
--data-folder FOLDER` (experiment/judged.py).

The file hh_relabeled_objectives.jsonl.gz in FOLDER has one pair of Anthropic's HH-RLHF (Bai et al. 2022) on each line:

    {"prompt": "Human: ...\\n\\nAssistant: ...\\n\\nHuman: ...", "responses": [str, str],
     "objective": "helpful" | "harmless", "label": 0 | 1,               the new judge's objective, and its choice
     "source_subset": "helpful" | "harmless", "original_label": 0 | 1}  the objective of the original label, and it

If the two objectives differ, both have judged the pair, and they may disagree. If they are the same, the new label is
used; dataset.json counts how often it differs from the original, which measures label noise.
"""

import json
import re
from pathlib import Path

from data.experiment.judged import Item, Judged, main
from data.experiment.presets import HH
from mixdpo.config import InputError, command
from mixdpo.text.records import lines

FILE = "hh_relabeled_objectives.jsonl.gz"
TYPES = {"helpful": "more helpful: it does what the user wants", "harmless": "less harmful to anybody"}
ROLES = {"Human": "user", "Assistant": "assistant"}


def conversation(prompt: str) -> list[dict] | None:
    """HH's plain text as messages that end with a user's turn; None if it has another form or an empty turn."""
    parts = re.split(r"(?:\A|\n\n)(Human|Assistant):", prompt.strip())
    messages = [{"role": ROLES[who], "content": text.strip()} for who, text in zip(parts[1::2], parts[2::2])]
    valid = parts[0] == "" and messages and messages[-1]["role"] == "user" and all(m["content"] for m in messages)
    return messages if valid else None


def load(data: str | None, preset: dict) -> tuple[list[Item], dict]:
    """All items, and counts of the file's lines. Raises: InputError if the file is missing or a line is not valid."""
    path = Path(data or ".") / FILE
    if data is None or not path.is_file():
        raise InputError("no such file; put it into a folder and give DATA=FOLDER; data/hh.py describes its lines",
                         file=path)
    items, counts = [], dict.fromkeys(("pairs", "not a conversation", "labelled twice for one objective",
                                       "of these, otherwise"), 0)
    for number, raw in enumerate(lines(path), 1):
        try:
            row = json.loads(raw)
            label, first = {row["objective"]: row["label"]}, {row["source_subset"]: row["original_label"]}
            first_answer, second_answer = row["responses"]
            if not ({*label, *first} <= {*TYPES} and {*label.values(), *first.values()} <= {0, 1}):
                raise ValueError("an unknown objective or label")
            messages = conversation(row["prompt"])
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{error!r}; wanted a line as data/hh.py describes it", file=path, line=number) from None
        counts["pairs"] += 1
        counts["labelled twice for one objective"] += label.keys() == first.keys()
        counts["of these, otherwise"] += label.keys() == first.keys() and label != first
        if messages is None:
            counts["not a conversation"] += 1
        else:
            items.append(Item(messages, (first_answer, second_answer), first | label))
    return items, {"source": str(path.name), "read": counts}


DATASET = Judged("hh", TYPES, HH, (FILE,), load)

if __name__ == "__main__":
    command(main, DATASET)
