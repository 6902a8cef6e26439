"""Several data files as one store: patterns, folders, and weights.

--data a.jsonl 'shards/*.parquet'      all rows, as if one file contained them
--data a.jsonl:0.7 b.parquet:0.3       of every 10 rows 7 from a.jsonl and 3 from b.parquet
"""

import copy
import glob
import hashlib
import json
import math
import re
from bisect import bisect_right
from fractions import Fraction
from itertools import accumulate
from pathlib import Path

import numpy as np

from dataset.other_files import SUFFIXES
from dataset.packing import Windows
from dataset.store import COLUMNS, TokenStore
from errors import require

LONGEST_ROUND = 10_000  # rows in which the proportions of the weights are exact
HELD_OUT = re.compile(r"(?i)(^|[^a-z])(test|val|valid|validation|dev|eval|held-?out)([^a-z]|$)")


# ---- Names of files


def split_weight(value: str) -> tuple[str, Fraction | None]:
    """``FILE:0.7`` as (FILE, 7/10), and FILE as (FILE, None). A path that exists is a path."""
    match = re.fullmatch(r"(.+):(\d+(?:\.\d+)?)", value)
    if not match or Path(value).exists():
        return value, None
    require(Fraction(match[2]) > 0, f"--data {value}: a weight must be above 0; leave the file out")
    return match[1], Fraction(match[2])


def data_files(path: str) -> list[str]:
    """The file of this path; of a folder or a pattern such as ``shards/*.parquet``, its data files by name.

    A folder that also contains a file for evaluation is refused: training would use it.
    """
    if Path(path).is_dir():
        found = sorted(str(file) for file in Path(path).iterdir() if file.name.lower().endswith(SUFFIXES))
        held_out = [file for file in found if HELD_OUT.search(Path(file).name)]
        advice = f"name the files for training by a pattern, such as '{path}/train*'"
        require(not held_out or len(found) == 1, f"{path}: {held_out[:1]} is for evaluation; {advice}")
        return found or [path]  # A folder without data files is an error where it is opened.
    if glob.has_magic(path) and not Path(path).exists():
        found = sorted(glob.glob(path, recursive=True))
        require(found, f"{path}: no file fits this pattern")
        return found
    return [path]


# ---- Stores


class Pieces:
    """Arrays one after another, as one that can be sliced within each: they stay mapped files."""

    def __init__(self, arrays: list):
        self.arrays, self.starts = arrays, [0, *accumulate(map(len, arrays))]

    def __len__(self) -> int:
        return self.starts[-1]

    def __getitem__(self, places: slice) -> np.ndarray:
        piece = min(bisect_right(self.starts, places.start), len(self.arrays)) - 1
        start = self.starts[piece]
        return self.arrays[piece][places.start - start : places.stop - start]


def join(stores: dict[str, TokenStore], weights: list[Fraction | None] | None = None) -> TokenStore:
    """A view of the rows of several stores, by the names of their files, one after another.

    Its `lines` are text, ``FILE:line``. With `weights`, `windows_of` draws from them in this proportion.
    """
    first, *others = stores.values()
    if not others:
        return first
    weights = weights or [None] * len(stores)
    some, all_ = any(weights), all(weights)
    require(all_ or not some, "--data: either every file has a weight, FILE:0.5, or none has")
    joined = copy.copy(first)
    joined.tokens = Pieces([store.tokens for store in stores.values()])
    joined.supervised = Pieces([store.supervised for store in stores.values()])
    for column in COLUMNS:
        setattr(joined, column, np.concatenate([getattr(store, column) for store in stores.values()]))
    width = max(store.bounds.shape[1] for store in stores.values())
    starts = zip(stores.values(), joined.tokens.starts, strict=False)
    joined.bounds = np.concatenate([widened(store.bounds, width) + start for store, start in starts])
    lines = [line for path, store in stores.items() for line in places(path, store)]
    joined.lines = np.array(lines, object)
    joined.weights = weights if all_ else None
    key = [[store.fingerprint for store in stores.values()], [str(weight) for weight in weights]]
    joined.fingerprint = hashlib.sha256(json.dumps(key).encode()).hexdigest()
    joined._derive()
    return joined


def widened(bounds: np.ndarray, width: int) -> np.ndarray:
    """Bounds (rows, width): missing replies are empty, and stand before the last one."""
    missing = np.repeat(bounds[:, -2:-1], width - bounds.shape[1], axis=1)
    return np.concatenate([bounds[:, :-1], missing, bounds[:, -1:]], axis=1)


def places(path: str, store: TokenStore) -> list[str]:
    """``FILE:line`` of every row; the lines of a joined store contain the file."""
    return [line if isinstance(line, str) else f"{path}:{line}" for line in store.lines.tolist()]


# ---- The rows of each step


def windows_of(store: TokenStore, batch_size: int, seed: int) -> Windows:
    """The rows of each optimizer step: all rows in random order, or a mixture if the files have weights."""
    if not store.weights:
        return Windows(len(store), batch_size, seed)
    source = np.searchsorted(store.tokens.starts, store.bounds[:, 0], side="right") - 1  # (rows,)
    sizes = np.bincount(source, minlength=len(store.weights)).tolist()
    require(all(sizes), "--data: no row is left to train on of a file with a weight")
    return Mixture(sizes, store.weights, batch_size, seed)


class Mixture(Windows):
    """Rows of several sources in the proportion of their weights: a pure function of (seed, step).

    The order of the sources repeats after `len(self.order)` rows, in which the proportions are exact; within,
    the k-th of a source's n rows has the place (k + 1/2) / n. So the windows also have the proportions, but
    for less than a row. A source has epochs of its own, each in a new order. An epoch of the run has as many
    rows as all sources.
    """

    def __init__(self, sizes: list[int], weights: list[Fraction], batch_size: int, seed: int):
        super().__init__(sum(sizes), batch_size, seed)
        self.sizes, self.firsts = sizes, [0, *accumulate(sizes)]
        scale = math.lcm(*(weight.denominator for weight in weights))
        counts = [int(weight * scale) for weight in weights]
        self.counts = [count // math.gcd(*counts) for count in counts]  # rows of each source in a round
        rows = sum(self.counts)
        fewer = f"--data: only {rows} rows have the proportions of the weights exactly; use fewer digits"
        require(rows <= LONGEST_ROUND, fewer)
        places = np.concatenate([(np.arange(count) + 0.5) / count for count in self.counts])
        sources = np.repeat(np.arange(len(sizes)), self.counts)
        self.order = sources[np.argsort(places, kind="stable")]  # (rows of a round,) the source of each
        self._orders: dict[int, tuple[int, np.ndarray]] = {}  # source: its epoch, and the rows' order in it

    def __getitem__(self, step: int) -> np.ndarray:
        rounds, places = np.divmod(np.arange(self.batch_size) + step * self.batch_size, len(self.order))
        window = np.empty(self.batch_size, int)
        for source, count in enumerate(self.counts):
            mine = self.order == source  # (rows of a round,)
            here = mine[places]  # (batch_size,)
            drawn = rounds[here] * count + (np.cumsum(mine) - 1)[places[here]]  # rows of this source before
            window[here] = [self.firsts[source] + self._row(source, number) for number in drawn.tolist()]
        return window

    def _row(self, source: int, number: int) -> int:
        epoch, place = divmod(number, self.sizes[source])
        if self._orders.get(source, (-1,))[0] != epoch:
            order = np.random.default_rng([self.seed, epoch, source]).permutation(self.sizes[source])
            self._orders[source] = epoch, order
        return int(self._orders[source][1][place])

    def describe(self, total_steps: int, ranks: int, max_tokens: int) -> str:
        shares = ", ".join(map(str, self.counts))
        mixed = f"of {len(self.order)} records in turn {shares} are from the files of --data"
        return f"{super().describe(total_steps, ranks, max_tokens)}; {mixed}"
