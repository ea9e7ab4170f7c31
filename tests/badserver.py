"""A server on this machine that does what servers do: it is slow, cuts, alters, forgets ranges, never answers.

For test_download.py and test_fetch.py, which import the fixtures by name.
"""

import hashlib
import http.server
import threading
from types import SimpleNamespace

import pytest

from mixdpo.files import fetch
from mixdpo.files.fetch import Asset

BODY = bytes(range(256)) * 1200         # 307,200 bytes: several blocks
SUM = hashlib.sha256(BODY).hexdigest()
CUT = 100_000


class Handler(http.server.BaseHTTPRequestHandler):
    """/KIND of answer, see each branch. The server's `seen` holds (path, Range) of all requests."""

    protocol_version = "HTTP/1.0"

    def log_message(self, *args):
        pass

    def do_HEAD(self):
        """What the hub says of a large file: a redirect with the server's `linked`, names and texts."""
        self.send_response(302)
        for name, text in ({"Location": "/large", "Content-Length": "0"} | self.server.linked).items():
            self.send_header(name, text)
        self.end_headers()

    def do_GET(self):
        kind, asked = self.path.strip("/"), self.headers.get("Range")
        self.server.seen.append((kind, asked))
        start = int(asked.removeprefix("bytes=").removesuffix("-")) if asked else 0
        if kind == "missing":
            return self.send_error(404)
        if kind == "silent":                # accepts, and never answers
            return self.server.closing.wait(20)
        if kind == "refuses" and start:
            return self.send_error(416)
        body, status = BODY[start:], 206 if asked else 200
        if kind == "forgetful":             # ignores ranges
            body, status = BODY, 200
        if kind == "altered":
            body = BODY[:-1] + b"?"
            body, status = body[start:], 206 if asked else 200
        if kind == "longer":
            body = body + b"more"
        if kind == "elsewhere":             # answers another range than was asked for
            body, start = BODY[start // 2:], start // 2
        self.send_response(status)
        if status == 206:
            self.send_header("Content-Range", f"bytes {start}-{len(BODY) - 1}/{len(BODY)}")
        if kind not in ("unmeasured", "endless"):
            self.send_header("Content-Length", "many" if kind == "wordy" else str(len(body)))
        self.end_headers()
        if kind == "endless":
            body = BODY + b"x" * 10_000_000
        if kind in ("cuts", "stalls"):      # sends a part of what it announced, then closes or keeps the line silent
            body = body[:CUT]
        if kind == "dead" and asked:        # sends a part once, and then nothing more
            body = b""
        if kind == "dead":
            body = body[:CUT]
        try:
            self.wfile.write(body)
            if kind == "stalls":
                self.wfile.flush()
                self.server.closing.wait(20)
        except ConnectionError:
            self.server.broken.append(kind)


@pytest.fixture
def server():
    running = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    running.seen, running.broken, running.closing = [], [], threading.Event()
    running.daemon_threads, running.linked = True, {}
    threading.Thread(target=running.serve_forever, args=(0.05,), daemon=True).start()
    running.url = f"http://127.0.0.1:{running.server_port}/"
    yield running
    running.closing.set()
    running.shutdown()
    running.server_close()


@pytest.fixture
def place(tmp_path, monkeypatch):
    """place(*sources, **fields) puts the asset "thing" into the table; its cache is an empty folder."""
    monkeypatch.setenv("MIXDPO_CACHE", str(tmp_path / "cache"))
    for variable in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(variable, raising=False)

    def put(*sources, **fields):
        entry = dict(file="thing.bin", bytes=len(BODY), sha256=SUM, sources=sources) | fields
        monkeypatch.setitem(fetch.ASSETS, "thing", Asset(**entry))
        target = tmp_path / "cache" / entry["file"]
        return SimpleNamespace(target=target, part=target.with_name(target.name + ".part"))

    return put
