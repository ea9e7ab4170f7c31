"""Who may use the server, how large a request may be, and what every answer carries."""

import base64
import hashlib
import json
import time

import httpx
import pytest
from rawhttp import connect, exchange, read_answer, request

from mixdpo.serving.app import Access
from mixdpo.serving.page import policy_of, read_page
from mixdpo.serving.service import Limits

BODY = json.dumps({"model": "mixture", "prompt": "say:ok", "max_tokens": 2}).encode()
TOKEN = "correct-horse-battery"
KIND = "Content-Type: application/json"


def sentence(answer, status):
    """The answer is an error of this status in OpenAI's form with a sentence."""
    assert answer.status == status, (answer.status, answer.body[:300])
    error = json.loads(answer.body)["error"]
    assert error.keys() == {"message", "type", "param", "code"} and len(error["message"]) > 20
    assert answer.headers["content-type"] == "application/json"
    return error


@pytest.mark.parametrize("host, status", [
    ("127.0.0.1", 200), ("localhost:8000", 200), ("LOCALHOST", 200), ("[::1]:99", 200), ("evil.example", 403),
    ("", 403),
    ("127.0.0.1.evil.example", 403), ("localhost@evil.example", 403), ("evil.example#localhost", 403),
    ("localhost:x", 403), ("localhost/../evil", 403), ("10.0.0.1", 403), ("[::1", 403), ("localhost:0", 403)])
def test_the_host_must_be_this_server(live, host, status):
    """Catches: DNS rebinding: a page of evil.example, whose name points to 127.0.0.1, reads answers."""
    for raw in (request("GET", "/health", host=host), request(body=BODY, host=host), request("GET", "/", host=host)):
        answer = exchange(live.port, raw)
        assert answer.status == status
        if status == 403:
            sentence(answer, 403)


def test_other_names_and_addresses(serving):
    with serving(access=Access(TOKEN, ("localhost", "models.example"), any_address=True)) as server:
        for host, status in (("models.example:80", 200), ("10.1.2.3", 200), ("[fe80::1]", 200), ("evil.example", 403),
                             ("10.1.2.3.example", 403)):
            assert exchange(server.port, request("GET", "/health", host=host)).status == status


@pytest.mark.parametrize("headers, status", [
    (["Origin: http://localhost:8000"], 200), (["Origin: http://evil.example"], 403), (["Origin: null"], 403),
    (["Origin: https://localhost:8000"], 200), (["Origin: http://localhost:8001"], 403),
    (["Origin: http://localhost"], 403), (["Origin: ftp://localhost:8000"], 403),
    (["Sec-Fetch-Site: cross-site"], 403), (["Sec-Fetch-Site: same-site"], 403), (["Sec-Fetch-Site: same-origin"], 200),
    (["Sec-Fetch-Site: none"], 200)])
def test_a_page_of_another_site_may_not_use_the_server(live, headers, status):
    for raw in (request(body=BODY, host="localhost:8000", headers=(KIND, *headers)),
                request("DELETE", "/v1/users/anna", host="localhost:8000", headers=tuple(headers))):
        answer = exchange(live.port, raw)
        assert answer.status == status
        assert not any(name.startswith("access-control") for name in answer.headers)
    answer = exchange(live.port, request("OPTIONS", host="localhost:8000", headers=(*headers,
                      "Access-Control-Request-Method: POST")))
    assert answer.status in (403, 405) and not any(name.startswith("access-control") for name in answer.headers)


def test_a_form_of_another_site_is_no_request(live):
    """Catches: a body that a browser sends across sites without asking first."""
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", ""):
        headers = (f"Content-Type: {kind}",) if kind else ()
        sentence(exchange(live.port, request(body=BODY, headers=headers)), 415)
    good = request(body=BODY, headers=("content-type: Application/JSON; charset=utf-8",))
    assert exchange(live.port, good).status == 200


def test_a_token_is_wanted_for_everything_but_the_page(serving):
    with serving(access=Access(TOKEN)) as server, httpx.Client(base_url=server.url) as client:
        for path in ("/", "/health"):
            assert client.get(path).status_code == 200
        wrong = [{}, {"Authorization": TOKEN}, {"Authorization": f"Basic {TOKEN}"},
                 {"Authorization": f"Bearer {TOKEN}x"},
                 {"Authorization": f"Bearer {TOKEN[:-1]}"}, {"Authorization": "Bearer"}, {"Authorization": "Bearer ü"}]
        for headers in wrong:
            for method, path in (("GET", "/v1/models"), ("POST", "/v1/completions"), ("GET", "/api/run"),
                                 ("DELETE", "/v1/users/a"), ("GET", "/nothing"), ("GET", "//"), ("GET", "/health/")):
                answer = client.request(method, server.url + path, headers={k: v.encode() for k, v in headers.items()})
                assert answer.status_code == 401 and answer.headers["www-authenticate"] == "Bearer", (path, headers)
                assert answer.json()["error"]["type"] == "authentication_error"
        assert client.get("/v1/models", headers={"Authorization": f"bearer {TOKEN}"}).status_code == 200
        assert not any(TOKEN in line for line in server.log)


def test_every_answer_has_the_headers_of_safety(live):
    """Catches: an answer that a browser would show as a page, that another site could frame, or that is cached."""
    for method, path in (("GET", "/"), ("GET", "/v1/models"), ("GET", "/nothing"), ("GET", "/v1/users/a/preferences"),
                         ("POST", "/v1/completions"), ("PUT", "/"), ("GET", "/health")):
        headers = httpx.request(method, live.url + path).headers
        assert headers["x-content-type-options"] == "nosniff" and headers["referrer-policy"] == "no-referrer"
        assert headers["cross-origin-resource-policy"] == "same-origin" and headers["cache-control"] == "no-store"
        assert "frame-ancestors 'none'" in headers["content-security-policy"]
        assert headers["x-frame-options"] == "DENY"
        policy, = headers.get_list("content-security-policy")               # of two, a browser obeys both
        assert policy.startswith("default-src 'none'")
        assert "server" not in headers and not any(name.startswith("access-control") for name in headers)
        kinds = ("application/json", "text/plain; charset=utf-8", *["text/html; charset=utf-8"] * (path == "/"))
        assert headers["content-type"] in kinds


def test_the_page_runs_its_own_script_alone(serving):
    """Catches: 'unsafe-inline'; a hash of other bytes than the browser's."""
    script, style = "\nlet a = '</' + 'b>';\nrun('ü');\n ", " body { margin: 0 }\n"
    page = (f"<!doctype html><style>{style}</style><p>x</p><script type=module>{script}</script>"
            f"<SCRIPT>{script}2</script >").encode()
    with serving(page=page) as server:
        answer = httpx.get(server.url + "/")
        policy = dict(part.strip().split(" ", 1) for part in answer.headers["content-security-policy"].split(";"))
        for name, texts in (("script-src", (script, script + "2")), ("style-src", (style,))):
            sums = (base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in texts)
            assert policy[name] == " ".join(f"'sha256-{each}'" for each in sums)
        assert policy["default-src"] == policy["frame-ancestors"] == policy["base-uri"] == "'none'"
        assert policy["connect-src"] == "'self'" and "unsafe" not in answer.headers["content-security-policy"]
        assert answer.content == page
    assert "script-src 'none'" in policy_of("<p>none</p>")


def test_a_page_with_carriage_returns_is_refused(tmp_path):
    from raising import raises_at

    (tmp_path / "page.html").write_bytes(b"<script>a\r\n</script>")
    with raises_at(file=tmp_path / "page.html"):
        read_page(tmp_path / "page.html")


def test_bodies_are_limited_whether_their_length_is_known_or_not(serving):
    """Catches: a limit that reads Content-Length alone; a server that reads all before it refuses."""
    with serving(limits=Limits(body=1000)) as server:
        large = b'{"prompt": "' + b"x" * 5000 + b'"}'
        sentence(exchange(server.port, request(body=large)), 413)
        sentence(exchange(server.port, request(body=b"{", length=10**15)), 413)
        chunks = [b"%x\r\n%s\r\n" % (100, b" " * 100) for _ in range(50)]
        head = request(headers=(KIND, "Transfer-Encoding: chunked"), length=-1)
        sentence(exchange(server.port, head, *chunks, b"0\r\n\r\n"), 413)
        sentence(exchange(server.port, head, *chunks), 413)                 # before the end has come
        assert exchange(server.port, head, *[b"%x\r\n%s\r\n" % (len(BODY), BODY)], b"0\r\n\r\n").status == 200


def test_a_large_body_that_is_refused_leaves_the_connection_usable(serving):
    """Catches: an answer that a close with unread data takes away from the client."""
    with serving() as server, httpx.Client() as client:
        for _ in range(3):
            answer = client.post(server.url + "/v1/completions", content=b" " * 5_000_000,
                                 headers={"Content-Type": "application/json"})
            assert answer.status_code == 413
        assert client.get(server.url + "/health").status_code == 200


@pytest.mark.parametrize("raw, status", [
    (request("GET", "/health", headers=("X: " + "a" * 20_000,)), 431),
    (request("GET", "/health", headers=tuple(f"X-{n}: {'a' * 90}" for n in range(200))), 431),
    (request("GET", "/health?" + "a" * 20_000), 431), (b"GET /health HTTP/1.1\r\nX: " + b"a" * 5_000_000, 431),
    (request("GET", "/health", headers=("Host: localhost",)), 400), (b"GET /health HTTP/1.1\r\n\r\n", 400),
    (b"GET /health HTTP/1.0\r\n\r\n", 403), (b"GET /health HTTP/2.0\r\nHost: localhost\r\n\r\n", 400),
    (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400),
    (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"x" * 40 + b"\r\n\r\n", 400),
    (request(body=BODY, headers=(KIND, KIND)), 400),
    (request(body=BODY, headers=(KIND, "Transfer-Encoding: chunked")), 400),
    (request(body=BODY, headers=(KIND, "Content-Length: 5")), 400), (request(headers=(KIND, "Content-Length: -1"),
                                                                             length=-1), 400),
    (request(headers=(KIND, "Content-Length: 1e3"), length=-1), 400),
    (request(headers=(KIND, "Transfer-Encoding: gzip"), length=-1), 400), (request(headers=(KIND, "Bad Name: x")), 400),
    (request(headers=(KIND, "Name : x")), 400), (request(headers=(KIND, "X: a\x00b")), 400),
    (request(headers=(KIND, "Transfer-Encoding: chunked"), length=-1) + b"zz\r\n{}\r\n0\r\n\r\n", 400),
    (request("GE\x01T", "/health"), 400), (request("GET", "/he alth"), 400),
    (b"\r\n\r\n\r\n\r\nnonsense\r\n\r\n", 400)])
def test_ambiguous_or_malformed_http_is_refused(live, raw, status):
    """Catches: request smuggling; a header that one program reads in one way and another in another."""
    answer = exchange(live.port, raw)
    sentence(answer, status)
    assert exchange(live.port, request("GET", "/health")).status == 200


@pytest.mark.parametrize("method, path, status", [
    ("GET", "/v1/completions", 405), ("PUT", "/v1/completions", 405), ("DELETE", "/", 405), ("POST", "/", 405),
    ("TRACE", "/", 405), ("PATCH", "/v1/users/a", 405), ("OPTIONS", "/v1/completions", 405),
    ("GET", "/v1/models/", 404),
    ("GET", "/v1/nothing", 404), ("GET", "//", 404), ("GET", "/../../etc/passwd", 404), ("GET", "/page.html", 404),
    ("GET", "/%2e%2e/%2e%2e/etc/passwd", 404), ("GET", "/v1/users/../../etc/passwd", 404), ("GET", "/v1/users/", 404),
    ("GET", "/v1/users/%2e%2e%2fetc", 404), ("GET", "/v1/users/a%00b", 400), ("GET", "/v1/users/a%20b", 400),
    ("GET", "/v1/users/" + "a" * 65, 400), ("GET", "/v1/users/%F0%9F%99%82", 400), ("GET", "/v1/users/%ff", 400),
    ("GET", "/v1/users/a%0d%0aX:1/preferences", 400), ("GET", "http://evil.example/v1/models", 404), ("GET", "*", 404),
    ("CONNECT", "evil.example:80", 404)])
def test_paths_and_methods(live, method, path, status):
    answer = exchange(live.port, request(method, path, headers=()))
    sentence(answer, status)
    assert status != 405 or answer.headers["allow"]
    assert "root:" not in answer.body.decode() and all("\n" not in line for line in live.log)


def test_head_is_get_without_a_body(live):
    answer = exchange(live.port, request("HEAD", "/health"), timeout=2)
    assert answer.status == 200 and not answer.body


def test_the_log_has_prompts_only_if_it_is_told_to(serving):
    body = {"model": "mixture", "prompt": "say:secret", "user": "anna"}
    for log_prompts in (False, True):
        with serving(log_prompts=log_prompts) as server:
            assert httpx.post(server.url + "/v1/completions", json=body).status_code == 200
            httpx.post(server.url + "/v1/completions", json=body | {"stream": True})
            httpx.post(server.url + "/v1/completions", json=body | {"prompt": "fail: secret"})
            httpx.post(server.url + "/api/score", json={"prompt": "secret", "completion": "secret"})
            httpx.get(server.url + "/secret%20prompt?secret")
            assert any("secret" in line for line in server.log) == log_prompts
            assert all(line.isascii() and "\n" not in line for line in server.log) and len(server.log) >= 5


def test_what_arrives_after_a_refusal_is_read_and_thrown_away(live):
    """Catches: a close with unread data, which takes the answer away from clients that are still sending."""
    with connect(live.port) as connection:
        connection.sendall(b"GET /\x01 HTTP/1.1\r\n\r\n")
        sentence(read_answer(connection), 400)
        for _ in range(5):
            time.sleep(0.1)
            connection.sendall(b"a" * 100_000)
        assert connection.recv(1) == b""                                    # and no second answer
