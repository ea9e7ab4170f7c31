"""Atomic writes: a reader finds the old file or the new one, never a part of one.

    write_tensors  tensors and a JSON of facts in one safetensors file, with the sha256 of both
    read_tensors   the same back; a changed bit is an error
    lock_folder    a lock: one process at a time works in a folder

All go through config.replacing, as text files do by config.write_text.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from mixdpo.config import InputError, replacing, to_json


class Damaged(InputError):
    """A file whose content differs from what was written."""


# --- tensors ----------------------------------------------------------------------------------------------------------


def save_tensors(part: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    """Writes a safetensors file to `part`, for use within `replacing`. Raises: OSError if the disk refuses."""
    try:
        save_file(tensors, part, metadata)
    except SafetensorError as error:                                        # so safetensors reports a full disk
        raise OSError(f"{part}: {error}") from None
    os.chmod(part, part.parent.stat().st_mode & 0o666)                      # safetensors lets its owner alone read it


def digest(tensors: dict[str, torch.Tensor], facts: str) -> str:
    """sha256 of the facts and of every tensor's name, type, shape and bytes."""
    total = hashlib.sha256(facts.encode())
    for name in sorted(tensors):
        x = tensors[name].detach().cpu().contiguous()
        total.update(f"\n{name} {x.dtype} {tuple(x.shape)}\n".encode())
        total.update(x.reshape(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()


# safetensors writes its metadata in no fixed order. With one key, equal content gives equal bytes. Files that earlier
# versions wrote have this key too.
KEY = "whole"


def write_tensors(path: Path, tensors: dict[str, torch.Tensor], facts: dict) -> None:
    """Writes tensors and facts atomically, with their sha256. Raises: OSError; `path` keeps its old content then."""
    text = to_json(facts)
    with replacing(path) as part:
        save_tensors(part, tensors, {KEY: json.dumps([digest(tensors, text), text])})


def read_tensors(path: Path) -> tuple[dict[str, torch.Tensor], dict]:
    """The tensors and facts of a file by `write_tensors`. Raises: Damaged if its content has changed since."""
    try:
        with safe_open(path, framework="pt") as file:
            sha256, text = json.loads((file.metadata() or {})[KEY])
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, LookupError, TypeError, AttributeError, ValueError) as error:
        raise Damaged(f"is incomplete or was not written by this program ({error})", file=path) from None
    if digest(tensors, text) != sha256:
        raise Damaged("its content has changed since it was written: the sha256 differs", file=path)
    return tensors, json.loads(text)


# --- folders ----------------------------------------------------------------------------------------------------------


def must_be_writable(folder: Path) -> None:
    """Raises: OSError, with the system's error number, if the folder cannot be written to. This holds for root too."""
    if not os.access(folder, os.W_OK):
        number = errno.EROFS if os.statvfs(folder).f_flag & os.ST_RDONLY else errno.EACCES
        raise OSError(number, os.strerror(number), str(folder))


def read_json_or_empty(path: Path) -> dict:
    """The object in a JSON file; {} if the file is missing, unreadable or holds no object."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def must_be_own(out: Path, inputs: list[tuple[str, str]], mark: str, fields: set[str],
                early: set[str] | frozenset[str] = frozenset()) -> None:
    """Raises: InputError unless the program may write into the folder `out`.

    It may if `out` is new, empty, or from an earlier run of the same program, and holds no input file.
    inputs: (option, path) of each input. mark: the JSON file that every run writes, with at least these `fields`.
    early: the files that a run writes before `mark`; a run that was killed early has only these.
    """
    for option, path in inputs:
        place = Path(path)
        folder = place if place.is_dir() else place.parent
        if path and place.exists() and out.exists() and out.samefile(folder):
            raise InputError(f"got {out}, which holds the input --{option} {path}; its files could be overwritten: "
                             "choose another folder", option="out")
    if out.exists() and not out.is_dir():
        raise InputError(f"got {out}, which is a file; wanted a folder", option="out")
    names = {path.name for path in (out.iterdir() if out.exists() else ()) if path.suffix != ".part"}
    if not fields <= read_json_or_empty(out / mark).keys() and names - early:
        raise InputError(f"{out} holds files that no run of this program wrote ({', '.join(sorted(names)[:3])}); "
                         "choose a folder that is new or empty", option="out")


@contextlib.contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Creates the folder and locks it for this process; at the end an empty new folder is removed again.

    The system drops the lock when the process ends, however it ends. Raises: InputError if another process has it.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError("another process is using this folder; wait until it ends, or choose another folder",
                             file=folder) from None
        yield
    finally:
        os.close(descriptor)
        with contextlib.suppress(OSError):                                  # not empty
            for path in made:
                path.rmdir()
