"""An experiment on real responses that were judged by more than one yardstick (data/hh.py, data/ultrafeedback.py).

What is a data set's own is its items: a conversation, two answers, and which of them each type of user prefers. Here
they become preference files, as if of users who each have one type, and judge alone:

    items        those whose ids are too many, or whose answers are the same after the cut, are left out, and counted
    split        by conversation, in the order of a hash of seed and text: held-out items are nobody's training pairs
    deal         every user of a type takes the next of the type's items, shuffled; again only when all are dealt
    held out     every judgement of a held-out item once, by the users of its type in turn
    new users    as many of each type as the preset says, on held-out conversations and on those that are trained on

then DPO and the mixtures are trained (train.py), and the table and the report are made (eval.py). No pairs are set
aside for the E-step: real judgements are noisy, heads learn little of them by heart, and each tells of its user.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data.experiment.pairs import name_users
from data.experiment.simulated import begin, check_preset, chosen, train_and_evaluate
from data.experiment.stages import key_of, stage, write_lines
from mixdpo.config import InputError, check_ranges, parse, to_json
from mixdpo.fast.memory import steady
from mixdpo.files import fetch
from mixdpo.files.atomic import alone, must_be_own
from mixdpo.preferences import encode_prompt, encode_response
from mixdpo.text.tokenizer import load_tokenizer

FILES = ["train.jsonl", "heldout.jsonl", "adapt-new-user.jsonl", "adapt-new-user-new-prompt.jsonl", "prompts.jsonl",
         "dataset.json"]


@dataclass(frozen=True)
class Item:
    """Two answers to a conversation, judged."""

    messages: list[dict]                # up to a user's turn (mixdpo/text/chat.py)
    answers: tuple[str, str]
    prefers: dict[str, int]             # type of user -> the answer that it chooses, 0 or 1

    @property
    def conflict(self) -> bool:
        """Whether two types choose differently."""
        return len(set(self.prefers.values())) > 1


@dataclass(frozen=True)
class Judged:
    """What is a data set's own."""

    name: str
    types: dict[str, str]               # type of user -> which answer it prefers, in words
    presets: dict                       # name -> settings (data/experiment/presets.py)
    sources: tuple[str, ...]            # files of the user's own folder that are read, part of the key
    load: Callable                      # (data folder or None, preset) -> items, facts


@dataclass(frozen=True)
class JudgedConfig:
    """An experiment: judged answers, users of several types, DPO and mixtures, table."""

    preset: str = ""            # smoke, quick, cpu or paper; default: paper with a CUDA device, else quick
    model: str = ""             # a chat model: smollm2, llama-3.2-1b or a directory; default: smollm2
    out: str = ""               # the job's folder; default: runs/DATASET-PRESET, and -MODEL where one is given
    users: int = 0              # of each type; 0: the preset's number
    pairs: int = 0              # that each user judges for training; 0: the preset's number
    seed: int = -1              # of split, users and runs; -1: the preset's
    types_as_users: bool = False    # true: each type is one user, who judges all that the type judges
    conflicts: bool = False     # true: only answers on which types disagree
    data_only: bool = False     # true: stop when the preference files are written
    data_folder: str = ""       # local files looked into before anything is fetched


def fitting(items: list[Item], tokenizer, preset: dict) -> tuple[list[Item], dict[str, int]]:
    """The items that training can use as they are, and how many are not, by what is wrong with them."""
    left_out, kept, most = Counter(), [], preset["max_response"]
    for item in items:
        try:
            encode_prompt(item.messages, tokenizer, preset["max_prompt"])
            ids = [encode_response([{"role": "assistant", "content": text}], tokenizer) for text in item.answers]
        except InputError as error:
            left_out[getattr(error, "kind", "a character without a token")] += 1
            continue
        if ids[0][:most] == ids[1][:most]:
            left_out["the same answers, or after the cut"] += 1
        elif min(map(len, ids)) < 2:
            left_out["an empty answer"] += 1
        else:
            kept.append(item)
    return kept, dict(left_out)


def divide(items: list[Item], heldout: float, seed: int) -> tuple[list[Item], list[Item]]:
    """The items of a share `heldout` of the conversations, and the others."""
    def place(item: Item) -> float:
        text = json.dumps(item.messages) + str(seed)
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big") / 2**56

    items = sorted(items, key=place)                                        # the order of the source tells nothing
    return [i for i in items if place(i) < heldout], [i for i in items if place(i) >= heldout]


def deal(items: list[Item], users: dict[str, str], each: int, seed: int, option="pairs") -> list[tuple[str, Item]]:
    """`each` items for every user, of those that its type judges; 0: all. Raises: InputError if they are fewer, naming
    the option that says how many."""
    out, rng, asked = [], np.random.default_rng([seed, 21]), each
    for kind in sorted(set(users.values())):
        deck = [item for item in items if kind in item.prefers]
        each = asked or len(deck)
        if len(deck) < each:
            raise InputError(f"{len(deck)} items are judged by {kind}, and each user wants {each}; choose fewer pairs "
                             "a user, or get more data", option=option)
        hand, theirs = [], [user for user, of in users.items() if of == kind]
        for user in theirs:
            if len(hand) < each:                                            # begun again: the rest first, then others
                fresh = rng.permutation(len(deck)).tolist()
                hand += [n for n in fresh if n not in hand]
            out += [(user, deck[n]) for n in hand[:each]]
            hand = hand[each:]
    return [out[n] for n in rng.permutation(len(out))]


def line(user: str, kind: str, item: Item) -> dict:
    """One line of a preference file. scores: which answer each type prefers, for those that judged it."""
    chosen = item.prefers[kind]
    answer = [[{"role": "assistant", "content": text}] for text in item.answers]
    scores = {of: [int(prefers == chosen), int(prefers != chosen)] for of, prefers in item.prefers.items()}
    row = {"prompt": item.messages, "chosen": answer[chosen], "rejected": answer[1 - chosen]}
    return row | {"user": user, "annotator": kind, "scores": scores}


def judge(job: Path, of: Judged, preset: dict, tokenizer, data: str | None) -> None:
    """Writes train.jsonl, heldout.jsonl and dataset.json, which says how they came about."""
    items, facts = of.load(data, preset)
    items, left_out = fitting(items, tokenizer, preset)
    if preset["conflicts"]:
        left_out["all types agree"] = sum(not item.conflict for item in items)
        items = [item for item in items if item.conflict]
    users = name_users(len(of.types) * preset["users"], list(of.types), preset["seed"])
    held_out, others = divide(items, preset["heldout"], preset["seed"])
    rows = [line(user, users[user], item) for user, item in deal(others, users, preset["pairs"], preset["seed"])]
    of_kind = {kind: [user for user in users if users[user] == kind] for kind in of.types}
    held = [(item, kind) for item in held_out for kind in item.prefers][: preset["heldout_pairs"] or None]
    held_rows = [line(of_kind[kind][n % len(of_kind[kind])], kind, item) for n, (item, kind) in enumerate(held)]
    new = {f"new-{user}": kind for user, kind in name_users(len(of.types) * preset["new_users"], list(of.types),
                                                            preset["seed"] + 1).items()}
    for name, part in (("adapt-new-user", others), ("adapt-new-user-new-prompt", held_out)):
        dealt = deal(part, new, preset["new_pairs"], preset["seed"] + 1, option="preset")
        write_lines(job / f"{name}.jsonl", (line(user, new[user], item) for user, item in dealt))
    asked = [{"prompt": item.messages} for item in held_out[: preset["evaluate"]]]
    write_lines(job / "prompts.jsonl", asked)
    if not held_rows:
        raise InputError(f"{len(items)} items leave none for evaluation; get more data, or choose another preset",
                         option="preset")
    write_lines(job / "train.jsonl", rows)
    write_lines(job / "heldout.jsonl", held_rows)
    counts = {part: {"items": len(chosen), "of_two_types_or_more": sum(len(i.prefers) > 1 for i in chosen),
                     "conflicts": sum(i.conflict for i in chosen)}
              for part, chosen in (("training", others), ("held out", held_out))}
    facts |= {"annotators": list(of.types), "criteria": of.types, "left_out": left_out, "parts": counts}
    facts |= {"train": {"pairs": len(rows)},
              "heldout": {"pairs": len(held_rows), "conflicts": sum(item.conflict for item, _ in held)}}
    names = ("users", "pairs", "new_users", "new_pairs", "seed", "conflicts")
    facts |= {"max_prompt": preset["max_prompt"], "max_new": preset["max_response"]}
    facts |= {"settings": {name: preset[name] for name in names}}
    (job / "dataset.json").write_text(to_json(facts, indent=1) + "\n")
    print(to_json(facts))


def main(of: Judged, argv: list[str]) -> None:
    """The data set's command."""
    steady()
    config = parse(JudgedConfig, argv, f"python -m data.{of.name}")
    check_ranges(config, {"users": "[0, inf)", "pairs": "[0, inf)", "seed": "[-1, 4294967295]"})
    name, preset, job = chosen(of, config)
    given = {"users": config.users, "pairs": config.pairs, "seed": config.seed + 1}
    preset |= {key: getattr(config, key) for key, value in given.items() if value}
    preset |= {"conflicts": config.conflicts}
    if config.types_as_users:
        if config.users or config.pairs:
            raise InputError("true has one user of each type, who judges everything: leave --users and --pairs out",
                             option="types_as_users")
        runs = {name: run | ({"em": "incremental"} if run.get("latent") == "user" else {})  # no batch holds a user
                for name, run in preset["runs"].items()}
        preset |= {"users": 1, "pairs": 0, "runs": runs}
    check_preset(preset)
    must_be_own(job, [], "job.json", {"preset"})
    with alone(job):
        model = config.model or "smollm2"
        begin(job, {"preset": name, "model": model, "settings": json.loads(to_json(preset))})
        tokenizer = load_tokenizer(model, config.data_folder or None)
        own = [Path(config.data_folder) / source for source in of.sources] if config.data_folder else []
        source = [fetch.sha256_of(file) for file in own if file.is_file()] or "fetched"
        sizes = {key: value for key, value in preset.items() if key not in ("runs", "train")}
        stage(job, "judge", key_of(sizes, source, tokenizer.key), FILES,
              lambda: judge(job, of, preset, tokenizer, config.data_folder or None))
        if not config.data_only:
            shared = {name: preset[name] for name in ("max_prompt", "max_response", "seed")}
            train_and_evaluate(job, preset, {"model": model, "data_folder": config.data_folder} | shared)
