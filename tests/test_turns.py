"""Right answers by turn.  python -m pytest tests/test_turns.py"""

from collections import Counter
from pathlib import Path

import pytest

from dataset.records import Message
from dataset.tokenizer import ChatTokenizer
from eval import turns
from model.generate import Answer
from tests.conftest import make_model

TOKENIZER = ChatTokenizer(Path(turns.__file__).parent.parent / "dataset" / "sample" / "tokenizer.json")


def record(question: str, value: str, language: str, before: tuple = ()) -> dict:
    judge = {"task": "any", "language": language, "check": "number", "accept": [value], "given": []}
    return {"prompt": [*before, Message("user", question)], "judge": judge}


RECORDS = [record(f"What is {n}?", str(n), "en") for n in range(4)]
RECORDS += [record(f"{n}是多少？", str(n), "zh") for n in range(4, 8)]
RECORDS.append(record("And 9?", "9", "en", (Message("user", "Hi."), Message("assistant", "Hello."))))


@pytest.fixture
def replies(monkeypatch):
    """A model that answers the first two questions of a conversation right; yields all prompts it read."""
    read = []

    def generate(model, prompts, end_id, max_new_tokens, temperature, batch_size):
        assert temperature == 0
        answers = []
        for text in map(TOKENIZER.decode, prompts):
            read.append(text)
            questions = [part for part in text.split("<|im_start|>") if part.startswith("user\n")]
            value = next(char for char in questions[-1] if char.isdigit())
            said = f"It is {value}." if len(questions) <= 2 else "It is 99."
            answers.append(Answer(TOKENIZER.text(said), finished=True))
        return answers

    monkeypatch.setattr(turns, "generate", generate)
    return read


def test_shares_are_by_turn_and_answers_stay_in_the_conversation(replies):
    """A measurement that restarts the conversation at each turn would see 100 % everywhere."""
    shares = turns.right_by_turn(make_model(8), TOKENIZER, RECORDS, conversations=5, turns=3)
    assert shares == {name: [1.0, 1.0, 0.0] for name in ("English", "Chinese", "mixed")}
    third = [text for text in replies if text.count("<|im_start|>user") == 3]
    assert len(third) == 15 and all(text.count("It is ") == 2 for text in third)


def test_questions_are_single_messages_of_the_language_without_repetition(replies):
    turns.right_by_turn(make_model(8), TOKENIZER, RECORDS, conversations=5, turns=4)
    assert not any("And 9?" in text for text in replies)
    last = [text for text in replies if text.count("<|im_start|>user") == 4]
    for text in last:
        asked = Counter(part for part in text.split("<|im_start|>") if part.startswith("user\n"))
        assert max(asked.values()) == 1
    assert all("是多少" not in text for text in last[:5])
    assert all("What is" not in text for text in last[5:10])


def test_the_same_seed_gives_the_same_conversations(replies):
    for seed in (1, 1, 2):
        turns.right_by_turn(make_model(8), TOKENIZER, RECORDS, conversations=5, turns=4, seed=seed)
    first, again, other = (replies[n * 60 : (n + 1) * 60] for n in range(3))
    assert first == again != other


def test_table_has_a_line_for_each_language():
    lines = turns.table({"English": [1.0, 0.5], "mixed": [0.25, 0.0]}).splitlines()
    assert [line.split() for line in lines[1:]] == [["English", "100%", "50%"], ["mixed", "25%", "0%"]]
