"""An LLM as judge, behind any endpoint that speaks OpenAI's chat completions.

    OPENAI_BASE_URL     its address, default https://api.openai.com/v1        OPENAI_API_KEY     its key
    MIXDPO_PRICE        "0.15,0.60": dollars a million tokens in and out, for the bill

Answers are kept in a file as they come, by what was asked, and never asked for again. A refusal for the moment (429,
5xx), a slow or cut-off reply, or an answer that is none of the words asked for is tried again, ATTEMPTS times in all,
after the pause that the endpoint names or a growing one; then the command ends, and goes on when it is run again.
Left out: sampling (temperature 0), several models, and asking for reasons.
"""

import hashlib
import http.client
import json
import os
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from data.stages import read_lines, write_lines
from mixdpo.config import InputError
from mixdpo.rundir import Progress

ATTEMPTS, AT_ONCE = 5, 8
PAUSE, LONGEST = 1.0, 60.0      # seconds: the first pause, twice as long each time; and the longest, or wait, of all
WORDS = ("first", "second", "tie")
ASK = """Two answers to the same conversation are below. Which is {criterion}?

[Conversation]
{prompt}

[First answer]
{first}

[Second answer]
{second}

Say one word only: first, second or tie."""


class Endpoint:
    """A model behind an address."""

    def __init__(self, model: str, kept: Path):
        self.model, self.kept, self.lock = model, kept, threading.Lock()
        self.address = os.environ.get("OPENAI_BASE_URL", "https://api.openai.com/v1").rstrip("/")
        self.key = os.environ.get("OPENAI_API_KEY", "")
        if not self.key and "OPENAI_BASE_URL" not in os.environ:
            raise InputError("--judge llm: wants OPENAI_API_KEY in the environment, and OPENAI_BASE_URL for another "
                             "endpoint than OpenAI's")
        rows = read_lines(kept, whole=True) if kept.exists() else []
        write_lines(kept, rows)                                             # without a line that was cut short
        self.known = {row["key"]: row["answer"] for row in rows}
        self.calls, self.tokens, self.ended = 0, [0, 0], False

    def answers(self, asked: list[tuple[str, str, str, str]]) -> list[str]:
        """One of WORDS for each (criterion, prompt, first, second), in order."""
        keys = [hashlib.sha256(json.dumps([self.model, *question]).encode()).hexdigest() for question in asked]
        open_ones = {key: question for key, question in zip(keys, asked) if key not in self.known}
        progress = Progress(f"judged by {self.model}")
        with ThreadPoolExecutor(AT_ONCE) as pool:
            try:
                for n, _ in enumerate(pool.map(self.settle, open_ones, open_ones.values()), 1):
                    progress(n, len(open_ones))
            except BaseException:
                self.ended = True                                           # those under way ask no more
                raise
        return [self.known[key] for key in keys]

    def settle(self, key: str, question: tuple) -> None:
        """Asks until there is an answer, and keeps it."""
        reasons = []
        for attempt in range(0 if self.ended else ATTEMPTS):
            pause = PAUSE * 2**attempt
            try:
                answer, used = self.ask(question)
            except urllib.error.HTTPError as error:
                said = error.read(300).decode(errors="replace")
                if error.code != 429 and error.code < 500:
                    self.ended = True
                    raise InputError(f"{self.address}: HTTP {error.code} {error.reason}: {said}") from None
                reasons.append(f"HTTP {error.code}")
                named = error.headers.get("Retry-After", "")
                pause = float(named) if named.replace(".", "", 1).isdigit() else pause
            except (OSError, http.client.HTTPException, ValueError, LookupError, TypeError, AttributeError) as error:
                reasons.append(f"{type(error).__name__}: {error}")
            else:
                with self.lock, self.kept.open("a", encoding="utf-8") as file:
                    file.write(json.dumps({"key": key, "answer": answer}) + "\n")
                    self.known[key] = answer
                    self.tokens = [have + more for have, more in zip(self.tokens, used)]
                return
            time.sleep(min(pause, LONGEST))
        self.ended = True
        raise InputError(f"{self.address}: no answer in {ATTEMPTS} attempts ({'; '.join(reasons)}); what was answered "
                         f"is kept in {self.kept}: run the same command again to go on")

    def ask(self, question: tuple) -> tuple[str, list[int]]:
        """One call: the word, and tokens in and out. Raises: whatever can go wrong."""
        content = ASK.format(**dict(zip(("criterion", "prompt", "first", "second"), question)))
        body = {"model": self.model, "temperature": 0, "messages": [{"role": "user", "content": content}]}
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {self.key}"} if self.key else {})
        request = urllib.request.Request(f"{self.address}/chat/completions", json.dumps(body).encode(), headers)
        with self.lock:
            self.calls += 1
        with urllib.request.urlopen(request, timeout=LONGEST) as response:
            reply = json.load(response)
        word = reply["choices"][0]["message"]["content"].strip().strip(".\"'*").lower()
        if word not in WORDS:
            raise ValueError(f"answered {word!r:.60}, wanted one of {', '.join(WORDS)}")
        used = reply.get("usage") or {}
        return word, [int(used.get(f"{what}_tokens", 0)) for what in ("prompt", "completion")]

    def bill(self) -> str:
        """Calls and tokens so far, and what they cost if the price is known."""
        line = f"{self.calls} calls, {self.tokens[0]} tokens in, {self.tokens[1]} out"
        if price := os.environ.get("MIXDPO_PRICE"):
            dollars = sum(float(each) * count for each, count in zip(price.split(","), self.tokens)) / 1e6
            line += f", {dollars:.4f} dollars"
        return line
