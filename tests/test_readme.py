"""The README's table of equations: each name exists, and its source cites the equation."""

import importlib
import inspect
import re
from pathlib import Path

import pytest

README = (Path(__file__).parent.parent / "README.md").read_text()
ROWS = re.findall(r"^\| (M\d+) \|[^|]*\| (.*) \|$", README, re.MULTILINE)


def test_every_equation_has_a_row():
    assert [name for name, _ in ROWS] == [f"M{i}" for i in range(1, 15)]


@pytest.mark.parametrize("equation, cell", ROWS)
def test_the_source_that_the_readme_names_cites_the_equation(equation, cell):
    """Catches: a renamed function, an equation's number lost from the line that implements it."""
    for module, name in re.findall(r"`(\w+)\.(\w+)`", cell):
        imported = importlib.import_module(module if module == "train" else f"mixdpo.{module}")
        source = inspect.getsource(getattr(imported, name))
        assert re.search(rf"\b{equation}\b", source), f"{module}.{name} does not mention {equation}"
