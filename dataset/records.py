"""The records of a data file as `Preference` or `Conversation`, or a `DataError` for each bad one.

    for record in read_preferences("pairs.jsonl"):
        if isinstance(record, DataError): ...            # stop or count: the caller decides
        record.prompt, record.chosen, record.rejected

The first record determines the format of the file; a record of another format is an error. `jsonl.py`
decodes JSON, `formats.py` lists the formats, and `turns.py` converts a record of each to messages.
"""

import hashlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from dataset import formats
from dataset.formats import FEEDBACK_FORMATS, PREFERENCE_FORMATS, SFT_FORMATS, Format, detect_format
from dataset.jsonl import DataError, kind, read_values, show
from dataset.turns import (
    Fault,
    Message,
    checked_turns,
    first_wins,
    refuse_unsupported,
    split_pair,
    system_message,
)
from errors import InputError

SCORE_KEYS = ("score_chosen", "score_rejected")


@dataclass(frozen=True)
class Conversation:
    """A record of supervised fine-tuning: user and assistant in turn, the assistant last."""

    messages: tuple[Message, ...]
    line: int
    format: str = field(default="", compare=False)  # its name in SFT_FORMATS


@dataclass(frozen=True)
class Preference:
    """A prompt, which ends with a user turn, and two responses."""

    prompt: tuple[Message, ...]
    chosen: str
    rejected: str
    line: int
    scores: tuple[float, float] | None = None  # (score_chosen, score_rejected), if the record has both
    win_probability: float | None = None  # P(chosen beats rejected), a soft label
    tie: bool = False  # whether a verdict prefers neither; such a pair is dropped and counted
    format: str = field(default="", compare=False)  # its name in PREFERENCE_FORMATS

    @property
    def replies(self) -> tuple[str, str]:
        return self.chosen, self.rejected


@dataclass(frozen=True)
class Ranking:
    """A prompt, which ends with a user turn, and two or more replies, the best one first."""

    prompt: tuple[Message, ...]
    replies: tuple[str, ...]
    line: int
    tie: bool = False  # as in `Preference`
    format: str = field(default="", compare=False)  # its name in PREFERENCE_FORMATS


@dataclass(frozen=True)
class Feedback:
    """A prompt, which ends with a user turn, and one answer, labelled desirable or not."""

    prompt: tuple[Message, ...]
    completion: str
    label: bool
    line: int
    tie: bool = False  # whether it is a side of a pair that is a tie
    format: str = field(default="", compare=False)  # its name in FEEDBACK_FORMATS or PREFERENCE_FORMATS

    @property
    def replies(self) -> tuple[str | None, str | None]:
        """A pair of which one side is missing: a desirable answer is chosen, an undesirable one rejected."""
        return (self.completion, None) if self.label else (None, self.completion)


def read_preferences(path, shape: str = "auto") -> Iterator[Preference | DataError]:
    """Yield a `Preference` for every record of the file, or a `DataError` in its place.

    ``shape`` is the name of a format, or "auto". Raises `InputError` if the whole file cannot be used.
    """
    return _read(path, shape, PREFERENCE_FORMATS, _preference)


def read_conversations(path, shape: str = "auto") -> Iterator[Conversation | DataError]:
    """Yield a `Conversation` for every record of the file, or a `DataError` in its place."""
    return _read(path, shape, SFT_FORMATS, _conversation)


def read_rankings(path, shape: str = "auto") -> Iterator["Ranking | DataError"]:
    """Yield a `Ranking` for every record of a file of preferences, or a `DataError` in its place."""
    return _read(path, shape, PREFERENCE_FORMATS, _ranking)


def read_feedback(path, shape: str = "auto") -> Iterator[Feedback | DataError]:
    """Yield a `Feedback` for every record, two for a pair of preferences; or a `DataError` in its place."""
    if shape in FEEDBACK_FORMATS or (shape == "auto" and formats.is_unpaired(first_record(path))):
        yield from _read(path, shape, FEEDBACK_FORMATS, _feedback)
        return
    for pair in read_preferences(path, shape):
        if isinstance(pair, DataError):
            yield pair
        else:
            yield Feedback(pair.prompt, pair.chosen, True, pair.line, pair.tie, pair.format)
            yield Feedback(pair.prompt, pair.rejected, False, pair.line, pair.tie, pair.format)


READERS = {
    "preferences": read_preferences,
    "rankings": read_rankings,
    "feedback": read_feedback,
    "conversations": read_conversations,
}


def first_record(path) -> dict:
    return next((record for _, record in read_values(path) if isinstance(record, dict)), {})


def read_records(path) -> Iterator[Preference | Conversation | Feedback | DataError]:
    """Yield the records of a file of preferences, conversations or feedback; its first record decides."""
    first = first_record(path)
    if formats.is_unpaired(first):
        yield from read_feedback(path)
        return
    pairs = detect_format(first) or (not detect_format(first, SFT_FORMATS) and formats.has_sides(first))
    yield from (read_preferences if pairs else read_conversations)(path)


def _read(path, shape: str, table: dict[str, Format], build: Callable) -> Iterator:
    if shape != "auto" and shape not in table:
        raise InputError(f"{path}: unknown format {show(shape)}; {formats.accepted(table)}")
    forced, name = shape != "auto", shape
    for line, record in read_values(path):
        if isinstance(record, DataError):
            yield record
            continue
        try:
            if not isinstance(record, dict):
                raise Fault(f"expected an object, found {kind(record)}")
            found = name if forced else detect_format(record, table)
            if name == "auto":
                if found is None or formats.misspelt_prompt(record, table[found]):
                    hint = formats.did_you_mean(record, table) + formats.accepted(table)
                    raise DataError(path, line, f"found {formats.describe(record)}; {hint}")
                name = found
            if found not in (name, None):
                raise Fault(f"this record has format {found}, the first has {name}; a file has one format")
            refuse_unsupported(record, "the record")
            value = build(record, line, name)  # Raises a Fault for a missing key or a wrong type.
            if found is None:
                raise Fault(f"found {formats.describe(record)}, not format {name} like the first record")
            yield value
        except Fault as fault:
            yield DataError(path, line, str(fault))


def _preference(record: dict, line: int, name: str) -> Preference:
    system = system_message(record)
    format = PREFERENCE_FORMATS[name]
    chosen, *_, rejected = format.read(record)
    sides = split_pair(system + chosen, system + rejected)
    wins, tie = win_probability(record), False
    if format.verdict:
        share = first_wins(record, format.verdict)
        tie = share == 0.5
        if isinstance(record[format.verdict], list):
            wins = max(share, 1 - share)
    return Preference(*sides, line, scores(record), wins, tie, name)


def _ranking(record: dict, line: int, name: str) -> Ranking:
    if PREFERENCE_FORMATS[name].verdict:
        pair = _preference(record, line, name)
        return Ranking(pair.prompt, pair.replies, line, pair.tie, name)
    system = system_message(record)
    best, *others = PREFERENCE_FORMATS[name].read(record)
    split = []
    for rank, other in enumerate(others, start=1):
        names = ("chosen", "rejected") if len(others) == 1 else ("reply 0", f"reply {rank}")
        split.append(split_pair(system + best, system + other, names))
    prompt, reply, _ = split[0]
    return Ranking(prompt, (reply, *(other for *_, other in split)), line, format=name)


def _feedback(record: dict, line: int, name: str) -> Feedback:
    (messages,) = FEEDBACK_FORMATS[name].read(record)
    turns = checked_turns(system_message(record) + messages, "completion")
    if turns[-1].weight == 0:
        raise Fault("completion: the answer has weight 0, so there is nothing to train on")
    return Feedback(tuple(turns[:-1]), turns[-1].content, record["label"], line, format=name)


def _conversation(record: dict, line: int, name: str) -> Conversation:
    (messages,) = SFT_FORMATS[name].read(record)
    turns = checked_turns(system_message(record) + messages, "conversation")
    if not any(turn.role == "assistant" and turn.weight for turn in turns):
        raise Fault("conversation: every assistant turn has weight 0, so there is nothing to train on")
    return Conversation(tuple(turns), line, name)


def prompt_digest(record: Preference | Ranking | Feedback | Conversation) -> bytes:
    """16 bytes; equal for two records whose prompts are equal but for white space and case."""
    turns = record.messages[:-1] if isinstance(record, Conversation) else record.prompt
    text = "\0".join(f"{turn.role}\1{' '.join(turn.content.lower().split())}" for turn in turns)
    return hashlib.sha256(text.encode()).digest()[:16]


def is_number(value) -> bool:
    return kind(value) == "a number" and math.isfinite(value)


def scores(record: dict) -> tuple[float, float] | None:
    """(score_chosen, score_rejected) of the record or of its ``metadata``; None if it has neither."""
    for place in (record, record.get("metadata")):
        found = [place.get(key) for key in SCORE_KEYS] if isinstance(place, dict) else [None]
        if all(value is None for value in found):
            continue
        for key, value in zip(SCORE_KEYS, found, strict=True):
            if not is_number(value):
                raise Fault(f"{key}: expected a number, found {kind(value)}; a pair has both scores or none")
        return float(found[0]), float(found[1])
    return None


def win_probability(record: dict) -> float | None:
    value = record.get("win_probability")
    if value is not None and not (is_number(value) and 0 <= value <= 1):
        raise Fault(f"win_probability: expected a number from 0 to 1, found {show(value)}")
    return None if value is None else float(value)
