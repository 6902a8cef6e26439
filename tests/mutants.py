"""Plant a known bug of the catalogue in tests/planted, and watch the test that it names fail.

    python -m tests.mutants                                       # plant them all
    python -m tests.mutants --list                                # their names, and why each is a bug
    python -m tests.mutants reference-omitted rope-not-restarted  # only these

Nearly all of these bugs train without an error and with a loss that falls. Green tests are therefore not
enough: each mutant shows that one of them can be red. Reading the catalogue beside the code is also a way to
learn what each line is for. To look at a bug longer, make the same change by hand and draw its curve.

A mutant is planted when its module is imported, in a forked child that runs one test. The parent has torch
imported, so that a child starts at once; the parent imports none of the project's own modules.
"""

import argparse
import gc
import importlib
import importlib.util
import json
import multiprocessing
import os
import signal
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from tests.planted import MUTANTS
from tests.planted.mutant import ROOT, Mutant, catalogue, plant_on_import

SECONDS = 120  # A test that takes longer with a mutant counts as broken.
PRELOADED = ("jinja2", "numpy", "pytest", "safetensors.torch", "tokenizers", "torch._dynamo", "tqdm")
PRELOADED += ("torch.distributed.checkpoint", "torch.distributed.fsdp", "torch.nn.parallel")


# Not bugs: a change that no test can see, and one that breaks an import.
CHECKS = catalogue("""
a-change-without-effect in losses: reward_metrics
No test can see it, so it must be reported as a survivor.
- chosen_rewards - rejected_rewards
+ -(rejected_rewards - chosen_rewards)
test_losses.py::test_metrics_are_sums_and_a_tie_is_half

a-module-that-does-not-load in losses:
A test that cannot start shows nothing about the test.
- import math
+ import maths
test_losses.py::test_metrics_are_sums_and_a_tie_is_half
""")


# ---- The runner


class Outcomes:
    """A pytest plugin that collects the tests that passed, that failed in their own body, or that broke."""

    def __init__(self):
        self.passed, self.failed, self.broken = [], [], []

    def pytest_runtest_logreport(self, report):
        if report.failed:
            (self.failed if report.when == "call" else self.broken).append(report.nodeid)
        elif report.when == "call" and report.passed:
            self.passed.append(report.nodeid)

    def pytest_collectreport(self, report):
        if report.failed:
            self.broken.append(report.nodeid)


def in_child(folder: Path, tests: list[str], mutant: Mutant | None) -> None:
    """Run the tests and write their outcomes into the folder; called after a fork, never returns."""
    try:
        os.setpgrp()  # The processes that a test starts die with it.
        log = os.open(folder / "log", os.O_WRONLY | os.O_CREAT)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.chdir(ROOT)
        os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # Their start takes a third of the time.
        if mutant:
            plant_on_import(mutant)
        import pytest

        outcomes = Outcomes()
        options = ["-q", "-o", "addopts=", "-p", "no:cacheprovider", "--basetemp", str(folder / "tmp")]
        pytest.main([*options, *tests], plugins=[outcomes])
        (folder / "outcomes.json").write_text(json.dumps(vars(outcomes)))
    except ValueError as error:
        print(error, flush=True)  # The mutant has no place.
    finally:
        os._exit(0)


def run_tests(tests: list[str], mutant: Mutant | None = None, seconds: float = SECONDS) -> dict:
    """What `Outcomes` collected from these tests, with a mutant or without one, and the log."""
    with tempfile.TemporaryDirectory(prefix="mutant-") as folder:
        child = os.fork()
        if child == 0:
            in_child(Path(folder), tests, mutant)
        deadline = time.monotonic() + seconds
        outcomes = {"passed": [], "failed": [], "broken": []}
        while os.waitpid(child, os.WNOHANG) == (0, 0):
            if time.monotonic() > deadline:
                os.killpg(child, signal.SIGKILL)
                os.waitpid(child, 0)
                return {**outcomes, "broken": [f"no end after {seconds:.0f} s"], "log": ""}
            time.sleep(0.01)
        written = Path(folder, "outcomes.json")
        found = json.loads(written.read_text()) if written.exists() else {"broken": ["the child died"]}
        return {**outcomes, **found, "log": Path(folder, "log").read_text(errors="replace")}


def verdict(mutant: Mutant) -> dict:
    """What became of the mutant: "killed" if its test failed in its own body, else "survived" or "broken"."""
    start = time.monotonic()
    outcomes = run_tests([mutant.test], mutant)
    found = {"name": mutant.name, "test": mutant.test, "seconds": time.monotonic() - start}
    if outcomes["broken"] or not outcomes["passed"] + outcomes["failed"]:
        return {**found, "kind": "broken", "why": f"{outcomes['broken']}\n{outcomes['log'][-3000:]}"}
    if outcomes["failed"]:
        return {**found, "kind": "killed", "why": ""}
    return {**found, "kind": "survived", "why": f"{mutant.test} is green"}


def without_a_mutant(tests: list[str]) -> dict:
    """Whether all these tests are "green" as they are, or "red"; under an empty name."""
    start = time.monotonic()
    outcomes = run_tests(tests, seconds=SECONDS * 5) if tests else {"passed": [], "failed": [], "broken": []}
    green = len(outcomes["passed"]) >= len(tests) and not outcomes["failed"] + outcomes["broken"]
    found = {"name": "", "test": f"{len(tests)} tests without a mutant", "seconds": time.monotonic() - start}
    return {**found, "kind": "green" if green else "red", "why": "" if green else outcomes["log"][-3000:]}


def verdicts(mutants: list[Mutant], run_elsewhere: Iterable[str], jobs: int) -> Iterator[dict]:
    """First the verdict without a mutant, on the tests that are not `run_elsewhere`; then one a mutant."""
    preload()
    elsewhere = {name for node in run_elsewhere for name in (node, node.partition("[")[0])}
    yield without_a_mutant(sorted({mutant.test for mutant in mutants} - elsewhere))
    if jobs == 1:
        yield from map(verdict, mutants)
        return
    with multiprocessing.get_context("fork").Pool(jobs) as pool:
        yield from pool.imap(verdict, mutants)


def preload() -> None:
    """Import what is slow to import, once, before the forks; and nothing of the project."""
    for name in PRELOADED:
        if importlib.util.find_spec(name.split(".")[0]):
            importlib.import_module(name)
    import torch

    torch.set_num_threads(1)  # A pool of threads does not survive a fork.
    gc.freeze()  # The children need not look through all of torch for garbage.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="mutants to plant; default: all")
    parser.add_argument("--list", action="store_true", help="print the catalogue and stop")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="mutants at a time; default: CPUs")
    parser.add_argument("--json", action="store_true", help="print one JSON object a line")
    parser.add_argument("--run-elsewhere", metavar="FILE", help="tests that need no run without a mutant")
    arguments = parser.parse_args()
    if arguments.list:
        for mutant in MUTANTS:
            where = f"{mutant.module}.{mutant.function}".rstrip(".")
            print(f"{mutant.name}\n    {mutant.why}\n    {where}, {mutant.test}")
        return 0
    known = {mutant.name: mutant for mutant in MUTANTS + CHECKS}
    if unknown := set(arguments.names) - known.keys():
        parser.error(f"unknown mutants: {', '.join(sorted(unknown))}")
    mutants = [known[name] for name in arguments.names] or MUTANTS
    elsewhere = Path(arguments.run_elsewhere).read_text().splitlines() if arguments.run_elsewhere else ()
    good = 0
    for found in verdicts(mutants, elsewhere, arguments.jobs):
        line = "{kind:9} {seconds:4.1f} s  {name}: {test}\n{why}".format(**found).rstrip()
        print(json.dumps(found) if arguments.json else line, flush=True)
        good += found["kind"] in ("green", "killed")
    if not arguments.json:
        print(f"{good - 1} of {len(mutants)} mutants killed")
    return 0 if good == 1 + len(mutants) else 1


if __name__ == "__main__":
    sys.exit(main())
