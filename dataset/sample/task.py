"""A task of the sample data: rows of a table, several wordings of the question, several sentences as answer.

A prompt is one row in one wording. `english.py` and `chinese.py` contain the tables.
"""

from collections.abc import Hashable
from dataclasses import dataclass, field, replace
from itertools import permutations, product


@dataclass(frozen=True)
class Row:
    """One fact or calculation. `args` fill {0}, {1}, … of the wordings; `value` is the answer."""

    args: tuple[str, ...]
    value: str
    fact: Hashable = None  # name of the fact; training states each fact of a held-out prompt
    accept: tuple[str, ...] = ()  # further right forms of the value
    given: tuple[str, ...] | None = None  # values of the question that an answer may repeat; None: args
    wrong: tuple[str, ...] = ()  # plausible mistakes; empty: any other value of the table


@dataclass(frozen=True)
class Task:
    """A table with its wordings. A line of a wording can start with `system: ` or `assistant: `."""

    name: str
    language: str
    check: str  # a key of CHECKS in eval/verdict.py: how the value is found in an answer
    weight: float  # share of the records of its language
    rows: tuple[Row, ...]
    wordings: tuple[str, ...]
    statements: tuple[str, ...]  # sentences that hold {value}
    show: str = "{}"  # how a value is written, for example in quotation marks
    style: str = "answer"  # phrases of manners.py before and after the statement
    blunt: tuple[str, ...] = ()  # sentences of a poor answer, instead of a statement
    amiss: tuple[str, ...] = ()  # sentences of a wrong answer, instead of a statement with a wrong value
    amiss_style: str = ""  # the phrases around it; empty: those of `style`
    wrong_share: float = 0.05  # share of the poor answers that are also wrong
    values: frozenset[str] = field(init=False)

    def __post_init__(self):
        every = (form for row in self.rows for form in (row.value, *row.accept))
        object.__setattr__(self, "values", frozenset(every))


@dataclass(frozen=True)
class Case:
    """A prompt: one row of a task in one wording."""

    task: Task
    row: Row
    wording: str
    casual: bool = False  # the last message in lower case and without its final punctuation mark

    def messages(self) -> list[dict[str, str]]:
        messages = []
        for line in self.wording.format(*self.row.args).split("\n"):
            role, text = "user", line
            for other in ("system", "assistant"):
                if line.startswith(f"{other}: "):
                    role, text = other, line.removeprefix(f"{other}: ")
            messages.append({"role": role, "content": text})
        if self.casual:
            messages[-1]["content"] = messages[-1]["content"].lower().rstrip(".!?。！？ ")
        return messages

    @property
    def has_system_message(self) -> bool:
        return self.wording.startswith("system: ")

    def judge(self) -> dict:
        """The `judge` field of a record: what `eval.verdict.score` needs to score any answer."""
        row, check = self.row, self.task.check
        known = check in ("number", "word")
        given = row.args if row.given is None else row.given
        return {
            "task": self.task.name,
            "language": self.task.language,
            "check": check,
            "accept": [row.value, *row.accept] if known else [],
            "given": list(given) if known else [],
            "manner": "courteous",
        }


def cases(task: Task) -> list[Case]:
    return [Case(task, row, wording) for row in task.rows for wording in task.wordings]


def in_short(task: Task, weight: float, sayings: str, endings: tuple[str, ...]) -> Task:
    """The same task for sayings of a word or two: each of them with each of the endings."""
    rows = tuple(Row((saying,), "", saying) for saying in sayings.split(", "))
    wordings = tuple("{0}" + ending for ending in endings)
    return replace(task, name=f"short {task.name}", weight=weight, rows=rows, wordings=wordings)


def _near(value: int) -> tuple[str, ...]:
    return tuple(str(value + step) for step in (-10, -2, -1, 1, 2, 10) if value + step >= 0)


def _number_row(args: tuple[int, ...], value: int, fact: Hashable, *wrong: int) -> Row:
    return Row(tuple(map(str, args)), str(value), fact, wrong=tuple(map(str, wrong)) or _near(value))


def sum_rows() -> tuple[Row, ...]:
    """a + b in both orders, up to 10."""
    pairs = ((a, b) for a, b in product(range(1, 10), repeat=2) if a + b <= 10)
    return tuple(_number_row((a, b), a + b, (max(a, b), min(a, b))) for a, b in pairs)


def difference_rows() -> tuple[Row, ...]:
    """a - b > 0, from numbers up to 8."""
    pairs = ((a, b) for a in range(3, 9) for b in range(1, 8) if a > b)
    return tuple(_number_row((a, b), a - b, (a, b)) for a, b in pairs)


def larger_rows() -> tuple[Row, ...]:
    """Two numbers up to 9; the larger is the answer, the smaller the mistake."""
    pairs = permutations(range(1, 10), 2)
    return tuple(_number_row((a, b), max(a, b), (max(a, b), min(a, b)), min(a, b)) for a, b in pairs)


def cycle_rows(names: list[str], **steps: int) -> tuple[Row, ...]:
    """Neighbours in a circle of names, by the word for each step; mistakes are the wrong neighbours."""
    rows, count = [], len(names)
    for index, name in enumerate(names):
        for word, step in steps.items():
            value, back, far = (names[(index + k * step) % count] for k in (1, -1, 2))
            rows.append(Row((word, name), value, (word, name), wrong=(back, far)))
    return tuple(rows)


def pair_rows(entries: dict[str, str]) -> tuple[Row, ...]:
    """One row for each entry; further right forms of a value follow a bar, as in "puppy|pup"."""
    rows = []
    for key, forms in entries.items():
        value, *accept = forms.split("|")
        rows.append(Row((key,), value, key, accept=tuple(accept)))
    return tuple(rows)


def table(text: str) -> dict[str, str]:
    """The dict of `"key: value, key: value"`, which may have several lines."""
    return dict(entry.split(": ") for entry in " ".join(text.split()).split(", "))


def both_ways(pairs: str) -> dict[str, str]:
    """The dict of `"hot/cold big/small"`, in both directions."""
    split = [pair.split("/") for pair in pairs.split()]
    return {**dict(split), **{right: left for left, right in split}}
