"""Shows a batch as training sees it: `python -m mixdpo.evaluation.show FILE` (`make show RUN=FOLDER`).

Prompt, response, end token and padding have different colours on a terminal and are named elsewhere. A special token is
shown as <|name|>, ordinary characters that spell its name as '<|name|>'. Everything comes from the ids and lengths of
the batch; the text of the file is not used.
"""

import itertools
import sys
from dataclasses import dataclass
from pathlib import Path

from mixdpo.config import InputError, command, parse
from mixdpo.files.atomic import read_json_or_empty
from mixdpo.files.sources import parts_of
from mixdpo.preferences import Batch, collate, read_preferences
from mixdpo.text.chat import ends
from mixdpo.text.records import REST
from mixdpo.text.tokenizer import load_tokenizer

COLOURS = {"prompt": "36", "response": "1;32", "special": "30;45", "EOS": "30;43", "padding": "90"}


def show(batch: Batch, tokenizer, colour: bool = False) -> str:
    """The batch as text. Its parts have different colours (ANSI, with a legend) or, in the plain form, names."""

    def part(kind: str, text: str) -> str:
        return f"\033[{COLOURS[kind]}m{text}\033[0m" if colour else f" {kind} {text}"

    def text_of(kind: str, ids: list[int]) -> str:
        out = [] if colour else [part(kind, "").rstrip()]
        for is_special, run in itertools.groupby(ids, special.__contains__):
            text = tokenizer.decode(list(run))
            if is_special:
                out.append(part("special", text) if colour else f" {text}")
            else:  # line breaks and control characters stay visible, and on one line
                out.append(part(kind, repr(text)[1:-1]) if colour else f" {text!r}")
        return "".join(out)

    special = {*getattr(tokenizer, "special", {}).values()}
    T = batch.ids.shape[-1]
    out = [" ".join(part(kind, kind) for kind in COLOURS)] if colour else []
    for b, start in enumerate(batch.start.tolist()):
        note = ", context" if batch.context[b] else ""
        out.append(f"pair {batch.pair[b]} (group {batch.group[b]}{note})")
        for side, place in enumerate(batch.order[b].tolist()):
            if place < 0:
                continue
            name = "rest" if place == REST else f"place {place + 1}"
            name = ("chosen", "rejected")[side] if batch.order.shape[1] == 2 else name
            row, length = batch.ids[b, side].tolist(), int(batch.length[b, side])
            finished = row[length - 1] in ends(tokenizer)
            text = text_of("prompt", row[:start])
            text += text_of("response", row[start : length - finished])
            text += part("EOS", f"<{row[length - 1]}>") if finished else ""
            text += part("padding", f"0 x {T - length}") if length < T else ""
            out.append(f"  {name:<9}{text.lstrip()}")
    return "\n".join(out)


@dataclass(frozen=True)
class ShowConfig:
    """Prints the first batch of a preference file."""

    data: str                   # preferences, as train.py --data; its flag may be omitted
    columns: str = ""           # which columns are which fields, as train.py --columns
    model: str = ""             # the model whose tokenizer is used, as train.py --model;
                                # default: the model of the job in the file's folder, else smollm2
    max_prompt: int = 0         # last ids of a prompt that are kept; 0: as in the dataset.json of the file's folder,
                                # else 64
    max_response: int = 0       # first ids of a response that are kept, EOS included; 0: the same
    drop: bool = False          # skip faulty lines and list them
    pairs: int = 4              # number of pairs to show
    data_folder: str = ""       # folder of local files that is searched before anything is downloaded


def main(argv: list[str]) -> None:
    """The command: prints the first pairs of a file."""
    flags = argv if argv and argv[0].startswith("-") else ["--data", *argv]
    config = parse(ShowConfig, flags, "python -m mixdpo.evaluation.show FILE")
    if config.pairs < 1:
        raise InputError(f"got {config.pairs}, wanted at least 1", option="pairs")
    home = Path(parts_of(config.data)[0]).parent
    facts, job = (read_json_or_empty(home / name) for name in ("dataset.json", "job.json"))
    tuned = str(home / "reference") if (home / "reference").is_dir() else job.get("model", "smollm2")
    tokenizer = load_tokenizer(config.model or tuned, config.data_folder or None)
    max_prompt = config.max_prompt or facts.get("max_prompt", 64)
    max_response = config.max_response or facts.get("max_new", 64)
    pairs = read_preferences(config.data, tokenizer, max_prompt, max_response, config.drop, columns=config.columns)
    batch = collate(pairs, list(range(min(config.pairs, len(pairs)))))
    print(show(batch, tokenizer, colour=sys.stdout.isatty()))


if __name__ == "__main__":
    command(main)
