"""What the experiments share: runs with seeds, means with intervals, log-ratios of generated answers, tables.

folder = train(out / "dpo-0", seed=0, model="runs/sft", data="pairs.jsonl", beta=0.1)
over_runs([0.71, 0.74, 0.70])                       # Estimate(0.717, 0.665, 0.768)
"""

import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean, stdev

import numpy as np
import torch
from torch import Tensor

import train_dpo
from dataset.jsonl import read_values
from dataset.packing import Windows, build_stream, fill
from dataset.records import DataError, read_records
from dataset.store import TokenStore, open_store
from dataset.tokenizer import ChatTokenizer
from errors import InputError
from eval.pairs import Estimate
from losses import sigmoid
from model.generate import Answer
from model.stream import TokenStream
from model.transformer import Transformer
from training.precision import Precision
from training.schedule import clip_gradients, cosine_lr, set_lr
from training.settings import flag
from training.setup import make_optimizer

T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)  # Student's t for 2 to 10 runs
MAX_TOKENS = 8192  # in a forward


@dataclass
class Settings:
    """The flags of every experiment. Each adds its own."""

    model: str = flag("runs/sft", "model folder to start from; its frozen copy is the reference")
    out: str = flag("", "folder for the runs, the figures and the picture")
    seeds: int = flag(3, "number of runs, each with its own seed")
    quick: bool = flag(
        False, "a few steps of two runs, to see that everything works; the figures mean nothing"
    )


@dataclass
class DPOSettings(Settings):
    """The flags of the experiments that train with DPO alone."""

    batch_size: int = flag(16, "pairs per optimizer step")
    beta: float = flag(0.1, "KL strength: a larger beta keeps the policy closer to the reference")


def shortened(settings, **smaller):
    """The settings; with --quick two seeds, and `smaller` in place of the values of the command line."""
    return replace(settings, seeds=2, **smaller) if settings.quick else settings


# ---- Data


def read_all(path: str | Path) -> list:
    """The records of a file. Raises `InputError` at the first bad one."""
    records = list(read_records(path))
    if bad := next((record for record in records if isinstance(record, DataError)), None):
        raise InputError(str(bad))
    return records


def write_lines(path: Path, records: Iterable[dict]) -> Path:
    """Write records as JSON lines; return the path. Creates the folder if necessary."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = (json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    path.write_text("".join(lines), encoding="utf-8")
    return path


def copy_lines(source: str | Path, target: Path, count: int) -> Path:
    """Write the first `count` lines of a file of JSON lines to `target`; return `target`."""
    return write_lines(target, [record for _, record in read_values(source)][:count])


def open_first(
    source: str | Path, target: Path, count: int, tokenizer: ChatTokenizer, max_length: int = 512
) -> TokenStore:
    """The first `count` pairs of a file, copied to `target` and tokenised; longer pairs are dropped."""
    return open_store(str(copy_lines(source, target, count)), "preferences", tokenizer, max_length)


# ---- Training


def train(out: Path, seed: int, main: Callable = train_dpo.main, **flags) -> Path:
    """Run a training script into the folder `out`, with these flags; return the folder."""
    given = [f"--{name.replace('_', '-')}={value}" for name, value in {"eval_data": "", **flags}.items()]
    main([*given, f"--seed={seed}", f"--out={out}", "--overwrite"])
    return out


def metrics(folder: Path) -> list[dict]:
    """The rows of a run's metrics.jsonl."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text("utf-8").splitlines()]


@dataclass(frozen=True)
class Step:
    """One optimizer step of `dpo_steps`, measured before the weights change; B pairs."""

    number: int  # from 1
    rows: np.ndarray  # (B,) the pairs' rows in the store
    losses: Tensor  # (B,)
    chosen_logratios: Tensor  # (B,)
    rejected_logratios: Tensor  # (B,)

    @property
    def margins(self) -> Tensor:
        return self.chosen_logratios - self.rejected_logratios


def pair_logps(model: Transformer, stream: TokenStream) -> tuple[Tensor, Tensor]:
    """log π(y|x) of the chosen and of the rejected answers, (B,) each."""
    return stream.sum_by_side(model(stream))


def dpo_steps(
    policy: Transformer,
    reference: Transformer,
    pairs: TokenStore,
    seed: int,
    *,
    model: str,
    epochs: int,
    batch_size: int,
    lr: float,
    beta: float,
    pair_logps: Callable = pair_logps,
) -> Iterator[Step]:
    """Train `policy` with DPO and yield each step: the loop of `train_dpo.py` without what is around it.

    For experiments that look at every pair or stop after every epoch. `model` is the folder of the policy,
    which decides the optimizer. `pair_logps` computes the log-probs of a stream's pairs. A test compares
    losses and log-ratios with those of `train_dpo.py`.
    """
    windows = Windows(len(pairs), batch_size, seed)
    precision = Precision("auto", policy.embed_tokens.weight.device)
    optimizer = make_optimizer(train_dpo.Settings(model=model), policy, precision)
    total_steps = epochs * windows.per_epoch
    for step in range(total_steps):
        set_lr(optimizer, cosine_lr(step, total_steps, lr, warmup_steps=10))
        stream = build_stream(pairs, windows[step]).to(policy.embed_tokens.weight.device)
        with precision.autocast():
            policy_chosen, policy_rejected = pair_logps(policy, stream)  # (B,) log π(y|x)
            with torch.no_grad():
                reference_chosen, reference_rejected = pair_logps(reference, stream)
        logratios = policy_chosen - reference_chosen, policy_rejected - reference_rejected
        losses = sigmoid(logratios[0] - logratios[1], beta)  # (B,)
        precision.backward(losses.mean())
        clip_gradients(optimizer, precision.scaler, 1.0)
        precision.step(optimizer)
        optimizer.zero_grad()
        yield Step(step + 1, windows[step], *(x.detach() for x in (losses, *logratios)))


# ---- Log-ratios of what a model generated


class Generated:
    """Prompts with one generated answer each, in the form of a `TokenStore`.

    Its tokens are those that were drawn. Text that is encoded again may get other tokens.
    """

    reference_logps = score_margins = None

    def __init__(self, prompts: list[list[int]], answers: list[Answer], end_id: int):
        self.prompts = [np.array(prompt) for prompt in prompts]
        self.answers = [np.array(a.tokens + [end_id] * a.finished, dtype=np.int64) for a in answers]

    def row(self, index: int) -> list[tuple]:
        answer = self.answers[index]
        return [(self.prompts[index], None), (answer, np.ones(len(answer), bool))]


@torch.no_grad()
def answer_logratios(
    policy: Transformer, reference: Transformer, prompts: list[list[int]], answers: list[Answer], end_id: int
) -> Tensor:
    """log π(y|x) − log π_ref(y|x) of each answer, (answers,), in nats and float32.

    If `policy` generated the answers at temperature 1, their mean estimates KL(π ‖ π_ref) per answer. An
    answer that reached the length limit counts without an end token.
    """
    store = Generated(prompts, answers, end_id)
    pairs = zip(store.prompts, store.answers, strict=True)
    lengths = np.array([len(prompt) + len(answer) for prompt, answer in pairs])
    parts = []
    for rows in fill(range(len(answers)), lengths, MAX_TOKENS):
        stream = build_stream(store, rows).to(policy.embed_tokens.weight.device)
        parts.append(stream.sum_by_response(policy(stream) - reference(stream)))
    return torch.cat(parts)


# ---- Figures


def over_runs(values: Sequence[float]) -> Estimate:
    """The mean of n runs and its 95 % interval by Student's t: mean ± t s / √n, with n − 1 in s.

    One run has no interval: its ends are infinite. More than ten runs use the t of ten, which is wider.
    """
    if len(values) == 1:
        return Estimate(values[0], -math.inf, math.inf)
    half = T95[min(len(values), 10) - 2] * stdev(values) / math.sqrt(len(values))
    return Estimate(mean(values), mean(values) - half, mean(values) + half)


def shown(values: Sequence[float], digits: int = 2) -> str:
    """``1.25 ± 0.10``: the mean of the runs and half of its 95 % interval."""
    estimate = over_runs(values)
    half = estimate.high - estimate.value
    interval = f" ± {half:.{digits}f}" if math.isfinite(half) else ""
    return f"{round(estimate.value, digits) + 0.0:.{digits}f}{interval}".replace("-", "−")


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


# ---- Pictures


def draw_curve(axes, steps: Sequence[float], runs: Sequence[Sequence[float]], colour: str, end: str, **line):
    """Draw the mean of the runs with its 95 % interval as a shade, and write `end` at its end.

    `runs` has one curve per run, each with a value per step.
    """
    points = [over_runs(values) for values in zip(*runs, strict=True)]
    middle = [point.value for point in points]
    if len(runs) > 1:
        low, high = [point.low for point in points], [point.high for point in points]
        axes.fill_between(steps, low, high, color=colour, alpha=0.15, linewidth=0)
    axes.plot(steps, middle, color=colour, **{"linewidth": 2, **line})
    axes.annotate(
        end, (steps[-1], middle[-1]), (4, 0), textcoords="offset points", color=colour, va="center",
        weight="bold", size=8.5, annotation_clip=False,
    )  # fmt: skip


def draw_interval(axes, estimate: Estimate, y: float, **line) -> None:
    """Draw an interval as a horizontal line at `y`; nothing for one run, whose interval is infinite."""
    if math.isfinite(estimate.low):
        axes.plot([estimate.low, estimate.high], [y, y], **line)


def draw_upright(axes, x: float, estimate: Estimate, **line) -> None:
    """Draw an interval as a vertical line at `x`."""
    if math.isfinite(estimate.low):
        axes.plot([x, x], [estimate.low, estimate.high], **line)
