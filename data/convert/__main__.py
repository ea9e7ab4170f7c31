"""`python -m data.convert SET FILE --out prefs.jsonl`: converts a public preference set to this project's JSON Lines.

It prints the set's licence and citation, and what was left out: each reason with its count and the first row.
"""

import inspect
import sys
from dataclasses import dataclass
from pathlib import Path

from data.convert import arena, community_alignment, coval, helpsteer, multipref, prism, tldr, ultrafeedback
from data.convert.source import Source
from mixdpo.config import InputError, check_choices, command, parse, replacing, to_json

SETS = {"community_alignment": community_alignment.convert, "coval": coval.convert, "multipref": multipref.convert,
        "prism": prism.convert, "tldr": tldr.convert, "ultrafeedback": ultrafeedback.convert,
        "helpsteer": helpsteer.convert, "arena": arena.convert}


@dataclass(frozen=True)
class ConvertConfig:
    """Converts a public preference set to JSON Lines: python -m data.convert SET FILE --out prefs.jsonl. SET: arena,
    community_alignment, coval, helpsteer, multipref, prism, tldr or ultrafeedback."""

    set: str                    # name of the set; may stand first, without --set
    file: str                   # the set's file: .jsonl, .json, .csv, .tsv (also .gz) or .parquet; may stand second
    out: str                    # the file to write, .jsonl; replaced if it exists
    rankings: bool = False      # true: records hold a ranking; false: one pair for every two answers of unequal rank
    block: str = ""             # coval only: personal or world; default: personal
    split: str = ""             # tldr, helpsteer only: takes rows of this split; default: all rows


def notice(convert) -> list[str]:
    """The paragraphs on licence and citation in the docstring of a converter's file, one line each."""
    text = inspect.cleandoc(sys.modules[convert.__module__].__doc__ or "")
    return [" ".join(part.split()) for part in text.split("\n\n") if part.startswith(("Licence:", "Citation:"))]


def report(source: Source, out: Path, records: int, users: int) -> list[str]:
    """What was made, and what was left out."""
    kind = "rankings" if source.rankings else "pairs"
    lines = [f"{out}: {records} {kind} of {source.judgements} judgements{f' by {users} users' * (users > 0)}, from "
             f"{source.read} rows"]
    if source.several:
        lines.append(f"{source.several} judgements became several pairs, one for every two answers of unequal rank. "
                     "Pairs of one judgement are not independent; --rankings true writes each judgement as one record")
    return lines + [f"left out, {reason}: {count} (first: row {source.first[reason]})"
                    for reason, count in source.counts.items()]


def options_for(config: ConvertConfig, convert) -> dict[str, str]:
    """The options that not all sets have. Raises: InputError if one is given that this set does not have."""
    given = {name: value for name in ("block", "split") if (value := getattr(config, name))}
    for name in given.keys() - inspect.signature(convert).parameters.keys():
        raise InputError(f"got {given[name]!r}, but {config.set} has no {name}; leave the option out", option=name)
    return given


def check_out(config: ConvertConfig) -> Path:
    """The output's path. Raises: InputError if it is the input or a folder, or if its name does not end in .jsonl."""
    out = Path(config.out)
    if out.exists() and Path(config.file).exists() and out.samefile(config.file):
        raise InputError(f"got {out}, which is the input; choose another name", option="out")
    if out.suffix != ".jsonl" or out.is_dir():
        raise InputError(f"got {out}; wanted a file with a name in .jsonl", option="out")
    return out


def main(argv: list[str]) -> None:
    """Converts one file."""
    free = next((n for n, word in enumerate(argv[:2]) if word.startswith("-")), len(argv[:2]))
    named = [word for pair in zip(("--set", "--file"), argv[:free]) for word in pair]
    config = parse(ConvertConfig, [*named, *argv[free:]], "python -m data.convert")
    check_choices(config, {"set": sorted(SETS)})
    convert = SETS[config.set]
    options, out = options_for(config, convert), check_out(config)
    print("\n".join(notice(convert)))
    source, records, users = Source(Path(config.file), config.rankings), 0, set()
    with replacing(out) as part, part.open("w", encoding="utf-8") as file:
        for record in convert(source, **options):
            file.write(to_json(record) + "\n")
            records, users = records + 1, users | {record.get("user")}
        lines = report(source, out, records, len(users - {None}))
        if not records:
            raise InputError("no record could be made of it; " + "; ".join(lines[1:] or ["it has no rows"]),
                             file=source.path)
    print("\n".join(lines))


if __name__ == "__main__":
    command(main)
