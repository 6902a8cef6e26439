"""Tokenised once, read by all: a data file as flat memory-mapped arrays.

The first process to need a file tokenises it, record by record, into a folder named after everything that
could change the result: the file's bytes, the tokenizer, the template, the length, the way it is read. Every
rank, every restart and every later run maps the same arrays, so a file larger than memory works.
"""

import hashlib
import json
import math
import os
import shutil
import tempfile
from array import array
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import numpy as np

from dataset.records import Conversation, DataError, Preference, read_conversations, read_preferences
from dataset.tokenizer import ChatTokenizer
from errors import InputError
from files import file_hash, sync

VERSION = 3  # Of the arrays below; a new layout must not read an old folder.
BAD_SHARE = 0.01  # With skip_bad, more bad records than this are a wrong file, not a few bad lines.

Branch = tuple[list[int], list[bool]]  # ids, and for each whether it is supervised


def encode(record: Preference | Conversation, tokenizer: ChatTokenizer) -> list[Branch]:
    """A record as a prompt and the branches that go on from it: chosen and rejected, or one conversation."""
    if isinstance(record, Conversation):
        return [([], []), tokenizer.conversation(record.messages)]
    prompt = tokenizer.prompt(record.prompt)
    sides = [tokenizer.response(record.chosen), tokenizer.response(record.rejected)]
    return [(prompt, [False] * len(prompt)), *((side, [True] * len(side)) for side in sides)]


def full_length(branches: list[Branch]) -> int:
    """Tokens of the prompt and the longest branch: what must fit into max_length."""
    prompt, *sides = branches
    return len(prompt[0]) + max(len(ids) for ids, _ in sides)


def reason_to_drop(branches: list[Branch], max_length: int) -> str | None:
    """A response is trained on whole, with its end token, or not at all; an equal pair prefers nothing."""
    if full_length(branches) > max_length:
        return "too long"
    if len(branches) == 3 and branches[1] == branches[2]:
        return "chosen equals rejected"
    return None


def score_margin(record: Preference | Conversation) -> float:
    """score_chosen - score_rejected, or the logit of win_probability if it is there; NaN without labels."""
    if isinstance(record, Preference) and record.win_probability is not None:
        p = record.win_probability
        return math.log(p) - math.log1p(-p) if 0 < p < 1 else math.copysign(math.inf, p - 0.5)
    if isinstance(record, Preference) and record.scores is not None:
        return record.scores[0] - record.scores[1]
    return math.nan


@dataclass
class Report:
    """What became of a file's records."""

    shape: str = ""
    kept: int = 0
    dropped: dict[str, list[int]] = field(default_factory=dict)  # reason: line numbers
    longest: int = 0  # tokens of the longest record, kept or not

    def drop(self, reason: str, line: int) -> None:
        self.dropped.setdefault(reason, []).append(line)

    def total(self) -> int:
        return self.kept + sum(map(len, self.dropped.values()))

    def __str__(self) -> str:
        parts = [f"{self.kept} of {self.total()} records ({self.shape})"]
        for reason, lines in self.dropped.items():
            shown = ", ".join(map(str, lines[:5])) + (", …" if len(lines) > 5 else "")
            parts.append(f"{len(lines)} dropped: {reason} (line {shown})")
        if len(self.dropped.get("too long", ())) > 0.05 * self.total():
            parts.append(f"--max-length {self.longest} would keep the long ones")
        return "; ".join(parts)


class TokenStore:
    """The arrays of one file: row i is a prompt and its branches, each a run of ids with a loss mask."""

    def __init__(self, folder: Path, fingerprint: str):
        self.folder, self.fingerprint = folder, fingerprint  # the latter of the data file
        self.report = Report(**json.loads((folder / "report.json").read_text()))
        self.bounds = np.load(folder / "bounds.npy", mmap_mode="r")  # (rows, 2 + branches) offsets
        self.lines = np.load(folder / "lines.npy", mmap_mode="r")  # (rows,) line in the data file
        self.records = np.load(folder / "records.npy", mmap_mode="r")  # (rows,) place among its records
        self.tokens = np.memmap(folder / "tokens.bin", np.int32, "r")
        self.supervised = np.memmap(folder / "supervised.bin", np.bool_, "r")
        self.targets = np.load(folder / "targets.npy", mmap_mode="r")  # (rows,) supervised tokens
        self.score_margins = np.load(folder / "score_margins.npy", mmap_mode="r")  # (rows,) NaN: has none
        self.lengths = self.bounds[:, -1] - self.bounds[:, 0]  # (rows,) tokens of all branches
        if not len(self.tokens) == len(self.supervised) == self.bounds[-1, -1]:
            raise ValueError("the arrays do not fit together")
        self.target_bounds = np.concatenate([[0], np.cumsum(self.targets)])  # (rows + 1,) offsets, see next
        # With --reference cached: log pi_ref of each supervised token, row by row (training/reference.py).
        self.reference_logps: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.bounds)

    def row(self, index: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """[prompt, branch, …], each (ids, supervised); the prompt of a conversation is empty."""
        offsets = self.bounds[index].tolist()
        return [(self.tokens[start:end], self.supervised[start:end]) for start, end in pairwise(offsets)]


def open_store(
    path: str | Path,
    kind: str,
    tokenizer: ChatTokenizer,
    max_length: int,
    shape: str = "auto",
    skip_bad: bool = False,
) -> TokenStore:
    """The `TokenStore` of a ``"preferences"`` or ``"conversations"`` file, tokenised now if it never was.

    Raises `DataError` at the first bad record; with `skip_bad`, leaves such records out as long as they are
    at most 1 %. Raises `InputError` when no record is left.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such data file")
    content = file_hash(path)
    key = (VERSION, content, tokenizer.fingerprint, kind, max_length, shape, skip_bad)
    folder = cache_folder() / hashlib.sha256(json.dumps(key).encode()).hexdigest()[:32]
    if not folder.is_dir():
        _build(folder, path, content, kind, tokenizer, max_length, shape, skip_bad)
    try:
        return TokenStore(folder, fingerprint=content)
    except (OSError, ValueError, TypeError, EOFError) as error:
        raise InputError(f"{folder}: damaged, remove it and it is made anew ({error})") from None


def cache_folder() -> Path:
    """Where tokenised data is kept: $MINIDPO_CACHE, or the user's cache folder."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "minidpo"
    return Path(os.environ.get("MINIDPO_CACHE") or default)


def _build(folder: Path, path: Path, content: str, kind, tokenizer, max_length, shape, skip_bad) -> None:
    """Tokenise into a folder beside the final one, and rename it when it is whole."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(dir=folder.parent, prefix="unfinished-"))
    unfinished.chmod(0o755)  # Another user may share the cache.
    try:
        _write(unfinished, path, kind, tokenizer, max_length, shape, skip_bad)
        if file_hash(path) != content:
            raise InputError(f"{path}: the file changed while it was read")
        for file in (*unfinished.iterdir(), unfinished):
            sync(file)  # Or a power cut could leave the name of the folder and not what is in it.
        try:
            unfinished.rename(folder)
        except OSError:
            if not folder.is_dir():  # Another process was faster: its arrays are the same.
                raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _write(folder: Path, path: Path, kind, tokenizer, max_length, shape, skip_bad) -> None:
    read = {"preferences": read_preferences, "conversations": read_conversations}[kind]
    report, bad = Report(), 0
    bounds, lines, places, targets, margins = (array(code) for code in "qqqqd")
    offset = 0
    with open(folder / "tokens.bin", "wb") as tokens, open(folder / "supervised.bin", "wb") as supervised:
        for place, record in enumerate(read(path, shape)):
            if isinstance(record, DataError):
                if not skip_bad:
                    raise record
                report.drop(record.reason, record.line)
                bad += 1
                continue
            try:
                branches = encode(record, tokenizer)
            except InputError as error:  # The chat template cannot say this record.
                raise DataError(path, record.line, str(error)) from None
            report.shape, report.longest = record.shape, max(report.longest, full_length(branches))
            if reason := reason_to_drop(branches, max_length):
                report.drop(reason, record.line)
                continue
            report.kept += 1
            bounds.append(offset)
            for ids, mask in branches:
                tokens.write(np.asarray(ids, np.int32).tobytes())
                supervised.write(np.asarray(mask, np.bool_).tobytes())
                offset += len(ids)
                bounds.append(offset)
            lines.append(record.line)
            places.append(place)
            targets.append(sum(sum(mask) for _, mask in branches))
            margins.append(score_margin(record))
    if bad > BAD_SHARE * report.total():
        raise InputError(f"{path}: {bad} of {report.total()} records are bad, more than 1 %: {report}")
    if not report.kept:
        raise InputError(f"{path}: no record is left to train on: {report}")
    np.save(folder / "bounds.npy", np.asarray(bounds).reshape(report.kept, -1))
    np.save(folder / "lines.npy", np.asarray(lines))
    np.save(folder / "records.npy", np.asarray(places))
    np.save(folder / "targets.npy", np.asarray(targets))
    np.save(folder / "score_margins.npy", np.asarray(margins))
    (folder / "report.json").write_text(json.dumps(report.__dict__))
