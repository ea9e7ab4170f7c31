"""Downloads one file over HTTP. Its size and checksum are known; an interrupted download is resumed.

Left out: credentials, mirrors, parallel ranges. urllib takes proxies from the environment.
"""

import hashlib
import http.client
import queue
import sys
import threading
import time
import urllib.error
import urllib.request

CONNECT_SECONDS = 8     # time limit for DNS, TLS and redirects together; without internet the wait is no longer
STALL_SECONDS = 30      # a connection that sends nothing for this long is closed; the download resumes with a new one
ATTEMPTS = 5            # connections for one file; the first that brings no new bytes is the last
CHUNK = 1 << 16


class Unavailable(Exception):
    """One source did not deliver the file; the message says why. fetch.py collects the reasons of all sources."""


def download(url, part, size, sha256, label):
    """Downloads `url` into the file `part`, after the bytes that `part` already holds. Returns `part`, complete.

    size: bytes. sha256: hex, or git's sha1 (see checksum_of). label: the name in the progress line.
    Raises: Unavailable. A truncated download stays in `part` for the next run; one with a wrong sha256 is removed.
    """
    if size_of(part) > size:
        part.unlink()
    for _ in range(ATTEMPTS):
        before = size_of(part)
        reason = _receive(url, part, before, size, label) if before < size else None
        after = size_of(part)
        if after == size:
            got = checksum_of(part, sha256)
            if got == sha256:
                return part
            part.unlink()
            if before == 0:     # one connection brought every byte; otherwise the parts may not fit: start over
                raise Unavailable(f"altered: sha256 {got}, wanted {sha256}")
        elif after == before:
            break
    raise Unavailable(f"truncated: got {after} of {size} bytes ({reason}); the next run resumes there")


def read_url(url, most=1 << 24):
    """The body of an answer, up to `most` bytes. Raises: Unavailable, or what urllib raises."""
    try:
        with _open(urllib.request.Request(url, headers={"User-Agent": "mixdpo"})) as response:
            return response.read(most)
    except urllib.error.HTTPError as error:
        raise Unavailable(f"HTTP {error.code} {error.reason}") from None


def head(url):
    """The headers of the first answer to a HEAD request: a mapping that ignores case, because proxies change it.
    Redirects are not followed: the hub puts the size and sha256 of a large file into the headers of the redirect.
    Raises: Unavailable, or what urllib raises."""
    request = urllib.request.Request(url, headers={"User-Agent": "mixdpo"}, method="HEAD")
    try:
        with _open(request, urllib.request.build_opener(_NoRedirect).open) as response:
            return response.headers
    except urllib.error.HTTPError as error:
        if 300 <= error.code < 400:
            return error.headers
        raise Unavailable(f"HTTP {error.code} {error.reason}") from None


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Follows no redirect: urllib then raises an HTTPError, which holds the redirect's headers."""

    def redirect_request(self, *_):
        return None


def _receive(url, part, have, size, label):
    """One connection: appends the received bytes to `part`, up to `size`. Returns why it ended early, or None.

    have: bytes that `part` holds already."""
    headers = {"User-Agent": "mixdpo"} | ({"Range": f"bytes={have}-"} if have else {})
    try:
        response = _open(urllib.request.Request(url, headers=headers))
    except urllib.error.HTTPError as error:
        if error.code == 416 and have:      # range not satisfiable: our bytes cannot be continued
            part.unlink()
            return "the server refused to resume"
        raise Unavailable(f"HTTP {error.code} {error.reason}") from None
    with response:
        resumed = response.status == 206
        if resumed and not response.headers.get("Content-Range", "").startswith(f"bytes {have}-"):
            part.unlink(missing_ok=True)
            return "the server sent another range than requested"
        have = have if resumed else 0       # a server without ranges sends the file from its start
        announced = response.length         # None: the server announces none, or no number
        if announced is not None and have + announced != size:
            raise Unavailable(f"another file: the server announces {have + announced} bytes, wanted {size}")
        progress = Progress(label, have, size)
        with open(part, "ab" if resumed else "wb") as file:
            while have < size:
                try:
                    block = response.read1(min(CHUNK, size - have))
                except (OSError, http.client.HTTPException) as error:
                    return f"{type(error).__name__}: {error}"
                if not block:
                    return "the server closed the connection"
                file.write(block)
                have += len(block)
                progress.show(have)
    return None


def _open(request, opener=urllib.request.urlopen):
    """urlopen with one time limit on everything before the body's first byte.

    urlopen's own timeout starts anew for each address of a host name, and does not cover the DNS lookup. So urlopen
    runs in a thread, which is abandoned if it has no answer in time.
    """
    answer = queue.SimpleQueue()

    def work():
        try:
            answer.put((opener(request, timeout=STALL_SECONDS), None))
        except Exception as error:          # raised again below, in the caller's thread
            answer.put((None, error))

    threading.Thread(target=work, daemon=True).start()
    try:
        response, error = answer.get(timeout=CONNECT_SECONDS)
    except queue.Empty:
        raise Unavailable(f"no answer within {CONNECT_SECONDS} seconds") from None
    if error is not None:
        raise error
    return response


class Progress:
    """Prints one line: megabytes received, rate, time left. On a terminal the line is rewritten twice a second;
    otherwise a new line is printed every 10 seconds."""

    def __init__(self, label, have, total):
        self.label, self.start, self.total = label, have, total
        self.began = self.shown = time.monotonic()

    def show(self, have):
        """Prints the line if it is time. have: bytes received so far."""
        now, terminal, done = time.monotonic(), sys.stderr.isatty(), have >= self.total
        if not done and now - self.shown < (0.5 if terminal else 10):
            return
        self.shown = now
        rate = max(have - self.start, 1) / max(now - self.began, 1e-3)      # bytes a second of this connection
        line = (f"{self.label}: {have / 1e6:.1f} of {self.total / 1e6:.1f} MB, {rate / 1e6:.2f} MB/s, "
                f"{max(self.total - have, 0) / rate:.0f} s left")
        end = "\n" if done or not terminal else ""
        print(f"\r{line}\033[K" if terminal else line, end=end, file=sys.stderr, flush=True)


def sha256_of(path):
    """sha256 of a file's bytes, hex."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def checksum_of(path, like):
    """sha256 of a file's bytes, or, if `like` has the 40 digits of a sha1, the sha1 by which git names them. Hex."""
    if len(like) != 40:
        return sha256_of(path)
    return hashlib.sha1(b"blob %d\0" % size_of(path) + path.read_bytes()).hexdigest()     # git's: of small files only


def size_of(path):
    """Size of a file in bytes; 0 if it does not exist."""
    return path.stat().st_size if path.is_file() else 0
