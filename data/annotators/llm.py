"""An LLM as judge, behind any endpoint that speaks OpenAI's chat completions.

    OPENAI_BASE_URL     its address, default https://api.openai.com/v1        OPENAI_API_KEY     its key
    MIXDPO_PRICE        "0.15,0.60": dollars a million tokens in and out, for the bill

Answers are kept in a file as they come, by what was asked, and never asked for again. A refusal for the moment (429,
5xx) or a slow or cut-off reply is tried again, ATTEMPTS times in all, after the pause that the endpoint names or a
growing one; then the command ends, and goes on when it is run again. A reply without a verdict (`verdict`) is tried
again as often, without a pause; then the comparison is not judged: null, and kept (to ask again, take its line out). So
is one that the endpoint refuses as such (REFUSED, say a content filter), but that is asked anew in another run; where
MOST_REFUSED are refused and none is answered, the command ends. A model that takes no temperature is asked without one.
Left out: sampling (temperature 0), several models, and asking for reasons.
"""

import hashlib
import http.client
import json
import os
import re
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from data.experiment.stages import read_lines, write_lines
from mixdpo.config import InputError
from mixdpo.runs.rundir import Progress

ATTEMPTS, AT_ONCE = 5, 8
PAUSE, LONGEST = 1.0, 60.0      # seconds: the first pause, twice as long each time; and the longest, or wait, of all
WORDS = ("first", "second", "tie")
REFUSED, MOST_REFUSED = (400, 413, 422), 16     # statuses that one request may have by its own fault
ASK = """Two answers to the same conversation are below. Which is {criterion}?

[Conversation]
{prompt}

[First answer]
{first}

[Second answer]
{second}

Say one word only: first, second or tie."""


class NoVerdict(ValueError):
    """The model replied, and its reply names no winner."""


def verdict(reply: str | None, criterion: str) -> str:
    """One of WORDS, from a reply to ASK: the word alone, "Second answer", "The first answer is better.", "It's a tie",
    behind a <think> block or not. Anything else could mean the other answer ("the first is worse").
    Raises: NoVerdict."""
    text = re.sub(r"[\s*_`\"]+", " ", str(reply or "").rpartition("</think>")[2]).strip(" .!:'").lower()
    better = "|".join(["(?:the )?better", "(?:the )?best", "preferable", "preferred", re.escape(criterion.lower())])
    lead = r"(?:(?:my |the )?(?:final )?(?:answer|verdict|choice)(?: is)? ?:? ?)?"
    found = re.fullmatch(rf"{lead}(?:the )?(first|second)(?: (?:answer|one|response))?"
                         rf"(?: is (?:{better})(?: (?:answer|one|response))?)?"
                         rf"|{lead}(?:it(?:'s| is) )?(?:a )?(tie)", text)
    if found is None:
        raise NoVerdict(f"answered {text!r:.60}, wanted one of {', '.join(WORDS)}")
    return found[1] or "tie"


class Refusal(Exception):
    """The endpoint answers with an error status."""

    def __init__(self, error: urllib.error.HTTPError):
        self.status, self.text = error.code, error.read(300).decode(errors="replace")
        named = error.headers.get("Retry-After", "")
        self.pause = float(named) if named.replace(".", "", 1).isdigit() else None          # seconds, if it names them
        super().__init__(f"HTTP {error.code} {error.reason}: {self.text}")


class Endpoint:
    """A model behind an address."""

    def __init__(self, model: str, kept: Path):
        self.model, self.kept, self.lock = model, kept, threading.Lock()
        self.address = os.environ.get("OPENAI_BASE_URL", "https://api.openai.com/v1").rstrip("/")
        self.key = os.environ.get("OPENAI_API_KEY", "")
        if not self.key and "OPENAI_BASE_URL" not in os.environ:
            raise InputError("llm: wants OPENAI_API_KEY in the environment, and OPENAI_BASE_URL for another endpoint "
                             "than OpenAI's", option="judge")
        rows = read_lines(kept, whole=True) if kept.exists() else []
        write_lines(kept, rows)                                             # without a line that was cut short
        self.known = {row["key"]: row["answer"] for row in rows}
        self.calls, self.tokens, self.ended, self.refusals, self.options = 0, [0, 0], False, [], {"temperature": 0}
        self.asked = set()

    def answers(self, asked: list[tuple[str, str, str, str]]) -> list[str | None]:
        """One of WORDS for each (criterion, prompt, first, second), in order; None where the model gives no verdict."""
        keys = [hashlib.sha256(json.dumps([self.model, *question]).encode()).hexdigest() for question in asked]
        self.asked.update(keys)
        open_ones = {key: question for key, question in zip(keys, asked) if key not in self.known}
        progress = Progress(f"judged by {self.model}")
        with ThreadPoolExecutor(AT_ONCE) as pool:
            try:
                for n, _ in enumerate(pool.map(self.resolve, open_ones, open_ones.values()), 1):
                    progress(n, len(open_ones))
            except BaseException:
                self.ended = True                                           # those under way ask no more
                raise
        if self.refusals:
            print(f"{len(self.refusals)} questions were refused, and are asked again in another run; the last time: "
                  f"{self.refusals[-1]}")
        return [self.known[key] for key in keys]

    def resolve(self, key: str, question: tuple) -> None:
        """Asks until there is an answer, or it is clear that there is none, and keeps that."""
        reasons, failed = [], None
        for attempt in range(0 if self.ended else ATTEMPTS):
            pause = PAUSE * 2**attempt
            try:
                self.keep(key, self.ask(question))
                return
            except Refusal as refusal:
                failed, pause = refusal, pause if refusal.pause is None else refusal.pause
                if refusal.status in REFUSED and self.refused_alone(key, refusal):
                    return
                if refusal.status != 429 and refusal.status < 500:
                    self.ended = True
                    raise InputError(f"got {refusal} from {self.address}", option="judge") from None
            except NoVerdict as reply:
                failed, pause = reply, 0
            except (OSError, http.client.HTTPException, ValueError, LookupError, TypeError, AttributeError) as error:
                failed = error
            reasons.append(f"{type(failed).__name__}: {failed}")
            time.sleep(min(pause, LONGEST))
        if isinstance(failed, NoVerdict):
            self.keep(key, None)
            return
        self.ended = True
        raise InputError(f"no answer from {self.address} in {ATTEMPTS} attempts ({'; '.join(reasons)}); what was "
                         f"answered is kept in {self.kept}: run the same command again to go on", option="judge")

    def keep(self, key: str, answer: str | None) -> None:
        """One answer, for this run and later ones."""
        with self.lock, self.kept.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"key": key, "answer": answer}) + "\n")
            self.known[key] = answer

    def refused_alone(self, key: str, refusal: Refusal) -> bool:
        """Takes the refusal for this question's own fault, unless many are refused and none was answered."""
        with self.lock:
            self.refusals.append(refusal)
            self.known[key] = None
            return len(self.refusals) < MOST_REFUSED or any(self.known.get(asked) for asked in self.asked)

    def ask(self, question: tuple) -> str:
        """One question: its verdict. Raises: whatever can go wrong."""
        content = ASK.format(**dict(zip(("criterion", "prompt", "first", "second"), question)))
        try:
            reply = self.call(content)
        except Refusal as refusal:
            if refusal.status not in REFUSED or "temperature" not in refusal.text:
                raise
            with self.lock:
                if self.options.pop("temperature", None) is not None:
                    print(f"{self.model} takes no temperature of 0: it is asked without one, so that it may answer "
                          "otherwise another time")
            reply = self.call(content)
        return verdict(reply["choices"][0]["message"]["content"], question[0])

    def call(self, content: str) -> dict:
        """One request: the reply, whose tokens are counted. Raises: Refusal, and whatever else can go wrong."""
        body = {"model": self.model, **self.options, "messages": [{"role": "user", "content": content}]}
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {self.key}"} if self.key else {})
        request = urllib.request.Request(f"{self.address}/chat/completions", json.dumps(body).encode(), headers)
        with self.lock:
            self.calls += 1
        try:
            with urllib.request.urlopen(request, timeout=LONGEST) as response:
                reply = json.load(response)
        except urllib.error.HTTPError as error:
            raise Refusal(error) from None
        used = reply.get("usage") or {}
        with self.lock:
            for n, what in enumerate(("prompt", "completion")):
                self.tokens[n] += int(used.get(f"{what}_tokens", 0))
        return reply

    def bill(self) -> str:
        """Calls and tokens so far, and what they cost if the price is known."""
        line = f"{self.calls} calls, {self.tokens[0]} tokens in, {self.tokens[1]} out"
        if price := os.environ.get("MIXDPO_PRICE"):
            dollars = sum(float(each) * count for each, count in zip(price.split(","), self.tokens)) / 1e6
            line += f", {dollars:.4f} dollars"
        return line
