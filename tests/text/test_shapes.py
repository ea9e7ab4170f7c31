"""mixdpo/text/shapes.py and turns.py: foreign columns and conversations as canonical records, and what is refused.
What each test catches stands in its docstring."""

import json

import pytest
from letters import GOOD, Letters, write
from raising import raises_at

from mixdpo.config import InputError
from mixdpo.preferences import read_preferences
from mixdpo.text.records import Fault
from mixdpo.text.shapes import parse_columns, read_records


def user(text="q"):
    return {"role": "user", "content": text}


def bot(text="a"):
    return {"role": "assistant", "content": text}


def system(text="s"):
    return {"role": "system", "content": text}


def message(who, text):
    return {"from": who, "value": text}


def chat(*prompt, chosen="y", rejected="n", **more):
    return {"prompt": [*prompt], "chosen": [bot(chosen)], "rejected": [bot(rejected)]} | more


def texts(prompt, chosen="y", rejected="n", **more):
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected} | more


def load(folder, *rows, columns="", name="data.jsonl", report=str):
    """The records of a file, whose faults are raised, and their remarks."""
    found = list(read_records(write(folder, *rows, name=name), columns, report))
    for row, record, _ in found:
        if isinstance(record, Fault):
            raise Fault(record.kind, record.got, record.remedy, row.file, row.number)
    return [record for _, record, _ in found], [remark for _, _, remarks in found for remark in remarks]


HH = "\n\nHuman: hi\n\nAssistant: hello\n\nHuman: who?\n\nAssistant:"
SHAPES = {                                                                  # row, canonical record; options
    "texts": (texts("p", split="train"), texts("p")),
    "messages": (chat(user(), split="train"), chat(user())),
    "a text prompt, messages as answers": ({"prompt": "q", "chosen": [bot("y")], "rejected": [bot("n")]}, chat(user())),
    "messages, texts as answers": ({"prompt": [user()], "chosen": "y", "rejected": "n"}, chat(user())),
    "one message each": ({"prompt": [user()], "chosen": bot("y"), "rejected": bot("n")}, chat(user())),
    "a prompt, and transcripts": (
        {"prompt": "q", "chosen": [user(), bot("y")], "rejected": [user(), bot("n")], "score_chosen": 3.0},
        chat(user())),
    "a system turn in transcripts only": (
        {"prompt": "q", "chosen": [system(), user(), bot("y")], "rejected": [system(), user(), bot("n")]},
        chat(system(), user())),
    "transcripts": ({"chosen": [user(), bot(), user("r"), bot("yes")],
                     "rejected": [user(), bot(), user("r"), bot("yet")]},
                    chat(user(), bot(), user("r"), chosen="yes", rejected="yet")),
    "HH": ({"chosen": HH + " I am.", "rejected": HH + " I am not."}, texts(HH, " I am.", " I am not.")),
    "messages + answers": ({"messages": [system(), user()], "chosen": "y", "rejected": "n"}, chat(system(), user())),
    "messages that end with the chosen answer": (
        {"messages": [user(), bot("y")], "chosen": [bot("y")], "rejected": [bot("n")]}, chat(user())),
    "conversations": ({"conversations": [message("human", "q"), message("gpt", "a"), message("human", "r")],
                       "chosen": message("gpt", "y"), "rejected": message("gpt", "n"), "id": 7},
                      chat(user(), bot(), user("r"))),
    "conversations and system": ({"conversations": [message("human", "q")], "chosen": message("gpt", "y"),
                                  "rejected": message("gpt", "n"), "system": "s"}, chat(system(), user())),
    "instruction, second better": ({"instruction": "Do", "input": "it", "output_1": "n", "output_2": "y",
                                    "preference": 2}, texts("Do\n\nit\n\n")),
    "instruction, first better": ({"instruction": "Do", "input": "", "output_1": "y", "output_2": "n",
                                   "preference": 1.0}, texts("Do\n\n")),
    "instruction, by name": ({"instruction": "Do", "output_1": "n", "output_2": "y", "preference": "output_2"},
                             texts("Do\n\n")),
    "question": ({"question": "q", "response_j": "y", "response_k": "n", "qid": 3}, texts("q\n\n")),
    "renamed": ({"instruction": "p", "good": "y", "bad": "n", "worker": "w", "note": "x"}, texts("p", user="w"),
                "prompt=instruction,chosen=good,rejected=bad,user=worker"),
    "renamed outputs": ({"text": "p", "completion_a": "n", "completion_b": "y", "best": "completion_b"}, texts("p"),
                        "prompt=text,output_1=completion_a,output_2=completion_b,preference=best"),
    "an id that is a number": (texts("p", worker=17), texts("p", user="17"), "user=worker"),
    "a name left out": (texts("p", context="passage", score=3), texts("p"), "context=,scores="),
    "a context that is the prompt": ({"context": [user()], "chosen": "y", "rejected": "n"}, chat(user()),
                                     "prompt=context"),
    "a system turn for a text": (texts("q", system="s"), chat(system(), user()), "system=system"),
    "a system turn for a text that is not asked for": (texts("q", system="s"), texts("q")),
    "an empty system turn for a text": (texts("q", system=""), texts("q"), "system=system"),
    "a null system turn for a text": (texts("q", system=None), texts("q"), "system=system"),
    "own format with columns for another": (texts("p", user="w"), texts("p", user="w"),
                                            "prompt=instruction,user=worker"),
    "empty keys of messages": ({"prompt": [user() | {"name": None, "tool_calls": []}], "chosen": [bot("y")],
                                "rejected": [bot("n")]}, chat(user())),
}


@pytest.mark.parametrize("case", SHAPES)
def test_a_shape_becomes_the_canonical_record(tmp_path, case):
    """Catches: a shape that is not recognised; answers exchanged; a turn in the wrong place; a prefix cut within a turn
    (" I am." and " I am not." begin alike, "yes" and "yet" too)."""
    row, wanted, *columns = SHAPES[case]
    assert load(tmp_path, row, row, columns="".join(columns))[0] == [wanted, wanted]


def test_a_common_prefix_is_cut_at_a_turn(tmp_path):
    """Turns of different lengths that begin alike. Catches: the common characters taken for the prompt; a marker within
    an answer's text taken for its end."""
    row = {"chosen": HH + " No.\n\nHumans err", "rejected": HH + " No.\n\nHuman:s err"}
    with raises_at(file=tmp_path / "data.jsonl", line=1, kind=Fault):
        load(tmp_path, row)
    (record,), _ = load(tmp_path, {"chosen": HH + " No.\n\nHumans err", "rejected": HH + " No."})
    assert record == texts(HH, " No.\n\nHumans err", " No.")


FAULTS = {                                                                  # row; kind and start of what it got
    "tool turn: prompt[1] has the role 'tool'": {"prompt": [user(), {"role": "tool", "content": "4"}, user()]},
    "tool turn: prompt[1] has tool_calls": {"prompt": [user(), bot() | {"tool_calls": [{"id": "x"}]}, user()]},
    "tool turn: chosen[0] has the role 'function_call'": {"chosen": message("function_call", "f()")},
    "wrong message: prompt[0] is {'role': 'critic'": {"prompt": [{"role": "critic", "content": "x"}]},
    "wrong message: prompt[0] is {'role': 'user', 'content': 'q', 'name'": {"prompt": [user() | {"name": "Bo"}]},
    "wrong message: prompt[0] is 'q'": {"prompt": ["q"]},
    "wrong type: prompt[0].content is None": {"prompt": [user(None)]},
    "wrong type: prompt[0].content is 4": {"prompt": [user(4)]},
    "trailing assistant turn: the prompt ends with the assistant's 'So'": {"prompt": [user(), bot("So")]},
    "wrong roles: prompt has ['user', 'system', 'user']": {"prompt": [user(), system(), user()]},
    "wrong roles: chosen has ['user']": {"chosen": [user("y")], "rejected": [bot("n")]},
    "two system turns": {"prompt": [system("a"), user()], "system": "b"},
    "wrong type: system is 3": {"system": 3},
    "wrong type: of chosen and rejected": {"chosen": "y"},
    "wrong type: chosen is 3": {"chosen": 3, "rejected": [bot("n")]},
    "wrong type: chosen is None": {"chosen": None},
    "wrong type: prompt is None": {"prompt": None},
    "wrong type: user is 17": {"user": 17},
    "missing field: rejected": {"rejected": ...},
    "two prompts": {"prompt": "other", "chosen": [user(), bot("y")], "rejected": [user(), bot("n")]},
    "not one answer each: behind the turns that they share, chosen has 3 turns and rejected 1":
        {"chosen": [user(), bot("y"), user(), bot()], "rejected": [user(), bot("n")]},
    "not one answer each: behind the turns that they share, chosen has 0 turns and rejected 2":
        {"chosen": [user(), bot("y")], "rejected": [user(), bot("y"), user(), bot()]},
    "identical responses": {"chosen": [user(), bot("y")], "rejected": [user(), bot("y")]},
    "not one answer each: behind the turns that they share, chosen has 2 turns and rejected 2":
        {"chosen": [user("a"), bot("y")], "rejected": [user("b"), bot("n")]},
    "lone surrogate: prompt[0].content has \\ud83d": {"prompt": [user("a\ud83d")]},
    "empty prompt[0].content": {"prompt": [user("")]},
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_row_that_cannot_be_converted(tmp_path, fault):
    """In a file with foreign columns. Catches: a turn left out or given another role silently; a number written as
    text; null taken for an empty text; --drop that does not skip the row."""
    first = chat(user()) | {"split": "train", "system": None}
    row = {name: value for name, value in (first | FAULTS[fault]).items() if value is not ...}
    with raises_at(file=tmp_path / "data.jsonl", line=2, kind=Fault) as caught:
        load(tmp_path, first, row)
    kind, _, got = fault.partition(": ")
    assert caught.value.kind == kind and caught.value.got.startswith(got) and caught.value.remedy
    records = [record for _, record, _ in read_records(tmp_path / "data.jsonl", "", str)]
    assert records[0] == chat(user()) and isinstance(records[1], Fault)


TEXT_FAULTS = {
    "no preference: preference is 0": ("instruction", {"preference": 0}),
    "no preference: preference is 1.5": ("instruction", {"preference": 1.5}),
    "no preference: preference is 1000000": ("instruction", {"preference": 10**400}),
    "no preference: preference is None": ("instruction", {"preference": None}),
    "no preference: preference is True": ("instruction", {"preference": True}),
    "wrong type: instruction is ''": ("instruction", {"instruction": ""}),
    "wrong type: input is 3": ("instruction", {"input": 3}),
    "wrong type: question is 3": ("question", {"question": 3}),
    "wrong type: chosen is 3": ("question", {"response_j": 3, "response_k": 4}),
    "not a transcript: chosen is 'hi'": ("HH", {"chosen": "hi"}),
    "not one answer each: behind the turns that they share, chosen has 1 turns and rejected 3":
        ("HH", {"rejected": HH + " b\n\nHuman: c\n\nAssistant: d"}),
    "identical responses": ("HH", {"rejected": HH + " I am."}),
    "wrong roles: the last turns are of Human and Human": (
        "HH", {"chosen": HH + " a\n\nHuman: b", "rejected": HH + " a\n\nHuman: c"}),
    "not one answer each: behind the turns that they share, chosen has 2 turns and rejected 2":
        ("HH", {"chosen": "Human: a\n\nAssistant: y", "rejected": "Human: b\n\nAssistant: n"}),
    "no common prompt": ("transcripts", {"chosen": [bot("y")], "rejected": [bot("n")]}),
    "empty chosen": ("HH", {"chosen": HH}),
}


@pytest.mark.parametrize("fault", TEXT_FAULTS)
def test_a_row_of_texts_that_cannot_be_converted(tmp_path, fault):
    """Catches: a tie that counts as a choice; true taken for 1; turns of another speaker trained on as answers."""
    shape, change = TEXT_FAULTS[fault]
    first = SHAPES["instruction, second better" if shape == "instruction" else shape][0]
    with raises_at(file=tmp_path / "data.jsonl", line=2, kind=Fault) as caught:
        load(tmp_path, first, first | change)
    kind, _, got = fault.partition(": ")
    assert caught.value.kind == kind and caught.value.got.startswith(got) and caught.value.remedy


AMBIGUOUS = {                                                               # first row -> columns that must be listed
    "no prompt": {"text": "a", "chosen": "b", "rejected": "c"},
    "texts without a prompt": {"chosen": "b", "rejected": "c"},
    "only one answer": {"prompt": "a", "completion": "b", "label": True},
    "two kinds of prompt": {"messages": [user()], "conversations": [user()], "chosen": "b", "rejected": "c"},
    "two kinds of answers": texts("a", output_1="x", output_2="y", preference=1),
    "outputs without a prompt": {"output_1": "x", "output_2": "y", "preference": 1, "topic": "z"},
    "capital letters": {"Prompt": "a", "Chosen": "b", "Rejected": "c"},
}


@pytest.mark.parametrize("case", AMBIGUOUS)
def test_columns_that_are_ambiguous_are_listed(tmp_path, case):
    """Catches: a guess; an error that does not list the columns or does not name --columns; a file that --drop
    empties."""
    path = write(tmp_path, AMBIGUOUS[case], name="data.jsonl")
    with raises_at("--columns", *map(repr, AMBIGUOUS[case]), file=path, line=1, option="columns"):
        read_preferences(path, Letters(), 16, 16, drop=True)


NEAR = ("users", "User", "user_id", "usr", "worker", "workers", "worker_id", "workerid", "labeler", "annotator_id",
        "annotators", "rater", "evaluator", "judge_id", "score", "Scores", "contexts", "domains")


@pytest.mark.parametrize("column", NEAR)
@pytest.mark.parametrize("later", [False, True])
def test_a_near_miss_of_an_optional_field_is_an_error(tmp_path, column, later):
    """Catches: who judged, ignored silently, in the first row or in a later one, or dropped with its row; a remedy that
    does not work."""
    first = texts("p", split="x")
    rows = [first, first | {column: "w"}] if later else [first | {column: "w"}]
    path = write(tmp_path, *rows, name="data.jsonl")
    with raises_at(repr(column), file=path, line=len(rows), kind=Fault) as caught:
        read_preferences(path, Letters(), 16, 16, drop=True)
    remedy = caught.value.remedy.split("--columns ")
    assert len(remedy) == 3
    leave_out, use = remedy[2].split()[0], remedy[1].split()[0]
    assert use == leave_out + column and len(load(tmp_path, *rows, columns=leave_out)[0]) == len(rows)
    if use.startswith("user=") and not later:
        assert load(tmp_path, *rows, columns=use)[0][-1]["user"] == "w"


def test_columns_that_are_no_near_miss(tmp_path):
    """Catches: common columns refused; one refused beside the field that it resembles."""
    row = texts("p", split="x", prompt_id="1", source="s", score_chosen=1, score_rejected=2, messages=[], category="c",
                language="en", text="t", timestamp=1, meta={}, margin=.5, num_turns=1, model_a="m")
    assert load(tmp_path, row)[0] == [texts("p")]
    assert load(tmp_path, texts("p", user="w", worker_id="9"))[0] == [texts("p", user="w")]


def test_the_own_format_is_strict_and_prints_nothing(tmp_path):
    """Catches: an unknown field in a later row ignored; conversions, or lines printed, in a file that needs none."""
    reports = []
    rows = [GOOD | {"user": "u", "domain": None}, GOOD, chat(user())]
    assert load(tmp_path, *rows, report=reports.append)[0] == [GOOD | {"user": "u"}, GOOD, chat(user())]
    assert reports == []
    for odd in (GOOD | {"split": "x"}, {"prompt": "q", "chosen": [user(), bot("y")], "rejected": [user(), bot("n")]}):
        with raises_at(file=tmp_path / "data.jsonl", line=2, kind=Fault):
            load(tmp_path, GOOD, odd)


@pytest.mark.parametrize("content", [None, ""])
def test_an_empty_system_turn_is_as_if_absent(tmp_path, content):
    """In the own format and in foreign ones, in the first row or later. Catches: an empty system turn that replaces the
    template's own; an error; a turn of a user that is removed."""
    for more in ({}, {"split": "x"}):
        row = chat(system(content), user()) | more
        assert load(tmp_path, row, chat(user()) | more, row)[0] == [chat(user())] * 3
        for wrong in (chat(user(content)), chat(user(), system(content), user())):
            with pytest.raises(Fault):
                load(tmp_path, row, wrong | more)
    row = {"chosen": [system(content), user(), bot("y")], "rejected": [system(content), user(), bot("n")]}
    assert load(tmp_path, row)[0] == [chat(user())]


def test_optional_fields_that_the_first_row_lacks(tmp_path):
    """Catches: users, inputs or system turns of later rows ignored, or taken for near misses."""
    first = {"instruction": "Do", "output_1": "y", "output_2": "n", "preference": 1}
    assert load(tmp_path, first, first | {"input": "it", "user": "u", "context": True})[0] == [
        texts("Do\n\n"), texts("Do\n\nit\n\n", user="u", context=True)]
    row = {"messages": [user()], "chosen": "y", "rejected": "n"}
    assert load(tmp_path, row, row | {"system": "s", "user": "u"}, columns="user=")[0] == [
        chat(user()), chat(system(), user())]


def test_what_is_printed(tmp_path, monkeypatch):
    """Catches: a column left out that is not named; no examples, too many, or wider than the terminal; a line for each
    of several files with the same columns."""
    monkeypatch.setenv("COLUMNS", "68")
    reports = []
    rows = [{"instruction": f"Do {n} " + "x" * n * 50, "output_1": "a", "output_2": "b\n", "preference": 1, "worker": n,
             "note": "n", "seen": True} for n in range(4)]
    write(tmp_path, "{", *rows, name="a.jsonl"), write(tmp_path, *rows, name="b.jsonl")
    named = f"{tmp_path / 'a.jsonl'},{tmp_path / 'b.jsonl'}"
    assert len(list(read_records(named, "user=worker", reports.append))) == 9
    head, *examples = reports
    assert head == (f"{tmp_path / 'a.jsonl'}: read as instruction, output_1, output_2, preference; user from 'worker'; "
                    "columns not used: 'note', 'seen'")
    assert [line.split(":")[0].strip() for line in examples] == ["2", "3", "4"] and max(map(len, examples)) == 68
    assert "Do 0" in examples[0] and "'a'" in examples[0] and r"'b\n'" in examples[0] and "user '0'" in examples[0]


def test_what_is_counted(tmp_path):
    """Catches: an answer removed from a prompt silently; a column of later rows ignored silently."""
    row = {"messages": [user(), bot("y")], "chosen": "y", "rejected": "n"}
    _, remarks = load(tmp_path, row, row | {"messages": [user()]}, row | {"late": 3})
    assert [remark.split()[0] for remark in remarks] == ["prompts", "rows", "prompts"] and "'late'" in remarks[1]


def test_repeated_keys_and_numbers_that_are_none(tmp_path):
    """In every format. Catches: the last of two values taken; NaN and Infinity read, also where nobody looks."""
    for line in ('{"prompt": "a", "chosen": "b", "rejected": "c", "chosen": "d"}',
                 '{"prompt": "a", "chosen": "b", "rejected": "c", "split": {"a": 1, "a": 1}}',
                 '{"prompt": "a", "chosen": "b", "rejected": "c", "split": NaN}',
                 '{"prompt": "a", "chosen": "b", "rejected": "c", "split": [{"a": -Infinity}]}'):
        for first in (GOOD, GOOD | {"split": "x"}):
            with raises_at(file=tmp_path / "data.jsonl", line=2, kind=Fault) as caught:
                load(tmp_path, first, line)
            assert caught.value.kind in ("repeated key", "wrong type")
        path = tmp_path / "data.json"
        path.write_text(f"[{json.dumps(GOOD)}, {line}]")
        faults = [record for _, record, _ in read_records(path, "", str) if isinstance(record, Fault)]
        assert [fault.kind for fault in faults] == [caught.value.kind]


def test_texts_keep_their_ends(tmp_path):
    """CRLF ends a line, and stays within a text; a byte-order mark begins a file. Catches: either one changed."""
    line = json.dumps(texts("a\r\nb", "\ufeffc", "d\r\n", split="x"), ensure_ascii=False).encode()
    records, _ = load(tmp_path, b"\xef\xbb\xbf" + line + b"\r", line + b"\r")
    assert records == [texts("a\r\nb", "\ufeffc", "d\r\n")] * 2


def test_the_option_columns():
    """Catches: a misspelt name, a name or a column given twice, an empty value."""
    assert parse_columns("prompt=a b,user=,scores=x=y") == {"prompt": "a b", "user": "", "scores": "x=y"}
    assert parse_columns("") == {}
    for wrong in ("prompt", "usr=worker", "user=a,user=b", "user=a,domain=a", "=a"):
        with raises_at(option="columns"):
            parse_columns(wrong)


def test_a_column_that_is_not_there(tmp_path):
    """Catches: --columns with a misspelt column that changes nothing."""
    with raises_at("'wroker'", "'worker'", file=tmp_path / "data.jsonl", line=1, option="columns", kind=InputError):
        load(tmp_path, GOOD | {"worker": "w"}, columns="user=wroker")


@pytest.mark.parametrize("columns", ["messages=note", "input=note", "question=note", "preference=note"])
def test_a_column_that_the_shape_does_not_use(tmp_path, columns):
    """Catches: a part of --columns without effect."""
    with raises_at(columns.split("=")[0], file=tmp_path / "data.jsonl", line=1, option="columns"):
        load(tmp_path, GOOD | {"note": "w"}, columns=columns)
