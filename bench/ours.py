"""Our loop as a user runs it: train_dpo.py itself, with a clock."""

from pathlib import Path

import train_dpo
from bench.work import BETA, Case, now
from dataset.packing import stream_lengths
from dataset.store import TokenStore
from training import setup
from training.reference import cache_references


def train(case: Case, folder: Path, store: TokenStore, how: str, device: str, precision: str, say) -> float:
    """Seconds of the timed steps; `how` is a layout, a reference and more flags: "forked live --flag"."""
    layout, reference, *others = how.split()
    setup.open_store = lambda *arguments: store
    times = []

    class Log(train_dpo.MetricsLog):
        def advance(self, items):
            times.append(now())

        def write(self, step, row):
            say(loss=row["loss"])

    def fill_cache(*arguments):
        start = now()
        digest = cache_references(*arguments)
        if digest:
            say(reference=now() - start)
        return digest

    class Precision(train_dpo.Precision):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            say(precision=self.name)  # what `auto` has become

    train_dpo.MetricsLog, train_dpo.cache_references, train_dpo.Precision = Log, fill_cache, Precision
    train_dpo.main([
        *("--model", str(folder / "model"), "--data", "synthetic", "--eval-data", ""),
        *("--out", str(folder / "run"), "--beta", str(BETA), "--layout", layout, "--reference", reference),
        *("--batch-size", str(case.pairs), "--micro-batch-tokens", str(forward_tokens(case, store, layout))),
        *("--max-length", str(case.max_length), "--precision", precision, "--device", device, *others),
        "--overwrite",
    ])  # fmt: skip
    return times[-1] - times[0]


def forward_tokens(case: Case, store: TokenStore, layout: str) -> int:
    """The bound of a forward with which `deal` makes the case's number of forwards of every window."""
    lengths = stream_lengths(store, layout)
    heaviest = max(int(lengths[window].sum()) for window in case.windows)
    return heaviest * case.micro_batch // case.pairs + int(lengths.max())
