"""Two models answer held-out prompts, and a judge with the right answers compares them.

    python -m eval.judge --model runs/dpo                      # against the model that the run started from
    python -m eval.judge --model DIR --versus DIR --prompts 50 --samples 2 --json figures.json
    python -m eval.judge --model runs/dpo --data prompts.txt --scorer rules.py:polite     # on any prompts
    python -m eval.judge --model runs/dpo --data pairs.jsonl --reward runs/reward

With --scorer or --reward the answer with the higher score wins. The judge that reads a `judge` field scores
more: right, well formed, courteous, by task.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from statistics import mean

from dataset.jsonl import DataError, printable, read_values
from dataset.prompts import read_prompts
from dataset.records import read_preferences
from dataset.tokenizer import ChatTokenizer
from errors import require, run_script
from eval.common import generating, load_model_and_tokenizer, print_start, starting_model
from eval.sample import answer_all
from eval.scorers import Scorer, ScorerFlags, make_scorer
from eval.terminal import cells
from eval.verdict import Verdict, rule_fault, score
from eval.win_rate import contest
from eval.words import tr
from files import write_json
from model.generate import Answer, generate
from model.transformer import Transformer
from training.distributed import World, pick_device
from training.precision import Precision
from training.settings import DEVICE_WHY, DEVICES, SAMPLE, flag, parse

KEPT = 200  # prompts whose replies are written beside the figures


@dataclass
class Settings(ScorerFlags):
    model: str = flag("runs/dpo", "model folder of the first model")
    versus: str = flag("", "model folder of the second model; default: what --model started from")
    data: str = flag(
        str(SAMPLE / "heldout.jsonl"), "pairs with a `judge` field; with --scorer or --reward any prompts"
    )
    prompts: int = flag(0, "number of prompts, from the start of the file; 0: all")
    samples: int = flag(4, "sampled answers per prompt, in addition to the greedy one")
    temperature: float = flag(1.0, "temperature of the sampled answers")
    max_new_tokens: int = flag(64, "maximum tokens of an answer; a longer one is not well formed")
    batch_size: int = flag(200, "answers generated at once; changes the speed, not the answers")
    seed: int = flag(0, "seed of the sampling, the same for both models")
    json: str = flag("", "file for the figures and some answers; eval.report shows RUN/judge.json")
    device: str = flag("auto", DEVICE_WHY, DEVICES)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.at_least(1, "samples", "max_new_tokens", "batch_size")
        self.at_least(0, "prompts")
        self.require(self.temperature > 0, "temperature", "above 0")


@dataclass(frozen=True)
class Reply:
    """One answer to one record, judged."""

    text: str
    tokens: int  # without the end token
    verdict: Verdict


def read_judged(path: str) -> list[dict]:
    """The records of a file, with `prompt` replaced by checked messages.

    Raises `DataError` at the first record that is not a preference pair or has no complete `judge` field.
    """
    records = []
    for (line, record), pair in zip(read_values(path), read_preferences(path), strict=True):
        if isinstance(pair, DataError):
            raise pair
        if fault := rule_fault(record.get("judge")):
            raise DataError(path, line, fault)
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
    """For each record the judged replies of the model: the greedy one, then `samples` sampled ones."""
    prompts = [tokenizer.prompt(record["prompt"]) for record in records]
    options = dict(end_id=tokenizer.end_id, max_new_tokens=max_new_tokens, batch_size=batch_size)
    with generating(model):
        greedy = generate(model, prompts, temperature=0, **options)
        sampled = generate(model, prompts, temperature=temperature, seed=seed, samples=samples, **options)

    def judged(record: dict, reply: Answer) -> Reply:
        text = tokenizer.decode(reply.tokens)
        return Reply(text, len(reply.tokens), score(record, text, reply.finished))

    return [
        [judged(record, reply) for reply in (greedy[i], *sampled[i * samples : (i + 1) * samples])]
        for i, record in enumerate(records)
    ]


def compare(records: list[dict], replies: dict[str, list[list[Reply]]]) -> dict:
    """Figures of the first model against the second, from the replies of `answer`: ``{"dpo": …, "sft": …}``.

    Sample i of the first is compared with sample i of the second on the same prompt: more points win, equal
    points tie. `win_rate` is wins / (wins + losses), None if all cases tie. Other rates are shares of the
    sampled answers, except `right_answers_greedy`. A right answer may still be badly formed.
    """
    first, second = replies.values()
    cases = [[*zip(a[1:], b[1:], strict=True)] for a, b in zip(first, second, strict=True)]
    points = [[ours.verdict.points - theirs.verdict.points for ours, theirs in row] for row in cases]
    longer = [[ours.tokens - theirs.tokens for ours, theirs in row] for row in cases]

    def means(value: Callable[[Reply], float], which: slice = slice(1, None)) -> dict[str, float]:
        chosen = {name: [reply for row in rows for reply in row[which]] for name, rows in replies.items()}
        return {name: sum(map(value, few)) / len(few) for name, few in chosen.items()}

    return {
        "prompts": len(records),
        "samples": len(cases[0]),
        **contest(points, longer),
        "right_answers": means(lambda reply: reply.verdict.right),
        "only_first_right": sum(
            ours.verdict.right > theirs.verdict.right for row in cases for ours, theirs in row
        ),
        "only_second_right": sum(
            ours.verdict.right < theirs.verdict.right for row in cases for ours, theirs in row
        ),
        "right_answers_greedy": means(lambda reply: reply.verdict.right, slice(1)),
        "well_formed": means(lambda reply: reply.verdict.well_formed),
        "wanted_manner": means(lambda reply: reply.verdict.manner),
        "mean_tokens": means(lambda reply: reply.tokens),
        "mean_characters": means(lambda reply: len(reply.text)),
    }


def compare_tasks(records: list[dict], replies: dict[str, list[list[Reply]]]) -> dict[str, dict]:
    """The figures of `compare` for each task, by its name."""
    tasks: dict[str, list[int]] = {}
    for i, record in enumerate(records):
        tasks.setdefault(record["judge"]["task"], []).append(i)
    return {
        task: compare([records[i] for i in rows], {name: [r[i] for i in rows] for name, r in replies.items()})
        for task, rows in sorted(tasks.items())
    }


def details(records: list[dict], replies: dict[str, list[list[Reply]]]) -> dict:
    """What a judge's file contains in addition to `compare`: the figures of each task, and answers to read.

    The latter are the first sampled replies of both models to the first `KEPT` prompts.
    """
    answers = [
        {
            "prompt": [{"role": turn.role, "content": turn.content} for turn in record["prompt"]],
            "task": record["judge"]["task"],
            "replies": {name: asdict(rows[i][1]) for name, rows in replies.items()},
        }
        for i, record in enumerate(records[:KEPT])
    ]
    return {"tasks": compare_tasks(records, replies), "answers": answers}


def compare_scores(models: dict[str, tuple], records: list[dict], scorer: Scorer, **sampling) -> dict:
    """Figures of the first model against the second, by the scores of sampled answers to any prompts.

    Sample i of the first is compared with sample i of the second: the higher score wins, equal ones tie.
    `models` has a model and its tokenizer for each name, `sampling` the options of `answer_all`.
    """
    answers = {
        name: answer_all(model, tokenizer, records, **sampling) for name, (model, tokenizer) in models.items()
    }
    scores = {
        name: scorer([{**record, "answers": row} for record, row in zip(records, rows, strict=True)])
        for name, rows in answers.items()
    }
    flat = {name: [value for row in rows for value in row] for name, rows in scores.items()}
    too_long = "an answer is too long for a reward model; lower --max-new-tokens"
    require(all(value is not None for values in flat.values() for value in values), too_long)

    def differences(of: dict[str, list[list[float]]]) -> list[list[float]]:
        return [[a - b for a, b in zip(*both, strict=True)] for both in zip(*of.values(), strict=True)]

    def means(value: Callable[[dict], float]) -> dict[str, float]:
        return {name: mean(value(a) for row in rows for a in row) for name, rows in answers.items()}

    tokens = {name: [[answer["tokens"] for answer in row] for row in rows] for name, rows in answers.items()}
    return {
        "prompts": len(records),
        "samples": sampling["samples"],
        **contest(differences(scores), differences(tokens)),
        "mean_score": {name: mean(values) for name, values in flat.items()},
        "finished": means(lambda answer: answer["finished"]),
        "mean_tokens": means(lambda answer: answer["tokens"]),
        "mean_characters": means(lambda answer: len(answer["text"])),
    }


def summary(figures: dict) -> str:
    """The figures of `compare` or `compare_scores` as a few lines of text."""
    first, second = figures["mean_tokens"]
    counts = {name: figures[name] for name in ("prompts", "samples", "wins", "ties", "losses")}
    lines = [
        tr("{first} against {second}, {prompts} prompts, {samples} sampled answers each: {wins} wins, "
           "{ties} ties, {losses} losses", first=first, second=second, **counts)
    ]  # fmt: skip
    for key in ("win_rate", "win_rate_at_equal_length"):
        if figures[key] is not None:
            ends = figures[f"{key}_ci95"] or (figures[key],) * 2
            low, high, share = (f"{value:.1%}" for value in (*ends, figures[key]))
            named = {"model": first, "share": share, "low": low, "high": high}
            lines.append(
                tr("{model} wins {share} of the decided cases (95 %: {low} to {high})", **named)
                if key == "win_rate"
                else tr("{model} wins {share} of them at equal length (95 %: {low} to {high})", **named)
            )
    lines.append(f"\n{'':<30}{first:>10}{second:>10}")
    for label, name, form in (
        (tr("right, sampled"), "right_answers", ".1%"),
        (tr("right, greedy"), "right_answers_greedy", ".1%"),
        (tr("well formed"), "well_formed", ".1%"),
        (tr("courteous"), "wanted_manner", ".1%"),
        (tr("score"), "mean_score", ".3f"),
        (tr("finished"), "finished", ".1%"),
        (tr("tokens per answer"), "mean_tokens", ".1f"),
        (tr("characters per answer"), "mean_characters", ".1f"),
    ):
        if name in figures:
            values = "".join(f"{figures[name][model]:>10{form}}" for model in (first, second))
            lines.append(label + " " * (30 - cells(label)) + values)
    return "\n".join(lines)


def task_table(tasks: dict[str, dict]) -> str:
    """A table with one line per task, from the figures of `compare_tasks`."""
    first, second = next(iter(tasks.values()))["right_answers"]
    heads = f"{'right ' + first:>14}{'right ' + second:>14}"
    rows = [f"{'task':<20}{'prompts':>8}{'wins':>8}{'ties':>8}{'losses':>8}{heads}"]
    for task, f in tasks.items():
        right = f["right_answers"]
        rows.append(
            f"{printable(task):<20}{f['prompts']:>8}{f['wins']:>8}{f['ties']:>8}{f['losses']:>8}"
            f"{right[first]:>14.1%}{right[second]:>14.1%}"
        )
    return "\n".join(rows)


def main(arguments: list[str] | None = None) -> None:
    settings = parse(Settings, __doc__.split("\n")[0], arguments)
    device = pick_device(settings.device)
    folders = settings.model, settings.versus or starting_model(settings.model, "--versus")
    loaded = [load_model_and_tokenizer(folder, device) for folder in folders]
    named = {folder: model for folder, (model, _) in zip(folders, loaded, strict=True)}
    print_start(named, device, Precision("auto", device).reason)
    models = dict(zip(("model", "versus"), loaded, strict=True))
    names = "samples", "temperature", "max_new_tokens", "seed", "batch_size"
    options = {name: getattr(settings, name) for name in names}
    if settings.scorer or settings.reward:
        scorer = make_scorer(settings.scorer, settings.reward, settings.pessimism, World(0, 1, device))
        records = read_prompts(settings.data)[: settings.prompts or None]
        figures = compare_scores(models, records, scorer, **options)
    else:
        records = read_judged(settings.data)[: settings.prompts or None]
        replies = {name: answer(*pair, records, **options) for name, pair in models.items()}
        figures = compare(records, replies) | details(records, replies)
    if settings.json:
        write_json(settings.json, figures)
    print(summary(figures) + ("\n\n" + task_table(figures["tasks"]) if "tasks" in figures else ""))


if __name__ == "__main__":
    run_script(main)
