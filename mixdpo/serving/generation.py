"""One request's choices: submitted to the engine together, read as pieces of text, cancelled together."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable

import numpy as np

from mixdpo.serving.answers import Piece
from mixdpo.serving.bodies import busy, stopping
from mixdpo.serving.engine import Full, Request, Token
from mixdpo.serving.texts import TextStream


def choice_seed(seed: int, index: int) -> int:
    """The seed of a choice's tokens: the request's own for choice 0."""
    return seed if index == 0 else int(np.random.default_rng([seed, index]).integers(2**63))


class Choices:
    """The running choices of one request. Raises: Refused with status 429 if the engine's queue is full, and then
    nothing runs."""

    def __init__(self, engine, requests: list[Request], streams: list[TextStream]):
        self.streams, self.handles = streams, []                            # type: ignore[var-annotated]
        self.events: asyncio.Queue = asyncio.Queue()                        # (index, what the engine delivers)
        loop = asyncio.get_running_loop()
        try:
            for index, request in enumerate(requests):
                self.handles.append(engine.submit(request, self.deliver(loop, index)))
        except Full:
            self.cancel()
            raise busy() from None

    def deliver(self, loop: asyncio.AbstractEventLoop, index: int) -> Callable:
        """The function that the engine's thread calls."""
        def put(event) -> None:
            with contextlib.suppress(RuntimeError):                         # the loop is closed: the server has stopped
                loop.call_soon_threadsafe(self.events.put_nowait, (index, event))

        return put

    def cancel(self) -> None:
        """Ends what still runs; safe at any time."""
        for handle in self.handles:
            handle.cancel()

    @property
    def tokens(self) -> int:
        """Tokens of all choices so far."""
        return sum(stream.tokens for stream in self.streams)

    async def pieces(self) -> AsyncIterator[Piece]:
        """The pieces of all choices as they come; each choice ends with one that has a reason. Raises: Refused if the
        server stops; the engine's exception if it failed."""
        open_choices = set(range(len(self.streams)))
        while open_choices:
            index, found = await self.events.get()
            await asyncio.sleep(0)                                          # other requests have their turn
            if index not in open_choices:                                   # tokens after a stop sequence
                continue
            stream = self.streams[index]
            if isinstance(found, Token):
                text, placed = stream.add(found)
                reason = "stop" if stream.stopped else None
                if stream.stopped:
                    self.handles[index].cancel()
            elif isinstance(found, Exception):
                raise found
            elif found == "cancelled":
                raise stopping()
            else:
                text, placed = stream.finish()
                reason = "stop" if stream.stopped else found
            if reason:
                open_choices.discard(index)
            if text or placed or reason:
                yield Piece(index, text, placed, reason)
