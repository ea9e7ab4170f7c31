"""Rows of bits with an even sum, a property that no marginal of fewer than all columns shows."""

import math
from dataclasses import replace

import numpy as np

from data.report.pictures import curves
from data.studies.aggregate import by, mean_over, table_of
from data.studies.study import Study
from data.tables.marginals import distances, parity_table, satisfied
from data.tables.mst import marginal_method
from mixdpo.private.keys import Key
from mixdpo.tabular.columns import columns_of
from mixdpo.tabular.dp_tbart import TableConfig, draw, fit, look

ROWS, DIMENSIONS = 20_000, range(3, 9)
STEPS = {"smoke": 3, "quick": 3000, "full": 8000}
SEEDS = {"smoke": 1, "quick": 1, "full": 5}
METHODS = {"transformer": math.inf, "transformer, epsilon 10": 10.0, "DP-TBART, epsilon 1": 1.0, "MST": math.inf,
           "MST, epsilon 1": 1.0}


def cells(preset: str) -> list[dict]:
    return [{"method": method, "d": d, "seed": seed, "steps": STEPS[preset]} for method in METHODS
            for d in (DIMENSIONS if preset != "smoke" else DIMENSIONS[:2]) for seed in range(SEEDS[preset])]


def measure(cell: dict, folder) -> dict:
    d, seed, epsilon, key = cell["d"], cell["seed"], METHODS[cell["method"]], Key.public(1000 + cell["seed"])
    codes, sizes = parity_table(ROWS, d, np.random.default_rng([seed, d])), [2] * d
    if cell["method"].startswith("MST"):
        made = marginal_method(codes, sizes, epsilon, 1e-5, ROWS, key.generator("MST"))
    else:
        columns = columns_of([{"name": f"bit {j}", "type": "category", "values": ["0", "1"]} for j in range(d)])
        config = TableConfig(epsilon=epsilon, seed=seed)                    # the defaults are what a user gets
        if cell["method"].startswith("transformer"):
            size = dict(batch=256, lr=3e-3, steps=cell["steps"]) if epsilon == math.inf else dict(
                batch=2048, lr=2e-2, steps=min(cell["steps"], 200))
            config = replace(config, first_look=0.0, width=32, layers=2, heads=4, micro=2048, **size)
        table = look(columns, codes, config, key)
        made = draw(table, fit(table, config, key), ROWS, key.generator("rows"))
    return {"satisfied": satisfied(made), "two": distances(codes, made, sizes)[2]}


def page(rows):
    ways, shown = by(rows, "method", "d"), {}
    for (method, d), found in ways.items():
        name, _, epsilon = method.partition(", ")
        points = shown.setdefault(epsilon or "without privacy", {}).setdefault(name, [])
        points.append((d, float(np.mean([f["satisfied"] for f in found])), 0.0))
    sizes = sorted({d for _, d in ways})
    body = [[method, *(mean_over(ways[method, d], "satisfied", 4) for d in sizes)] for method in METHODS]
    d = 5 if 5 in sizes else sizes[-1]
    text = (f"At d = {d} and without privacy {mean_over(ways['transformer', d], 'satisfied', 4)} of the rows of a "
            "transformer that is trained on the rows alone (`--first-look 0`) have an even sum; with its default "
            f"options DP-TBART reaches {mean_over(ways['DP-TBART, epsilon 1', d], 'satisfied', 4)} at epsilon 1, from "
            f"a noisy marginal of all columns; MST, which looks at pairs, {mean_over(ways['MST', d], 'satisfied', 4)}: "
            "a coin's share. All pairs are uniform, so the 2-way distances are of noise and sampling only "
            f"({mean_over(ways['transformer', d], 'two', 4)} and {mean_over(ways['MST', d], 'two', 4)}).")
    head = ["share of rows with an even sum, d =", *map(str, sizes)]
    return "\n\n".join([text, table_of(head, body)]), {
        "satisfied": curves(shown, ("columns d", "rows with an even sum"), lines={"a coin": 0.5})}


STUDY = Study(
    "Parity: what marginals cannot show",
    f"{ROWS:,} rows of d bits, uniform among those with an even sum. Every set of d - 1 columns is uniform, so a "
    "method that measures marginals of fewer than d columns learns nothing; an autoregressive model sees all columns "
    "before the last (Castellon et al. 2023). DP-TBART measures larger marginals if the number of rows allows it "
    "(mixdpo/tabular/plan.py).",
    cells, measure, page, version=2)
