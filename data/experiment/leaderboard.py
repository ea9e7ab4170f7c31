"""The protocol of the published tables of personal preferences, UF-P-2 and UF-P-4: `make train DATASET=ultrafeedback
PRESET=leaderboard` (docs/leaderboard.md has the published rows).

    items      pairs of answers that all of the benchmark's types rate differently, in which as many types prefer one
               answer as the other; each type judges each of them
    divide     by instruction, at random: test instructions are never trained on
    users      the training choices of a type are dealt to users of EACH, of which 4 are context pairs
    test       each test choice comes with 4 choices of the same type on training instructions, drawn at random from
               SURVEY of them; with these the mixture infers the type (M11) and predicts the choice (M5)

The figure is the share of test choices that are predicted, over SEEDS seeds of users, runs and context pairs. Rows: one
policy (DPO), the mixture, and one policy per known type. Standard errors count prompts.
Not known of the published numbers: which of the four completions were paired, and the seeds of their division. The same
sizes and rules therefore do not mean the same rows.
"""

import json
from pathlib import Path

import numpy as np
import torch

from data.experiment.common import begin
from data.experiment.judged import Item, Judged, JudgedConfig, fitting, line
from data.experiment.presets import ADAPTERS, LEADERBOARD
from data.experiment.stages import key_of, stage, write_lines
from data.report.tables import pm, table
from mixdpo.config import InputError, to_json, write_text
from mixdpo.dpo import mixture_accuracy
from mixdpo.evaluation.adaptation import weights_after
from mixdpo.evaluation.heldout import margins_of
from mixdpo.evaluation.statistics import mean_se
from mixdpo.files.atomic import lock_folder, must_be_own
from mixdpo.mixture import log_marginal
from mixdpo.preferences import Pair
from mixdpo.runs.load_run import load_run
from mixdpo.runs.reference import load_references
from mixdpo.text.tokenizer import load_tokenizer
from train import TrainConfig, run

SHOWN, SURVEY, EACH, SEEDS = 4, 100, 16, 3


def usable(items: list[Item], types: list[str]) -> list[Item]:
    """The items on which no type of the benchmark is undecided, and half of the types prefer either answer."""
    return [item for item in items if not item.ties & set(types)
            and 2 * sum(item.prefers[kind] for kind in types) == len(types)]


def divide(items: list[Item], types: list[str], train: int, test: int, seed: int) -> tuple[list[Item], list[Item]]:
    """Training and test items, of which there are `train` and `test` choices; fewer, in this proportion, if the file
    has fewer. All items of an instruction are in one part."""
    by_prompt: dict[str, list[Item]] = {}
    for item in items:
        by_prompt.setdefault(json.dumps(item.messages), []).append(item)
    order = np.random.default_rng([seed, 24]).permutation(len(by_prompt)).tolist()
    prompts = [list(by_prompt.values())[n] for n in order]
    share = min(1.0, len(types) * len(items) / (train + test))
    wanted, held = round(share * test / len(types)), []
    while prompts and len(held) < wanted:
        held += prompts.pop()
    return [item for own in prompts for item in own][: round(share * train / len(types))], held[:wanted]


def write_files(job: Path, types: list[str], parts: tuple[list[Item], list[Item]], seed: int) -> str:
    """Writes train.jsonl and train-TYPE.jsonl of users, survey.jsonl, which has the choices that context pairs are
    drawn from, and test.jsonl. Returns a summary."""
    (training, test), rng, rows = parts, np.random.default_rng([seed, 25]), []
    for kind in types:
        dealt = [training[n] for n in rng.permutation(len(training))]
        users = max(1, len(dealt) // EACH)
        rows += [line(f"{kind}-{n % users}", kind, item) | {"context": n // users < SHOWN}
                 for n, item in enumerate(dealt)]
    names = {name: f"user-{n:05d}" for n, name in enumerate(dict.fromkeys(
        rows[i]["user"] for i in rng.permutation(len(rows))))}              # names do not tell types
    rows = [row | {"user": names[row["user"]]} for row in rows]
    write_lines(job / "train.jsonl", [rows[i] for i in rng.permutation(len(rows))])
    for kind in types:
        write_lines(job / f"train-{kind}.jsonl", ({k: v for k, v in row.items() if k != "context"} for row in rows
                                                  if row["annotator"] == kind))
    survey = [training[n] for n in rng.permutation(len(training))[:SURVEY]]
    for name, some in (("survey", survey), ("test", test)):
        write_lines(job / f"{name}.jsonl", (line(kind, kind, item) for item in some for kind in types))
    return f"{len(rows)} train choices of {len(names)} users, {len(types) * len(test)} test choices"


def runs_of(types: list[str], seed: int) -> dict[str, dict]:
    """Name -> options of TrainConfig."""
    single = ADAPTERS | {"experts": 1, "seed": seed}
    mixture = ADAPTERS | {"experts": len(types), "shared_rank": 16, "start": "linear", "latent": "user",
                          "estep": "context", "em": "incremental", "seed": seed}
    return {"dpo": single, "mixture": mixture} | {f"dpo-{kind}": single | {"data": f"train-{kind}.jsonl"}
                                                  for kind in types}


def predictions(job: Path, name: str, shared: dict, seed: int) -> dict[str, tuple[torch.Tensor, list[Pair]]]:
    """What a run predicts of the test choices: 1, 0, or one half for a tie (N,). With an entry for the run as it is,
    without context pairs, and with SHOWN of them, if it has several experts."""
    folder, device = job / name, "cuda" if torch.cuda.is_available() else "cpu"
    one = load_run(folder, device, shared["data_folder"])
    models, tokenizer = load_references(one.config, device)
    (_, survey, seen, _), (_, test, h, log_w) = (
        next(margins_of([one], models, tokenizer, job / f"{part}.jsonl", job / "cache")) for part in ("survey", "test"))
    found = {"": (mixture_accuracy(log_marginal(log_w, h)), test)}
    if one.config.experts > 1:
        rng, right = np.random.default_rng([seed, 26]), []
        of_kind = {kind: [i for i, pair in enumerate(survey) if pair.annotator == kind]
                   for kind in sorted({str(pair.annotator) for pair in survey})}
        for i, pair in enumerate(test):
            own = of_kind[str(pair.annotator)]
            known = rng.choice(own, min(SHOWN, len(own)), replace=False).tolist()
            both, n = torch.cat([seen[known], h[i : i + 1]]), len(known)
            weights = weights_after(log_w[i].expand(n + 1, -1), both, list(range(n)), [n])              # (1,K)  M11
            right.append(mixture_accuracy(log_marginal(weights, h[i : i + 1])))
        found[f", {SHOWN} context pairs"] = torch.cat(right), test
    return found


def benchmark(job: Path, name: str, items: list[Item], config: JudgedConfig, preset: dict) -> list[list[str]]:
    """Trains and evaluates all seeds of one benchmark; returns rows: method, accuracy, number of test choices."""
    sizes, model = preset["benchmarks"][name], config.model or "smollm2"
    types, right = sizes["types"], {}
    shared = {name: preset[name] for name in ("max_prompt", "max_response")} | {"model": model, "data_folder":
                                                                                config.data_folder}
    for seed in range(preset["seeds"]):
        folder = job / name / f"seed{seed}"
        folder.mkdir(parents=True, exist_ok=True)
        parts = divide(usable(items, types), types, sizes["train"], sizes["test"], seed)
        if min(map(len, parts)) == 0:
            raise InputError(f"{name} needs pairs that {', '.join(types)} rate differently, half of them either way; "
                             f"the file has {len(usable(items, types))}, too few to divide", option="preset")
        files = ["train.jsonl", "survey.jsonl", "test.jsonl", *(f"train-{kind}.jsonl" for kind in types)]
        key = key_of(seed, sizes, [[item.messages, item.answers] for part in parts for item in part])
        stage(folder, "divide", key, files, lambda: write_files(folder, types, parts, seed))
        for row, own in runs_of(types, seed).items():
            chosen = {"data": "train.jsonl"} | shared | preset["train"] | own
            run(TrainConfig(out=str(folder / row), **chosen | {"data": str(folder / chosen["data"])}))
            for what, (hits, test) in predictions(folder, row, shared, seed).items():
                kind = row.removeprefix("dpo-") if row.startswith("dpo-") else None
                kept = [n for n, pair in enumerate(test) if kind in (None, pair.annotator)]
                method = "one policy per known type" if kind else {"dpo": "one policy (DPO)"}.get(row, row) + what
                hold, prompts = right.setdefault(method, ([], []))
                hold += hits[kept].tolist()
                prompts += [tuple(test[n].prompt) for n in kept]
    return [[method, pm({k: 100 * v if k != "n" else v for k, v in mean_se(hits, prompts).items()}, 1), str(len(hits))]
            for method, (hits, prompts) in right.items()]


def main(dataset: Judged, config: JudgedConfig) -> None:
    """The job: both benchmarks, and runs/ultrafeedback-leaderboard/leaderboard.md."""
    job, preset = Path(config.out or f"runs/{dataset.name}-leaderboard"), LEADERBOARD
    must_be_own(job, [], "job.json", {"preset"})
    with lock_folder(job):
        model = config.model or "smollm2"
        begin(job, {"preset": "leaderboard", "model": model, "settings": json.loads(to_json(preset))})
        tokenizer = load_tokenizer(model, config.data_folder or None)
        items, facts = dataset.load(config.data_folder or None, {"seed": 0})
        items, dropped = fitting(items, tokenizer, preset)
        print(f"{len(items)} pairs of answers from {', '.join(facts['source'])}; left out: {dropped}")
        parts = []
        for name, sizes in preset["benchmarks"].items():
            rows = benchmark(job, name, items, config, preset)
            size = f"{sizes['train']:,} train and {sizes['test']:,} test choices in the protocol"
            head = ["method", "accuracy (%)", "test choices, all seeds"]
            parts.append(f"## {name}\n\n{table(head, rows)}\n\n{size}.")
        text = "\n\n".join([f"# Personal preferences, {model}", *parts]) + "\n"
        write_text(job / "leaderboard.md", text)
        print(f"{text}\nReport: {job / 'leaderboard.md'}")
