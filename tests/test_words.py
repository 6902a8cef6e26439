"""The words for readers in two languages: eval/words.py and its table, words.zh.json; docs/GLOSSARY.md."""

import ast
import importlib
import json
import re
import string

import pytest

from eval import common, curves, judge, terminal, turns, words
from tests.loops import ROOT
from tests.test_docs import CHINESE, page
from tests.test_report import judged_figures

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


# ---- The glossary

ROWS = [line.strip("| ").split(" | ") for line in page("docs/GLOSSARY.md").splitlines() if line[:1] == "|"]
TERMS = ROWS[2:]  # below the heads
# Other words for a term of the glossary. One word a term: a reader takes two words for two things.
OTHERS = {
    "参考模型": ["参照模型", "基准模型", "参考策略"],
    "提示": ["提示词", "题面"],
    "回答": ["回复", "响应", "应答", "答复"],
    "偏好数据": ["偏好集"],
    "对数概率": ["概率对数", "log 概率", "对数似然"],
    "对数比": ["对数比率", "对数比值", "log 比"],
    "隐式奖励": ["隐含奖励", "内隐奖励"],
    "配分函数": ["划分函数", "归一化常数"],
    "梯度累积": ["梯度累加", "累积梯度"],
    "差值": ["间隔", "边际"],
    "留出数据": ["保留数据", "验证数据"],
    "结束符": ["终止符", "结束标记"],
    "奖励模型": ["打分模型", "回报模型"],
    "目标函数": ["代价函数"],
    "评判程序": ["裁判", "评委"],
    "检查点": ["存档点"],
}


@pytest.mark.parametrize("row", TERMS, ids=lambda row: row[0])
def test_a_term_of_the_glossary_is_in_the_code(row):
    """A module, a name in it, or a flag; tests/test_docs.py checks the flags."""
    assert len(row) == 4 and all(row)
    code = re.fullmatch("`(.*)`", row[3])[1]
    if not code.startswith("--"):
        assert resolves(code), code


def resolves(code: str) -> bool:
    """Whether a dotted name is a module, or a name or a field in one."""
    parts, found = code.split("."), None
    while parts and found is None:
        try:
            found = importlib.import_module(".".join(parts))
        except ModuleNotFoundError:
            parts.pop()
    for part in code.split(".")[len(parts) :]:
        if found is None or not hasattr(found, part):
            return part in getattr(found, "__annotations__", {})
        found = getattr(found, part)
    return found is not None


def test_the_chinese_pages_use_the_words_of_the_glossary():
    words_of_it = {word for row in TERMS for word in re.split("[，；]", row[1])}
    assert {*OTHERS} <= words_of_it and len(TERMS) == len({row[0] for row in TERMS})
    texts = {name: page(name) for name in CHINESE} | {"words.zh.json": TABLE.read_text("utf-8")}
    for name, text in texts.items():
        for term, others in OTHERS.items():
            for other in others:
                assert other not in text, f"{name}: {other}; the glossary has {term}"


# ---- Tables on a terminal


@pytest.mark.parametrize("name", ["en", "zh"])
def test_columns_of_the_closing_words_are_straight(name):
    """A Chinese character takes two cells; Python's own padding counts it as one."""
    with words.language(name):
        summary = judge.summary(judged_figures("dpo", "sft"))
        by_turn = turns.table({"mixed": [0.5, 1.0]})
    for table in (summary.split("\n\n")[1], by_turn):
        assert len({terminal.cells(line) for line in table.splitlines()}) == 1, table
