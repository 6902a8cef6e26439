"""Rows of a store into token streams: which rows meet in a step, who computes them, and the one shift."""

import math

import numpy as np
import torch

from dataset.store import TokenStore
from model.stream import TokenStream

LAYOUTS = ("forked", "twin")


class Windows:
    """Which rows each optimizer step sees: a pure function of (seed, step), whatever ran before.

    An epoch visits every row once, in an order of its own; its last window may be short.
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

    def describe(self, total_steps: int, ranks: int, micro_batch_size: int) -> str:
        """The arithmetic of a run in one line."""
        rounds = math.ceil(min(self.batch_size, self.rows) / (ranks * micro_batch_size))
        return (
            f"{total_steps} steps, {self.per_epoch} an epoch, of {self.batch_size} records: "
            f"{ranks} rank(s) x {rounds} micro-batch(es) of at most {micro_batch_size}"
        )


def deal(
    window: np.ndarray, lengths: np.ndarray, ranks: int, micro_batch_size: int
) -> list[list[np.ndarray]]:
    """Deal a window's rows to the micro-batches of each rank: ``deal(...)[rank][micro_batch]``.

    Every rank gets the same number of micro-batches, each of at most `micro_batch_size` rows and about as
    many tokens as the others: the longest row goes first, to the lightest micro-batch that has room. A
    window smaller than the number of ranks leaves some micro-batches empty, which is fine: an empty stream
    has a zero loss and takes part in the gradient exchange like any other.
    """
    rounds = math.ceil(len(window) / (ranks * micro_batch_size))
    hands: list[list[int]] = [[] for _ in range(ranks * rounds)]
    weights = [0] * len(hands)
    for row in sorted(window.tolist(), key=lambda row: -lengths[row]):
        hand = min(
            (h for h in range(len(hands)) if len(hands[h]) < micro_batch_size), key=weights.__getitem__
        )
        hands[hand].append(row)
        weights[hand] += int(lengths[row])
    return [[np.array(hand, int) for hand in hands[rank::ranks]] for rank in range(ranks)]


def share(rows: int, rank: int, ranks: int, batch_size: int) -> list[range]:
    """One rank's part of an evaluation: every ranks-th row, in batches, of which all ranks get as many.

    A batch without rows is an empty stream: it has nothing to add, but a place in every sum, and in every
    exchange of weights where they are split.
    """
    mine, most = range(rank, rows, ranks), len(range(0, rows, ranks))
    return [mine[start : start + batch_size] for start in range(0, max(1, most), batch_size)]


def build_stream(store: TokenStore, rows, layout: str = "forked") -> TokenStream:
    """Lay rows one after another as one `TokenStream`.

    ``forked``: prompt, chosen, rejected in one run; the prompt is computed once, both sides see it and not
    each other. ``twin``: prompt + chosen, prompt + rejected: the textbook layout. Same log-probs, same
    gradients. A conversation has one branch and no prompt, so for SFT the two are one.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout {layout!r} is none of {LAYOUTS}")
    tokens, positions, segments, predictors, targets, owners, cached = [], [], [], [], [], [], []
    end = 0  # of the stream so far

    def append(ids: np.ndarray, first_position: int, prefix: tuple[int, int] = (0, 0)) -> int:
        """Append one segment; return where it starts."""
        nonlocal end
        start, end = end, end + len(ids)
        tokens.append(ids)
        positions.append(np.arange(first_position, first_position + len(ids)))
        segments.append((start, end, *prefix))
        return start

    def supervise(ids: np.ndarray, supervised: np.ndarray, start: int, before: int, owner: int) -> None:
        """The one shift of the project: a token is predicted by the position before it.

        `before` is that position for the segment's first token: the end of the prompt.
        """
        where = np.flatnonzero(supervised)
        predictors.append(np.where(where == 0, before, start + where - 1))
        targets.append(ids[where])
        owners.append(np.full(len(where), owner))

    responses, known = 0, store.reference_logps
    for row in rows:
        (prompt, _), *branches = store.row(row)
        fork = layout == "forked" and len(prompt) > 0
        if fork:
            start = append(prompt, 0)
            prefix = (start, start + len(prompt))
        for ids, supervised in branches:
            if fork:
                start = append(ids, len(prompt), prefix)
                supervise(ids, supervised, start, prefix[1] - 1, responses)
            else:
                start = append(np.concatenate([prompt, ids]), 0) + len(prompt)
                supervise(ids, supervised, start, start - 1, responses)
            responses += 1
        if known is not None:
            start, stop = store.target_bounds[row : row + 2]
            cached.append(known[start:stop])

    def tensor(parts: list[np.ndarray], dtype=np.int64) -> torch.Tensor:
        return torch.from_numpy(np.concatenate([np.zeros(0, dtype), *parts]))

    return TokenStream(
        tokens=tensor(tokens),
        positions=tensor(positions),
        segments=torch.tensor(segments or [(0, 0, 0, 0)]),
        predictors=tensor(predictors),
        targets=tensor(targets),
        owners=tensor(owners),
        responses=responses,
        reference_logps=None if known is None else tensor(cached, known.dtype),
    )
