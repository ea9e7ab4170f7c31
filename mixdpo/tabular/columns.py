"""Columns: the legal values of a table, from its schema, which is public. rows.py converts rows to codes, and back.

A schema is a JSON list with an object for each column, in one of these four forms:

    [{"name": "sex", "type": "category", "values": ["Male", "Female"], "missing": "?"},
     {"name": "age", "type": "number", "low": 17, "high": 90, "bins": 20, "integer": true},
     {"name": "gain", "type": "number", "edges": [0, 1, 1000, 99999]},
     {"name": "wage", "type": "number", "low": 0, "high": 500, "quantiles": 20}]

    values      all legal values, as strings
    bins        so many bins of equal width from low to high; both bounds are legal values
    edges       bins of your choice: here [0,1) [1,1000) [1000,99999]
    quantiles   so many bins of about equal counts from low to high. They depend on the data: they start as FINE bins of
                equal width, which dp_tbart.py merges by noisy counts, at a cost that it accounts for
    integer     true: all numbers, edges and bounds are integers, exact up to 64 bits
    missing     the text of a missing value, for example "NA" or "". Without it every value must be legal. It is the
                last code of the column

A value that the schema does not allow is an error. It is not clipped to the bounds: choose bounds that every possible
row satisfies, or clip the column in the file first. The model sees the bin of a number only, and the synthetic number
is drawn uniformly within its bin: use narrow bins where the number matters, and a wide one for a rare tail. Other
numbers than integers have enough digits for a thousand different values in the narrowest bin.
A table is a CSV file with commas. Its first line has the column names in any order: exactly those of the schema.
Remove other columns from the file, also one of row numbers.
"""

import bisect
import contextlib
import json
import math
import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from decimal import Decimal, InvalidOperation
from fractions import Fraction
from pathlib import Path

import numpy as np

from mixdpo.config import InputError, reading

FINE = 256              # bins of equal width from which quantiles are computed
MOST = 10_000           # legal values of a column: with more, noise covers every count and memory ends
EXACT = 2**53           # a float represents every integer up to this
LARGEST = 2**63 - 1     # largest int64

FIELDS = {"category": {"name", "type", "values", "missing"},
          "number": {"name", "type", "low", "high", "bins", "edges", "quantiles", "integer", "missing"}}


@dataclass(frozen=True)
class Column:
    """The legal values of one column: the `values` of a category, or bins between `edges`.

    A bin includes its lower edge and excludes its upper edge; the last bin includes both. For integers the last edge
    is the largest value plus 1, so every bin excludes its upper edge."""

    name: str
    values: tuple[str, ...] = ()
    edges: tuple[float, ...] = ()   # int if `integer`: a float is not exact for integers above 2^53
    integer: bool = False
    missing: str | None = None      # the text of a missing value, which has the last code
    quantiles: int = 0              # merge the bins into this many; 0: keep them

    @property
    def known(self) -> int:
        """The number of codes without the code for missing values."""
        return len(self.values) or len(self.edges) - 1

    @property
    def size(self) -> int:
        """The number of codes."""
        return self.known + (self.missing is not None)

    def encode(self, text: str) -> int:
        """The code of a value. Raises: ValueError that says what was expected."""
        if self.missing is not None and text == self.missing:
            return self.known
        if self.values:
            try:
                return self.values.index(text)
            except ValueError:
                raise ValueError(f"wanted one of {', '.join(map(repr, self.values[:12]))}"
                                 f"{', ...' if len(self.values) > 12 else ''}") from None
        low, high = self.edges[0], self.edges[-1] - self.integer
        try:
            number = Decimal(text) if self.integer else float(text)         # a float would round a large integer
            allowed = low <= number <= high and not (self.integer and number % 1)
        except (ValueError, InvalidOperation):                              # comparing Decimal NaN raises
            allowed = False
        if not allowed:
            raise ValueError(f"wanted {'an integer' if self.integer else 'a number'} from {exactly(low)} to "
                             f"{exactly(high)}")
        return min(bisect.bisect_right(self.edges, number), self.known) - 1

    def decode(self, codes: np.ndarray, rng: np.random.Generator) -> list[str]:
        """A value for each code (N,); within a bin, uniformly at random. `encode` gives the same code back."""
        if self.values:
            names = np.array([*self.values, self.missing or ""], dtype=object)
            return names[codes].tolist()
        edges, place = np.array(self.edges, np.int64 if self.integer else float), codes.clip(0, self.known - 1)
        low, high = edges[place], edges[place + 1]
        texts: Iterable[str]
        if self.integer:
            texts = map(str, rng.integers(low, high).tolist())
        else:
            numbers = np.minimum(rng.uniform(low, high), np.nextafter(high, low))   # uniform may round up to high
            digits = min(max(3 - math.floor(math.log10(np.diff(edges).min())), 0), 17)
            texts = (written(*row, digits) for row in zip(numbers.tolist(), low.tolist(), high.tolist()))
        return [self.missing or "" if code == self.known else text for code, text in zip(codes.tolist(), texts)]


def written(number: float, low: float, high: float, digits: int) -> str:
    """The number rounded to `digits` decimal places; or with all its digits if rounding leaves [low, high)."""
    text = f"{round(number, digits) + 0.0:.{digits}f}"                      # + 0.0 turns -0 into 0
    return text if low <= float(text) < high else repr(number)


def exactly(number: float) -> str:
    """A bound with all of its digits: 0, 0.1, 1700086400, but not 0.0."""
    return repr(number).removesuffix(".0")


def joined(column: Column, counts: np.ndarray) -> tuple[Column, np.ndarray]:
    """-> the column, its fine bins merged into `quantiles` bins of about equal counts; the new code of each old code
    (size,). counts (size,): of the fine bins; they may be noisy and negative."""
    counts, fine = np.maximum(counts[: column.known], 0), column.known
    share = counts.cumsum() / max(counts.sum(), 1e-9) * column.quantiles
    ends = [int(np.searchsorted(share, n - 1e-9)) + 1 for n in range(1, column.quantiles)]
    cuts = sorted({0, fine, *(end for end in ends if end < fine)})
    code = np.searchsorted(cuts, np.arange(fine), side="right") - 1
    new = replace(column, edges=tuple(column.edges[cut] for cut in cuts), quantiles=0)
    return new, np.append(code, new.known)                                  # missing values keep the last code


# ---- the schema


def read_schema(path) -> list[Column]:
    """The columns of a schema file. Raises: InputError that names the file and the column."""
    with reading(path, "wanted a schema: a JSON list of columns"):
        try:
            described = json.loads(Path(path).read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise InputError(f"not JSON ({error.msg} at column {error.colno}); look for a missing or extra comma, "
                             "quote or bracket", file=path, line=error.lineno) from None
        if not isinstance(described, list) or not described:
            raise InputError(f"wanted a list of columns, got {str(described)[:60]!r}", file=path)
    return columns_of(described, path)


def columns_of(described: list[dict], path="schema") -> list[Column]:
    """The columns of a schema. path: its file, for errors. Raises: InputError that names the column."""
    columns = []
    for number, entry in enumerate(described, 1):
        if not isinstance(entry, dict) or not isinstance(entry.get("name"), str) or entry.get("type") not in [*FIELDS]:
            raise InputError(f'column {number}: wanted {{"name": ..., "type": "category" or "number", ...}}, '
                             f'got {entry!r:.80}; for integers add "integer": true to a number', file=path)
        where = f"column {entry['name']!r}"
        if unknown := sorted(set(entry) - FIELDS[entry["type"]]):
            known = ", ".join(sorted(FIELDS[entry["type"]]))
            raise InputError(f"in {where}: unknown field {unknown[0]!r}, wanted some of {known}; remove it", file=path)
        try:
            column = category(entry) if entry["type"] == "category" else number_of(entry)
            if column.size > MOST:
                raise ValueError(f"got {column.size:,} legal values, wanted at most {MOST:,}: put rare values into "
                                 "one, or several numbers into one bin")
            "".join([column.name, *column.values, column.missing or ""]).encode()           # UTF-8 must encode these
        except (ValueError, TypeError, KeyError) as error:
            raise InputError(f"in {where}: {error}", file=path) from None
        columns.append(column)
    twice = [name for name, count in Counter(c.name for c in columns).items() if count > 1]
    if twice:
        raise InputError(f"column {twice[0]!r} is described twice; remove one description", file=path)
    return columns


def schema_of(columns: list[Column]) -> list[dict]:
    """The schema of these columns, with bins as edges. columns_of(schema_of(columns)) gives the same columns."""
    out = []
    for c in columns:
        entry: dict[str, object] = {"name": c.name, "type": "category" if c.values else "number"}
        edges = [*c.edges[:-1], c.edges[-1] - c.integer] if c.edges else []
        entry |= {"values": list(c.values)} if c.values else {"edges": edges, "integer": c.integer}
        out.append(entry | ({} if c.missing is None else {"missing": c.missing}))
    return out


def category(entry: dict) -> Column:
    """The column of a schema entry of type category. Raises: ValueError."""
    values = entry.get("values")
    if not isinstance(values, list) or not values or not all(isinstance(v, str) for v in values):
        raise ValueError(f"values: got {values!r:.60}, wanted a list of strings, each in quotes: all legal values, "
                         "from public knowledge")
    if len(set(values)) < len(values) or entry.get("missing") in values:
        raise ValueError("a value, or `missing`, occurs twice; list each once")
    return Column(entry["name"], tuple(values), missing=missing_of(entry))


def missing_of(entry: dict) -> str | None:
    """The text of a missing value, or None. Raises: ValueError."""
    if not isinstance(entry.get("missing", ""), str):
        raise ValueError(f"missing: got {entry['missing']!r}, wanted a string, the text of a missing value")
    return entry.get("missing")


def number_of(entry: dict) -> Column:
    """The column of a schema entry of type number. Raises: ValueError, TypeError."""
    integer, ways = entry.get("integer", False), [w for w in ("edges", "bins", "quantiles") if w in entry]
    if len(ways) != 1:
        raise ValueError(f"got {', '.join(ways) or 'none'} of edges, bins and quantiles; a number needs exactly one of "
                         'them, for example "low": 0, "high": 100, "bins": 10')
    if not isinstance(integer, bool):
        raise ValueError(f"integer: got {integer!r}, wanted true or false")
    count = 0
    if ways == ["edges"]:
        given = entry["edges"]
        if "low" in entry or "high" in entry:
            raise ValueError("got edges and also low or high; remove low and high, because edges include the bounds")
    else:
        if "low" not in entry or "high" not in entry:
            raise ValueError(f"{ways[0]} need low and high, bounds from public knowledge: bounds found in the data "
                             "would disclose its extreme rows")
        given, count = [entry["low"], entry["high"]], entry[ways[0]]
        if type(count) is not int or not 1 <= count <= MOST:
            raise ValueError(f"{ways[0]}: got {count!r}, wanted an integer from 1 to {MOST:,}")
    edges = edges_of(given, integer)
    if count:
        edges = equal_bins(edges, FINE if ways == ["quantiles"] else count)
    column = Column(entry["name"], (), tuple(edges), integer, missing_of(entry), count * (ways == ["quantiles"]))
    with contextlib.suppress(ValueError):
        replace(column, missing=None).encode(column.missing or "")
        raise TypeError(f"missing: {column.missing!r} is also a legal number of the column; choose another text")
    return column


def edges_of(given: list, integer: bool) -> list:
    """A schema's edges or bounds -> edges as in Column: int if `integer`, otherwise float.
    Raises: ValueError, TypeError."""
    if any(type(e) not in (int, float) for e in given):
        raise TypeError(f"got edges or bounds {given[:6]}, wanted numbers")
    rising = [a < b for a, b in zip(given, given[1:])]                      # False for NaN too
    single = integer and len(given) > 2 and given[-1] == given[-2]          # the last bin has a single number
    if not all(rising[:-1] if single else rising) or len(given) < 2 or math.inf in map(abs, given):
        raise ValueError(f"got edges or bounds {given[:6]}, wanted finite numbers in increasing order")
    if not integer:
        if max(map(abs, given)) > sys.float_info.max / 2:
            raise ValueError(f"wanted edges or bounds of magnitude {sys.float_info.max / 2:.1g} at most")
        if unlike := [e for e in given if float(e) != e]:
            raise ValueError(f'{unlike[0]} has more digits than a float; for integers add "integer": true')
        return list(map(float, given))
    if any(e != int(e) for e in given):
        raise ValueError("wanted integers as edges or bounds, because \"integer\" is true")
    if unlike := [e for e in given if not -LARGEST <= e < LARGEST or isinstance(e, float) and abs(e) > EXACT]:
        raise ValueError(f"{unlike[0]} is not exact; wanted integers from {-LARGEST} to {LARGEST - 1}, and above "
                         f"{EXACT} without a decimal point or an exponent")
    return [*map(int, given[:-1]), int(given[-1]) + 1]


def equal_bins(bounds: list, count: int) -> list:
    """Edges of `count` bins of equal width; of fewer bins if there are fewer integers."""
    low, high = bounds
    if isinstance(low, int):                                                # exact; halves round to the even integer
        return sorted({low + round(Fraction((high - low) * n, count)) for n in range(count + 1)})
    return np.unique(np.linspace(low, high, count + 1)).tolist()
