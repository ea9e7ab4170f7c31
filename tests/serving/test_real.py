"""The server with a real model: a tiny run, its own command, texts and numbers against the library's."""

import json
import math
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import httpx
import openai
import pytest
import tinyjob
import torch
from served_jobs import made, make_folder  # noqa: F401

from mixdpo.evaluation.generate import Sampling, generate
from mixdpo.serving.engine import Engine
from mixdpo.serving.policies import ServedRun
from mixdpo.serving.service import Limits
from mixdpo.serving.users import mean_weights

ROOT = Path(__file__).resolve().parents[2]
MODELS = ["mixture", "sparse", "reference", "expert-0", "expert-1", "dpo"]


@pytest.fixture(params=["heads", "lora"])
def real(request, made, serving):
    """A server of a tiny mixture with DPO beside it."""
    served = made.served(request.param)
    engine = Engine(served, rows=8, waiting=200)
    with serving(served=served, engine=engine, prior=mean_weights(served.run), limits=Limits(choices=8)) as server:
        server.served = served
        with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60) as server.client:
            yield server


def test_the_models_are_the_policies(real):
    assert [model.id for model in real.client.models.list()] == MODELS


def test_a_text_is_what_the_policy_generates(real):
    """Each policy by evaluation.generate, row 0, of the same seed. Catches: another policy's answer; another prompt."""
    served = real.served
    for name in served.names[1:-1]:
        model, head = served.run.experts.policy(int(name[-1]))
        for seed in range(3):
            ids, end = served.encode("mno")
            wanted, = generate(model, [ids], Sampling(10, end, 1.0, seed), head)
            answer = real.client.completions.create(model=name, prompt="mno", seed=seed, max_tokens=10)
            assert answer.choices[0].text == served.tokenizer.decode([i for i in wanted if i != end])
            assert answer.choices[0].finish_reason == ("stop" if wanted[-1] == end else "length")
            assert answer.usage.prompt_tokens == len(ids)


def test_many_mixed_requests_at_once_give_what_each_gives_alone(real):
    """48 requests of all models, streamed and not, with options of all kinds, through 8 rows. Catches: rows that
    change each other; a token that is lost or delivered to another client; a queue that forgets a request."""
    asks = [dict(model=MODELS[n % 6], prompt="mnop"[: 1 + n % 4], seed=n, max_tokens=3 + n % 9, n=1 + n % 3,
                 temperature=(1.0, 0.0, 0.7)[n % 3], top_p=(1.0, 0.8)[n % 2]) for n in range(48)]
    alone = [real.client.completions.create(**ask) for ask in asks]
    found = [None] * len(asks)

    def one(n):
        if n % 2:
            found[n] = [choice.text for choice in real.client.completions.create(**asks[n]).choices]
            return
        texts = [""] * asks[n]["n"]
        for chunk in real.client.completions.create(stream=True, **asks[n]):
            for choice in chunk.choices:
                texts[choice.index] += choice.text
        found[n] = texts

    threads = [threading.Thread(target=one, args=(n,)) for n in range(len(asks))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [[choice.text for choice in answer.choices] for answer in alone]
    assert len({text for texts in found for text in texts}) > 40


def test_logprobs_are_those_of_the_scores(real):
    """What the engine said while it wrote, by a teacher-forced pass over the text. Catches: log-probs of another
    policy or temperature."""
    compared = 0
    for name in real.served.names:
        for seed in range(30):
            answer = real.client.completions.create(model=name, prompt="mnop", seed=seed, max_tokens=3, logprobs=3,
                                                    temperature=0.6)
            text, found = answer.choices[0].text, answer.choices[0].logprobs
            if not text or {*text} & {"\ufffd", "\x00"}:                    # bytes that are no text
                continue
            scores = httpx.post(real.url + "/api/score", json={"prompt": "mnop", "completion": text}).json()
            assert found.token_logprobs == pytest.approx(scores["logps"][name], abs=2e-4)
            assert "".join(scores["tokens"]) == text and len(scores["posterior"]) == len(found.tokens) + 1
            assert [len(top) for top in found.top_logprobs] == [3] * len(found.tokens)
            compared += 1
    assert compared >= 8


def test_posteriors_follow_from_the_runs_margins(real):
    """M4 and M11 from margins in a plain loop; then the weights of an answer. Catches: chosen in the place of rejected;
    evidence of the reference; evidence that is not used."""
    served, choices = real.served, [("abca", "wxyz"), ("dcb", "zyxw"), ("wwx", "aabb")]
    log_q = mean_weights(served.run)
    for n, (chosen, rejected) in enumerate(choices, 1):
        found = httpx.post(f"{real.url}/v1/users/new/preferences",
                           json={"prompt": "mno", "chosen": chosen, "rejected": rejected}).json()
        h = served.margins("mno", chosen, rejected)
        log_q = log_q + torch.nn.functional.logsigmoid(h.double())
        wanted = torch.softmax(log_q, 0).tolist()
        assert found["comparisons"] == n and found["posterior"] == pytest.approx(wanted, abs=1e-6)
    evidence = log_q - mean_weights(served.run)
    assert evidence.max() - evidence.min() > 0.05
    weights = torch.softmax(served.log_w(served.encode("nn")[0]).double() + evidence, 0).tolist()
    answer = real.client.completions.create(model="sparse", prompt="nn", user="new")
    assert answer.mixdpo["weights"] == pytest.approx(weights, abs=1e-5)
    assert answer.mixdpo["expert"] == weights.index(max(weights))


def test_training_users_are_known(real):
    for name in ("u0", "u1"):
        log_q = real.served.known_user(name)
        assert httpx.get(f"{real.url}/v1/users/{name}").json()["posterior"] == pytest.approx(log_q.exp().tolist(),
                                                                                             abs=1e-5)


def test_chat(tmp_path, serving):
    """Catches: messages that are encoded as a text; an answer that does not end with the turn; a conversation that the
    template cannot write and that is an error of the server."""
    served = ServedRun.load(make_folder(tmp_path, "heads", max_prompt=40))
    url = "/v1/chat/completions"
    engine, asked = Engine(served), []
    submit, engine.submit = engine.submit, lambda request, deliver: asked.append(request) or submit(request, deliver)
    with serving(served=served, engine=engine, prior=mean_weights(served.run)) as server:
        for seed in range(4):
            messages = [{"role": "user", "content": "mno"[: 1 + seed % 3]}]
            body = {"model": "expert-0", "messages": messages, "seed": seed, "max_tokens": 10, "logprobs": True}
            choice = httpx.post(server.url + url, json=body).json()["choices"][0]
            ids, end = served.encode(messages)
            wanted, = generate(served.run.experts.policy(0)[0], [ids], Sampling(10, end, 1.0, seed),
                               served.run.experts.policy(0)[1])
            assert asked[-1].end == end != served.tokenizer.eos
            assert choice["message"]["content"] == served.tokenizer.decode([i for i in wanted if i != end])
            assert len(choice["logprobs"]["content"]) == len(wanted) - (wanted[-1] == end)
        httpx.post(server.url + "/v1/completions", json={"model": "reference", "prompt": "mno"})
        assert asked[-1].end == served.tokenizer.eos
        for messages, named in (([{"role": "assistant", "content": "m"}], "last"),
                                ([{"role": "user", "content": "m" * 60}], "too long")):
            answer = httpx.post(server.url + url, json=body | {"messages": messages})
            message = answer.json()["error"]["message"]
            assert answer.status_code == 400 and named in message and "remove the line" not in message
        choice = {"prompt": messages[:0] + [{"role": "user", "content": "m"}], "chosen": "ab", "rejected": "xy"}
        found = httpx.post(server.url + "/v1/users/a/preferences", json=choice).json()
        h = served.margins(choice["prompt"], "ab", "xy").double()
        wanted = torch.softmax(mean_weights(served.run) + torch.nn.functional.logsigmoid(h), 0)
        assert found["posterior"] == pytest.approx(wanted.tolist(), abs=1e-6)
        assert json.loads(httpx.get(server.url + "/v1/users/a/preferences").text)["chosen"][0]["content"] == "ab"


def test_inputs_that_the_run_cannot_use_are_refused_with_a_sentence(real):
    for path, body in (("/api/weights", {"prompt": ""}), ("/api/score", {"prompt": "m", "completion": "x" * 100}),
                       ("/v1/completions", {"model": "sparse", "prompt": "m", "max_tokens": 64}),
                       ("/v1/users/a/preferences", {"prompt": "m", "chosen": "x" * 50, "rejected": "x" * 60}),
                       ("/v1/users/a/preferences", {"prompt": [{"role": "system", "content": "m"}], "chosen": "x",
                                                    "rejected": "y"})):
        answer = httpx.post(real.url + path, json=body)
        assert answer.status_code == 400 and len(answer.json()["error"]["message"]) > 20, (path, answer.text)
    assert not any(line.startswith("error") for line in real.log)


# --- the command


def start(*words):
    """The command as a process -> (process, its url)."""
    made = subprocess.Popen([sys.executable, "-m", "mixdpo.serving", *words, "--port", "0"], cwd=ROOT, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    for line in made.stdout:
        if line.startswith("http://"):
            return made, line.split()[0]
    raise AssertionError(made.stderr.read())


def test_the_command_serves_a_run_and_its_users_survive(made, tmp_path):
    """A run is copied, served, stopped, served again; trained again, its old numbers are not used. What was downloaded
    is a file that train.py accepts."""
    folder = tmp_path / "job"
    shutil.copytree(made.path("heads").parent, folder)
    choice = {"prompt": "mno", "chosen": "abca", "rejected": "wxyz"}
    server, url = start(str(folder / "heads"))
    try:
        first = httpx.post(url + "/v1/users/anna/preferences", json=choice).json()
        answer = httpx.post(url + "/v1/completions", json={"model": "mixture", "prompt": "mno", "user": "anna"}).json()
        assert answer["choices"][0]["finish_reason"] and math.isclose(sum(answer["mixdpo"]["weights"]), 1, abs_tol=1e-6)
        assert "mixdpo" in httpx.get(url).text.lower() and httpx.get(url + "/api/run").json()["experts"] == 2
        lines = httpx.get(url + "/v1/users/anna/preferences").text
        server.send_signal(signal.SIGTERM)
        assert server.wait(10) == 0 and (folder / "heads/users.sqlite").exists()
        assert "mno" not in server.stderr.read()
        server, url = start(str(folder / "heads"))
        assert httpx.get(url + "/v1/users/anna").json() == first and first["comparisons"] == 1
    finally:
        server.kill()
        server.communicate()
    records = [json.loads(line) for line in lines.splitlines()] * 4
    tinyjob.run(tmp_path, folder / "model", [record | {"prompt": "mnop"[n:]} for n, record in enumerate(records)],
                "again", max_prompt=12, max_response=10, experts=1)
    assert (tmp_path / "again/checkpoint").exists()


def test_a_folder_without_a_run_is_one_sentence(tmp_path):
    found = subprocess.run([sys.executable, "-m", "mixdpo.serving", str(tmp_path)], cwd=ROOT, capture_output=True,
                           text=True, timeout=120)
    assert found.returncode == 1 and found.stderr.startswith("error: ") and len(found.stderr.splitlines()) == 1
