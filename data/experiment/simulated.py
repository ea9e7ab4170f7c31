"""An experiment with simulated users: from texts to preference files, runs and a report.

A data set (data/imdb.py, data/reviews.py) supplies the texts and their split. Each stage is a function that writes its
files atomically into the job's folder. A stage is skipped if its files exist under the same content key (its inputs and
settings):

    split       reviews for fine-tuning, train and held-out prompts, the judge of sentiment
    finetune    reference/: the model after supervised fine-tuning on reviews (finetune.py)
    sample      several continuations of each prompt by the reference (mixdpo/evaluation/generate.py)
    annotate    the score of each continuation by each annotator (data/annotators/rewards.py)
    judge       train.jsonl, heldout.jsonl and dataset.json: pairs judged by simulated users (pairs.py); and
                adapt-*.jsonl for new users, on train and on held-out prompts, if the preset has new users

Then common.py trains DPO and the mixtures and evaluates them.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from data.annotators.rewards import NAMES, score
from data.annotators.sentiment import find_distilbert
from data.experiment.common import begin, check_preset, choose_preset, recorded_facts, train_and_evaluate
from data.experiment.estimate import estimate
from data.experiment.finetune import FinetuneConfig, finetune
from data.experiment.pairs import Rules, judge_with_context, name_users, pair_facts, pair_line, spreads
from data.experiment.stages import key_of, line_by_line, read_lines, stage, write_lines
from mixdpo.config import InputError, check_choices, compute_dtype, parse, to_json, write_text
from mixdpo.evaluation.completions import with_utilities
from mixdpo.evaluation.generate import Sampling, generate
from mixdpo.fast.memory import tune_process
from mixdpo.files import fetch
from mixdpo.files.atomic import must_be_own
from mixdpo.models.weights import load_model
from mixdpo.preferences import encode_prompt
from mixdpo.runs.distributed import joined
from mixdpo.runs.parallel import first_alone, from_first, locked
from mixdpo.text.tokenizer import load_tokenizer

MAX_PROMPT = 16     # a prompt is the first MAX_PROMPT tokens of a review
AT_ONCE = 512       # continuations sampled together on a CPU; four times as many on a GPU
FILES = {"train": "prompts-train.jsonl", "heldout": "prompts.jsonl"}


@dataclass(frozen=True)
class DataSet:
    """The parts of an experiment that depend on the data set."""

    name: str
    presets: dict               # name -> settings (data/experiment/presets.py)
    sources: tuple              # names of files in the user's data folder that are used; they are part of the key
    sizes: tuple                # settings that the split depends on
    split: Callable             # (job, preset, tokenizer, distilbert, data) -> summary; writes the files of the stage
    evaluate: str = "prompts.jsonl"         # file of the prompts that are completed in the evaluation


@dataclass(frozen=True)
class ExperimentConfig:
    """An experiment: data, reference, DPO and mixtures, report. Finished stages are skipped."""

    preset: str = ""            # smoke, quick, cpu or paper; default: paper with a CUDA device, else quick
    model: str = ""             # as train.py --model; default: gpt2 where possible, else smollm2
    out: str = ""               # the job's folder; default: runs/DATASET-PRESET, or runs/DATASET-PRESET-MODEL
    sentiment: str = ""       # judge of sentiment: bag or distilbert; default: distilbert if it can be loaded, else bag
    data_only: bool = False     # true: stop after the preference files are written
    data_folder: str = ""       # folder of local files, used before anything is fetched


# ---- prompts


def prompt_of(text: str, tokenizer) -> str | None:
    """The review's first MAX_PROMPT tokens as text; None if the review is too short, or if encoding the text does not
    return the same tokens."""
    if len(text) < 8 * MAX_PROMPT:
        return None
    ids = tokenizer.encode(text[: 32 * MAX_PROMPT])[:MAX_PROMPT]
    prompt = tokenizer.decode(ids)
    return prompt if "\ufffd" not in prompt and tokenizer.encode(prompt) == ids else None


def longest_prompt(tokenizer) -> int:
    """Tokens of a prompt, including the start token if the tokenizer has one."""
    return MAX_PROMPT + (tokenizer.bos is not None)


# ---- continuations and their scores


def sample(job: Path, preset: dict, tokenizer, file: str, seed: int, key: str) -> None:
    """Writes sampled-FILE, one {"prompt", "responses", "lost"} a line, sampled from the reference. Resumes.

    A continuation is dropped if encoding its text does not return its tokens (training would see other tokens than were
    sampled), or if it repeats another. "lost" counts dropped continuations.
    """
    prompts, n = read_lines(job / file), preset["continuations"]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = load_model(str(job / "reference"), dtype=compute_dtype("auto", device)[0], device=device)
    rows = (AT_ONCE if device == "cpu" else 4 * AT_ONCE) // n * n

    def continued(start: int, part: list[dict]) -> list[dict]:
        encoded = [encode_prompt(row["prompt"], tokenizer, 2 * MAX_PROMPT)[0] for row in part for _ in range(n)]
        ids = generate(model, encoded, Sampling(preset["max_response"], tokenizer.eos, seed=seed, batch=rows),
                       rows=list(range(start * n, (start + len(part)) * n)))
        texts = [response_of(response, tokenizer) for response in ids]
        kept = [list(dict.fromkeys(filter(None, texts[i * n : (i + 1) * n]))) for i in range(len(part))]
        return [row | {"responses": responses, "lost": n - len(responses)} for row, responses in zip(part, kept)]

    line_by_line(job / f"sampled-{file}", key, prompts, rows // n, continued, f"sample {file}")


def response_of(ids: list[int], tokenizer) -> str | None:
    """A continuation as text; None if it is blank, or if encoding the text does not return the same tokens."""
    ids = ids[:-1] if ids[-1:] == [tokenizer.eos] else ids
    text = tokenizer.decode(ids)
    return text if text.strip() and "\ufffd" not in text and tokenizer.encode(text) == ids else None


def annotate(job: Path, file: str, key: str) -> None:
    """Writes scored-FILE: each annotator's score of each prompt with continuation. Resumes."""
    def scored(_, part: list[dict]) -> list[dict]:
        texts = [row["prompt"] + response for row in part for response in row["responses"]]
        scores, done, out = score(texts, list(NAMES), job), 0, []
        for row in part:
            own = slice(done, done := done + len(row["responses"]))
            out.append(row | {"scores": {name: [round(s, 6) for s in column[own]] for name, column in scores.items()}})
        return out

    rows = [row for row in read_lines(job / f"sampled-{file}") if len(row["responses"]) > 1]
    line_by_line(job / f"scored-{file}", key, rows, 512, scored, f"annotate {file}")


# ---- pairs


@dataclass(frozen=True)
class PreferenceFile:
    """One preference file to write: NAME.jsonl, pairs on the prompts of a split."""

    name: str
    split: str                  # train or heldout
    users: dict[str, str]       # user -> type
    each: int                   # pairs for each user
    context: int                # of these, pairs for the E-step alone
    seed: int


def preference_files(preset: dict) -> list[PreferenceFile]:
    """The files that a preset asks for: train, heldout, and two of new users if the preset has new users."""
    types, seed = preset["annotators"], preset["seed"]
    users = name_users(preset["users"], types, seed)
    files = [PreferenceFile("train", "train", users, preset["pairs"], preset["context"], seed),
             PreferenceFile("heldout", "heldout", users, preset["heldout_pairs"], 0, seed + 1)]
    if preset.get("new_users"):
        new = {f"new-{user}": kind for user, kind in name_users(preset["new_users"], types, seed + 3).items()}
        files += [PreferenceFile("adapt-new-user", "train", new, preset["new_pairs"], 0, seed + 3),
                  PreferenceFile("adapt-new-user-new-prompt", "heldout", new, preset["new_pairs"], 0, seed + 4)]
    return files


def judged_pairs(rows: list[dict], file: PreferenceFile, preset: dict, rules: Rules) -> list[dict]:
    """Pairs of judge_with_context for every user of the file. rows: the split's scored prompts. In a preset with
    domains a user judges only prompts of the domain of the user's type."""
    judged = []
    for domain, judges in preset.get("domains", {None: preset["annotators"]}).items():      # None: no domains
        here = [n for n, row in enumerate(rows) if row.get("domain") == domain]
        users = {user: kind for user, kind in file.users.items() if kind in judges}
        pairs = judge_with_context([rows[n]["scores"] for n in here], users, file.each, file.context, rules, file.seed)
        judged += [pair | {"prompt": here[pair["prompt"]]} for pair in pairs]
    return judged


def judge(job: Path, preset: dict, max_prompt: int) -> str:
    """Writes the preference files and dataset.json, which records how they were made. Returns a summary."""
    types = preset["annotators"]
    scored = {name: read_lines(job / f"scored-{file}") for name, file in FILES.items()}
    facts = {"rewards": list(NAMES), "annotators": types, "max_new": preset["max_response"], "max_prompt": max_prompt}
    tastes = preset.get("tastes", {})                                       # utilities of rewards in spreads
    spread = spreads([row["scores"] for row in scored["train"]],
                     sorted({reward for of in tastes.values() for reward in of}) or types)
    if tastes:
        facts["utilities"] = {kind: {reward: weight / spread[reward] for reward, weight in of.items()}
                              for kind, of in tastes.items()}
        scored = {name: [row | {"scores": with_utilities(row["scores"], facts["utilities"])} for row in rows]
                  for name, rows in scored.items()}
    rules = Rules(preset["agree"], preset["margin"], dict.fromkeys(types, 1.0) if tastes else spread)
    names = ("seed", "users", "pairs", "context", "heldout_pairs", "new_users", "new_pairs", "continuations", "agree",
             "domains", "margin")
    facts |= {name: preset[name] for name in names if name in preset}
    facts |= {"spread": spread, "ties": "none: a pair within the margin is not shown"}
    for file in preference_files(preset):
        rows = scored[file.split]
        judged = judged_pairs(rows, file, preset, rules)
        lines = [pair_line(rows[pair["prompt"]], pair) for pair in judged]
        write_lines(job / f"{file.name}.jsonl", lines)
        if file.name == "train":                                            # of each type, for one policy a known type
            for kind in types:
                write_lines(job / f"train-{kind}.jsonl", (line for line in lines if line["annotator"] == kind))
        lost = sum(row["lost"] for row in read_lines(job / f"sampled-{FILES[file.split]}"))
        facts[file.name] = {"prompts": len(rows), "continuations_lost": lost}
        facts[file.name] |= pair_facts(rows, judged, types, rules.spread)
    facts["reviews"] = json.loads((job / "split.json").read_text())
    write_text(job / "dataset.json", to_json(facts, indent=1) + "\n")
    train, heldout = facts["train"], facts["heldout"]
    return (f"{train['pairs']} train and {heldout['pairs']} held-out pairs of {train['users']} users; all types agree "
            f"on {train['agreement']:.2f} of the train pairs")


# ---- the job


def choose_model(config: ExperimentConfig) -> tuple[str, str]:
    """The model's name, and the reason for the choice."""
    if config.model:
        return config.model, "as requested"
    folder = config.data_folder or None
    try:
        fetch.asset("gpt2", folder), fetch.asset("gpt2.config", folder)
    except InputError as error:
        if folder and any((Path(folder) / place).exists() for place in ("gpt2/model.safetensors", "model.safetensors")):
            raise       # the user's copy is damaged, and must not be replaced in silence
        return "smollm2", f"GPT-2's weights cannot be had ({str(error).splitlines()[0]})"
    return "gpt2", "its weights are at hand"


def choose_judge(config: ExperimentConfig) -> tuple[str | None, str]:
    """DistilBERT's name or directory, or None for the bag; and the reason for the choice."""
    found, why = (None, "as requested") if config.sentiment == "bag" else find_distilbert(config.data_folder or None)
    if config.sentiment == "distilbert" and found is None:
        raise InputError(f"distilbert cannot be loaded: {why}; choose --sentiment bag", option="sentiment")
    return found, why


def data_of_prompts(job: Path, dataset: DataSet, preset: dict, model: str, distilbert: str | None, data: str) -> None:
    """Runs the stages up to the scored continuations of all prompts."""
    tokenizer = first_alone(lambda: load_tokenizer(model, data or None))
    own = [Path(data) / name for name in dataset.sources]
    source = [fetch.sha256_of(file) for file in own if data and file.is_file()] or "fetched"
    sizes = {name: preset[name] for name in dataset.sizes}
    job.mkdir(parents=True, exist_ok=True)
    files = ["reviews.jsonl", *FILES.values(), "split.json", "judge.json"]
    stage(job, "split", key_of(sizes, source, tokenizer.key, distilbert), files,
          lambda: dataset.split(job, preset, tokenizer, distilbert, data or None))
    tuned = job / "reference"
    finetune(FinetuneConfig(str(job / "reviews.jsonl"), model, str(tuned), data_folder=data, **preset["finetune"]))
    for seed, (name, file) in enumerate(FILES.items(), start=preset["seed"]):
        key = key_of(preset["max_response"], preset["continuations"], seed, job / file, tuned / "model.safetensors")
        stage(job, f"sample-{name}", key, [f"sampled-{file}"], lambda: sample(job, preset, tokenizer, file, seed, key),
              together=True)
        key = key_of(job / f"sampled-{file}", job / "judge.json")
        stage(job, f"annotate-{name}", key, [f"scored-{file}"], lambda: annotate(job, file, key), together=True)


def prepare(job: Path, dataset: DataSet, preset: dict, model: str, distilbert: str | None, data: str) -> None:
    """Runs all stages up to the preference files."""
    data_of_prompts(job, dataset, preset, model, distilbert, data)
    names = ("annotators", "tastes", "domains", "seed", "margin", "agree", "users", "pairs", "context", "heldout_pairs",
             "new_users", "new_pairs")
    longest = longest_prompt(load_tokenizer(model, data or None))
    scored = [job / f"scored-{file}" for file in FILES.values()]
    key = key_of({name: preset.get(name) for name in names}, longest, *scored)
    files = ["train.jsonl", "heldout.jsonl", "dataset.json", *(f"train-{kind}.jsonl" for kind in preset["annotators"])]
    files += ["adapt-new-user.jsonl", "adapt-new-user-new-prompt.jsonl"] if preset.get("new_users") else []
    stage(job, "judge", key, files, lambda: judge(job, preset, longest))


def main(dataset: DataSet, argv: list[str]) -> None:
    """The command of a data set."""
    tune_process()
    config = parse(ExperimentConfig, argv, f"python -m data.{dataset.name}")
    check_choices(config, {"sentiment": ("", "bag", "distilbert")})
    name, preset, job = choose_preset(dataset, config)
    check_preset(preset, "finetune")
    must_be_own(job, [], "job.json", {"preset"})
    with joined(), locked(job):
        run_job(dataset, config, name, preset, job)


def run_job(dataset: DataSet, config, name: str, preset: dict, job: Path) -> None:
    """Runs the job, or resumes it."""
    recorded, resumed = from_first(lambda: recorded_facts(job)), "as the job began"
    model, why = (recorded["model"], resumed) if recorded and not config.model else first_alone(
        lambda: choose_model(config))
    same_judge = recorded and not config.sentiment
    distilbert, why_judge = (recorded["judge"], resumed) if same_judge else first_alone(lambda: choose_judge(config))
    begin(job, {"preset": name, "model": model, "judge": distilbert, "settings": json.loads(to_json(preset))})
    print(f"job: {job}, preset {name}")
    print(f"model: {model} ({why})")
    print(f"judge of sentiment: {distilbert or 'bag of words and word pairs'} ({why_judge})")
    print(f"time: {estimate(preset, model, MAX_PROMPT)}")
    prepare(job, dataset, preset, model, distilbert, config.data_folder)
    if config.data_only:
        print(f"The preference files are in {job}; nothing was trained, since --data-only is set.")
        return
    max_prompt = longest_prompt(load_tokenizer(model, config.data_folder or None))
    shared = {"model": str(job / "reference"), "data_folder": config.data_folder, "max_prompt": max_prompt,
              "max_response": preset["max_response"]}
    train_and_evaluate(job, preset, shared, prompts=str(job / dataset.evaluate), limit=preset["evaluate"],
                       **preset.get("evaluation", {}))
