"""Every bug of the catalogue (tests/planted) turns its test red: the tests of this project work."""

import ast
import json
import subprocess
import sys
from collections import Counter

import pytest

from tests.mutants import CHECKS, MUTANTS, ROOT
from tests.planted.mutant import Mutant, plant


@pytest.fixture(scope="module")
def verdict(request, tmp_path_factory):
    """A function from a mutant's name to the verdict on it; one process forks for each mutant, in order.

    That process, unlike this one, has not imported the project's modules. It plants the mutants that this run
    of pytest has collected. It runs a test without a mutant only if this run of pytest does not.
    """
    collected = tmp_path_factory.mktemp("mutants") / "collected"
    collected.write_text("\n".join(item.nodeid for item in request.session.items))
    asked = {item.name for item in request.session.items}
    names = [mutant.name for mutant in MUTANTS if f"test_mutant_is_killed[{mutant.name}]" in asked]
    names = [*(check.name for check in CHECKS), *names]
    command = [sys.executable, "-m", "tests.mutants", *names, "--json", "--jobs", "1"]
    command += ["--run-elsewhere", str(collected)]
    log, found = collected.with_name("log"), {}
    with log.open("w") as errors, subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=errors, text=True
    ) as process:

        def find(name: str) -> dict:
            while name not in found:
                line = process.stdout.readline()
                assert line, f"the mutants' process has ended: {log.read_text()}"
                verdict = json.loads(line)
                found[verdict["name"]] = verdict
            return found[name]

        yield find
        process.terminate()


def test_the_named_tests_are_green_without_a_mutant(verdict):
    """A test that is always red kills every mutant."""
    found = verdict("")
    assert found["kind"] == "green", found["why"]


def test_the_runner_recognises_survivors_and_wrecks(verdict):
    """Were every change called killed, or every crash, the catalogue would prove nothing."""
    assert [verdict(check.name)["kind"] for check in CHECKS] == ["survived", "broken"]


@pytest.mark.parametrize("name", [mutant.name for mutant in MUTANTS])
def test_mutant_is_killed(name, verdict):
    """A survivor is a bug that no test sees; look the mutant up in tests/planted for what it does."""
    found = verdict(name)
    assert found["kind"] == "killed", found["why"]


def test_the_catalogue_names_each_mutant_once():
    """Two entries of one name would hide one of them."""
    assert not [name for name, times in Counter(m.name for m in MUTANTS + CHECKS).items() if times > 1]
    assert all(mutant.why.endswith(".") for mutant in MUTANTS)


def test_every_mutant_has_its_place():
    """A change of the code that takes a mutant's place away is reported in a second, with the place."""
    lost = []
    for mutant in MUTANTS:
        try:
            plant(mutant.path.read_text(encoding="utf-8"), mutant)
        except (OSError, ValueError) as error:
            lost.append(str(error))
    assert not lost, "\n".join(lost)


SOURCE = '''
class Sum:
    def of(self, a, b=2, **options):
        """Words that change."""
        # and comments
        total = add(
            a, b, scale="one",
            strict=True,
        )
        if total > 1:
            print("more")
        return total

def of(a):
    return a
'''


@pytest.mark.parametrize(
    ("function", "old", "new", "planted"),
    [
        ("Sum.of", "add(a, b, scale='one', strict=True)", "a + b", "total = a + b"),
        ("Sum.of", "add(..., strict=True, **...)", "add()", None),
        ("Sum.of", "add(..., **..., strict=True)", "sub(..., **...)", "total = sub(a, b, scale='one')"),
        ("Sum.of", "if total > 1: ...", "if True: ...", "if True:\n            print('more')"),
        ("Sum.of", "if total > 1: ...", "", "strict=True)\n        return total"),
        ("Sum.of", "return ...", "pass; return -...", "pass\n        return -total"),
        ("of", "return a", "", "def of(a):\n    pass"),
        ("Sum", "2", "3", "b=3"),
        ("", "total", "0", None),
        ("Sum.off", "total", "0", None),
    ],
)
def test_a_fragment_is_found_by_its_syntax(function, old, new, planted):
    """Were the layout to matter, better words would turn the suite red."""
    mutant = Mutant("name", "Why.", "losses", function, old, new, "test")
    if planted is None:
        with pytest.raises(ValueError, match=r"^name: losses\.py"):
            plant(SOURCE, mutant)
    else:
        assert planted in ast.unparse(plant(SOURCE, mutant))
