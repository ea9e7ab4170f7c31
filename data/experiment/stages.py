"""Stages of a job: files are written atomically, and again only if their inputs have changed.

Of several processes (`torchrun`, mixdpo/runs/distributed.py) the first one writes; the others wait for it.
"""

import hashlib
import json
import os
import time
from pathlib import Path

from mixdpo.config import to_json
from mixdpo.files import fetch
from mixdpo.runs.distributed import everyone, rank, world
from mixdpo.runs.log import Progress
from mixdpo.runs.parallel import from_first

VERSION = 1     # part of every key; raise it when the result of a stage changes
MISSING = "(none)"      # stands for None in the file of a cell


def write_lines(path: Path, rows) -> None:
    """Writes JSON Lines atomically."""
    part = path.with_name(path.name + ".part")
    with part.open("w", encoding="utf-8") as file:
        file.writelines(to_json(row) + "\n" for row in rows)
    os.replace(part, path)


def read_lines(path: Path, complete: bool = False) -> list[dict]:
    """Reads JSON Lines. complete: skip a last line without line break, which an interruption cut short."""
    lines = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in (lines[:-1] if complete else lines) if line]


def marked(value):
    """The value with MISSING for each None, which to_json would not tell from NaN."""
    if isinstance(value, dict):
        return {key: marked(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [marked(part) for part in value]
    return MISSING if value is None else value


def numbers(value):
    """Restores what to_json cannot write: null is NaN, "inf" and "-inf" are infinities, and MISSING is None."""
    if isinstance(value, dict):
        return {key: numbers(part) for key, part in value.items()}
    if isinstance(value, list):
        return [numbers(part) for part in value]
    if value == MISSING:
        return None
    return float("nan" if value is None else value) if value in (None, "inf", "-inf") else value


def line_by_line(path: Path, key: str, items: list, size: int, work, name: str) -> None:
    """Writes one line for each item. work(n, part) -> one object for each item of part, at most `size` items from item
    n on. An interrupted file is resumed in the same parts, so the bytes do not change. key: lines written under another
    key are not used. Each process of several writes a file of its own part of the items; the first one joins them."""
    shares = [path.with_name(f"{path.name}.{key[:12]}" + f".{r}-of-{world()}" * (world() > 1)) for r in range(world())]
    first, last = (len(items) * r // world() for r in (rank(), rank() + 1))
    done = read_lines(shares[rank()], complete=True) if shares[rank()].is_file() else []
    done = done[: len(done) // size * size] if first + len(done) < last else done           # complete parts
    write_lines(shares[rank()], done)
    progress = Progress(name, len(done))
    with shares[rank()].open("a", encoding="utf-8") as out:
        for start in range(first + len(done), last, size):
            part = items[start : min(start + size, last)]
            out.writelines(to_json(row) + "\n" for row in work(start, part))
            out.flush()
            progress(start + len(part) - first, last - first)
    everyone(None)
    if rank() == 0:
        joined = shares[0].with_name(path.name + ".part")
        joined.write_bytes(b"".join(share.read_bytes() for share in shares))
        os.replace(joined, path)
        for share in path.parent.glob(f"{path.name}.{key[:12]}*"):          # those of another number of processes, too
            share.unlink()
    everyone(None)


def key_of(*inputs) -> str:
    """sha256 of the inputs: settings as JSON, Paths by the bytes of their files."""
    parts = [fetch.sha256_of(i) if isinstance(i, Path) else json.dumps(i, sort_keys=True) for i in (VERSION, *inputs)]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def stage(job: Path, name: str, key: str, files: list[str], make, together: bool = False) -> None:
    """Runs make(), which writes `files` into the job's folder and returns a summary or None; prints one line. make() is
    skipped if the files exist and were written under the same key. together: every process calls make(), not only the
    first."""
    mark, began = job / "stages" / name, time.monotonic()
    if from_first(lambda: mark.is_file() and mark.read_text() == key and all((job / file).is_file() for file in files)):
        print(f"[{name}] finished before")
        return
    if rank() == 0:
        mark.parent.mkdir(parents=True, exist_ok=True)
        mark.unlink(missing_ok=True)    # before its files change: a mark must never stand for files of another key
    summary = make() if together else from_first(make)
    if rank() == 0:
        mark.with_suffix(".part").write_text(key)
        os.replace(mark.with_suffix(".part"), mark)
    print(f"[{name}] {time.monotonic() - began:.0f} s" + (f": {summary}" if summary else ""))
