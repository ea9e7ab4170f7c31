"""Tokens -> text that can be shown while it grows.

A character whose bytes lie in several tokens is shown when it is complete. Text that may be the beginning of a stop
sequence is held back until it is clear that it is not. A text ends before the first stop sequence that is complete,
read character by character; so it does not depend on how the text is cut into tokens.
"""

import codecs
from collections.abc import Callable
from dataclasses import dataclass, field

from mixdpo.serving.engine import Token


@dataclass(frozen=True)
class Placed:
    """A token and the place of its text: `start` characters of the completion stand before it."""

    token: Token
    start: int


@dataclass
class TextStream:
    """The text of one completion. bytes_of: id -> the bytes of a token. stop: texts before which it ends."""

    bytes_of: Callable[[int], bytes]
    stop: tuple[str, ...] = ()
    stopped: bool = False           # a stop sequence was found: nothing more is shown
    shown: int = 0                  # characters shown so far
    tokens: int = 0                 # tokens added, those of the stop sequence included
    held: str = ""                  # characters decoded and not yet shown
    waiting: list[tuple[Placed, int]] = field(default_factory=list)         # tokens not yet shown, each with its end
    decoder: codecs.IncrementalDecoder = field(
        default_factory=lambda: codecs.getincrementaldecoder("utf-8")("replace"))

    def add(self, token: Token) -> tuple[str, list[Placed]]:
        """-> the text that can be shown now, and the tokens whose text is shown with it."""
        if self.stopped:
            return "", []
        start = self.shown + len(self.held)
        self.tokens += 1
        self.held += self.decoder.decode(self.bytes_of(token.id))
        self.waiting.append((Placed(token, start), self.shown + len(self.held)))
        return self.show(self.held_back())

    def finish(self) -> tuple[str, list[Placed]]:
        """The rest: the completion has no more tokens. Bytes that are no character give U+FFFD."""
        if self.stopped:
            return "", []
        self.held += self.decoder.decode(b"", True)
        return self.show(0)

    def show(self, keep: int) -> tuple[str, list[Placed]]:
        """Shows what is held, up to a stop sequence, or all but the last `keep` characters."""
        cut = self.cut()
        self.stopped = cut is not None
        size = len(self.held) - keep if cut is None else cut
        text, self.held = self.held[:size], self.held[size:]
        self.shown += size
        if self.stopped:                                                    # a part of the last token may be shown
            done = [placed for placed, _ in self.waiting if placed.start < self.shown]
            self.waiting = []
        else:
            done = [placed for placed, end in self.waiting if end <= self.shown]
            self.waiting = self.waiting[len(done):]
        return text, done

    def cut(self) -> int | None:
        """The place in `held` of the stop sequence that is complete first; None if there is none."""
        found = [(place + len(text), place) for text in self.stop if (place := self.held.find(text)) >= 0]
        return min(found)[1] if found else None

    def held_back(self) -> int:
        """How many of the last characters held may be the beginning of a stop sequence."""
        longest = min(max(map(len, self.stop), default=1) - 1, len(self.held))
        return next((n for n in range(longest, 0, -1) if any(text.startswith(self.held[-n:]) for text in self.stop)), 0)


def token_bytes(tokenizer) -> Callable[[int], bytes]:
    """id -> the bytes of a token; an id without a token gives those of U+FFFD, as in `decode`."""
    names = tokenizer.vocabulary.names
    return lambda i: names.get(i, b"\xef\xbf\xbd")
