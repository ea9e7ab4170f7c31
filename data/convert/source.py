"""What all converters share: access to a row's fields, records from a ranking, and counts of what is left out.

A judgement is a prompt and a ranking: groups of answers, best group first, equal answers in one group. It becomes

    pairs       one record for every two answers of different groups: {"prompt", "chosen", "rejected"}. An answer
                occurs in several pairs, so the pairs of one judgement are not independent: it counts as one
    a ranking   with --rankings true: one record {"prompt", "ranking": [[best, ...], ..., [worst, ...]]}; if only the
                best is known, {"prompt", "ranking": [[best]], "rest": [the others]}

Left out: weights for the strength of a preference; a slight and a clear preference count the same.
"""

import itertools
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from mixdpo.config import InputError
from mixdpo.files.sources import data_files
from mixdpo.text.containers import rows
from mixdpo.text.records import Fault, check_messages, check_string


@dataclass(frozen=True)
class Row:
    """One row of a file, or an object inside it. Every access names file, row and field if the field is missing."""

    file: Path
    number: int
    fields: dict
    where: str = ""                     # place of the object within the row, "metadata.assessments[0]."

    def get(self, name: str):
        """A field's value; a missing number (NaN) is None. Raises: InputError if there is no such field."""
        if name not in self.fields:
            raise self.error(f"no field {self.where}{name}; found: {', '.join(map(str, self.fields)) or 'none'}; "
                             "wanted the fields that the converter's file in data/convert describes")
        value = self.fields[name]
        return None if value != value else value

    def text(self, name: str) -> str:
        """A text; "" if it is null or has only blanks. Raises: InputError if it is not a string."""
        value = self.get(name)
        if not isinstance(value, str | None):
            raise self.error(f"{self.where}{name} is {value!r:.80}; wanted a text")
        return value if value and value.strip() else ""

    def user(self, name: str) -> str:
        """Who judged, as a text; "" if unknown. Raises: InputError if it is neither a text nor a whole number."""
        value = self.get(name)
        if isinstance(value, bool) or not isinstance(value, str | int | None):
            raise self.error(f"{self.where}{name} is {value!r:.80}; wanted a text or a whole number")
        return "" if value is None else str(value).strip()

    def number_of(self, name: str) -> float | None:
        """A number, also one that is written as a text; None if it is null or "". Raises: InputError."""
        value = self.get(name)
        try:
            number = None if value is None or value == "" else float(value)
        except (TypeError, ValueError, OverflowError):
            raise self.error(f"{self.where}{name} is {value!r:.80}; wanted a number") from None
        return None if number != number else number

    def at(self, name: str) -> "Row":
        """An object inside the row. Raises: InputError if it is none."""
        return self.inner(name, self.get(name))

    def each(self, name: str) -> list["Row"]:
        """The objects of a list inside the row; none if it is null. Raises: InputError if it is no list of objects."""
        found = self.get(name)
        if not isinstance(found, list | None):
            raise self.error(f"{self.where}{name} is {found!r:.80}; wanted a list")
        return [self.inner(f"{name}[{n}]", value) for n, value in enumerate(found or ())]

    def inner(self, name: str, value) -> "Row":
        if not isinstance(value, dict):
            raise self.error(f"{self.where}{name} is {value!r:.80}; wanted an object")
        return Row(self.file, self.number, value, f"{self.where}{name}.")

    def error(self, message: str) -> InputError:
        return InputError(message, file=self.file, line=self.number)


@dataclass
class Source:
    """A file to be converted, and the counts of its conversion."""

    path: Path
    rankings: bool = False                          # records hold rankings; False: pairs
    read: int = 0                                   # rows
    judgements: int = 0                             # those that became records
    several: int = 0                                # those that became several pairs
    counts: Counter = field(default_factory=Counter)        # reason -> how often something was left out
    first: dict[str, int] = field(default_factory=dict)     # reason -> the first row where it was

    def rows(self) -> Iterator[Row]:
        """The rows of the file (mixdpo/text/containers.py). Raises: InputError naming the line or row."""
        for file in data_files(self.path):
            for found in rows(file):
                self.read += 1
                try:
                    values = found.value()
                except Fault as fault:
                    raise Fault(fault.kind, fault.got, fault.remedy, self.path, found.number) from None
                yield Row(self.path, found.number, values)

    def skip(self, reason: str, row: Row) -> None:
        """Counts what is left out, or changed, by its reason."""
        self.counts[reason] += 1
        self.first.setdefault(reason, row.number)

    def judgement(self, row: Row, prompt: str | list, ranking: list[list[str]], rest: bool = False, **more: str
                  ) -> Iterator[dict]:
        """Yields the records of one judgement; none, and a count, if it cannot be used. prompt: a text or messages; the
        answers take the same form. rest: the order of the last group is unknown, in place of equal. more: user,
        annotator, domain; one that is "" is left out."""
        groups, seen = [], set()
        for group in ranking:
            kept = []
            for text in group:
                if not text.strip():
                    self.skip("answers that are empty", row)
                elif text.strip() in seen:                                  # many chat templates strip an answer
                    self.skip("answers with the same text as one that is ranked as high or higher", row)
                else:
                    kept.append(text)
                    seen.add(text.strip())
            groups += [kept] if kept else []
        if len(groups) < 2:
            return self.skip("ties" if len(seen) > 1 else "judgements of fewer than two different answers", row)
        try:
            for text in seen:
                check_string("an answer", text)
            (check_messages if isinstance(prompt, list) else check_string)("prompt", prompt)
        except Fault as fault:
            return self.skip(f"judgements with a fault, {fault.kind}", row)
        more = {name: value for name, value in more.items() if value}
        if isinstance(prompt, list):
            groups = [[[{"role": "assistant", "content": text}] for text in group] for group in groups]
        self.judgements += 1
        if self.rankings:
            ranked = {"ranking": groups[:-1], "rest": groups[-1]} if rest else {"ranking": groups}
            yield {"prompt": prompt} | ranked | more
            return
        pairs = [pair for better, worse in itertools.combinations(groups, 2)
                 for pair in itertools.product(better, worse)]
        self.several += len(pairs) > 1
        for chosen, rejected in pairs:
            yield {"prompt": prompt, "chosen": chosen, "rejected": rejected} | more


def user_turn(text: str) -> dict:
    return {"role": "user", "content": text}


def messages_of(row: Row, name: str) -> list[dict]:
    """A list of messages with role and content only. A developer's message is a system turn."""
    roles = {"developer": "system"}
    return [{"role": roles.get(role := part.text("role"), role), "content": part.text("content")}
            for part in row.each(name)]
