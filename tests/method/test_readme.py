"""README and docs: names exist, equations are cited where docs say, results were measured, the code is the
program's."""

import importlib
import inspect
import re
from pathlib import Path

import pytest

import train

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
EQUATIONS = (ROOT / "docs/equations.md").read_text()
ROWS = re.findall(r"^\| (M\d+) \|[^|]*\| (.*) \|$", EQUATIONS, re.MULTILINE)


def test_every_equation_has_a_row():
    assert [name for name, _ in ROWS] == [f"M{i}" for i in range(1, 15)]


@pytest.mark.parametrize("equation, cell", ROWS)
def test_the_source_that_is_named_cites_the_equation(equation, cell):
    """Catches: a renamed function, an equation's number lost from the line that implements it."""
    for module, name in re.findall(r"`([\w.]+)\.(\w+)`", cell):
        imported = importlib.import_module(module if module in ("train", "eval") else f"mixdpo.{module}")
        source = inspect.getsource(getattr(imported, name))
        assert re.search(rf"\b{equation}\b", source), f"{module}.{name} does not mention {equation}"


RESULTS = (ROOT / "docs/results.md").read_text().split("\n### ")[1:]


@pytest.mark.parametrize("section", RESULTS, ids=lambda section: section.splitlines()[0])
def test_every_figure_of_the_results_stands_in_the_committed_report(section):
    """Catches: a figure in docs/results.md that no run gave, or that a later run has changed."""
    report = (ROOT / "docs" / re.search(r"\]\((results/[\w-]+/report\.md)\)", section).group(1)).read_text()
    rows = re.findall(r"^\| ([\w-].*) \|$", section, re.MULTILINE)
    rows = [[cell.strip() for cell in row.split("|")] for row in rows if "±" in row]
    assert len(rows) >= 7
    for name, *cells in rows:
        lines = [line for line in report.splitlines() if line.startswith(f"| {name} |")]
        assert lines, f"{name} is no row of the report"
        assert any(all(cell in line for cell in cells) for line in lines), f"{name}: {cells} are not in the report"


def test_the_readme_shows_the_step_as_it_is_and_is_short():
    """Catches: code in README that the program has changed since; a README that nobody reads to its end."""
    assert inspect.getsource(train.em_loss).rstrip() in README
    assert len(README.split()) <= 1200


def test_the_reading_order_gives_the_length_of_each_file():
    """Catches: a file of the method that has grown and is still said to be short."""
    rows = re.findall(r"^\| \d \| `([\w/.]+)` \| (\d+) \|", README, re.MULTILINE)
    lengths = {path: len((ROOT / path).read_text().splitlines()) for path, _ in rows}
    assert len(rows) == 9 and lengths["train.py"] <= 250
    assert all(abs(lengths[path] - int(count)) <= 10 for path, count in rows), lengths


def test_every_file_that_the_docs_name_exists():
    """Catches: a file that was moved or renamed, and is still named by its old place."""
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]
    named = {(page.name, path) for page in pages
             for path in re.findall(r"\b(?:mixdpo|tests|data)/[\w/]+\.(?:py|json|md)\b", page.read_text())}
    assert len(named) > 20
    assert not [(page, path) for page, path in sorted(named) if not (ROOT / path).exists()]


def test_every_link_leads_somewhere():
    """Catches: a page that was moved, a heading that is gone."""
    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")):
        for link in re.findall(r"\]\(([^)]+)\)", page.read_text()):
            assert link.startswith("http") or (page.parent / link).exists(), f"{page.name}: {link}"
