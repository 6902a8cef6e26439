"""A report on a data file, before training on it.

    python -m dataset.inspect pairs.jsonl
    python -m dataset.inspect train.jsonl --against heldout.jsonl --tokenizer runs/sft/tokenizer.json --show 5

Prints the format, the records kept and dropped with reasons and line numbers, lengths in tokens, repeated
prompts, prompts that are also in another file, and some records as the model reads them, with the supervised
tokens marked. For pairs it also prints which side is longer and how much the sides differ: both decide what
DPO learns. The exit status is 1 if training on the file would stop: at a bad record, or with none left.
"""

import argparse
import random
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from dataset.formats import FEEDBACK_FORMATS, PREFERENCE_FORMATS, SFT_FORMATS
from dataset.jsonl import printable
from dataset.records import Conversation, DataError, Feedback, Preference, prompt_digest, read_records
from dataset.store import Branch, Report, encode_or_drop, score_margin
from dataset.tokenizer import ChatTokenizer
from errors import InputError, run_script

GREEN, DIM, PLAIN = "\033[32m", "\033[2m", "\033[0m"
PERCENTILES = (0, 50, 90, 95, 99, 100)
LINES_SHOWN = 12
# The edit distance of two sides takes |y_w| · |y_l| comparisons, so it is measured on this many pairs: their
# mean is then known to about 0.02.
PAIRS_COMPARED = 200
LONGER = 0.6  # A rule that only prefers the longer (or the shorter) side is right in this share of the pairs.
FORMATS = {Preference: PREFERENCE_FORMATS, Conversation: SFT_FORMATS, Feedback: FEEDBACK_FORMATS}
CLOSE = 0.2  # Below it four tokens of five are shared. The bundled close pairs have 0.06, UltraFeedback 0.88.


class Findings:
    """The counts of one pass over a file. Memory grows with the number of records, not with their text."""

    def __init__(self, path: str, tokenizer: ChatTokenizer, max_length: int, show: int):
        self.report, self.description = Report(), ""
        self.errors: dict[str, list[int]] = defaultdict(list)  # reason: lines at which training stops
        self.lengths: dict[str, list[int]] = defaultdict(list)  # part: tokens of each record
        self.prompts: dict[bytes, list[int]] = defaultdict(list)  # digest of a prompt: its lines
        self.examples: list[tuple[int, list[Branch]]] = []
        self.longer = self.shorter = 0  # kept pairs whose chosen side is longer, or shorter
        self.desirable = self.feedback = 0  # kept answers with a label, and those of them that are desirable
        self.compared: list[list[Branch]] = []  # a random sample of the kept pairs
        draw = random.Random(0)
        for record in read_records(path):
            if isinstance(record, DataError):
                self.errors[record.reason].append(record.line)
                continue
            self.report.format = record.format
            self.description = FORMATS[type(record)][record.format].description
            try:
                branches, length, reason = encode_or_drop(record, tokenizer, max_length)
            except InputError as error:  # The chat template has no place for a message of this record.
                self.errors[str(error)].append(record.line)
                continue
            prompt, *sides = branches or [()]
            branches = [prompt, *(side for side in sides if side[0])]  # without a missing side
            self.measure(branches, length)
            self.prompts[prompt_digest(record)].append(record.line)
            if reason:
                self.report.drop(reason, record.line)
                continue
            self.report.kept += 1
            self.desirable += isinstance(record, Feedback) and record.label
            self.feedback += isinstance(record, Feedback)
            self.report.rejected_higher += score_margin(record) < 0
            if len(self.examples) < show:
                self.examples.append((record.line, branches))
            if len(branches) == 3:
                self.compare(branches, draw)

    def measure(self, branches: list[Branch], length: int) -> None:
        if len(branches) == 3:
            for name, (ids, _) in zip(("prompt", "chosen", "rejected"), branches, strict=True):
                self.lengths[name].append(len(ids))
        self.lengths["whole"].append(length)

    def compare(self, branches: list[Branch], draw: random.Random) -> None:
        """Count which side of a kept pair is longer, and sample pairs with equal chances (algorithm R)."""
        chosen, rejected = (len(ids) for ids, _ in branches[1:])
        self.longer += chosen > rejected
        self.shorter += chosen < rejected
        if len(self.compared) < PAIRS_COMPARED:
            self.compared.append(branches)
        elif (place := draw.randrange(self.report.kept)) < PAIRS_COMPARED:
            self.compared[place] = branches


def summary(findings: Findings, max_length: int) -> Iterator[str]:
    """The lines of the report on a file, without its examples."""
    report = findings.report
    if report.format:
        yield f"format    {report.format}: {findings.description}"
    bad_lines = [line for lines in findings.errors.values() for line in lines]
    total = report.total() + len(bad_lines)
    yield f"records   {total}: {report.kept} to train on"
    for reason, lines in report.dropped.items():
        yield f"dropped   {len(lines)} {reason}: {line_list(lines)}"
    for reason, lines in sorted(findings.errors.items(), key=lambda item: -len(item[1])):
        yield f"bad       {len(lines)} {reason}: {line_list(lines)}"
    if bad_lines:
        yield f"          training stops at line {min(bad_lines)}; --skip-bad leaves out up to 1 % of a file"
    if too_long := report.dropped.get("too long"):
        yield f"          {len(too_long) / total:.1%} are longer than {max_length} tokens"
    yield from (f"scores    {line}" for line in report.score_lines())
    if findings.feedback:
        undesirable = findings.feedback - findings.desirable
        yield f"labels    {findings.desirable} desirable answers, {undesirable} undesirable ones"
    yield "tokens    " + "".join(f"{f'{p} %':>8}" for p in PERCENTILES)
    for name, lengths in findings.lengths.items():
        percentiles = np.percentile(lengths, PERCENTILES, method="nearest")
        yield f"  {name:<8}" + "".join(f"{tokens:>8}" for tokens in percentiles)
    if findings.compared:
        yield from length_lines(findings)
        yield from distance_lines(findings.compared)
    repeated = [lines for lines in findings.prompts.values() if len(lines) > 1]
    if repeated:
        extra = sum(map(len, repeated)) - len(repeated)
        yield f"repeated  {len(repeated)} prompts stand {extra} more times, as on {line_list(repeated[0])}"
    else:
        yield "repeated  no prompt stands twice"


def length_lines(findings: Findings) -> Iterator[str]:
    """The share of pairs whose chosen side is longer, and what it means for DPO."""
    longer, shorter = findings.longer / findings.report.kept, findings.shorter / findings.report.kept
    yield f"longer    the chosen side in {longer:.1%} of the pairs, the rejected side in {shorter:.1%}"
    if max(longer, shorter) < LONGER:
        yield "          the length alone decides few pairs, so DPO must learn something else"
    else:
        kind = "longer" if longer > shorter else "shorter"
        yield f"          DPO can win these pairs by {kind} answers alone; --ld-alpha 0.5 weakens that"


def distance_lines(pairs: list[list[Branch]]) -> Iterator[str]:
    """The edit distance of the sides, end tokens left out, and what it means for DPO."""
    sides = ([ids[:-1] for ids, _ in branches[1:]] for branches in pairs)
    distances = [edit_distance(*both) / max(map(len, both)) for both in sides]
    low, middle, high = np.percentile(distances, (10, 50, 90))
    yield (
        f"distance  median {middle:.2f} (10 %: {low:.2f}, 90 %: {high:.2f}) of {len(pairs)} pairs: edits "
        "from one side to the other, divided by the longer side"
    )
    if middle < CLOSE:
        yield (
            "          the sides are close, and DPO can make the chosen answers less likely too: "
            "--loss dpop prevents it"
        )
    else:
        yield "          the sides differ, so raising the chosen side does not raise the rejected side"


def edit_distance(one: list[int], other: list[int]) -> int:
    """Levenshtein's distance: the fewest insertions, deletions and replacements between two lists."""
    other, places = np.asarray(other), np.arange(len(other) + 1)
    row = places  # row[j]: the distance of one[:i] and other[:j]
    for i, token in enumerate(one, start=1):
        best = np.minimum(row[1:] + 1, row[:-1] + (other != token))  # deletion; replacement, or nothing
        # An insertion adds 1 to the place before: row[j] = min over k <= j of best[k] + j - k.
        row = np.minimum.accumulate(np.concatenate([[i], best]) - places) + places
    return int(row[-1])


def overlap(findings: Findings, other: Findings, path: str) -> str:
    """The line of the report about prompts that are also in another file."""
    common = findings.prompts.keys() & other.prompts.keys()
    lines = sorted(line for prompt in common for line in findings.prompts[prompt])
    if not lines:
        return f"overlap   no prompt stands in {path}"
    return f"overlap   {len(lines)} records have a prompt that also stands in {path}: {line_list(lines)}"


def line_list(lines: list[int]) -> str:
    rest = len(lines) - LINES_SHOWN
    shown = ", ".join(map(str, lines[:LINES_SHOWN]))
    return f"line{'s' * (len(lines) > 1)} {shown}" + (f" and {rest} more" if rest > 0 else "")


def paint(branches: list[Branch], tokenizer: ChatTokenizer, colour: bool) -> list[str]:
    """One text for each response, as the model reads it; supervised tokens are green, or stand in «»."""
    (prompt, prompt_mask), *sides = branches
    before, on, off = (DIM, PLAIN + GREEN, PLAIN + DIM) if colour else ("", "«", "»")
    texts = []
    for ids, mask in sides:
        ids, mask = np.array([*prompt, *ids]), np.array([*prompt_mask, *mask])
        text, runs = before, np.split(np.arange(len(ids)), np.flatnonzero(np.diff(mask)) + 1)
        for run in runs:
            piece = printable(tokenizer.decode(ids[run].tolist()))
            text += f"{on}{piece}{off}" if mask[run[0]] else piece
        texts.append(text + (PLAIN if colour else ""))
    return texts


def main(arguments: list[str] | None = None) -> int:
    default = Path(__file__).parent / "sample" / "tokenizer.json"
    parser = argparse.ArgumentParser(prog="python -m dataset.inspect", description=__doc__.split("\n")[0])
    parser.add_argument("file", metavar="FILE", help="preferences, conversations, feedback (docs/DATA.md)")
    parser.add_argument("--against", metavar="FILE", help="a second file: count the prompts that are in both")
    parser.add_argument("--tokenizer", default=default, help="path of the tokenizer.json to use")
    parser.add_argument("--max-length", type=int, default=512, help="limit on tokens of prompt and response")
    parser.add_argument("--show", type=int, default=2, help="records to print as the model reads them")
    parser.add_argument(
        "--colour", action=argparse.BooleanOptionalAction, default=sys.stdout.isatty(),
        help="mark supervised tokens in colour",
    )  # fmt: skip
    settings = parser.parse_args(arguments)

    tokenizer = ChatTokenizer(settings.tokenizer)
    findings = Findings(settings.file, tokenizer, settings.max_length, settings.show)
    print(settings.file)
    print("\n".join(summary(findings, settings.max_length)))
    if settings.against:
        other = Findings(settings.against, tokenizer, settings.max_length, show=0)
        print(overlap(findings, other, settings.against))
    for line, branches in findings.examples:
        for name, text in zip(
            ("chosen", "rejected"), paint(branches, tokenizer, settings.colour), strict=False
        ):
            print(f"\n---- line {line}{f', {name}' if len(branches) == 3 else ''}\n{text}")
    return 1 if findings.errors or not findings.report.kept else 0


if __name__ == "__main__":
    run_script(main)
