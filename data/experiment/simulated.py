"""An experiment, whole: from real texts to the table of rewards. What is its own of a data set (data/imdb.py,
data/reviews.py) is where the texts come from and how they are split; the rest is here.

Each stage is a function that writes its files into the job's folder, whole or not at all, and is skipped where they lie
already under the same content key (what went in, and the settings):

    split       reviews for the supervised step, prompts from train and from held-out reviews, the judge of sentiment
    finetune    reference/: the model after a supervised step on reviews (data/experiment/finetune.py)
    sample      several continuations of each prompt by the reference (mixdpo/evaluation/generate.py)
    annotate    what each annotator thinks of each (data/annotators/rewards.py)
    judge       train.jsonl, heldout.jsonl and dataset.json: pairs judged by simulated users (experiment/pairs.py); and
                adapt-*.jsonl, of new users, on the train prompts and on the held-out ones, where a preset has some

then DPO and the mixtures are trained (train.py), and the table and the report are made (eval.py).
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import torch

from data.annotators.rewards import NAMES, score
from data.annotators.sentiment import find_distilbert
from data.experiment.estimate import estimate
from data.experiment.finetune import FinetuneConfig, finetune
from data.experiment.finetune import validate as validate_finetune
from data.experiment.pairs import judge_apart, name_users, pair_facts, pair_line, spreads
from data.experiment.stages import key_of, line_by_line, read_lines, stage, write_lines
from eval import EvalConfig, evaluate
from mixdpo.config import SEEDS, InputError, check_choices, check_ranges, parse, to_json, write_whole
from mixdpo.evaluation.generate import generate
from mixdpo.fast.memory import steady
from mixdpo.files import fetch
from mixdpo.files.atomic import alone, must_be_own
from mixdpo.models.weights import load_model
from mixdpo.preferences import encode_prompt
from mixdpo.runs.options import validate
from mixdpo.runs.rundir import compute_dtype
from mixdpo.text.tokenizer import load_tokenizer
from train import TrainConfig, run

MAX_PROMPT = 16  # tokens of a review that make a prompt
AT_ONCE = 256  # continuations sampled together on a CPU; four times as many on a GPU
FILES = {"train": "prompts-train.jsonl", "heldout": "prompts.jsonl"}


@dataclass(frozen=True)
class DataSet:
    """What is an experiment's own."""

    name: str
    presets: dict               # name -> settings (data/experiment/presets.py)
    sources: tuple              # names of the user's own files that are looked into; what lies there is part of the key
    sizes: tuple                # the settings that the split depends on
    split: Callable             # (job, preset, tokenizer, distilbert, data): writes what `prepare` says of it
    evaluate: str = "prompts.jsonl"         # the prompts that are completed


@dataclass(frozen=True)
class ExperimentConfig:
    """An experiment: data, reference, DPO and mixtures, table. What is finished is not done again."""

    preset: str = ""            # smoke, quick, cpu or paper; default: paper with a CUDA device, else quick
    model: str = ""             # gpt2, smollm2, llama-3.2-1b or a directory; default: gpt2 where possible, else smollm2
    out: str = ""               # the job's folder; default: runs/DATASET-PRESET, and -MODEL where one is given
    sentiment: str = ""         # its judge: bag or distilbert; default: distilbert if it can be loaded, else bag
    data_only: bool = False     # true: stop when the preference files are written
    data_folder: str = ""       # local files looked into before anything is fetched


# ---- prompts


def prompt_of(text: str, tokenizer) -> str | None:
    """The review's first MAX_PROMPT tokens as text; None if it is hardly longer or its text does not give them back."""
    if len(text) < 8 * MAX_PROMPT:
        return None
    ids = tokenizer.encode(text[: 32 * MAX_PROMPT])[:MAX_PROMPT]
    prompt = tokenizer.decode(ids)
    return prompt if "\ufffd" not in prompt and tokenizer.encode(prompt) == ids else None


def longest_prompt(tokenizer) -> int:
    """Ids of a prompt, a start token counted where the tokenizer has one."""
    return MAX_PROMPT + (tokenizer.bos is not None)


# ---- continuations and their scores


def sample(job: Path, preset: dict, tokenizer, file: str, seed: int, key: str) -> None:
    """sampled-FILE: {"prompt", "responses", "lost"} a line, by the reference; goes on where it was interrupted.

    A continuation is kept only if its text gives its tokens back, so that what is trained on is what was sampled: a cut
    character or an unusual choice of tokens loses it, as does saying the same as another. Lost ones are counted.
    """
    asked, n = read_lines(job / file), preset["continuations"]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = load_model(str(job / "reference"), dtype=compute_dtype("auto", device)[0], device=device)
    rows = (AT_ONCE if device == "cpu" else 4 * AT_ONCE) // n * n

    def continued(start: int, part: list[dict]) -> list[dict]:
        encoded = [encode_prompt(row["prompt"], tokenizer, 2 * MAX_PROMPT)[0] for row in part for _ in range(n)]
        ids = generate(model, encoded, preset["max_response"], tokenizer.eos, seed=seed, batch=rows,
                       rows=list(range(start * n, (start + len(part)) * n)))
        texts = [response_of(response, tokenizer) for response in ids]
        kept = [list(dict.fromkeys(filter(None, texts[i * n : (i + 1) * n]))) for i in range(len(part))]
        return [row | {"responses": responses, "lost": n - len(responses)} for row, responses in zip(part, kept)]

    line_by_line(job / f"sampled-{file}", key, asked, rows // n, continued, f"sample {file}")


def response_of(ids: list[int], tokenizer) -> str | None:
    """A continuation as text; None if it is blank or its text does not give its tokens back."""
    ids = ids[:-1] if ids[-1:] == [tokenizer.eos] else ids
    text = tokenizer.decode(ids)
    return text if text.strip() and "\ufffd" not in text and tokenizer.encode(text) == ids else None


def annotate(job: Path, file: str, key: str) -> None:
    """scored-FILE: every annotator's score of every continuation, its prompt in front of it; goes on where it was
    interrupted."""
    def scored(_, part: list[dict]) -> list[dict]:
        texts = [row["prompt"] + response for row in part for response in row["responses"]]
        scores, done = score(texts, list(NAMES), job), 0
        for row in part:
            own = slice(done, done := done + len(row["responses"]))
            row["scores"] = {name: [round(s, 6) for s in column[own]] for name, column in scores.items()}
        return part

    rows = [row for row in read_lines(job / f"sampled-{file}") if len(row["responses"]) > 1]
    line_by_line(job / f"scored-{file}", key, rows, 512, scored, f"annotate {file}")


# ---- pairs


def judge(job: Path, preset: dict, max_prompt: int) -> None:
    """train.jsonl, heldout.jsonl (other prompts, the same users) and dataset.json, which says how they came about."""
    types, seed = preset["annotators"], preset["seed"]
    users = name_users(preset["users"], types, seed)
    scored = {name: read_lines(job / f"scored-{file}") for name, file in FILES.items()}
    spread = spreads([row["scores"] for row in scored["train"]], types)
    facts = {"rewards": list(NAMES), "annotators": types, "max_new": preset["max_response"], "max_prompt": max_prompt}
    names = ("seed", "users", "pairs", "context", "heldout_pairs", "new_users", "new_pairs", "continuations", "agree")
    facts |= {name: preset[name] for name in names if name in preset}
    facts |= {"domains": preset["domains"]} if "domains" in preset else {}
    facts |= {"margin": preset["margin"], "spread": spread, "ties": "none: a pair within the margin is not shown"}
    parts = [("train", "train", users, preset["pairs"], preset["context"], seed),
             ("heldout", "heldout", users, preset["heldout_pairs"], 0, seed + 1)]
    if preset.get("new_users"):
        new = {f"new-{user}": kind for user, kind in name_users(preset["new_users"], types, seed + 3).items()}
        parts += [("adapt-new-user", "train", new, preset["new_pairs"], 0, seed + 3),
                  ("adapt-new-user-new-prompt", "heldout", new, preset["new_pairs"], 0, seed + 4)]
    for name, source, judges_of, each, context, own_seed in parts:
        rows, judged = scored[source], []
        for domain, judges in preset.get("domains", {None: types}).items():             # None: one domain, and no name
            here = [n for n, row in enumerate(rows) if row.get("domain") == domain]
            theirs = {user: kind for user, kind in judges_of.items() if kind in judges}
            of_domain = judge_apart([rows[n]["scores"] for n in here], theirs, each, context, preset["agree"],
                                    preset["margin"], spread, own_seed)
            judged += [pair | {"prompt": here[pair["prompt"]]} for pair in of_domain]
        write_lines(job / f"{name}.jsonl", (pair_line(rows[pair["prompt"]], pair) for pair in judged))
        lost = sum(row["lost"] for row in read_lines(job / f"sampled-{FILES[source]}"))
        facts[name] = {"prompts": len(rows), "continuations_lost": lost} | pair_facts(rows, judged, types, spread)
        print(f"{name}: {to_json(facts[name])}")
    facts["reviews"] = json.loads((job / "split.json").read_text())
    (job / "dataset.json").write_text(to_json(facts, indent=1) + "\n")


# ---- the whole


def choose_model(config: ExperimentConfig) -> tuple[str, str]:
    """The model's name, and why it is that one."""
    if config.model:
        return config.model, "as asked"
    folder = config.data_folder or None
    try:
        fetch.asset("gpt2", folder), fetch.asset("gpt2.config", folder)
    except InputError as error:
        if folder and any((Path(folder) / place).exists() for place in ("gpt2/model.safetensors", "model.safetensors")):
            raise       # the user's own copy is damaged: that is not "cannot be had"
        return "smollm2", f"GPT-2's weights cannot be had ({str(error).splitlines()[0]})"
    return "gpt2", "its weights are at hand"


def choose_judge(config: ExperimentConfig) -> tuple[str | None, str]:
    """DistilBERT's name or directory, or None for the bag; and why."""
    found, why = (None, "as asked") if config.sentiment == "bag" else find_distilbert(config.data_folder or None)
    if config.sentiment == "distilbert" and found is None:
        raise InputError(f"distilbert cannot be had: {why}", option="sentiment")
    return found, why


def prepare(job: Path, of: DataSet, preset: dict, model: str, distilbert: str | None, data: str) -> None:
    """All stages up to the preference files."""
    tokenizer, own = load_tokenizer(model, data or None), [Path(data) / name for name in of.sources]
    source = [fetch.sha256_of(file) for file in own if data and file.is_file()] or "fetched"
    sizes = {name: preset[name] for name in of.sizes}
    files = ["reviews.jsonl", *FILES.values(), "split.json", "judge.json"]
    stage(job, "split", key_of(sizes, source, tokenizer.key, distilbert), files,
          lambda: of.split(job, preset, tokenizer, distilbert, data or None))
    tuned = job / "reference"
    finetune(FinetuneConfig(str(job / "reviews.jsonl"), model, str(tuned), data_folder=data, **preset["finetune"]))
    for seed, (name, file) in enumerate(FILES.items(), start=preset["seed"]):
        key = key_of(preset["max_response"], preset["continuations"], seed, job / file, tuned / "model.safetensors")
        stage(job, f"sample-{name}", key, [f"sampled-{file}"], lambda: sample(job, preset, tokenizer, file, seed, key))
        key = key_of(job / f"sampled-{file}", job / "judge.json")
        stage(job, f"annotate-{name}", key, [f"scored-{file}"], lambda: annotate(job, file, key))
    names = ("annotators", "domains", "seed", "margin", "agree", "users", "pairs", "context", "heldout_pairs",
             "new_users", "new_pairs")
    longest, scored = longest_prompt(tokenizer), [job / f"scored-{file}" for file in FILES.values()]
    key = key_of({name: preset.get(name) for name in names}, longest, *scored)
    files = ["train.jsonl", "heldout.jsonl", "dataset.json"]
    files += ["adapt-new-user.jsonl", "adapt-new-user-new-prompt.jsonl"] if preset.get("new_users") else []
    stage(job, "judge", key, files, lambda: judge(job, preset, longest))


def chosen(of, config) -> tuple[str, dict, Path]:
    """The preset's name, its settings, and the job's folder. Raises: InputError if there is no such preset."""
    name = config.preset or ("paper" if torch.cuda.is_available() else "quick")
    if name not in of.presets:
        raise InputError(f"got {name!r}, wanted one of {', '.join(of.presets)}", option="preset")
    job = Path(config.out or f"runs/{of.name}-{name}" + (f"-{Path(config.model).name}" if config.model else ""))
    return name, dict(of.presets[name]), job


def check_preset(preset: dict, *parts: str) -> None:
    """Before anything is fetched or sampled. Raises: InputError on sizes out of range, and on options that train.py or,
    with "finetune" among the parts, data/experiment/finetune.py would refuse in the end."""
    ranges = dict.fromkeys(("prompts", "users", "reviews", "judge_reviews", "max_prompt", "max_response"), "[1, inf)")
    ranges |= dict.fromkeys(("pairs", "heldout_pairs", "context", "new_users", "new_pairs", "apart", "margin",
                             "evaluate"), "[0, inf)")
    ranges |= {"seed": SEEDS, "heldout": "(0, inf)", "continuations": "[2, inf)", "agree": "[0, 1]"}
    check_ranges(SimpleNamespace(**preset), {name: ranges[name] for name in ranges if name in preset})
    for options in preset["runs"].values():
        validate(TrainConfig(data="", model="", out="", **preset["train"] | options))
    if "finetune" in parts:
        validate_finetune(FinetuneConfig(data="", model="", out="", **preset["finetune"]))


def begun_with(job: Path) -> dict:
    """What the job in this folder was begun with; {} if there is none."""
    return json.loads((job / "job.json").read_text()) if (job / "job.json").exists() else {}


def begin(job: Path, facts: dict) -> None:
    """Makes the job's folder, which says what it is a job of. Raises: InputError if it holds another one."""
    begun = begun_with(job)
    if differ := [what for what in begun if begun[what] != facts[what]]:
        raise InputError(f"holds a job of another {', '.join(differ)}: it goes on with what it began with. Remove it, "
                         "or name another folder with --out", file=job)
    job.mkdir(parents=True, exist_ok=True)
    if not begun:
        write_whole(job / "job.json", to_json(facts, indent=1) + "\n")


def train_and_evaluate(job: Path, preset: dict, shared: dict, **asked) -> None:
    """The preset's runs on the job's train.jsonl, and their table. asked: options of EvalConfig."""
    for name, options in preset["runs"].items():
        run(TrainConfig(out=str(job / name), data=str(job / "train.jsonl"), **shared | preset["train"] | options))
    evaluate(EvalConfig(dir=str(job), data_folder=shared["data_folder"], **asked))


def main(of: DataSet, argv: list[str]) -> None:
    """The data set's command."""
    steady()
    config = parse(ExperimentConfig, argv, f"python -m data.{of.name}")
    check_choices(config, {"sentiment": ("", "bag", "distilbert")})
    name, preset, job = chosen(of, config)
    check_preset(preset, "finetune")
    must_be_own(job, [], "job.json", {"preset"})
    with alone(job):
        run_job(of, config, name, preset, job)


def run_job(of: DataSet, config, name: str, preset: dict, job: Path) -> None:
    """Everything, or what is left of it."""
    begun = begun_with(job)
    model, why = (begun["model"], "as the job began") if begun and not config.model else choose_model(config)
    goes_on = begun and not config.sentiment
    distilbert, why_judge = (begun["judge"], "as the job began") if goes_on else choose_judge(config)
    begin(job, {"preset": name, "model": model, "judge": distilbert, "settings": json.loads(to_json(preset))})
    print(f"preset {name} in {job}; model {model}: {why}")
    print(f"judge of sentiment: {distilbert or 'bag of words and word pairs'}: {why_judge}")
    print(estimate(preset, model, MAX_PROMPT))
    prepare(job, of, preset, model, distilbert, config.data_folder)
    if config.data_only:
        return
    max_prompt = longest_prompt(load_tokenizer(model, config.data_folder or None))
    shared = {"model": str(job / "reference"), "data_folder": config.data_folder, "max_prompt": max_prompt,
              "max_response": preset["max_response"]}
    train_and_evaluate(job, preset, shared, prompts=str(job / of.evaluate), limit=preset["evaluate"])
