"""An LLM as judge, behind any endpoint with OpenAI's chat completions.

    OPENAI_BASE_URL     address of the endpoint, default https://api.openai.com/v1      OPENAI_API_KEY     its key
    MIXDPO_PRICE        "0.15,0.60": dollars for a million input and output tokens, to compute the cost

Each verdict is stored in a file as soon as it arrives, under a key of the question, and is not requested again.

    temporary error     (429, 5xx, or a slow or incomplete reply) is retried, ATTEMPTS times in all, after the pause
                        that the endpoint names or a growing pause. Then the command stops; the same command resumes
    no verdict          (`verdict`) is retried as often, without a pause. Then the comparison is not judged, and null is
                        stored; delete its line to ask again
    refused question    (REFUSED, for example by a content filter) is not judged, and is asked again in another run. If
                        MOST_REFUSED are refused and none is answered, the command stops

A model that does not accept temperature 0 is asked without it. Left out: sampling, several models, reasons.
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
from mixdpo.runs.log import Progress

ATTEMPTS, AT_ONCE = 5, 8
PAUSE, LONGEST = 1.0, 60.0      # seconds: first pause, which doubles each time; longest pause, and timeout
WORDS = ("first", "second", "tie")
REFUSED, MOST_REFUSED = (400, 413, 422), 16     # statuses that a single question can cause
ASK = """Two answers to the same conversation are below. Which is {criterion}?

[Conversation]
{prompt}

[First answer]
{first}

[Second answer]
{second}

Say one word only: first, second or tie."""


class NoVerdict(ValueError):
    """The reply has no verdict."""


def verdict(reply: str | None, criterion: str) -> str:
    """One of WORDS from a reply to ASK: the word itself, "Second answer", "The first answer is better." or "It's a
    tie", with or without a <think> block. Other replies may mean the opposite ("the first is worse"). Raises:
    NoVerdict."""
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
    """The endpoint returned an error status."""

    def __init__(self, error: urllib.error.HTTPError):
        self.status, self.text = error.code, error.read(300).decode(errors="replace")
        named = error.headers.get("Retry-After", "")
        self.pause = float(named) if named.replace(".", "", 1).isdigit() else None          # seconds, or None
        super().__init__(f"HTTP {error.code} {error.reason}: {self.text}")


class Endpoint:
    """A model at an address, and the file with its verdicts."""

    def __init__(self, model: str, store: Path):
        self.model, self.store, self.lock = model, store, threading.Lock()
        self.address = os.environ.get("OPENAI_BASE_URL", "https://api.openai.com/v1").rstrip("/")
        self.key = os.environ.get("OPENAI_API_KEY", "")
        if not self.key and "OPENAI_BASE_URL" not in os.environ:
            raise InputError("llm: needs OPENAI_API_KEY in the environment, or OPENAI_BASE_URL for another "
                             "endpoint", option="judge")
        rows = read_lines(store, complete=True) if store.exists() else []
        write_lines(store, rows)                                            # removes an incomplete last line
        self.known = {row["key"]: row["answer"] for row in rows}
        self.calls, self.tokens, self.ended, self.refusals, self.options = 0, [0, 0], False, [], {"temperature": 0}
        self.keys = set()                                                   # of all questions of this run

    def answers(self, questions: list[tuple[str, str, str, str]]) -> list[str | None]:
        """One of WORDS for each (criterion, prompt, first, second), in order; None if there is no verdict. Raises:
        InputError if the endpoint fails."""
        keys = [hashlib.sha256(json.dumps([self.model, *question]).encode()).hexdigest() for question in questions]
        self.keys.update(keys)
        unanswered = {key: question for key, question in zip(keys, questions) if key not in self.known}
        progress = Progress(f"judged by {self.model}")
        with ThreadPoolExecutor(AT_ONCE) as pool:
            try:
                for n, _ in enumerate(pool.map(self.resolve, unanswered, unanswered.values()), 1):
                    progress(n, len(unanswered))
            except BaseException:
                self.ended = True                                           # running requests are not retried
                raise
        if self.refusals:
            print(f"warning: {len(self.refusals)} questions were refused and are not judged; run the same command "
                  f"again to ask them. The last refusal: {self.refusals[-1]}")
        return [self.known[key] for key in keys]

    def resolve(self, key: str, question: tuple) -> None:
        """Asks until there is a verdict or no attempt is left, and stores the result. Raises: InputError."""
        reasons, failed = [], None
        for attempt in range(0 if self.ended else ATTEMPTS):
            pause = PAUSE * 2**attempt
            try:
                self.save(key, self.ask(question))
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
            self.save(key, None)
            return
        self.ended = True
        raise InputError(f"no answer from {self.address} in {ATTEMPTS} attempts ({'; '.join(reasons)}); the "
                         f"verdicts are stored in {self.store}; run the same command again to resume", option="judge")

    def save(self, key: str, answer: str | None) -> None:
        """Stores one verdict."""
        with self.lock, self.store.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"key": key, "answer": answer}) + "\n")
            self.known[key] = answer

    def refused_alone(self, key: str, refusal: Refusal) -> bool:
        """Records a refusal. Returns whether the question caused it: not if many are refused and none was answered."""
        with self.lock:
            self.refusals.append(refusal)
            self.known[key] = None
            return len(self.refusals) < MOST_REFUSED or any(self.known.get(key) for key in self.keys)

    def ask(self, question: tuple) -> str:
        """The verdict on one question. Raises: NoVerdict, Refusal, and network errors."""
        content = ASK.format(**dict(zip(("criterion", "prompt", "first", "second"), question)))
        try:
            reply = self.call(content)
        except Refusal as refusal:
            if refusal.status not in REFUSED or "temperature" not in refusal.text:
                raise
            with self.lock:
                if self.options.pop("temperature", None) is not None:
                    print(f"warning: {self.model} takes no temperature of 0, so it is asked without; its verdicts may "
                          "differ in another run, and a larger number of prompts makes the win rate stable")
            reply = self.call(content)
        return verdict(reply["choices"][0]["message"]["content"], question[0])

    def call(self, content: str) -> dict:
        """The reply to one request; counts its tokens. Raises: Refusal, and network errors."""
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
        """Calls and tokens so far, and their cost if the price is known."""
        line = f"{self.calls} calls, {self.tokens[0]} tokens in, {self.tokens[1]} out"
        if price := os.environ.get("MIXDPO_PRICE"):
            dollars = sum(float(each) * count for each, count in zip(price.split(","), self.tokens)) / 1e6
            line += f", {dollars:.4f} dollars"
        return line
