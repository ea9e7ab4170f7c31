"""The report of a job: report.md, and its pictures in report/*.png."""

import json
from pathlib import Path
from urllib.parse import quote

from data import domains, pictures, tables, users
from data.job import read_job
from mixdpo.config import write_whole


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
    write_whole(home / "report.md", "\n\n".join(parts) + "\n")
    return home / "report.md"


def planted_report(folder: Path) -> Path:
    """Writes folder/report.md and its picture from planted.json (data/planted.py); returns the path of report.md."""
    found = json.loads((folder / "planted.json").read_text())
    with pictures.style():
        pictures.planted(found).savefig(folder / "planted.png")
    write_whole(folder / "report.md", users.planted(found))
    return folder / "report.md"
