"""kill -9 while comparisons are written: nothing that was acknowledged is lost, and nothing is half there."""

import ctypes
import http.client
import json
import os
import random
import signal
import sys
import threading
import time

import pytest
from conftest import wait
from fakerun import FINGERPRINT, FakeEngine, FakeRun

from mixdpo.serving import __main__ as command
from mixdpo.serving.users import Comparison, Users

PR_SET_PDEATHSIG = 1                                                        # linux/prctl.h


def server_process(folder) -> tuple[int, int]:
    """The server's command on the fake run as a forked process -> its number and its port."""
    read, write = os.pipe()
    if child := os.fork():
        os.close(write)
        with os.fdopen(read) as lines:
            lines.readline()
            return child, int(lines.readline().split()[0].rsplit(":", 1)[1])
    try:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)           # it does not outlive a test that fails
        sys.stdout, sys.stderr = os.fdopen(write, "w"), open(os.devnull, "w")               # not pytest's
        served = FakeRun()
        config = command.ServeConfig(str(folder), port=0)
        command.serve(config, served, FakeEngine(served), command.users_of(config, FINGERPRINT, 2), served.log_w([]),
                      {})
    finally:
        os._exit(1)


def write_until_it_dies(port: int, user: str, sent: list[str], acknowledged: list[str]) -> None:
    """Posts comparisons one after another, over a connection of its own, until the server is gone."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        while True:
            text = f"{user} {len(sent)} " + "x" * random.Random(len(sent)).randint(1, 900)
            sent.append(text)
            body = json.dumps({"prompt": text * 20, "chosen": text, "rejected": "no"})
            connection.request("POST", f"/v1/users/{user}/preferences", body, {"Content-Type": "application/json"})
            answer = json.load(connection.getresponse())
            assert answer["comparisons"] == len(answer["history"]) - 1
            acknowledged.append(text)
    except (OSError, http.client.HTTPException):
        connection.close()


@pytest.mark.slow
def test_kill_9_loses_nothing_that_was_acknowledged_and_leaves_nothing_half(tmp_path):
    """50 kills of a server that four clients write to. Catches: an acknowledgement before the commit; a transaction
    of which a part stays."""
    rng, names = random.Random(0), [f"user-{n}" for n in range(4)]
    sent, acknowledged = ({name: [] for name in names} for _ in range(2))
    journals = unacknowledged = 0
    for kill in range(50):
        child, port = server_process(tmp_path)
        threads = [threading.Thread(target=write_until_it_dies, args=(port, name, sent[name], acknowledged[name]))
                   for name in names]
        for thread in threads:
            thread.start()
        before = sum(map(len, acknowledged.values()))
        try:
            wait(lambda: sum(map(len, acknowledged.values())) > before)
            time.sleep(rng.uniform(0, 0.2))
        finally:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        for thread in threads:
            thread.join()
        journal = tmp_path / "users.sqlite-journal"
        journals += journal.exists() and journal.stat().st_size > 0
        users = Users(tmp_path / "users.sqlite", FINGERPRINT, 2)
        assert users.db.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        for name in names:
            found = users.comparisons(name)
            texts = [each.chosen for each in found]
            missing = [text for text in acknowledged[name] if text not in texts]
            assert not missing, f"kill {kill}: {len(missing)} of {len(acknowledged[name])} acknowledged are lost"
            assert texts == [text for text in sent[name] if text in {*texts}] # in order, each once
            assert all(each.prompt == each.chosen * 20 and each.rejected == "no" for each in found)
            assert users.log_likelihood(name).isfinite().all()
            unacknowledged += len(texts) - len(acknowledged[name])
            acknowledged[name][:] = texts                                   # from now on they must stay
        users.close()
    total = sum(map(len, acknowledged.values()))
    print(f"50 kills: {total} comparisons, {unacknowledged} written and not acknowledged, {journals} kills within a "
          "transaction")
    assert total >= 100 and journals > 0


def test_a_kill_within_a_transaction_leaves_what_was_before(tmp_path):
    """A change of 100 rows, of which a part is in the file when the process is killed. Catches: a change of which a
    part stays, at the one moment at which there could be one."""
    users = Users(tmp_path / "users.sqlite", "run-1", 2)
    for n in range(100):
        users.add("anna", Comparison("p", f"old {n} " + "x" * 3000, "r", (-1.0, -1.0)))
    users.close()
    for when, wanted in (("before", "old"), ("after", "new")):
        if not (child := os.fork()):
            try:
                users = Users(tmp_path / "users.sqlite", "run-1", 2)
                users.db.execute("PRAGMA cache_size=2")                     # so pages go to the file before the commit
                with users.transaction() as db:
                    for n in range(100):
                        db.execute("UPDATE comparisons SET chosen = 'new' || substr(chosen, 4) WHERE number = ?", (n,))
                    if when == "before":
                        os.kill(os.getpid(), signal.SIGKILL)
                os.kill(os.getpid(), signal.SIGKILL)
            finally:
                os._exit(1)
        assert os.waitpid(child, 0)[1] == signal.SIGKILL
        assert when == "after" or b"new 7 " in (tmp_path / "users.sqlite").read_bytes()     # a part was in the file
        users = Users(tmp_path / "users.sqlite", "run-1", 2)
        found = [each.chosen.split(" x")[0] for each in users.comparisons("anna")]
        assert found == [f"{wanted} {n}" for n in range(100)]
        assert users.db.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        users.close()
