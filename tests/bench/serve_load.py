"""Many clients of one server: `python -m tests.bench.serve_load --run RUN --seconds 120`.

The server runs as a process of its own, by its own command. First one client, then `clients` at once send completions,
one after another each: all models in turn, every second one as a stream. There are `texts` different requests; each has
a seed, so whenever it is sent, streamed or not, alone or among others, its text must be the same. Status 429 is no
error: the client waits and sends again. Printed: tokens a second of wall time and of the server's CPU time, the latter
being the measure on a machine that others use; quantiles of the seconds to the first and to the last token; and the
server's resident memory over time. The exit status is 1 if an answer failed, was lost or differed.
"""

import asyncio
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import numpy as np

from mixdpo.config import InputError, command, parse

TARGET = 3.0            # tokens a CPU second of all clients, in those of one
MODELS = ("mixture", "sparse", "reference", "expert-0", "expert-1", "dpo")


@dataclass(frozen=True)
class LoadConfig:
    """Load of a served run over HTTP."""

    run: str                    # a finished run, or a folder of runs
    seconds: float = 120.0      # with all clients; with one: a fourth of it
    clients: int = 64           # at once
    tokens: int = 24            # of an answer, at most
    texts: int = 48             # different requests
    rows: int = 32              # of the server: answers that are written at the same time
    waiting: int = 64           # of the server: answers that may wait; below clients - rows, some get status 429
    dtype: str = "float32"      # of products, for a copy of the run's options. In bfloat16 a text depends on its batch
                                # by rounding, so differences are counted and are no error; empty: as in the run


@dataclass
class Tally:
    """What the clients of one phase saw."""

    tokens: int = 0
    answers: int = 0
    streams: int = 0
    busy: int = 0                                           # status 429
    errors: list[str] = field(default_factory=list)
    differ: list[str] = field(default_factory=list)         # another text of the same request
    first: list[float] = field(default_factory=list)        # seconds to the first token of a stream
    last: list[float] = field(default_factory=list)         # seconds to the end of an answer


def make_asks(config: LoadConfig, models: list[str]) -> list[dict]:
    """The different requests."""
    words = "The film was a quiet story of two friends who meet again after many years and".split()
    return [{"model": models[n % len(models)], "prompt": " ".join(words[: 3 + n % 12]), "seed": n,
             "max_tokens": config.tokens, "temperature": (1.0, 0.8)[n % 2], "top_p": (1.0, 0.95)[n // 2 % 2]}
            for n in range(config.texts)]


async def streamed(client: httpx.AsyncClient, ask: dict, tally: Tally) -> tuple[int, str, int]:
    """-> status, text, tokens of an answer that is streamed."""
    began, text, tokens, ended = time.monotonic(), "", 0, False
    body = ask | {"stream": True, "stream_options": {"include_usage": True}}
    async with client.stream("POST", "/v1/completions", json=body) as answer:
        if answer.status_code != 200:
            return answer.status_code, (await answer.aread()).decode(), 0
        async for line in answer.aiter_lines():
            if line == "data: [DONE]":
                ended = True
            elif line:
                chunk = json.loads(line.removeprefix("data: "))
                if "error" in chunk:
                    return 500, json.dumps(chunk), 0
                if not text and chunk["choices"] and chunk["choices"][0]["text"]:
                    tally.first.append(time.monotonic() - began)
                text += "".join(choice["text"] for choice in chunk["choices"])
                tokens = chunk["usage"]["completion_tokens"] if chunk.get("usage") else tokens
    return (200, text, tokens) if ended else (0, "the stream has no end", 0)


async def at_once(client: httpx.AsyncClient, ask: dict) -> tuple[int, str, int]:
    """-> status, text, tokens of an answer that is not streamed."""
    answer = await client.post("/v1/completions", json=ask)
    if answer.status_code != 200:
        return answer.status_code, answer.text, 0
    found = answer.json()
    return 200, found["choices"][0]["text"], found["usage"]["completion_tokens"]


async def one_client(client: httpx.AsyncClient, asks: list[dict], n: int, until: float, known: dict, tally: Tally):
    """Requests one after another until a moment; the last one is waited for."""
    while time.monotonic() < until:
        n, began = n + 1, time.monotonic()
        ask, stream = asks[n * 7 % len(asks)], n // len(asks) % 2 == n % 2
        try:
            status, text, tokens = await (streamed(client, ask, tally) if stream else at_once(client, ask))
        except httpx.HTTPError as error:
            status, text, tokens = 0, repr(error), 0
        if status == 429:
            tally.busy += 1
            await asyncio.sleep(1)
        elif status != 200:
            tally.errors.append(f"status {status}: {text[:200]}")
        else:
            tally.answers, tally.streams = tally.answers + 1, tally.streams + stream
            tally.tokens += tokens
            tally.last.append(time.monotonic() - began)
            if known.setdefault(ask["seed"], text) != text:
                tally.differ.append(f"seed {ask['seed']}, stream {stream}: {text!r}, before: {known[ask['seed']]!r}")


async def phase(url: str, pid: int, asks: list[dict], clients: int, seconds: float, known: dict
                ) -> tuple[Tally, float, float, list[float]]:
    """-> the tally, wall and CPU seconds of the server, and its memory (MiB) each second."""
    tally, memory = Tally(), []
    limits = httpx.Limits(max_connections=clients, max_keepalive_connections=clients)
    async with httpx.AsyncClient(base_url=url, timeout=600, limits=limits, trust_env=False) as client:
        began, cpu = time.monotonic(), cpu_seconds(pid)
        works = [asyncio.ensure_future(one_client(client, asks, 5 * n, began + seconds, known, tally))
                 for n in range(clients)]
        while not all(work.done() for work in works):
            memory.append(resident(pid))
            await asyncio.sleep(1)
        await asyncio.gather(*works)
        return tally, time.monotonic() - began, cpu_seconds(pid) - cpu, memory


def cpu_seconds(pid: int) -> float:
    """CPU time of a process, all threads."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def resident(pid: int) -> float:
    """Resident memory of a process in MiB."""
    return int(re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())[1]) / 1024


def with_dtype(run: Path, dtype: str, folder: Path) -> Path:
    """A copy of the run, or of the folder of runs, whose products have another dtype. Weights are links."""
    home = run.parent if (run / "checkpoint").exists() else run
    for path in {each.parent for each in home.glob("*/checkpoint")}:
        (folder / path.name).mkdir()
        (folder / path.name / "checkpoint").symlink_to((path / "checkpoint").resolve())
        options = json.loads((path / "config.json").read_text()) | {"dtype": dtype}
        (folder / path.name / "config.json").write_text(json.dumps(options))
    return folder if home == run else folder / run.name


def row(clients: int, tally: Tally, wall: float, cpu: float) -> str:
    def quantiles(values: list[float]) -> str:
        return " / ".join(f"{np.quantile(values, q):.2f}" for q in (0.5, 0.95)) if values else "-"

    return (f"| {clients} | {tally.answers} ({tally.streams} streamed) | {tally.tokens / wall:.1f} | "
            f"{tally.tokens / cpu:.1f} | {quantiles(tally.first)} | {quantiles(tally.last)} | {tally.busy} | "
            f"{len(tally.errors)} | {len(tally.differ)} |")


def main(argv: list[str]) -> None:
    config = parse(LoadConfig, argv, "python -m tests.bench.serve_load")
    with tempfile.TemporaryDirectory() as folder, open(Path(folder) / "log", "w") as log:
        run = with_dtype(Path(config.run), config.dtype, Path(folder)) if config.dtype else config.run
        words = ["--run", str(run), "--port", "0", "--users", f"{folder}/users.sqlite", "--rows", str(config.rows),
                 "--waiting", str(config.waiting), "--seconds", "3000"]
        server = subprocess.Popen([sys.executable, "-m", "mixdpo.serving", *words], stdout=subprocess.PIPE, text=True,
                                  stderr=log)
        try:
            url = next(line.split()[0] for line in server.stdout if line.startswith("http://"))
            models = [each["id"] for each in httpx.get(f"{url}/v1/models").json()["data"] if each["id"] in MODELS]
            asks, known, found = make_asks(config, models), {}, {}
            asyncio.run(phase(url, server.pid, asks, 4, min(config.seconds / 8, 5), {}))    # caches are filled
            print("| clients | answers | tokens/s | tokens/CPU s | first token, s: p50 / p95 | answer, s: p50 / p95 | "
                  "status 429 | errors | differ |\n|--:|--:|--:|--:|--:|--:|--:|--:|--:|", flush=True)
            for clients, seconds in ((1, config.seconds / 4), (config.clients, config.seconds)):
                found[clients] = asyncio.run(phase(url, server.pid, asks, clients, seconds, known))
                print(row(clients, *found[clients][:3]), flush=True)
            still = httpx.get(f"{url}/health").json()
        finally:
            server.terminate()
            ended = server.wait(60)
    report(config, found, still, ended)


def report(config: LoadConfig, found: dict, still: dict, ended: int) -> None:
    """Prints ratios and memory. Raises: InputError if something was lost or differed."""
    (one, wall_1, cpu_1, _), (many, wall, cpu, memory) = found[1], found[config.clients]
    by_wall, by_cpu = many.tokens / wall / (one.tokens / wall_1), many.tokens / cpu / (one.tokens / cpu_1)
    print(f"\n{config.clients} clients have {by_wall:.2f} times the tokens a second of one, and {by_cpu:.2f} times the "
          f"tokens a CPU second; wanted at least {TARGET:g}")
    places = [int(share * (len(memory) - 1)) for share in (0.1, 0.25, 0.5, 0.75, 1)]
    print("resident memory of the server at 10, 25, 50, 75 and 100 % of the time, MiB: "
          + ", ".join(f"{memory[place]:.0f}" for place in places))
    wrong = one.errors + many.errors + (one.differ + many.differ if config.dtype == "float32" else [])
    if still["rows"] or still["waiting"] or ended:
        wrong.append(f"at the end the server has {still}, and its exit status was {ended}")
    if wrong:
        raise InputError(f"{len(wrong)} answers failed or differed:\n" + "\n".join(wrong[:10]))
    print(f"no answer failed, was lost or differed: {one.answers + many.answers} answers of {config.texts} texts")


if __name__ == "__main__":
    command(main)
