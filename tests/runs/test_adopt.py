"""mixdpo/runs/init_experts.py and experts with references of their own. Each docstring names the faults that the
test was seen to catch."""

import json

import pytest
import tinyjob
import torch
from raising import raises_at

import train
from eval import EvalConfig, evaluate
from mixdpo.dpo import margins
from mixdpo.gates import Inputs
from mixdpo.mixture import log_marginal
from mixdpo.models.weights import load_model
from mixdpo.preferences import read_preferences
from mixdpo.runs.checkpoint import trained_state
from mixdpo.runs.load_run import load_experts, load_run
from mixdpo.runs.parallel import logp_in_parts
from mixdpo.runs.reference import compute_reference
from mixdpo.text.tokenizer import load_tokenizer

IDS = torch.arange(20)[None]
KINDS = {
    "low-rank heads": dict(sharing="heads", train_trunk=False),
    "full heads": dict(sharing="heads", train_trunk=False, rank=0),
    "adapters": dict(sharing="lora"),
    "models": dict(sharing="models"),
}


@pytest.fixture(scope="module")
def sources(tmp_path_factory, model_dir):
    """A finished run of every kind, of two experts, and one of DPO; lines of other users than later runs have."""
    folder, records = tmp_path_factory.mktemp("sources"), tinyjob.make_records(seed=3)
    made = {kind: tinyjob.run(folder, model_dir, records, name=kind.replace(" ", "-"), epochs=4, latent="user",
                              start="linear", start_steps=9, batch=9, **options
                              | ({"lr": 1e-2} if "lr" in tinyjob.small(**options) else {"head_lr": 3e-2}))
            for kind, options in KINDS.items()}
    head = tinyjob.run(folder, model_dir, records, name="head", experts=1, train_trunk=False, head_lr=3e-2)
    return made | {"dpo": tinyjob.run(folder, model_dir, records, name="dpo", experts=1), "head": head}


def logits(run, k):
    """Of expert k on a fixed text, by policy(k)."""
    model, head = load_experts(run, "cpu", "")[1].policy(k)
    with torch.no_grad():
        return model(IDS)[0] @ head.T


def begin(tmp_path, model_dir, begun, name="new", **options):
    return tinyjob.run(tmp_path, model_dir, tinyjob.make_records(), name=name, start="none",
                       init_experts=",".join(begun), experts=len(begun), **options)


@pytest.mark.parametrize("kind", KINDS)
def test_a_frozen_expert_keeps_every_bit_and_the_others_learn(kind, sources, tmp_path, model_dir):
    """Faults: expert j for expert k; a fresh one that starts as the one taken over; a mask that freezes the others, or
    all; a frozen model left out of the checkpoint."""
    source = sources[kind]
    out = begin(tmp_path, model_dir, (f"{source}:1", "fresh", f"{source}:0"), freeze="0", epochs=2, **KINDS[kind])
    state = [trained_state(load_experts(run, "cpu", "")[1]) for run in (source, out)]
    rows = 0
    for name, now in state[1].items():
        if kind == "models":
            _, _, k, rest = name.split(".", 3)
            before = state[0][f"experts.models.1.{rest}"] if k == "0" else None
        else:
            before, now, k = state[0][name][1], now[0], "0"
        if before is not None:
            assert torch.equal(now, before), name
            rows += 1
    assert rows and torch.equal(logits(out, 0), logits(source, 1))
    began = {1: reference_logits(model_dir), 2: logits(source, 0)}
    learnt = [(logits(out, k) - other).abs().max() for k, other in began.items()]
    assert min(learnt) > 1e-4, "what is not frozen learns"


def reference_logits(model_dir):
    model = load_model(model_dir)
    with torch.no_grad():
        return model(IDS)[0] @ model.unembedding.T


@pytest.mark.parametrize("kind", KINDS)
def test_experts_begin_as_what_they_are_taken_from(kind, sources, tmp_path, model_dir):
    """Before any step. Faults: factors of another projection; a fresh one that is not the reference; the model's own
    head in place of the expert's."""
    begun = (f"{sources[kind]}:1", "fresh")
    options = tinyjob.small(**KINDS[kind]) | dict(start="none", init_experts=",".join(begun))
    options.pop("start_steps")
    data = tinyjob.write(tmp_path / "d.jsonl", tinyjob.make_records())
    experts = tinyjob.read(train.TrainConfig(data=data, model=str(model_dir), out=str(tmp_path / "r"), **options))[0]
    for k, want in enumerate((logits(sources[kind], 1), reference_logits(model_dir))):
        model, head = experts.policy(k)
        with torch.no_grad():
            assert torch.equal(model(IDS)[0] @ head.T, want), k


def test_a_single_head_becomes_an_expert_of_a_mixture(sources, tmp_path, model_dir):
    """A low-rank head trained with --experts 1. Fault: factors of one expert that do not fit into those of two."""
    out = begin(tmp_path, model_dir, (f"{sources['head']}:0", "fresh"), freeze="0", **KINDS["low-rank heads"])
    assert torch.equal(logits(out, 0), logits(sources["head"], 0))
    assert (logits(out, 0) - reference_logits(model_dir)).abs().max() > 1e-3


def test_whole_models_take_over_experts_of_any_kind(sources, tmp_path, model_dir):
    """DPO's model, a head (which unties its model), adapters merged. They train, are saved, and open again.
    Faults: the trunk's head for the expert's; an untied model that loads as a tied one."""
    begun = {"dpo": 0, "low-rank heads": 1, "full heads": 0, "adapters": 1, "models": 0}
    out = begin(tmp_path, model_dir, [f"{sources[kind]}:{k}" for kind, k in begun.items()], sharing="models",
                freeze="0,1,2,3,4", gate="linear")
    for n, (kind, k) in enumerate(begun.items()):
        assert torch.allclose(logits(out, n), logits(sources[kind], k), atol=1e-6), kind


@pytest.mark.parametrize("kind", KINDS)
def test_a_gate_alone_learns_on_frozen_experts(kind, sources, tmp_path, model_dir):
    """Modular deployment: on frozen experts of two tastes the gate finds each user's, and no expert moves.
    Faults: an expert that moves; a gate that does not; responsibilities of a start."""
    begun = [f"{sources[kind]}:{k}" for k in (0, 1)]
    out = begin(tmp_path, model_dir, begun, freeze="all", gate="user", latent="user", gate_lr=0.1, epochs=12, beta=1.0,
                **KINDS[kind])
    run = load_run(out, "cpu", "")
    w = run.gate(Inputs(torch.zeros(6, 0), torch.arange(1, 7))).exp()[:, 0]                 # of u0, ..., u5
    assert min(w[::2]) > max(w[1::2]) + 0.1 or min(w[1::2]) > max(w[::2]) + 0.1
    for k in (0, 1):
        assert torch.equal(logits(out, k), logits(sources[kind], k))


@pytest.mark.parametrize(("options", "option", "named"), [
    (dict(init_experts="RUN:0"), "init_experts", "2 experts"),
    (dict(init_experts="RUN:2,fresh"), "init_experts", "0 to 1"),
    (dict(init_experts="RUN,fresh"), "init_experts", "RUN:k"),
    (dict(init_experts="RUN:0,fresh", rank=3), "init_experts", "--rank"),
    (dict(init_experts="RUN:0,fresh", sharing="lora", train_trunk=True), "init_experts", "--sharing"),
    (dict(init_experts="RUN:0,fresh", start="linear"), "init_experts", "--start none"),
    (dict(init_experts="RUN:0,fresh", train_trunk=True), "init_experts", "--train-trunk false"),
    (dict(init_experts="SHARED:0,fresh", sharing="lora", train_trunk=True), "init_experts", "shared"),
    (dict(init_experts="OTHER:0,fresh"), "init_experts", "--model"), (dict(init_experts="NONE:0,fresh"), None, ""),
    (dict(freeze="2"), "freeze", "0 to 1"), (dict(freeze="0,0"), "freeze", "0 to 1"),
    (dict(freeze="all"), "freeze", "--gate"), (dict(freeze="x"), "freeze", "'x'"),
    (dict(experts=1, freeze="0", train_trunk=True), "freeze", "--experts"),
    (dict(model="MODEL,MODEL,MODEL", sharing="models", train_trunk=True), "model", "2 experts"),
])
def test_what_does_not_fit_is_refused(options, option, named, sources, tmp_path, model_dir):
    """And nothing is written. Caught too: an adapter taken over without the part that its run's experts share."""
    other = tinyjob.make_model(tmp_path / "other", seed=1)
    if "OTHER" in options.get("init_experts", ""):
        tinyjob.run(tmp_path, other, tinyjob.make_records(), name="elsewhere", **KINDS["low-rank heads"])
    if "SHARED" in options.get("init_experts", ""):
        tinyjob.run(tmp_path, model_dir, tinyjob.make_records(), name="together", sharing="lora", shared_rank=2)
    places = {"RUN": sources["low-rank heads"], "SHARED": tmp_path / "together", "OTHER": tmp_path / "elsewhere",
              "NONE": tmp_path / "none", "MODEL": model_dir}
    for word, place in places.items():
        options = {name: str(value).replace(word, str(place)) if word in str(value) else value
                   for name, value in options.items()}
    begins = {"start": "none"} if "init_experts" in options else {}
    with raises_at(named, option=option, file=None if option else tmp_path / "none"):
        tinyjob.run(tmp_path, options.pop("model", model_dir), tinyjob.make_records(), name="bad",
                    **dict(train_trunk=False) | begins | options)
    assert not (tmp_path / "bad").exists()


def test_models_with_references_of_their_own(tmp_path, model_dir):
    """Margins are 0 at the start for each, and later those against each one's own; evaluation computes the same.
    Faults: the first reference for all (training, then evaluation); references exchanged."""
    other = tinyjob.make_model(tmp_path / "other", seed=1)
    both, records = f"{model_dir},{other}", tinyjob.make_records()
    out = tinyjob.run(tmp_path, both, records, name="train", sharing="models", beta=0.5)
    run, tokenizer = load_run(out, "cpu", ""), load_tokenizer(model_dir)
    first = json.loads((out / "metrics.jsonl").read_text().splitlines()[0])
    assert max(map(abs, first["margin"])) < 1e-5, "policies are their references before the first step"
    (tmp_path / "heldout.jsonl").write_text((tmp_path / "train.jsonl").read_text())
    got = evaluate(EvalConfig(dir=str(out)))["preferences"]["train"]
    pairs = read_preferences(tmp_path / "heldout.jsonl", tokenizer, 256, 256, False)
    logp = logp_in_parts(run.experts, pairs, "again")
    h = [margins(logp[:, k], compute_reference(load_model(place), pairs, torch.float32).logp[:, 0], 0.5)
         for k, place in enumerate((model_dir, other))]
    want = log_marginal(torch.full((len(pairs), 2), 0.5).log(), torch.stack(h, 1)).mean()
    assert abs(got["log_likelihood"]["mean"] - float(want)) < 1e-5
    assert min(each.abs().max() for each in h) > 0.01


def test_models_of_different_tokenizers_are_refused(tmp_path, model_dir):
    """Fault: the second model's tokenizer is not looked at."""
    other = tinyjob.make_model(tmp_path / "other", seed=1)
    file = other / "tokenizer.json"
    document = json.loads(file.read_text())
    vocab = document["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    file.write_text(json.dumps(document))
    with raises_at(other, model_dir, option="model"):
        tinyjob.run(tmp_path, f"{model_dir},{other}", tinyjob.make_records(), sharing="models")


def test_the_first_e_step_reads_the_experts_that_a_run_begins_with(sources, tmp_path, model_dir, monkeypatch):
    """Faults: margins of the reference, all 0, in the place of theirs."""
    seen, e_step_of_all = [], train.visit_log_likelihoods

    def checked(state, problem, *rest):
        found = e_step_of_all(state, problem, *rest)
        if state.t == 0:
            pairs = problem.plan.pairs
            h = margins(logp_in_parts(state.experts, pairs, ""), problem.ref_logp, problem.config.beta)
            want = torch.stack([torch.nn.functional.logsigmoid(h[visit.context or visit.trained]).sum(0)
                                for visit in problem.plan.visits[: problem.plan.inferred]])
            seen.append((found, torch.log_softmax(want, -1)))
        return found

    monkeypatch.setattr(train, "visit_log_likelihoods", checked)
    source = sources["adapters"]
    begin(tmp_path, model_dir, (f"{source}:1", f"{source}:0"), latent="user", em="incremental", **KINDS["adapters"])
    (found, want), = seen
    assert torch.allclose(torch.log_softmax(found, -1), want, atol=1e-4) and want.std() > 0.05
