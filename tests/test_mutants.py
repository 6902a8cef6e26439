"""Every bug of the catalogue (tests/planted) turns its test red: the tests of this project work."""

import json
import subprocess
import sys
from collections import Counter

import pytest

from tests.mutants import CHECKS, MUTANTS, ROOT


@pytest.fixture(scope="module")
def verdicts(request, tmp_path_factory) -> dict[str, list[str]]:
    """The verdicts on those mutants that this run of pytest asks for, from one process that forks for each.

    A process of its own, because here the project's modules are imported already, without any bug. The tests
    that this run of pytest has collected itself show without it whether they are green.
    """
    file = tmp_path_factory.mktemp("mutants") / "verdicts.json"
    collected = file.with_name("collected")
    collected.write_text("\n".join(item.nodeid for item in request.session.items))
    asked = {item.name for item in request.session.items}
    names = [mutant.name for mutant in MUTANTS if f"test_mutant_is_killed[{mutant.name}]" in asked]
    names += [check.name for check in CHECKS]
    command = [sys.executable, "-m", "tests.mutants", *names, "--json", str(file)]
    command += ["--run-elsewhere", str(collected)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1800)
    assert file.exists(), result.stdout + result.stderr
    return json.loads(file.read_text())


def test_the_named_tests_are_green_without_a_mutant(verdicts):
    """A test that is always red kills every mutant."""
    kind, said = verdicts[""]
    assert kind == "green", said


@pytest.mark.parametrize("name", [mutant.name for mutant in MUTANTS])
def test_mutant_is_killed(name, verdicts):
    """A survivor is a bug that no test sees; look the mutant up in tests/planted for what it does."""
    kind, said = verdicts[name]
    assert kind == "killed", said


def test_the_runner_knows_survivors_and_wrecks(verdicts):
    """Were every change called killed, or every crash, the catalogue would prove nothing."""
    assert [verdicts[check.name][0] for check in CHECKS] == ["survived", "broken"]


def test_the_catalogue_names_each_mutant_once():
    """Two entries of one name would hide one of them."""
    assert not [name for name, times in Counter(m.name for m in MUTANTS + CHECKS).items() if times > 1]
    assert all(mutant.why.endswith(".") for mutant in MUTANTS)
