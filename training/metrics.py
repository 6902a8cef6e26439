"""Running means over micro-batches and ranks, and the file and the bar that show them."""

import json
import time
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from training.distributed import World


class Meter:
    """Weighted means since the last `mean()`, kept on the device so that no step waits for a number."""

    def __init__(self, world: World):
        self.world = world
        self.sums: dict[str, Tensor] = {}
        self.weight = 0.0

    def add(self, weight: float, sums: dict[str, Tensor]) -> None:
        """Add sums over `weight` items (pairs, or tokens)."""
        self.weight += weight
        for name, value in sums.items():
            self.sums[name] = self.sums.get(name, 0.0) + value.detach().float()

    def mean(self) -> dict[str, float]:
        """Means over all ranks; starts afresh. Every rank must call it."""
        names = list(self.sums)
        totals = torch.stack([*self.sums.values(), torch.tensor(self.weight, device=self.world.device)])
        *sums, weight = self.world.sum(totals).tolist()
        self.sums, self.weight = {}, 0.0
        return {name: value / weight for name, value in zip(names, sums, strict=True)}


SHOWN = {"loss": "loss", "rewards/margins": "margin", "rewards/accuracies": "accuracy"}  # on the bar


class MetricsLog:
    """``metrics.jsonl``, one row a logged step, and the progress bar. Only the main rank writes."""

    def __init__(self, folder: Path, world: World, total_steps: int, unit: str):
        self.unit = unit
        self.items, self.since = 0, time.perf_counter()
        self.bar = tqdm(total=total_steps, unit="step", disable=not world.is_main, dynamic_ncols=True)
        self.file = None
        if world.is_main:
            folder.mkdir(parents=True, exist_ok=True)
            self.file = open(folder / "metrics.jsonl", "w", encoding="utf-8")  # noqa: SIM115

    def advance(self, items: int) -> None:
        """One optimizer step is done, over `items` pairs or conversations of all ranks."""
        self.items += items
        self.bar.update()

    def write(self, step: int, row: dict[str, float]) -> None:
        """Append a row and show its main figures on the bar; training rows also get their speed."""
        if not self.file:
            return
        if "loss" in row:
            now = time.perf_counter()
            row = {**row, f"{self.unit}_per_second": self.items / (now - self.since)}
            self.items, self.since = 0, now
            shown = {short: f"{row[name]:.4f}" for name, short in SHOWN.items() if name in row}
            self.bar.set_postfix({**shown, f"{self.unit}/s": f"{row[f'{self.unit}_per_second']:.1f}"})
        self.file.write(json.dumps({"step": step, **row}) + "\n")
        self.file.flush()

    def close(self) -> None:
        self.bar.close()
        if self.file:
            self.file.close()
