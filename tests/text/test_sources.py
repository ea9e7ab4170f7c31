"""mixdpo/files/sources.py: which files an option names, and the hub against a server on this machine.
What each test catches stands in its docstring."""

import builtins
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hubserver import SHA, hub  # noqa: F401  (a fixture)
from letters import GOOD, Letters, write
from raising import raises_at

from mixdpo.files.sources import data_files, files_of_split, kind_of, missing_file, parts_of, short_name
from mixdpo.preferences import read_preferences
from mixdpo.text.records import Fault, data_key

ROOT = Path(__file__).resolve().parents[2]


def jsonl(*records):
    return "".join(json.dumps(record) + "\n" for record in records).encode()


def without(monkeypatch, *packages):
    """Imports of these packages fail, as where they are not installed."""
    real = builtins.__import__

    def refuse(name, *arguments, **options):
        if name.partition(".")[0] in packages:
            raise ImportError(name)
        return real(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", refuse)


# ---- names


@pytest.mark.parametrize("name, kind", {"a.jsonl": "lines", "a": "lines", "a.txt.gz": "lines", "a.json": "json",
                                        "a.json.zst": "json", "a.csv.gz": "csv", "b/a.tsv": "tsv",
                                        "a.parquet": "parquet"}.items())
def test_the_container_follows_from_the_end_of_a_name(name, kind):
    """Catches: a packed file taken for another container; a name that no longer means JSON Lines."""
    assert kind_of(name) == kind


def test_several_files_are_read_as_one(tmp_path):
    """Catches: only the first read; another order; a file named wrongly in an error or a report."""
    first, second = write(tmp_path, GOOD, GOOD, name="a.jsonl"), write(tmp_path, {**GOOD, "user": "u"}, name="b.jsonl")
    pairs = read_preferences(f"{first},{second}", Letters(), 16, 16)
    assert [(pair.file, pair.line, pair.user) for pair in pairs] == [
        (str(first), 1, None), (str(first), 2, None), (str(second), 1, "u")]
    write(tmp_path, GOOD, "{", name="b.jsonl")
    with raises_at(file=second, line=2, kind=Fault):
        read_preferences(f"{first},{second}", Letters(), 16, 16)
    reports = []
    read_preferences(f"{first},{second}", Letters(), 3, 16, drop=True, report=reports.append)
    assert f"(line {second}:2)" in reports[0] and f": 3 (first: line {first}:1)" in reports[1]
    with raises_at(file=tmp_path / "c.jsonl"):
        read_preferences(f"{first},{tmp_path / 'c.jsonl'}", Letters(), 16, 16)
    assert missing_file(f"{first},{tmp_path / 'c.jsonl'}") == str(tmp_path / "c.jsonl")
    assert missing_file(f"{first},hub:a/b") is None and short_name(f"{first},{second}.gz,hub:a/b:c") == "a+b.jsonl+b:c"


def test_many_files_are_no_name_that_is_too_long(tmp_path, monkeypatch):
    """300 files of the working directory, and by their full paths. Catches: "File name too long", of a list that is
    longer than a name may be."""
    monkeypatch.chdir(tmp_path)
    names = [write(tmp_path, GOOD, name=f"train-{n:05}-of-00300.jsonl").name for n in range(300)]
    for parts in (names, [str(tmp_path / name) for name in names]):
        named = ",".join(parts)
        assert parts_of(named) == parts and len(read_preferences(named, Letters(), 16, 16)) == 300
        assert missing_file(named) is None and missing_file(f"{named},{'x' * 999}") == "x" * 999


def test_a_file_whose_name_has_a_comma(tmp_path):
    """Catches: a file that was read before and is now taken for two; an empty or repeated part that is ignored."""
    path = write(tmp_path, GOOD, name="a,b.jsonl")
    assert len(read_preferences(path, Letters(), 16, 16)) == 1
    for wrong in ("a.jsonl,", "a.jsonl,a.jsonl"):
        with raises_at(file=wrong):
            parts_of(wrong)


def test_the_key_covers_all_files_containers_and_columns(tmp_path):
    """Catches: a cached reference of other files, of another order or of other columns."""
    a, b = write(tmp_path, GOOD, name="a.jsonl"), write(tmp_path, GOOD, GOOD, name="b.jsonl")
    c, d = (write(tmp_path, "prompt,chosen,rejected", "a,b,c", name=name) for name in ("c.csv", "c.tsv"))
    keys = [data_key(a), data_key(f"{a},{b}"), data_key(f"{b},{a}"), data_key(a, "user=w"), data_key(a, "user=v"),
            data_key(f"{a},{b}", "user=w"), data_key(c), data_key(d)]
    assert len(set(keys)) == len(keys)
    assert data_key(a, "user=w,scores=") == data_key(a, "scores=,user=w"), "the order of --columns means nothing"
    before = data_key(f"{a},{b}")
    write(tmp_path, GOOD, {**GOOD, "user": "x"}, name="b.jsonl")
    assert data_key(f"{a},{b}") != before


# ---- the hub


SPLITS = {      # files of a data set, the split -> the files that are read; None: an error
    "numbered": (["README.md", "data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet",
                  "data/test-00000-of-00001.parquet"],
                 {"": [1, 2], "train": [1, 2], "test": [3], "validation": None}),
    "names that contain others": (["data/train_prefs-00000-of-00001.parquet", "data/train_sft-00000-of-00001.parquet"],
                                  {"train_prefs": [0], "": None, "train": None}),
    "a name within another": (["test.jsonl", "test_prefs.jsonl"], {"test": [0], "test_prefs": [1], "prefs": None}),
    "folders": (["harmless-base/train.jsonl.gz", "harmless-base/test.jsonl.gz", "helpful-base/train.jsonl.gz"],
                {"": None, "train": None, "harmless-base/train": [0], "test": [1], "helpful-base/train": [2]}),
    "a folder a split": (["train/a.json", "train/b.json", "test/a.json"], {"": [0, 1], "test": [2]}),
    "one split only": (["all.jsonl", ".gitattributes", "dataset_infos.txt"], {"": [0], "all": [0]}),
    "two kinds": (["train.csv", "train.jsonl", "train.parquet"], {"": [2]}),
    "nothing": (["README.md"], {"": None}),
    "folders with a point": (["v1.0/train.jsonl", "v1.1/train.jsonl"], {"": None, "v1.0/train": [0], "v1.1": [1]}),
    "a folder of splits": (["hh/test_prefs.jsonl", "hh/train_prefs.jsonl", "en/a.csv", "en/b.csv"],
                           {"hh": None, "hh/train_prefs": [1], "test_prefs": [0], "en": [2, 3]}),
    "numbers and hashes": (["data/train-00000-of-00002-1f.parquet", "data/train-00001-of-00002-e7.parquet",
                            "test-00001-of-00002.csv", "test-00002-of-00002.csv"], {"": [0, 1], "test": [2, 3]}),
    "a number is missing": (["train-00000-of-00003.parquet", "train-00002-of-00003.parquet", "test-00000-of-00001.csv"],
                            {"": None, "test": [2]}),
    "files of two uploads": (["train-00000-of-00001.csv", "train-00000-of-00002.csv", "train-00001-of-00002.csv",
                              "test-00000-of-00002.csv", "test-00001-of-00002.csv", "test-00002-of-00003.csv"],
                             {"": None, "test": None}),
    "a number twice": (["train-00000-of-00001-1f.csv", "train-00000-of-00001-e7.csv"], {"": None}),
    "two forms of a file": (["train.jsonl", "train.jsonl.gz", "test.json", "test.jsonl"], {"": None, "test": None}),
}


@pytest.mark.parametrize("case", SPLITS)
def test_the_files_of_a_split(case):
    """Catches: a split that is a part of another's name; folders mixed, those whose names differ behind a point too;
    all splits of a folder read as one; a part of a split taken for all of it; rows read twice."""
    names, splits = SPLITS[case]
    for split, wanted in splits.items():
        if wanted is None:
            with raises_at(file="hub:a/b"):
                files_of_split(names, split, "hub:a/b")
        else:
            assert files_of_split(names, split, "hub:a/b") == [names[n] for n in wanted], split


def test_a_split_from_the_hub(hub):
    """Catches: another revision or file; a file asked for again in the same process; errors that name a path in a
    cache instead of the data set's file; another key than that of the same local files."""
    hub.files |= {"train-00000-of-00002.jsonl": jsonl(GOOD, GOOD), "train-00001-of-00002.jsonl": jsonl(GOOD),
                  "test.jsonl": jsonl({**GOOD, "user": "t"})}
    pairs = read_preferences("hub:someone/prefs", Letters(), 16, 16)
    assert [(pair.file, pair.line) for pair in pairs] == [
        ("hub:someone/prefs/train-00000-of-00002.jsonl", 1), ("hub:someone/prefs/train-00000-of-00002.jsonl", 2),
        ("hub:someone/prefs/train-00001-of-00002.jsonl", 1)]
    asked = len(hub.asked)
    files = [path for _, path in hub.asked if "/resolve/" in path]
    assert files and all(f"/resolve/{SHA}/train-" in path for path in files)
    local = ",".join(str(file.path) for file in data_files("hub:someone/prefs"))
    assert data_key("hub:someone/prefs") == data_key(local) and len(hub.asked) == asked
    assert [pair.user for pair in read_preferences("hub:someone/prefs:test", Letters(), 16, 16)] == ["t"]


def test_what_the_hub_does_not_have(hub, monkeypatch):
    """Catches: a traceback of another package; a name that is not one sent to the server."""
    with raises_at(file="hub:someone/absent"):
        data_files("hub:someone/absent")
    hub.asked.clear()
    for wrong in ("hub:", "hub:prefs", "hub:a/b/c", "hub:a/../b"):
        with raises_at(file=wrong):
            data_files(wrong)
    assert not hub.asked
    hub.shutdown()
    hub.server_close()
    monkeypatch.setenv("HF_HUB_DOWNLOAD_TIMEOUT", "1")
    with raises_at(file="hub:someone/prefs"):
        data_files("hub:someone/prefs")


def test_a_missing_package_is_named_with_the_extra(tmp_path, monkeypatch):
    """Catches: an ImportError; an error that does not say what to install."""
    without(monkeypatch, "huggingface_hub", "pyarrow", "zstandard", "compression")
    for named in ("hub:someone/else", write(tmp_path, GOOD, name="a.parquet"), write(tmp_path, GOOD, name="a.zst")):
        with raises_at("[files]", file=named):
            read_preferences(named, Letters(), 16, 16)


@pytest.mark.slow
def test_the_endpoint_is_read_from_the_environment(hub):
    """In a process of its own. Catches: HF_ENDPOINT without effect."""
    hub.files["train.jsonl"] = jsonl(GOOD)
    code = "from mixdpo.files.sources import data_files; print(data_files('hub:someone/prefs')[0].path)"
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | hub.environment, cwd=ROOT, text=True,
                          capture_output=True)
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()).read_bytes() == jsonl(GOOD)
