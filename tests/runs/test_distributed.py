"""Several processes train as one does (runs/distributed.py, runs/parallel.py), with gloo. Each docstring names the
faults that its test was seen to fail on."""

import dataclasses
import hashlib
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
import torch.distributed as dist
from ranks import Group

import train
from mixdpo.config import Stopped, command
from mixdpo.files.atomic import read_tensors
from mixdpo.plan import Plan, Visit
from mixdpo.preferences import Pair
from mixdpo.private.keys import Key
from mixdpo.runs import checkpoint, distributed, memory_estimate, parallel, setup

ROOT = Path(__file__).parents[2]
TEN_STEPS = {"batch": 8, "micro": 8, "epochs": 2, "lr": 2e-5, "head_lr": 3e-4, "beta": 0.5}
USER, SLICES = {"latent": "user"}, {"latent": "user", "em": "incremental"}
PRIVATE = {"epsilon": 8.0, "delta": 1e-3, "clip": 0.1, "batch": 4, "epochs": 4}
CASES = {
    "pairs, gate": {"gate": "linear", "gate_lr": 1e-3, "gate_balance": 0.5, "gate_entropy": 0.1},
    "users, gate, validation": USER | {"gate": "user", "gate_lr": 1e-3, "validation": "v.jsonl", "evaluate_every": 3},
    "models, slices, tempered": SLICES | {"sharing": "models", "variant": "tempered", "variant_temperature": 0.5},
    "adapters, context, slices": SLICES | {"sharing": "lora", "shared_rank": 2, "estep": "context", "context": 2,
                                           "batch": 6},
    "robust, updated weights": USER | {"train_trunk": False, "robust": 0.1, "weights": "update", "prior": 2.0,
                                       "variant": "monte-carlo", "draws": 2},
    "one expert": {"experts": 1, "micro": 2},
    "full heads, context": USER | {"rank": 0, "estep": "context", "context": 1, "batch": 6},
    "private": PRIVATE | {"gate": "linear", "gate_lr": 1e-3, "privacy_unit": "user", "batch": 1, "epochs": 1},
    "private users": PRIVATE | USER | {"privacy_unit": "user", "sharing": "lora", "estep": "context", "context": 2},
}
SHARDED = ("pairs, gate", "users, gate, validation", "models, slices, tempered", "full heads, context", "one expert")
STOPPED = "models, slices, tempered"    # the case that several processes stop and others resume
KEY = Key.public(3)


def config(folder, out, case, **more):
    """The options of a case, or without one those that are given; its run is folder/out."""
    options = CASES.get(case, {}) | more
    if "validation" in options:
        options["validation"] = str(folder / options["validation"])
    known = tinyjob.small(**options)
    used = {name: value for name, value in TEN_STEPS.items() if name in known or name not in tinyjob.SMALL}
    return train.TrainConfig(str(folder / "d.jsonl"), str(folder / "model"), str(folder / out),
                             **tinyjob.small(**used | options))


def run(folder, out, case, **more):
    """One run. Only process 0 has the right key; the others must get it from there."""
    key = KEY if distributed.rank() == 0 else Key.public(4)
    train.run(config(folder, out, case, **more), key if "private" in case else None)


def program(work):
    """work() as train.py's own command runs it, within the group of processes."""
    def joined(words):
        with distributed.joined():
            work()

    return lambda rank: command(joined)


def until(t):
    """train.step, which is interrupted in step t."""
    real = train.step

    def step(state, *rest):
        if state.t + 1 == t:
            raise Stopped("here")
        return real(state, *rest)

    return step


def spied(folder, name):
    """Notes in folder/NAME the bytes of every exchange: (step, operation, bytes)."""
    seen = []
    for operation in ("all_reduce", "all_gather"):
        def call(first, *rest, real=getattr(dist, operation), operation=operation):
            sent = rest[0] if operation == "all_gather" else first
            seen.append([train.STEP, operation, str(sent.dtype), sent.numel() * sent.itemsize])
            return real(first, *rest)

        setattr(dist, operation, call)
    real = train.step

    def step(state, *rest):
        train.STEP = state.t
        try:
            return real(state, *rest)
        finally:
            train.STEP = -1

    train.STEP, train.step = -1, step
    return lambda: (folder / name).write_text(json.dumps(seen))


def all_cases(folder, count):
    """What each of `count` processes does: all cases, one after the other."""
    def equal_everywhere(job, made, save):
        digest = hashlib.sha256()
        distributed.reshard(made.experts)
        for tensors in (made.experts.state_dict(), made.gate.state_dict(), made.variants.tensors()):
            for name, x in sorted(tensors.items()):
                if not distributed.is_sharded(x):
                    digest.update(name.encode() + x.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        found = parallel.everyone(digest.hexdigest())
        assert len(set(found)) == 1, f"processes have different parameters: {found}"
        return finish(job, made, save)

    def reads(*_, **__):
        raise AssertionError("a process other than 0 writes a file")

    def fetched():
        if distributed.rank() == 0:
            time.sleep(0.2)
            (folder / f"fetched-{count}").write_text("")
        return (folder / f"fetched-{count}").exists()

    def work():
        assert parallel.first_alone(fetched), "a process that does not wait for process 0"
        train.finish = equal_everywhere
        if distributed.rank():
            os.replace = Path.unlink = reads
        for n, case in enumerate(CASES):
            written = spied(folder, f"{count}.json") if n == 0 else None
            run(folder, f"{count}/{n}", case)
            if written and distributed.rank() == 0:
                written()
            if count == 4 and case in SHARDED:
                run(folder, f"4/sharded-{n}", case, shard=True, checkpointing=case == "one expert")
        if count == 4:
            run(folder, "stopped", STOPPED, shard=True)

    finish = train.finish
    return program(work)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder with a model and preferences."""
    folder = tmp_path_factory.mktemp("ranks")
    tinyjob.make_model(folder / "model")
    tinyjob.write(folder / "d.jsonl", tinyjob.make_records(users=10, each=4))
    tinyjob.write(folder / "v.jsonl", tinyjob.make_records(users=7, each=3, seed=4))
    return folder


@pytest.fixture(scope="module")
def folder(files):
    """Runs of all cases by 1, 2 and 4 processes; and two whose first four steps were made by 2, the rest by 1 or 4."""
    folder = files

    def interrupted():
        train.step = until(5)
        run(folder, "stopped", STOPPED, save_minutes=0.0)

    for n, case in enumerate(CASES):
        run(folder, f"1/{n}", case)
    assert Group(2, program(interrupted), folder / "stopped.txt").wait(120) == [130, 130]
    shutil.copytree(folder / "stopped", folder / "stopped-1")
    run(folder, "stopped-1", STOPPED)
    for count in (2, 4):
        group = Group(count, all_cases(folder, count), folder / f"{count}.txt")
        assert group.wait(240) == [0] * count, "\n".join(group.printed()[-60:])
    return folder


def gap(a, b, only=("experts.", "gate.")):
    """The largest difference of what two runs learnt; or of their tensors whose names begin with `only`."""
    a, b = tinyjob.tensors(a), tinyjob.tensors(b)
    assert a.keys() == b.keys()
    some = [(a[name].double(), b[name].double()) for name in a if name.startswith(only)]
    return max(float(torch.where((x == y) | x.isnan() & y.isnan(), 0.0, (x - y).abs()).max()) for x, y in some)


def same_figures(one, several):
    for a, b in zip(tinyjob.lines(one / "metrics.jsonl"), tinyjob.lines(several / "metrics.jsonl"), strict=True):
        assert a.keys() == b.keys()
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-5) and a.get("clipped") == b.get("clipped")
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4) and a["pairs"] == b["pairs"]


@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("case", CASES)
def test_several_processes_give_the_run_of_one(folder, case, count):
    """In one case a step has no example, and in several a process has no pair of a step.

    Catches: gradients that are not summed, or of means over parts; bonuses of a gate that count once a part; a table
    or robust weights that know only their own pairs; noise that is added by every process; a key that each draws; lines
    or files that every process writes."""
    n = [*CASES].index(case)
    one, several = folder / f"1/{n}", folder / f"{count}/{n}"
    assert len(tinyjob.lines(one / "metrics.jsonl")) >= 10
    assert gap(one, several) <= 1e-6
    assert gap(one, several, ("table", "kept", "log_v", "user_loss")) <= 1e-5               # nats, of sums of log-probs
    same_figures(one, several)
    assert (0 in [row["pairs"] for row in tinyjob.lines(one / "metrics.jsonl")]) == (case == "private")


@pytest.mark.parametrize("count", [2, 4])
def test_the_reference_of_several_processes_is_that_of_one(folder, count):
    """Catches: pairs in another order, a part that is missing, states that one process keeps and another does not."""
    names = sorted(path.name for path in (folder / "1" / "cache").iterdir())
    assert names == sorted(path.name for path in (folder / str(count) / "cache").iterdir()) and len(names) == 3
    for name in names:
        one, several = (read_tensors(folder / its / "cache" / name)[0] for its in ("1", str(count)))
        assert all(torch.allclose(one[key], several[key], atol=1e-5) for key in one) and one.keys() == several.keys()


@pytest.mark.parametrize("case", SHARDED)
def test_sharded_parameters_give_the_same_run(folder, case):
    """Catches: the mean of gradients, a process that makes fewer passes, parameters that are put back into a copy."""
    n = [*CASES].index(case)
    assert gap(folder / f"1/{n}", folder / f"4/sharded-{n}") <= 1e-6
    same_figures(folder / f"1/{n}", folder / f"4/sharded-{n}")


@pytest.mark.parametrize("name", ["stopped", "stopped-1"])
def test_a_run_of_two_processes_is_resumed_by_others(folder, name):
    """By one, and by four whose parameters are sharded. Catches: moments that are lost, or those of other parts."""
    assert gap(folder / f"1/{[*CASES].index(STOPPED)}", folder / name) <= 1e-6
    assert "resumed at step 4 of 10" in (folder / "4.txt").read_text()


# --- volume -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [2, 4])
def test_a_step_exchanges_little_more_than_it_must(folder, count):
    """The floor: the gradient of each trained parameter once, and log q and h of each pair, 4 bytes each. On top: two
    flags, whether to save and to stop, four numbers that are reported of each pair, and the rows that fill the parts of
    a step up to equal numbers of pairs."""
    seen = json.loads((folder / f"{count}.json").read_text())
    trained = sum(x.numel() for name, x in tinyjob.tensors(folder / f"{count}/0").items()
                  if name.startswith(("experts.", "gate.")) and name not in ("gate.mean", "gate.scale"))
    rows = 8 * (2 * 2 + 4) * 4                                              # 8 pairs, log q and h, K = 2, four numbers
    for step in range(10):
        calls = [call[1:] for call in seen if call[0] == step]
        assert [call for call in calls if call[0] == "all_reduce"] == [["all_reduce", "torch.float32", 4 * trained]]
        sent, = [size for operation, _, size in calls if operation == "all_gather"]
        assert rows <= count * sent <= 1.5 * rows
    between = [call for call in seen if call[0] == -1 and call[2] == "torch.uint8" and call[3] == 2]
    assert len(between) == 9, "one exchange of two flags after each step but the last"


# --- what each process does -------------------------------------------------------------------------------------------


def plan_of(lengths, owner=None):
    pairs = [Pair([1], [2] * n, [3]) for n in lengths]
    visits = [Visit(n, [n], []) for n in range(len(pairs))]
    return Plan(pairs, [[n] for n in range(len(pairs))], visits, [], owner)


def test_parts_of_a_step_are_balanced(monkeypatch):
    """Catches: parts of equal numbers of pairs, parts that are not contiguous."""
    monkeypatch.setattr(parallel, "world", lambda: 3)
    lengths = [*range(1, 61)]
    parts = parallel.divider(plan_of(lengths))(range(60))
    assert parts == sorted(parts) and set(parts) == {0, 1, 2}
    cost = [sum(n + 2 for n, part in zip(lengths, parts) if part == r) for r in range(3)]
    assert max(cost) - min(cost) <= 62, "the cost of one pair"


def test_a_part_has_whole_examples(monkeypatch):
    """Catches: an example of DP-SGD whose gradient is clipped in two parts."""
    monkeypatch.setattr(parallel, "world", lambda: 4)
    owner = torch.tensor([5, 5, 5, 2, 2, 2, 2, 9, 9])
    parts = parallel.divider(plan_of([4] * 9, owner))(range(9))
    assert all(len({part for part, its in zip(parts, owner.tolist()) if its == example}) == 1 for example in (2, 5, 9))
    assert len(set(parts)) == 3


@pytest.mark.parametrize("count, rank, wanted", [(3, 0, range(0, 3)), (3, 2, range(6, 10)), (20, 19, range(9, 10)),
                                                 (20, 0, None)])
def test_parts_of_a_pass(monkeypatch, count, rank, wanted):
    """Catches: an item of two processes, or of none; a pass over nothing."""
    monkeypatch.setattr(parallel, "world", lambda: count)
    monkeypatch.setattr(parallel, "rank", lambda: rank)
    monkeypatch.setattr(parallel, "everyone", lambda value: [value])
    assert parallel.in_parts(range(10), list) == ([] if wanted is None else [[*wanted]])


# --- faults -----------------------------------------------------------------------------------------------------------


def errors(group):
    wanted = ("error: ", "Traceback", "run the same command")
    return [line for line in group.printed() if any(text in line for text in wanted)]


def other_data(folder):
    os.chdir(folder / "other")


def other_revision(folder):
    real = setup.environment
    setup.environment = lambda: real() | {"revision": "0123456789"}


def other_torch(folder):
    real = setup.environment
    setup.environment = lambda: real() | {"torch": "2.12.0"}


def other_program(folder):
    setup.program_key = lambda: "0123456789"


@pytest.mark.parametrize("fault, says", [(other_data, "data_key"), (other_revision, "revision"),
                                         (other_program, "program"), (other_torch, "torch"), (None, "beta")])
def test_a_process_that_differs_is_refused(files, tmp_path, fault, says):
    """Catches: gradients of different data or losses that are summed; a wait for ever; a sentence of each process."""
    (tmp_path / "other").mkdir()
    (tmp_path / "d.jsonl").write_bytes((files / "d.jsonl").read_bytes())
    tinyjob.write(tmp_path / "other" / "d.jsonl", tinyjob.make_records(users=10, each=4, seed=1))
    own = dataclasses.replace(config(files, "refused", "one expert"), data="d.jsonl", out=str(tmp_path / "run"))

    def work():
        os.chdir(tmp_path)
        different = distributed.rank() == 1
        if different and fault:
            fault(tmp_path)
        train.run(own if not different or fault else dataclasses.replace(own, beta=0.7))

    group = Group(2, program(work), tmp_path / "said.txt")
    assert group.wait(60) == [1, 1]
    line, = errors(group)
    assert line.startswith(f"error: process 1 differs from process 0: {says} ") and "Start all processes with" in line


def faulty(files, tmp_path, fault, case="models, slices, tempered", count=2, **more):
    """Processes of which number 1 calls fault() in place of its step 4."""
    real = train.step

    def step(state, *rest):
        if state.t == 3 and distributed.rank() == 1:
            fault()
        return real(state, *rest)

    def work():
        train.step = step
        train.run(dataclasses.replace(config(files, "", case, **more), out=str(tmp_path / "run")))

    return Group(count, program(work), tmp_path / "said.txt")


def test_a_killed_process_ends_the_others(files, tmp_path):
    """And the run resumes to the same bits. Catches: a wait for ever, a traceback, a sentence of each process."""
    group = faulty(files, tmp_path, lambda: os.kill(os.getpid(), signal.SIGKILL), count=3, save_minutes=0.0)
    while 1 not in group.ended:
        group.poll()
    assert group.wait(30) == [1, -signal.SIGKILL, 1]
    assert [line.removeprefix("error: ") for line in errors(group)] == [distributed.MISSING]
    runs = []
    for name, out in (("again", tmp_path / "run"), ("whole", tmp_path / "whole")):
        own = dataclasses.replace(config(files, "", STOPPED), out=str(out))
        group = Group(3, program(lambda: train.run(own)), tmp_path / f"{name}.txt")
        assert group.wait(60) == [0, 0, 0], group.printed()[-20:]
        runs.append(out)
    assert tinyjob.equal(*runs) and (runs[0] / "metrics.jsonl").read_bytes() == (runs[1] / "metrics.jsonl").read_bytes()


def test_a_process_that_hangs_ends_the_others(files, tmp_path, monkeypatch):
    """Catches: no limit on a wait, or one of half an hour that nobody has set."""
    monkeypatch.setattr(distributed, "TIMEOUT", distributed.datetime.timedelta(seconds=3))
    began = time.monotonic()
    group = faulty(files, tmp_path, lambda: time.sleep(40))
    while 0 not in group.ended and time.monotonic() - began < 30:
        group.poll()
        time.sleep(0.05)
    assert group.ended == {0: 1}, "it waits for ever"
    group.kill(1)
    assert group.wait(5) == [1, -signal.SIGKILL]
    assert [line.removeprefix("error: ") for line in errors(group)] == [distributed.MISSING]


def test_an_error_of_one_process_is_shown_once(files, tmp_path):
    """Catches: an error that only process 0 may show; the others' errors about it."""
    def fault():
        raise FloatingPointError("gradient norm nan of one example")

    group = faulty(files, tmp_path, fault, count=3)
    assert group.wait(60) == [1, 1, 1]
    line, = errors(group)
    assert "gradient norm nan of one example; this step was not made" in line


def test_a_signal_to_one_process_stops_all_after_the_same_step(files, tmp_path):
    """Catches: a process that stops alone; a checkpoint that is not written."""
    group = faulty(files, tmp_path, lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert group.wait(60) == [130, 130]
    assert [path.stem for path in checkpoint.checkpoints(tmp_path / "run")] == ["00000004"]
    line, = errors(group)
    assert "stopped and saved after step 4 of 10; run the same command again to resume" in line


def test_a_signal_that_others_had_before_is_not_the_second():
    """torchrun sends it to one process after the other. Catches: one that ends at once, before all is saved."""
    with checkpoint.Stop("run") as stop:
        stop.requested = True                                               # as any_process says
        stop.ask(signal.SIGTERM, None)
        with pytest.raises(KeyboardInterrupt):
            stop.ask(signal.SIGTERM, None)


def test_the_estimate_of_memory_knows_the_parts(files, monkeypatch):
    """Catches: an estimate that warns of memory that no process needs, or forgets the sum of gradients."""
    one = memory_estimate.estimate(config(files, "", STOPPED), torch.float32)
    monkeypatch.setattr(memory_estimate, "world", lambda: 4)
    copied, sharded = (memory_estimate.estimate(config(files, "", STOPPED, shard=shard), torch.float32)
                       for shard in (False, True))
    assert copied == one | {"gradients": 2 * one["gradients"]}
    assert sharded == one | {part: one[part] / 4 for part in ("weights", "gradients", "moments")}


def test_shard_needs_several_processes(files):
    with pytest.raises(train.InputError, match="torchrun"):
        train.run(config(files, "alone", "one expert", shard=True))


def test_torchrun(files, tmp_path):
    """The command of the documentation, which chooses its options from the data. Catches: output of every process."""
    words = {"data": files / "d.jsonl", "model": files / "model", "out": tmp_path / "run", "dtype": "float32"}
    call = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
                           "train.py", *(str(word) for name, value in words.items() for word in (f"--{name}", value))],
                          cwd=ROOT, capture_output=True, text=True, timeout=240,
                          env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""})
    assert call.returncode == 0, call.stderr[-3000:]
    said = call.stdout.splitlines()
    for begins in ("chosen from the data", "options: ", "finished: "):
        assert len([line for line in said if line.startswith(begins)]) == 1
    assert checkpoint.load_checkpoint(tmp_path / "run", {})[1]["finished"]
