"""Make preference pairs of sampled answers with scores.

    python -m dataset.pair answers.jsonl --out pairs.jsonl                      # the best against the worst
    python -m dataset.pair answers.jsonl --out pairs.jsonl --method gap --gap 1 # all pairs more than 1 apart
    python -m dataset.pair answers.jsonl --out pairs.jsonl --method rso --beta 0.5
    python -m dataset.pair answers.jsonl --out lists.jsonl --method ranked      # all answers, the best first

The answers are those of `eval.sample`, scored by `eval.score`. An answer is dropped if it is unfinished, too
long, without a score, or the same text as an earlier one. A pair keeps its scores as `score_chosen` and
`score_rejected`, so that `--loss soft` can use them. The scores of the two differ by more than --gap.

rso is statistical rejection sampling (Liu et al. 2023, arXiv 2309.06657): it accepts some of the answers, as
if they had been sampled from π·e^{score/β} and not from π, and pairs the accepted ones at random.
"""

import argparse
from collections import Counter
from collections.abc import Sequence
from itertools import combinations

import numpy as np

from dataset.prompts import read_answers
from errors import InputError, require, run_script
from files import write_lines

METHODS = ("best_worst", "gap", "rso", "ranked")


def best_worst(scores: Sequence[float]) -> list[tuple[int, int]]:
    """The pair of the highest and the lowest score."""
    return [(int(np.argmax(scores)), int(np.argmin(scores)))] if len(scores) > 1 else []


def all_pairs(scores: Sequence[float]) -> list[tuple[int, int]]:
    """Every pair, the answer with the higher score first."""
    pairs = combinations(range(len(scores)), 2)
    return [(i, j) if scores[i] >= scores[j] else (j, i) for i, j in pairs]


def rejection_sample(
    scores: Sequence[float], count: int, beta: float, draw: np.random.Generator
) -> list[int]:
    """`count` places, in the order in which they are accepted, or all if there are not more.

    A candidate that is not accepted yet is drawn, and accepted with probability exp((r − r_max) / β). r_max
    is the highest score that is left. The candidates are answers of π: an answer that π prefers stands among
    them more often. So the accepted ones follow π·e^{r/β} as the number of candidates grows.
    """
    left, accepted = list(range(len(scores))), []
    while left and len(accepted) < count:
        highest = max(scores[i] for i in left)
        place = draw.integers(len(left))
        if draw.random() < np.exp((scores[left[place]] - highest) / beta):
            accepted.append(left.pop(place))
    return accepted


def random_pairs(scores: Sequence[float], accepted: list[int]) -> list[tuple[int, int]]:
    """The accepted answers, which are in random order, two by two; the one with the higher score first."""
    pairs = zip(accepted[::2], accepted[1::2], strict=False)
    return [(i, j) if scores[i] >= scores[j] else (j, i) for i, j in pairs]


def usable(answers: list[dict], max_tokens: int, counts: Counter) -> list[dict]:
    """The answers that are finished, short enough and scored. `counts` gets the reasons of the others."""
    kept = []
    for answer in answers:
        if not answer.get("finished", True):
            counts["unfinished"] += 1
        elif max_tokens and answer.get("tokens", 0) > max_tokens:
            counts["too long"] += 1
        elif answer.get("score") is None:
            counts["without a score"] += 1
        elif not answer["text"].strip():
            counts["empty"] += 1
        else:
            kept.append(answer)
    return kept


def distinct(answers: list[dict], counts: Counter) -> list[dict]:
    """The answers without those whose text an earlier one has."""
    first = {}
    for answer in answers:
        counts["duplicate"] += answer["text"] in first
        first.setdefault(answer["text"], answer)
    return list(first.values())


def pairs_of(answers: list[dict], settings, place: int, counts: Counter) -> list[tuple[dict, dict]]:
    """The pairs (chosen, rejected) of the answers to prompt `place`. `counts` gets what is dropped."""
    answers = usable(answers, settings.max_tokens, counts)
    if settings.method != "rso":  # There a repeated answer weighs more, as π gave it more probability.
        answers = distinct(answers, counts)
    scores = [answer["score"] for answer in answers]
    if settings.method == "rso":
        draw = np.random.default_rng([settings.seed, place])
        found = random_pairs(scores, rejection_sample(scores, settings.accept, settings.beta, draw))
    else:
        found = (all_pairs if settings.method == "gap" else best_worst)(scores)
    kept = [(i, j) for i, j in found if scores[i] - scores[j] > settings.gap]
    counts["pair within the gap"] += len(found) - len(kept)
    return [(answers[i], answers[j]) for i, j in kept]


def ranking_of(answers: list[dict], settings, counts: Counter) -> list[dict]:
    """The answers, the best first, each more than the gap better than the next; the others are dropped."""
    answers = distinct(usable(answers, settings.max_tokens, counts), counts)
    ranking = []
    for answer in sorted(answers, key=lambda answer: -answer["score"]):  # stable: the earlier one of a tie
        if ranking and ranking[-1]["score"] - answer["score"] <= settings.gap:
            counts["within the gap"] += 1
        else:
            ranking.append(answer)
    return ranking if len(ranking) > 1 else []


def make_records(records: list[dict], settings) -> tuple[list[dict], Counter]:
    """The pairs, or with --method ranked the lists, of all records; and counts of what was dropped."""
    made, counts = [], Counter()
    for place, record in enumerate(records):
        before = len(made)
        rest = {key: value for key, value in record.items() if key not in ("prompt", "answers")}
        if settings.method == "ranked":
            if ranking := ranking_of(record["answers"], settings, counts):
                replies = {key: [answer[name] for answer in ranking] for key, name in
                           (("ranked", "text"), ("scores", "score"))}  # fmt: skip
                made.append({"prompt": record["prompt"], **replies, **rest})
        else:
            for chosen, rejected in pairs_of(record["answers"], settings, place, counts):
                sides = {"chosen": chosen["text"], "rejected": rejected["text"]}
                scores = {"score_chosen": chosen["score"], "score_rejected": rejected["score"]}
                made.append({"prompt": record["prompt"], **sides, **scores, **rest})
        counts["prompt without a pair"] += len(made) == before
    return made, +counts


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m dataset.pair", description=__doc__.split("\n")[0])
    parser.add_argument("file", metavar="FILE", help="answers of eval.sample, scored by eval.score")
    parser.add_argument("--out", required=True, help=".jsonl file for the pairs, or for the lists of ranked")
    parser.add_argument("--method", choices=METHODS, default="best_worst", help="which answers to pair")
    parser.add_argument("--gap", type=float, default=0.0, help="a pair's scores differ by more than this")
    parser.add_argument("--beta", type=float, default=0.5, help="rso: smaller accepts higher scores only")
    parser.add_argument("--accept", type=int, default=4, help="rso: answers to accept for a prompt")
    parser.add_argument("--max-tokens", type=int, default=0, help="drop longer answers; 0: no limit")
    parser.add_argument("--seed", type=int, default=0, help="rso: seed of the draws")
    pair(parser.parse_args(arguments))


def pair(settings) -> None:
    """Write the pairs and print what was dropped. `settings` has the flags as attributes."""
    require(settings.gap >= 0, f"--gap must be at least 0, not {settings.gap}")
    require(settings.beta > 0, f"--beta must be above 0, not {settings.beta}")
    require(settings.accept > 1, f"--accept must be at least 2, not {settings.accept}")
    records = read_answers(settings.file)
    scored = any(answer.get("score") is not None for record in records for answer in record["answers"])
    require(scored, f"{settings.file}: no answer has a score: run python -m eval.score first")
    made, counts = make_records(records, settings)
    dropped = "; ".join(f"{count} × {reason}" for reason, count in counts.items()) or "nothing"
    summary = f"{len(made)} {'lists' if settings.method == 'ranked' else 'pairs'} of {len(records)} prompts"
    if not made:
        raise InputError(f"{settings.file}: no pair is left; dropped: {dropped}")
    write_lines(settings.out, made)
    print(f"{settings.out}: {summary} ({settings.method}); dropped: {dropped}")


if __name__ == "__main__":
    run_script(main)
