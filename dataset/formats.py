"""The formats of records, in two tables, and which of them fits a record."""

import difflib
from collections.abc import Callable
from dataclasses import dataclass

from dataset.jsonl import kind, show
from dataset.turns import (
    Read,
    answers,
    conversations,
    is_transcript,
    judged_pair,
    ranked_replies,
    text_pair,
    transcript_pair,
)

# The prompt of a record with one of these keys is there: it must not be cut out of chosen and rejected.
PROMPT_KEYS = ("prompt", "question", "instruction", "input", "query", "conversations", "messages", "history")
PAIR = ("chosen", "rejected")
SIDES = (*PAIR, "chosen_messages", "rejected_messages")


@dataclass(frozen=True)
class Format:
    """A row of the tables below. It fits a record that has each of ``keys`` with that type."""

    description: str
    example: dict
    keys: dict[str, type | tuple[type, ...]]
    read: Read
    absent: tuple[str, ...] = ()
    test: Callable[[dict], bool] = bool  # a further condition; `bool` holds for every record
    verdict: str = ""  # the key that prefers one of two answers

    def fits(self, record: dict) -> bool:
        has_keys = all(isinstance(record.get(key), types) for key, types in self.keys.items())
        return has_keys and not any(key in record for key in self.absent) and self.test(record)


# ---- The tables. A record has the first format that fits, so special formats stand above general ones.

USER, GOOD, BAD = ({"role": role, "content": content} for role, content in
                   (("user", "2 + 2?"), ("assistant", "4"), ("assistant", "5")))  # fmt: skip
HUMAN, GPT_GOOD, GPT_BAD = ({"from": name, "value": content} for name, content in
                            (("human", "2 + 2?"), ("gpt", "4"), ("gpt", "5")))  # fmt: skip
SIDE = (str, dict, list)

PREFERENCE_FORMATS = {
    "text": Format(
        "prompt, chosen and rejected are text",
        {"prompt": "2 + 2?", "chosen": "4", "rejected": "5"},
        {"prompt": str, "chosen": str, "rejected": str}, answers("prompt", *PAIR),
    ),
    "question": Format(
        "question, chosen and rejected are text",
        {"question": "2 + 2?", "chosen": "4", "rejected": "5"},
        {"question": str, "chosen": str, "rejected": str}, answers("question", *PAIR),
    ),
    "ultrafeedback": Format(
        "prompt is text, chosen and rejected are messages, with or without the prompt",
        {"prompt": "2 + 2?", "chosen": [USER, GOOD], "rejected": [USER, BAD]},
        {"prompt": str, "chosen": (list, dict), "rejected": (list, dict)}, answers("prompt", *PAIR),
    ),
    "chat": Format(
        "prompt is messages; chosen and rejected are text, a message or messages",
        {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]},
        {"prompt": list, "chosen": SIDE, "rejected": SIDE}, answers("prompt", *PAIR),
    ),
    "sharegpt": Format(
        "conversations is {from, value} messages; chosen and rejected are one message each",
        {"conversations": [HUMAN], "chosen": GPT_GOOD, "rejected": GPT_BAD},
        {"conversations": list, "chosen": SIDE, "rejected": SIDE}, answers("conversations", *PAIR),
    ),
    "alpaca": Format(
        "instruction, input, chosen and rejected, optionally history and system",
        {"instruction": "Add.", "input": "2 + 2", "output": "4", "chosen": "4", "rejected": "5"},
        {"instruction": str, "chosen": SIDE, "rejected": SIDE}, answers("instruction", *PAIR),
    ),
    "ranked": Format(
        "instruction, input and a list of output replies, the best one first",
        {"instruction": "Add.", "input": "2 + 2", "output": ["4", "four?", "5"], "history": [["Hi", "Hi!"]]},
        {"instruction": str, "output": list}, ranked_replies("instruction", "output"),
    ),
    "ranked-prompt": Format(
        "prompt is text or messages; ranked is a list of replies, the best one first",
        {"prompt": "2 + 2?", "ranked": ["4", "four?", "5"]},
        {"prompt": (str, list), "ranked": list}, ranked_replies("prompt", "ranked"),
    ),
    "output_1": Format(
        "output_1, output_2 and label: 1, 2, 'tie' or a list of votes; the prompt as in alpaca or text",
        {"input": "2 + 2?", "output_1": "5", "output_2": "4", "label": 2},
        {"output_1": SIDE, "output_2": SIDE}, judged_pair("output_1", "output_2", "label"), verdict="label",
    ),
    "response_a": Format(
        "response_a, response_b and winner: 'model_a', 'model_b', 'tie' or a list of votes",
        {"prompt": "2 + 2?", "response_a": "4", "response_b": "5", "winner": ["model_a", "tie"]},
        {"response_a": SIDE, "response_b": SIDE}, judged_pair("response_a", "response_b", "winner"),
        verdict="winner",
    ),
    "chosen_messages": Format(
        "chosen_messages and rejected_messages are whole conversations",
        {"chosen_messages": [USER, GOOD], "rejected_messages": [USER, BAD]},
        {"chosen_messages": list, "rejected_messages": list},
        conversations("chosen_messages", "rejected_messages"),
    ),
    "chat-implicit": Format(
        "chosen and rejected are whole conversations, as in MiniMind",
        {"chosen": [USER, GOOD], "rejected": [USER, BAD]},
        {"chosen": list, "rejected": list}, conversations(*PAIR), absent=PROMPT_KEYS,
    ),
    "hh": Format(
        "chosen and rejected are 'Human: ... Assistant: ...' transcripts",
        {"chosen": "\n\nHuman: 2 + 2?\n\nAssistant: 4", "rejected": "\n\nHuman: 2 + 2?\n\nAssistant: 5"},
        {"chosen": str, "rejected": str}, transcript_pair, absent=PROMPT_KEYS,
        test=lambda record: is_transcript(record["chosen"]) and is_transcript(record["rejected"]),
    ),
    "text-implicit": Format(
        "chosen and rejected are text that begins with the same prompt",
        {"chosen": "2 + 2 is 4", "rejected": "2 + 2 is 5"},
        {"chosen": str, "rejected": str}, text_pair, absent=PROMPT_KEYS,
    ),
}  # fmt: skip

SFT_FORMATS = {
    "messages": Format(
        "messages is a list of {role, content}",
        {"messages": [USER, GOOD]},
        {"messages": list}, conversations("messages"),
    ),
    "sharegpt": Format(
        "conversations is a list of {from, value} or {role, content}",
        {"conversations": [HUMAN, GPT_GOOD]},
        {"conversations": list}, conversations("conversations"),
    ),
    "alpaca": Format(
        "instruction, input and output, optionally history and system",
        {"instruction": "Add.", "input": "2 + 2", "output": "4", "history": [["Hi", "Hi!"]]},
        {"instruction": str, "output": str}, answers("instruction", "output"),
    ),
    "response": Format(
        "prompt and response are text or messages",
        {"prompt": "2 + 2?", "response": "4"},
        {"prompt": (str, list), "response": SIDE}, answers("prompt", "response"),
    ),
    "completion": Format(
        "prompt and completion are text or messages",
        {"prompt": "2 + 2?", "completion": "4"},
        {"prompt": (str, list), "completion": SIDE}, answers("prompt", "completion"),
    ),
    "question": Format(
        "question and answer are text",
        {"question": "2 + 2?", "answer": "4"},
        {"question": str, "answer": str}, answers("question", "answer"),
    ),
}  # fmt: skip

FEEDBACK_FORMATS = {
    "unpaired": Format(
        "prompt and completion are text or messages; label is true (desirable) or false",
        {"prompt": "2 + 2?", "completion": "4", "label": True},
        {"prompt": (str, list), "completion": SIDE, "label": bool}, answers("prompt", "completion"),
    ),
    "unpaired-messages": Format(
        "messages is a list of {role, content}; label, of its last turn, is true (desirable) or false",
        {"messages": [USER, GOOD], "label": True},
        {"messages": list, "label": bool}, conversations("messages"),
    ),
}  # fmt: skip


# ---- Which format fits


def detect_format(record: dict, formats: dict[str, Format] | None = None) -> str | None:
    """The name of the first format in ``formats`` (default: PREFERENCE_FORMATS) that fits, or None.

    A preference never counts as a conversation: its rejected side must not be trained on.
    """
    formats = formats or PREFERENCE_FORMATS
    if is_unpaired(record) != (formats is FEEDBACK_FORMATS):
        return None
    if formats is SFT_FORMATS and detect_format(record):
        return None
    return next((name for name, format in formats.items() if format.fits(record)), None)


def is_unpaired(record: dict) -> bool:
    labelled = isinstance(record.get("label"), bool) or ("label" in record and "completion" in record)
    return labelled and not {"chosen", "output_1"} & record.keys()


def describe(record: dict) -> str:
    """What a record that cannot be used seems to be, for an error message."""
    if is_unpaired(record):
        return "unpaired feedback (a completion and its label), for --loss kto"
    if "text" in record and set(record) <= {"text", "label"}:
        return "plain text (a corpus, or chosen and rejected on alternate lines), which holds no pairs"
    if any(isinstance(value, dict) and "is_correct" in value for value in record.values()):
        return "graded solutions nested under one question, which must be made into pairs first"
    if (name := detect_format(record)) and not misspelt_prompt(record, PREFERENCE_FORMATS[name]):
        return f"preferences (format {name})"
    if name := detect_format(record, SFT_FORMATS):
        return f"conversations without a rejected side (format {name})"
    keys = [f"{show(key)}: {kind(value)}" for key, value in list(record.items())[:8]]
    return "{" + ", ".join(keys) + (", ...}" if len(record) > 8 else "}")


def closest(key: str, names, cutoff: float = 0.75) -> str:
    """The name of ``names`` that is spelt like ``key``, or ""."""
    return next(iter(difflib.get_close_matches(key[:40], names, 1, cutoff)), "")


def has_sides(record: dict) -> bool:
    """Whether a key is spelt like one of a pair's sides."""
    return any(closest(key, SIDES) for key in list(record)[:50])


def misspelt_prompt(record: dict, format: Format) -> bool:
    """Whether a format without a prompt key fits only because a key such as 'promt' is misspelt."""
    others = [key for key in list(record)[:50] if key not in format.keys and "_" not in key]  # not prompt_id
    return bool(format.absent) and any(closest(key, PROMPT_KEYS, 0.8) for key in others)


def did_you_mean(record: dict, formats: dict[str, Format]) -> str:
    """The sentence part that names the right spelling of a key, or ""."""
    known = {*PROMPT_KEYS, *(key for format in formats.values() for key in format.example)}
    for key in list(record)[:50]:
        if key not in known and (name := closest(key, sorted(known - record.keys()))):
            return f"did you mean '{name}' instead of {show(key)}? "
    return ""


def accepted(formats: dict[str, Format]) -> str:
    """The sentence part that lists the formats."""
    families = {"preferences": PREFERENCE_FORMATS, "conversations": SFT_FORMATS, "feedback": FEEDBACK_FORMATS}
    family = next(name for name, table in families.items() if table is formats)
    listed = "; ".join(f"{name} ({format.description})" for name, format in formats.items())
    return f"accepted {family}: {listed}"
