"""Tables as codes: schemas, files, and what is said of faults in them. Docstrings name the faults that each test is
there for."""

import csv
import gzip
import json

import numpy as np
import pytest

from mixdpo.columns import FINE, columns_of, encode, joined, read_schema, read_table, write_table
from mixdpo.config import InputError

SCHEMA = [
    {"name": "colour", "type": "category", "values": ["red", "green, dark", "blue"], "missing": "?"},
    {"name": "age", "type": "number", "low": 0, "high": 9, "bins": 5, "integer": True},
    {"name": "gain", "type": "number", "edges": [0, 1, 10, 100], "missing": ""},
]
NAMES = ("colour", "age", "gain")
ROWS = [["red", "0", "0"], ["green, dark", "9", "100"], ["?", "5", ""], ["blue", "1", "9.99"]]


@pytest.fixture
def table(tmp_path):
    def write(rows=ROWS, header=NAMES, name="table.csv"):
        path = tmp_path / name
        with (gzip.open(path, "wt") if name.endswith(".gz") else open(path, "w", newline="")) as file:
            csv.writer(file).writerows([header, *rows])
        return path

    return write


def test_values_become_codes(table):
    """By hand: bins are closed below, the last one above too; a missing value is the last code; columns may stand in
    any order. Faults: bins open below; the highest value in a bin of its own; columns by place instead of name."""
    columns = columns_of(SCHEMA)
    assert [c.size for c in columns] == [4, 5, 4] and columns[1].edges == (0, 2, 4, 6, 8, 10)
    wanted = [[0, 0, 0], [1, 4, 2], [3, 2, 3], [2, 0, 1]]
    assert read_table(table(), columns).tolist() == wanted
    turned = table([row[::-1] for row in ROWS], ("gain", "age", "colour"), "turned.csv.gz")
    assert read_table(turned, columns).tolist() == wanted


def test_codes_become_values_of_their_own_code(tmp_path):
    """Every code is written as values that read back as it, and all whole numbers of a bin occur. Faults: the upper
    edge of an inner bin written; the highest number never written; missing written as a number."""
    columns, rng = columns_of(SCHEMA), np.random.default_rng(0)
    codes = np.stack([rng.integers(c.size, size=2000) for c in columns], 1)
    write_table(tmp_path / "made.csv", codes, columns, seed=1)
    assert (read_table(tmp_path / "made.csv", columns) == codes).all()
    ages = {row[1] for row in csv.reader(open(tmp_path / "made.csv"))}
    assert ages == {"age", *map(str, range(10))}
    write_table(tmp_path / "again.csv", codes, columns, seed=1)
    assert (tmp_path / "again.csv").read_bytes() == (tmp_path / "made.csv").read_bytes()


def test_bins_of_about_equal_counts():
    """Faults: cuts by place instead of counts; noise below zero turning the order of cuts; missing joined too."""
    column = columns_of([{"name": "x", "type": "number", "low": 0, "high": 1, "quantiles": 4, "missing": "?"}])[0]
    assert column.known == FINE and column.quantiles == 4
    x = np.random.default_rng(0).beta(1, 6, size=20000)
    fine = encode([{"x": f"{v}"} for v in x] + [{"x": "?"}] * 7, [column])[:, 0]
    new, code = joined(column, np.bincount(fine, minlength=column.size).astype(float))
    assert new.size == 5 and new.quantiles == 0 and new.edges[0] == 0 and new.edges[-1] == 1
    shares = np.bincount(code[fine], minlength=5)
    assert (abs(shares[:4] / 20000 - 0.25) < 0.03).all() and shares[4] == 7
    assert (code[fine][:50] == [new.encode(f"{v}") for v in x[:50]]).all()  # it codes as its codes were joined
    noisy, code = joined(column, np.random.default_rng(1).normal(size=column.size) * 50)
    assert 1 < noisy.size <= 5 and (np.diff(code) >= 0).all() and list(noisy.edges) == sorted(set(noisy.edges))


@pytest.mark.parametrize("row, column, wanted", [
    (["purple", "1", "2"], "colour", "wanted one of 'red', 'green, dark', 'blue'"),
    (["red", "10", "2"], "age", "wanted a whole number from 0 to 9"),
    (["red", "1.5", "2"], "age", "wanted a whole number from 0 to 9"),
    (["red", "", "2"], "age", "wanted a whole number"),
    (["red", "1", "-0.1"], "gain", "wanted a number from 0 to 100"),
    (["red", "1", "nan"], "gain", "wanted a number from 0 to 100"),
    (["red", "1", "much"], "gain", "wanted a number from 0 to 100"),
])
def test_a_value_that_the_schema_does_not_allow_names_row_and_column(table, row, column, wanted):
    """Faults: NaN passing the bounds; numbers clipped to the bounds in silence; rows counted from 0."""
    path = table([*ROWS, row])
    with pytest.raises(InputError) as error:
        read_table(path, columns_of(SCHEMA))
    assert f"{path}:6, column {column!r}: got {row[NAMES.index(column)]!r}" in str(error.value)
    assert wanted in str(error.value)


def test_a_table_with_other_columns_or_fields_is_told(table, tmp_path):
    """Fault: a column that the schema lacks dropped in silence."""
    columns = columns_of(SCHEMA)
    for rows, header, what in (([[*r, "1"] for r in ROWS], (*NAMES, "id"), "'id' is in the file and not"),
                               ([r[:2] for r in ROWS], NAMES[:2], "'gain' is in the schema and not"),
                               ([[*r, "1"] for r in ROWS], (*NAMES, "age"), "'age' is there twice"),
                               ([*ROWS, ["red", "1"]], NAMES, ":6: 2 fields, wanted 3"), ([], NAMES, "no rows")):
        with pytest.raises(InputError, match=what):
            read_table(table(rows, header), columns)
    for cut in (b"", b"a,b\n", table(name="whole.csv.gz").read_bytes()[:-9]):
        (tmp_path / "cut.csv.gz").write_bytes(cut)
        with pytest.raises(InputError, match="cut.csv.gz"):
            read_table(tmp_path / "cut.csv.gz", columns)
    (tmp_path / "bytes.csv").write_bytes(b"colour,age,gain\n\xff,1,2\n")
    with pytest.raises(InputError, match="UTF-8"):
        read_table(tmp_path / "bytes.csv", columns)
    with pytest.raises(InputError, match="no such file"):
        read_table(tmp_path / "none.csv", columns)


@pytest.mark.parametrize("change, wanted", [
    ({"type": "colour"}, "column 2"), ({"bin": 3}, "unknown field 'bin'"), ({"bins": 0}, "whole number from 1 on"),
    ({"bins": None}, "bins: got None"), ({"edges": [1, 2]}, "one of edges, bins or quantiles"), ({"low": 9}, "above"),
    ({"high": float("inf")}, "finite"), ({"integer": 1}, "true or false"), ({"low": 0.5}, "whole edges"),
    ({"missing": 3}, "a string"), ({"name": "colour"}, "described twice"), ({"low": None}, "'age'"),
])
def test_a_faulty_schema_names_the_column(tmp_path, change, wanted):
    path = tmp_path / "schema.json"
    path.write_text(json.dumps([SCHEMA[0], SCHEMA[1] | change, SCHEMA[2]]))
    with pytest.raises(InputError, match=wanted) as error:
        read_schema(path)
    assert str(path) in str(error.value)


def test_bounds_must_be_public(tmp_path):
    """Bounds and vocabulary are never taken from the data. Fault: low and high found in the file."""
    for entry in ({"name": "x", "type": "number", "quantiles": 4}, {"name": "x", "type": "number", "bins": 4, "low": 1},
                  {"name": "x", "type": "category"}):
        with pytest.raises(InputError, match="public knowledge"):
            columns_of([entry])
    for text in ("{", "[]", '{"a": 1}', '[3]'):
        (tmp_path / "s.json").write_text(text)
        with pytest.raises(InputError, match="s.json"):
            read_schema(tmp_path / "s.json")
