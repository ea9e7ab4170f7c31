"""data/annotators/judges.py and data/annotators/llm.py: win rates, and a judge behind an endpoint that misbehaves. What
each test catches stands in its docstring."""

import http.server
import json
import threading
import time

import numpy as np
import pytest
from raising import raises_at

import eval as evaluation
from data.annotators import judges, llm
from data.annotators.judges import by_scores, rate, win_rates
from data.report.job import read_job
from data.report.users import win_rates as win_rates_of
from mixdpo.config import InputError

TYPES = {"short": "shorter", "long": "longer"}


@pytest.fixture
def job(tmp_path):
    """Four prompts, completed by the reference, DPO and one mixture; the second is completed alike by all."""
    texts = [("aaa", "aa", "a"), ("same", "same", "same"), ("bb", "bbb", "b"), ("c", "ccc", "cccc")]
    names = ("reference", "dpo", "mix mixture")
    rows = [{"prompt": f"p{n} ", "texts": {name: f"p{n} {text}" for name, text in zip(names, row)}}
            for n, row in enumerate(texts)]
    (tmp_path / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "dataset.json").write_text(json.dumps({"criteria": TYPES}))
    return tmp_path


@pytest.fixture
def endpoint(monkeypatch):
    """An endpoint that prefers the shorter or the longer answer, as asked; `faults` are taken first, one a call."""
    class Handler(http.server.BaseHTTPRequestHandler):
        def log_message(self, *args):
            pass

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with self.server.lock:
                self.server.calls.append((body, self.headers.get("Authorization"), self.path))
                fault = self.server.faults.pop(0) if self.server.faults else None
            query = body["messages"][0]["content"]
            first, second = (query.split(f"[{which} answer]\n")[1].split("\n")[0] for which in ("First", "Second"))
            longer = "Which is longer?" in query
            word = "first" if self.server.biased or (len(first) > len(second)) == longer else "second"
            if self.server.style:
                word = self.server.style(word, query)
            else:
                word = fault[1] if fault and fault[0] == "says" else f" {word.title()}. "
            reply = json.dumps({"choices": [{"message": {"content": word}}],
                                "usage": {"prompt_tokens": 10, "completion_tokens": 1}}).encode()
            if fault and fault[0] == "slow":
                time.sleep(fault[1])
            status, text = fault[1:] if fault and fault[0] == "status" else self.server.refuses(body, query) or (0, "")
            if status:
                self.send_response(status)
                self.send_header("Retry-After", "0.01")
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                self.wfile.write(text.encode())
                return
            if fault and fault[0] == "malformed":
                reply = fault[1]
            self.send_response(200)
            self.send_header("Content-Length", str(len(reply) + (50 if fault and fault[0] == "cut" else 0)))
            self.end_headers()
            self.wfile.write(reply)

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.calls, server.faults, server.biased, server.lock = [], [], False, threading.Lock()
    server.style, server.refuses = None, lambda body, query: None
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("OPENAI_BASE_URL", f"http://127.0.0.1:{server.server_port}/v1/")
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    monkeypatch.setattr(llm, "PAUSE", 0.001)
    yield server
    server.shutdown()


def test_a_rate_and_its_interval():
    """Catches: ties as losses, an interval of another level, another sample on the same seed."""
    wins = [1.0] * 60 + [0.5] * 20 + [0.0] * 20
    found = rate(wins, 0)
    assert found["rate"] == 0.7 and (found["wins"], found["ties"], found["losses"]) == (60, 20, 20)
    half = 1.96 * np.std(wins) / 10
    assert [found["low"], found["high"]] == pytest.approx([0.7 - half, 0.7 + half], abs=0.015)
    assert rate(wins, 0) == found and rate([1.0], 0)["low"] == 1
    assert rate([*wins, None, None], 0) == found | {"unjudged": 2} and found["unjudged"] == 0


def test_scores_decide():
    """Catches: sides swapped, equal scores as a win, a prompt left out."""
    preferred = by_scores(lambda texts: {"length": list(map(len, texts))})
    found = preferred([("p ", "aa", "a"), ("p ", "a", "aa"), ("q", "x", "y")])
    assert found == {"length": [1.0, 0.0, 0.5]}


def test_an_llm_is_asked_in_both_orders(job, endpoint, capsys, monkeypatch):
    """Catches: one order alone, the same text asked about, one criterion for all types, no key sent, no bill."""
    monkeypatch.setenv("MIXDPO_PRICE", "2,10")
    found = win_rates(job, "llm:judge", "", 0)
    assert found["against"] == "dpo" and list(found["columns"]) == ["short", "long"]
    of = {(column, policy): (f["wins"], f["ties"], f["losses"]) for column, rows in found["columns"].items()
          for policy, f in rows.items()}
    assert of == {("short", "reference"): (2, 1, 1), ("long", "reference"): (1, 1, 2),
                  ("short", "mix mixture"): (2, 1, 1), ("long", "mix mixture"): (1, 1, 2)}
    assert len(endpoint.calls) == 2 * 2 * 3 * 2, "policies, criteria, prompts that differ, orders"
    body, key, path = endpoint.calls[0]
    assert key == "Bearer secret" and path == "/v1/chat/completions" and body["temperature"] == 0
    assert "24 calls, 240 tokens in, 24 out, 0.0007 dollars" in capsys.readouterr().out
    assert json.loads((job / "winrates.json").read_text()) == found
    win_rates(job, "llm:judge", "dpo", 0)
    assert len(endpoint.calls) == 24, "what was answered is not asked again"
    win_rates(job, "llm:other", "dpo", 0)
    assert len(endpoint.calls) == 48, "another judge's answers are its own"


def test_a_judge_that_prefers_a_place_gives_ties(job, endpoint):
    """Catches: the first order's word taken for the answer."""
    endpoint.biased = True
    for rows in win_rates(job, "llm:judge", "dpo", 0)["columns"].values():
        assert all(f["ties"] == 4 and f["rate"] == 0.5 for f in rows.values())


FAULTS = [("status", 429, "no"), ("status", 500, "no"), ("malformed", b"{"), ("malformed", b'{"choices": []}'),
          ("malformed", b"[]"), ("says", "Well, the first one"), ("says", ""), ("cut", 0), ("slow", 0.6)]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda f: f"{f[0]} {f[1]!r}"[:24])
def test_a_passing_fault_is_tried_again(job, endpoint, fault, monkeypatch):
    """Catches: a fault taken for a verdict, or for the end; a reply waited for without limit."""
    monkeypatch.setattr(llm, "LONGEST", 0.3)
    endpoint.faults = [fault] * 3
    found = win_rates(job, "llm:judge", "dpo", 0)
    assert found["columns"]["short"]["reference"]["wins"] == 2 and len(endpoint.calls) == 24 + 3


def test_a_lasting_fault_ends_and_nothing_is_lost(job, endpoint, monkeypatch):
    """Catches: attempts without limit, answers thrown away, a wrong key tried again and again."""
    monkeypatch.setattr(llm, "AT_ONCE", 1)
    endpoint.faults = [None] * 5 + [("status", 503, "no")] * llm.ATTEMPTS
    with pytest.raises(InputError) as error:
        win_rates(job, "llm:judge", "dpo", 0)
    assert error.value.option == "judge" and error.value.message.count("HTTP 503") == llm.ATTEMPTS
    assert len((job / "judged.jsonl").read_text().splitlines()) == 5 and len(endpoint.calls) == 5 + llm.ATTEMPTS
    with (job / "judged.jsonl").open("a") as file:
        file.write('{"key": "cut of')                                       # an interruption in the middle of a line
    endpoint.calls.clear()
    win_rates(job, "llm:judge", "dpo", 0)
    assert len(endpoint.calls) == 24 - 5
    endpoint.calls.clear()
    endpoint.faults = [("status", 401, "no")] * 30
    with pytest.raises(InputError) as error:
        win_rates(job, "llm:another", "dpo", 0)
    assert error.value.option == "judge" and "HTTP 401" in error.value.message
    assert len(endpoint.calls) == 1


def test_what_is_refused(job, monkeypatch, tmp_path):
    """Catches: a policy as its own judge, a query asked before all is known to be good, an option without effect."""
    for name in ("OPENAI_BASE_URL", "OPENAI_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    run = job / "mix"
    run.mkdir()
    (run / "config.json").write_text(json.dumps({"model": str(tmp_path / "base")}))
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text("{}")
    for judge, against, option in (("llm:x", "", "judge"), ("coin", "", "judge"), ("annotator:", "", "judge"),
                                   ("llm:x", "mix", "against"), (f"classifier:{run}", "", "judge"),
                                   (f"classifier:{tmp_path / 'base'}", "", "judge"),
                                   ("classifier:/nowhere", "", "judge")):
        with pytest.raises(InputError) as error:
            win_rates(job, judge, against)
        assert error.value.option == option
    with raises_at("'fun'", option="judge"):
        win_rates(job, "annotator:fun", "")
    for text in ("", "\n", '{"prompt": "x"}\n', "{\n"):                      # empty, blank, damaged
        (job / "samples.jsonl").write_text(text)
        with raises_at(file=job / "samples.jsonl"):
            win_rates(job, "llm:x", "")
    (job / "samples.jsonl").unlink()
    with raises_at(file=job):
        win_rates(job, "llm:x", "")
    with pytest.raises(InputError) as error:
        evaluation.main([str(job), "--judge", "llm:x", "--limit", "3"])
    assert error.value.option == "limit"


REPLIES = {"first": "first", "Second.": "second", "**First**": "first", "First answer": "first", "tie": "tie",
           "The second answer is better.": "second", "The first answer is the better one": "first",
           "The first answer is shorter.": "first", "<think>\nfirst? no, second\n</think>\n\nfirst": "first",
           "<think></think> It's a tie.": "tie", "Verdict: second": "second", "My answer is: first": "first",
           "Answer: **Second**": "second", "`first`": "first"}
NO_VERDICT = ["", None, "neither", "first or second", "The first answer is worse.", "The first answer is not better.",
              "The first answer is longer.", "I can't help with comparing the first answer.", "<think>first",
              "first\nsecond", "The first answer is better than the second, but wrong", "a tie for the first place"]


def test_a_verdict_is_taken_only_where_it_is_clear():
    """Catches: words of the reasoning taken for the verdict, a sentence not understood, one that means the other answer
    or none taken for this one."""
    assert {reply: llm.verdict(reply, "shorter") for reply in REPLIES} == REPLIES
    for reply in NO_VERDICT:
        with pytest.raises(llm.NoVerdict):
            llm.verdict(reply, "shorter")


def asked_of(query: str) -> str:
    """The prompt in a query."""
    return query.split("[Conversation]\n")[1].split("\n")[0].strip()


@pytest.mark.parametrize("reply", [None, "I can't help with comparing these answers."])
def test_a_comparison_without_a_verdict_is_not_judged_and_the_rest_is(job, endpoint, reply, capsys, monkeypatch):
    """Catches: one prompt that the judge will not answer ends everything, at every run; such a prompt as a tie, or its
    number not printed; a pause before the same query again."""
    endpoint.style = lambda word, query: reply if asked_of(query) == "p0" else f"<think>first or second</think>{word}"
    pauses = []
    monkeypatch.setattr(llm.time, "sleep", pauses.append)
    evaluation.main([str(job), "--judge", "llm:judge", "--against", "dpo"])
    assert not any(pauses)
    calls, found = len(endpoint.calls), json.loads((job / "winrates.json").read_text())
    assert calls == 24 - 8 + 8 * llm.ATTEMPTS, "2 policies, 2 criteria, 2 orders of the first prompt"
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith(("policy", "reference"))]
    assert [row[-2:] for row in rows[::2]] == [["not", "judged"]] * 2 and [row[-1] for row in rows[1::2]] == ["1"] * 2
    for column, wins, losses in (("short", 2, 0), ("long", 0, 2)):
        f = found["columns"][column]["reference"]
        assert (f["wins"], f["ties"], f["losses"], f["unjudged"]) == (wins, 1, losses, 1)
        assert f["rate"] == (wins + 0.5) / 3
    win_rates(job, "llm:judge", "dpo")
    assert len(endpoint.calls) == calls, "what has no verdict is not asked again"


def test_a_question_that_a_filter_refuses_is_not_judged(job, endpoint, capsys, monkeypatch):
    """Catches: HTTP 400 for one prompt ends everything, or is kept for good; a wrong request that is sent for each
    prompt of thousands."""
    monkeypatch.setattr(llm, "MOST_REFUSED", 5)
    endpoint.refuses = lambda body, query: (400, '{"code": "content_filter"}') if asked_of(query) == "p2" else None
    found = win_rates(job, "llm:judge", "dpo")
    assert all(f["unjudged"] == 1 for rows in found["columns"].values() for f in rows.values())
    assert "content_filter" in capsys.readouterr().out and len(endpoint.calls) == 24
    endpoint.refuses = lambda body, query: None
    found = win_rates(job, "llm:judge", "dpo")
    assert len(endpoint.calls) == 24 + 8 and not any(f["unjudged"] for rows in found["columns"].values()
                                                     for f in rows.values())
    endpoint.calls.clear()
    endpoint.refuses = lambda body, query: (400, "no such option")
    with pytest.raises(InputError) as error:
        win_rates(job, "llm:other", "dpo")
    assert error.value.option == "judge" and len(endpoint.calls) < 5 + llm.AT_ONCE


def test_a_judge_that_takes_no_temperature_is_asked_without_one(job, endpoint, capsys):
    """Catches: a reasoning model that refuses temperature 0 ends everything; the retry for each query, or in
    silence; a temperature left out where it is taken."""
    endpoint.refuses = lambda body, query: (400, "'temperature' does not support 0") if "temperature" in body else None
    found = win_rates(job, "llm:judge", "dpo")
    assert found["columns"]["short"]["reference"]["wins"] == 2
    assert capsys.readouterr().out.count("takes no temperature of 0") == 1
    assert 24 < len(endpoint.calls) <= 24 + llm.AT_ONCE


def test_nothing_judged_at_all(job, endpoint):
    """Catches: a rate of 0 or 1/2, NaN in a JSON file, a report that cannot be made."""
    endpoint.style = lambda word, query: "neither"
    rows = [json.loads(line) for line in (job / "samples.jsonl").read_text().splitlines()]
    (job / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows if row["prompt"] != "p1 "))
    assert np.isnan(win_rates(job, "llm:judge", "dpo")["columns"]["short"]["reference"]["rate"])
    found = json.loads((job / "winrates.json").read_text(), parse_constant=pytest.fail)["columns"]["short"]["reference"]
    assert found == {"rate": None, "low": None, "high": None, "wins": 0, "ties": 0, "losses": 0, "unjudged": 3}
    assert "| reference | – | – | – | 0.0 | 3.0 |" in win_rates_of(read_job(job))


def test_the_command(job, endpoint, monkeypatch, capsys):
    """Catches: a table without its interval, the policy compared with itself, a report without it."""
    monkeypatch.setattr(evaluation, "write_report", lambda folder: None)
    evaluation.main([str(job), "--judge", "llm:judge", "--against", "reference"])
    out = capsys.readouterr().out
    assert "short: win rate against reference on 4 prompts" in out and "mix mixture" in out
    assert json.loads((job / "winrates.json").read_text())["columns"]["long"].keys() == {"dpo", "mix mixture"}
    assert judges.GENERAL.keys() == {"better"}
    section = win_rates_of(read_job(job))
    assert "| policy | short | long | worst | ties | not judged |" in section and "| dpo | 0.375 (" in section
