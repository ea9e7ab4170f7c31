"""An experiment on real answers that several objectives judged (data/hh.py, data/ultrafeedback.py).

A data set supplies items: a conversation, two answers, and the answer that each type of user prefers. Items become
preference files of simulated users, each of one type:

    fitting      items that do not fit the length limits, or whose answers are equal after truncation, are dropped and
                 counted
    divide       by conversation, in the order of a hash of seed and text: held-out conversations are never trained on
    deal         every user of a type takes the next items of the type, shuffled; items repeat only after all were dealt
    held out     every judgement of a held-out item once, by the users of its type in turn
    new users    as many of each type as the preset says, on held-out conversations and on training conversations

Then common.py trains the runs of the preset and evaluates them.
"""

import hashlib
import itertools
import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data.experiment.common import begin, check_preset, choose_preset, train_and_evaluate
from data.experiment.pairs import name_users
from data.experiment.stages import key_of, stage, write_lines
from mixdpo.config import InputError, check_ranges, parse, to_json, write_text
from mixdpo.fast.memory import tune_process
from mixdpo.files import fetch
from mixdpo.files.atomic import must_be_own
from mixdpo.preferences import encode_prompt, encode_response
from mixdpo.runs.distributed import joined
from mixdpo.runs.parallel import first_alone, locked
from mixdpo.text.tokenizer import load_tokenizer

FILES = ["train.jsonl", "heldout.jsonl", "adapt-new-user.jsonl", "adapt-new-user-new-prompt.jsonl", "prompts.jsonl",
         "dataset.json"]


@dataclass(frozen=True)
class Item:
    """A conversation with two judged answers."""

    messages: list[dict]                # ends with a user's turn (mixdpo/text/chat.py)
    answers: tuple[str, str]
    prefers: dict[str, int]             # type of user -> the answer that the type prefers, 0 or 1
    ties: frozenset[str] = frozenset()  # types that rate both equally; `prefers` has a coin

    @property
    def conflict(self) -> bool:
        """Whether two types prefer different answers."""
        return len(set(self.prefers.values())) > 1


@dataclass(frozen=True)
class Judged:
    """The parts of an experiment that depend on the data set."""

    name: str
    types: dict[str, str]               # type of user -> what the type prefers, in words
    presets: dict                       # name -> settings (data/experiment/presets.py)
    sources: tuple[str, ...]            # names of files in the user's data folder that are used; part of the key
    load: Callable                      # (data folder or None, preset) -> items, facts


@dataclass(frozen=True)
class JudgedConfig:
    """An experiment: judged answers, users of several types, DPO and mixtures, report."""

    preset: str = ""            # smoke, quick, cpu or paper; default: paper with a CUDA device, else quick
    model: str = ""             # a chat model, as train.py --model; default: smollm2
    out: str = ""               # the job's folder; default: runs/DATASET-PRESET, or runs/DATASET-PRESET-MODEL
    users: int = 0              # users of each type; 0: the preset's number
    pairs: int = 0              # training pairs of each user; 0: the preset's number
    seed: int = -1              # seed of split, users and runs; -1: the preset's
    types_as_users: bool = False    # true: each type is one user, who judges all items of the type
    conflicts: bool = False     # true: use only items on which types disagree
    data_only: bool = False     # true: stop after the preference files are written
    data_folder: str = ""       # folder of local files, used before anything is fetched


def fitting(items: list[Item], tokenizer, preset: dict) -> tuple[list[Item], dict[str, int]]:
    """The items that training can use unchanged, and counts of the others by reason."""
    dropped, kept, limit = Counter(), [], preset["max_response"]
    for item in items:
        try:
            encode_prompt(item.messages, tokenizer, preset["max_prompt"])
            ids = [encode_response([{"role": "assistant", "content": text}], tokenizer) for text in item.answers]
        except InputError as error:
            dropped[getattr(error, "kind", "a character without a token")] += 1
            continue
        if ids[0][:limit] == ids[1][:limit]:
            dropped["equal answers, or equal after truncation"] += 1
        elif min(map(len, ids)) < 2:
            dropped["an empty answer"] += 1
        else:
            kept.append(item)
    return kept, dict(dropped)


def divide(items: list[Item], heldout: float, seed: int) -> tuple[list[Item], list[Item]]:
    """Items of a share `heldout` of the conversations, and the other items."""
    def place(item: Item) -> float:
        text = json.dumps(item.messages) + str(seed)
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big") / 2**56

    items = sorted(items, key=place)                             # the result does not depend on the order of the source
    return [i for i in items if place(i) < heldout], [i for i in items if place(i) >= heldout]


def deal(items: list[Item], users: dict[str, str], each: int, seed: int, option="pairs") -> list[tuple[str, Item]]:
    """`each` items for every user, among those that the user's type judged; 0: all of them. Raises: InputError naming
    `option` if there are too few items."""
    out, rng = [], np.random.default_rng([seed, 21])
    for kind in sorted(set(users.values())):
        deck = [item for item in items if kind in item.prefers]
        count = each or len(deck)
        if len(deck) < count:
            raise InputError(f"{len(deck)} items were judged by {kind}; each user needs {count}; choose fewer pairs "
                             "for each user, or get more data", option=option)
        hand = []                                                           # shuffled positions in the deck
        for user in (user for user, its in users.items() if its == kind):
            if len(hand) < count:                                           # the rest of the deck first, then repeats
                hand += [n for n in rng.permutation(len(deck)).tolist() if n not in hand]
            out += [(user, deck[n]) for n in hand[:count]]
            hand = hand[count:]
    return [out[n] for n in rng.permutation(len(out))]


def line(user: str, kind: str, item: Item) -> dict:
    """One line of a preference file. scores: the preference of each type that judged the item."""
    chosen = item.prefers[kind]
    answer = [[{"role": "assistant", "content": text}] for text in item.answers]
    scores = {of: [int(prefers == chosen), int(prefers != chosen)] for of, prefers in item.prefers.items()}
    row = {"prompt": item.messages, "chosen": answer[chosen], "rejected": answer[1 - chosen]}
    return row | {"user": user, "annotator": kind, "scores": scores}


def write_preferences(job: Path, types: list[str], training: list[Item], heldout: list[Item], preset: dict) -> tuple:
    """Writes all files of pairs and prompts; returns the numbers of train and held-out pairs, and of held-out
    conflicts. Raises: InputError if no held-out pair is left."""
    seed = preset["seed"]
    users = name_users(len(types) * preset["users"], types, seed)
    rows = [line(user, users[user], item) for user, item in deal(training, users, preset["pairs"], seed)]
    of_kind = {kind: [user for user in users if users[user] == kind] for kind in types}
    judged = [(item, kind) for item in heldout for kind in item.prefers][: preset["heldout_pairs"] or None]
    turn = {kind: itertools.cycle(of_kind[kind]) for kind in types}
    heldout_rows = [line(next(turn[kind]), kind, item) for item, kind in judged]
    names = name_users(len(types) * preset["new_users"], types, seed + 1)
    new = {f"new-{user}": kind for user, kind in names.items()}
    for name, part in (("adapt-new-user", training), ("adapt-new-user-new-prompt", heldout)):
        dealt = deal(part, new, preset["new_pairs"], seed + 1, option="preset")
        write_lines(job / f"{name}.jsonl", (line(user, new[user], item) for user, item in dealt))
    write_lines(job / "prompts.jsonl", [{"prompt": item.messages} for item in heldout[: preset["evaluate"]]])
    if not heldout_rows:
        raise InputError(f"{len(training)} items leave no held-out pairs; get more data, or choose another preset",
                         option="preset")
    write_lines(job / "train.jsonl", rows)
    for kind in types:
        write_lines(job / f"train-{kind}.jsonl", (row for row in rows if row["annotator"] == kind))
    write_lines(job / "heldout.jsonl", heldout_rows)
    return len(rows), len(heldout_rows), sum(item.conflict for item, _ in judged)


def judge(job: Path, dataset: Judged, preset: dict, tokenizer, data: str | None) -> str:
    """Writes the preference files and dataset.json, which records how they were made. Returns a summary."""
    items, facts = dataset.load(data, preset)
    items, dropped = fitting(items, tokenizer, preset)
    if preset["conflicts"]:
        dropped["all types agree"] = sum(not item.conflict for item in items)
        items = [item for item in items if item.conflict]
    heldout, training = divide(items, preset["heldout"], preset["seed"])
    pairs, heldout_pairs, conflicts = write_preferences(job, list(dataset.types), training, heldout, preset)
    counts = {part: {"items": len(some), "of_two_types_or_more": sum(len(i.prefers) > 1 for i in some),
                     "conflicts": sum(i.conflict for i in some)}
              for part, some in (("training", training), ("held out", heldout))}
    names = ("users", "pairs", "new_users", "new_pairs", "seed", "conflicts")
    facts |= {"annotators": list(dataset.types), "criteria": dataset.types, "left_out": dropped, "parts": counts,
              "train": {"pairs": pairs}, "heldout": {"pairs": heldout_pairs, "conflicts": conflicts},
              "max_prompt": preset["max_prompt"], "max_new": preset["max_response"],
              "settings": {name: preset[name] for name in names}}
    write_text(job / "dataset.json", to_json(facts, indent=1) + "\n")
    return (f"{pairs} train and {heldout_pairs} held-out pairs ({conflicts} on which types disagree); "
            f"{sum(dropped.values())} items dropped")


def preset_with(config: JudgedConfig, preset: dict) -> dict:
    """The preset with the options of the command line. Raises: InputError on options that exclude each other."""
    given = {"users": config.users, "pairs": config.pairs, "seed": config.seed + 1}
    preset = preset | {key: getattr(config, key) for key, value in given.items() if value}
    preset |= {"conflicts": config.conflicts}
    if config.types_as_users:
        if config.users or config.pairs:
            raise InputError("true makes one user of each type, who judges all items; leave out --users and --pairs",
                             option="types_as_users")
        sliced = {"estep": "all", "context": 0, "em": "incremental"}        # a user exceeds a batch
        runs = {name: run | (sliced if run.get("estep") == "context" else {}) for name, run in preset["runs"].items()
                if run.get("estep") != "first"}
        preset |= {"users": 1, "pairs": 0, "runs": runs}
    return preset


def main(dataset: Judged, argv: list[str]) -> None:
    """The command of a data set."""
    tune_process()
    config = parse(JudgedConfig, argv, f"python -m data.{dataset.name}")
    check_ranges(config, {"users": "[0, inf)", "pairs": "[0, inf)", "seed": "[-1, 4294967295]"})
    name, preset, job = choose_preset(dataset, config)
    preset = preset_with(config, preset)
    check_preset(preset)
    must_be_own(job, [], "job.json", {"preset"})
    with joined(), locked(job):
        model = config.model or "smollm2"
        begin(job, {"preset": name, "model": model, "settings": json.loads(to_json(preset))})
        print(f"job: {job}, preset {name}\nmodel: {model}")
        tokenizer = first_alone(lambda: load_tokenizer(model, config.data_folder or None))
        own = [Path(config.data_folder) / source for source in dataset.sources] if config.data_folder else []
        source = [fetch.sha256_of(file) for file in own if file.is_file()] or "fetched"
        sizes = {key: value for key, value in preset.items() if key not in ("runs", "train")}
        files = [*FILES, *(f"train-{kind}.jsonl" for kind in dataset.types)]
        stage(job, "judge", key_of(sizes, source, tokenizer.key), files,
              lambda: judge(job, dataset, preset, tokenizer, config.data_folder or None))
        if config.data_only:
            print(f"The preference files are in {job}; nothing was trained, since --data-only is set.")
            return
        shared = {name: preset[name] for name in ("max_prompt", "max_response", "seed")}
        train_and_evaluate(job, preset, {"model": model, "data_folder": config.data_folder} | shared)
