"""One function for every format of a record: from decoded JSON to conversations.

Text is kept exactly; a record that cannot be used raises a `Fault` with the reason. Two things are dropped
because they have no meaning: white space where an implicit prompt is cut, and a blank system message.
"""

import re
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import zip_longest

from dataset.jsonl import kind, show

ROLES = {"system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant"}
# A message is plain text here, so the content of these keys would be lost silently.
UNSUPPORTED = ("tools", "tool_calls", "tool_call_id", "function_call", "images", "image", "videos", "audios",
               "reasoning_content", "thinking")  # fmt: skip


class Fault(ValueError):
    """The reason why a record cannot be used. The reader adds path and line."""


@dataclass(frozen=True)
class Message:
    role: str  # "system", "user" or "assistant"
    content: str
    weight: int = field(default=1, compare=False)  # of an assistant turn in supervised fine-tuning: 0 or 1


Read = Callable[[dict], list[list[Message]]]  # a record's conversation, or one for each answer, best first


# ---- Parts of all formats: text, messages, turns


def required(record: dict, key: str, where: str = ""):
    if key not in record:
        raise Fault(f"{where}missing key {show(key)}")
    return record[key]


def text(value, where: str) -> str:
    if not isinstance(value, str):
        raise Fault(f"{where}: expected text, found {kind(value)}")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        lone = show(value[error.start])
        raise Fault(f"{where}: lone surrogate {lone} at character {error.start}") from None
    return value


def message(entry, where: str) -> Message:
    """A `Message` from {role, content} or ShareGPT's {from, value}. Text parts of content are joined."""
    if not isinstance(entry, dict):
        raise Fault(f"{where}: expected a message, found {kind(entry)}")
    refuse_unsupported(entry, where)
    role_key, content_key = ("from", "value") if "from" in entry else ("role", "content")
    role, content = (required(entry, key, f"{where}: ") for key in (role_key, content_key))
    weight = entry.get("weight")
    if not isinstance(role, str) or role not in ROLES:
        raise Fault(f"{where}: unknown role {show(role)}; accepted: {', '.join(ROLES)}, no tools")
    if weight is not None and (isinstance(weight, bool) or weight not in (0, 1)):
        raise Fault(f"{where}: weight: expected 0 or 1, found {show(weight)}")
    if isinstance(content, list):
        content = "".join(text_part(part, f"{where}, part {place}") for place, part in enumerate(content))
    return Message(ROLES[role], text(content, where), 1 if weight is None else int(weight))


def text_part(part, where: str) -> str:
    if not isinstance(part, dict) or part.get("type") != "text":
        found = show(part.get("type")) if isinstance(part, dict) else kind(part)
        raise Fault(f"{where}: expected type 'text', found {found}; only text is supported")
    return text(required(part, "text" if "text" in part else "value"), where)


def messages(value, where: str) -> list[Message]:
    if not isinstance(value, list) or not value:
        raise Fault(f"{where}: expected messages, found {'an empty list' if value == [] else kind(value)}")
    return [message(entry, f"{where}[{turn}]") for turn, entry in enumerate(value)]


def refuse_unsupported(entry: dict, where: str) -> None:
    for key in UNSUPPORTED:
        if entry.get(key) not in (None, False, "", "[]", [], {}):
            raise Fault(f"{where}: {show(key)} is not supported; messages are plain text")


def system_message(record: dict) -> list[Message]:
    """The system message of the key ``system``, as a list; empty if the record has none."""
    if record.get("system") is None:
        return []
    return [Message("system", text(record["system"], "system"))]


def require_last(turns: list[Message], where: str, role: str) -> None:
    if turns[-1].role != role:
        raise Fault(f"{where}: the last turn ({len(turns) - 1}) is {turns[-1].role}, expected {role}")


def checked_turns(turns: list[Message], where: str, last: str = "assistant") -> list[Message]:
    """``turns``, checked: an optional system turn, then user and assistant in turn, the last by ``last``."""
    require_last(turns, where, last)
    start = 1 if turns[0].role == "system" else 0
    for turn in range(start, len(turns)):
        role, expected = turns[turn].role, ("user", "assistant")[(turn - start) % 2]
        if role != expected:
            raise Fault(f"{where}: turn {turn} is {role}, expected {expected}")
        if not turns[turn].content.strip():
            raise Fault(f"{where}: turn {turn} ({role}) is empty")
    return turns[1:] if start and not turns[0].content.strip() else turns


def split_pair(
    chosen: list[Message], rejected: list[Message], names: tuple[str, str] = ("chosen", "rejected")
) -> tuple[tuple[Message, ...], str, str]:
    """(prompt, chosen, rejected) of two conversations, which must be equal in all but the last turn.

    With two different prompts the partition function Z(x) does not cancel, and the loss is not DPO's.
    """
    for where, turns in zip(names, (chosen, rejected), strict=True):
        require_last(turns, where, "assistant")
        if turns[-1].weight == 0:
            raise Fault(f"{where}: the response has weight 0; a pair needs both responses")
    for turn, (left, right) in enumerate(zip_longest(chosen[:-1], rejected[:-1])):
        if left != right:
            raise Fault(f"{names[0]} and {names[1]} have different prompts: they differ from turn {turn} on")
    chosen, rejected = checked_turns(chosen, names[0]), checked_turns(rejected, names[1])
    return tuple(chosen[:-1]), chosen[-1].content, rejected[-1].content


# ---- Explicit prompts


def prompt_turns(record: dict, key: str) -> list[Message]:
    """The prompt in ``record[key]``: text, which is one user turn, or messages."""
    prompt = required(record, key)
    if is_transcript(prompt):
        raise Fault(f"{key}: a Human/Assistant transcript; put the whole transcripts in chosen and rejected")
    history = messages(prompt, key) if isinstance(prompt, list) else [Message("user", text(prompt, key))]
    checked_turns(history, key, last="user")
    return history


def append_response(history: list[Message], record: dict, key: str) -> list[Message]:
    """``history`` and the response in ``record[key]``: text, a message, or messages.

    UltraFeedback's messages repeat the history. They replace it; appended, every question would stand twice.
    """
    answer = required(record, key)
    if not isinstance(answer, (list, dict)):
        return [*history, Message("assistant", text(answer, key))]
    turns = messages([answer] if isinstance(answer, dict) else answer, key)
    if turns[0].role == "assistant":
        return history + turns
    # The copies may differ in a system turn before them and in white space around them.
    start = 1 if turns[0].role == "system" and history[0].role != "system" else 0
    repeated = turns[start : start + len(history)]
    if [(m.role, m.content.strip()) for m in repeated] != [(m.role, m.content.strip()) for m in history]:
        raise Fault(f"{key}: its first turns neither answer nor repeat the prompt")
    return turns


def alpaca_prompt(record: dict) -> list[Message]:
    """The turns of history [[question, answer], ...], then the instruction, its input on the next line."""
    turns = []
    history = [] if record.get("history") is None else record["history"]
    if not isinstance(history, list):
        raise Fault(f"history: expected a list, found {kind(history)}")
    for place, pair in enumerate(history):
        if not isinstance(pair, list) or len(pair) != 2:
            raise Fault(f"history[{place}]: expected [question, answer], found {kind(pair)}")
        turns.append(Message("user", text(pair[0], f"history[{place}][0]")))
        turns.append(Message("assistant", text(pair[1], f"history[{place}][1]")))
    parts = [text(required(record, "instruction"), "instruction")]
    parts += [] if record.get("input") is None else [text(record["input"], "input")]
    return [*turns, Message("user", "\n".join(part for part in parts if part))]


def answers(prompt: str, *keys: str) -> Read:
    """A reader of one conversation for each of `keys`: the prompt in the key `prompt`, and this response."""

    def read(record: dict) -> list[list[Message]]:
        history = alpaca_prompt(record) if prompt == "instruction" else prompt_turns(record, prompt)
        return [append_response(history, record, key) for key in keys]

    return read


def ranked_replies(prompt: str, key: str) -> Read:
    """A reader of one conversation for each reply of the list in `key`, the best one first."""

    def read(record: dict) -> list[list[Message]]:
        replies = required(record, key)
        if not isinstance(replies, list) or len(replies) < 2:
            raise Fault(f"{key}: expected a list of two replies or more, the best one first")
        turns = [Message("assistant", text(reply, f"{key}[{rank}]")) for rank, reply in enumerate(replies)]
        history = alpaca_prompt(record) if prompt == "instruction" else prompt_turns(record, prompt)
        return [[*history, turn] for turn in turns]

    return read


# ---- Two answers and a verdict

VERDICTS = {  # a vote in lower case: the share of it that counts for the first answer
    **dict.fromkeys(("1", "a", "model_a", "response_a", "output_1"), 1.0),
    **dict.fromkeys(("2", "b", "model_b", "response_b", "output_2"), 0.0),
    **dict.fromkeys(("tie", "tie (bothbad)", "both_bad"), 0.5),
}


def judged_pair(first: str, second: str, verdict: str) -> Read:
    """A reader of the answers in the keys `first` and `second`; the better one by `verdict` comes first."""

    def read(record: dict) -> list[list[Message]]:
        keys = ("instruction", "prompt", "question", "input")
        sides = answers(next((key for key in keys if key in record), "prompt"), first, second)(record)
        return sides if first_wins(record, verdict) >= 0.5 else sides[::-1]

    return read


def first_wins(record: dict, key: str) -> float:
    """The share of the votes in ``record[key]``, one or a list, for the first answer; 0.5 is a tie."""
    votes = required(record, key)
    votes = votes if isinstance(votes, list) else [votes]
    if not votes:
        raise Fault(f"{key}: expected a verdict, found an empty list")
    names = [f"{vote:g}" if kind(vote) == "a number" else str(vote).lower() for vote in votes]
    for vote, name in zip(votes, names, strict=True):
        if name not in VERDICTS:
            expected = "1, 2, 'model_a', 'model_b', 'tie' or a list of such votes"
            raise Fault(f"{key}: expected {expected}, found {show(vote)}")
    return sum(VERDICTS[name] for name in names) / len(names)


# ---- Implicit prompts: chosen and rejected both contain it


def conversations(*keys: str) -> Read:
    """A reader of the whole conversation in each of `keys`."""
    return lambda record: [messages(required(record, key), key) for key in keys]


def is_transcript(value) -> bool:
    return isinstance(value, str) and value.lstrip().startswith("Human:") and "\n\nAssistant:" in value


def transcript(value: str, where: str) -> list[Message]:
    r"""The turns of an HH transcript (Anthropic): "\n\nHuman: ... \n\nAssistant: ...", one space after a tag.

    A tag starts a paragraph; "Human:" inside a paragraph is text. The last tag starts the response. Before
    it the roles alternate, so a tag that repeats the role is text of that turn.
    """
    if not is_transcript(value):
        raise Fault(f"{where}: expected a transcript: 'Human:' first, then an 'Assistant:' paragraph")
    pieces = re.split(r"\n\n(Human|Assistant):", "\n\n" + value.lstrip())[1:]
    turns: list[tuple[str, list[str]]] = []
    for place in range(0, len(pieces), 2):
        tag, content = pieces[place : place + 2]
        role = "user" if tag == "Human" else "assistant"
        if turns and turns[-1][0] == role and place + 2 < len(pieces):
            turns[-1][1].append(f"\n\n{tag}:{content}")
        else:
            turns.append((role, [content.removeprefix(" ")]))
    return [Message(role, "".join(parts)) for role, parts in turns]


def transcript_pair(record: dict) -> list[list[Message]]:
    return [transcript(text(required(record, key), key), key) for key in ("chosen", "rejected")]


def text_pair(record: dict) -> list[list[Message]]:
    """The prompt is the common beginning of both texts, cut between words."""
    chosen, rejected = (text(required(record, key), key) for key in ("chosen", "rejected"))
    for key, value in (("chosen", chosen), ("rejected", rejected)):
        if not value.strip():
            raise Fault(f"{key}: is empty")
    cut = shared_words(chosen, rejected)
    if not cut:
        raise Fault("chosen and rejected share no first word that could be the prompt; add a key 'prompt'")
    user = Message("user", chosen[:cut].rstrip())
    return [[user, Message("assistant", side[cut:].lstrip())] for side in (chosen, rejected)]


def shared_words(first: str, second: str) -> int:
    """Length of the longest common beginning that ends between words and leaves text on both sides; else 0.

    "The answer is 12." and "The answer is 123." share "The answer is", not the "12" of both numbers.
    """
    longest = min(len(first.rstrip()), len(second.rstrip())) - 1
    longest = next((place for place in range(longest) if first[place] != second[place]), longest)
    indent = len(first) - len(first.lstrip())  # A prompt must not be white space alone.
    for cut in range(longest, indent, -1):
        if between_words(first[cut - 1], first[cut]) and between_words(second[cut - 1], second[cut]):
            return cut
    return 0


# Chinese and Japanese have no spaces: a place beside one of their characters or marks is between words.
UNSPACED = re.compile("[\u3001-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
                      "\uff01-\uff0f\uff1a-\uff20\U00020000-\U0003ffff]")  # fmt: skip


def between_words(before: str, after: str) -> bool:
    if unicodedata.category(after).startswith("M") or after == "\u200d":
        return False  # A combining mark, a variation selector or a joiner belongs to the character before it.
    return any(character.isspace() or UNSPACED.match(character) for character in (before, after))
