"""The report of a job: report.md, the same as report.html, and its pictures in report/*.png.

The result comes first (result.py), then tables and pictures with the details, then completions, and last what was run.
"""

import html
import json
from pathlib import Path
from urllib.parse import quote

from markdown_it import MarkdownIt

from data.report import domains, pictures, tables, users
from data.report.job import read_job
from data.report.result import result
from mixdpo.config import write_text

BREAK = "\ue000"  # replaces <br> while Markdown is rendered
STYLE = """body { font: 15px/1.5 system-ui, sans-serif; max-width: 75em; margin: 2em auto; padding: 0 1em; color: #222 }
table { border-collapse: collapse; font-size: 13px; display: block; overflow-x: auto } th, td { padding: .2em .7em }
tr:nth-child(even) { background: #f6f6f6 } th { border-bottom: 1px solid #888 } img { max-width: 100% }"""


def report(home: Path) -> Path:
    """Writes home/report.md, home/report.html and home/report/*.png from the files in home; returns report.md's path.
    """
    home = Path(home)
    job, folder = read_job(home), home / "report"
    folder.mkdir(exist_ok=True)
    for old in folder.glob("*.png"):                                        # pictures of an earlier evaluation
        old.unlink()
    gated = any(run.config.get("gate", "fixed") != "fixed" for run in job.runs)
    new_users = bool(job.results["adapt"])
    with pictures.style():
        opening = result(job, *saved(pictures.result(job), folder))
        drawings = []
        for title, caption, draw in pictures.PICTURES + pictures.OF_USERS * new_users + pictures.OF_GATES * gated:
            links = saved(draw(job), folder)
            drawings.append(tables.section(title, caption if links else "Its figures were not measured.", *links))
    sections = [tables.policies, tables.head_differences, tables.preferences, users.types,
                *[users.adaptation] * new_users, tables.alignment, *[users.win_rates] * bool(job.win_rates)]
    if "domains" in job.dataset:
        sections[:0] = [domains.rewards_by_domain, domains.gates, domains.likelihoods]
    title = home.resolve().name
    parts = [f"# {tables.escape(title)}", opening, *(write(job) for write in sections), *drawings, tables.samples(job),
             tables.what_was_run(job)]
    text = "\n\n".join(parts) + "\n"
    write_text(home / "report.md", text)
    write_text(home / "report.html", as_html(title, text))
    return home / "report.md"


def saved(figures: dict, folder: Path) -> list[str]:
    """Saves figures {name: Figure} as folder/NAME.png; returns their Markdown links, relative to folder's parent."""
    for name, figure in figures.items():
        figure.savefig(folder / f"{name}.png")
    return [f"![{tables.escape(name)}]({folder.name}/{quote(name)}.png)" for name in figures]


def as_html(title: str, text: str) -> str:
    """Markdown as an HTML page. HTML in the Markdown is shown as text (html=False); only <br> of `escape` acts."""
    body = MarkdownIt("commonmark", {"html": False}).enable("table").render(text.replace("<br>", BREAK))
    body = body.replace(BREAK, "<br>")
    return (f'<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n<title>{html.escape(title)}</title>\n'
            f"<style>{STYLE}</style>\n<body>\n{body}</body>\n</html>\n")


def planted_report(folder: Path) -> Path:
    """Writes folder/report.md and its picture from planted.json (experiment/planted.py); returns report.md's path."""
    found = json.loads((folder / "planted.json").read_text())
    with pictures.style():
        pictures.planted(found).savefig(folder / "planted.png")
    write_text(folder / "report.md", users.planted(found))
    return folder / "report.md"
