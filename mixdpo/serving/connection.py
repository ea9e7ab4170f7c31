"""Connections: uvicorn's HTTP/1.1 with time limits, answers to what is no HTTP, and a stop that lets answers finish.

    head        the headers of a request arrive within HEAD seconds; an idle connection is closed after IDLE
    body        its body within the server's time for a body and a little more; the route answers 408 before that
    stalled     a client that takes nothing for STALLED seconds is cut off
    most        connections at once, MOST
    no HTTP     400, 408 or 431 with a sentence; what still arrives is thrown away before the connection closes, because
                a close with unread data would take the answer away from the client

The first SIGTERM or SIGINT refuses new requests and lets the running ones end; a second one stops at once.
"""

import asyncio
import functools
import os
import socket
import sys
from dataclasses import dataclass

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from mixdpo.config import InputError, to_json
from mixdpo.serving.bodies import Refused
from mixdpo.serving.guard import HEADERS, State

BACKLOG = 256


@dataclass(frozen=True)
class Times:
    """Seconds, and connections."""

    head: float = 10.0
    body: float = 12.0              # more than a route waits for a body
    stalled: float = 30.0
    idle: int = 30                  # between two requests
    linger: float = 2.0             # after an answer to what is no HTTP
    most: int = 512


class Connection(H11Protocol):
    """One connection."""

    def __init__(self, times: Times, *arguments, **options):
        super().__init__(*arguments, **options)
        self.times = times
        self.phase: str | None = None               # what the client is to send: "head", "body" or nothing
        self.timer: asyncio.TimerHandle | None = None
        self.stall: asyncio.TimerHandle | None = None
        self.refused = False                        # the client does not speak HTTP: its bytes are thrown away

    def connection_made(self, transport) -> None:
        super().connection_made(transport)
        if len(self.connections) > self.times.most:
            return self.refuse(503, "the server has as many connections as it can hold; try again later")
        self.expect("head")

    def connection_lost(self, exc) -> None:
        self.expect(None)
        if self.stall is not None:
            self.stall.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if not self.refused:
            super().data_received(data)
            self.watch()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self.watch()

    def watch(self) -> None:
        """Sets the timer to what the client has begun to send."""
        if self.refused or self.transport.is_closing():
            return
        if self.conn.their_state is h11.SEND_BODY:
            self.expect("body")
        elif self.conn.their_state is h11.IDLE and self.conn.trailing_data[0]:
            self.expect("head")
        else:
            self.expect(None)

    def expect(self, phase: str | None) -> None:
        """Starts the timer of a new phase."""
        if phase == self.phase:
            return
        if self.timer is not None:
            self.timer.cancel()
        self.phase = phase
        seconds = {"head": self.times.head, "body": self.times.body}.get(phase or "")
        self.timer = None if seconds is None else self.loop.call_later(seconds, self.too_slow)

    def too_slow(self) -> None:
        """The client has not sent in time what it began."""
        if self.phase == "body" or not self.conn.trailing_data[0]:          # or it sent nothing at all
            return self.close()
        self.refuse(408, f"the headers of the request did not arrive within {self.times.head:g} seconds")

    def close(self) -> None:
        """Closes, and does not wait for ever until the client has taken what is left."""
        self.transport.close()
        self.loop.call_later(self.times.stalled, self.transport.abort)

    def timeout_keep_alive_handler(self) -> None:
        super().timeout_keep_alive_handler()
        self.loop.call_later(self.times.stalled, self.transport.abort)

    def pause_writing(self) -> None:
        super().pause_writing()
        self.stall = self.loop.call_later(self.times.stalled, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self.stall is not None:
            self.stall.cancel()

    def send_400_response(self, msg: str) -> None:
        """uvicorn calls it for bytes that are no HTTP."""
        if len(self.conn.trailing_data[0]) > HEADERS:
            return self.refuse(431, f"the headers have more than {HEADERS} bytes; send fewer")
        self.refuse(400, "the request is not valid HTTP/1.1; check its request line, its headers and its chunks")

    def refuse(self, status: int, message: str) -> None:
        """Answers outside of HTTP's states, and closes when the client has sent what it was sending."""
        answering = self.cycle is not None and self.cycle.response_started and not self.cycle.response_complete
        self.refused = True
        self.expect(None)
        if not answering:                                                   # else it would lie within another answer
            body = to_json(Refused(status, message).body).encode()
            lines = [f"HTTP/1.1 {status} Refused", "Content-Type: application/json", f"Content-Length: {len(body)}",
                     "X-Content-Type-Options: nosniff", "Connection: close"]
            self.transport.write("\r\n".join([*lines, "", ""]).encode() + body)
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self.loop.call_later(self.times.linger, self.close)


class Server(uvicorn.Server):
    """uvicorn with this server's way to stop."""

    def __init__(self, config: uvicorn.Config, state: State):
        super().__init__(config)
        self.state = state

    def handle_exit(self, sig, frame) -> None:
        if self.state.stopping:
            self.force_exit = self.should_exit = True
            return
        self.state.stopping = True
        if self.state.running:
            text = f"running requests: {self.state.running}; stopping when they end. A second signal stops at once\n"
            os.write(sys.stderr.fileno(), text.encode())                    # print could interrupt another print

    async def on_tick(self, counter: int) -> bool:
        if self.state.stopping and not self.state.running:
            self.should_exit = True
        return await super().on_tick(counter)

    async def shutdown(self, sockets=None) -> None:
        if self.force_exit:                                                 # from Python 3.12 on uvicorn waits for them
            for connection in list(self.server_state.connections):
                connection.transport.abort()
        await super().shutdown(sockets)


def make_server(app, state: State, times: Times) -> Server:
    """The server of an ASGI application, for `Server.run(sockets=[...])`."""
    config = uvicorn.Config(app, http=functools.partial(Connection, times), ws="none", lifespan="off", loop="asyncio",
                            log_config=None, log_level="critical", access_log=False, proxy_headers=False,
                            server_header=False, timeout_keep_alive=times.idle, h11_max_incomplete_event_size=HEADERS)
    return Server(config, state)


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens at an address; port 0: any that is free. Raises: InputError."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=BACKLOG)
    except OSError as error:
        raise InputError(f"cannot listen at {host}, port {port}: {error.strerror}; choose another --port, or a --host "
                         "that this machine has") from None
