"""The server as a process: how it begins, and how it ends."""

import importlib.util
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest
from raising import raises_at
from test_server import GOOD, slow

from mixdpo.config import parse
from mixdpo.serving.__main__ import ServeConfig, main, validate
from mixdpo.serving.connection import listen

FAKE = Path(__file__).with_name("fakerun.py")


@pytest.fixture
def process(tmp_path):
    """process(*options): the server's command as a process -> (process, its url)."""
    started = []

    def start(*options):
        made = subprocess.Popen([sys.executable, str(FAKE), "--run", str(tmp_path), "--port", "0", *options],
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        started.append(made)
        made.stdout.readline()
        return made, made.stdout.readline().split()[0]

    yield start
    for each in started:
        each.kill()
        each.communicate()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_running_answers_end(process, number):
    """Catches: a stream that is cut; a server that goes on to take requests, or that never stops."""
    server, url = process()
    with httpx.stream("POST", url + "/v1/completions", json=slow(100, stream=True), timeout=20) as stream:
        lines = stream.iter_lines()
        next(lines)
        server.send_signal(number)
        time.sleep(0.2)
        refused = httpx.post(url + "/v1/completions", json=GOOD)
        assert refused.status_code == 503 and int(refused.headers["retry-after"]) > 0
        assert httpx.get(url + "/health").json()["status"] == "stopping"
        rest = list(lines)
    assert sum('"text":"x"' in line for line in rest) > 90 and rest[-2] == "data: [DONE]"
    assert server.wait(5) == 0
    assert "running requests: 1" in server.stderr.read()


def test_a_second_signal_stops_at_once(process):
    server, url = process()
    with httpx.stream("POST", url + "/v1/completions", json=slow(2000, stream=True), timeout=20) as stream:
        lines = stream.iter_lines()
        next(lines)
        server.send_signal(signal.SIGTERM)
        time.sleep(0.3)
        assert server.poll() is None
        began = time.monotonic()
        server.send_signal(signal.SIGTERM)
        with pytest.raises(httpx.HTTPError):
            list(lines)
        assert time.monotonic() - began < 1.5                               # the stream has 40 seconds to go
    server.wait(10)


def test_an_idle_server_stops_at_once_and_keeps_its_users(process):
    """Catches: comparisons that live in memory alone."""
    choice = {"prompt": "p", "chosen": "aaaa", "rejected": "b"}
    server, url = process()
    first = httpx.post(url + "/v1/users/anna/preferences", json=choice).json()
    server.send_signal(signal.SIGTERM)
    assert server.wait(5) == 0
    server, url = process()
    assert httpx.get(url + "/v1/users/anna").json() == first and first["comparisons"] == 1


@pytest.mark.parametrize("words, option, named", [
    (["--host", "0.0.0.0"], "host", "--token"), (["--host", "192.0.2.1"], "host", "--token"),
    (["--host", "example.org"], "host", "--token"), (["--host", "::"], "host", "--token"),
    (["--token", "short"], "token", "16"), (["--token", "x" * 15 + " y"], "token", "16"),
    (["--token", "ü" * 20], "token", "16"), (["--port", "70000"], "port", "65535"),
    (["--names", "a:80"], "names", "a:80"),
    (["--rows", "0"], "rows", "1")])
def test_what_would_be_unsafe_is_refused_at_the_start(words, option, named):
    """Catches: a server that the network can reach without a token."""
    with raises_at(named, option=option):
        validate(parse(ServeConfig, ["--run", "x", *words], ""))


def test_what_is_safe_is_accepted():
    for words in ([], ["--host", "::1"], ["--host", "localhost"], ["--host", "127.0.0.2"],
                  ["--host", "0.0.0.0", "--token", "x" * 16], ["--names", "a.example,b"]):
        validate(parse(ServeConfig, ["--run", "x", *words], ""))


def test_missing_packages_are_named(tmp_path, monkeypatch):
    """Catches: a traceback in place of what to install."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with raises_at("starlette and uvicorn"):
        main([str(tmp_path)])


def test_an_address_that_is_taken_is_named():
    with listen("127.0.0.1", 0) as taken, raises_at(taken.getsockname()[1], "--port"):
        listen("127.0.0.1", taken.getsockname()[1])
