"""The server's own endpoints: users, weights, scores, facts."""

import contextlib
import json
import math
import sqlite3
import threading
import time

import httpx
import pytest
from conftest import wait
from fakerun import FakeEngine, FakeRun, make_tokenizer

from mixdpo.config import InputError
from mixdpo.preferences import read_preferences
from mixdpo.serving import connection, users
from mixdpo.serving.__main__ import ServeConfig, access_of, rewards_beside, serve, users_of
from mixdpo.serving.service import Limits


@pytest.fixture
def client(live):
    with httpx.Client(base_url=live.url, timeout=20) as made:
        yield made


def sigma(h):
    return 1 / (1 + math.exp(-h))


def test_a_users_posterior_moves_with_each_comparison(client):
    """Catches: chosen and rejected that change places; a history that does not begin at the weights."""
    prior = client.get("/v1/users/anna").json()
    assert prior == {"user": "anna", "comparisons": 0, "posterior": prior["history"][0], "history": prior["history"]}
    assert prior["posterior"] == pytest.approx([0.7, 0.3], abs=1e-6)
    odds = 0.7 / 0.3
    for n, (chosen, rejected) in enumerate((("aaaaaa", "a"), ("a", "aaaaaa"), ("a", "aaaaaa")), 1):
        found = client.post("/v1/users/anna/preferences", json={"prompt": "p", "chosen": chosen, "rejected": rejected})
        found, h = found.json(), (len(chosen) - len(rejected)) / 10
        odds *= sigma(h) / sigma(-h)
        assert found["comparisons"] == n and len(found["history"]) == n + 1
        assert found["posterior"] == found["history"][-1] == pytest.approx([odds / (1 + odds), 1 / (1 + odds)],
                                                                           abs=1e-6)
    assert client.get("/v1/users/anna").json() == found
    assert client.get("/v1/users/bert").json()["comparisons"] == 0


def test_a_training_user_begins_with_the_runs_responsibilities(client):
    assert client.get("/v1/users/trained").json()["posterior"] == pytest.approx([0.1, 0.9], abs=1e-6)
    found = client.post("/v1/users/trained/preferences", json={"prompt": "p", "chosen": "aaaaaa",
                                                               "rejected": "a"}).json()
    odds = 0.1 / 0.9 * sigma(0.5) / sigma(-0.5)
    assert found["posterior"][0] == pytest.approx(odds / (1 + odds), abs=1e-6)


def test_the_prior_of_a_new_user_is_the_runs_mean_weights(serving):
    import torch

    with serving(prior=torch.tensor([0.25, 0.75]).log()) as server:
        assert httpx.get(server.url + "/v1/users/new").json()["posterior"] == pytest.approx([0.25, 0.75], abs=1e-6)


def test_comparisons_are_downloaded_as_preferences(client, tmp_path):
    for chosen in ("größer", "zwei\nZeilen"):
        client.post("/v1/users/anna/preferences", json={"prompt": "ein Text", "chosen": chosen, "rejected": "b"})
    answer = client.get("/v1/users/anna/preferences")
    assert answer.headers["content-type"] == "text/plain; charset=utf-8"
    assert answer.headers["content-disposition"] == 'attachment; filename="preferences-anna.jsonl"'
    assert [json.loads(line) for line in answer.text.splitlines()] == [
        {"prompt": "ein Text", "chosen": chosen, "rejected": "b", "user": "anna"} for chosen in ("größer",
                                                                                                 "zwei\nZeilen")]
    (tmp_path / "down.jsonl").write_bytes(answer.content)
    assert len(read_preferences(str(tmp_path / "down.jsonl"), make_tokenizer(), 32, 32)) == 2
    assert client.get("/v1/users/nobody/preferences").text == ""


def test_a_user_is_forgotten(client):
    client.post("/v1/users/anna/preferences", json={"prompt": "p", "chosen": "aaaa", "rejected": "b"})
    client.post("/v1/users/bert/preferences", json={"prompt": "p", "chosen": "aaaa", "rejected": "b"})
    assert client.delete("/v1/users/anna").json() == {"user": "anna", "forgotten": 1}
    assert client.delete("/v1/users/anna").json() == {"user": "anna", "forgotten": 0}
    assert client.get("/v1/users/anna").json()["comparisons"] == 0
    assert client.get("/v1/users/anna/preferences").text == ""
    assert client.get("/v1/users/bert").json()["comparisons"] == 1


def test_users_and_comparisons_are_limited(serving):
    choice = {"prompt": "p", "chosen": "aaaa", "rejected": "b"}
    with serving(most_users=1, most_comparisons=2) as server, httpx.Client(base_url=server.url) as client:
        codes = [client.post("/v1/users/anna/preferences", json=choice).status_code for _ in range(3)]
        other = client.post("/v1/users/bert/preferences", json=choice)
        assert codes == [200, 200, 409] and other.status_code == 409
        assert other.json()["error"]["code"] == "limit_reached" and "1 users" in other.json()["error"]["message"]
        client.delete("/v1/users/anna")
        assert client.post("/v1/users/bert/preferences", json=choice).status_code == 200


def test_a_file_that_another_process_holds_is_no_error_of_the_server(serving, tmp_path, monkeypatch):
    """Each request that reads or writes users' comparisons. Catches: status 500 where a later request would succeed."""
    monkeypatch.setattr(users, "WAIT", 0.05)
    choice, path = {"prompt": "p", "chosen": "aaaa", "rejected": "b"}, "/v1/users/anna/preferences"
    asks = [("POST", path, choice), ("GET", path, None), ("GET", "/v1/users/anna", None),
            ("POST", "/api/weights", {"prompt": "p", "user": "anna"}), ("DELETE", "/v1/users/anna", None),
            ("POST", "/v1/completions", {"model": "mixture", "prompt": "p", "user": "anna"})]
    with serving() as server, httpx.Client(base_url=server.url) as client:
        with contextlib.closing(sqlite3.connect(tmp_path / "users.sqlite", isolation_level=None)) as other:
            other.execute("BEGIN EXCLUSIVE")
            for method, place, body in asks:
                answer = client.request(method, place, json=body)
                assert answer.status_code == 503 and int(answer.headers["retry-after"]) > 0, (method, place)
            other.execute("ROLLBACK")
        assert [client.request(method, place, json=body).status_code for method, place, body in asks] == [200] * 6
        assert not any(line.startswith("error") for line in server.log)


def test_what_the_run_cannot_compare_is_refused_and_not_stored(client):
    answer = client.post("/v1/users/anna/preferences", json={"prompt": "p", "chosen": "a" * 2000, "rejected": "b"})
    assert answer.status_code == 400 and "too long" in answer.json()["error"]["message"]
    assert client.get("/v1/users/anna").json()["comparisons"] == 0


def test_weights_with_and_without_a_users_evidence(client):
    client.post("/v1/users/anna/preferences", json={"prompt": "p", "chosen": "a", "rejected": "aaaaaa"})
    odds = 0.7 / 0.3 * sigma(-0.5) / sigma(0.5)
    for prompt in ("text", [{"role": "user", "content": "text"}]):
        found = client.post("/api/weights", json={"prompt": prompt, "user": "anna"}).json()
        assert found["weights"][0] == pytest.approx(odds / (1 + odds), abs=1e-6)
        assert found["gate"] == pytest.approx([0.7, 0.3], abs=1e-6)
    found = client.post("/api/weights", json={"prompt": "text"}).json()
    assert found["weights"] == found["gate"] == pytest.approx([0.7, 0.3], abs=1e-6)
    assert client.post("/api/weights", json={"prompt": ""}).status_code == 400


class Weighted(FakeRun):
    """Its scores show the weights that they were computed under."""

    def scores(self, prompt, completion, log_w):
        found = super().scores(prompt, completion, log_w)
        found.posterior[0][:] = log_w.exp().tolist()
        return found


def test_a_completion_is_scored_under_every_policy(serving):
    seen = []

    def score(text):
        seen.append(text)
        return {"sentiment": 0.25}

    with serving(served=Weighted(), score=score) as server, httpx.Client(base_url=server.url) as client:
        found = client.post("/api/score", json={"prompt": "Pröm", "completion": "pt!", "user": "trained"}).json()
        assert "".join(found["tokens"]) == "pt!" and seen == ["Prömpt!"] and found["rewards"] == {"sentiment": 0.25}
        assert found["posterior"][0] == pytest.approx([0.1, 0.9], abs=1e-6) and len(found["posterior"]) == 4
        assert found["logps"].keys() == found["totals"].keys() == {"reference", "expert-0", "expert-1", "dpo"}
        for name, logps in found["logps"].items():
            assert len(logps) == 3 and found["totals"][name]["logp"] == pytest.approx(sum(logps))
            assert found["totals"][name]["log_ratio"] == pytest.approx(sum(logps) - sum(found["logps"]["reference"]))
        for body, param in (({"prompt": "p", "completion": ""}, "completion"), ({"prompt": "p"}, "completion"),
                            ({"prompt": "p", "completion": "x" * 5000}, "completion")):
            answer = client.post("/api/score", json=body)
            assert answer.status_code == 400 and answer.json()["error"]["param"] == param


def test_slow_rewards_hold_nothing_else_up(serving):
    """Catches: annotators in threads beside each other; threads that all wait for them."""
    running, most, release = [], [], threading.Event()

    def score(text):
        running.append(text)
        most.append(len(running))
        release.wait(10)
        running.pop()
        return {}

    with serving(score=score) as server, httpx.Client(base_url=server.url, timeout=20) as client:
        threads = [threading.Thread(target=httpx.post, args=(server.url + "/api/score",),
                                    kwargs={"json": {"prompt": "p", "completion": "c"}}) for _ in range(12)]
        for thread in threads:
            thread.start()
        wait(lambda: server.state.running == 12 and server.service.calls == 0 and running)
        began = time.monotonic()
        assert client.get("/v1/users/anna").status_code == 200
        assert client.post("/v1/completions", json={"model": "sparse", "prompt": "say:x"}).status_code == 200
        assert time.monotonic() - began < 2
        release.set()
        for thread in threads:
            thread.join()
    assert {*most} == {1} and len(most) == 12


def test_without_annotators_there_are_no_rewards(client):
    assert client.post("/api/score", json={"prompt": "p", "completion": "c"}).json()["rewards"] is None


def test_health_and_facts(client):
    assert client.get("/health").json() == {"status": "ok", "rows": 0, "waiting": 0}
    assert client.get("/api/run").json() == {"name": "fake"}
    assert client.get("/").text.startswith("<!doctype html>")


def test_tokens_are_limited_by_the_server_and_by_the_context(serving):
    with serving(limits=Limits(tokens=5)) as server, httpx.Client(base_url=server.url) as client:
        ask = {"model": "expert-0", "prompt": "slow:40"}
        refused = client.post("/v1/completions", json=ask | {"max_tokens": 6}).json()["error"]
        assert refused["param"] == "max_tokens" and "at most 5" in refused["message"]
        for more in ({}, {"max_tokens": 5}):
            assert client.post("/v1/completions", json=ask | more).json()["usage"]["completion_tokens"] == 5
    with serving() as server, httpx.Client(base_url=server.url) as client:
        room = FakeRun.context - 7
        refused = client.post("/v1/completions", json=ask | {"max_tokens": room + 1}).json()["error"]
        assert f"at most {room}" in refused["message"] and refused["code"] == "context_length_exceeded"
        assert client.post("/v1/completions", json=ask).json()["usage"]["completion_tokens"] == 40


def test_a_prompt_that_fills_the_context_is_refused(serving):
    served = FakeRun()
    served.context = served.max_prompt = 10
    with serving(served=served) as server:
        answer = httpx.post(server.url + "/v1/completions", json={"model": "sparse", "prompt": "x" * 50})
        assert answer.status_code == 400 and answer.json()["error"]["param"] == "prompt"


# --- the command


def test_rewards_come_from_the_annotators_beside_the_run(tmp_path, monkeypatch):
    """Catches: rewards of another folder; a utility that is left out; a missing package that stops the server; a
    traceback for a damaged file, at the start or for each answer."""
    from data.annotators import rewards

    asked = []

    def score(texts, names, folder):
        asked.append((texts, names, folder))
        return {name: [len(name) / 10] * len(texts) for name in names}

    monkeypatch.setattr(rewards, "score", score)
    run = tmp_path / "job/run"
    run.mkdir(parents=True)
    assert rewards_beside(run) is None
    dataset = tmp_path / "job/dataset.json"
    dataset.write_text('{"max_new": 3}')
    assert rewards_beside(run) is None
    dataset.write_text('{"rewards": ["ab", "abc"], "utilities": {"both": {"ab": 1, "abc": 2}}}')
    assert rewards_beside(run)("text") == pytest.approx({"ab": 0.2, "abc": 0.3, "both": 0.8})
    assert asked[-1] == (["text"], ["ab", "abc"], tmp_path / "job")
    assert {folder for _, _, folder in asked} == {tmp_path / "job"}
    for damaged in ('{"rewards": 3}', '{"rewards": null}', '{"rewards": ["ab"], "utilities": 3}',
                    '{"rewards": ["ab"], "utilities": {"both": {"abc": 1}}}'):
        dataset.write_text(damaged)
        assert rewards_beside(run) is None
    dataset.write_text('{"rewards": ["ab"]}')
    monkeypatch.setattr(rewards, "score", lambda *_: (_ for _ in ()).throw(InputError("no judge")))
    assert rewards_beside(run) is None


@pytest.mark.parametrize("waiting", [64, 2000])
def test_connections_suffice_for_the_answers_that_may_wait(tmp_path, monkeypatch, waiting):
    """Catches: a fixed number of connections below --rows and --waiting."""
    most, config, served = [], ServeConfig(str(tmp_path), waiting=waiting), FakeRun()
    monkeypatch.setattr(connection, "make_server", lambda app, state, times: most.append(times.most) or 1 / 0)
    engine, store = FakeEngine(served), users_of(config, "f" * 32, served.K)
    with contextlib.closing(store), pytest.raises(ZeroDivisionError):
        serve(config, served, engine, store, served.log_w([]), {})
    engine.stop(False)
    assert most[0] > config.rows + waiting


def test_the_options_decide_who_may_come_in():
    assert access_of(ServeConfig("x")).any_address is False and "0.0.0.0" not in access_of(ServeConfig("x")).names
    access = access_of(ServeConfig("x", host="0.0.0.0", token="t" * 16, names=("a.example",)))
    assert access.any_address and access.token == "t" * 16 and "a.example" in access.names
    assert "0.0.0.0" not in access.names
    assert "models.example" in access_of(ServeConfig("x", host="models.example", token="t" * 16)).names
