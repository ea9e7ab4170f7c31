"""5,000 requests that nobody should send, from a seed, over raw sockets: each gets a 4xx with a sentence, or, if it is
no HTTP at all, perhaps a closed connection; and the server answers good requests all the while."""

import collections
import json
import random
import string

import pytest
from conftest import wait
from rawhttp import exchange, request

from mixdpo.serving.connection import Times
from mixdpo.serving.service import Limits

COUNT = 5000
KIND = "Content-Type: application/json"
TEXT = {"model": "mixture", "prompt": "say:ok", "max_tokens": 2}
CHAT = {"model": "mixture", "messages": [{"role": "user", "content": "say:ok"}], "max_tokens": 2}
CHOICE = {"prompt": "p", "chosen": "a", "rejected": "b"}
BODIES = {"/v1/completions": TEXT, "/v1/chat/completions": CHAT, "/v1/users/u/preferences": CHOICE,
          "/api/weights": {"prompt": "p"}, "/api/score": {"prompt": "p", "completion": "c"}}
BAD_UNICODE = [b'"\\ud800"', b'"a\\udfffb"', b'"\\ud83d\\ud83d"', b'"\\u0000"', b'"\x00"', b'"\xff"', b'"\xc3"',
               b'"\xed\xa0\x80"',
               b'"\xf5\x80\x80\x80"', b'"\\x41"', b'"\\u12"', b'"tab\there"', b'"line\nbreak"', b"\"'"]
BAD_NUMBERS = [b"NaN", b"Infinity", b"-Infinity", b"1e999", b"-1e999", b"9" * 19, b"9" * 400, b"9" * 5000, b"01",
               b"+1", b"1.",
               b".5", b"0x10", b"1e", b"--1", b"1_000", "١".encode()]


def good(rng: random.Random) -> tuple[str, dict]:
    path = rng.choice([*BODIES])
    return path, BODIES[path]


def junk(rng: random.Random, depth: int = 0):
    """A JSON value that is neither a text of the server's nor a number in any range."""
    kinds = [lambda: rng.choice([-1, -10**9, 2**62, -0.5, 1e300]), lambda: rng.choice([True, False]),
             lambda: [junk(rng, depth + 1) for _ in range(rng.randint(1, 3))],
             lambda: {"".join(rng.choices(string.printable, k=5)): junk(rng, depth + 1)}]
    return rng.choice(kinds[: 2 if depth > 3 else 4])()


def damaged_json(rng):
    """Bytes of a good body cut, turned, doubled or mixed with others until they are no JSON."""
    path, body = good(rng)
    raw = bytearray(json.dumps(body, ensure_ascii=False).encode())
    while True:
        for _ in range(rng.randint(1, 4)):
            at = rng.randrange(len(raw) + 1)
            part = rng.choice([b"", bytes([rng.randrange(256)]), b"}", b"{", b'"', b",", b"\\", b"null",
                               raw[at : at + 9]])
            raw[at : at + rng.randint(0, 3)] = part
        try:
            json.loads(bytes(raw))
        except (ValueError, RecursionError):
            return request(path=path, body=bytes(raw))


def wrong_type(rng):
    """A field of another type, or one that does not exist."""
    path, body = good(rng)
    name = rng.choice([*body, "x" * rng.randint(1, 50), "tools", "stream_options", "prompt_", "__proto__",
                       "constructor"])
    value = junk(rng)
    if name == "tools" and value == []:
        value = 1
    if name == "messages" or path != "/v1/chat/completions" and name == "prompt":
        value = rng.choice([1, True, {"a": value}, [[value]], [{"role": value}],
                            [{"role": "user", "content": {"a": value}}]])
    return request(path=path, body=json.dumps(body | {name: value}).encode())


def wrong_value(rng):
    """A known field out of its range."""
    path = rng.choice(["/v1/completions", "/v1/chat/completions"])
    field, values = rng.choice([
        ("max_tokens", [0, -5, 10**12, 4096, 1.5]), ("temperature", [-0.1, 2.5, 1e308, 1e-9, "hot"]),
        ("top_p", [0, 1.1, -1]),
        ("n", [0, 9, 10**18, -1]), ("seed", [-1, 0.5, "s"]), ("stop", ["", [""], ["a"] * 5, "x" * 1000, [1]]),
        ("model", ["", "gpt-4", "../expert-0", "expert-2", "expert--1", "<script>", "mixture\n"]),
        ("user", ["a/b", "../../etc/passwd", "a\nb", "é", "x" * 65, " ", "a;DROP TABLE comparisons"]),
        ("stream", ["yes", 1, []]), ("logit_bias", [{"1": 100}]), ("frequency_penalty", [2]), ("best_of", [3]),
        ("stream_options", [{"include_usage": 1}, {"x": True}, []]), ("logprobs", [-1, 10**9, "all"])])
    return request(path=path, body=json.dumps(BODIES[path] | {field: rng.choice(values)}).encode())


def bad_atom(rng):
    """A number or a text that JSON has not, or that is no text."""
    path, body = good(rng)
    name = rng.choice([*body]).encode()
    atom = rng.choice(BAD_UNICODE + BAD_NUMBERS)
    raw = json.dumps({key: value for key, value in body.items() if key.encode() != name}).encode()[:-1]
    return request(path=path, body=raw + b', "%s": %s}' % (name, atom))


def repeated_key(rng):
    path, body = good(rng)
    name = rng.choice([*body])
    return request(path=path, body=json.dumps(body).encode()[:-1] + b", " + json.dumps({name: body[name]}).encode()[1:])


def deep(rng):
    path, body = good(rng)
    n, (a, b) = rng.choice([17, 30, 1000, 50_000]), rng.choice([("[", "]"), ('{"a":', "}")])
    middle = rng.choice(["1", ""]) if a == "[" else "1"
    raw = json.dumps(body)[:-1] + ', "deep": ' + a * n + middle + rng.choice([b * n, "", b * (n - 1)]) + "}"
    return request(path=path, body=raw.encode())


def huge(rng):
    path, body = good(rng)
    size = rng.choice([9_000, 20_000, 100_000])
    raw = json.dumps(body | {"prompt": "x" * size}).encode()
    return rng.choice([request(path=path, body=raw), request(path=path, body=b"{",
                                                             length=rng.choice([10**6, 10**15, 10**20])),
                       request(path=path, body=b" " * size)])


def smuggled(rng):
    """Headers that two programs could read in two ways."""
    body = json.dumps(TEXT).encode()
    chunked = b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body)
    both = request(headers=(KIND, "Transfer-Encoding: chunked"), length=len(body)) + rng.choice([body, chunked])
    twice = request(body=body, headers=(KIND, f"Content-Length: {len(body) + rng.randint(1, 9)}"))
    value = rng.choice(["chunked, identity", "identity", "xchunked", "chunked;q=1", "gzip, chunked", "chunked\x0b",
                        "\tx"])
    coded = request(headers=(KIND, f"Transfer-Encoding: {value}"), length=-1) + chunked
    length = request(headers=(KIND, f"Content-Length: {rng.choice(['+5', '0x5', '5 5', '-1', '5,6', '²', '1e1', ''])}"),
                     length=-1) + body
    name = rng.choice(["Content Length", "Content-Length ", "Host ", "Transfer-Encoding\t", "X\x00", "(x)", "", "é",
                       "\x7f"])
    odd = request(body=body, headers=(KIND, f"{name}: {rng.choice(['5', 'localhost'])}"))
    sizes = request(headers=(KIND, "Transfer-Encoding: chunked"), length=-1) + rng.choice(
        [b"-5\r\n", b"5;\r\n{}\r\n", b"0x5\r\nhello\r\n", b"fffffffffffffffffffff\r\n", b"zz\r\n",
         b"5\r\nhelloXX"]) + b"\r\n\r\n"
    hosts = request(body=body, headers=(KIND, f"Host: {rng.choice(['localhost', 'evil.example', '127.0.0.1'])}"))
    return rng.choice([both, twice, coded, length, odd, sizes, hosts])


def elsewhere(rng):
    """A path, a method, a host, an origin or a type of body that is not the server's."""
    body = json.dumps(TEXT).encode()
    path = rng.choice(["/..", "/../../etc/passwd", "/%2e%2e/%2e%2e/etc/passwd", "//v1/models", "/v1/users/..%2f..%2fx",
                       "/v1/users/a%00", "/v1/users/%ff", "/v1/models/%0d%0aX:%201", "/index.php?a=<script>",
                       "/.git/config",
                       "/v1/users/" + "a" * 100, "http://evil.example/", "*", "/v1/users/a/../../x", "/page.html",
                       "/v1"])
    return rng.choice([
        request(rng.choice(["GET", "POST", "DELETE"]), path, b""),
        request(rng.choice(["PUT", "PATCH", "TRACE", "OPTIONS", "BREW", "PROPFIND"]), "/v1/completions", body),
        request(body=body, host=rng.choice(["evil.example", "", "localhost.evil.example", "[::", "a b", "127.1"])),
        request(body=body, headers=(KIND, f"Origin: {rng.choice(['null', 'http://evil.example', 'file://'])}")),
        request(body=body, headers=(KIND, "Sec-Fetch-Site: cross-site")),
        request(body=body, headers=rng.choice([(), ("Content-Type: text/plain",), ("Content-Type: application/jsonp",),
                                               (KIND, KIND), ("Content-Type: multipart/form-data; boundary=x",)]))])


def large_head(rng):
    return rng.choice([
        request("GET", "/health", headers=(f"X: {'a' * rng.randint(17_000, 60_000)}",)),
        request("GET", "/health?" + "a" * rng.randint(17_000, 60_000)),
        request("GET", "/health", headers=tuple(f"X-{n}: {'a' * 100}" for n in range(rng.randint(200, 400))))])


def no_http(rng):
    """Bytes of no or of half a protocol; they end with blank lines, so that a server need not wait for more."""
    raw = rng.choice([
        bytes(rng.choices(range(256), k=rng.randint(1, 200))), b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc" + b"x" * 50,
        b"GET\r\n", b"GET /\r\n", b"GET / HTTP/9.9\r\nHost: localhost\r\n", b"get / http/1.1\r\nHost: localhost\r\n",
        b"GET / HTTP/1.1\nHost localhost\n", b"SSH-2.0-OpenSSH\r\n", b"HELO x\r\n",
        b"GET / HTTP/1.1\r\n folded\r\nHost: localhost\r\n",
        b"GET  / HTTP/1.1\r\nHost: localhost\r\n", b"\x00\x00\x00\x00", b"PRI * HTTP/2.0\r\n",
        b"GET /\x01 HTTP/1.1\r\nHost: l\r\n"])
    return raw + b"\r\n\r\n"


def too_slow(rng):
    """A request whose rest never comes."""
    raw = request(body=json.dumps(TEXT).encode())
    return rng.choice([raw[: rng.randint(1, len(raw) - 1)],
                       request(headers=(KIND, "Transfer-Encoding: chunked"), length=-1) + b"5\r\n{\"a"])


WEIGHTS = {damaged_json: 1200, wrong_type: 800, wrong_value: 700, bad_atom: 600, repeated_key: 200, deep: 200,
           huge: 150,
           smuggled: 450, elsewhere: 400, large_head: 100, no_http: 180, too_slow: 20}


@pytest.mark.slow
def test_every_hostile_request_is_refused_with_a_sentence_and_the_server_lives(serving):
    rng, statuses, closed = random.Random(0), collections.Counter(), collections.Counter()
    makers = rng.sample([maker for maker, count in WEIGHTS.items() for _ in range(count)], COUNT)
    with serving(limits=Limits(body=8192, body_seconds=0.3), times=Times(head=0.3, body=0.6, linger=0.1)) as server:
        for n, maker in enumerate(makers):
            raw = maker(rng)
            answer = exchange(server.port, raw)
            told = f"request {n}, {maker.__name__}: {raw[:300]!r}: {answer.status} {answer.body[:300]!r}"
            statuses[answer.status] += 1
            if answer.status == 0:
                assert maker is no_http, told
                closed[maker.__name__] += 1
                continue
            assert 400 <= answer.status < 500, told
            error = json.loads(answer.body)["error"]
            assert error.keys() == {"message", "type", "param", "code"} and 15 < len(error["message"]) < 500, told
            assert error["message"].isascii() and error["message"].isprintable(), told
            assert answer.headers["content-type"] == "application/json", told
            assert answer.headers["x-content-type-options"] == "nosniff", told
            if n % 100 == 99:
                fine = exchange(server.port, request(body=json.dumps(TEXT).encode()))
                assert fine.status == 200 and json.loads(fine.body)["choices"][0]["text"] == "ok", fine
        wait(lambda: not server.server.server_state.connections, 5)
        assert server.state.running == server.engine.rows_now == server.service.calls == 0
        assert not any(line.startswith("error:") for line in server.log)
        assert not server.service.users.comparisons("u")
    print(f"{COUNT} hostile requests: {dict(sorted(statuses.items()))}")
