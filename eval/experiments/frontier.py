"""Reward against distance from the reference: which objective buys the most reward for its KL?

    python -m eval.experiments.frontier --model runs/sft --out runs/frontier
    python -m eval.experiments.frontier --sentiment ../shared/data/sentiment --pairs 1000 --lr 6e-4

With --sentiment: film reviews, rewarded for positive words (see sentiment.py), with a model trained here.
Without: the bundled data, rewarded with the judge's points, 0 to 3. Each objective trains from one SFT model;
a seed draws the pairs (sentiment only), their order and the answers. Then each policy answers held-out
prompts, and KL(π ‖ π_ref) is the mean of log π(y|x) − log π_ref(y|x) over these answers.

Claim (Rafailov et al. 2023, arXiv 2305.18290, figure 2): at every KL, DPO has the highest reward.
Best-of-n is the best of n answers of the reference by the true reward; its KL is at most log n − (n−1)/n.
"""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean

import torch

from dataset.records import Message
from errors import run_script
from eval.common import load_model_and_tokenizer
from eval.experiments import common, sentiment
from eval.experiments.common import answer_logratios, draw_interval, draw_upright, over_runs, shown, table
from eval.judge import read_judged
from eval.report import BLUE, INK, ORANGE, PALE, VIOLET, canvas, need_matplotlib, plain
from eval.verdict import score
from eval.win_rate import Z95
from files import write_json
from model.generate import generate
from model.transformer import Transformer
from training.distributed import pick_device
from training.settings import SAMPLE, flag, parse

BETAS = (0.03, 0.1, 0.3, 1.0)
DPO = {f"DPO β {beta:g}": dict(loss="sigmoid", beta=beta) for beta in BETAS}
OBJECTIVES = DPO | {
    "IPO β 0.1": dict(loss="ipo", beta=0.1),
    "hinge β 0.1": dict(loss="hinge", beta=0.1),
    "DPOP β 0.1": dict(loss="dpop", beta=0.1),
    "SimPO β 2": dict(loss="simpo", beta=2.0),
    "SFT on chosen": dict(loss="sft"),
}
WITHOUT_REFERENCE = ("simpo", "sft")
BEST_OF = (1, 2, 4, 8)
MARKS = ((VIOLET, "s"), (VIOLET, "^"), (ORANGE, "s"), (ORANGE, "^"), (INK, "D"))  # of the others


@dataclass
class Settings(common.Settings):
    out: str = flag("runs/frontier", "folder for the runs, the figures and the picture")
    sentiment: str = flag("", f"folder of {sentiment.SENTENCES} and {sentiment.LEXICON}; empty: bundled data")
    sft_epochs: int = flag(3, "with --sentiment: passes over the sentences")
    pairs: int = flag(320, "starts that pairs are made of (--sentiment), or pairs to train on")
    prompts: int = flag(200, "held-out prompts, each answered once by every policy")
    epochs: int = flag(1, "passes over the pairs")
    batch_size: int = flag(16, "pairs per optimizer step")
    lr: float = flag(4e-4, "peak learning rate of every objective")


@dataclass
class Task:
    """What to train on and how to reward. `reward` is that of a text as answer to held-out prompt i."""

    model: str
    pairs: Callable[[int], Path]  # the file for a seed
    prompts: list[list[int]]
    reward: Callable[[int, str, bool], float]  # i, text, whether it has an end
    max_new_tokens: int
    unit: str


def main(arguments: list[str] | None = None) -> None:
    settings = parse(Settings, __doc__.split("\n")[0], arguments)
    settings = common.shortened(settings, pairs=40, prompts=6, epochs=1, sft_epochs=1, batch_size=8)
    need_matplotlib()
    out, device = Path(settings.out), pick_device("auto")
    task = (sentiment_task if settings.sentiment else bundled_task)(settings, out)
    reference, tokenizer = load_model_and_tokenizer(task.model, device)
    found: dict[str, list[dict]] = {}  # name: one dict of figures per seed
    for seed in range(settings.seeds):
        for name, figures in best_of(task, reference, tokenizer, seed).items():
            found.setdefault(name, []).append(figures)
        data = task.pairs(seed)
        for name, flags in OBJECTIVES.items():
            cached = {} if flags["loss"] in WITHOUT_REFERENCE else {"reference": "cached"}
            numbers = {key: getattr(settings, key) for key in ("epochs", "batch_size", "lr")}
            folder = out / f"{name.replace(' ', '-')}-{seed}"
            common.train(folder, seed, model=task.model, data=data, **flags, **numbers, **cached)
            policy, _ = load_model_and_tokenizer(folder, device)
            found.setdefault(name, []).append(measure(task, policy, reference, tokenizer, seed))
            (folder / "model.pt").unlink()  # 16 MB each
        write_json(out / "results.json", {"settings": asdict(settings), "runs": found})
    draw(found, task.unit, out / "frontier.png")
    rows = [
        [name, *(shown([run[key] for run in runs]) for key in ("kl", "reward"))]
        for name, runs in found.items()
    ]
    print("\n" + table(["", "KL(π ‖ π_ref), nats", f"reward, {task.unit}"], rows))


def bundled_task(settings: Settings, out: Path) -> Task:
    _, tokenizer = load_model_and_tokenizer(settings.model, torch.device("cpu"))
    records = read_judged(str(SAMPLE / "heldout.jsonl"))[: settings.prompts]
    path = common.copy_lines(SAMPLE / "preferences.jsonl", out / "pairs.jsonl", settings.pairs)

    def reward(i: int, text: str, finished: bool) -> float:
        return score(records[i], text, finished).points

    prompts = [tokenizer.prompt(record["prompt"]) for record in records]
    return Task(settings.model, lambda seed: path, prompts, reward, 64, "points of the judge, 0 to 3")


def sentiment_task(settings: Settings, out: Path) -> Task:
    folder = Path(settings.sentiment)
    lexicon = sentiment.Lexicon.read(folder)
    sentences, held_out = sentiment.read_sentences(folder, settings.prompts)
    sentences = sentences[: 200 if settings.quick else None]
    model = sentiment.train_start(out, sentences, settings.sft_epochs)
    reference, tokenizer = load_model_and_tokenizer(model, pick_device("auto"))
    starts = [sentiment.start_of(words) for words in sentences[: settings.pairs]]

    def pairs(seed: int) -> Path:
        path = out / f"pairs-{seed}.jsonl"
        return sentiment.write_pairs(path, reference, tokenizer, lexicon, starts, seed)

    def reward(i: int, text: str, finished: bool) -> float:
        return lexicon.reward(text)

    prompts = [tokenizer.prompt([Message("user", sentiment.start_of(words))]) for words in held_out]
    return Task(str(model), pairs, prompts, reward, sentiment.MAX_NEW_TOKENS, "σ(positive − negative words)")


# ---- Figures of one run


def measure(task: Task, policy: Transformer, reference: Transformer, tokenizer, seed: int) -> dict:
    """Mean reward and KL(π ‖ π_ref) of the policy's own answers, each with half of its 95 % interval."""
    options = dict(end_id=tokenizer.end_id, max_new_tokens=task.max_new_tokens, batch_size=200)
    answers = generate(policy, task.prompts, seed=1000 + seed, **options)
    logratios = answer_logratios(policy, reference, task.prompts, answers, tokenizer.end_id)
    texts = (tokenizer.decode(answer.tokens) for answer in answers)
    rewards = torch.tensor(
        [task.reward(i, text, answers[i].finished) for i, text in enumerate(texts)], dtype=torch.float
    )
    halves = [Z95 * values.std().item() / math.sqrt(len(values)) for values in (logratios, rewards)]
    return {
        "kl": logratios.mean().item(),
        "kl_half": halves[0],
        "reward": rewards.mean().item(),
        "reward_half": halves[1],
        "tokens": mean(len(answer.tokens) for answer in answers),
        "unfinished": mean(not answer.finished for answer in answers),
    }


def best_of(task: Task, reference: Transformer, tokenizer, seed: int) -> dict[str, dict]:
    """Reward and the bound of KL of best-of-n for each n. n = 1 is the SFT model."""
    most = max(BEST_OF)
    prompts = [prompt for prompt in task.prompts for _ in range(most)]
    options = dict(end_id=tokenizer.end_id, max_new_tokens=task.max_new_tokens, batch_size=200)
    answers = generate(reference, prompts, seed=2000 + seed, **options)
    texts = [tokenizer.decode(answer.tokens) for answer in answers]
    rewards = [task.reward(i // most, text, answers[i].finished) for i, text in enumerate(texts)]
    found = {}
    for n in BEST_OF:
        best = [max(rewards[i : i + n]) for i in range(0, len(rewards), n)]
        name = "SFT" if n == 1 else f"best of {n}"
        found[name] = {"kl": math.log(n) - (n - 1) / n, "reward": mean(best)}
    return found


# ---- Picture


def draw(found: dict[str, list[dict]], unit: str, out: Path) -> None:
    """Each objective at its KL and reward, with intervals over the seeds; a line joins points of one kind."""
    with canvas(8.5, 4.6, out) as figure:
        axes = figure.subplots()
        plain(axes, "Expected reward against KL", unit)
        axes.set_xlabel("KL(π ‖ π_ref), nats per answer (square-root scale)", color=PALE)
        axes.set_xscale("function", functions=(lambda x: abs(x) ** 0.5, lambda x: x**2))
        draw_kind(axes, {"1": found["SFT"]} | named(found, "best of "), PALE, label="best of n, with n")
        draw_kind(axes, named(found, "DPO β "), BLUE, label="DPO, with β")
        others = {name: runs for name, runs in found.items() if name in OBJECTIVES and name not in DPO}
        for (name, runs), mark in zip(others.items(), MARKS, strict=True):
            draw_kind(axes, {"": runs}, *mark, label=name)
        axes.set_xlim(left=0)
        axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1), labelcolor="linecolor")
        figure.subplots_adjust(left=0.07, right=0.78, top=0.86, bottom=0.12)


def named(found: dict[str, list[dict]], start: str) -> dict[str, list[dict]]:
    """The runs whose names begin like this, by the rest of the name."""
    return {name.removeprefix(start): runs for name, runs in found.items() if name.startswith(start)}


def draw_kind(axes, group: dict[str, list[dict]], colour: str, marker: str = "o", label: str = "") -> None:
    """Draw the points of one kind as a line, each with its name and, over several runs, its intervals."""
    points = []
    for name, runs in group.items():
        kl, reward = (over_runs([run[key] for run in runs]) for key in ("kl", "reward"))
        points.append((kl.value, reward.value))
        draw_interval(axes, kl, reward.value, color=colour, alpha=0.35)
        draw_upright(axes, kl.value, reward, color=colour, alpha=0.35)
        axes.annotate(name, points[-1], (0, 6), textcoords="offset points", size=8, color=colour, ha="center")
    xs, ys = zip(*points, strict=True)
    axes.plot(xs, ys, color=colour, marker=marker, markersize=6, linewidth=1.4, label=label)


if __name__ == "__main__":
    run_script(main)
