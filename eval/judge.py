"""Two models answer held-out prompts, and a judge that knows the right answers compares them.

python -m eval.judge --model runs/dpo --versus runs/sft
python -m eval.judge --model DIR --versus DIR --prompts 50 --samples 2 --json figures.json
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

from dataset.jsonl import DataError, read_values, show
from dataset.records import read_preferences
from dataset.tokenizer import ChatTokenizer
from errors import run_script
from eval.common import DEVICE_WHY, DEVICES, load_speaker, require, write_json
from eval.verdict import CHECKS, Verdict, score
from model.generate import Answer, generate
from model.transformer import Transformer
from training.distributed import pick_device
from training.settings import SAMPLE, flag, parse

Z95 = 1.959964  # A normal variable lies within ± this many standard deviations 95 times in 100.


@dataclass
class Settings:
    model: str = flag("runs/dpo", "model folder of the one that is judged")
    versus: str = flag("runs/sft", "model folder of the one that it is held against")
    data: str = flag(str(SAMPLE / "heldout.jsonl"), "records with a `judge` field, as in the bundled data")
    prompts: int = flag(0, "ask only the first so many prompts; 0 for all")
    samples: int = flag(4, "sampled answers to each prompt, beside the greedy one")
    temperature: float = flag(1.0, "of the sampled answers")
    max_new_tokens: int = flag(64, "tokens of an answer; what is longer is cut off, and not well formed")
    batch_size: int = flag(200, "answers at once; changes the speed, not the answers")
    seed: int = flag(0, "of the sampling, the same for both models")
    json: str = flag("", "write the figures into this file, too")
    device: str = flag("auto", DEVICE_WHY, DEVICES)

    def __post_init__(self) -> None:
        for name in ("samples", "max_new_tokens", "batch_size"):
            value = getattr(self, name)
            require(value >= 1, f"--{name.replace('_', '-')}", value, "must be at least 1")
        require(self.prompts >= 0, "--prompts", self.prompts, "must not be negative")
        require(self.temperature > 0, "--temperature", self.temperature, "must be positive")


@dataclass(frozen=True)
class Reply:
    """One answer to one record, judged."""

    text: str
    tokens: int  # without the end token
    verdict: Verdict


def read_judged(path: str) -> list[dict]:
    """The records of a file as they stand there, but with `prompt` as checked messages.

    Raises `DataError` at the first that is no preference pair, or that does not say how to judge an answer.
    """
    records = []
    for (line, record), pair in zip(read_values(path), read_preferences(path), strict=True):
        if isinstance(pair, DataError):
            raise pair
        wanted = record.get("judge")
        if not isinstance(wanted, dict):
            raise DataError(path, line, "no `judge` field, so no answer can be scored")
        if lacking := {"task", "language", "check", "accept", "given"} - wanted.keys():
            raise DataError(path, line, f"its `judge` field lacks {', '.join(sorted(lacking))}")
        if wanted["check"] not in CHECKS:
            raise DataError(path, line, f"unknown check {show(wanted['check'])}; known: {', '.join(CHECKS)}")
        records.append({**record, "prompt": pair.prompt})
    return records


def answer(
    model: Transformer,
    tokenizer: ChatTokenizer,
    records: list[dict],
    samples: int = 4,
    temperature: float = 1.0,
    max_new_tokens: int = 64,
    seed: int = 0,
    batch_size: int = 200,
) -> list[list[Reply]]:
    """For each record the model's greedy reply, then `samples` sampled ones."""
    prompts = [tokenizer.prompt(record["prompt"]) for record in records]
    asked = dict(end_id=tokenizer.end_id, max_new_tokens=max_new_tokens, batch_size=batch_size)
    greedy = generate(model, prompts, temperature=0, **asked)
    repeated = [prompt for prompt in prompts for _ in range(samples)]
    sampled = generate(model, repeated, temperature=temperature, seed=seed, **asked)

    def judged(record: dict, said: Answer) -> Reply:
        text = tokenizer.decode(said.tokens)
        return Reply(text, len(said.tokens), score(record, text, said.finished))

    return [
        [judged(record, said) for said in (greedy[i], *sampled[i * samples : (i + 1) * samples])]
        for i, record in enumerate(records)
    ]


def compare(records: list[dict], replies: dict[str, list[list[Reply]]]) -> dict:
    """The first model against the second, from what `answer` gave for each: ``{"dpo": …, "sft": …}``.

    Sample i of one meets sample i of the other on the same prompt: more points win, equal points tie.
    `win_rate` is of decided cases, None if there is none. Rates are shares of the sampled answers, but for
    `right_answers_greedy`. "Right" does not ask whether the answer is well formed.
    """
    first, second = replies.values()
    outcomes = [
        [ours.verdict.points - theirs.verdict.points for ours, theirs in zip(a[1:], b[1:], strict=True)]
        for a, b in zip(first, second, strict=True)
    ]
    wins = [sum(difference > 0 for difference in row) for row in outcomes]
    losses = [sum(difference < 0 for difference in row) for row in outcomes]

    def means(value: Callable[[Reply], float], which: slice = slice(1, None)) -> dict[str, float]:
        chosen = {name: [reply for row in rows for reply in row[which]] for name, rows in replies.items()}
        return {name: sum(map(value, few)) / len(few) for name, few in chosen.items()}

    return {
        "prompts": len(records),
        "samples": len(outcomes[0]),
        "wins": sum(wins),
        "ties": sum(row.count(0) for row in outcomes),
        "losses": sum(losses),
        "win_rate": sum(wins) / (sum(wins) + sum(losses)) if any(wins + losses) else None,
        "win_rate_ci95": win_interval(wins, losses),
        "right_answers": means(lambda reply: reply.verdict.right),
        "right_answers_greedy": means(lambda reply: reply.verdict.right, slice(1)),
        "well_formed": means(lambda reply: reply.verdict.well_formed),
        "wanted_manner": means(lambda reply: reply.verdict.manner),
        "mean_tokens": means(lambda reply: reply.tokens),
        "mean_characters": means(lambda reply: len(reply.text)),
    }


def compare_tasks(records: list[dict], replies: dict[str, list[list[Reply]]]) -> dict[str, dict]:
    """`compare` for the records of each task alone."""
    tasks: dict[str, list[int]] = {}
    for i, record in enumerate(records):
        tasks.setdefault(record["judge"]["task"], []).append(i)
    return {
        task: compare([records[i] for i in rows], {name: [r[i] for i in rows] for name, r in replies.items()})
        for task, rows in sorted(tasks.items())
    }


def win_interval(wins: list[int], losses: list[int]) -> list[float] | None:
    """95 % interval of the win rate, from the wins and losses of each prompt; None if no case is decided.

    Samples of one prompt are alike: a model that knows the answer gives it every time. So the cases are not
    independent draws, and an interval over all of them would be too narrow. This is Wilson's (1927) with
    Kish's (1965) effective number, (sum of m)² / sum of m² for m decided cases a prompt: right if all samples
    of a prompt say the same, and rather too wide than too narrow if each says something of its own.
    """
    decided = [won + lost for won, lost in zip(wins, losses, strict=True)]
    if not any(decided):
        return None
    rate = sum(wins) / sum(decided)
    n = sum(decided) ** 2 / sum(m * m for m in decided)
    centre = (rate + Z95**2 / (2 * n)) / (1 + Z95**2 / n)
    half = Z95 / (1 + Z95**2 / n) * math.sqrt(rate * (1 - rate) / n + Z95**2 / (4 * n * n))
    return [max(0.0, centre - half), min(1.0, centre + half)]


def summary(figures: dict) -> str:
    """What `compare` found, as a few lines to read."""
    first, second = figures["right_answers"]
    lines = [
        f"{first} against {second}, {figures['prompts']} prompts, {figures['samples']} sampled answers each: "
        f"{figures['wins']} wins, {figures['ties']} ties, {figures['losses']} losses"
    ]
    if figures["win_rate"] is not None:
        low, high = figures["win_rate_ci95"]
        share = f"{figures['win_rate']:.1%} of the decided cases (95 %: {low:.1%} to {high:.1%})"
        lines.append(f"{first} wins {share}")
    lines.append(f"\n{'':<30}{first:>10}{second:>10}")
    for label, name in (
        ("right, sampled", "right_answers"),
        ("right, greedy", "right_answers_greedy"),
        ("well formed", "well_formed"),
        ("courteous", "wanted_manner"),
    ):
        lines.append(f"{label:<30}{figures[name][first]:>10.1%}{figures[name][second]:>10.1%}")
    for label, name in (("tokens an answer", "mean_tokens"), ("characters an answer", "mean_characters")):
        lines.append(f"{label:<30}{figures[name][first]:>10.1f}{figures[name][second]:>10.1f}")
    return "\n".join(lines)


def task_table(tasks: dict[str, dict]) -> str:
    """One line a task, from `compare_tasks`."""
    first, second = next(iter(tasks.values()))["right_answers"]
    heads = f"{'right ' + first:>14}{'right ' + second:>14}"
    rows = [f"{'task':<20}{'prompts':>8}{'wins':>8}{'ties':>8}{'losses':>8}{heads}"]
    for task, f in tasks.items():
        right = f["right_answers"]
        rows.append(
            f"{task:<20}{f['prompts']:>8}{f['wins']:>8}{f['ties']:>8}{f['losses']:>8}"
            f"{right[first]:>14.1%}{right[second]:>14.1%}"
        )
    return "\n".join(rows)


def main(arguments: list[str] | None = None) -> None:
    settings = parse(Settings, "Two models answer held-out prompts, and a judge scores them.", arguments)
    device = pick_device(settings.device)
    speakers = {name: load_speaker(getattr(settings, name), device) for name in ("model", "versus")}
    records = read_judged(settings.data)[: settings.prompts or None]
    names = ("samples", "temperature", "max_new_tokens", "seed", "batch_size")
    asked = {name: getattr(settings, name) for name in names}
    replies = {name: answer(*speaker, records, **asked) for name, speaker in speakers.items()}
    figures = compare(records, replies) | {"tasks": compare_tasks(records, replies)}
    if settings.json:
        write_json(settings.json, figures)
    print(f"{summary(figures)}\n\n{task_table(figures['tasks'])}")


if __name__ == "__main__":
    run_script(main)
