"""Win rates: a judge compares the completions of two policies, prompt by prompt. The judge is neither of the policies:
`python eval.py DIR --judge JUDGE --against POLICY`, after `python eval.py DIR` has written DIR/samples.jsonl.

    annotator:NAME,...      reward functions of rewards.py, one column each
    classifier:PATH         a sequence classifier or reward model in a Hugging Face directory (needs transformers): the
                            logit of its last label for prompt and completion
    llm:MODEL               a model behind an OpenAI-compatible endpoint (llm.py), asked in both orders. One column for
                            each of dataset.json's "criteria", {type: which answer it prefers}, or a single column

    win rate    (wins + ties / 2) / prompts, with a 95 % interval from 10,000 bootstrap samples of the prompts
    tie         equal scores, equal texts, or an LLM whose verdicts differ between the two orders
    not judged  an LLM without a verdict in one of the orders; such prompts are counted, and excluded from the rate

Columns are types of users; the worst column is what a policy guarantees. Writes DIR/winrates.json.
"""

import importlib.util
import json
import math
from pathlib import Path

import numpy as np

from data.annotators.llm import Endpoint
from data.annotators.rewards import score
from data.experiment.stages import read_lines
from mixdpo.config import InputError, reading, to_json, write_text

GENERAL = {"better": "the better answer: helpful, right, harmless and clear"}


def win_rates(folder: Path, judge: str, against: str, seed: int = 0) -> dict:
    """Compares every policy with `against` ("": dpo if there is one, else the reference). Returns {"judge", "against",
    "prompts", "columns": {column: {policy: {"rate", "low", "high", "wins", "ties", "losses", "unjudged"}}}} and writes
    it to winrates.json. Raises: InputError before the judge is used."""
    if not (folder / "samples.jsonl").exists():
        raise InputError(f"has no samples.jsonl; run `python eval.py {folder}` first",
                         file=folder)
    with reading(folder / "samples.jsonl", f"run `python eval.py {folder}` to write it again"):
        samples = read_lines(folder / "samples.jsonl")
        if not samples:
            raise InputError(f"has no completions; run `python eval.py {folder}` first",
                             file=folder / "samples.jsonl")
        policies = list(samples[0]["texts"])
    against = against or ("dpo" if "dpo" in policies else "reference")
    if against not in policies:
        raise InputError(f"got {against!r}, wanted one of {', '.join(policies)}", option="against")
    preferred, columns = judge_of(judge, folder), {}
    for policy in [name for name in policies if name != against]:
        rows = [(s["prompt"], *(s["texts"][name].removeprefix(s["prompt"]) for name in (policy, against)))
                for s in samples]
        for column, wins in preferred(rows).items():
            columns.setdefault(column, {})[policy] = rate(wins, seed)
    found = {"judge": judge, "against": against, "prompts": len(samples), "columns": columns}
    write_text(folder / "winrates.json", to_json(found, indent=1) + "\n")
    return found


def rate(wins: list[float | None], seed: int) -> dict:
    """wins (N): 1 for a win, 1/2 for a tie, 0 for a loss, None if not judged. The rate is NaN if none was judged."""
    unjudged, wins = wins.count(None), np.array([win for win in wins if win is not None], dtype=float)
    if not len(wins):
        none = dict.fromkeys(("rate", "low", "high"), math.nan) | dict.fromkeys(("wins", "ties", "losses"), 0)
        return none | {"unjudged": unjudged}
    drawn = np.random.default_rng([seed, 41]).integers(len(wins), size=(10000, len(wins)))
    low, high = np.quantile(wins[drawn].mean(1), [0.025, 0.975])
    counts = {name: int((wins == value).sum()) for name, value in (("wins", 1), ("ties", 0.5), ("losses", 0))}
    return {"rate": wins.mean(), "low": low, "high": high} | counts | {"unjudged": unjudged}


def judge_of(judge: str, folder: Path):
    """A function from [(prompt, a, b)] to {column: [1 if a wins, 1/2 for a tie, 0 if b wins, None if not judged]}."""
    kind, _, name = judge.partition(":")
    home = folder.parent if (folder / "checkpoint").exists() else folder
    if kind == "annotator" and name:
        return by_scores(lambda texts: score(texts, name.split(","), home))
    if kind == "classifier" and name:
        return by_scores(lambda texts: {Path(name).name: classify(texts, refuse_policies(Path(name), home))})
    if kind == "llm" and name:
        facts = home / "dataset.json"
        criteria = json.loads(facts.read_text()).get("criteria") if facts.exists() else None
        return by_verdicts(Endpoint(name, folder / "judged.jsonl"), criteria or GENERAL)
    raise InputError(f"got {judge!r}, wanted annotator:NAME, classifier:PATH or llm:MODEL", option="judge")


def by_scores(scores):
    """judge_of for scores: a function from texts to {column: [score]}. The higher score wins."""
    def preferred(rows):
        both = [scores([prompt + text for prompt, *two in rows for text in two[side : side + 1]]) for side in (0, 1)]
        return {column: [(1 + (a > b) - (a < b)) / 2 for a, b in zip(both[0][column], both[1][column])]
                for column in both[0]}

    return preferred


def by_verdicts(endpoint: Endpoint, criteria: dict[str, str]):
    """judge_of for an LLM: a wins if it wins in both orders; not judged if one order has no verdict."""
    def preferred(rows):
        questions = [(criterion, prompt, *texts) for criterion in criteria.values() for prompt, a, b in rows if a != b
                 for texts in ((a, b), (b, a))]
        answers = dict(zip(questions, endpoint.answers(questions)))
        print(endpoint.bill())
        out = {}
        for column, criterion in criteria.items():
            out[column] = []
            for prompt, a, b in rows:
                verdicts = {"first": 0, "second": 0} if a == b else {
                    "first": answers[criterion, prompt, a, b], "second": answers[criterion, prompt, b, a]}
                a_wins = verdicts == {"first": "first", "second": "second"}
                b_wins = verdicts == {"first": "second", "second": "first"}
                out[column].append(None if None in verdicts.values() else 1.0 if a_wins else 0.0 if b_wins else 0.5)
        return out

    return preferred


def refuse_policies(path: Path, home: Path) -> Path:
    """The path. Raises: InputError if it has no model, or if the model is a policy of the job."""
    if not (path / "config.json").is_file():
        raise InputError("has no config.json; --judge classifier:PATH needs a Hugging Face directory", file=path,
                         option="judge")
    used = {Path(json.loads(file.read_text())["model"]).resolve() for file in home.glob("*/config.json")
            if "model" in json.loads(file.read_text())}
    if path.resolve() in used or home.resolve() in path.resolve().parents:
        raise InputError("is a policy of this job and must not judge itself; choose another model for --judge",
                         file=path, option="judge")
    return path


def classify(texts: list[str], path: Path) -> list[float]:
    """The logit of the model's last label for each text; a reward model has one label."""
    if importlib.util.find_spec("transformers") is None:
        raise InputError("classifier: needs the package transformers, which is not installed; pip install "
                         "transformers", option="judge")
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model = AutoModelForSequenceClassification.from_pretrained(path).eval()
    tokenizer, out = AutoTokenizer.from_pretrained(path), []
    limit = getattr(model.config, "max_position_embeddings", 512)
    with torch.no_grad():
        for text in texts:                                           # one at a time, so that no padding token is needed
            ids = tokenizer(text, return_tensors="pt", truncation=True, max_length=min(limit, 512))
            out.append(float(model(**ids).logits[0, -1]))
    return out
