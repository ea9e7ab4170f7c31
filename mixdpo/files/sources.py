"""Sources: the files that an option like --data names.

    prefs.jsonl                 one file
    a.jsonl,b.parquet           several files, which are read as one, in this order
    hub:OWNER/NAME              the files of the split "train" of a data set on the Hugging Face Hub, or of its only one
    hub:OWNER/NAME:SPLIT        those of another split; FOLDER/SPLIT if several folders have it

The container follows from the end of the name, before .gz or .zst: .parquet, .csv, .tsv, .json; every other name is
JSON Lines. A split's files are found by their names: SPLIT-00000-of-00002.parquet, SPLIT.jsonl, SPLIT/anything.json. If
a split has files of several kinds, Parquet is taken before JSON, and JSON before CSV. A split of which a numbered file
is missing, or one file is there in two forms, is an error. The hub's newest revision is read; huggingface_hub downloads
and keeps the files, and reads HF_ENDPOINT and HF_TOKEN.
"""

import functools
import os
import re
from dataclasses import dataclass
from pathlib import Path

from mixdpo.config import InputError

HUB, PACKED = "hub:", (".gz", ".zst")
KINDS = {".parquet": "parquet", ".csv": "csv", ".tsv": "tsv", ".json": "json", ".jsonl": "lines", ".ndjson": "lines"}
PREFERRED = (("parquet",), ("lines", "json"), ("csv", "tsv"))  # of the files of one split on the hub
SPLITS = {"train", "training", "test", "testing", "validation", "valid", "val", "dev", "eval", "evaluation"}
NUMBERED = re.compile(r"(.*)-(\d{5})-of-(\d{5})")


@dataclass(frozen=True)
class DataFile:
    """One file with data."""

    name: str                       # as errors name it
    path: Path
    kind: str                       # lines, json, csv, tsv or parquet


def parts_of(named) -> list[str]:
    """The single files and hub data sets in the value of an option. A comma separates them, unless a file has the
    complete name. Raises: InputError on an empty part, or a part that occurs twice."""
    named = str(named)
    parts = [named] if os.path.exists(named) else named.split(",")          # Path.exists raises for a long list
    if "" in parts or len(set(parts)) < len(parts):
        raise InputError("has an empty or a repeated name between its commas; give each file once", file=named)
    return parts


def data_files(named) -> list[DataFile]:
    """The files that `named` (a path or an option's text) stands for; those of the hub are downloaded. A local file may
    be missing. Raises: InputError."""
    files = []
    for part in parts_of(named):
        files += hub_files(part) if part.startswith(HUB) else [DataFile(part, Path(part), kind_of(part))]
    return files


def missing_file(named) -> str | None:
    """The first local file in `named` that does not exist, or None."""
    return next((part for part in parts_of(named) if not part.startswith(HUB) and not os.path.exists(part)), None)


def short_name(named) -> str:
    """A label: the names of the files without folders and endings."""
    return "+".join(part.rpartition("/")[2] if part.startswith(HUB) else Path(part).stem for part in parts_of(named))


def suffix_of(name: str) -> str:
    """The end of a file's name that says which container it is: ".csv" for "a.csv.gz"."""
    path = Path(name)
    return (path.with_suffix("") if path.suffix in PACKED else path).suffix


def kind_of(name: str) -> str:
    """The container of a file."""
    return KINDS.get(suffix_of(name), "lines")


@functools.cache
def hub_files(named: str) -> list[DataFile]:
    """The downloaded files of hub:OWNER/NAME[:SPLIT]; asked for once per process. Raises: InputError."""
    name, _, split = named.removeprefix(HUB).partition(":")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise InputError("wanted hub:OWNER/NAME or hub:OWNER/NAME:SPLIT; correct the name", file=named)
    try:
        from huggingface_hub import HfApi
    except ImportError:
        raise InputError("needs the package huggingface_hub; run `pip install -e .[files]`, or download the files and "
                         "give their paths", file=named) from None
    try:
        api = HfApi()
        info = api.dataset_info(name)
        chosen = files_of_split([file.rfilename for file in info.siblings or ()], split, named)
        paths = [api.hf_hub_download(name, file, repo_type="dataset", revision=info.sha) for file in chosen]
    except InputError:
        raise
    except Exception as error:                              # its own errors, and those of its HTTP library
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        raise InputError(f"cannot be downloaded: {type(error).__name__}: {reason:.200}; check the name, HF_TOKEN and "
                         "the connection, or download the files and give their paths", file=named) from None
    return [DataFile(f"{HUB}{name}/{file}", Path(path), kind_of(file)) for file, path in zip(chosen, paths)]


def files_of_split(names: list[str], split: str, named: str) -> list[str]:
    """The data files of a split, sorted by name. names: all files of the data set. Raises: InputError if no file, or
    files of several folders or splits, or an incomplete set of files belong to the split."""
    wanted = set((split or "train").split("/"))
    data = sorted(name for name in names if suffix_of(name) in KINDS and not Path(name).name.startswith("."))
    found = [name for name in data if wanted <= {*label(name).split("/")}]
    if not split and not found and len({label(name) for name in data}) == 1:
        found = data
    labels = sorted({label(name) for name in data})
    if not found:
        raise InputError(f"has no data file of the split {split or 'train'!r}; choose one: add a colon and one of "
                         f"{', '.join(labels) or '(it has no data files)'}", file=named)
    found = next(kept for kinds in PREFERRED if (kept := [name for name in found if kind_of(name) in kinds]))
    folders = {name: label(name).rpartition("/")[0] for name in found}
    labels = sorted({folders[name] if wanted <= {*folders[name].split("/")} else label(name) for name in found})
    if len(labels) > 1:
        raise InputError(f"has this split in several folders; choose one: add a colon and one of {', '.join(labels)}",
                         file=named)
    ends = {label(name).rpartition("/")[2] for name in found} - wanted
    if len(words := {re.split(r"[^a-z]", end.lower())[0] for end in ends}) > 1 and words & SPLITS:
        labels = sorted({label(name) for name in found})
        raise InputError(f"has several splits of that name; choose one: add a colon and one of {', '.join(labels)}",
                         file=named)
    check_complete(found, named)
    return found


def check_complete(found: list[str], named: str) -> None:
    """Raises: InputError unless each file of a split is there once: all numbers of NAME-00000-of-00002 to the last, and
    not a.jsonl beside a.jsonl.gz or a.json."""
    numbers: dict[str, list[tuple[int, int]]] = {}                          # NAME -> (number, how many there are)
    forms: dict[str, str] = {}                                              # a name without its ending -> the name
    for name in found:
        if part := NUMBERED.match(name):
            numbers.setdefault(part[1], []).append((int(part[2]), int(part[3])))
        stem = name.removesuffix(Path(name).suffix) if Path(name).suffix in PACKED else name
        if (other := forms.setdefault(stem.removesuffix(suffix_of(name)), name)) != name:
            raise InputError(f"has {other} and {name}, which may hold the same rows; download one and give its path",
                             file=named)
    for stem, given in numbers.items():
        total = max(given)[1]
        if sorted(given) not in ([(n + first, total) for n in range(total)] for first in (0, 1)):
            raise InputError(f"has {len(given)} numbered files of {stem}, which are not one complete set of {total}; "
                             "download the right ones and give their paths", file=named)


def split_of(part: str) -> str:
    """A folder or a file's name without its number: "train" for "train-00000-of-00002"."""
    return re.sub(r"-\d{5}.*", "", part)


def label(name: str) -> str:
    """The folder and the split of a file: "helpful/train" for "helpful/train.jsonl"; numbered files have their
    folder's."""
    *folders, file = name.split("/")
    parts = [*map(split_of, folders), split_of(file.split(".")[0])]
    parts = parts[:-1] if parts[-1].isdigit() and len(parts) > 1 else parts
    return "/".join(parts[1:] if parts[0] == "data" and len(parts) > 1 else parts)
