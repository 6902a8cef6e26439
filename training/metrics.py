"""Running means over micro-batches and ranks, the files of rows, and the progress bar."""

import json
import math
import time
from itertools import groupby
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from errors import NotFiniteError
from files import append_synced, write_whole
from training.distributed import World
from training.settings import TrainSettings
from training.track import open_tracker
from training.warnings import Watch

COUNT = "/count"  # A sum with this ending is the weight of the sum without it.


class Meter:
    """Weighted means since the last `mean()`. Sums stay on the device, so that no step waits for them."""

    def __init__(self, world: World):
        self.world = world
        self.sums: dict[str, Tensor] = {}
        self.weight = 0.0

    def add(self, weight: float, sums: dict[str, Tensor]) -> None:
        """Add sums over `weight` items (pairs, or tokens)."""
        self.weight += weight
        for name, value in sums.items():
            self.sums[name] = self.sums.get(name, 0.0) + value.detach().float()

    def is_finite(self, *others: float) -> bool:
        """Whether all sums and the other numbers are finite on all ranks. Every rank must call this."""
        finite = all(map(math.isfinite, others)) and torch.stack([*self.sums.values()]).isfinite().all()
        return not self.world.largest(int(not finite))

    def mean(self) -> dict[str, float]:
        """The means over all ranks; the sums start again at 0. Every rank must call this function.

        A name with a count of its own has the mean over that; with a count of 0 it is left out.
        """
        names = list(self.sums)
        totals = torch.stack([*self.sums.values(), torch.tensor(self.weight, device=self.world.device)])
        *sums, weight = self.world.sum(totals).tolist()
        self.sums, self.weight = {}, 0.0
        sums = dict(zip(names, sums, strict=True))
        weights = {name: sums.get(name + COUNT, weight) for name in names if not name.endswith(COUNT)}
        return {name: sums[name] / each for name, each in weights.items() if each}

    def state_dict(self) -> dict:
        """The sums of each rank: a sum over ranks would round differently. Every rank must call this."""
        mine = [*(float(value) for value in self.sums.values()), self.weight]
        device = self.world.device if self.world.ranks > 1 else "cpu"
        rows = torch.zeros(self.world.ranks, len(mine), dtype=torch.float64, device=device)
        rows[self.world.rank] = torch.tensor(mine, dtype=torch.float64)
        return {"names": list(self.sums), "rows": self.world.sum(rows).tolist()}

    def load_state_dict(self, saved: dict) -> None:
        rows = saved["rows"]
        if len(rows) != self.world.ranks:  # Another number of ranks: the main one takes the total.
            total = [sum(column) for column in zip(*rows, strict=True)]
            rows = [total] + [[0.0] * len(total)] * (self.world.ranks - 1)
        *sums, self.weight = rows[self.world.rank]
        tensors = (torch.tensor(value, device=self.world.device, dtype=torch.float32) for value in sums)
        self.sums = dict(zip(saved["names"], tensors, strict=True))


METRICS, SAMPLES = "metrics.jsonl", "samples.jsonl"
SHOWN = {"loss": "loss", "rewards/margins": "margin", "rewards/accuracies": "accuracy"}  # at the terminal


class RowFile:
    """A file of JSON rows with a ``step``, each on the disk before `append` returns.

    A run that continues after `first_step` keeps the rows up to that step. Later rows are written again.
    """

    def __init__(self, path: Path, first_step: int):
        self.path, self.file = path, None
        lines = rows_until(first_step, path) if first_step else []
        self.text, self.kept = "".join(lines), [json.loads(line) for line in lines]
        if path.exists():
            self._open()

    def _open(self) -> None:
        write_whole(self.path, lambda file: file.write(self.text.encode()))
        self.file = open(self.path, "ab", buffering=0)  # noqa: SIM115

    def append(self, rows: list[dict]) -> None:
        """Append rows. Raises `InputError` if the disk fails."""
        if not self.file:
            self._open()
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
        append_synced(self.file, lines, self.path)  # A checkpoint of this step must not outlive its row.

    def close(self) -> None:
        if self.file:
            self.file.close()


class MetricsLog:
    """``metrics.jsonl``, one row per logged step; ``samples.jsonl``; the tracker, the bar and the warnings.

    Only the main rank writes.
    """

    def __init__(
        self,
        folder: Path,
        world: World,
        settings: TrainSettings,
        first_step: int,
        total_steps: int,
        unit: str,
    ):
        self.world, self.unit, self.total_steps = world, unit, total_steps
        self.items, self.since = 0, time.perf_counter()
        self.bar = tqdm(
            total=total_steps, initial=first_step, unit="step", disable=not world.is_main, dynamic_ncols=True
        )
        if world.is_main:
            self.rows, self.samples = (RowFile(folder / name, first_step) for name in (METRICS, SAMPLES))
            self.tracker = open_tracker(settings, folder, first_step) if settings.track != "none" else None
            self.watch = Watch()
            for row in self.rows.kept:  # Their warnings were printed before the run stopped.
                self.watch.see(row)
            for _, answers in groupby(self.samples.kept, key=lambda row: row["step"]):
                self.watch.see_answers(list(answers))

    def advance(self, items: int) -> None:
        """Count an optimizer step over `items` pairs or conversations of all ranks."""
        self.items += items
        self.bar.update()

    def write(self, step: int, row: dict[str, float]) -> None:
        """Append a row; a row of training also gets its speed, and its main figures stand on the bar.

        Raises `NotFiniteError` on every rank if an evaluation is not finite, `InputError` if the disk fails.
        """
        for name, value in row.items():
            if name.startswith("eval_") and not math.isfinite(value):
                raise NotFiniteError(step, f"{name} is {value}")
        if not self.world.is_main:
            return
        if "loss" in row:
            now = time.perf_counter()
            row = {**row, f"{self.unit}_per_second": self.items / (now - self.since)}
            self.items, self.since = 0, now
            speed = {f"{self.unit}/s": f"{row[f'{self.unit}_per_second']:.1f}"}
            self.bar.set_postfix({**shown(row, ""), **speed})
        self.rows.append([{"step": step, **row}])
        if self.tracker:
            self.tracker.log(step, row)
        self.warn(self.watch.see({"step": step, **row}))

    def write_held_out(self, step: int, name: str, metrics: dict[str, float]) -> dict[str, float]:
        """Write the row of an evaluation and show its main figures; return the row.

        Its metrics are eval_…, and eval_NAME_… if the held-out set has a name, as Hugging Face's Trainer has.
        """
        part = f"eval_{name}_" if name else "eval_"
        row = {f"{part}{metric}": value for metric, value in metrics.items()}
        self.write(step, row)
        figures = ", ".join(f"{short} {value}" for short, value in shown(row, part).items())
        of = f"held-out {name}" if name else "held-out"
        if self.world.is_main:
            self.bar.write(f"step {step} of {self.total_steps}: {of} {figures}")
        return row

    def write_samples(self, step: int, samples: list[dict]) -> None:
        """Append the rows of `training.samples` of an evaluation."""
        if self.world.is_main and samples:
            self.samples.append(rows := [{"step": step, **sample} for sample in samples])
            self.warn(self.watch.see_answers(rows))

    def warn(self, lines: list[str]) -> None:
        for line in lines:
            self.bar.write(f"warning: {line}")

    def close(self) -> None:
        self.bar.close()
        if self.world.is_main:
            self.rows.close()
            self.samples.close()
            if self.tracker:
                self.tracker.close()


def shown(row: dict[str, float], prefix: str) -> dict[str, str]:
    """The figures of a row for the terminal, by their short names."""
    return {short: f"{row[prefix + name]:.4f}" for name, short in SHOWN.items() if prefix + name in row}


def rows_until(step: int, path: Path) -> list[str]:
    """The lines of a file of rows whose step is at most `step`, without lines that a crash cut off."""
    kept = []
    # An answer may contain U+2028, at which splitlines() would split it. What follows the last \n is cut off.
    for line in path.read_text("utf-8", errors="replace").split("\n")[:-1] if path.exists() else ():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except (ValueError, TypeError, KeyError):
            continue
    return kept
