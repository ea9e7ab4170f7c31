"""Tests that an interrupted run resumes where it was, or ends with a sentence that says what is wrong: `make chaos`, or
`python -m tests.chaos --cases 20000 --kills 60`. Prints a table of cases and the fraction survived; the exit status is
1 unless all were survived.
"""

import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from mixdpo.config import InputError, command, parse
from tests.chaos import fuzz, kills, processes

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class ChaosConfig:
    """Kills, faults and hostile files."""

    kills: int = 60             # smallest number of kills at random moments
    processes: int = 20         # the same, of one of several processes
    cases: int = 20000          # damaged files, over all formats
    seed: int = 0               # seed of the moments and the damage
    at_once: int = 2            # formats that are fuzzed in parallel
    keep: str = ""              # folder for files that were not survived; empty: they are not kept


def killed(config: ChaosConfig, suite=kills, count: int | None = None) -> tuple[int, list[str]]:
    """Kills at random moments -> number of cases, failures."""
    counts, wrong = [], []

    def report(count, what):
        counts.append(count)
        wrong.extend([what] if what else [])

    suite.kills(config.kills if count is None else count, config.seed, report)
    return sum(counts), wrong


def killed_of_several(config: ChaosConfig) -> tuple[int, list[str]]:
    """The same, of one of several processes."""
    return killed(config, processes, config.processes)


def written(config: ChaosConfig) -> tuple[int, list[str]]:
    """Writes that fail -> number of cases, failures."""
    results = []
    kills.writes(config.seed, results.append)
    return len(results), [failure for failure in results if failure]


def faults(config: ChaosConfig) -> tuple[int, list[str]]:
    """tests/runs/test_faults.py and the tests of checkpoints and downloads; each simulates a fault."""
    files = ["tests/runs/test_faults.py", "tests/runs/test_checkpoint.py", "tests/models/test_download.py",
             "tests/models/test_fetch.py"]
    call = subprocess.run([sys.executable, "-m", "pytest", "-rfE", *files], cwd=ROOT, capture_output=True, text=True)
    lines = call.stdout.splitlines()
    wrong = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    if call.returncode and not wrong:
        raise InputError(f"pytest ended with {call.returncode}: {call.stdout[-2000:]}{call.stderr[-2000:]}")
    passed = sum(line.count(".") for line in lines if line and set(line.split(" ")[0]) <= set(".sFEx"))
    return passed + len(wrong), wrong


def main(argv: list[str]) -> None:
    config = parse(ChaosConfig, argv, "python -m tests.chaos")
    torch.set_num_threads(1)                                                # before the processes fork
    failures, total = [], 0
    print("| what | cases | survived | seconds |\n|:--|--:|--:|--:|")

    def row(name: str, cases: int, wrong: list[str], seconds: float) -> None:
        failures.extend(f"{name}: {what}" for what in wrong)
        share = 100 * (cases - len(wrong)) / cases if cases else 0.0
        print(f"| {name} | {cases} | {share:.4g} % | {seconds:.0f} |", flush=True)

    def fuzzed(name: str) -> tuple[str, dict, float]:
        began, keep = time.monotonic(), Path(config.keep) if config.keep else None
        found = fuzz.run(name, -(-config.cases // len(fuzz.FORMATS)), config.seed, keep)
        return name, found, time.monotonic() - began

    for name, suite in (("killed at a random moment; resumed, same bits", killed),
                        ("one of several processes killed; the others ended, resumed, same bits", killed_of_several),
                        ("killed, or disk full, at a write; resumed, same bits", written),
                        ("faults simulated by a test", faults)):
        began = time.monotonic()
        row(name, *suite(config), time.monotonic() - began)
    with ThreadPoolExecutor(config.at_once) as pool:
        for name, found, seconds in pool.map(fuzzed, fuzz.FORMATS):
            row(f"damaged: {name}", found["cases"], found["failures"], seconds)
            total += found["cases"]
    print(f"\n{total} damaged files, seed {config.seed}")
    if failures:
        raise InputError("not survived:\n" + "\n".join(failures[:50]))


if __name__ == "__main__":
    command(main)
