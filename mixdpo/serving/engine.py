"""Continuous batching on one worker thread: requests join and leave the running batches at every token.

    turn    calls, cancelled rows leave, waiting requests join, then for each trunk: draw, deliver, advance

Requests join in the order of submission, while there are fewer than `rows` rows and their keys and values fit into
CACHE bytes; a turn reads at most PREFILL tokens of prompts, so running rows do not wait for long. torch is used by this
thread only: functions that compute (weights, margins, scores) run between two turns, by `call`.
An error in a pass is delivered to the rows of that pass, and the worker goes on.
"""

import threading
import time
import traceback
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future

from mixdpo.evaluation.generate import CACHE
from mixdpo.serving.decoder import Decoder, Request, Row, Token
from mixdpo.serving.policies import ServedRun

__all__ = ["Engine", "Full", "Handle", "Request", "Token"]
Event = Token | str | Exception
PREFILL = 1024      # tokens of prompts read in one turn, at most; a longer prompt has a turn of its own
CALLS = 0.1         # seconds of a turn after which the next call waits for the next turn
GRACE = 30.0        # seconds that `stop` waits for the worker to notice


class Full(Exception):
    """No more requests can wait, or the engine is stopping."""


class Handle:
    """A request that was submitted."""

    def __init__(self, engine: "Engine", row: Row):
        self.engine, self.row = engine, row

    def cancel(self) -> None:
        """The request leaves before its next token and is told "cancelled", unless it has ended."""
        self.row.cancelled = True
        self.engine.wake()


class Engine:
    """Completes requests. rows: running at once; waiting: in the queue while all rows run, at most."""

    def __init__(self, served: ServedRun, rows: int = 32, waiting: int = 64):
        self.served, self.rows, self.waiting = served, rows, waiting
        self.decoders = {trunk: Decoder(trunk) for trunk in served.trunks}
        self.memory = CACHE[served.trunks[0].model.unembedding.device.type]
        self.queue, self.calls = deque[Row](), deque[tuple[Future, Callable]]()
        self.changed = threading.Condition()                                # guards queue, calls and the two flags
        self.stopping = self.cancelling = False
        self.joining = 0                                                    # rows between the queue and their decoder
        self.thread = threading.Thread(target=self.work, name="engine", daemon=True)
        self.thread.start()

    @property
    def rows_now(self) -> int:
        return sum(len(decoder.rows) for decoder in self.decoders.values())

    @property
    def waiting_now(self) -> int:
        return len(self.queue)

    # --- called from any thread

    def submit(self, request: Request, deliver: Callable[[Event], None]) -> Handle:
        """Queues a request. deliver is called from the worker thread: Tokens, then once "stop" (the end token was
        drawn), "length" (max_new tokens) or "cancelled", or an exception. It must return soon.
        Raises: ValueError if the request cannot be run; Full."""
        self.check(request)
        row = Row(request, self.served.policies[request.policy], deliver)
        with self.changed:
            if self.stopping:
                raise Full("the engine is stopping")
            free = max(self.rows - self.rows_now - self.joining, 0)         # these places are filled from the queue
            if len(self.queue) >= self.waiting + free:
                raise Full(f"{self.waiting} requests are waiting; try again later")
            self.queue.append(row)
            self.changed.notify()
        return Handle(self, row)

    def check(self, request: Request) -> None:
        """Raises: ValueError if the request cannot be run."""
        policy, length = self.served.policies.get(request.policy), len(request.prompt)
        if policy is None:
            raise ValueError(f"got policy {request.policy!r}, wanted one of {', '.join(self.served.names)}")
        context, vocabulary = policy.trunk.model.config.context, len(policy.head)
        if not length or not all(0 <= i < vocabulary for i in request.prompt):
            raise ValueError(f"got a prompt of {length} ids, wanted at least one, each in 0 to {vocabulary - 1}")
        if request.max_new < 1 or length + request.max_new > context:
            raise ValueError(f"got a prompt of {length} tokens and max_new {request.max_new}; wanted at least 1 new "
                             f"token, and at most the context of {context} together")
        if not (request.temperature == 0 or 1e-3 <= request.temperature <= 1e3):
            raise ValueError(f"got temperature {request.temperature}, wanted 0, or 0.001 to 1000")
        if not 0 < request.top_p <= 1:
            raise ValueError(f"got top_p {request.top_p}, wanted above 0 and at most 1")
        if request.seed < 0 or not 0 <= request.top_logprobs <= vocabulary:
            raise ValueError(f"got seed {request.seed} and top_logprobs {request.top_logprobs}, wanted at least 0, and "
                             f"at most {vocabulary} top_logprobs")

    def call(self, function: Callable) -> Future:
        """Runs function() on the worker between two turns. Raises: Full if the engine is stopping."""
        future: Future = Future()
        with self.changed:
            if self.stopping:
                raise Full("the engine is stopping")
            self.calls.append((future, function))
            self.changed.notify()
        return future

    def stop(self, finish: bool = True, seconds: float = 30.0) -> None:
        """Ends the worker: waiting requests are cancelled; running ones and calls end first, for at most so many
        seconds, or are cancelled too if finish is false. Returns when the worker has ended; if a callback or a pass
        blocks it, after GRACE more seconds."""
        with self.changed:
            self.stopping, self.cancelling = True, self.cancelling or not finish
            self.changed.notify_all()
        if threading.current_thread() is self.thread:
            return
        if finish:
            self.thread.join(seconds)
            with self.changed:
                self.cancelling = True
                self.changed.notify_all()
        self.thread.join(GRACE)

    def wake(self) -> None:
        with self.changed:
            self.changed.notify()

    # --- the worker thread

    def work(self) -> None:
        """Turns, until the engine is stopped."""
        while True:
            with self.changed:
                self.changed.wait_for(lambda: self.queue or self.calls or self.rows_now or self.stopping)
                if self.stopping and not (self.queue or self.calls or self.rows_now):
                    return
            try:
                self.turn()
            except Exception as error:
                self.fail(error)

    def turn(self) -> None:
        """One token of every row."""
        self.run_calls()
        self.drop_cancelled()
        self.admit()
        for decoder in self.decoders.values():
            try:
                for row, event in decoder.draw():
                    self.tell(row, event)
                decoder.advance()
            except Exception as error:
                self.fail(error, decoder)

    def run_calls(self) -> None:
        """Runs calls, in order: at least one, and more for CALLS seconds."""
        began = time.monotonic()
        while self.calls and (self.cancelling or time.monotonic() - began < CALLS):
            future, function = self.calls.popleft()
            if self.cancelling:
                future.cancel()
            elif future.set_running_or_notify_cancel():
                try:
                    future.set_result(function())
                except BaseException as error:                              # the caller's, not the worker's
                    future.set_exception(error)

    def drop_cancelled(self) -> None:
        """Takes out cancelled rows; if the engine stops, waiting ones, or all."""
        with self.changed:
            gone = [row for row in self.queue if row.cancelled or self.stopping]
            self.queue = deque(row for row in self.queue if not (row.cancelled or self.stopping))
        for decoder in self.decoders.values():
            stay = [n for n, row in enumerate(decoder.rows) if not (row.cancelled or self.cancelling)]
            if len(stay) < len(decoder.rows):
                gone += [row for row in decoder.rows if row.cancelled or self.cancelling]
                decoder.keep(stay)
        for row in gone:
            self.tell(row, "cancelled")

    def admit(self) -> None:
        """Waiting requests join, the first ones first, while rows, PREFILL and memory allow it."""
        joining: dict[Decoder, list[Row]] = {decoder: [] for decoder in self.decoders.values()}
        count, tokens = 0, 0
        with self.changed:
            while self.queue and self.rows_now + count < self.rows:
                row = self.queue[0]
                joining[self.decoders[row.policy.trunk]].append(row)
                count, tokens = count + 1, tokens + len(row.request.prompt)
                memory = sum(decoder.nbytes(new) for decoder, new in joining.items())
                if count > 1 and tokens > PREFILL or memory > self.memory and self.rows_now + count > 1:
                    joining[self.decoders[row.policy.trunk]].pop()
                    break
                self.queue.popleft()
            self.joining = sum(map(len, joining.values()))
        for decoder, new in joining.items():
            try:
                if new:
                    decoder.join(new)
            except Exception as error:
                for row in new:
                    self.tell(row, error)
            self.joining -= len(new)

    def fail(self, error: Exception, decoder: Decoder | None = None) -> None:
        """Tells the running rows of a decoder, or all rows, of an error; they leave."""
        failed: list[Row] = []
        for each in [decoder] if decoder is not None else self.decoders.values():
            failed += each.rows
            each.keep([])
        if decoder is None:
            with self.changed:
                failed += self.queue
                self.queue.clear()
        for row in failed:
            self.tell(row, error)

    def tell(self, row: Row, event: Event) -> None:
        """Delivers an event. A callback that fails is printed, and its request is cancelled."""
        try:
            row.deliver(event)
        except Exception:
            traceback.print_exc()
            row.deliver, row.cancelled = (lambda event: None), True
