"""Columns: the rows of a table as codes, and back. What a column may hold is public: it stands in the schema.

A schema is a JSON list, a column an object:

    {"name": "sex", "type": "category", "values": ["Male", "Female"]}
    {"name": "age", "type": "number", "low": 17, "high": 90, "bins": 20, "integer": true}    bins of equal width
    {"name": "gain", "type": "number", "edges": [0, 1, 1000, 99999]}                         [0,1) [1,1000) [1000,99999]
    {"name": "wage", "type": "number", "low": 0, "high": 500, "quantiles": 20}               bins of about equal counts

and each may have {"missing": "?"}: how an absent value is written; it is then a value like any other, the last one.
Whole numbers ("integer") have whole edges. Bins by quantiles depend on the data: they begin as FINE bins of equal
width, and tabular.py, which accounts for it, joins these by noisy counts. A table is a CSV file whose first line names
the columns, in any order; it must have those of the schema and no others.
"""

import bisect
import csv
import gzip
import io
import json
import math
import zlib
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from mixdpo.config import InputError, reading, write_whole

FINE = 256      # bins of equal width that quantiles are found in

FIELDS = {"category": {"name", "type", "values", "missing"},
          "number": {"name", "type", "low", "high", "bins", "edges", "quantiles", "integer", "missing"}}


@dataclass(frozen=True)
class Column:
    """What may stand in one column: `values` of a category, or bins between `edges`, open above but for the last. Of
    whole numbers the last edge is one above the highest, so that no bin is closed."""

    name: str
    values: tuple[str, ...] = ()
    edges: tuple[float, ...] = ()
    integer: bool = False
    missing: str | None = None      # its code is the last
    quantiles: int = 0              # to be joined into so many bins

    @property
    def known(self) -> int:
        """How many codes stand for a value that is there."""
        return len(self.values) or len(self.edges) - 1

    @property
    def size(self) -> int:
        return self.known + (self.missing is not None)

    def encode(self, text: str) -> int:
        """Raises: ValueError that says what was wanted."""
        if self.missing is not None and text == self.missing:
            return self.known
        if self.values:
            try:
                return self.values.index(text)
            except ValueError:
                raise ValueError(f"wanted one of {', '.join(map(repr, self.values[:12]))}"
                                 f"{', ...' if len(self.values) > 12 else ''}") from None
        low, high = self.edges[0], self.edges[-1] - self.integer
        wanted = f"wanted a {'whole ' * self.integer}number from {low:g} to {high:g}"
        try:
            number = float(text)
        except ValueError:
            raise ValueError(wanted) from None
        if not low <= number <= high or self.integer and number != int(number):
            raise ValueError(wanted)
        return min(bisect.bisect_right(self.edges, number), self.known) - 1

    def decode(self, codes: np.ndarray, rng: np.random.Generator) -> list[str]:
        """Values; of a bin, each of its numbers alike."""
        if self.values:
            names = np.array([*self.values, self.missing or ""], dtype=object)
            return names[codes].tolist()
        edges = np.array(self.edges)
        low, high = edges[np.minimum(codes, self.known - 1)], edges[np.minimum(codes, self.known - 1) + 1]
        if self.integer:
            numbers = [f"{n}" for n in rng.integers(low.astype(np.int64), high.astype(np.int64))]
        else:
            numbers = [f"{n:.6g}" for n in rng.uniform(low, high)]
        return [self.missing if code == self.known else n for code, n in zip(codes, numbers)]


def joined(column: Column, counts: np.ndarray) -> tuple[Column, np.ndarray]:
    """The column with `quantiles` bins of about equal counts, made of its fine ones; and the new code of each old one.
    counts (size,): of the fine bins, perhaps noisy, perhaps below 0."""
    counts, fine = np.maximum(counts[: column.known], 0), column.known
    share = counts.cumsum() / max(counts.sum(), 1e-9) * column.quantiles
    ends = [int(np.searchsorted(share, n - 1e-9)) + 1 for n in range(1, column.quantiles)]
    cuts = sorted({0, fine, *(end for end in ends if end < fine)})
    code = np.searchsorted(cuts, np.arange(fine), side="right") - 1
    new = replace(column, edges=tuple(column.edges[cut] for cut in cuts), quantiles=0)
    return new, np.append(code, new.known)                                  # missing stays the last


# ---- the schema


def read_schema(path) -> list[Column]:
    """Raises: InputError that names the file and the column."""
    with reading(path, "wanted a schema: a JSON list of columns"):
        described = json.loads(Path(path).read_text(encoding="utf-8"))
        if not isinstance(described, list) or not described:
            raise InputError(f"{path}: wanted a list of columns, got {str(described)[:60]!r}")
    return columns_of(described, path)


def columns_of(described: list[dict], path="schema") -> list[Column]:
    """Raises: InputError, as above."""
    columns = []
    for number, entry in enumerate(described, 1):
        where = f"{path}: column {number}"
        if not isinstance(entry, dict) or not isinstance(entry.get("name"), str) or entry.get("type") not in FIELDS:
            raise InputError(f'{where}: wanted {{"name": ..., "type": "category" or "number", ...}}, got {entry!r:.80}')
        where = f"{path}: column {entry['name']!r}"
        if unknown := sorted(set(entry) - FIELDS[entry["type"]]):
            raise InputError(f"{where}: unknown field {unknown[0]!r}; known are {sorted(FIELDS[entry['type']])}")
        try:
            columns.append(category(entry) if entry["type"] == "category" else number_of(entry))
        except (ValueError, TypeError, KeyError) as error:
            raise InputError(f"{where}: {error}") from None
    twice = [name for name, count in Counter(c.name for c in columns).items() if count > 1]
    if twice:
        raise InputError(f"{path}: column {twice[0]!r} is described twice")
    return columns


def category(entry: dict) -> Column:
    values = entry.get("values")
    if not isinstance(values, list) or not values or not all(isinstance(v, str) for v in values):
        raise ValueError("a category wants values, a list of strings: all that may stand in it, from public knowledge")
    if len(set(values)) < len(values) or entry.get("missing") in values:
        raise ValueError("each value, and missing, wants to be there once")
    return Column(entry["name"], tuple(values), missing=missing_of(entry))


def missing_of(entry: dict) -> str | None:
    if not isinstance(entry.get("missing", ""), str):
        raise ValueError(f"missing: got {entry['missing']!r}, wanted how an absent value is written, a string")
    return entry.get("missing")


def number_of(entry: dict) -> Column:
    integer, ways = entry.get("integer", False), [w for w in ("edges", "bins", "quantiles") if w in entry]
    if len(ways) != 1:
        raise ValueError(f"a number wants one of edges, bins or quantiles, got {ways or 'none'}")
    if not isinstance(integer, bool):
        raise ValueError(f"integer: got {integer!r}, wanted true or false")
    count = 0
    if ways == ["edges"]:
        edges = [float(e) for e in entry["edges"]]
        if "low" in entry or "high" in entry:
            raise ValueError("edges say where it begins and ends: leave low and high out")
    else:
        if "low" not in entry or "high" not in entry:
            raise ValueError(f"{ways[0]} want low and high, bounds from public knowledge: those found in the data "
                             "would tell of its outermost rows")
        low, high, count = float(entry["low"]), float(entry["high"]), entry[ways[0]]
        if not isinstance(count, int) or count < 1:
            raise ValueError(f"{ways[0]}: got {count!r}, wanted a whole number from 1 on")
        edges = [low, high]
    if not all(map(math.isfinite, edges)) or any(a >= b for a, b in zip(edges, edges[1:])) or len(edges) < 2:
        raise ValueError(f"wanted finite edges or bounds, each above the one before, got {edges[:6]}")
    if integer and any(e != int(e) for e in edges):
        raise ValueError("a whole number wants whole edges and bounds")
    edges[-1] += integer
    if count:
        edges = np.linspace(*edges, (FINE if ways == ["quantiles"] else count) + 1)
        edges = np.unique(edges.round() if integer else edges).tolist()     # fewer bins where there are fewer numbers
    return Column(entry["name"], (), tuple(edges), integer, missing_of(entry), count * (ways == ["quantiles"]))


# ---- tables


def encode(rows: list[dict], columns: list[Column], where=None) -> np.ndarray:
    """Codes (N,d) int64 of rows, each by column name. where(n): what to call row n. Raises: InputError that names row
    and column."""
    codes = np.empty((len(rows), len(columns)), dtype=np.int64)
    for j, column in enumerate(columns):
        known = {}                                                          # a value is looked up once
        for n, row in enumerate(rows):
            text = row[column.name]
            if text not in known:
                try:
                    known[text] = column.encode(text)
                except ValueError as error:
                    place = where(n) if where else f"row {n + 1}"
                    raise InputError(f"{place}, column {column.name!r}: got {text!r}, {error}; mend the row, or let "
                                     "the schema allow it") from None
            codes[n, j] = known[text]
    return codes


def read_table(path, columns: list[Column]) -> np.ndarray:
    """Codes (N,d) int64 of a .csv or .csv.gz file. Raises: InputError that names file, line and column."""
    if not Path(path).is_file():
        raise InputError(f"{path}: no such file; wanted a table as .csv or .csv.gz")
    with reading(path, "wanted a table as .csv or .csv.gz, in UTF-8"):
        raw = Path(path).read_bytes()
        try:
            raw = gzip.decompress(raw) if str(path).endswith(".gz") else raw
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise InputError(f"{path}: not a whole gzip file ({error}); pack it again") from None
        reader = csv.reader(io.StringIO(raw.decode("utf-8-sig"), newline=""), strict=True)
        header = next(reader, [])
        names = [column.name for column in columns]
        for wrong, what in ((sorted(set(names) - set(header)), "is in the schema and not in the file"),
                            (sorted(set(header) - set(names)), "is in the file and not in the schema: describe it, or "
                                                               "take it out of the file"),
                            ([n for n, c in Counter(header).items() if c > 1], "is there twice")):
            if wrong:
                raise InputError(f"{path}: column {wrong[0]!r} {what}")
        rows, numbers = [], []
        for row in reader:
            if not row:
                continue                                                    # an empty line holds nothing
            if len(row) != len(header):
                raise InputError(f"{path}:{reader.line_num}: {len(row)} fields, wanted {len(header)} as in its first "
                                 "line")
            rows.append(dict(zip(header, row)))
            numbers.append(reader.line_num)
    if not rows:
        raise InputError(f"{path}: no rows in it")
    return encode(rows, columns, lambda n: f"{path}:{numbers[n]}")


def write_table(path: Path, codes: np.ndarray, columns: list[Column], rng: np.random.Generator) -> None:
    """The codes as a .csv file; numbers are drawn within their bins."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([column.name for column in columns])
    writer.writerows(zip(*(column.decode(codes[:, j], rng) for j, column in enumerate(columns))))
    write_whole(path, text.getvalue())
