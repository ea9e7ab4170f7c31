"""checkpoint.py, log.py and optimizer.py: checkpoints whole or not at all, AdamW's state to the bit.
Docstrings name the faults seen."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from raising import raises_at
from safetensors import safe_open

from mixdpo.config import compute_dtype
from mixdpo.fast.optimizer import load_optimizer_state, make_optimizer, optimizer_state, set_rate
from mixdpo.files.atomic import lock_folder
from mixdpo.runs import checkpoint
from mixdpo.runs import log as log_module
from mixdpo.runs.checkpoint import load_checkpoint, save_checkpoint
from mixdpo.runs.options import TrainConfig

ROOT = Path(__file__).parents[2]


def save(run, value, keep=2, **config):
    tensors = {"x": torch.tensor([value, torch.nan]), "h": torch.tensor(3.0).bfloat16()}
    save_checkpoint(run, tensors, {"step": int(value), "config": config}, keep)


def test_checkpoints_come_back_with_nan_and_the_newest_stay(tmp_path):
    """Faults: the oldest stay; a leftover of a killed process stays; an order of names for one of numbers."""
    assert load_checkpoint(tmp_path, {}) is None
    for value in (9.0, 10.0, 11.0):
        save(tmp_path, value, a=1)
        (tmp_path / "checkpoint" / "00000012.safetensors.77.part").write_bytes(b"half")
    tensors, state = load_checkpoint(tmp_path, {"a": 1})
    assert tensors["x"][0] == 11 and tensors["x"][1].isnan() and state["step"] == 11
    assert tensors["h"].dtype == torch.bfloat16 and tensors["h"].shape == ()
    save(tmp_path, 12.0, keep=3)
    assert [p.name[:8] for p in checkpoint.checkpoints(tmp_path)] == ["00000012", "00000011", "00000010"]
    assert len(list((tmp_path / "checkpoint").iterdir())) == 3


@pytest.mark.parametrize("dies", ["files.atomic.save_file", "config.sync", "config.os.replace"])
def test_an_interrupted_save_leaves_a_whole_checkpoint(tmp_path, monkeypatch, dies):
    """Faults: the file written under its own name; the old one removed before the new one stands."""
    save(tmp_path, 1.0, keep=1)

    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(f"mixdpo.{dies}", stop)
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path, 2.0, keep=1)
    assert load_checkpoint(tmp_path, {})[1]["step"] == 1
    monkeypatch.undo()
    save(tmp_path, 3.0, keep=1)                                             # and what is left over is no hindrance
    assert load_checkpoint(tmp_path, {})[1]["step"] == 3 and len(list((tmp_path / "checkpoint").iterdir())) == 1


def test_any_bit_that_turned_is_found(tmp_path, capsys):
    """Every byte of a checkpoint in turn. Faults: tensors outside of the sum, facts outside of it, a damaged file that
    ends the program, one that is used."""
    save(tmp_path, 1.0)
    save(tmp_path, 2.0)
    path = checkpoint.checkpoints(tmp_path)[0]
    good = path.read_bytes()
    for n in range(len(good)):
        path.write_bytes(good[:n] + bytes([good[n] ^ 1 << n % 8]) + good[n + 1 :])
        tensors, state = load_checkpoint(tmp_path, {})
        if state["step"] == 2:                                              # a bit turned where it means nothing
            assert tensors["x"][0] == 2 and tensors["h"] == 3, n
        else:
            assert "00000002.safetensors: " in capsys.readouterr().out and tensors["x"][0] == 1
    for length in (0, 5, len(good) // 2, len(good) - 1):
        path.write_bytes(good[:length])
        assert load_checkpoint(tmp_path, {})[1]["step"] == 1
    checkpoint.checkpoints(tmp_path)[1].write_bytes(b"")
    with raises_at(file=tmp_path / "checkpoint"):
        load_checkpoint(tmp_path, {})


def test_one_process_owns_a_folder(tmp_path):
    """Faults: two at once; a folder left behind that nothing was put into; one that was there before taken away."""
    with lock_folder(tmp_path / "a" / "b"):
        child = [sys.executable, "-c", "import sys; from pathlib import Path\n"
                 "from mixdpo.files.atomic import lock_folder\nwith lock_folder(Path(sys.argv[1])): pass",
                 str(tmp_path / "a" / "b")]
        held = subprocess.run(child, cwd=ROOT, capture_output=True, text=True)
        assert held.returncode and "another process is using this folder" in held.stderr
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "c").mkdir()
    with lock_folder(tmp_path / "c" / "d"):
        (tmp_path / "c" / "d" / "x").write_text("")
    with lock_folder(tmp_path / "c"):
        pass
    assert (tmp_path / "c" / "d" / "x").exists()


def test_a_checkpoint_of_another_configuration_is_refused_by_field(tmp_path):
    """Faults: no comparison; only the first field named; 1 and 1.0 or None and absent taken for
    a difference that is none."""
    save(tmp_path, 1.0, a=1, b="x", c=[1, 2])
    load_checkpoint(tmp_path, {"a": 1, "c": (1, 2)})
    newest = checkpoint.checkpoints(tmp_path)[0]
    with raises_at("a: there 1, now 2", "b: there 'x', now 'y'", "--out", file=newest) as caught:
        load_checkpoint(tmp_path, {"a": 2, "b": "y", "c": (1, 2)})
    assert "c:" not in caught.value.message


def strict(text):
    """JSON as every reader has it: no bare NaN or Infinity."""
    return json.loads(text, parse_constant=lambda word: pytest.fail(f"a bare {word}"))


def test_no_file_of_a_run_holds_a_bare_nan_or_infinity(tmp_path):
    """A step without pairs, whose figures are NaN, and an option that is infinite. Catches: lines and facts that only
    Python reads; "inf" in a checkpoint taken for a difference to
    infinity, and a bare one, as in older files."""
    config = TrainConfig("d.jsonl", "m", "out", clip=math.inf)
    figures = {"step": 1, "loss": math.nan, "bound": math.nan, "accuracy": [math.nan, 0.5],
               "effective_experts": math.nan}
    log = log_module.Log(tmp_path, 0, 2, config)
    log.step(figures, [0], torch.tensor([[math.nan, 0.0]]))
    log.sync(), log.close()
    line, = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert strict(line)["accuracy"] == [None, 0.5]
    assert strict((tmp_path / "responsibilities.jsonl").read_text())["q"] == [[None, 1.0]]
    save(tmp_path, 1.0, clip=math.inf)
    with safe_open(checkpoint.checkpoints(tmp_path)[0], "pt") as file:
        strict(strict(file.metadata()["whole"])[1])
    load_checkpoint(tmp_path, {"clip": math.inf})
    with raises_at("clip", file=checkpoint.checkpoints(tmp_path)[0]):
        load_checkpoint(tmp_path, {"clip": 1.0})
    older = {"step": 2, "config": {"clip": math.inf}}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mixdpo.files.atomic.to_json", json.dumps)
        save_checkpoint(tmp_path, {"x": torch.zeros(1)}, older, 1)
    assert load_checkpoint(tmp_path, {"clip": math.inf})[1] == older


def test_the_dtype_of_the_products():
    """Faults: an unknown name taken for auto; a reason left out."""
    assert compute_dtype("float32", "cpu")[0] == torch.float32 and compute_dtype("bfloat16", "cpu")[0] == torch.bfloat16
    dtype, why = compute_dtype("auto", "cpu")
    assert dtype in (torch.float32, torch.bfloat16) and "processor" in why
    with raises_at("'float16'", option="dtype"):
        compute_dtype("float16", "cpu")


class Small(torch.nn.Module):
    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        for name in ("A", "first", "B", "second"):
            setattr(self, name, torch.nn.Parameter(torch.randn(3, 2, generator=generator)))
        self.frozen = torch.nn.Parameter(torch.ones(1), requires_grad=False)


def steps(module, optimizer, first, last):
    for t in range(first, last):
        set_rate(optimizer, t, 10, 3)
        sum(((t + 1) * p).sin().sum() for p in module.parameters() if p.requires_grad).backward()
        optimizer.step()
        optimizer.zero_grad()


def test_adamw_goes_on_to_the_bit_and_each_set_at_its_own_rate():
    """Faults: names in the module's order and not the optimizer's; moments not copied;
    the step count lost; head_lr for all."""
    whole, (through, _) = (module := Small()), make_optimizer(module, 0.1, 0.01)
    steps(whole, through, 0, 6)
    half, (before, names) = (module := Small()), make_optimizer(module, 0.1, 0.01)
    steps(half, before, 0, 3)
    kept = {n: t.clone() for n, t in optimizer_state(before, names).items()}
    after, own = make_optimizer(half, 0.1, 0.01)
    load_optimizer_state(after, own, kept)
    steps(half, after, 3, 6)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), half.parameters()))
    assert names == ["first", "second", "A", "B"] and [g["peak"] for g in after.param_groups] == [0.1, 0.01]


def test_the_rate_rises_for_warmup_steps_and_falls_to_a_tenth():
    """Faults: a first step at rate 0; a peak that is never reached, or reached twice; no decay."""
    optimizer, _ = make_optimizer(Small(), 1.0, 0.5)
    rates = []
    for t in range(100):
        set_rate(optimizer, t, 100, 4)
        rates.append(optimizer.param_groups[0]["lr"])
        assert optimizer.param_groups[1]["lr"] == pytest.approx(rates[-1] / 2)
    assert rates[:4] == pytest.approx([0.25, 0.5, 0.75, 1.0])
    assert rates[3:] == pytest.approx([1 - 0.9 * n / 96 for n in range(97)])


def sources():
    return [p for p in [*ROOT.glob("mixdpo/**/*.py"), *ROOT.glob("data/**/*.py"), ROOT / "train.py", ROOT / "eval.py"]]


def test_no_pickle_anywhere_and_backward_only_in_train():
    """Faults: torch.save of a state in checkpoint.py; a loss that data/experiment/finetune.py calls backward on."""
    unwanted = ("import pickle", "torch.save(", "torch.load(", "joblib", "allow_pickle=True", "import dill")
    assert len(sources()) > 20
    for path in sources():
        text = path.read_text()
        found = [word for word in unwanted if word in text]
        assert not found, f"{path.name}: {found}"
        assert ".backward(" not in text or path.name in ("train.py", "backward.py"), f"{path.name} calls backward"


def test_the_package_knows_nothing_of_the_data_scripts_and_needs_only_its_own_packages():
    """Faults: `from data import ...`, or scikit-learn, in mixdpo/."""
    unwanted = ("data", "tests", "sklearn", "spacy", "matplotlib", "transformers", "trl", "datasets")
    for path in [*ROOT.glob("mixdpo/**/*.py"), ROOT / "train.py", ROOT / "eval.py"]:
        for number, line in enumerate(path.read_text().splitlines(), 1):
            imports = line.startswith(("import ", "from ")) and len(line.split()) > 1
            word = line.split()[1].split(".")[0] if imports else ""
            assert word not in unwanted, f"{path.name}:{number}: {line}"


def test_progress_says_rate_and_time_left(capsys, monkeypatch):
    """Faults: a resumed run's rate counts steps it did not do; the last line is not written."""
    now = iter([0.0, 10.0, 40.0])
    monkeypatch.setattr(log_module.time, "monotonic", lambda: next(now))
    progress = log_module.Progress("name", 100)
    progress(101, 200)
    progress(200, 200, "note")
    said = capsys.readouterr().err.splitlines()
    assert said[-1].split() == ["name", "200/200", "2.50/s", "00:00:00", "left", "note"], said


def test_a_revision_is_found_or_said_to_be_unknown():
    assert json.dumps(log_module.environment()) and log_module.revision()
