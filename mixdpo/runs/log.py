"""What a run reports: metrics.jsonl, responsibilities.jsonl, the progress line, and the environment; and to a logger
(loggers.py)."""

import hashlib
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from mixdpo.config import InputError, to_json, write_text
from mixdpo.runs.loggers import NONE, Logger


def revision() -> str:
    """The git revision of this source tree, with + behind it if files differ from it;
    "unknown" outside a repository."""
    root = Path(__file__).resolve().parents[2]
    call = subprocess.run(["git", "-C", str(root), "describe", "--always", "--dirty=+", "--abbrev=10"],
                          capture_output=True, text=True)
    return call.stdout.strip() if call.returncode == 0 else "unknown"


def program_key() -> str:
    """Identifies the content of the program's files, also where there is no repository."""
    found, root = hashlib.sha256(), Path(__file__).resolve().parents[1]
    for path in sorted(root.rglob("*.py")):
        found.update(f"{path.relative_to(root)} {hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return found.hexdigest()


def environment() -> dict:
    """What a number depends on besides the configuration."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    return {"revision": revision(), "torch": torch.__version__, "python": platform.python_version(), "device": device,
            "threads": torch.get_num_threads()}


class Progress:
    """A progress line on stderr: steps, rate, time left. On a terminal the line is rewritten; in a file there is a line
    every 20 seconds. first: steps that were done before. after: called at each call, line or not."""

    def __init__(self, name: str, first: int = 0, after: Callable = lambda: None):
        self.name, self.began, self.first, self.last, self.after = name, time.monotonic(), first, 0.0, after

    def __call__(self, done: int, total: int, note: str = "") -> None:
        self.after()
        now, live = time.monotonic(), sys.stderr.isatty()
        if done < total and now - self.last < (0.5 if live else 20):
            return
        self.last, rate = now, (done - self.first) / max(now - self.began, 1e-9)
        left = time.strftime("%H:%M:%S", time.gmtime((total - done) / max(rate, 1e-9)))
        line = f"{self.name} {done}/{total}  {rate:.2f}/s  {left} left  {note}"
        end = "\n" if done >= total or not live else ""
        print(f"\r{line:<118}" if live else line, end=end, file=sys.stderr, flush=True)


class Log:
    """metrics.jsonl and responsibilities.jsonl, a line a step each, the progress line, and the logger of --log."""

    def __init__(self, run: Path, t: int, total: int, config, writes: bool = True, logger: Logger = NONE):
        """t: steps done before; later lines are removed. writes: False in the processes of a run that do not write."""
        self.metrics, self.q = (keep_lines(run / name, t) if writes else open(os.devnull, "a")
                                for name in ("metrics.jsonl", "responsibilities.jsonl"))
        self.writes, self.logger = writes, logger
        self.total, self.config, self.progress = total, config, Progress(run.name, t)

    def step(self, figures: dict, groups: list[int], log_q: torch.Tensor) -> None:
        """One step's figures, and the responsibilities (G,K) that it used."""
        t = figures["step"]
        self.write(self.metrics, to_json(figures))
        self.responsibilities(t, groups, log_q)
        self.logger.send(t, figures)
        accuracy = " ".join(f"{a:.2f}" for a in figures["accuracy"])
        used = f"  effective experts {figures['effective_experts']:.2f}" if self.config.experts > 1 else ""
        self.progress(t, self.total,
                      f"loss {figures['loss']:.4f}  bound {figures['bound']:.4f}  accuracy {accuracy}{used}")

    def responsibilities(self, t: int, groups: list[int], log_q: torch.Tensor) -> None:
        q = log_q.exp().mul(1e4).round().div(1e4).tolist()                  # to four digits
        self.write(self.q, to_json({"step": t, "groups": groups, "q": q}))

    def write(self, file, line: str) -> None:
        """Writes one line at once. Raises: OSError that names the file."""
        try:
            file.write(line + "\n")
            file.flush()
        except OSError as error:
            raise OSError(error.errno, error.strerror, file.name) from None

    def sync(self) -> None:
        """Syncs both files, and flushes the logger; a checkpoint is written after the lines that it needs."""
        self.logger.flush()
        if self.writes:
            os.fsync(self.metrics.fileno())
            os.fsync(self.q.fileno())

    def close(self) -> None:
        self.metrics.close()
        self.q.close()
        self.logger.close()


def keep_lines(path: Path, steps: int):
    """Opens a file with one line per step for appending after its first `steps` lines; a repeated step writes its line
    again. Raises: InputError if there are fewer lines."""
    kept = path.read_bytes().splitlines(keepends=True)[:steps] if path.exists() and steps else []
    if len(kept) < steps or kept and not kept[-1].endswith(b"\n"):
        raise InputError(f"has {len(kept)} complete lines, but its checkpoint needs {steps}; the file was truncated or "
                         f"deleted. Remove {path.parent} and start again", file=path)
    write_text(path, b"".join(kept).decode())
    return path.open("a")
