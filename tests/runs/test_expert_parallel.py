"""Processes that have one expert each train as one process does (runs/expert_parallel.py), with gloo. Each docstring
names the faults that its test was seen to fail on."""

import dataclasses
import hashlib
import json
import os
import shutil
import signal

import pytest
import test_distributed
import tinyjob
import torch
from ranks import Group
from test_distributed import SLICES, USER, errors, faulty, gap, program, same_figures, spied, until

import train
from mixdpo.runs import distributed, memory_estimate, parallel, rules, setup

CASES = {
    "pairs, gate": {"gate": "linear", "gate_lr": 1e-3, "gate_balance": 0.5, "gate_entropy": 0.1, "micro": 2},
    "users, gate, validation": USER | {"gate": "user", "gate_lr": 1e-3, "validation": "v.jsonl", "evaluate_every": 3},
    "users, fixed weights": USER | {"weights": "0.3,0.7"},
    "slices, context, updated weights": SLICES | {"estep": "context", "context": 2, "batch": 6, "weights": "update"},
    "robust, sampled": USER | {"robust": 0.1, "variant": "monte-carlo", "draws": 2, "clip": 0.05},
    "frozen, gate": {"gate": "linear", "gate_lr": 1e-3, "freeze": "0"},
    "frozen": {"freeze": "1"},
    "taken over": {"init_experts": "fresh,source:1", "start": "none"},
    "two models": {"model": "model,other"},
    "four experts": USER | {"experts": 4, "freeze": "2"},
}
RESUMED = "users, gate, validation"     # the case that some processes stop and others resume


def run(folder, out, case, **more):
    """One run. In `source:` and the names of models, folder/ is added."""
    options = {"sharing": "models"} | CASES[case] | more
    models = ",".join(str(folder / name) for name in options.pop("model", "model").split(","))
    if "init_experts" in options:
        options["init_experts"] = options["init_experts"].replace("source", str(folder / "source"))
    train.run(dataclasses.replace(test_distributed.config(folder, out, "", **options), model=models))


def digest(tensors):
    """Of the bits of named tensors."""
    found = hashlib.sha256()
    for name, x in sorted(tensors.items()):
        found.update(name.encode() + x.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def equal_in_all(job, made, save):
    """finish, after a comparison of what the processes have."""
    shared = made.gate.state_dict() | made.variants.tensors()
    assert len({*parallel.everyone(digest(shared))}) == 1, "processes have different gates or tables"
    assert len({*parallel.everyone(digest(made.experts.state_dict()))}) == made.experts.K, "twins differ"
    assert len(made.experts.models) == 1 and len(made.names) <= sum(1 for _ in made.experts.parameters()) + 2
    return setup.finish(job, made, save)


def all_cases(folder, count):
    """What each of `count` processes does: all cases that fit, one after the other."""
    def work():
        train.finish = equal_in_all
        for case, options in CASES.items():
            if options.get("experts", 2) <= count:
                written = spied(folder, f"{count}.json") if case == "pairs, gate" else None
                run(folder, f"{count}/{case}", case, expert_parallel=True)
                if written and distributed.rank() == 0:
                    written()
        train.finish = setup.finish
        if count == 4:
            run(folder, "by-2-then-4-copies", RESUMED)
            run(folder, "by-1-then-4", RESUMED, expert_parallel=True)

    return program(work)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Runs of all cases by one process, and by 2 and 4 with one expert each; runs that others have begun."""
    folder = tmp_path_factory.mktemp("experts")
    tinyjob.make_model(folder / "model")
    tinyjob.make_model(folder / "other", seed=1, layers=1, tied=False)
    tinyjob.write(folder / "d.jsonl", tinyjob.make_records(users=10, each=4))
    tinyjob.write(folder / "v.jsonl", tinyjob.make_records(users=7, each=3, seed=4))
    train.run(test_distributed.config(folder, "source", "", **USER | {"train_trunk": False, "head_lr": 1e-2}))

    def interrupted(out, **more):
        def work():
            train.step = until(5)
            run(folder, out, RESUMED, save_minutes=0.0, **more)

        return program(work)

    for case in CASES:
        run(folder, f"1/{case}", case)
    assert Group(2, interrupted("by-2-then-1", expert_parallel=True), folder / "a.txt").wait(120) == [130, 130]
    assert Group(1, interrupted("by-1-then-4"), folder / "b.txt").wait(120) == [130]
    shutil.copytree(folder / "by-2-then-1", folder / "by-2-then-4-copies")
    run(folder, "by-2-then-1", RESUMED)
    for count in (2, 4):
        group = Group(count, all_cases(folder, count), folder / f"{count}.txt")
        assert group.wait(240) == [0] * count, "\n".join(group.printed()[-60:])
    return folder


@pytest.mark.parametrize("count, case", [(count, case) for count in (2, 4) for case in CASES
                                         if CASES[case].get("experts", 2) <= count])
def test_processes_with_one_expert_each_give_the_run_of_one(folder, case, count):
    """Catches: a norm of one expert alone; gradients of other experts' log-probs that are added; figures, or a gate's
    gradient, that count once for each member of a team; a team whose members read different pairs; a frozen expert
    whose process does not take part; an expert that is missing in the checkpoint."""
    one, several = folder / "1" / case, folder / f"{count}" / case
    rows = tinyjob.lines(one / "metrics.jsonl")
    assert len(rows) >= 10
    assert gap(one, several) <= 1e-6
    assert gap(one, several, ("table", "kept", "log_v", "user_loss")) <= 1e-5               # nats, of sums of log-probs
    same_figures(one, several)
    assert [row["rate"] for row in rows] == [row["rate"] for row in tinyjob.lines(several / "metrics.jsonl")]
    assert ("clip" not in CASES[case]) or all(row["grad_norm"] > CASES[case]["clip"] for row in rows)


@pytest.mark.parametrize("name", ["by-2-then-1", "by-2-then-4-copies", "by-1-then-4"])
def test_a_run_is_resumed_by_other_processes(folder, name):
    """Catches: moments of one expert only, or of the wrong one; a checkpoint that only as many processes can read."""
    assert gap(folder / "1" / RESUMED, folder / name) <= 1e-6
    assert (folder / "4.txt").read_text().count("resumed at step 4 of 10") == 2


# --- volume -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [2, 4])
def test_a_step_exchanges_one_expert_and_few_numbers(folder, count):
    """An expert's gradient between the processes that have it, none if there is one; a gate's between all; the
    log-probs of this team's tokens in a row of each micro-batch's part; a norm; the figures of each pair.

    Catches: gradients of all experts that are exchanged by all; states or logits that are."""
    seen = json.loads((folder / f"{count}.json").read_text())
    found = tinyjob.tensors(folder / str(count) / "pairs, gate")
    expert, gate = (4 * sum(x.numel() for name, x in found.items() if name.startswith(begins)
                            and name not in ("gate.mean", "gate.scale")) for begins in ("experts.models.0.", "gate."))
    for step in range(10):
        calls = [call[1:] for call in seen if call[0] == step]
        reduced = [size for operation, _, size in calls if operation == "all_reduce"]
        assert reduced == [expert] * (count > 2) + [gate]
        sent = [size for operation, _, size in calls if operation == "all_gather"]
        *logps, figures, norm = sent
        assert norm == 4 and figures <= 8 * (2 * 2 + 4) * 4
        assert 0 < sum(logps) <= 4 * 8 * 2 * 7, "8 pairs, responses of at most 6 letters and an end"
        assert sum(reduced) + sum(sent) < 0.6 * (2 * expert + gate), "copies exchange the gradients of both experts"


# --- what is refused, and what is estimated ---------------------------------------------------------------------------


@pytest.mark.parametrize("options, count, says", [
    ({"sharing": "heads"}, 2, "--sharing models"), ({"experts": 1, "sharing": "heads"}, 2, "--experts 2 or more"),
    ({}, 1, "a multiple of --experts 2, not 1"), ({"experts": 3}, 4, "a multiple of --experts 3, not 4"),
    ({"experts": 4}, 2, "a multiple of --experts 4, not 2"), ({"shard": True}, 2, "--shard false"),
    ({"moments": "bfloat16"}, 2, "--moments float32"), ({"epsilon": 1.0, "delta": 1e-3}, 2, "no --epsilon")])
def test_what_cannot_be_combined_is_refused(tmp_path, monkeypatch, options, count, says):
    """Catches: a rule that is not there: processes that wait for ever, or a norm that is not the run's."""
    monkeypatch.setattr(rules, "world", lambda: count)
    config = test_distributed.config(tmp_path, "run", "", **{"sharing": "models"} | options)
    rules.validate(config)
    with pytest.raises(train.InputError, match=f"^--expert-parallel: needs .*{says}"):
        rules.validate(dataclasses.replace(config, expert_parallel=True))


def test_processes_that_experts_do_not_divide_are_refused_once(folder, tmp_path):
    """Catches: a traceback, a sentence of each process, a group that waits."""
    group = Group(3, program(lambda: run(folder, "refused", "frozen", expert_parallel=True)), tmp_path / "said.txt")
    assert group.wait(60) == [1, 1, 1]
    line, = errors(group)
    assert line.startswith("error: --expert-parallel: needs a number of processes that is a multiple of --experts 2")


def test_the_estimate_of_memory_counts_one_expert(folder, monkeypatch):
    """Catches: an estimate of all experts; of the smaller of two models; of a sum that is not made."""
    def estimate(processes, **options):
        monkeypatch.setattr(memory_estimate, "world", lambda: processes)
        made = test_distributed.config(folder, "", "", **{"latent": "user"} | options)
        return memory_estimate.estimate(dataclasses.replace(made, model=f"{folder / 'other'},{folder / 'model'}"
                                                            if made.experts > 1 else made.model), torch.float32)

    one, several = estimate(1, experts=1, latent="pair"), {"sharing": "models", "expert_parallel": True}
    assert estimate(2, **several) == one
    assert estimate(4, **several) == one | {"gradients": 2 * one["gradients"]}


def test_a_killed_process_ends_the_others(folder, tmp_path):
    """Catches: an exchange in a team that waits for ever; an error that is not the sentence of other exchanges."""
    group = faulty(folder, tmp_path, lambda: os.kill(os.getpid(), signal.SIGKILL), count=4, expert_parallel=True)
    while 1 not in group.ended:
        group.poll()
    assert group.wait(30) == [1, -signal.SIGKILL, 1, 1]
    assert [line.removeprefix("error: ") for line in errors(group)] == [distributed.MISSING]
