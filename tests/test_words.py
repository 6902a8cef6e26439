"""The words for readers in two languages: eval/words.py and its table, words.zh.json."""

import ast
import json
import re
import string

import pytest

from eval import common, curves, turns, words
from tests.loops import ROOT

TABLE = ROOT / "eval" / "words.zh.json"
SCRIPT = r'\btr\(("(?:[^"\\]|\\.)*")'  # a call in JavaScript
ELEMENT = r"<[^<>]+ data-tr>([^<>]+)<"  # an element whose text the script of its page translates


def literals(source: str) -> set[str]:
    """The first arguments of the calls of `tr`, where they are literals."""
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    named = [call for call in calls if isinstance(call.func, ast.Name) and call.func.id == "tr"]
    return {call.args[0].value for call in named if isinstance(call.args[0], ast.Constant)}


def translated() -> set[str]:
    """Every English text that is translated somewhere: literals, and the names of two tables."""
    folder = ROOT / "eval"
    found = set().union(*(literals(path.read_text("utf-8")) for path in folder.rglob("*.py")))
    for path in (*folder.glob("*.js"), *folder.glob("*.html")):
        source = path.read_text("utf-8")
        found |= {json.loads(text) for text in re.findall(SCRIPT, source)}
        found |= {*re.findall(ELEMENT, source)}
    for panel in curves.PREFERENCE_PANELS + curves.SFT_PANELS:
        found |= {panel.title, panel.unit, panel.mark_label} - {""}
    return found | {*turns.LANGUAGES} | {*common.LANGUAGES.values()}


def places(text: str) -> list[str]:
    return sorted(name for _, name, *_ in string.Formatter().parse(text) if name is not None)


def test_both_languages_have_the_same_texts_and_placeholders():
    """A text that was reworded would silently stay English; a placeholder with a typing error would raise."""
    rows = json.loads(TABLE.read_text("utf-8"), object_pairs_hook=list)
    keys = [key for key, _ in rows]
    assert len(keys) == len({*keys}) > 100
    assert {*keys} == translated()
    for english, chinese in rows:
        assert places(english) == places(chinese), english
        assert re.findall(r"</?\w+>", english) == re.findall(r"</?\w+>", chinese), english


@pytest.mark.parametrize("variables, expected", [
    ({"LANG": "zh_CN.UTF-8"}, "zh"),
    ({"LANG": "zh_CN.UTF-8", "LC_ALL": "C.UTF-8"}, "en"),
    ({"LANG": "en_GB.UTF-8", "LC_MESSAGES": "zh_TW"}, "zh"),
    ({"LANG": "zh_CN.UTF-8", "LC_ALL": ""}, "zh"),
    ({}, "en"),
])  # fmt: skip
def test_auto_is_the_language_of_the_environment(variables, expected, monkeypatch):
    """LC_ALL comes before LC_MESSAGES, and that before LANG; an empty variable counts as unset (POSIX)."""
    for name in ("LC_ALL", "LC_MESSAGES", "LANG"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with words.language("auto"):
        assert words.current() == expected
    assert words.current() == "en"  # outside: the tests, and commands without --lang


def test_a_text_is_translated_and_filled():
    for name, expected in (("en", "7 runs"), ("zh", "7 次训练")):
        with words.language(name):
            assert words.tr("{count} runs", count=7) == expected
            assert words.tr("not in the table {x}", x=1) == "not in the table 1"
