"""data/studies/synth.py: which cells there are, what a cell measures, and what the page says. Each docstring names the
faults that the test is there for."""

import math

import numpy as np
import pytest

from data.studies import synth
from data.tables import rivals, suite
from data.tables.marginals import distances


@pytest.fixture
def nothing_installed(tmp_path, monkeypatch):
    """No package of rivals, and an empty folder for their samples."""
    monkeypatch.setattr(rivals, "available", lambda: False)
    monkeypatch.setattr(rivals, "HOME", str(tmp_path / "rivals"))
    return tmp_path / "rivals"


def methods(preset, table=None):
    return {cell["method"] for cell in synth.cells(preset) if table in (None, cell["table"])}


def test_rivals_are_cells_where_their_samples_are_stored(nothing_installed, monkeypatch):
    """Faults: a cell that fails without the package, or takes hours with it; a stored sample that is passed over;
    rivals in the smoke preset."""
    packaged = set(synth.PACKAGED)
    assert not methods("full") & packaged
    path = rivals.sample_path(nothing_installed, "fair", "aim", 1.0, 0)
    path.parent.mkdir()
    path.touch()
    assert methods("quick", "fair") & packaged == {"AIM (OpenDP)"} and not methods("quick", "adult") & packaged
    rivals.sample_path(nothing_installed, "credit", "aim", 1.0, 0).touch()
    monkeypatch.setattr(rivals, "available", lambda: True)
    assert methods("quick", "credit") & packaged == {"AIM (OpenDP)"} and not methods("smoke") & packaged


def test_kept_tables_wait_for_the_full_preset():
    """Faults: a kept table in a preset that is run while settings are chosen; a table that is never run; epsilons or
    seeds that are left out."""
    for preset in ("smoke", "quick"):
        assert not {cell["table"] for cell in synth.cells(preset)} & set(suite.KEPT)
    assert {cell["table"] for cell in synth.cells("quick")} == set(suite.DEVELOPMENT)
    full = synth.cells("full")
    assert {cell["table"] for cell in full} == set(suite.NAMES + suite.PLANTED)
    ours = [(c["epsilon"], c["seed"]) for c in full if (c["table"], c["method"]) == ("adult", synth.OURS)]
    assert len(set(ours)) == len(ours)
    assert {(float(e), seed) for e, seed in ours} == {(e, seed) for e in (0.5, 1, 3, 10, math.inf) for seed in range(3)}


def cell(method, epsilon="1.0", table="parity"):
    return {"table": table, "epsilon": epsilon, "method": method, "seed": 0, "preset": "smoke"}


def test_a_cell_measures_its_own_method(tmp_path, nothing_installed, monkeypatch):
    """Faults: a sample of another method; distances to the held-out rows taken for those to the training rows; a
    utility of the held-out table on itself; a detector that is asked about a table and itself."""
    monkeypatch.setattr(suite, "ROWS", 2000)
    tables = suite.planted("parity")
    coins = np.random.default_rng(0).integers(2, size=(2000, 5))
    nothing_installed.mkdir()
    monkeypatch.setattr(rivals, "generate", lambda of, method, rho: coins)
    monkeypatch.setattr(rivals, "available", lambda: True)
    found = synth.measure(cell("AIM (OpenDP)"), tmp_path / "synth" / "work")
    assert found["distance"]["2"] == distances(tables.train, coins, tables.sizes)[2]
    assert found["held"]["2"] == distances(tables.test, coins, tables.sizes)[2] != found["distance"]["2"]
    assert found["detector"] == pytest.approx(0.75, abs=0.04) and found["seconds"] >= 0
    held = synth.measure(cell(synth.HELD, "inf"), tmp_path / "synth" / "work")
    assert held["distance"]["2"] > 0 == held["held"]["2"] and held["utility"] == {} and math.isnan(held["seconds"])
    assert held["detector"] == pytest.approx(0.5, abs=0.05)
    real = synth.measure(cell(synth.REAL, "inf"), tmp_path / "synth" / "work")
    assert real["distance"]["2"] == 0 and real["utility"]["boosting"]["auroc"] > 0.99 and math.isnan(real["detector"])


def test_the_paper_s_way_has_no_first_look(tmp_path, monkeypatch):
    """Faults: the two ways exchanged, or alike."""
    monkeypatch.setattr(suite, "ROWS", 400)
    seen = []

    def synthesize(tables, config, rows, key):
        seen.append(config.first_look)
        return tables.train, None, None

    monkeypatch.setattr(synth, "synthesize", synthesize)
    for method in (synth.OURS, synth.PAPER):
        synth.measure(cell(method), tmp_path)
    assert seen == [-1.0, 0.0], "by rule, and no noisy marginals"


def figures(two, auroc):
    return {"distance": {"1": two / 2, "2": two, "3": 2 * two}, "held": {"2": two}, "detector": 0.6, "seconds": 1.0,
            "megabytes": 2.0, "utility": {name: {"accuracy": 0.7, "auroc": auroc} for name in ("logistic", "boosting")}}


def test_the_page_answers_first():
    """Faults: wins counted the wrong way round, or where a rival was not run; another epsilon's figures; means for
    standard errors; a kept table that is not marked."""
    rows = []
    for table, mine, other in (("adult", 0.03, 0.04), ("diamonds", 0.05, 0.02)):
        for seed, off in ((0, 0.0), (1, 0.002)):
            rows += [(cell(synth.OURS, table=table), figures(mine + off, 0.9)),
                     (cell(synth.OURS, "3.0", table), figures(mine / 2, 0.91)),
                     (cell("MST", table=table), figures(other + off, 0.8))]
        rows.append((cell(synth.HELD, "inf", table), figures(0.01, 0.5) | {"utility": {}}))
    rows.append((cell("AIM (OpenDP)", table="adult"), figures(0.02, 0.95)))
    text, shown = synth.page(rows)
    first, _, head, _, adult, diamonds = text.splitlines()[:6]
    assert ("is 1.55 to 2.43 of theirs and smaller on 0 of 2 tables, of kept ones on 0 of 1; the AUROC of boosting is "
            "at least theirs on 1 of 2.") in first and "in 0 of 0 pairs" in first
    rows += [(cell(synth.EVEN, table="adult"), figures(0.08, 0.5)), (cell(synth.OURS, table="parity"), figures(0, 0.9)),
             (cell(synth.EVEN, "3.0", "adult"), figures(0.01, 0.5)), (cell("MST", table="parity"), figures(1, 0.5))]
    rows = [(of, found) for of, found in rows if of["method"] != "AIM (OpenDP)"]
    second = synth.page(rows)[0].splitlines()[0]
    assert "is 0.76 to 2.43 of theirs and smaller on 1 of 2" in second and "in 1 of 2 pairs" in second
    assert adult.startswith("| adult | development | 0.0310 ± 0.0010 | 0.0200 | 0.0410 ± 0.0010 | not run | 0.0100 |")
    assert diamonds.startswith("| diamonds | kept | 0.0510 ± 0.0010 | not run |") and "0.900 ± 0.000" in diamonds
    assert head.count("|") == adult.count("|") and list(shown) == ["distance"]
    assert "| 3 | DP-TBART | 0.0075 | 0.0150 |" in text.replace(" ± 0.0000", "")
