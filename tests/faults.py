"""What the tests of resuming and of faults share; also a program that torchrun starts, with a fault planted.

torchrun --standalone --nproc-per-node 2 -m tests.faults resume train_dpo VERDICT.json FOLDER --model DIR …
torchrun --standalone --nproc-per-node 2 --max-restarts 1 -m tests.faults SIGKILL 1 3 train_dpo --model DIR …
"""

import hashlib
import importlib
import json
import math
import os
import shutil
import signal
import sys
from pathlib import Path

import torch

from errors import run_script
from tests.loops import metrics
from training.checkpoint import checkpoints, load_checkpoint, step_of
from training.distributed import World, join
from training.run import RunFolder
from training.settings import parse


class Keeping(RunFolder):
    """A run folder that keeps the checkpoints of a finished run, to be looked at."""

    def remove_checkpoints(self) -> None:
        pass


def train(module, arguments: list[str], world: World) -> None:
    settings = parse(module.Settings, "", arguments)
    with Keeping(settings, world) as run:
        module.train(settings, world, run)


def states(folder: Path) -> dict[int, str]:
    """A digest of everything in each checkpoint, by step: weights, moments, means, all, to the bit.

    Of what was split its state holds the shape, and the digests of the files that hold the rest.
    """
    return {step_of(path): digest(load_checkpoint(path)) for path in checkpoints(folder / "checkpoints")}


def digest(state) -> str:
    if isinstance(state, torch.Tensor):
        if state.is_meta:
            return f"{state.dtype}{tuple(state.shape)}"
        return hashlib.sha256(
            f"{state.dtype}{tuple(state.shape)}".encode() + state.numpy().tobytes()
        ).hexdigest()
    if isinstance(state, dict):
        state = [(key, digest(state[key])) for key in sorted(state, key=repr)]
    elif isinstance(state, (list, tuple)):
        state = [digest(part) for part in state]
    return hashlib.sha256(repr(state).encode()).hexdigest()


def timeless(rows: list[dict]) -> list[dict]:
    """Rows of metrics without the speed, which no two runs share."""
    return [{k: v for k, v in row.items() if not k.endswith("_per_second")} for row in rows]


def samples(folder: Path) -> str:
    """The content of a run's samples.jsonl; "" for a run without."""
    return "".join(file.read_text() for file in folder.glob("samples.jsonl"))


def resume_from_each_step(module, arguments: list[str], folder: Path, world: World) -> dict[str, list]:
    """Train without a break; then again from the checkpoint of every step. What differs, by step.

    The copied files of rows have all rows of the whole run, and a torn one: the run was killed later.
    """
    every = ["--save-every", "1", "--keep-checkpoints", "1000"]
    whole = folder / "whole"
    train(module, [*arguments, *every, "--out", str(whole)], world)
    world.wait()
    differing, wanted = {}, states(whole)
    for path in reversed(checkpoints(whole / "checkpoints")):
        again = folder / path.name[:8]
        if world.is_main:
            (again / "checkpoints").mkdir(parents=True)
            copy = shutil.copytree if path.is_dir() else shutil.copy
            copy(path, again / "checkpoints" / path.name)
            for file in whole.glob("*.jsonl"):
                (again / file.name).write_text(file.read_text() + '{"step": 99, "lo')
        world.wait()
        train(module, [*arguments, *every, "--out", str(again), "--resume"], world)
        world.wait()
        later = {step: state for step, state in wanted.items() if step >= step_of(path)}
        found = {
            "state": states(again) != later,
            "rows": timeless(metrics(again)) != timeless(metrics(whole)),
            "samples": samples(again) != samples(whole),
            "model": (again / "model.pt").read_bytes() != (whole / "model.pt").read_bytes(),
        }
        differing[str(step_of(path))] = [what for what, differs in found.items() if differs]
    return differing


def plant(module, fault: str, rank: int, step: int) -> None:
    """In the first attempt, give a rank a fault when it has done `step` steps and is within the next.

    A fault is the name of a signal, several joined by "+", or the value of the gradient or the loss.
    """
    calls = 0

    def due() -> bool:
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        return calls == step and int(os.environ.get("RANK", "0")) == rank and attempt == "0"

    def clip_gradients(optimizer, *arguments):
        nonlocal calls
        if due() and fault.startswith("SIG"):
            for name in fault.split("+"):
                os.kill(os.getpid(), signal.Signals[name])
        if due() and fault == "gradient":
            optimizer.param_groups[0]["params"][0].grad[0, 0] = math.nan
        norm = clip(optimizer, *arguments)
        calls += 1
        return norm

    def faulty_sigmoid(*arguments):
        losses = sigmoid(*arguments)
        if due() and fault.startswith("loss"):
            losses = losses * math.nan if fault == "loss nan" else losses + math.inf
        return losses

    clip, sigmoid = module.clip_gradients, getattr(module, "sigmoid", None)
    module.clip_gradients, module.sigmoid = clip_gradients, faulty_sigmoid


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[1] == "resume":
        script, verdict, folder, *arguments = sys.argv[2:]
        with join("cpu") as world:
            found = resume_from_each_step(importlib.import_module(script), arguments, Path(folder), world)
        if world.is_main:
            Path(verdict).write_text(json.dumps(found))
    else:
        fault, rank, step, script, *arguments = sys.argv[1:]
        module = importlib.import_module(script)
        plant(module, fault, int(rank), int(step))

        def main() -> None:
            with join("cpu") as world:
                train(module, arguments, world)

        run_script(main)
