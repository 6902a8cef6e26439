"""Look at a data file before training on it.

    python -m dataset.inspect pairs.jsonl
    python -m dataset.inspect train.jsonl --against heldout.jsonl --tokenizer runs/sft/tokenizer.json --show 5

Prints the shape, the records kept and dropped with reasons and line numbers, lengths in tokens, repeated
prompts, prompts that also stand in another file, and some records as the model sees them, with the
supervised tokens marked. Ends with status 1 when training would stop at a record.
"""

import argparse
import hashlib
import sys
import unicodedata
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from dataset.records import PREFERENCE_FORMATS, SFT_FORMATS, DataError, Preference, read_records
from dataset.store import Branch, encode, full_length, reason_to_drop
from dataset.tokenizer import ChatTokenizer
from errors import run_script

GREEN, DIM, PLAIN = "\033[32m", "\033[2m", "\033[0m"
PERCENTILES = (0, 50, 90, 95, 99, 100)
LINES_SHOWN = 12


class Findings:
    """What one pass over a file gathers; memory grows with the number of records, not with their text."""

    def __init__(self, path: str, tokenizer: ChatTokenizer, max_length: int, show: int):
        self.kept, self.shape = 0, None
        self.errors: dict[str, list[int]] = defaultdict(list)  # reason: lines that training would stop at
        self.dropped: dict[str, list[int]] = defaultdict(list)  # reason: lines that training leaves out
        self.lengths: dict[str, list[int]] = defaultdict(list)  # part: tokens of each record
        self.prompts: dict[bytes, list[int]] = defaultdict(list)  # digest of a prompt: its lines
        self.examples: list[tuple[int, list[Branch]]] = []
        for record in read_records(path):
            if isinstance(record, DataError):
                self.errors[record.reason].append(record.line)
                continue
            self.shape = (PREFERENCE_FORMATS if isinstance(record, Preference) else SFT_FORMATS, record.format)
            branches = encode(record, tokenizer)
            self.measure(branches)
            self.prompts[prompt_digest(record)].append(record.line)
            if reason := reason_to_drop(branches, max_length):
                self.dropped[reason].append(record.line)
                continue
            self.kept += 1
            if len(self.examples) < show:
                self.examples.append((record.line, branches))

    def measure(self, branches: list[Branch]) -> None:
        names = ("prompt", "chosen", "rejected") if len(branches) == 3 else ("", "")
        for name, (ids, _) in zip(names, branches, strict=True):
            if name:
                self.lengths[name].append(len(ids))
        self.lengths["whole"].append(full_length(branches))


def prompt_digest(record) -> bytes:
    """16 bytes that two records share if, but for white space and case, their prompts are the same."""
    turns = record.prompt if isinstance(record, Preference) else record.messages[:-1]
    text = "\0".join(f"{turn.role}\1{' '.join(turn.content.lower().split())}" for turn in turns)
    return hashlib.sha256(text.encode()).digest()[:16]


def report(findings: Findings, path: str, max_length: int) -> Iterable[str]:
    """The lines that describe a file, but for its examples."""
    if findings.shape:
        shapes, name = findings.shape
        yield f"shape     {name}: {shapes[name].description}"
    total = findings.kept + sum(map(len, [*findings.dropped.values(), *findings.errors.values()]))
    total_lines = [line for lines in findings.errors.values() for line in lines]
    yield f"records   {total}: {findings.kept} to train on"
    for reason, lines in findings.dropped.items():
        yield f"dropped   {len(lines)} {reason}: {line_list(lines)}"
    for reason, lines in sorted(findings.errors.items(), key=lambda item: -len(item[1])):
        yield f"bad       {len(lines)} {reason}: {line_list(lines)}"
    if total_lines:
        first = min(total_lines)
        yield f"          training stops at line {first}; --skip-bad leaves out up to 1 % of a file"
    if too_long := findings.dropped.get("too long"):
        yield f"          {len(too_long) / total:.1%} are longer than {max_length} tokens"
    yield "tokens    " + "".join(f"{f'{p} %':>8}" for p in PERCENTILES)
    for name, lengths in findings.lengths.items():
        figures = np.percentile(lengths, PERCENTILES, method="nearest")
        yield f"  {name:<8}" + "".join(f"{figure:>8}" for figure in figures)
    repeated = [lines for lines in findings.prompts.values() if len(lines) > 1]
    if repeated:
        extra = sum(map(len, repeated)) - len(repeated)
        yield f"repeated  {len(repeated)} prompts stand {extra} more times, as on {line_list(repeated[0])}"
    else:
        yield "repeated  no prompt stands twice"


def overlap(findings: Findings, other: Findings, path: str) -> str:
    lines = sorted(
        line for prompt in findings.prompts.keys() & other.prompts.keys() for line in findings.prompts[prompt]
    )
    if not lines:
        return f"overlap   no prompt stands in {path}"
    return f"overlap   {len(lines)} records have a prompt that also stands in {path}: {line_list(lines)}"


def line_list(lines: list[int]) -> str:
    rest = len(lines) - LINES_SHOWN
    shown = ", ".join(map(str, lines[:LINES_SHOWN]))
    return f"line{'s' * (len(lines) > 1)} {shown}" + (f" and {rest} more" if rest > 0 else "")


def paint(branches: list[Branch], tokenizer: ChatTokenizer, colour: bool) -> list[str]:
    """One text a response, as the model sees it; what is supervised is green, or stands in «»."""
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


def printable(text: str) -> str:
    """Text that can do nothing to a terminal: control characters are escaped, tabs become spaces.

    Those are the C0 and C1 controls (an ESC could move the cursor, retitle the window or worse), line and
    paragraph separators, lone surrogates, and format characters, some of which turn the writing direction.
    Line feeds stay, and so do the two joiners that some scripts and emoji need.
    """

    def shown(c: str) -> str:
        if c == "\t":
            return "    "
        harmless = c in "\n\u200c\u200d" or unicodedata.category(c) not in ("Cc", "Cf", "Cs", "Zl", "Zp")
        return c if harmless else c.encode("unicode_escape").decode()

    return "".join(map(shown, text))


def main(arguments: list[str] | None = None) -> int:
    default = Path(__file__).parent / "sample" / "tokenizer.json"
    parser = argparse.ArgumentParser(prog="python -m dataset.inspect", description=__doc__.split("\n")[0])
    parser.add_argument("file", metavar="FILE", help="preferences or conversations, in any known shape")
    parser.add_argument("--against", metavar="FILE", help="also count the prompts that stand in this file")
    parser.add_argument("--tokenizer", default=default, help="tokenizer.json to count and mark tokens with")
    parser.add_argument("--max-length", type=int, default=512, help="tokens that training would allow")
    parser.add_argument("--show", type=int, default=2, help="records to show as the model sees them")
    parser.add_argument("--colour", action=argparse.BooleanOptionalAction, default=sys.stdout.isatty())
    settings = parser.parse_args(arguments)

    tokenizer = ChatTokenizer(settings.tokenizer)
    findings = Findings(settings.file, tokenizer, settings.max_length, settings.show)
    print(settings.file)
    print("\n".join(report(findings, settings.file, settings.max_length)))
    if settings.against:
        other = Findings(settings.against, tokenizer, settings.max_length, show=0)
        print(overlap(findings, other, settings.against))
    for line, branches in findings.examples:
        for name, text in zip(
            ("chosen", "rejected"), paint(branches, tokenizer, settings.colour), strict=False
        ):
            print(f"\n---- line {line}{f', {name}' if len(branches) == 3 else ''}\n{text}")
    return 1 if findings.errors else 0


if __name__ == "__main__":
    run_script(main)
