"""Scores of answers: by the bundled judge, by a function of the user, or by reward models.

    scorer = make_scorer("judge", "", 0, world)                          # records with a `judge` field
    scorer = make_scorer("rules.py:polite", "", 0, world)
    scorer = make_scorer("", "runs/reward-0,runs/reward-1", 1.0, world)  # mean − 1.0 · std of the two
    scorer(records)                                                      # one list of scores per record

A record has `prompt`, messages, and `answers`, each with `text`; see dataset/prompts.py. The user's function
gets a record and the text of an answer, and returns a number; higher is better:

    def polite(record, answer):
        return float("please" in answer.lower())
"""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from dataset.jsonl import show
from dataset.prompts import as_messages
from dataset.records import is_number
from dataset.tokenizer import ChatTokenizer
from errors import InputError, require
from eval import verdict
from eval.common import length_limit, load_model_and_tokenizer, print_start
from model.reward import RewardModel
from training.distributed import World
from training.evaluate import MAX_TOKENS, batches
from training.precision import Precision
from training.settings import Flags, flag

SCORER_WHY = "score by a function, file.py:function, or by the judge of records with a `judge` field: judge"
PESSIMISM_WHY = "k of mean − k·std, the score by several reward models; 0: their mean"

Scores = list[list[float | None]]  # for each record those of its answers; None: it could not be scored
Scorer = Callable[[list[dict]], Scores]


@dataclass
class ScorerFlags(Flags):
    """The flags of the commands that score answers in one of these ways."""

    scorer: str = flag("", SCORER_WHY)
    reward: str = flag("", "score by a reward model folder, or by several, separated by commas")
    pessimism: float = flag(0.0, PESSIMISM_WHY)

    def __post_init__(self) -> None:
        self.at_least(0, "pessimism")
        require(not (self.scorer and self.reward), "--scorer and --reward are two ways to score: choose one")


def make_scorer(scorer: str, reward: str, pessimism: float, world: World, *options) -> Scorer:
    """A function from records to the scores of their answers. `options` are those of `reward_scores`.

    Raises `InputError` if the function or a model cannot be loaded.
    """
    if reward:
        folders = reward.split(",")
        return lambda records: ensemble(
            [reward_scores(folder, records, world, *options) for folder in folders], pessimism
        )
    one = judge if scorer == "judge" else user_function(scorer)
    # One rank calls it: a function may call an API that costs money.
    return lambda records: world.from_main(
        lambda: [[one(record, answer) for answer in record["answers"]] for record in records]
    )


# ---- The judge, and a function of the user


def judge(record: dict, answer: dict) -> float:
    """The points of the bundled judge, 0 to 3."""
    if fault := verdict.rule_fault(record.get("judge")):
        raise InputError(f"prompt {show(record['prompt'][-1]['content'])}: {fault}; give another --scorer")
    return float(verdict.score(record, answer["text"], answer.get("finished", True)).points)


def user_function(name: str) -> Callable[[dict, dict], float]:
    """The function that `file.py:function` names, checked at every call."""
    path, _, function_name = name.rpartition(":")
    require(path, f"--scorer {name}: expected judge, or file.py:function")
    require(Path(path).is_file(), f"--scorer {name}: there is no file {path}")
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    function = getattr(module, function_name, None)
    require(callable(function), f"--scorer {name}: {path} has no function {function_name}")

    def checked(record: dict, answer: dict) -> float:
        value = function(record, answer["text"])
        value = float(value) if isinstance(value, bool) else value
        found = show(value) if not isinstance(value, float) else value
        require(is_number(value), f"--scorer {name}: expected a finite number, found {found}")
        return float(value)

    return checked


# ---- Reward models


class AnswerRows:
    """Records in the form of a `TokenStore`: a row is a prompt and its answers, computed in one stream.

    Answers that are longer than `max_length` tokens with their prompt are left out.
    """

    reference_logps = score_margins = None

    def __init__(self, records: list[dict], tokenizer: ChatTokenizer, max_length: int):
        self.rows, self.places = [], []  # of each row its segments, and where its answers are in `records`
        for i, record in enumerate(records):
            prompt = np.array(tokenizer.prompt(as_messages(record)))
            sides = [np.array(tokenizer.response(answer["text"])) for answer in record["answers"]]
            short = [j for j, side in enumerate(sides) if len(prompt) + len(side) <= max_length]
            if short:
                self.rows.append([prompt, *(sides[j] for j in short)])
                self.places.append([(i, j) for j in short])
        self.lengths = np.array([sum(map(len, row)) for row in self.rows], int)

    def __len__(self) -> int:
        return len(self.rows)

    def row(self, index: int) -> list[tuple]:
        prompt, *sides = self.rows[index]
        return [(prompt, None), *((side, np.ones(len(side), bool)) for side in sides)]


@torch.no_grad()
def reward_scores(
    folder: str,
    records: list[dict],
    world: World,
    precision: str = "auto",
    max_length: int = 0,
    max_tokens: int = MAX_TOKENS,
) -> Scores:
    """The scores of a reward model. It reads an unfinished answer as if it had ended there."""
    model, tokenizer = load_model_and_tokenizer(folder, world.device, RewardModel)
    autocast = Precision(precision, world.device)
    if world.is_main:
        print_start({folder: model}, world.device, autocast.reason)
    store = AnswerRows(records, tokenizer, length_limit(max_length, folder, model.config))
    ends = np.cumsum([0, *map(len, store.places)])  # row i has the answers from ends[i] to ends[i + 1]
    rewards = torch.zeros(ends[-1], dtype=model.score.weight.dtype, device=world.device)
    for rows, stream in batches(store, world, max_tokens, "forked"):
        with autocast.autocast():
            found = model(stream)
        rewards[[k for row in rows for k in range(ends[row], ends[row + 1])]] = found
    scores: Scores = [[None] * len(record["answers"]) for record in records]
    places = (place for row in store.places for place in row)
    for (i, j), value in zip(places, world.sum(rewards).tolist(), strict=True):
        scores[i][j] = value
    return scores


def ensemble(models: list[Scores], pessimism: float) -> Scores:
    """mean − k·std of the models' scores of each answer; None where a model has none.

    Reward models that were trained alike agree on answers like those they saw, and differ elsewhere. There
    the best score is often an error (Coste et al. 2023, arXiv 2310.02743).
    """

    def combined(values: tuple[float | None, ...]) -> float | None:
        return None if None in values else float(np.mean(values) - pessimism * np.std(values))

    rows = zip(*models, strict=True)
    return [[combined(values) for values in zip(*row, strict=True)] for row in rows]
