"""Containers: the rows of a data file, with their numbers, whatever the file is made of.

    JSON Lines      one object a line; the number of a row is its line, from 1. Empty lines are skipped
    .json           an array of objects; the number is the object's place, from 1. A file that does not begin with "["
                    is read as JSON Lines
    .csv, .tsv      the first line names the columns; the number is the line on which a row begins. An empty cell is
                    null, all others are text. A field with quotes may contain line breaks; quotes in it are doubled
    .parquet        the number is the row, from 1; needs pyarrow. A value that Python has not (a time in nanoseconds, a
                    text that is not UTF-8) is a Foreign: a fault only in a column that is used

All but Parquet may be packed as .gz or .zst. Texts are UTF-8; a byte-order mark is skipped. A line ends with a newline,
with or without a carriage return before it; within a JSON string or a quoted field both are kept as they are.
A row with a fault of its own can be skipped by --drop. A file that cannot be read further cannot: damaged packing,
an array that is not JSON, quotes that are not closed, a column that occurs twice.
"""

import csv
import json
from collections.abc import Iterator
from dataclasses import dataclass

from mixdpo import config as configs
from mixdpo.config import InputError
from mixdpo.files.sources import DataFile
from mixdpo.files.unpack import unpacked
from mixdpo.text.records import LONGEST, Fault, lines, parse_object

ARRAY = 2**31  # largest JSON array in bytes: it is held in memory
BATCH = 256  # rows of a Parquet file that are decoded at once


@dataclass(frozen=True)
class Row:
    """One row of a file."""

    file: str                       # as errors name it
    number: int                     # line or row, from 1
    content: bytes | dict | Fault   # the text of a JSON object, or column -> value, or what is wrong with it
    kind: str = "lines"             # the container

    def value(self) -> dict:
        """Column -> value. Raises: Fault."""
        if isinstance(self.content, Fault):
            raise self.content
        return parse_object(self.content) if isinstance(self.content, bytes) else self.content

    def line(self) -> bytes:
        """The row as a line: of JSON Lines the line itself, of other containers an object with the same values."""
        if isinstance(self.content, bytes) and self.kind == "lines":
            return self.content
        try:
            return configs.to_json(self.value(), default=str).encode() + b"\n"
        except Fault as fault:
            return f"{fault}\n".encode()


@dataclass(frozen=True)
class Foreign:
    """A value of a Parquet file that Python cannot hold."""

    type: str                       # pyarrow's name
    reason: str

    def __repr__(self) -> str:
        return f"a {self.type} that cannot be read ({self.reason})"


def rows(source: DataFile) -> Iterator[Row]:
    """The rows of a file, in its order. Raises: InputError if the file cannot be read."""
    read = {"lines": line_rows, "json": array_rows, "csv": cell_rows, "tsv": cell_rows, "parquet": parquet_rows}
    return read[source.kind](source)


def line_rows(source: DataFile) -> Iterator[Row]:
    """The rows of JSON Lines."""
    for number, raw in enumerate(lines(source.path), start=1):
        if raw.strip():
            yield Row(source.name, number, raw)


def array_rows(source: DataFile) -> Iterator[Row]:
    """The rows of a JSON array. Each object is cut out here, and parsed as a line is."""
    with unpacked(source.path) as file:
        start = file.read(1 << 12)
        if not start.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"["):
            yield from line_rows(source)
            return
        raw = start + file.read(ARRAY)
    if len(raw) > ARRAY:
        raise InputError(f"an array of more than {ARRAY >> 20} MiB; write one object a line (.jsonl)", file=source.name)
    try:
        text = raw.decode()
    except UnicodeDecodeError as error:
        raise InputError(f"not UTF-8: byte {error.start + 1} is 0x{raw[error.start]:02x}; save the file as UTF-8",
                         file=source.name) from None
    decoder, place, number = json.JSONDecoder(), skip(text, text.index("[") + 1), 1
    while text[place : place + 1] != "]" or number > 1:                     # an empty array has no first object
        try:
            end = decoder.raw_decode(text, place)[1]
        except (ValueError, RecursionError) as error:
            raise InputError(f"not JSON ({str(error):.200}); wanted an array of objects", file=source.name,
                             line=number) from None
        yield Row(source.name, number, text[place:end].encode(), "json")
        place, number = skip(text, end), number + 1
        if text[place : place + 1] == "]":
            break
        if text[place : place + 1] != ",":
            raise InputError(f"got {text[place : place + 20]!r}, wanted a comma or the end of the array; the file is "
                             "incomplete or damaged", file=source.name, line=number - 1)
        place = skip(text, place + 1)
    if rest := text[place + 1 :].strip(" \t\r\n"):
        raise InputError(f"got {rest[:20]!r} after the array, wanted nothing; remove it", file=source.name)


def skip(text: str, place: int) -> int:
    """The place of the next character that is no JSON white space."""
    while text[place : place + 1] in (" ", "\t", "\r", "\n"):
        place += 1
    return place


def cell_rows(source: DataFile) -> Iterator[Row]:
    """The rows of a CSV or TSV file."""
    limit = csv.field_size_limit(LONGEST)
    try:
        reader = csv.reader(text_lines(source), delimiter="\t" if source.kind == "tsv" else ",", strict=True)
        header: list[str] | None = None
        while True:
            number = reader.line_num + 1
            if (cells := next(reader, None)) is None:
                return
            if header is None:
                header = unique_names(cells, source, number)
            elif len(cells) == len(header):
                yield Row(source.name, number, {name: cell or None for name, cell in zip(header, cells)}, source.kind)
            elif cells:                                                     # else an empty line
                wanted = f"wanted {len(header)} as in the first line"
                yield Row(source.name, number, Fault("wrong number of cells", f"got {len(cells)}", wanted), source.kind)
    except csv.Error as error:
        raise InputError(f"not CSV ({error}); a field with quotes must have one at each end, and quotes inside it must "
                         "be doubled", file=source.name, line=number) from None
    finally:
        csv.field_size_limit(limit)


def text_lines(source: DataFile) -> Iterator[str]:
    """The lines of a file as texts, with their ends."""
    for number, raw in enumerate(lines(source.path), start=1):
        try:
            yield raw.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise InputError(f"not UTF-8: byte {error.start + 1} of the line is 0x{error.object[error.start]:02x}; "
                             "save the file as UTF-8", file=source.name, line=number) from None


def unique_names(names: list[str], source: DataFile, line: int | None = None) -> list[str]:
    """The names of columns. Raises: InputError if one occurs twice."""
    if repeated := [name for name in names if names.count(name) > 1]:
        raise InputError(f"column {repeated[0]!r} occurs twice; rename or remove one", file=source.name, line=line)
    return names


def parquet_rows(source: DataFile) -> Iterator[Row]:
    """The rows of a Parquet file."""
    try:
        from pyarrow import parquet
    except ImportError:
        raise InputError("Parquet needs the package pyarrow; run `pip install -e .[files]`, or save the file as JSON "
                         "Lines", file=source.name) from None
    with unpacked(source.path) as file, configs.reading(source.name, "wanted a Parquet file"):
        try:
            opened, number = parquet.ParquetFile(file), 0
            unique_names(opened.schema_arrow.names, source)
            for batch in opened.iter_batches(BATCH):
                columns = [python_values(column) for column in batch.columns]
                for number, values in enumerate(zip(*columns), start=number + 1):
                    yield Row(source.name, number, dict(zip(batch.schema.names, values)), source.kind)
        except OSError as error:                                            # pyarrow's, for damaged pages
            raise InputError(f"cannot be read as Parquet ({str(error):.200}); get it again", file=source.name) from None


def python_values(column) -> list:
    """The values of a column of pyarrow's; one that Python cannot hold is a Foreign."""
    def value(scalar):
        try:
            return scalar.as_py()
        except (ValueError, ArithmeticError) as error:
            return Foreign(str(column.type), str(error)[:60])

    try:
        return column.to_pylist()
    except (ValueError, ArithmeticError):
        return list(map(value, column))
