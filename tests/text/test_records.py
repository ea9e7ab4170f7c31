"""mixdpo/text/records.py, and what preferences.py makes of a faulty line: what each test catches stands in its
docstring."""

import json

import pytest
from letters import GOOD, Letters, read, write
from raising import raises_at

from mixdpo.preferences import read_preferences
from mixdpo.text.records import Fault, data_key


def turn(role, content="b"):
    return {"role": role, "content": content}


def chat(**fields):
    return {"prompt": [turn("user")], "chosen": [turn("assistant")], "rejected": [turn("assistant", "c")]} | fields


FAULTS = {
    "not JSON": '{"prompt": "a", "chosen": "b", "rej',
    "not UTF-8": b'{"prompt": "caf\xe9", "chosen": "b", "rejected": "c"}',
    "not an object": '["a", "b", "c"]',
    "missing field: rejected": {"prompt": "a", "chosen": "b"},
    "missing field: chosen, rejected": {"prompt": "a"},
    "wrong type: chosen is 3": {**GOOD, "chosen": 3},
    "wrong type: prompt is None": {**GOOD, "prompt": None},
    "wrong type: chosen: messages, the others: text": {**GOOD, "chosen": [{"role": "assistant", "content": "b"}]},
    "wrong message: prompt[0] is 'hi'": chat(prompt=["hi"]),
    "wrong message: prompt[0] is {'role': 'user'}": chat(prompt=[{"role": "user"}]),
    "wrong message: chosen[0] is {'role'": chat(chosen=[{"role": "assistant", "content": "b", "name": "bob"}]),
    "wrong type: prompt[0].content is ['b']": chat(prompt=[{"role": "user", "content": ["b"]}]),
    "empty prompt[0].content": chat(prompt=[{"role": "user", "content": ""}]),
    "wrong roles: prompt has []": chat(prompt=[]),
    "wrong roles: prompt has ['user', 'assistant']": chat(prompt=[turn("user"), turn("assistant")]),
    "wrong roles: prompt has ['user', 'system', 'user']": chat(prompt=[turn("user"), turn("system"), turn("user")]),
    "wrong roles: prompt has ['tool', 'user']": chat(prompt=[turn("tool"), turn("user")]),
    "wrong roles: prompt[0].role is ['user']": chat(prompt=[turn(["user"])]),
    "wrong roles: chosen has ['user', 'assistant']": chat(chosen=[turn("user"), turn("assistant")]),
    "wrong type: user is 17": {**GOOD, "user": 17},
    "wrong type: context is 1": {**GOOD, "context": 1},
    "wrong type: scores is ": {**GOOD, "scores": {"length": [1, float("nan")]}},
    "wrong type: scores is {'n'": {**GOOD, "scores": {"n": [10**400, 0]}},  # no float can hold it
    "wrong type: split is [": '{"split": ' + "[" * 900 + "NaN" + "]" * 900 + "}",  # deeper than Python's own recursion
    "empty user": {**GOOD, "user": ""},
    "empty prompt": {**GOOD, "prompt": ""},
    "empty chosen": {**GOOD, "chosen": ""},
    "empty rejected": {**GOOD, "rejected": ""},
    "identical responses": {**GOOD, "rejected": " yes"},
    "identical after truncation: the first 16 ids": {**GOOD, "chosen": "x" * 16 + "a", "rejected": "x" * 16 + "b"},
    "no token for a character: '~' at position 2": {**GOOD, "chosen": "ab~"},
    "EOS in a response": {**GOOD, "rejected": "a\u0100"},  # the letter whose id is EOS's
    "lone surrogate: prompt has \\ud83d at position 1": '{"prompt": "a\\ud83d", "chosen": "b", "rejected": "c"}',
}


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_is_an_error_with_file_and_line(tmp_path, fault):
    """Caught: any one check removed; a message without file, line or remedy."""
    with raises_at("--drop true", file=tmp_path / "prefs.jsonl", line=2, kind=Fault) as error:
        read(tmp_path, GOOD, FAULTS[fault])
    kind, _, got = fault.partition(": ")
    assert error.value.kind == kind and error.value.got.startswith(got) and error.value.remedy


def test_dropped_lines_are_counted_and_listed(tmp_path):
    """Caught: a silent drop; a kind or a line missing from the report; good lines dropped along."""
    reports, kinds = [], [fault.partition(":")[0] for fault in FAULTS]
    pairs = read(tmp_path, GOOD, *FAULTS.values(), *FAULTS.values(), GOOD, drop=True, report=reports.append)
    assert [p.line for p in pairs] == [1, 2 * len(FAULTS) + 2]
    expected = []
    for kind in dict.fromkeys(kinds):
        at = [i + 2 for i, other in enumerate(kinds * 2) if other == kind]
        expected.append(f"{tmp_path / 'prefs.jsonl'}: dropped, {kind}: {len(at)} (line {', '.join(map(str, at))})")
    assert reports == expected


@pytest.mark.parametrize("drop", [False, True])
def test_unknown_field_is_named(tmp_path, drop):
    """Caught: a misspelt field that is ignored, or that empties the file when drops are asked for."""
    with raises_at("'usr', 'split'", file=tmp_path / "prefs.jsonl", line=2, kind=Fault) as error:
        read(tmp_path, GOOD, {**GOOD, "usr": "ann", "split": "train"}, drop=drop)
    assert error.value.kind == "unknown field"


def test_a_pair_without_faults_is_complete_and_not_reported(tmp_path):
    """Caught: optional fields lost or exchanged; null taken for a value; line numbers that do not count empty
    ones; texts that just fit reported as cut."""
    extra = {"user": "ann", "annotator": "kind", "scores": {"length": [3, 2.5]}, "context": False}
    records, reports = [{**GOOD, **extra}, "", {**GOOD, **dict.fromkeys(extra)}, GOOD], []
    one, two, three = read(tmp_path, *records, max_prompt=7, max_response=5, report=reports.append)
    assert (one.user, one.annotator, one.scores, one.context) == ("ann", "kind", {"length": [3, 2.5]}, False)
    assert (two.user, two.annotator, two.scores, two.context) == (None, None, None, None)
    assert [p.line for p in (one, two, three)] == [1, 3, 4] and reports == []


def test_files_without_a_pair(tmp_path):
    """Caught: no pairs handed on from an empty file, an all-dropped one, a missing one, half a gzip file."""
    with raises_at(file=tmp_path / "prefs.jsonl"):
        read(tmp_path)
    with raises_at(file=tmp_path / "prefs.jsonl"):
        read(tmp_path, "{", drop=True, report=str)
    with raises_at(file=tmp_path / "absent.jsonl"):
        read_preferences(tmp_path / "absent.jsonl", Letters(), 16, 16)
    packed = write(tmp_path, *[GOOD] * 99, name="prefs.jsonl.gz")
    packed.write_bytes(packed.read_bytes()[:-20])
    with raises_at(file=packed):
        read_preferences(packed, Letters(), 16, 16)


def test_lines_end_at_newlines_only(tmp_path):
    """Caught: splitlines() on U+2028; CRLF or a byte-order mark taken for text."""
    odd = json.dumps({**GOOD, "chosen": "a\u2028b"}, ensure_ascii=False).encode()
    path = write(tmp_path, b"\xef\xbb\xbf" + odd + b"\r", GOOD)
    assert [p.line for p in read_preferences(path, Letters(), 16, 16)] == [1, 2]


def test_packed_file_is_the_same_data(tmp_path):
    """Caught: a key of the packed bytes; a key that forgets part of the file."""
    plain, packed = write(tmp_path, GOOD, GOOD), write(tmp_path, GOOD, GOOD, name="prefs.jsonl.gz")
    assert read_preferences(plain, Letters(), 9, 9) == read_preferences(packed, Letters(), 9, 9)
    assert data_key(plain) == data_key(packed) != data_key(write(tmp_path, GOOD, name="other.jsonl"))
