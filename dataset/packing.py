"""From rows of a store to token streams: the rows of a step, the rank of each row, and the label shift."""

import heapq
import math
from collections.abc import Iterator

import numpy as np
import torch

from dataset.store import TokenStore
from model.stream import TokenStream

LAYOUTS = ("forked", "twin")


class Windows:
    """The rows of each optimizer step: a pure function of (seed, step).

    Each epoch visits every row once, in a new order. Its last window may be short.
    """

    def __init__(self, rows: int, batch_size: int, seed: int):
        self.rows, self.batch_size, self.seed = rows, batch_size, seed
        self.per_epoch = math.ceil(rows / batch_size)
        self._epoch, self._order = None, None

    def __getitem__(self, step: int) -> np.ndarray:
        """The row numbers of optimizer step `step`, counted from 0 over all epochs."""
        epoch, window = divmod(step, self.per_epoch)
        if epoch != self._epoch:
            self._epoch, self._order = epoch, np.random.default_rng([self.seed, epoch]).permutation(self.rows)
        return self._order[window * self.batch_size : (window + 1) * self.batch_size]

    def describe(self, total_steps: int, ranks: int, max_tokens: int) -> str:
        """One line about the run: its steps, its ranks, and the bound of a forward."""
        return (
            f"{total_steps} steps, {self.per_epoch} per epoch, of {self.batch_size} records; "
            f"{ranks} rank(s), each with at most {max_tokens:,} tokens in a forward"
        )


def stream_lengths(store: TokenStore, layout: str = "forked") -> np.ndarray:
    """The tokens of each row in a stream, (rows,): in ``twin`` each branch has its own copy of the prompt."""
    if layout == "forked":
        return store.lengths
    branches = (np.diff(store.bounds[:, 1:]) > 0).sum(axis=1)  # of each row, without missing ones
    return store.lengths + (branches - 1) * (store.bounds[:, 1] - store.bounds[:, 0])


def deal(window: np.ndarray, lengths: np.ndarray, ranks: int, max_tokens: int) -> list[list[np.ndarray]]:
    """Deal a window's rows to micro-batches: ``deal(...)[rank][micro_batch]`` is an array of rows.

    A micro-batch has at most `max_tokens` tokens, or a single longer row. Every rank gets the same number of
    micro-batches, and all have about the same number of tokens: the longest row goes first, to the
    micro-batch with the fewest tokens so far. A micro-batch without rows is an empty stream: its loss is 0,
    and its rank takes part in the exchange of gradients.
    """
    rows = sorted(window.tolist(), key=lambda row: -lengths[row])
    # A row longer than `max_tokens` fills one micro-batch, like a row of `max_tokens`.
    tokens = int(np.minimum(lengths[window], max_tokens).sum())
    rounds = max(1, math.ceil(tokens / (ranks * max_tokens)))
    while True:
        batches: list[list[int]] = [[] for _ in range(ranks * rounds)]
        smallest_first = [(0, place) for place in range(len(batches))]  # a heap of (tokens, place)
        for row in rows:
            total, place = smallest_first[0]
            if total and total + lengths[row] > max_tokens:
                break
            batches[place].append(row)
            heapq.heapreplace(smallest_first, (total + int(lengths[row]), place))
        else:
            return [[np.array(rows, int) for rows in batches[rank::ranks]] for rank in range(ranks)]
        rounds += 1


def micro_batches(
    store: TokenStore, window: np.ndarray, world, max_tokens: int, layout: str = "forked"
) -> Iterator[tuple[TokenStream, bool]]:
    """This rank's part of a window: streams on its device, and for each whether it is the last one.

    `world` has the number of this rank, the number of ranks and the device (`training.distributed.World`).
    """
    dealt = deal(window, stream_lengths(store, layout), world.ranks, max_tokens)[world.rank]
    for number, rows in enumerate(dealt, start=1):
        yield build_stream(store, rows, layout).to(world.device), number == len(dealt)


def fill(rows: range, lengths: np.ndarray, max_tokens: int) -> list[range]:
    """Cut `rows` into runs of at most `max_tokens` tokens; a longer row is a run of its own."""
    runs, start, tokens = [], 0, 0
    for place, row in enumerate(rows):
        if tokens and tokens + lengths[row] > max_tokens:
            runs.append(rows[start:place])
            start, tokens = place, 0
        tokens += int(lengths[row])
    return [*runs, rows[start:]]


def share(lengths: np.ndarray, rank: int, ranks: int, max_tokens: int) -> list[range]:
    """This rank's part of an evaluation: every ranks-th row, in batches of at most `max_tokens` tokens.

    Every rank gets the same number of batches, since split ranks exchange weights in every forward. A batch
    without rows is an empty stream: it adds nothing to a sum.
    """
    parts = [fill(range(each, len(lengths), ranks), lengths, max_tokens) for each in range(ranks)]
    return parts[rank] + [range(0)] * (max(map(len, parts)) - len(parts[rank]))


def spread(count: int, most: int | None) -> np.ndarray:
    """At most `most` of `count` places, spread evenly from the first to the last; None: all of them."""
    return np.linspace(0, count - 1, min(count if most is None else most, count)).round().astype(int)


def build_stream(store: TokenStore, rows, layout: str = "forked") -> TokenStream:
    """The `TokenStream` of these rows, one after another.

    ``forked`` is prompt, chosen, rejected: the prompt is computed once, and both sides attend to it but not
    to each other. ``twin`` is prompt, chosen, prompt, rejected, as in textbooks. Log-probs and gradients are
    the same. A conversation has one branch and no prompt, so for SFT both layouts are the same. A row of K
    ranked replies has K branches; an empty one is missing, and takes no place in the stream.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout {layout!r} is not one of {LAYOUTS}")
    tokens, positions, segments, predictors, targets, owners, cached = [], [], [], [], [], [], []
    end = 0  # of the stream so far

    def append(ids: np.ndarray, first_position: int, prefix: tuple[int, int] = (0, 0)) -> int:
        """Append one segment; return its start."""
        nonlocal end
        start, end = end, end + len(ids)
        tokens.append(ids)
        positions.append(np.arange(first_position, first_position + len(ids)))
        segments.append((start, end, *prefix))
        return start

    def supervise(ids: np.ndarray, supervised: np.ndarray, start: int, before: int, owner: int) -> None:
        """Append labels. This is the only shift: the position before a token predicts it.

        `before` is that position for the segment's first token, the end of the prompt.
        """
        where = np.flatnonzero(supervised)
        predictors.append(np.where(where == 0, before, start + where - 1))
        targets.append(ids[where])
        owners.append(np.full(len(where), owner))

    responses, width, reference_logps = 0, 2, store.reference_logps
    for row in rows:
        (prompt, _), *branches = store.row(row)
        fork = layout == "forked" and len(prompt) > 0
        if fork:
            start = append(prompt, 0)
            prefix = (start, start + len(prompt))
        width = len(branches)
        for owner, (ids, supervised) in enumerate(branches, responses):
            if not len(ids):
                continue  # a missing reply
            if fork:
                start = append(ids, len(prompt), prefix)
                supervise(ids, supervised, start, prefix[1] - 1, owner)
            else:
                start = append(np.concatenate([prompt, ids]), 0) + len(prompt)
                supervise(ids, supervised, start, start - 1, owner)
        responses += width
        if reference_logps is not None:
            start, stop = store.target_bounds[row : row + 2]
            cached.append(reference_logps[start:stop])

    def tensor(parts: list[np.ndarray], dtype=np.int64) -> torch.Tensor:
        return torch.from_numpy(np.concatenate([np.zeros(0, dtype), *parts]))

    score_margins = None
    if store.score_margins is not None:
        score_margins = torch.from_numpy(store.score_margins[np.asarray(rows, int)]).float()  # (B,)
    return TokenStream(
        tokens=tensor(tokens),
        positions=tensor(positions),
        segments=torch.tensor(segments or [(0, 0, 0, 0)]),
        predictors=tensor(predictors),
        targets=tensor(targets),
        owners=tensor(owners),
        responses=responses,
        branches=width,
        reference_logps=None if reference_logps is None else tensor(cached, reference_logps.dtype),
        score_margins=score_margins,
    )
