"""One decoded record in, conversations out: a small function for every shape of record.

Nothing is repaired: text is kept to the last space, or the record is a `Fault` that says what is wrong. Two
things are left out as meaningless: white space where an implicit prompt is cut, and a blank system message.
"""

import re
import unicodedata
from dataclasses import dataclass
from itertools import zip_longest

from dataset.jsonl import kind, show

ROLES = {"system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant"}
# What these hold would be lost without a word, since a message is plain text here.
UNSUPPORTED = ("tools", "tool_calls", "tool_call_id", "function_call", "images", "image", "videos", "audios",
               "reasoning_content", "thinking")  # fmt: skip


class Fault(ValueError):
    """Why a record is refused. The reader adds path and line."""


@dataclass(frozen=True)
class Message:
    role: str  # "system", "user" or "assistant"
    content: str


# ---- What the shapes share: text, messages, turns


def get(record: dict, key: str):
    if key not in record:
        raise Fault(f"missing key {show(key)}")
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
    """{role, content}, or ShareGPT's {from, value}. Content is text, or text parts, which are joined."""
    if not isinstance(entry, dict):
        raise Fault(f"{where}: expected a message, found {kind(entry)}")
    refuse_unsupported(entry, where)
    role_key, content_key = ("from", "value") if "from" in entry else ("role", "content")
    for key in (role_key, content_key):
        if key not in entry:
            raise Fault(f"{where}: missing key {show(key)}")
    role, content = entry[role_key], entry[content_key]
    if not isinstance(role, str) or role not in ROLES:
        raise Fault(f"{where}: unknown role {show(role)}; accepted: {', '.join(ROLES)}, no tools")
    if isinstance(content, list):
        content = "".join(text_part(part, f"{where}, part {place}") for place, part in enumerate(content))
    return Message(ROLES[role], text(content, where))


def text_part(part, where: str) -> str:
    if not isinstance(part, dict) or part.get("type") != "text":
        found = show(part.get("type")) if isinstance(part, dict) else kind(part)
        raise Fault(f"{where}: expected type 'text', found {found}; only text is supported")
    return text(get(part, "text" if "text" in part else "value"), where)


def messages(value, where: str) -> list[Message]:
    if not isinstance(value, list) or not value:
        raise Fault(f"{where}: expected messages, found {'an empty list' if value == [] else kind(value)}")
    return [message(entry, f"{where}[{turn}]") for turn, entry in enumerate(value)]


def refuse_unsupported(entry: dict, where: str) -> None:
    for key in UNSUPPORTED:
        if entry.get(key) not in (None, False, "", "[]", [], {}):
            raise Fault(f"{where}: {show(key)} is not supported, only plain text is")


def system_message(record: dict) -> list[Message]:
    """The optional column ``system``, as the list with which the record's conversations start."""
    if record.get("system") is None:
        return []
    return [Message("system", text(record["system"], "system"))]


def require_last(turns: list[Message], where: str, role: str) -> None:
    if turns[-1].role != role:
        raise Fault(f"{where}: the last turn ({len(turns) - 1}) is {turns[-1].role}, expected {role}")


def checked_turns(turns: list[Message], where: str, last: str = "assistant") -> list[Message]:
    """``turns``, if they are an optional system turn, then user and assistant by turns up to ``last``."""
    require_last(turns, where, last)
    start = 1 if turns[0].role == "system" else 0
    for turn in range(start, len(turns)):
        role, due = turns[turn].role, ("user", "assistant")[(turn - start) % 2]
        if role != due:
            raise Fault(f"{where}: turn {turn} is {role}, expected {due}")
        if not turns[turn].content.strip():
            raise Fault(f"{where}: turn {turn} ({role}) is empty")
    return turns[1:] if start and not turns[0].content.strip() else turns


def split_pair(chosen: list[Message], rejected: list[Message]) -> tuple[tuple[Message, ...], str, str]:
    """Two whole conversations → (prompt, chosen, rejected). They must agree in all but the last turn.

    With two different prompts the partition function Z(x) would not cancel, and the loss would not be DPO's.
    """
    require_last(chosen, "chosen", "assistant")
    require_last(rejected, "rejected", "assistant")
    for turn, (left, right) in enumerate(zip_longest(chosen[:-1], rejected[:-1])):
        if left != right:
            raise Fault(f"chosen and rejected have different prompts: they differ from turn {turn} on")
    chosen, rejected = checked_turns(chosen, "chosen"), checked_turns(rejected, "rejected")
    return tuple(chosen[:-1]), chosen[-1].content, rejected[-1].content


# ---- Explicit prompts


def asked(record: dict, key: str) -> list[Message]:
    """The prompt in ``record[key]``: text, which is one user turn, or messages."""
    prompt = get(record, key)
    if is_transcript(prompt):
        raise Fault(f"{key}: a Human/Assistant transcript; put the whole transcripts in chosen and rejected")
    history = messages(prompt, key) if isinstance(prompt, list) else [Message("user", text(prompt, key))]
    checked_turns(history, key, last="user")
    return history


def answered(history: list[Message], record: dict, key: str) -> list[Message]:
    """``history`` with the answer in ``record[key]``: text, a message, or messages.

    UltraFeedback's messages repeat the history; to append them would ask every question twice.
    """
    answer = get(record, key)
    if not isinstance(answer, (list, dict)):
        return [*history, Message("assistant", text(answer, key))]
    turns = messages([answer] if isinstance(answer, dict) else answer, key)
    if turns[0].role == "assistant":
        return history + turns
    # The copies may differ in a system turn before them and in white space around them; this copy is kept.
    start = 1 if turns[0].role == "system" and history[0].role != "system" else 0
    repeated = turns[start : start + len(history)]
    if [(m.role, m.content.strip()) for m in repeated] != [(m.role, m.content.strip()) for m in history]:
        raise Fault(f"{key}: its first turns neither answer the prompt nor repeat it")
    return turns


def explicit_pair(record: dict, key: str = "prompt") -> tuple[list[Message], list[Message]]:
    history = asked(record, key)
    return answered(history, record, "chosen"), answered(history, record, "rejected")


def alpaca_prompt(record: dict) -> list[Message]:
    """history [[question, answer], ...], then the instruction, with its input on the next line."""
    turns = []
    history = [] if record.get("history") is None else record["history"]
    if not isinstance(history, list):
        raise Fault(f"history: expected a list, found {kind(history)}")
    for place, pair in enumerate(history):
        if not isinstance(pair, list) or len(pair) != 2:
            raise Fault(f"history[{place}]: expected [question, answer], found {kind(pair)}")
        turns.append(Message("user", text(pair[0], f"history[{place}][0]")))
        turns.append(Message("assistant", text(pair[1], f"history[{place}][1]")))
    parts = [text(get(record, "instruction"), "instruction")]
    parts += [] if record.get("input") is None else [text(record["input"], "input")]
    return [*turns, Message("user", "\n".join(part for part in parts if part))]


def alpaca_pair(record: dict) -> tuple[list[Message], list[Message]]:
    history = alpaca_prompt(record)
    return answered(history, record, "chosen"), answered(history, record, "rejected")


def ranked_pair(record: dict) -> tuple[list[Message], list[Message]]:
    """Replies, the best one first: it is chosen, and the last one is rejected."""
    replies = get(record, "output")
    if not isinstance(replies, list) or len(replies) < 2:
        raise Fault("output: expected a list of two replies or more, the best one first")
    turns = [Message("assistant", text(reply, f"output[{rank}]")) for rank, reply in enumerate(replies)]
    history = alpaca_prompt(record)
    return [*history, turns[0]], [*history, turns[-1]]


# ---- Implicit prompts: chosen and rejected both hold it


def messages_pair(record: dict, sides=("chosen", "rejected")) -> tuple[list[Message], list[Message]]:
    chosen, rejected = (messages(get(record, key), key) for key in sides)
    return chosen, rejected


def is_transcript(value) -> bool:
    return isinstance(value, str) and value.lstrip().startswith("Human:") and "\n\nAssistant:" in value


def transcript(said: str, where: str) -> list[Message]:
    r"""Anthropic's HH: "\n\nHuman: ... \n\nAssistant: ...", with one space after a tag.

    A tag starts a paragraph; "Human:" within one is text. The last tag opens the response. Before it the
    speakers alternate, so a tag that does not change the speaker is text of that turn.
    """
    if not is_transcript(said):
        raise Fault(f"{where}: expected a transcript: 'Human:' first, then an 'Assistant:' paragraph")
    pieces = re.split(r"\n\n(Human|Assistant):", "\n\n" + said.lstrip())[1:]
    turns: list[tuple[str, list[str]]] = []
    for place in range(0, len(pieces), 2):
        tag, content = pieces[place : place + 2]
        role = "user" if tag == "Human" else "assistant"
        if turns and turns[-1][0] == role and place + 2 < len(pieces):
            turns[-1][1].append(f"\n\n{tag}:{content}")
        else:
            turns.append((role, [content.removeprefix(" ")]))
    return [Message(role, "".join(parts)) for role, parts in turns]


def transcript_pair(record: dict) -> tuple[list[Message], list[Message]]:
    chosen, rejected = (transcript(text(get(record, key), key), key) for key in ("chosen", "rejected"))
    return chosen, rejected


def text_pair(record: dict) -> tuple[list[Message], list[Message]]:
    """The prompt is the beginning that both texts share, cut between words."""
    chosen, rejected = (text(get(record, key), key) for key in ("chosen", "rejected"))
    for key, value in (("chosen", chosen), ("rejected", rejected)):
        if not value.strip():
            raise Fault(f"{key}: is empty")
    cut = shared_words(chosen, rejected)
    if not cut:
        raise Fault("chosen and rejected share no first word that could be the prompt; add a key 'prompt'")
    user = Message("user", chosen[:cut].rstrip())
    chosen, rejected = ([user, Message("assistant", side[cut:].lstrip())] for side in (chosen, rejected))
    return chosen, rejected


def shared_words(first: str, second: str) -> int:
    """Length of the longest common beginning that ends between words and leaves both sides something to say.

    "The answer is 12." and "The answer is 123." share "The answer is", not a number cut in two.
    """
    longest = min(len(first.rstrip()), len(second.rstrip())) - 1
    longest = next((place for place in range(longest) if first[place] != second[place]), longest)
    indent = len(first) - len(first.lstrip())  # A prompt of white space alone is none.
    for cut in range(longest, indent, -1):
        if between_words(first[cut - 1], first[cut]) and between_words(second[cut - 1], second[cut]):
            return cut
    return 0


# Chinese and Japanese write no spaces: any place beside one of their characters or marks is between words.
UNSPACED = re.compile("[\u3001-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
                      "\uff01-\uff0f\uff1a-\uff20\U00020000-\U0003ffff]")  # fmt: skip


def between_words(before: str, after: str) -> bool:
    if unicodedata.category(after).startswith("M") or after == "\u200d":
        return False  # A combining mark, a variation selector or a joiner belongs to what stands before it.
    return any(character.isspace() or UNSPACED.match(character) for character in (before, after))
