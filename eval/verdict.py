"""The verdict on one answer to the sample data: is it well formed, is it right, and is it courteous?

It needs no model: each record of `dataset/sample` carries what it takes to score any answer, and the words
by which manners are known stand in `dataset/sample/manners.py`. `score` never fails on odd text; an
undertrained model writes plenty of it.
"""

import re
import unicodedata
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache

from dataset.sample import chinese, english
from dataset.sample.manners import COMPLIES, COURTEOUS, COURTESIES, DECLINES, RUDE

LONGEST = 400  # characters; the answers of the data have at most 160, whatever is longer rambles
ENDING = re.compile(r"[.!?。！？…]['\"”’」）)]*$")
# The same words five times running, or the same sentence three times. No task asks for more than four.
STUCK = re.compile(r"(.{1,19}?)\1{4,}|(.{20,60}?)\2{2,}", re.DOTALL)
CHINESE = re.compile(r"[\u3400-\u9fff]")
LATIN_WORD = re.compile(r"[A-Za-z]+")
WORD = re.compile(r"[\u3400-\u9fff]|\d+|[A-Za-z']+")  # a Chinese character counts as one
QUOTED = re.compile(r"(?<![A-Za-z0-9])['\"“‘「]([^'\"“”‘’「」]{1,30})['\"”’」](?![A-Za-z0-9])")
NUMBER = re.compile(r"(?<![\d.])(?:(?<![\w)])-)?\d+(?:[.,]\d+)*")
THE_OTHER = re.compile(r"(?:\bthan|比)\s*$")  # "51 is larger than 34" claims 51


@dataclass(frozen=True)
class Verdict:
    well_formed: bool
    right: bool
    manner: bool

    @property
    def points(self) -> int:
        """0 to 3. Right weighs more than manner: of two answers, a rude right one beats a kind wrong one."""
        return 2 * self.right + self.manner if self.well_formed else 0


def score(record: dict, answer: str, finished: bool) -> Verdict:
    """Judge `answer` to the prompt of `record`; `finished`: the model ended it by its own end token."""
    wanted, text = record["judge"], normal(answer)
    return Verdict(
        well_formed=finished and is_well_formed(wanted, text),
        right=CHECKS[wanted["check"]](wanted, text[: 2 * LONGEST]),
        manner=is_courteous(wanted["language"], text[: 2 * LONGEST]),
    )


def normal(text: str) -> str:
    """One way to write digits and apostrophes, and single spaces. Chinese punctuation stays as it is."""
    text = "".join(unicodedata.normalize("NFKC", c) if c.isalnum() else c for c in text)
    text = re.sub(r"(?<=\w)’(?=\w)", "'", text)
    return " ".join(text.split())


# Well formed -------------------------------------------------------------------------------------------


def is_well_formed(wanted: dict, text: str) -> bool:
    """A short text in the language of the prompt that ends as a sentence does and is not stuck."""
    return (
        0 < len(text) <= LONGEST
        and ENDING.search(text) is not None
        and "\ufffd" not in text
        and all(c.isprintable() for c in text)
        and STUCK.search(text + " ") is None
        and script_matches(wanted, text)
    )


def script_matches(wanted: dict, text: str) -> bool:
    """No word of the other language, but for what is quoted, asked about or asked for."""
    text = QUOTED.sub(" ", text)
    for known in sorted((*wanted["accept"], *wanted["given"]), key=len, reverse=True):
        text = text.replace(known, " ")
    foreign = CHINESE if wanted["language"] == "en" else LATIN_WORD
    return foreign.search(text) is None


# Manner ------------------------------------------------------------------------------------------------


def is_courteous(language: str, text: str) -> bool:
    """A courteous phrase, no rude one, no shouting, and enough words for a sentence."""
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
    """The answer claims one number only, the right one; what it echoes of the question is no claim."""
    claims = without_echo(numbers(text), wanted["given"])
    return bool(claims) and set(claims) <= set(wanted["accept"])


def sequence_is_right(wanted: dict, text: str) -> bool:
    """The numbers in the right order, once, and none else; the list of the question may stand before them."""
    claims, given = numbers(text), wanted["given"]
    if claims[: len(given)] == given and len(claims) > len(given):
        claims = claims[len(given) :]
    return any(claims == numbers(form) for form in wanted["accept"])


def word_is_right(wanted: dict, text: str) -> bool:
    """Of all values that the task knows, the answer names an accepted one and, but for echoes, no other.

    So "red or blue" is not right: a hedge is no answer.
    """
    accept, echo = fold(wanted["accept"]), fold(wanted["given"])
    values = known_values(wanted["task"], wanted["language"]) | frozenset(wanted["accept"])
    return one_claim(set(found_words(values, text)), accept, echo)


def letter_is_right(wanted: dict, text: str) -> bool:
    """Letters (or single Chinese characters) count where they are quoted, or are all that is said."""
    quoted = QUOTED.findall(text) or [text.rstrip(".。!！")]
    letters = {part.casefold() for part in quoted if len(part) == 1}
    return one_claim(letters, fold(wanted["accept"]), set())


def exact_is_right(wanted: dict, text: str) -> bool:
    """The accepted form, with its upper and lower case, as a word of its own."""
    return any(re.search(rf"(?<!\w){re.escape(form)}(?!\w)", text) for form in wanted["accept"])


def repeat_is_right(wanted: dict, text: str) -> bool:
    """The longest run of the word is as long as was asked for: not shorter and not longer."""
    for form in wanted["accept"]:
        form = form.casefold()
        word = form.split()[0] if " " in form else _period(form)
        run = re.compile(rf"(?<![a-z]){re.escape(word)}(?:[\s,，、]*{re.escape(word)})*(?![a-z])")
        runs = [match.group().count(word) for match in run.finditer(text.casefold())]
        if runs and max(runs) == form.count(word):
            return True
    return False


def refusal_is_right(wanted: dict, text: str) -> bool:
    """It declines, and does not then tell how after all."""
    language = wanted["language"]
    declines = first_phrase(DECLINES[language], text) is not None
    return declines and first_phrase(COMPLIES[language], text) is None


def courtesy_is_right(wanted: dict, text: str) -> bool:
    """The first courtesy of the answer is of the kind that replies to the prompt."""
    kinds = COURTESIES[wanted["language"]]
    first = {kind: first_phrase(phrases, text) for kind, phrases in kinds.items()}
    places = {kind: place for kind, place in first.items() if place is not None}
    return bool(places) and min(places, key=places.get) == wanted["check"]


CHECKS: dict[str, Callable[[dict, str], bool]] = {
    "number": number_is_right,
    "sequence": sequence_is_right,
    "word": word_is_right,
    "letter": letter_is_right,
    "exact": exact_is_right,
    "repeat": repeat_is_right,
    "refusal": refusal_is_right,
    **dict.fromkeys(("greeting", "thanks", "apology", "farewell"), courtesy_is_right),
}


# Finding words and numbers -----------------------------------------------------------------------------


def numbers(text: str) -> list[str]:
    """The numbers of a text in order, without leading zeros, but for those that follow "than" or "比"."""
    found = [m for m in NUMBER.finditer(text) if not THE_OTHER.search(text[: m.start()][-8:])]
    return [re.sub(r"^(-?)0+(?=\d)", r"\1", m.group()) for m in found]


def without_echo(claims: list[str], given: list[str]) -> list[str]:
    """Drop the operands where they first stand side by side, in either order: "7 plus 5 is 12" claims 12."""
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
    """Every value that the tables of the sample data hold for a task; none for a task of other data."""
    tasks = chinese.TASKS if language == "zh" else english.TASKS
    return frozenset().union(*(t.values for t in tasks if t.name == task))


def found_words(values: frozenset[str], text: str) -> list[str]:
    """The values named in a text. One Chinese character counts only in quotes: “大” is in 大家 too."""
    single = {v for v in values if len(v) == 1 and CHINESE.match(v)}
    quoted = QUOTED.findall(text) or [text.rstrip(".。!！")]
    return [part for part in quoted if part in single] + _pattern(values - single).findall(text.casefold())


def first_phrase(phrases: Iterable[str], text: str) -> int | None:
    """Where the first of the phrases stands in the text, ignoring case and how formal the "you" is."""
    match = _pattern(frozenset(phrases)).search(text.casefold().replace("您", "你"))
    return match.start() if match else None


@cache
def _pattern(phrases: frozenset[str]) -> re.Pattern:
    """Any of the phrases, longest first (十一月 before 一月); Latin ones only as whole words.

    A Chinese character beside a Latin word ends it, as in 我是MiniDPO，.
    """
    ordered = sorted(fold(phrases), key=lambda phrase: (-len(phrase), phrase))
    letter = r"[^\W\u3400-\u9fff]"
    word = rf"(?<!{letter}){{}}(?!{letter})"
    parts = [re.escape(p) if CHINESE.search(p) else word.format(re.escape(p)) for p in ordered]
    return re.compile("|".join(parts) or r"(?!)")


def _period(text: str) -> str:
    """The shortest text whose repetition gives this one: 苹果 for 苹果苹果."""
    return next(text[:n] for n in range(1, len(text) + 1) if text[:n] * (len(text) // n) == text)
