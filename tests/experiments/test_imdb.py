"""The IMDb experiment: sources, shares, sampling, the rule that makes pairs, and the job as a whole, on tiny files."""

import csv
import gzip
import io
import json
import re
import tarfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import small
import torch
from raising import raises_at
from ranks import Group

from data import imdb
from data.experiment import common, simulated
from data.experiment.estimate import estimate, work
from data.experiment.pairs import Rules, judge_pairs, kinds, name_users, pair_facts, pair_line, spreads
from data.experiment.presets import HH, IMDB, REVIEWS, ULTRAFEEDBACK
from data.experiment.simulated import prompt_of, response_of, sample
from data.experiment.stages import key_of, read_lines, stage, write_lines
from data.imdb import divide
from data.texts.movies import Review, clean, load_reviews, read_archive, read_csv
from mixdpo.config import InputError, Stopped, command
from mixdpo.models.llama import Llama, LlamaConfig
from mixdpo.models.lora import projections
from mixdpo.models.weights import save_model
from mixdpo.preferences import read_preferences
from mixdpo.runs.rules import validate
from mixdpo.text.tokenizer import load_tokenizer

LETTERS = [chr(c) for c in range(33, 127)]
ROW = {"split": "train", "label": "pos", "text": "A film."}


def save_tiny(folder):
    """A model directory: a character a token, one layer, random weights."""
    vocabulary = {letter: i for i, letter in enumerate([*LETTERS, "Ġ"])}
    document = {
        "model": {"type": "BPE", "vocab": vocabulary, "merges": []}, "decoder": {"type": "ByteLevel"},
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True},
        "added_tokens": [{"id": len(vocabulary), "content": "<eos>", "special": True}],
    }
    folder.mkdir(parents=True)
    (folder / "tokenizer.json").write_text(json.dumps(document))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<eos>"}))
    torch.manual_seed(0)
    config = LlamaConfig(vocab=len(vocabulary) + 1, width=16, layers=1, heads=2, kv_heads=1, inner=32, context=256)
    save_model(Llama(config), folder)
    return folder


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("tiny") / "model")


# ---- reviews


def test_clean_takes_breaks_and_stray_bytes_out():
    """Caught: words glued together where a break stood; Windows-1252 bytes and control characters left in."""
    assert clean("one<br /><br />two<br>three\x85 it\x92s\x96ok\n\n four\x00") == "one two three… it’s–ok four"


def write_reviews(folder, rows):
    with gzip.open(folder / "imdb.jsonl.gz", "wt") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    return folder


def test_texts_in_both_splits_are_removed_and_repeats_counted(tmp_path):
    """Caught: a text kept on one side, compared before cleaning; repeats counted as in both; a label lost to one."""
    rows = [ROW | {"text": "both<br />here"}, ROW | {"text": "both here", "split": "test"}, ROW | {"text": "twice"},
            ROW | {"text": "twice"}, ROW | {"text": "test", "split": "test", "label": "neg"},
            ROW | {"text": "seen", "split": "unsup", "label": "unsup"}, ROW | {"text": "seen"}]
    reviews, counts = load_reviews(write_reviews(tmp_path, rows))
    assert sorted((r.text, r.split, r.label) for r in reviews) == [
        ("seen", "train", 1), ("test", "test", 0), ("twice", "train", 1)]
    assert counts == {"source": "imdb.jsonl.gz", "read": 7, "texts_in_both_splits": 1, "repeated": 2,
                      "train": 2, "test": 1, "unsup": 0}


@pytest.mark.parametrize("line", ["{", '{"text": "a"}', '{"text": "a", "split": "train", "label": "good"}', "[]"])
def test_a_faulty_line_is_named(tmp_path, line):
    """Caught: a bare KeyError; lines counted from 0."""
    with gzip.open(tmp_path / "imdb.jsonl.gz", "wt") as file:
        file.write(json.dumps(ROW) + "\n" + line + "\n")
    with raises_at(file=tmp_path / "imdb.jsonl.gz", line=2):
        load_reviews(tmp_path)


def test_the_official_archive_is_read(tmp_path):
    """Caught: bags of words and lists of links taken for reviews; neg and pos swapped; unlabelled ones in train."""
    members = {"train/pos/0_9.txt": "good", "train/neg/0_1.txt": "bad", "test/neg/3_2.txt": "poor é",
               "train/unsup/0_0.txt": "who knows", "train/urls_pos.txt": "http://", "README": "x"}
    with tarfile.open(tmp_path / "a.tar.gz", "w:gz") as archive:
        for name, text in members.items():
            member = tarfile.TarInfo(f"aclImdb/{name}")
            member.size = len(text.encode())
            archive.addfile(member, io.BytesIO(text.encode()))
    assert list(read_archive(tmp_path / "a.tar.gz")) == [
        ("good", "train", 1), ("bad", "train", 0), ("poor é", "test", 0), ("who knows", "unsup", None)]


def test_the_package_is_read(tmp_path):
    """Caught: Rotten Tomatoes' sentences taken for reviews; labels left as strings."""
    with open(tmp_path / "a.csv", "w", newline="") as file:
        csv.writer(file).writerows([["text", "label", "source"], ['a "b",\nc', 0, "imdb"], ["d", 1, "rotten_tomatoes"]])
    assert list(read_csv(tmp_path / "a.csv")) == [('a "b",\nc', "train", 0)]


def test_what_is_fetched_where_no_file_is_given(tmp_path, monkeypatch):
    """Caught: the package asked for before the archive; a damaged archive of the user's passed over."""
    asked = []

    def asset(name, data):
        asked.append(name)
        if name == "imdb":
            raise InputError("no such host")
        with open(tmp_path / "a.csv", "w") as file:
            file.write("text,label,source\nfine,1,imdb\n")
        return tmp_path / "a.csv"

    monkeypatch.setattr("data.texts.movies.fetch.asset", asset)
    reviews, counts = load_reviews(tmp_path)
    assert [r.text for r in reviews] == ["fine"] and asked == ["imdb", "imdb-train"]
    (tmp_path / "aclImdb_v1.tar.gz").write_bytes(b"damaged")
    with raises_at("no such host"):
        load_reviews(tmp_path)


# ---- shares


def many_reviews(train=300, test=200, unsup=0):
    sizes = {"train": train, "test": test, "unsup": unsup}
    return [Review(f"{split} review {n} " + "word " * 60, split, None if split == "unsup" else n % 2)
            for split, size in sizes.items() for n in range(size)]


SIZES = {"seed": 0, "prompts": 50, "heldout": 40, "reviews": 60}


def test_shares_are_apart_and_come_from_their_splits(tiny):
    """Caught: a review in two shares or lost from all; held-out prompts from train; too few or too many."""
    reviews, tokenizer = many_reviews(unsup=100), load_tokenizer(tiny)
    taken, rest, kept = divide(reviews, SIZES, tokenizer)
    assert kept == 1
    assert {name: len(rows) for name, rows in taken.items()} == {"heldout": 40, "train": 50, "reviews": 60}
    texts = [r.text for rows in taken.values() for r, _ in rows] + [r.text for r in rest]
    assert len(texts) == len(set(texts)) == len(reviews)
    splits = {name: {r.split for r, _ in rows} for name, rows in taken.items()}
    assert splits == {"heldout": {"test"}, "train": {"train"}, "reviews": {"unsup"}}
    assert [r.split for r in rest] == sorted((r.split for r in rest), key=lambda split: split != "train")


def test_shares_do_not_depend_on_the_order_of_the_source(tiny):
    """Caught: a choice by position; a seed without effect."""
    reviews, tokenizer = many_reviews(test=0), load_tokenizer(tiny)
    first, again = (divide(order, SIZES, tokenizer)[0] for order in (reviews, reviews[::-1]))
    other = divide(reviews, SIZES | {"seed": 1}, tokenizer)[0]
    assert first == again and first["train"] != other["train"]


def test_too_few_reviews_shrink_every_share_alike(tiny):
    """Caught: the last share starved, or reviews used twice, where the presets ask for more than there are."""
    taken, rest, kept = divide(many_reviews(train=75, test=0), SIZES, load_tokenizer(tiny))
    assert kept == pytest.approx(0.97 / 2)
    assert {name: len(rows) for name, rows in taken.items()} == {"heldout": 19, "train": 24, "reviews": 29}


def test_a_prompt_is_the_first_tokens_and_its_text_gives_them_back(tiny, monkeypatch):
    """Caught: a review hardly longer than its prompt; a prompt cut inside a character; one token too many."""
    tokenizer = load_tokenizer(tiny)
    assert prompt_of("x" * 127, tokenizer) is None
    assert prompt_of("0123456789" * 20, tokenizer) == "0123456789012345"
    cut = SimpleNamespace(encode=lambda text: list(range(16)), decode=lambda ids: "half \ufffd")
    assert prompt_of("x" * 200, cut) is None
    merged = SimpleNamespace(encode=lambda text: list(range(len(text))), decode=lambda ids: "short")
    assert prompt_of("x" * 200, merged) is None


# ---- sampling


def test_only_what_its_text_gives_back_is_kept(tiny):
    """Caught: end of text left in the response; blank responses; tokens that the text would not give."""
    tokenizer = load_tokenizer(tiny)
    ids = tokenizer.encode(" fine")
    assert response_of([*ids, tokenizer.eos], tokenizer) == response_of(ids, tokenizer) == " fine"
    assert response_of([tokenizer.eos], tokenizer) is None and response_of(tokenizer.encode("  "), tokenizer) is None
    other = SimpleNamespace(eos=9, encode=lambda text: [7], decode=lambda ids: "ab")
    assert response_of([7], other) == "ab" and response_of([5, 6], other) is None


def test_interrupted_sampling_goes_on_to_the_same_texts(tiny, tmp_path, monkeypatch):
    """Caught: lines lost or repeated after an interruption, a torn line kept, randomness by place in the part."""
    tokenizer, preset = load_tokenizer(tiny), {"continuations": 3, "max_response": 5}
    monkeypatch.setattr(simulated, "AT_ONCE", 6)                                 # two prompts a part
    (tmp_path / "reference").symlink_to(tiny)
    write_lines(tmp_path / "p.jsonl", ({"prompt": f"prompt {n}"} for n in range(7)))
    sample(tmp_path, preset, tokenizer, "p.jsonl", seed=3, key="k" * 64)
    whole = read_lines(tmp_path / "sampled-p.jsonl")
    assert [row["prompt"] for row in whole] == [f"prompt {n}" for n in range(7)]
    assert all(len(row["responses"]) + row["lost"] == 3 for row in whole)
    assert len({text for row in whole for text in row["responses"]}) > 10   # each its own randomness
    lines = (tmp_path / "sampled-p.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "sampled-p.jsonl").unlink()
    (tmp_path / "sampled-p.jsonl.kkkkkkkkkkkk").write_text("".join(lines[:3]) + lines[3][:9])
    sample(tmp_path, preset, tokenizer, "p.jsonl", seed=3, key="k" * 64)
    assert read_lines(tmp_path / "sampled-p.jsonl") == whole
    assert not list(tmp_path.glob("*.kkkk*"))


def test_interrupted_annotation_goes_on_to_the_same_file(tmp_path, monkeypatch):
    """Caught: whole parts done again, a part cut elsewhere than before, a torn line kept, the file other than in one
    go."""
    rows = [{"prompt": f"p{n}", "responses": ["a" * n, "b", "c"][: 1 + n % 3]} for n in range(1500)]
    write_lines(tmp_path / "sampled-p.jsonl", rows)
    calls = []

    def score(texts, names, job):
        calls.append(len(texts))
        return {name: [len(text) + n for n, text in enumerate(texts)] for name in names}   # the place in a part counts

    monkeypatch.setattr(simulated, "score", score)
    simulated.annotate(tmp_path, "p.jsonl", "k" * 64)
    whole, parts = (tmp_path / "scored-p.jsonl").read_bytes(), list(calls)
    (tmp_path / "scored-p.jsonl").unlink()
    lines = whole.splitlines(keepends=True)
    (tmp_path / "scored-p.jsonl.kkkkkkkkkkkk").write_bytes(b"".join(lines[:700]) + lines[700][:9])
    calls.clear()
    simulated.annotate(tmp_path, "p.jsonl", "k" * 64)
    assert (tmp_path / "scored-p.jsonl").read_bytes() == whole and calls == parts[1:] and len(parts) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["sampled-p.jsonl", "scored-p.jsonl"]


# ---- pairs


def test_kinds_of_a_prompt_by_hand():
    """Caught: gaps not divided by the spread; a margin on the judge alone; chosen for rejected; kinds mixed."""
    scores = {"a": [0.0, 1.0, 2.0, 2.1], "b": [0.0, 30.0, 10.0, 12.0]}
    found = kinds(scores, "a", {"a": 1.0, "b": 10.0}, margin=0.5)
    assert found == {
        "agree": [(pytest.approx(1.2), 3, 0), (1.0, 2, 0), (1.0, 1, 0)],
        "conflict": [(1.1, 3, 1), (1.0, 2, 1)],
        "other": [],
    }
    assert kinds(scores, "b", {"a": 1.0, "b": 10.0}, margin=1.5) == {                           # no gap of a's is 1.5
        "agree": [], "conflict": [], "other": [(3.0, 1, 0), (2.0, 1, 2), (1.8, 1, 3)]}
    assert kinds({"a": [1, 1], "b": [1, 2]}, "a", {"a": 1, "b": 1}, 0.0) == {"agree": [], "conflict": [], "other": []}


def test_spreads_are_within_prompts():
    """Caught: differences between prompts counted as spread, which would hide those within; a constant annotator."""
    assert spreads([{"a": [0.0, 1.0]}, {"a": [10.0, 11.0]}, {"a": [5.0]}], ["a"]) == {"a": pytest.approx(0.5**0.5)}
    with raises_at("annotator a ", option="preset"):
        spreads([{"a": [1.0, 1.0]}], ["a"])


def some_scores(prompts=60, n=4, names=("a", "b"), seed=0):
    rng = np.random.default_rng(seed)
    return [{a: rng.normal(size=n).tolist() for a in names} for _ in range(prompts)]


def test_every_user_gets_its_pairs_and_both_kinds():
    """Caught: quotas by chance, a prompt twice for a user, a loser chosen, margins ignored, lines in order of user."""
    scores, users = some_scores(), name_users(10, ["a", "b"], seed=0)
    spread = spreads(scores, ["a", "b"])
    judged = judge_pairs(scores, users, 10, Rules(0.3, 0.5, spread), seed=0)
    assert len(judged) == 100 and [p["user"] for p in judged] != sorted(p["user"] for p in judged)
    for user, kind in users.items():
        own = [p for p in judged if p["user"] == user]
        assert len(own) == len({p["prompt"] for p in own}) == 10 and {p["annotator"] for p in own} == {kind}
        assert sum(p["kind"] == "agree" for p in own) == 3 and sum(p["kind"] == "conflict" for p in own) == 7
    for p in judged:
        gap = {a: (s[p["chosen"]] - s[p["rejected"]]) / spread[a] for a, s in scores[p["prompt"]].items()}
        other = gap["b" if p["annotator"] == "a" else "a"]
        assert gap[p["annotator"]] >= 0.5 and (other >= 0.5 if p["kind"] == "agree" else other <= -0.5)
    assert judged == judge_pairs(scores, users, 10, Rules(0.3, 0.5, spread), seed=0)
    assert judged != judge_pairs(scores, users, 10, Rules(0.3, 0.5, spread), seed=1)


def test_of_a_prompts_pairs_the_clearest_is_seen():
    """Caught: the first pair in order, or the one clearest for the judge alone."""
    scores = [{"a": [0.0, 2.0, 3.0], "b": [0.0, -2.0, -0.6]}]
    for p in judge_pairs(scores, {"u": "a"}, 1, Rules(0.0, 0.5, {"a": 1.0, "b": 1.0}), seed=0):
        assert (p["chosen"], p["rejected"]) == (1, 0)           # (2, 0) has the judge's larger gap, and b's 0.6


def test_users_see_different_pairs_while_there_are_any():
    """Caught: the clearest pair for everybody; the two orders of a pair held for two; prompts' counts mixed up."""
    scores = [{"a": [0.0, 2.0, 3.0], "b": [0.0, -2.0, -0.6]}] * 2         # clear conflicts: (1, 0), (2, 0); not (2, 1)
    users = {"u": "a", "v": "b", "w": "a"}
    judged = judge_pairs(scores, users, 2, Rules(0.0, 0.5, {"a": 1.0, "b": 1.0}), seed=0)
    seen = {(p["user"], p["prompt"]): (p["chosen"], p["rejected"]) for p in judged}
    for prompt in (0, 1):
        assert [seen[user, prompt] for user in users] == [(1, 0), (0, 2), (1, 0)]


def test_where_prompts_run_out_pairs_are_filled_in_or_refused():
    """Caught: fewer pairs in silence; a pair that is not clear for its judge."""
    agreeing = [{"a": [0.0, 1.0], "b": [0.0, 1.0]}] * 4
    judged = judge_pairs(agreeing, {"u": "a"}, 4, Rules(0.25, 0.5, {"a": 1.0, "b": 1.0}), seed=0)
    assert sorted(p["kind"] for p in judged) == ["agree", "filled", "filled", "filled"]
    assert all(p["chosen"] == 1 for p in judged) and len({p["prompt"] for p in judged}) == 4
    with raises_at("u (a)", "4 pairs on 4", 5, option="preset"):
        judge_pairs(agreeing, {"u": "a"}, 5, Rules(0.25, 0.5, {"a": 1.0, "b": 1.0}), seed=0)
    with raises_at("u (a)", "0 pairs on 4", 1, option="preset"):
        judge_pairs(agreeing, {"u": "a"}, 1, Rules(0.25, 1.5, {"a": 1.0, "b": 1.0}), seed=0)


def test_without_a_wanted_share_pairs_of_any_kind_are_taken():
    """Each user's first prompts that have a clear pair. Caught: quotas of kinds; prompts that are passed over for their
    kind; pairs counted as filled; a pair that is not clear, or that many have seen."""
    scores, users = some_scores(), name_users(10, ["a", "b"], seed=0)
    spread = spreads(scores, ["a", "b"])
    judged = judge_pairs(scores, users, 10, Rules(None, 0.5, spread), seed=0)
    assert len(judged) == 100 and {p["kind"] for p in judged} == {"any"}
    signs = set()
    for u, (user, judge) in enumerate(users.items()):
        order = np.random.default_rng([0, 11, u]).permutation(len(scores)).tolist()
        clear = [p for p in order if any(kinds(scores[p], judge, spread, 0.5).values())]
        assert sorted(p["prompt"] for p in judged if p["user"] == user) == sorted(clear[:10])
    for p in judged:
        gap = {a: (s[p["chosen"]] - s[p["rejected"]]) / spread[a] for a, s in scores[p["prompt"]].items()}
        assert gap[p["annotator"]] >= 0.5
        signs.add(gap["b" if p["annotator"] == "a" else "a"] > 0)
    assert signs == {True, False}
    one = [{"a": [0.0, 2.0, 3.0], "b": [0.0, -2.0, -0.6]}]
    rules = Rules(None, 0.5, {"a": 1.0, "b": 1.0})
    assert len({(p["chosen"], p["rejected"]) for p in judge_pairs(one, {"u": "a", "v": "a"}, 1, rules, seed=0)}) == 2


def test_a_users_name_says_nothing_of_its_type():
    """Caught: types by turns or in blocks, sizes uneven, a seed without effect."""
    users = name_users(60, ["a", "b", "c"], seed=0)
    types = list(users.values())
    assert list(users)[:2] == ["user-0001", "user-0002"] and all(types.count(kind) == 20 for kind in "abc")
    assert types != sorted(types) and types != ["a", "b", "c"] * 20 and users != name_users(60, ["a", "b", "c"], seed=1)


def test_facts_by_hand():
    """Caught: Bayes' assignment without the agreeing pairs' coin; agreement over the wrong pairs."""
    rows = [{"prompt": "p", "responses": ["x", "y"], "scores": {"a": [1.0, 0.0], "b": [1.0, 0.0]}, "lost": 0},
            {"prompt": "q", "responses": ["x", "y"], "scores": {"a": [1.0, 0.0], "b": [0.0, 2.0]}, "lost": 0}]
    judged = [{"user": "u", "annotator": "a", "kind": "agree", "prompt": 0, "chosen": 0, "rejected": 1},
              {"user": "u", "annotator": "a", "kind": "conflict", "prompt": 1, "chosen": 0, "rejected": 1},
              {"user": "v", "annotator": "b", "kind": "conflict", "prompt": 1, "chosen": 1, "rejected": 0}]
    facts = pair_facts(rows, judged, ["a", "b"], {"a": 0.5, "b": 1.0})
    assert facts["agreement"] == pytest.approx(1 / 3) and facts["agreement_of_all_pairs"] == 0.5
    assert facts["bayes_assignment_of_pairs"] == pytest.approx(2.5 / 3) and facts["bayes_assignment_of_users"] == 1
    assert facts["mean_gap_of_judge"] == {"a": 2.0, "b": 2.0} and facts["kinds"] == {"agree": 1, "conflict": 2}
    assert pair_line(rows[1], judged[2]) == {
        "prompt": "q", "chosen": "y", "rejected": "x", "user": "v", "annotator": "b",
        "scores": {"a": [0.0, 1.0], "b": [2.0, 0.0]}}


# ---- the job


def test_a_stage_is_done_once_and_again_for_another_key(tmp_path):
    """Caught: a stage redone, not redone for other inputs, or held for done after it failed or its file was deleted."""
    made = []

    def make(fail=False):
        (tmp_path / "file").write_text("x")
        made.append(1)
        assert not fail

    for key, count in (("one", 1), ("one", 1), ("two", 2), ("one", 3)):
        stage(tmp_path, "s", key, ["file"], make)
        assert len(made) == count
    (tmp_path / "file").unlink()
    stage(tmp_path, "s", "one", ["file"], make)
    assert len(made) == 4
    with pytest.raises(AssertionError):
        stage(tmp_path, "s", "three", ["file"], lambda: make(fail=True))
    stage(tmp_path, "s", "one", ["file"], make)
    assert len(made) == 6
    assert len({key_of({"a": 1}), key_of({"a": 2}), key_of({"a": 1}, tmp_path / "file")}) == 3


def test_presets_fit_together():
    """Caught: prompts too few for a user's pairs, users under ten pairs, options that do not exist, adapters on
    projections that one of the models does not have."""
    for preset in IMDB.values():
        assert preset["prompts"] >= preset["pairs"] >= 10 and preset["heldout"] >= preset["heldout_pairs"]
        assert preset["evaluate"] <= preset["heldout"] and preset["users"] % len(preset["annotators"]) == 0
        for options in preset["runs"].values():
            validate(common.TrainConfig(model="", out="", **{"data": ""} | preset["train"] | options))
            whole = options.get("latent") == "user" and options.get("em") != "incremental"
            assert not whole or preset["train"]["batch"] >= preset["pairs"]         # whole users fit a batch
        simulated.FinetuneConfig(data="", model="", out="", **preset["finetune"])
    for preset in REVIEWS.values():
        assert preset["prompts"] / 2 >= preset["pairs"] and preset["heldout"] / 2 >= preset["heldout_pairs"]
        assert preset["evaluate"] > 4 * preset["apart"]
        assert set(preset["annotators"]) == {a for judges in preset["domains"].values() for a in judges}
        for options in preset["runs"].values():
            validate(common.TrainConfig(data="", model="", out="", **preset["train"] | options))
        simulated.FinetuneConfig(data="", model="", out="", **preset["finetune"])
    for family in ("gpt2", "llama"):                                        # a job trains whichever it can have
        for presets in (IMDB, REVIEWS, HH, ULTRAFEEDBACK):
            assert all(projections(small.model(family), options.get("targets", ""))
                       for preset in presets.values() for options in preset["runs"].values())
    assert list(IMDB) == list(REVIEWS) == ["smoke", "quick", "cpu", "paper"]


def test_a_whole_tiny_job(tiny, tmp_path, monkeypatch, capsys):
    """Caught: files that training cannot read, prompts in train and held-out, work done twice, truths left out."""
    pytest.importorskip("spacy", reason="spaCy is not installed (the `data` extra)")
    pytest.importorskip("sklearn", reason="scikit-learn is not installed (the `data` extra)")
    rng, words = np.random.default_rng(0), {1: ["superb", "moving"], 0: ["awful", "boring"]}
    texts = [" ".join([*rng.choice(list("abcdefgh"), 60), *words[n % 2], str(n)]) for n in range(400)]
    rows = [ROW | {"label": ("neg", "pos")[n % 2], "text": text} for n, text in enumerate(texts)]
    data = tmp_path / "data"
    data.mkdir()
    write_reviews(data, rows)
    sizes = {"prompts": 20, "heldout": 10, "margin": 0.0, "max_response": 24, "users": 2}
    preset = IMDB["smoke"] | sizes | {"finetune": {"steps": 1, "batch": 2, "tokens": 32, "held": 4}}
    monkeypatch.setitem(IMDB, "tiny", preset)
    trained, evaluated = [], []
    monkeypatch.setattr(common, "run", trained.append)
    monkeypatch.setattr(common, "evaluate", evaluated.append)
    flags = ["--preset", "tiny", "--model", str(tiny), "--out", str(tmp_path / "job"), "--data-folder", str(data)]
    simulated.main(imdb.DATASET, flags)
    job, tokenizer = tmp_path / "job", load_tokenizer(tiny)
    pairs = {name: read_preferences(job / f"{name}.jsonl", tokenizer, 16, 24) for name in ("train", "heldout")}
    assert len(pairs["train"]) == 20 and len(pairs["heldout"]) == 8
    kinds = ["detailed", "plain"]
    of_types = {kind: read_preferences(job / f"train-{kind}.jsonl", tokenizer, 16, 24) for kind in kinds}
    assert all({p.annotator for p in of} == {kind} for kind, of in of_types.items())
    assert sum(map(len, of_types.values())) == 20
    assert not {tuple(p.prompt) for p in pairs["train"]} & {tuple(p.prompt) for p in pairs["heldout"]}
    assert {p.user for p in pairs["train"]} == {p.user for p in pairs["heldout"]} == {"user-0001", "user-0002"}
    prompts = [tokenizer.encode(row["prompt"]) for row in read_lines(job / "prompts.jsonl")]
    assert all(p.prompt in prompts for p in pairs["heldout"])
    for p in pairs["train"]:
        assert p.scores.keys() == {"sentiment", "informativeness", "grammar", *kinds} and p.context is not None
        assert p.scores[p.annotator][0] > p.scores[p.annotator][1]
    apart = [{tuple(p.prompt) for p in pairs["train"] if p.context == context} for context in (True, False)]
    assert not apart[0] & apart[1] and sum(p.context for p in pairs["train"]) == 2 * 4
    for name, part in (("adapt-new-user", "train"), ("adapt-new-user-new-prompt", "heldout")):
        new = read_preferences(job / f"{name}.jsonl", tokenizer, 16, 24)
        assert {p.user for p in new} == {"new-user-0001", "new-user-0002"} and len(new) == 12
        assert {p.annotator for p in new} == {*kinds}
        file = "prompts.jsonl" if part == "heldout" else "prompts-train.jsonl"
        assert {tuple(p.prompt) for p in new} <= {tuple(tokenizer.encode(r["prompt"])) for r in read_lines(job / file)}
    facts = json.loads((job / "dataset.json").read_text())
    assert facts["annotators"] == kinds
    for pair in pairs["train"]:
        for side in (0, 1):
            for kind, weights in facts["utilities"].items():
                want = sum(weight * pair.scores[reward][side] for reward, weight in weights.items())
                assert pair.scores[kind][side] == pytest.approx(want)
    spread = facts["spread"]
    assert facts["utilities"]["plain"] == pytest.approx(
        {"sentiment": 1 / spread["sentiment"], "informativeness": -1 / spread["informativeness"]})
    assert facts["max_new"] == 24 and facts["train"]["pairs"] == 20
    assert facts["reviews"]["taken"] == {"heldout": 10, "train": 20, "reviews": 60}
    assert facts["reviews"]["judge_of_sentiment"]["accuracy_whole"] >= 0.88
    assert [c.out for c in trained] == [
        str(job / name) for name in ("dpo", "mixture", "dpo-detailed", "dpo-plain", "start")]
    assert [Path(c.data).name for c in trained] == [
        "train.jsonl", "train.jsonl", "train-detailed.jsonl", "train-plain.jsonl", "train.jsonl"]
    assert [c.dir for c in evaluated] == [str(job)]
    capsys.readouterr()
    times = {file: file.stat().st_mtime_ns for file in job.rglob("*") if file.is_file()}
    simulated.main(imdb.DATASET, flags)
    assert {file: file.stat().st_mtime_ns for file in job.rglob("*") if file.is_file()} == times
    printed = capsys.readouterr().out
    assert not re.search(r'[{}]|":', printed), "a dictionary on the console"
    stages = ("split", "sample-train", "annotate-heldout", "judge")
    assert all(f"[{name}] finished before" in printed for name in stages)


def test_a_job_of_two_processes_is_that_of_one(tiny, tmp_path, monkeypatch):
    """From reviews to results.json, with the real judges and runs; two processes go on where two others were stopped.
    Caught: a lock, a stage or a file of every process; a continuation, a pair or a result that depends on the number
    of processes."""
    pytest.importorskip("spacy", reason="spaCy is not installed (the `data` extra)")
    pytest.importorskip("sklearn", reason="scikit-learn is not installed (the `data` extra)")
    rng, data = np.random.default_rng(0), tmp_path / "data"
    texts = [" ".join([*rng.choice(list("abcdefgh"), 60), ("awful", "superb")[n % 2], str(n)]) for n in range(400)]
    data.mkdir()
    write_reviews(data, [ROW | {"label": ("neg", "pos")[n % 2], "text": text} for n, text in enumerate(texts)])
    smoke = IMDB["smoke"]
    preset = smoke | {"prompts": 20, "heldout": 10, "evaluate": 5, "margin": 0.0, "users": 2,
                      "finetune": {"steps": 2, "batch": 3, "tokens": 32, "held": 4}, "evaluation": {"examples": 0},
                      "train": smoke["train"] | {"dtype": "float32"},
                      "runs": {name: smoke["runs"][name] for name in ("dpo", "mixture")}}
    monkeypatch.setitem(IMDB, "tiny", preset)
    flags = ["--preset", "tiny", "--model", str(tiny), "--data-folder", str(data), "--out"]

    def by(count, name, stop=None):
        """The job `name` by so many processes, which stop before their runs are trained, if `stop`."""
        def work(rank):
            if stop:
                common.run = stop
            command(lambda words: simulated.main(imdb.DATASET, [*flags, str(tmp_path / name / "job")]))

        group = Group(count, work, tmp_path / f"{name}-{count}.txt")
        return group.wait(300), "\n".join(group.printed()[-40:])

    def stopped(config):
        raise Stopped("here")

    for status, printed in (by(1, "one"), by(2, "two", stopped), by(2, "two")):
        assert set(status) in ({0}, {130}), printed
    files = ["reviews.jsonl", "sampled-prompts.jsonl", "scored-prompts-train.jsonl", "train.jsonl", "heldout.jsonl",
             "dataset.json", "samples.jsonl"]
    for name in files:
        assert (tmp_path / "one" / "job" / name).read_bytes() == (tmp_path / "two" / "job" / name).read_bytes(), name
    one, two = (json.loads((tmp_path / name / "job" / "results.json").read_text()) for name in ("one", "two"))
    for name in ("dpo", "mixture"):
        assert one["preferences"][name]["by_pair"] == pytest.approx(two["preferences"][name]["by_pair"], abs=1e-5)
    assert [row["gain"] for row in one["own_reward"]] == [
        {key: pytest.approx(x, abs=1e-5, nan_ok=True) for key, x in row["gain"].items()} for row in two["own_reward"]]
    assert "[sample-train] finished before" in (tmp_path / "two-2.txt").read_text()


def test_the_estimate_counts_what_a_preset_asks_for():
    """Caught: a part of the work left out; backward counted as forward, or where there is none; a directory's size
    taken for nothing."""
    base = IMDB["quick"] | {"new_users": 0}
    first, of_new = work(base, 1e8, 16), work(IMDB["quick"], 1e8, 16)
    trunks = 1 + 1 + 2 + 1 + 1 + 1                                          # the reference and every expert's
    assert of_new["evaluation"]["pass"] - first["evaluation"]["pass"] == 2e8 * trunks * 2 * 8 * 16 * 80
    assert first["sampling"]["decode"] == 2e8 * 260 * 4 * 32
    for name, stage_name in (("users", "training"), ("prompts", "sampling"), ("evaluate", "evaluation")):
        more = work(base | {name: 2 * base[name]}, 1e8, 16)
        assert sum(more[stage_name].values()) > 1.3 * sum(first[stage_name].values())
    tuned = work(base | {"finetune": {"steps": 10, "batch": 2, "tokens": 64}}, 1e8, 16)["fine-tuning"]
    assert tuned == {"pass": 6e8 * 10 * 2 * 64}
    lora = {"sharing": "lora", "experts": 2}
    one_type = lora | {"experts": 1, "data": "train-x.jsonl"}
    some = {"dpo": {"experts": 1}, "mix": lora | {"estep": "context"}, "one type": one_type}
    changed = base | {"runs": some, "pairs": 16, "context": 4, "train": {"epochs": 2}}
    trained = work(changed, 1e8, 16)["training"]["pass"]
    passes = (1 + 2 * 3) + (1 + 2 * (2 * (2 + 0.25) + 0.25)) + (1 + 2 * 2) / 2      # each: its reference, its passes
    assert trained == pytest.approx(2e8 * 32 * 16 * 80 * passes)
    assert re.fullmatch(r"about \d+ minutes on this machine \(.+ GFLOP/s in \w+\): annotating \d+, .*",
                        estimate(base, "smollm2", 16))


def test_main_refuses_what_it_does_not_know(tmp_path):
    """Caught: an unknown preset or judge taken for the default."""
    with raises_at("'big'", "smoke, quick, cpu, paper", option="preset"):
        simulated.main(imdb.DATASET, ["--preset", "big"])
    with raises_at("'me'", option="sentiment"):
        simulated.main(imdb.DATASET, ["--preset", "smoke", "--model", "smollm2", "--sentiment", "me"])


def test_the_model_is_gpt2_where_it_can_be_had(tmp_path, monkeypatch):
    """Caught: smollm2 though GPT-2 is there; a damaged file of the user's passed over; no reason given."""
    config = simulated.ExperimentConfig(data_folder=str(tmp_path))
    monkeypatch.setattr(simulated.fetch, "asset", lambda name, data: tmp_path)
    assert simulated.choose_model(config) == ("gpt2", "its weights are at hand")

    def refuse(name, data):
        raise InputError("gpt2: no such host\nmore")

    monkeypatch.setattr(simulated.fetch, "asset", refuse)
    assert simulated.choose_model(config) == ("smollm2", "GPT-2's weights cannot be had (gpt2: no such host)")
    assert simulated.choose_model(simulated.ExperimentConfig(model="gpt2"))[0] == "gpt2"
    (tmp_path / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(InputError):
        simulated.choose_model(config)
