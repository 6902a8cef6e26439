"""Right answers by turn: a model answers conversations of unrelated questions, one question after another."""

import random

from dataset.records import Message
from dataset.tokenizer import ChatTokenizer
from eval.common import generating
from eval.terminal import cells
from eval.verdict import score
from eval.words import tr
from model.generate import generate
from model.transformer import Transformer

LANGUAGES = {"English": ("en",), "Chinese": ("zh",), "mixed": ("en", "zh")}


def right_by_turn(
    model: Transformer,
    tokenizer: ChatTokenizer,
    records: list[dict],
    conversations: int = 40,
    turns: int = 6,
    max_new_tokens: int = 64,
    seed: int = 0,
) -> dict[str, list[float]]:
    """Share of right greedy answers at each turn, for each of `LANGUAGES`.

    A conversation asks `turns` of the one-message prompts in `records`, without repetition. The model's own
    answers stay in the conversation.
    """
    shares = {}
    for name, languages in LANGUAGES.items():
        draw = random.Random(seed)
        pool = [r for r in records if len(r["prompt"]) == 1 and r["judge"]["language"] in languages]
        questions = [draw.sample(pool, turns) for _ in range(conversations)]
        histories: list[list[Message]] = [[] for _ in questions]
        shares[name] = []
        for turn in range(turns):
            for history, asked in zip(histories, questions, strict=True):
                history += asked[turn]["prompt"]
            prompts = [tokenizer.prompt(history) for history in histories]
            options = dict(max_new_tokens=max_new_tokens, temperature=0, batch_size=conversations)
            with generating(model):
                answers = generate(model, prompts, tokenizer.end_id, **options)
            right = 0
            for history, asked, answer in zip(histories, questions, answers, strict=True):
                text = tokenizer.decode(answer.tokens)
                history.append(Message("assistant", text))
                right += score(asked[turn], text, answer.finished).right
            shares[name].append(right / conversations)
    return shares


def table(shares: dict[str, list[float]]) -> str:
    """The shares of `right_by_turn` in per cent, one line a language."""
    turns = len(next(iter(shares.values())))
    rows = [(tr("right answers, turn"), [f"{turn:>7}" for turn in range(1, turns + 1)])]
    rows += [(tr(name), [f"{share:>7.0%}" for share in row]) for name, row in shares.items()]
    return "\n".join(label + " " * (20 - cells(label)) + "".join(numbers) for label, numbers in rows)
