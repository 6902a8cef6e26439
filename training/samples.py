"""Answers to a few held-out prompts, written at every evaluation: what the policy generates, step by step.

    OUT/samples.jsonl contains a row for each prompt of each evaluation:
    {"step": 40, "prompt": "What colour is grass?", "answer": "Green.", "finished": true, "tokens": 3}

`tokens` counts the answer without its end token. `finished` is false if the answer reached the limit.
"""

from contextlib import nullcontext

import numpy as np
import torch

from dataset.packing import spread
from dataset.store import TokenStore
from dataset.tokenizer import ChatTokenizer
from model.generate import generate
from model.transformer import Transformer
from training.distributed import World
from training.settings import TrainSettings, default_length

# Both limits bound the cost of an evaluation: its samples take the time of 128 small forwards, and the memory
# of 640 tokens' keys and values for each prompt.
ANSWER_TOKENS = 128
PROMPT_TOKENS = 512


def held_out_prompts(
    settings: TrainSettings, held_out: dict[str, TokenStore], model: Transformer, world: World
) -> list[list[int]]:
    """The ids of at most --sample-prompts different prompts, spread evenly over the first held-out set.

    Prints one line if there are none although they were requested.
    """
    if not held_out or not settings.sample_prompts:
        return []
    data = next(iter(held_out.values()))
    if settings.shard and world.ranks > 1:
        # A token of an answer is a forward, and each forward would gather all weights from all ranks.
        world.print("no samples: with --shard they are too slow; python -m eval.chat shows answers later")
        return []
    longest = min(PROMPT_TOKENS, default_length(model.config) - ANSWER_TOKENS)
    fits = np.flatnonzero(data.bounds[:, 1] - data.bounds[:, 0] <= longest)
    if not len(fits):
        world.print(f"no samples: every held-out prompt has more than {longest} tokens")
        return []
    _, first = np.unique(data.digests[fits], return_index=True)
    rows = fits[np.sort(first)]
    return [data.row(row)[0][0].tolist() for row in rows[spread(len(rows), settings.sample_prompts)]]


def greedy_answers(
    model: Transformer, tokenizer: ChatTokenizer, prompts: list[list[int]], world: World, compiled: bool
) -> list[dict]:
    """The greedy answer to each prompt, as the rows above without the step. Every rank must call it.

    The main rank generates; the others wait. Computes in float32, as `eval.chat` does.
    """

    def answer() -> list[dict]:
        # A cache of keys is another context than a stream: compiled layers would be compiled again.
        with torch.compiler.set_stance("force_eager") if compiled else nullcontext():
            answers = generate(model, prompts, tokenizer.end_id, ANSWER_TOKENS, temperature=0)
        return [
            {
                "prompt": prompt_text(prompt, tokenizer),
                "answer": tokenizer.decode(answer.tokens),
                "finished": answer.finished,
                "tokens": len(answer.tokens),
            }
            for prompt, answer in zip(prompts, answers, strict=True)
        ]

    return world.from_main(answer) if prompts else []


def prompt_text(prompt: list[int], tokenizer: ChatTokenizer) -> str:
    """The text of a single user turn; of several turns, also the template between their texts."""
    template = tokenizer.template
    return tokenizer.decode(prompt).removeprefix(template.before_user).removesuffix(template.user_to_answer)
