"""What an evaluation reads: the runs of a folder, and the files that they are evaluated on.

    DIR                 a finished run, or a folder of finished runs; results are written here
    heldout.jsonl       held-out preferences
    adapt-*.jsonl       preferences of new users
    prompts.jsonl       evaluation prompts, {"prompt": text or messages} a line
    dataset.json        the names of the reward functions, and how long completions are

The last four lie in the folder of the runs unless an option names another file; any of them may be missing. Options
name preferences as train.py --data does: other containers and shapes, several files, hub:OWNER/NAME.
"""

import json
from dataclasses import dataclass, fields
from pathlib import Path

import torch

from mixdpo.config import InputError, check_ranges, reading
from mixdpo.files.sources import missing_file
from mixdpo.preferences import Pair, encode_prompt
from mixdpo.runs.load_run import Run, Unfinished, find_runs, load_run
from mixdpo.runs.reference import load_references
from mixdpo.text.chat import template_of
from mixdpo.text.records import check_messages, check_string, lines


@dataclass(frozen=True)
class Prompts:
    """Evaluation prompts and how they are completed."""

    pairs: list[Pair]               # the prompts, as pairs without responses
    end: int                        # the token that ends a completion
    max_new: int                    # tokens of a completion, at most
    labels: list[dict]              # "domain" and "set" of each prompt, where the file has them


@dataclass(frozen=True)
class EvalInputs:
    """Everything that an evaluation reads."""

    folder: Path                    # DIR
    home: Path                      # the folder of the data: DIR, or the folder that the single run DIR is in
    runs: list[Run]
    references: list                # the runs' model, or each expert's
    tokenizer: object
    heldout: str | None
    adapt: list[str]                # files of new users
    columns: str                    # which columns of these two are which fields, as train.py --columns
    prompts: Prompts | None         # None: no completions are evaluated
    dataset: dict                   # dataset.json, or {}


def check_options(config) -> None:
    """Raises: InputError if a value of an EvalConfig is out of range, before anything is read, computed or replaced."""
    check_ranges(config, dict.fromkeys(("limit", "max_new", "temperature", "batch", "seed", "examples"), "[0, inf)"))
    if config.kl:
        check_ranges(config, {"kl": "(0, inf)"})
    if len({*config.kl}) < len(config.kl):
        raise InputError(f"got {config.kl}, wanted different numbers", option="kl")
    if config.format != "hf" and not config.export:
        raise InputError("is for --export; add --export OUT, or leave this option out", option="format")


def refuse_unused(config, why: str, used: tuple) -> None:
    """Raises: InputError naming an option of an EvalConfig that is set although it has no effect here."""
    unused = [f.name for f in fields(config) if f.name not in used and getattr(config, f.name) != f.default]
    if unused:
        raise InputError(f"{why} and does not use this option; leave it out", option=unused[0])


def read_inputs(config) -> EvalInputs:
    """Reads what an EvalConfig names. Raises: InputError if something is missing or does not fit together; nothing has
    been computed then."""
    folder, device = Path(config.dir).resolve(), "cuda" if torch.cuda.is_available() else "cpu"
    home = folder.parent if (folder / "checkpoint").exists() else folder
    loaded: dict = {}
    runs = load_runs(folder, device, config.data_folder, loaded)
    references, tokenizer = loaded.get(runs[0].config.model) or load_references(runs[0].config, device)
    heldout, prompts, dataset = find_files(config, home)
    completed = None
    if prompts.exists() and dataset:
        pairs, end = read_prompts(prompts, tokenizer, runs[0].config.max_prompt, config.limit)
        max_new = config.max_new or dataset.get("max_new") or runs[0].config.max_response
        check_context(pairs, max_new, min(model.config.context for model in references))
        completed = Prompts(pairs, end, max_new, prompt_labels(prompts, config.limit))
    found = sorted(home.glob("adapt-*.jsonl"), key=lambda path: path.stem)
    adapt = [config.adapt] if config.adapt else list(map(str, found))
    return EvalInputs(folder, home, runs, references, tokenizer, heldout, adapt, columns_of(config, runs), completed,
                      dataset)


def columns_of(config, runs: list[Run]) -> str:
    """The option --columns, or else that of the runs. Raises: InputError if these differ."""
    found = sorted({run.config.columns for run in runs})
    if not config.columns and len(found) > 1:
        raise InputError(f"the runs have different columns ({'; '.join(map(repr, found))}); give --columns for the "
                         "files of this evaluation, or none", option="columns")
    return "" if config.columns == "none" else config.columns or found[0]


def load_runs(folder: Path, device: str, data_folder: str, loaded: dict) -> list[Run]:
    """The finished runs in `folder`; loaded: of load_experts. Raises: InputError if they cannot be evaluated together.
    """
    runs = []
    for path in find_runs(folder):
        try:
            runs.append(load_run(path, device, data_folder, loaded))
        except Unfinished as error:
            if path == folder:
                raise
            print(f"warning: {error}. It is skipped")
    if not runs:
        raise InputError("has no finished run; finish one of them", file=folder)
    for run in runs:
        if any(getattr(run.config, name) != getattr(runs[0].config, name)
               for name in ("model", "max_prompt", "max_response", "dtype")):
            raise InputError(f"its model, lengths or dtype differ from those of {runs[0].path}; evaluate these runs "
                             "one at a time", file=run.path)
    return runs


def find_files(config, home: Path) -> tuple[str | None, Path, dict]:
    """The held-out preferences, if there are any, the file of prompts, which may be missing, and dataset.json, or {}.
    Raises: InputError if a file that an option names is missing, or if there is nothing to evaluate on."""
    heldout, prompts = config.heldout or str(home / "heldout.jsonl"), Path(config.prompts or home / "prompts.jsonl")
    facts = home / "dataset.json"
    for option, named in (("heldout", heldout), ("adapt", config.adapt), ("prompts", prompts), ("prompts", facts)):
        if getattr(config, option) and (path := missing_file(named)) is not None:
            raise InputError("no such file; --heldout and --adapt want a file of preferences, --prompts wants a file "
                             "of prompts and a dataset.json in the folder of the runs, which names the reward "
                             "functions", file=path, option=option)
    with reading(facts):
        dataset = dict(json.loads(facts.read_text())) if facts.exists() else {}
    if missing_file(heldout) is not None:
        heldout = None
    if heldout is None and not config.adapt and not (prompts.exists() and dataset):
        raise InputError("nothing to evaluate on; wanted heldout.jsonl in this folder. Put it there, or name a file "
                         "with --heldout FILE", file=home)
    return heldout, prompts, dataset


def read_prompts(path: Path, tokenizer, max_prompt: int, limit: int) -> tuple[list[Pair], int]:
    """The first `limit` prompts (0: all) as pairs without responses, and the token that ends a completion.
    Raises: InputError, with the line if a line is faulty."""
    prompts, kinds = [], set()
    for number, line in enumerate(lines(path), 1):
        if not line.strip():
            continue
        try:
            prompt = (row := json.loads(line))["prompt"]
            check_messages("prompt", prompt) if isinstance(prompt, list) else check_string("prompt", prompt)
            prompts.append(Pair(encode_prompt(prompt, tokenizer, max_prompt)[0], [], [], domain=row.get("domain")))
        except (ValueError, KeyError, TypeError) as error:                  # no JSON, no prompt, an unknown character
            raise InputError(f'got {line[:80]!r} ({error}); wanted {{"prompt": text or messages}}: correct the line, '
                             "or remove it", file=path, line=number) from None
        kinds.add(type(prompt))
    if not prompts:
        raise InputError("has no prompt; wanted one prompt a line", file=path)
    if len(kinds) > 1:
        raise InputError("some prompts are texts and some are conversations, which end differently; wanted one kind: "
                         "split the file", file=path)
    prompts = prompts[: limit or None]
    if repeated := len(prompts) - len({tuple(pair.prompt) for pair in prompts}):
        print(f"warning: {repeated} of {len(prompts)} prompts in {path} repeat another one. Standard errors take all "
              "prompts as independent, so they are too small; give each prompt once")
    return prompts, template_of(tokenizer).end if kinds == {list} else tokenizer.eos


def check_context(prompts: list[Pair], max_new: int, context: int) -> None:
    """Raises: InputError if the longest prompt and max_new more tokens exceed the models' context."""
    longest = max(len(p.prompt) for p in prompts)
    if longest + max_new > context:
        raise InputError(f"the longest prompt has {longest} tokens; with {max_new} new ones it exceeds the model's "
                         f"context of {context}; wanted at most {context - longest} new tokens", option="max_new")


def prompt_labels(path: Path, limit: int) -> list[dict]:
    """The "domain" and the "set" of each of the first `limit` prompts (0: all), where the file has them."""
    rows = [json.loads(line) for line in lines(path) if line.strip()][: limit or None]
    return [{name: row[name] for name in ("domain", "set") if name in row} for row in rows]
