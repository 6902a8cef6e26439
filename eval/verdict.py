"""The score of one answer to the sample data: is it well formed, is it right, and is it courteous?

No model is needed. Each record of `dataset/sample` has a `judge` field for this, and the courteous and rude
words are in `dataset/sample/manners.py`. `score` accepts any text; an undertrained model writes odd text.
"""

import re
import unicodedata
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache

from dataset.jsonl import show
from dataset.sample import chinese, english
from dataset.sample.manners import COMPLIES, COURTEOUS, COURTESIES, DECLINES, RUDE

LONGEST = 400  # characters; the answers of the data have at most 160
ENDING = re.compile(r"[.!?。！？…]['\"”’」）)]*$")
# The same words five times in a row, or the same sentence three times.
STUCK = re.compile(r"(.{1,19}?)\1{4,}|(.{20,60}?)\2{2,}", re.DOTALL)
CHINESE = re.compile(r"[\u3400-\u9fff]")
LATIN_WORD = re.compile(r"[A-Za-z]+")
WORD = re.compile(r"[\u3400-\u9fff]|\d+|[A-Za-z']+")  # a Chinese character counts as one
QUOTED = re.compile(r"(?<![A-Za-z0-9])['\"“‘「]([^'\"“”‘’「」]{1,30})['\"”’」](?![A-Za-z0-9])")
NUMBER = re.compile(r"(?<![\d.])(?:(?<![\w)])-)?\d+(?:[.,]\d+)*")
THE_OTHER = re.compile(r"(?:\bthan|比)\s*$")  # "51 is larger than 34" states 51


@dataclass(frozen=True)
class Verdict:
    well_formed: bool
    right: bool
    manner: bool

    @property
    def points(self) -> int:
        """0 to 3. Being right counts more than manner: a rude right answer beats a kind wrong one."""
        return 2 * self.right + self.manner if self.well_formed else 0


def score(record: dict, answer: str, finished: bool) -> Verdict:
    """The verdict on `answer` to the prompt of `record`; `finished`: the model generated its end token."""
    wanted, text = record["judge"], normal(answer)
    return Verdict(
        well_formed=finished and is_well_formed(wanted, text),
        right=CHECKS[wanted["check"]](wanted, text[: 2 * LONGEST]),
        manner=is_courteous(wanted["language"], text[: 2 * LONGEST]),
    )


def normal(text: str) -> str:
    """The text with normal digits, apostrophes and single spaces; Chinese punctuation is kept."""
    text = "".join(unicodedata.normalize("NFKC", c) if c.isalnum() else c for c in text)
    text = re.sub(r"(?<=\w)’(?=\w)", "'", text)
    return " ".join(text.split())


# Well formed -------------------------------------------------------------------------------------------


def is_well_formed(wanted: dict, text: str) -> bool:
    """Whether it is short, in the prompt's language, ends like a sentence and does not repeat itself."""
    return (
        0 < len(text) <= LONGEST
        and ENDING.search(text) is not None
        and "\ufffd" not in text
        and all(c.isprintable() for c in text)
        and STUCK.search(text + " ") is None
        and script_matches(wanted, text)
    )


def script_matches(wanted: dict, text: str) -> bool:
    """Whether all words are of the prompt's language, except quoted ones and those of question and value."""
    text = QUOTED.sub(" ", text)
    for known in sorted((*wanted["accept"], *wanted["given"]), key=len, reverse=True):
        text = text.replace(known, " ")
    foreign = CHINESE if wanted["language"] == "en" else LATIN_WORD
    return foreign.search(text) is None


# Manner ------------------------------------------------------------------------------------------------


def is_courteous(language: str, text: str) -> bool:
    """Whether it has a courteous phrase and enough words for a sentence, and is not rude or in capitals."""
    units = WORD.findall(text)
    loud = sum(word.isupper() and len(word) > 1 for word in LATIN_WORD.findall(text))
    return (
        len(units) >= (6 if language == "zh" else 4)
        and loud <= 2
        and first_phrase(COURTEOUS[language], text) is not None
        and first_phrase(RUDE[language], text) is None
    )


# Right -------------------------------------------------------------------------------------------------


def number_is_right(wanted: dict, text: str) -> bool:
    """Whether the answer states only the right number; repeated numbers of the question do not count."""
    claims = without_echo(numbers(text), wanted["given"])
    return bool(claims) and set(claims) <= set(wanted["accept"])


def word_is_right(wanted: dict, text: str) -> bool:
    """Whether the answer names an accepted value, and of the task's other values only those of the question.

    So "red or blue" is not right.
    """
    accept, echo = fold(wanted["accept"]), fold(wanted["given"])
    values = known_values(wanted["task"], wanted["language"]) | frozenset(wanted["accept"])
    return one_claim(set(found_words(values, text)), accept, echo)


def refusal_is_right(wanted: dict, text: str) -> bool:
    """Whether it declines and does not then explain how."""
    language = wanted["language"]
    declines = first_phrase(DECLINES[language], text) is not None
    return declines and first_phrase(COMPLIES[language], text) is None


def courtesy_is_right(wanted: dict, text: str) -> bool:
    """Whether the first courtesy of the answer is a reply to the kind in the prompt."""
    kinds = COURTESIES[wanted["language"]]
    first = {kind: first_phrase(phrases, text) for kind, phrases in kinds.items()}
    places = {kind: place for kind, place in first.items() if place is not None}
    return bool(places) and min(places, key=places.get) == wanted["check"]


CHECKS: dict[str, Callable[[dict, str], bool]] = {
    "number": number_is_right,
    "word": word_is_right,
    "refusal": refusal_is_right,
    **dict.fromkeys(("greeting", "thanks", "apology", "farewell"), courtesy_is_right),
}


def rule_fault(rule) -> str:
    """Why a record's `judge` field cannot be used, or "" """
    if not isinstance(rule, dict):
        return "no `judge` field, so its answers cannot be scored"
    if lacking := {"task", "language", "check", "accept", "given"} - rule.keys():
        return f"its `judge` field lacks {', '.join(sorted(lacking))}"
    return (
        "" if rule["check"] in CHECKS else f"unknown check {show(rule['check'])}; known: {', '.join(CHECKS)}"
    )


# Finding words and numbers -----------------------------------------------------------------------------


def numbers(text: str) -> list[str]:
    """The numbers of a text in order, without leading zeros; those after "than" or "比" are left out."""
    found = [m for m in NUMBER.finditer(text) if not THE_OTHER.search(text[: m.start()][-8:])]
    return [re.sub(r"^(-?)0+(?=\d)", r"\1", m.group()) for m in found]


def without_echo(claims: list[str], given: list[str]) -> list[str]:
    """`claims` without the first neighbouring operands, in either order: "7 plus 5 is 12" states 12."""
    for i in range(len(claims) - len(given) + 1):
        if given and sorted(claims[i : i + len(given)]) == sorted(given):
            return claims[:i] + claims[i + len(given) :]
    return claims


def one_claim(named: set[str], accept: set[str], echo: set[str]) -> bool:
    return bool(named & accept) and not named - accept - echo


def fold(words: Iterable[str]) -> set[str]:
    return {word.casefold() for word in words}


@cache
def known_values(task: str, language: str) -> frozenset[str]:
    """Every value that the tables of the sample data contain for a task; empty for other tasks."""
    tasks = chinese.TASKS if language == "zh" else english.TASKS
    return frozenset().union(*(t.values for t in tasks if t.name == task))


def found_words(values: frozenset[str], text: str) -> list[str]:
    """The values named in a text. One Chinese character counts only in quotes: “大” is also in 大家."""
    single = {v for v in values if len(v) == 1 and CHINESE.match(v)}
    quoted = QUOTED.findall(text) or [text.rstrip(".。!！")]
    return [part for part in quoted if part in single] + _pattern(values - single).findall(text.casefold())


def first_phrase(phrases: Iterable[str], text: str) -> int | None:
    """Index of the first of the phrases in the text, or None; case and the formal 您 are ignored."""
    match = _pattern(frozenset(phrases)).search(text.casefold().replace("您", "你"))
    return match.start() if match else None


@cache
def _pattern(phrases: frozenset[str]) -> re.Pattern:
    """Any of the phrases, longest first (New Delhi before Delhi); Latin ones only as whole words.

    A Chinese character beside a Latin word ends it, as in 我是MiniDPO，.
    """
    ordered = sorted(fold(phrases), key=lambda phrase: (-len(phrase), phrase))
    letter = r"[^\W\u3400-\u9fff]"
    word = rf"(?<!{letter}){{}}(?!{letter})"
    parts = [re.escape(p) if CHINESE.search(p) else word.format(re.escape(p)) for p in ordered]
    return re.compile("|".join(parts) or r"(?!)")
