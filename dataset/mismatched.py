"""Prompts with answers to other prompts, from which KTO estimates how far the policy has moved.

    mismatched(store)      # a `TokenStore` with the same prompts, each with the answer of another row
"""

import numpy as np

from dataset.store import TokenStore
from errors import require


def mismatched(store: TokenStore) -> TokenStore:
    """The store's prompts, each with an answer to another prompt. It is made once, and kept by the store."""
    if store.mismatched is None:
        store.mismatched = Mismatched(store)
    return store.mismatched


class Mismatched(TokenStore):
    """A view of a store of unpaired feedback: row i has prompt x_i, and the answer of row ``partners[i]``.

    The partner is a row of the next prompt in the file, so it depends on no window, and log π_ref of its
    answer can be cached. The answer is cut where the row would be longer than the longest of the store.
    """

    def __init__(self, store: TokenStore):
        vars(self).update(vars(store))
        self.fingerprint = f"{store.fingerprint}-mismatched"
        self.partners = partners(store.digests)
        prompts = store.bounds[:, 1] - store.bounds[:, 0]
        self.room = store.lengths.max() - prompts
        self.target_counts = np.minimum((store.lengths - prompts)[self.partners], self.room)
        self._derive()
        self.lengths = prompts + self.target_counts

    def row(self, index: int) -> list[tuple[np.ndarray, np.ndarray]]:
        prompt, *_ = super().row(index)
        _, *answers = super().row(self.partners[index])
        return [prompt, *((ids[: self.room[index]], mask[: self.room[index]]) for ids, mask in answers)]


def partners(digests: np.ndarray) -> np.ndarray:
    """For each row a row with another prompt, (rows,): one of the next run of rows with equal prompts.

    The k-th row of a run gets the k-th row of the next one; the last run is followed by the first.
    Raises `InputError` if all prompts are equal.
    """
    rows, places = len(digests), np.arange(len(digests))
    starts = np.flatnonzero(digests != np.roll(digests, 1))  # of the runs
    require(len(starts), "--loss kto needs at least two prompts; all prompts of the data are equal")
    run = np.searchsorted(starts, places, side="right") - 1  # -1 before the first start: the last run
    after, beyond = starts[(run + 1) % len(starts)], starts[(run + 2) % len(starts)]
    return (after + (places - starts[run]) % rows % ((beyond - after) % rows)) % rows
