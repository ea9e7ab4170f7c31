"""Every two settings of train.py together, on a job of seconds. Two settings either are refused, in a sentence that
names one of them, before anything is trained; or they train, and then

    resume      a run that was cut behind its third step, within an epoch, ends as the whole one does, to the bit
    evaluate    held-out preferences and new users give finite figures, in files that are valid JSON
    agree       evaluation finds the responsibilities of training again; a step cut into other micro-batches is the same
    stay        a frozen trunk, base or expert keeps every bit, the reference too; every other expert learns

`make test` leaves this file out, `make test-all` runs it. Each setting alone must train, so a refusal is of the two.
Left out: settings that are two values of the same option.
"""

import contextlib
import copy
import io
import itertools
import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
import tinyjob
import torch

import eval as evaluation
import train
from mixdpo.config import InputError
from mixdpo.evaluation import inputs
from mixdpo.evaluation.adaptation import weights_after
from mixdpo.experts import Adapters, Models
from mixdpo.gates import TRAINED
from mixdpo.private import keys
from mixdpo.runs import checkpoint, log, reference, setup
from mixdpo.runs import load_run as finished
from mixdpo.runs import memory_estimate as fits
from mixdpo.runs.options import TrainConfig
from mixdpo.runs.rules import validate

SETTINGS = {
    "one expert": {"experts": 1},
    "lora": {"sharing": "lora"},
    "shared adapter": {"sharing": "lora", "shared_rank": 2},
    "models": {"sharing": "models"},
    "reference models": {"model": "two"},
    "full heads": {"rank": 0},
    "frozen trunk": {"train_trunk": False},
    "users": {"latent": "user"},
    "context": {"estep": "context", "context": 1},
    "a user of context pairs": {"data": "aside"},
    "first visit": {"estep": "first"},
    "incremental": {"em": "incremental"},
    "tempered": {"variant": "tempered"},
    "hard": {"variant": "hard"},
    "monte-carlo": {"variant": "monte-carlo"},
    "gumbel": {"variant": "gumbel"},
    "linear gate": {"gate": "linear"},
    "user gate": {"gate": "user"},
    "prompt-user gate": {"gate": "prompt-user"},
    "domain gate": {"gate": "domain"},
    "balance": {"gate_balance": 0.5},
    "updated weights": {"weights": "update"},
    "given weights": {"weights": "0.3,0.7"},
    "robust": {"robust": 0.5},
    "frozen expert": {"freeze": "0"},
    "init and freeze": {"init_experts": "source", "freeze": "0"},
    "noisy labels": {"label_noise": 0.3},
    "private pairs": {"epsilon": 8.0, "privacy_unit": "pair"},
    "private users": {"epsilon": 8.0, "privacy_unit": "user"},
    "linear start": {"start": "linear"},
    "no start": {"start": "none"},
    "short moments": {"moments": "bfloat16"},
    "checkpointing": {"checkpointing": True},
    "head rows": {"head_rows": 10},
    "drop": {"drop": True},
    "bfloat16": {"dtype": "bfloat16"},
}
# What an option needs besides, where the other setting of the pair does not say otherwise.
NEEDS = {
    "model": {"sharing": "models"},
    "context": {"latent": "user"},
    "estep=first": {"start": "none"},
    "variant=tempered": {"variant_temperature": 2.0},
    "variant=monte-carlo": {"draws": 2},
    "gate_balance": {"gate": "linear"},
    "init_experts": {"start": "none"},
    "em": {"latent": "user"},
    "privacy_unit=pair": {"batch": 3, "epochs": 1},                         # four steps each, on average a fourth of
    "privacy_unit=user": {"batch": 1, "epochs": 1},                         # all examples
    "start=linear": {"restarts": 2},
}
BASE = dict(dtype="float32", rank=2, batch=6, micro=6, lr=1e-2, head_lr=3e-2, gate_lr=3e-2, warmup=1, start_steps=1,
            epochs=2, beta=1.0, save_minutes=0.0, keep=99)


def needed(setting: dict) -> dict:
    """The setting's options, and those that they need."""
    found = [NEEDS.get(key, {}) for name, value in setting.items() for key in (name, f"{name}={value}")]
    return {name: value for part in [*found, setting] for name, value in part.items()}


def contradict(a: dict, b: dict) -> bool:
    return any(a[name] != b[name] for name in a.keys() & b.keys())


PAIRS = [(a, b) for a, b in itertools.combinations(SETTINGS, 2) if not contradict(SETTINGS[a], SETTINGS[b])]


# --- the job ----------------------------------------------------------------------------------------------------------


@dataclass
class Job:
    """A folder with two models, preferences with and without faulty lines, and finished runs to begin with."""

    folder: Path
    models: list[Path]
    sources: dict[str, Path]

    def file(self, config_drop: bool, aside: bool, kind: str) -> Path:
        return self.folder / f"{kind}{'-faulty' * config_drop}{'-aside' * aside}.jsonl"

    def options(self, *settings: str) -> dict:
        """TrainConfig's options for these settings, what they need, and BASE as far as it has an effect there."""
        both = [SETTINGS[setting] for setting in settings]
        chosen = {name: value for part in [*map(needed, both), *both] for name, value in part.items()}
        several, sharing = chosen.get("experts", 2) > 1, chosen.get("sharing", "heads")
        if {"init_experts", "freeze"} & chosen.keys() and sharing == "heads":
            chosen = {"train_trunk": False} | chosen
        lora, full = sharing == "lora", chosen.get("rank") == 0
        heads = lora or sharing == "heads" and (several or not chosen.get("train_trunk", True))
        used = {"rank": heads, "head_lr": heads and not full, "gate_lr": several and chosen.get("gate") in TRAINED,
                "lr": not lora and (full or chosen.get("train_trunk", True)),
                "start_steps": several and chosen.get("start") != "none"
                and (chosen.get("start"), chosen.get("estep")) != ("linear", "context")}
        chosen = {name: value for name, value in BASE.items() if used.get(name, True)} | chosen
        kind = "full" if full and sharing == "heads" else sharing
        if "init_experts" in chosen:
            chosen["init_experts"] = f"{self.sources[kind]}:1,fresh"
        chosen["model"] = ",".join(map(str, self.models[: 2 if chosen.get("model") == "two" else 1]))
        chosen["data"] = str(self.file(chosen.get("drop", False), chosen.get("data") == "aside", "train"))
        return chosen


def records(users, seed, prefix=""):
    """Three pairs of each user, each with a domain."""
    made = tinyjob.make_records(users=users, each=3, seed=seed)
    return [r | {"user": prefix + r["user"], "domain": ("even", "odd")[n // users % 2]} for n, r in enumerate(made)]


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pairs")
    models = [tinyjob.make_model(folder / f"model{n}", seed=n, layers=1) for n in range(2)]
    made = Job(folder, models, {})
    aside = [r | {"user": "aside", "context": True} for r in records(1, 5)]
    faulty = [{"prompt": "x", "chosen": "same", "rejected": "same", "user": "u0"}]
    for drop, one in itertools.product((False, True), repeat=2):
        known = records(4, 0) + aside * one + faulty * drop
        tinyjob.write(made.file(drop, one, "train"), known)
        tinyjob.write(made.file(drop, one, "heldout"), known + records(2, 1, "other-"))
        tinyjob.write(made.file(drop, one, "adapt"), records(4, 2, "new-") + faulty * drop)
    kinds = {"heads": {"train_trunk": False}, "full": {"train_trunk": False, "rank": 0}, "lora": {"sharing": "lora"},
             "models": {"sharing": "models"}}
    for kind, options in kinds.items():
        known = dict(batch=6, micro=6, epochs=2, warmup=1, start_steps=4, data=str(made.file(False, False, "train")))
        made.sources[kind] = tinyjob.run(folder, models[0], None, name=f"source-{kind}", **known | options)
    return made


LOADED = {}


def load_references(config, device):
    """As reference.load_references, but each model is read once and copied from then on."""
    key = (config.model, config.sharing)
    if key not in LOADED:
        LOADED[key] = reference.load_references(config, device)
    return copy.deepcopy(LOADED[key][0]), LOADED[key][1]


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """One thread, and models that are read once; no process for the revision, no report."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for module in (setup, inputs, finished):
        monkeypatch.setattr(module, "load_references", load_references)
    monkeypatch.setattr(log, "revision", lambda: "unknown")
    monkeypatch.setattr(evaluation, "write_report", lambda folder: None)
    yield
    torch.set_num_threads(threads)


# --- what a pair must do ----------------------------------------------------------------------------------------------


def test_enough_pairs_are_crossed():
    """Fault: a list so short, or of settings so alike, that nothing is crossed."""
    assert len(PAIRS) >= 150, len(PAIRS)


@pytest.mark.parametrize("setting", SETTINGS)
def test_each_setting_alone_trains(setting, job, monkeypatch):
    """Fault: a setting that is refused by itself, so all of its pairs pass as refused."""
    options = job.options(setting)
    out = job.folder / f"alone-{setting.replace(' ', '-')}"
    check(job, options, out, monkeypatch)


@pytest.mark.parametrize("pair", PAIRS, ids=[" x ".join(pair) for pair in PAIRS])
def test_a_pair_is_refused_in_a_sentence_or_keeps_every_promise(pair, job, monkeypatch):
    """Faults: see the head of this file; a private run that begins with experts whose training no budget covers."""
    options, out = job.options(*pair), job.folder / " x ".join(pair).replace(" ", "-")
    names = {name for setting in pair for name in needed(SETTINGS[setting])}
    monkeypatch.setattr(fits, "describe_memory", lambda *_: [])            # an estimate, made with each setting alone
    try:
        validate(TrainConfig(out=str(out), **options))
        check(job, options, out, monkeypatch)
    except InputError as error:
        flags = [f"--{name.replace('_', '-')}" for name in names]           # a third option's error may name one of two
        assert (error.option in names or any(flag in error.message for flag in flags)
                or "data" in names and str(error.file) == options["data"]), \
            f"refused, and none of {', '.join(sorted(names))} named: {error!r}"
        assert len(str(error).split()) >= 5, f"no sentence: {error}"
        assert not (out / "checkpoint").exists(), f"refused only after a step: {error}"
    else:
        assert not {"epsilon", "init_experts"} <= names, "began with experts that were trained without privacy"


@contextlib.contextmanager
def silence():
    """Within it nothing is printed: the report of a failure then holds the failure alone."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


@silence()
def check(job: Job, options: dict, out: Path, monkeypatch) -> None:
    """Trains and evaluates; every promise of the module's head is an assertion. Raises: InputError if it is refused."""
    count_keys(monkeypatch)
    with monkeypatch.context() as patch:
        copied, seen = copy_behind(patch, 3), watch(patch)
        whole = train.run(TrainConfig(out=str(out), **options))
    assert copied, "fewer than four steps: nothing to resume"
    stays_and_learns(*seen)
    parts = train.run(TrainConfig(out=str(copied[0]), **options))
    assert differences(whole, parts) == [], "resumed and whole differ"
    evaluates(job, options, whole, monkeypatch)
    cut = options | other_cut(options)
    if cut != options:
        count_keys(monkeypatch)
        same_but_for_rounding(whole, train.run(TrainConfig(out=f"{out}-cut", **cut)), options)
    for folder in (out, copied[0], Path(f"{out}-cut")):
        shutil.rmtree(folder, ignore_errors=True)


def count_keys(monkeypatch) -> None:
    """From here on the first secret key is always the same, the second another: a run that resumes must draw none."""
    drawn = itertools.count()
    monkeypatch.setattr(keys.Key, "fresh", classmethod(lambda cls: cls(bytes([next(drawn)]) * 32)))


def copy_behind(patch, step: int) -> list[Path]:
    """Once a run has saved behind this step, its directory is copied, as if the run had been killed there. Returns a
    list that then holds the copy."""
    real, copies = checkpoint.save_checkpoint, []

    def save_checkpoint(run, tensors, state, keep):
        if state["step"] == step or state["finished"]:
            real(run, tensors, state, keep)
        if state["step"] == step and not state["finished"]:
            copies.append(Path(f"{run}-parts"))
            shutil.copytree(run, copies[0])

    patch.setattr(checkpoint, "save_checkpoint", save_checkpoint)
    return copies


def watch(patch) -> list:
    """A list that will hold a run's config, its experts, its reference, and what these were before the first step."""
    real, seen = setup.read, []

    def read(job, *rest):
        made, config = real(job, *rest), job.config
        experts, _, reference, *_ = made
        seen.extend([config, experts, reference, frozen_parts(experts, config), own_parts(experts),
                     reference.logp.clone()])
        return made

    patch.setattr(setup, "read", read)
    return seen


def frozen_parts(experts, config) -> dict[str, torch.Tensor]:
    """Copies of all that must never change."""
    parts = {}
    if isinstance(experts, Adapters):
        parts = {n: p for n, p in experts.named_parameters() if n.rpartition(".")[2] not in ("A", "B", "A_0", "B_0")}
    elif not config.train_trunk:
        parts = {f"trunk.{n}": p for n, p in experts.trunk.named_parameters()}
    for k in config.frozen:
        model, head = experts.policy(k)
        parts |= {f"expert {k}: {n}": p for n, p in model.named_parameters()} | {f"expert {k}: head": head}
    return {name: p.detach().clone() for name, p in parts.items()}


def own_parts(experts) -> list[list[torch.Tensor]]:
    """Of each expert copies of the parameters that no other expert has."""
    if experts.K == 1:
        parts = [[p for p in experts.parameters() if p.requires_grad]]
    elif isinstance(experts, Models):
        parts = [[*model.parameters()] for model in experts.models]
    else:
        rows = [p for n, p in experts.named_parameters() if n.rpartition(".")[2] in ("A", "B", "W_k")]
        parts = [[p[k] for p in rows] for k in range(experts.K)]
    return [[p.detach().clone() for p in part] for part in parts]


def stays_and_learns(config, experts, reference, frozen, own, logp) -> None:
    after = frozen_parts(experts, config)
    moved = [name for name, p in frozen.items() if not torch.equal(p, after[name])]
    assert not moved, f"frozen, and moved: {moved[:3]}"
    assert torch.equal(logp, reference.logp), "the reference moved"
    still = [k for k, (a, b) in enumerate(zip(own, own_parts(experts))) if all(map(torch.equal, a, b))]
    assert still == [*config.frozen], f"experts that never moved: {still}, frozen are {config.frozen}"


def differences(a: Path, b: Path) -> list[str]:
    """The tensors and files in which two finished runs differ."""
    x, y = tinyjob.tensors(a), tinyjob.tensors(b)
    both = x.keys() & y.keys()
    off = [*sorted(x.keys() ^ y.keys()), *(name for name in both if not torch.equal(bits(x[name]), bits(y[name])))]
    files = ("metrics.jsonl", "responsibilities.jsonl")
    return off + [name for name in files if (a / name).read_text() != (b / name).read_text()]


def bits(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous().view(-1).view(torch.uint8)


def evaluates(job: Job, options: dict, run: Path, monkeypatch) -> None:
    """Evaluates the run on the pairs that it was trained on, with others behind them, and on new users."""
    drop, aside, seen = options.get("drop", False), options["data"].endswith("aside.jsonl"), {}
    heldout, adapt = (job.file(drop, aside, kind) for kind in ("heldout", "adapt"))
    real = evaluation.margins_of

    def margins_of(runs, references, tokenizer, path, store, columns):
        for found in real(runs, references, tokenizer, path, store, columns):
            seen[Path(path).name] = found
            yield found

    with monkeypatch.context() as patch:
        patch.setattr(evaluation, "margins_of", margins_of)
        evaluation.evaluate(evaluation.EvalConfig(dir=str(run), heldout=str(heldout), adapt=str(adapt)))
    results = strict_json((run / "results.json").read_text(), "results.json")
    numbers = [*numbers_of(results["preferences"], "preferences"), *numbers_of(results["adapt"], "adapt")]
    empty = [path for path, value in numbers if isinstance(value, (str, type(None))) and not path.endswith(NOBODY)]
    assert len(numbers) > 50 and not empty, f"no finite number: {empty[:5]}"
    for name in ("metrics.jsonl", "responsibilities.jsonl"):
        for line in (run / name).read_text().splitlines():
            strict_json(line, name)
    if (run / "privacy.json").exists():
        strict_json((run / "privacy.json").read_text(), "privacy.json")
    table = tinyjob.tensors(run)["table"]
    assert not table.isnan().any(), f"responsibilities of {int(table.isnan().any(1).sum())} units are NaN"
    finds_the_responsibilities_again(*seen[heldout.name])


NOBODY = ("/own/0", "/own_other/0",     # null where one expert stands for everybody,
          "/user_of_pair")              # and where weights are not of users


def strict_json(text: str, name: str):
    def refuse(word):
        raise AssertionError(f"{name} holds {word}, which is not JSON")

    return json.loads(text, parse_constant=refuse)


def numbers_of(value, path: str):
    """(path, leaf) of all numbers, nulls and infinities, which JSON has as text."""
    if isinstance(value, dict):
        for key, part in value.items():
            yield from numbers_of(part, f"{path}/{key}")
    elif isinstance(value, list):
        for n, part in enumerate(value):
            yield from numbers_of(part, f"{path}/{n}")
    elif not isinstance(value, str) or value in ("inf", "-inf"):
        yield path, value


def finds_the_responsibilities_again(run, pairs, h, log_w) -> None:
    """M11 by evaluation's functions, on the training pairs, which stand first."""
    if run.config.experts == 1 or run.config.estep == "first":              # a first visit is kept
        return
    if run.config.estep == "context":                                       # trained on after the last E-step
        return
    visits = {}
    for visit in run.plan.visits:
        visits.setdefault(visit.unit, []).extend(visit.trained)
    slack = 1e-5 if run.config.dtype == "float32" else 5e-3
    line = {pair.line: n for n, pair in enumerate(pairs)}
    for u, shown in visits.items():
        shown = [line[run.plan.pairs[i].line] for i in shown]
        q = weights_after(log_w, h, shown, shown[:1])[0].exp()
        off = (q - run.table[u].exp()).abs().max()
        assert off <= slack, f"unit {u}: q is {run.table[u].exp().tolist()} in training, {q.tolist()} in evaluation"


# --- another cut ------------------------------------------------------------------------------------------------------


def other_cut(options: dict) -> dict:
    """The same steps in other micro-batches and head micro-batches."""
    return {"micro": 2, "head_rows": options.get("head_rows", 7)}


def same_but_for_rounding(a: Path, b: Path, options: dict) -> None:
    """The figures of all steps, and the last responsibilities."""
    slack = 3e-5 if options["dtype"] == "float32" else 0.05                 # five times what was seen
    for x, y in zip(*(tinyjob.lines(run / "metrics.jsonl") for run in (a, b)), strict=True):
        for name in ("loss", "log_marginal", "elbo", "margin", "q", "w", "pairs"):
            if x[name] != y[name]:
                assert y[name] == pytest.approx(x[name], rel=slack, abs=slack, nan_ok=True), f"step {x['step']}: {name}"
        assert y["grad_norm"] == pytest.approx(x["grad_norm"], rel=slack, abs=slack), f"step {x['step']}: grad_norm"
    p, q = (tinyjob.tensors(run)["table"].exp() for run in (a, b))
    assert (p - q).abs().max() <= slack, "the responsibilities of all pairs at the end"
