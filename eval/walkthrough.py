"""Print every number of one DPO pair, from its JSON line to its gradient.

    python -m eval.walkthrough --model runs/demo/dpo --row 203             # the pair of docs/TOUR.md
    python -m eval.walkthrough --model DIR --reference DIR --data pairs.jsonl --row 3
    python -m eval.walkthrough --model runs/demo/dpo --text                # reads prompt, chosen, rejected

The headings name the file that does each step. The gradient is computed by autograd, as in training; beside
it stands DPO's formula (arXiv 2305.18290, section 4). Computes in float32.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from dataset.inspect import paint
from dataset.jsonl import printable, read_values
from dataset.packing import build_stream
from errors import run_script
from eval.explain import SIDES, Opened, Settings, open_pair, signed
from eval.terminal import cells, terminal_width, wrap
from model.stream import TokenStream
from training.objective import Objective
from training.settings import parse

LONGEST_PROMPT, ENDS = 16, 4  # A longer prompt is shown by this many tokens of its start and its end.
SEGMENTS = ("prompt", *SIDES)


def walk(opened: Opened) -> Iterator[str]:
    """The lines of the whole walk: record, text, stream, token log-probs, sums, loss, gradient."""
    stream = build_stream(opened.pair, [0]).to(opened.policy.embed_tokens.weight.device)
    with torch.no_grad():
        policy_logps, reference_logps = opened.policy(stream), opened.reference(stream)  # (N,)
    policy_logps.requires_grad_()  # as if it came from a model in training
    models = opened.policy, opened.reference
    loss = opened.objective(opened.objective.pairs(stream, policy_logps, reference_logps, *models)).sum()
    (gradient,) = torch.autograd.grad(loss, policy_logps)  # (N,) dloss / dlog π(y_t | x, y_<t)

    width = terminal_width()
    yield from record_lines(opened, width)
    yield from text_lines(opened, width)
    yield from stream_lines(stream, opened.tokenizer)
    logps = policy_logps.detach(), reference_logps
    yield from token_lines(stream, *logps, opened.tokenizer)
    yield from loss_lines(stream, *logps, loss.item(), opened.objective)
    yield from gradient_lines(stream, *logps, gradient, opened)


def record_lines(opened: Opened, width: int) -> Iterator[str]:
    record = opened.record
    source = "typed"
    if opened.data:
        source = f"{Path(opened.data).name}:{record.line}, data format {record.format}"
    yield from [f"1. The record: {source}  (dataset/records.py)", ""]
    messages = [{"role": message.role, "content": message.content} for message in record.prompt]
    value = {"prompt": messages, "chosen": record.chosen, "rejected": record.rejected}
    if opened.data:
        value = next(value for line, value in read_values(opened.data) if line == record.line)
    yield from wrap(printable(json.dumps(value, ensure_ascii=False)), width)


def text_lines(opened: Opened, width: int) -> Iterator[str]:
    yield from ["", "2. What the model reads; « » mark the tokens in the loss  (dataset/tokenizer.py)"]
    for text in paint(opened.pair.branches, opened.tokenizer, colour=False):
        yield from ["", *wrap(text, width)]


def shown(tokenizer, token: int, width: int = 16) -> str:
    """A token as a JSON string of exactly `width` cells."""
    text = json.dumps(printable(tokenizer.decode([token])), ensure_ascii=False)
    while cells(text) > width:
        text = text[:-2] + "…"
    return text + " " * (width - cells(text))


def stream_lines(stream: TokenStream, tokenizer) -> Iterator[str]:
    """A line for each token of the stream."""
    tokens, positions = stream.tokens.tolist(), stream.positions.tolist()
    scored = {*supervised_indices(stream)}
    yield from ["", "3. The stream: the prompt once, then both answers  (dataset/packing.py)", ""]
    yield "index  position  segment      id  token             mask  attends to"
    for name, (start, end, first, last) in zip(SEGMENTS, stream.segments.tolist(), strict=True):
        cut = name == "prompt" and end - start > LONGEST_PROMPT
        for index in range(start, end):
            if cut and start + ENDS <= index < end - ENDS:
                if index == start + ENDS:
                    yield f"    …  {end - start - 2 * ENDS} more tokens of the prompt"
                continue
            seen = f"{first}–{last - 1}, " if last else ""
            seen += f"{start}–{index}" if index > start else f"{index}"
            yield (
                f"{index:5}  {positions[index]:8}  {name:<8}  {tokens[index]:5}  "
                f"{shown(tokenizer, tokens[index])}  {int(index in scored):4}  {seen}"
            )
    yield from ["", f"segments: {', '.join(str(tuple(segment)) for segment in stream.segments.tolist())}"]
    yield f"{len(tokens)} tokens, {len(stream.targets)} of them in the loss: mask 1"


def supervised(stream: TokenStream, side: int) -> Iterator[tuple[int, int, int]]:
    """(n, index, token) of each supervised token of a side: its place in (N,), its index in the stream."""
    indices = supervised_indices(stream)
    for n, (token, owner) in enumerate(zip(stream.targets.tolist(), stream.owners.tolist(), strict=True)):
        if owner == side:
            yield n, indices[n], token


def supervised_indices(stream: TokenStream) -> list[int]:
    """The index of each supervised token in the stream, (N,): all tokens of both answers."""
    return [index for start, end, *_ in stream.segments.tolist()[1:] for index in range(start, end)]


def token_lines(stream, policy_logps, reference_logps, tokenizer) -> Iterator[str]:
    """A line for each supervised token: where it is predicted, and its log-probs."""
    yield from ["", "4. Token log-probs of both models, in nats  (model/transformer.py)"]
    columns = policy_logps, reference_logps, policy_logps - reference_logps
    for side, name in enumerate(SIDES):
        yield from ["", f"{name:<8}  token             predicted at    log π  log π_ref  log-ratio"]
        for n, index, token in supervised(stream, side):
            logp, reference_logp, logratio = (signed(column[n].item()) for column in columns)
            place = f"{index:8}  {shown(tokenizer, token)}  {stream.predictors[n].item():12}"
            yield f"{place}  {logp:>7}  {reference_logp:>9}  {logratio:>9}"


def loss_lines(stream, policy_logps, reference_logps, loss: float, objective: Objective) -> Iterator[str]:
    """Sums, log-ratios, margin and loss."""
    beta = objective.settings.beta
    policy, reference = stream.sum_by_response(policy_logps), stream.sum_by_response(reference_logps)
    yield from ["", "5. Sums over the tokens of an answer  (model/stream.py)", ""]
    yield "          tokens  log π(y|x)  log π_ref(y|x)  log-ratio  reward β·log-ratio"
    ratios = (policy - reference).tolist()
    columns = zip(SIDES, stream.lengths(), policy.tolist(), reference.tolist(), ratios, strict=True)
    for side, length, logp, reference_logp, ratio in columns:
        sums = f"{signed(logp):>10}  {signed(reference_logp):>14}  {signed(ratio):>9}"
        yield f"{side:<8}  {length:6}  {sums}  {signed(beta * ratio, 3):>18}"
    margin = ratios[0] - ratios[1]
    yield from ["", "6. Margin and loss  (losses.py)", ""]
    yield f"margin  a − b = {signed(ratios[0])} − ({signed(ratios[1])}) = {signed(margin)}"
    yield f"reward margin  β (a − b) = {beta:g} · ({signed(margin)}) = {signed(beta * margin, 3)}"
    formula = " = −log σ(β (a − b))" if objective.is_dpo else ""
    yield f"loss, {objective.settings.loss}{formula} = {loss:.4f}"


def gradient_lines(stream, policy_logps, reference_logps, gradient, opened: Opened) -> Iterator[str]:
    """The derivative of the loss by the log-prob and by the logit of each supervised token."""
    beta, is_dpo = opened.objective.settings.beta, opened.objective.is_dpo
    chosen, rejected = stream.sum_by_side(policy_logps - reference_logps)
    pull = (beta * torch.sigmoid(-beta * (chosen - rejected))).item()  # β σ(−β (a − b))
    yield from ["", "7. The gradient  (autograd, as in training)", ""]
    if is_dpo:
        yield f"formula: −β σ(−β (a − b)) = {signed(-pull, 4)} for y_w, {signed(pull, 4)} for y_l"
    yield "dloss/dlogit = dloss/dlog π · (1 − π): a token that the policy is sure of does not move"
    for side, name in enumerate(SIDES):
        formula = "  formula" if is_dpo else ""
        yield from ["", f"{name:<8}  token                   π  dloss/dlog π{formula}  dloss/dlogit"]
        for n, index, token in supervised(stream, side):
            probability, slope = policy_logps[n].exp().item(), gradient[n].item()
            formula = f"  {signed(pull if side else -pull, 4):>7}" if is_dpo else ""
            place = f"{index:8}  {shown(opened.tokenizer, token)}  {probability:7.4f}"
            yield f"{place}  {signed(slope, 4):>12}{formula}  {signed(slope * (1 - probability), 4):>12}"


def main(arguments: list[str] | None = None) -> None:
    opened = open_pair(parse(Settings, __doc__.split("\n")[0], arguments))
    sys.stdout.reconfigure(errors="backslashreplace")
    print("\n".join(walk(opened)))


if __name__ == "__main__":
    run_script(main)
