"""data/experiment/leaderboard.py on the committed sample and a tiny model, and its rules on items written here. What
each test catches stands in its docstring."""

import json

import tinyjob
import torch
from raising import raises_at

from data import ultrafeedback
from data.experiment import leaderboard
from data.experiment.judged import Item
from data.experiment.leaderboard import divide, usable, write_files
from data.sample import make
from mixdpo.config import InputError
from mixdpo.preferences import Pair

FOUR = ["helpfulness", "honesty", "instruction_following", "truthfulness"]


def item(n, *prefers, ties=()):
    return Item([{"role": "user", "content": f"q{n}"}], (f"a{n}", f"b{n}"), dict(zip(FOUR, prefers)), frozenset(ties))


def test_items_on_which_half_prefer_either_answer():
    """Catches: an undecided type's coin; a tie of a type that does not take part; three against one."""
    items = [item(0, 0, 1, 0, 0), item(1, 0, 1, 0, 1, ties=["honesty"]), item(2, 0, 1, 1, 0, ties=["truthfulness"]),
             item(3, 1, 1, 0, 0), item(4, 1, 0, 1, 0)]
    assert [i.messages[0]["content"] for i in usable(items, FOUR[:2])] == ["q0", "q2", "q4"]
    assert [i.messages[0]["content"] for i in usable(items, FOUR)] == ["q3", "q4"]


def test_parts_share_no_instruction():
    """Catches: an instruction in both parts; sizes that are not the protocol's; a file that is too small read as one
    that is large enough."""
    items = [item(n // 2, n % 2, 1 - n % 2) for n in range(200)]
    training, test = divide(items, FOUR[:2], 160, 40, 0)
    assert (len(training), len(test)) == (80, 20)
    assert not {str(i.messages) for i in training} & {str(i.messages) for i in test}
    training, test = divide(items[:50], FOUR[:2], 160, 40, 0)
    assert (len(training), len(test)) == (40, 10)
    assert divide(items, FOUR[:2], 160, 40, 1)[1] != test


def test_users_and_context_pairs(tmp_path):
    """Catches: a user of two types; users with more or fewer context pairs than four; a name that tells the type; test
    instructions in the survey; a choice of the other type."""
    items = [item(n, n % 2, 1 - n % 2) for n in range(70)]
    write_files(tmp_path, FOUR[:2], (items[:64], items[64:]), 0)
    rows = [json.loads(line) for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    users = {row["user"] for row in rows}
    assert len(rows) == 128 and len(users) == 8 and all(name.startswith("user-") for name in users)
    for user in users:
        own = [row for row in rows if row["user"] == user]
        assert len({row["annotator"] for row in own}) == 1 and len(own) == 16
        assert sum(row["context"] for row in own) == 4
        assert len({json.dumps(row["prompt"]) for row in own}) == 16
    survey, test = ([json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
                    for name in ("survey", "test"))
    assert len(test) == 12 and not {str(r["prompt"]) for r in survey} & {str(r["prompt"]) for r in test}
    assert {row["scores"][row["annotator"]][0] for row in rows + survey + test} == {1}


def test_the_context_pairs_of_a_choice(monkeypatch, tmp_path):
    """Two opposed experts and sure types. Catches: context pairs of another type; the test pair as its own context; a
    prior in place of the posterior."""
    pairs = [Pair([n], [1], [2], annotator="ab"[n % 2]) for n in range(20)]
    h = torch.tensor([[3.0, -3.0], [-3.0, 3.0]])[torch.arange(20) % 2]
    one = type("One", (), {"config": type("C", (), {"experts": 2}), "experts": None})
    monkeypatch.setattr(leaderboard, "load_run", lambda *_: one)
    monkeypatch.setattr(leaderboard, "load_references", lambda *_: ([], None))
    monkeypatch.setattr(leaderboard, "margins_of", lambda runs, models, tokenizer, path, cache: iter(
        [(runs[0], pairs, h, torch.full((20, 2), 0.5).log())]))
    found = leaderboard.predictions(tmp_path, "mixture", {"data_folder": ""}, 0)
    assert found[""][0].tolist() == [0.5] * 20 and found[", 4 context pairs"][0].tolist() == [1.0] * 20


def test_the_whole_protocol_on_the_sample(tmp_path, monkeypatch, capsys):
    """Catches: a row that is missing; accuracies of other types' choices; a job that cannot be run again."""
    special = ("<|im_end|>", "<|im_start|>")
    model = tinyjob.make_model(tmp_path / "model", context=256, special=special)
    monkeypatch.setattr(leaderboard, "LEADERBOARD", leaderboard.LEADERBOARD | {
        "seeds": 2, "max_prompt": 128, "max_response": 60,
        "train": {"epochs": 1, "batch": 16, "micro": 16, "dtype": "float32", "head_lr": 1e-3}})
    words = f"--preset leaderboard --model {model} --out {tmp_path / 'job'} --data-folder {make.FILE.parent}".split()
    ultrafeedback.start(words)
    text = (tmp_path / "job" / "leaderboard.md").read_text()
    for name in ("UF-P-2", "UF-P-4"):
        part = text.partition(f"## {name}")[2].partition("##")[0]
        assert all(f"| {row} |" in part for row in ("one policy (DPO)", "mixture", "mixture, 4 context pairs",
                                                    "one policy per known type"))
        assert len({line.split("|")[3] for line in part.splitlines() if "±" in line}) == 1      # all rows: all choices
    capsys.readouterr()
    ultrafeedback.start(words)
    assert capsys.readouterr().out.count("finished before") >= 12
    assert (tmp_path / "job" / "leaderboard.md").read_text() == text


def test_a_file_without_disagreement(tmp_path):
    """Catches: an empty test file that is evaluated."""
    (tmp_path / "ultrafeedback.jsonl").write_text(json.dumps({"instruction": "do", "completions": [
        {"response": text, "annotations": {kind: {"Rating": rating} for kind in FOUR}} for text, rating in
        (("a", "5"), ("b", "1"))]}) + "\n")
    model = tinyjob.make_model(tmp_path / "model", special=("<|im_end|>", "<|im_start|>"))
    with raises_at(option="preset", kind=InputError):
        ultrafeedback.start(["--preset", "leaderboard", "--model", str(model), "--out", str(tmp_path / "job"),
                             "--data-folder", str(tmp_path)])
