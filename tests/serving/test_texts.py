"""The text of a stream: whole characters, nothing of a stop sequence, the same however it is cut into tokens."""

import random

import pytest

from mixdpo.serving.engine import Token
from mixdpo.serving.texts import TextStream


def run(pieces: list[bytes], stop=()):
    """-> the parts that are shown one after another, the tokens shown with each, and the stream."""
    stream = TextStream(pieces.__getitem__, tuple(stop))
    parts = [stream.add(Token(n, -1.0, [])) for n in range(len(pieces))] + [stream.finish()]
    return [text for text, _ in parts], [placed for _, placed in parts], stream


def cut(raw: bytes, rng: random.Random) -> list[bytes]:
    """The same bytes as tokens of 1 to 4 bytes, a few of them empty."""
    places = sorted(rng.sample(range(1, len(raw)), min(len(raw) - 1, len(raw) // rng.randint(1, 4)))) if raw else []
    return [raw[a:b] for a, b in zip([0, *places], [*places, len(raw)])] + [b""]


def oracle(text: str, stop) -> str:
    """Character by character: the text up to the first stop sequence that is complete."""
    for end in range(1, len(text) + 1):
        found = [end - len(one) for one in stop if text[:end].endswith(one)]
        if found:
            return text[: min(found)]
    return text


def test_a_character_of_several_tokens_is_shown_when_it_is_complete():
    """Catches: U+FFFD in a stream for the first byte of an umlaut."""
    parts, _, _ = run([b"gr", b"\xc3", b"\xb6", b"\xf0\x9f", b"\x99", b"\x82", b"."])
    assert parts == ["gr", "", "ö", "", "", "🙂", ".", ""]


def test_bytes_that_are_no_character_are_shown_as_decode_shows_them():
    for raw in (b"a\xffb", b"a\xe2\x82", b"\xe2\x28\xa1", b"\xc3\xc3\xb6", b"\xed\xa0\x80"):
        parts, _, _ = run([raw[n : n + 1] for n in range(len(raw))])
        assert "".join(parts) == raw.decode(errors="replace")


@pytest.mark.parametrize("stop, wanted", [
    (["END"], "one E EN "), (["two"], "one E EN END "), (["EN EN"], "one E "), (["o", "one E"], ""),
    (["ne E", "on"], ""), (["e E", "one E EN"], "on"), (["absent"], "one E EN END two")])
def test_the_text_ends_before_the_first_complete_stop_sequence(stop, wanted):
    raw = b"one E EN END two"
    for size in (1, 2, 3, 5, len(raw)):
        parts, _, stream = run([raw[n : n + size] for n in range(0, len(raw), size)], stop)
        assert "".join(parts) == wanted and stream.stopped == (stop != ["absent"])


def test_text_does_not_depend_on_how_it_is_cut_into_tokens():
    """Catches: a stop sequence across tokens that is missed; a part of it that is shown and cannot be taken back."""
    rng = random.Random(1)
    for _ in range(3000):
        text = "".join(rng.choice("abö🙂") for _ in range(rng.randint(0, 14)))
        stop = ["".join(rng.choice("abö") for _ in range(rng.randint(1, 4))) for _ in range(rng.randint(0, 3))]
        wanted = oracle(text, stop)
        parts, placed, stream = run(cut(text.encode(), rng), stop)
        assert "".join(parts) == wanted, (text, stop)
        assert all("\ufffd" not in part for part in parts)
        shown = ""
        for part in parts:                                                  # nothing is taken back
            shown += part
            assert wanted.startswith(shown)


def test_text_is_shown_as_soon_as_it_cannot_be_a_stop_sequence():
    """Catches: a stream that holds everything back until its end."""
    parts, _, _ = run([b"a", b"b", b"c", b"x", b"a"], ["abd"])
    assert parts == ["", "", "abc", "x", "", "a"]


def test_tokens_are_placed_in_the_text_and_those_of_the_stop_sequence_are_left_out():
    rng = random.Random(2)
    for _ in range(500):
        text = "".join(rng.choice("abö") for _ in range(rng.randint(1, 12)))
        pieces = cut(text.encode(), rng)
        parts, placed, stream = run(pieces, ["ab"])
        found = [one for part in placed for one in part]
        assert [one.token.id for one in found] == list(range(len(found)))   # in order, each once
        starts = [len(b"".join(pieces[:n]).decode(errors="ignore")) for n in range(len(pieces))]
        assert [one.start for one in found] == starts[: len(found)]
        shown = "".join(parts)
        if stream.stopped:
            assert len(found) == sum(start < len(shown) for start in starts)
        else:
            assert len(found) == len(pieces)
