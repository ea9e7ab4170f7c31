"""Time and memory of one optimizer step, ours and others': `python -m tests.bench.step` (`make bench`).

Time: all variants are in one process. In every round each makes one step, in a newly shuffled order, so that a
disturbance of the machine affects all of them. Results are medians over rounds of CPU-seconds (all threads; idle
workers sleep) and of wall time; on a GPU, of the device's event clock and of wall time. Memory: each variant has its
own process, see memory.py. What several processes exchange: see exchange.py. Each ratio is printed with its target,
reached or missed; nothing is asserted. Absolute times depend on the machine; ratios are the result. All rows together
need about 20 GB and an otherwise idle machine.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: idle workers that spin count as CPU time

import importlib.metadata  # noqa: E402
import importlib.util  # noqa: E402
import json  # noqa: E402
import math  # noqa: E402
import random  # noqa: E402
import statistics  # noqa: E402
import sys  # noqa: E402
import tempfile  # noqa: E402
import time  # noqa: E402
from dataclasses import asdict, dataclass  # noqa: E402
from pathlib import Path  # noqa: E402

import torch  # noqa: E402

from mixdpo.config import InputError, command, parse, write_text  # noqa: E402
from mixdpo.fast.memory import tune_process  # noqa: E402
from mixdpo.runs.log import environment  # noqa: E402
from tests.bench import exchange, memory  # noqa: E402
from tests.bench.parts import ROWS  # noqa: E402
from tests.bench.variants import SIZES, VARIANTS, Setting, Stepper, make_setting  # noqa: E402


@dataclass(frozen=True)
class BenchConfig:
    """Time and peak memory of one optimizer step, compared with plain PyTorch and TRL."""

    sizes: str = "gpt2-4"                   # gpt2-4: GPT-2 124M, 4 pairs of 32 + 96 tokens; gpt2-64, llama-1b: for a
                                            # GPU; quick: checks that everything runs, its ratios mean nothing
    rounds: int = 7                         # timed steps of each variant; at least 5 for a result
    variants: tuple[str, ...] = ()          # rows to measure, by key, comma-separated; empty: all
    memory: bool = True                     # true: measure peak memory too, in one process for each variant
    keep_pages: bool = False                # true: the process keeps freed pages, as train.py's does (fast/memory.py);
                                            # that makes the steps of all rows faster, also those of other libraries
    exchange: bool = True                   # true: measure what 1 and 2 processes exchange too (on a CPU)
    device: str = "cpu"                     # cpu or cuda
    seed: int = 0                           # seed of the weights, the pairs and the order within rounds
    out: str = "runs/bench.json"            # file for the results


# (row, compared with, figure, at most)
TARGETS = [
    ("k1", "trl", "time", 0.40),
    ("k1", "trl-precomputed", "time", 0.53),
    ("k1", "plain", "time", 0.77),
    ("k1-bf16", "k1", "time", 0.65),
    ("k4-low-rank", "k1", "time", 1.15),
    ("k4-full", "k1", "time", 1.85),
    ("k4-models", "k1", "time", 4.0),
    ("em", "k1", "time", 0.01),
    ("head-tiled", "head-full", "time", 1.1),
    ("head-kept", "head-products", "time", 1.3),
    ("long-shared", "long-plain", "time", 0.70),
    ("generate", "generate-transformers", "time", 0.6),
    ("k1", "plain", "memory", 0.5),
    ("k1", "plain-transformers", "memory", 0.5),
    ("head-tiled", "head-full", "memory", 0.10),
]


def timed(step, device: str) -> tuple[float, float]:
    """Seconds of one step: (CPU-seconds or, on a GPU, device seconds; wall seconds)."""
    if device == "cuda":
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        wall = time.perf_counter()
        begin.record()
        step()
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end) / 1e3, time.perf_counter() - wall
    cpu, wall = time.process_time(), time.perf_counter()
    step()
    return time.process_time() - cpu, time.perf_counter() - wall


def build(name: str, setting: Setting) -> Stepper:
    """A row after two warm-up steps. Asserts that the first loss of an optimizer step is DPO's first loss, ln 2."""
    made = ROWS[name].build(setting)
    loss = made.step() if made.first is None else made.first
    if name in VARIANTS:
        assert abs(float(loss) - math.log(2)) < 0.02, f"{name}: the first loss is {loss}, want ln 2"
    made.step()
    return made


def time_all(names: list[str], setting: Setting, rounds: int, seed: int) -> tuple[dict, dict[str, Stepper]]:
    """-> {name: a (CPU, wall) pair for each round}; {name: the row's step}."""
    steppers, samples = {name: build(name, setting) for name in names}, {name: [] for name in names}
    order = random.Random(seed)
    for n in range(rounds):
        for name in order.sample(names, len(names)):
            samples[name].append(timed(steppers[name].step, setting.device))
        print(f"round {n + 1}/{rounds}", file=sys.stderr, flush=True)
    return samples, steppers


def summary(samples: list[tuple[float, float]], used: dict[str, float] | None) -> dict:
    """One row's figures: medians and every sample in seconds, memory in MB."""
    cpu, wall = zip(*samples)
    medians = {"cpu": statistics.median(cpu), "wall": statistics.median(wall)}
    return medians | {"samples": {"cpu": cpu, "wall": wall}, "memory": used}


def measured_rates(dtypes: set[torch.dtype], device: str) -> dict[str, float]:
    """Rates of this machine: FLOPs per second of a large matrix product in each dtype, bytes per second of a copy."""
    n = 8192 if device == "cuda" else 2048

    def best(work) -> float:
        work()
        return min(timed(work, device)[1] for _ in range(9))                # the minimum: the machine's best rate

    rates = {}
    for dtype in dtypes:
        a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
        rates[str(dtype).removeprefix("torch.")] = 2 * n**3 / best(lambda: a @ b)
    source = torch.ones(2**26, device=device)
    target = torch.empty_like(source)
    return rates | {"bytes": 2 * 4 * source.numel() / best(lambda: target.copy_(source))}


def roofline(rows: dict[str, dict], steppers: dict[str, Stepper], device: str) -> dict:
    """For each row with counted FLOPs: the shortest possible wall time for its FLOPs and bytes at the measured rates,
    and that time as a fraction of the measured wall time."""
    counted = {name: steppers[name] for name in rows if steppers[name].flops}
    rates = measured_rates({stepper.dtype for stepper in counted.values()}, device)
    out = {"rates": rates, "rows": {}}
    for name, stepper in counted.items():
        floor = max(stepper.flops / rates[str(stepper.dtype).removeprefix("torch.")], stepper.bytes / rates["bytes"])
        share = floor / rows[name]["wall"]
        out["rows"][name] = {"flops": stepper.flops, "bytes": stepper.bytes, "floor": floor, "share": share}
    return out


def roofline_table(found: dict) -> str:
    """The result of `roofline` as printed text."""
    rates = ", ".join(f"{rate / 1e9:.0f} G{'B' if name == 'bytes' else 'FLOP'}/s ({name})"
                      for name, rate in found["rates"].items())
    lines = [f"at the rates of this machine, {rates}:"]
    for name, row in found["rows"].items():
        lines.append(f"{ROWS[name].title:58}{row['flops'] / 1e9:10.0f} GFLOP{row['bytes'] / 1e9:8.2f} GB, at least "
                     f"{row['floor']:.4f} s: {row['share']:.0%} of that rate")
    return "\n".join(lines)


def ratios(rows: dict[str, dict], targets: list[tuple] = TARGETS) -> list[dict]:
    """For each target whose two rows were measured: its ratios, and whether all of them are within the limit."""
    found = []
    for row, base, figure, limit in targets:
        a, b, keys = rows.get(row), rows.get(base), ("cpu", "wall")
        if figure == "memory":
            a, b, keys = a and a["memory"], b and b["memory"], ("step",)
        if a and b:
            values = {key: a[key] / b[key] for key in keys}
            target = {"row": row, "base": base, "figure": figure, "limit": limit}
            found.append(target | {"ratio": values, "reached": max(values.values()) <= limit})
    return found


def table(rows: dict[str, dict], found: list[dict], skipped: dict[str, list[str]], clock: str) -> str:
    """All results as printed text. clock: the name of the first clock, CPU or GPU."""
    lines = [f"{'':58}{clock + ' s':>9}{'wall s':>9}{'step MB':>10}{'state MB':>10}{'freed MB':>10}"]
    for name, row in rows.items():
        used = row["memory"]
        figures = "".join(f"{used[key]:10.0f}" for key in ("step", "state", "freed")) if used else f"{'-':>10}" * 3
        lines.append(f"{ROWS[name].title:58}{row['cpu']:9.3f}{row['wall']:9.3f}{figures}")
    for name, packages in skipped.items():
        lines.append(f"{ROWS[name].title:58}  skipped: {', '.join(packages)} not installed")
    lines.append("")
    for target in found:
        values = ", ".join(f"{value:.2f} ({clock if key == 'cpu' else key})" for key, value in target["ratio"].items())
        lines.append(f"{target['figure']}: {ROWS[target['row']].title} / {ROWS[target['base']].title}")
        lines.append(f"    {values}; wanted at most {target['limit']}: {'reached' if target['reached'] else 'MISSED'}")
    return "\n".join(lines)


def processor() -> str:
    """The CPU's name, from the system."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")


def versions() -> dict[str, str]:
    """The installed versions of the packages that the rows use."""
    wanted = {"torch", "numpy", "transformers", "trl", "accelerate", "datasets", "tokenizers"}
    return {d.metadata["Name"]: d.version for d in importlib.metadata.distributions() if d.metadata["Name"] in wanted}


def missing(name: str) -> list[str]:
    """The packages, or the GPU, that a row needs and that are missing."""
    present = {"CUDA": torch.cuda.is_available()}
    return [what for what in ROWS[name].needs if not present.get(what, importlib.util.find_spec(what) is not None)]


def main(argv: list[str]) -> dict:
    config = parse(BenchConfig, argv, "python -m tests.bench.step")
    names = list(config.variants or ROWS)
    if unknown := [name for name in names if name not in ROWS]:
        raise InputError(f"got {', '.join(unknown)}, wanted some of {', '.join(ROWS)}", option="variants")
    skipped = {name: missing(name) for name in names if missing(name)}
    names = [name for name in names if name not in skipped]
    if config.sizes not in SIZES:
        raise InputError(f"got {config.sizes}, wanted one of {', '.join(SIZES)}", option="sizes")
    if config.keep_pages:
        tune_process()
    sizes = SIZES[config.sizes]
    with tempfile.TemporaryDirectory() as folder:
        setting = make_setting(sizes, Path(folder) / "model", config.device, config.seed)
        measure = config.memory and memory.measurable(config.device)
        used = {n: memory.measure(n, setting.directory, sizes, config.device) if measure else None for n in names}
        shared = exchange.measure(setting.directory, sizes, config.rounds) if config.exchange else {}
        samples, steppers = time_all(names, setting, config.rounds, config.seed)
        rows = {name: summary(samples[name], used[name]) for name in names}
        found, roof = ratios(rows), roofline(rows, steppers, config.device)
    if config.sizes == "quick":
        print("tiny sizes: these ratios mean nothing; they only show that everything runs")
    clock = "CPU" if config.device == "cpu" else "GPU"
    print(table(rows, found, skipped, clock), roofline_table(roof), exchange.table(shared), sep="\n\n")
    result = {"config": asdict(config), "sizes": asdict(sizes), "rows": rows, "targets": found, "roofline": roof,
              "exchange": shared, "skipped": skipped,
              "environment": environment() | {"cpu": processor(), "versions": versions()}}
    Path(config.out).parent.mkdir(parents=True, exist_ok=True)
    write_text(Path(config.out), json.dumps(result, indent=1) + "\n")
    return result


if __name__ == "__main__":
    command(main)
