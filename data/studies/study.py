"""A study: a question, independent cells that are measured, and a page made from their figures.

    cells(preset)               settings of all cells, each a dict of plain values
    measure(cell, folder)       figures of a cell, plain values; `folder` is removed afterwards. It is empty at first;
                                if the study `resumes`, as an interrupted call at the same revision left it
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
from mixdpo.runs.log import Progress, environment, revision

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
    resumes: bool = False               # whether `measure` goes on in the folder of an interrupted call


def measured(name: str, cell: dict, home: Path) -> dict:
    """Measures one cell, or reads its stored figures. Output of its runs goes to a log file."""
    study, code = study_of(name), revision()
    key = key_of(cell, study.version)[:20]
    path, folder = home / name / f"{key}.json", home / name / f"{key}-{code}.work"
    if path.is_file():
        return facts_of(path)
    torch.set_num_threads(1)                                                # cells run in parallel, not threads
    if not study.resumes or code.endswith("+") or code == "unknown":        # then another call's code may be other code
        shutil.rmtree(folder, ignore_errors=True)
    resumed, began = folder.exists(), time.monotonic()
    folder.mkdir(parents=True, exist_ok=True)
    with open(home / name / f"{key}.log", "a") as log, contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
        try:
            found = study.measure(cell, folder)
        except InputError as error:
            message = f"{error.message} (study {name}, {cell})"
            raise InputError(message, error.file, error.line, error.option) from None
    facts = {"cell": cell, "figures": found, "seconds": time.monotonic() - began, "resumed": resumed,
             "environment": environment()}
    write_text(path, to_json(marked(facts)) + "\n")
    for left in (home / name).glob(f"{key}*.work"):                         # of other revisions too
        shutil.rmtree(left)
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
    """The command, time and revision of a page. seconds: of all calls that ended."""
    revisions = sorted({row["environment"]["revision"] for row in facts})
    where = facts[0]["environment"]
    less = " and those of interrupted calls" if any(row.get("resumed") for row in facts) else ""
    return (f"`make study NAME={name} PRESET={preset}`: {len(facts)} cells, {sum(r['seconds'] for r in facts):.0f} "
            f"core seconds{less}; calls that ended took {seconds / 60:.1f} minutes on {os.cpu_count()} cores; measured "
            f"at revision {', '.join(revisions)}, torch {where['torch']}, Python {where['python']}.")
