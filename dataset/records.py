"""A raw file in, typed records out; what is wrong with a record is said as ``path:line: reason``.

    for record in read_preferences("pairs.jsonl"):
        if isinstance(record, DataError): ...            # stop, or count it: the caller decides
        record.prompt, record.chosen, record.rejected

The first record decides the shape of the file, and every other must have the same, so that a file cannot
drift from one meaning to another. `jsonl.py` turns bytes into JSON values; `shapes.py` turns a value of each
shape into conversations; the tables here name the shapes.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial

from dataset.formats import (
    Fault,
    Message,
    alpaca_pair,
    alpaca_prompt,
    answered,
    asked,
    checked_turns,
    explicit_pair,
    get,
    is_transcript,
    messages,
    messages_pair,
    ranked_pair,
    refuse_unsupported,
    split_pair,
    system_message,
    text_pair,
    transcript_pair,
)
from dataset.jsonl import DataError, kind, read_values, show
from errors import InputError

# A record with one of these has its prompt there. Looking for it inside chosen and rejected would drop it.
PROMPT_KEYS = ("prompt", "question", "instruction", "input", "query", "conversations", "messages", "history")
SCORE_KEYS = ("score_chosen", "score_rejected")


@dataclass(frozen=True)
class Conversation:
    """What supervised fine-tuning learns from: user and assistant in turn, the assistant last."""

    messages: tuple[Message, ...]
    line: int
    shape: str = field(default="", compare=False)  # the name of the shape it was read from


@dataclass(frozen=True)
class Preference:
    """One prompt, which ends in a user turn, and two responses to it."""

    prompt: tuple[Message, ...]
    chosen: str
    rejected: str
    line: int
    scores: tuple[float, float] | None = None  # (score_chosen, score_rejected), if the record has both
    win_probability: float | None = None  # P(chosen beats rejected), a soft label
    shape: str = field(default="", compare=False)  # the name of the shape it was read from


@dataclass(frozen=True)
class Shape:
    """A row of the tables below: a record has this shape if each of ``keys`` is there with that type."""

    description: str
    example: dict
    keys: dict[str, type | tuple[type, ...]]
    read: Callable[[dict], list | tuple]  # record → one conversation, or the pair (chosen, rejected)
    absent: tuple[str, ...] = ()
    test: Callable[[dict], bool] = bool  # A further condition; without one, any record will do.

    def fits(self, record: dict) -> bool:
        return (
            all(key in record and isinstance(record[key], types) for key, types in self.keys.items())
            and not any(key in record for key in self.absent)
            and self.test(record)
        )


def read_preferences(path, shape: str = "auto") -> Iterator[Preference | DataError]:
    """Yield a `Preference` for every record of the file, or the `DataError` that stands in its place.

    What spoils the whole file is raised: what `read_values` raises, and a shape that holds no preferences.
    """
    return _read(path, shape, PREFERENCE_SHAPES, _preference)


def read_conversations(path, shape: str = "auto") -> Iterator[Conversation | DataError]:
    """Yield a `Conversation` for every record of the file, or the `DataError` that stands in its place."""
    return _read(path, shape, SFT_SHAPES, _conversation)


def read_records(path) -> Iterator[Preference | Conversation | DataError]:
    """Yield the records of a file of either kind, which its first record decides."""
    first = next((record for _, record in read_values(path) if isinstance(record, dict)), {})
    yield from (read_preferences if detect_shape(first, PREFERENCE_SHAPES) else read_conversations)(path)


def _read(path, shape: str, shapes: dict[str, Shape], build: Callable) -> Iterator:
    if shape != "auto" and shape not in shapes:
        raise InputError(f"{path}: unknown shape {show(shape)}; {accepted(shapes)}")
    forced, name = shape != "auto", shape
    for line, record in read_values(path):
        if isinstance(record, DataError):
            yield record
            continue
        try:
            if not isinstance(record, dict):
                raise Fault(f"expected an object, found {kind(record)}")
            found = name if forced else detect_shape(record, shapes)
            if name == "auto" and found is None:
                raise DataError(path, line, f"found {describe(record)}; {accepted(shapes)}")
            name = found if name == "auto" else name
            if found not in (name, None):
                raise Fault(f"this record has shape {found}, the first has {name}; a file has one shape")
            refuse_unsupported(record, "the record")
            value = build(record, line, name)  # Says what is missing or of a wrong type.
            if found is None:
                raise Fault(f"found {describe(record)}, not shape {name} like the first record")
            yield value
        except Fault as fault:
            yield DataError(path, line, str(fault))


def _preference(record: dict, line: int, shape: str) -> Preference:
    system = system_message(record)
    chosen, rejected = PREFERENCE_SHAPES[shape].read(record)
    prompt, chosen, rejected = split_pair(system + chosen, system + rejected)
    return Preference(prompt, chosen, rejected, line, scores(record), win_probability(record), shape)


def _conversation(record: dict, line: int, shape: str) -> Conversation:
    turns = system_message(record) + SFT_SHAPES[shape].read(record)
    return Conversation(tuple(checked_turns(turns, "conversation")), line, shape)


def is_number(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def scores(record: dict) -> tuple[float, float] | None:
    """(score_chosen, score_rejected) from the record or from its ``metadata``, if they are there."""
    for place in (record, record.get("metadata")):
        both = [place.get(key) for key in SCORE_KEYS] if isinstance(place, dict) else [None, None]
        if both == [None, None]:
            continue
        for key, value in zip(SCORE_KEYS, both, strict=True):
            if not is_number(value):
                raise Fault(f"{key}: expected a number, found {kind(value)}; a pair has both scores or none")
        return float(both[0]), float(both[1])
    return None


def win_probability(record: dict) -> float | None:
    value = record.get("win_probability")
    if value is None:
        return None
    if not is_number(value) or not 0 <= value <= 1:
        found = value if is_number(value) else show(value)
        raise Fault(f"win_probability: expected a number from 0 to 1, found {found}")
    return float(value)


# ---- The tables. A record has the first shape that fits it, so particular shapes stand above general ones.

USER, GOOD, BAD = ({"role": role, "content": content} for role, content in
                   (("user", "2 + 2?"), ("assistant", "4"), ("assistant", "5")))  # fmt: skip
HUMAN, GPT_GOOD, GPT_BAD = ({"from": name, "value": content} for name, content in
                            (("human", "2 + 2?"), ("gpt", "4"), ("gpt", "5")))  # fmt: skip
SIDE = (str, dict, list)

PREFERENCE_SHAPES = {
    "text": Shape(
        "prompt, chosen and rejected are text",
        {"prompt": "2 + 2?", "chosen": "4", "rejected": "5"},
        {"prompt": str, "chosen": str, "rejected": str}, explicit_pair,
    ),
    "question": Shape(
        "question, chosen and rejected are text",
        {"question": "2 + 2?", "chosen": "4", "rejected": "5"},
        {"question": str, "chosen": str, "rejected": str}, partial(explicit_pair, key="question"),
    ),
    "ultrafeedback": Shape(
        "prompt is text, chosen and rejected are messages, with or without the prompt",
        {"prompt": "2 + 2?", "chosen": [USER, GOOD], "rejected": [USER, BAD]},
        {"prompt": str, "chosen": (list, dict), "rejected": (list, dict)}, explicit_pair,
    ),
    "chat": Shape(
        "prompt is messages; chosen and rejected are text, a message or messages",
        {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]},
        {"prompt": list, "chosen": SIDE, "rejected": SIDE}, explicit_pair,
    ),
    "sharegpt": Shape(
        "conversations is {from, value} messages; chosen and rejected are one message each",
        {"conversations": [HUMAN], "chosen": GPT_GOOD, "rejected": GPT_BAD},
        {"conversations": list, "chosen": SIDE, "rejected": SIDE},
        partial(explicit_pair, key="conversations"),
    ),
    "alpaca": Shape(
        "instruction, input, chosen and rejected, optionally history and system",
        {"instruction": "Add.", "input": "2 + 2", "output": "4", "chosen": "4", "rejected": "5"},
        {"instruction": str, "chosen": SIDE, "rejected": SIDE}, alpaca_pair,
    ),
    "ranked": Shape(
        "instruction, input and a list of output replies, the best one first",
        {"instruction": "Add.", "input": "2 + 2", "output": ["4", "four?", "5"], "history": [["Hi", "Hi!"]]},
        {"instruction": str, "output": list}, ranked_pair,
    ),
    "chosen_messages": Shape(
        "chosen_messages and rejected_messages are whole conversations",
        {"chosen_messages": [USER, GOOD], "rejected_messages": [USER, BAD]},
        {"chosen_messages": list, "rejected_messages": list},
        partial(messages_pair, sides=("chosen_messages", "rejected_messages")),
    ),
    "chat-implicit": Shape(
        "chosen and rejected are whole conversations, as in MiniMind",
        {"chosen": [USER, GOOD], "rejected": [USER, BAD]},
        {"chosen": list, "rejected": list}, messages_pair, absent=PROMPT_KEYS,
    ),
    "hh": Shape(
        "chosen and rejected are 'Human: ... Assistant: ...' transcripts",
        {"chosen": "\n\nHuman: 2 + 2?\n\nAssistant: 4", "rejected": "\n\nHuman: 2 + 2?\n\nAssistant: 5"},
        {"chosen": str, "rejected": str}, transcript_pair, absent=PROMPT_KEYS,
        test=lambda record: is_transcript(record["chosen"]) and is_transcript(record["rejected"]),
    ),
    "text-implicit": Shape(
        "chosen and rejected are text that begins with the same prompt",
        {"chosen": "2 + 2 is 4", "rejected": "2 + 2 is 5"},
        {"chosen": str, "rejected": str}, text_pair, absent=PROMPT_KEYS,
    ),
}  # fmt: skip

SFT_SHAPES = {
    "messages": Shape(
        "messages is a list of {role, content}",
        {"messages": [USER, GOOD]},
        {"messages": list}, lambda record: messages(get(record, "messages"), "messages"),
    ),
    "sharegpt": Shape(
        "conversations is a list of {from, value} or {role, content}",
        {"conversations": [HUMAN, GPT_GOOD]},
        {"conversations": list}, lambda record: messages(get(record, "conversations"), "conversations"),
    ),
    "alpaca": Shape(
        "instruction, input and output, optionally history and system",
        {"instruction": "Add.", "input": "2 + 2", "output": "4", "history": [["Hi", "Hi!"]]},
        {"instruction": str, "output": str}, lambda record: answered(alpaca_prompt(record), record, "output"),
    ),
    "response": Shape(
        "prompt and response are text or messages",
        {"prompt": "2 + 2?", "response": "4"},
        {"prompt": (str, list), "response": SIDE},
        lambda record: answered(asked(record, "prompt"), record, "response"),
    ),
    "completion": Shape(
        "prompt and completion are text or messages",
        {"prompt": "2 + 2?", "completion": "4"},
        {"prompt": (str, list), "completion": SIDE},
        lambda record: answered(asked(record, "prompt"), record, "completion"),
    ),
    "question": Shape(
        "question and answer are text",
        {"question": "2 + 2?", "answer": "4"},
        {"question": str, "answer": str},
        lambda record: answered(asked(record, "question"), record, "answer"),
    ),
}  # fmt: skip


def detect_shape(record: dict, shapes: dict[str, Shape] = PREFERENCE_SHAPES) -> str | None:
    """The name of the first shape in ``shapes`` that fits, or None.

    A preference is no conversation, although it may hold one: its rejected half is not to be learned.
    """
    if is_unpaired(record) or (shapes is SFT_SHAPES and detect_shape(record, PREFERENCE_SHAPES)):
        return None
    return next((name for name, shape in shapes.items() if shape.fits(record)), None)


def is_unpaired(record: dict) -> bool:
    labelled = isinstance(record.get("label"), bool) or ("label" in record and "completion" in record)
    return labelled and "chosen" not in record


def describe(record: dict) -> str:
    """What a record that is not accepted seems to be, for an error message."""
    if is_unpaired(record):
        return "unpaired feedback (a completion and its label), which holds no pairs"
    if "text" in record and set(record) <= {"text", "label"}:
        return "plain text (a corpus, or chosen and rejected on alternate lines), which holds no pairs"
    if any(isinstance(value, dict) and "is_correct" in value for value in record.values()):
        return "graded solutions nested under one question, which must be made into pairs first"
    if name := detect_shape(record, PREFERENCE_SHAPES):
        return f"preferences (shape {name})"
    if name := detect_shape(record, SFT_SHAPES):
        return f"conversations without a rejected side (shape {name})"
    keys = [f"{show(key)}: {kind(value)}" for key, value in list(record.items())[:8]]
    return "{" + ", ".join(keys) + (", ...}" if len(record) > 8 else "}")


def accepted(shapes: dict[str, Shape]) -> str:
    """The sentence part that lists what is accepted."""
    wanted = "preferences" if shapes is PREFERENCE_SHAPES else "conversations"
    listed = "; ".join(f"{name} ({shape.description})" for name, shape in shapes.items())
    return f"accepted {wanted}: {listed}"
