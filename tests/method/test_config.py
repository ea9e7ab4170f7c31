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
    return {bool: str(not default).lower(), int: "17", float: "0.375", str: "some words"}[f.type]


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
    (["--path", "x", "--cuont-all", "1"], "cuont_all", ["--count-all", "prog --help"]),
    (["--path", "x", "stray"], None, ["'stray'"]),
    (["--path", "x", "-rate", "1"], None, ["'-rate'"]),
    (["--path", "x", "--count-all", "1.5"], "count_all", ["'1.5'", "int"]),
    (["--path", "x", "--rate", "fast"], "rate", ["'fast'", "float"]),
    (["--path", "x", "--loud", "maybe"], "loud", ["'maybe'", "true", "false"]),
    (["--path", "x", "--shares", "1,b"], "shares", ["'b'"]),
    (["--path", "x", "--rate"], "rate", []),
    (["--path", "x", "--rate", "1", "--rate=1"], "rate", []),
    (["--rate", "1"], "path", ["where"]),
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


def test_every_option_is_explained_in_the_help(capsys):
    """Fault: the comment is not found behind a field, so the help says nothing."""
    for cls in (TrainConfig, FinetuneConfig, EvalConfig):
        comments = configs.field_comments(cls)
        assert [f.name for f in dataclasses.fields(cls) if not comments.get(f.name)] == []
        with pytest.raises(SystemExit) as ended:
            parse("--help", cls=cls)
        said = capsys.readouterr().out
        assert ended.value.code == 0
        for f in dataclasses.fields(cls):
            assert f"--{f.name.replace('_', '-')}" in said and comments[f.name] in said, f.name


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
            found[field].append(token.string.strip("# "))
    raise AssertionError(f"{name} has no end")


def test_no_help_text_is_cut():
    """Every option of every script, its comment in the source by another reader. Catches: the lines of a comment after
    the first left out; a comment of the next field or of a section taken for one of its lines."""
    classes, long = config_classes(), 0
    assert len(classes) >= 10 and {"TrainConfig", "EvalConfig", "FinetuneConfig"} <= {name for _, name in classes}
    for file, name in classes:
        module = ".".join(file.relative_to(Path(__file__).parents[2]).with_suffix("").parts)
        cls = getattr(importlib.import_module(module), name)
        comments = configs.field_comments(cls)
        for field, lines in comments_by_token(file, name).items():
            assert comments.get(field, "") == " ".join(lines), f"{name}.{field}"
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
