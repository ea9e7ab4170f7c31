"""A long run whose memory must stay constant and whose steps must not become slower:
`python -m tests.chaos.soak --data FILE --out DIR --minutes 120`. It trains on the file repeatedly and saves every
minute; a signal stops it after the given time. Then it compares medians over the last fifth of the steps and over the
second fifth (the first is warm-up).
"""

import os
import signal
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import train
from mixdpo.config import InputError, Stopped, command, parse
from mixdpo.fast.memory import tune_process
from mixdpo.runs.log import Log
from tests.bench.memory import resident

MEMORY, TIME = 1.02, 1.10       # largest ratio of the last fifth to the second


@dataclass(frozen=True)
class SoakConfig:
    """A long run."""

    data: str                   # preference file
    out: str                    # run directory
    model: str = "smollm2"      # as --model of train.py
    minutes: float = 120.0      # minutes of training
    batch: int = 8              # pairs in a step
    lengths: int = 48           # tokens of a prompt, and of a response


def main(argv: list[str]) -> None:
    config, seen, real = parse(SoakConfig, argv, "python -m tests.chaos.soak"), [], Log.step

    def step(log, *arguments) -> None:
        real(log, *arguments)
        seen.append((time.monotonic(), resident("VmRSS")))
        if seen[-1][0] - seen[0][0] > 60 * config.minutes:
            os.kill(os.getpid(), signal.SIGTERM)

    Log.step = step
    tune_process()                                                          # as train.py's own command
    try:
        train.run(train.TrainConfig(config.data, config.model, config.out, batch=config.batch, micro=config.batch,
                                    max_prompt=config.lengths, max_response=config.lengths, epochs=10000,
                                    save_minutes=1.0))
    except Stopped as stopped:
        print(stopped)
    if len(seen) < 50:
        raise InputError(f"{len(seen)} steps in {config.minutes} minutes, wanted at least 50; raise --minutes")
    took = [b - a for (a, _), (b, _) in zip(seen, seen[1:])]
    fifth, memory = len(took) // 5, [rss for _, rss in seen]
    ratio = {}
    for name, values, most in (("resident memory", memory, MEMORY), ("time of a step", took, TIME)):
        early, late = statistics.median(values[fifth : 2 * fifth]), statistics.median(values[-fifth:])
        ratio[name] = late / early <= most
        unit = "MB" if name == "resident memory" else "s"
        print(f"{name}: {early:.4g} {unit} in the second fifth, {late:.4g} in the last: {late / early:.3f}, "
              f"at most {most}: {'reached' if ratio[name] else 'missed'}")
    print(f"{len(seen)} steps in {(seen[-1][0] - seen[0][0]) / 60:.1f} minutes, {Path(config.out)}")
    if not all(ratio.values()):
        raise InputError("memory or the time of a step has grown beyond the limit")


if __name__ == "__main__":
    command(main)
