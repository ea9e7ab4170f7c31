"""--log without any of its packages: what is sent, and when (runs/loggers.py); tests/peers/test_curves.py reads what
the packages have written. Each docstring names the faults that its test was seen to fail on."""

import sys

import pytest
import tinyjob
from ranks import Group

import train
from mixdpo.config import InputError, command
from mixdpo.runs import checkpoint, distributed, loggers

SENT = ["rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins", "logps/chosen", "logps/rejected",
        "loss", "lr", "grad_norm", "mixture/bound", "mixture/gap", "mixture/effective_experts",
        "mixture/responsibility_entropy", "mixture/gate_information"]
SAME = {"lr": "rate", "mixture/bound": "bound", "mixture/gap": "gap",
        "mixture/effective_experts": "effective_experts", "mixture/responsibility_entropy": "q_entropy",
        "mixture/gate_information": "gate_information"}


@pytest.fixture
def sent(monkeypatch):
    """Stands in for TensorBoard; the list of what it is told."""
    found = []

    def fake(config, run, t):
        found.append(("open", t))
        return loggers.Logger(lambda step, values: found.append((step, values)), lambda: found.append(("flush",)),
                              lambda: found.append(("close",)))

    monkeypatch.setattr(loggers, "to_tensorboard", fake)
    monkeypatch.setattr(loggers, "must_be_installed", lambda log: None)
    return found


@pytest.mark.parametrize("log", ["tensorboard", "wandb", "trackio"])
def test_a_missing_package_is_an_error_before_anything_is_read(log, tmp_path, model_dir, monkeypatch):
    """Catches: an error after the passes over the data; one that names neither the extra nor the command."""
    monkeypatch.setitem(sys.modules, loggers.MODULES[log], None)
    with pytest.raises(InputError, match=rf"--log: got {log}, .*extra `log`: pip install -e \.\[log\]"):
        tinyjob.run(tmp_path, model_dir, tinyjob.make_records(), log=log)
    assert not (tmp_path / "run").exists() and not (tmp_path / "cache").exists()


def test_every_step_is_sent_with_the_values_of_its_line(sent, tmp_path, model_dir):
    """Catches: a figure under the name of another; a step that is not sent; a checkpoint before the flush."""
    out = tinyjob.run(tmp_path, model_dir, tinyjob.make_records(), log="tensorboard", latent="user", gate="user")
    lines = tinyjob.lines(out / "metrics.jsonl")
    assert sent[0] == ("open", 0) and sent[-2:] == [("flush",), ("close",)]
    assert sent[1:-2] == [(line["step"], {name: line[SAME.get(name, name)] for name in SENT}) for line in lines]
    assert len(lines) == 3 and all(line["gap"] > 0.01 for line in lines[:2]) and abs(lines[2]["gap"]) < 1e-6
    assert lines[0]["rewards/chosen"] == pytest.approx(0, abs=1e-6) and abs(lines[2]["rewards/chosen"]) > 1e-4


def test_of_one_expert_the_margins_are_dpos(sent, tmp_path, model_dir):
    """Catches: rewards of another beta; chosen and rejected exchanged."""
    out = tinyjob.run(tmp_path, model_dir, tinyjob.make_records(), log="tensorboard", experts=1, beta=0.7)
    for line in tinyjob.lines(out / "metrics.jsonl"):
        assert line["rewards/margins"] == pytest.approx(line["margin"][0], abs=1e-5)
        assert line["rewards/accuracies"] == line["accuracy"][0] or line["step"] == 1       # rounding decides there
        assert line["gap"] == pytest.approx(0, abs=1e-6)


def test_a_private_run_sends_what_is_covered_and_nothing_before_it_ends(sent, tmp_path, model_dir):
    """Catches: a figure without noise; steps that are sent as they end, whose times tell how many examples they had."""
    out = tinyjob.run(tmp_path, model_dir, tinyjob.make_records(), log="tensorboard", epsilon=8.0, batch=4)
    lines = tinyjob.lines(out / "metrics.jsonl")
    assert sent == [("open", 0), *((line["step"], {"lr": line["rate"], "grad_norm": line["grad_norm"]})
                                   for line in lines), ("close",)]


def test_the_log_may_differ_when_a_run_resumes(sent, tmp_path, model_dir, monkeypatch):
    """Catches: a run that is refused for its --log; a logger that begins at step 1 again."""
    save = checkpoint.Saver.after

    def stop(self, t, *rest):
        save(self, t, *rest)
        if t == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(checkpoint.Saver, "after", stop)
        tinyjob.run(tmp_path, model_dir, tinyjob.make_records(), save_minutes=0.0)
    assert sent == []
    tinyjob.run(tmp_path, model_dir, tinyjob.make_records(), log="tensorboard")
    assert [entry[0] for entry in sent] == ["open", 3, "flush", "close"] and sent[0] == ("open", 2)


def test_of_several_processes_the_first_logs(sent, tmp_path, model_dir):
    """Catches: every process logs; the texts' figures of one process's pairs only."""
    alone = tinyjob.run(tmp_path, model_dir, tinyjob.make_records(), name="alone")
    tinyjob.write(tmp_path / "run.jsonl", tinyjob.make_records())

    def work(words):
        with distributed.joined():
            tinyjob.run(tmp_path, model_dir, None, log="tensorboard")
            (tmp_path / f"sent-{distributed.rank()}").write_text(str(len(sent)))

    group = Group(2, lambda rank: command(work), tmp_path / "said")
    assert group.wait(120) == [0, 0], "\n".join(group.printed()[-20:])
    assert [(tmp_path / f"sent-{rank}").read_text() for rank in range(2)] == ["6", "0"]
    for one, two in zip(*(tinyjob.lines(run / "metrics.jsonl") for run in (alone, tmp_path / "run")), strict=True):
        for name in SENT:
            assert one[SAME.get(name, name)] == pytest.approx(two[SAME.get(name, name)], abs=1e-4), name


def test_the_option_is_one_of_three():
    """Catches: a name that is taken for none."""
    with pytest.raises(InputError, match="--log: got 'tensorbord'; choose one of tensorboard, wandb, trackio"):
        train.run(train.TrainConfig("d.jsonl", "model", "out", log="tensorbord"))
