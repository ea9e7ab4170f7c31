"""Bodies that nobody should send: each is refused with a sentence; good ones keep every value."""

import json

import pytest

from mixdpo.serving.bodies import DEPTH, Fields, Refused, read_object
from mixdpo.serving.protocol import read_chat, read_choice, read_completion, read_query

CHAT = {"model": "mixture", "messages": [{"role": "user", "content": "Hi"}]}
TEXT = {"model": "mixture", "prompt": "Hi"}


def refused(function, *arguments, param=None, code=None, names=()):
    """The call is refused with status 400, with this field, in a sentence of ASCII that names `names`."""
    with pytest.raises(Refused) as caught:
        function(*arguments)
    error = caught.value
    assert error.status == 400 and error.param == param and error.code == code, error.body
    assert error.message.isascii() and error.message.isprintable() and 10 < len(error.message) < 400
    for name in names:
        assert str(name) in error.message
    return error


@pytest.mark.parametrize("raw", [
    b"", b"  \n", b"{", b"{}x", b"[]", b"null", b"1", b'"text"', b"{'a': 1}", b'{"a": 1,}', b'{"a": NaN}',
    b'{"a": [Infinity]}', b'{"a": -Infinity}', b'{"a": 1e999}', b'{"a": -1e400}', b'{"a": 9223372036854775808}',
    b'{"a": -9223372036854775809}', b'{"a": ' + b"9" * 5000 + b"}", b'{"a": 1, "a": 1}', b'{"a": {"b": 1, "b": 2}}',
    b'{"a": "\\ud800"}', b'{"\\udc00": 1}', b'{"a": ["x\\ud83d"]}', b'{"a": "\\u0000"}', b'{"a": "\x00"}',
    b'{"a\\u0000": 1}',
    b'{"a": "\xff"}', b'{"a": "\xed\xa0\x80"}', b'\xef\xbb\xbf{}', '{"a": 1}'.encode("utf-16"), b'{"a": "x\ny"}',
    b'{"a":' * (DEPTH + 1) + b"1" + b"}" * (DEPTH + 1), b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    b"[" * 200_000, b'{"a": "' + b'\\"' * 1000 + b"["])
def test_what_is_not_a_plain_object_is_refused(raw):
    """Catches: a constant, a number or half a character that gets through to the model; a parser that recurses until
    it fails; an error message that repeats a body."""
    refused(read_object, raw)


def test_a_plain_object_keeps_every_value():
    value = {"text": 'ünï 🙂 \\ " [[[{{{ \u2028', "list": [1, -2.5, None, True, 2**63 - 1, -(2**63), 1e308],
             "deep": json.loads("[" * (DEPTH - 1) + "]" * (DEPTH - 1)), "": {"a": {}}}
    assert read_object(json.dumps(value).encode()) == value
    assert read_object(b" " + json.dumps(value, ensure_ascii=False).encode() + b"\r\n") == value


def test_brackets_in_texts_are_not_depth():
    """Catches: a prompt with many brackets that is refused."""
    value = {"a": "[" * 1000 + '\\"' + "{" * 1000}
    assert read_object(json.dumps(value).encode()) == value


def test_true_is_no_number_and_one_is_no_truth():
    refused(Fields({"n": True}).integer, "n", 0, 5, param="n", names=["True"])
    refused(Fields({"n": 1.0}).integer, "n", 0, 5, param="n")
    refused(Fields({"x": False}).real, "x", 0, 1, 0.5, param="x")
    refused(Fields({"x": 1}).flag, "x", param="x")
    assert Fields({"x": None}).real("x", 0, 1, 0.5) == 0.5 and Fields({}).integer("n", 1, 2) is None


@pytest.mark.parametrize("field, values", [
    ("prompt", [None, 1, ["a", "b"], [1, 2], {}]), ("model", [None, 1, [], {}]),
    ("max_tokens", [0, -1, 1.5, "3", True, 2**40]), ("temperature", [-0.1, 2.1, "1", [], 1e-4]),
    ("top_p", [0, -1, 1.01, "1"]), ("seed", [-1, 1.5, "1", 2**63]), ("n", [0, 5, 1.0, "2"]),
    ("stop", ["", [""], ["a", 1], {}, 1, ["a"] * 5, "x" * 300]), ("logprobs", [-1, 21, True, "1", 1.0]),
    ("user", ["a b", "ä", "x" * 65, 1, "../x", "a/b"]), ("stream", [1, "true", []]),
    ("stream_options", [{"include_usage": True}, 1, []])])
def test_a_field_of_a_wrong_value_is_named(field, values):
    for value in values:
        body = TEXT | {field: value}
        refused(read_completion, body, 4, param=field)


@pytest.mark.parametrize("field, values", [
    ("messages", [None, [], "Hi", {}, [1] * 300]), ("logprobs", [1, "true"]), ("top_logprobs", [1, -1, 21]),
    ("max_completion_tokens", [])])
def test_a_field_of_chat_of_a_wrong_value_is_named(field, values):
    for value in values:
        refused(read_chat, CHAT | {field: value}, 4, param=field)
    refused(read_chat, CHAT | {"max_tokens": 2, "max_completion_tokens": 3}, 4, param="max_tokens")


@pytest.mark.parametrize("message", [
    {"role": "tool", "content": "x"}, {"role": "user"}, {"role": "user", "content": None}, {"content": "x"},
    {"role": "user", "content": [{"type": "image_url", "image_url": {}}]}, {"role": "user", "content": ["x"]},
    {"role": "user", "content": [{"type": "text", "text": 1}]}, {"role": ["user"], "content": "x"}, "x", None, [],
    {"role": "assistant", "content": "x", "tool_calls": [{}]}, {"role": "user", "content": "x", "weight": 1}])
def test_a_message_that_cannot_be_read_is_refused(message):
    with pytest.raises(Refused) as caught:
        read_chat(CHAT | {"messages": [message]}, 4)
    assert caught.value.status == 400 and caught.value.message.isascii()


def test_messages_become_roles_and_texts():
    messages = [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": "Hi", "name": None},
                {"role": "assistant", "content": "Ho", "tool_calls": [], "refusal": None},
                {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]
    assert read_chat(CHAT | {"messages": messages}, 4).prompt == [
        {"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Ho"}, {"role": "user", "content": "ab"}]


def test_fields_that_change_nothing_are_accepted_and_others_are_named():
    """Catches: an option of OpenAI's that a client sends and that is silently ignored."""
    neutral = {"frequency_penalty": 0, "presence_penalty": 0.0, "logit_bias": {}, "echo": False, "best_of": 2, "n": 2,
               "suffix": None}
    assert read_completion(TEXT | neutral, 4).n == 2
    for field, value in {"frequency_penalty": 0.5, "logit_bias": {"1": 2}, "echo": True, "best_of": 3, "suffix": "x",
                         "presence_penalty": False}.items():
        refused(read_completion, TEXT | {field: value}, 4, param=field, code="unsupported_field", names=[field])
    chat = {"tools": [], "tool_choice": "auto", "response_format": {"type": "text"}, "store": False, "metadata": {},
            "modalities": ["text"], "parallel_tool_calls": True, "service_tier": "auto", "audio": None}
    assert read_chat(CHAT | chat, 4).n == 1
    for field, value in {"tools": [{}], "response_format": {"type": "json_object"}, "store": True, "store ": 1,
                         "audio": {}, "reasoning_effort": "high", "echo": False}.items():
        with pytest.raises(Refused) as caught:
            read_chat(CHAT | {field: value}, 4)
        assert field in caught.value.message
    refused(read_completion, TEXT | {"top_k": 5}, 4, param="top_k", code="unknown_field", names=["top_k", "top_p"])
    refused(read_completion, TEXT | {"\n<script>": 5}, 4, code="unknown_field")


def test_the_fields_are_read_as_they_are_sent():
    ask = read_completion(TEXT | {"max_tokens": 7, "temperature": 0, "top_p": 0.5, "seed": 2**63 - 1, "n": 3,
                                  "stop": "x",
                                  "logprobs": 0, "user": "anna-1.b_C", "stream": True,
                                  "stream_options": {"include_usage": True, "include_obfuscation": False}}, 4)
    assert (ask.max_tokens, ask.temperature, ask.top_p, ask.seed, ask.n) == (7, 0.0, 0.5, 2**63 - 1, 3)
    assert (ask.stop, ask.logprobs, ask.user, ask.stream, ask.usage, ask.chat) == (("x",), 0, "anna-1.b_C", True, True,
                                                                                False)
    ask = read_chat(CHAT | {"logprobs": True, "top_logprobs": 5, "max_completion_tokens": 9, "stop": ["a", "b"]}, 4)
    assert (ask.logprobs, ask.max_tokens, ask.stop, ask.chat, ask.seed) == (5, 9, ("a", "b"), True, None)
    assert read_chat(CHAT | {"logprobs": True}, 4).logprobs == 0 and read_chat(CHAT, 4).logprobs is None


def test_comparisons_and_queries():
    choice = {"prompt": "p", "chosen": "a", "rejected": "b"}
    assert read_choice(choice).chosen == "a"
    assert read_choice(choice | {"prompt": CHAT["messages"]}).prompt == CHAT["messages"]
    refused(read_choice, choice | {"rejected": "a"}, param="rejected")
    refused(read_choice, choice | {"user": "x"}, param="user", code="unknown_field")
    refused(read_choice, {"prompt": "p", "chosen": "a"}, param="rejected")
    refused(read_choice, choice | {"prompt": {"a": 1}}, param="prompt")
    assert read_query({"prompt": "p", "completion": "c", "user": "u"}, True).user == "u"
    refused(read_query, {"prompt": "p"}, True, param="completion")
    refused(read_query, {"prompt": "p", "completion": "c"}, False, param="completion", code="unknown_field")
