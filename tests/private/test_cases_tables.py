"""Runs of tables, and folders that runs write into: what must not happen when files, options or folders change between
two commands. Docstrings name the faults that each test is there for."""

import csv
import json
import math
import resource
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import tinyjob
from fakejob import make_job
from raising import raises_at

from data import hh, imdb
from data.experiment import common, judged, planted, simulated, stages
from data.experiment.presets import HH, IMDB, REVIEWS, ULTRAFEEDBACK
from data.report.page import report
from data.studies import __main__ as studies
from data.studies import study
from data.tables import synth
from mixdpo.config import InputError, to_json
from mixdpo.runs.checkpoint import checkpoints
from mixdpo.tabular import dp_tbart as tabular
from mixdpo.tabular.columns import read_schema
from mixdpo.tabular.rows import read_table

SCHEMA = [{"name": "sex", "type": "category", "values": ["F", "M"]},
          {"name": "age", "type": "number", "low": 0, "high": 99, "quantiles": 5, "integer": True}]
RELEASE = ("synthetic.csv", "schema.json", "model.safetensors", "privacy.json")


def write_rows(path, rows):
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([["sex", "age"], *rows])


def rows_of(seed, n=400):
    rng = np.random.default_rng(seed)
    return [["FM"[rng.integers(2)], str(rng.integers(100))] for _ in range(n)]


@pytest.fixture
def own(tmp_path):
    """A small table, its schema and its test table, as options of data.tables.synth."""
    write_rows(tmp_path / "table.csv", rows_of(0))
    write_rows(tmp_path / "test.csv", rows_of(1, 60))
    (tmp_path / "schema.json").write_text(json.dumps(SCHEMA))
    return {"data": tmp_path / "table.csv", "schema": tmp_path / "schema.json", "test": tmp_path / "test.csv",
            "target": "sex", "out": tmp_path / "out", "preset": "smoke", "delta": 1e-4}


def call(options):
    synth.main([word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", str(value))])


def stopped(options, monkeypatch, step=2):
    """The command, stopped after a step that has a checkpoint."""
    progress = tabular.Progress.__call__

    def stop(self, done, total, note=""):
        if done > step:
            raise KeyboardInterrupt
        progress(self, done, total, note)

    with monkeypatch.context() as within:
        within.setattr(tabular.Progress, "__call__", stop)
        with pytest.raises(KeyboardInterrupt):
            call(options | {"save_minutes": 0})


def bytes_of(folder, names=RELEASE):
    return {name: (folder / name).read_bytes() for name in names}


def refused(options, option):
    with pytest.raises(InputError) as error:
        call(options)
    assert error.value.option == option


# --- another table under the same name --------------------------------------------------------------------------------


@pytest.mark.parametrize("name, change", [
    ("data", lambda path: write_rows(path, rows_of(2))), ("test", lambda path: write_rows(path, rows_of(3, 60))),
    ("schema", lambda path: path.write_text(json.dumps([SCHEMA[0] | {"values": ["M", "F"]}, SCHEMA[1]]))),
])
def test_a_stopped_run_does_not_go_on_with_other_contents(own, monkeypatch, name, change):
    """The same number of rows with other contents; F and M exchanged; another test table. Fault: a checkpoint that
    compares only the names of the files."""
    stopped(own, monkeypatch)
    change(own[name])
    with raises_at(f"{name}_key", file=checkpoints(own["out"])[0]):
        call(own)
    assert not (own["out"] / "privacy.json").exists()


def test_a_stopped_run_goes_on_with_the_same_contents_elsewhere(own, monkeypatch, capsys, tmp_path):
    """Fault: a table that was moved, or packed, taken for another."""
    stopped(own, monkeypatch)
    (tmp_path / "moved").mkdir()
    for name in ("data", "test", "schema"):
        own[name] = shutil.move(own[name], tmp_path / "moved")
    call(own)
    assert "resumed at step 2 of 4" in capsys.readouterr().out


# --- one secret, one release ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gone", ["report.md", "figures.json"])
def test_a_report_is_made_again(own, gone):
    """Someone removes a file that may not be published. Fault: a missing figures.json, without which every later call
    ended with "run the same command again"."""
    call(own)
    made = bytes_of(own["out"])
    (own["out"] / gone).unlink()
    call(own)
    assert bytes_of(own["out"]) == made and "DP-TBART" in (own["out"] / gone).read_text()


@pytest.mark.parametrize("name", ["privacy.json", "schema.json"])
@pytest.mark.parametrize("text", ["", "{", "[]", "{}", "null", "\xff"])
def test_a_damaged_file_of_a_release_is_named(own, name, text):
    """Fault: a traceback."""
    call(own)
    (own["out"] / "report.md").unlink()                                     # which would not be made again
    (own["out"] / name).write_text(text, "latin-1")
    with pytest.raises(InputError) as error:
        call(own)
    assert error.value.file == own["out"] / name


@pytest.mark.parametrize("dies", [RuntimeError, KeyboardInterrupt, OSError])
def test_a_release_is_finished_before_its_report(own, monkeypatch, dies, capsys):
    """However the report ends: the secret is deleted, other options are an error, and the same command makes the report
    of the same release. Faults: the secret deleted only after the report, so that another release has the same noise;
    a finished release overwritten, so that privacy.json describes one release although there were two; another schema
    reported as checksums, or as another table."""
    with monkeypatch.context() as within:
        within.setattr(synth, "baselines", lambda *_: (_ for _ in ()).throw(dies()))
        with pytest.raises(dies):
            call(own)
    made, out = bytes_of(own["out"]), own["out"]
    assert not (out / "noise-key").exists() and not (out / "checkpoint").exists() and not (out / "report.md").exists()
    for change in ({"epsilon": 2}, {"delta": 1e-6}, {"steps": 5}, {"rows": 7}, {"clip": 0.5}, {"target": "age"}):
        refused(own | change, "out")
    table = own["data"].read_text()
    own["data"].write_text(table.replace("F,", "M,", 1))
    refused(own, "out")
    own["data"].write_text(table)
    schema = own["schema"].read_text()
    own["schema"].write_text(schema.replace('"F", "M"', '"M", "F"'))         # all codes differ; the tables do not
    with raises_at("(--schema)", option="out") as error:
        call(own)
    assert not any(name in error.value.message for name in ("--data", "--test", "_key"))
    own["schema"].write_text(schema)
    assert bytes_of(out) == made
    for _ in range(2):
        call(own)
        assert bytes_of(out) == made and "DP-TBART" in (out / "report.md").read_text()
    assert "finished before" in capsys.readouterr().out
    figures = json.loads((out / "figures.json").read_text())["figures"]
    assert figures["the real table"]["distance"] == {"1": 0, "2": 0}        # of one sample: in the release's bins
    assert [*figures] == ["DP-TBART", "independent columns", "MST", "the real table", "a second real table"]


def test_a_command_that_died_before_it_could_drop_the_secret(own, monkeypatch):
    """Faults: the next command of other options takes the secret; that of the same options makes a second release."""
    with monkeypatch.context() as within:
        within.setattr(synth, "delete_key", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            call(own)
    made = bytes_of(own["out"])
    assert (own["out"] / "noise-key").exists()
    refused(own | {"epsilon": 2}, "out")
    call(own)
    assert bytes_of(own["out"]) == made and not (own["out"] / "noise-key").exists()


def test_the_released_model_is_whole_and_may_be_read_by_others(own):
    """Faults: a full disk ends in a traceback, and leaves the part that fitted under the model's name; a file for
    publication that its owner alone can read."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8000, hard))                 # the model alone has more bytes
    try:
        with pytest.raises(OSError, match="model.safetensors"):
            call(own | {"save_minutes": math.inf})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (own["out"] / "synthetic.csv").exists() and not (own["out"] / "model.safetensors").exists()
    call(own | {"save_minutes": math.inf})
    modes = {(own["out"] / name).stat().st_mode & 0o777 for name in RELEASE}
    assert len(modes) == 1, f"got modes {sorted(map(oct, modes))}"


def test_a_release_reads_back(own):
    """The table is read with the released schema.json, which has the bins that were found. Fault: bins not saved."""
    call(own)
    columns = read_schema(own["out"] / "schema.json")
    assert read_table(own["out"] / "synthetic.csv", columns).shape == (400, 2) and 2 <= columns[1].size <= 5


# --- what is known before the first step ------------------------------------------------------------------------------


def test_a_test_table_with_one_class_is_refused_before_anything_is_made(own):
    """Fault: an AssertionError after training, and no report."""
    write_rows(own["test"], [["F", "88"], ["F", "17"], ["F", "10"]])
    with pytest.raises(InputError) as error:
        call(own)
    assert (error.value.option, error.value.file) == ("test", str(own["test"])) and not own["out"].exists()


def test_a_target_without_other_columns_is_refused(own):
    """Fault: a traceback from the classifiers, which get no column."""
    own["schema"].write_text(json.dumps(SCHEMA[:1]))
    for name in ("data", "test"):
        own[name].write_text("sex\nF\nM\nM\n")
    refused(own, "target")
    call({name: own[name] for name in ("data", "schema", "out", "preset")})                 # one column is a table, too


def test_a_target_whose_found_bins_leave_one_class_has_no_auroc(own, monkeypatch):
    """Bins are found under noise, so this cannot be known before. Fault: an AssertionError, and no report."""
    joined = tabular.joined
    monkeypatch.setattr(tabular, "joined", lambda column, counts: joined(column, np.eye(len(counts))[0]))
    write_rows(own["test"], [["F", "88"], ["M", "17"], ["F", "30"]])
    call(own | {"target": "age"})
    text = (own["out"] / "figures.json").read_text()
    found = json.loads(text, parse_constant=pytest.fail)["figures"]["DP-TBART"]["utility"]["logistic"]
    assert found["auroc"] is None and 0 <= found["accuracy"] <= 1


# --- folders that are not a run's own ---------------------------------------------------------------------------------


def kept(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_a_table_is_not_written_over_what_is_not_its_own(own, tmp_path):
    """The folder of its data, a model, a run of train.py, anybody's files. Faults: the real table written over by
    the synthetic one; a model's weights by the table's."""
    folders = {name: tmp_path / name for name in ("home", "model", "run", "notes")}
    for folder in folders.values():
        folder.mkdir()
    shutil.copy(own["data"], folders["home"] / "synthetic.csv")
    tinyjob.make_model(folders["model"])
    (folders["run"] / "config.json").write_text(json.dumps({"data": "d", "model": "m", "out": "o", "experts": 2}))
    (folders["notes"] / "notes.txt").write_text("mine")
    before = {name: kept(folder) for name, folder in folders.items()}
    for name, folder in folders.items():
        refused(own | {"out": folder} | ({"data": folder / "synthetic.csv"} if name == "home" else {}), "out")
    (tmp_path / "link").symlink_to(folders["home"])
    refused(own | {"out": tmp_path / "link", "data": folders["home"] / "synthetic.csv"}, "out")
    refused(own | {"out": own["data"]}, "out")
    assert {name: kept(folder) for name, folder in folders.items()} == before


def test_a_run_is_not_written_over_what_is_not_its_own(tmp_path):
    """The folder of the model, of the data, of a table, or with other files. Fault: the run overwrites the model's
    config.json, and the model cannot be read any more."""
    records, model = tinyjob.make_records(), tinyjob.make_model(tmp_path / "model")
    (tmp_path / "home").mkdir()
    data, others = tinyjob.write(tmp_path / "home" / "own.jsonl", records), tmp_path / "others"
    others.mkdir()
    (others / "config.json").write_text(json.dumps({"synth": {}}))
    before = {folder: kept(folder) for folder in (model, tmp_path / "home", others)}
    for out in before:
        with pytest.raises(InputError) as error:
            tinyjob.run(tmp_path, model, records, data=data, out=str(out))
        assert error.value.option == "out"
    with pytest.raises(InputError) as error:                                # of two models, the second
        other = tinyjob.make_model(tmp_path / "second")
        tinyjob.run(tmp_path, f"{model},{other}", records, data=data, out=str(other), sharing="models")
    assert error.value.option == "out"
    assert {folder: kept(folder) for folder in before} == before


def test_a_runs_own_folder_is_used_again(tmp_path, capsys):
    """New, empty, just started, finished, or without its config.json. Fault: a run refuses its own folder."""
    records, model = tinyjob.make_records(), tinyjob.make_model(tmp_path / "model")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "noise-key").write_text("begun")
    out = tinyjob.run(tmp_path, model, records)
    tinyjob.run(tmp_path, model, records)
    assert "finished before" in capsys.readouterr().out
    (out / "config.json").unlink()
    tinyjob.run(tmp_path, model, records)
    assert "finished before" in capsys.readouterr().out


def test_a_job_and_its_kin_do_not_begin_among_other_files(tmp_path):
    """Fault: files with fixed names written into a folder with other files."""
    (tmp_path / "report.md").write_text("mine")
    for command in (lambda: planted.main(["--out", str(tmp_path)]),
                    lambda: simulated.main(imdb.DATASET, ["--preset", "smoke", "--out", str(tmp_path)]),
                    lambda: judged.main(hh.DATASET, ["--preset", "smoke", "--out", str(tmp_path)])):
        with pytest.raises(InputError) as error:
            command()
        assert error.value.option == "out"
    assert kept(tmp_path) == {"report.md": b"mine"}


# --- options of the data scripts --------------------------------------------------------------------------------------


@pytest.mark.parametrize("command, option, values", [
    (planted.main, "types", ["0", "2,-1", ""]), (planted.main, "each", ["0", ""]), (planted.main, "pairs", ["0", "3"]),
    (planted.main, "features", ["0"]), (planted.main, "seeds", ["0"]), (planted.main, "starts", ["-1"]),
    (studies.main, "name", ["none"]), (studies.main, "preset", ["cpu"]),
    (lambda words: simulated.main(imdb.DATASET, words), "sentiment", ["me"]),
    (lambda words: simulated.main(imdb.DATASET, words), "preset", ["big"]),
])
def test_options_out_of_range_carry_their_name(command, option, values, tmp_path, monkeypatch):
    """Faults: a traceback, or an endless run, for a number that makes no sense; an error that names five options."""
    monkeypatch.chdir(tmp_path)
    for value in values:
        words = {"--name": "fixed"} if command is studies.main else {}
        with pytest.raises(InputError) as error:
            command([word for pair in (words | {f"--{option}": value}).items() for word in pair])
        assert error.value.option == option and not [*tmp_path.iterdir()]


def test_presets_are_checked_before_anything_is_made():
    """Fault: errors in options of the last stage, found only after all other stages."""
    for presets in (IMDB, REVIEWS, HH, ULTRAFEEDBACK):
        for preset in presets.values():
            parts = ["finetune"] * ("finetune" in preset)
            common.check_preset(preset, *parts)
            for change, option in (({"users": 0}, "users"), ({"seed": -1}, "seed"), ({"pairs": -1}, "pairs"),
                                   ({"heldout": math.nan}, "heldout"), ({"evaluate": -3}, "evaluate"),
                                   ({"finetune": {"steps": 0}}, "steps") if parts else ({"users": -1}, "users")):
                with pytest.raises(InputError) as error:
                    common.check_preset(preset | change, *parts)
                assert error.value.option == option
            with pytest.raises(InputError):
                common.check_preset(preset | {"runs": {"x": {"experts": 0}}})


# --- JSON -------------------------------------------------------------------------------------------------------------


def test_every_json_of_a_table_is_valid(own):
    """Without privacy epsilon is infinite. Fault: Infinity and NaN, which are not JSON."""
    call(own | {"epsilon": "inf"})
    for path in own["out"].glob("*.json"):
        json.loads(path.read_text(), parse_constant=lambda word, path=path: pytest.fail(f"{path} holds {word}"))
    assert "No privacy" in (own["out"] / "report.md").read_text()


def test_lines_and_figures_without_a_value_come_back(tmp_path):
    """Faults: NaN in a file; a figure that is None, and no number, once it was read back."""
    stages.write_lines(tmp_path / "rows.jsonl", [{"a": math.nan, "b": [math.inf, -math.inf, 1.0], "c": "nan"}])
    text = (tmp_path / "rows.jsonl").read_text()
    found = stages.numbers(json.loads(text, parse_constant=pytest.fail))
    assert math.isnan(found["a"]) and found["b"] == [math.inf, -math.inf, 1.0] and found["c"] == "nan"


def test_a_cells_figures_are_the_same_now_and_later(tmp_path, monkeypatch):
    """Faults: a study's file with NaN; a page made of None; None that comes back as NaN."""
    class Fake:
        version, resumes = 1, False
        measure = staticmethod(lambda cell, folder: {"mean": math.nan, "most": math.inf, "of": [1.0, math.nan],
                                                              "no": [None, {"such": None}]})

    monkeypatch.setattr(study, "study_of", lambda name: Fake)
    (tmp_path / "fake").mkdir()
    first, again = (study.measured("fake", {"n": 1}, tmp_path)["figures"] for _ in range(2))
    for found in (first, again):
        assert math.isnan(found["mean"]) and found["most"] == math.inf and math.isnan(found["of"][1])
        assert found["no"] == [None, {"such": None}]
    path, = (tmp_path / "fake").glob("*.json")
    json.loads(path.read_text(), parse_constant=pytest.fail)


def test_a_report_copes_with_figures_that_are_null(tmp_path):
    """A job whose results hold null for NaN, and "inf" for no privacy. Faults: a traceback; an option shown as if it
    were not at its default."""
    home = make_job(tmp_path / "job")
    results = json.loads((home / "results.json").read_text())
    row = results["preferences"]["mix-user"]
    row["types"]["sentiment"]["own_expert"] = {"mean": math.nan, "se": math.nan, "n": 0}
    row["elbo_gap"]["se"] = math.nan
    row["conflicts_by_pair"][0] = math.nan
    row["alignment_train"]["ari"] = math.nan
    (home / "results.json").write_text(to_json(results))
    for path in home.glob("*/config.json"):
        path.write_text(to_json(json.loads(path.read_text())))
    lines = [json.loads(line) for line in (home / "dpo/metrics.jsonl").read_text().splitlines()]
    lines[2] |= {"loss": math.nan, "accuracy": [math.nan]}
    stages.write_lines(home / "dpo/metrics.jsonl", lines)
    assert (home / "results.json").read_text().count("null") > 4
    text = report(home).read_text()
    assert "epsilon" not in text.split("## ")[1]


# --- commands ---------------------------------------------------------------------------------------------------------


def test_each_make_target_takes_a_data_set_that_it_knows():
    """Fault: `make synth` without DATASET asks data.tables.synth for imdb."""
    root = Path(__file__).resolve().parents[2]

    def asked(*words):
        call = ["make", "--dry-run", *words]
        return subprocess.run(call, cwd=root, capture_output=True, text=True, check=True).stdout

    assert "data.tables.synth --dataset adult " in asked("synth") and "-m data.imdb" in asked("train")
    assert "--dataset other " in asked("synth", "DATASET=other") and "-m data.hh" in asked("train", "DATASET=hh")
