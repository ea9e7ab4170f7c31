"""`python -m data.studies --name collapse --preset quick`: measures what is not measured yet, and writes the page."""

import time
from dataclasses import dataclass
from pathlib import Path

from data.report import pictures
from data.studies import NAMES, study_of
from data.studies.study import PRESETS, describe_study, run
from mixdpo.config import check_choices, command, parse, write_whole


@dataclass(frozen=True)
class StudyConfig:
    """A study: its cells, its page NAME.md, its pictures NAME-*.png."""

    name: str                           # one of those in docs/studies
    preset: str = "quick"               # smoke, quick (20 minutes on two cores at most) or full
    out: str = "docs/studies"           # where the page goes
    home: str = "runs/studies"          # where figures are kept
    data_folder: str = ""               # local files looked into before anything is fetched


def main(argv: list[str]) -> None:
    config, began = parse(StudyConfig, argv, "python -m data.studies"), time.monotonic()
    check_choices(config, {"name": NAMES, "preset": PRESETS})
    study, out = study_of(config.name), Path(config.out)
    facts = run(config.name, config.preset, Path(config.home), config.data_folder)
    spent = Path(config.home) / config.name / f"{config.preset}.seconds"    # of all calls together
    seconds = time.monotonic() - began + (float(spent.read_text()) if spent.exists() else 0.0)
    write_whole(spent, f"{seconds:.1f}")
    out.mkdir(parents=True, exist_ok=True)
    with pictures.style():
        text, figures = study.page([(row["cell"], row["figures"]) for row in facts])
        for what, figure in figures.items():
            figure.savefig(out / f"{config.name}-{what}.png")
    links = "\n\n".join(f"![{what}]({config.name}-{what}.png)" for what in figures)
    provenance = describe_study(facts, config.name, config.preset, seconds)
    parts = [f"# {study.title}", study.question, text, links, provenance]
    write_whole(out / f"{config.name}.md", "\n\n".join(parts) + "\n")
    print(f"page: {out / config.name}.md")


if __name__ == "__main__":
    command(main)
