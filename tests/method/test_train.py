"""train.py end to end on a tiny model, against a slow twin of the whole loop.
Docstrings name the faults that each test was seen to fail on."""

import copy
import dataclasses
import json
import math
import re
import shutil
import types

import brute
import numpy as np
import pytest
import tinyjob
import torch
import torch.nn.functional as F
from raising import raises_at

import train
from mixdpo import start as start_module
from mixdpo.config import InputError, load
from mixdpo.experts import make_experts
from mixdpo.linear import random_responsibilities
from mixdpo.models.weights import load_model
from mixdpo.plan import batches, mark_context
from mixdpo.preferences import groups, read_preferences
from mixdpo.runs import reference as reference_module
from mixdpo.runs.reference import compute_reference
from mixdpo.runs.rules import validate_values
from mixdpo.text.tokenizer import load_tokenizer

USER, CONTEXT = {"latent": "user"}, {"latent": "user", "estep": "context", "context": 2}
CASES = {
    "dpo": {"experts": 1},
    "full heads": {"rank": 0},
    "low-rank heads": {"rank": 2},
    "heads alone": {"train_trunk": False},
    "one head alone": {"train_trunk": False, "experts": 1, "epochs": 2},
    "models": {"sharing": "models", "experts": 3},
    "users": USER | {"epochs": 2, "batch": 7},
    "users, models": USER | {"sharing": "models"},
    "context": CONTEXT | {"epochs": 4, "start_steps": 1},
    "context, composable": CONTEXT | {"epochs": 3, "start_steps": 1, "head_rows": 0},
    "context, one expert": CONTEXT | {"experts": 1, "epochs": 2},
    "context, linear": CONTEXT | {"epochs": 3, "start": "linear", "batch": 3},
    "context, updated weights": CONTEXT | {"epochs": 3, "start": "linear", "weights": "update", "prior": 2.0},
    "context, gate of users": CONTEXT | {"epochs": 3, "start_steps": 1, "gate": "user", "gate_temperature": 3.0,
                                         "gate_entropy": 0.05},
    "context, a long start": CONTEXT | {"epochs": 2, "start_steps": 99},
    "first visit": {"estep": "first", "epochs": 3, "start": "none"},
    "first visit, users": USER | {"estep": "first", "epochs": 2, "start": "none"},
    "given weights": {"weights": "0.2,0.8", "rank": 0},
    "updated weights": USER | {"weights": "update", "prior": 2.0, "epochs": 3},
    "learned gate": {"gate": "linear", "epochs": 3, "gate_temperature": 3.0, "gate_entropy": 0.05, "gate_balance": 0.3},
    "gate on the mean state": {"gate": "linear", "gate_features": "mean", "epochs": 2},
    "gate of users": USER | {"gate": "user", "epochs": 3},
    "incremental EM, users": USER | {"em": "incremental", "epochs": 3, "batch": 2, "start_steps": 1},
    "incremental EM, hard": USER | {"em": "incremental", "epochs": 3, "batch": 2, "variant": "hard"},
    "incremental EM, weights": USER | {"em": "incremental", "epochs": 3, "batch": 3, "weights": "update"},
    "incremental EM, gate of users": USER | {"em": "incremental", "epochs": 3, "batch": 4, "gate": "user",
                                             "gate_entropy": 0.05},
    "incremental EM, context": CONTEXT | {"em": "incremental", "epochs": 3, "batch": 2, "start_steps": 1,
                                          "variant": "tempered", "variant_temperature": 0.7},
    "incremental EM, linear and context": CONTEXT | {"em": "incremental", "epochs": 3, "batch": 2, "start": "linear"},
    "clipped": {"clip": 1e-3, "start": "none"},
    "checkpointing": {"checkpointing": True},
    "untied": {"rank": 0, "model": "untied"},
    "lora": {"sharing": "lora", "lr": train.TrainConfig.lr, "epochs": 2, "targets": "q_proj,up_proj"},
    "lora, shared part": {"sharing": "lora", "shared_rank": 1, "lr": train.TrainConfig.lr, "epochs": 2},
    "lora, users": USER | {"sharing": "lora", "lr": train.TrainConfig.lr, "experts": 3, "checkpointing": True},
}


SLICED = [case for case in CASES if case.startswith("incremental EM, ")]


@pytest.fixture(scope="session")
def untied_dir(tmp_path_factory):
    return tinyjob.make_model(tmp_path_factory.mktemp("untied"), tied=False)


# --- the slow twin ----------------------------------------------------------------------------------------------------


def slow_logp(hidden, head, prompt, response):
    """Summed log-prob of a response from full logits: one text, no padding."""
    logits = hidden @ head.T                                                # (T,V)
    logps = torch.log_softmax(logits[len(prompt) - 1 : -1], -1)
    return logps[torch.arange(len(response)), torch.tensor(response)].sum()


def merged(experts, reference, k):
    """Expert k of adapters as a function of ids, with gradient: the reference with W + 2 B_k A_k in the place of W;
    with a shared adapter W + 2 (B_0 A_0 + B_k A_k - mean_j B_j A_j)."""
    def change(f):
        if not experts.shared:
            return f.B[k] @ f.A[k]
        return f.B_0 @ f.A_0 + f.B[k] @ f.A[k] - sum(B @ A for A, B in zip(f.A, f.B)) / experts.K

    factors = {path: experts.trunk.get_submodule(path) for path in experts.targets}
    changed = {f"{path}.weight": reference.get_submodule(path).weight + 2 * change(f) for path, f in factors.items()}
    return lambda ids: torch.func.functional_call(reference, changed, (ids,))


def slow_margins(experts, reference, pair, beta):
    """h of one pair under each expert, (K,) with gradient."""
    out = []
    for k in range(experts.K):
        ratio = []
        for response in (pair.chosen, pair.rejected):
            ids = torch.tensor([pair.prompt + response])
            model = experts.models[k] if hasattr(experts, "models") else experts.trunk
            head = model.unembedding
            if hasattr(experts, "targets"):
                model = merged(experts, reference, k)
            if hasattr(experts, "A"):
                head = head + head @ experts.A[k] @ experts.B[k]
            elif hasattr(experts, "W_k"):
                head = experts.W_k[k]
            with torch.no_grad():
                ref = slow_logp(reference(ids)[0], reference.unembedding, pair.prompt, response)
            ratio.append(slow_logp(model(ids)[0], head, pair.prompt, response) - ref)
        out.append(beta * (ratio[0] - ratio[1]))
    return torch.stack(out)


class SlowGate:
    """A linear gate on each prompt's states, or one row of logits a user, unit by unit."""

    def __init__(self, config, model, pairs, units):
        K, self.config, self.temperature, self.named = config.experts, config, 1.0, {}
        if config.gate == "linear":
            with torch.no_grad():
                states = [model(torch.tensor([pairs[unit[0]].prompt]))[0] for unit in units]            # (T,C) each
            f = torch.stack([s[-1] if config.gate_features == "last" else s.mean(0) for s in states])
            self.f = (f - f.mean(0)) / f.std(0, correction=0) / math.sqrt(f.shape[1])                   # (G,C)
            self.named = {"gate.W": torch.nn.Parameter(torch.zeros(K, f.shape[1])),
                          "gate.b": torch.nn.Parameter(torch.zeros(K))}
        if config.gate == "user":
            self.named = {"gate.E": torch.nn.Parameter(torch.zeros(1 + len(units), K))}

    def log_w(self, g):
        named = self.named
        logits = named["gate.E"][g + 1] if "gate.E" in named else named["gate.W"] @ self.f[g] + named["gate.b"]
        return torch.log_softmax(logits / self.temperature, 0)

    def loss(self, used):
        """used: (unit, q, share of the unit) of every visit of the step."""
        if not self.named:
            return 0.0
        rows, total = [self.log_w(g) for g, _, _ in used], 0.0
        for (_, q, share), row in zip(used, rows):
            q = torch.tensor(q)
            one = torch.special.xlogy(q, q).sum() - (q * row).sum()
            if "gate.E" in self.named:
                one = one - (q * torch.log_softmax(self.named["gate.E"][0] / self.temperature, 0)).sum()
            total = total + share * (one + self.config.gate_entropy * (row.exp() * row).sum())
        mean = torch.stack(rows).exp().mean(0)
        return total + self.config.gate_balance * len(used) * (mean * mean.log()).sum()


def slow_evidence(config, pairs, units, model, w):
    """The linear start's evidence of each unit, (G,K), and its margins of all pairs, (P,K); zeros without it."""
    if (config.start, config.estep) != ("linear", "context"):
        return [[0.0] * config.experts for _ in units], torch.zeros(len(pairs), config.experts)
    features = torch.zeros(len(pairs), 2, model.unembedding.shape[1])
    for i, pair in enumerate(pairs):
        for side, response in enumerate((pair.chosen, pair.rejected)):
            with torch.no_grad():
                features[i, side] = model(torch.tensor([pair.prompt + response]))[0, len(pair.prompt) :].mean(0)
    plan, fixed = types.SimpleNamespace(pairs=pairs, units=units), config.gate == "fixed" and config.weights != "update"
    log_w = torch.tensor(w).log().expand(len(units), -1) if fixed else None
    evidence, linear = start_module.start_evidence(config, plan, features, log_w)
    assert linear.abs().max() > 0.1 and evidence.abs().max() > 0.1, "a start that says nothing tests nothing"
    return evidence.tolist(), linear


def slow_run(config):
    """The whole of train.run, pair by pair, q in Python floats.
    Returns parameters by name, table of q (G,K), w (K,)."""
    pairs = read_preferences(config.data, load_tokenizer(config.model), config.max_prompt, config.max_response)
    if config.estep == "context":
        pairs = mark_context(pairs, config.context, config.seed)
    model, units, K = load_model(config.model), groups(pairs, config.latent), config.experts
    reference, experts = copy.deepcopy(model), make_experts([model], config, torch.float32)
    named = {n: p for n, p in experts.named_parameters() if p.requires_grad}
    peak = {n: config.head_lr if n.split(".")[-1] in ("A", "B", "A_0", "B_0") else config.lr for n in named}
    slow_gate = SlowGate(config, model, pairs, units)
    named |= slow_gate.named
    peak |= dict.fromkeys(slow_gate.named, config.gate_lr)
    optimizer = torch.optim.AdamW([{"params": [p]} for p in named.values()], weight_decay=0.0, betas=(0.9, 0.99))
    w = [1 / K] * K if config.weights in ("uniform", "update") else [float(x) for x in config.weights.split(",")]
    start = None
    if config.start == "dirichlet":
        start = random_responsibilities(len(units), K, torch.Generator().manual_seed(config.seed)).exp()
    trained = [[i for i in unit if config.estep != "context" or not pairs[i].context] for unit in units]
    looked = [[i for i in unit if config.estep != "context" or pairs[i].context] for unit in units]
    visits = [(g, trained[g], looked[g]) for g in range(len(units))]
    if config.em == "incremental":                                          # a slice for every pair that is looked at
        cut = [(g, min(len(trained[g]), len(looked[g]))) for g in range(len(units))]
        visits = [(g, a.tolist(), b.tolist()) for g, n in cut
                  for a, b in zip(np.array_split(trained[g], n), np.array_split(looked[g], n))]

    def passes(visits):
        longest = [max(pairs[i].longest() for i in learns) for _, learns, _ in visits]
        return [[visits[v] for v in sorted(ids, key=lambda v: longest[v])] for e in range(config.epochs)
                for ids in batches([learns for _, learns, _ in visits], config.batch, config.seed, e)]

    plan = passes([(v, learns, g) for v, (g, learns, _) in enumerate(visits)])
    last_part = len(plan)                                                   # after it, context pairs are trained on
    if config.estep == "context":
        plan += passes([(v, [i], g) for v, (g, _, context) in enumerate(visits) for i in context])
    table, said, (evidence, linear) = {}, {}, slow_evidence(config, pairs, units, reference, w)

    def slow_h(g):
        return {i: slow_margins(experts, reference, pairs[i], config.beta) for i in units[g]}

    def says(v, h):
        return sum(F.logsigmoid((h[i].detach() + linear[i]).double()) for i in visits[v][2])                # (K,)

    def exact(g, h, other=0.0, variant=config.variant):
        """q of unit g by its pairs' margins; or, where they are not asked for, by what all its visits said."""
        prior = w if config.gate == "fixed" else slow_gate.log_w(g).exp().tolist()
        prior = [p * math.exp(e) for p, e in zip(prior, evidence[g])]
        if h is None:
            q = torch.softmax(torch.tensor(prior).double().log() + other, 0).tolist()
        else:
            judged = [(h[i] + linear[i]).tolist() for i in looked[g]]
            q = brute.user_posterior(prior, judged, [0] * len(judged))[1][0]
        if variant == "tempered":
            q = [x ** (1 / config.variant_temperature) for x in q]
            return [x / sum(q) for x in q]
        return [float(x == max(q)) for x in q] if variant == "hard" else q

    start_steps = 0 if config.start == "linear" else config.start_steps
    for t, step in enumerate([*plan, None]):
        if t == last_part and K > 1 and config.estep != "first":            # the last E-step, on all units
            slow_gate.temperature = 1.0
            table = {g: exact(g, slow_h(g), variant="exact") for g in range(len(units))}
        if step is None:
            break
        loss, used, count = 0.0, [], sum(len(learns) for _, learns, _ in step)
        slow_gate.temperature = config.gate_temperature ** max(0.0, 1 - 2 * t / len(plan))
        if config.em == "incremental" and config.latent == "user" and t >= start_steps and not said:
            said = {v: says(v, slow_h(g)) for v, (g, _, _) in enumerate(visits)}
        before = dict(said)
        for v, learns, g in step:
            h = slow_h(g)
            if t >= last_part:
                q = table[g] if K > 1 else [1.0]
            elif start is not None and t < start_steps and K > 1:
                q = start[g].tolist()
            elif config.estep == "first" and g in table:
                q = table[g]
            elif config.em == "incremental":
                now = says(v, h)
                said[v] = now
                q = exact(g, None, said[v] + sum(before[o] for o in before if visits[o][0] == g and o != v))
            else:
                q = exact(g, h)
            table[g] = q
            parts = sum(len(context) for u, _, context in visits if u == g) if t >= last_part else sum(
                u == g for u, _, _ in visits)                               # visits of g in this part of the run
            used.append((g, q, 1 / parts))
            loss = loss - sum((torch.tensor(q) * F.logsigmoid(h[i])).sum() for i in learns) / count
        loss = loss + slow_gate.loss(used) / count
        optimizer.zero_grad()
        loss.backward()
        norm = math.sqrt(sum(p.grad.square().sum().item() for p in named.values() if p.grad is not None))
        for (name, p), group in zip(named.items(), optimizer.param_groups):
            rest = len(plan) - config.warmup
            group["lr"] = peak[name] * ((t + 1) / config.warmup if t < config.warmup
                                        else 0.1 + 0.9 * (len(plan) - 1 - t) / rest)
            if p.grad is not None and norm > config.clip:
                p.grad *= config.clip / norm
        optimizer.step()
        if config.weights == "update":
            mean = np.array([table[g] for g in table])
            w = ((mean.sum(0) + config.prior - 1) / (len(mean) + K * (config.prior - 1))).tolist()
    return named, np.array([table[g] for g in range(len(units))]), w


@pytest.mark.parametrize("case", CASES)
def test_the_loop_equals_its_slow_twin(case, tmp_path, model_dir, untied_dir):
    """Faults: user's pairs not pooled; context pairs trained on, or q from the trained pairs; responsibilities
    of `first` not kept; loss divided by the micro-batch; no clipping; weights updated with another prior, or never;
    the start used for too long; head_lr for the trunk; a frozen trunk trained; the run's last responsibilities those of
    before its last step, or of the start, or of the trained pairs where there are context pairs; the gate's temperature
    not annealed; entropy and balance exchanged; the generic user not trained; a slice's log-likelihoods counted twice
    or never renewed; a variant at the last E-step. Of the last part: context pairs never trained on; with new
    responsibilities, or those of the start; the table computed again after it. The start's evidence, or its
    margins of context pairs, left out of the E-step of a step, or of the last one; evidence counted once a slice;
    the start's margins in the M-step; head_lr not for the shared adapter."""
    options = dict(CASES[case])
    model = untied_dir if options.pop("model", None) else model_dir
    rates = {"lr": 3e-4, "head_lr": 3e-3}
    options = {name: rate for name, rate in rates.items() if name in tinyjob.small(**options)} | {"beta": 0.5} | options
    records = tinyjob.make_records(users=4)
    if options.get("start") == "linear":                                    # else it finds no types in so few pairs
        records = tinyjob.make_records(users=4, each=4, letters=("aaab", "zzzy"))
    elif case in SLICED:                                                    # users of 2 to 6 slices
        records = [r for n, r in enumerate(tinyjob.make_records(users=4, each=6)) if n < 12 + 4 * (n % 4)]
    out = tinyjob.run(tmp_path, model, records, **options)
    config = load(train.TrainConfig, out / "config.json")
    named, table, w = slow_run(config)
    got, metrics = tinyjob.tensors(out), tinyjob.lines(out / "metrics.jsonl")
    for name, p in named.items():
        stored = got[name if name.startswith("gate.") else f"experts.{name}"]
        assert torch.allclose(stored, p, rtol=0, atol=2e-5), f"{name}: {(stored - p).abs().max():.2g}"
    assert np.allclose(got["table"].exp().numpy(), table, atol=1e-5)
    if config.gate == "fixed":
        assert np.allclose(got["gate.log_w"].exp().numpy(), w, atol=1e-5)
    else:
        assert max(p.abs().max() for name, p in named.items() if name.startswith("gate.")) > 1e-3
    assert [m["step"] for m in metrics] == list(range(1, len(metrics) + 1))
    assert metrics[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    of_experts = {n.removeprefix("experts.") for n in got if n.startswith("experts.")}
    assert of_experts == {n for n in named if not n.startswith("gate.")}
    assert not any(n.startswith("optimizer.") for n in got)                 # a finished run needs no moments
    assert "alone" not in case or set(named) == {"A", "B"}


# --- step 0 -----------------------------------------------------------------------------------------------------------


def test_a_reference_of_another_model_stops_before_the_first_step(tmp_path, model_dir, monkeypatch):
    """Fault: the reference's log-probs are another model's (put in here); and check_start not called."""
    other = load_model(tinyjob.make_model(tmp_path / "other", seed=1))
    monkeypatch.setattr(reference_module, "compute_reference",
                        lambda model, *rest, **more: compute_reference(other, *rest, **more))
    with pytest.raises(AssertionError, match="margins at step 0.*policy and reference differ"):
        tinyjob.run(tmp_path, model_dir, tinyjob.make_records())
    assert not (tmp_path / "run" / "checkpoint").exists()


@pytest.mark.parametrize("name,fault,says", [
    ("e_step", lambda e: lambda w, h, g=None: (e(w, h, g)[0], torch.full_like(h, -math.log(2))),
     "responsibilities at step 0"),
    ("e_step", lambda e: lambda w, h, g=None: (e(w, h, g)[0] + 0.1, e(w, h, g)[1]), "off ln 2"),
    ("elbo", lambda e: lambda *a: e(*a) - 1e-3, "bound is .* below"),
])
def test_the_other_invariants_of_step_0(tmp_path, model_dir, monkeypatch, name, fault, says):
    """Faults (put in here): q uniform whatever w is; a wrong marginal; a loose bound. And each assertion taken out."""
    monkeypatch.setattr(start_module, name, fault(getattr(start_module, name)))
    with pytest.raises(AssertionError, match=says):
        tinyjob.run(tmp_path, model_dir, tinyjob.make_records(), weights="0.2,0.8")


# --- the saddle -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"rank": 0}, {"sharing": "models"}])
def test_without_a_start_equal_experts_stay_equal_and_with_one_they_part(options, tmp_path, model_dir):
    """Faults: noise on the heads' copies; start=none ignored; start_steps 0 where dirichlet was asked for."""
    options = options | dict(epochs=2, beta=0.5)
    for start in ("none", "dirichlet"):
        out = tinyjob.run(tmp_path, model_dir, tinyjob.make_records(), name=start, start=start, **options)
        got, spread = tinyjob.tensors(out), 0.0
        for name, p in got.items():
            if name == "experts.W_k":
                spread = max(spread, (p[0] - p[1]).abs().max().item())
            elif name.startswith("experts.models.0."):
                spread = max(spread, (p - got[name.replace("models.0.", "models.1.")]).abs().max().item())
        off = (got["table"].exp() - 0.5).abs().max().item()
        margin = np.ptp(tinyjob.lines(out / "metrics.jsonl")[-1]["margin"])
        if start == "none":
            assert spread < 1e-6 and off < 1e-5 and margin < 1e-5, (spread, off, margin)
        else:
            assert spread > 1e-3 and off > 1e-2 and margin > 1e-3, (spread, off, margin)


# --- what training looks at -------------------------------------------------------------------------------------------


def test_context_pairs_are_not_trained_on_before_the_last_part(tmp_path, model_dir):
    """Fault: the M-step takes all pairs. With one expert q is 1, so context pairs turned round must change nothing
    before the last part, and something in it; other pairs must from their first step on."""
    records = [r | {"context": n < 6} for n, r in enumerate(tinyjob.make_records())]

    def turned(context):
        return [r | {"chosen": r["rejected"], "rejected": r["chosen"]} if r["context"] == context else r
                for r in records]

    options = dict(experts=1, latent="user", estep="context", epochs=2)
    runs = [tinyjob.run(tmp_path, model_dir, data, name=f"run{n}", **options)
            for n, data in enumerate((records, turned(True), turned(False)))]
    rows = [tinyjob.lines(run / "metrics.jsonl") for run in runs]
    assert [row["pairs"] for row in rows[0]] == [8, 4, 8, 4, 6, 6] and len(records) == 18
    assert rows[0][:4] == rows[1][:4] and rows[0][4]["loss"] != rows[1][4]["loss"]
    assert rows[0][1]["loss"] != rows[2][1]["loss"] and not tinyjob.equal(runs[0], runs[1])


@pytest.mark.parametrize("options", [{}, {"em": "incremental", "batch": 4}, {"start": "linear"}], ids=str)
def test_the_final_table_does_not_depend_on_what_the_last_part_learns(options, tmp_path, model_dir, monkeypatch):
    """A run whose last part is undone after each step has the same responsibilities, to the bit, and other experts.
    Caught: responsibilities computed again after the last part, in its steps, or at its end."""
    real, undone = train.step, []

    def undo(state, problem, em):
        late = state.t >= problem.plan.last_part
        before = {name: p.detach().clone() for name, p in state.experts.named_parameters()}
        found = real(state, problem, em)
        with torch.no_grad():
            for name, p in state.experts.named_parameters() if late else ():
                p.copy_(before[name])
        undone.append(late)
        return found

    options = CONTEXT | dict(epochs=2, head_lr=3e-2, beta=0.5) | options
    whole = tinyjob.run(tmp_path, model_dir, tinyjob.make_records(), name="whole", **options)
    monkeypatch.setattr(train, "step", undo)
    other = tinyjob.run(tmp_path, model_dir, tinyjob.make_records(), name="undone", **options)
    assert True in undone and False in undone and undone == sorted(undone)
    assert tinyjob.equal(whole, other, only="table") and not tinyjob.equal(whole, other, only="experts")
    last = tinyjob.lines(whole / "responsibilities.jsonl")[-1]
    table = tinyjob.tensors(whole)["table"].exp()
    assert (table - 0.5).abs().max() > 1e-3 and torch.allclose(torch.tensor(last["q"]), table, atol=1e-4)
    for line in tinyjob.lines(whole / "responsibilities.jsonl")[undone.index(True) :]:
        assert torch.allclose(torch.tensor(line["q"]), table[line["groups"]], atol=1e-4)


def test_first_freezes_responsibilities_at_the_first_visit_and_all_does_not(tmp_path, model_dir):
    """Faults: `first` computes them anew at every visit; `all` keeps them."""
    for estep, frozen in (("first", True), ("all", False)):
        options = dict(estep=estep, epochs=3, start="none", beta=1.0)
        out, seen = tinyjob.run(tmp_path, model_dir, tinyjob.make_records(), name=estep, **options), {}
        for line in tinyjob.lines(out / "responsibilities.jsonl"):
            for g, q in zip(line["groups"], line["q"]):
                seen.setdefault(g, []).append(q)
        assert all(len(visits) == 3 + (not frozen) for visits in seen.values()) and len(seen) == 18    # and the last
        assert all(v[0] == v[1] == v[2] for v in seen.values()) == frozen
    assert any(abs(v[0][0] - 0.5) > 0.01 for v in seen.values())


def test_the_linear_start_finds_planted_users(tmp_path, model_dir, capsys):
    """Faults: features of the chosen text alone; groups shuffled against pairs; features of the prompt.
    Users stand in no order in the file."""
    records = tinyjob.make_records(users=10, each=6, letters=("aaab", "zzzy"))
    paths = dict(data=tinyjob.write(tmp_path / "d.jsonl", records), model=str(model_dir), out=str(tmp_path / "r"))
    config = train.TrainConfig(**tinyjob.SMALL | paths, latent="user", start="linear")
    _, plan, reference, _ = tinyjob.read(config)
    pairs, units = plan.pairs, plan.units
    q = start_module.first_responsibilities(config, units, reference.features).exp()
    found, truth = q.argmax(1).tolist(), [int(pairs[unit[0]].user[1:]) % 2 for unit in units]
    assert brute.best_matching(found, truth, 2) == 1.0 and q.max(1).values.min() > 0.8
    assert re.search(r"best bound of 5 fits -[0-9.]+ nats \(all:( -[0-9.]+,?){5}\)", capsys.readouterr().out)
    out = tinyjob.run(tmp_path, model_dir, records, name="d", latent="user", start="linear", start_steps=1000, batch=30)
    for line in tinyjob.lines(out / "responsibilities.jsonl")[:-1]:        # and these are what the M-step used
        assert torch.allclose(torch.tensor(line["q"]), q[line["groups"]], atol=1e-4)


def test_the_linear_start_is_part_of_every_e_step_on_context_pairs(tmp_path, model_dir, monkeypatch):
    """The experts' margins are 0 at the first step, so its responsibilities are those of the linear rewards on all
    pairs, softmax(log w + evidence of training pairs + log sigma of context pairs' margins), and planted users are
    found at once. Caught: evidence, or the margins, ignored at the first step; the prior left out; steps on the start's
    responsibilities as with other E-steps."""
    records, w = tinyjob.make_records(users=10, each=6, letters=("aaab", "zzzy")), torch.tensor([0.3, 0.7])
    folds = start_module.fold_margins
    monkeypatch.setattr(start_module, "fold_margins", lambda *arguments: 0.1 * folds(*arguments))   # less sure
    paths = dict(data=tinyjob.write(tmp_path / "d.jsonl", records), model=str(model_dir), out=str(tmp_path / "r"))
    options = CONTEXT | dict(start="linear", weights="0.3,0.7", batch=40)
    config = train.TrainConfig(**tinyjob.small(**options) | paths)
    _, plan, reference, _ = tinyjob.read(config)
    evidence, linear = start_module.start_evidence(config, plan, reference.features, w.log().expand(10, 2))
    context = [[i for i in unit if plan.pairs[i].context] for unit in plan.units]
    assert {len(unit) for unit in context} == {2} and not linear[[not pair.context for pair in plan.pairs]].any()
    said = torch.stack([F.logsigmoid(linear[unit]).sum(0) for unit in context])                     # (U,K)
    q, truth = torch.softmax(w.log() + evidence + said, 1), [int(plan.pairs[u[0]].user[1:]) % 2 for u in plan.units]
    assert brute.best_matching(q.argmax(1).tolist(), truth, 2) == 1.0
    for part in (evidence + said, w.log() + evidence, w.log() + said):
        assert (torch.softmax(part, 1) - q).abs().max() > 1e-3, "each part makes a difference"
    out = tinyjob.run(tmp_path, model_dir, records, name="d", **options)
    line = tinyjob.lines(out / "responsibilities.jsonl")[0]
    assert sorted(line["groups"]) == list(range(10))
    assert torch.allclose(torch.tensor(line["q"]), q[line["groups"]], atol=1e-4)


def test_a_linear_start_that_finds_no_types_still_breaks_the_tie(tmp_path, model_dir, monkeypatch, capsys):
    """It warns that random responsibilities are used. Caught: with --estep context they are not, and equal experts stay
    equal for ever."""
    monkeypatch.setattr(start_module, "differ", lambda fit: False)
    for options in (USER, CONTEXT):
        out = tinyjob.run(tmp_path, model_dir, tinyjob.make_records(), name=options.get("estep", "all"), epochs=3,
                          sharing="models", start="linear", **options)
        assert (tinyjob.tensors(out)["table"].exp() - 0.5).abs().max() > 1e-4, options


def test_features_are_the_mean_states_of_the_response(tmp_path, model_dir):
    """Faults: the states that predict the tokens; the prompt's among them; padding counted."""
    data = tinyjob.write(tmp_path / "d.jsonl", tinyjob.make_records())
    config = train.TrainConfig(**tinyjob.SMALL, data=data, model=str(model_dir), out=str(tmp_path / "r"))
    experts, plan, reference, _ = tinyjob.read(config)
    pairs = plan.pairs
    for i in (0, 5, 11):
        for side, response in enumerate((pairs[i].chosen, pairs[i].rejected)):
            with torch.no_grad():
                states = experts.trunk(torch.tensor([pairs[i].prompt + response]))[0, len(pairs[i].prompt) :]
            assert torch.allclose(reference.features[i, side], states.mean(0), atol=1e-5)


def test_results_depend_on_neither_micro_batches_nor_chunks(tmp_path, model_dir):
    """Faults: the loss divided by the micro-batch's pairs; a chunk's E-step on part of a user;
    a chunk's last pair lost."""
    options = dict(latent="user", epochs=2, batch=9, lr=1e-4, head_lr=1e-3)
    cuts = [(9, 0), (1, 0), (3, 1), (4, 30), (9, 1), (9, 40), (9, 10**6)]
    runs = [tinyjob.run(tmp_path, model_dir, tinyjob.make_records(), name=f"run{n}",
                        micro=micro, head_rows=rows, **options)
            for n, (micro, rows) in enumerate(cuts)]
    for run in runs[1:]:
        assert tinyjob.equal(runs[0], run, slack=1e-6)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile wants a C++ compiler")
def test_compiled_trunks_train_the_same(tmp_path, model_dir):
    """The start's checks pass, and checkpoints agree to rounding. Faults: the switch not looked at; a trunk compiled
    before its adapters are in it."""
    runs, graphs = [], torch._dynamo.utils.counters["stats"]
    for on in (False, True):
        before = graphs["unique_graphs"]
        runs.append(tinyjob.run(tmp_path, model_dir, tinyjob.make_records(), str(on), sharing="lora",
                                lr=train.TrainConfig.lr, compile=on))
        assert (graphs["unique_graphs"] > before) == on
    assert tinyjob.equal(*runs, slack=1e-4)


def test_annotators_and_scores_never_reach_training(tmp_path, model_dir):
    """Fault: the start, or the E-step, looks at `annotator`."""
    records = tinyjob.make_records()
    plain = [{k: v for k, v in r.items() if k not in ("annotator", "scores")} for r in records]
    other = [r | {"annotator": "nobody", "scores": {"x": [n, -n]}} for n, r in enumerate(records)]
    runs = [tinyjob.run(tmp_path, model_dir, data, name=f"run{n}", latent="user", start="linear")
            for n, data in enumerate((records, plain, other))]
    assert tinyjob.equal(runs[0], runs[1]) and tinyjob.equal(runs[0], runs[2])
    metrics = [(run / "metrics.jsonl").read_text() for run in runs]
    assert metrics[0] == metrics[1] == metrics[2]


def test_the_seed_and_only_the_seed_changes_a_run(tmp_path, model_dir):
    """Faults: a generator without a seed; the seed not used."""
    runs = [tinyjob.run(tmp_path, model_dir, tinyjob.make_records(), name=f"run{n}", seed=seed)
            for n, seed in enumerate((0, 0, 1))]
    assert tinyjob.equal(runs[0], runs[1]) and not tinyjob.equal(runs[0], runs[2])


# --- options that are refused -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("options,says", [                                   # the option, and values named with it
    ({"sharing": "trunk"}, "sharing 'trunk' heads lora models"), ({"latent": "group"}, "latent 'group'"),
    ({"estep": "some"}, "estep"), ({"start": "zero"}, "start"), ({"experts": 0}, "experts"), ({"batch": 0}, "batch"),
    ({"micro": 0}, "micro"), ({"epochs": 0}, "epochs"), ({"rank": -1}, "rank"), ({"beta": 0.0}, "beta"),
    ({"clip": 0.0}, "clip"), ({"head_rows": -2}, "head_rows"), ({"start_steps": -1}, "start_steps"),
    ({"lr": -1.0}, "lr"), ({"start": "linear", "restarts": 0}, "restarts"),
    ({"weights": "update", "prior": 0.5}, "prior"), ({"context": 2}, "context --estep"),
    ({"estep": "context", "context": 1}, "estep --latent"),
    ({"train_trunk": False, "experts": 1, "rank": 0}, "rank --experts --train-trunk"),
    ({"train_trunk": False, "experts": 1, "lr": 1e-3}, "lr --head-lr"),
    ({"train_trunk": False, "experts": 1, "sharing": "models"}, "sharing --experts"),
    ({"train_trunk": False, "sharing": "models"}, "train_trunk --sharing models"),
    ({"estep": "first", "start": "dirichlet", "start_steps": 1}, "estep --start --start-steps"),
    ({"prior": 2.0}, "prior --weights"), ({"restarts": 9}, "restarts --start"),
    ({"experts": 1, "weights": "update"}, "weights --experts"), ({"experts": 1, "start": "linear"}, "start --experts"),
    ({"experts": 1, "sharing": "models"}, "sharing --experts"),
    ({"experts": 1, "start_steps": 3}, "start_steps --start"),
    ({"start": "none", "start_steps": 3}, "start_steps --start"),
    ({"experts": 1, "rank": 2}, "rank --experts --train-trunk --sharing"),
    ({"sharing": "models", "rank": 2}, "rank --sharing"), ({"rank": 0, "head_lr": 0.1}, "head_lr"),
    ({"targets": "q_proj"}, "targets --sharing"), ({"sharing": "lora", "rank": 0}, "rank --sharing"),
    ({"shared_rank": 2}, "shared_rank --sharing"), ({"sharing": "models", "shared_rank": 2}, "shared_rank --sharing"),
    ({"sharing": "lora", "shared_rank": -1}, "shared_rank"),
    ({"sharing": "lora", "lr": train.TrainConfig.lr, "shared_rank": 2, "freeze": "0"}, "freeze --shared-rank"),
    ({"sharing": "lora", "lr": train.TrainConfig.lr, "shared_rank": 2, "init_experts": "a:0,fresh", "start": "none"},
     "init_experts --shared-rank"),
    (CONTEXT | {"start": "linear", "start_steps": 3}, "start_steps --start linear --estep context"),
    ({"sharing": "lora", "train_trunk": False}, "train_trunk --sharing lora"),
    ({"sharing": "lora", "lr": 1e-3}, "lr --head-lr"), ({"train_trunk": False, "lr": 1e-3}, "lr --head-lr"),
    ({"sharing": "lora", "lr": train.TrainConfig.lr, "targets": "q_proj,c_attn"},
     "targets 'c_attn' down_proj gate_proj k_proj o_proj q_proj up_proj v_proj"),
    ({"weights": "0.5,0.2,0.3"}, "weights '0.5,0.2,0.3'"), ({"weights": "1,0"}, "weights"),
    ({"weights": "uniformly"}, "weights 'uniformly'"), ({"dtype": "half"}, "dtype 'half'"),
    pytest.param({"packing": True}, "packing", marks=pytest.mark.skipif(torch.cuda.is_available(), reason="has CUDA")),
])
def test_wrong_and_contradictory_options_are_refused_before_anything_is_written(options, says, tmp_path, model_dir):
    """Faults: each check taken out; an option that has no effect ignored in silence; a run directory left behind."""
    option, *named = says.split()
    with raises_at(*named, option=option):
        tinyjob.run(tmp_path, model_dir, tinyjob.make_records(), **options)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run.jsonl"]


@pytest.mark.parametrize("options, steps", [
    ({}, 7), ({"start": "linear"}, 7), ({"start": "none"}, 0), ({"experts": 1}, 0), (CONTEXT, 7),
    (CONTEXT | {"start": "linear"}, 0), ({"estep": "first", "start": "linear"}, 7)], ids=str)
def test_steps_whose_responsibilities_are_those_of_the_start(options, steps):
    """Caught: first steps without an E-step where the start is part of it; none where it is not."""
    assert train.TrainConfig("prefs.jsonl", "smollm2", "out", start_steps=7, **options).known_steps == steps


NUMBERS = {f.name: f.type for f in dataclasses.fields(train.TrainConfig) if f.type in (int, float)}
MAY_BE = {math.inf: {"clip", "epsilon", "save_minutes"}, -1: {"head_rows"},
          0: {"rank", "shared_rank", "context", "gate_entropy", "gate_balance", "robust", "label_noise", "examples",
              "start_steps", "head_rows", "warmup", "seed", "save_minutes"}}


@pytest.mark.parametrize("name", NUMBERS)
def test_every_number_is_in_its_range(name):
    """NaN, infinities, -1 and 0 for every number of the command line. Catches: NaN, which is neither below nor above a
    bound; --beta inf, whose margins are NaN; --seed -1 and --max-prompt 0, which fail later with a traceback."""
    config = train.TrainConfig("prefs.jsonl", "smollm2", "out")
    for value in (-1, 0, *((math.nan, math.inf, -math.inf, 1e39) if NUMBERS[name] is float else ())):
        changed = dataclasses.replace(config, **{name: NUMBERS[name](value)})
        if name in MAY_BE.get(value, ()):
            validate_values(changed)
            continue
        with pytest.raises(InputError) as caught:
            validate_values(changed)
        assert caught.value.option == name, value


@pytest.mark.parametrize("seed", [-1, 2**32, 2**32 + 5, 10**23])
def test_a_seed_that_would_not_be_read_whole_is_refused(seed):
    """Catches: a seed of which a generator on a CPU reads the low 32 bits, so that 2^32 + 5 is 5; a traceback."""
    with pytest.raises(InputError) as caught:
        validate_values(train.TrainConfig("prefs.jsonl", "smollm2", "out", seed=seed))
    assert caught.value.option == "seed"
    validate_values(train.TrainConfig("prefs.jsonl", "smollm2", "out", seed=2**32 - 1))


@pytest.mark.parametrize("weights", ["0.3,,0.7", "0.3,0.7,", "inf,1", "nan,1", "3e38,3e38", "1e-50,1", "-1,2", ""])
def test_weights_are_positive_numbers(weights):
    """Catches: an empty place skipped; infinite weights, or a sum that is, whose logarithms are NaN."""
    with pytest.raises(InputError) as caught:
        validate_values(train.TrainConfig("prefs.jsonl", "smollm2", "out", weights=weights))
    assert caught.value.option == "weights"


def test_the_configuration_is_printed_and_saved(tmp_path, model_dir, capsys):
    """Fault: defaults left out of what is saved."""
    out = tinyjob.run(tmp_path, model_dir, tinyjob.make_records())
    saved = json.loads((out / "config.json").read_text())
    printed = capsys.readouterr().out
    assert saved.keys() == {f.name for f in dataclasses.fields(train.TrainConfig)} and "{" not in printed
    for name in ("batch", "head_lr", "out"):
        assert f"--{name.replace('_', '-')} {saved[name]}" in printed
    assert "--beta" not in printed and str(out / "config.json") in printed  # at its default
    assert all(f"{fact} " in printed for fact in ("revision", "torch", "python", "device", "threads"))


def test_users_who_are_served_worst_count_more(tmp_path, model_dir):
    """--robust: one user judges against all others. Its weight is the largest, and experts become others;
    an option that finds no users is refused. Catches: weights of groups for those of users, the best served raised,
    weights lost in a checkpoint, an option that does nothing."""
    records = tinyjob.make_records(users=6, each=4)
    for record in records:
        if record["user"] != "u0":
            record["chosen"], record["rejected"] = sorted((record["chosen"], record["rejected"]))   # as all others do
        else:
            record["rejected"], record["chosen"] = sorted((record["chosen"], record["rejected"]))
    options = dict(experts=1, epochs=8, batch=24, micro=12, lr=3e-3)
    plain, robust = (tinyjob.run(tmp_path, model_dir, records, str(rate), robust=rate, **options) for rate in (0., 1.))
    v = tinyjob.tensors(robust)["log_v"].exp()
    assert v.argmax() == 1 and records[0]["user"] == "u0" and v[1:].mean() == pytest.approx(1)
    assert v[0] == 0 and "log_v" not in tinyjob.tensors(plain)
    assert not tinyjob.equal(plain, robust, only="experts")
    with raises_at(file=tmp_path / "nameless.jsonl", option="robust"):
        nameless = [{k: r[k] for k in ("prompt", "chosen", "rejected")} for r in records]
        tinyjob.run(tmp_path, model_dir, nameless, "nameless", robust=0.1, **options)


@pytest.mark.parametrize("options", [{"rank": 0}, {"rank": 2}, {"sharing": "models", "experts": 3},
                                     {"sharing": "lora", "lr": train.TrainConfig.lr}], ids=str)
def test_equal_experts_share_what_hard_responsibilities_give(options, tmp_path, model_dir):
    """--variant hard --start none: in the first step every expert is the reference, and none is the likeliest. Catches:
    all pairs to expert 0, so that the run is DPO and does not say so; a tie that rounding decides."""
    out = tinyjob.run(tmp_path, model_dir, tinyjob.make_records(), variant="hard", start="none", **options)
    K = options.get("experts", 2)
    q = tinyjob.lines(out / "responsibilities.jsonl")[0]["q"]
    assert all(row == pytest.approx([1 / K] * K, abs=1e-4) for row in q)


def test_weighted_pairs_have_weighted_gradients(model_dir):
    """Two groups' weights against the gradients of each alone. Catches: the mean of weights divided out, weights of the
    wrong group's pairs, chunks that begin at the first group's weight."""
    import small

    from mixdpo.variants.robust import RobustWeights

    config = small.config(latent="user", rank=3, batch=6, micro=6, head_rows=5)
    problem = small.problem(config, small.pairs(6, users=2), small.reference_logp(6))

    def gradients(weight):
        experts, robust = small.experts(rank=3), RobustWeights(torch.tensor([1, 2]), 0.1, "")
        robust.log_v = torch.tensor([0.0, *weight]).log()
        small.accumulate(experts, problem, torch.tensor([0.5, 0.5]).log(), train.EM(weigh=robust.weigh))
        return [p.grad for p in experts.parameters() if p.grad is not None]

    one, other, both = (gradients(w) for w in ([1.0, 0.0], [0.0, 1.0], [0.5, 3.0]))
    for a, b, c in zip(one, other, both):
        assert torch.allclose(0.5 * a + 3.0 * b, c, rtol=1e-4, atol=1e-6)
    assert any((a - b).abs().max() > 1e-3 for a, b in zip(one, other))


@pytest.mark.parametrize("latent, nats", [("pair", math.log(2)), ("user", 3 * math.log(2))])
def test_the_objective_is_logged_by_unit(tmp_path, model_dir, latent, nats):
    """At step 0 every margin is 0: a user of three pairs has -3 ln 2 nats, less KL(q || w) of a random start. And EM
    raises it. Faults: the figure of pairs logged for users; the bound after the update."""
    options = dict(latent=latent, epochs=6, batch=18, train_trunk=False, head_lr=0.05)
    out = tinyjob.run(tmp_path, model_dir, tinyjob.make_records(users=6, each=3), start="none", **options)
    bounds = [line["bound"] for line in tinyjob.lines(out / "metrics.jsonl")]
    assert bounds[0] == pytest.approx(-nats, abs=1e-4) and bounds[-1] > bounds[0] + 0.01
    out = tinyjob.run(tmp_path, model_dir, None, name="random", data=str(tmp_path / "run.jsonl"), **options)
    q = torch.tensor(tinyjob.lines(out / "responsibilities.jsonl")[0]["q"])
    gain = (q * (q * 2).clamp_min(1e-9).log()).sum(1).mean()                # KL(q || uniform)
    assert tinyjob.lines(out / "metrics.jsonl")[0]["bound"] == pytest.approx(-nats - float(gain), abs=1e-3)
