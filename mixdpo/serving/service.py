"""What the routes do, without HTTP: a prompt becomes ids, weights and an expert; a choice becomes evidence.

Each answer comes from one expert (M13): "mixture" draws it from the weights, "sparse" takes the most likely one. The
weights are w(x) for nobody, and for a user the posterior given the user's comparisons (M11). A user of the training
data begins with the responsibilities of the run.
"""

import asyncio
import re
import secrets
import sqlite3
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import torch

from mixdpo.config import InputError
from mixdpo.dpo import log_likelihood
from mixdpo.evaluation.generate import choose_expert
from mixdpo.serving.answers import Answer
from mixdpo.serving.bodies import Refused, busy, stopping
from mixdpo.serving.engine import Engine, Full, Request
from mixdpo.serving.generation import Choices, choice_seed
from mixdpo.serving.policies import ServedRun
from mixdpo.serving.protocol import Ask, Choice, Query
from mixdpo.serving.texts import TextStream, token_bytes
from mixdpo.serving.users import Comparison, NoRoom, Users, history

FILES = re.compile(r"(raise (--)?max.\w+( \(now \d+\))?,? or )?remove the line")          # remedies of text/records.py
DRAWN = ("mixture", "sparse")       # models whose expert is chosen by the weights; the others are policies


def as_sentence(error: InputError) -> str:
    """The message of a bad input. What it advises for a line of a file becomes what a request can do."""
    return FILES.sub("send another text", error.message)


@dataclass(frozen=True)
class Limits:
    """What one request may ask for. The engine has its own limits of rows and of waiting requests."""

    body: int = 256 * 1024          # bytes
    body_seconds: float = 10.0
    seconds: float = 300.0          # of a request, from its body to its last token
    choices: int = 8                # n
    tokens: int = 0                 # max_tokens; 0: what the context leaves
    requests: int = 256             # at once, of any kind
    calls: int = 64                 # weights, margins and scores that wait for the engine at once


@dataclass
class Service:
    """A run with everything that is needed to serve it."""

    served: ServedRun
    engine: Engine
    users: Users
    prior: torch.Tensor             # log w (K,) of a new user whose prompt is not known
    score: Callable[[str], dict[str, float]] | None = None                  # a text -> its rewards; None: not at hand
    limits: Limits = field(default_factory=Limits)
    calls: int = 0                  # that wait for the engine now
    scorer: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1))       # annotators want one thread

    @property
    def models(self) -> list[str]:
        """The names that a request may have in `model`."""
        return [*DRAWN, *self.served.names]

    async def call(self, function: Callable):
        """function() on the engine's thread. Raises: Refused if its input cannot be used, or if too many wait."""
        if self.calls >= self.limits.calls:
            raise busy()
        self.calls += 1
        try:
            return await asyncio.wrap_future(self.engine.call(function))
        except Full:
            raise stopping() from None
        except InputError as error:
            raise Refused(400, as_sentence(error)) from None
        finally:
            self.calls -= 1

    async def encode(self, prompt: str | list[dict], param: str = "prompt") -> tuple[list[int], int]:
        """The ids of a prompt, and the id that ends its answer. param: its field. Raises: Refused."""
        try:
            return await asyncio.to_thread(self.served.encode, prompt)
        except InputError as error:
            raise Refused(400, f"{param}: {as_sentence(error)}", param) from None

    # --- completions

    async def prepare(self, ask: Ask) -> tuple[Answer, list[Request]]:
        """The frame of the answer, and a request to the engine for each choice. Raises: Refused."""
        if ask.model not in self.models:
            raise Refused(404, f"there is no model {ascii(ask.model)[:60]}; this server has {', '.join(self.models)}",
                          "model", "model_not_found")
        prompt, end = await self.encode(ask.prompt, ask.prompt_field)
        max_new = self.room(ask, len(prompt))
        weights = (await self.weights(prompt, ask.user))[1]
        seed = secrets.randbits(32) if ask.seed is None else ask.seed
        if ask.model in DRAWN:
            chosen = choose_expert(weights, ask.n, ask.model, seed).tolist()                # M13
            policies = [f"expert-{k}" for k in chosen]
        else:
            policies = [ask.model] * ask.n
        experts = [int(name.removeprefix("expert-")) if name.startswith("expert-") else None for name in policies]
        requests = [Request(prompt, policy, max_new, end, ask.temperature, ask.top_p, choice_seed(seed, index),
                            ask.logprobs or 0) for index, policy in enumerate(policies)]
        return Answer(ask, experts, weights.exp().tolist(), seed, len(prompt), self.users.run,
                      token_bytes(self.served.tokenizer)), requests

    def room(self, ask: Ask, prompt: int) -> int:
        """The most tokens of an answer to a prompt of so many. Raises: Refused if more are asked for."""
        room = self.served.context - prompt
        if room < 1:
            raise Refused(400, f"the prompt has {prompt} tokens, which fill the context of {self.served.context}; send "
                          "a shorter one", ask.prompt_field, "context_length_exceeded")
        most = min(room, self.limits.tokens or room)
        if ask.max_tokens is not None and ask.max_tokens > most:
            why = f"the prompt has {prompt} tokens of a context of {self.served.context}" if most == room else (
                "the server's limit")
            raise Refused(400, f"max_tokens: got {ask.max_tokens}; send at most {most} ({why})", "max_tokens",
                          "context_length_exceeded")
        return ask.max_tokens or min(self.served.max_response, most)

    def submit(self, ask: Ask, requests: list[Request]) -> Choices:
        """Raises: Refused if the queue is full."""
        bytes_of = token_bytes(self.served.tokenizer)
        return Choices(self.engine, requests, [TextStream(bytes_of, ask.stop) for _ in requests])

    async def weights(self, prompt: list[int], user: str) -> tuple[torch.Tensor, torch.Tensor]:
        """log w(x), and the same with what is known of the user; (K,) each."""
        gate = (await self.call(lambda: self.served.log_w(prompt))).double()
        return gate, (await self.history(user, gate))[-1] if user else gate

    # --- users

    async def stored(self, function: Callable, *arguments):
        """function(*arguments), one of `users`, on a thread. Raises: Refused if another process holds the file."""
        try:
            return await asyncio.to_thread(function, *arguments)
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY:        # the low byte is the kind
                raise
            raise Refused(503, "another process uses the file of users; send the request again later",
                          headers={"Retry-After": "10"}) from None

    async def history(self, user: str, log_w: torch.Tensor) -> torch.Tensor:
        """log q (n+1,K) of a user with n comparisons (M11). log_w (K,): where a new user starts."""
        known = self.served.known_user(user)
        evidence = await self.stored(self.users.log_likelihood, user)                       # (n,K)
        return history(log_w if known is None else known, evidence)

    async def user(self, name: str) -> dict:
        """What is known of a user."""
        rows = (await self.history(name, self.prior)).exp().tolist()
        return {"user": name, "comparisons": len(rows) - 1, "posterior": rows[-1], "history": rows}

    async def add(self, user: str, choice: Choice) -> dict:
        """Stores a comparison. Raises: Refused."""
        h = await self.call(lambda: self.served.margins(choice.prompt, choice.chosen, choice.rejected))     # (K,)  M4
        row = Comparison(choice.prompt, choice.chosen, choice.rejected, tuple(log_likelihood(h.double()).tolist()))
        try:
            await self.stored(self.users.add, user, row)
        except NoRoom as error:
            raise Refused(409, str(error), code="limit_reached") from None
        return await self.user(user)

    # --- scores

    async def scores(self, query: Query) -> dict:
        """A completion under every policy. Raises: Refused."""
        prompt, _ = await self.encode(query.prompt)
        completion = await self.completion_ids(query.completion or "", self.served.context - len(prompt))
        log_w = (await self.weights(prompt, query.user))[1]
        found = await self.call(lambda: self.served.scores(prompt, completion, log_w))
        total = {name: sum(logps) for name, logps in found.logps.items()}
        totals = {name: {"logp": logp, "log_ratio": logp - total["reference"]} for name, logp in total.items()}
        tokenizer, rewards = self.served.tokenizer, None
        if self.score is not None:
            text = tokenizer.decode([i for i in prompt if i != tokenizer.bos] + completion)
            rewards = await asyncio.get_running_loop().run_in_executor(self.scorer, self.score, text)
        return {"tokens": found.tokens, "logps": found.logps, "posterior": found.posterior, "totals": totals,
                "rewards": rewards}

    async def completion_ids(self, text: str, room: int) -> list[int]:
        """Raises: Refused unless it has at least one token and at most `room`."""
        try:
            ids = await asyncio.to_thread(self.served.tokenizer.encode, text)
        except InputError as error:
            raise Refused(400, f"completion: {error.message}", "completion") from None
        if not 1 <= len(ids) <= room:
            raise Refused(400, f"completion: got {len(ids)} tokens; send at least 1 and at most {room}, which the "
                          "prompt leaves of the context", "completion")
        return ids
