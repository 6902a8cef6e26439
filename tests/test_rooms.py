"""The rooms of the house: who may import whom."""

import ast
import subprocess

from tests.loops import ROOT

LEVELS = {"errors": 0, "files": 0, "losses": 0, "model": 1, "dataset": 2, "training": 3}
LEVELS |= {"train_sft": 4, "train_dpo": 4, "train_reward": 4, "eval": 5, "bench": 5, "tests": 6}


def python_files() -> list[str]:
    """The project's Python files, relative to its folder."""
    listed = subprocess.run(["git", "ls-files", "*.py"], cwd=ROOT, capture_output=True, text=True, check=True)
    return listed.stdout.split()


def imports(source: str) -> set[str]:
    """The first names of all modules that a file imports, at its top or inside a function."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.split(".")[0])
    return found


def test_no_package_imports_one_above_it():
    """A room that imports upwards cannot be read, tested or reused without the rooms above it."""
    files = python_files()
    assert {name.split("/")[0].removesuffix(".py") for name in files} == set(LEVELS)
    for name in files:
        room = name.split("/")[0].removesuffix(".py")
        ours = imports((ROOT / name).read_text("utf-8")) & set(LEVELS)
        higher = [other for other in ours if LEVELS[other] > LEVELS[room]]
        assert not higher, f"{name} imports {higher}"


def test_losses_import_nothing_of_the_project():
    """The lesson can be read, and copied, without the rest."""
    assert not imports((ROOT / "losses.py").read_text("utf-8")) & set(LEVELS)
