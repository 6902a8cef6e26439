"""Score preference pairs, or the sampled answers of eval.sample.

    python -m eval.score --model runs/reward --data pairs.jsonl --out scored.jsonl
    python -m eval.score --model runs/reward-0,runs/reward-1 --data answers.jsonl --out scored.jsonl
    python -m eval.score --scorer rules.py:polite --data answers.jsonl --out scored.jsonl
    torchrun --standalone --nproc-per-node 4 -m eval.score --model DIR --data pairs.jsonl --out scored.jsonl

Writes the records as JSON lines in their order, with all their fields. Each answer of `answers` gets a
`score`. A pair gets `score_chosen` and `score_rejected`, the soft labels of ``train_dpo.py --loss soft``. Its
`win_probability` is removed, because training would use it instead of the scores. Pairs that training drops
(too long, or equal sides) are left out and counted, so that every pair of the file has scores.
`eval/scorers.py` describes the function of --scorer.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from dataset.jsonl import DataError, read_values
from dataset.prompts import is_answers, read_answers
from dataset.records import read_preferences
from dataset.store import open_store
from errors import InputError, require, run_script
from eval.common import PairFlags, length_limit, load_model_and_tokenizer, print_note, print_start
from eval.scorers import PESSIMISM_WHY, SCORER_WHY, ensemble, make_scorer
from files import write_lines
from model.reward import RewardModel
from model.weights import require_folder
from training.distributed import World, join
from training.evaluate import evaluate_rewards, score_pairs
from training.precision import Precision
from training.settings import flag, parse


@dataclass
class Settings(PairFlags):
    model: str = flag("runs/reward", "reward model folder, or several, separated by commas")
    data: str = flag("", "preference pairs, or answers of eval.sample: .jsonl or .json, also .gz")
    out: str = flag("", ".jsonl file for the scored records; may be --data itself")
    scorer: str = flag("", SCORER_WHY)
    pessimism: float = flag(0.0, PESSIMISM_WHY)

    def __post_init__(self) -> None:
        if not self.data or not self.out:
            raise InputError("give --data, the pairs to score, and --out, the file for the scored pairs")
        self.at_least(0, "pessimism")
        if not self.out.endswith(".jsonl"):
            raise InputError(f"--out {self.out}: the name must end in .jsonl, the format of scored pairs")
        super().__post_init__()


def main(arguments: list[str] | None = None) -> None:
    settings = parse(Settings, __doc__.split("\n")[0], arguments)
    with join(settings.device) as world:
        score(settings, world)


def score(settings: Settings, world: World) -> None:
    """Write the scored records, and print a line about the scores."""
    for folder in [] if settings.scorer else settings.model.split(","):
        require_folder(Path(folder))
    if is_answers(settings.data):
        score_answers(settings, world)
        return
    scores = (pairs_by_function if settings.scorer else pairs_by_models)(settings, world)
    require(scores, f"{settings.data}: no pair could be scored")
    if not world.is_main:
        return
    if removed := write_scored(settings.out, settings.data, scores):
        print_note(f"removed win_probability from {removed} records: training would prefer it to the scores")
    figures = evaluate_rewards(torch.tensor([*scores.values()]))
    print_note(
        f"{settings.out}: {len(scores)} pairs; the chosen answer has the higher score in "
        f"{figures['rewards/accuracies']:.1%}, by {figures['rewards/margins']:.3g} on average"
    )


def score_answers(settings: Settings, world: World) -> None:
    """Give each answer of a file of `eval.sample` its score."""
    records = read_answers(settings.data)
    options = settings.precision, settings.max_length, settings.micro_batch_tokens
    models = "" if settings.scorer else settings.model
    scores = make_scorer(settings.scorer, models, settings.pessimism, world, *options)(records)
    if not world.is_main:
        return
    for record, row in zip(records, scores, strict=True):
        for answer, value in zip(record["answers"], row, strict=True):
            answer["score"] = value
    write_lines(settings.out, records)
    found = [value for row in scores for value in row if value is not None]
    left = sum(map(len, scores)) - len(found)
    mean = f"mean score {sum(found) / len(found):.3g}" if found else "no score"
    print_note(f"{settings.out}: {len(found)} answers to {len(records)} prompts; {mean}; {left} too long")


Scored = dict[int, list[float]]  # place of a pair in the file: the scores of its chosen and rejected answer


def pairs_by_function(settings: Settings, world: World) -> Scored:
    """The scores by --scorer of all pairs of the file."""
    records = {}
    pairs = zip(read_values(settings.data), read_preferences(settings.data, settings.shape), strict=True)
    for place, ((_, record), pair) in enumerate(pairs):
        if not isinstance(pair, DataError):
            prompt = [{"role": turn.role, "content": turn.content} for turn in pair.prompt]
            sides = [{"text": pair.chosen}, {"text": pair.rejected}]
            records[place] = {**record, "prompt": prompt, "answers": sides}
        elif not settings.skip_bad:
            raise pair
    scores = make_scorer(settings.scorer, "", 0, world)([*records.values()])
    return dict(zip(records, scores, strict=True))


def pairs_by_models(settings: Settings, world: World) -> Scored:
    """The rewards of the pairs that are not too long for any of the models."""
    of_models = []
    for folder in settings.model.split(","):
        model, tokenizer = load_model_and_tokenizer(folder, world.device, RewardModel)
        length = length_limit(settings.max_length, folder, model.config)
        precision = Precision(settings.precision, world.device)
        if world.is_main:
            print_start({folder: model}, world.device, precision.reason)
        read = length, settings.shape, settings.skip_bad
        pairs = world.node_first(lambda: open_store(settings.data, "preferences", tokenizer, *read))  # noqa: B023
        if world.is_main:
            print_note(f"{settings.data}: {pairs.report}")
        rewards = score_pairs(model, pairs, world, precision, settings.layout, settings.micro_batch_tokens)
        of_models.append(dict(zip(pairs.records.tolist(), rewards.tolist(), strict=True)))
    places = [place for place in of_models[0] if all(place in scores for scores in of_models)]
    each = [[scores[place] for place in places] for scores in of_models]
    return dict(zip(places, ensemble(each, settings.pessimism), strict=True))


def write_scored(path: str, source: str, scores: Scored) -> int:
    """Write the records of `source` that have scores, with them.

    Returns the number of records that had a `win_probability`. The file appears complete or not at all.
    """
    removed = 0

    def scored() -> Iterator[dict]:
        nonlocal removed
        for place, (_, record) in enumerate(read_values(source)):
            if place in scores:
                removed += record.pop("win_probability", None) is not None
                record["score_chosen"], record["score_rejected"] = scores[place]
                yield record

    write_lines(path, scored())
    return removed


if __name__ == "__main__":
    run_script(main)
