"""A data file as flat memory-mapped arrays of token ids, tokenised once.

The first process that needs a file tokenises it, record by record, into a folder of the cache. The folder's
name is a digest of everything that determines the arrays: the file's bytes, the tokenizer, the template, the
length limit and the options of reading. Every rank, restart and later run maps the same arrays, so a file
may be larger than memory.
"""

import copy
import hashlib
import json
import math
from array import array
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path

import numpy as np

from dataset.cache import build, cache_folder, is_cached
from dataset.other_files import require_data_file
from dataset.records import READERS, Conversation, DataError, Feedback, Preference, Ranking, prompt_digest
from dataset.tokenizer import ChatTokenizer
from errors import InputError, require
from files import file_hash

VERSION = 4  # of the arrays below; a new layout must not read an old folder
BAD_SHARE = 0.01  # With skip_bad: a file with more bad records than this is the wrong file.
PIECE = 2**16  # characters that are always tokenised at once
COLUMNS = ("bounds", "lines", "records", "target_counts", "score_margins", "digests")  # as in `TokenStore`

Branch = tuple[list[int], list[bool]]  # ids, and for each whether it is supervised
Record = Preference | Ranking | Feedback | Conversation


# ---- One record


def encode(record: Record, tokenizer: ChatTokenizer) -> list[Branch]:
    """A record as a prompt and its branches: one for each reply, the best first, or one conversation.

    The branch of a missing reply is empty.
    """
    if isinstance(record, Conversation):
        return [([], []), tokenizer.conversation(record.messages)]
    prompt = tokenizer.prompt(record.prompt)
    sides = [[] if reply is None else tokenizer.response(reply) for reply in record.replies]
    return [(prompt, [False] * len(prompt)), *((side, [True] * len(side)) for side in sides)]


def encode_or_drop(
    record: Record, tokenizer: ChatTokenizer, max_length: int
) -> tuple[list[Branch], int, str | None]:
    """(branches, tokens of the prompt and the longest branch, the reason to drop the record or None).

    A response is trained on whole, with its end token, or not at all. Equal replies have no order, and an
    equal pair no gradient. To
    tokenise a text takes some 200 times its memory. So a text of more characters than max_length tokens can
    have is only counted, piece by piece, and its branches are empty.
    """
    whole = isinstance(record, Conversation)
    texts = [message.content for message in (record.messages if whole else record.prompt)]
    sides = [""] if whole else [reply or "" for reply in record.replies]
    if sum(map(len, texts)) + max(map(len, sides)) > max(PIECE, max_length * tokenizer.longest_token):
        length = sum(count_tokens(text, tokenizer) for text in texts)
        length += max(count_tokens(text, tokenizer) for text in sides)
        if length > max_length:
            return [], length, "too long"
    branches = encode(record, tokenizer)
    length = len(branches[0][0]) + max(len(ids) for ids, _ in branches[1:])
    if length > max_length:
        return branches, length, "too long"
    if getattr(record, "tie", False):
        return branches, length, "the verdict is a tie"
    equal = len({tuple(ids) for ids, _ in branches[1:]}) < len(branches) - 1
    reason = "two replies are equal" if len(branches) > 3 else "chosen equals rejected"
    return branches, length, reason if equal else None


def count_tokens(text: str, tokenizer: ChatTokenizer) -> int:
    """Tokens of a long text, in bounded memory; a few more than of the whole, for the cuts."""
    return sum(len(tokenizer.text(text[start : start + PIECE])) for start in range(0, len(text), PIECE))


def score_margin(record: Record) -> float:
    """score_chosen - score_rejected, or the logit of win_probability if it is there; NaN without labels."""
    if not isinstance(record, Preference):
        return math.nan
    if (p := record.win_probability) is not None:
        return math.log(p) - math.log1p(-p) if 0 < p < 1 else math.copysign(math.inf, p - 0.5)
    return math.nan if record.scores is None else record.scores[0] - record.scores[1]


def swap_sides(record: Preference) -> Preference:
    """The pair with chosen and rejected exchanged, and their scores too."""
    return replace(
        record,
        chosen=record.rejected,
        rejected=record.chosen,
        scores=record.scores and record.scores[::-1],
        win_probability=None if record.win_probability is None else 1 - record.win_probability,
    )


# ---- All records


@dataclass
class Report:
    """Counts of a file's records: kept, and dropped for which reason."""

    format: str = ""
    kept: int = 0
    dropped: dict[str, list[int]] = field(default_factory=dict)  # reason: line numbers
    longest: int = 0  # tokens of the longest record, kept or not
    rejected_higher: int = 0  # kept pairs whose rejected side scores higher
    swapped: bool = False  # whether the sides of those were exchanged

    def drop(self, reason: str, line: int) -> None:
        self.dropped.setdefault(reason, []).append(line)

    def total(self) -> int:
        return self.kept + sum(map(len, self.dropped.values()))

    def __str__(self) -> str:
        parts = [f"{self.kept} of {self.total()} records ({self.format})"]
        for reason, lines in self.dropped.items():
            shown = ", ".join(map(str, lines[:5])) + (", …" if len(lines) > 5 else "")
            parts.append(f"{len(lines)} dropped: {reason} (line {shown})")
        if len(self.dropped.get("too long", ())) > 0.05 * self.total():
            parts.append(f"--max-length {self.longest} would keep the long ones")
        return "; ".join([*parts, *self.score_lines()])

    def score_lines(self) -> list[str]:
        """One sentence about pairs whose rejected side scores higher, if there are any."""
        if not self.rejected_higher:
            return []
        done = "they were exchanged" if self.swapped else "--swap-by-score exchanges the sides"
        return [f"{self.rejected_higher} pairs have a rejected side that scores higher: {done}"]


class TokenStore:
    """The arrays of one file. A row is a prompt and its branches, each a run of ids with a loss mask.

    All rows have the same number of branches. A row with fewer replies has empty branches before its last
    one, so that the best reply comes first and the worst one last.
    """

    def __init__(self, folder: Path, fingerprint: str):
        self.folder, self.fingerprint = folder, fingerprint  # the second: digest of the data file
        self.weights: list | None = None  # of several files that are mixed (dataset/mixture.py)
        self.report = Report(**json.loads((folder / "report.json").read_text()))
        self.tokens = np.memmap(folder / "tokens.bin", np.int32, "r")
        self.supervised = np.memmap(folder / "supervised.bin", np.bool_, "r")

        def load(name: str) -> np.ndarray:
            return np.load(folder / f"{name}.npy", mmap_mode="r")

        self.lines = load("lines")  # (rows,) line in the data file
        self.records = load("records")  # (rows,) place among the file's records, from 0
        self.target_counts = load("target_counts")  # (rows,) supervised tokens
        self.score_margins = load("score_margins")  # (rows,) NaN without scores
        self.digests = load("digests")  # (rows,) 64 bits of the prompt's digest
        self.bounds = load("bounds").reshape(len(self.lines), -1)  # (rows, 2 + branches) offsets of tokens
        if not len(self.tokens) == len(self.supervised) == self.bounds[-1, -1]:
            raise ValueError("the arrays do not fit together")
        self._derive()

    def _derive(self) -> None:
        self.lengths = self.bounds[:, -1] - self.bounds[:, 0]  # (rows,) tokens of all branches
        self.target_bounds = np.concatenate([[0], np.cumsum(self.target_counts)])  # (rows + 1,) offsets of
        # the reference log-probs, one for each supervised token, row by row (training/reference.py).
        self.reference_logps: np.ndarray | None = None
        self.mismatched: TokenStore | None = None  # of unpaired feedback (dataset/mismatched.py)

    def __len__(self) -> int:
        return len(self.bounds)

    def row(self, index: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """[prompt, branch, …], each (ids, supervised); the prompt of a conversation is empty."""
        offsets = self.bounds[index].tolist()
        return [(self.tokens[start:end], self.supervised[start:end]) for start, end in pairwise(offsets)]

    def split(self, share: float) -> tuple["TokenStore", "TokenStore"]:
        """(training rows, held-out rows): two views of this store, about `share` of the prompts held out.

        The digest of its prompt decides about a row. So a prompt is never on both sides, and no row changes
        sides when rows are added to the file.
        """
        if not 0 < share < 1:
            raise InputError(f"share of held-out rows: expected a number between 0 and 1, found {share}")
        held_out = self.digests < np.uint64(share * 2**64)
        if held_out.all() or not held_out.any():
            empty = "train on" if held_out.all() else "hold out"
            raise InputError(f"a share of {share} of {len(self)} rows leaves no row to {empty}")
        return self._view(~held_out, f"train-{share}"), self._view(held_out, f"held-out-{share}")

    def _view(self, rows: np.ndarray, name: str) -> "TokenStore":
        view = copy.copy(self)
        view.fingerprint = f"{self.fingerprint}-{name}"
        for column in COLUMNS:
            setattr(view, column, getattr(self, column)[rows])
        view._derive()
        return view


# ---- One file


def open_store(
    path: str | Path,
    kind: str,
    tokenizer: ChatTokenizer,
    max_length: int,
    shape: str = "auto",
    skip_bad: bool = False,
    swap_by_score: bool = False,
) -> TokenStore:
    """The `TokenStore` of a file, tokenised unless it is cached.

    `kind`, the records that the rows hold, is a key of `dataset.records.READERS`.
    `shape` is the name of the records' format. `swap_by_score` exchanges the sides of a pair whose rejected
    side scores higher. Raises `DataError` at the first bad record; with `skip_bad`, bad records are left out
    and counted, at most 1 %. Raises `InputError` if no record is left.
    """
    path = Path(path)
    content = data_hash(path)
    options = kind, max_length, shape, skip_bad, swap_by_score
    key = (VERSION, content, tokenizer.fingerprint, *options)
    folder = cache_folder() / hashlib.sha256(json.dumps(key).encode()).hexdigest()[:32]

    def write(unfinished: Path) -> None:
        _write(unfinished, path, tokenizer, *options)
        require(data_hash(path) == content, f"{path}: the file changed while it was read")

    if not is_cached(folder):
        build(folder, write)
    try:
        return TokenStore(folder, fingerprint=content)
    except (OSError, ValueError, TypeError, EOFError) as error:
        raise InputError(f"{folder}: damaged, remove it and it is made anew ({error})") from None


def data_hash(path: Path) -> str:
    """SHA-256 of a data file; `InputError` if it is not a readable file."""
    require_data_file(path)
    try:
        require(path.is_file(), f"{path}: cannot be read: it is not a regular file")
        return file_hash(path)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None


def _write(folder: Path, path: Path, tokenizer, kind, max_length, shape, skip_bad, swap_by_score) -> None:
    """Tokenise a file's records into the arrays that `TokenStore` reads."""
    report, bad, offset = Report(swapped=swap_by_score), 0, 0
    columns = bounds, lines, places, target_counts, margins, digests = [array(code) for code in "qqqqdQ"]
    widths = array("q")  # numbers in `bounds` of each row
    with open(folder / "tokens.bin", "wb") as tokens, open(folder / "supervised.bin", "wb") as supervised:
        for place, record in enumerate(READERS[kind](path, shape)):
            if isinstance(record, DataError):
                if not skip_bad:
                    raise record
                report.drop(record.reason, record.line)
                bad += 1
                continue
            report.format = record.format
            worse = score_margin(record) < 0
            if worse and swap_by_score:
                record = swap_sides(record)
            try:
                branches, length, reason = encode_or_drop(record, tokenizer, max_length)
            except InputError as error:  # The chat template has no place for a message of this record.
                raise DataError(path, record.line, str(error)) from None
            report.longest = max(report.longest, length)
            if reason:
                report.drop(reason, record.line)
                continue
            report.kept += 1
            report.rejected_higher += worse
            bounds.append(offset)
            for ids, mask in branches:
                tokens.write(np.asarray(ids, np.int32).tobytes())
                supervised.write(np.asarray(mask, np.bool_).tobytes())
                offset += len(ids)
                bounds.append(offset)
            widths.append(len(branches) + 1)
            lines.append(record.line)
            places.append(place)
            target_counts.append(sum(sum(mask) for _, mask in branches))
            margins.append(score_margin(record))
            digests.append(int.from_bytes(prompt_digest(record)[:8], "big"))
    if bad > BAD_SHARE * report.total():
        raise InputError(f"{path}: {bad} of {report.total()} records are bad, more than 1 %: {report}")
    require(report.kept, f"{path}: no record is left to train on: {report}")
    for name, column in zip(COLUMNS, (pad_bounds(bounds, widths), *columns[1:]), strict=True):
        np.save(folder / f"{name}.npy", np.asarray(column))
    (folder / "report.json").write_text(json.dumps(report.__dict__))


def pad_bounds(bounds: array, widths: array) -> np.ndarray:
    """The offsets of all rows, one after another, as (rows, largest width), flat.

    A short row repeats its last offset but one: its missing branches are empty and stand before its last one.
    """
    if min(widths) == max(widths):
        return np.asarray(bounds)
    widths, columns = np.asarray(widths)[:, None], np.arange(max(widths))
    places = np.minimum(columns, widths - 2)  # (rows, largest width)
    places[:, -1:] = widths - 1
    return np.asarray(bounds)[places + np.cumsum(widths)[:, None] - widths].ravel()
