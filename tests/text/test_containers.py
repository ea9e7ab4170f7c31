"""mixdpo/text/containers.py and files/unpack.py: the same records in every container, and containers with faults.
What each test catches stands in its docstring."""

import csv
import gzip
import io
import json

import pytest
from letters import GOOD, Letters
from raising import raises_at

from mixdpo.config import InputError
from mixdpo.files.sources import data_files
from mixdpo.preferences import read_preferences
from mixdpo.text import containers
from mixdpo.text.containers import rows
from mixdpo.text.records import Fault, data_key
from mixdpo.text.shapes import read_records

RECORDS = [{**GOOD, "user": "ann", "context": True},
           {"prompt": 'a "b",\tc', "chosen": "x\r\ny\nz", "rejected": "é\u2028"},
           {**GOOD, "user": "bob", "scores": {"length": [3, 2.5]}, "domain": "d"}]


def as_lines(records):
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode()


def as_cells(records, delimiter=","):
    names, text = ["prompt", "chosen", "rejected", "user", "scores", "domain", "context"], io.StringIO()
    writer = csv.writer(text, delimiter=delimiter, lineterminator="\r\n")
    writer.writerow(names)
    for record in records:
        cells = {name: json.dumps(v) if isinstance(v, (dict, bool)) else v for name, v in record.items()}
        writer.writerow([cells.get(name, "") for name in names])
    return text.getvalue().encode()


def as_parquet(records):
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    out = io.BytesIO()
    parquet.write_table(pa.Table.from_pylist([dict.fromkeys(RECORDS[0] | RECORDS[2]) | r for r in records]), out)
    return out.getvalue()


def zstd(raw):
    return pytest.importorskip("zstandard").ZstdCompressor().compress(raw)


def frames(raw):
    """Two frames, as pzstd and `cat a.zst b.zst` make them."""
    return zstd(raw[:60]) + zstd(raw[60:])


CONTAINERS = {
    "a.jsonl": as_lines,
    "a.jsonl.gz": lambda records: gzip.compress(as_lines(records)),
    "a.jsonl.zst": lambda records: zstd(as_lines(records)),
    "two-frames.jsonl.zst": lambda records: frames(as_lines(records)),
    "a.json": lambda records: json.dumps(records, indent=2).encode(),
    "one-line.json": lambda records: json.dumps(records, ensure_ascii=False).encode(),
    "bom.json": lambda records: b"\xef\xbb\xbf" + json.dumps(records).replace("[{", "\r\n[ {").encode(),
    "lines.json": as_lines,
    "a.json.gz": lambda records: gzip.compress(json.dumps(records).encode()),
    "a.csv": as_cells,
    "bom.csv": lambda records: b"\xef\xbb\xbf" + as_cells(records),
    "a.csv.zst": lambda records: zstd(as_cells(records)),
    "a.tsv": lambda records: as_cells(records, "\t"),
    "a.parquet": as_parquet,
}


def put(folder, name, raw):
    (folder / name).write_bytes(raw)
    return folder / name


def read(path, **options):
    return read_preferences(path, Letters(), 99, 99, report=lambda line: None, **options)


@pytest.mark.parametrize("name", CONTAINERS)
def test_every_container_holds_the_same_pairs(tmp_path, name):
    """Catches: a row lost, doubled or in another order; line breaks, quotes or null changed on the way; messages,
    scores or context of CSV left as text; only the first frame of a zstd file read."""
    wanted = read(put(tmp_path, "own.jsonl", as_lines(RECORDS)))
    pairs = read(put(tmp_path, name, CONTAINERS[name](RECORDS)))
    numbers = [2, 3, 6] if ".csv" in name or ".tsv" in name else [1, 2, 3]
    assert [pair.line for pair in pairs] == numbers and {pair.file for pair in pairs} == {str(tmp_path / name)}
    for one, other in zip(wanted, pairs, strict=True):
        fields = ("prompt", "chosen", "rejected", "user", "scores", "context", "domain", "annotator")
        assert [getattr(one, name) for name in fields] == [getattr(other, name) for name in fields]


@pytest.mark.parametrize("name", CONTAINERS)
def test_a_fault_in_a_row_has_its_number(tmp_path, name):
    """Catches: the number of another row; rows of a container that --drop cannot skip; good rows dropped along."""
    bad = [RECORDS[0], {**GOOD, "chosen": GOOD["rejected"]}, RECORDS[2]]
    path = put(tmp_path, name, CONTAINERS[name](bad))
    number = 3 if ".csv" in name or ".tsv" in name else 2
    with raises_at(file=path, line=number, kind=Fault):
        read(path)
    assert [pair.user for pair in read(path, drop=True)] == ["ann", "bob"]


@pytest.mark.parametrize("name", CONTAINERS)
def test_a_truncated_file_is_an_error(tmp_path, name):
    """Catches: the first half of a file taken for all of it. JSON Lines and CSV show it in their last line only."""
    raw = CONTAINERS[name](RECORDS * 20)
    path = put(tmp_path, name, raw[:-40])
    with pytest.raises(ValueError) as caught:
        read(path)
    assert str(path) in str(caught.value)
    if ".zst" in name or ".gz" in name:
        with raises_at(file=path):
            data_key(path)


@pytest.mark.parametrize("name", [name for name in CONTAINERS if "." in name.partition(".")[2]])
def test_a_plain_file_with_a_packed_name(tmp_path, name):
    """Catches: a traceback of the library."""
    if name.endswith(".zst"):
        pytest.importorskip("zstandard")
    with raises_at(file=put(tmp_path, name, as_lines(RECORDS))):
        read(tmp_path / name)


BROKEN = {                                                                  # name, bytes -> line of the error
    "not an array's end": ("a.json", b'[{"prompt": "a"} {"prompt": "b"}]', 1),
    "a comma too many": ("a.json", b'[{"prompt": "a", "chosen": "b", "rejected": "c"},]', 2),
    "text behind an array": ("a.json", b'[{"prompt": "a", "chosen": "b", "rejected": "c"}] []', None),
    "an empty array": ("a.json", b"[]", None),
    "an array of nothing": ("a.json", b"[", 1),
    "an array in Latin-1": ("a.json", b'[{"prompt": "caf\xe9"}]', None),
    "an open quote": ("a.csv", b'prompt,chosen,rejected\na,b,c\na,"b,c\na,b,c\n', 3),
    "a stray quote": ("a.csv", b'prompt,chosen,rejected\na,"b" x,c\n', 2),
    "CSV in Latin-1": ("a.csv", b"prompt,chosen,rejected\na,b,c\na,caf\xe9,c\n", 3),
    "a repeated column": ("a.csv", b"prompt,chosen,rejected,chosen\na,b,c,d\n", 1),
    "an empty table": ("a.csv", b"", None),
    "a table without rows": ("a.csv", b"prompt,chosen,rejected\n", None),
    "not Parquet": ("a.parquet", b"PAR1 and no more", None),
}


@pytest.mark.parametrize("case", BROKEN)
@pytest.mark.parametrize("drop", [False, True])
def test_a_container_that_cannot_be_read_further(tmp_path, case, drop):
    """Catches: a traceback of csv, json or pyarrow; an error without file and line; half a file read under --drop."""
    name, raw, line = BROKEN[case]
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow")
    with raises_at(file=put(tmp_path, name, raw), line=line):
        read(tmp_path / name, drop=drop)


def test_a_parquet_file_with_a_repeated_column(tmp_path):
    """Catches: one of two columns of the same name taken silently."""
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    names = ["prompt", "chosen", "rejected", "chosen"]
    parquet.write_table(pa.Table.from_arrays([pa.array(["a"])] * 4, names), tmp_path / "a.parquet")
    with raises_at("'chosen'", file=tmp_path / "a.parquet"):
        read(tmp_path / "a.parquet")


def test_rows_that_differ_in_their_fields(tmp_path):
    """Parquet gives each row the fields of all rows. Catches: a ranking beside pairs, or scores of other names, that
    can be read as JSON Lines and not as Parquet."""
    pytest.importorskip("pyarrow")
    records = [{**GOOD, "scores": {"a": [1, 2]}}, {**GOOD, "scores": {"b": [2.5, 1]}, "user": "u"}, GOOD,
               {"prompt": "p", "ranking": [["a"], ["b", "c"]], "rest": ["d"]}]
    names = dict.fromkeys(name for record in records for name in record)
    raw = as_parquet([names | record for record in records])
    wanted, found = ([record for _, record, _ in read_records(put(tmp_path, *file), "", print)]
                     for file in (("a.jsonl", as_lines(records)), ("a.parquet", raw)))
    assert found == wanted == records


def test_an_error_does_not_repeat_a_long_value(tmp_path):
    """Catches: megabytes of a column of bytes on the screen."""
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    for name in ("prompt", "user", "scores", "context"):
        parquet.write_table(pa.table({key: [value] for key, value in {**GOOD, name: b"x" * 10**6}.items()}),
                            tmp_path / "a.parquet")
        with raises_at(name, file=tmp_path / "a.parquet", line=1, kind=Fault) as caught:
            read(tmp_path / "a.parquet")
        assert len(caught.value.message) < 400


@pytest.mark.parametrize("kind, value", [
    ("timestamp('ns')", 1_700_000_000_123_456_789), ("duration('ns')", 1), ("timestamp('us')", 2**62),
    ("date32()", 2**31 - 1), ("timestamp('ms', tz='No/Where')", 0), ("binary()", b"caf\xe9")])
def test_parquet_values_that_python_cannot_hold(tmp_path, kind, value):
    """Times in nanoseconds, years above 9999, an unknown time zone, a text that is not UTF-8. Catches: a file that is
    refused because of a column that nobody uses; such a value used as a text or an id; a row that --drop cannot skip,
    or that a failed step cannot keep."""
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    odd = pa.array([None, value, None], eval(kind, vars(pa)))
    odd = odd.view(pa.string()) if pa.types.is_binary(odd.type) else odd
    texts = {name: pa.array([GOOD[name]] * 3) for name in ("prompt", "chosen", "rejected")}
    parquet.write_table(pa.table(texts | {"odd": odd}), tmp_path / "a.parquet")
    assert len(read(tmp_path / "a.parquet")) == 3
    with raises_at("user", file=tmp_path / "a.parquet", line=2, kind=Fault):
        read(tmp_path / "a.parquet", columns="user=odd")
    assert [pair.line for pair in read(tmp_path / "a.parquet", columns="user=odd", drop=True)] == [1, 3]
    source, = data_files(tmp_path / "a.parquet")
    kept = [json.loads(row.line())["odd"] for row in rows(source)]
    assert kept[0] is kept[2] is None and str(odd.type) in kept[1]


def test_a_damaged_parquet_file(tmp_path):
    """One byte wrong, at many places: in pages, texts and the footer. Catches: an error of pyarrow, which has several
    types, that is no InputError; one without the file's name."""
    raw, refused = as_parquet(RECORDS * 20), 0
    for place in range(0, len(raw), 31):
        path = put(tmp_path, "a.parquet", raw[:place] + bytes([raw[place] ^ 255]) + raw[place + 1 :])
        try:
            read(path, drop=True)
        except InputError as error:
            assert str(path) in str(error)
            refused += 1
    assert refused > 30


def test_rows_of_csv_with_a_wrong_number_of_cells(tmp_path):
    """Catches: cells shifted into other columns; a short row filled up; empty lines that are errors."""
    path = put(tmp_path, "a.csv", b"prompt,chosen,rejected\n\na,b\na,b,c,d\n\na,b,c\n")
    with raises_at(2, file=path, line=3, kind=Fault) as caught:
        read(path)
    assert caught.value.kind == "wrong number of cells"
    assert [pair.line for pair in read(path, drop=True)] == [6]


def test_a_long_cell(tmp_path):
    """Catches: the csv module's limit of 131,072 characters in a field; the limit left changed for other readers."""
    before = csv.field_size_limit()
    path = put(tmp_path, "a.csv", b"prompt,chosen,rejected\na," + b"x" * 200_000 + b",c\n")
    assert len(read(path)[0].chosen) == 99 and csv.field_size_limit() == before


def test_rows_as_lines(tmp_path):
    """What a failed step keeps of each container. Catches: a line of JSON Lines that is written anew; other values; a
    row on several lines."""
    raw = as_lines(RECORDS)
    (tmp_path / "a.jsonl").write_bytes(raw.replace(b'": "', b'" :  "'))
    source, = data_files(tmp_path / "a.jsonl")
    assert b"".join(row.line() for row in rows(source)) == (tmp_path / "a.jsonl").read_bytes()
    for name in ("a.json", "a.csv", "a.parquet"):
        source, = data_files(put(tmp_path, name, CONTAINERS[name](RECORDS)))
        lines = [row.line() for row in rows(source)]
        assert all(line.count(b"\n") == 1 for line in lines)
        kept = [json.loads(line) for line in lines]
        assert [row["chosen"] for row in kept] == [record["chosen"] for record in RECORDS]


def test_an_array_that_is_too_large(tmp_path, monkeypatch):
    """Catches: a packed array that unpacks to any size, read into memory."""
    monkeypatch.setattr(containers, "ARRAY", 5000)
    path = put(tmp_path, "a.json.gz", gzip.compress(b"[" + b" " * 10**6))
    with raises_at(file=path):
        read(path)
