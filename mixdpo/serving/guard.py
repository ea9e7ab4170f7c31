"""What stands in front of every route: who may send a request, what every answer carries, one line of log.

    Host        a name or an address that this server has: a page of another site whose name was made to point here
                (DNS rebinding) is refused
    Origin      a request that changes or computes something comes from this server's own page, or from no page
    token       Authorization: Bearer TOKEN, if the server has one; the page itself and /health are open
    headers     at most HEADERS bytes; no field twice that must be one; not both lengths of a body
Answers carry no CORS header, so no other site can read them. The log has no prompt unless the server is told to.
"""

import hmac
import ipaddress
import re
import sys
import time
import traceback
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from mixdpo.config import to_json
from mixdpo.serving.bodies import Refused, busy, stopping

HEADERS = 16 * 1024                 # bytes
SINGLE = (b"host", b"authorization", b"content-type", b"content-length", b"origin", b"transfer-encoding")
OPEN = ("/", "/health")             # paths without a token
PLAIN = re.compile(r"[A-Za-z0-9._/-]{1,100}")
SAFE = {
    b"x-content-type-options": b"nosniff", b"referrer-policy": b"no-referrer", b"cache-control": b"no-store",
    b"cross-origin-resource-policy": b"same-origin", b"x-frame-options": b"DENY",
    b"content-security-policy": b"default-src 'none'; frame-ancestors 'none'"}
GONE = 499                          # the log's status of a request whose client left


@dataclass(frozen=True)
class Access:
    """Who may use the server. The fields are Guard's."""

    token: str = ""
    names: tuple[str, ...] = ("127.0.0.1", "localhost", "::1")
    any_address: bool = False


@dataclass
class State:
    """What the server does at this moment."""

    stopping: bool = False          # running requests end, new ones are refused
    running: int = 0                # requests
    began: int = field(default_factory=lambda: int(time.time()))            # seconds since 1970


class Guard:
    """An ASGI application around another one.

    token: "" for none. names: host names and addresses that a Host header may have. any_address: every IP address is
    allowed too (an address cannot be rebound). most: requests that run at once."""

    def __init__(self, app, state: State, token: str, names: tuple[str, ...], any_address: bool, most: int, log):
        self.app, self.state, self.token, self.any_address, self.most = app, state, token, any_address, most
        self.names, self.log = {name.lower() for name in names}, log

    async def __call__(self, scope, receive, send) -> None:
        assert scope["type"] == "http", f"got a {scope['type']}, want http"
        began, status = time.monotonic(), GONE
        note: dict = scope.setdefault("note", {})                           # what a route adds to the line of log

        async def answer(message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                given = {name for name, _ in message["headers"]}
                message = message | {"headers": [*message["headers"],
                                                 *((name, text) for name, text in SAFE.items() if name not in given)]}
            await send(message)

        self.state.running += 1
        try:
            self.check(scope)
            await self.app(scope, receive, answer)
        except Refused as refused:
            await refuse(refused, answer)
        except Exception as error:
            self.log(failure(error))
            if status != GONE:                                              # the answer has begun: close the connection
                raise ConnectionAbortedError from None
            await refuse(Refused(500, "the server failed on this request; its log says where"), answer)
        finally:
            self.state.running -= 1
            path = scope["path"] if PLAIN.fullmatch(scope["path"]) else "(a path with other characters)"
            notes = "".join(f" {name}={value}" for name, value in note.items())
            self.log(f"{scope['method'][:20]} {path} {status} {time.monotonic() - began:.3f}s{notes}")

    def check(self, scope) -> None:
        """Raises: Refused unless the request may come in."""
        headers = check_headers(scope)
        self.check_host(headers)
        self.check_origin(scope, headers)
        if scope["path"] not in OPEN:
            self.check_token(headers)
        if scope["path"] != "/health":
            if self.state.stopping:
                raise stopping()
            if self.state.running > self.most:
                raise busy()

    def check_host(self, headers: dict[bytes, bytes]) -> None:
        name = host_name(headers.get(b"host", b"").decode("latin-1"))
        if name is None or not (name in self.names or self.any_address and is_address(name)):
            raise Refused(403, "the Host header names no address of this server; use the address that it printed at "
                          "its start, or start it with --names NAME")

    def check_origin(self, scope, headers: dict[bytes, bytes]) -> None:
        """A browser sends Origin with every POST and DELETE of a page, and Sec-Fetch-Site with all requests. The page
        may have come through a proxy that adds TLS."""
        origin, site = headers.get(b"origin"), headers.get(b"sec-fetch-site", b"none")
        own = [scheme + headers[b"host"].lower() for scheme in (b"http://", b"https://")]
        changes = scope["method"] not in ("GET", "HEAD")
        if origin is not None and origin.lower() not in own or changes and site not in (b"same-origin", b"none"):
            raise Refused(403, "the request comes from a page of another site, which may not use this server")

    def check_token(self, headers: dict[bytes, bytes]) -> None:
        if not self.token:
            return
        scheme, _, given = headers.get(b"authorization", b"").partition(b" ")
        if scheme.lower() != b"bearer" or not hmac.compare_digest(given.strip(), self.token.encode()):
            raise Refused(401, "the token is missing or wrong; send the header Authorization: Bearer TOKEN with the "
                          "server's --token", code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})


def check_headers(scope) -> dict[bytes, bytes]:
    """The headers by name. Raises: Refused if they are too large or ambiguous."""
    size = len(scope["raw_path"]) + len(scope["query_string"]) + sum(len(a) + len(b) for a, b in scope["headers"])
    if size > HEADERS:
        raise Refused(431, f"the headers have more than {HEADERS} bytes; send fewer")
    if scope["http_version"] not in ("1.0", "1.1"):
        raise Refused(400, "the request is of another version of HTTP; send HTTP/1.1", headers={"Connection": "close"})
    names = [name for name, _ in scope["headers"]]
    for name in SINGLE:
        if names.count(name) > 1:
            raise Refused(400, f"the header {name.decode()} occurs twice; send it once")
    if b"content-length" in names and b"transfer-encoding" in names:
        raise Refused(400, "the request has Content-Length and Transfer-Encoding; send one of them",
                      headers={"Connection": "close"})
    return dict(scope["headers"])


def host_name(host: str) -> str | None:
    """The name in a Host header without its port, in lower case; None if it is none."""
    try:
        parts = urlsplit(f"//{host}")
        port = parts.port                                                   # ValueError: not a number
    except ValueError:
        return None
    return parts.hostname if parts.netloc == host and "@" not in host and port != 0 else None


def is_address(name: str) -> bool:
    try:
        return ipaddress.ip_address(name) is not None
    except ValueError:
        return False


async def refuse(refused: Refused, send) -> None:
    """Sends an error."""
    body = to_json(refused.body).encode()
    headers = {"Content-Type": "application/json", "Content-Length": str(len(body))} | refused.headers
    await send({"type": "http.response.start", "status": refused.status,
                "headers": [(name.lower().encode(), text.encode()) for name, text in headers.items()]})
    await send({"type": "http.response.body", "body": body, "more_body": False})


def failure(error: BaseException) -> str:
    """An error that nobody expected, as a line of log: its type and place. Its message may hold a part of a prompt."""
    places = traceback.extract_tb(error.__traceback__)[-6:]
    named = [f"{place.filename.rsplit('/', 1)[-1]}:{place.lineno}" for place in reversed(places)]
    return f"error: {type(error).__name__} at {' < '.join(named)}"


def log_line(text: str) -> None:
    """One line with the time to stderr."""
    print(time.strftime("%H:%M:%S"), text, file=sys.stderr, flush=True)
