"""Files that are whole or not there, and known to be whole.

A file is written under another name, synced, and renamed; its folder is synced too. Whoever reads finds the old one or
the new one. Tensors lie in safetensors, beside a JSON of facts and the sha256 of both: a bit that has turned since is
found when they are read. One process at a time owns a folder.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from mixdpo.config import InputError, to_json


class Damaged(InputError):
    """A file that is not what was written."""


def digest(tensors: dict[str, torch.Tensor], facts: str) -> str:
    """sha256 of the facts and of every tensor's name, type, shape and bytes."""
    total = hashlib.sha256(facts.encode())
    for name in sorted(tensors):
        x = tensors[name].detach().cpu().contiguous()
        total.update(f"\n{name} {x.dtype} {tuple(x.shape)}\n".encode())
        total.update(memoryview(x.reshape(-1).view(torch.uint8).numpy()))
    return total.hexdigest()


def write_tensors(path: Path, tensors: dict[str, torch.Tensor], facts: dict) -> None:
    """Raises: OSError if the disk does not take it; what lay there before still does."""
    part, text = path.with_name(f"{path.name}.{os.getpid()}.part"), to_json(facts)
    try:
        try:
            save_file(tensors, part, {"whole": json.dumps([digest(tensors, text), text])})  # one key: the same bytes
            os.chmod(part, path.parent.stat().st_mode & 0o666)              # it makes them its owner's alone
        except SafetensorError as error:                                    # how it tells of a full disk
            raise OSError(f"{part}: {error}") from None
        sync(part)
        os.replace(part, path)
        sync(path.parent)
    finally:
        part.unlink(missing_ok=True)


def read_tensors(path: Path) -> tuple[dict[str, torch.Tensor], dict]:
    """The tensors and the facts of a file that write_tensors wrote. Raises: Damaged if it is not as it was then."""
    try:
        with safe_open(path, framework="pt") as file:
            sha256, text = json.loads((file.metadata() or {})["whole"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, LookupError, TypeError, AttributeError, ValueError) as error:
        raise Damaged(f"is not whole ({error})", file=path) from None
    if digest(tensors, text) != sha256:
        raise Damaged("its bytes are not those that were written", file=path)
    return tensors, json.loads(text)


def sync(path: Path) -> None:
    """To the disk itself: a file's bytes, or a folder's names."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def must_be_writable(folder: Path) -> None:
    """Raises: OSError, with the system's number, if nothing can be written into the folder; root is asked too."""
    if not os.access(folder, os.W_OK):
        number = errno.EROFS if os.statvfs(folder).f_flag & os.ST_RDONLY else errno.EACCES
        raise OSError(number, os.strerror(number), str(folder))


def noted(path: Path) -> dict:
    """The object of a JSON file; {} if there is none, or none that can be read."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def must_be_own(out: Path, inputs: list[tuple[str, str]], mark: str, fields: set[str], early: set[str] = set()) -> None:
    """Raises: InputError unless `out` may be written into: it is new or empty, or an earlier run of the same program
    wrote it, and it is not the folder of an input, (option, path) each.

    Such a run has a JSON file `mark` with these fields; one that was killed before it has only files named in `early`.
    """
    for option, path in inputs:
        place = Path(path)
        folder = place if place.is_dir() else place.parent
        if path and place.exists() and out.exists() and out.samefile(folder):
            raise InputError(f"got {out}, the folder of --{option} {path}, whose files could be overwritten; choose a "
                             "folder of its own", option="out")
    if out.exists() and not out.is_dir():
        raise InputError(f"got {out}, which is a file; wanted a folder", option="out")
    there = {path.name for path in (out.iterdir() if out.exists() else ()) if path.suffix != ".part"}
    if not fields <= noted(out / mark).keys() and there - early:
        raise InputError(f"{out} holds files that no run of this program wrote ({', '.join(sorted(there)[:3])}); "
                         "choose a folder that is new or empty", option="out")


@contextlib.contextmanager
def alone(folder: Path):
    """Makes the folder, and holds it for this process; one that stays empty is taken away again. The system lets go of
    it whenever the process ends. Raises: InputError if another process holds it."""
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError("another process is at work in it; wait for it, or choose another folder",
                             file=folder) from None
        yield
    finally:
        os.close(descriptor)
        with contextlib.suppress(OSError):                                  # not empty
            for path in made:
                path.rmdir()
