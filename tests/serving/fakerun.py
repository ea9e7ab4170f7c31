"""A run without a model, for tests of the server: its texts follow from the request alone, or are what the prompt says.

    "say:TEXT"          the answer is TEXT, a byte a token
    "slow:N"            N letters, one each 20 ms
    "fail:"             the model fails after three tokens
    any other prompt    words that depend on the prompt, the policy, the seed and the temperature

`python tests/serving/fakerun.py --run FOLDER ..` is the server's own command on such a run.
"""

import hashlib
import queue
import sys
import threading
import time
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")] if str(ROOT) not in sys.path else []

from mixdpo.config import InputError  # noqa: E402
from mixdpo.serving.engine import Full, Request, Token  # noqa: E402
from mixdpo.serving.policies import Scores, token_texts  # noqa: E402
from mixdpo.text import bpe  # noqa: E402
from mixdpo.text.tokenizer import Tokenizer  # noqa: E402

EOS = 256
WORDS = ["red ", "blue ", "größe ", "猫 ", "🙂 ", "a ", "b ", "stop ", "\n\n", "end. "]
FINGERPRINT = "f" * 32
SLOW = 0.02                                         # seconds a token


def make_tokenizer() -> Tokenizer:
    """A byte a token, and <end>."""
    vocab = {bpe.to_name(bytes([b])): b for b in range(256)} | {"<end>": EOS}
    return Tokenizer(bpe.document(vocab, ["<end>"], bpe.BYTE_LEVEL, [], False), {"eos_token": "<end>"}, "fake")


class FakeRun:
    """The contract of policies.ServedRun: two experts with fixed weights."""

    name, K, context, max_prompt, max_response, chat = "fake", 2, 4096, 2000, 40, True

    def __init__(self):
        self.tokenizer = make_tokenizer()
        self.names = ["reference", "expert-0", "expert-1", "dpo"]
        self.run, self.dpo = SimpleNamespace(path=Path("fake")), None

    def encode(self, prompt):
        text = prompt if isinstance(prompt, str) else "".join(f"{m['role']}: {m['content']}\n" for m in prompt)
        if isinstance(prompt, list) and prompt[-1]["role"] != "user":
            raise InputError("the last message is not a user's; end with one")
        if not text:
            raise InputError("the prompt has no token; write at least one character")
        return self.tokenizer.encode(text)[-self.max_prompt :], EOS

    def log_w(self, prompt):
        return torch.tensor([0.7, 0.3]).log()

    def known_user(self, name):
        return torch.tensor([0.1, 0.9]).log() if name == "trained" else None

    def margins(self, prompt, chosen, rejected):
        """Expert 0 likes long texts, expert 1 short ones."""
        if len(chosen) > 1000:
            raise InputError("the response is too long")
        h = min(max(len(chosen) - len(rejected), -20), 20) / 10
        return torch.tensor([h, -h])

    def scores(self, prompt, completion, log_w):
        logps = {name: [-0.5 - n - i % 7 / 10 for i in completion] for n, name in enumerate(self.names)}
        posterior = [[1.0, 0.0]] * (len(completion) + 1)
        return Scores(token_texts(self.tokenizer, completion), logps, posterior)


def text_of(request: Request, prompt: str) -> str:
    """What a policy answers."""
    say = prompt.partition("say:")
    if say[1]:
        return say[2].removesuffix("\n")                                    # a message ends with a line feed
    if "slow:" in prompt:
        return "x" * int(prompt.partition("slow:")[2])
    options = f"{prompt} {request.policy} {request.seed if request.temperature else 0} {request.top_p}"
    rng = np.random.default_rng(list(hashlib.sha256(options.encode()).digest()))
    return "".join(WORDS[i] for i in rng.integers(0, len(WORDS), rng.integers(5, 15)))


class FakeEngine:
    """The contract of engine.Engine: one thread, a token of every row in turn."""

    def __init__(self, served: FakeRun, rows: int = 32, waiting: int = 64):
        self.served, self.rows, self.waiting = served, rows, waiting
        self.running, self.queue, self.calls = [], [], queue.Queue()
        self.lock, self.finish, self.stopped = threading.Lock(), True, False
        self.most_rows = 0
        self.thread = threading.Thread(target=self.work, daemon=True)
        self.thread.start()

    @property
    def rows_now(self):
        return len(self.running)

    @property
    def waiting_now(self):
        return len(self.queue)

    def submit(self, request, deliver):
        assert len(request.prompt) + request.max_new <= self.served.context, "it does not fit"
        prompt = self.served.tokenizer.decode(request.prompt)
        ids = self.served.tokenizer.encode(text_of(request, prompt))
        rng = np.random.default_rng(request.seed)
        row = SimpleNamespace(request=request, deliver=deliver, ids=ids, at=0, cancelled=False, rng=rng,
                              slow="slow:" in prompt, fail="fail:" in prompt, due=0.0)
        row.cancel = lambda: setattr(row, "cancelled", True)
        with self.lock:
            if self.stopped or len(self.queue) >= self.waiting + max(self.rows - len(self.running), 0):
                raise Full("the queue is full")
            self.queue.append(row)
        return row

    def call(self, function):
        if self.stopped:
            raise Full("the engine is stopping")
        future = Future()
        self.calls.put((future, function))
        return future

    def stop(self, finish=True):
        self.finish, self.stopped = finish, True
        self.thread.join(30)

    def work(self):
        while not (self.stopped and not (self.running and self.finish)):
            while not self.calls.empty():
                future, function = self.calls.get()
                try:
                    future.set_result(function())
                except Exception as error:
                    future.set_exception(error)
            with self.lock:
                while self.queue and len(self.running) < self.rows:
                    self.running.append(self.queue.pop(0))
                self.most_rows = max(self.most_rows, len(self.running))
            for row in list(self.running):
                if (end := self.step(row)) is not None:
                    self.running.remove(row)
                    row.deliver(end)
            if not self.running or all(row.slow for row in self.running):
                time.sleep(0.001)
        for row in self.running + self.queue:
            row.deliver("cancelled")

    def step(self, row):
        """Delivers a token; returns the last event of a row that ends."""
        if row.cancelled:
            return "cancelled"
        if row.slow and time.monotonic() < row.due:
            return None
        row.due = time.monotonic() + SLOW
        if row.fail and row.at == 3:
            return RuntimeError("a prompt that must not be logged: " + self.served.tokenizer.decode(row.request.prompt))
        if row.at == len(row.ids):
            return "stop"
        logp = -float(row.rng.random())
        top = [(row.ids[row.at], logp), *((65 + n, logp - 1 - n) for n in range(20))][: row.request.top_logprobs]
        row.deliver(Token(row.ids[row.at], logp, top))
        row.at += 1
        return "length" if row.at == row.request.max_new else None


def main(argv):
    from mixdpo import config as configs
    from mixdpo.serving import __main__ as command

    config = configs.parse(command.ServeConfig, argv, "fakerun.py")
    command.validate(config)
    served = FakeRun()
    users = command.users_of(config, FINGERPRINT, served.K)
    command.serve(config, served, FakeEngine(served, config.rows, config.waiting), users, served.log_w([]), {"fake": 1})


if __name__ == "__main__":
    from mixdpo.config import command as run

    run(main)
