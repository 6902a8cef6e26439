"""The exercises of docs/TOUR.md: a right answer is accepted, a wrong one is refused with a useful word."""

import re

import pytest

from tests.exercises import checks
from tests.exercises.answers import ANSWERS, NOTICING
from tests.loops import ROOT

PAGES = ["docs/TOUR.md", "docs/TOUR.zh.md"]
QUICK = [number for number in ANSWERS if number != 8]  # 8 starts pytest


@pytest.fixture
def verdict(monkeypatch, tmp_path):
    """The word on an answer, as if the exercise's file contained it."""

    def of(number: int, answer) -> str:
        name = checks.EXERCISES[number][0]
        namespace = {name: answer} if name else answer
        monkeypatch.setattr(checks.runpy, "run_path", lambda path: namespace)
        return checks.verdict(number, tmp_path / "mine.py")

    return of


@pytest.mark.parametrize("number", QUICK)
def test_a_right_answer_is_accepted_and_two_wrong_ones_are_not(number, verdict):
    """A check that refuses a right answer, or accepts a wrong one, teaches the wrong thing."""
    right, *wrong = ANSWERS[number]
    assert verdict(number, right) == ""
    assert len(wrong) == 2
    for answer, word in wrong:
        assert word in verdict(number, answer)


@pytest.mark.parametrize("status, word", [(1, ""), (0, "stays green"), (4, "could not run")])
def test_a_broken_mask_needs_a_test_that_notices(status, word, verdict, monkeypatch):
    """The verdict on a mask, with the exit status of pytest given."""
    monkeypatch.setattr(checks, "run_with", lambda exercise, node: status)
    right, (unbroken, unbroken_word), _ = ANSWERS[8]
    got = verdict(8, right)
    assert word in got if word else got == ""
    assert unbroken_word in verdict(8, unbroken)
    assert "no test" in verdict(8, {**right, "NOTICED_BY": "tests/test_store.py::test_of_a_dream"})
    assert "Break the mask only" in verdict(8, {**right, "encode": lambda record, tokenizer: [([1], [True])]})


@pytest.mark.slow
@pytest.mark.parametrize("node, status", [(NOTICING, 1), (ANSWERS[8][2][0]["NOTICED_BY"], 0)])
def test_the_named_test_runs_with_the_broken_mask(node, status, tmp_path):
    """A test that runs without the reader's mask would be green for every answer."""
    lines = ["from dataset.store import encode as right", "", "def encode(record, tokenizer):"]
    lines += ["    prompt, *sides = right(record, tokenizer)"]
    lines += ["    return [prompt, *((ids, [*mask[:-1], False]) for ids, mask in sides)]"]
    (tmp_path / "mine.py").write_text("\n".join(lines), "utf-8")
    assert checks.run_with(str(tmp_path / "mine.py"), node) == status


def test_an_exercise_that_is_not_begun_or_that_fails(verdict):
    """A traceback of the checker is not a useful word; the reader's own line is."""

    def untouched(margins, beta):
        raise NotImplementedError

    assert "Fill in mine.py" in verdict(5, untouched)
    assert "ZeroDivisionError" in verdict(5, lambda margins, beta: 1 / 0)


def test_an_error_names_the_readers_line(tmp_path):
    path = tmp_path / "typo.py"
    path.write_text("\n\ndef ipo(margins, beta):\n    return margin\n")
    assert checks.verdict(5, path).startswith("typo.py, line 4: NameError")
    path.write_text("def ipo(margins, beta)\n")
    assert "SyntaxError" in checks.verdict(5, path)
    path.write_text("")
    assert "typo.py does not define ipo" in checks.verdict(5, path)


def test_the_command_needs_a_number(capsys):
    assert checks.main([]) == checks.main(["13"]) == checks.main(["x"]) == 2
    assert capsys.readouterr().out.count("make exercise N=1") == 3


def test_the_command_prints_one_line(capsys):
    """The exercise as it stands in the checkout, begun or not."""
    status = checks.main(["6"])
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("Exercise 6, docs/exercises/06_shift_by_one.py: ")
    assert line.endswith("right.") == (status == 0)


def test_every_exercise_has_a_file_with_its_name_in_it():
    files = sorted(checks.FOLDER.glob("*.py"))
    assert [int(file.name[:2]) for file in files] == sorted(checks.EXERCISES) == sorted(ANSWERS)
    for number, (name, _) in checks.EXERCISES.items():
        source = checks.file_of(number).read_text("utf-8")
        assert re.search(rf"^(def {name}\(|{name} = )" if name else "^NOTICED_BY = ", source, re.M)
        assert source.startswith(f'"""Exercise {number}: ')


@pytest.mark.parametrize("page", PAGES)
def test_the_tour_lists_every_exercise_with_a_hint(page):
    table = re.findall(r"^\| (\d+) \| (.+) \| (.+) \|$", (ROOT / page).read_text("utf-8"), re.M)
    assert [int(number) for number, *_ in table] == sorted(checks.EXERCISES)
    for number, task, hint in table:
        assert f"](exercises/{checks.file_of(int(number)).name})" in task and len(hint) >= 8
