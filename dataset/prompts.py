"""The prompts of any data file, and the file of sampled answers.

    read_prompts("pairs.jsonl")      # also conversations, prompts alone, and a .txt file, one prompt a line
    [{"prompt": [{"role": "user", "content": "2 + 2?"}], "judge": {…}}, …]

`eval.sample` adds answers to these records, `eval.score` a score to each answer, and `dataset.pair` makes
pairs of them:

    {"prompt": […], "judge": {…}, "answers": [{"text": "4", "tokens": 1, "finished": true, "score": 2.0}, …]}

`tokens` counts the answer without its end token. `finished`: the model generated the end token. `model` is
the folder of the model, if two models answered. A score is null where there was nothing to score with.
"""

from collections.abc import Iterator
from pathlib import Path

from dataset.formats import PREFERENCE_FORMATS, PROMPT_KEYS, SFT_FORMATS, SIDES, describe, detect_format
from dataset.jsonl import DataError, kind, read_values, show
from dataset.other_files import require_data_file
from dataset.records import SCORE_KEYS, is_number, read_preferences
from dataset.turns import Fault, Message, alpaca_prompt, checked_turns, messages, prompt_turns, system_message
from errors import InputError, require

# The keys of a prompt and of a reply in a record that is not a pair. The first one that is there counts.
PROMPTS = ("messages", "conversations", "instruction", "prompt", "question")
REPLIES = ("response", "completion", "answer", "output")
# The other fields of a record are kept, for a judge or a scorer.
EXAMPLES = [form.example for form in (*PREFERENCE_FORMATS.values(), *SFT_FORMATS.values())]
USED = {
    *PROMPT_KEYS,
    *SIDES,
    *REPLIES,
    *SCORE_KEYS,
    "system",
    "win_probability",
    "label",
    "scores",
    "answers",
}
USED.update(*EXAMPLES)


def read_prompts(path: str | Path) -> list[dict]:
    """For each record of a data file its prompt as ``{role, content}`` messages, and its further fields.

    The reply of a conversation is kept as ``reply``: a scorer can compare answers with it. Raises `DataError`
    at the first record without a prompt.
    """
    if str(path).endswith(".txt"):
        return text_prompts(path)
    first = next((record for _, record in read_values(path) if isinstance(record, dict)), {})
    records = []
    for record, prompt, reply in (of_pairs if detect_format(first) else of_others)(path):
        kept = {key: value for key, value in record.items() if key not in USED}
        turns = [{"role": turn.role, "content": turn.content} for turn in prompt]
        records.append({"prompt": turns, **({} if reply is None else {"reply": reply}), **kept})
    return records


def text_prompts(path: str | Path) -> list[dict]:
    """The lines of a text file as prompts; blank lines are left out."""
    require_data_file(path)
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read as UTF-8 text ({error})") from None
    prompts = [line.strip() for line in lines if line.strip()]
    require(prompts, f"{path}: the file has no prompt; expected one a line")
    return [{"prompt": [{"role": "user", "content": prompt}]} for prompt in prompts]


Prompt = tuple[dict, list[Message], str | None]  # a record, its prompt, and the reply if it has one


def of_pairs(path: str | Path) -> Iterator[Prompt]:
    for (_, record), pair in zip(read_values(path), read_preferences(path), strict=True):
        if isinstance(pair, DataError):
            raise pair
        yield record, list(pair.prompt), None


def of_others(path: str | Path) -> Iterator[Prompt]:
    for line, record in read_values(path):
        if isinstance(record, DataError):
            raise record
        try:
            if not isinstance(record, dict):
                raise Fault(f"expected an object, found {kind(record)}")
            yield record, *split_reply(record)
        except Fault as fault:
            raise DataError(path, line, str(fault)) from None


def split_reply(record: dict) -> tuple[list[Message], str | None]:
    """The prompt of a record that is not a pair, and the assistant's reply to it or None."""
    key = next((key for key in PROMPTS if key in record), None)
    if key is None:
        raise Fault(f"found {describe(record)}; expected a prompt in one of the keys {', '.join(PROMPTS)}")
    if key == "instruction":
        turns = alpaca_prompt(record)
    else:
        turns = messages(record[key], key) if key in PROMPTS[:2] else prompt_turns(record, key)
    turns = system_message(record) + turns
    reply = next((record[key] for key in REPLIES if isinstance(record.get(key), str)), None)
    if reply is None and len(turns) > 1 and turns[-1].role == "assistant":
        reply = turns.pop().content
    return checked_turns(turns, key, last="user"), reply


# ---- Sampled answers


def is_answers(path: str | Path) -> bool:
    """Whether the first record of a file has sampled answers."""
    first = next((record for _, record in read_values(path)), None)
    return isinstance(first, dict) and isinstance(first.get("answers"), list)


def read_answers(path: str | Path) -> list[dict]:
    """The records of a file of sampled answers. Raises `DataError` at the first one of another form."""
    records = []
    for line, record in read_values(path):
        if isinstance(record, DataError):
            raise record
        answers = record.get("answers") if isinstance(record, dict) else None
        if not isinstance(answers, list) or not isinstance(record.get("prompt"), list):
            raise DataError(path, line, "expected a record of eval.sample: `prompt` and `answers` are lists")
        for answer in answers:
            if not isinstance(answer, dict) or not isinstance(answer.get("text"), str):
                raise DataError(path, line, f"expected an answer with `text`, found {show(answer)}")
            if not (answer.get("score") is None or is_number(answer["score"])):
                raise DataError(
                    path, line, f"score: expected a number or null, found {show(answer['score'])}"
                )
        records.append(record)
    return records


def as_messages(record: dict) -> list[Message]:
    """The prompt of a record of this file."""
    return [Message(turn["role"], turn["content"]) for turn in record["prompt"]]
