"""The judge of sentiment: P(positive) of a text, in [0, 1].

There are two judges. `judge.json` in the job's folder says which is in use:
    bag         logistic regression on a text's set of words and word pairs, fitted on labelled reviews: `fit_sentiment`
    distilbert  DistilBERT fine-tuned on SST-2: `use_distilbert`; needs the package transformers and its weights
The texts to judge are short (a prompt with its response, about 50 words). Accuracy on full reviews of 230 words says
little about them, since a part of a review need not show its opinion. So both accuracies are measured, on held-out
reviews. The bag hashes words to feature indices: its weights are one array, and no vocabulary is stored. No pickles are
used, since they run code when opened.
"""

import hashlib
import importlib.util
import json
import os
from pathlib import Path

import numpy as np
import torch

from mixdpo.config import InputError, replacing, to_json
from mixdpo.files.atomic import save_tensors

DISTILBERT = "distilbert/distilbert-base-uncased-finetuned-sst-2-english"
FEATURES = 2**20  # number of hashed features
SHORT = 50  # words in a short text: a prompt of 16 tokens and a response of 48
NEEDED = 0.88  # least accuracy on held-out full reviews; a worse judge is refused
VERSION = 1  # part of the content key; raise it when the fit changes


def sentiment(texts: list[str], folder) -> list[float]:
    """P(positive) of each text by the judge in `folder`. Raises: InputError if there is none."""
    judge = read_judge(folder)
    if judge is None:
        raise InputError("has no judge.json; run a job's data script, or data.annotators.sentiment.fit_sentiment, to "
                         "make one", file=folder)
    return distilbert(texts, judge["model"]) if judge["kind"] == "distilbert" else bag(texts, Path(folder), judge)


def read_judge(folder) -> dict | None:
    """The content of judge.json; None if the file does not exist."""
    spec = Path(folder) / "judge.json"
    return json.loads(spec.read_text()) if spec.is_file() else None


def describe_judge(judge: dict) -> str:
    """One clause on the quality of the judge, for the console."""
    if judge["kind"] == "distilbert":
        return "the judge of sentiment is DistilBERT"
    return (f"the judge of sentiment is right on {judge['accuracy_whole']:.3f} of full reviews and "
            f"{judge['accuracy_short']:.3f} of short texts")


def write_judge(folder: Path, report: dict) -> None:
    """Writes judge.json atomically."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "judge.json.part").write_text(to_json(report, indent=1) + "\n")
    os.replace(folder / "judge.json.part", folder / "judge.json")


# ---- bag


def vectors(texts: list[str]):
    """Sparse unit vectors (N, FEATURES) over a text's set of words, ! and ?, and of neighbouring pairs."""
    if importlib.util.find_spec("sklearn") is None:
        raise InputError("the judge of sentiment needs scikit-learn, which is not installed: pip install '.[data]'")
    from sklearn.feature_extraction.text import HashingVectorizer

    pattern = r"(?u)\b\w[\w']*\b|[!?]"
    bag = {"ngram_range": (1, 2), "n_features": FEATURES, "binary": True, "alternate_sign": False}
    return HashingVectorizer(token_pattern=pattern, **bag).transform(texts)


def bag(texts: list[str], folder: Path, judge: dict) -> list[float]:
    """The fitted classifier, calibrated for short texts: sigmoid(slope * logit + offset)."""
    from safetensors.numpy import load_file

    weight = load_file(folder / "sentiment.safetensors")["weight"]                          # (FEATURES,)
    logit = vectors(texts) @ weight + judge["intercept"]                                    # (N,)
    return np.exp(-np.logaddexp(0.0, -judge["slope"] * logit - judge["offset"])).tolist()


def piece(text: str, words: int, rng: np.random.Generator) -> str:
    """`words` consecutive words of the text from a random position; the full text if it is not longer."""
    all_words = text.split()
    start = rng.integers(max(len(all_words) - words, 0) + 1)
    return " ".join(all_words[start : start + words])


def log_ratio(x, y: np.ndarray) -> np.ndarray:
    """log of a feature's share in positive texts divided by its share in negative texts, counts plus one:
    (FEATURES,)."""
    positive, negative = (1 + np.asarray((x[y == label] > 0).sum(axis=0)).ravel() for label in (1, 0))
    return np.log(positive / positive.sum()) - np.log(negative / negative.sum())


def fit_sentiment(reviews: list[tuple[str, int]], folder, seed: int = 0, needed: float = NEEDED) -> dict:
    """Fits the judge on reviews (text, 1 if positive else 0) and writes it to `folder`; returns its report. A judge
    that was fitted to the same reviews is reused.

    An eighth of the reviews, at most 3,000, is held out. Each other review is used twice: in full, and as a piece of
    25, 50 or 75 words with the review's label, since the judge is used on short texts. Features are weighted by the
    log-ratio of their shares in positive and negative texts (Wang & Manning 2012; without it accuracy is 0.01 lower).
    Slope and offset of the final sigmoid (Platt) are fitted to pieces of 50 words of a third of the held-out reviews.
    The report's figures are measured on the other two thirds. Raises: InputError if accuracy on held-out full reviews
    is below `needed`.
    """
    folder, key = Path(folder), sentiment_key(reviews, seed)
    if (judge := read_judge(folder)) and judge.get("key") == key:
        return judge
    rng = np.random.default_rng([seed, 1])
    shuffled, held = [reviews[i] for i in rng.permutation(len(reviews))], min(3000, len(reviews) // 8)
    tuning, testing, fitting = shuffled[: held // 3], shuffled[held // 3 : held], shuffled[held:]
    if min(len({label for _, label in part}) for part in (tuning, testing, fitting)) < 2:
        raise InputError(f"{len(reviews)} reviews are too few to fit and to test the judge of sentiment; wanted some "
                         "hundreds, positive and negative", file=folder)
    both = fitting + [(piece(text, rng.choice([25, 50, 75]), rng), label) for text, label in fitting]
    x, y = vectors([text for text, _ in both]), np.array([label for _, label in both])
    from sklearn.linear_model import LogisticRegression

    ratio = log_ratio(x, y)
    model = LogisticRegression(C=10.0, solver="liblinear", random_state=seed).fit(x.multiply(ratio).tocsr(), y)
    weight = (model.coef_[0] * ratio).astype(np.float32)                                    # (FEATURES,)

    def logits(part, cut: bool):
        texts = [piece(text, SHORT, rng) if cut else text for text, _ in part]
        return (vectors(texts) @ weight + model.intercept_)[:, None], np.array([label for _, label in part])

    platt = LogisticRegression(C=1e6).fit(*logits(tuning, cut=True))
    (short, truth), (full, _) = logits(testing, cut=True), logits(testing, cut=False)
    of_truth = platt.predict_proba(short)[np.arange(len(truth)), truth]                     # (N,)
    report = {"kind": "bag", "key": key, "intercept": float(model.intercept_[0])}
    report |= {"slope": float(platt.coef_[0, 0]), "offset": float(platt.intercept_[0])}
    report |= {"reviews_fitted": len(fitting), "reviews_held_out": len(testing)}
    report |= {"accuracy_whole": platt.score(full, truth), "accuracy_short": platt.score(short, truth)}
    report |= {"nats_short": -float(np.log(of_truth).mean())}
    if report["accuracy_whole"] < needed:
        got = f"the judge of sentiment is right on {report['accuracy_whole']:.3f} of {len(testing)} held-out reviews"
        remedy = "choose distilbert, give more reviews, or check their labels"
        raise InputError(f"{got}, wanted {needed}; it was fitted on {len(fitting)}: {remedy}", option="sentiment")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "judge.json").unlink(missing_ok=True)
    with replacing(folder / "sentiment.safetensors") as part:
        save_tensors(part, {"weight": torch.from_numpy(weight)}, {})
    write_judge(folder, report)  # last: judge.json means that the weights are complete
    return report


def sentiment_key(reviews: list[tuple[str, int]], seed: int) -> str:
    """sha256 of the inputs of the fit."""
    key = hashlib.sha256(json.dumps([VERSION, FEATURES, SHORT, seed]).encode())
    for review in reviews:
        key.update(json.dumps(review).encode())
    return key.hexdigest()


# ---- DistilBERT


def find_distilbert(data=None) -> tuple[str | None, str]:
    """(name or directory of DistilBERT, reason), or (None, reason) if it cannot be loaded. data: local folder, searched
    first."""
    if importlib.util.find_spec("transformers") is None:
        return None, "DistilBERT needs the package transformers, which is not installed"
    from transformers import AutoModelForSequenceClassification

    local = Path(data or ".") / DISTILBERT.split("/")[1]
    if data is not None and (local / "config.json").is_file():
        return str(local), "DistilBERT is in the data folder"
    try:
        AutoModelForSequenceClassification.from_pretrained(DISTILBERT)      # from transformers' cache, or downloaded
    except OSError as error:
        return None, f"DistilBERT cannot be loaded ({str(error).splitlines()[0]})"
    return DISTILBERT, "DistilBERT is available"


def use_distilbert(folder, model: str) -> dict:
    """Makes DistilBERT the judge in `folder`. model: a directory or a name on the hub, as find_distilbert returns
    it."""
    report = {"kind": "distilbert", "model": str(model)}
    distilbert(["a film"], report["model"])  # fails here, before sampling, if it cannot be loaded
    write_judge(Path(folder), report)
    return report


def distilbert(texts: list[str], model: str, batch: int = 64) -> list[float]:
    """P(positive) by a sequence classifier with two classes, negative first, as in SST-2."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = AutoTokenizer.from_pretrained(model)
    classifier = AutoModelForSequenceClassification.from_pretrained(model).to(device).eval()
    classes = classifier.config.num_labels
    assert classes == 2, f"{model} has {classes} classes, wanted two: negative, positive"
    out = []
    with torch.no_grad():
        for start in range(0, len(texts), batch):
            ids = tokenizer(texts[start : start + batch], padding=True, truncation=True, max_length=512,
                            return_tensors="pt")
            out += classifier(**ids.to(device)).logits.float().softmax(-1)[:, 1].tolist()   # (N, 2)
    return out
