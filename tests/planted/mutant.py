"""A planted bug, the search for its place in a module's syntax tree, and the import hook that plants it.

Fragments are compared as syntax trees: comments, docstrings, line breaks and quotes do not matter. `...` in
`old` matches any expression, any body, or any run of arguments; `**...` matches any run of keyword arguments.
Each `...` of `new` is replaced by what the `...` of the same number in `old` matched.
"""

import ast
import copy
import dataclasses
import importlib.abc
import importlib.machinery
import importlib.util
import json
import os
import re
import sys
import textwrap
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
STARTUP = ROOT / "tests" / "planted" / "startup"
SKIPPED = ("ctx", "kind", "type_comment")  # Fields that do not matter in a comparison.


@dataclasses.dataclass(frozen=True)
class Mutant:
    """One bug: in `function` of `module` the only `old` becomes `new`, and `test` must fail.

    `function` is a qualified name, such as `TokenStream.sum_by_side`, a class, or "" for the whole module.
    `test` is a node of pytest; without parameters in [], one of the function's tests must fail.
    """

    name: str
    why: str
    module: str
    function: str
    old: str
    new: str
    test: str

    @property
    def path(self) -> Path:
        """The module's file: model.stream -> model/stream.py; a package's is its __init__.py."""
        base = ROOT.joinpath(*self.module.split("."))
        return base / "__init__.py" if base.is_dir() else base.with_suffix(".py")


def catalogue(text: str) -> list[Mutant]:
    """The bugs of a text, which are separated by blank lines; lines that start with # are comments. A bug:

        name in module: function
        Why it is a bug.
        - the lines of `old`
        + the lines of `new`, if there are any
        test_file.py::test
    """
    mutants = []
    for entry in text.strip().split("\n\n"):
        lines = [line for line in entry.splitlines() if not line.startswith("#")]
        if lines:
            (head, why, *code), test = lines[:-1], lines[-1]
            name, module, function = re.fullmatch(r"(\S+) in (\S+):(?: (\S+))?", head).groups()
            old, new = ("\n".join(line[2:] for line in code if line[0] == sign) for sign in "-+")
            mutants.append(Mutant(name, why, module, function or "", old, new, f"tests/{test}"))
    return mutants


# ---- Fragments


def parse(fragment: str) -> list[ast.stmt]:
    return ast.parse(textwrap.dedent(fragment)).body


def is_dots(node) -> bool:
    """Whether a node is `...`, alone or as a statement, or `**...` among keyword arguments."""
    if isinstance(node, (ast.Expr, ast.keyword)) and getattr(node, "arg", None) is None:
        node = node.value
    return isinstance(node, ast.Constant) and node.value is ...


def match(old, node) -> list | None:
    """What each `...` of the fragment `old` stands for in `node`, in order; None if `node` is different."""
    if isinstance(old, list):
        return match_lists(old, node) if isinstance(node, list) else None
    if isinstance(old, ast.expr) and is_dots(old):
        return [node] if isinstance(node, ast.expr) else None
    if type(old) is not type(node):
        return None
    if not isinstance(old, ast.AST):
        return [] if old == node else None
    found = []
    for field in old._fields:
        if field not in SKIPPED:
            more = match(getattr(old, field, None), getattr(node, field, None))
            if more is None:
                return None
            found += more
    return found


def match_lists(old: list, nodes: list) -> list | None:
    """Like `match`, where each `...` of `old` stands for any number of nodes, the fewest that fit."""
    if not old:
        return None if nodes else []
    if not is_dots(old[0]):
        first = match(old[0], nodes[0]) if nodes else None
        rest = None if first is None else match_lists(old[1:], nodes[1:])
        return None if rest is None else first + rest
    for end in range(len(nodes) + 1):
        rest = match_lists(old[1:], nodes[end:])
        if rest is not None:
            return [nodes[:end], *rest]
    return None


class Fill(ast.NodeTransformer):
    """Puts what `match` found in place of each `...`; further ones stay what Python takes them for."""

    def __init__(self, found: list):
        self.found = list(found)

    def visit(self, node):
        if self.found and is_dots(node):
            return copy.deepcopy(self.found.pop(0))
        return self.generic_visit(node)


# ---- Places


def definitions(node: ast.AST):
    """The functions and classes that a module, class or function defines itself."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            yield child
        else:
            yield from definitions(child)


def function_of(tree: ast.Module, mutant: Mutant) -> ast.AST:
    """The node of the mutant's function or class, or the whole module."""
    node = tree
    for name in filter(None, mutant.function.split(".")):
        found = [child for child in definitions(node) if child.name == name]
        if len(found) != 1:
            times = f"expected {mutant.function} once, found it {len(found)} times"
            raise ValueError(f"{mutant.name}: {mutant.path.relative_to(ROOT)}: {times}")
        node = found[0]
    return node


def places(root: ast.AST, old: list[ast.stmt], as_expression: bool):
    """Each place of `old` below `root`: (node, field, first, end, matches of `...`).

    `first` and `end` are indices into the field's list, or None if the field is not a list.
    """
    for node in ast.walk(root):
        for field, value in ast.iter_fields(node):
            if as_expression:
                for place, each in enumerate(value) if isinstance(value, list) else [(None, value)]:
                    found = match(old[0].value, each) if isinstance(each, ast.expr) else None
                    if found is not None:
                        yield node, field, place, place, found
            elif isinstance(value, list):
                for first in range(len(value) - len(old) + 1):
                    found = match(old, value[first : first + len(old)])
                    if found is not None:
                        yield node, field, first, first + len(old), found


def plant(source: str, mutant: Mutant) -> ast.Module:
    """The syntax tree of a module's source with the mutant in it; ValueError unless `old` occurs once."""
    tree, old, new = ast.parse(source), parse(mutant.old), parse(mutant.new)
    as_expression = all(len(side) == 1 and isinstance(side[0], ast.Expr) for side in (old, new))
    found = list(places(function_of(tree, mutant), old, as_expression))
    if len(found) != 1:
        where = f"{mutant.path.relative_to(ROOT)}, {mutant.function or 'the whole module'}"
        times = f"expected this code once, found it {len(found)} times"
        raise ValueError(f"{mutant.name}: {where}: {times}:\n{mutant.old}")
    node, field, first, end, dots = found[0]
    filled = Fill(dots).visit(ast.Module(new, [])).body
    value = getattr(node, field)
    if not as_expression:
        value[first:end] = filled
        value or value.append(ast.Pass())
    elif first is None:
        setattr(node, field, filled[0].value)
    else:
        value[first] = filled[0].value
    return ast.fix_missing_locations(tree)


# ---- The hook


class Loader(importlib.machinery.SourceFileLoader):
    """Loads a module with mutants in it; compiled files are neither read nor written."""

    def __init__(self, name: str, path: str, mutants: list[Mutant]):
        super().__init__(name, path)
        self.mutants = mutants

    def get_code(self, fullname: str):
        source = self.get_data(self.path).decode("utf-8")
        for mutant in self.mutants:
            source = ast.unparse(plant(source, mutant))
        return compile(source, self.path, "exec", dont_inherit=True)


class Finder(importlib.abc.MetaPathFinder):
    """Finds only the mutant's module, with the mutants of all finders: `force_bf16` may be one of them."""

    def __init__(self, mutant: Mutant):
        self.mutant = mutant

    def find_spec(self, fullname: str, path=None, target=None):
        if fullname != self.mutant.module:
            return None
        file, finders = str(self.mutant.path), [each for each in sys.meta_path if isinstance(each, Finder)]
        # Each once: a process may be told of the same one at its start and by conftest.
        mutants = dict.fromkeys(each.mutant for each in finders if each.mutant.module == fullname)
        loader = Loader(fullname, file, list(mutants))
        return importlib.util.spec_from_file_location(fullname, file, loader=loader)


def plant_on_import(mutant: Mutant) -> None:
    """Plant the mutant when its module is imported, here and in the processes that this one starts.

    Those find it in their environment: Python imports startup/sitecustomize.py at its start.
    """
    assert mutant.module not in sys.modules, f"{mutant.module} is imported already"
    plant(mutant.path.read_text(encoding="utf-8"), mutant)  # Raises where there is no place for it.
    sys.meta_path.insert(0, Finder(mutant))
    os.environ["MINIDPO_MUTANT"] = json.dumps(dataclasses.asdict(mutant))
    os.environ["PYTHONPATH"] = os.pathsep.join([str(STARTUP), str(ROOT)])


def force_bf16(value: str) -> None:
    """Let `cpu_multiplies_bf16` return `value == "1"`, here and in the processes that this one starts."""
    name = "training.precision", "cpu_multiplies_bf16"
    sys.meta_path.insert(0, Finder(Mutant("bf16", "", *name, "any(...)", str(value == "1"), "")))
    os.environ["PYTHONPATH"] = os.pathsep.join([str(STARTUP), str(ROOT)])
