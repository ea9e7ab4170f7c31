"""mixdpo/evaluation/leaks.py: files whose form gives the choices away, and files whose form does not. What each test
catches stands in its docstring."""

import json
import random

import pytest
from letters import Letters, pair, write

from mixdpo.evaluation import leaks
from mixdpo.evaluation.leaks import describe_leak, features_of, find_leak

WORDS = "yes no it was so they all went home and then again some of us did not".split()


def text(rng, words=6):
    return " ".join(rng.choice(WORDS) for _ in range(words))


def file_of(change, count=120, prompts=60, seed=0):
    """Pairs of random texts; change(rng, chosen, rejected) -> the two texts as the file has them."""
    rng, made = random.Random(seed), []
    for n in range(count):
        chosen, rejected = change(rng, text(rng, rng.randint(3, 9)), text(rng, rng.randint(3, 9)))
        made.append(pair([n % prompts + 1], Letters().encode(chosen) + [256], Letters().encode(rejected) + [256]))
    return made


FORMS = {
    "length": lambda rng, a, b: (a + " " + text(rng, 8), b),
    "starts with a space": lambda rng, a, b: (" " + a, b),
    "ends with a full stop": lambda rng, a, b: (a + ("." if rng.random() < 0.9 else ""), b),
    "template": lambda rng, a, b: (a, b + rng.choice(["<|im_end|>", " [INST]", " Human: no"])),
    "line break": lambda rng, a, b: (a + "\n" + text(rng, 2), b + " " + text(rng, 2)),
    "list": lambda rng, a, b: ("- " + a, "so " + b)}


@pytest.mark.parametrize("name", FORMS)
def test_form_that_gives_the_choice_away_is_named(name):
    """Caught: a feature that is not looked at; named with the wrong response; a probe fitted to the pairs it judges."""
    pairs = file_of(FORMS[name])
    leak = find_leak(pairs, Letters())
    assert leak.accuracy["mean"] > 0.75 and name in leak.strongest()
    line, = describe_leak(pairs, Letters())
    assert f"{name}: more of it in the {'rejected' if name == 'template' else 'chosen'} response of" in line


def test_a_cut_response_is_known_by_its_missing_end():
    """Caught: the end token counted as text; a response that ends taken for one that is cut."""
    pairs = [pair([n + 1], [97, 98, 256], [97, 98, 99]) for n in range(60)]
    assert "cut off" in find_leak(pairs, Letters()).strongest()
    assert find_leak(pairs, Letters()).alone["cut off"]["mean"] == 0


def test_no_alarm_where_form_says_nothing():
    """Caught: an alarm by chance; the order of the file as a feature; a verdict on a handful of prompts."""
    said = [describe_leak(file_of(lambda rng, a, b: (a, b), seed=seed), Letters()) for seed in range(20)]
    assert said == [[]] * 20
    assert find_leak(file_of(FORMS["length"], prompts=9), Letters()) is None


def test_the_probe_predicts_pairs_that_it_has_not_seen():
    """All forms at random on either side, in few pairs. Caught: a probe fitted to the pairs that it predicts."""
    def mixed(rng, *texts):
        for form in FORMS.values():
            first = rng.randrange(2)
            texts = form(rng, texts[first], texts[1 - first]) if rng.random() < 0.5 else texts
            texts = texts[::-1] if rng.random() < 0.5 else texts
        return texts

    found = [find_leak(file_of(mixed, 40, 40, seed), Letters()).accuracy["mean"] for seed in range(20)]
    assert abs(sum(found) / 20 - 0.5) < 0.06


def test_features():
    """Caught: a number at the start of a text as a list; a template's name inside a word; an empty response."""
    found = features_of("1. one\n2) two\nthree", 9, False)
    assert found["list"] == pytest.approx(2 / 3) and found["line break"] == 1 and found["starts with a digit"] == 1
    assert features_of("1999 was good", 3, False)["list"] == 0
    assert features_of("superHuman: no", 3, False)["template"] == 0 and features_of("a <|x|>", 3, True)["template"] == 1
    assert features_of("", 0, False)["length"] == 0 and features_of("Why?", 2, False)["ends with ! or ?"] == 1


def test_the_command(tmp_path, monkeypatch, capsys):
    """Caught: options that it does not look at; no answer for a small file."""
    monkeypatch.setattr("mixdpo.text.tokenizer.load_tokenizer", lambda name, data: Letters())
    rng = random.Random(0)
    rows = [{"prompt": f"p{n}", "chosen": text(rng) + ".", "rejected": text(rng)} for n in range(40)]
    leaks.main([str(write(tmp_path, *map(json.dumps, rows))), "--max-response", "99"])
    out = capsys.readouterr().out
    assert out.startswith("form alone predicts 1.000") and "ends with a full stop: more of it in the chosen" in out
    leaks.main([str(write(tmp_path, *map(json.dumps, rows[:3])))])
    assert "too few to tell" in capsys.readouterr().out
