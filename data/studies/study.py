"""A study: a question, independent cells that are measured, and a page made from their figures.

    cells(preset)               settings of all cells, each a dict of plain values
    measure(cell, folder)       figures of a cell, plain values; `folder` is empty at first, and is removed afterwards
    page(rows)                  Markdown and pictures by name; rows: [(cell, figures)]

Cells run in one process for each core, with one thread each. The figures of a cell are stored under a key of its
settings, so that an interrupted study resumes. They record the revision at which they were measured, and the page shows
it.
"""

import contextlib
import json
import multiprocessing
import os
import shutil
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

import torch

from data.experiment.stages import key_of, marked, numbers
from data.studies import study_of
from mixdpo.config import InputError, to_json, write_text
from mixdpo.files.atomic import lock_folder
from mixdpo.runs.log import Progress, environment

PRESETS = ("smoke", "quick", "full")


@dataclass(frozen=True)
class Study:
    """The parts of a study."""

    title: str
    question: str               # Markdown
    cells: Callable
    measure: Callable
    page: Callable
    prepare: Callable | None = None     # (home, preset, data folder): writes what all cells share
    version: int = 1                    # part of every key; raise it when figures of cells change


def measured(name: str, cell: dict, home: Path) -> dict:
    """Measures one cell, or reads its stored figures. Output of its runs goes to a log file."""
    key = key_of(cell, study_of(name).version)[:20]
    path, folder = home / name / f"{key}.json", home / name / f"{key}.work"
    if path.is_file():
        return facts_of(path)
    torch.set_num_threads(1)                                                # cells run in parallel, not threads
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    began = time.monotonic()
    with open(home / name / f"{key}.log", "w") as log, contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
        try:
            found = study_of(name).measure(cell, folder)
        except InputError as error:
            message = f"{error.message} (study {name}, {cell})"
            raise InputError(message, error.file, error.line, error.option) from None
    facts = {"cell": cell, "figures": found, "seconds": time.monotonic() - began, "environment": environment()}
    write_text(path, to_json(marked(facts)) + "\n")
    shutil.rmtree(folder)
    return facts_of(path)


def facts_of(path: Path) -> dict:
    """Reads a cell's file."""
    facts = json.loads(path.read_text())
    return facts | {"figures": numbers(facts["figures"])}


def run(name: str, preset: str, home: Path, data_folder: str) -> list[dict]:
    """Measures all cells of a study; returns them in order."""
    study = study_of(name)
    (home / name).mkdir(parents=True, exist_ok=True)
    with lock_folder(home / name):
        if study.prepare:
            study.prepare(home, preset, data_folder or None)
        cells, progress, done = study.cells(preset), Progress(f"study {name}"), {}
        context, workers = multiprocessing.get_context("spawn"), os.cpu_count() or 1
        with ProcessPoolExecutor(workers, context) as pool:
            waiting = {pool.submit(measured, name, cell, home): n for n, cell in enumerate(cells)}
            try:
                for n, future in enumerate(as_completed(waiting), 1):
                    done[waiting[future]] = future.result()
                    progress(n, len(cells))
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
        return [done[n] for n in range(len(cells))]


def describe_study(facts: list[dict], name: str, preset: str, seconds: float) -> str:
    """The command, time and revision of a page."""
    revisions = sorted({row["environment"]["revision"] for row in facts})
    where = facts[0]["environment"]
    return (f"`make study NAME={name} PRESET={preset}`: {len(facts)} cells, {sum(r['seconds'] for r in facts):.0f} "
            f"core seconds, {seconds / 60:.1f} minutes on {os.cpu_count()} cores; measured at revision "
            f"{', '.join(revisions)}, torch {where['torch']}, Python {where['python']}.")
