"""Rivals from a maintained package, OpenDP (its extra `mbi`): `make rivals DATASET=credit METHOD=aim EPSILON=1`.

    mst     the tree of pairs of mst.py (McKenna, Miklau, Sheldon 2021, arXiv 2108.04978)
    aim     in each round measures the marginal that the model so far fits worst; the model is a Markov random field
            over all marginals that were measured (McKenna, Mullins, Sheldon, Miklau 2022, arXiv 2201.12677)

Privacy is the same for all methods: an epsilon and a delta; neighbouring tables differ by one added or removed row
(OpenDP's symmetric distance 1). Both rivals are accounted in zCDP, and get the rho of mst.py's conversion, which for
these methods is the tightest that is known.

Settings are those of the papers where OpenDP's defaults differ. aim: 1-way marginals get 0.9 / 16 of rho, and not half
of it; its workload is all pairs, as in the authors' code: it is measured by pairs here; models of up to 80 MB. mst: a
third of rho each for 1-way marginals, the choice of the tree, and its pairs. Rows are sampled independently from the
model, as from all other generators here: mbi 1.1.0 can also round tables of counts, but gives all children of a column
their values in one order, which makes columns dependent that are independent in the model.

OpenDP draws its noise from the operating system, so `seed` only numbers repetitions. A sample is stored as codes, with
its time and memory, in OUT/TABLE-METHOD-EPSILON-SEED.npz; the study reads it from there, and a command whose file
exists does nothing.
"""

import hashlib
import importlib.util
import os
import time
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import numpy as np

from data.tables import suite
from data.tables.mst import zcdp
from mixdpo.config import SEEDS, InputError, check_choices, check_ranges, command, parse

HOME = "runs/rivals"
XLA = "--xla_disable_hlo_passes=constant_folding"       # which takes minutes for each model of AIM on a large table
METHODS = ("mst", "aim")


@dataclass(frozen=True)
class RivalConfig:
    """A sample of a rival, for one table of the suite."""

    dataset: str = "credit"             # a table of data/tables/suite.py
    method: str = "aim"                 # aim or mst
    epsilon: float = 1.0                # privacy budget epsilon, finite
    delta: float = 1e-5                 # privacy budget delta
    seed: int = 0                       # number of the repetition
    out: str = HOME                     # folder for samples
    data_folder: str = ""               # folder of local files, used before anything is fetched


def available() -> bool:
    """Whether the package is installed."""
    return all(importlib.util.find_spec(name) for name in ("opendp", "mbi"))


def sample_path(home, table: str, method: str, epsilon: float, seed: int) -> Path:
    """The file of a sample."""
    return Path(home) / f"{table}-{method}-{epsilon:g}-{seed}.npz"


def sample_of(path: Path, tables: suite.Tables, method: str, epsilon: float, delta: float) -> dict:
    """{"codes" (N,d), "seconds", "megabytes"}: the stored sample, or a new one. Raises: InputError if the package is
    not installed, or the stored sample is of another table or budget."""
    same = hashlib.sha256(tables.train.tobytes() + repr((tables.sizes, method, epsilon, delta)).encode()).hexdigest()
    if path.exists():
        with np.load(path) as found:
            if str(found["same"]) != same:
                raise InputError("a sample of another table, method or budget; remove it", file=path)
            return {"codes": found["codes"], "seconds": float(found["seconds"]), "megabytes": float(found["megabytes"])}
    if not available():
        raise InputError("OpenDP, which it pins, is not installed; `make .venv/rivals` does that",
                         file="data/tables/requirements.txt")
    codes, seconds, megabytes = with_cost(lambda: generate(tables, method, zcdp(epsilon, delta)))
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    with open(part, "wb") as file:
        np.savez_compressed(file, codes=codes, seconds=seconds, megabytes=megabytes, same=same)
    part.replace(path)
    return {"codes": codes, "seconds": seconds, "megabytes": megabytes}


def generate(tables: suite.Tables, method: str, rho: float) -> np.ndarray:
    """A table (N,d), as many rows as the given one, private at rho in zCDP for one added or removed row."""
    os.environ.setdefault("XLA_FLAGS", XLA)                                 # read when mbi imports JAX
    import opendp.prelude as dp
    import polars
    from opendp.extras.mbi import _mst

    dp.enable_features("contrib")
    names = [f"c{j}" for j in range(len(tables.sizes))]
    frame = polars.DataFrame({name: tables.train[:, j] for j, name in enumerate(names)}).lazy()
    algorithm = (dp.mbi.AIM(queries=2, oneway_split=0.9 / 16, measure_split=0.9, max_size=80.0) if method == "aim" else
                 dp.mbi.MST(oneway_split=1 / 3, measure_split=1 / 2))
    budget = dp.Context.compositor(data=frame, privacy_unit=dp.unit_of(contributions=1),
                                   privacy_loss=dp.loss_of(rho=rho))
    # A cut after every code but the last: all legal codes, no others, and no extra cell for missing values.
    cuts = {name: [*range(size - 1)] for name, size in zip(names, tables.sizes)}
    # OpenDP 0.16.0 divides the budget for choosing edges with a margin of one float, which its own rounding exceeds
    # ("insufficient budget" with more than about four columns).
    with patch.object(_mst, "prior", lambda share: share * (1 - 1e-12)):
        table = budget.query(rho=rho).select(*names).contingency_table(cuts=cuts, algorithm=algorithm).release()
    drawn = table.model.synthetic_data(len(tables.train), "sample").to_dict()
    return np.stack([np.asarray(drawn[name]) for name in names], axis=1).astype(np.int64)


def with_cost(make) -> tuple[np.ndarray, float, float]:
    """make() -> its result; core seconds of this process; and the megabytes by which the process's peak memory exceeded
    the memory at the start (NaN where the kernel does not tell)."""
    def resident(what: str) -> float:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) / 1000 for line in lines if line.startswith(what))

    before, began = np.nan, time.process_time()                             # other processes do not count
    if os.access("/proc/self/clear_refs", os.W_OK):
        Path("/proc/self/clear_refs").write_text("5")                       # the peak begins here
        before = resident("VmRSS")
    made = make()
    return made, time.process_time() - began, resident("VmHWM") - before if before == before else np.nan


def main(argv: list[str]) -> None:
    config = parse(RivalConfig, argv, "python -m data.tables.rivals")
    check_choices(config, {"dataset": suite.NAMES + suite.PLANTED, "method": METHODS})
    check_ranges(config, {"epsilon": "(0, inf)", "delta": "[1e-11, 1)", "seed": SEEDS})
    path = sample_path(config.out, config.dataset, config.method, config.epsilon, config.seed)
    planted = config.dataset in suite.PLANTED
    tables = suite.planted(config.dataset) if planted else suite.coded(config.dataset, config.data_folder or None)
    found = sample_of(path, tables, config.method, config.epsilon, config.delta)
    print(f"{path}: {len(found['codes'])} rows, {found['seconds']:.0f} core seconds, {found['megabytes']:.0f} MB")


if __name__ == "__main__":
    command(main)
