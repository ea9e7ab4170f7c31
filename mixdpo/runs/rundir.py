"""A run's directory: config.json, metrics.jsonl, responsibilities.jsonl, checkpoint/, and what a run prints about
itself. No pickle: tensors are safetensors, the rest JSON.

    checkpoint/00000042.safetensors      after step 42: all that the next step depends on (files/atomic.py)

Batches, noise and starts are functions of (seed, step), so there is no random state to keep; a run resumed from any
checkpoint ends as the uninterrupted one does, to the bit.
"""

import json
import math
import os
import platform
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from pathlib import Path

import torch

from mixdpo.config import InputError, Stopped, to_json, write_whole
from mixdpo.metrics import WINDOW, alarms
from mixdpo.files.atomic import Damaged, must_be_own, read_tensors, write_tensors


def revision() -> str:
    """The git revision of this source tree, with + behind it if files differ from it;
    "unknown" outside a repository."""
    root = Path(__file__).resolve().parent.parent
    call = subprocess.run(["git", "-C", str(root), "describe", "--always", "--dirty=+", "--abbrev=10"],
                          capture_output=True, text=True)
    return call.stdout.strip() if call.returncode == 0 else "unknown"


def environment() -> dict:
    """What a number depends on besides the configuration."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    return {"revision": revision(), "torch": torch.__version__, "python": platform.python_version(), "device": device,
            "threads": torch.get_num_threads()}


def compute_dtype(name: str, device: str) -> tuple[torch.dtype, str]:
    """The one dtype of a run's products, and why:
    "auto" is bfloat16 where the device has units for it, else float32."""
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    if name in known:
        return known[name], "as asked"
    if name != "auto":
        raise InputError(f"got {name!r}, wanted auto, float32 or bfloat16", option="dtype")
    if device == "cuda":
        if torch.cuda.is_bf16_supported():
            return torch.bfloat16, "the GPU has bfloat16 units"
        return torch.float32, "the GPU has no bfloat16"
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    units = [unit for unit in ("amx_bf16", "avx512_bf16") if unit in flags]
    if units:
        return torch.bfloat16, f"the processor has {units[0]}"
    return torch.float32, "the processor has no bfloat16 units"


def must_be_run(config) -> None:
    """Raises: InputError unless a run of this TrainConfig may write into its --out."""
    before = {"noise-key", "privacy.json", "checkpoint", "metrics.jsonl", "responsibilities.jsonl"}
    inputs = [("data", config.data), *(("model", model) for model in config.models)]
    must_be_own(Path(config.out), inputs, "config.json", {"data", "model", "out", "experts"}, before)


class Progress:
    """One line on stderr: steps, rate, time left. On a terminal it rewrites itself;
    in a file a line every 20 seconds."""

    def __init__(self, name: str, first: int = 0):                          # first: what was done before, not now
        self.name, self.began, self.first, self.last = name, time.monotonic(), first, 0.0

    def __call__(self, done: int, total: int, note: str = "") -> None:
        now, live = time.monotonic(), sys.stderr.isatty()
        if done < total and now - self.last < (0.5 if live else 20):
            return
        self.last, rate = now, (done - self.first) / max(now - self.began, 1e-9)
        left = time.strftime("%H:%M:%S", time.gmtime((total - done) / max(rate, 1e-9)))
        line = f"{self.name} {done}/{total}  {rate:.2f}/s  {left} left  {note}"
        end = "\n" if done >= total or not live else ""
        print(f"\r{line:<118}" if live else line, end=end, file=sys.stderr, flush=True)


def with_nan(value):
    """Figures as they were before to_json wrote NaN as null."""
    if isinstance(value, dict):
        return {key: with_nan(part) for key, part in value.items()}
    return [with_nan(part) for part in value] if isinstance(value, list) else math.nan if value is None else value


class Log:
    """metrics.jsonl and responsibilities.jsonl, a line a step each, the progress line, and alarms, each told once."""

    def __init__(self, run: Path, t: int, total: int, config):              # t: steps done before; later lines go
        self.metrics, self.q = keep_lines(run / "metrics.jsonl", t), keep_lines(run / "responsibilities.jsonl", t)
        lines = map(with_nan, map(json.loads, (run / "metrics.jsonl").read_text().splitlines()))
        self.history = deque((step for step in lines if step.get("pairs", 1)), maxlen=WINDOW)   # what alarms look at
        self.total, self.config, self.progress, self.rung = total, config, Progress(run.name, t), set()

    def step(self, figures: dict, groups: list[int], log_q: torch.Tensor) -> None:
        """One step's figures, and the responsibilities (G,K) that it used."""
        t = figures["step"]
        if figures.get("pairs", 1):                                         # none: a private step that drew no example
            self.history.append(figures)
        self.write(self.metrics, to_json(figures))
        self.responsibilities(t, groups, log_q)
        accuracy = " ".join(f"{a:.2f}" for a in figures["accuracy"])
        self.progress(t, self.total, f"loss {figures['loss']:.4f}  bound {figures['bound']:.4f}  accuracy {accuracy}")
        for name, what in alarms(self.history, self.config.experts, self.config.start_steps).items():
            if name not in self.rung:
                print(f"ALARM at step {t}, {name}: {what}")
                self.rung.add(name)

    def responsibilities(self, t: int, groups: list[int], log_q: torch.Tensor) -> None:
        q = log_q.exp().mul(1e4).round().div(1e4).tolist()                  # to four digits
        self.write(self.q, to_json({"step": t, "groups": groups, "q": q}))

    def write(self, file, line: str) -> None:
        """One line, now. Raises: OSError that names the file, which the system's own does not."""
        try:
            file.write(line + "\n")
            file.flush()
        except OSError as error:
            raise OSError(error.errno, os.strerror(error.errno), file.name) from None

    def sync(self) -> None:
        """Lines before the checkpoint that counts on them."""
        os.fsync(self.metrics.fileno()), os.fsync(self.q.fileno())

    def close(self) -> None:
        self.metrics.close(), self.q.close()


def checkpoints(run: Path) -> list[Path]:
    """The run's checkpoints, the newest first."""
    return sorted((run / "checkpoint").glob("*.safetensors"), reverse=True)


def save_checkpoint(run: Path, tensors: dict[str, torch.Tensor], state: dict, keep: int) -> None:
    """Writes the checkpoint of state["step"], whole or not at all; then only the newest `keep` stay."""
    (run / "checkpoint").mkdir(exist_ok=True)
    for left in [*(run / "checkpoint").glob("*.part"), *(run / "checkpoint").glob(".tmp*")]:        # of a process that
        left.unlink()                                                       # was killed; .tmp*: safetensors' own
    write_tensors(run / "checkpoint" / f"{state['step']:08d}.safetensors", tensors, state)
    for old in checkpoints(run)[keep:]:
        old.unlink()


def load_checkpoint(run: Path, config: dict) -> tuple[dict[str, torch.Tensor], dict] | None:
    """The run's newest whole checkpoint, or None; one that is damaged is named and passed over.
    Raises: InputError if none is whole, or if it was written by another configuration, naming the fields."""
    for path in checkpoints(run):
        try:
            tensors, state = read_tensors(path)
            break
        except Damaged as damaged:
            print(f"{damaged}; the checkpoint before it is used")
    else:
        if checkpoints(run):
            raise InputError(f"no checkpoint in it is whole; remove {run}, and begin again", file=run / "checkpoint")
        return None
    differ = [k for k in config if to_json(state["config"].get(k)) != to_json(config[k])]   # a list is like a tuple
    if differ:
        what = "; ".join(f"{k}: there {state['config'].get(k)!r}, now {config[k]!r}" for k in differ)
        raise InputError(f"is the checkpoint of another configuration ({what}); use another --out, or the same options "
                         "to go on", file=path)
    return tensors, state


def keep_lines(path: Path, steps: int):
    """A file with one line a step, opened for appending behind its first `steps` lines: a step done again writes anew.
    Raises: InputError if they are fewer."""
    kept = path.read_bytes().splitlines(keepends=True)[:steps] if path.exists() and steps else []
    if len(kept) < steps or kept and not kept[-1].endswith(b"\n"):
        raise InputError(f"has {len(kept)} whole lines, and its checkpoint wants {steps}: it was cut or taken away. "
                         f"Remove {path.parent}, and begin again", file=path)
    write_whole(path, b"".join(kept).decode())
    return path.open("a")


class Stop:
    """Within it, SIGINT and SIGTERM are wishes: `asked` is true, and the loop ends after its step. The second one stops
    at once. Elsewhere than in the main thread signals stay as they are. name: of what is stopped."""

    def __init__(self, name: str = ""):
        self.name = name

    def check(self, message: str | None = None) -> None:
        """Raises: Stopped if it was asked for."""
        if self.asked:
            raise Stopped(f"{self.name}: {message or 'stopped before its first step'}")

    def __enter__(self):
        self.asked, main = False, threading.current_thread() is threading.main_thread()
        self.before = {number: signal.signal(number, self.ask) for number in (signal.SIGINT, signal.SIGTERM) if main}
        return self

    def ask(self, number, frame):
        if self.asked:
            raise KeyboardInterrupt("stopped at once")
        self.asked = True
        print("\nstopping after this step; once more stops at once", file=sys.stderr, flush=True)

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)
