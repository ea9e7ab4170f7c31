"""Tokens a second of the engine, at 1, 16 and 64 requests at once: `python -m tests.bench.serving --run RUN`.

Each client submits its next request when its last one ends, so that many requests are running or waiting all the time.
Prompts are those of the run's training pairs, policies take turns, and every text has `tokens` tokens. In every round
each number of clients has its turn, so that a disturbance of the machine affects all of them. The figure is the median
over rounds, of wall time and of the CPU time of the process (all threads): on a machine that others use, the second one
is the measure. `first` is the time to a request's first token, `all` the time to its last, in seconds. The resident
memory after each round shows whether the engine keeps anything.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: idle workers that spin count as CPU time

import statistics  # noqa: E402
import threading  # noqa: E402
import time  # noqa: E402
from dataclasses import dataclass  # noqa: E402
from pathlib import Path  # noqa: E402

import numpy as np  # noqa: E402

from mixdpo.config import command, parse  # noqa: E402
from mixdpo.serving.engine import Engine, Request, Token  # noqa: E402
from mixdpo.serving.policies import ServedRun  # noqa: E402

TARGET = 3.0            # 64 clients, in tokens a second of one client


@dataclass(frozen=True)
class ServingConfig:
    """Tokens a second of a served run by the number of clients."""

    run: str                                # a finished run, or a folder of runs
    clients: tuple[int, ...] = (1, 16, 64)  # requests at once, comma-separated
    policies: tuple[str, ...] = ()          # those that answer, in turn; empty: all
    tokens: int = 32                        # of a text
    requests: int = 8                       # of a turn, at least; and at least twice the number of clients
    rounds: int = 3                         # turns of each number of clients
    rows: int = 32                          # the engine's: running at once
    top_p: float = 1.0                      # of every second request
    data_folder: str = ""                   # folder of local files that is searched before anything is downloaded


class Client:
    """Submits requests one after another and notes their times."""

    def __init__(self, engine: Engine, requests: list[Request]):
        self.engine, self.requests, self.times, self.done = engine, requests, [], threading.Event()

    def begin(self) -> None:
        """The next request, or the end."""
        if not self.requests:
            self.done.set()
            return
        self.began, self.first = time.monotonic(), None
        self.engine.submit(self.requests.pop(), self.on_event)

    def on_event(self, event) -> None:
        if isinstance(event, Token):
            self.first = self.first or time.monotonic() - self.began
            return
        assert event == "length", f"got {event!r}, want a text of full length"
        self.times.append((self.first, time.monotonic() - self.began))
        self.begin()


def turn(served: ServedRun, engine: Engine, config: ServingConfig, clients: int, seed: int) -> dict[str, float]:
    """One turn of so many clients: wall and CPU tokens a second, and times."""
    rng, prompts = np.random.default_rng(seed), [pair.prompt for pair in served.run.plan.pairs]
    names, count = config.policies or served.names, max(config.requests, 2 * clients)
    requests = [Request(prompts[rng.integers(len(prompts))], names[n % len(names)], config.tokens, -1, seed=n,
                        top_p=config.top_p if n % 2 else 1.0) for n in range(count)]
    work = [Client(engine, requests[n::clients]) for n in range(clients)]
    wall, cpu = time.monotonic(), time.process_time()
    for client in work:
        client.begin()
    for client in work:
        client.done.wait()
    wall, cpu, tokens = time.monotonic() - wall, time.process_time() - cpu, count * config.tokens
    first, full = zip(*(times for client in work for times in client.times))
    return {"tokens/s": tokens / wall, "tokens/CPU-s": tokens / cpu, "first p50": statistics.median(first),
            "first p95": float(np.quantile(first, 0.95)), "all p50": statistics.median(full),
            "all p95": float(np.quantile(full, 0.95)), "memory MB": resident() / 1e6}


def resident() -> int:
    """Resident memory of this process, in bytes."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def main(argv: list[str]) -> None:
    config = parse(ServingConfig, argv, "python -m tests.bench.serving")
    served = ServedRun.load(config.run, config.data_folder)
    engine = Engine(served, config.rows, waiting=max(config.clients))
    print(f"{served.name}: {', '.join(config.policies or served.names)}; {len(served.trunks)} trunks, "
          f"{served.run.experts.dtype}, {config.tokens} tokens a text, {config.rows} rows", flush=True)
    turn(served, engine, config, 2, seed=0)                                 # warm-up
    found: dict[int, list[dict]] = {clients: [] for clients in config.clients}
    for number in range(config.rounds):
        for clients in config.clients:
            found[clients].append(turn(served, engine, config, clients, seed=number))
            print(f"round {number + 1}, {clients:>3} clients: "
                  + "  ".join(f"{name} {value:.3g}" for name, value in found[clients][-1].items()), flush=True)
    engine.stop()
    for figure in ("tokens/s", "tokens/CPU-s"):
        median = {clients: statistics.median(each[figure] for each in found[clients]) for clients in found}
        most, least = max(median), min(median)
        ratio = median[most] / median[least]
        print(f"{figure}: " + ", ".join(f"{n} clients {value:.1f}" for n, value in median.items())
              + f"; {most} against {least}: {ratio:.2f} times, target {TARGET:g}: "
              + ("reached" if ratio >= TARGET else "missed"))


if __name__ == "__main__":
    command(main)
