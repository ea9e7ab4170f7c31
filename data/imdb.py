"""The IMDb experiment, whole: `python -m data.imdb --preset quick` goes from real reviews to the table of rewards.

Each stage is a function that writes its files into the job's folder, whole or not at all, and is skipped where they lie
already under the same content key (what went in, and the settings):

    split       reviews for the supervised step, prompts from train and from held-out reviews, the judge of sentiment
    finetune    reference/: the model after a supervised step on reviews (data/finetune.py)
    sample      several continuations of each prompt by the reference (mixdpo/generate.py)
    annotate    what each annotator thinks of each (data/annotators.py)
    judge       train.jsonl, heldout.jsonl and dataset.json: pairs judged by simulated users (data/pairs.py)

then DPO and the mixtures are trained (train.py), and the table and the report are made (eval.py).

No review serves twice: those of the supervised step, of train prompts and of held-out prompts are apart by their text.
The judge of sentiment is fitted on labelled reviews that give no prompt; should there be fewer than 5,000 of them, on
those of the train prompts too, never on those of held-out prompts.
"""

import hashlib
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from data.annotators import NAMES, score
from data.estimate import estimate
from data.finetune import FinetuneConfig, finetune
from data.pairs import judge_apart, name_users, pair_facts, pair_line, spreads
from data.presets import PRESETS
from data.reviews import Review, load_reviews
from data.sentiment import find_distilbert, fit_sentiment, use_distilbert
from data.stages import key_of, read_lines, stage, write_lines
from eval import EvalConfig, evaluate
from mixdpo import fetch
from mixdpo.config import InputError, parse, write_whole
from mixdpo.generate import generate
from mixdpo.preferences import encode_prompt
from mixdpo.rundir import Progress, compute_dtype
from mixdpo.tokenizer import load_tokenizer
from mixdpo.weights import load_model
from train import TrainConfig, run

JUDGE_LEAST = 5000  # labelled reviews that the judge of sentiment needs to reach its accuracy
MAX_PROMPT = 16  # tokens of a review that make a prompt
ARCHIVE = "aclImdb_v1.tar.gz"
AT_ONCE = 64  # continuations sampled together on a CPU; sixteen times as many on a GPU
FILES = {"train": "prompts-train.jsonl", "heldout": "prompts.jsonl"}


@dataclass(frozen=True)
class ImdbConfig:
    """The IMDb experiment: data, reference, DPO and mixtures, table. What is finished is not done again."""

    preset: str = ""            # smoke, quick, cpu or paper; default: paper with a CUDA device, else quick
    model: str = ""             # gpt2, smollm2, llama-3.2-1b or a directory; default: gpt2 where possible, else smollm2
    out: str = ""               # the job's folder; default: runs/imdb-PRESET, and -MODEL where one is given
    sentiment: str = ""         # its judge: bag or distilbert; default: distilbert if it can be loaded, else bag
    data_only: bool = False     # true: stop when the preference files are written
    data_folder: str = ""       # local files looked into before anything is fetched


# ---- split


def divide(reviews: list[Review], preset: dict, tokenizer) -> tuple[dict[str, list[tuple]], list[Review], float]:
    """Disjoint shares "heldout", "train", "reviews": [(review, prompt or None)]; the reviews left; the share kept.

    Reviews stand in the order of a hash of seed and text, which no source can change. Held-out prompts come from the
    test split, train prompts from the train split, the supervised step's texts from those without a label, while they
    last. Are there too few reviews in all, every share shrinks alike.
    """
    place = {r.text: hashlib.sha256(f"{preset['seed']}:{r.text}".encode()).digest() for r in reviews}
    free = sorted(reviews, key=lambda r: place[r.text])
    wanted = {"heldout": preset["heldout"], "train": preset["prompts"], "reviews": preset["reviews"]}
    first = {"heldout": "test", "train": "train", "reviews": "unsup"}
    kept, taken = min(1.0, 0.97 * len(free) / sum(wanted.values())), {}     # some reviews are too short for a prompt
    for name, count in wanted.items():
        free.sort(key=lambda r: r.split != first[name])                     # stable: within, the order stays
        taken[name], looked_at = [], 0
        while len(taken[name]) < int(kept * count) and looked_at < len(free):
            review = free[looked_at]
            prompt = None if name == "reviews" else prompt_of(review.text, tokenizer)
            if prompt or name == "reviews":
                taken[name].append((review, prompt))
            looked_at += 1
        free = free[looked_at:]
    return taken, sorted(free, key=lambda r: (r.split != "train", place[r.text])), kept


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


def split(job: Path, preset: dict, tokenizer, distilbert: str | None, data: str | None) -> None:
    """Writes reviews.jsonl, the two files of prompts, the judge of sentiment, and what there was into split.json."""
    reviews, counts = load_reviews(data)
    taken, rest, kept = divide(reviews, preset, tokenizer)
    if kept < 1:
        print(f"{len(reviews)} reviews are fewer than the preset asks for: every share is {kept:.3f} of what it asks")
    for name, file in FILES.items():
        write_lines(job / file, ({"prompt": prompt} for _, prompt in taken[name]))
    write_lines(job / "reviews.jsonl", ({"text": review.text} for review, _ in taken["reviews"]))
    labelled = [r for r in [*rest, *(r for r, _ in taken["reviews"])] if r.label is not None]
    apart = len(labelled) >= JUDGE_LEAST
    if not apart:
        labelled += [r for r, _ in taken["train"] if r.label is not None]
    fitted = [(r.text, r.label) for r in labelled[: preset["judge_reviews"]]]
    judge = use_distilbert(job, distilbert) if distilbert else fit_sentiment(fitted, job, preset["seed"])
    facts = {"texts": counts, "taken": {name: len(rows) for name, rows in taken.items()}, "share_of_asked": kept}
    facts |= {"judge_of_sentiment": judge, "its_reviews_are_apart_from_all_prompts": apart or bool(distilbert)}
    (job / "split.json").write_text(json.dumps(facts, indent=1) + "\n")
    print(json.dumps(facts))


# ---- continuations and their scores


def sample(job: Path, preset: dict, tokenizer, file: str, seed: int, key: str) -> None:
    """sampled-FILE: {"prompt", "responses", "lost"} a line, by the reference; goes on where it was interrupted.

    A continuation is kept only if its text gives its tokens back, so that what is trained on is what was sampled: a cut
    character or an unusual choice of tokens loses it, as does saying the same as another. Lost ones are counted.
    """
    prompts, n = [row["prompt"] for row in read_lines(job / file)], preset["continuations"]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = load_model(str(job / "reference"), dtype=compute_dtype("auto", device)[0], device=device)
    unfinished = job / f"sampled-{file}.{key[:12]}"                         # the key: another job's lines are not used
    done = read_lines(unfinished, whole=True) if unfinished.is_file() else []
    write_lines(unfinished, done)
    progress, rows = Progress(f"sample {file}", len(done)), (AT_ONCE if device == "cpu" else 16 * AT_ONCE) // n * n
    with unfinished.open("a", encoding="utf-8") as out:
        for start in range(len(done), len(prompts), rows // n):
            part = prompts[start : start + rows // n]
            ids = generate(model, [encode_prompt(prompt, tokenizer, 2 * MAX_PROMPT)[0] for prompt in part for _ in range(n)],
                           preset["max_response"], tokenizer.eos, seed=seed, batch=rows,
                           rows=list(range(start * n, (start + len(part)) * n)))
            texts = [response_of(response, tokenizer) for response in ids]
            for i, prompt in enumerate(part):
                kept = list(dict.fromkeys(text for text in texts[i * n : (i + 1) * n] if text))
                out.write(json.dumps({"prompt": prompt, "responses": kept, "lost": n - len(kept)}) + "\n")
            out.flush()
            progress(start + len(part), len(prompts))
    os.replace(unfinished, job / f"sampled-{file}")


def response_of(ids: list[int], tokenizer) -> str | None:
    """A continuation as text; None if it is blank or its text does not give its tokens back."""
    ids = ids[:-1] if ids[-1:] == [tokenizer.eos] else ids
    text = tokenizer.decode(ids)
    return text if text.strip() and "\ufffd" not in text and tokenizer.encode(text) == ids else None


def annotate(job: Path, file: str) -> None:
    """scored-FILE: every annotator's score of every continuation, its prompt in front of it."""
    rows = [row for row in read_lines(job / f"sampled-{file}") if len(row["responses"]) > 1]
    texts = [row["prompt"] + response for row in rows for response in row["responses"]]
    scores, done = score(texts, list(NAMES), job), 0
    for row in rows:
        part = slice(done, done := done + len(row["responses"]))
        row["scores"] = {name: [round(s, 6) for s in column[part]] for name, column in scores.items()}
    write_lines(job / f"scored-{file}", rows)


# ---- pairs


def judge(job: Path, preset: dict, max_prompt: int) -> None:
    """train.jsonl, heldout.jsonl (other prompts, the same users) and dataset.json, which says how they came about."""
    types, seed = preset["annotators"], preset["seed"]
    users = name_users(preset["users"], types, seed)
    scored = {name: read_lines(job / f"scored-{file}") for name, file in FILES.items()}
    spread = spreads([row["scores"] for row in scored["train"]], types)
    facts = {"rewards": list(NAMES), "annotators": types, "max_new": preset["max_response"], "max_prompt": max_prompt}
    names = ("seed", "users", "pairs", "context", "heldout_pairs", "continuations", "agree")
    facts |= {name: preset[name] for name in names}
    facts |= {"margin": preset["margin"], "spread": spread, "ties": "none: a pair within the margin is not shown"}
    for name, each, context, own_seed in (("train", preset["pairs"], preset["context"], seed),
                                          ("heldout", preset["heldout_pairs"], 0, seed + 1)):
        rows = scored[name]
        scores = [row["scores"] for row in rows]
        judged = judge_apart(scores, users, each, context, preset["agree"], preset["margin"], spread, own_seed)
        write_lines(job / f"{name}.jsonl", (pair_line(rows[pair["prompt"]], pair) for pair in judged))
        lost = sum(row["lost"] for row in read_lines(job / f"sampled-{FILES[name]}"))
        facts[name] = {"prompts": len(rows), "continuations_lost": lost} | pair_facts(rows, judged, types, spread)
        print(f"{name}: {json.dumps(facts[name])}")
    facts["reviews"] = json.loads((job / "split.json").read_text())
    (job / "dataset.json").write_text(json.dumps(facts, indent=1) + "\n")


# ---- the whole


def choose_model(config: ImdbConfig) -> tuple[str, str]:
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


def choose_judge(config: ImdbConfig) -> tuple[str | None, str]:
    """DistilBERT's name or directory, or None for the bag; and why."""
    if config.sentiment not in ("", "bag", "distilbert"):
        raise InputError(f"--sentiment: got {config.sentiment!r}, wanted bag or distilbert, or nothing")
    found, why = (None, "as asked") if config.sentiment == "bag" else find_distilbert(config.data_folder or None)
    if config.sentiment == "distilbert" and found is None:
        raise InputError(f"--sentiment distilbert: {why}")
    return found, why


def prepare(job: Path, preset: dict, model: str, distilbert: str | None, data: str) -> None:
    """All stages up to the preference files."""
    tokenizer, own = load_tokenizer(model, data or None), [Path(data) / name for name in ("imdb.jsonl.gz", ARCHIVE)]
    source = next((fetch.sha256_of(file) for file in own if data and file.is_file()), "fetched")
    sizes = {name: preset[name] for name in ("seed", "prompts", "heldout", "reviews", "judge_reviews")}
    files = ["reviews.jsonl", *FILES.values(), "split.json", "judge.json"]
    stage(job, "split", key_of(sizes, source, tokenizer.key, distilbert), files,
          lambda: split(job, preset, tokenizer, distilbert, data or None))
    tuned = job / "reference"
    finetune(FinetuneConfig(str(job / "reviews.jsonl"), model, str(tuned), data_folder=data, **preset["finetune"]))
    for seed, (name, file) in enumerate(FILES.items(), start=preset["seed"]):
        key = key_of(preset["max_response"], preset["continuations"], seed, job / file, tuned / "model.safetensors")
        stage(job, f"sample-{name}", key, [f"sampled-{file}"], lambda: sample(job, preset, tokenizer, file, seed, key))
        key = key_of(job / f"sampled-{file}", job / "judge.json")
        stage(job, f"annotate-{name}", key, [f"scored-{file}"], lambda: annotate(job, file))
    names = ("annotators", "seed", "margin", "agree", "users", "pairs", "context", "heldout_pairs")
    key = key_of({name: preset[name] for name in names}, longest_prompt(tokenizer), *(job / f"scored-{file}" for file in FILES.values()))
    stage(job, "judge", key, ["train.jsonl", "heldout.jsonl", "dataset.json"], lambda: judge(job, preset, longest_prompt(tokenizer)))


def main(argv: list[str]) -> None:
    config = parse(ImdbConfig, argv, "python -m data.imdb")
    name = config.preset or ("paper" if torch.cuda.is_available() else "quick")
    if name not in PRESETS:
        raise InputError(f"--preset: got {name!r}, wanted one of {', '.join(PRESETS)}")
    preset = PRESETS[name]
    job = Path(config.out or f"runs/imdb-{name}" + (f"-{Path(config.model).name}" if config.model else ""))
    begun = json.loads((job / "job.json").read_text()) if (job / "job.json").exists() else {}
    model, why = (begun["model"], "as the job began") if begun and not config.model else choose_model(config)
    distilbert, why_judge = (begun["judge"], "as the job began") if begun and not config.sentiment else choose_judge(config)
    facts = {"preset": name, "model": model, "judge": distilbert, "settings": json.loads(json.dumps(preset))}
    if differ := [what for what in begun if begun[what] != facts[what]]:
        raise InputError(f"{job} holds a job of another {', '.join(differ)}: it goes on with what it began with. "
                         f"Remove {job}, or name another folder with --out")
    job.mkdir(parents=True, exist_ok=True)
    if not begun:
        write_whole(job / "job.json", json.dumps(facts, indent=1) + "\n")
    print(f"preset {name} in {job}; model {model}: {why}")
    print(f"judge of sentiment: {distilbert or 'bag of words and word pairs'}: {why_judge}")
    print(estimate(preset, model, MAX_PROMPT))
    prepare(job, preset, model, distilbert, config.data_folder)
    if config.data_only:
        return
    shared = {"data": str(job / "train.jsonl"), "model": str(job / "reference"), "data_folder": config.data_folder}
    max_prompt = longest_prompt(load_tokenizer(model, config.data_folder or None))
    shared |= {"max_prompt": max_prompt, "max_response": preset["max_response"]} | preset["train"]
    for run_name, options in preset["runs"].items():
        run(TrainConfig(out=str(job / run_name), **shared | options))
    evaluate(EvalConfig(dir=str(job), limit=preset["evaluate"], data_folder=config.data_folder))


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except InputError as error:
        sys.exit(f"error: {error}")
