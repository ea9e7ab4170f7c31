"""Planted worlds: preference files with known types and rewards, and a model so small that a run takes seconds.

A response is one of ITEMS, a lower-case letter; a prompt is a few capital letters and a mark. There are K types of
judges:

    rewards    r_t(item) ~ N(0, sharp^2), with correlation `agree` between types
    choices    between two random items, by the reward of the judge's type:  p(a > b) = sigma(r_t(a) - r_t(b))
    judges     users of one type who judge `each` pairs. With `domains` there are no users: the letters of a prompt come
               from the alphabet of one domain, and the domain's type judges the pair with probability OWN

The model is a GPT-2 of width 32 with random weights. Mixtures have low-rank heads on its frozen trunk, which can learn
rewards of items and little else; DPO trains the same model. All runs go through train.py. Held-out pairs are judged by
new users or on new prompts, without the noise of the training pairs (`flips`, `jitter`, `other`).
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

import train
from data.experiment.stages import write_lines
from mixdpo.dpo import accuracy, mixture_accuracy
from mixdpo.evaluation.heldout import alignment, margins_of
from mixdpo.evaluation.statistics import adjusted_rand_index, mean_se
from mixdpo.metrics import effective_experts
from mixdpo.mixture import e_step, log_marginal
from mixdpo.models.gpt2 import GPT2, GPT2Config
from mixdpo.models.weights import save_model
from mixdpo.preferences import Pair, groups
from mixdpo.private.keys import Key
from mixdpo.runs.load_run import Run, load_run
from mixdpo.runs.options import TrainConfig
from mixdpo.runs.reference import load_references
from mixdpo.text import bpe
from mixdpo.text.records import lines

# DPO with the parameters of one expert, a low-rank head on the frozen trunk: a mixture whose second weight is about 0.
ONE = {"experts": 2, "weights": "1,1e-9", "start": "none"}
ITEMS = "abcdefghijklmnopqrstuvwx"
ALPHABETS = "ABCDEF", "GHIJKL", "MNOPQR", "STUVWX"  # alphabets of the domains
FOREIGN = "012345"                                  # letters of no domain
LETTERS, EOS = 4, 256                               # letters in a prompt; the tokens are bytes and EOS
OWN = 0.9
# Learning rates and epochs with the best held-out log-likelihood; more epochs memorise the few pairs.
TRUNK, HEADS = {"lr": 0.003}, {"train_trunk": False, "head_lr": 0.01}
STEPS = {"epochs": 5, "batch": 50, "micro": 50, "start_steps": 10, "beta": 0.5, "dtype": "float32", "save_minutes": 1e9}


@dataclass(frozen=True)
class World:
    """The settings of a world."""

    seed: int = 0
    types: int = 2
    users: int = 100
    each: int = 10              # pairs of each user
    sharp: float = 2.0          # standard deviation of rewards, in nats
    agree: float = 0.0          # correlation of two types' rewards
    domains: bool = False       # the prompt's domain decides the type; no users
    flips: float = 0.0          # share of training pairs with inverted choice
    jitter: float = 0.0         # deviation of Gaussian noise on scores of training pairs
    other: float = 0.0          # share of training pairs that another type judges
    heldout: int = 2000         # held-out pairs

    def rewards(self) -> np.ndarray:
        """Rewards of each type and item (K,V), nats."""
        rng = np.random.default_rng([self.seed, self.types, 1])
        common, own = rng.normal(size=len(ITEMS)), rng.normal(size=(self.types, len(ITEMS)))
        return self.sharp * (math.sqrt(self.agree) * common + math.sqrt(1 - self.agree) * own)


@dataclass(frozen=True)
class Judged:
    """N comparisons: type and user of the judge, domain, the items chosen and rejected."""

    type: np.ndarray
    user: np.ndarray
    domain: np.ndarray
    chosen: np.ndarray
    rejected: np.ndarray

    def gaps(self, rewards: np.ndarray) -> torch.Tensor:
        """The true margins r_t(chosen) - r_t(rejected) of every type (N,K)."""
        return torch.from_numpy((rewards[:, self.chosen] - rewards[:, self.rejected]).T.copy())


def judged(world: World, heldout: bool = False) -> Judged:
    """The training or held-out comparisons of a world."""
    rng, r = np.random.default_rng([world.seed, world.types, 2 + heldout]), world.rewards()
    users = world.heldout // world.each if heldout else world.users
    N = users * world.each
    user = np.repeat(np.arange(users), world.each)
    kind = rng.integers(world.types, size=users)[user]
    domain = rng.integers(world.types, size=N)
    if world.domains:
        kind = np.where(rng.random(N) < OWN, domain, (domain + rng.integers(1, world.types, size=N)) % world.types)
    first = rng.integers(len(ITEMS), size=N)
    second = (first + rng.integers(1, len(ITEMS), size=N)) % len(ITEMS)     # another item
    judge, scores = kind.copy(), np.zeros((2, N))
    if not heldout:
        swapped = rng.random(N) < world.other
        judge = np.where(swapped, (kind + rng.integers(1, max(2, world.types), size=N)) % world.types, kind)
        scores = world.jitter * rng.normal(size=(2, N))
    gap = r[judge, first] + scores[0] - r[judge, second] - scores[1]
    right = rng.random(N) < 1 / (1 + np.exp(-gap))
    right ^= (rng.random(N) < world.flips) & (not heldout)
    return Judged(kind, user, domain, np.where(right, first, second), np.where(right, second, first))


def prompt(rng, letters: str, foreign: str = "", share: float = 0.0) -> str:
    """LETTERS letters and a mark; a `share` of the letters, at random positions, comes from another alphabet."""
    text = rng.choice(list(letters), LETTERS)
    places = rng.permutation(LETTERS)[: round(share * LETTERS)]
    text[places] = rng.choice(list(foreign or letters), len(places))
    return "".join(text) + ">"


def write(world: World, folder: Path) -> None:
    """Writes model/, train.jsonl and heldout.jsonl into the folder."""
    make_model(folder / "model")
    for name, heldout in (("train", False), ("heldout", True)):
        of, rng = judged(world, heldout), np.random.default_rng([world.seed, 4 + heldout])
        rows = []
        for z, user, domain, chosen, rejected in zip(of.type, of.user, of.domain, of.chosen, of.rejected):
            letters = ALPHABETS[domain] if world.domains else "".join(ALPHABETS)
            row = {"prompt": prompt(rng, letters), "chosen": ITEMS[chosen], "rejected": ITEMS[rejected],
                   "annotator": f"type {z}"}
            rows.append(row | ({"domain": f"domain {domain}"} if world.domains else {"user": f"{name}-{user}"}))
        write_lines(folder / f"{name}.jsonl", rows)


def make_model(folder: Path) -> None:
    """Writes a Hugging Face directory with random weights. They are five times the usual size: otherwise all texts have
    almost the same states in so narrow a model."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    model = GPT2(GPT2Config(vocab=EOS + 1, context=16, width=32, layers=2, heads=2, eos=EOS))
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(5.0 if p.ndim > 1 else 1.0)
    save_model(model, folder)
    vocab = {bpe.to_name(bytes([b])): b for b in range(256)} | {"<end>": EOS}
    (folder / "tokenizer.json").write_text(json.dumps(bpe.document(vocab, ["<end>"], bpe.BYTE_LEVEL, [], False)))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<end>"}))


# ---- runs


def fit(folder: Path, name: str, **options) -> Path:
    """One run of train.py on the world in `folder`; returns its directory. options: of TrainConfig, replacing STEPS."""
    several, own = options.get("experts", 2) > 1, options.get("sharing", "heads") != "heads"
    usual = STEPS | (HEADS if several and not own else TRUNK)
    if not several or options.get("start") == "none":
        usual = {key: value for key, value in usual.items() if key != "start_steps"}
    data = options.pop("data", "train.jsonl")
    config = TrainConfig(str(folder / data), str(folder / "model"), str(folder / name), **usual | options)
    return train.run(config, Key.public(config.seed))                       # planted worlds have no secrets


@dataclass
class Found:
    """A finished run, and its margins and weights on a file of preferences."""

    run: Run
    pairs: list[Pair]
    h: torch.Tensor             # (P,K)
    log_w: torch.Tensor         # (P,K)

    @property
    def metrics(self) -> list[dict]:
        """The metrics of every step."""
        return [json.loads(line) for line in lines(self.run.path / "metrics.jsonl")]


def look(path: Path, heldout: Path) -> Found:
    """Loads a run and computes its margins on a held-out file."""
    run = load_run(path, "cpu", "")
    models, tokenizer = load_references(run.config, "cpu")
    return Found(*next(margins_of([run], models, tokenizer, heldout, path.parent / "cache")))


def figures(found: Found) -> dict:
    """Figures of a run for all studies: log-likelihoods (nats a pair, with SE), accuracies and assignment of types."""
    run, h, log_w = found.run, found.h, found.log_w
    log_p, log_q = e_step(log_w, h)
    of_users = run.config.experts > 1 and found.pairs[0].user is not None
    log_user = of_new_users(found.pairs, h, log_w) if of_users else log_p
    aligned = alignment(run.table, run.plan.units, run.plan.pairs) if run.config.experts > 1 else {}
    naming = aligned.get("naming", {})
    expert = {kind: int(k) for k, kind in naming.items() if kind}
    own = torch.tensor([expert.get(pair.annotator, 0) for pair in found.pairs])
    right = accuracy(h[torch.arange(len(h)), own])                          # by the expert of the judge's type
    by_type = {kind: mean_se(right[[p.annotator == kind for p in found.pairs]])["mean"]
               for kind in sorted({p.annotator for p in found.pairs})}
    q = run.table.exp() if run.config.experts > 1 else torch.ones(1, 1)
    return {
        "ll": mean_se(log_p), "ll_user": mean_se(log_user), "accuracy": float(mixture_accuracy(log_p).mean()),
        "own": float(right.mean()), "worst": min(by_type.values()),
        "ari": aligned.get("ari", 0.0), "matched": aligned.get("matched", 0.0),
        "effective": effective_experts(run.table) if run.config.experts > 1 else 1.0,
        "variance": float(q.var(0, correction=0).sum()),                    # variance of responsibilities over units
        "apart": float((h.std(1) if h.shape[1] > 1 else h[:, 0] * 0).mean()),           # nats
    }


def of_new_users(pairs: list[Pair], h: torch.Tensor, log_w: torch.Tensor) -> torch.Tensor:
    """log p of all choices of each new user (M11) divided by their number, nats a pair: (U,)."""
    units = groups(pairs, "user")
    group = torch.empty(len(pairs), dtype=torch.int64)
    for u, unit in enumerate(units):
        group[unit] = u
    return e_step(log_w, h, group)[0] / torch.tensor([len(unit) for unit in units])


def oracle(world: World) -> dict:
    """The same figures for the true rewards and weights, the upper bound of all runs except by chance."""
    r, of = world.rewards(), judged(world, heldout=True)
    gaps = of.gaps(r)
    even = torch.full_like(gaps, -math.log(world.types))
    if world.domains:
        even = torch.full_like(gaps, math.log((1 - OWN) / max(1, world.types - 1)))
        even[torch.arange(len(gaps)), torch.from_numpy(of.domain)] = math.log(OWN)
    training = judged(world)
    log_q = e_step(torch.full((world.types,), -math.log(world.types)).double(), training.gaps(r),
                   torch.from_numpy(training.user))[1]
    first = np.arange(0, len(training.user), world.each)
    single = e_step(torch.full((world.types,), -math.log(world.types)).double(), training.gaps(r))[1]
    z = training.type[first].tolist()
    own = gaps[torch.arange(len(gaps)), torch.from_numpy(of.type)]
    result = {"ll": mean_se(log_marginal(even, gaps)), "ll_own": mean_se(torch.nn.functional.logsigmoid(own)),
              "own": float(accuracy(own).mean()),
              "ari_pair": adjusted_rand_index(single.argmax(1).tolist(), training.type.tolist()),
              "matched_pair": float((single.argmax(1).numpy() == training.type).mean())}
    if not world.domains:
        result |= {"ll_user": mean_se(e_step(even, gaps, torch.from_numpy(of.user))[0] / world.each),
                   "ari": adjusted_rand_index(log_q.argmax(1).tolist(), z),
                   "matched": float((log_q.argmax(1).numpy() == training.type[first]).mean())}
    return result


# ---- policies


def item_probabilities(model, unembedding: torch.Tensor, prompts: list[str]) -> torch.Tensor:
    """pi(item | prompt), normalised over the items: (P,V)."""
    ids = torch.tensor([list(text.encode()) for text in prompts])
    with torch.no_grad():
        logits = model(ids)[:, -1] @ unembedding.T                          # (P,vocabulary)
    return torch.softmax(logits[:, list(ITEMS.encode())].double(), dim=-1)
