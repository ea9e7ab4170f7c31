"""A private synthetic table: `python -m data.synth --dataset adult --epsilon 1`, or your own: `--data table.csv
--schema schema.json` (mixdpo/columns.py), perhaps with `--test held-out.csv --target column`.

    OUT/synthetic.csv       as many rows as the table has: what may be published, with model.safetensors and
    OUT/privacy.json        what was spent on which table, and what that does not cover
    OUT/report.md           how near it comes; made of the table without noise, so it stays at home

The report holds DP-TBART (mixdpo/tabular.py) beside independent columns and trees of pairs (MST) that have the same
budget, and beside the table itself.
"""

import json
import math
import shutil
import time
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from data import adult
from data.marginals import distances, independent, utility
from data.mst import marginal_method
from data.studies.tell import table_of
from mixdpo.accountant import noise_multiplier
from mixdpo.budget import drop_key, kept_key
from mixdpo.columns import Column, columns_of, encode, read_schema, read_table, write_table
from mixdpo.config import InputError, command, parse, write_whole
from mixdpo.keys import Key
from mixdpo.memory import steady
from mixdpo.rundir import environment, load_checkpoint
from mixdpo.tabular import TableConfig, account, fit, look, sample, validate
from mixdpo.whole import alone

PRESETS = {"smoke": dict(steps=4, batch=256, width=16, layers=1, heads=2), "quick": {},
           "full": dict(steps=1000, lr=1e-2)}


@dataclass(frozen=True)
class SynthConfig(TableConfig):
    """A private synthetic table, and a report of how near it comes to the real one."""

    dataset: str = ""                           # adult; or your own by --data and --schema
    data: str = ""                              # table, .csv or .csv.gz
    schema: str = ""                            # its columns, .json
    test: str = ""                              # another table, for train-on-synthetic-test-on-real
    target: str = ""                            # the column to be foretold there
    rows: int = 0                               # to be written; 0: as many as the table has
    preset: str = "quick"                       # smoke, quick (under half an hour on two cores) or full
    out: str = "runs/synth"                     # folder
    data_folder: str = ""                       # local files looked into before anything is fetched


@dataclass(frozen=True)
class Tables:
    """What a report is made of: codes of the table (N,d) and, if there is one, of the test table (M,d)."""

    columns: list[Column]
    train: np.ndarray
    test: np.ndarray | None
    target: int | None


def read_tables(config: SynthConfig) -> Tables:
    """Raises: InputError."""
    if config.dataset == "adult":
        columns, folder = columns_of(adult.SCHEMA), config.data_folder or None
        train, test = (encode(adult.table(split, folder), columns) for split in ("train", "test"))
        return Tables(columns, train, test, len(columns) - 1)
    if config.dataset:
        raise InputError(f"--dataset: got {config.dataset!r}, wanted adult; for your own, --data and --schema")
    if not (config.data and config.schema):
        raise InputError("wanted --dataset adult, or --data table.csv and --schema schema.json")
    if bool(config.test) != bool(config.target):
        raise InputError("--test and --target go together: a table to test on, and the column to be foretold")
    columns = read_schema(config.schema)
    names = [column.name for column in columns]
    if config.target and config.target not in names:
        raise InputError(f"--target: got {config.target!r}, wanted one of {', '.join(names)}")
    train, test = read_table(config.data, columns), read_table(config.test, columns) if config.test else None
    return Tables(columns, train, test, names.index(config.target) if config.target else None)


def compared(tables: Tables, made: dict[str, np.ndarray]) -> dict[str, dict]:
    """Figures of each synthetic table: mean total variation by way, and utility if there is a test table, but not that
    one's own, which would be tested on what it was fitted to."""
    sizes, kinds = [c.size for c in tables.columns], ["category" if c.values else "number" for c in tables.columns]
    return {name: {"distance": {str(k): v for k, v in distances(tables.train, codes, sizes).items()},
                   "utility": {} if tables.test is None or codes is tables.test else
                   utility(codes, tables.test, sizes, tables.target, kinds)}
            for name, codes in made.items()}


def baselines(tables: Tables, epsilon: float, delta: float, rows: int, key: Key) -> dict[str, np.ndarray]:
    """The same budget spent in simpler ways."""
    sizes, rng = [c.size for c in tables.columns], key.generator("independent columns")
    sigma = noise_multiplier(epsilon, delta, 1.0, 1) * math.sqrt(len(sizes)) if epsilon < math.inf else 0.0
    return {"independent columns": independent(tables.train, sizes, rows, rng, sigma),
            "MST": marginal_method(tables.train, sizes, epsilon, delta, rows, key.generator("MST"))}


def rows_of(figures: dict[str, dict]) -> list[list]:
    """Lines of a table, after HEAD."""
    lines = []
    for name, found in figures.items():
        ways = [found["distance"].get(way) for way in "123"]
        told = [found["utility"].get(model, {}).get(what) for model in ("logistic", "boosting") for what in
                ("accuracy", "auroc")]
        lines.append([name, *(["–" if v is None else f"{v:.4f}" for v in ways]),
                      *(["–" if v is None else f"{v:.3f}" for v in told])])
    return lines


HEAD = ["table", "1-way", "2-way", "3-way", "accuracy (LR)", "AUROC (LR)", "accuracy (GB)", "AUROC (GB)"]
READING = (
    "Mean total variation of all 1-, 2- and 3-way marginals to the real table, of one sample (a second real table is "
    "not at 0 either); then classifiers of the target column, fitted to each table and tested on real rows: logistic "
    "regression (LR) and gradient boosting (GB).")


def synthesize(tables: Tables, config: TableConfig, rows: int, key: Key, out: Path | None = None,
               same: dict | None = None) -> tuple:
    """Fits and samples. Returns codes (rows,d) under the columns of the second, the Table that it learnt, and the
    Fitted."""
    table = look(tables.columns, tables.train, config, key)
    fitted = fit(table, config, key, out, same)
    return table.as_given(sample(fitted.model, rows, key.generator("rows"))), table, fitted


def run(config: SynthConfig) -> Path:
    """Raises: InputError; Stopped, and the same command goes on."""
    validate(config)
    tables, out, began = read_tables(config), Path(config.out), time.monotonic()
    N = config.examples or len(tables.train)
    rows = config.rows or N
    if config.epsilon < math.inf and config.delta * N >= 1:
        raise InputError(f"--delta {config.delta:g} for {N} rows: one of them could be given away whole; "
                         f"wanted less than {1 / N:.1g}")
    out.mkdir(parents=True, exist_ok=True)
    with alone(out):
        apart = ("out", "save_minutes", "micro", "data_folder")
        same = {k: v for k, v in asdict(config).items() if k not in apart} | {"table": len(tables.train)}
        key = kept_key(out, same, load_checkpoint(out, same) is not None)
        codes, table, fitted = synthesize(tables, config, rows, key, out, same)
        told = account(fitted, config, N)
        write_table(out / "synthetic.csv", codes, table.columns, key.generator("numbers"))
        save_file({n: x.contiguous() for n, x in fitted.model.state_dict().items()}, out / "model.safetensors")
        write_whole(out / "privacy.json", json.dumps(told, indent=1) + "\n")
        # Bins that were found in the data are its columns now: all tables are compared in them.
        tables = replace(tables, columns=table.columns, train=table.codes, test=None if tables.test is None else
                         table.coded(tables.test))
        print("the table is written; now the report")
        figures = compared(tables, {"DP-TBART": codes} | baselines(tables, config.epsilon, config.delta, rows, Key.fresh()))
        real = {"the real table": tables.train} if tables.test is None else {
            "the real table": tables.train, "a second real table": tables.test}
        figures |= compared(tables, real)
        drop_key(out)
        shutil.rmtree(out / "checkpoint", ignore_errors=True)               # other noise must not go on from there
    spent = (f"Each row of {N} is hidden with epsilon {told['epsilon']:.4g} at delta {config.delta:g}. Not covered: "
             + "; ".join(told["not_covered"])) if fitted.spent else "No privacy: epsilon is inf."
    where = environment()
    how = (f"{(time.monotonic() - began) / 60:.1f} minutes; revision {where['revision']}, torch {where['torch']}, "
           f"`python -m data.synth {words(config)}`")
    write_whole(out / "figures.json", json.dumps({"config": asdict(config), "figures": figures}, indent=1) + "\n")
    write_whole(out / "report.md", "\n\n".join(["# A synthetic table", table_of(HEAD, rows_of(figures)), READING,
                                                spent + ".", how + "."]) + "\n")
    print(f"table: {out / 'synthetic.csv'}\nreport: {out / 'report.md'}")
    return out


def words(config: SynthConfig) -> str:
    """The options that are not at their defaults, as they would be given."""
    given = [(f.name, getattr(config, f.name)) for f in fields(config)]
    return " ".join(f"--{name.replace('_', '-')} {value}" for name, value in given
                    if value != getattr(SynthConfig, name) and name not in PRESETS[config.preset])


def main(argv: list[str]) -> None:
    steady()
    torch.set_float32_matmul_precision("highest")
    config = parse(SynthConfig, argv, "python -m data.synth")
    if config.preset not in PRESETS:
        raise InputError(f"--preset: got {config.preset!r}, wanted one of {', '.join(PRESETS)}")
    given = {word.partition("=")[0].removeprefix("--").replace("-", "_") for word in argv}
    run(replace(config, **{name: value for name, value in PRESETS[config.preset].items() if name not in given}))


if __name__ == "__main__":
    command(main)
