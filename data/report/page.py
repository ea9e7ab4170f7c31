"""The report of a job: report.md, the same as report.html, and its pictures in report/*.png."""

import html
import json
from pathlib import Path
from urllib.parse import quote

from markdown_it import MarkdownIt

from data.report import domains, pictures, tables, users
from data.report.job import read_job
from mixdpo.config import write_whole

BREAK = "\ue000"  # stands for a line break while Markdown is read
STYLE = """body { font: 15px/1.5 system-ui, sans-serif; max-width: 75em; margin: 2em auto; padding: 0 1em; color: #222 }
table { border-collapse: collapse; font-size: 13px; display: block; overflow-x: auto } th, td { padding: .2em .7em }
tr:nth-child(even) { background: #f6f6f6 } th { border-bottom: 1px solid #888 } img { max-width: 100% }"""


def report(home: Path) -> Path:
    """Writes home/report.md and home/report/*.png from what lies in home; returns the path of report.md."""
    home = Path(home)
    job, folder = read_job(home), home / "report"
    folder.mkdir(exist_ok=True)
    for old in folder.glob("*.png"):                                        # a picture of before must not stand beside
        old.unlink()
    drawings = []
    with pictures.style():
        gated = any(run.config.get("gate", "fixed") != "fixed" for run in job.runs)
        new_users = bool(job.results["adapt"])
        for title, reading, draw in pictures.PICTURES + pictures.OF_USERS * new_users + pictures.OF_GATES * gated:
            drawn = draw(job)
            for name, figure in drawn.items():
                figure.savefig(folder / f"{name}.png")
            links = [f"![{tables.escape(name)}](report/{quote(name)}.png)" for name in drawn]
            drawings.append(tables.section(title, reading if drawn else "Nothing was measured that it shows.", *links))
    sections = [tables.what_was_run, tables.policies, tables.head_differences, tables.preferences, users.types,
                *[users.adaptation] * new_users, tables.alignment, *[users.win_rates] * bool(job.win_rates)]
    if "domains" in job.dataset:
        sections[1:1] = [domains.rewards_by_domain, domains.gates, domains.likelihoods]
    title = f"# {tables.escape(home.resolve().name)}"
    parts = [title, *(write(job) for write in sections), *drawings, tables.samples(job)]
    text = "\n\n".join(parts) + "\n"
    write_whole(home / "report.md", text)
    write_whole(home / "report.html", page(home.resolve().name, text))
    return home / "report.md"


def page(title: str, text: str) -> str:
    """Markdown as a page of its own. Markup in it is text: html=False lets none through but our own line breaks."""
    body = MarkdownIt("commonmark", {"html": False}).enable("table").render(text.replace("<br>", BREAK))
    body = body.replace(BREAK, "<br>")
    return (f'<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n<title>{html.escape(title)}</title>\n'
            f"<style>{STYLE}</style>\n<body>\n{body}</body>\n</html>\n")


def planted_report(folder: Path) -> Path:
    """Writes folder/report.md and its picture from planted.json (experiment/planted.py); returns report.md's path."""
    found = json.loads((folder / "planted.json").read_text())
    with pictures.style():
        pictures.planted(found).savefig(folder / "planted.png")
    write_whole(folder / "report.md", users.planted(found))
    return folder / "report.md"
