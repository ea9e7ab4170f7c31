"""data/tables/suite.py and rivals.py: the suite's tables, their split and schemas, planted tables, samples of rivals.
Each docstring names the faults that the test is there for."""

import io
import json
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from raising import raises_at

from data.tables import rivals, suite, synth
from data.tables.marginals import detector, distances, parity_table, product_mixture, total_variation, xor_chain
from data.tables.mst import zcdp
from mixdpo.files import fetch
from mixdpo.tabular.columns import columns_of

ROOT = Path(__file__).resolve().parents[2]

# ---- schemas


def test_the_parts_of_the_suite_do_not_overlap():
    """Faults: a kept table among those that settings are chosen on; a table without a description."""
    assert len(set(suite.NAMES)) == len(suite.DEVELOPMENT) + len(suite.KEPT) == 8
    assert set(suite.DESCRIBED) == set(suite.NAMES) and not set(suite.PLANTED) & set(suite.NAMES)
    assert set(suite.KEPT) >= {"randhie", "diamonds"} and suite.DEVELOPMENT[0] == "adult"


@pytest.mark.parametrize("name", suite.NAMES)
def test_schemas_are_public_and_complete(name):
    """Faults: bins found in the data; a target that is no column; no source for the bounds; an asset that is not
    fetched; a table outside of 500 to 50,000 rows."""
    entry = suite.DESCRIBED[name]
    columns, target = suite.described(name)
    assert columns == columns_of(entry["schema"]) and not any(column.quantiles for column in columns)
    assert columns[target].name == entry["target"] and 2 <= columns[target].size <= 7
    if name != "adult":
        assert all(entry[what] for what in ("title", "package", "licence", "documentation", "bounds"))
        package = fetch.ASSETS[entry["asset"]].sources[0]
        assert entry["package"] == package.requirement and 500 <= entry["train"] <= 50_000
        assert ("member" in entry) == (entry["asset"] == "pydataset")


# ---- files

CRIMINAL = ["id", "name", *(column["name"] for column in suite.DESCRIBED["criminal"]["schema"]), "priors_count"]


def a_file(folder, name, lines):
    """A table's file with these lines, as its package ships it."""
    text = "\n".join(lines) + "\n"
    path = folder / name
    if "member" not in suite.DESCRIBED[name]:
        path.write_text(text)
        return path
    with tarfile.open(path, "w:gz") as archive:
        info = tarfile.TarInfo(suite.DESCRIBED[name]["member"])
        info.size = len(text.encode())
        archive.addfile(info, io.BytesIO(text.encode()))
    return path


def test_columns_are_read_by_name(tmp_path):
    """Faults: names of people kept; the second of two columns with one name; the number of a row taken for a column;
    a file without a line of names that loses its first row."""
    row = ["1", "somebody", "Male", "69", "Other", "0", "0", "0", "3", "-1", "F", "1", "1", "0", "7"]
    path = a_file(tmp_path, "criminal", [",".join(CRIMINAL), ",".join(row)])
    found, = suite.read(path, CRIMINAL[2:-1], "criminal")
    assert found == dict(zip(CRIMINAL[2:-1], row[2:-1])) and found["priors_count"] == "3"
    path = a_file(tmp_path, "credit", [" ".join(["A11", "6"] + ["x"] * 19), " ".join(["A12", "48"] + ["x"] * 19)])
    found = suite.read(path, suite.CREDIT, "credit")
    assert [(row["status"], row["duration"]) for row in found] == [("A11", "6"), ("A12", "48")]
    names = [column["name"] for column in suite.DESCRIBED["chile"]["schema"]]
    header, row = ",".join(['""', *(f'"{n}"' for n in names)]), '"1","N",175000,"M",65,"P",35000,1.0,"Y"'
    path = a_file(tmp_path, "chile", [header, row])
    found, = suite.read(path, names, "chile")
    assert found["region"] == "N" and found["vote"] == "Y" and "" not in found


def test_faults_in_a_file_are_named(tmp_path):
    """Faults: a traceback of gzip, tarfile or csv; a short row that is passed over; a column that is missing."""
    path = a_file(tmp_path, "criminal", [",".join(CRIMINAL), "1,2,3"])
    with raises_at("3 fields", 15, file=path, line=2):
        suite.read(path, CRIMINAL[2:-1], "criminal")
    with raises_at("'sex'", file=a_file(tmp_path, "criminal", ["id,name"]), line=1):
        suite.read(path, CRIMINAL[2:-1], "criminal")
    path.write_bytes(b"\xff")
    with raises_at(file=path):
        suite.read(path, CRIMINAL[2:-1], "criminal")
    path = a_file(tmp_path, "chile", ["x"])
    whole = path.read_bytes()
    for broken in (whole[:40], b"not gzip"):
        path.write_bytes(broken)
        with raises_at("Chile.csv", file=path):
            suite.read(path, ["region"], "chile")
    path.write_bytes(whole)
    with raises_at("diamonds.csv", file=path):
        suite.read(path, ["cut"], "diamonds")


def test_the_split_is_fixed_and_has_each_row_once(tmp_path, monkeypatch):
    """Faults: a split that depends on the order or on a random state; rows in both parts, or in the order of the file;
    another size."""
    lines = [" ".join([f"A1{n % 4 + 1}", str(n)] + ["x"] * 19) for n in range(1000)]
    path = a_file(tmp_path, "credit", lines)
    monkeypatch.setattr(fetch, "asset", lambda name, data: path)
    train, test = suite.rows("credit")
    places = [[int(row["duration"]) for row in part] for part in (train, test)]
    assert (len(train), len(test)) == (700, 300) and sorted(sum(places, [])) == list(range(1000))
    assert places[0][:5] == [700, 267, 501, 100, 561] and suite.rows("credit") == (train, test)
    assert abs(np.mean(places[0]) - 500) < 40 and places[0] != sorted(places[0])


def test_a_folder_of_ones_own_comes_first(tmp_path):
    """Fault: the data folder not passed on; a file of another version taken."""
    path = tmp_path / "german.data"
    path.write_text("A11 6\n")
    with raises_at("truncated or altered", file=path):
        suite.coded("credit", tmp_path)
    with raises_at("is not a folder", file=tmp_path / "none"):
        suite.coded("randhie", tmp_path / "none")


def test_the_command_knows_the_suite(tmp_path, monkeypatch):
    """Faults: a data set of another name, or a planted table, that is looked for; the target of another table; an error
    that names Adult."""
    codes = np.array([[0] * 20 + [1]])
    made = suite.Tables(suite.described("credit")[0], codes, codes, 20)
    monkeypatch.setattr(suite, "coded", lambda name, data, columns: made if (name, data) == ("credit", "d") else None)
    assert synth.read_tables(synth.SynthConfig(dataset="credit", data_folder="d")) is made
    with raises_at("'parity'", "randhie", option="dataset"):
        synth.check(synth.SynthConfig(dataset="parity"))
    with raises_at("--dataset fair", option="target"):
        synth.read_tables(synth.SynthConfig(dataset="fair", target="age"))


# ---- planted tables


def test_a_chain_shows_in_threes_alone():
    """Faults: a pair that is dependent; a link that is missing, or not flipped as often as it should be."""
    codes = xor_chain(20_000, 3, np.random.default_rng(0))
    assert codes.shape == (20_000, 7) and set(np.unique(codes)) == {0, 1}
    uniform = np.stack(np.unravel_index(np.arange(2**7), [2] * 7), axis=1)
    assert total_variation(codes, uniform, [2] * 7, 2).max() < 0.02
    for a in (0, 2, 4):
        assert (codes[:, a] ^ codes[:, a + 1] ^ codes[:, a + 2]).mean() == pytest.approx(0.05, abs=0.006)


def test_a_mixture_is_independent_within_its_classes():
    """Faults: columns of one class only; shares that are alike in all classes; a value above the largest."""
    codes = product_mixture(40_000, 3, np.random.default_rng(0), classes=2, size=3)
    rng = np.random.default_rng(0)
    shares = rng.dirichlet(np.full(3, 0.5), size=(2, 3))
    expected = np.einsum("ka,kb,kc->abc", *(shares[:, j] / (2 if j == 0 else 1) for j in range(3)))
    counts = np.bincount(np.ravel_multi_index(codes.T, [3] * 3), minlength=27).reshape(3, 3, 3) / 40_000
    assert np.abs(counts - expected).sum() / 2 < 0.02
    alone = np.einsum("a,b,c->abc", *(expected.sum(tuple({0, 1, 2} - {j})) for j in range(3)))
    assert np.abs(alone - expected).sum() / 2 > 0.05


@pytest.mark.parametrize("name", suite.PLANTED)
def test_planted_tables_are_the_same_at_every_call(name):
    """Faults: held-out rows among those for training; a world that differs between the methods of a study."""
    first, second = suite.planted(name), suite.planted(name)
    assert np.array_equal(first.train, second.train) and np.array_equal(first.test, second.test)
    assert (len(first.train), len(first.test)) == (20_000, 5_000) and first.target == len(first.sizes) - 1
    assert 0 < distances(first.train, first.test, first.sizes)[2] < 0.03
    assert not np.array_equal(first.train[:5_000], first.test)
    assert (first.train.max(0) + 1).tolist() == first.sizes


# ---- the detector


def test_a_detector_tells_what_differs_and_nothing_else():
    """Faults: scores of rows that a model was fitted to; another label; kinds with other numbers of rows; chance
    without a seed."""
    rng = np.random.default_rng(0)
    real, same = parity_table(3000, 4, rng), parity_table(2000, 4, rng)
    coins = rng.integers(2, size=(4000, 4))
    kinds = ["category"] * 4
    assert detector(real, same, kinds) == pytest.approx(0.5, abs=0.03)
    assert detector(real, coins, kinds) == pytest.approx(0.75, abs=0.03)    # odd rows are known, half of the others
    assert detector(real, coins, kinds, rows=500) == detector(real, coins, kinds, rows=500)
    numbers = rng.integers(1000, size=(2000, 2))
    assert detector(numbers, rng.integers(1000, size=(2000, 2)), ["number"] * 2) == pytest.approx(0.5, abs=0.04)


# ---- rivals


def small(rows=2000, seed=0) -> suite.Tables:
    """Three columns of 3, 2 and 4 values, the first two equal but for a tenth; a legal value that no row has."""
    rng = np.random.default_rng(seed)
    a, c = rng.integers(2, size=rows), rng.integers(3, size=rows)
    codes = np.stack([a, np.where(rng.random(rows) < 0.1, 1 - a, a), c], axis=1)
    columns = columns_of([{"name": str(j), "type": "category", "values": list("abcd"[:size])}
                          for j, size in enumerate((3, 2, 4))])
    return suite.Tables(columns, codes, codes, 1)


def test_a_sample_is_stored_and_read_back(tmp_path, monkeypatch):
    """Faults: a sample made twice; that of another budget or table taken; a file that is left half written."""
    calls, tables = [], small()
    monkeypatch.setattr(rivals, "available", lambda: True)
    monkeypatch.setattr(rivals, "generate", lambda of, method, rho: calls.append((method, rho)) or of.train[::-1])
    path = rivals.sample_path(tmp_path / "samples", "small", "aim", 1.0, 0)
    first, again = (rivals.sample_of(path, tables, "aim", 1.0, 1e-5) for _ in range(2))
    assert calls == [("aim", zcdp(1.0, 1e-5))] and np.array_equal(again["codes"], tables.train[::-1])
    assert first["seconds"] == again["seconds"] and [*path.parent.iterdir()] == [path]
    for other in ((tables, "aim", 2.0, 1e-5), (tables, "mst", 1.0, 1e-5), (small(seed=1), "aim", 1.0, 1e-5)):
        with raises_at("another", file=path):
            rivals.sample_of(path, *other)
    monkeypatch.setattr(rivals, "available", lambda: False)
    assert np.array_equal(rivals.sample_of(path, tables, "aim", 1.0, 1e-5)["codes"], first["codes"])
    with raises_at("make .venv/rivals", file="data/tables/requirements.txt"):
        rivals.sample_of(tmp_path / "none.npz", tables, "aim", 1.0, 1e-5)


def test_memory_is_that_of_the_call():
    """In a process of its own: one that keeps freed memory would not grow. Faults: the peak of what ran before; the
    memory of the process."""
    code = ("import numpy as np; from data.tables.rivals import with_cost; np.ones(40_000_000).sum(); "
            "made, seconds, megabytes = with_cost(lambda: np.ones(12_500_000)); print(len(made), seconds, megabytes)")
    said = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    length, seconds, megabytes = map(float, said.split())
    assert length == 12_500_000 and 0 < seconds < 60
    assert megabytes == pytest.approx(100, abs=15) or np.isnan(megabytes)


@pytest.mark.slow
@pytest.mark.parametrize("method", rivals.METHODS)
def test_rivals_find_a_dependence_and_stay_legal(method):
    """Faults: codes in another order; a cell for missing values; a legal value that is dropped because no row has it;
    a budget that is not passed on."""
    pytest.importorskip("opendp", reason="OpenDP is not installed (`make .venv/rivals`)")
    tables = small()
    made = rivals.generate(tables, method, zcdp(3.0, 1e-5))
    assert made.shape == tables.train.shape and made.dtype == np.int64
    assert made.min() >= 0 and all(made[:, j].max() < size for j, size in enumerate(tables.sizes))
    found = distances(tables.train, made, tables.sizes)
    assert found[1] < 0.06 and found[2] < 0.09
    noisy = rivals.generate(tables, method, zcdp(0.01, 1e-5))
    assert distances(tables.train, noisy, tables.sizes)[2] > 2 * found[2]


def test_options_of_rivals_carry_their_name():
    """Faults: a traceback for a method or a budget that makes no sense; no noise at all."""
    for option, value in (("method", "gan"), ("dataset", "mnist"), ("epsilon", "inf"), ("epsilon", "0"),
                          ("seed", "-1")):
        with raises_at(option=option):
            rivals.main([f"--{option}", value])


def test_described_is_json_that_a_reader_can_follow():
    """Fault: a table twice, of which the second is silently taken."""
    pairs = json.loads((suite.Path(suite.__file__).parent / "suite.json").read_text(), object_pairs_hook=list)
    assert len(pairs) == len(dict(pairs)) == 7
