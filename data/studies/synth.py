"""Adult by privacy budget: DP-TBART compared with independent columns and trees of pairs at the same epsilon."""

import math
from dataclasses import replace

import numpy as np

from data.report.pictures import curves
from data.studies.aggregate import by, table_of
from data.studies.study import Study
from data.tables import adult
from data.tables.synth import (
    HEAD,
    PRESETS,
    READING,
    SynthConfig,
    Tables,
    baselines,
    compared,
    read_tables,
    rows_of,
    synthesize,
)
from mixdpo.private.keys import Key
from mixdpo.tabular.columns import columns_of

EPSILONS = {"smoke": (1.0, math.inf), "quick": (0.5, 1.0, 3.0, 10.0, math.inf), "full": (0.5, 1.0, 3.0, 10.0, math.inf)}
SEEDS = {"smoke": 1, "quick": 1, "full": 3}
REAL = "a second real table"


def cells(preset: str) -> list[dict]:
    ways = [{"epsilon": str(epsilon), "method": method, "preset": preset, "seed": seed} for seed in range(SEEDS[preset])
            for epsilon in EPSILONS[preset] for method in ("DP-TBART", "baselines")]
    return ways + [{"epsilon": "inf", "method": REAL, "preset": preset, "seed": 0}]


def prepare(home, preset: str, data_folder: str | None) -> None:
    """Writes the codes of Adult, once for all cells."""
    if not (home / "adult.npz").exists():
        tables = read_tables(SynthConfig(dataset="adult", data_folder=data_folder or ""))
        np.savez(home / "adult.npz", train=tables.train, test=tables.test)


def measure(cell: dict, folder) -> dict:
    with np.load(folder.parent.parent / "adult.npz") as found:
        tables = Tables(columns_of(adult.SCHEMA), found["train"], found["test"], len(adult.SCHEMA) - 1)
    epsilon, rows, key = float(cell["epsilon"]), len(tables.train), Key.public(1000 + cell["seed"])
    if cell["method"] == REAL:
        return compared(tables, {REAL: tables.test, "the real table": tables.train})
    if cell["method"] == "baselines":
        return compared(tables, baselines(tables, epsilon, SynthConfig.delta, rows, key))
    config = replace(SynthConfig(epsilon=epsilon, seed=cell["seed"]), **PRESETS[cell["preset"]])
    return compared(tables, {"DP-TBART": synthesize(tables, config, rows, key)[0]})


def page(rows):
    body, shown, ways = [], {}, by(rows, "epsilon")
    for epsilon, found in ways.items():
        figures = {}
        for of in found:
            for name, one in of.items():
                figures.setdefault(name, []).append(one)
        for name, line in zip(figures, rows_of({name: mean(each) for name, each in figures.items()})):
            body.append(["none" if epsilon == "inf" else f"{float(epsilon):g}", *line])
            if epsilon != "inf":
                for way in "12":
                    distance = float(np.mean([one["distance"][way] for one in figures[name]]))
                    shown.setdefault(f"{way}-way", {}).setdefault(name, []).append((float(epsilon), distance, 0.0))
    one = {name: of for found in ways.get("1.0", []) for name, of in found.items()}
    free = {name: of for found in ways["inf"] for name, of in found.items()}["independent columns"]["distance"]["2"]
    mine, tree, even = (one[name]["distance"]["2"] for name in ("DP-TBART", "MST", "independent columns"))
    text = (f"At epsilon 1 the mean 2-way distance of DP-TBART is {mine / even:.2f} of that of independent columns "
            f"with the same budget, and {mine / free:.2f} of that of independent columns with exact marginals; "
            f"MST's is {tree / free:.2f} of the latter.")
    return "\n\n".join([text, table_of(["epsilon", *HEAD], body, 2), READING]), {
        "distance": curves(shown, ("epsilon (delta 1e-5)", "mean total variation"), log=10)}


def mean(each: list[dict]) -> dict:
    """Mean of each figure over seeds."""
    if not isinstance(each[0], dict):
        return float(np.mean(each))
    return {name: mean([one[name] for one in each]) for name in each[0]}


STUDY = Study(
    "Private synthetic tables: Adult by budget",
    "Adult's 32,561 training rows, 15 columns in public bins (`data/tables/adult.py`), delta 1e-5. How near do tables "
    "of DP-TBART come, at which epsilon, beside simpler generators with the same budget?",
    cells, measure, page, prepare)
