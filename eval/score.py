"""Score preference pairs with a reward model.

    python -m eval.score --model runs/reward --data pairs.jsonl --out scored.jsonl
    torchrun --standalone --nproc-per-node 4 -m eval.score --model DIR --data pairs.jsonl --out scored.jsonl

Writes the records as JSON lines in their order. Each keeps its fields and gets `score_chosen` and
`score_rejected`, the soft labels of ``train_dpo.py --loss soft``. A `win_probability` is removed, because
training would use it instead of the scores. Pairs that training drops (too long, or equal sides) are left
out and counted, so that every record of the file has scores.
"""

import json
from dataclasses import dataclass

from torch import Tensor

from dataset.jsonl import read_values
from dataset.store import TokenStore, open_store
from errors import InputError, run_script
from eval.common import PairFlags, length_limit, load_model_and_tokenizer, print_note, print_start
from files import write_whole
from model.reward import RewardModel
from training.distributed import World, join
from training.evaluate import evaluate_rewards, score_pairs
from training.precision import Precision
from training.settings import flag, parse


@dataclass
class Settings(PairFlags):
    model: str = flag("runs/reward", "reward model folder")
    out: str = flag("", ".jsonl file for the scored pairs; may be --data itself")

    def __post_init__(self) -> None:
        if not self.data or not self.out:
            raise InputError("give --data, the pairs to score, and --out, the file for the scored pairs")
        if not self.out.endswith(".jsonl"):
            raise InputError(f"--out {self.out}: the name must end in .jsonl, the format of scored pairs")
        super().__post_init__()


def main(arguments: list[str] | None = None) -> None:
    settings = parse(Settings, __doc__.split("\n")[0], arguments)
    with join(settings.device) as world:
        score(settings, world)


def score(settings: Settings, world: World) -> None:
    """Write the scored pairs, and print how often the chosen answer has the higher score."""
    model, tokenizer = load_model_and_tokenizer(settings.model, world.device, RewardModel)
    length = length_limit(settings.max_length, settings.model, model.config)
    precision = Precision(settings.precision, world.device)
    if world.is_main:
        print_start({settings.model: model}, world.device, precision.reason)
    read = length, settings.shape, settings.skip_bad
    pairs = world.node_first(lambda: open_store(settings.data, "preferences", tokenizer, *read))
    rewards = score_pairs(model, pairs, world, precision, settings.layout, settings.micro_batch_tokens)
    if not world.is_main:
        return
    print_note(f"{settings.data}: {pairs.report}")
    if removed := write_scored(settings.out, settings.data, pairs, rewards):
        print_note(f"removed win_probability from {removed} records: training would prefer it to the scores")
    figures = evaluate_rewards(rewards)
    print_note(
        f"{settings.out}: {len(pairs)} pairs; the chosen answer has the higher score in "
        f"{figures['rewards/accuracies']:.1%}, by {figures['rewards/margins']:.3g} on average"
    )


def write_scored(path: str, source: str, pairs: TokenStore, rewards: Tensor) -> int:
    """Write the records of `source` that are rows of `pairs`, with their (P, 2) rewards as scores.

    Returns the number of records that had a `win_probability`. The file appears complete or not at all.
    """
    scores = dict(zip(pairs.records.tolist(), rewards.tolist(), strict=True))  # place in the file: scores
    removed = 0

    def write(file) -> None:
        nonlocal removed
        for place, (_, record) in enumerate(read_values(source)):
            if place in scores:
                removed += record.pop("win_probability", None) is not None
                record["score_chosen"], record["score_rejected"] = scores[place]
                # UTF-8 cannot encode a lone surrogate. Texts have none; in other fields JSON escapes it.
                line = json.dumps(record, ensure_ascii=False) + "\n"
                file.write(line.encode("utf-8", "backslashreplace"))

    write_whole(path, write)
    return removed


if __name__ == "__main__":
    run_script(main)
