"""Reads the rows of a file: .jsonl, .json, .csv, .tsv, each also with .gz, and .parquet.

A .json file holds one array of objects, or an object on each line like a .jsonl file.

A row is a dict. Rows are numbered from 1: in JSON Lines by line, in other files by row, because a text in a .csv file
may have many lines. Every value of a .csv or .tsv file is a string.
"""

import csv
import gzip
import json
from collections.abc import Iterator
from pathlib import Path

from mixdpo.config import InputError, reading
from mixdpo.text.records import lines

KINDS = (".jsonl", ".json", ".csv", ".tsv", ".parquet")


def rows(path) -> Iterator[tuple[int, dict]]:
    """Yields (row number, row). Raises: InputError naming the file and, where there is one, the row."""
    path = Path(path)
    kind = Path(path.name.removesuffix(".gz")).suffix
    if kind not in KINDS or path.name.endswith(".parquet.gz"):
        raise InputError(f"its name ends in {path.suffix!r}; wanted {', '.join(KINDS)}, or .gz after one of the first "
                         "four", file=path)
    if not path.is_file():
        raise InputError("no such file", file=path)
    readers = {".jsonl": json_lines, ".json": json_array, ".parquet": parquet}
    found = readers[kind](path) if kind in readers else table(path, "\t" if kind == ".tsv" else ",")
    for number, row in found:
        if not isinstance(row, dict):
            raise InputError(f"is a {type(row).__name__}, wanted an object with named fields", file=path, line=number)
        yield number, row


def json_lines(path: Path):
    for number, raw in enumerate(lines(path), 1):
        if raw.strip():
            try:
                yield number, json.loads(raw.decode("utf-8-sig"))
            except (ValueError, RecursionError) as error:                   # UnicodeDecodeError is a ValueError
                raise InputError(f"{error}; wanted one JSON object on the line", file=path, line=number) from None


def json_array(path: Path):
    with opened(path) as file, reading(path, "wanted an array of objects, [{...}, {...}], or one object on each line"):
        if not file.read(1000).lstrip().startswith("["):
            yield from json_lines(path)
            return
        file.seek(0)
        found = json.load(file)
    yield from enumerate(found, 1)


def table(path: Path, delimiter: str):
    csv.field_size_limit(2**26)                                             # the default, 128 KiB, is less than a chat
    with opened(path) as file:
        reader = csv.DictReader(file, delimiter=delimiter, strict=True)
        number = 0
        try:
            for number, row in enumerate(reader, 1):
                if None in row or None in row.values():
                    raise InputError(f"has another number of fields than the {len(reader.fieldnames or ())} of the "
                                     "first line; quote fields that hold a separator", file=path, line=number)
                yield number, row
        except (csv.Error, UnicodeDecodeError) as error:
            raise InputError(f"{error}; wanted a table in UTF-8", file=path, line=number + 1) from None


def parquet(path: Path):
    try:
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise InputError("reading .parquet needs pyarrow; run `pip install pyarrow`, or convert the file to .jsonl",
                         file=path) from None
    with reading(path), ParquetFile(path) as file:
        number = 0
        for batch in file.iter_batches(batch_size=1000):
            for number, row in enumerate(batch.to_pylist(), number + 1):
                yield number, row


def opened(path: Path):
    """The file as text, without a byte order mark; line breaks inside of quoted fields stay as they are."""
    return (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8-sig", newline="")
