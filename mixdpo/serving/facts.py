"""What the page says about a run: GET /api/run. Everything comes from files beside the run.

    checkpoint, config.json     the run itself (runs/load_run.py), which the server has loaded
    metrics.jsonl               the number of optimizer steps
    results.json                an evaluation (eval.py), in the run's folder or in the folder of the job
    prompts.jsonl               prompts to try; else those of samples.jsonl, else of heldout.jsonl

Each of the last three may be missing; `cannot` then says what the page does not show, and what to do. No folder is
named, only files: the page may be seen by others than the owner of the machine. For the same reason prompts of the
training data are not shown, and a private run shows no counts.
"""

import json
import math
import re
from dataclasses import asdict, fields
from itertools import islice
from pathlib import Path

from mixdpo.evaluation.collapse import describe_collapse
from mixdpo.evaluation.tables import sentences
from mixdpo.files.atomic import read_json_or_empty
from mixdpo.files.sources import HUB, parts_of
from mixdpo.runs.load_run import Run
from mixdpo.runs.options import TrainConfig, short_run
from mixdpo.text.records import Fault, lines
from mixdpo.text.shapes import read_records

PROMPTS = 12                    # at most so many prompts are offered
PATHS = ("data", "model", "out", "data_folder", "validation", "init_experts")      # options that may name folders
SHARING = {"heads": "each a head (output layer) on one shared model",
           "lora": "each a LoRA adapter (small added weights) in one frozen model", "models": "each a model of its own"}
GATES = {
    "fixed": "The weights are the same for every prompt.",
    "linear": "A gate that was trained with the experts reads the prompt.",
    "mlp": "A gate that was trained with the experts reads the prompt.",
    "user": "The gate knows the users of the training data; anybody else gets its weights for an unknown user.",
    "prompt-user": "The gate reads the prompt. It also knows the users of the training data; anybody else is an "
                   "unknown user.",
    "domain": "The gate reads the domain of a prompt from its file. A prompt that is typed here has none, so all "
              "weights are equal.",
    "random": "A gate that was never trained reads the prompt: a baseline."}


def facts(served) -> dict:
    """Everything that the page says about a run (policies.ServedRun), ready for JSON: no NaN.

    "summary": one sentence; "experts": K; "labels" and "policies": names to show and to ask for; "alarms", "headline":
    sentences; "adaptation": accuracy for new users by the number of their known comparisons; "prompts": texts or
    messages; "cannot": [{"what", "why"}].
    """
    run, config = served.run, served.run.config
    chat = served.chat and trained_on_messages(config)
    found = evaluation(run)
    return {
        "name": served.name,
        "summary": summary(run),
        "experts": served.K,
        "labels": found["labels"],
        "policies": list(served.names),
        "model": ", ".join(map(model_name, config.models)),
        "gate": config.gate,
        "gate_note": GATES[config.gate],
        "latent": config.latent,
        "beta": config.beta,
        "data": data_names(config.data),
        "options": changed_options(config),
        "headline": found["headline"],
        "adaptation": found["adaptation"],
        "alarms": [*found["alarms"], *short_alarms(run)],
        "prompts": example_prompts(run, chat),
        "chat": chat,
        "max_tokens": served.max_response,
        "max_prompt": served.max_prompt,
        "context": served.context,
        "cannot": cannot(served, found),
    }


# --- the run ----------------------------------------------------------------------------------------------------------


def summary(run: Run) -> str:
    """What the run is, in one sentence."""
    config, K = run.config, run.config.experts
    private = config.epsilon < math.inf
    users = {pair.user for pair in run.plan.pairs} - {None}
    count = "" if private else f"{len(run.plan.pairs):,} "
    by = f" by {len(users):,} user{'s' * (len(users) != 1)}" if users and not private else ""
    budget = f", with differential privacy (epsilon {config.epsilon:g})" if private else ""
    if K == 1:
        return f"One policy for everybody, trained by DPO on {count}comparisons{by}{budget}."
    method = "Mix-DPO" if config.gate == "fixed" else "MoE-DPO"
    unit = "each user has one type of taste" if config.latent == "user" else "each comparison has its own type of taste"
    return f"{K} experts, {SHARING[config.sharing]}, trained by {method} on {count}comparisons{by}{budget}; {unit}."


def model_name(named: str) -> str:
    """A model without the folders of its path; a model that a job has fine-tuned is named after the original."""
    settings = read_json_or_empty(Path(named) / "finetune.json").get("settings")
    original = settings.get("model") if isinstance(settings, dict) else None    # else the file is of another program
    if original and isinstance(original, str) and original != named:
        return f"{model_name(original)}, fine-tuned on the job's texts"
    is_hub_name = re.fullmatch(r"[\w.-]+/[\w.-]+", named) and not Path(named).exists()
    return named if is_hub_name else Path(named).name


def data_names(named: str) -> list[str]:
    """The names of the data files, without their folders."""
    return [part if part.startswith(HUB) else Path(part).name for part in parts_of(named)]


def changed_options(config: TrainConfig) -> dict[str, str]:
    """The options of the run that are not at their defaults, as on the command line; none that names a folder."""
    values = asdict(config)
    return {f"--{f.name.replace('_', '-')}": str(values[f.name]).lower() if isinstance(values[f.name], bool)
            else str(values[f.name]) for f in fields(config)
            if f.name not in PATHS and values[f.name] != f.default}


def steps_of(run: Run) -> int | None:
    """The number of optimizer steps, from the last line of metrics.jsonl; None if it cannot be read."""
    path = run.path / "metrics.jsonl"
    last = path.read_bytes().rstrip().rpartition(b"\n")[2] if path.exists() else b""
    try:
        return int(json.loads(last)["step"])
    except (ValueError, LookupError, TypeError):
        return None


# --- its evaluation ---------------------------------------------------------------------------------------------------


def evaluation(run: Run) -> dict:
    """What an evaluation says of a run: "headline", "labels" of the experts, "adaptation" and "alarms"; "missing": why
    there is none, or "". Of several evaluations the one in the run's own folder counts."""
    for folder in (run.path, run.path.parent):
        results = {"preferences": {}, "adapt": {}, "policies": {}, "own_reward": []} | read_results(folder)
        try:
            if run.name not in runs_in(results):
                continue
            figures = results["preferences"].get(run.name)
            return {"headline": "".join(sentences(without_other_mixtures(results, run.name))[:1]),
                    "labels": expert_labels(run, figures or {}),
                    "adaptation": adaptation_tables(results, run.name),
                    "alarms": as_sentences(run, [describe_collapse(run.name, figures)] if figures else []),
                    "missing": ""}
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            why = f"results.json is damaged or of another version ({type(error).__name__}: {error}). Run eval.py again."
            return nothing(run, why)
    return nothing(run, "The run was not evaluated. Run eval.py with held-out comparisons.")


def nothing(run: Run, why: str) -> dict:
    """`evaluation` of a run without one."""
    return {"headline": "", "labels": expert_labels(run, {}), "adaptation": [], "alarms": [], "missing": why}


def runs_in(results: dict) -> set[str]:
    """The runs that an evaluation is about."""
    return {*results["preferences"], *map(run_of, results["policies"]), *(row["run"] for row in results["own_reward"])}


def read_results(folder: Path) -> dict:
    """results.json, or {}. null in a figure is NaN again: to_json writes NaN as null."""
    def figure(found: dict) -> dict:
        is_figure = found.keys() & {"mean", "se"}
        return {name: math.nan if is_figure and value is None else value for name, value in found.items()}

    return json.loads(json.dumps(read_json_or_empty(folder / "results.json")), object_hook=figure)


def run_of(policy: str) -> str:
    """The run that a policy of an evaluation belongs to."""
    return re.sub(r" (mixture|sparse|head \d+)$", "", policy)


def without_other_mixtures(results: dict, name: str) -> dict:
    """The results of one run, and of all runs with one policy. The headline is about the first mixture."""
    rows = [row for row in results["own_reward"] if row["run"] == name or row["config"]["experts"] == 1]
    mixtures = {run_of(policy) for policy in results["policies"] if run_of(policy) != policy}
    return results | {
        "own_reward": rows,
        "preferences": {run: found for run, found in results["preferences"].items()
                        if run == name or found["experts"] == 1},
        "policies": {policy: row for policy, row in results["policies"].items()
                     if run_of(policy) == name or run_of(policy) not in mixtures}}


def expert_labels(run: Run, figures: dict) -> list[str]:
    """A label of each expert: its number, and the annotator of most of its training units, if an evaluation knows. A
    private run has no annotators: they are counted without noise."""
    if run.config.experts == 1:
        return ["DPO"]
    own = run.config.epsilon == math.inf and figures.get("own") or [None] * run.config.experts
    return [f"Expert {k}" + (f" ({own[k]})" if own[k] else "") for k in range(run.config.experts)]


def adaptation_tables(results: dict, name: str) -> list[dict]:
    """[{"file", "points": [{"shown", "users", "mean", "se"}]}]: the accuracy for new users, by the number of their
    comparisons that the weights are computed from. se: None if there is a single user."""
    tables = []
    for file, runs in results["adapt"].items():
        points = [{"shown": point["shown"], "users": point["users"], "mean": finite(point["accuracy"]["mean"]),
                   "se": finite(point["accuracy"]["se"])} for point in runs.get(name, [])]
        tables += [{"file": file, "points": points}] if points else []
    return tables


def short_alarms(run: Run) -> list[str]:
    """Warnings that the run was too short for its options."""
    steps = steps_of(run)
    return as_sentences(run, [] if steps is None else short_run(run.config, steps))


def as_sentences(run: Run, warnings: list[str]) -> list[str]:
    """Warnings of the command line as sentences; empty ones are left out."""
    found = [line.removeprefix("warning: ").removeprefix(f"{run.name}: ").rstrip(".") for line in warnings if line]
    return [f"{line[0].upper()}{line[1:]}." for line in found]


def finite(number: float) -> float | None:
    """The number, or None for NaN, which JSON does not have."""
    return number if math.isfinite(number) else None


# --- prompts, and what is missing -------------------------------------------------------------------------------------


def trained_on_messages(config: TrainConfig) -> bool:
    """Whether the first prompt of the training data is a list of messages, not a text."""
    for _, record, _ in read_records(config.data, config.columns, lambda line: None):
        if not isinstance(record, Fault):
            return isinstance(record["prompt"], list)
    return False


def example_prompts(run: Run, chat: bool) -> list:
    """Up to PROMPTS prompts to try, each once: texts or, with chat, messages with one turn of a user."""
    public = run.config.epsilon == math.inf
    for name in ("prompts.jsonl", "samples.jsonl", *["heldout.jsonl"] * public):
        for path in (run.path / name, run.path.parent / name):
            found: list = []
            for raw in islice(lines(path), 50 * PROMPTS) if path.exists() else ():
                prompt = prompt_of(raw, chat)
                found += [prompt] if prompt and prompt not in found else []
            if found:
                return found[:PROMPTS]
    return []


def prompt_of(raw: bytes, chat: bool) -> str | list | None:
    """The prompt of one line of a file; None if the page could not show it in its fields."""
    try:
        prompt = json.loads(raw)["prompt"]
        turns = [message["role"] for message in prompt if isinstance(message["content"], str)] \
            if isinstance(prompt, list) else []
    except (ValueError, LookupError, TypeError, RecursionError):
        return None
    if chat:
        return prompt if turns in (["user"], ["system", "user"]) and len(turns) == len(prompt) else None
    return prompt if isinstance(prompt, str) and prompt.strip() else None


def cannot(served, found: dict) -> list[dict]:
    """What this run cannot show, and why: [{"what", "why"}]. found: its `evaluation`."""
    config, several, missing = served.run.config, served.K > 1, found["missing"]
    rules = [
        (not several, "Experts, colours and your own type",
         "The run has one policy. Train with --experts 2 or more."),
        (several and config.latent == "pair", "Types of people",
         "In training each comparison had its own type, so nothing taught the experts that one person keeps one type. "
         "Your type is still computed from your choices. Train with --latent user if the data name users."),
        (several and served.dpo is None, "DPO beside the experts",
         "There is no finished run with one policy in the same folder. Train one with --experts 1."),
        (bool(missing), "A headline figure", missing),
        (several and not missing and not found["adaptation"], "How well the mixture serves new users",
         "The evaluation had no new users. Run eval.py with --adapt."),
        (config.epsilon < math.inf, "Numbers of comparisons and users",
         "The run is private, and these numbers are part of its data."),
    ]
    return [{"what": what, "why": why} for applies, what, why in rules if applies]
