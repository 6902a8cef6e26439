"""Our loop as a user runs it: train_dpo.py itself, with a clock."""

import time
from pathlib import Path

import train_dpo
from bench.work import BETA, Case
from dataset.store import TokenStore
from reference import cache_reference


def train(case: Case, folder: Path, store: TokenStore, how: str, say) -> float:
    """Seconds of the timed steps; `how` is a layout, a reference and more flags: "forked live --flag"."""
    layout, reference, *others = how.split()
    train_dpo.open_store = lambda *arguments: store
    times = []

    class Log(train_dpo.MetricsLog):
        def advance(self, items):
            times.append(time.perf_counter())

        def write(self, step, row):
            say(loss=row["loss"])

    def ask(*arguments):
        start = time.perf_counter()
        cache_reference(*arguments)
        say(reference=time.perf_counter() - start)

    train_dpo.MetricsLog, train_dpo.cache_reference = Log, ask
    train_dpo.main([
        *("--model", str(folder / "model"), "--data", "synthetic", "--eval-data", ""),
        *("--out", str(folder / "run"), "--beta", str(BETA), "--layout", layout, "--reference", reference),
        *("--batch-size", str(case.pairs), "--micro-batch-size", str(case.pairs)),
        *("--max-length", str(case.max_length), "--precision", "fp32", "--device", "cpu", *others),
    ])  # fmt: skip
    return times[-1] - times[0]
