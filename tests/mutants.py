"""Plant a known bug of the catalogue in tests/planted, and watch the test that it names go red.

    python -m tests.mutants                                       # plant them all
    python -m tests.mutants --list                                # what there is, and why each is a bug
    python -m tests.mutants reference-omitted rope-not-restarted  # only these

Nearly all of these bugs train without an error and with a loss that falls. So it is not enough that the tests
are green: each mutant shows that one of them can be red. Reading the catalogue beside the code is also a way
to learn what each line is for. To look at a bug longer, make the same change by hand and draw its curve.

Each mutant changes one place in a copy of the project and runs one test there, in a forked child, as many at
a time as there are CPUs: torch is imported once, the project's own modules are not imported before the fork.
"""

import argparse
import gc
import importlib
import json
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

from tests.planted import MUTANTS
from tests.planted.mutant import Mutant

ROOT = Path(__file__).resolve().parent.parent
SECONDS = 120  # A test that takes longer under a mutant counts as one that says nothing.


# Not bugs: what the runner must say of a change that no test can see, and of one that breaks an import.
CHECKS = [
    Mutant(
        "a-change-without-effect",
        "No test can see it, so it must be reported as a survivor.",
        "losses.py",
        "margins = chosen_rewards - rejected_rewards",
        "margins = -(rejected_rewards - chosen_rewards)",
        "tests/test_losses.py::test_metrics_are_sums_and_a_tie_is_half",
    ),
    Mutant(
        "a-module-that-does-not-load",
        "A test that cannot even start shows nothing about the test.",
        "objective.py",
        "def pair_metrics(",
        "def renamed(",
        "tests/test_losses.py::test_metrics_are_sums_and_a_tie_is_half",
    ),
]


# ---- The runner


class Outcomes:
    """A pytest plugin that notes which tests passed, which failed in their own body, and what else broke."""

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


def copy_project(to: Path) -> None:
    """The project's files, without what is hidden or made by runs.

    Compiled files are welcome: they name the time and size of their source, which a mutant changes.
    """
    shutil.copytree(ROOT, to, ignore=shutil.ignore_patterns(".*", "runs", "*.egg-info"))


def plant(tree: Path, mutant: Mutant) -> None:
    path = tree / mutant.file
    text = path.read_text(encoding="utf-8")
    times = text.count(mutant.old)
    if times != 1:
        raise ValueError(f"{mutant.name}: {mutant.file} holds {mutant.old!r} {times} times, not once")
    path.write_text(text.replace(mutant.old, mutant.new), encoding="utf-8")


def in_child(tree: Path, tests: list[str]) -> None:
    """Run the tests in the tree; called after a fork, never returns."""
    try:
        os.setpgrp()  # So that what the tests start dies with them.
        log = os.open(tree.parent / "log", os.O_WRONLY | os.O_CREAT)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.chdir(tree)
        ours = {path.stem for path in (*ROOT.glob("*.py"), *ROOT.glob("[a-z]*/"))}
        for name in [name for name in sys.modules if name.split(".")[0] in ours]:
            del sys.modules[name]
        sys.path[:] = [str(tree), *(path for path in sys.path if path not in ("", ".", str(ROOT)))]
        sys.dont_write_bytecode = True
        import pytest

        outcomes = Outcomes()
        options = ["-q", "-o", "addopts=", "-p", "no:cacheprovider", "--basetemp", str(tree.parent / "tmp")]
        pytest.main([*options, *tests], plugins=[outcomes])
        (tree.parent / "outcomes.json").write_text(json.dumps(vars(outcomes)))
    finally:
        os._exit(0)


def run_tests(tests: list[str], mutant: Mutant | None = None, seconds: float = SECONDS) -> dict:
    """Run tests in a copy of the project, with a mutant or without one; return what `Outcomes` noted."""
    with tempfile.TemporaryDirectory(prefix="mutant-") as folder:
        tree = Path(folder) / "minidpo"
        copy_project(tree)
        if mutant:
            plant(tree, mutant)
        child = os.fork()
        if child == 0:
            in_child(tree, tests)
        deadline = time.monotonic() + seconds
        while os.waitpid(child, os.WNOHANG) == (0, 0):
            if time.monotonic() > deadline:
                os.killpg(child, signal.SIGKILL)
                os.waitpid(child, 0)
                return {"passed": [], "failed": [], "broken": [f"no end after {seconds:.0f} s"], "log": ""}
            time.sleep(0.01)
        noted = Path(folder, "outcomes.json")
        outcomes = json.loads(noted.read_text()) if noted.exists() else {"broken": ["the child died"]}
        log = Path(folder, "log").read_text(errors="replace")
        return {"passed": [], "failed": [], "broken": [], **outcomes, "log": log}


def verdict(mutant: Mutant) -> tuple[str, str, float]:
    """("killed", …) if the named test failed in its own body, else "survived" or "broken", why, seconds."""
    start = time.monotonic()
    outcomes = run_tests([mutant.test], mutant)
    seconds = time.monotonic() - start
    if outcomes["broken"] or not outcomes["passed"] + outcomes["failed"]:
        return "broken", f"{outcomes['broken']}\n{outcomes['log'][-3000:]}", seconds
    return *(("killed", "") if outcomes["failed"] else ("survived", f"{mutant.test} is green")), seconds


def run(mutants: Iterable[Mutant], run_elsewhere: Iterable[str] = ()) -> dict[str, tuple[str, str]]:
    """The verdict on each mutant; and under the empty name that on the project as it is, green or red.

    Tests that are `run_elsewhere` without a mutant are not run here once more.
    """
    preload()
    mutants = list(mutants)
    wanted = sorted({mutant.test for mutant in mutants} - {*run_elsewhere})
    verdicts = {"": ("green", "")}
    if wanted:
        outcomes = run_tests(wanted, seconds=SECONDS * 5)
        green = len(outcomes["passed"]) == len(wanted) and not outcomes["failed"] + outcomes["broken"]
        verdicts = {"": ("green", "") if green else ("red", outcomes["log"][-3000:])}
    print(f"{verdicts[''][0]:9} {len(wanted)} tests without a mutant", flush=True)
    with multiprocessing.get_context("fork").Pool(os.cpu_count()) as pool:
        for mutant, (kind, why, seconds) in zip(mutants, pool.imap(verdict, mutants), strict=True):
            verdicts[mutant.name] = kind, why
            print(f"{kind:9} {seconds:4.1f} s  {mutant.name}: {mutant.test}", flush=True)
    return verdicts


def preload() -> None:
    """Import what is slow to import, once, before the forks; and nothing of the project."""
    for name in ("numpy", "pytest", "tokenizers", "tqdm", "torch._dynamo", "torch.distributed"):
        importlib.import_module(name)
    import torch

    torch.set_num_threads(1)  # A pool of threads does not survive a fork.
    gc.freeze()  # The children need not look through all of torch for garbage.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="mutants to plant; none means all of them")
    parser.add_argument("--list", action="store_true", help="print the catalogue and stop")
    parser.add_argument("--json", metavar="FILE", help="write the verdicts to this file")
    parser.add_argument("--run-elsewhere", metavar="FILE", help="tests that need no run without a mutant")
    arguments = parser.parse_args()
    if arguments.list:
        for mutant in MUTANTS:
            print(f"{mutant.name}\n    {mutant.why}\n    {mutant.file}, {mutant.test}")
        return 0
    known = {mutant.name: mutant for mutant in MUTANTS + CHECKS}
    if unknown := set(arguments.names) - known.keys():
        parser.error(f"no such mutant: {', '.join(sorted(unknown))}")
    elsewhere = Path(arguments.run_elsewhere).read_text().splitlines() if arguments.run_elsewhere else ()
    verdicts = run([known[name] for name in arguments.names] or MUTANTS, elsewhere)
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(verdicts))
    bad = {name: said for name, (kind, said) in verdicts.items() if kind not in ("green", "killed")}
    for name, said in bad.items():
        print(f"\n{name or 'without a mutant'}: {verdicts[name][0]}\n{said}")
    print(f"{sum(kind == 'killed' for kind, _ in verdicts.values())} of {len(verdicts) - 1} mutants killed")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
