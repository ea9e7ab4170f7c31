"""data/experiment/judged.py and data/hh.py: real answers that several types of users judge. What each test catches
stands in its docstring."""

import gzip
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import tinyjob
from raising import raises_at

from data import hh
from data.experiment import judged
from data.experiment.judged import Item, deal, divide, fitting, line
from data.experiment.presets import HH
from data.report.job import read_job
from mixdpo.evaluation.tables import sentences
from mixdpo.preferences import read_preferences
from mixdpo.text.tokenizer import load_tokenizer

WORDS = {"helpful": "abcd", "harmless": "wxyz"}


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory):
    return tinyjob.make_model(tmp_path_factory.mktemp("chat"), context=128, special=("<|im_end|>", "<|im_start|>"))


def item(n=0, **prefers):
    return Item([{"role": "user", "content": f"hi {n}"}], ("abc", "wxyz"), prefers)


def hh_row(n, rng):
    """An answer of one type's letters and one of the other's; each type chooses its own."""
    texts = ["".join(rng.choice(list(WORDS[kind]), 4)) + f" {n}" for kind in hh.TYPES]
    objective, subset = ([*hh.TYPES][i] for i in (n % 2, n // 2 % 2))
    return {"prompt": f"Human: question {n}?", "responses": texts, "objective": objective, "source_subset": subset,
            "label": [*hh.TYPES].index(objective), "original_label": [*hh.TYPES].index(subset), "index": n}


def write_hh(folder, rows):
    folder.mkdir(exist_ok=True)
    with gzip.open(folder / hh.FILE, "wt") as file:
        file.writelines((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
    return folder


# ---- items


def test_hh_text_as_messages():
    """Catches: roles swapped, a turn that ends at a blank line, the word Human inside a text taken for a turn."""
    text = "Human: I am Human: yes.\n\nStill me.\n\nAssistant: Good.\n\nHuman: Why?"
    assert hh.conversation(text) == [{"role": "user", "content": "I am Human: yes.\n\nStill me."},
                                     {"role": "assistant", "content": "Good."}, {"role": "user", "content": "Why?"}]
    for bad in ("hello", "Human: a\n\nAssistant: b", "Human: a\n\nAssistant: \n\nHuman: b", "x\n\nHuman: a", ""):
        assert hh.conversation(bad) is None, bad


def test_hh_labels(tmp_path):
    """Catches: the first judgement kept over the new one of the same objective, one of two objectives lost, a faulty
    line passed over."""
    row = {"prompt": "Human: a", "responses": ["b", "c"], "objective": "helpful", "label": 1,
           "source_subset": "helpful", "original_label": 0}
    both = row | {"source_subset": "harmless"}
    items, facts = hh.load(str(write_hh(tmp_path / "data", [row, both, row | {"prompt": "odd"}])), {})
    assert [i.prefers for i in items] == [{"helpful": 1}, {"harmless": 0, "helpful": 1}]
    assert [i.conflict for i in items] == [False, True] and items[0].answers == ("b", "c")
    assert facts["read"] == {"pairs": 3, "not a conversation": 1, "labelled twice for one objective": 2,
                             "of these, otherwise": 2}
    for bad in ("{", row | {"label": 2}, row | {"objective": "funny"}, row | {"responses": ["b"]}, {"prompt": "a"}):
        with raises_at(file=tmp_path / "bad" / hh.FILE, line=2):
            hh.load(str(write_hh(tmp_path / "bad", [row, bad])), {})
    for data in (None, str(tmp_path)):
        with raises_at(file=Path(data or "") / hh.FILE):
            hh.load(data, {})


def test_items_that_do_not_fit_are_counted(chat_model):
    """Catches: an item that stops training later, answers that are one after the cut, a kind without its count."""
    turn, long = [{"role": "user", "content": "hi"}], [{"role": "user", "content": "x" * 80}]
    items = [Item(turn, ("abc", "xyz"), {}), Item(long, ("abc", "xyz"), {}), Item(turn, ("aaaaaaaab", "aaaaaaaac"), {}),
             Item(turn, ("", "xyz"), {}), Item(turn, ("same", "same"), {})]
    kept, left_out = fitting(items, load_tokenizer(chat_model), {"max_prompt": 64, "max_response": 8})
    assert kept == items[:1]
    assert left_out == {"turn too long": 1, "equal answers, or equal after truncation": 2, "an empty answer": 1}


def test_shares_of_conversations():
    """Catches: a conversation on two sides, a share that depends on the file's order, seeds that do not matter."""
    items = [item(n, helpful=0) for n in range(2000)]
    parts = divide(items, 0.25, seed=0)
    places = [[i.messages[0]["content"] for i in part] for part in parts]
    assert sorted(sum(places, [])) == sorted(i.messages[0]["content"] for i in items)
    assert len(places[0]) == pytest.approx(500, abs=90) and len(places[1]) == pytest.approx(1500, abs=90)
    assert divide(items[::-1], 0.25, seed=0) == parts and divide(items, 0.25, seed=1) != parts
    twice = divide([*items, item(3, harmless=1)], 0.25, seed=0)
    assert sum(any(i.messages == item(3).messages for i in part) for part in twice) == 1


def test_users_get_the_items_of_their_type():
    """Catches: an item dealt twice before all are dealt once, or twice to one user, another type's item."""
    items = [item(n, **{kind: n % 2 for kind in [*hh.TYPES][: 1 + n % 2]}) for n in range(20)]  # 20 helpful, 10 both
    users = {"a": "helpful", "b": "helpful", "c": "harmless", "d": "helpful", "e": "harmless"}
    dealt = deal(items, users, 8, seed=0)
    assert Counter(user for user, _ in dealt) == dict.fromkeys(users, 8)
    assert all(users[user] in i.prefers for user, i in dealt)
    for user in users:
        assert len({i.messages[0]["content"] for u, i in dealt if u == user}) == 8
    for kind, times in (("helpful", {1, 2}), ("harmless", {1, 2})):
        seen = Counter(i.messages[0]["content"] for user, i in dealt if users[user] == kind)
        assert set(seen.values()) <= times and len(seen) == (20 if kind == "helpful" else 10)
    with raises_at(10, "harmless", 11, option="pairs"):
        deal(items, users, 11, seed=0)


def test_a_line_says_who_chose_what():
    """Catches: the answers swapped, scores of a type that did not judge, or in the order of the answers."""
    row = line("u1", "harmless", item(0, helpful=0, harmless=1))
    assert [row[side][0]["content"] for side in ("chosen", "rejected")] == ["wxyz", "abc"]
    assert row["scores"] == {"helpful": [0, 1], "harmless": [1, 0]} and row["annotator"] == "harmless"
    assert line("u1", "helpful", item(0, helpful=0))["scores"] == {"helpful": [1, 0]}


def test_held_out_items_go_to_all_users_of_their_type(tmp_path):
    """Both types judge every item. Catches: turns that count the other type's judgements too, so that every
    second user had no held-out pair where all types judge every item."""
    items = [item(n, helpful=0, harmless=1) for n in range(10)]
    preset = {"seed": 0, "users": 4, "pairs": 2, "new_users": 1, "new_pairs": 2, "heldout_pairs": 0, "evaluate": 2}
    judged.write_preferences(tmp_path, [*hh.TYPES], items, items, preset)
    rows = [json.loads(row) for row in (tmp_path / "heldout.jsonl").read_text().splitlines()]
    count = Counter((row["annotator"], row["user"]) for row in rows)
    assert sorted(count.values()) == [2] * 4 + [3] * 4 and len({user for _, user in count}) == 8


# ---- the whole


def test_a_whole_tiny_job_of_two_objectives(chat_model, tmp_path, monkeypatch):
    """From the file to the table: all methods, held-out items that nobody trained on, what each type gets, conflicts,
    and new users, a job that goes on where it was. Catches: a held-out item among the training pairs, a user of two
    types, conflicts counted where one type judged, new users whom training knows, pairs of another type in a file of
    one type."""
    rng = np.random.default_rng(0)
    data = write_hh(tmp_path / "data", [hh_row(n, rng) for n in range(160)])
    quickly = {"targets": "", "rank": 2, "head_lr": 1e-2}
    runs = {name: options | quickly for name, options in HH["smoke"]["runs"].items()}
    small = {"users": 3, "pairs": 10, "heldout_pairs": 0, "max_prompt": 64, "max_response": 8,
             "train": {"batch": 20, "micro": 10, "dtype": "float32"}}
    monkeypatch.setitem(HH, "tiny", HH["smoke"] | small | {"runs": runs})
    words = f"--preset tiny --model {chat_model} --out {tmp_path / 'job'} --data-folder {data}".split()
    judged.main(hh.DATASET, words)
    job, tokenizer = tmp_path / "job", load_tokenizer(chat_model)
    train, held = (read_preferences(job / f"{name}.jsonl", tokenizer, 64, 8) for name in ("train", "heldout"))
    assert Counter(p.user for p in train) == {f"user-000{n}": 10 for n in range(1, 7)}
    assert len({(p.user, p.annotator) for p in [*train, *held]}) == 6
    trained, held_out = ({tuple(p.prompt) for p in pairs} for pairs in (train, held))
    assert not trained & held_out
    everything = json.loads((job / "results.json").read_text())
    results, new = everything["preferences"], everything["adapt"]
    assert list(new) == ["adapt-new-user", "adapt-new-user-new-prompt"]
    for name, curves in new.items():
        pairs = read_preferences(job / f"{name}.jsonl", tokenizer, 64, 8)
        assert not {p.user for p in pairs} & {p.user for p in train} and len({p.user for p in pairs}) == 2
        assert not {tuple(p.prompt) for p in pairs} & (trained if "prompt" in name else held_out)
        assert {run: [point["shown"] for point in curve] for run, curve in curves.items()} == dict.fromkeys(
            results, [0, 1, 2])
    assert list(results) == ["dpo", "dpo-harmless", "dpo-helpful", "mixture", "moe-user", "start"]
    for kind in hh.TYPES:
        of_type = read_preferences(job / f"train-{kind}.jsonl", tokenizer, 64, 8)
        assert {p.annotator for p in of_type} == {kind} == {*results[f"dpo-{kind}"]["trained_on"]}
        assert len(of_type) == 30
    sentence = sentences(everything)[0]
    assert sentence.startswith("mixture predicts") and "One policy per known type" in sentence
    facts = json.loads((job / "dataset.json").read_text())
    assert (facts["max_prompt"], facts["max_new"]) == (64, 8)
    both = [p for p in held if len(p.scores) == 2]
    for figures in results.values():
        assert set(figures["types"]) == set(hh.TYPES) and figures["conflicts"]["n"] == len(both) > 0
        assert len(figures["conflicts_by_pair"]) == len(both) == facts["heldout"]["conflicts"]
    dpo = results["dpo"]
    assert dpo["conflicts"]["mean"] == 0.5, "one policy serves one side of every conflict"
    share = {kind: dpo["types"][kind]["accuracy"]["n"] for kind in hh.TYPES}
    assert sum(share.values()) == len(held)
    assert "](report/adaptation.png)" in (job / "report.md").read_text()
    samples = [json.loads(row) for row in (job / "samples.jsonl").read_text().splitlines()]
    assert len(samples) == 4 and all(text.startswith(s["prompt"]) for s in samples for text in s["texts"].values())
    assert samples[0]["prompt"].startswith("<|im_start|>user\nquestion") and "dpo" in samples[0]["texts"]
    before = (job / "mixture" / "metrics.jsonl").stat().st_mtime_ns
    judged.main(hh.DATASET, words)
    assert (job / "mixture" / "metrics.jsonl").stat().st_mtime_ns == before
    with raises_at("settings", file=job):
        judged.main(hh.DATASET, [*words, "--users", "2"])


def test_each_type_as_one_user_who_judges_everything(chat_model, tmp_path, monkeypatch):
    """Users far larger than a batch. Catches: items of a type left out, or dealt to several users, a latent that wants
    whole users in a batch, responsibilities of slices for users in the report."""
    rng = np.random.default_rng(0)
    data = write_hh(tmp_path / "data", [hh_row(n, rng) for n in range(160)])
    runs = {"mixture": HH["smoke"]["runs"]["mixture"] | {"targets": "", "rank": 2, "head_lr": 1e-2, "epochs": 2}}
    small = {"heldout_pairs": 0, "max_prompt": 64, "max_response": 8, "evaluate": 2,
             "train": {"batch": 20, "micro": 10, "dtype": "float32"}}
    monkeypatch.setitem(HH, "tiny", HH["smoke"] | small | {"runs": runs})
    words = f"--preset tiny --model {chat_model} --out {tmp_path / 'job'} --data-folder {data}".split()
    judged.main(hh.DATASET, [*words, "--types-as-users", "true"])
    job = tmp_path / "job"
    train = read_preferences(job / "train.jsonl", load_tokenizer(chat_model), 64, 8)
    of = {(p.user, p.annotator) for p in train}
    assert len(of) == 2 and {annotator for _, annotator in of} == set(hh.TYPES)
    assert len(train) == json.loads((job / "dataset.json").read_text())["train"]["pairs"] > 100
    assert len({(p.user, tuple(p.prompt)) for p in train}) == len(train), "each item once for a type"
    run, = read_job(job).runs
    assert run.units == [annotator for _, annotator in dict.fromkeys((p.user, p.annotator) for p in train)]
    assert {g for step in run.steps for g in step["groups"]} == {0, 1}
    found = json.loads((job / "results.json").read_text())["preferences"]["mixture"]["alignment_train"]
    assert found["units"] == 2
    with raises_at("--users", "--pairs", option="types_as_users"):
        judged.main(hh.DATASET, [*words, "--types-as-users", "true", "--pairs", "3"])


def test_options_that_cannot_be_met(tmp_path):
    """Catches: a traceback in place of a sentence."""
    for option, value in (("preset", "big"), ("pairs", "-2"), ("users", "-1"), ("seed", "-2"), ("seed", "5000000000")):
        words = [] if option == "preset" else ["--preset", "smoke"]
        with raises_at(option=option):
            judged.main(hh.DATASET, [*words, f"--{option}", value, "--out", str(tmp_path / "x")])
    assert not (tmp_path / "x").exists()
