"""data/convert: every set from rows in its format, made up here, to records that the reader takes. What each test
catches stands in its docstring."""

import csv
import gzip
import json
import os

import pytest
from letters import Letters
from raising import raises_at

from data.convert import __main__ as program
from data.convert.coval import parse_ranking
from data.convert.helpsteer import turns_of
from data.convert.source import Source
from mixdpo.config import InputError
from mixdpo.preferences import read_preferences
from mixdpo.text.records import Fault


class ChatLetters(Letters):
    """Letters with ChatML's special tokens, for records of messages."""

    special = {"<|im_start|>": 601, "<|im_end|>": 602}


def u(text):
    return {"role": "user", "content": text}


def a(text):
    return {"role": "assistant", "content": text}


@pytest.fixture
def convert(tmp_path, capsys):
    """convert(set, rows, *options) -> records, and {what was left out: (count, first row)}. Each file is also read as
    train.py reads it: with as many choices as records, and the same users."""
    def run(name, source, *options):
        path, out = tmp_path / "source.jsonl", tmp_path / "prefs.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in source))
        program.main([name, str(path), "--out", str(out), *options])
        lines = capsys.readouterr().out.splitlines()
        assert lines[0].startswith("Licence: ") and lines[1].startswith("Citation: ")
        records = [json.loads(line) for line in out.read_text().splitlines()]
        assert f" {len(source)} rows" in lines[2] and f" {len(records)} " in lines[2]
        pairs = read_preferences(out, ChatLetters(), 2000, 200)
        assert [(p.user, p.annotator, p.domain) for p in pairs] == [
            tuple(map(record.get, ("user", "annotator", "domain"))) for record in records]
        left = [line.removeprefix("left out, ").rpartition(": row ") for line in lines if line.startswith("left out, ")]
        counts = {text.rpartition(" (")[0].rpartition(": "): int(row.rstrip(")")) for text, _, row in left}
        return records, {reason: (int(count), row) for (reason, _, count), row in counts.items()}

    return run


def pair(prompt, chosen, rejected, **more):
    """A record of messages; prompt: the last user's turn or all messages."""
    prompt = [u(prompt)] if isinstance(prompt, str) else prompt
    return {"prompt": prompt, "chosen": [a(chosen)], "rejected": [a(rejected)]} | more


# ---- the sets


def alignment(user="w1", **turns):
    """A row of Community Alignment. turns: first="prompt/a/b/c/d/preferred letter", ..."""
    row = {"annotator_id": user, "assigned_lang": "en", "conversation_id": "1"}
    for turn in ("first", "second", "third", "fourth"):
        cells = (turns.get(turn) or "/////").split("/")
        row |= {f"{turn}_turn_prompt": cells[0], f"{turn}_turn_preferred_response": cells[5] and f"response_{cells[5]}"}
        row |= {f"{turn}_turn_response_{letter}": text for letter, text in zip("abcd", cells[1:])}
    return row


def test_community_alignment(convert):
    """Catches: a later turn whose prompt is not the conversation along the chosen answers, a chosen answer against
    itself, the others ranked among themselves, turns after a gap, an end token left in, "EMPTY STRING" as a text."""
    source = [alignment(first="p/A/B/C/D/b", second="q/E/F/G/H/a"),
              alignment(first="p/A/EMPTY STRING/A/D/a"),
              alignment(first="p/A/A/A/A/a", second="q/E/F///b"),
              alignment(first="p/A/B/C/D/EMPTY STRING", second="q/E/F/G/H/a"),
              alignment(first="p/A//C/D/b"), alignment("", first="p/A/B/C/D/a"), alignment(),
              alignment(7, second="q/E/F/G/H/a"), alignment(first="/A/B/C/D/a"),
              alignment(8, first="p/A<|end_of_text|>/B///a", second="q/E/F///a")]
    records, left = convert("community_alignment", source)
    en = {"user": "w1", "domain": "en"}
    talk = [u("p"), a("B"), u("q")]
    assert records == [
        *(pair("p", "B", other, **en) for other in "ACD"), *(pair(talk, "E", other, **en) for other in "FGH"),
        pair("p", "A", "D", **en), pair([u("p"), a("A"), u("q")], "F", "E", **en),
        pair("p", "A", "B", user="8", domain="en"), pair([u("p"), a("A"), u("q")], "E", "F", user="8", domain="en")]
    same = "answers with the same text as one that is ranked as high or higher"
    assert left == {
        "answers that are empty": (1 + 2 + 4, 2), same: (4, 2),
        "judgements of fewer than two different answers": (1, 3),
        "turns without a choice": (1, 4), "turns without a preferred answer": (1, 5), "rows without a turn": (1, 7),
        "turns after one that is missing or cannot be followed": (2, 4), "turns without an annotator": (1, 6),
        "turns without a prompt": (1, 9), "the end token <|end_of_text|> of texts": (1, 10)}
    ranked, _ = convert("community_alignment", source[:1], "--rankings", "true")
    assert ranked == [{"prompt": [u("p")], "ranking": [[[a("B")]]], "rest": [[a("A")], [a("C")], [a("D")]]} | en,
                      {"prompt": talk, "ranking": [[[a("E")]]], "rest": [[a("F")], [a("G")], [a("H")]]} | en]


def assessment(user, personal=None, world=None):
    blocks = {name: [{"ranking": block, "rationale": "r"}] if isinstance(block, str) else block
              for name, block in (("personal", personal), ("world", world))}
    return {"annotator_id": user, "ranking_blocks": blocks}


def coval(*assessments, prompt=(u("p"),), texts="ABCD"):
    responses = [{"response_index": letter, "messages": [a(text)]} for letter, text in zip("ABCD", texts)]
    return {"prompt_id": "1", "prompt": {"id": "1", "messages": list(prompt)}, "responses": responses,
            "metadata": {"assessments": list(assessments)}}


def test_coval(convert):
    """Catches: equal answers as a pair, the order reversed, the world's ranking for the personal one, a letter taken
    for the place of a response, the same text against itself, a developer's message that the reader refuses."""
    rules = coval(assessment("s", "D>C"), prompt=({"role": "developer", "content": "be kind"}, u("p"), a("x"), u("q")))
    several = coval(assessment("t", "A>B>C=D"))
    several["responses"][0]["messages"].append(a("more"))
    several["responses"].reverse()
    source = [coval(assessment("r", "B>A=C=D", "A>B"), assessment(5, "A = B > C"), assessment("r", "A=B=C=D"),
                    assessment("", "A>B"), assessment("r", None), assessment("r", [], "A>B"), assessment("r", "")),
              rules, several, coval(assessment("r", "A>E"), assessment("r", "A>B=A"), assessment("r", "A>"))]
    source += [coval(assessment("v", "A>B>C"), texts=["same", " same", "other"]),
               coval(assessment("w", [{"ranking": "A>B"}, {"ranking": "B>A"}], "C>D"))]
    records, left = convert("coval", source)
    system = [{"role": "system", "content": "be kind"}, u("p"), a("x"), u("q")]
    assert records == [*(pair("p", "B", other, user="r") for other in "ACD"), pair("p", "A", "C", user="5"),
                       pair("p", "B", "C", user="5"), pair(system, "D", "C", user="s"),
                       pair("p", "B", "C", user="t"), pair("p", "B", "D", user="t"),
                       pair("p", "same", "other", user="v"), pair("p", "A", "B", user="w")]
    assert left == {
        "ties": (1, 1), "rankings without an annotator": (1, 1), "assessments without a ranking": (3, 1),
        "answers that are not one assistant's message": (1, 3), "answers that are empty": (1, 3),
        "rankings that name an answer twice or an unknown answer": (3, 4), "further rankings of one assessment": (1, 6),
        "answers with the same text as one that is ranked as high or higher": (1, 5)}
    ranked, _ = convert("coval", source[:1], "--rankings", "true")
    assert [(r["user"], r["ranking"]) for r in ranked] == [
        ("r", [[[a("B")]], [[a("A")], [a("C")], [a("D")]]]), ("5", [[[a("A")], [a("B")]], [[a("C")]]])]
    world, _ = convert("coval", [source[0], source[-1]], "--block", "world")
    assert world == [pair("p", "A", "B", user="r"), pair("p", "A", "B", user="r"), pair("p", "C", "D", user="w")]
    assert parse_ranking("B>A=C=D") == [["B"], ["A", "C", "D"]]
    with raises_at("moon", option="block"):
        convert("coval", source, "--block", "moon")


def test_coval_with_two_answers_of_one_letter(convert):
    """Nobody knows which of them was ranked. Catches: the second in place of the first, without a word."""
    twice = coval(assessment("r", "A>B>C"))
    twice["responses"].append({"response_index": "A", "messages": [a("other")]})
    records, left = convert("coval", [twice])
    assert records == [pair("p", "B", "C", user="r")]
    assert left == {"answers with the letter of another one, and that one": (1, 1), "answers that are empty": (1, 1)}


def test_multipref(convert):
    """Catches: the sides swapped, a tie as a choice, experts left out, an unknown value as a choice."""
    def note(user, choice):
        return {"evaluator": user, "overall_pref": choice, "helpful_pref": "Tie", "time_spent": 9}

    row = {"comparison_id": "1", "text": "p", "completion_a": "A", "completion_b": "B", "category": "Open QA"}
    row |= {"normal_worker_annotations": [note("n1", "A-is-clearly-better"), note("n2", "Tie")],
            "expert_worker_annotations": [note("e1", "B-is-slightly-better"), note(None, "Tie"),
                                          note("e2", "B-is-best")]}
    records, left = convert("multipref", [row, row | {"completion_b": "A"}])
    assert records == [pair("p", "A", "B", user="n1", domain="Open QA"),
                       pair("p", "B", "A", user="e1", domain="Open QA")]
    assert left == {"ties": (1, 1), "annotations without an evaluator": (2, 1),
                    "annotations with overall_pref 'B-is-best'": (2, 1),
                    "answers with the same text as one that is ranked as high or higher": (3, 2),
                    "judgements of fewer than two different answers": (3, 2)}


def utterance(talk, turn, prompt, text, score, chosen=False, user="u1"):
    return {"utterance_id": "x", "conversation_id": talk, "user_id": user, "turn": turn, "user_prompt": prompt,
            "model_response": text, "score": score, "if_chosen": chosen, "model_name": "m"}


def test_prism(convert):
    """Catches: the rows of two conversations mixed, a later turn without what was said before, scores compared as
    texts, an order among equal scores, a turn that contradicts itself, an answer without a score as the worst, a
    conversation that goes on after two chosen answers, "False" in a table as true."""
    source = [utterance("c1", 1, "q", "E", 9), utterance("c2", 0, "o", "X", "80", "True", user="u2"),
              utterance("c1", 0, "p", "A", 20), utterance("c1", 0, "p", "B", 100, True),
              utterance("c1", 1, "q", "F", 30, True), utterance("c1", 0, "p", "C", 20),
              utterance("c2", 0, "o", "Y", "9", "False", user="u2"), utterance("c1", 0, "p", "D", None),
              utterance("c3", 0, "p", "A", 5, True), utterance("c3", 0, "p", "B", 6),                       # row 9
              utterance("c3", 1, "q", "C", 6, True), utterance("c3", 1, "q", "D", 5),
              utterance("c4", 0, "p", "A", 5), utterance("c4", 1, "q", "B", 5, True),                       # row 13
              utterance("c5", 0, "p", "A", 5, True), utterance("c5", 0, "q", "B", 4),                       # row 15
              utterance("c6", 1, "p", "A", 5, True), utterance("", 0, "p", "A", 5, True),                   # row 17
              utterance("c7", 0, "p", "A", 5, True, user=None), utterance("c8", 0, "p", "A", 7, True),
              utterance("c8", 0, "p", "B", 7), utterance("c2", 1, "r", "Z", "70", "True", user="u2"),         # row 21
              utterance("c2", 1, "r", "W", "8", "False", user="u2"), utterance("c9", 0, "p", "A", 7, True),
              utterance("c9", 0, "p", "B", 7, True), utterance("c9", 1, "q", "C", 7, True)]
    records, left = convert("prism", source)
    assert records == [*(pair("p", x, y, user="u1") for x, y in ("BA", "BC")),
                       pair([u("p"), a("B"), u("q")], "F", "E", user="u1"), pair("o", "X", "Y", user="u2"),
                       pair([u("o"), a("X"), u("r")], "Z", "W", user="u2"),
                       pair([u("p"), a("A"), u("q")], "C", "D", user="u1")]
    assert left == {
        "answers without a conversation or a turn": (1, 18), "answers without a score": (1, 8),
        "turns whose chosen answer has not the highest score": (1, 9), "ties": (2, 20),
        "judgements of fewer than two different answers": (1, 13), "turns without a prompt, or with several": (1, 15),
        "turns after one that is missing or cannot be followed": (3, 14), "turns without a user, or of two": (1, 19)}
    ranked, _ = convert("prism", source, "--rankings", "true")
    assert ranked[0]["ranking"] == [[[a("B")]], [[a("A")], [a("C")]]]


def tldr(choice=0, worker="w", split="train", texts=(" x", " y"), **info):
    info = info or {"post": "P", "title": "T", "subreddit": "s"}
    return {"info": {"id": "1"} | info, "summaries": [{"text": text, "policy": "ref", "note": None} for text in texts],
            "choice": choice, "worker": worker, "batch": "batch3", "split": split, "extra": {"confidence": 5}}


def test_tldr(convert):
    """Catches: the rejected summary as the chosen one, a summary's first blank lost, an article as a post, rows of
    other splits, messages in place of texts."""
    prompt = "SUBREDDIT: r/s\n\nTITLE: T\n\nPOST: P\n\nTL;DR:"
    source = [tldr(1), tldr(0, split="valid2"), tldr(worker=None), tldr(2), tldr(texts=[" x"]), tldr(post="", title="",
              subreddit=""), tldr(article="N", title="T", post=None), tldr(texts=(" x", " x"))]
    records, left = convert("tldr", source)
    assert records == [
        {"prompt": prompt, "chosen": " y", "rejected": " x", "user": "w", "domain": "s"},
        {"prompt": prompt, "chosen": " x", "rejected": " y", "user": "w", "domain": "s"},
        {"prompt": "Article: N\n\nTL;DR:", "chosen": " x", "rejected": " y", "user": "w"}]
    assert left == {"rows without a worker": (1, 3), "rows without two summaries and a choice of one of them": (2, 4),
                    "rows without a post": (1, 6), "judgements of fewer than two different answers": (1, 8),
                    "answers with the same text as one that is ranked as high or higher": (1, 8)}
    records, left = convert("tldr", source[:2], "--split", "valid2", "--rankings", "true")
    assert records == [{"prompt": prompt, "ranking": [[" x"], [" y"]], "user": "w", "domain": "s"}]
    assert left == {"rows of another split than valid2": (1, 1)}


def test_ultrafeedback(convert):
    """Catches: one criterion's rating for another's, a missing rating as the lowest, ties as an order."""
    def completion(text, *ratings):
        kinds = ("helpfulness", "honesty", "instruction_following", "truthfulness")
        return {"response": text, "annotations": {k: {"Rating": r, "Rationale": ""} for k, r in zip(kinds, ratings)}}

    row = {"source": "flan", "instruction": "p", "completions": [completion("A", "5", "1", "3", "N/A"),
                                                                 completion("B", "4", "2", "3", "5")]}
    row["completions"].append(completion("C", "4", "5", "3", None))
    records, left = convert("ultrafeedback", [row, row | {"instruction": " "}])
    of = {kind: {"user": kind, "annotator": kind} for kind in ("helpfulness", "honesty")}
    assert records == [pair("p", "A", "B", **of["helpfulness"]), pair("p", "A", "C", **of["helpfulness"]),
                       *(pair("p", x, y, **of["honesty"]) for x, y in ("CB", "CA", "BA"))]
    assert left == {"ties": (1, 1), "answers without a rating for truthfulness": (2, 1),
                    "judgements of fewer than two different answers": (1, 1), "rows without an instruction": (1, 2)}


def test_helpsteer(convert):
    """Catches: the sign of a preference reversed, a rating compared with that of another prompt, turns left in a text,
    -100 as a preference, an invented user."""
    talk = [u("p"), a("x"), u("q")]
    three = {"domain": "code", "language": "en", "context": talk, "response1": "A", "response2": "B"}
    records, left = convert("helpsteer", [three | {"overall_preference": n} for n in (-3, 1, 0, None)] + [
        three | {"overall_preference": 2, "context": [u("p"), a("x")]}])
    assert records == [pair(talk, "A", "B", domain="code"), pair(talk, "B", "A", domain="code")]
    assert left == {"ties": (1, 3), "rows without a preference from -3 to 3": (1, 4),
                    "judgements with a fault, wrong roles": (1, 5)}
    prompt = "p\n<extra_id_1>Assistant\nx\n\ny\n<extra_id_1>User\nq"
    two = {"split": "train", "prompt": prompt, "response_1": "A", "response_2": "B"}
    records, left = convert("helpsteer", [two | {"preference_strength": n} for n in (-1, 2, -100)] + [
        two | {"split": "val", "preference_strength": 1}], "--split", "train")
    talk = [u("p"), a("x\n\ny"), u("q")]
    assert records == [pair(talk, "A", "B"), pair(talk, "B", "A")] and turns_of("p") == [u("p")]
    assert left == {"rows of another split than train": (1, 4), "rows without a preference from -3 to 3": (1, 3)}
    rated = [{"prompt": p, "response": r, "helpfulness": h} for p, r, h in (
        ("p", "A", 1), ("p", "B", 4), ("alone", "X", 0), ("q", "C", 3), ("q", "D", 2), ("q", "E", 2), ("q", "F", 2),
        ("end", "Y", 1))]
    records, left = convert("helpsteer", rated)
    assert records == [pair("p", "B", "A"), pair("q", "C", "D")]
    assert left == {"ties": (1, 7), "rated answers without a second one to the same prompt": (2, 3)}


def test_arena(convert):
    """Catches: model b's win as model a's, a tie as a choice, answers to two different conversations as a pair."""
    def battle(winner, *talks, judge="j1", **more):
        talks = talks or ([u("p"), a("A")], [u("p"), a("B")])
        sides = {f"conversation_{side}": talk for side, talk in zip("ab", talks)}
        return {"question_id": "1", "winner": winner, "judge": judge, "turn": 1, "language": "English"} | sides | more

    long = [[u("p"), a(x), u("q"), a(y)] for x, y in ("AC", "BD", "AD")]
    no_language = battle("model_a")
    del no_language["language"]
    records, left = convert("arena", [
        battle("model_a"), battle("model_b", long[0], long[2], judge="j2"), battle("tie"), battle("tie (bothbad)"),
        battle("model_a", long[0], long[1]), battle("model_a", judge=None), battle("model_c"),
        battle("model_a", [u("p")], [u("p")]), battle("model_b", [], []), no_language])
    assert records == [pair("p", "A", "B", user="j1", domain="English"),
                       pair([u("p"), a("A"), u("q")], "D", "C", user="j2", domain="English"),
                       pair("p", "A", "B", user="j1")]
    assert left == {"ties": (2, 3), "conversations that differ before the last answer": (1, 5),
                    "votes without a judge": (1, 6), "votes for 'model_c'": (1, 7),
                    "conversations that do not end with an answer": (2, 8)}


# ---- the program


def test_a_missing_field_is_named(tmp_path):
    """For each set and each field that it reads. Catches: a field taken for empty, a traceback, a row not named."""
    two = {"prompt": "p", "response_1": "A", "response_2": "B", "preference_strength": 1}
    three = {"context": [u("p")], "response1": "A", "response2": "B", "overall_preference": 1, "domain": "code"}
    good = {"community_alignment": alignment(first="p/A/B/C/D/b"), "coval": coval(assessment("r", "A>B")),
            "prism": utterance("c", 0, "p", "A", 5, True), "tldr": tldr(), "helpsteer": three,
            "multipref": {"text": "p", "category": "c", "completion_a": "A", "completion_b": "B",
                          "normal_worker_annotations": [{"evaluator": "n", "overall_pref": "Tie"}],
                          "expert_worker_annotations": []},
            "ultrafeedback": {"instruction": "p", "completions": []},
            "arena": {"judge": "j", "winner": "model_a", "conversation_a": [u("p"), a("A")],
                      "conversation_b": [u("p"), a("B")]}}
    unread = {"conversation_id", "utterance_id", "model_name", "batch", "extra", "prompt_id", "id", "rationale",
              "world", "policy", "note", "confidence"}
    path = tmp_path / "x.jsonl"

    def places(value, at=()):
        """Paths of all fields of an object, and of the objects in it."""
        parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        for key, part in parts:
            yield from [(*at, key)] * isinstance(key, str)
            yield from places(part, (*at, key))

    assert {*good} == {*program.SETS}
    tried = 0
    rated = {"prompt": "p", "response": "A", "helpfulness": 1}
    for name, row in [*good.items(), ("helpsteer", two), ("helpsteer", rated)]:
        for *at, field in places(row):
            if field in unread and (name, field) != ("prism", "conversation_id"):
                continue
            bad = json.loads(json.dumps(row))
            inner = bad
            for key in at:
                inner = inner[key]
            del inner[field]
            path.write_text(f"{json.dumps(row)}\n{json.dumps(bad)}\n")
            if field in ("context", "response_1"):                          # then it is a row of rated answers
                field = "prompt" if field == "context" else "response"
            with raises_at(field, *list(inner)[:1], file=path, line=2):
                program.main([name, str(path), "--out", str(tmp_path / "out.jsonl")])
            tried += 1
    assert tried > 60 and not (tmp_path / "out.jsonl").exists() and [*tmp_path.iterdir()] == [path]


def test_a_field_of_another_type_is_named(tmp_path):
    """Catches: a list written as a text, a number or an object in its place, a traceback."""
    path = tmp_path / "x.jsonl"
    for name, row, value in (
            ("multipref", {"text": 3}, "3"), ("tldr", tldr(worker=1.5), "1.5"), ("tldr", tldr(worker=True), "True"),
            ("tldr", tldr("best"), "'best'"), ("coval", coval() | {"responses": "[]"}, "'[]'"),
            ("coval", coval() | {"responses": 5}, "5"), ("coval", coval() | {"prompt": []}, "[]"),
            ("coval", coval() | {"responses": ["A"]}, "'A'"), ("prism", utterance("c", "one", "p", "A", 5), "'one'"),
            ("prism", utterance("c", 10**400, "p", "A", 5), "10000")):                      # no float can hold it
        path.write_text("\n" + json.dumps(row) + "\n")
        with raises_at(value, file=path, line=2):
            program.main([name, str(path), "--out", str(tmp_path / "out.jsonl")])


def test_the_output_is_written_atomically_and_never_over_the_input(tmp_path, capsys):
    """Catches: an input that is lost, an old output that is lost to a fault, a part of a file left behind, an empty
    output, an option that a set does not have ignored."""
    path, out = tmp_path / "x.jsonl", tmp_path / "out.jsonl"
    path.write_text(text := json.dumps(tldr()) + "\n")
    os.link(path, tmp_path / "link.jsonl")
    for same in (path, tmp_path / "link.jsonl", tmp_path / "." / "x.jsonl"):
        with raises_at(same, option="out"):
            program.main(["tldr", str(path), "--out", str(same)])
    out.write_text("old")
    for bad in (text + "{", json.dumps(tldr(worker="")), ""):
        path.write_text(bad)
        with raises_at(file=path, line=2 if bad.endswith("{") else None):
            program.main(["tldr", str(path), "--out", str(out)])
    assert out.read_text() == "old" and len([*tmp_path.iterdir()]) == 3
    path.write_text(text)
    program.main(["tldr", str(path), "--out", str(out)])
    assert json.loads(out.read_text())["chosen"] == " x" and len([*tmp_path.iterdir()]) == 3
    for option, value, named in (("block", "world", "tldr"), ("split", "train", "arena"), ("rankings", "3", "3"),
                                 ("out", "x.json", "x.json"), ("set", "imdb", "imdb")):
        words = {"set": "arena" if option == "split" else "tldr", "file": str(path), "out": str(out), option: value}
        with raises_at(named, option=option):
            program.main([part for key, word in words.items() for part in (f"--{key}", word)])
    with raises_at(option="file"):
        program.main(["tldr", "--out", str(out)])
    with pytest.raises(SystemExit):
        program.main(["--help"])
    shown = capsys.readouterr().out
    assert all(name in shown for name in program.SETS)


def test_pairs_of_one_ranking_are_said_to_depend(tmp_path, capsys):
    """Catches: pairs from a ranking that count as that many judgements without a word."""
    path = tmp_path / "x.jsonl"
    for ranking, rankings, told in (("A>B", "false", False), ("A>B>C", "false", True), ("A>B>C", "true", False)):
        path.write_text(json.dumps(coval(assessment("r", ranking))) + "\n")
        program.main(["coval", str(path), "--out", str(tmp_path / "out.jsonl"), "--rankings", rankings])
        assert ("not independent" in capsys.readouterr().out) == told


def test_lone_surrogates_are_left_out(convert):
    """Catches: a record that UTF-8 cannot encode, which the reader refuses."""
    records, left = convert("tldr", [tldr(), tldr(texts=("\ud800", "y"))])
    assert len(records) == 1 and left == {"judgements with a fault, lone surrogate": (1, 2)}


# ---- files


def test_the_same_records_from_every_kind_of_file(tmp_path):
    """Rows are read by mixdpo/text/containers.py, which has tests of its own. Catches: an empty cell of a table that is
    not an empty text; a fault without its line."""
    table = [{"prompt": "p\nq", "worker": ""}, {"prompt": "", "worker": "7"}]
    (tmp_path / "x.jsonl").write_text("\n".join(json.dumps(row) for row in table) + "\n")
    (tmp_path / "x.json").write_text("\ufeff" + json.dumps(table), encoding="utf-8")
    with open(tmp_path / "x.csv", "w", encoding="utf-8-sig", newline="") as file:
        writer = csv.DictWriter(file, ["prompt", "worker"])
        writer.writeheader()
        writer.writerows(table)
    (tmp_path / "x.jsonl.gz").write_bytes(gzip.compress((tmp_path / "x.jsonl").read_bytes()))
    for kind in ("jsonl", "json", "csv", "jsonl.gz"):
        found = [(row.text("prompt"), row.user("worker")) for row in Source(tmp_path / f"x.{kind}").rows()]
        assert found == [("p\nq", ""), ("", "7")], kind
    for name, text, line in (("b.csv", "a,b\n1,2\n3\n", 3), ("d.jsonl", "{}\n[]\n", 2), ("e.jsonl", "{}\n{\n", 2)):
        (tmp_path / name).write_text(text)
        with raises_at(file=tmp_path / name, line=line, kind=Fault):
            [*Source(tmp_path / name).rows()]
    with raises_at(file=tmp_path / "none.jsonl"):
        [*Source(tmp_path / "none.jsonl").rows()]


def test_parquet(tmp_path):
    """Catches: nested fields that are not dicts and lists, numbers that begin again with every batch."""
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet
    table = [coval(assessment(f"r{n}", "A>B")) for n in range(1500)]
    parquet.write_table(pyarrow.Table.from_pylist(table), tmp_path / "x.parquet")
    found = [*Source(tmp_path / "x.parquet").rows()]
    assert [row.number for row in found] == [*range(1, 1501)]
    assert found[-1].fields["metadata"]["assessments"][0]["ranking_blocks"]["personal"][0]["ranking"] == "A>B"
    program.main(["coval", str(tmp_path / "x.parquet"), "--out", str(tmp_path / "out.jsonl")])
    assert json.loads((tmp_path / "out.jsonl").read_text().splitlines()[-1]) == pair("p", "A", "B", user="r1499")
    (tmp_path / "bad.parquet").write_bytes(b"PAR1")
    with pytest.raises(InputError):
        [*Source(tmp_path / "bad.parquet").rows()]
