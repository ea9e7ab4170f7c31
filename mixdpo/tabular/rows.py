"""Rows: reads a table as integer codes, and writes codes as a table, with the columns of a schema (columns.py).

Codes are (N,d), int64; the docstring of columns.py says what a file may have.
"""

import csv
import gzip
import io
import json
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from mixdpo.config import InputError, reading, write_text
from mixdpo.tabular.columns import Column

ABSENT = {"", "na", "n/a", "nan", "none", "null", "?", "."}     # usual texts of missing values, in lower case


def encode(rows: list[dict], columns: list[Column], file=None, numbers: list[int] | None = None) -> np.ndarray:
    """Codes (N,d) int64 of rows, which are dicts by column name. file, numbers (N,): the rows' file and line numbers,
    for errors. Raises: InputError that names row and column."""
    codes = np.empty((len(rows), len(columns)), dtype=np.int64)
    for j, column in enumerate(columns):
        known = {}                                                          # each value is encoded once
        for n, row in enumerate(rows):
            text = row[column.name]
            if text not in known:
                try:
                    known[text] = column.encode(text)
                except ValueError as error:
                    row_of = "" if numbers else f"row {n + 1}, "
                    raise InputError(f"{row_of}column {column.name!r}: got {text!r:.80}, {error}; "
                                     f"{remedy(column, text)}", file=file,
                                     line=numbers[n] if numbers else None) from None
            codes[n, j] = known[text]
    return codes


def remedy(column: Column, text: str) -> str:
    """What to do about a value that the column does not allow."""
    if column.missing is None and text.strip().lower() in ABSENT:
        return f'if it is a missing value, add "missing": {json.dumps(text)} to the column in the schema'
    if column.values:
        return "correct the row, or add the value to the schema if it is publicly known to be legal"
    return "correct the row, clip the column to the bounds, or choose wider bounds from public knowledge"


def csv_rows(text, path, **options) -> Iterator[tuple[int, list[str]]]:
    """Yields (line number, fields) for each row of CSV. text: a text file or a list of lines; path: for errors.
    Raises: InputError if the text is not CSV."""
    reader = csv.reader(text, **options)
    try:
        for row in reader:
            yield reader.line_num, row
    except csv.Error as error:
        raise InputError(f"not CSV ({error}); separate fields by commas; a field with quotes must have one at each "
                         "end, and quotes inside it must be doubled", file=path, line=reader.line_num) from None


def read_table(path, columns: list[Column]) -> np.ndarray:
    """Codes (N,d) int64 of a .csv or .csv.gz file. Raises: InputError that names file, line and column."""
    if not Path(path).is_file():
        raise InputError("no such file; wanted a table as .csv or .csv.gz", file=path)
    with reading(path, "wanted a table as .csv or .csv.gz, in UTF-8"):
        raw = Path(path).read_bytes()
        try:
            raw = gzip.decompress(raw) if str(path).endswith(".gz") else raw
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise InputError(f"is not a complete gzip file ({error}); compress it again", file=path) from None
        reader = csv_rows(io.StringIO(raw.decode("utf-8-sig"), newline=""), path, strict=True)
        header = next(reader, (1, []))[1]
        names = [column.name for column in columns]
        if "" in header and "" not in names:
            raise InputError(f"column {header.index('') + 1} has no name; remove it from the file if it has row "
                             "numbers, or name it and describe it in the schema", file=path, line=1)
        for wrong, what in ((sorted(set(names) - set(header)), "is in the schema but not in the file, which has "
                                                               f"{', '.join(map(repr, header)):.300}: correct one of "
                                                               "them"),
                            (sorted(set(header) - set(names)), "is in the file but not in the schema: describe it, or "
                                                               "remove it from the file"),
                            ([n for n, c in Counter(header).items() if c > 1], "occurs twice: remove one")):
            if wrong:
                raise InputError(f"column {wrong[0]!r} {what}", file=path, line=1)
        rows, numbers = [], []
        for number, row in reader:
            if not row:
                continue                                                    # an empty line
            if len(row) != len(header):
                raise InputError(f"{len(row)} fields, wanted {len(header)} as in the first line; correct the line",
                                 file=path, line=number)
            rows.append(dict(zip(header, row)))
            numbers.append(number)
    if not rows:
        raise InputError("no rows, wanted at least one; choose another file", file=path)
    return encode(rows, columns, path, numbers)


def write_table(path: Path, codes: np.ndarray, columns: list[Column], rng: np.random.Generator) -> None:
    """Writes codes (N,d) as a .csv file; read_table gives the same codes back. Numbers are drawn within their bins."""
    text, known = io.StringIO(), "".join(part for c in columns for part in (c.name, *c.values, c.missing or ""))
    lost = any(mark in known for mark in "\r\ufeff")                        # readers remove these outside of quotes
    writer = csv.writer(text, lineterminator="\n", quoting=csv.QUOTE_ALL if lost else csv.QUOTE_MINIMAL)
    writer.writerow([column.name for column in columns])
    writer.writerows(zip(*(column.decode(codes[:, j], rng) for j, column in enumerate(columns))))
    write_text(path, text.getvalue())
