"""Show what DPO changed in one pair: every token coloured by log π / π_ref.

    python -m eval.explain --model runs/dpo --row 3            # the third of the run's held-out pairs
    python -m eval.explain --model runs/dpo --data pairs.jsonl --row 3
    python -m eval.explain --model runs/dpo --text             # reads prompt, chosen, rejected, a line each

A token is blue if the policy finds it more likely than the reference does, and orange if less. The log-ratios
of an answer's tokens sum to its log-ratio; beta times that is its implicit reward (arXiv 2305.18290, eq. 5).
Without colours (a pipe, or NO_COLOR) the log-ratio follows each token in brackets. Computes in float32.
"""

import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from dataset.jsonl import printable
from dataset.packing import build_stream
from dataset.records import DataError, Message, Preference, read_preferences
from dataset.store import Branch, TokenStore, encode, score_margin
from dataset.tokenizer import ChatTokenizer
from errors import InputError, run_script
from eval.common import (
    load_policy_and_reference,
    print_start,
    reference_of,
    run_settings,
)
from eval.preference import choose_objective, held_out_pairs
from eval.terminal import cells, terminal_width, text_pieces, wrap
from model.transformer import Transformer
from training.distributed import pick_device
from training.objective import Objective
from training.settings import DEVICE_WHY, DEVICES, Flags, flag, parse

SIDES = ("chosen", "rejected")
STEPS = (0.1, 0.3, 1.0, 3.0)  # |log-ratio| in nats at which the colour becomes stronger
# 256-colour codes of the background; the text is black, so both read on dark and on light terminals.
BLUES, ORANGES = (195, 153, 111, 75), (230, 223, 215, 208)
PLAIN, DIM = "\x1b[0m", "\x1b[2m"
LARGEST = 5  # tokens in the list below an answer


@dataclass
class Settings(Flags):
    model: str = flag("runs/dpo", "model folder of the policy")
    reference: str = flag("", "model folder of the reference; default: the model that the run started from")
    data: str = flag("", "preference pairs: .jsonl or .json, also .gz; default: the run's held-out pairs")
    row: int = flag(1, "number of the record in the file, from 1")
    text: bool = flag(False, "read a pair from standard input: prompt, chosen and rejected, one line each")
    beta: float | None = flag(None, "KL strength in rewards and loss; default: the run's, or 0.1")
    loss: str = flag("", "loss or losses (see losses.py); default: the run's with its options, or sigmoid")
    device: str = flag("auto", DEVICE_WHY, DEVICES)

    def __post_init__(self) -> None:
        self.at_least(1, "row")
        self.require(self.beta is None or self.beta > 0, "beta", "above 0")


# ---- One pair


class OnePair:
    """A record in the form of a `TokenStore` with one row."""

    reference_logps = None

    def __init__(self, record: Preference, branches: list[Branch]):
        self.branches = [(np.asarray(ids), np.asarray(mask, bool)) for ids, mask in branches]
        self.bounds = np.cumsum([[0, *(len(ids) for ids, _ in branches)]], axis=1)
        self.score_margins = np.array([score_margin(record)])
        self.lines = np.array([record.line])

    def row(self, index: int) -> list[tuple[np.ndarray, np.ndarray]]:
        return self.branches


@dataclass(frozen=True)
class Answer:
    """One side of a pair: its supervised tokens, end token included, and their log-probs, each (|y|,)."""

    tokens: list[int]
    logps: list[float]  # log π(y_t | x, y_<t)
    reference_logps: list[float]

    @property
    def logratios(self) -> list[float]:
        return [logp - reference for logp, reference in zip(self.logps, self.reference_logps, strict=True)]


@torch.no_grad()
def explain_rows(
    policy: Transformer, reference: Transformer, pairs: TokenStore | OnePair, rows, objective: Objective
) -> list[tuple[list[Answer], float]]:
    """For each row its chosen and its rejected answer with the log-probs of both models, and its loss."""
    stream = build_stream(pairs, rows).to(policy.embed_tokens.weight.device)
    policy_logps, reference_logps = policy(stream), reference(stream)  # (N,)
    inputs = objective.pairs(stream, policy_logps, reference_logps, policy, reference)
    losses = objective(inputs).tolist()  # (B,)
    lengths = stream.lengths().tolist()  # The targets of an answer are consecutive.
    columns = (x.split(lengths) for x in (stream.targets, policy_logps, reference_logps))
    answers = [Answer(*(x.tolist() for x in values)) for values in zip(*columns, strict=True)]
    return [(answers[2 * i : 2 * i + 2], loss) for i, loss in enumerate(losses)]


def explain(
    policy: Transformer, reference: Transformer, pair: OnePair, objective: Objective
) -> tuple[list[Answer], float]:
    """The chosen and the rejected answer of one pair, and its loss."""
    return explain_rows(policy, reference, pair, [0], objective)[0]


def read_row(path: str, row: int) -> Preference:
    """The pair with this number in a file. Raises `DataError` if it is bad, `InputError` if there is none."""
    count = 0
    for count, record in enumerate(read_preferences(path), start=1):
        if count == row:
            if isinstance(record, DataError):
                raise record
            return record
    raise InputError(f"--row {row}: {path} has {count} records")


def read_typed() -> Preference:
    """A pair from standard input, one line each: prompt, chosen, rejected."""
    texts = []
    sys.stdin.reconfigure(errors="replace")
    for name in ("prompt", *SIDES):
        if sys.stdin.isatty():
            print(f"{name}: ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline().strip()
        if not line:
            raise InputError(f"--text: the line of the {name} is missing or empty")
        texts.append(line)
    prompt, chosen, rejected = texts
    return Preference((Message("user", prompt),), chosen, rejected, 1)


@dataclass(frozen=True)
class Opened:
    """One pair, and what it is computed with: two models in float32, their tokenizer, the objective."""

    policy: Transformer
    reference: Transformer
    tokenizer: ChatTokenizer
    objective: Objective
    data: str  # the pair's file; "" for --text
    record: Preference
    pair: OnePair


def open_pair(settings: Settings) -> Opened:
    """Load what the settings name. Raises `InputError` for what is missing or a pair that is too long."""
    device, run = pick_device(settings.device), run_settings(settings.model)
    folder = settings.reference or reference_of(settings.model)
    policy, reference, tokenizer = load_policy_and_reference(settings.model, folder, device)
    print_start({settings.model: policy, folder: reference}, device, "fp32")
    data = "" if settings.text else settings.data or held_out_pairs(settings.model, run)[0]
    record = read_row(data, settings.row) if data else read_typed()
    pair = OnePair(record, encode(record, tokenizer))
    policy.config.check_fits(length=int(pair.bounds[0, -1]))
    objective = choose_objective(settings, run, pair, data or "--text")
    return Opened(policy, reference, tokenizer, objective, data, record, pair)


# ---- On the terminal


def colour_of(logratio: float) -> str:
    """The escape code of a log-ratio's background; "" below the first step."""
    strength = sum(abs(logratio) >= step for step in STEPS)
    codes = BLUES if logratio > 0 else ORANGES
    return f"\x1b[38;5;16;48;5;{codes[strength - 1]}m" if strength else ""


def token_pieces(answer: Answer, tokenizer) -> Iterator[tuple[str, float, float]]:
    """(text, log π, log π_ref) of each token. Tokens that share a character come together, with sums."""
    pieces = list(text_pieces(tokenizer, answer.tokens))
    total, reference_total = 0.0, 0.0
    for piece, logp, reference in zip(pieces, answer.logps, answer.reference_logps, strict=False):
        total, reference_total = total + logp, reference_total + reference
        if piece:
            yield printable(piece), total, reference_total
            total, reference_total = 0.0, 0.0
    if pieces[-1]:  # bytes at the end that are not a character
        yield printable(pieces[-1]), total, reference_total


def pieces_of(answer: Answer, tokenizer) -> Iterator[tuple[str, float]]:
    """(text, log-ratio) of each token, from `token_pieces`."""
    return ((text, logp - reference) for text, logp, reference in token_pieces(answer, tokenizer))


def lay_out(pieces: list[tuple[str, float]], width: int, colour: bool) -> list[str]:
    """Lines of at most `width` cells: tokens on their colours, or each followed by its log-ratio."""
    lines, line, used = [], "", 0
    for text, logratio in pieces:
        for part in text.replace("\n", "↵\n").splitlines(keepends=True):
            shown = part.rstrip("\n")
            if not colour:
                shown += f"[{signed(logratio)}]"
            for chunk in wrap(shown, width) if cells(shown) > width else [shown]:
                if used and used + cells(chunk) > width:
                    lines.append(line)
                    line, used = "", 0
                code = colour_of(logratio) if colour else ""
                line += f"{code}{chunk}{PLAIN}" if code else chunk
                used += cells(chunk)
            if part.endswith("\n"):
                lines.append(line)
                line, used = "", 0
    return [*lines, line]


def signed(value: float, digits: int = 2) -> str:
    """``+1.25`` or ``−0.40``. Adding 0.0 avoids ``−0.00``."""
    return f"{round(value, digits) + 0.0:+.{digits}f}".replace("-", "−")


def describe(
    record: Preference, answers: list[Answer], loss: float, objective: Objective, tokenizer, colour: bool
) -> Iterator[str]:
    """The lines that show a pair: prompt, both answers with sums and rewards, margin and loss."""
    beta, width = objective.settings.beta, max(20, terminal_width() - 2)
    dim, plain = (DIM, PLAIN) if colour else ("", "")
    for message in record.prompt:
        for line in wrap(printable(f"{message.role}: {message.content}"), width):
            yield f"{dim}{line}{plain}"
    sums = []
    for name, answer in zip(SIDES, answers, strict=True):
        pieces = list(pieces_of(answer, tokenizer))
        sums.append(sum(answer.logratios))
        logps, reference_logps = sum(answer.logps), sum(answer.reference_logps)
        yield ""
        yield (
            f"{name}: log π/π_ref {signed(sums[-1])} = {signed(logps)} − ({signed(reference_logps)}), "
            f"reward {signed(beta * sums[-1])}, {len(answer.tokens)} tokens"
        )
        yield from lay_out(pieces, width, colour)
        largest = sorted(pieces, key=lambda piece: -abs(piece[1]))[:LARGEST]
        shown = ", ".join(f"{text.strip() or repr(text)} {signed(value)}" for text, value in largest)
        yield from wrap(f"largest: {shown}", width)
    yield ""
    margin = sums[0] - sums[1]
    yield f"margin: log-ratios {signed(margin)}, rewards {signed(beta * margin)} (beta {beta:g})"
    yield f"loss {objective.settings.loss}: {loss:.4f}"
    if colour:
        values = [*(-step for step in reversed(STEPS)), *STEPS]
        yield "nats per token: " + "".join(f"{colour_of(v)} {signed(v)} {PLAIN}" for v in values)


def main(arguments: list[str] | None = None) -> None:
    opened = open_pair(parse(Settings, __doc__.split("\n")[0], arguments))
    answers, loss = explain(opened.policy, opened.reference, opened.pair, opened.objective)
    colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    sys.stdout.reconfigure(errors="backslashreplace")
    lines = describe(opened.record, answers, loss, opened.objective, opened.tokenizer, colour)
    print("\n".join(lines))


if __name__ == "__main__":
    run_script(main)
