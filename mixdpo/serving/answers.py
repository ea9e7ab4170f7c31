"""Answers in OpenAI's form: complete ones, the chunks of a stream, and errors; each a dict that JSON can hold.

Beside OpenAI's fields every answer, and the first chunk of a stream, has "mixdpo": which expert answered, or null for
another policy; the weights over the K experts; and the seed that gives the same text again.
"""

import json
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from mixdpo.config import to_json
from mixdpo.serving.protocol import Ask
from mixdpo.serving.texts import Placed

LEAST = -9999.0                     # OpenAI's log-prob of a token that is as good as impossible


@dataclass(frozen=True)
class Piece:
    """What is new in the text of one choice."""

    index: int                      # of the choice
    text: str
    placed: list[Placed]
    reason: str | None = None       # "stop" or "length": the choice is complete


@dataclass
class Answer:
    """The answer to one request, complete or in chunks."""

    ask: Ask
    experts: list[int | None]       # of each choice
    weights: list[float]            # (K,)
    seed: int
    prompt_tokens: int
    fingerprint: str
    bytes_of: Callable[[int], bytes]
    id: str = field(default_factory=lambda: secrets.token_hex(12))
    created: int = field(default_factory=lambda: int(time.time()))

    def frame(self, chunk: bool) -> dict:
        """The fields that every answer and every chunk has."""
        kind = ("chat.completion.chunk" if chunk else "chat.completion") if self.ask.chat else "text_completion"
        return {"id": f"{'chatcmpl' if self.ask.chat else 'cmpl'}-{self.id}", "object": kind, "created": self.created,
                "model": self.ask.model, "system_fingerprint": f"mixdpo-{self.fingerprint[:12]}"}

    @property
    def extra(self) -> dict:
        """The object "mixdpo". expert: of choice 0; experts: of each choice."""
        return {"expert": self.experts[0], "experts": self.experts, "weights": self.weights, "seed": self.seed}

    def usage(self, tokens: int) -> dict:
        return {"prompt_tokens": self.prompt_tokens, "completion_tokens": tokens,
                "total_tokens": self.prompt_tokens + tokens}

    def complete(self, pieces: list[Piece], tokens: int) -> dict:
        """The answer, of the pieces of all choices. tokens: of all choices."""
        choices = []
        for index in range(self.ask.n):
            own = [piece for piece in pieces if piece.index == index]
            text, placed = "".join(piece.text for piece in own), [one for piece in own for one in piece.placed]
            said = {"message": {"role": "assistant", "content": text, "refusal": None}} if self.ask.chat else {
                "text": text}
            choices.append({"index": index, **said, "logprobs": self.logprobs(placed), "finish_reason": own[-1].reason})
        return self.frame(False) | {"choices": choices, "usage": self.usage(tokens), "mixdpo": self.extra}

    def first_chunk(self) -> dict:
        """The chunk that opens a stream: no text yet."""
        said: dict = {"delta": {"role": "assistant", "content": ""}} if self.ask.chat else {"text": ""}
        choices = [{"index": index, **said, "logprobs": None, "finish_reason": None} for index in range(self.ask.n)]
        return self.chunk(choices) | {"mixdpo": self.extra}

    def next_chunk(self, piece: Piece) -> dict:
        said: dict = {"delta": {"content": piece.text} if piece.text else {}} if self.ask.chat else {"text": piece.text}
        logprobs = self.logprobs(piece.placed) if piece.placed else None
        return self.chunk([{"index": piece.index, **said, "logprobs": logprobs, "finish_reason": piece.reason}])

    def last_chunk(self, tokens: int) -> dict:
        """The chunk with the numbers of tokens, if they are asked for."""
        return self.frame(True) | {"choices": [], "usage": self.usage(tokens)}

    def chunk(self, choices: list[dict]) -> dict:
        return self.frame(True) | {"choices": choices} | ({"usage": None} if self.ask.usage else {})

    def logprobs(self, placed: list[Placed]) -> dict | None:
        """Log-probs at temperature 1 in the endpoint's form; None if they are not asked for."""
        if self.ask.logprobs is None:
            return None
        if self.ask.chat:
            return {"content": [self.entry(one.token.id, one.token.logp) | {
                "top_logprobs": [self.entry(*other) for other in one.token.top[: self.ask.logprobs]]}
                for one in placed], "refusal": None}
        top = [{self.name(i): max(logp, LEAST) for i, logp in one.token.top[: self.ask.logprobs]} for one in placed]
        return {"tokens": [self.name(one.token.id) for one in placed],
                "token_logprobs": [max(one.token.logp, LEAST) for one in placed],
                "top_logprobs": top if self.ask.logprobs else None, "text_offset": [one.start for one in placed]}

    def entry(self, token: int, logp: float) -> dict:
        return {"token": self.name(token), "logprob": max(logp, LEAST), "bytes": list(self.bytes_of(token))}

    def name(self, token: int) -> str:
        """A token as text; bytes that are no characters as OpenAI's completions show them, "bytes:\\xe2\\x82"."""
        raw = self.bytes_of(token)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def event(value: dict) -> bytes:
    """An event of a stream. JSON in ASCII holds no line break, so it cannot end an event early."""
    return b"data: " + to_json(value, separators=(",", ":")).encode() + b"\n\n"


DONE = b"data: [DONE]\n\n"          # the last event of a stream that did not fail


def json_lines(records: list[dict]) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)
