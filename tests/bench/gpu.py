"""Tests and measurements on a GPU, in one command that takes less than ten minutes and needs no network:
`python -m tests.bench.gpu` (`make bench-gpu`). It runs the tests of kernels and models on the device; then the rows of
step.py at three sizes, with targets for an H100, memory, and the fraction of the hardware's rate. The results go to
docs/results/h100.md and runs/h100.json.
"""

import json
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from mixdpo.config import InputError, command, parse, write_text
from mixdpo.runs.log import environment
from tests.bench import (
    memory,
    step,  # first: it sets how threads wait
)
from tests.bench.variants import SIZES, make_setting

PEAK = 989e12                           # dense bf16 FLOPs per second of an H100 SXM, from its data sheet
TESTS = ["tests/method/test_kernels.py", "tests/models/test_models.py", "tests/method/test_logprob.py"]


@dataclass(frozen=True)
class Part:
    """Rows at one size; the rows whose memory is measured too; targets (row, compared with, figure, at most)."""

    sizes: str
    rows: tuple[str, ...]
    memory: tuple[str, ...]
    targets: list[tuple]


PARTS = [
    Part("gpt2-64", ("k1", "k4-low-rank", "k4-full", "k4-models", "plain", "trl", "trl-precomputed", "em", "head-tiled",
                     "head-full", "head-kept", "head-products", "head-trl", "head-cut", "long-shared", "long-plain",
                     "generate", "generate-transformers"), ("k1", "plain", "head-tiled", "head-full"),
         [("k1", "trl", "time", 0.25), ("k1", "trl-precomputed", "time", 0.40), ("k1", "plain", "time", 0.6),
          ("k4-low-rank", "k1", "time", 1.15), ("k4-full", "k1", "time", 1.8), ("k4-models", "k1", "time", 4.0),
          ("em", "k1", "time", 0.01), ("head-kept", "head-products", "time", 1.43),
          ("head-kept", "head-trl", "time", 1 / 1.3), ("head-kept", "head-cut", "time", 1 / 1.3),
          ("long-shared", "long-plain", "time", 0.70), ("generate", "generate-transformers", "time", 0.5),
          ("k1", "plain", "memory", 0.30)]),
    Part("gpt2-4", ("k1", "trl", "trl-precomputed", "head-kept", "head-liger"), (),
         [("k1", "trl", "time", 0.10), ("head-kept", "head-liger", "time", 1 / 12)]),
    Part("llama-1b", ("k1", "k4-low-rank", "k4-full", "head-kept", "head-products", "head-trl", "head-cut"),
         ("k4-models-lean",),
         [("head-kept", "head-products", "time", 1.18), ("k4-full", "k1", "time", 1.8),
          ("head-kept", "head-trl", "time", 1 / 1.3), ("head-kept", "head-cut", "time", 1 / 1.3)]),
]


@dataclass(frozen=True)
class GpuConfig:
    """Correctness, time and memory on a GPU, compared with plain PyTorch and the installed peers."""

    rounds: int = 7                         # timed steps of each row; at least 5 for a result
    quick: bool = False                     # true: tiny sizes, to check that everything runs; the results mean nothing
    device: str = "cuda"                    # cuda; or cpu, with --quick true, to check that everything runs
    out: str = "docs/results/h100.md"       # file for the report
    figures: str = "runs/h100.json"         # file for the numbers


def measure(part: Part, config: GpuConfig) -> dict:
    """The results of one part, in step.py's form."""
    sizes = SIZES["quick" if config.quick else part.sizes]
    skipped = {name: step.missing(name) for name in part.rows if step.missing(name)}
    names = [name for name in part.rows if name not in skipped]
    with tempfile.TemporaryDirectory() as folder:
        setting = make_setting(sizes, Path(folder) / "model", config.device)
        used = {name: memory.measure(name, setting.directory, sizes, config.device) for name in part.memory}
        samples, steppers = step.time_all(names, setting, config.rounds, 0)
        rows = {name: step.summary(samples[name], used.get(name)) for name in names}
        roof = step.roofline(rows, steppers, config.device)
    return {"sizes": asdict(sizes), "rows": rows, "memory": used, "targets": step.ratios(rows, part.targets),
            "roofline": roof, "skipped": skipped}


def report(found: dict) -> str:
    """The results as Markdown."""
    facts, lines = found["environment"], ["# On a GPU", ""]
    lines += [f"`make bench-gpu` at revision {facts['revision']}: {facts['device']}, torch {facts['torch']}, Python "
              f"{facts['python']}; {found['minutes']:.1f} minutes.", "", f"Tests: {found['tests']}.", ""]
    for name, part in found["parts"].items():
        roof = part["roofline"]["rows"]
        lines += [f"## {name}", "", "| row | ms | TFLOP/s | of 989 | of the measured rate | step memory, MB |",
                  "|---|---|---|---|---|---|"]
        for key, row in part["rows"].items():
            of = roof.get(key)
            rate = of and of["flops"] / row["cpu"]                          # "cpu": the device's clock
            figures = f"{rate / 1e12:.1f} | {rate / PEAK:.1%} | {of['share']:.0%}" if of else "– | – | –"
            used = f"{part['memory'][key]['step']:.0f}" if key in part["memory"] else "–"
            lines.append(f"| {step.ROWS[key].title} | {1e3 * row['cpu']:.2f} | {figures} | {used} |")
        for key, used in part["memory"].items():
            if key not in part["rows"]:
                lines += ["", f"{step.ROWS[key].title}: {used['level'] + used['freed']:.0f} MB at its peak, of which "
                          f"{used['state']:.0f} are weights, gradients and moments by count."]
        lines += ["", "| target | at most | measured | |", "|---|---|---|---|"]
        for t in part["targets"]:
            clocks = {"cpu": "GPU"}                                         # step.py's name for the device's own
            measured = ", ".join(f"{value:.2f} ({clocks.get(key, key)})" for key, value in t["ratio"].items())
            what = f"{t['figure']}: {step.ROWS[t['row']].title} / {step.ROWS[t['base']].title}"
            lines.append(f"| {what} | {t['limit']:.2f} | {measured} | {'reached' if t['reached'] else 'missed'} |")
        lines += ["", *(f"Skipped: {step.ROWS[key].title} ({', '.join(needs)} not installed)."
                        for key, needs in part["skipped"].items()), ""]
    return "\n".join(lines)


def main(argv: list[str]) -> dict:
    config, began = parse(GpuConfig, argv, "python -m tests.bench.gpu"), time.monotonic()
    if config.device == "cuda" and not torch.cuda.is_available():
        raise InputError("no CUDA device; use --device cpu --quick true to check that everything runs")
    tests = "not run"
    if not config.quick:
        call = subprocess.run([sys.executable, "-m", "pytest", "-q", *TESTS], capture_output=True, text=True)
        tests = call.stdout.strip().splitlines()[-1] if call.stdout.strip() else f"exit status {call.returncode}"
        print(call.stdout[-4000:])
    found = {"environment": environment(), "tests": tests, "parts": {}}
    for part in PARTS:
        found["parts"][part.sizes] = measure(part, config)
        found["minutes"] = (time.monotonic() - began) / 60
        for path, text in ((config.figures, json.dumps(found, indent=1) + "\n"), (config.out, report(found))):
            Path(path).parent.mkdir(parents=True, exist_ok=True)            # after each part, in case a later one fails
            write_text(Path(path), text)
    print(report(found))
    return found


if __name__ == "__main__":
    command(main)
