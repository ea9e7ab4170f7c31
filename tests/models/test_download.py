"""download.py, through fetch.asset, against badserver.py. Each docstring names the faults that the test was seen to
fail on.
"""

import time

import pytest
from badserver import BODY, CUT, SUM, place, server  # noqa: F401  (fixtures)
from raising import raises_at

from mixdpo.files import download
from mixdpo.files.fetch import asset


@pytest.mark.parametrize("kind", ["whole", "unmeasured", "wordy"])
def test_a_file_is_complete_and_fetched_once(kind, server, place):
    """With and without an announced length, and with one that is no number. Faults: the cache not looked into; the
    transfer's own name left behind; a traceback for a length that is no number."""
    at = place(server.url + kind)
    assert asset("thing") == at.target and at.target.read_bytes() == BODY and not at.part.exists()
    assert asset("thing") == at.target and server.seen == [(kind, None)]


def test_a_cut_transfer_is_resumed_where_it_stopped(server, place):
    """The server closes after 100,000 bytes of each answer. Faults: no Range; the part opened anew; a wrong start."""
    at = place(server.url + "cuts")
    assert asset("thing").read_bytes() == BODY and not at.part.exists()
    assert [start for _, start in server.seen] == [None, "bytes=100000-", "bytes=200000-", "bytes=300000-"]


def test_a_stalled_transfer_is_dropped_and_resumed(server, place, monkeypatch):
    """Fault: no time limit on reading, so that it waits for ever."""
    monkeypatch.setattr(download, "STALL_SECONDS", 0.3)
    place(server.url + "stalls")
    began = time.monotonic()
    assert asset("thing").read_bytes() == BODY and len(server.seen) == 4
    assert time.monotonic() - began < 20        # the server holds each of three silent lines for 20 seconds


def test_the_next_run_resumes_what_an_earlier_one_left(server, place):
    """Faults: the part removed at the start, or when a download fails; endless requests that bring nothing new."""
    at = place(server.url + "dead")
    with raises_at(f"{CUT} of {len(BODY)}", file="thing"):
        asset("thing")
    assert not at.target.exists() and at.part.read_bytes() == BODY[:CUT] and len(server.seen) == 2
    place(server.url + "whole")
    assert asset("thing").read_bytes() == BODY and server.seen[-1] == ("whole", f"bytes={CUT}-")


@pytest.mark.parametrize("kind", ["forgetful", "refuses", "elsewhere"])
def test_servers_that_cannot_resume_start_over(kind, server, place):
    """No ranges, a 416, and another range than requested. Fault: the answer appended to the existing bytes."""
    at = place(server.url + kind)
    at.part.parent.mkdir()
    at.part.write_bytes(BODY[:CUT])
    assert asset("thing").read_bytes() == BODY and server.seen[0] == (kind, f"bytes={CUT}-")


@pytest.mark.parametrize("left", [b"\0" * CUT, b"\0" * len(BODY), b"\0" * (len(BODY) + 1)])
def test_a_part_of_another_file_does_no_harm(left, server, place):
    """Faults: a wrong sha256 after a resumed download taken as final; a complete part not checked, or kept."""
    at = place(server.url + "whole")
    at.part.parent.mkdir()
    at.part.write_bytes(left)
    assert asset("thing").read_bytes() == BODY


def test_an_altered_file_is_refused_and_not_kept(server, place):
    """Faults: no sum; the file renamed before its sum is known; altered bytes kept as something to resume."""
    at = place(server.url + "altered")
    with raises_at(SUM, server.url + "altered", at.target, "DATA=FOLDER", file="thing"):
        asset("thing")
    assert not at.target.exists() and not at.part.exists() and len(server.seen) == 1


def test_a_file_of_another_size_is_refused_before_it_comes(server, place):
    """Fault: the announced length not looked at."""
    at = place(server.url + "longer")
    with raises_at(len(BODY) + 4, file="thing"):
        asset("thing")
    assert not at.part.exists()


def test_no_more_than_the_size_is_ever_read(server, place):
    """A server that announces no length and sends 10 MB too many. Fault: reading to the end fills the disk."""
    place(server.url + "endless")
    assert asset("thing").read_bytes() == BODY
    for _ in range(100):
        if server.broken:
            break
        time.sleep(0.05)
    assert server.broken == ["endless"]     # it was still writing when we closed


def test_a_machine_without_internet_goes_on_in_seconds(server, place, monkeypatch):
    """A host that accepts the connection and never answers, an unknown host name, a port without a server,
    a 404. Faults: urlopen's time limit alone, which starts anew for each address; an OSError let through."""
    monkeypatch.setattr(download, "CONNECT_SECONDS", 0.4)
    sources = (server.url + "silent", "http://no-such-host.invalid/x", "http://127.0.0.1:9/x", server.url + "missing")
    place(*sources)
    began = time.monotonic()
    with raises_at("0.4 seconds", "HTTP 404", *sources, file="thing"):
        asset("thing")
    assert time.monotonic() - began < 5
    place(*sources, server.url + "whole")
    assert asset("thing").read_bytes() == BODY


def test_progress_shows_rate_and_time_left(monkeypatch, capsys):
    """Half of what is missing came in 20 s. Faults: the rate counted with bytes of an earlier run; no last line."""
    clock = iter([100.0, 101.0, 120.0, 125.0])
    monkeypatch.setattr(download.time, "monotonic", lambda: next(clock))
    progress = download.Progress("thing", 20_000_000, 100_000_000)
    for have in (30_000_000, 60_000_000, 100_000_000):
        progress.show(have)
    lines = capsys.readouterr().err.splitlines()
    assert lines == ["thing: 60.0 of 100.0 MB, 2.00 MB/s, 20 s left", "thing: 100.0 of 100.0 MB, 3.20 MB/s, 0 s left"]
