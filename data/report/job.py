"""A job, read back: what its files say, and the figures that the report makes of them.

    paired difference   mean over prompts of a(prompt) - b(prompt), with its standard error: same prompts, same seeds
    by annotator        mean responsibilities of the groups of an annotator, over a stretch of consecutive steps

A job is a folder with results.json and samples.jsonl (eval.py), dataset.json and preference files (the data script),
reference/, and a directory for each run; or one run in such a folder, with results.json and samples.jsonl of its own.
Any of them may be missing. Left out: every figure that eval.py computes.
"""

import json
import re
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import numpy as np

from data.experiment.stages import numbers
from mixdpo import config as configs
from mixdpo.metrics import mean_se
from mixdpo.runs.options import TrainConfig
from mixdpo.text.records import lines

SAMPLES = 6  # prompts whose completions are shown
FIGURES = {"mean", "se", "values", "conflicts_by_pair", "effective_experts", "ari", "matched", "bayes_ari",
           "bayes_matched", "perplexity_before", "perplexity_after", "rate", "low", "high"}


@dataclass
class Run:
    """One run directory."""

    name: str
    config: dict
    metrics: list[dict]             # one a step
    steps: list[dict]               # {"step", "groups": indices into units, "q": their responsibilities (G,K)}
    units: list[str]                # annotator of each training group, "all" if unnamed; [] if it cannot be told
    seconds: float                  # from its (last) start to its last step, by the files' times


@dataclass
class Job:
    """Everything the report is made of."""

    home: Path
    results: dict
    dataset: dict
    samples: list[dict]             # the first few
    tuned: dict                     # reference/finetune.json
    files: dict[str, list[dict]]    # train, heldout, prompts: the records of each, where the file is
    runs: list[Run]
    win_rates: dict = field(default_factory=dict)                           # winrates.json (data/annotators/judges.py)


# ---- reading


def records(path: Path, most: int | None = None) -> list[dict]:
    """The objects of a .jsonl file, the first `most` of them; none if there is no such file."""
    return [json.loads(line) for line in islice(lines(path), most) if line.strip()] if path.exists() else []


def read_job(folder: Path) -> Job:
    """The runs are those that results.json names, in its order; all in the folder if it names none."""
    home = folder.parent if (folder / "metrics.jsonl").exists() else folder  # of a single run's data

    def read(path: Path) -> dict:
        return json.loads(path.read_text(), object_hook=figure) if path.exists() else {}

    results = {"preferences": {}, "adapt": {}, "policies": {}} | read(folder / "results.json")
    named = dict.fromkeys([*results["preferences"], *(run_of(row) for row in results["policies"])])
    found = [folder.name] if home != folder else [path.parent.name for path in sorted(home.glob("*/metrics.jsonl"))]
    runs = [read_run(home / name) for name in found if not named.keys() & set(found) or name in named]
    runs.sort(key=lambda run: [*named, run.name].index(run.name))
    files = {name: rows for name in ("train", "heldout", "prompts") if (rows := records(home / f"{name}.jsonl"))}
    shown = SAMPLES if results.get("asked", True) else 0                    # else they are of an evaluation before
    samples = records(folder / "samples.jsonl", shown)
    tuned = read(home / "reference" / "finetune.json")
    return Job(home, results, read(home / "dataset.json"), samples, tuned, files, runs, read(folder / "winrates.json"))


def figure(found: dict) -> dict:
    """An object of a results file: what is null in a figure or a list of them was NaN (mixdpo/config.py, to_json);
    anything else that is null is not there."""
    return found | {name: numbers(found[name]) for name in FIGURES & found.keys()}


def run_of(row: str) -> str:
    """The run that a row of the policies belongs to; "reference" is its own."""
    return re.sub(r" (mixture|sparse|head \d+)$", "", row)


def read_run(path: Path) -> Run:
    config = vars(configs.load(TrainConfig, path / "config.json", report=lambda line: None))       # eval.py reported
    beside = path.parent / Path(config["data"]).name
    data = beside if beside.exists() else Path(config["data"])              # a job's folder may have moved since
    units = {}
    for n, pair in enumerate(records(data) if not config["drop"] else []):  # dropped lines would shift the numbers
        if pair.get("context") and config["estep"] != "context":
            continue                                                        # in no group (mixdpo/plan.py)
        units.setdefault(pair["user"] if config["latent"] == "user" else n, pair.get("annotator") or "all")
    seconds = (path / "metrics.jsonl").stat().st_mtime - (path / "config.json").stat().st_mtime
    return Run(path.name, config, numbers(records(path / "metrics.jsonl")), records(path / "responsibilities.jsonl"),
               list(units.values()), seconds)


def annotators_of(job: Job) -> list[str]:
    """All annotators in a fixed order: as dataset.json has them, then any others by name."""
    seen = {name for run in job.runs for name in run.units}
    seen |= {name for figures in job.results["preferences"].values() for name in figures["accuracy"]}
    first = list(job.dataset.get("annotators", []))
    return first + sorted(seen - set(first))


def rewards_of(job: Job) -> list[str]:
    """Names of the rewards in the order of each policy's "values"; none if no completions were evaluated."""
    row = next(iter(job.results["policies"].values()), {})
    return [name for name in row if name not in ("trained", "gain", "kl", "length", "values", "w")]


def heads_of(job: Job) -> dict[str, list[str]]:
    """Run -> the rows of the policies that are its heads, in their order."""
    heads = {}
    for row in job.results["policies"]:
        if re.search(r" head \d+$", row):
            heads.setdefault(run_of(row), []).append(row)
    return heads


# ---- figures


def paired(rows: dict, a: str, b: str) -> list[dict]:
    """Policy a minus policy b, one figure a reward."""
    difference = np.array(rows[a]["values"]) - np.array(rows[b]["values"])                  # (N,R)
    return [mean_se(column) for column in difference.T]


def by_annotator(run: Run, stretches: int = 30) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Annotator -> middles of the stretches (S,) in steps, mean responsibilities (S,K) of its groups, or NaN."""
    edges = np.linspace(0, len(run.steps), min(stretches, len(run.steps)) + 1).round().astype(int)
    out = {}
    for name in dict.fromkeys(run.units):
        means = np.full((len(edges) - 1, run.config["experts"]), np.nan)
        for s, (first, end) in enumerate(zip(edges, edges[1:])):
            pairs = [(g, q) for step in run.steps[first:end] for g, q in zip(step["groups"], step["q"])]
            if rows := [q for g, q in pairs if run.units[g] == name]:
                means[s] = np.mean(rows, axis=0)
        out[name] = (edges[:-1] + edges[1:] + 1) / 2, means                 # steps count from 1
    return out


def last_responsibilities(run: Run) -> dict[str, np.ndarray]:
    """Annotator -> the last responsibilities of each of its groups (G_a,K)."""
    last = {g: q for step in run.steps for g, q in zip(step["groups"], step["q"])}
    return {name: np.array([last[g] for g in sorted(last) if run.units[g] == name]).reshape(-1, run.config["experts"])
            for name in dict.fromkeys(run.units)}


def smooth(values: list, stretches: int = 50) -> tuple[np.ndarray, np.ndarray]:
    """Means over at most `stretches` stretches of consecutive steps: middles (S,) and means (S,...). Steps without
    figures, which nobody took part in, count for nothing."""
    values = np.array(values, dtype=np.float64)
    edges = np.linspace(0, len(values), min(stretches, len(values)) + 1).round().astype(int)
    parts = [values[a:b] for a, b in zip(edges, edges[1:])]
    counts = [np.isfinite(part).sum(0) for part in parts]
    means = [np.nansum(part, 0) / np.where(n > 0, n, np.nan) for part, n in zip(parts, counts)]
    return (edges[:-1] + edges[1:] + 1) / 2, np.array(means)
