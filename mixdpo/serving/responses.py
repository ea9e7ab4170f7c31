"""Bodies in, answers out, and clients that leave: what routes share.

    read_body       a body within its limits of bytes and seconds
    attend          waits for a result, and gives it up when the client leaves or the request takes too long
    EventStream     an answer of server-sent events, with the same two ends
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable

from starlette.requests import Request
from starlette.responses import Response

from mixdpo.config import to_json
from mixdpo.serving.answers import DONE, event
from mixdpo.serving.bodies import Refused
from mixdpo.serving.guard import failure


class Gone(Exception):
    """The client has left: nobody reads an answer."""


def as_json(value, status: int = 200) -> Response:
    """A JSON answer; NaN becomes null."""
    return Response(to_json(value), status, media_type="application/json")


async def read_body(request: Request, most: int, seconds: float) -> bytes:
    """The body of a JSON request. Raises: Refused if its type is another one (415), if it has more than `most` bytes
    (413), or if it does not arrive in time (408); Gone."""
    kind = request.headers.get("content-type", "").split(";")[0].strip().lower()
    if kind != "application/json":
        raise Refused(415, "the body has another type; send JSON, with the header Content-Type: application/json")
    large = Refused(413, f"the body has more than {most} bytes; send a smaller one")
    if int(request.headers.get("content-length", "0")[:20]) > most:
        raise large
    parts, size, more = [], 0, True
    try:
        async with asyncio.timeout(seconds):
            while more:
                message = await request.receive()
                if message["type"] == "http.disconnect":
                    raise Gone
                parts.append(message.get("body", b""))
                size, more = size + len(parts[-1]), message.get("more_body", False)
                if size > most:
                    raise large
    except TimeoutError:
        raise Refused(408, f"the body did not arrive within {seconds:g} seconds; send it at once",
                      headers={"Connection": "close"}) from None
    return b"".join(parts)


async def until_gone(receive) -> None:
    """Returns when the client has left."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def until_first(*works: Awaitable) -> None:
    """Runs all until one ends; then the others are cancelled. Raises what that one raised."""
    tasks = [asyncio.ensure_future(work) for work in works]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    for task in done:
        task.result()


async def attend(request: Request, work: Awaitable, seconds: float):
    """The result of `work`. Raises: Gone if the client leaves first, Refused (503) after `seconds`; `work` is cancelled
    then."""
    task = asyncio.ensure_future(work)
    try:
        async with asyncio.timeout(seconds):
            await until_first(task, until_gone(request.receive))
    except TimeoutError:
        raise too_long(seconds) from None
    if task.cancelled():
        raise Gone
    return task.result()


def too_long(seconds: float) -> Refused:
    return Refused(503, f"the answer took more than {seconds:g} seconds; ask for fewer tokens, or try again later",
                   code="timeout", headers={"Retry-After": "10"})


class EventStream(Response):
    """Server-sent events. events: yields dicts; `end` is called in any case. An error in the middle is an event too,
    and then the stream has no [DONE]."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[dict], end: Callable[[], None], seconds: float,
                 log: Callable[[str], None]):
        super().__init__(headers={"Content-Type": self.media_type, "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self.events, self.end, self.seconds, self.log = events, end, seconds, log

    async def __call__(self, scope, receive, send) -> None:
        try:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            await until_first(self.send_all(send), until_gone(receive))
        finally:
            self.end()

    async def send_all(self, send) -> None:
        async def part(body: bytes, more: bool = True) -> None:
            await send({"type": "http.response.body", "body": body, "more_body": more})

        try:
            async with asyncio.timeout(self.seconds):
                async for value in self.events:
                    await part(event(value))
            await part(DONE)
        except TimeoutError:
            await part(event(too_long(self.seconds).body))
        except Refused as refused:
            await part(event(refused.body))
        except Exception as error:
            self.log(failure(error))
            await part(event(Refused(500, "the server failed on this request; its log says where").body))
        await part(b"", False)
