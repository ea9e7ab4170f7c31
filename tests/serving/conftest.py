"""A server on this machine, in a thread of the test's process, with a run that needs no model (fakerun.py).

Tests of the files that need the extra `serve` are collected only if tests/serving/requirements.txt is installed.
"""

import contextlib
import importlib.util
import threading
import time
from types import SimpleNamespace

import pytest

MISSING = [name for name in ("starlette", "uvicorn", "openai", "httpx") if importlib.util.find_spec(name) is None]
NEED_IT = ("endpoints", "guard", "hostile", "kills", "openai", "real", "server", "stop", "users")
collect_ignore = [f"test_{name}.py" for name in NEED_IT] if MISSING else []


@contextlib.contextmanager
def running(folder, times=None, access=None, limits=None, log_prompts=False, score=None, served=None, engine=None,
            prior=None, page=b"<!doctype html><title>page</title>", rows=32, waiting=64, **users):
    """Yields the server: url, port, service, state, engine, server, log (its lines). users: options of Users."""
    from fakerun import FINGERPRINT, FakeEngine, FakeRun

    from mixdpo.serving.app import make_app
    from mixdpo.serving.connection import Times, listen, make_server
    from mixdpo.serving.guard import State
    from mixdpo.serving.page import Page, policy_of
    from mixdpo.serving.service import Limits, Service
    from mixdpo.serving.users import Users

    served = served or FakeRun()
    engine = engine or FakeEngine(served, rows, waiting)
    state, lines = State(), []
    store = Users(folder / "users.sqlite", FINGERPRINT, served.K, **users)
    prior = served.log_w([]) if prior is None else prior
    service = Service(served, engine, store, prior, score, limits or Limits())
    app = make_app(service, Page(page, policy_of(page.decode())), {"name": "fake"}, state, access, log_prompts,
                   lines.append)
    server = make_server(app, state, times or Times())
    with listen("127.0.0.1", 0) as socket:
        port = socket.getsockname()[1]
        thread = threading.Thread(target=server.run, args=([socket],))
        thread.start()
        wait(lambda: server.started or not thread.is_alive())
        try:
            yield SimpleNamespace(url=f"http://127.0.0.1:{port}", port=port, service=service, state=state,
                                  engine=engine, server=server, log=lines)
        finally:
            server.force_exit = server.should_exit = True
            thread.join(10)
            engine.stop(False)
            store.close()


def wait(condition, seconds=10.0):
    """Waits until condition() is true. Raises: AssertionError after so many seconds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.005)


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    for variable in ("http_proxy", "HTTP_PROXY", "https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(variable, raising=False)


@pytest.fixture
def live(tmp_path):
    """A server with its defaults."""
    with running(tmp_path) as server:
        yield server


@pytest.fixture
def serving(tmp_path):
    """serving(**options): a server with options, within a `with`."""
    return lambda **options: running(tmp_path, **options)
