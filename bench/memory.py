"""How much memory does a run take, and what does training/costs.py say of it before?

    python -m bench.memory               # tensors that are alive at the peak of a whole run of train_dpo.py
    python -m bench.memory --ranks 2     # the same on a rank of two, with copies and with --shard
    python -m bench.memory --process     # the peaks of whole processes, as Linux counts them
    python -m bench.memory --device cuda # on a GPU, as torch's allocator counts them

Counted tensors have no noise, and the formulas can be held to them. A process has more: what libraries and
kernels need inside, which is measured on a run of next to no model, and gaps between what was freed.
"""

import argparse
import contextlib
import itertools
import json
import os
import shlex
import subprocess
import sys
import tempfile
import weakref
from collections.abc import Iterator
from dataclasses import astuple, dataclass
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

import train_dpo
from bench.work import write_store
from dataset.store import TokenStore
from dataset.tokenizer import ChatTokenizer, train
from errors import InputError, run_script
from model.transformer import ModelConfig, Transformer
from model.weights import save_model
from training.costs import Plan, make_stream, peak
from training.distributed import World, join
from training.run import RunFolder
from training.settings import ROOT, parse

MIB = 2**20
# Name: vocabulary and shape. Each is unlike the others in what weighs most, and in an option.
SMALL = "64 x 3"
SHAPES = {
    SMALL: (512, dict(hidden_size=64, num_hidden_layers=3, num_attention_heads=4, intermediate_size=176)),
    "128 x 8, untied": (
        6400,
        dict(
            hidden_size=128, num_hidden_layers=8, num_attention_heads=8, num_key_value_heads=8,
            intermediate_size=352, tie_word_embeddings=False,
        ),
    ),
    "192 x 4, QK-norm": (
        32_000,
        dict(
            hidden_size=192, num_hidden_layers=4, num_attention_heads=6, num_key_value_heads=1,
            intermediate_size=512, qk_norm=True,
        ),
    ),
}  # fmt: skip
LENGTHS = ((64, 8), (256, 4), (1024, 1))  # tokens of prompt and response, pairs a step
FLAGS = (
    "", "--reference cached", "--layout twin", "--checkpoint-activations",
    "--reference cached --checkpoint-activations", "--micro-batch-size 1", "--lora-rank 8",
    "--lora-rank 8 --checkpoint-activations", "--precision bf16", "--precision bf16 --lora-rank 8",
    "--precision bf16 --reference cached --checkpoint-activations",
    "--precision bf16 --micro-batch-size 1 --checkpoint-activations",
)  # fmt: skip
FLAGS_OF_RANKS = (
    "", "--reference cached --checkpoint-activations", "--lora-rank 8", "--shard",
    "--shard --reference cached", "--shard --checkpoint-activations", "--shard --micro-batch-size 1",
    "--shard --lora-rank 8", "--shard --precision bf16 --reference cached",
)  # fmt: skip


@dataclass(frozen=True)
class Point:
    shape: str
    length: int
    pairs: int
    flags: str
    ranks: int = 1  # each of which has as many pairs

    def __str__(self) -> str:
        return f"{self.shape}, {self.length} x {self.pairs} {self.flags}".strip()

    @property
    def config(self) -> ModelConfig:
        vocabulary, shape = (SHAPES | LARGE)[self.shape]
        return ModelConfig(vocabulary, **shape)

    def arguments(self, device: str) -> list[str]:
        """What train_dpo.py and training/plan.py are both told."""
        sizes = f"--batch-size {self.pairs * self.ranks} --micro-batch-size {self.pairs}"
        return shlex.split(f"{sizes} --precision fp32 --device {device} {self.flags}")

    def planned(self, device: str = "cpu") -> tuple[str, float]:
        """The moment of the peak, and its bytes."""
        size = "--length", str(self.length), "--gpus", str(self.ranks)
        plan = parse(Plan, "", [*size, *self.arguments(device)])
        moment, parts = peak(self.config, make_stream(plan), plan)
        return moment, sum(parts.values())

    def run(self, folder: Path, world: World) -> None:
        """Two steps of train_dpo.py on pairs of this length, of which one half is the prompt."""
        arguments = [
            *("--model", str(folder / "model"), "--data", "synthetic", "--eval-data", ""),
            *("--out", str(folder / "run"), "--max-length", str(self.length), "--epochs", "2"),
            *self.arguments(world.device.type),
        ]
        settings = parse(train_dpo.Settings, "", arguments)
        pairs = mock.patch.object(train_dpo, "open_store", lambda *_: TokenStore(folder / "store", ""))
        with pairs, RunFolder(settings, world) as run:
            train_dpo.train(settings, world, run)

    def prepare(self, folder: Path) -> None:
        """Write its model and its pairs."""
        torch.manual_seed(0)
        save_model(folder / "model", Transformer(self.config))
        train(["a"], vocab_size=259).save(str(folder / "model" / "tokenizer.json"))
        ChatTokenizer(folder / "model" / "tokenizer.json").save(folder / "model")
        generator, half = np.random.default_rng(0), self.length // 2
        lengths, most = (half, self.length - half, self.length - half), self.config.vocab_size
        pairs = [[generator.integers(10, most, n) for n in lengths] for _ in range(self.pairs * self.ranks)]
        write_store(folder / "store", pairs)


def points(every_flags=FLAGS, ranks: int = 1) -> Iterator[Point]:
    """Every set of flags with every shape, at one of the lengths.

    They are shorter in bf16, which may be emulated, and where ranks share a CPU.
    """
    for row, flags in enumerate(every_flags):
        for column, shape in enumerate(SHAPES):
            length, pairs = LENGTHS[(row + column) % len(LENGTHS)]
            if "bf16" in flags or ranks > 1:
                length, pairs = min(length, 256), min(pairs, 2)
            yield Point(shape, length, pairs, flags, ranks)


GRID = list(points())


class LiveBytes(TorchDispatchMode):
    """The bytes of all tensors that operations made and that are still there: now, and at the most.

    Storages are counted once, whatever views there are of them, and as large as they are at the time: FSDP2
    keeps buffers and empties them between uses. Of a split tensor the part on this rank is counted.
    """

    def __init__(self):
        super().__init__()
        self.peak = 0
        self.alive = weakref.WeakValueDictionary()  # storages by address

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if DTensor in types:
            return NotImplemented  # It comes back with operations on its part.
        result = function(*args, **(kwargs or {}))
        for x in result if isinstance(result, (tuple, list)) else [result]:
            # Its storage tells where it is: DTensor finds out shapes with tensors that only say "cpu".
            if isinstance(x, torch.Tensor) and (storage := x.untyped_storage()).device.type == "cpu":
                self.alive[storage._cdata] = storage
        self.peak = max(self.peak, self.now)
        return result

    @property
    def now(self) -> int:
        return sum(storage.nbytes() for storage in self.alive.values())


def measured(point: Point, device: str = "cpu") -> float:
    """Bytes at the peak of a whole run, from loading the model to saving it."""
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(None):
        point.prepare(Path(folder))
        with join(device) as world:
            if device == "cuda":
                torch.cuda.reset_peak_memory_stats()
                point.run(Path(folder), world)
                return torch.cuda.max_memory_allocated()
            with LiveBytes() as live:
                point.run(Path(folder), world)
            return live.peak


# ---- Ranks


def measured_on_ranks(points: list[Point]) -> list[float]:
    """The same of several runs, on the last of their ranks, whose CPU stands for a card.

    The main rank's does not: it also holds the whole model, to load and to save it.
    """
    with tempfile.TemporaryDirectory() as folder:
        for place, point in enumerate(points):
            point.prepare(Path(folder, str(place)))
        Path(folder, "points").write_text(json.dumps([astuple(point) for point in points]))
        torchrun = "torch.distributed.run", "--standalone", f"--nproc-per-node={points[0].ranks}", "-m"
        start([*torchrun, "bench.memory", "--of-ranks", folder])
        return json.loads(Path(folder, "peaks").read_text())


def count_on_ranks(folder: Path) -> None:
    """What torchrun starts: one run after another."""
    peaks = []
    with join("cpu") as world:
        for place, values in enumerate(json.loads((folder / "points").read_text())):
            with LiveBytes() as live:
                Point(*values).run(folder / str(place), world)
            peaks.append(live.peak)
        if world.rank == world.ranks - 1:
            (folder / "peaks").write_text(json.dumps(peaks))


# ---- Processes


def memory_of_process(name: str) -> int:
    """Bytes: VmRSS is what this process has in memory now, VmHWM the most it ever had."""
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name)]
    return int(line.split()[1]) * 1024


def measured_by_process(point: Point, gaps: bool = True) -> float:
    """What a process has at its peak beyond what it had before the run, with its libraries loaded.

    Without `gaps` what is freed goes back to the system at once, instead of staying where the next tensor
    may not fit.
    """
    with tempfile.TemporaryDirectory() as folder:
        point.prepare(Path(folder))
        values = json.dumps(astuple(point))
        malloc = {} if gaps else {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
        said = start(["bench.memory", "--worker", folder, values, "gaps" * gaps], malloc)
    return float(said.splitlines()[-1])


def work(folder: str, values: str, gaps: str) -> None:
    before = memory_of_process("VmRSS")
    keeping = contextlib.nullcontext() if gaps else mock.patch("training.distributed.keep_freed_memory")
    with keeping, join("cpu") as world:
        Point(*json.loads(values)).run(Path(folder), world)
    print(memory_of_process("VmHWM") - before)


def start(module: list[str], environment: dict[str, str] | None = None) -> str:
    """Run a module in another process and return what it prints."""
    command, variables = [sys.executable, "-m", *module], {**os.environ, **(environment or {})}
    result = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True)
    if result.returncode:
        raise InputError(f"bench.memory failed:\n{result.stderr[-2000:]}")
    return result.stdout


# ---- The tables

# Large enough that what a process has besides is small.
LARGE = {
    "256 x 8": (6400, dict(hidden_size=256, num_hidden_layers=8, intermediate_size=704)),
    "512 x 8": (
        32_000,
        dict(hidden_size=512, num_hidden_layers=8, num_attention_heads=8, intermediate_size=1408),
    ),
}
PROCESSES = [
    Point(shape, *LENGTHS[place % len(LENGTHS)], flags)
    for place, (flags, shape) in enumerate(itertools.product(FLAGS[:8], LARGE))
]
NEARLY_NOTHING = Point(SMALL, 64, 1, "")


def rows(options) -> Iterator[tuple[Point, list[float]]]:
    """What the command line asks for, as it is measured."""
    if options.process:
        for point in PROCESSES:
            yield point, [measured_by_process(point), measured_by_process(point, gaps=False)]
    elif options.ranks > 1:
        several = list(points(FLAGS_OF_RANKS, options.ranks))
        for point, found in zip(several, measured_on_ranks(several), strict=True):
            yield point, [found]
    else:
        for point in GRID:
            yield point, [measured(point, options.device)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--ranks", default=1, type=int, help="with more than one, gloo's, on the CPU")
    parser.add_argument("--process", action="store_true", help="measure processes instead of tensors")
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--of-ranks", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work(*options.worker)
        return
    if options.of_ranks:
        count_on_ranks(Path(options.of_ranks))
        return
    columns, own = ["measured, MiB", "planned", "off by"], 0.0
    if options.process:
        columns[1:1] = ["without gaps"]
        own = measured_by_process(NEARLY_NOTHING, gaps=False) - NEARLY_NOTHING.planned()[1]
        print(f"planned is the tensors, and {own / MIB:.1f} MiB that a process needs for nearly none\n")
    print(f"| width x layers | length x pairs | flags | {' | '.join(columns)} | the peak is at |")
    print("|" + "---|" * (4 + len(columns)), flush=True)
    for point, found in rows(options):
        moment, planned = point.planned(options.device)
        planned += own
        cells = point.shape, f"{point.length} x {point.pairs}", f"`{point.flags}`" if point.flags else ""
        cells += (
            *(f"{size / MIB:.1f}" for size in (*found, planned)),
            f"{planned / found[-1] - 1:+.1%}",
            moment,
        )
        print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    run_script(main)
