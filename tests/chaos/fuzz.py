"""Hostile files: every reader of a foreign file gets thousands of damaged files. Each case must succeed or raise an
InputError that names the file. Any other exception, more than SECONDS of CPU time, or more than GROWTH bytes of memory
is a failure.

    bytes       real files with bits flipped, pieces removed, copied or overwritten, numbers made huge
    values      JSON with one value, at any place, replaced by a value from Hypothesis, or removed

Each format runs in its own process with limited memory; a case that takes too long is interrupted.
"""

import gzip
import io
import json
import os
import random
import resource
import signal
import sys
import tempfile
from pathlib import Path

import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))                # the tests' helpers

import tinyjob

from mixdpo import config as configs
from mixdpo.config import InputError
from mixdpo.models.gguf import read_gguf
from mixdpo.models.weights import load_model
from mixdpo.preferences import read_preferences
from mixdpo.runs.checkpoint import load_checkpoint, save_checkpoint
from mixdpo.runs.options import TrainConfig
from mixdpo.text.tokenizer import load_tokenizer
from tests.models.test_gguf import METADATA, TENSORS, gguf

SECONDS, GROWTH = 5, 2**30
CLOCKS = ((signal.SIGPROF, signal.ITIMER_PROF, SECONDS), (signal.SIGALRM, signal.ITIMER_REAL, 10 * SECONDS))
TEXT = "it's 12  naïve <end> 中\n"


class TooLong(BaseException):
    """A case took more than SECONDS."""


# ---- readers of a file


def read_lines(path: Path) -> None:
    tokenizer = read_lines.tokenizer
    read_preferences(path, tokenizer, 32, 32, report=lambda line: None)
    read_preferences(path, tokenizer, 32, 32, drop=True, report=lambda line: None)


def read_weights(path: Path) -> None:
    load_model(path.parent)


def read_tokenizer(path: Path) -> None:
    tokenizer = load_tokenizer(path.parent)
    try:
        tokenizer.decode(tokenizer.encode(TEXT))
    except InputError:                                                      # a character without a token
        pass


def read_run(path: Path) -> None:
    configs.load(TrainConfig, path)


# ---- the files, made once in an empty folder: name -> (file, reader)


def make_lines(folder: Path):
    chat = [{"role": "user", "content": "hi"}]
    rows = tinyjob.make_records() + [{"prompt": chat, "chosen": [{"role": "assistant", "content": "a"}],
                                      "rejected": [{"role": "assistant", "content": "b"}], "context": True}]
    read_lines.tokenizer = load_tokenizer(tinyjob.make_model(folder / "model", special=("<|im_end|>", "<|im_start|>")))
    return tinyjob.write(folder / "pairs.jsonl", rows), read_lines


def make_packed(folder: Path):
    plain, reader = make_lines(folder)
    (folder / "pairs.jsonl.gz").write_bytes(gzip.compress(Path(plain).read_bytes()))
    return folder / "pairs.jsonl.gz", reader


def make_gguf(folder: Path):
    (folder / "model.gguf").write_bytes(gguf(METADATA, TENSORS))

    def reader(path):
        for tensor in read_gguf(path)[1].values():
            tensor.float32()

    return folder / "model.gguf", reader


def make_weights(folder: Path):
    tinyjob.make_model(folder)
    return folder / "model.safetensors", read_weights


def make_config(folder: Path):
    tinyjob.make_model(folder)
    return folder / "config.json", read_weights


def make_tokenizer(folder: Path):
    tinyjob.make_model(folder)
    return folder / "tokenizer.json", read_tokenizer


def make_checkpoint(folder: Path):
    for step in (1, 2):
        tensors = {"x": torch.arange(6.0), "y": torch.ones(2).bfloat16()}
        save_checkpoint(folder, tensors, {"step": step, "config": {}}, 2)
    return folder / "checkpoint" / "00000002.safetensors", lambda path: load_checkpoint(folder, {})


def make_run(folder: Path):
    configs.save(TrainConfig("a.jsonl", "smollm2", "runs/x"), folder / "config.json")
    return folder / "config.json", read_run


FORMATS = {"preferences, .jsonl": make_lines, "preferences, .jsonl.gz": make_packed, "GGUF": make_gguf,
           "safetensors": make_weights, "config.json of a model": make_config, "tokenizer.json": make_tokenizer,
           "checkpoint": make_checkpoint, "config.json of a run": make_run}
JSON = {"preferences, .jsonl", "config.json of a model", "tokenizer.json", "config.json of a run"}


# ---- damage


def damaged(data: bytes, rng: random.Random) -> bytes:
    """The data with one to three kinds of damage."""
    data = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        a, b = sorted(rng.randrange(len(data) + 1) for _ in range(2))
        b = min(b, a + rng.choice((1, 8, 64, 4096)))
        kind = rng.randrange(8)
        if kind == 0 and a < len(data):
            data[a] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del data[a:]
        elif kind == 2:
            del data[a:b]
        elif kind == 3:
            data[a:a] = data[a:b]
        elif kind == 4:
            data[a:b] = rng.randbytes(b - a)
        elif kind == 5:
            data[a : a + 8] = rng.choice((2**64 - 1, 2**63, 2**32, 2**40, 0, 1 << 20)).to_bytes(8, "little")
        elif kind == 6:
            data[a:a] = rng.choice((b"[" * 5000, b'{"a":' * 5000, b"1e999", b"-1", b"NaN", b"\\ud800", b"\xff", b"\0",
                                    b'"' * 3, b"9" * 5000, b"null", b"\xe2\x80\xa8", b"\r", b"\n" * 9))
        else:
            digits = [n for n, c in enumerate(data) if 48 <= c < 58]
            if digits:
                n = rng.choice(digits)
                data[n : n + 1] = rng.choice((b"999999999999", b"-3", b"0", b"1.5", b"1e400"))
        if not data:
            break
    return bytes(data)


ANY = st.recursive(
    st.none() | st.booleans() | st.integers() | st.integers(-3, 3) | st.floats() | st.text(max_size=20)
    | st.sampled_from([10**30, -1, 0, 1e308, "\ud800", "", "x" * 10000, 2**31, 2**63, [[]], {"": None}]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4), max_leaves=8)


def places(value, path=()):
    """Yields every place in a JSON value, as a tuple of keys and indices."""
    yield path
    if isinstance(value, (dict, list)):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield from places(value[key], (*path, key))


def with_value(value, path, new, removed: bool):
    """A copy of a JSON value with `new` at the place `path`; removed: without the value at that place."""
    if not path:
        return new
    out = dict(value) if isinstance(value, dict) else list(value)
    if len(path) == 1 and removed:
        del out[path[0]]
    else:
        out[path[0]] = with_value(value[path[0]], path[1:], new, removed)
    return out


# ---- one format


def try_one(reader, path: Path, data: bytes) -> str | None:
    """Writes these bytes to the file and reads it -> the failure, or None."""
    path.write_bytes(data)

    def late(*_):
        raise TooLong

    for number, clock, seconds in CLOCKS:
        signal.signal(number, late)
        signal.setitimer(clock, seconds)
    try:
        reader(path)
    except InputError as error:
        named = str(error.file).startswith(str(path.parent))
        return None if named else f"does not name the file: {error}"
    except TooLong:
        return f"took more than {SECONDS} seconds of CPU time, or {10 * SECONDS} seconds of wall time"
    except BaseException as error:
        return f"{type(error).__name__}: {str(error)[:200]}"
    finally:
        for _, clock, _ in CLOCKS:
            signal.setitimer(clock, 0)
    return None


def fuzz(name: str, cases: int, number: int, keep: Path | None, report) -> None:
    """`cases` cases of one format in this process; report(failure, or None) after each."""
    with tempfile.TemporaryDirectory() as temporary:
        file, reader = FORMATS[name](Path(temporary))
        file, rng = Path(file), random.Random(f"{name} {number}")
        good = file.read_bytes()
        if (wrong := try_one(reader, file, good)) is not None:
            raise AssertionError(f"{name}: the undamaged file: {wrong}")
        virtual = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (virtual + GROWTH, virtual + GROWTH))

        def check(data: bytes) -> None:
            wrong = try_one(reader, file, data)
            if wrong and keep:
                keep.mkdir(parents=True, exist_ok=True)
                (keep / f"{name.replace(' ', '-')}-{abs(hash(data))}").write_bytes(data)
            report(wrong)

        of_values = cases // 2 if name in JSON else 0
        for _ in range(cases - of_values):
            check(damaged(good, rng))
        if of_values:
            text = good.decode()
            rows = [json.loads(row) for row in text.splitlines()] if name.startswith("pref") else json.loads(text)
            where = list(places(rows))

            @seed(number)
            @settings(max_examples=of_values, database=None, deadline=None, phases=[Phase.generate],
                      suppress_health_check=list(HealthCheck))
            @given(st.sampled_from(where), ANY, st.booleans())
            def values(path, new, removed):
                made = with_value(rows, path, new, removed)
                if name.startswith("pref"):
                    lines = made if isinstance(made, list) else [made]
                    check("".join(json.dumps(row) + "\n" for row in lines).encode())
                else:
                    check(json.dumps(made).encode())

            values()


def run(name: str, cases: int, number: int, keep: Path | None = None) -> dict:
    """`fuzz` in a new process -> {"cases": number, "failures": [...]}. A process that dies is a failure too."""
    receive, send = os.pipe()
    child = os.fork()
    if not child:
        os.close(receive)
        with os.fdopen(send, "w") as out:
            torch.set_num_threads(1)
            sys.stdout, quiet = io.StringIO(), os.open(os.devnull, os.O_WRONLY)
            os.dup2(quiet, 2)                                               # hides the panic messages of Rust libraries
            try:
                fuzz(name, cases, number, keep, lambda wrong: print(json.dumps(wrong), file=out))
            except BaseException as error:
                print(json.dumps(f"{type(error).__name__}: {error}"), file=out)
        os._exit(0)
    os.close(send)
    with os.fdopen(receive) as lines:
        results = [json.loads(line) for line in lines]
    status = os.waitpid(child, 0)[1]
    failures = [wrong for wrong in results if wrong is not None] + ([f"ended with {status}"] if status else [])
    return {"cases": len(results), "failures": failures}
