"""What several processes exchange in a step, and how long that takes: processes of their own, one core each, with gloo.

    python -m tests.bench.exchange DIRECTORY SIZES ROUNDS       prints one JSON line

Every process makes the same steps on its part of the pairs. The processes meet before each exchange, and waiting for
each other is not counted: on one machine it depends on what else runs there. Times are those of process 0, medians over
rounds; a process's CPU-seconds are those of all of its threads, gloo's too. Bytes are those that a process puts in.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

ROOT, LIMIT = Path(__file__).resolve().parents[2], 300  # seconds after which processes that hang are ended
COUNTS = (1, 2)                                         # numbers of processes
TITLES = {"k1": "mixdpo, K=1 (DPO)", "k4-adapters": "mixdpo, K=4, adapters"}


def measure(directory: Path, sizes, rounds: int) -> dict[str, list[dict]]:
    """Runs this module in a new process, which has no threads yet: {row: figures for each number of processes}."""
    words = [str(Path(directory).resolve()), json.dumps(asdict(sizes)), str(rounds)]
    call = subprocess.run([sys.executable, "-m", "tests.bench.exchange", *words], cwd=ROOT, capture_output=True,
                          env=os.environ | {"OMP_NUM_THREADS": "1"}, text=True)
    assert call.returncode == 0, f"exchange: ended with {call.returncode}:\n{call.stderr[-2000:]}"
    return json.loads(call.stdout.splitlines()[-1])


def table(found: dict[str, list[dict]]) -> str:
    """All figures as printed text."""
    lines = [f"{'exchange of processes (gloo), of a step':42}{'processes':>10}{'CPU s':>9}{'wall s':>9}"
             f"{'exchange, CPU':>15}{'wall':>7}{'MB':>10}{'floor':>10}"]
    for row in (row | {"title": TITLES[name]} for name, rows in found.items() for row in rows):
        lines.append(f"{row['title']:42}{row['processes']:10}{row['cpu']:9.3f}{row['wall']:9.3f}{row['cpu_share']:15.1%}"
                     f"{row['wall_share']:7.1%}{row['bytes'] / 1e6:10.4f}{row['floor'] / 1e6:10.4f}")
    return "\n".join(lines)


def clocks() -> tuple[float, float]:
    """CPU-seconds and wall seconds."""
    return time.process_time(), time.perf_counter()


class Exchanges:
    """The bytes and seconds of this process's exchanges, and the seconds that it waited, since the last `clear`."""

    def __init__(self):
        import torch.distributed as dist

        self.clear()
        for operation in ("all_reduce", "all_gather"):
            setattr(dist, operation, self.timed(getattr(dist, operation), dist.barrier, operation == "all_gather"))

    def clear(self) -> None:
        self.bytes, self.taken, self.waited = 0, [0.0, 0.0], [0.0, 0.0]     # (CPU, wall) each

    def timed(self, real, meet, gathers: bool):
        """`real`, noted here. gathers: the tensor that is sent is its second argument."""
        def call(*arguments):
            sent, times = arguments[gathers], [clocks()]
            for work in (meet, lambda: real(*arguments)):
                work()
                times.append(clocks())
            self.bytes += sent.numel() * sent.itemsize
            for total, (begin, end) in zip((self.waited, self.taken), zip(times, times[1:])):
                total[:] = [t + b - a for t, a, b in zip(total, begin, end)]
        return call


def work(name: str, setting, count: int, rounds: int, out: Path) -> None:
    """What each process does. Process 0 writes the figures."""
    from mixdpo.runs.distributed import joined, rank
    from tests.bench.variants import ours

    with joined():
        K = 1 if name == "k1" else setting.sizes.experts
        options = {} if name == "k1" else {"rank": setting.sizes.rank, "sharing": "lora"}
        made, exchanges, samples = ours(setting, K, **options), Exchanges(), []
        for _ in range(2 + rounds):                                         # two to warm up
            exchanges.clear()
            begin = clocks()
            made.step()
            spent = [b - a - waited for a, b, waited in zip(begin, clocks(), exchanges.waited)]
            samples.append([*spent, *(own / all_of for own, all_of in zip(exchanges.taken, spent))])
        if rank() == 0:
            figures = dict(zip(("cpu", "wall", "cpu_share", "wall_share"), map(statistics.median, zip(*samples[2:]))))
            trained = sum(p.numel() for p in made.parameters)
            rows = 8 * K * len(setting.pairs) / count                       # log q and h of this process's pairs
            floor = (4 * trained + rows) * (count > 1)
            out.write_text(json.dumps({"processes": count, "bytes": exchanges.bytes, "floor": floor} | figures))


def main(directory: str, sizes: str, rounds: str) -> None:
    from tests.bench.variants import Sizes, make_setting
    from tests.ranks import Group

    setting, found = make_setting(Sizes(**json.loads(sizes)), Path(directory)), {name: [] for name in TITLES}
    with tempfile.TemporaryDirectory() as folder:
        for n, (name, count) in enumerate((name, count) for name in TITLES for count in COUNTS):
            out = Path(folder) / f"{n}.json"
            group = Group(count, lambda _: work(name, setting, count, int(rounds), out), Path(folder) / "said")
            assert group.wait(LIMIT) == [0] * count, "\n".join(group.printed()[-20:])
            found[name].append(json.loads(out.read_text()))
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
