"""Time, room and an end: clients that leave, answers that take too long, a full queue, a server that is to stop."""

import asyncio
import json
import threading
import time
from types import SimpleNamespace

import httpx
import pytest
from conftest import wait
from rawhttp import connect, exchange, read_answer, request

from mixdpo.serving.__main__ import ServeConfig, limits_of
from mixdpo.serving.connection import Times
from mixdpo.serving.engine import Token
from mixdpo.serving.generation import Choices
from mixdpo.serving.service import Limits
from mixdpo.serving.texts import TextStream

GOOD = {"model": "mixture", "prompt": "say:good"}


def post(server, body, path="/v1/completions", **options):
    return httpx.post(server.url + path, json=body, timeout=20, **options)


def slow(tokens, **options):
    return {"model": "expert-0", "prompt": f"slow:{tokens}", "max_tokens": tokens} | options


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_whose_client_leaves_is_cancelled(live, stream):
    """Catches: a model that goes on writing for nobody."""
    connection = connect(live.port)
    connection.sendall(request(body=json.dumps(slow(2000, stream=stream, n=3)).encode()))
    wait(lambda: live.engine.rows_now == 3)
    if stream:
        assert read_some(connection, b"data: ")
    connection.close()
    wait(lambda: live.engine.rows_now == 0, 2)
    wait(lambda: live.state.running == 0, 2)
    assert any(" 499 " in line or " 200 " in line for line in live.log)
    assert post(live, GOOD).json()["choices"][0]["text"] == "good"


def read_some(connection, mark: bytes) -> bytes:
    """What arrives up to a mark."""
    raw = b""
    while mark not in raw:
        assert (part := connection.recv(65536)), raw
        raw += part
    return raw


def test_a_stop_sequence_frees_the_row_at_once(live):
    """Catches: a choice that is complete while the model goes on to max_tokens."""
    began = time.monotonic()
    answer = post(live, slow(1000, stop="xxxxx")).json()
    assert answer["choices"][0]["text"] == "" and answer["usage"]["completion_tokens"] == 5
    assert time.monotonic() - began < 5
    wait(lambda: live.engine.rows_now == 0, 1)


def test_a_choice_that_stops_frees_its_row_while_others_go_on():
    """Catches: rows of choices that are complete, busy until the last choice of the request is."""
    rows = []

    def submit(request, deliver):
        rows.append(SimpleNamespace(deliver=deliver, cancelled=False))
        return SimpleNamespace(cancel=lambda row=rows[-1]: setattr(row, "cancelled", True))

    async def run():
        choices = Choices(SimpleNamespace(submit=submit), [None, None],
                          [TextStream(lambda i: bytes([i]), ("b",)) for _ in range(2)])
        found = choices.pieces()
        for row, text in zip(rows, (b"abc", b"xy")):
            for letter in text:
                row.deliver(Token(letter, -1.0, []))
        pieces = [await anext(found) for _ in range(4)]
        assert [row.cancelled for row in rows] == [True, False]
        rows[1].deliver("length")
        pieces += [each async for each in found]
        return [(piece.index, piece.text, piece.reason) for piece in pieces]

    assert asyncio.run(run()) == [(0, "a", None), (0, "", "stop"), (1, "x", None), (1, "y", None), (1, "", "length")]


def test_an_answer_that_takes_too_long_is_given_up(serving):
    with serving(limits=Limits(seconds=0.5)) as server:
        answer = post(server, slow(1000))
        assert answer.status_code == 503 and answer.json()["error"]["code"] == "timeout"
        assert int(answer.headers["retry-after"]) > 0
        lines = post(server, slow(1000, stream=True)).text.splitlines()
        assert json.loads(lines[-2].removeprefix("data: "))["error"]["code"] == "timeout" and "[DONE]" not in lines[-2]
        assert sum('"text":"x"' in line for line in lines) > 3
        wait(lambda: server.engine.rows_now == 0, 1)
        assert post(server, GOOD).status_code == 200


def test_a_full_queue_refuses_and_says_when_to_come_again(serving):
    """Catches: a queue without an end; some choices of a refused request that run."""
    with serving(rows=2, waiting=1) as server:
        answers = []
        threads = [threading.Thread(target=lambda: answers.append(post(server, slow(60)))) for _ in range(3)]
        for thread in threads:
            thread.start()
        wait(lambda: server.engine.rows_now == 2 and server.engine.waiting_now == 1)
        for body in (GOOD, GOOD | {"stream": True}):
            refused = post(server, body)
            assert refused.status_code == 429 and int(refused.headers["retry-after"]) > 0
            assert refused.json()["error"]["type"] == "rate_limit_error"
        for thread in threads:
            thread.join()
        assert [len(answer.json()["choices"][0]["text"]) for answer in answers] == [60] * 3
        assert post(server, slow(500, n=4)).status_code == 429                # 2 rows and 1 place: all or nothing
        wait(lambda: server.engine.rows_now == server.engine.waiting_now == 0, 1)
        assert post(server, GOOD).status_code == 200


def test_as_many_answers_as_the_options_say_may_be_asked_for_at_once(serving):
    """All wait for their weights, then for the model. Catches: fixed limits of calls, requests or connections below
    --rows and --waiting."""
    config = ServeConfig("x", rows=40, waiting=280)
    limits = limits_of(config)
    with serving(limits=limits, rows=40, waiting=280) as server:
        release, codes = threading.Event(), []
        server.engine.call(release.wait)
        threads = [threading.Thread(target=lambda: codes.append(post(server, GOOD).status_code)) for _ in range(320)]
        for thread in threads:
            thread.start()
        wait(lambda: server.service.calls == 320 or codes, 20)
        release.set()
        for thread in threads:
            thread.join()
        assert codes == [200] * 320


def test_too_many_requests_at_once_are_refused(serving):
    with serving(limits=Limits(requests=2)) as server:
        threads = [threading.Thread(target=post, args=(server, slow(40))) for _ in range(2)]
        for thread in threads:
            thread.start()
        wait(lambda: server.engine.rows_now == 2)
        assert post(server, GOOD).status_code == 429 and httpx.get(server.url + "/health").status_code == 200
        for thread in threads:
            thread.join()
        assert post(server, GOOD).status_code == 200


def test_too_many_calls_to_the_model_are_refused(serving):
    """Catches: weights and scores that pile up beside the bounded queue."""
    with serving(limits=Limits(calls=2)) as server:
        release = threading.Event()
        server.engine.call(release.wait)
        threads = [threading.Thread(target=post, args=(server, {"prompt": "p"}, "/api/weights")) for _ in range(2)]
        for thread in threads:
            thread.start()
        wait(lambda: server.service.calls == 2)
        assert post(server, {"prompt": "p"}, "/api/weights").status_code == 429
        release.set()
        for thread in threads:
            thread.join()
        assert post(server, {"prompt": "p"}, "/api/weights").status_code == 200


@pytest.mark.parametrize("parts, status", [
    ([b"POST /v1/completions HTTP/1.1\r\nHost: 127.0"], 408), ([b""], 0),
    ([request(body=b'{"model"', length=100)], 408), ([request(body=b"", length=100)], 408),
    ([request(headers=("Content-Type: application/json", "Transfer-Encoding: chunked"), length=-1), b"3\r\n{}"], 408)])
def test_a_client_that_sends_too_slowly_is_answered_and_dropped(serving, parts, status):
    """Catches: connections that are kept for ever by a client that sends nothing (slowloris)."""
    with serving(times=Times(head=0.4, body=1.0), limits=Limits(body_seconds=0.5)) as server:
        began = time.monotonic()
        answer = exchange(server.port, *parts)
        assert answer.status == status and time.monotonic() - began < 3
        assert not status or len(answer.message) > 20 and answer.headers["connection"] == "close"
        wait(lambda: not server.server.server_state.connections, 5)


def test_a_client_that_drips_headers_or_a_body_is_dropped(serving):
    """Catches: a timer that starts again with each byte."""
    with serving(times=Times(head=0.5, body=1.0), limits=Limits(body_seconds=0.5)) as server:
        for start in (b"GET / HTTP/1.1\r\nX: ", request(body=b"", length=1000)):
            with connect(server.port) as connection:
                began = time.monotonic()
                connection.sendall(start)
                with pytest.raises((ConnectionError, StopIteration)):
                    while time.monotonic() - began < 5:
                        connection.sendall(b"a")
                        time.sleep(0.05)
                    raise AssertionError("never dropped")
        wait(lambda: not server.server.server_state.connections, 5)


def test_a_client_that_reads_nothing_is_dropped(serving):
    """Catches: an answer that waits for ever in the server's memory."""
    with serving(times=Times(stalled=0.5)) as server:
        connection = connect(server.port)
        body = {"model": "expert-0", "prompt": "say:" + "y" * 1900, "max_tokens": 1900, "stream": True, "n": 8,
                "logprobs": 20}
        connection.sendall(request(body=json.dumps(body).encode()) * 3)
        wait(lambda: server.state.running == 1, 2)
        wait(lambda: not server.server.server_state.connections, 8)
        wait(lambda: server.state.running == 0 and server.engine.rows_now == 0, 0.5)
        connection.close()


def test_connections_are_limited(serving):
    with serving(times=Times(most=3, linger=0.2)) as server:
        held = [connect(server.port) for _ in range(3)]
        wait(lambda: len(server.server.server_state.connections) == 3)
        assert exchange(server.port, request("GET", "/health")).status == 503
        held.pop().close()
        wait(lambda: len(server.server.server_state.connections) == 2)
        assert exchange(server.port, request("GET", "/health")).status == 200
        for connection in held:
            connection.close()


def test_a_connection_serves_many_requests_and_pipelined_ones(live):
    with connect(live.port) as connection:
        for n in range(3):
            connection.sendall(request(body=json.dumps(GOOD | {"prompt": f"say:{n}"}).encode()))
            answer = read_answer(connection)
            assert json.loads(answer.body)["choices"][0]["text"] == str(n)
        connection.sendall(request("GET", "/health") * 2)
        raw = read_some(connection, b'"ok"')
        while raw.count(b'"ok"') < 2:
            raw += connection.recv(65536)
