"""What goes wrong around a run: each fault is put in, and the run ends with a sentence and can go on. Killing and
fuzzing are in tests/chaos. Docstrings name what each test catches."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tinyjob
import torch
from raising import raises_at

import train
from mixdpo import config as configs
from mixdpo.config import Stopped
from mixdpo.fast import texts
from mixdpo.runs import memory_estimate as fits
from mixdpo.runs.checkpoint import Stop, checkpoints, load_checkpoint
from mixdpo.text import records

ROOT = Path(__file__).parents[2]


def words(folder, model, **options):
    """train.py's command line for a tiny job in folder/run."""
    given = {"data": folder / "d.jsonl", "model": model, "out": folder / "run", "experts": 2} | tinyjob.small(**options)
    return [word for name, value in given.items() for word in (f"--{name.replace('_', '-')}", str(value))]


def start(command, **options):
    return subprocess.Popen([sys.executable, *command], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                            text=True, **options)


def ended(monkeypatch, error):
    """What `command` prints and returns when the program meets an error."""
    def main(argv):
        raise error

    monkeypatch.setattr(sys, "argv", ["train.py"])
    with pytest.raises(SystemExit) as caught:
        configs.command(main)
    return caught.value.code


# ---- signals


def test_a_stop_finishes_the_step_and_the_same_command_goes_on(tmp_path, model_dir):
    """SIGTERM to the program itself. Catches: a step cut, nothing saved, no word of how to go on, another result."""
    records_ = tinyjob.make_records()
    tinyjob.write(tmp_path / "d.jsonl", records_)
    whole = tinyjob.run(tmp_path, model_dir, records_, name="whole", data=str(tmp_path / "d.jsonl"), epochs=150)
    process, log = start(["train.py", *words(tmp_path, model_dir, epochs=150)]), tmp_path / "run" / "metrics.jsonl"
    while process.poll() is None and not (log.exists() and log.read_bytes().count(b"\n") > 2):
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=120)[0]
    assert process.returncode == 130, said
    steps = len(tinyjob.lines(log))
    assert "stopping after this step; a second signal stops at once" in said
    assert f"stopped and saved after step {steps} of 450; run the same command again to resume" in said
    assert [path.stem for path in checkpoints(tmp_path / "run")] == [f"{steps:08d}"] and steps < 450
    tinyjob.run(tmp_path, model_dir, None, name="run", data=str(tmp_path / "d.jsonl"), epochs=150)
    assert tinyjob.equal(whole, tmp_path / "run") and log.read_text() == (whole / "metrics.jsonl").read_text()


def test_the_second_signal_stops_at_once(tmp_path, model_dir, monkeypatch):
    """Catches: a step that must be waited for, handlers that stay after the run."""
    before, real = signal.getsignal(signal.SIGINT), train.step

    def twice(*arguments):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
        return real(*arguments)

    monkeypatch.setattr(train, "step", twice)
    with pytest.raises(KeyboardInterrupt, match="stopped at once"):
        tinyjob.run(tmp_path, model_dir, tinyjob.make_records())
    assert signal.getsignal(signal.SIGINT) is before
    assert not (tmp_path / "run" / "checkpoint").exists()


def asks_at(monkeypatch, count, name, owner):
    """Asks the Stop in use to stop within call number `count` of owner.NAME; returns the calls so far."""
    calls, stops, real, begin = [], [], getattr(owner, name), Stop.__enter__

    def enter(stop):
        stops.append(begin(stop))
        return stop

    def counted(*arguments, **options):
        calls.append(None)
        if len(calls) == count:
            stops[-1].ask(signal.SIGTERM, None)
        return real(*arguments, **options)

    monkeypatch.setattr(Stop, "__enter__", enter)
    monkeypatch.setattr(owner, name, counted)
    return calls


E_STEPS = {                                                                 # options; steps done
    "last": (dict(epochs=1), 9),
    "last of context": (dict(latent="user", estep="context", context=6, epochs=1, start_steps=9), 6),
    "first of incremental": (dict(latent="user", em="incremental", epochs=2, start_steps=2), 2),
}


@pytest.mark.parametrize("case", E_STEPS)
def test_a_stop_within_an_e_step_is_heeded(case, tmp_path, model_dir, monkeypatch):
    """A stop is asked for in the second of several batches of an E-step over all pairs. Catches: the whole pass waited
    for, the steps before it lost or done again, another result."""
    options, steps = E_STEPS[case]
    data = tinyjob.write(tmp_path / "d.jsonl", tinyjob.make_records(each=12))       # 72 pairs; batches of 32 texts
    whole = tinyjob.run(tmp_path, model_dir, None, name="whole", data=data, **options)
    with monkeypatch.context() as patch, pytest.raises(Stopped) as caught:
        calls = asks_at(patch, 2, "pair_logp", texts)
        tinyjob.run(tmp_path, model_dir, None, name="run", data=data, **options)
    assert len(calls) == 2 and str(tmp_path / "run") in str(caught.value)
    assert [path.stem for path in checkpoints(tmp_path / "run")] == [f"{steps:08d}"] * (steps > 0)
    taken, real = [], train.step
    monkeypatch.setattr(train, "step", lambda *a: taken.append(None) or real(*a))
    run = tinyjob.run(tmp_path, model_dir, None, name="run", data=data, **options)
    assert tinyjob.equal(whole, run) and len(taken) == len(tinyjob.lines(whole / "metrics.jsonl")) - steps
    for name in ("metrics.jsonl", "responsibilities.jsonl"):
        assert (run / name).read_bytes() == (whole / name).read_bytes()


def test_a_stop_within_the_references_pass_is_heeded(tmp_path, model_dir, monkeypatch):
    """Catches: all batches of the pass waited for, and a step after it."""
    from mixdpo.runs import reference

    data = tinyjob.write(tmp_path / "d.jsonl", tinyjob.make_records(each=12))               # 72 pairs, batches of 16
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        calls = asks_at(patch, 2, "compact_rows", reference)
        patch.setattr(train, "step", lambda *_: pytest.fail("a step"))
        tinyjob.run(tmp_path, model_dir, None, data=data)
    assert len(calls) == 2
    tinyjob.run(tmp_path, model_dir, None, data=data)


def test_how_a_program_ends(monkeypatch, capsys):
    """Catches: a traceback for what the system refuses, an exit status of success."""
    assert ended(monkeypatch, KeyboardInterrupt()) == 130
    assert "stopped; run the same command again" in capsys.readouterr().err
    assert ended(monkeypatch, Stopped("runs/x: saved")) == 130 and "runs/x: saved; run" in capsys.readouterr().err
    for error, says in ((OSError(28, "No space left on device", "x.part"), "x.part'; free space on the disk. Finished"),
                        (OSError("x: I/O error: No space left on device (os error 28)"), "free space on the disk"),
                        (PermissionError(13, "Permission denied", "/etc/x"), "a directory that you may write to"),
                        (OSError(30, "Read-only file system", "/r"), "choose a directory that can be written to"),
                        (FileNotFoundError(2, "No such file", "m"), "check that path")):
        assert says in ended(monkeypatch, error)


# ---- the disk


@pytest.fixture
def disk(tmp_path):
    """A tmpfs that a child mounts for itself alone, and that goes with it: its folder, seen through /proc, and how to
    mount it anew with other options. Root is refused nothing but by such a disk."""
    if shutil.which("unshare") is None:
        pytest.skip("no unshare to make mounts of one's own with")
    (tmp_path / "disk").mkdir()
    script = 'm() { mount -t tmpfs -o "$1" none "$0"; echo $?; }; m size=4m; while read -r o; do m "remount,$o"; done'
    own = ["unshare", "--mount", *(["--map-root-user"] if os.geteuid() else []), "sh", "-c", script]
    with subprocess.Popen([*own, str(tmp_path / "disk")], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, text=True) as child:    # ends where its input ends
        if (said := child.stdout.readline()) != "0\n":
            pytest.skip(f"the system allows no mounts of one's own: {said.strip()}")

        def remount(options):
            print(options, file=child.stdin, flush=True)
            assert (said := child.stdout.readline()) == "0\n", said

        yield Path(f"/proc/{child.pid}/root{tmp_path}/disk"), remount


def sentence(process):
    """The one that a program of exit status 1 ends with."""
    said = process.communicate(timeout=120)[0]
    assert process.returncode == 1 and "Traceback" not in said, said
    found, = [line for line in said.splitlines() if line.startswith("error: ")]
    return found


def contents(*folders):
    return {path: path.is_file() and path.read_bytes() for folder in folders for path in folder.rglob("*")}


def test_a_disk_that_becomes_full(tmp_path, model_dir, disk):
    """A tmpfs that a checkpoint fits into, and part of the next. Catches: a step told of as saved that is not, harm to
    the checkpoint before it, a leftover that takes up the room, no word of what to do, another result."""
    folder, remount = disk
    data, run = tinyjob.write(folder / "d.jsonl", tinyjob.make_records()), folder / "run"
    whole = tinyjob.run(tmp_path, model_dir, None, name="whole", data=data)
    command = ["train.py", *words(folder, model_dir, save_minutes=0.0)]
    remount("size=200k")
    says = sentence(start(command))
    assert "00000002.safetensors" in says and "No space left on device" in says and "free space on the disk. F" in says
    assert [path.name for path in (run / "checkpoint").iterdir()] == ["00000001.safetensors"]
    assert load_checkpoint(run, {})[1]["step"] == 1
    remount("size=4m")
    process = start(command)
    said = process.communicate(timeout=120)[0]
    assert process.returncode == 0 and "resumed at step 1 of 3" in said, said
    assert tinyjob.equal(whole, run)
    for name in ("metrics.jsonl", "responsibilities.jsonl"):
        assert (run / name).read_bytes() == (whole / name).read_bytes()


@pytest.mark.parametrize("begun", [False, True])
def test_a_disk_that_is_read_only(begun, tmp_path, model_dir, disk, monkeypatch):
    """Catches: a traceback, no word of what to do, files put beside it instead, a run that cannot go on after it."""
    def stop(*_):
        raise Stopped

    folder, remount = disk
    data = tinyjob.write(folder / "d.jsonl", tinyjob.make_records())
    if begun:
        with monkeypatch.context() as patch, pytest.raises(Stopped):
            patch.setattr(train, "visit_log_likelihoods", stop)  # the last E-step; three steps are done
            tinyjob.run(folder, model_dir, None, data=data, save_minutes=0.0)
    remount("ro")
    before = contents(tmp_path, folder)
    says = sentence(start(["train.py", *words(folder, model_dir)]))
    assert "Read-only file system" in says and "choose a directory that can be written to. Finished" in says
    assert contents(tmp_path, folder) == before
    remount("rw")
    tinyjob.run(folder, model_dir, None, data=data)
    assert [path.stem for path in checkpoints(folder / "run")] == ["00000003"]


def test_a_file_too_large_for_the_system_ends_in_a_sentence(tmp_path, model_dir):
    """A limit of the kernel on file sizes, met while a checkpoint is written. Catches: a traceback, half a checkpoint
    under a checkpoint's name, a leftover, a run that cannot go on."""
    import resource

    tinyjob.write(tmp_path / "d.jsonl", tinyjob.make_records())
    command = ["train.py", *words(tmp_path, model_dir, save_minutes=0.0)]
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (30000, 30000))
    process = start(command, preexec_fn=limit)
    said = process.communicate(timeout=120)[0]
    assert process.returncode == 1 and "error: " in said and "run the same command again" in said, said
    assert "Traceback" not in said and checkpoints(tmp_path / "run") == []
    process = start(command)
    assert process.communicate(timeout=120) and process.returncode == 0


def test_a_place_that_cannot_be_written_to(tmp_path, model_dir, monkeypatch):
    """Catches: found only after the passes over the data."""
    monkeypatch.setattr(train, "prepare", lambda config: pytest.fail("prepared"))
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError):
        tinyjob.run(tmp_path, model_dir, tinyjob.make_records(), out=str(tmp_path / "file" / "run"))


@pytest.mark.parametrize("what", ["gone", "shorter", "torn"])
def test_lines_that_a_checkpoint_counts_on(what, tmp_path, model_dir, monkeypatch):
    """Catches: a run that goes on with a hole in its metrics."""
    def stop(*_):
        raise Stopped

    monkeypatch.setattr(train.Log, "sync", lambda log: None)
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(train, "visit_log_likelihoods", stop)  # the last E-step; three steps are done
        tinyjob.run(tmp_path, model_dir, tinyjob.make_records(), save_minutes=0.0)
    path = tmp_path / "run" / "metrics.jsonl"
    text = path.read_text()
    path.unlink() if what == "gone" else path.write_text(text.splitlines(keepends=True)[0] if what == "shorter" else
                                                         text[: text.index("\n", text.index("\n") + 1)])
    with raises_at(2, tmp_path / "run", file=path):
        tinyjob.run(tmp_path, model_dir, None)


def test_a_cached_reference_that_turned_is_made_again(tmp_path, model_dir, capsys):
    """Catches: log-probs used as they lie there; a damaged cache that stops the program."""
    first = tinyjob.run(tmp_path, model_dir, tinyjob.make_records(), name="a")
    path, = (tmp_path / "cache").glob("*.safetensors")
    good = path.read_bytes()
    path.write_bytes(good[:-3] + bytes([good[-3] ^ 64]) + good[-2:])
    again = tinyjob.run(tmp_path, model_dir, None, name="b", data=str(tmp_path / "a.jsonl"))
    assert "it is computed again" in capsys.readouterr().out
    assert tinyjob.equal(first, again) and path.read_bytes() == good


def test_weights_that_turned_are_not_gone_on_with(tmp_path, monkeypatch):
    """One bit of the reference's weights between two halves of a run. Catches: a run on two references."""
    model = tinyjob.make_model(tmp_path / "model")
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        calls = []
        real = train.step

        def third(*arguments):
            calls.append(None)
            if len(calls) == 3:
                raise Stopped
            return real(*arguments)

        patch.setattr(train, "step", third)
        tinyjob.run(tmp_path, model, tinyjob.make_records(), save_minutes=0.0)
    data = (model / "model.safetensors").read_bytes()
    (model / "model.safetensors").write_bytes(data[:-9] + bytes([data[-9] ^ 1]) + data[-8:])
    with raises_at("model_key", file=checkpoints(tmp_path / "run")[0]):
        tinyjob.run(tmp_path, model, None, save_minutes=0.0)


def test_two_runs_in_one_directory(tmp_path, model_dir):
    """Catches: two that write into the same files."""
    from mixdpo.files.atomic import lock_folder

    child = "import sys, time; from pathlib import Path; from mixdpo.files.atomic import lock_folder\n" \
            "with lock_folder(Path(sys.argv[1])): print('held', flush=True); time.sleep(60)"
    process = start(["-c", child, str(tmp_path / "run")])
    try:
        assert process.stdout.readline() == "held\n"
        with raises_at(file=tmp_path / "run"):
            tinyjob.run(tmp_path, model_dir, tinyjob.make_records())
    finally:
        process.kill()
        process.communicate()
    with lock_folder(tmp_path / "run"):                                           # a killed one holds nothing
        pass
    tinyjob.run(tmp_path, model_dir, None)


# ---- memory, numbers, sizes


def test_out_of_memory_names_what_would_fit(tmp_path, model_dir, monkeypatch):
    """What a GPU raises, and what a CPU does. Catches: a traceback; a size that would not fit either; a run that
    cannot go on with it; another error taken for this one."""
    with pytest.raises(RuntimeError) as caught:
        torch.empty(10**15)
    assert fits.exceeded(caught.value) and not fits.exceeded(RuntimeError("shape"))
    calls, real, micro = [], train.step, lambda config: sum(fits.estimate(config, torch.float32).values())

    def fails(*arguments):
        calls.append(None)
        if len(calls) == 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")
        return real(*arguments)

    given = train.TrainConfig(str(tmp_path / "run.jsonl"), str(model_dir), str(tmp_path / "run"), **tinyjob.SMALL)
    sizes = [micro(dataclasses.replace(given, micro=m)) for m in (1, 2, 3, 4)]
    assert sizes == sorted(set(sizes))
    with monkeypatch.context() as patch:
        patch.setattr(train, "step", fails)
        patch.setattr(fits, "available", lambda device: sizes[1] / fits.TIGHT + 1)
        with raises_at("got 4", "CUDA out of memory", "--micro 2", option="micro"):
            tinyjob.run(tmp_path, model_dir, tinyjob.make_records(), save_minutes=0.0)
        patch.setattr(fits, "available", lambda device: 1.0)
        calls[:] = [None] * 2
        with raises_at("\n    --checkpointing true", option="micro"):
            tinyjob.run(tmp_path, model_dir, None, save_minutes=0.0)
    whole = tinyjob.run(tmp_path, model_dir, tinyjob.make_records(), name="whole")
    assert tinyjob.equal(tinyjob.run(tmp_path, model_dir, None, micro=2), whole, slack=1e-6)


def test_the_lines_of_a_step_without_a_number_are_kept(tmp_path, model_dir):
    """Catches: other lines, none, or a step on NaN."""
    with raises_at(tmp_path / "run" / "step-2.jsonl", file=tmp_path / "run.jsonl", option="lr"):
        tinyjob.run(tmp_path, model_dir, tinyjob.make_records(), lr=1e30, warmup=0)
    rows = (tmp_path / "run.jsonl").read_text().splitlines()
    kept = (tmp_path / "run" / "step-2.jsonl").read_text().splitlines()
    assert len(kept) == 8 and set(kept) < set(rows) and json.loads(kept[0])["prompt"]


def test_a_packed_file_that_unpacks_to_anything(tmp_path, monkeypatch):
    """Catches: a line read whole before it is known how long it is."""
    import gzip

    monkeypatch.setattr(records, "LONGEST", 1000)
    path = tmp_path / "d.jsonl.gz"
    path.write_bytes(gzip.compress(b"x" * 900 + b"\n" + b"y" * 10**7))
    found = records.lines(path)
    assert next(found) == b"x" * 900 + b"\n"
    with raises_at(file=path, line=2):
        list(found)
