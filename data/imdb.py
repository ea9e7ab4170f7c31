"""The IMDb experiment, whole: `python -m data.imdb --preset quick` goes from real reviews to the table of rewards.

Each stage is a function that writes its files into the job's folder, whole or not at all, and is skipped where they lie there already with the
same content key (what went in, and the settings):

    split       reviews.jsonl for the supervised step, prompts of train and of held-out reviews, and the judge of sentiment
    finetune    reference/: the model after a supervised step on reviews (train.py)
    sample      several continuations of each prompt by the reference (mixdpo/generate.py)
    annotate    what each annotator thinks of each (data/annotators.py)
    judge       train.jsonl, heldout.jsonl, dataset.json: pairs judged by simulated users (data/pairs.py)
    train       DPO, the mixture with one type a pair, the mixture with one type a user (train.py), then the table (eval.py)

No review serves twice: those of the supervised step, of train prompts and of held-out prompts are apart by their text. The judge of sentiment is
fitted on labelled reviews that give no prompt; where those are fewer than 5,000, on the train prompts' too, never on the held-out ones'.
"""

import hashlib
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from data.annotators import NAMES, score
from data.finetune import FinetuneConfig, finetune
from data.pairs import judge_pairs, name_users, spreads
from data.presets import PRESETS
from data.reviews import load_reviews
from data.sentiment import fit_sentiment, use_distilbert
from data.stages import key_of, read_lines, stage, write_lines
from eval import EvalConfig, evaluate
from mixdpo import fetch
from mixdpo.config import InputError, parse
from mixdpo.diagnostics import bayes_posterior
from mixdpo.generate import generate
from mixdpo.rundir import Progress, compute_dtype
from mixdpo.tokenizer import load_tokenizer
from mixdpo.weights import load_model
from train import TrainConfig, run

JUDGE_LEAST = 5000          # labelled reviews that a judge of sentiment needs to reach its accuracy
MAX_PROMPT = 16             # tokens of a review that make its prompt


@dataclass(frozen=True)
class ImdbConfig:
    """Runs the IMDb experiment: data, reference, DPO and mixtures, table. What is finished is not done again."""

    preset: str = ""        # smoke, quick, cpu or paper; default: paper with a CUDA device, else quick
    model: str = ""         # gpt2, smollm2, llama-3.2-1b or a directory; default: gpt2 where it can be had, else smollm2
    out: str = ""           # the job's folder; default runs/imdb-PRESET, with the model's name behind it where one is given
    sentiment: str = "bag"  # judge of sentiment: bag (fitted on the reviews) or distilbert (needs transformers)
    data_folder: str = ""   # local files looked into before anything is fetched
    stop: str = ""          # "data": stop when the preference files are written


# ---- stages


def split(job: Path, preset: dict, tokenizer, config: ImdbConfig) -> None:
    """reviews.jsonl, train-prompts.jsonl, prompts.jsonl and the judge of sentiment; counts into split.json."""
    reviews, counts = load_reviews(config.data_folder or None)
    place = {r.text: hashlib.sha256(f"{preset['seed']}:{r.text}".encode()).digest() for r in reviews}
    free = sorted(reviews, key=lambda r: place[r.text])                     # an order of the text's own: from any source the same
    wanted = {"heldout": preset["heldout"], "prompts": preset["prompts"], "reviews": preset["reviews"]}
    first = {"heldout": "test", "prompts": "train", "reviews": "unsup"}     # where each takes its reviews from while they last
    shrink = min(1.0, 0.97 * len(free) / sum(wanted.values()))
    if shrink < 1:
        print(f"{len(free)} reviews are too few for {wanted}: every part shrinks to {shrink:.2f} of that")
    taken = {}
    for part, count in wanted.items():
        free.sort(key=lambda r: r.split != first[part])                     # stable: within, the order of the texts stays
        taken[part], tried = [], 0
        while len(taken[part]) < int(shrink * count) and tried < len(free):
            prompt = free[tried].text if part == "reviews" else prompt_of(free[tried].text, tokenizer, MAX_PROMPT)
            if prompt:
                taken[part].append((free[tried], prompt))
            tried += 1
        free = free[tried:]
    for part, file in (("heldout", "prompts.jsonl"), ("prompts", "train-prompts.jsonl")):
        write_lines(job / file, ({"prompt": prompt} for _, prompt in taken[part]))
    write_lines(job / "reviews.jsonl", ({"text": text} for _, text in taken["reviews"]))
    fitting = [r for r in [*free, *(r for r, _ in taken["reviews"])] if r.label is not None]
    apart = len(fitting) >= JUDGE_LEAST
    if not apart:
        fitting += [r for r, _ in taken["prompts"] if r.label is not None]
    fitting = sorted(fitting, key=lambda r: (r.split != "train", place[r.text]))[: preset["judge_reviews"]]
    judge = use_distilbert(job) if config.sentiment == "distilbert" else fit_sentiment([(r.text, r.label) for r in fitting], job, preset["seed"])
    counts |= {"shrunk_to": shrink, **{part: len(rows) for part, rows in taken.items()}, "judge_apart_from_train_prompts": apart, "judge": judge}
    (job / "split.json").write_text(json.dumps(counts, indent=1) + "\n")
    print(json.dumps(counts))


def prompt_of(text: str, tokenizer, tokens: int) -> str | None:
    """The review's first `tokens` tokens as text; None if it is hardly longer, or if its text does not give these tokens back."""
    if len(text) < 8 * tokens:
        return None
    ids = tokenizer.encode(text[: 32 * tokens])[:tokens]
    prompt = tokenizer.decode(ids)
    return prompt if "\ufffd" not in prompt and tokenizer.encode(prompt) == ids else None


def sample(job: Path, preset: dict, tokenizer, prompts_file: str, seed: int, key: str) -> None:
    """Continuations of each prompt by the reference, into sampled-FILE: {"prompt", "responses": [...]}; goes on where it was interrupted.

    Only a continuation whose text gives its tokens back is kept: what is trained on is then what was sampled. The others are counted.
    """
    prompts, n = [row["prompt"] for row in read_lines(job / prompts_file)], preset["continuations"]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = load_model(str(job / "reference"), dtype=compute_dtype("auto", device)[0], device=device)
    out, todo = job / f"sampled-{prompts_file}", job / f"sampled-{prompts_file}.{key[:12]}"     # the key: others' lines are not gone on with
    done = read_lines(todo, whole=True) if todo.is_file() else []
    write_lines(todo, done)
    progress, size = Progress(f"sample {prompts_file}"), 64 if device == "cpu" else 1024
    progress(len(done), len(prompts))
    with todo.open("a", encoding="utf-8") as file:
        for start in range(len(done), len(prompts), size // n):
            part = prompts[start : start + size // n]
            rows = [(start + i) * n + c for i in range(len(part)) for c in range(n)]
            ids = generate(model, [tokenizer.encode(p) for p in part for _ in range(n)], preset["max_response"], tokenizer.eos, seed=seed, batch=size, rows=rows)
            texts = [response_of(row, tokenizer) for row in ids]
            for i, prompt in enumerate(part):
                kept = list(dict.fromkeys(t for t in texts[i * n : (i + 1) * n] if t))
                file.write(json.dumps({"prompt": prompt, "responses": kept, "lost": n - len(kept)}) + "\n")
            file.flush()
            progress(start + len(part), len(prompts))
    os.replace(todo, out)


def response_of(ids: list[int], tokenizer) -> str | None:
    """A continuation as text; None if it is empty or its text does not give its tokens back (a character cut in two, unusual merges)."""
    ids = ids[:-1] if ids[-1:] == [tokenizer.eos] else ids
    text = tokenizer.decode(ids)
    return text if text.strip() and "\ufffd" not in text and tokenizer.encode(text) == ids else None


def annotate(job: Path, prompts_file: str) -> None:
    """scored-FILE: every continuation's score by every annotator, of prompt and continuation together."""
    rows = [row for row in read_lines(job / f"sampled-{prompts_file}") if len(row["responses"]) > 1]
    texts = [row["prompt"] + response for row in rows for response in row["responses"]]
    scores, done = score(texts, list(NAMES), job), 0
    for row in rows:
        part = slice(done, done := done + len(row["responses"]))
        row["scores"] = {name: [round(s, 6) for s in column[part]] for name, column in scores.items()}
    write_lines(job / f"scored-{prompts_file}", rows)


def judge(job: Path, preset: dict) -> None:
    """train.jsonl, heldout.jsonl (other prompts, the same users) and dataset.json. Spreads are the train continuations'."""
    users, types = name_users(preset["users"], preset["annotators"], preset["seed"]), preset["annotators"]
    scored = {"train": read_lines(job / "scored-train-prompts.jsonl"), "heldout": read_lines(job / "scored-prompts.jsonl")}
    spread = spreads([row["scores"] for row in scored["train"]], types)
    facts = {"rewards": list(NAMES), "annotators": types, "max_new": preset["max_response"], "max_prompt": MAX_PROMPT, "spread": spread}
    facts |= {name: preset[name] for name in ("seed", "margin", "agree", "users", "pairs", "heldout_pairs", "continuations")}
    facts |= {"rule": "data/pairs.py", "reviews": json.loads((job / "split.json").read_text())}
    for i, (name, each) in enumerate((("train", preset["pairs"]), ("heldout", preset["heldout_pairs"]))):
        rows = scored[name]
        judged = judge_pairs([row["scores"] for row in rows], users, each, preset["agree"], preset["margin"], spread, preset["seed"] + 100 * i)
        write_lines(job / f"{name}.jsonl", (pair_line(rows[pair["prompt"]], pair) for pair in judged))
        facts[name] = pair_facts(rows, judged, types, spread)
        print(f"{name}: {json.dumps(facts[name])}")
    (job / "dataset.json").write_text(json.dumps(facts, indent=1) + "\n")


def pair_line(row: dict, pair: dict) -> dict:
    """One line of a preference file."""
    i, j = pair["chosen"], pair["rejected"]
    line = {"prompt": row["prompt"], "chosen": row["responses"][i], "rejected": row["responses"][j], "user": pair["user"]}
    return line | {"annotator": pair["annotator"], "scores": {name: [s[i], s[j]] for name, s in row["scores"].items()}}


def pair_facts(rows: list[dict], judged: list[dict], types: list[str], spread: dict) -> dict:
    """Counts of kinds, how often annotators agree (judged pairs; all pairs of continuations), mean gaps, Bayes-optimal assignment."""
    lines = [pair_line(rows[pair["prompt"]], pair)["scores"] for pair in judged]
    gaps = [{a: (s[a][0] - s[a][1]) / spread[a] for a in types} for s in lines]
    every = [[(row["scores"][a][i] - row["scores"][a][j]) for a in types] for row in rows
             for i in range(len(row["responses"])) for j in range(i)]
    by_user = {}
    for pair, scores in zip(judged, lines):
        by_user.setdefault(pair["user"], []).append(scores)
    kinds = [pair["kind"] for pair in judged]
    return {
        "pairs": len(judged), "kinds": {kind: kinds.count(kind) for kind in sorted(set(kinds))}, "prompts": len({pair["prompt"] for pair in judged}),
        "agreement_of_annotators": sum(len({g > 0 for g in gap.values()}) == 1 for gap in gaps) / len(gaps),
        "agreement_on_all_pairs": sum(len({d > 0 for d in diff}) == 1 for diff in every) / len(every),
        "mean_gap_of_judge": {a: mean([gap[a] for gap, pair in zip(gaps, judged) if pair["annotator"] == a]) for a in types},
        "bayes_assignment_of_pairs": bayes_posterior([[s] for s in lines], types).max(1).values.mean().item(),
        "bayes_assignment_of_users": bayes_posterior(list(by_user.values()), types).max(1).values.mean().item(),
    }


def mean(values: list[float]) -> float:
    return sum(values) / max(len(values), 1)


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


def prepare(job: Path, preset: dict, model: str, config: ImdbConfig) -> None:
    """All stages up to the preference files."""
    job.mkdir(parents=True, exist_ok=True)
    tokenizer, own = load_tokenizer(model, config.data_folder or None), Path(config.data_folder or ".") / "imdb.jsonl.gz"
    sizes = {name: preset[name] for name in ("seed", "prompts", "heldout", "reviews", "judge_reviews")}
    source = fetch.sha256_of(own) if config.data_folder and own.is_file() else "fetched"
    files = ["reviews.jsonl", "train-prompts.jsonl", "prompts.jsonl", "split.json", "judge.json"]
    stage(job, "split", key_of(sizes, source, tokenizer.key, config.sentiment), files, lambda: split(job, preset, tokenizer, config))
    finetune(FinetuneConfig(str(job / "reviews.jsonl"), model, str(job / "reference"), data_folder=config.data_folder, **preset["finetune"]))
    for number, file in enumerate(("train-prompts.jsonl", "prompts.jsonl")):
        key = key_of(preset["max_response"], preset["continuations"], preset["seed"], job / file, job / "reference" / "model.safetensors")
        stage(job, f"sample-{number}", key, [f"sampled-{file}"], lambda: sample(job, preset, tokenizer, file, preset["seed"] + number, key))
        stage(job, f"annotate-{number}", key_of(job / f"sampled-{file}", job / "judge.json"), [f"scored-{file}"], lambda: annotate(job, file))
    rules = {name: preset[name] for name in ("annotators", "seed", "margin", "agree", "users", "pairs", "heldout_pairs")}
    scored = [job / "scored-train-prompts.jsonl", job / "scored-prompts.jsonl"]
    stage(job, "judge", key_of(rules, *scored), ["train.jsonl", "heldout.jsonl", "dataset.json"], lambda: judge(job, preset))


def main(argv: list[str]) -> None:
    config = parse(ImdbConfig, argv, "python -m data.imdb")
    name = config.preset or ("paper" if torch.cuda.is_available() else "quick")
    if name not in PRESETS:
        raise InputError(f"--preset: got {name!r}, wanted one of {', '.join(PRESETS)}")
    if config.sentiment not in ("bag", "distilbert") or config.stop not in ("", "data"):
        raise InputError(f"--sentiment wants bag or distilbert, got {config.sentiment!r}; --stop wants data or nothing, got {config.stop!r}")
    preset, (model, why) = PRESETS[name], choose_model(config)
    job = Path(config.out or f"runs/imdb-{name}" + (f"-{Path(config.model).name}" if config.model else ""))
    print(f"preset {name} in {job}; model {model}: {why}")
    prepare(job, preset, model, config)
    if config.stop:
        return
    shared = preset["train"] | {"max_prompt": MAX_PROMPT, "max_response": preset["max_response"], "data_folder": config.data_folder}
    for seed in preset["seeds"]:
        for run_name, options in preset["runs"].items():
            out = job / (run_name if len(preset["seeds"]) == 1 else f"{run_name}-seed{seed}")
            run(TrainConfig(data=str(job / "train.jsonl"), model=str(job / "reference"), out=str(out), seed=seed, **shared | options))
    evaluate(EvalConfig(dir=str(job), limit=preset["evaluate"], data_folder=config.data_folder))


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except InputError as error:
        sys.exit(f"error: {error}")
