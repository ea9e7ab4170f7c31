"""The judge of sentiment: P(positive) of a text, in [0, 1].

Two judges, told apart by the `judge.json` in the folder they live in:
    bag         logistic regression on the set of words and word pairs of a text, fitted on labelled reviews by `fit_sentiment`;
    distilbert  DistilBERT fine-tuned on SST-2, chosen by `use_distilbert`; needs the package transformers and its weights (268 MB).
What is judged later is short (a prompt and its response, about 50 words), and an accuracy on whole reviews of 230 words says little
about that: a piece of a review need not show the review's opinion. Both accuracies are measured, on reviews the fit has not seen.
Left out: pickles (they run code when opened). The bag hashes words to places, so its weights are one array and no vocabulary is stored.
"""

import hashlib
import importlib.util
import json
import os
from pathlib import Path

import numpy as np

from mixdpo.config import InputError

DISTILBERT = "distilbert/distilbert-base-uncased-finetuned-sst-2-english"
FEATURES = 2**20  # places of the hashed bag: about four times the pairs seen twice or more
SHORT = 50  # words: a prompt of 16 tokens and a response of 48
NEEDED = 0.88  # share of held-out whole reviews judged rightly under which a judge is refused
VERSION = 1  # part of the content key: raise it when the fit changes


def sentiment(texts: list[str], folder) -> list[float]:
    """P(positive) of each text by the judge in `folder`. Raises: InputError if there is none."""
    judge = read_judge(folder)
    if judge is None:
        raise InputError(f"{folder}: no judge.json in it; fit a judge first (data.sentiment.fit_sentiment) or choose use_distilbert")
    return distilbert(texts, judge["model"]) if judge["kind"] == "distilbert" else bag(texts, Path(folder), judge)


def read_judge(folder) -> dict | None:
    """What judge.json says, or None if there is none."""
    spec = Path(folder) / "judge.json"
    return json.loads(spec.read_text()) if spec.is_file() else None


# ---- bag


def vectors(texts: list[str]):
    """Unit vectors over a text's set of words, ! and ?, and pairs of neighbours: (N, FEATURES), sparse."""
    from sklearn.feature_extraction.text import HashingVectorizer

    pattern = r"(?u)\b\w[\w']*\b|[!?]"
    hashing = HashingVectorizer(ngram_range=(1, 2), n_features=FEATURES, binary=True, alternate_sign=False, token_pattern=pattern)
    return hashing.transform(texts)


def bag(texts: list[str], folder: Path, judge: dict) -> list[float]:
    """The fitted classifier, calibrated for short texts: sigmoid(slope * logit + offset)."""
    from safetensors.numpy import load_file

    logit = vectors(texts) @ load_file(folder / "sentiment.safetensors")["weight"] + judge["intercept"]  # (N,)
    return sigmoid(judge["slope"] * logit + judge["offset"]).tolist()


def sigmoid(x: np.ndarray) -> np.ndarray:
    return np.exp(-np.logaddexp(0.0, -x))


def piece(text: str, words: int, rng: np.random.Generator) -> str:
    """`words` words in a row of the text, from a place drawn at random; the whole text if it has no more."""
    all_words = text.split()
    start = rng.integers(max(len(all_words) - words, 0) + 1)
    return " ".join(all_words[start : start + words])


def fit_sentiment(reviews: list[tuple[str, int]], folder, seed: int = 0, needed: float = NEEDED) -> dict:
    """Fits the judge on reviews (text, 1 if positive else 0), writes it to `folder`, returns its report; if it is there, only reads it.

    An eighth of the reviews, 3,000 at most, is held out. The others count twice: whole, and as a piece of 25, 50 or 75 words under the
    review's label, since short texts are what it will judge. Each word and pair counts with the log-ratio of its shares in positive and in
    negative texts (Wang & Manning 2012: two points more than plain ones). On pieces of 50 words of a third of the held-out reviews slope
    and offset of the final sigmoid are fitted (Platt); accuracies are those on the other two thirds.
    Raises: InputError if it judges fewer than `needed` of the held-out whole reviews rightly.
    """
    folder, key = Path(folder), sentiment_key(reviews, seed)
    if (judge := read_judge(folder)) and judge.get("key") == key:
        return judge
    from safetensors.numpy import save_file
    from sklearn.linear_model import LogisticRegression

    rng = np.random.default_rng([seed, 1])
    shuffled = [reviews[i] for i in rng.permutation(len(reviews))]
    held = min(3000, len(reviews) // 8)
    tuning, testing, fitting = shuffled[: held // 3], shuffled[held // 3 : held], shuffled[held:]
    both = fitting + [(piece(text, rng.choice([25, 50, 75]), rng), label) for text, label in fitting]
    model = LogisticRegression(C=10.0, solver="liblinear", random_state=seed)
    x, y = vectors([text for text, _ in both]), np.array([label for _, label in both])
    ratio = log_ratio(x, y)
    model.fit(x.multiply(ratio).tocsr(), y)
    weight = (model.coef_[0] * ratio).astype(np.float32)

    def logits(part):  # (N, 1), (N,)
        return (vectors([text for text, _ in part]) @ weight + model.intercept_)[:, None], np.array([label for _, label in part])

    def cut(part):
        return [(piece(text, SHORT, rng), label) for text, label in part]

    platt = LogisticRegression(C=1e6).fit(*logits(cut(tuning)))
    (short, truth), (whole, _) = logits(cut(testing)), logits(testing)
    nats = -float(np.log(platt.predict_proba(short)[np.arange(len(truth)), truth]).mean())
    report = {"kind": "bag", "key": key, "intercept": float(model.intercept_[0])}
    report |= {"slope": float(platt.coef_[0, 0]), "offset": float(platt.intercept_[0])}
    report |= {"reviews_fitted": len(fitting), "reviews_held_out": len(testing), "accuracy_whole": platt.score(whole, truth)}
    report |= {"accuracy_short": platt.score(short, truth), "nats_short": nats}
    if report["accuracy_whole"] < needed:
        got = f"the judge of sentiment is right on {report['accuracy_whole']:.3f} of {len(testing)} held-out reviews"
        raise InputError(f"{got}, wanted at least {needed}; fitted on {len(fitting)}: give it more reviews, or look at their labels")
    folder.mkdir(parents=True, exist_ok=True)
    save_file({"weight": weight}, folder / "sentiment.safetensors.part")
    os.replace(folder / "sentiment.safetensors.part", folder / "sentiment.safetensors")
    write_judge(folder, report)  # last: it vouches for the weights beside it
    return report


def log_ratio(x, y: np.ndarray) -> np.ndarray:
    """log of each place's share among the positives' words over its share among the negatives', one added to every count: (FEATURES,)"""
    positive, negative = (1 + np.asarray((x[y == label] > 0).sum(axis=0)).ravel() for label in (1, 0))
    return np.log(positive / positive.sum()) - np.log(negative / negative.sum())


def sentiment_key(reviews: list[tuple[str, int]], seed: int) -> str:
    """sha256 of what the fit depends on."""
    key = hashlib.sha256(json.dumps([VERSION, FEATURES, SHORT, seed]).encode())
    for review in reviews:
        key.update(json.dumps(review).encode())
    return key.hexdigest()


def write_judge(folder: Path, report: dict) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "judge.json.part").write_text(json.dumps(report, indent=1) + "\n")
    os.replace(folder / "judge.json.part", folder / "judge.json")


# ---- DistilBERT


def use_distilbert(folder, model: str = DISTILBERT) -> dict:
    """Makes DistilBERT the judge in `folder`. model: a name on the hub or a directory.

    Raises: InputError if the package transformers is not installed.
    """
    if importlib.util.find_spec("transformers") is None:
        raise InputError("the judge distilbert needs the package transformers: pip install transformers, or choose the judge bag")
    report = {"kind": "distilbert", "model": str(model)}
    distilbert(["a film"], report["model"])  # it loads, or says why not, before anything is sampled
    write_judge(Path(folder), report)
    return report


def distilbert(texts: list[str], model: str, batch: int = 64) -> list[float]:
    """P(positive) by a sequence classifier of two classes, negative first, as SST-2's are."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer, classifier = AutoTokenizer.from_pretrained(model), AutoModelForSequenceClassification.from_pretrained(model)
    classifier.to(device).eval()
    assert classifier.config.num_labels == 2, f"{model} has {classifier.config.num_labels} classes, wanted negative and positive"
    out = []
    with torch.no_grad():
        for start in range(0, len(texts), batch):
            ids = tokenizer(texts[start : start + batch], padding=True, truncation=True, max_length=512, return_tensors="pt")
            out += classifier(**ids.to(device)).logits.float().softmax(-1)[:, 1].tolist()  # (N, 2)
    return out
