"""Tables as codes: schemas, files, and the errors for faults in them. Docstrings name the faults that each test is
there for."""

import csv
import dataclasses
import gzip
import json

import numpy as np
import pytest
from raising import raises_at

from data.tables import adult
from mixdpo.tabular import columns as columns_module
from mixdpo.tabular.columns import FINE, MOST, columns_of, joined, read_schema, schema_of
from mixdpo.tabular.rows import encode, read_table, write_table

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
    """Values written for a code read back as that code, and all integers of a bin occur. Faults: the upper
    edge of an inner bin written; the highest number never written; missing written as a number."""
    columns, rng = columns_of(SCHEMA), np.random.default_rng(0)
    codes = np.stack([rng.integers(c.size, size=2000) for c in columns], 1)
    write_table(tmp_path / "made.csv", codes, columns, np.random.default_rng(1))
    assert (read_table(tmp_path / "made.csv", columns) == codes).all()
    ages = {row[1] for row in csv.reader(open(tmp_path / "made.csv"))}
    assert ages == {"age", *map(str, range(10))}
    write_table(tmp_path / "again.csv", codes, columns, np.random.default_rng(1))
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
    (["red", "10", "2"], "age", "wanted an integer from 0 to 9"),
    (["red", "1.5", "2"], "age", "wanted an integer from 0 to 9"),
    (["red", "", "2"], "age", "wanted an integer"),
    (["red", "1", "-0.1"], "gain", "wanted a number from 0 to 100"),
    (["red", "1", "nan"], "gain", "wanted a number from 0 to 100"),
    (["red", "1", "much"], "gain", "wanted a number from 0 to 100"),
])
def test_a_value_that_the_schema_does_not_allow_names_row_and_column(table, row, column, wanted):
    """Faults: NaN within the bounds; numbers clipped to the bounds without an error; rows counted from 0."""
    path = table([*ROWS, row])
    with raises_at(f"{column!r}", f"got {row[NAMES.index(column)]!r}", wanted, file=path, line=6):
        read_table(path, columns_of(SCHEMA))


@pytest.mark.parametrize("row, missing, wanted, other", [
    (["NA", "1", "2"], None, '"missing": "NA"', "legal"), (["red", "", "2"], None, '"missing": ""', "bounds"),
    (["red", "10", "2"], None, "wider bounds", "missing"), (["purple", "1", "2"], None, "legal", "missing"),
    (["red", "NA", "2"], "?", "wider bounds", '"missing"'),
])
def test_the_remedy_depends_on_the_value(table, row, missing, wanted, other):
    """Faults: bounds to be widened for the text of a missing value; a second text proposed for missing values."""
    schema = [{key: value for key, value in entry.items() if key != "missing"} for entry in SCHEMA]
    schema = [entry | ({} if missing is None else {"missing": missing}) for entry in schema]
    with raises_at(wanted, file=table([*ROWS[:2], row]), line=4) as error:
        read_table(table([*ROWS[:2], row]), columns_of(schema))
    assert other not in error.value.message


def test_a_table_with_other_columns_or_fields_is_an_error(table, tmp_path):
    """Faults: a column that the schema lacks dropped without an error; a column without a name shown as ''; semicolons
    between the names, and a message that does not show them."""
    columns = columns_of(SCHEMA)
    for rows, header, line, named in (([[*r, "1"] for r in ROWS], (*NAMES, "id"), 1, ["'id'"]),
                                      ([r[:2] for r in ROWS], NAMES[:2], 1, ["'gain'"]),
                                      ([[*r, "1"] for r in ROWS], (*NAMES, "age"), 1, ["'age'"]),
                                      ([["1", *r] for r in ROWS], ("", *NAMES), 1, ["column 1", "row numbers"]),
                                      ([], (";".join(NAMES),), 1, ["'age'", repr(";".join(NAMES))]),
                                      ([*ROWS, ["red", "1"]], NAMES, 6, [2, 3]), ([], NAMES, None, [])):
        path = table(rows, header)
        with raises_at(*named, file=path, line=line):
            read_table(path, columns)
    for cut, line in ((b"", 1), (b"a,b\n", None), (table(name="whole.csv.gz").read_bytes()[:-9], None)):
        (tmp_path / "cut.csv.gz").write_bytes(cut)
        with raises_at(file=tmp_path / "cut.csv.gz", line=line):
            read_table(tmp_path / "cut.csv.gz", columns)
    (tmp_path / "bytes.csv").write_bytes(b"colour,age,gain\n\xff,1,2\n")
    with raises_at("UTF-8", file=tmp_path / "bytes.csv"):
        read_table(tmp_path / "bytes.csv", columns)
    with raises_at(file=tmp_path / "none.csv"):
        read_table(tmp_path / "none.csv", columns)


@pytest.mark.parametrize("change, wanted", [
    ({"type": "colour"}, "column 2"), ({"type": ["number"]}, "column 2"), ({"bin": 3}, "'bin'"),
    ({"bins": 0}, "bins: got 0"), ({"bins": 10**9}, "from 1 to 10,000"),
    ({"bins": None}, "bins: got None"), ({"edges": [1, 2]}, "edges"), ({"low": 9}, "9"),
    ({"high": float("inf")}, "inf"), ({"integer": 1}, "integer: got 1"), ({"low": 0.5}, "integers"),
    ({"missing": 3}, "missing: got 3"), ({"name": "colour"}, "'colour'"), ({"low": None}, "None"),
])
def test_a_faulty_schema_names_the_column(tmp_path, change, wanted):
    path = tmp_path / "schema.json"
    path.write_text(json.dumps([SCHEMA[0], SCHEMA[1] | change, SCHEMA[2]]))
    column = "" if "type" in change else repr(change.get("name", "age"))
    with raises_at(column, wanted, file=path):
        read_schema(path)


def test_a_column_has_not_too_many_values():
    """Fault: a table that ends for want of memory, without a word, after its first step."""
    values = [str(n) for n in range(MOST)]
    for more in ({"values": values}, {"values": values[1:], "missing": ""}):
        assert columns_of([{"name": "zip", "type": "category"} | more])[0].size == MOST
    for more in ({"values": [*values, "more"]}, {"values": values, "missing": ""},
                 {"type": "number", "edges": [*range(MOST + 3)]}):
        with raises_at("'zip'", "at most 10,000", file="schema"):
            columns_of([{"name": "zip", "type": "category"} | more])


def test_bounds_must_be_public(tmp_path):
    """Bounds and vocabulary are never taken from the data. Fault: low and high found in the file."""
    for entry in ({"name": "x", "type": "number", "quantiles": 4}, {"name": "x", "type": "number", "bins": 4, "low": 1},
                  {"name": "x", "type": "category"}):
        with raises_at("'x'", "public knowledge", file="schema"):
            columns_of([entry])
    for text, line in (("{", 1), ('[{"name": "x"},\n]', 2), ("[]", None), ('{"a": 1}', None), ("[3]", None)):
        (tmp_path / "s.json").write_text(text)
        with raises_at(file=tmp_path / "s.json", line=line):
            read_schema(tmp_path / "s.json")


def test_the_schema_in_the_docstring_is_one():
    """Fault: a field that was renamed, and the docstring as before."""
    text = columns_module.__doc__
    example = json.loads(text[text.index("["): text.index("}]") + 2])
    assert [c.size for c in columns_of(example)] == [3, 20, 3, FINE]


# --- numbers in full --------------------------------------------------------------------------------------------------


NUMBERS = {
    "an hour of a day, unix seconds": {"low": 1700000000, "high": 1700086400, "bins": 24},
    "milliseconds of a year": {"low": 1672531200000, "high": 1704067200000, "bins": 12},
    "latitudes of a town": {"low": 48.1371, "high": 48.1379, "bins": 8},
    "julian days": {"low": 2459945, "high": 2460310, "bins": 12},
    "a fraction of a year": {"low": 2020, "high": 2021, "quantiles": 12},
    "money": {"low": 0, "high": 5e6, "bins": 20},
    "around zero": {"low": -1e-3, "high": 1e-3, "bins": 3},
    "thirds": {"edges": [0, 1 / 3, 2 / 3, 1]},
    "narrow and wide bins": {"edges": [0, 1e-12, 1, 1e12]},
    "hardly apart": {"edges": [1.0, float(np.nextafter(1, 2)), float(np.nextafter(1, 2)) + 2.0**-52]},
    "tiny": {"edges": [0, 5e-324, 1e-300]},
    "huge": {"edges": [-8e307, 0, 8e307]},
    "whole, above 2^53": {"low": 2**53 + 1, "high": 2**53 + 9, "bins": 4, "integer": True},
    "whole, 18 digits": {"low": 10**18, "high": 10**18 + 3, "bins": 4, "integer": True},
    "whole, all of 64 bits": {"low": 1 - 2**63, "high": 2**63 - 2, "bins": 7, "integer": True},
    "whole, both signs": {"low": -5, "high": 5, "bins": 3, "integer": True, "missing": "?"},
}


@pytest.mark.parametrize("what", NUMBERS)
def test_a_number_is_written_within_its_own_bin(what, tmp_path):
    """Written and read back, every code is what it was. Faults: six digits (timestamps and latitudes fall together, in
    another bin or out of bounds); integers above 2^53 converted through floats."""
    column = columns_of([{"name": "x", "type": "number", **NUMBERS[what]}])[0]
    codes = np.random.default_rng(0).integers(column.size, size=(3000, 1))
    write_table(tmp_path / "made.csv", codes, [column], np.random.default_rng(1))
    assert (read_table(tmp_path / "made.csv", [column]) == codes).all()
    texts = (tmp_path / "made.csv").read_text().split()[1:]
    values = [(int if column.integer else float)(text) for text in texts if text != "?"]
    assert min(values) >= column.edges[0] and max(values) <= column.edges[-1]
    assert "-0" not in texts and not any(set(text) <= set("-0.") and text[0] == "-" for text in texts)


@pytest.mark.parametrize("what", ["an hour of a day, unix seconds", "latitudes of a town", "julian days", "money"])
def test_numbers_of_a_bin_stay_different(what):
    """Written in full, without exponent. Fault: six digits, which leave ten different seconds of a day."""
    column = columns_of([{"name": "x", "type": "number", **NUMBERS[what]}])[0]
    texts = column.decode(np.zeros(1000, dtype=np.int64), np.random.default_rng(0))
    assert len(set(texts)) > 500 and not any("e" in text for text in texts)


def test_integers_are_exact_or_refused():
    """Faults: 2^53 + 1 becomes its neighbour; a bound that JSON gave as a float, rounded without an error; bounds that
    exceed 64 bits, found only at the end."""
    column = columns_of([{"name": "x", "type": "number", "edges": [2**53, 2**53 + 1, 2**53 + 3], "integer": True}])[0]
    assert [column.encode(str(2**53 + n)) for n in range(4)] == [0, 1, 1, 1]
    assert column.encode("9007199254740993.0") == 1
    for text in ("9007199254740991", "9007199254740996", "9007199254740993.5", "nan", "inf", "-inf", "1e400", "much"):
        with pytest.raises(ValueError, match="integer from 9007199254740992 to 9007199254740995"):
            column.encode(text)
    for change in ({"low": 2.0**60, "integer": True}, {"high": 2**63 - 1, "integer": True}, {"low": 2**53 + 1},
                   {"high": 10**400}, {"low": -1e308, "high": 1e308}):
        with raises_at("'x'", file="schema"):
            columns_of([{"name": "x", "type": "number", "low": 0, "high": 2**62, "bins": 4} | change])


def test_bounds_are_named_with_all_digits():
    """Fault: bounds of a table's numbers printed with six digits."""
    for entry, wanted in (({"low": 1700000000, "high": 1700086400}, "from 1700000000 to 1700086400"),
                          ({"low": 48.13712, "high": 48.13799}, "from 48.13712 to 48.13799")):
        column = columns_of([{"name": "x", "type": "number", "bins": 8} | entry])[0]
        with pytest.raises(ValueError, match=wanted):
            column.encode("0")


def test_values_that_csv_could_lose_come_back(tmp_path):
    """Faults: a carriage return written outside of quotes ends the row; a first name's byte order mark is taken for the
    file's; a missing value that is written as a number is read as one; half a character, found after training."""
    columns = columns_of([{"name": "\ufeffx", "type": "category", "values": ["a\rb", "a\nb", 'a"b', "a,b", " ", ""]},
                          {"name": "y", "type": "number", "low": 0, "high": 9, "bins": 3, "missing": "none"}])
    codes = np.array([[n, n % 4] for n in range(6)])
    write_table(tmp_path / "made.csv", codes, columns, np.random.default_rng(1))
    assert (read_table(tmp_path / "made.csv", columns) == codes).all()
    for entry in ({"type": "number", "low": 0, "high": 9, "bins": 3, "missing": "5"},
                  {"type": "category", "values": ["\ud800"]}):
        with raises_at("'x'", file="schema"):
            columns_of([{"name": "x", **entry}])


def test_a_schema_of_the_columns_gives_them_back():
    """Faults: the highest integer one too high; `missing` lost; edges rounded through JSON."""
    for schema in (SCHEMA, adult.SCHEMA, [{"name": n, "type": "number", **entry} for n, entry in NUMBERS.items()]):
        columns = columns_of(schema)
        again = columns_of(json.loads(json.dumps(schema_of(columns))))
        assert [dataclasses.replace(c, quantiles=0) for c in columns] == again


@pytest.mark.parametrize("rows, line", [
    (['"F"x,12', "F,72"], 2), (["F,72", "F,5", '"F,12'], 4), ([f"{'F' * 140_000},12", "F,3"], 2), (['"a"b,age'], 1),
])
def test_what_is_no_csv_names_file_and_line(tmp_path, rows, line):
    """A stray quote, an open quote, a field above the limit; in the header too. Fault: csv.Error, which is no
    ValueError, ends the program with a traceback."""
    columns = columns_of([{"name": "sex", "type": "category", "values": ["F", "M"]}, SCHEMA[1]])
    path = tmp_path / "table.csv"
    path.write_text("\n".join(rows if line == 1 else ["sex,age", *rows]) + "\n")
    with raises_at(file=path, line=line):
        read_table(path, columns)
