"""Imports run one way, from the scripts down to the model; and importing a file runs nothing."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from tests.loops import ROOT

# A room may import from itself and from those after it; losses, from no room at all.
ORDER = ["bench", "eval", "train", "training", "losses", "dataset", "model", "files", "errors"]


def python_files() -> list[str]:
    """Our Python files, tests included, as paths from the project's folder."""
    folders = [ROOT / name for name in (*ORDER, "tests")]
    found = [*ROOT.glob("*.py"), *(path for folder in folders for path in folder.rglob("*.py"))]
    return sorted(str(path.relative_to(ROOT)) for path in found)


FILES = [Path(name) for name in python_files() if not name.startswith("tests/")]


def room_of(module: str) -> str | None:
    """The room of a module, such as "train" of train_dpo; None if the module is not ours."""
    first = module.split(".")[0]
    first = "train" if first.startswith("train_") else first
    return first if first in ORDER else None


def imported(source: str) -> set[str]:
    """The modules that a file imports, anywhere in it, relative imports included as "."."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add("." if node.level else node.module)
    return found


def module_of(path) -> str:
    return ".".join(path.with_suffix("").parts).removesuffix(".__init__")


def test_every_file_has_a_room():
    """A file outside the order could import anything."""
    assert len(FILES) > 50
    assert not [str(path) for path in FILES if not room_of(module_of(path))]


@pytest.mark.parametrize("path", FILES, ids=str)
def test_no_file_imports_a_room_above_it(path):
    """A model that imports training, or training that imports eval, can be read and reused by nobody."""
    room = room_of(module_of(path))
    modules = imported((ROOT / path).read_text(encoding="utf-8"))
    assert "." not in modules, "write the full name of the module"
    rooms = {found for module in modules if (found := room_of(module))}
    allowed = set(ORDER[ORDER.index(room) :]) if room != "losses" else set()
    assert rooms <= allowed, f"{path} imports {sorted(rooms - allowed)}"


def test_importing_any_file_runs_nothing():
    """A script that parses flags or joins ranks on import cannot be tested or reused."""
    names = [name for path in FILES if (name := module_of(path)) != "bench.peers"]  # It needs TRL.
    code = "import importlib, sys; sys.argv = ['x', '--nonsense']; names = sys.stdin.read().split()\n"
    code += "for name in names: importlib.import_module(name)\nprint('quiet')"
    command = [sys.executable, "-c", code]
    result = subprocess.run(
        command, cwd=ROOT, input=" ".join(names), capture_output=True, text=True, timeout=120
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, "quiet\n", "")
