"""config.py: a dataclass as a command line, and everything that is refused.
Docstrings name the faults that each test was seen to fail on."""

import ast
import dataclasses
import importlib
import io
import json
import math
import re
import tokenize
import types
from pathlib import Path

import pytest
from raising import raises_at

from data.experiment.finetune import FinetuneConfig
from eval import EvalConfig
from mixdpo import config as configs
from train import TrainConfig


@dataclasses.dataclass(frozen=True)
class Example:
    """An example."""

    path: str                       # where
    shares: tuple[float, ...] = (1.0,)  # of what
    count_all: int = 3              # how many
    rate: float = 0.5               # how fast
    loud: bool = False              # whether


def parse(*words, cls=Example):
    return configs.parse(cls, list(words), "prog")


def other(f):
    """A value of a field that is not its default, as a word."""
    default = None if f.default is dataclasses.MISSING else f.default
    return {bool: str(not default).lower(), int: "17", float: "0.375", str: "some words",
            tuple[float, ...]: "0.25,0.5"}[f.type]


@pytest.mark.parametrize("cls", [TrainConfig, FinetuneConfig, EvalConfig])
@pytest.mark.parametrize("joined", [False, True], ids=["--flag value", "--flag=value"])
def test_every_option_of_every_script_is_read_as_its_type(cls, joined):
    """Faults: dashes not turned to underscores; bool("false") is true; the text kept instead of the number."""
    want = {f.name: other(f) for f in dataclasses.fields(cls)}
    flags = {name: f"--{name.replace('_', '-')}" for name in want}
    joint = [f"{flags[n]}={v}" for n, v in want.items()]
    words = joint if joined else [w for n, v in want.items() for w in (flags[n], v)]
    config = parse(*words, cls=cls)
    for f in dataclasses.fields(cls):
        value = getattr(config, f.name)
        if f.type == tuple[float, ...]:
            assert value == (0.25, 0.5), f"{f.name} is {value!r}"
            continue
        assert type(value) is f.type, f"{f.name} is {value!r}, want {f.type.__name__}"
        assert (str(value).lower() if f.type is bool else str(value)) == want[f.name]


def test_tuples_bools_and_defaults():
    """Faults: a tuple's members left as text; yes and 1 read as false."""
    assert parse("--path", "x") == Example("x")
    config = parse("--path", "x", "--shares", "0.25,0.75", "--loud", "yes", "--rate", "-1e-3")
    assert config == Example("x", (0.25, 0.75), 3, -1e-3, True)
    assert parse("--path", "x", "--loud", "1").loud and not parse("--path", "x", "--loud", "no").loud


def test_an_empty_value_behind_an_equals_sign_is_a_value():
    """Fault: `--path= --rate 1` takes "--rate" as the path."""
    assert parse("--path=", "--rate", "1") == Example("", rate=1.0)


@pytest.mark.parametrize("words,option,named", [
    (["--path", "x", "--cuont-all", "1"], "cuont_all", ["--count-all", "prog --help-all"]),
    (["--path", "x", "stray"], None, ["'stray'"]),
    (["--path", "x", "-rate", "1"], None, ["'-rate'"]),
    (["--path", "x", "--count-all", "1.5"], "count_all", ["'1.5'", "whole number"]),
    (["--path", "x", "--rate", "fast"], "rate", ["'fast'", "a number"]),
    (["--path", "x", "--loud", "maybe"], "loud", ["'maybe'", "true", "false"]),
    (["--path", "x", "--shares", "1,b"], "shares", ["'b'"]),
    (["--path", "x", "--rate"], "rate", ["--rate VALUE"]),
    (["--path", "x", "--rate", "1", "--rate=1"], "rate", []),
    (["--rate", "1"], "path", ["where", "prog --help-all"]),
    (["--path", "x", "--rate", "nan"], "rate", ["'nan'"]),
    (["--path", "x", "--shares", "0.3,,0.7"], "shares", ["'0.3,,0.7'"]),
    (["--path", "x", "--shares", "0.3,"], "shares", ["'0.3,'"]),
    (["--path", "x", "--shares", ","], "shares", ["','"]),
])
def test_refused(words, option, named):
    """Faults: an unknown option skipped; no near match offered; a single dash taken; the last of two values wins;
    a required option left None; nan taken; an empty word between commas skipped."""
    with raises_at(*named, option=option):
        parse(*words)


@pytest.mark.parametrize("interval,value,named", [
    ("[1, inf)", 0, "of at least 1"), ("[1, inf)", math.inf, "finite number of at least 1"),
    ("(0, inf]", 0.0, "above 0"), ("[0, 0.5)", 0.5, "of at least 0 and below 0.5"),
    ("(0, 1]", 1.5, "above 0 and at most 1"), ("[0, 1]", math.nan, "nan"),
    ("[1, inf)", (2, 0), "got 0"), ("[1, inf)", (), "got no number"),
])
def test_numbers_out_of_their_interval(interval, value, named):
    """Catches: a bracket that is read as the other kind, in the check or in its message; NaN; a tuple's first number
    checked alone, or an empty tuple accepted."""
    with raises_at(named, option="rate"):
        configs.check_ranges(types.SimpleNamespace(rate=value), {"rate": interval})
    for inside in (1, 1.0, (1, 1)):
        configs.check_ranges(types.SimpleNamespace(rate=inside), {"rate": "[1, 1]"})


def test_an_error_says_where_by_its_fields():
    """Catches: an InputError whose message begins with an option or a file, which only a reader of prose would find."""
    root, seen = Path(configs.__file__).parents[1], 0
    for path in [*root.glob("mixdpo/**/*.py"), *root.glob("data/**/*.py"), root / "train.py", root / "eval.py"]:
        for call in ast.walk(ast.parse(path.read_text())):
            if isinstance(call, ast.Call) and getattr(call.func, "id", "") == "InputError":
                text = ast.unparse(call.args[0]).removeprefix("f")[1:]
                assert not re.match(r"--|\{[^{}]*\}: ", text), f"{path}:{call.lineno}: {text}"
                seen += 1
    assert seen > 150, seen


@pytest.mark.parametrize("cls", [TrainConfig, FinetuneConfig, EvalConfig])
def test_every_option_is_explained_in_the_help(cls, capsys):
    """Faults: the comment is not found behind a field, so the help says nothing; an option without its default."""
    options = configs.options_of(cls)
    assert [f.name for f in dataclasses.fields(cls)] == list(options)
    with pytest.raises(SystemExit) as ended:
        parse("--help-all", cls=cls)
    lines = capsys.readouterr().out.splitlines()
    assert ended.value.code == 0
    for f in dataclasses.fields(cls):
        help, line = options[f.name].help, [x for x in lines if x.split()[:1] == [f"--{f.name.replace('_', '-')}"]]
        assert help and len(line) == 1 and help in line[0] and line[0].endswith("]"), f.name
        if f.default is dataclasses.MISSING:
            assert line[0].endswith("[required]")
        elif f.default not in ("", ()):
            word = line[0].rpartition("[")[2].removesuffix("]")
            assert configs.convert(word, f.type, f.name) == f.default, f.name


@dataclasses.dataclass(frozen=True)
class Base:
    """The class that is inherited from."""

    width: int = 3                  # columns

    # --- speed and memory
    rows: int = 9                   # * rows of a block,
                                    # at most
    fast: bool = False              # true: a | b


@dataclasses.dataclass(frozen=True)
class Grouped(Base):
    """A class with groups."""

    # --- names
    name: str = ""                  # * what it is called


def test_groups_and_the_essential_options(capsys):
    """Catches: a group line that is read as a part of the comment above it; groups of the base class lost, or taken
    over by the fields of the other class; a star in the text; --help without a hint at the other options, or empty
    where no option has a star."""
    option = configs.Option
    assert configs.options_of(Grouped) == {
        "width": option("columns", False, "options"),
        "rows": option("rows of a block, at most", True, "speed and memory"),
        "fast": option("true: a | b", False, "speed and memory"), "name": option("what it is called", True, "names")}
    assert parse("--rows", "4", cls=Grouped) == Grouped(rows=4)
    shown = {}
    for word in ("--help", "--help-all", "-h"):
        with pytest.raises(SystemExit):
            parse(word, cls=Grouped)
        shown[word] = capsys.readouterr().out
    assert shown["-h"] == shown["--help"]
    assert shown["--help"].splitlines()[4:] == [
        "speed and memory:", "  --rows  rows of a block, at most  [9]", "",
        "names:", "  --name  what it is called  [empty]", "", "These are 2 of 4 options; `prog --help-all` shows all."]
    assert shown["--help-all"].splitlines()[4:] == [
        "options:", "  --width  columns  [3]", "", "speed and memory:", "  --rows   rows of a block, at most  [9]",
        "  --fast   true: a | b  [false]", "", "names:", "  --name   what it is called  [empty]"]
    for word in ("--help", "--help-all"):                                   # no star, no group
        with pytest.raises(SystemExit):
            parse(word, cls=Example)
        shown[word] = capsys.readouterr().out
    assert shown["--help"] == shown["--help-all"] and "options:" in shown["--help"] and "[1.0]" in shown["--help"]


def test_the_help_of_training_is_short():
    """Catches: an essential option that is lost among fifty; a line that no terminal shows; a group of one option."""
    options = configs.options_of(TrainConfig)
    essential = [name for name, option in options.items() if option.essential]
    assert {"data", "model", "out", "experts", "latent", "epochs", "batch", "lr"} <= set(essential)
    assert 10 <= len(essential) <= 18 < len(options)
    groups = [option.group for option in options.values()]
    assert "options" not in groups and len(set(groups)) == sum(a != b for a, b in zip(groups, [None, *groups]))
    assert all(groups.count(group) > 1 for group in groups)
    assert max(len(option.help) for option in options.values()) <= 200


def test_the_page_of_options_is_up_to_date():
    """Catches: an option that was added, removed or explained anew, and docs/options.md as before."""
    page = Path(__file__).parents[2] / "docs" / "options.md"
    wanted = configs.options_page("train.TrainConfig", "eval.EvalConfig")
    command = next(line.strip() for line in wanted.splitlines() if line.startswith("    "))
    assert page.read_text() == wanted, f"docs/options.md is out of date; write it again: {command}"
    assert "| `--fast` | false | true: a \\| b |" in configs.options_page(f"{__name__}.Grouped")


def config_classes():
    """Every dataclass that a command line is made from, but for those of tests/chaos, which needs packages of its own:
    (file, class name)."""
    root = Path(__file__).parents[2]
    files = [root / "train.py", root / "eval.py",
             *(path for part in ("mixdpo", "data", "tests/bench") for path in sorted(root.glob(f"{part}/**/*.py")))]
    return [(file, name) for file in files
            for name in re.findall(r"@dataclass\(frozen=True\)\nclass (\w*Config)\b", file.read_text())]


def comments_by_token(file, name):
    """Each field's comment by Python's own tokenizer: all comments from its line up to the next field's."""
    tokens = list(tokenize.generate_tokens(io.StringIO(file.read_text()).readline))
    begin = next(n for n, t in enumerate(tokens) if t.string == "class" and tokens[n + 1].string == name)
    depth, field, found = 0, None, {}
    for token, after in zip(tokens[begin:], tokens[begin + 1 :]):
        depth += (token.type == tokenize.INDENT) - (token.type == tokenize.DEDENT)
        if found and depth < 1 or token.string in ("def", "@"):
            return found
        if token.type == tokenize.NAME and token.start[1] == 4 and after.string == ":":
            field = token.string
            found[field] = []
        if token.type == tokenize.COMMENT and field and token.start[1] > 4:
            found[field].append(token.string.strip("# ").removeprefix("* "))
    raise AssertionError(f"{name} has no end")


def test_no_help_text_is_cut():
    """Every option of every script, its comment in the source by another reader. Catches: the lines of a comment after
    the first left out; a comment of the next field or of a section taken for one of its lines."""
    classes, long = config_classes(), 0
    assert len(classes) >= 10 and {"TrainConfig", "EvalConfig", "FinetuneConfig"} <= {name for _, name in classes}
    for file, name in classes:
        module = ".".join(file.relative_to(Path(__file__).parents[2]).with_suffix("").parts)
        cls = getattr(importlib.import_module(module), name)
        options = configs.options_of(cls)
        for field, lines in comments_by_token(file, name).items():
            assert options[field].help == " ".join(lines), f"{name}.{field}"
            assert " ".join(lines) in configs.usage(cls, "prog")
            long += len(lines) > 1
    assert long >= 5


@pytest.mark.parametrize("value", [math.inf, -math.inf, 0.25])
def test_infinities_are_json_and_come_back(value, tmp_path):
    """Catches: a bare Infinity, which is not JSON; "inf" that comes back as a word; files of before, which hold bare
    ones, refused."""
    config, path = Example("inf", rate=value), tmp_path / "config.json"
    configs.save(config, path)
    json.loads(path.read_text(), parse_constant=lambda word: pytest.fail(f"a bare {word}"))
    assert configs.load(Example, path) == config
    path.write_text(json.dumps(dataclasses.asdict(config)))
    assert configs.load(Example, path) == config


def test_saved_configurations_come_back_by_other_versions_too(tmp_path, capsys):
    """Faults: a tuple comes back as a list; an option of another version taken over or ignored without a word; one that
    has no default made up; infinities that are not JSON."""
    config, path = Example("x", (0.5, 0.5), loud=True), tmp_path / "config.json"
    configs.save(config, path)
    assert configs.load(Example, path) == config
    assert not capsys.readouterr().out
    saved = path.read_text()
    path.write_text(saved.replace('"rate"', '"speed"'))
    assert configs.load(Example, path) == dataclasses.replace(config, rate=Example.rate)
    newer, older = capsys.readouterr().out.splitlines()
    assert str(path) in newer and "rate" in newer and str(path) in older and "speed" in older
    for broken in (saved.replace('"path"', '"title"'), saved.replace('"x"', "3")):
        path.write_text(broken)
        with raises_at(file=path):
            configs.load(Example, path)
    configs.save(dataclasses.replace(config, rate=-math.inf), path)
    assert '"-inf"' in path.read_text() and configs.load(Example, path).rate == -math.inf
