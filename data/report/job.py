"""Reads the files of a job, and computes the figures that the report adds to those of eval.py.

    paired difference   mean over prompts of a(prompt) - b(prompt), with its standard error: same prompts, same seeds
    by annotator        mean responsibilities of an annotator's groups over an interval of steps

A job is a folder with results.json and samples.jsonl (eval.py), dataset.json and preference files (the data script),
reference/, and a directory for each run. It may also be one run in such a folder, with its own results.json and
samples.jsonl. Any of these files may be missing.
"""

import json
import os
import re
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import numpy as np

from data.experiment.stages import numbers
from mixdpo import config as configs
from mixdpo.evaluation.statistics import mean_se
from mixdpo.files.sources import parts_of
from mixdpo.runs.options import TrainConfig
from mixdpo.text.records import lines
from mixdpo.text.shapes import read_records

SAMPLES = 6  # number of prompts whose completions are shown
FIGURES = {"mean", "se", "values", "conflicts_by_pair", "effective_experts", "ari", "matched", "bayes_ari",
           "bayes_matched", "perplexity_before", "perplexity_after", "rate", "low", "high"}


@dataclass
class Run:
    """The files of one run directory."""

    name: str
    config: dict
    metrics: list[dict]             # one for each step
    steps: list[dict]               # {"step", "groups": indices into units, "q": their responsibilities (G,K)}
    units: list[str]                # annotator of each training group, "all" if unnamed; [] if unknown
    seconds: float                  # from the last start to the last step, by modification times


@dataclass
class Job:
    """All inputs of the report."""

    home: Path
    results: dict
    dataset: dict
    samples: list[dict]             # the first few
    tuned: dict                     # reference/finetune.json
    files: dict[str, list[dict]]    # records of train, heldout and prompts, for each file that exists
    runs: list[Run]
    win_rates: dict = field(default_factory=dict)                           # winrates.json (data/annotators/judges.py)


# ---- reading


def records(path: Path, most: int | None = None) -> list[dict]:
    """The first `most` objects of a .jsonl file, or all; [] if the file does not exist."""
    return [json.loads(line) for line in islice(lines(path), most) if line.strip()] if path.exists() else []


def read_job(folder: Path) -> Job:
    """Reads a job. Runs are those in results.json, in its order, or all runs in the folder if it names none."""
    home = folder.parent if (folder / "metrics.jsonl").exists() else folder  # one run: the data lie above it

    def read(path: Path) -> dict:
        return json.loads(path.read_text(), object_hook=figure) if path.exists() else {}

    results = {"preferences": {}, "adapt": {}, "policies": {}} | read(folder / "results.json")
    named = dict.fromkeys([*results["preferences"], *(run_of(row) for row in results["policies"])])
    found = [folder.name] if home != folder else [path.parent.name for path in sorted(home.glob("*/metrics.jsonl"))]
    runs = [read_run(home / name) for name in found if not named.keys() & set(found) or name in named]
    runs.sort(key=lambda run: [*named, run.name].index(run.name))
    files = {name: rows for name in ("train", "heldout", "prompts") if (rows := records(home / f"{name}.jsonl"))}
    shown = SAMPLES if results.get("asked", True) else 0                 # else samples.jsonl is older than results.json
    samples = records(folder / "samples.jsonl", shown)
    tuned = read(home / "reference" / "finetune.json")
    return Job(home, results, read(home / "dataset.json"), samples, tuned, files, runs, read(folder / "winrates.json"))


def figure(found: dict) -> dict:
    """Turns null back into NaN in the FIGURES of a JSON object (mixdpo/config.py, to_json); other nulls mean
    "absent"."""
    return found | {name: numbers(found[name]) for name in FIGURES & found.keys()}


def run_of(row: str) -> str:
    """The run that a row of the policies belongs to; "reference" stays as it is."""
    return re.sub(r" (mixture|sparse|head \d+)$", "", row)


def read_run(path: Path) -> Run:
    """Reads a run directory. Raises: InputError if its config.json is not valid."""
    config = vars(configs.load(TrainConfig, path / "config.json", report=lambda line: None))       # eval.py reported
    files = [local(path.parent, name) for name in parts_of(config["data"])]
    units = {}
    readable = all(map(os.path.isfile, files)) and not config["drop"]       # dropped lines would shift the numbers
    found = read_records(",".join(files), config["columns"], lambda line: None) if readable else ()
    for n, (_, pair, _) in enumerate(found):
        units.setdefault(pair["user"] if config["latent"] == "user" else n, pair.get("annotator") or "all")
    seconds = (path / "metrics.jsonl").stat().st_mtime - (path / "config.json").stat().st_mtime
    return Run(path.name, config, numbers(records(path / "metrics.jsonl")), records(path / "responsibilities.jsonl"),
               list(units.values()), seconds)


def local(folder: Path, name: str) -> str:
    """The file of this name in the job's folder, which may have moved; if there is none, the file itself."""
    own = folder / Path(name).name
    return str(own) if os.path.exists(own) else name


def annotators_of(job: Job) -> list[str]:
    """All annotators in a fixed order: those of dataset.json in its order, then others by name."""
    seen = {name for run in job.runs for name in run.units}
    seen |= {name for figures in job.results["preferences"].values() for name in figures["accuracy"]}
    first = list(job.dataset.get("annotators", []))
    return first + sorted(seen - set(first))


def rewards_of(job: Job) -> list[str]:
    """Names of the rewards in the order of each policy's "values"; [] if no completions were evaluated."""
    row = next(iter(job.results["policies"].values()), {})
    return [name for name in row if name not in ("trained", "gain", "kl", "length", "values", "w")]


def heads_of(job: Job) -> dict[str, list[str]]:
    """Run -> its head rows among the policies, in order."""
    heads = {}
    for row in job.results["policies"]:
        if re.search(r" head \d+$", row):
            heads.setdefault(run_of(row), []).append(row)
    return heads


# ---- figures


def paired(rows: dict, a: str, b: str) -> list[dict]:
    """Policy a minus policy b: one figure for each reward."""
    difference = np.array(rows[a]["values"]) - np.array(rows[b]["values"])                  # (N,R)
    return [mean_se(column) for column in difference.T]


def by_annotator(run: Run, intervals: int = 30) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Annotator -> midpoints of the intervals (S,) in steps, and mean responsibilities of its groups (S,K) or NaN."""
    edges = np.linspace(0, len(run.steps), min(intervals, len(run.steps)) + 1).round().astype(int)
    out = {}
    for name in dict.fromkeys(run.units):
        means = np.full((len(edges) - 1, run.config["experts"]), np.nan)
        for s, (first, end) in enumerate(zip(edges, edges[1:])):
            pairs = [(g, q) for step in run.steps[first:end] for g, q in zip(step["groups"], step["q"])]
            if rows := [q for g, q in pairs if run.units[g] == name]:
                means[s] = np.mean(rows, axis=0)
        out[name] = (edges[:-1] + edges[1:] + 1) / 2, means                 # steps start at 1
    return out


def last_responsibilities(run: Run) -> dict[str, np.ndarray]:
    """Annotator -> the last responsibilities of each of its groups (G_a,K)."""
    last = {g: q for step in run.steps for g, q in zip(step["groups"], step["q"])}
    return {name: np.array([last[g] for g in sorted(last) if run.units[g] == name]).reshape(-1, run.config["experts"])
            for name in dict.fromkeys(run.units)}


def smooth(values: list, intervals: int = 50) -> tuple[np.ndarray, np.ndarray]:
    """Means over up to `intervals` intervals of steps: midpoints (S,) and means (S,...). NaN steps are skipped."""
    values = np.array(values, dtype=np.float64)
    edges = np.linspace(0, len(values), min(intervals, len(values)) + 1).round().astype(int)
    parts = [values[a:b] for a, b in zip(edges, edges[1:])]
    counts = [np.isfinite(part).sum(0) for part in parts]
    means = [np.nansum(part, 0) / np.where(n > 0, n, np.nan) for part, n in zip(parts, counts)]
    return (edges[:-1] + edges[1:] + 1) / 2, np.array(means)
