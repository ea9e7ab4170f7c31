"""A private synthetic table: `python -m data.tables.synth --dataset adult --epsilon 1`, or of your own table: `--data
table.csv --schema schema.json` (mixdpo/tabular/columns.py), optionally with `--test held-out.csv --target column`.
`--plan true` only prints how the budget would be divided. It spends nothing and writes nothing.

    OUT/synthetic.csv       as many rows as the table has; may be published, together with model.safetensors and
    OUT/schema.json         its columns, with the bins that were found under noise
    OUT/privacy.json        the privacy that was spent, and what it does not cover. It completes the release: the secret
                            key is deleted, and a run with other options is refused
    OUT/report.md           distances to the real table; computed without noise, so do not publish it
    OUT/figures.json        the figures of the report; do not publish them either
    OUT/config.json         the options, and sha256 of table, schema and test table; do not publish it either

If the report fails or is stopped, the same command makes only the report again, from these files. The report compares
DP-TBART, independent columns and trees of pairs (MST) with the same budget, and the real table.
"""

import hashlib
import json
import math
import shutil
import time
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import numpy as np
import torch

from data.experiment.stages import numbers
from data.report.tables import aligned
from data.studies.aggregate import table_of
from data.tables import suite
from data.tables.marginals import distances, independent, utility
from data.tables.mst import marginal_method
from data.tables.suite import Tables
from mixdpo.config import (
    InputError,
    check_choices,
    check_ranges,
    command,
    parse,
    reading,
    replacing,
    to_json,
    write_text,
)
from mixdpo.fast.memory import tune_process
from mixdpo.files.atomic import lock_folder, must_be_own, must_be_writable, read_json_or_empty, save_tensors
from mixdpo.private.accountant import noise_multiplier
from mixdpo.private.budget import delete_key, load_or_create_key
from mixdpo.private.keys import Key
from mixdpo.runs.checkpoint import load_checkpoint
from mixdpo.runs.log import environment
from mixdpo.tabular.columns import Column, read_schema, schema_of
from mixdpo.tabular.dp_tbart import TableConfig, account, draw, fit, look, plan_for, validate
from mixdpo.tabular.plan import Plan
from mixdpo.tabular.rows import read_table, write_table

PRESETS = {"smoke": dict(steps=4, pretrain=4, batch=256, width=16, layers=1, heads=2), "quick": {},
           "full": dict(pretrain=2000)}


@dataclass(frozen=True)
class SynthConfig(TableConfig):
    """A private synthetic table, and a report of its distance to the real table. For your own table give --data,
    --schema and --out: docs/privacy.md has an example."""

    dataset: str = ""                           # a table of data/tables/suite.py: adult, criminal, credit, fair, ...
    data: str = ""                              # the table, .csv or .csv.gz
    schema: str = ""                            # columns of the table, .json: mixdpo/tabular/columns.py describes it
    test: str = ""                              # held-out table, to test classifiers fitted to the synthetic table
    target: str = ""                            # column that the classifiers predict; needs --test
    plan: bool = False                          # print how the budget would be divided, and stop
    rows: int = 0                               # rows to write; 0: as many as the table has, or --examples if given
    preset: str = "quick"                       # smoke, quick (under half an hour on two cores) or full
    out: str = "runs/synth"                     # folder for all results; another one for each table
    data_folder: str = ""                       # folder of local files, used before anything is fetched


def read_tables(config: SynthConfig, columns: list[Column] | None = None) -> Tables:
    """Reads the tables that the options name. columns: use these instead of the schema's. Raises: InputError."""
    if config.dataset:
        for name in ("data", "schema", "test", "target"):
            if getattr(config, name):
                raise InputError(f"got {getattr(config, name)!r}, but --dataset {config.dataset} has its own; leave "
                                 "one out", option=name)
        return suite.coded(config.dataset, config.data_folder or None, columns)
    if not (config.data and config.schema):
        raise InputError("wanted --data table.csv and --schema schema.json, or --dataset, one of the suite",
                         option="schema" if config.data else "data")
    if bool(config.test) != bool(config.target):
        raise InputError("wanted both --test, a table to test on, and --target, the column to predict, or neither",
                         option="target" if config.test else "test")
    columns = columns or read_schema(config.schema)
    names = [column.name for column in columns]
    if config.target and config.target not in names:
        raise InputError(f"got {config.target!r}, wanted one of {', '.join(names)}", option="target")
    train, test = read_table(config.data, columns), read_table(config.test, columns) if config.test else None
    return Tables(columns, train, test, names.index(config.target) if config.target else None)


def check(config: SynthConfig) -> None:
    """Raises: InputError on values out of range."""
    check_choices(config, {"dataset": ("", *suite.NAMES), "preset": PRESETS})
    check_ranges(config, {"rows": "[0, inf)"})
    validate(config)


def check_tables(tables: Tables, config: SynthConfig) -> None:
    """Checks, before training, what would fail at the end. Raises: InputError."""
    N = config.examples or len(tables.train)
    if config.epsilon < math.inf and config.delta * N >= 1:
        raise InputError(f"got {config.delta:g} for {N} rows; wanted less than {1 / N:.1g}: otherwise releasing one "
                         "row in full would be allowed", option="delta")
    if tables.test is None:
        return
    if len(tables.columns) < 2:
        raise InputError(f"{config.target!r} is the only column; wanted others to predict it from", option="target")
    if len(np.unique(tables.test[:, tables.target])) < 2:
        raise InputError(f"column {tables.columns[tables.target].name!r}, the --target, has one value in all rows; "
                         "wanted a test table with two values or more", file=config.test or None, option="test")


def identity(config: SynthConfig, tables: Tables) -> dict:
    """The options that a release depends on, with the sha256 of files instead of their names."""
    def key(content) -> str:
        return hashlib.sha256(content if isinstance(content, bytes) else repr(content).encode()).hexdigest()

    not_part = ("out", "save_minutes", "micro", "data_folder", "data", "schema", "test", "plan")
    test = None if tables.test is None else tables.test.tobytes()
    return {k: v for k, v in asdict(config).items() if k not in not_part} | {
        "data_key": key(tables.train.tobytes()), "schema_key": key(tables.columns), "test_key": test and key(test)}


def compared(tables: Tables, made: dict[str, np.ndarray]) -> dict[str, dict]:
    """Figures of each table in `made`: mean total variation by way, and utility if there is a test table. The test
    table itself has no utility: it would be tested on the rows that it was fitted to."""
    return {name: {"distance": {str(k): v for k, v in distances(tables.train, codes, tables.sizes).items()},
                   "utility": {} if tables.test is None or codes is tables.test else
                   utility(codes, tables.test, tables.sizes, tables.target, tables.kinds)}
            for name, codes in made.items()}


def baselines(tables: Tables, epsilon: float, delta: float, rows: int, key: Key) -> dict[str, np.ndarray]:
    """Tables of the simpler generators with the same budget."""
    return {"independent columns": independent_columns(tables, epsilon, delta, rows, key),
            "MST": marginal_method(tables.train, tables.sizes, epsilon, delta, rows, key.generator("MST"))}


def independent_columns(tables: Tables, epsilon: float, delta: float, rows: int, key: Key) -> np.ndarray:
    """A table of independent columns, (epsilon, delta)-private: one Gaussian mechanism for all counts."""
    sigma = noise_multiplier(epsilon, delta, 1.0, 1) * math.sqrt(len(tables.sizes)) if epsilon < math.inf else 0.0
    return independent(tables.train, tables.sizes, rows, key.generator("independent columns"), sigma)


def rows_of(figures: dict[str, dict]) -> list[list]:
    """Rows of the table with heading HEAD."""
    lines = []
    for name, found in figures.items():
        ways = [found["distance"].get(way) for way in "123"]
        scores = [found["utility"].get(model, {}).get(what, math.nan) for model in ("logistic", "boosting") for what in
                ("accuracy", "auroc")]
        lines.append([name, *(["–" if v is None else f"{v:.4f}" for v in ways]),
                      *(["–" if math.isnan(v) else f"{v:.3f}" for v in scores])])
    return lines


HEAD = ["table", "1-way", "2-way", "3-way", "accuracy (LR)", "AUROC (LR)", "accuracy (GB)", "AUROC (GB)"]
READING = (
    "Distance is the mean total variation of all 1-, 2- and 3-way marginals to the real table, in the bins of "
    "schema.json: lower is better. DP-TBART is synthetic.csv; independent columns and MST are simpler methods with the "
    "same budget. ")
COMPARE = (
    "A second real table is that of --test: its distance is not 0 either, so compare with it. LR and GB are logistic "
    "regression and gradient boosting of the target column, fitted to each table and tested on the rows of --test.")
WITHOUT_TEST = (
    "Another sample of real rows is not at 0 either: --test with held-out rows and --target show its distance, and how "
    "well classifiers fitted to the synthetic table do.")
PUBLISH = (
    "May be published: synthetic.csv, schema.json, model.safetensors, privacy.json. Computed from the real rows "
    "without noise, so not private: the figures here, report.md, figures.json, config.json.")
NOT_PRIVATE = "No privacy: epsilon is inf. Nothing here may be published."


def advice(plan: Plan, columns: int) -> str:
    """What to do if the plan leaves all dependence between columns out; "" if it does not."""
    if plan.pairs or plan.steps or columns < 2:
        return ""
    return ("  No pair of columns is measured and there are no steps, so the columns will be independent of each "
            "other.\n  Give columns fewer values or bins, or raise --epsilon. To see the plan first, add --plan true.")


def synthesize(tables: Tables, config: TableConfig, rows: int, key: Key, out: Path | None = None,
               same: dict | None = None) -> tuple:
    """Fits and samples. Returns codes (rows,d), the Table whose columns they use, and the Fitted model."""
    table = look(tables.columns, tables.train, config, key)
    if warning := advice(table.plan, len(tables.columns)):
        print(warning)
    fitted = fit(table, config, key, out, same)
    return draw(table, fitted, rows, key.generator("rows")), table, fitted


def run(config: SynthConfig) -> Path:
    """Makes the release and the report; returns the folder. Raises: InputError; Stopped, after which the same command
    resumes."""
    check(config)
    out, began = Path(config.out), time.monotonic()
    must_be_own(out, [(name, getattr(config, name)) for name in ("data", "schema", "test")], "config.json", {"synth"})
    tables = read_tables(config)
    check_tables(tables, config)
    if config.plan:
        plan = plan_for(tables.columns, config.examples or len(tables.train), config)
        print("\n".join(filter(None, [plan.why, advice(plan, len(tables.columns)), "No budget was spent."])))
        return out
    with lock_folder(out):
        must_be_writable(out)
        same = identity(config, tables)
        if not released(out, same):
            release(tables, config, out, same)
            print(f"[table] {time.monotonic() - began:.0f} s: {out / 'synthetic.csv'}")
        delete_key(out)                                                     # before anything that may fail or take long
        shutil.rmtree(out / "checkpoint", ignore_errors=True)           # a run with other noise must not resume from it
        if (out / "report.md").exists() and "figures" in read_json_or_empty(out / "figures.json"):
            print("[report] finished before")
        else:
            report(config, out, began)
    figures = json.loads((out / "figures.json").read_text())["figures"]
    print(f"report: {out / 'report.md'}\n\n{aligned(HEAD, rows_of(numbers(figures)))}\n\n"
          f"{PUBLISH if config.epsilon < math.inf else NOT_PRIVATE}\n\n{sentence(figures, config)}")
    return out


def sentence(figures: dict[str, dict], config: SynthConfig) -> str:
    """The result in one sentence, from the distances of the largest common order of marginals up to 2."""
    way = max(way for way in figures["DP-TBART"]["distance"] if way in "12")
    others = ", ".join(f"{name} {found['distance'][way]:.4f}" for name, found in figures.items()
                       if name not in ("DP-TBART", "the real table"))
    return (f"At epsilon {config.epsilon:g} the table of DP-TBART has a mean {way}-way distance of "
            f"{figures['DP-TBART']['distance'][way]:.4f} to the real table ({others}).")


FILES = {"data_key": "table (--data)", "schema_key": "schema (--schema)", "test_key": "test table (--test)"}


def released(out: Path, same: dict) -> bool:
    """Whether the folder has a release of the same options. Raises: InputError if it has a release of other options."""
    if not (out / "privacy.json").exists():
        return False
    stored, now = read_json_or_empty(out / "config.json")["synth"], json.loads(to_json(same))
    if differ := [name for name in now if stored.get(name) != now[name]]:
        if "schema_key" in differ:                                          # the codes of both tables depend on it
            differ = [name for name in differ if name not in ("data_key", "test_key")]
        what = "; ".join(f"another {FILES[name]}" if name in FILES else
                         f"--{name.replace('_', '-')}: stored {stored.get(name)!r}, now {now[name]!r}"
                         for name in differ)
        raise InputError(f"{out} holds a finished table of other options ({what}), which may have been published; use "
                         "another folder for this one. The budgets of all tables from the same rows add up",
                         option="out")
    return True


def release(tables: Tables, config: SynthConfig, out: Path, same: dict) -> None:
    """Writes all files that may be published. privacy.json is the last: it means that the release is complete."""
    N, resumes = config.examples or len(tables.train), load_checkpoint(out, same) is not None
    write_text(out / "config.json", to_json({"synth": same}, indent=1) + "\n")
    (out / "report.md").unlink(missing_ok=True)                             # a report of an earlier, removed release
    key = load_or_create_key(out, same, resumes)
    codes, table, fitted = synthesize(tables, config, config.rows or N, key, out, same)
    write_table(out / "synthetic.csv", codes, table.columns, key.generator("numbers"))
    write_text(out / "schema.json", to_json(schema_of(table.columns), indent=1) + "\n")
    with replacing(out / "model.safetensors") as part:
        save_tensors(part, {n: x.contiguous() for n, x in fitted.model.state_dict().items()}, {"format": "pt"})
    write_text(out / "privacy.json", to_json(account(fitted, config, N), indent=1) + "\n")


def report(config: SynthConfig, out: Path, began: float) -> None:
    """Writes figures.json and report.md from the release and the tables. All tables use the bins of the release. began:
    start time of the command."""
    columns = read_schema(out / "schema.json")
    with reading(out / "privacy.json"):
        spent = words_of_budget(json.loads((out / "privacy.json").read_text()))
    tables, codes = read_tables(config, columns), read_table(out / "synthetic.csv", columns)
    real = {"the real table": tables.train} | ({} if tables.test is None else {"a second real table": tables.test})
    simpler = baselines(tables, config.epsilon, config.delta, len(codes), Key.fresh())
    figures = compared(tables, {"DP-TBART": codes} | simpler | real)
    where = environment()
    how = (f"{(time.monotonic() - began) / 60:.1f} minutes; revision {where['revision']}, torch {where['torch']}, "
           f"`python -m data.tables.synth {words(config)}`")
    write_text(out / "figures.json", to_json({"config": asdict(config), "figures": figures}, indent=1) + "\n")
    legend = READING + (WITHOUT_TEST if tables.test is None else COMPARE)
    write_text(out / "report.md", "\n\n".join(["# A synthetic table", table_of(HEAD, rows_of(figures)), legend,
                                                spent, how + "."]) + "\n")


def words_of_budget(facts: dict) -> str:
    """The content of privacy.json as text."""
    if not facts["spent"]:
        return NOT_PRIVATE
    return (f"{PUBLISH}\n\nEach of {facts['rows']} rows is protected with epsilon {facts['epsilon']:.4g} at delta "
            f"{facts['delta']:g}. Not covered: {'; '.join(facts['not_covered'])}.")


def words(config: SynthConfig) -> str:
    """The options that differ from their defaults, as on the command line."""
    given = [(f.name, getattr(config, f.name)) for f in fields(config)]
    return " ".join(f"--{name.replace('_', '-')} {value}" for name, value in given
                    if value != getattr(SynthConfig, name) and name not in PRESETS[config.preset])


def main(argv: list[str]) -> None:
    tune_process()
    torch.set_float32_matmul_precision("highest")
    config = parse(SynthConfig, argv, "python -m data.tables.synth")
    check_choices(config, {"preset": PRESETS})
    given = {word.partition("=")[0].removeprefix("--").replace("-", "_") for word in argv}
    run(replace(config, **{name: value for name, value in PRESETS[config.preset].items() if name not in given}))


if __name__ == "__main__":
    command(main)
