"""What all experiments share: presets, the job's folder, training and evaluation."""

import json
from pathlib import Path
from types import SimpleNamespace

import torch

from data.experiment.finetune import FinetuneConfig
from data.experiment.finetune import validate as validate_finetune
from eval import EvalConfig, evaluate
from mixdpo.config import SEEDS, InputError, check_ranges, to_json, write_text
from mixdpo.runs.distributed import rank
from mixdpo.runs.parallel import from_first
from mixdpo.runs.rules import validate
from train import TrainConfig, run


def choose_preset(dataset, config) -> tuple[str, dict, Path]:
    """The preset's name, its settings, and the job's folder. Raises: InputError if there is no such preset."""
    name = config.preset or ("paper" if torch.cuda.is_available() else "quick")
    if name not in dataset.presets:
        raise InputError(f"got {name!r}; wanted one of {', '.join(dataset.presets)}", option="preset")
    model = f"-{Path(config.model).name}" if config.model else ""
    return name, dict(dataset.presets[name]), Path(config.out or f"runs/{dataset.name}-{name}{model}")


def check_preset(preset: dict, *parts: str) -> None:
    """Checks a preset before anything is fetched or sampled. Raises: InputError on sizes out of range and on options
    that train.py refuses; with "finetune" among parts, also on options that finetune.py refuses."""
    ranges = dict.fromkeys(("prompts", "users", "reviews", "judge_reviews", "max_prompt", "max_response"), "[1, inf)")
    ranges |= dict.fromkeys(("pairs", "heldout_pairs", "context", "new_users", "new_pairs", "apart", "margin",
                             "evaluate"), "[0, inf)")
    ranges |= {"seed": SEEDS, "heldout": "(0, inf)", "continuations": "[2, inf)", "agree": "[0, 1]"}
    check_ranges(SimpleNamespace(**preset), {name: ranges[name] for name in ranges if preset.get(name) is not None})
    for options in preset["runs"].values():
        validate(TrainConfig(model="", out="", **{"data": ""} | preset["train"] | options))
    if "finetune" in parts:
        validate_finetune(FinetuneConfig(data="", model="", out="", **preset["finetune"]))


def recorded_facts(job: Path) -> dict:
    """job.json of the job in this folder; {} if there is none."""
    return json.loads((job / "job.json").read_text()) if (job / "job.json").exists() else {}


def begin(job: Path, facts: dict) -> None:
    """Makes the job's folder and records the facts in job.json. Raises: InputError if it holds a job of other facts."""
    recorded = from_first(lambda: recorded_facts(job))
    if differ := [name for name in recorded if recorded[name] != facts[name]]:
        raise InputError(f"holds a job with another {', '.join(differ)}; a job is resumed only with the settings that "
                         "it began with. Remove the folder, or choose another with --out", file=job)
    job.mkdir(parents=True, exist_ok=True)
    if not recorded and rank() == 0:
        write_text(job / "job.json", to_json(facts, indent=1) + "\n")


def train_and_evaluate(job: Path, preset: dict, shared: dict, **options) -> None:
    """Trains the preset's runs on the job's train.jsonl, or on the file that a run names, and evaluates them. shared:
    options of TrainConfig for all runs; options: of EvalConfig."""
    for name, own in preset["runs"].items():
        chosen = {"data": "train.jsonl"} | shared | preset["train"] | own
        run(TrainConfig(out=str(job / name), **chosen | {"data": str(job / chosen["data"])}))
    evaluate(EvalConfig(dir=str(job), data_folder=shared["data_folder"], **options))
