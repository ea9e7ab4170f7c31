"""`python -m data.studies --name collapse --preset quick`: measures the missing cells and writes the page."""

import time
from dataclasses import dataclass
from pathlib import Path

from data.report import pictures
from data.studies import NAMES, study_of
from data.studies.study import PRESETS, describe_study, run
from mixdpo.config import check_choices, command, parse, write_text


@dataclass(frozen=True)
class StudyConfig:
    """Runs a study, and writes its page NAME.md and its pictures NAME-*.png."""

    name: str                           # name of the study, as in docs/studies
    preset: str = "quick"               # smoke, quick (20 minutes on two cores at most) or full
    out: str = "docs/studies"           # folder for the page
    home: str = "runs/studies"          # folder for the figures of cells
    data_folder: str = ""               # folder of local files, used before anything is fetched


def main(argv: list[str]) -> None:
    """Measures the study's cells and writes its page."""
    config, began = parse(StudyConfig, argv, "python -m data.studies"), time.monotonic()
    check_choices(config, {"name": NAMES, "preset": PRESETS})
    study, out = study_of(config.name), Path(config.out)
    facts = run(config.name, config.preset, Path(config.home), config.data_folder)
    spent = Path(config.home) / config.name / f"{config.preset}.seconds"    # of all calls that ended
    seconds = time.monotonic() - began + (float(spent.read_text()) if spent.exists() else 0.0)
    write_text(spent, f"{seconds:.1f}")
    out.mkdir(parents=True, exist_ok=True)
    with pictures.style():
        text, figures = study.page([(row["cell"], row["figures"]) for row in facts])
        for what, figure in figures.items():
            figure.savefig(out / f"{config.name}-{what}.png")
    links = "\n\n".join(f"![{what}]({config.name}-{what}.png)" for what in figures)
    provenance = describe_study(facts, config.name, config.preset, seconds)
    parts = [f"# {study.title}", study.question, text, links, provenance]
    write_text(out / f"{config.name}.md", "\n\n".join(parts) + "\n")
    print(f"The page of the study is {out / config.name}.md: {len(facts)} cells, {seconds / 60:.1f} minutes.")


if __name__ == "__main__":
    command(main)
