"""Early stopping, mixdpo/runs/validation.py: what each test catches stands in its docstring."""

import pytest
import tinyjob
import torch
from raising import raises_at
from test_resume import Stopped, stop_at

import train
from mixdpo.evaluation.heldout import margins_of
from mixdpo.files.atomic import read_tensors, write_tensors
from mixdpo.preferences import groups
from mixdpo.runs.checkpoint import trained_state
from mixdpo.runs.load_run import load_run
from mixdpo.runs.reference import load_references

OPTIONS = dict(latent="user", epochs=12, head_lr=0.05, evaluate_every=4, beta=0.5)      # 0.05: it overfits
CASES = {"all pairs": {}, "context": dict(estep="context", context=1),
         "one expert": dict(experts=1, latent="pair", sharing="lora"),
         "adapters": dict(sharing="lora", shared_rank=2), "gate": dict(gate="user", gate_lr=0.5)}


def files(tmp_path):
    """Preferences to train on, and a file in which two of three choices are inverted: training makes it worse."""
    heldout = [r | ({"chosen": r["rejected"], "rejected": r["chosen"]} if n % 3 else {})
               for n, r in enumerate(tinyjob.make_records(seed=5))]
    return tinyjob.make_records(), tinyjob.write(tmp_path / "heldout.jsonl", heldout)


def likelihood(out, heldout):
    """Of a finished run, by users (M11), nats a pair."""
    run = load_run(out, "cpu", "")
    references, tokenizer = load_references(run.config, "cpu")
    (_, pairs, h, log_w), = margins_of([run], references, tokenizer, heldout, out.parent / "cache2")
    total = 0.0
    for unit in groups(pairs, run.config.latent):
        total += float(torch.logsumexp(log_w[unit[0]] + torch.nn.functional.logsigmoid(h[unit]).sum(0), 0))
    return total / len(pairs)


@pytest.mark.parametrize("case", CASES)
def test_the_parameters_that_predict_best_are_kept(tmp_path, model_dir, case):
    """Caught: the last parameters kept; the first; those of the worst; the gate of other parameters; a figure by pairs
    for users; parameters put back after the last E-step instead of before it."""
    records, heldout = files(tmp_path)
    options = OPTIONS | CASES[case]
    out = tinyjob.run(tmp_path, model_dir, records, name="run", validation=heldout, **options)
    history = tinyjob.lines(out / "validation.jsonl")
    best = max(history, key=lambda row: row["log_likelihood"])
    assert best["step"] < history[-1]["step"] and history[-1]["log_likelihood"] < best["log_likelihood"] - 1e-4
    assert likelihood(out, heldout) == pytest.approx(best["log_likelihood"], abs=1e-5)
    plain = {n: t for n, t in options.items() if n != "evaluate_every"}
    other = tinyjob.run(tmp_path, model_dir, records, name="plain", **plain)
    if case != "context":                                                   # there the last part goes on from the best
        assert likelihood(other, heldout) == pytest.approx(history[-1]["log_likelihood"], abs=1e-5)
    if case == "all pairs":
        run = load_run(out, "cpu", "")
        references, tokenizer = load_references(run.config, "cpu")
        (_, _, h, log_w), = margins_of([run], references, tokenizer, run.config.data, out.parent / "cache2")
        unit = run.plan.units[1]
        q = torch.log_softmax(log_w[unit[0]] + torch.nn.functional.logsigmoid(h[unit]).sum(0), 0)
        assert torch.allclose(run.table[1], q, atol=1e-4), "responsibilities of other parameters"


@pytest.mark.parametrize("case", ["all pairs", "context"])
def test_the_last_e_step_reads_the_parameters_that_were_put_back(tmp_path, model_dir, case, monkeypatch):
    """With context pairs it comes before the last part. Caught: parameters put back at the end of the run only, so that
    responsibilities belong to others."""
    records, heldout = files(tmp_path)
    seen, e_step_of_all = [], train.visit_log_likelihoods

    def checked(state, problem, *rest):
        best, header = read_tensors(tmp_path / "run" / "best.safetensors")
        own = trained_state(state.experts)
        seen.append((state.t, header["step"], all(torch.equal(own[name], best[name]) for name in own)))
        return e_step_of_all(state, problem, *rest)

    monkeypatch.setattr(train, "visit_log_likelihoods", checked)
    tinyjob.run(tmp_path, model_dir, records, name="run", validation=heldout, **OPTIONS | CASES[case])
    (t, best, equal), = seen
    assert equal and int(best) < t


@pytest.mark.parametrize("stop", [3, 8, 21])
def test_a_resumed_run_evaluates_and_ends_as_an_uninterrupted_one(tmp_path, model_dir, monkeypatch, stop):
    """Caught: evaluations of before lost, or counted twice; the best parameters forgotten."""
    records, heldout = files(tmp_path)
    options = OPTIONS | CASES["context"] | {"validation": heldout, "data": tinyjob.write(tmp_path / "d.jsonl", records)}
    whole = tinyjob.run(tmp_path, model_dir, records, name="whole", **options)
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        stop_at(patch, "step", stop)
        tinyjob.run(tmp_path, model_dir, records, name="part", save_minutes=0.0, **options)
    part = tinyjob.run(tmp_path, model_dir, records, name="part", **options)
    assert tinyjob.equal(whole, part)
    assert (whole / "validation.jsonl").read_bytes() == (part / "validation.jsonl").read_bytes()


def test_what_the_file_of_the_best_holds_is_what_is_put_back(tmp_path, model_dir, monkeypatch):
    """A run that is killed after its last checkpoint leaves the best of a later step. Caught: the parameters of that
    step put back under the name of an earlier one, which other processes, with other rounding, may find better."""
    records, heldout = files(tmp_path)
    options = OPTIONS | {"validation": heldout, "data": tinyjob.write(tmp_path / "d.jsonl", records)}
    whole = tinyjob.run(tmp_path, model_dir, records, name="whole", **options)
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        stop_at(patch, "step", 3)
        tinyjob.run(tmp_path, model_dir, records, name="run", save_minutes=0.0, **options)
    later = {name: x * 1.5 for name, x in read_tensors(whole / "best.safetensors")[0].items()}
    write_tensors(tmp_path / "run" / "best.safetensors", later, {"step": 20, "log_likelihood": -0.5})
    run = load_run(tinyjob.run(tmp_path, model_dir, records, name="run", **options), "cpu", "")
    state = trained_state(run.experts)
    assert all(torch.equal(state[name], later[name]) for name in state)


def test_faults_of_the_file_are_named(tmp_path, model_dir):
    """Caught: --evaluate-every ignored without a file; a faulty line found after hours; another file on resuming."""
    records, heldout = files(tmp_path)
    with raises_at("--validation", option="evaluate_every"):
        tinyjob.run(tmp_path, model_dir, records, evaluate_every=3)
    with raises_at(line=2, file=str(tmp_path / "bad.jsonl")):
        (tmp_path / "bad.jsonl").write_text(open(heldout).readline() + "{}\n")
        tinyjob.run(tmp_path, model_dir, records, validation=str(tmp_path / "bad.jsonl"))
