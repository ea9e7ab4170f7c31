"""Configuration: one flat frozen dataclass a script; the command line is made from it.

Each field of the dataclass is one option: its name (with dashes) is the flag, its type the parser, its default the
default. The comment behind it in the source is the help text. Two marks in the source arrange the help:

    # --- training                  a line between fields: the fields below it form the group "training"
    epochs: int = 1     # * passes over the data        a star: the option is essential, so --help shows it

--help-all shows every option. Without any star, --help shows every option too.
An unknown option or a value of the wrong type is an error.
Left out on purpose: configuration files, nesting, environment variables, registries.
"""

import contextlib
import dataclasses
import difflib
import errno
import importlib
import inspect
import itertools
import json
import math
import os
import re
import sys
import typing
from collections.abc import Iterator
from pathlib import Path

import torch


class InputError(ValueError):
    """User input that cannot be used. `message` says what is wrong, what was expected and what to do; file, line and
    option say where. As text: "FILE:LINE: message", "FILE: message", "--option: message", or the message alone."""

    def __init__(self, message: str, file=None, line: int | None = None, option: str | None = None):
        self.message, self.file, self.line, self.option = message, file, line, option
        where = f"{file}" if file is not None else as_flag(option) if option is not None else ""
        if line is not None:                                                # without a file: lines_of adds it
            where = f"{where}:{line}" if file is not None else f"{where}, line {line}".removeprefix(", ")
        super().__init__(f"{where}: {message}" if where else message)


@contextlib.contextmanager
def lines_of(file):
    """Context manager: adds this file to an InputError that has a line and no file."""
    try:
        yield
    except InputError as error:
        if error.line is None or error.file is not None:
            raise
        raise InputError(error.message, file, error.line, error.option) from None


@contextlib.contextmanager
def reading(path, remedy: str = "the file is damaged or of another format; get it again"):
    """Context manager around the reading of a foreign file: an error that its contents cause becomes an InputError that
    names the file. remedy: the end of the message."""
    try:
        yield
    except InputError:
        raise
    except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, AssertionError, RecursionError,
            MemoryError, RuntimeError) as error:
        raise InputError(f"{type(error).__name__} {str(error)[:200]!r}; {remedy}", file=path) from error


class Option(typing.NamedTuple):
    """What the source of a dataclass says about one of its fields."""

    help: str = ""                  # the comment behind the field, without its star
    essential: bool = False         # whether the comment begins with a star
    group: str = "options"          # title of the group that the field stands in


def options_of(cls: type) -> dict[str, Option]:
    """The options of a dataclass by field name, in the order of its fields, inherited ones included. A comment
    continues over the comment lines below it that are indented further than the fields."""
    found, pattern = {}, r"^    (?:# --- (.+)|(\w+): [^#\n]*#(.+(?:\n {5,}#.*)*))$"
    for part in filter(dataclasses.is_dataclass, cls.__mro__):
        group = Option().group
        for title, name, comment in re.findall(pattern, inspect.getsource(part), re.MULTILINE):
            group = title or group
            text = " ".join(line.strip(" #") for line in comment.splitlines())
            found[name] = Option(text.removeprefix("* "), text.startswith("* "), group)
    return {f.name: found.get(f.name, Option()) for f in dataclasses.fields(cls)}


def as_flag(name: str) -> str:
    """The flag of a field: "--train-trunk" for "train_trunk"."""
    return f"--{name.replace('_', '-')}"


def default_of(field: dataclasses.Field) -> str:
    """The field's default as the command line writes it, "required" or, for an empty text, "empty"."""
    if field.default is not dataclasses.MISSING:
        value = field.default
    elif field.default_factory is not dataclasses.MISSING:
        value = field.default_factory()
    else:
        return "required"
    if isinstance(value, bool):
        return str(value).lower()
    return (",".join(map(str, value)) if isinstance(value, tuple) else str(value)) or "empty"


def usage(cls, program: str, complete: bool = True) -> str:
    """The help text in groups, one line an option with its default. complete: all options, not the essential alone."""
    options, fields = options_of(cls), dataclasses.fields(cls)
    shown = [f for f in fields if complete or options[f.name].essential] or fields
    lines = [f"usage: {program} [--option value ...]", "", inspect.getdoc(cls) or ""]
    width = max(len(f.name) for f in shown)
    for group, members in itertools.groupby(shown, lambda f: options[f.name].group):
        lines += ["", f"{group}:"]
        lines += [f"  {as_flag(f.name):<{width + 2}}  {options[f.name].help}  [{default_of(f)}]" for f in members]
    if len(shown) < len(fields):
        lines += ["", f"These are {len(shown)} of {len(fields)} options; `{program} --help-all` shows all."]
    return "\n".join(lines)


def options_page(*names: str) -> str:
    """A page in Markdown of the options of some dataclasses, each named as "module.Class": a table for each group."""
    listed = ", ".join(map(repr, names))
    lines = ["# Options", "", "Generated from the source by", "", "    .venv/bin/python -c \"from mixdpo.config import "
             f"options_page; print(options_page({listed}), end='')\" > docs/options.md", "",
             "Options in bold are those that `--help` shows; `--help-all` shows all."]
    for module, _, name in (name.rpartition(".") for name in names):
        cls = getattr(importlib.import_module(module), name)
        options = options_of(cls)
        lines += ["", f"## {module}.py", "", inspect.getdoc(cls) or ""]
        for group, members in itertools.groupby(dataclasses.fields(cls), lambda f: options[f.name].group):
            lines += ["", f"### {group}", "", "| option | default | meaning |", "|---|---|---|"]
            for f in members:
                flag = f"**`{as_flag(f.name)}`**" if options[f.name].essential else f"`{as_flag(f.name)}`"
                lines.append(f"| {flag} | {default_of(f)} | {options[f.name].help.replace('|', chr(92) + '|')} |")
    return "\n".join(lines) + "\n"


def convert(text: str, kind: type, flag: str):
    """One word of the command line as the field's type: str, int, float, bool,
    or a comma-separated tuple of one of them."""
    option = flag.removeprefix("--").replace("-", "_")
    if typing.get_origin(kind) is tuple:
        words = text.split(",") if text else []
        if not all(word.strip() for word in words):
            raise InputError(f"got {text!r}, which has an empty place between commas; give values separated by single "
                             "commas", option=option)
        return tuple(convert(word, typing.get_args(kind)[0], flag) for word in words)
    if kind is bool:
        if text.lower() not in ("true", "false", "1", "0", "yes", "no"):
            raise InputError(f"got {text!r}; choose true or false", option=option)
        return text.lower() in ("true", "1", "yes")
    try:
        value = kind(text)
    except ValueError:
        wanted = "a whole number" if kind is int else "a number"            # every text is a str
        raise InputError(f"got {text!r}; give {wanted}", option=option) from None
    if value != value:                                                      # NaN passes every later check like x <= 0
        raise InputError(f"got {text!r}, which is not a number; give a number", option=option)
    return value


def parse(cls, argv: list[str], program: str):
    """An instance of the dataclass `cls` from `--flag value` words.

    Raises: InputError on an unknown flag (with the nearest known one), a missing value, a wrong type,
    a missing required option; SystemExit(0) after printing the help text on -h, --help or --help-all.
    """
    kinds = typing.get_type_hints(cls)
    values, words = {}, list(argv)
    while words:
        word = words.pop(0)
        if word in ("-h", "--help", "--help-all"):
            print(usage(cls, program, complete=word == "--help-all"))
            raise SystemExit(0)
        flag, equals, attached = word.partition("=")
        name = flag.removeprefix("--").replace("-", "_")
        if not flag.startswith("--") or name not in kinds:
            near = difflib.get_close_matches(name, kinds, n=1)
            hint = f"; did you mean {as_flag(near[0])}?" if near else ""
            option, which = (name, "") if flag.startswith("--") else (None, f" {word!r}")
            raise InputError(f"unknown option{which}{hint} (`{program} --help-all` lists all options)", option=option)
        if not equals and not words:
            raise InputError(f"has no value; write {as_flag(name)} VALUE", option=name)
        if name in values:
            raise InputError("is given twice; give it once", option=name)
        values[name] = convert(attached if equals else words.pop(0), kinds[name], flag)
    for f in dataclasses.fields(cls):
        if f.name not in values and f.default is dataclasses.MISSING:
            raise InputError(f"is missing; add {as_flag(f.name)} VALUE: {options_of(cls)[f.name].help} "
                             f"(`{program} --help-all` lists all options)", option=f.name)
    return cls(**values)


SEEDS = "[0, 4294967295]"       # torch's generator on a CPU uses the low 32 bits of its seed: others would repeat these


def in_words(interval: str) -> str:
    """An interval as the end of a sentence: "[0, 0.5)" -> "of at least 0 and below 0.5", "(0, inf)" -> "above 0"."""
    low, high = interval[1:-1].split(", ")
    words = f"of at least {low}" if interval[0] == "[" else f"above {low}"
    return words if high == "inf" else f"{words} and {'at most' if interval[-1] == ']' else 'below'} {high}"


def check_ranges(config, ranges: dict[str, str]) -> None:
    """ranges: option -> interval, "[1, inf)" for 1 or more, "(0, inf)" for a finite number above 0. Each number of a
    tuple is checked. Raises: InputError that carries the option; NaN lies in no interval."""
    for name, interval in ranges.items():
        (low, high), value = map(float, interval[1:-1].split(",")), getattr(config, name)
        for number in value if isinstance(value, tuple) else (value,):
            inside = low <= number <= high
            if not inside or number == low and interval[0] == "(" or number == high and interval[-1] == ")":
                finite = "finite " * (number == math.inf)
                raise InputError(f"got {number}; choose a {finite}number {in_words(interval)}", option=name)
        if value == ():
            raise InputError(f"got no number; give one or more numbers {in_words(interval)}", option=name)


def check_choices(config, choices: typing.Mapping[str, typing.Iterable[str]]) -> None:
    """choices: option -> the words that it takes. Raises: InputError that carries the option."""
    for name, known in choices.items():
        if getattr(config, name) not in known:
            raise InputError(f"got {getattr(config, name)!r}; choose one of {', '.join(filter(None, known))}",
                             option=name)


class Stopped(Exception):
    """The user stopped the program, and everything is saved. The message says how to resume."""


def command(main, *first) -> None:
    """Calls main(*first, the words of the command line). An InputError or an error of the operating system ends the
    program with one line and exit status 1, a stop by the user with status 130."""
    try:
        main(*first, sys.argv[1:])
    except InputError as error:
        sys.exit(f"error: {error}")
    except OSError as error:
        sys.exit(f"error: {system_error(error)}")
    except (KeyboardInterrupt, Stopped) as stopped:
        print(f"\n{str(stopped) or 'stopped'}; run the same command again to resume", file=sys.stderr)
        sys.exit(130)


def system_error(error: OSError) -> str:
    """The message of the operating system, and what to do."""
    remedies: dict[int | None, str] = {
        errno.ENOSPC: "free space on the disk", errno.EDQUOT: "free space in your quota",
        errno.EROFS: "choose a directory that can be written to",
        errno.EACCES: "choose a directory that you may write to",
        errno.ENOENT: "check that path"}
    full = "No space left" in str(error)                                    # safetensors gives no number
    remedy = remedies[errno.ENOSPC] if full else remedies.get(error.errno, "check that file and its disk")
    return f"{error}; {remedy}. Finished work is intact; run the same command again to resume"


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields the path of a temporary file for the caller to write; then that file becomes `path`.

    If the caller or the disk fails, `path` keeps its old content and the temporary file is removed. Raises: OSError.
    """
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        yield part
        sync(part)
        os.replace(part, path)
        sync(path.parent)                                                   # the new name survives a power cut
    finally:
        part.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Waits until a file's bytes, or a folder's file names, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Writes a text file atomically. Raises: OSError."""
    with replacing(path) as part:
        part.write_text(text, encoding="utf-8")


def to_json(value, **options) -> str:
    """The value as JSON that every reader accepts. NaN becomes null, an infinity the string "inf" or "-inf": both are
    valid in Python's own dialect only."""
    def plain(value):
        if isinstance(value, float) and not math.isfinite(value):
            return None if math.isnan(value) else str(value)
        if isinstance(value, dict):
            return {key: plain(part) for key, part in value.items()}
        return [plain(part) for part in value] if isinstance(value, (list, tuple)) else value

    return json.dumps(plain(value), allow_nan=False, **options)


def save(config, path: Path) -> None:
    """Writes the resolved configuration as JSON."""
    write_text(path, to_json(dataclasses.asdict(config), indent=1) + "\n")


def load(cls, path: Path, report=print):
    """Reads a file that `save` of this or another version wrote. An option that the file lacks takes its default, an
    option that no longer exists is ignored, and `report` gets a line about each kind. A bare Infinity, as in older
    files, is accepted. Raises: InputError if an option without a default is missing, or if a value has a wrong type."""
    kinds = typing.get_type_hints(cls)
    defaults = {f.name: f.default for f in dataclasses.fields(cls) if f.default is not dataclasses.MISSING}
    with reading(path):
        values = json.loads(path.read_text(encoding="utf-8"))
        new, old = [n for n in kinds if n not in values], [n for n in values if n not in kinds]
        if lost := [n for n in new if n not in defaults]:
            raise InputError(f"lacks {', '.join(lost)}, so this program did not write it; restore the file", file=path)
        for names, what in ((new, "is older than these options, which take their defaults"),
                            (old, "has options that no longer exist and are ignored")):
            if names:
                report(f"{path} {what}: {', '.join(names)}")
        values = {name: values.get(name, defaults.get(name)) for name in kinds}
        for name, value in values.items():
            kind = typing.get_origin(kinds[name]) or kinds[name]
            if kind is float and value in ("inf", "-inf"):
                values[name] = float(value)
            elif type(value) not in {tuple: (list, tuple), float: (float, int)}.get(kind, (kind,)):
                raise InputError(f"{name} is {value!r:.80}, which is not of type {kind.__name__}; restore the file",
                                 file=path)
        return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})


def compute_dtype(name: str, device: str) -> tuple[torch.dtype, str]:
    """The dtype of a run's products, and the reason. "auto" is bfloat16 if the device has units for it, else
    float32."""
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    if name in known:
        return known[name], "as asked"
    if name != "auto":
        raise InputError(f"got {name!r}, wanted auto, float32 or bfloat16", option="dtype")
    if device == "cuda":
        if torch.cuda.is_bf16_supported():
            return torch.bfloat16, "the GPU has bfloat16 units"
        return torch.float32, "the GPU has no bfloat16"
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    units = [unit for unit in ("amx_bf16", "avx512_bf16") if unit in flags]
    if units:
        return torch.bfloat16, f"the processor has {units[0]}"
    return torch.float32, "the processor has no bfloat16 units"
