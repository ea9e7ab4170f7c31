"""Helpers for pages: group rows by settings, average figures over cells, and format tables."""

import math

from data.report.tables import pm, table
from mixdpo.evaluation.statistics import mean_se


def by(rows: list[tuple[dict, dict]], *names: str) -> dict[tuple | str, list[dict]]:
    """Figures grouped by these settings, in the order of the rows. With one name, keys are its values."""
    out = {}
    for cell, figures in rows:
        key = tuple(cell[name] for name in names) if len(names) > 1 else cell[names[0]]
        out.setdefault(key, []).append(figures)
    return out


def over(found: list[dict], name: str) -> dict:
    """Mean and SE over cells of a figure; a figure may be a {"mean", ...} itself."""
    return mean_se([f[name]["mean"] if isinstance(f[name], dict) else f[name] for f in found])


def mean_over(found: list[dict], name: str, digits: int = 3) -> str:
    """The mean over cells as text."""
    return f"{over(found, name)['mean']:.{digits}f}"


def pm_of(figure: dict, sign: str = "") -> str:
    """mean ± SE."""
    return pm(figure, 3, sign)


def se_over(figure: dict) -> float:
    """The SE; 0 if there is none, as with a single world."""
    return figure["se"] if math.isfinite(figure["se"]) else 0.0


def table_of(head: list[str], body: list[list], left: int = 1) -> str:
    """A Markdown table of any values."""
    return table(head, [[str(cell) for cell in row] for row in body], left)
