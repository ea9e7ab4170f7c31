"""Real sentences and ratings with linear rewards on SmolLM2's frozen states, for studies of real text.

    responses   sentences of product reviews and editorials (data/texts/sentences.py), as SmolLM2's mean state
    prompts     four sentences of one document, as their mean state; in shifted prompts some are from other documents
    tastes      warm: mean rating by people; cold: its negative; terse: shorter; lavish: longer. Rewards have deviation
                SHARP over all sentences; choices follow p(a > b) = sigma(r(a) - r(b))
    experts     h_k = theta_k . (f(a) - f(b)) on the first D principal components of the states (mixdpo/linear.py)

A run takes seconds, where a language model would take minutes; maps need hundreds of runs. docs/results shows what
language models add and lose. Held-out comparisons share no sentence with training comparisons.
"""

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from data.experiment.stages import key_of
from data.texts.sentences import Sentence, load_sentences
from mixdpo.config import compute_dtype
from mixdpo.dpo import mixture_accuracy
from mixdpo.evaluation.statistics import adjusted_rand_index, mean_se
from mixdpo.files import fetch
from mixdpo.files.atomic import read_tensors, write_tensors
from mixdpo.linear import LinearMixture, LinearOptions, linear_mixture
from mixdpo.mixture import e_step, log_marginal
from mixdpo.models.weights import load_model
from mixdpo.preferences import Pair
from mixdpo.runs.log import Progress
from mixdpo.runs.reference import compute_reference, prompt_features
from mixdpo.text.tokenizer import load_tokenizer

SIZES = {"smoke": {"sentences": 60, "prompts": 24, "apart": 8},
         "quick": {"sentences": 1000, "prompts": 250, "apart": 50},
         "full": {"sentences": 2200, "prompts": 1200, "apart": 200}}             # of each domain
DOMAINS, FOREIGN = ("product", "editorial"), ("film", "tweet")
SHORT, LONG, IN_PROMPT = 30, 110, 4     # characters of a sentence; sentences in a prompt
SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)    # shares of a prompt's sentences from other documents
D, SHARP = 64, 2.0
PRIOR = 48.0                            # l2 penalty of the linear rewards, for files of any size


def path_of(home: Path, preset: str) -> Path:
    """The file of states; its name depends on the settings and the archive."""
    return home / f"texts-{key_of(SIZES[preset], SHARES, fetch.ASSETS['sentences'].sha256)[:12]}.safetensors"


def prepare(home: Path, preset: str, data: str | None) -> None:
    """Computes SmolLM2's states of all sentences and prompts, once for all studies."""
    path, sizes = path_of(home, preset), SIZES[preset]
    if path.exists():
        return
    sentences, rng = load_sentences(data), np.random.default_rng(0)
    tokenizer, (dtype, _) = load_tokenizer("smollm2", data), compute_dtype("auto", "cpu")
    model = load_model("smollm2", data=data)
    fitting = {d: [s for s in of if SHORT <= len(s.text) <= LONG] for d, of in sentences.items()}
    windows = {d: four_of(fitting[d]) for d in DOMAINS}
    prompts, facts = prompts_of(windows, fitting, sizes, rng)
    used = {text for texts in prompts for text in texts}                    # sentences of prompts are not responses
    chosen = [s for d in DOMAINS for s in [s for s in fitting[d] if s.text not in used][: sizes["sentences"] // 2 * 2]]
    opening = tokenizer.encode("A sentence:")
    ids = [tokenizer.encode(" " + s.text) for s in chosen]
    pairs = [Pair(opening, a, b) for a, b in zip(ids[::2], ids[1::2])]
    states = compute_reference(model, pairs, dtype, progress=Progress("states of sentences")).features
    encoded = [tokenizer.encode(" ".join(texts)) for texts in prompts]
    of_prompts = prompt_features(model, encoded, dtype)[:, 1].contiguous()  # the mean states
    recorded = {"domain": [s.domain for s in chosen], "ratings": [s.ratings for s in chosen],
                "length": [len(s.text) for s in chosen], "prompts": facts}
    write_tensors(path, {"states": states.flatten(0, 1).contiguous(), "prompts": of_prompts},
                  json.loads(json.dumps(recorded)))


def four_of(sentences: list[Sentence]) -> list[list[str]]:
    """Groups of IN_PROMPT consecutive sentences of a document, without overlap."""
    runs, run, of = [], [], None
    for s in sentences:
        run = [*run, s.text] if s.document == of else [s.text]
        of = s.document
        if len(run) == IN_PROMPT:
            runs.append(run)
            run = []
    return runs


def prompts_of(windows, fitting, sizes: dict, rng) -> tuple[list[list[str]], list[dict]]:
    """Sentences of every prompt, and its description {"domain", "part": "train", "crossed" or "foreign", "share"}."""
    texts, facts = [], []
    for d in DOMAINS:
        order = rng.permutation(len(windows[d]))
        shifted, train = order[: sizes["apart"]], order[sizes["apart"] :][: sizes["prompts"]]
        texts += [windows[d][n] for n in train]
        facts += [{"domain": d, "part": "train", "share": 0.0} for _ in train]
        elsewhere = {"crossed": [s.text for s in fitting[DOMAINS[1 - DOMAINS.index(d)]]],
                     "foreign": [s.text for name in FOREIGN for s in fitting[name]]}
        for part, others in elsewhere.items():
            for share in SHARES:
                for n in shifted:
                    text, count = list(windows[d][n]), round(share * IN_PROMPT)
                    for place, other in zip(rng.permutation(IN_PROMPT)[:count], rng.choice(others, count, False)):
                        text[place] = str(other)
                    texts.append(text)
                    facts.append({"domain": d, "part": part, "share": share})
    return texts, facts


@dataclass(frozen=True)
class Texts:
    """Features and rewards of all sentences and prompts."""

    x: torch.Tensor             # (S,D) float64 principal components, of deviation 1
    c: torch.Tensor             # (P,D) the same of prompts
    rewards: dict               # taste -> (S,) numpy, nats
    ratings: list[list[int]]
    domain: np.ndarray          # (S,)
    prompts: list[dict]


def load(home: Path, preset: str) -> Texts:
    """Reads the states that `prepare` wrote."""
    tensors, facts = read_tensors(path_of(home, preset))
    warm, terse = (standard([np.mean(r) for r in facts["ratings"]]), standard([-n for n in facts["length"]]))
    rewards = {"warm": SHARP * warm, "terse": SHARP * terse, "cold": -SHARP * warm, "lavish": -SHARP * terse}
    train = torch.tensor([p["part"] == "train" for p in facts["prompts"]])
    return Texts(components(tensors["states"]), components(tensors["prompts"], train), rewards, facts["ratings"],
                 np.array(facts["domain"]), facts["prompts"])


def standard(values) -> np.ndarray:
    """Values with mean 0 and deviation 1."""
    values = np.array(values, dtype=float)
    return (values - values.mean()) / values.std()


def components(states: torch.Tensor, of: torch.Tensor | None = None) -> torch.Tensor:
    """The first D principal components of the rows `of`, with deviation 1: (N,C) -> (N,D) float64; fewer than D if
    there are fewer rows."""
    states = states.double()
    base = states if of is None else states[of]
    V = torch.linalg.svd(base - base.mean(0), full_matrices=False)[2][: min(D, len(base) - 1)]
    scores = (states - base.mean(0)) @ V.T
    return scores / (scores if of is None else scores[of]).std(0)


@dataclass(frozen=True)
class Judged:
    """N comparisons of sentences."""

    x: torch.Tensor             # (N,D) chosen minus rejected
    group: torch.Tensor         # (N,) user, 0..U-1
    type: np.ndarray            # (N,) taste of the judge
    gaps: torch.Tensor          # (N,K) true margins of every taste
    prompt: torch.Tensor        # (N,) index into Texts.c; zeros without prompts


@dataclass(frozen=True)
class Judges:
    """Who judges, and how."""

    tastes: tuple[str, ...]     # each user has one of them
    users: int
    each: int                   # pairs of each user
    seed: int
    flips: float = 0.0          # share of choices that are inverted
    one_rating: bool = False    # warm and cold follow the rating of one random person instead of the mean rating
    domains: bool = False       # the domain of a pair's prompt decides the taste (in the order of DOMAINS)


def judge(texts: Texts, judges: Judges, heldout: bool = False) -> Judged:
    """Choices between two sentences of one domain. heldout: on sentences and prompts that training never uses. With
    one_rating a tie is broken by a coin."""
    tastes, users, each = judges.tastes, judges.users, judges.each
    rng = np.random.default_rng([judges.seed, len(tastes), 5 + heldout])
    S, order = len(texts.x), np.random.default_rng(3).permutation(len(texts.x))
    own = order[: S // 4] if heldout else order[S // 4 :]                   # held-out pairs have sentences of their own
    N, rewards = users * each, np.stack([texts.rewards[t] for t in tastes])
    kind = np.repeat(rng.integers(len(tastes), size=users), each)
    where, prompt = rng.integers(2, size=N), np.zeros(N, dtype=int)
    if judges.domains:
        kind = where
        of = [np.array([n for n, p in enumerate(texts.prompts) if p["domain"] == d and p["part"] == "train"])
              for d in DOMAINS]
        halves = [(o[len(o) // 4 :], o[: len(o) // 4])[heldout] for o in of]
        prompt = np.array([rng.choice(halves[w]) for w in where])
    pools = [own[texts.domain[own] == d] for d in DOMAINS]
    two = np.array([rng.choice(pools[w], 2, replace=False) for w in where])
    gaps = (rewards[:, two[:, 0]] - rewards[:, two[:, 1]]).T                # (N,K)
    right = rng.random(N) < 1 / (1 + np.exp(-gaps[np.arange(N), kind]))
    if judges.one_rating:
        rated = np.array([[rng.choice(texts.ratings[s]) for s in pair] for pair in two])
        higher = np.where(rated[:, 0] == rated[:, 1], rng.random(N) < 0.5, rated[:, 0] > rated[:, 1])
        signs = np.array([{"warm": 1, "cold": -1}.get(t, 0) for t in tastes])[kind]
        right = np.where(signs == 0, right, higher == (signs > 0))
    right ^= rng.random(N) < judges.flips
    sign = np.where(right, 1.0, -1.0)[:, None]
    x = texts.x[two[:, 0]] - texts.x[two[:, 1]]
    group = np.arange(N) if judges.domains else np.repeat(np.arange(users), each)
    return Judged(x * torch.from_numpy(sign), torch.from_numpy(group), kind, torch.from_numpy(gaps * sign),
                  torch.from_numpy(prompt))


def per_pair(training: Judged) -> Judged:
    """The same comparisons with one latent type for each pair."""
    return replace(training, group=torch.arange(len(training.x)))


def fit(training: Judged, experts: int, seed: int = 0, starts: int = 3, iterations: int = LinearOptions.iterations,
        **options) -> LinearMixture:
    """A mixture of linear rewards. options: arguments of linear_mixture."""
    fitted = LinearOptions(PRIOR, starts, iterations, seed)
    return linear_mixture(training.x, training.group, experts, fitted, **options)


def figures(found: LinearMixture, training: Judged, held: Judged, log_w: torch.Tensor | None = None) -> dict:
    """Held-out log-likelihood (M5, and M11 for new users; nats a pair), accuracy and ARI, and the values that the true
    tastes reach. log_w (N,K): weights of a gate; None: those of the fit."""
    K, types = len(found.theta), held.gaps.shape[1]
    h = held.x @ found.theta.double().T                                     # (N,K)
    w = found.log_w.double().expand_as(h) if log_w is None else log_w
    log_p = log_marginal(w, h)
    even = torch.full((types,), -math.log(types)).double()
    first = torch.searchsorted(training.group, torch.arange(int(training.group.max()) + 1))
    z = training.type[first.numpy()].tolist()
    bayes = e_step(even, training.gaps, training.group)[1].argmax(1).tolist()
    size = held.group.bincount()
    return {
        "ll": mean_se(log_p), "accuracy": float(mixture_accuracy(log_p).mean()),
        "ll_user": mean_se(e_step(w, h, held.group)[0] / size if log_w is None else log_p),
        "oracle": mean_se(log_marginal(even, held.gaps)), "oracle_user": mean_se(e_step(even, held.gaps, held.group)[0]
                                                                                / size),
        "ari": adjusted_rand_index(found.log_q.argmax(1).tolist(), z) if K > 1 else 0.0,
        "bayes_ari": adjusted_rand_index(bayes, z) if types > 1 else 1.0,
    }
