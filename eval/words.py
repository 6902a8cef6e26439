"""The words that readers see, in two languages: English in the code, Chinese in words.zh.json.

    with language("zh"):
        tr("{count} optimizer steps", count=188)      # "188 步"

Data formats, logs and errors stay English, so that they can be searched for.
"""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from pathlib import Path

LANGUAGES = ("auto", "en", "zh")
LANG_WHY = "language of the words for readers; auto: the language of the environment"

_current = ContextVar("language", default="en")


@contextmanager
def language(name: str) -> Iterator[None]:
    """Set the language of `tr` inside the block. "auto" reads LC_ALL, LC_MESSAGES and LANG, as POSIX does."""
    if name == "auto":
        places = (os.environ.get(key) for key in ("LC_ALL", "LC_MESSAGES", "LANG"))
        name = "zh" if next(filter(None, places), "").startswith("zh") else "en"
    token = _current.set(name)
    try:
        yield
    finally:
        _current.reset(token)


def current() -> str:
    """The language in use: "en" or "zh"."""
    return _current.get()


def table() -> dict[str, str]:
    """{English text: its translation} of the language in use; {} for English."""
    return chinese() if current() == "zh" else {}


@cache
def chinese() -> dict[str, str]:
    return json.loads(Path(__file__).with_name("words.zh.json").read_text("utf-8"))


def tr(english: str, **values: object) -> str:
    """The text in the language in use, with `values` at the places of its {names}."""
    text = table().get(english, english)
    return text.format(**values) if values else text
