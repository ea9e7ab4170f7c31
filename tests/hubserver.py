"""A server on this machine that answers what huggingface_hub asks about a data set: its files, and each of them.

Import the fixture `hub` by name. It needs huggingface_hub."""

import hashlib
import http.server
import json
import threading

import pytest

from mixdpo.files import sources

SHA = "0123456789abcdef0123456789abcdef01234567"


class Handler(http.server.BaseHTTPRequestHandler):
    """The server's `files` are name -> bytes of the data set someone/prefs; `asked` holds (method, path)."""

    def log_message(self, *args):
        pass

    def do_HEAD(self):
        self.do_GET(body=False)

    def do_GET(self, body=True):
        self.server.asked.append((self.command, self.path))
        about, file = "/api/datasets/someone/prefs", f"/datasets/someone/prefs/resolve/{SHA}/"
        if self.path.partition("?")[0] == about:
            names = [{"rfilename": name} for name in self.server.files]
            content = json.dumps({"id": "someone/prefs", "sha": SHA, "siblings": names, "private": False}).encode()
        elif self.path.startswith(file) and self.path.removeprefix(file) in self.server.files:
            content = self.server.files[self.path.removeprefix(file)]
        else:
            self.send_response(404)
            self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Length", "0")
            return self.end_headers()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("X-Repo-Commit", SHA)
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.end_headers()
        if body:
            self.wfile.write(content)


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """The running server. huggingface_hub in this process asks it, and keeps what it downloads in tmp_path/hub.
    `environment` does the same for another process."""
    constants = pytest.importorskip("huggingface_hub.constants")
    running = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    running.files, running.asked, running.daemon_threads = {}, [], True
    running.url = f"http://127.0.0.1:{running.server_port}"
    threading.Thread(target=running.serve_forever, args=(0.05,), daemon=True).start()
    for variable in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(variable, raising=False)
    running.environment = {"HF_ENDPOINT": running.url, "HF_HOME": str(tmp_path / "hub")}
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, running.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "ENDPOINT", running.url)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    sources.hub_files.cache_clear()
    yield running
    sources.hub_files.cache_clear()
    running.shutdown()
    running.server_close()
