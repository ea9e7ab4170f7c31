"""Runs that are killed, or whose disk fails, are resumed. They must end with the same weights, optimizer state,
responsibilities and metrics as an uninterrupted run, bit for bit.

    kills     SIGKILL at a random moment, repeated until the run finishes
    writes    a fault before, during or after a write: the process is killed, or the disk is full

Every run is a forked process with a job of a few seconds (tests/tinyjob.py) that saves after every step.
"""

import contextlib
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))                # the tests' helpers

import tinyjob

import train
from mixdpo.files import atomic
from mixdpo.runs import checkpoint, log

USER = {"latent": "user", "beta": 0.5}
CASES = {
    "shared trunk": USER | {"epochs": 4},
    "shared trunk, incremental": USER | {"em": "incremental", "epochs": 2, "batch": 5},
    "own models": {"sharing": "models", "epochs": 4, "beta": 0.5},
    "own models, incremental": USER | {"sharing": "models", "em": "incremental", "epochs": 4,
                                       "variant": "monte-carlo", "draws": 2},
}
POINTS = [("save_file", "before"), ("save_file", "inside"), ("save_file", "after"), ("replace", "before"),
          ("replace", "after"), ("fsync", "before"), ("fsync", "after"), ("line", "before"), ("line", "inside"),
          ("line", "after")]
PROCESS, DISK = "killed", "disk full"


def forked(work) -> int:
    """Starts work() in a new process without output -> the process number."""
    child = os.fork()
    if child:
        return child
    torch.set_num_threads(1)
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1), os.dup2(quiet, 2)
    try:
        work()
    except BaseException:
        os._exit(1)
    os._exit(0)


def job(folder: Path, model: Path, name: str, options: dict):
    """The run as a function. It also keeps the last checkpoint before the finished one, with the optimizer's state."""
    def work():
        real = checkpoint.keep_newest
        checkpoint.keep_newest = lambda run, count: real(run, 2)
        train.run(train.TrainConfig(str(folder / "pairs.jsonl"), str(model), str(folder / name),
                                    **tinyjob.small(save_minutes=0.0, **options)))

    return work


def end(child: int) -> bool:
    """Waits for the process -> True if it succeeded."""
    return os.waitpid(child, 0)[1] == 0


def state_of(run: Path) -> dict:
    """All results of a run, by name."""
    files = {path.name: path.read_bytes() for path in (run / "metrics.jsonl", run / "responsibilities.jsonl")}
    for path in checkpoint.checkpoints(run):
        tensors, facts = atomic.read_tensors(path)
        files |= {f"{path.name} {name}": (x.dtype, x.shape, bytes(x.reshape(-1).contiguous().view(torch.uint8).numpy()))
                  for name, x in tensors.items()} | {path.name: facts["step"]}
    return files


@contextlib.contextmanager
def jobs():
    """Yields (folder with the preferences, model, {name: (state of the uninterrupted run, its seconds)})."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        model = tinyjob.make_model(folder / "model")
        tinyjob.write(folder / "pairs.jsonl", tinyjob.make_records())
        wanted = {}
        for n, (name, options) in enumerate(CASES.items()):
            began = time.monotonic()
            assert end(forked(job(folder, model, f"reference{n}", options))), f"{name}: failed"
            wanted[name] = state_of(folder / f"reference{n}"), time.monotonic() - began
            assert any("optimizer." in key for key in wanted[name][0]), "no optimizer's state to compare"
        yield folder, model, wanted


def kills(count: int, number: int, report) -> None:
    """Kills runs until `count` kills are done. report(number of kills, failure or None) after each finished run."""
    rng, done, trial = random.Random(number), 0, 0
    with jobs() as (folder, model, wanted):
        while done < count:
            for name, options in CASES.items():
                trial += 1
                run, killed = folder / f"killed{trial}", 0
                while True:
                    child = forked(job(folder, model, run.name, options))
                    limit = rng.uniform(0, 1.2 * wanted[name][1]) if killed < 12 else 600.0
                    began = time.monotonic()
                    while (ended := os.waitpid(child, os.WNOHANG)) == (0, 0) and time.monotonic() - began < limit:
                        time.sleep(0.005)
                    if ended != (0, 0):
                        wrong = None if ended[1] == 0 else f"{name}: ended with {ended[1]}"
                        break
                    os.kill(child, signal.SIGKILL)
                    os.waitpid(child, 0)
                    killed += 1
                done += killed
                if wrong is None and state_of(run) != wanted[name][0]:
                    wrong = f"{name}: killed {killed} times, ended with other results"
                report(killed, wrong)
                shutil.rmtree(run)


def inject(point: str, moment: str, fault: str, nth: int) -> None:
    """In this process, the nth write of the kind `point` fails."""
    left = [nth]

    def die():
        if fault == PROCESS:
            os.kill(os.getpid(), signal.SIGKILL)
        raise OSError(28, "No space left on device")

    def wrapped(real, inside):
        def call(*arguments, **options):
            left[0] -= 1
            if left[0] or moment == "after":
                out = real(*arguments, **options)
                return die() if left[0] == 0 else out
            return inside(*arguments, **options) if moment == "inside" else die()

        return call

    def half_of_a_file(tensors, path, metadata):
        real_save(tensors, path, metadata)
        os.truncate(path, Path(path).stat().st_size // 2)
        die()

    def half_of_a_line(log, *arguments):
        log.metrics.write('{"step": ')
        log.metrics.flush()
        die()

    real_save = atomic.save_file
    if point == "save_file":
        atomic.save_file = wrapped(real_save, half_of_a_file)
    elif point == "line":
        log.Log.step = wrapped(log.Log.step, half_of_a_line)
    else:
        setattr(os, point, wrapped(getattr(os, point), None))


def writes(number: int, report) -> None:
    """Every point, moment and fault, on each case. report(failure, or None) after each."""
    rng = random.Random(number)
    with jobs() as (folder, model, wanted):
        for n, (name, options) in enumerate(CASES.items()):
            for m, (point, moment) in enumerate(POINTS):
                for fault in (PROCESS, DISK):
                    run, nth = folder / f"fault{n}-{m}-{len(fault)}", rng.randrange(1, 7)

                    def work(inner=job(folder, model, run.name, options)):
                        inject(point, moment, fault, nth)
                        inner()

                    what = f"{name}: {fault} {moment} {point} {nth}"
                    failed = not end(forked(work))
                    resumed = end(forked(job(folder, model, run.name, options)))
                    wrong = None if failed else f"{what}: the fault had no effect"
                    if wrong is None and not resumed:
                        wrong = f"{what}: did not resume"
                    elif wrong is None and state_of(run) != wanted[name][0]:
                        wrong = f"{what}: ended with other results"
                    report(wrong)
                    shutil.rmtree(run)
