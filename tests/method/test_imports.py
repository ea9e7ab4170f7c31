"""Who imports whom: a file takes from its own room and from rooms below it, and the core from four packages alone.

Catches: a circle; an arrow that points up; a feature that the method comes to know of; a fifth package in the core."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FLOORS = ("config", "files", "dpo", "mixture fast", "linear logprob", "models", "text", "preferences",
          "experts plan packing", "backward texts", "gates private", "start variants metrics", "runs",
          "evaluation tabular", "serving", "train", "data", "eval serve")
FLOOR = {room: height for height, rooms in enumerate(FLOORS) for room in rooms.split()}
PACKAGES = {"torch", "tiktoken", "numpy", "safetensors", *sys.stdlib_module_names}
OPTIONAL = {"mixdpo/fast/kernels.py": {"triton"}, "mixdpo/text/chat.py": {"jinja2"},      # used where they are there
            "mixdpo/text/containers.py": {"pyarrow"}, "mixdpo/files/sources.py": {"huggingface_hub"},
            "mixdpo/files/unpack.py": {"zstandard", "compression"}, "mixdpo/runs/loggers.py": {"wandb", "trackio"}}
SERVER = {"mixdpo/serving/app.py": {"starlette"}, "mixdpo/serving/responses.py": {"starlette"},
          "mixdpo/serving/connection.py": {"uvicorn", "h11"}}               # the extra `serve`
FILES = [path.relative_to(ROOT) for part in ("train.py", "eval.py", "mixdpo", "data")
         for path in ([ROOT / part] if part.endswith(".py") else sorted((ROOT / part).rglob("*.py")))]


def room_of(parts: tuple[str, ...]) -> str | None:
    """The room of a module, given as the parts of its name; None: another package."""
    if parts[:2] == ("mixdpo", "fast") and parts[2:3] in (("backward",), ("texts",), ("packing",)):     # they know
        return parts[2]                                         # batches and experts: they are on floors of their own
    if parts[:3] == ("mixdpo", "serving", "__main__"):                      # a command, as eval.py is: it asks data for
        return "serve"                                                      # its rewards
    if parts[0] == "mixdpo":
        return parts[1] if len(parts) > 1 else "mixdpo"
    return parts[0] if parts[0] in ("train", "eval", "data") else None


def imports(path: Path) -> list[tuple[tuple[str, ...], int]]:
    """The modules that a file names, as parts, with their lines; those within functions too."""
    found = []
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        if isinstance(node, ast.Import):
            found += [(tuple(alias.name.split(".")), node.lineno) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            whole = node.module in ("mixdpo", "data")                       # from mixdpo import dpo
            found += [((*node.module.split("."), *([alias.name] if whole else [])), node.lineno)
                      for alias in node.names]
    return found


@pytest.mark.parametrize("path", FILES, ids=str)
def test_a_file_imports_from_below(path):
    own = room_of(path.with_suffix("").parts)
    for parts, line in imports(path):
        room = room_of(parts)
        if own == "__init__" or room in (None, own):                        # mixdpo/__init__.py exports all
            continue
        if (own, room) == ("data", "eval"):                                 # a job ends with its evaluation, and
            continue                                                        # eval.py asks data for its report
        assert FLOOR[room] < FLOOR[own], f"{path}:{line} imports {'.'.join(parts)} from above"


@pytest.mark.parametrize("path", [path for path in FILES if path.parts[0] != "data"], ids=str)
def test_the_core_wants_four_packages(path):
    for parts, line in imports(path):
        known = PACKAGES | OPTIONAL.get(str(path), set()) | SERVER.get(str(path), set())
        assert room_of(parts) or parts[0] in known, f"{path}:{line} imports {parts[0]}"


@pytest.mark.parametrize("path", [path for path in OPTIONAL if "kernels" not in path])
def test_optional_packages_are_imported_where_they_are_used(path):
    """Catches: a package that whoever imports mixdpo must have, though only one container or template needs it."""
    top = ast.parse((ROOT / path).read_text()).body
    found = {alias.name for node in top if isinstance(node, ast.Import) for alias in node.names}
    found |= {node.module for node in top if isinstance(node, ast.ImportFrom) and node.module}
    assert not {name.split(".")[0] for name in found} & OPTIONAL[path]


def test_only_the_server_needs_its_packages():
    """The files that import them, those that import these, and nothing else. Catches: an engine, an export or an
    evaluation that cannot be used without the extra `serve`."""
    named = {path.with_suffix("").parts: {parts for parts, _ in imports(path)} for path in FILES}
    need, before = {Path(path).with_suffix("").parts for path in SERVER}, set()
    while need != before:
        before = need
        need = need | {name for name, found in named.items() if any({parts[:3], parts[:4]} & need for parts in found)}
    assert need == {("mixdpo", "serving", name) for name in ("app", "responses", "connection", "__main__")}


def test_no_module_imports_itself_by_way_of_others():
    """Within a room too, where the floors say nothing."""
    names = {path.with_suffix("").parts: path for path in FILES}
    arrows = {path: {names[parts[:n]] for parts, _ in imports(path) for n in range(1, len(parts) + 1)
                     if parts[:n] in names} - {path} for path in FILES if path.parts[0] == "mixdpo"}
    done, trail = set(), []

    def visit(path):
        assert path not in trail, " -> ".join(map(str, [*trail[trail.index(path):], path]))
        if path not in done:
            trail.append(path)
            for other in arrows.get(path, ()):
                visit(other)
            done.add(trail.pop())

    for path in arrows:
        visit(path)
