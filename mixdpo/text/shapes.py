"""Shapes: recognises the columns of a preference file, and converts its rows to canonical records (records.py).

    answers                                 prompt: the first of these columns that the file has
    chosen, rejected                        prompt; messages; conversations; none of them: chosen and rejected are whole
                                            transcripts, and what they have in common is the prompt (turns.py)
    output_1, output_2, preference          prompt; instruction, with input if it is there; preference is 1 or 2
    response_j, response_k                  prompt; question; response_j is the chosen one

Each file is recognised by its first row. A file with the project's own fields only is not converted: it is read exactly
as records.py says, and any other field is an error. --columns NAME=COLUMN,... gives a column of the file a name of
the table or of records.py, or the name system; NAME= leaves a name without a column. If a file lacks the column and
has the name, the name is used, so a file in the project's own format fits too.

Parts of a text prompt (instruction, input, question) are each followed by a blank line. If one of prompt and answers is
messages, all become messages: a text is one turn. A prompt that ends with an assistant's turn is an error, unless that
turn is the chosen answer; then it is removed, and counted. The column system is a system turn in front of messages;
null or empty: none. In front of a text it must be asked for: --columns system=system.
A column that is not used is named. One that looks like an optional field (users, worker, annotator_id, score) is an
error, unless the file has that field or --columns says what it is: `user=worker`, or `user=` for none.
Numbers where text is wanted are errors, with one exception: whole numbers in a column that --columns names as user,
annotator or domain are ids, and are written in decimal. In CSV, messages and scores are read as JSON.
"""

import difflib
import json
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from mixdpo.config import InputError
from mixdpo.files.sources import data_files
from mixdpo.text.containers import Row, rows
from mixdpo.text.records import FIELDS, OPTIONAL, TEXTS, Fault, check_record
from mixdpo.text.turns import is_transcript, read_turns, split_texts, split_turns, with_prompt, with_system

ANSWERS: dict[tuple[str, ...], tuple[str, ...]] = {     # columns of the answers -> of the prompt
    ("chosen", "rejected"): ("messages", "conversations"),
    ("output_1", "output_2", "preference"): ("instruction",),
    ("response_j", "response_k"): ("question",)}
MORE = ("input", "system")
NAMES = tuple(dict.fromkeys([*FIELDS, *(name for pair in ANSWERS.items() for part in pair for name in part), *MORE]))
PEOPLE = ("worker", "labeler", "labeller", "rater", "evaluator", "judge", "participant", "respondent", "person",
          "annotator", "user", "crowdworker", "reviewer")           # also with "s", "id" or "_id" behind them
IDS = ("user", "annotator", "domain")
MESSAGES = re.compile(r"""\s*(\[\s*)?\{\s*"(role|content|from|value)"\s*:""")  # in a cell of CSV
CELLS = ("csv", "tsv")  # containers whose values are text or null
EXAMPLES = 3


@dataclass(frozen=True)
class Layout:
    """How the rows of a file are read."""

    own: bool                       # the project's own format: nothing is converted
    answers: tuple[str, ...] = ()   # a key of ANSWERS
    prompt: str = ""                # the prompt's column; "": the common part of two transcripts
    names: tuple[tuple[str, str], ...] = ()     # (name, column) for each column that is used
    unused: tuple[str, ...] = ()    # the other columns
    later: tuple[str, ...] = ()     # optional names that the first row lacks; later rows may have them

    def __str__(self) -> str:
        shape = ", ".join(filter(None, (self.prompt, *self.answers)))
        where = [f"{name} from {column!r}" for name, column in self.names if name != column]
        more = [name for name, column in self.names if name == column and name in OPTIONAL + MORE]
        said = [f"read as {shape}" + " (the prompt is what both begin with)" * (not self.prompt)]
        said += [f"with {', '.join(more)}"] * bool(more) + [", ".join(where)] * bool(where)
        return "; ".join(said + [f"columns not used: {listed(self.unused)}"] * bool(self.unused))


def parse_columns(text: str) -> dict[str, str]:
    """The option columns: "prompt=instruction,user=" -> {"prompt": "instruction", "user": ""}. Raises: InputError."""
    found: dict[str, str] = {}
    for part in filter(None, text.split(",")):
        name, equals, column = part.partition("=")
        if not equals or name not in NAMES or name in found or column and column in found.values():
            raise InputError(f"got {part!r}; wanted NAME=COLUMN,..., each name and each column once, with names from "
                             f"{', '.join(NAMES)}", option="columns")
        found[name] = column
    return found


def read_records(named, columns: str, report: Callable) -> Iterator[tuple[Row, dict | Fault, list[str]]]:
    """Yields each row of the files that `named` stands for, its canonical record or what is wrong with it, and remarks.

    `report` receives a line on what was recognised, and one for each of the first three records, unless the file is in
    the project's own format. Raises: InputError if a file cannot be read or recognised."""
    given, before = parse_columns(columns), None
    for source in data_files(named):
        layout: Layout | None = None
        shown = EXAMPLES
        for row in rows(source):
            try:
                value, remarks = row.value(), list[str]()
                if layout is None:
                    layout = recognise(value, given, row)
                    if not layout.own and layout != before:
                        report(f"{source.name}: {layout}")
                        before, shown = layout, 0
                record, remarks = (value, []) if layout.own else convert(value, layout, given, row.kind)
                record = check_record(record)
            except Fault as fault:
                yield row, fault, []
                continue
            if shown < EXAMPLES:
                report(example(row, record))
                shown += 1
            yield row, record, remarks


# ---- which columns


def recognise(value: dict, given: dict[str, str], row: Row) -> Layout:
    """The layout of a file with this first row. Raises: InputError that lists the columns."""
    column_of = columns_by_name(value, given, row)
    if value.keys() <= {*FIELDS} and "prompt" in value and not given and row.kind not in CELLS and is_own(value):
        return Layout(own=True)
    families = [answers for answers in ANSWERS if column_of.keys() >= {*answers}]
    if len(families) != 1:
        raise unrecognised(value, "several shapes fit" if families else "no known shape fits", row)
    answers = families[0]
    prompts = [name for name in ("prompt", *ANSWERS[answers]) if name in column_of]
    if len(prompts) > 1 and "prompt" not in prompts:
        raise unrecognised(value, f"each of {' and '.join(prompts)} could be the prompt", row)
    prompt = prompts[0] if prompts else ""
    texts = [cell("", value[column_of[name]], row.kind) for name in (*answers[:2], *prompts[:1])]
    if not prompt and (answers[0] != "chosen" or any(isinstance(v, str) and not is_transcript(v) for v in texts)):
        raise unrecognised(value, "no column is known to be the prompt", row)
    chat = not all(isinstance(v, str) for v in texts) or "system" in given
    used = {*answers, prompt, *OPTIONAL, *["input"] * (prompt == "instruction"), *["system"] * chat}
    names = {name: column for name, column in column_of.items() if name in used}
    unused = tuple(column for column in value if column not in names.values())
    if idle := [name for name, column in given.items() if column and name not in names]:
        raise InputError(f"a column is given for {', '.join(idle)}, which is not used beside "
                         f"{', '.join(filter(None, (prompt, *answers)))}; leave it out", row.file, row.number,
                         option="columns")
    for column in unused:
        check_near_miss(column, names, given)
    later = tuple(name for name in (*OPTIONAL, *MORE) if name in used and name not in given and name not in value)
    return Layout(False, answers, prompt, tuple(names.items()), unused, later)


def columns_by_name(value: dict, given: dict[str, str], row: Row) -> dict[str, str]:
    """Name -> column of a row, after --columns. Raises: InputError if a column that was named is not there."""
    found = {}
    for name, column in given.items():
        if column and column not in value and name not in value:
            raise InputError(f"has no column {column!r} (nor {name!r}); its columns are {listed(value)}: correct "
                             "--columns", row.file, row.number, option="columns")
        if column:
            found[name] = column if column in value else name
    taken = {*found.values()}
    return found | {name: name for name in value if name in NAMES and name not in given and name not in taken}


def is_own(value: dict) -> bool:
    """Whether conversion would leave a row as it is, or be refused; records.py then says what is wrong."""
    if value.keys() & {"ranking", "rest"}:                                  # of the project's own format alone
        return True
    layout = Layout(False, ("chosen", "rejected"), "prompt", tuple((name, name) for name in value))
    try:
        return convert(value, layout, {}, "lines")[0] == value
    except Fault:
        return True


def check_near_miss(column: str, names: dict, given: dict) -> None:
    """Raises: Fault if a column looks like an optional field that nothing in the file or in --columns stands for."""
    plain = re.sub(r"[^a-z0-9]+", "_", column.lower()).strip("_")
    people = re.sub(r"(_?ids?|s)$", "", plain) in PEOPLE
    near = ["user"] if people else difflib.get_close_matches(plain, OPTIONAL, n=1, cutoff=0.8)
    if near and near[0] not in names and near[0] not in given:
        raise Fault("unknown field", f"{column!r} looks like {near[0]}", f"add --columns {near[0]}={column} to use it, "
                    f"or --columns {near[0]}= to leave it out")


def unrecognised(value: dict, why: str, row: Row) -> InputError:
    """The error for columns that could be read in no way, or in several."""
    return InputError(f"{why}; its columns are {listed(value)}. Say which are which: --columns prompt=COLUMN,"
                      "chosen=COLUMN,rejected=COLUMN (docs/own-data.md lists the shapes)", row.file, row.number,
                      option="columns")


def listed(columns) -> str:
    names = [repr(column) for column in columns]
    return ", ".join(names[:30]) + f" and {len(names) - 30} more" * (len(names) > 30)


# ---- rows


def convert(value: dict, layout: Layout, given: dict[str, str], kind: str) -> tuple[dict, list[str]]:
    """A row as a record whose fields records.py still has to check, and remarks on what was left out. Raises: Fault."""
    names = dict(layout.names) | {name: name for name in layout.later if name in value}
    remarks = []
    for column in [column for column in value if column not in (*layout.unused, *names.values())]:
        check_near_miss(column, names, given)
        remarks.append(f"rows with the column {column!r}, which the first row lacks and which is not used")
    row = {name: cell(name, value[column], kind) for name, column in names.items() if column in value}
    if missing := [name for name in (*layout.answers, layout.prompt) if name and name not in row]:
        raise Fault("missing field", ", ".join(missing), "wanted it in every row: add it, or remove the row")
    for name in IDS:
        if name in given and type(row.get(name)) is int:
            row[name] = str(row[name])
    chosen, rejected = answers_of(row, layout)
    prompt = prompt_of(row, layout.prompt)
    if layout.prompt:
        prompt, chosen, rejected = with_prompt(prompt, chosen, rejected, remarks)
    elif isinstance(chosen, str) and isinstance(rejected, str):
        prompt, chosen, rejected = split_texts(chosen, rejected)
    else:
        prompt, chosen, rejected = split_turns(read_turns("chosen", chosen), read_turns("rejected", rejected))
    prompt, chosen, rejected = with_system(row.get("system"), prompt, chosen, rejected)
    record = dict(zip(TEXTS, (prompt, chosen, rejected)))
    return record | {name: row[name] for name in OPTIONAL if name in row}, remarks


def cell(name: str, value, kind: str):
    """A value; if it is a cell of CSV, what it holds as JSON where a field is no text."""
    if kind not in CELLS or not isinstance(value, str):
        return value
    if name == "context":
        return {"true": True, "false": False}.get(value.lower(), value)
    if name == "scores" or MESSAGES.match(value):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value
    return value


def prompt_of(row: dict, name: str):
    """The prompt's column; of an instruction or a question, the text of the prompt. Raises: Fault."""
    if name not in ("instruction", "question"):
        return row.get(name)
    parts = {name: row[name]} | ({"input": row["input"]} if row.get("input") not in (None, "") else {})
    for field, text in parts.items():
        if not isinstance(text, str) or not text:
            raise Fault("wrong type", f"{field} is {text!r:.80}", "wanted a text")
    return "".join(f"{text}\n\n" for text in parts.values())


def answers_of(row: dict, layout: Layout):
    """The chosen and the rejected answer. Raises: Fault if a preference names neither."""
    first, second = (row[name] for name in layout.answers[:2])
    if "preference" not in layout.answers:
        return first, second
    preference, names = row["preference"], [dict(layout.names)[name] for name in layout.answers[:2]]
    if type(preference) in (int, float) and preference in (1, 2):           # true is not 1
        preference = str(int(preference))
    if preference not in ("1", "2", *names):
        raise Fault("no preference", f"preference is {preference!r:.40}", "wanted 1 or 2, or the name of the column of "
                    "the better answer")
    return (first, second) if preference in ("1", names[0]) else (second, first)


# ---- what is printed


def example(row: Row, record: dict) -> str:
    """One record on a line, cut at the width of the terminal."""
    width = shutil.get_terminal_size((120, 24)).columns
    share = max(16, (width - 60) // 3)
    parts = [f"{field} {shortened(record[field], share)}" for field in TEXTS]
    parts += [f"{name} {record[name]!r}" for name in OPTIONAL if name in record]
    return f"  {row.number}: {' | '.join(parts)}".encode("utf-8", "replace").decode()[:width]


def shortened(value, share: int) -> str:
    """The start of a text, or of the last of several turns."""
    count = f"({len(value)} turns) " if isinstance(value, list) and len(value) > 1 else ""
    text = value if isinstance(value, str) else value[-1]["content"]
    return count + (repr(text) if len(text) <= share else repr(text[:share]) + "...")
