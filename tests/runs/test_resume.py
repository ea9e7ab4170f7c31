"""train.py interrupted, resumed, and given bad input. Docstrings name the faults that each test was seen to fail on."""

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tinyjob
import torch
from raising import raises_at
from safetensors.torch import load_file, save_file

import train
from mixdpo.fast.optimizer import clip_and_step
from mixdpo.plan import batches
from mixdpo.runs import checkpoint, setup
from mixdpo.runs.checkpoint import checkpoints, save_checkpoint

ROOT = Path(__file__).parents[2]
CASES = {
    "pairs": dict(epochs=2),
    "users, updated weights": dict(latent="user", weights="update", epochs=3),
    "first visit": dict(estep="first", start="none", epochs=3, beta=0.5),
    "context": dict(latent="user", estep="context", context=1, start_steps=3, epochs=3),
    "context, linear": dict(latent="user", estep="context", context=1, start="linear", epochs=3),
    "models": dict(sharing="models", epochs=2),
    "gate, sampled": dict(gate="mlp", variant="monte-carlo", draws=3, epochs=3),
    "users in slices": dict(latent="user", em="incremental", start_steps=2, epochs=3, batch=5),
    "users in slices, sampled": dict(latent="user", em="incremental", variant="gumbel", epochs=3, beta=0.5),
    "gate of users": dict(latent="user", gate="user", epochs=3, gate_temperature=2.0),
    "untied": dict(rank=0, epochs=2),
    "robust": dict(robust=2.0, clip=math.inf, epochs=3),
    "lora": dict(sharing="lora", lr=train.TrainConfig.lr, epochs=2),
    "lora, shared part": dict(sharing="lora", shared_rank=2, lr=train.TrainConfig.lr, epochs=2),
}
LAST_PART = {
    "users": dict(beta=0.5),
    "linear, updated weights": dict(start="linear", weights="update"),
    "users in slices": dict(em="incremental", batch=5, variant="tempered", variant_temperature=0.7),
    "lora, shared part": dict(sharing="lora", shared_rank=2, lr=train.TrainConfig.lr),
}


class Stopped(Exception):
    """The plug is pulled."""


def stop_at(monkeypatch, name, count):
    """train.step, or checkpoint.save_checkpoint, raises on its call number `count`."""
    owner = train if name == "step" else checkpoint
    calls, real = [], getattr(owner, name)

    def counted(*arguments, **options):
        calls.append(None)
        if len(calls) == count:
            raise Stopped
        return real(*arguments, **options)

    monkeypatch.setattr(owner, name, counted)


def same_files(a, b):
    for name in ("metrics.jsonl", "responsibilities.jsonl"):
        assert (a / name).read_text() == (b / name).read_text(), name
    steps = [m["step"] for m in tinyjob.lines(a / "metrics.jsonl")]
    assert steps == list(range(1, len(steps) + 1)) and len(steps) > 3


@pytest.mark.parametrize("case", CASES)
def test_stopped_and_resumed_equals_uninterrupted_to_the_bit(case, tmp_path, model_dir, monkeypatch):
    """Faults: the optimizer's state not loaded; the table lost (first visit); w lost (updated weights);
    lines of repeated steps stand twice; the order of batches drawn anew;
    moments of a parameter without gradient expected (untied)."""
    model, records = model_dir, tinyjob.make_records()
    if case == "untied":
        model = tinyjob.make_model(tmp_path / "model", tied=False)
    data = tinyjob.write(tmp_path / "d.jsonl", records)
    options = CASES[case] | dict(data=data)
    whole = tinyjob.run(tmp_path, model, records, name="whole", **options)
    for stop, count in (("step", 3), ("save_checkpoint", 2), ("step", 2)):    # in a step; before its checkpoint; again
        with monkeypatch.context() as patch, pytest.raises(Stopped):
            stop_at(patch, stop, count)
            tinyjob.run(tmp_path, model, records, name="parts", save_minutes=0.0, **options)
            pytest.fail(f"{stop} was called less than {count} times")
    shutil.rmtree(tmp_path / "cache")                                       # the reference is computed again
    parts = tinyjob.run(tmp_path, model, records, name="parts", **options)
    assert tinyjob.equal(whole, parts)
    same_files(whole, parts)


@pytest.mark.parametrize("case", LAST_PART)
def test_a_run_stopped_around_its_last_part_equals_an_uninterrupted_one_to_the_bit(case, tmp_path, model_dir,
                                                                                   monkeypatch):
    """Stopped in the last step before the E-step on all units, in that E-step, in the first step of the last part, in
    its second and in the last of all. Caught: responsibilities of the last part computed again from experts that it has
    trained, or those of a step before; a last part that begins anew; the shared adapter, or its moments, lost."""
    options = dict(latent="user", estep="context", context=2, epochs=2) | LAST_PART[case]
    records, plans = tinyjob.make_records(each=4), []
    options["data"] = tinyjob.write(tmp_path / "d.jsonl", records)
    with monkeypatch.context() as patch:
        real = train.fit
        patch.setattr(train, "fit", lambda state, problem, *rest: (plans.append(problem.plan),
                                                                   real(state, problem, *rest))[1])
        whole = tinyjob.run(tmp_path, model_dir, records, name="whole", **options)
    first, total = plans[0].last_part, len(plans[0].steps)
    assert 1 < first < total - 1
    done, calls = 0, train.visit_log_likelihoods
    for stop in (first, "E-step", first + 1, first + 2, total):             # the step that is not done
        with monkeypatch.context() as patch, pytest.raises(Stopped):
            if stop == "E-step":
                patch.setattr(train, "visit_log_likelihoods", lambda state, problem, *rest: (
                    raised() if state.t == problem.plan.last_part else calls(state, problem, *rest)))
            else:
                stop_at(patch, "step", stop - done)
                done = stop - 1
            tinyjob.run(tmp_path, model_dir, records, name="parts", save_minutes=0.0, **options)
            pytest.fail(f"it was not stopped at {stop}")
        if stop == "E-step":
            done = first
    parts = tinyjob.run(tmp_path, model_dir, records, name="parts", **options)
    assert tinyjob.equal(whole, parts)
    same_files(whole, parts)


def raised():
    raise Stopped


def test_without_a_checkpoint_a_stopped_run_begins_again(tmp_path, model_dir, monkeypatch):
    """Fault: lines of the run that left no checkpoint are kept."""
    records = tinyjob.make_records()
    whole = tinyjob.run(tmp_path, model_dir, records, name="whole", epochs=2)
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        stop_at(patch, "step", 3)
        tinyjob.run(tmp_path, model_dir, records, name="parts", epochs=2)
    parts = tinyjob.run(tmp_path, model_dir, records, name="parts", epochs=2)
    assert tinyjob.equal(whole, parts)
    same_files(whole, parts)


def test_a_finished_run_returns_at_once(tmp_path, model_dir, monkeypatch, capsys):
    """Fault: it is trained again, or its files are touched."""
    out = tinyjob.run(tmp_path, model_dir, tinyjob.make_records())
    before = {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in out.rglob("*") if p.is_file()}
    monkeypatch.setattr(train, "prepare", lambda config: pytest.fail("prepared again"))
    assert tinyjob.run(tmp_path, model_dir, tinyjob.make_records(), save_minutes=3.0) == out
    assert "finished before" in capsys.readouterr().out
    assert before == {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in out.rglob("*") if p.is_file()}


def test_a_run_that_is_killed_behind_its_last_checkpoint_leaves_no_other(tmp_path, model_dir, monkeypatch):
    """Fault: killed between the last checkpoint and the removal of the one before, it leaves both."""
    records, real = tinyjob.make_records(), checkpoint.keep_newest

    def killed(run, count):
        if len(checkpoint.checkpoints(run)) > 1 and checkpoint.load_checkpoint(run, {})[1]["finished"]:
            raise KeyboardInterrupt
        real(run, count)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(checkpoint, "keep_newest", killed)
        tinyjob.run(tmp_path, model_dir, records, save_minutes=0.0)
    out = tinyjob.run(tmp_path, model_dir, records, save_minutes=0.0)
    path, = checkpoint.checkpoints(out)
    assert checkpoint.load_checkpoint(out, {})[1]["finished"]


@pytest.mark.parametrize("options,says", [
    (dict(beta=0.2), "beta: there 0.1, now 0.2"),
    (dict(experts=3, seed=5), "experts: there 2, now 3; seed: there 0, now 5"),
    (dict(columns="user="), "data_key has changed"),
])
@pytest.mark.parametrize("finished", [True, False])
def test_a_run_of_another_configuration_is_refused(options, says, finished, tmp_path, model_dir, monkeypatch):
    """Faults: a finished run returned whatever was asked for; config.json overwritten before the refusal."""
    with monkeypatch.context() as patch:
        if not finished:
            stop_at(patch, "step", 3)
        try:
            tinyjob.run(tmp_path, model_dir, tinyjob.make_records(), save_minutes=0.0)
        except Stopped:
            assert not finished
    before = (tmp_path / "run" / "config.json").read_text()
    with raises_at(says, "--out", file=checkpoints(tmp_path / "run")[0]):
        tinyjob.run(tmp_path, model_dir, tinyjob.make_records(), **options)
    assert (tmp_path / "run" / "config.json").read_text() == before


def test_a_run_on_other_data_under_the_same_name_is_refused(tmp_path, model_dir):
    """Fault: the path is compared and not the content, so a run on last week's file counts as finished."""
    tinyjob.run(tmp_path, model_dir, tinyjob.make_records())
    tinyjob.write(tmp_path / "run.jsonl", tinyjob.make_records(seed=1))
    with raises_at("data_key", file=checkpoints(tmp_path / "run")[0]):
        tinyjob.run(tmp_path, model_dir, None)


def test_a_run_from_another_model_under_the_same_name_is_refused(tmp_path, monkeypatch):
    """Fault: weights of one model go on with log-probs of another as reference."""
    model = tinyjob.make_model(tmp_path / "model")
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        stop_at(patch, "step", 3)
        tinyjob.run(tmp_path, model, tinyjob.make_records(), save_minutes=0.0)
    tinyjob.make_model(tmp_path / "model", seed=1)
    path = tmp_path / "run" / "config.json"
    path.write_text(before := path.read_text() + " ")
    with raises_at("model_key", file=checkpoints(tmp_path / "run")[0]):
        tinyjob.run(tmp_path, model, None)
    assert path.read_text() == before


def on_machine(monkeypatch, auto, folder, model, **options):
    """A run where --dtype auto is the dtype `auto`."""
    folder.mkdir(exist_ok=True)
    resolved = {"auto": auto, "float32": torch.float32, "bfloat16": torch.bfloat16}
    monkeypatch.setattr(setup, "compute_dtype", lambda name, device: (resolved[name], "so it is here"))
    return tinyjob.run(folder, model, tinyjob.make_records(), save_minutes=0.0, **options)


@pytest.mark.parametrize("begun,now", [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)])
def test_a_run_goes_on_in_the_dtype_that_it_was_begun_in(begun, now, tmp_path, model_dir, monkeypatch):
    """--dtype auto on two machines. Catches: the word compared and not what it stands for, so that the second half is
    in another dtype; the same dtype by its own name refused; a finished run that another machine finds unfinished."""
    there, here = (str(x).removeprefix("torch.") for x in (begun, now))
    whole = on_machine(monkeypatch, begun, tmp_path / "a", model_dir, dtype="auto")
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        stop_at(patch, "step", 3)
        on_machine(patch, begun, tmp_path / "b", model_dir, dtype="auto")
    for word in ("auto", here):
        with raises_at(f"dtype: there '{there}', now '{here}'", file=checkpoints(tmp_path / "b" / "run")[0]):
            on_machine(monkeypatch, now, tmp_path / "b", model_dir, dtype=word)
    assert tinyjob.equal(whole, on_machine(monkeypatch, now, tmp_path / "b", model_dir, dtype=there))
    monkeypatch.setattr(train, "learn", lambda *_: pytest.fail("trained again"))
    assert on_machine(monkeypatch, now, tmp_path / "b", model_dir, dtype="auto") == tmp_path / "b" / "run"


def test_a_run_on_another_tokenizer_is_refused(tmp_path, monkeypatch):
    """Catches: the second half of a run on other ids of the same texts."""
    model = tinyjob.make_model(tmp_path / "model")
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        stop_at(patch, "step", 3)
        tinyjob.run(tmp_path, model, tinyjob.make_records(), save_minutes=0.0)
    path = model / "tokenizer.json"
    document = json.loads(path.read_text())
    vocab = document["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    path.write_text(json.dumps(document))
    with raises_at("tokenizer_key", file=checkpoints(tmp_path / "run")[0]):
        tinyjob.run(tmp_path, model, None)


def test_another_device_is_named(tmp_path, model_dir, monkeypatch, capsys):
    """Catches: a change of device, which changes rounding, that nothing says."""
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        stop_at(patch, "step", 3)
        patch.setattr(checkpoint, "save_checkpoint", lambda out, tensors, state, keep: save_checkpoint(
            out, tensors, state | {"device": "cuda"}, keep))
        tinyjob.run(tmp_path, model_dir, tinyjob.make_records(), save_minutes=0.0)
    tinyjob.run(tmp_path, model_dir, None)
    assert "begun on cuda, resumed on cpu" in capsys.readouterr().out


# --- bad input --------------------------------------------------------------------------------------------------------


def test_a_loss_that_is_not_a_number_stops_with_its_lines_and_leaves_nothing_half_written(tmp_path, model_dir):
    """Faults: NaN stepped with; the lines of another batch named; a checkpoint written on the way out."""
    with raises_at("step 2", "nan", file=tmp_path / "run.jsonl", option="lr") as caught:
        tinyjob.run(tmp_path, model_dir, tinyjob.make_records(), lr=1e30, warmup=0)
    message, out = caught.value.message, tmp_path / "run"
    told = [int(word) for word in message[message.rindex("(") + 1 : message.rindex(")")].split(", ")]
    plan = batches([[i] for i in range(18)], 8, 0, 0)
    assert told == sorted(i + 1 for i in plan[1])                           # lines and steps count from 1
    assert not (out / "checkpoint").exists() and not (out / "checkpoint.new").exists()
    assert len(tinyjob.lines(out / "metrics.jsonl")) == len(tinyjob.lines(out / "responsibilities.jsonl")) == 1


@pytest.mark.parametrize("options", [dict(experts=1), {}, dict(sharing="lora", lr=train.TrainConfig.lr)], ids=str)
def test_a_model_without_numbers_is_the_users_fault(options, tmp_path):
    """A NaN in the model's file, and weights so large that its log-probs are NaN. Catches: an assertion on step 0, as
    if the policy and the reference differed; log-probs that are cached before anyone looks at them."""
    model = tinyjob.make_model(tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    name = next(name for name in tensors if "mlp" in name)
    damaged = tensors[name].clone()
    damaged[0, 0] = torch.nan
    save_file(tensors | {name: damaged}, model / "model.safetensors")
    with raises_at(name, file=model / "model.safetensors"):
        tinyjob.run(tmp_path, model, tinyjob.make_records(), **options)
    save_file(tensors | {"model.norm.weight": torch.full((16,), 3e38)}, model / "model.safetensors")
    with raises_at("line 1", option="model"):
        tinyjob.run(tmp_path, model, None, **options)
    assert not (tmp_path / "run").exists() and not (tmp_path / "cache").exists()


def test_the_largest_beta_is_no_assertion(tmp_path, model_dir):
    """Catches: margins that overflow at step 0, where policy and reference are equal."""
    with raises_at(option="beta"):
        tinyjob.run(tmp_path, model_dir, tinyjob.make_records(), beta=1e39)


@pytest.mark.parametrize("options,warned", [
    (dict(start_steps=3, warmup=3, latent="user", batch=6),
     {"start-steps 1": "--start-steps 3", "warmup 1": "--warmup 3"}),
    (dict(start_steps=2, warmup=2, latent="user", batch=6), {}),
    (dict(start="linear", start_steps=9, warmup=0, latent="user", batch=6), {"start-steps 1": "--start linear"}),
    (dict(experts=1, warmup=10, batch=6), {"warmup 1": "30%"}),
    (dict(start="none", warmup=1, batch=6), {}),
    (dict(start_steps=3, warmup=1, batch=18, epochs=1), {"--epochs": "1 optimizer steps", "batch": "100%"}),
], ids=str)
def test_a_run_too_short_for_its_options_is_announced(options, warned, tmp_path, model_dir, capsys):
    """18 pairs: three steps of six, or one. Catches: a run on random responsibilities alone, or at a fraction of its
    learning rate, that nothing announces; a warning about a run that is long enough; one that names no remedy."""
    tinyjob.run(tmp_path, model_dir, tinyjob.make_records(), **options)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning: the run has")]
    assert len(lines) == len(warned)
    for line, (remedy, number) in zip(lines, warned.items()):
        assert number in line and remedy in line.partition("Choose")[2], line


def test_clip_and_step_steps_nowhere_on_nan_and_clips_the_norm(model_dir):
    """Faults: the step taken before the check; infinity taken for a number; the norm after clipping returned."""
    import torch

    for bad, loss in ((torch.nan, 1.0), (torch.inf, 1.0), (1.0, torch.nan), (1.0, torch.inf)):
        p = torch.nn.Parameter(torch.ones(2))
        p.grad = torch.full((2,), bad)
        with pytest.raises(FloatingPointError):
            clip_and_step(torch.optim.SGD([p], lr=1.0), loss, 1.0)
        assert p.tolist() == [1.0, 1.0]
    p.grad = torch.tensor([3.0, 4.0])
    assert clip_and_step(torch.optim.SGD([p], lr=1.0), 0.0, 1.0) == pytest.approx(5.0)
    assert p.tolist() == pytest.approx([0.4, 0.2], abs=1e-5) and p.grad is None


@pytest.mark.parametrize("change,options,line,option,named", [
    ({}, dict(latent="user", batch=2), 1, "batch", ["'u0'", "--batch 3"]),
    ({"prompt": "m" * 40, "chosen": "a" * 40}, {}, 5, None, [40, 41, 64]),
    ({"chosen": ""}, {}, 5, None, ["chosen"]), ({"chosen": "ab", "rejected": "ab"}, {}, 5, None, ["rejected"]),
    ({"user": None}, dict(latent="user"), 5, None, [1, 18]),
])
def test_bad_input_is_refused_and_leaves_no_run(change, options, line, option, named, tmp_path, model_dir):
    """Faults: each check taken out; a run directory left behind by a run that never began."""
    records = tinyjob.make_records()
    records[4] |= change
    with raises_at(*named, file=tmp_path / "run.jsonl", line=line, option=option):
        tinyjob.run(tmp_path, model_dir, records, **options)
    assert not (tmp_path / "run").exists()


def test_faulty_lines_are_dropped_and_counted_where_asked(tmp_path, model_dir, capsys):
    """Fault: a dropped line shifts the others' numbers, or is not reported."""
    records = tinyjob.make_records()
    records[4]["chosen"] = ""
    out = tinyjob.run(tmp_path, model_dir, records, drop=True)
    assert "empty chosen: 1 (line 5)" in capsys.readouterr().out
    assert sum(m["pairs"] for m in tinyjob.lines(out / "metrics.jsonl")) == 17


def test_the_command_line(tmp_path, model_dir):
    """Fault: `python train.py` needs more than --data, --model, --experts and --out; an error is a traceback."""
    records = [{k: r[k] for k in ("prompt", "chosen", "rejected")} for r in tinyjob.make_records()]
    data, out = tinyjob.write(tmp_path / "prefs.jsonl", records), tmp_path / "runs" / "x"
    words = ["--data", data, "--model", str(model_dir), "--experts", "4", "--out", str(out)]
    done = subprocess.run([sys.executable, ROOT / "train.py", *words], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert len(tinyjob.lines(out / "metrics.jsonl")) == 1 and tinyjob.tensors(out)["table"].shape == (18, 4)
    words = [*words[:-1], str(tmp_path / "y"), "--expert", "4"]
    done = subprocess.run([sys.executable, ROOT / "train.py", *words], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and done.stdout == "" and done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: --expert: ") and "--experts" in done.stderr
