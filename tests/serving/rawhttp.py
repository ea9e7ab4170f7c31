"""HTTP by hand: requests that no client library would send, and answers read byte by byte."""

import json
import socket
from dataclasses import dataclass


@dataclass(frozen=True)
class Answer:
    """What a server sent. status 0: it closed the connection without an answer."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def message(self) -> str:
        """The sentence of an error."""
        return json.loads(self.body)["error"]["message"]


def connect(port: int, timeout: float = 10.0) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), timeout)


def exchange(port: int, *parts: bytes, timeout: float = 10.0) -> Answer:
    """Sends bytes on a new connection and reads one answer."""
    with connect(port, timeout) as connection:
        try:
            for part in parts:
                connection.sendall(part)
        except OSError:
            pass                                                            # the server has closed, perhaps answered
        return read_answer(connection, body=not parts[0].startswith(b"HEAD"))


def read_answer(connection: socket.socket, body: bool = True) -> Answer:
    """One answer. body: whether it has one. Raises: TimeoutError if the server neither answers nor closes."""
    raw = b""
    try:
        while b"\r\n\r\n" not in raw:
            if not (part := connection.recv(65536)):
                return Answer(0, {}, raw)
            raw += part
        head, _, rest = raw.partition(b"\r\n\r\n")
        first, *lines = head.decode("latin-1").split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        length = int(headers["content-length"]) if "content-length" in headers else None
        while body and (length is None or len(rest) < length):
            if not (part := connection.recv(65536)):
                break
            rest += part
        return Answer(int(first.split()[1]), headers, rest[:length])
    except ConnectionError:
        return Answer(0, {}, raw)


def request(method: str = "POST", path: str = "/v1/completions", body: bytes = b"", host: str = "127.0.0.1",
            headers: tuple[str, ...] = ("Content-Type: application/json",), length: int | None = None) -> bytes:
    """A request as bytes. length: a Content-Length that may be wrong; -1: none."""
    length = len(body) if length is None else length
    lines = [f"{method} {path} HTTP/1.1", f"Host: {host}", *headers]
    lines += [f"Content-Length: {length}"] if length >= 0 else []
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + body
