"""Checkpoints: the whole state after an optimizer step, in one file that is either whole or not there.

    OUT/checkpoints/00000120-<SHA-256 of the file>.pt

or, where ranks hold a part of it each, in a folder of which the same is true (see sharded.py).
A crash while it is written leaves the former ones (`files.write_whole`). A flipped bit anywhere in it is
found before anything of it is read, because its name is its digest; torch.load alone would take it for a
weight. It is loaded with ``weights_only=True``, so no code in it can run. It is taken between optimizer steps
only, where there are no half-summed gradients. It holds no state of a random generator: nothing draws after
the first weights, and the data order is a function of seed and step.
"""

import re
import shutil
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from errors import InputError
from files import file_hash, write_whole
from training.distributed import World
from training.sharded import STATE, check_shards, write_shards

NAME = re.compile(r"(\d{8,})-([0-9a-f]{64})(\.pt|\.shards)")


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of a folder, the newest first."""
    found = [path for path in folder.glob("*-*.*") if NAME.fullmatch(path.name)]
    return sorted(found, key=step_of, reverse=True)


def step_of(path: Path) -> int:
    return int(NAME.fullmatch(path.name)[1])


def save_checkpoint(folder: Path, step: int, state: dict, keep: int, world: World | None = None) -> None:
    """Write the state after `step` steps; then, and not before, remove all but the newest `keep`.

    With `world` its ranks hold a part each of what is to be written, and every rank must call it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if world:
        write_shards(folder / f"{step:08d}-{{sha256}}.shards", state, world)
    else:
        write_whole(folder / f"{step:08d}-{{sha256}}.pt", lambda file: torch.save(state, file))
    if not world or world.is_main:
        for old in checkpoints(folder)[keep:]:
            remove(old)


def remove(path: Path) -> None:
    """Remove a file, or a folder so that no half of it is ever left under its name."""
    if path.is_dir():
        shutil.rmtree(path.rename(path.with_suffix(".tmp")))
    else:
        path.unlink()


def load_checkpoint(path: Path, check_parts: bool = True) -> dict:
    """The state in a checkpoint; `InputError` with the reason when it cannot be trusted.

    Tensors that were split are still to be read then, by `sharded.settle`; the files that hold them are
    checked here, unless somebody else has done so.
    """
    file = path / STATE if path.is_dir() else path
    try:
        if path.is_symlink() or file.is_symlink():
            raise InputError(f"{path}: a link, where a checkpoint should be a file of this folder")
        if file_hash(file) != NAME.fullmatch(path.name)[2]:
            raise InputError(f"{path}: damaged, its content is not that of the digest in its name")
        state = torch.load(file, map_location="cpu", weights_only=True)
        if file != path and check_parts:
            check_shards(path, state)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    except InputError:
        raise
    except Exception as error:  # torch.load raises many kinds for what somebody else may have written.
        raise InputError(f"{path}: no checkpoint ({str(error).partition(chr(10))[0]})") from None
    if not isinstance(state, dict) or state.get("step") != step_of(path):
        raise InputError(f"{path}: no checkpoint of step {step_of(path)}")
    return state


def newest_valid(folder: Path, say: Callable) -> tuple[Path, dict] | None:
    """The newest checkpoint that can be trusted; None if there is no file at all.

    What is wrong with a newer one is said, and it is set aside, out of the way of what is saved from here on.
    When none is left, nothing is touched and nothing is started anew over what may still be mended.
    """
    faults: dict[Path, str] = {}
    for path in checkpoints(folder):
        try:
            state = load_checkpoint(path)
        except InputError as error:
            faults[path] = str(error)
            continue
        for damaged, fault in faults.items():
            say(f"{fault}; going back to step {step_of(path)}")
            damaged.rename(damaged.with_suffix(".damaged"))
        return path, state
    if faults:
        raise InputError(f"--resume: no checkpoint can be used: {'; '.join(faults.values())}")
    return None


def restore(things: dict, state: dict) -> None:
    """Give each thing the state that was saved under its name. Raises `InputError` where they do not fit."""
    for name, thing in things.items():
        if name not in state:
            raise InputError(f"--resume: the checkpoint has no {name}, only {', '.join(state)}")
        saved = state[name]
        if isinstance(thing, torch.optim.Optimizer):
            saved = checked_moments(thing, saved)
        try:
            thing.load_state_dict(saved)
        except (RuntimeError, ValueError, KeyError) as error:
            raise InputError(f"--resume: the checkpoint's {name} does not fit: {error}") from None


def checked_moments(optimizer: torch.optim.Optimizer, saved: dict) -> dict:
    """An optimizer's saved state for the very parameters it has now; how it steps is for the settings to say.

    torch matches moments to parameters by their place alone, and would take another order without a word.
    """
    groups = optimizer.state_dict()["param_groups"]
    then, now = ([group["param_names"] for group in side] for side in (saved["param_groups"], groups))
    if then != now:
        changed = sorted({*chain(*then)} ^ {*chain(*now)}) or "the same ones in another order"
        raise InputError(f"--resume: the checkpoint's optimizer has other parameters: {changed}")
    return {"state": saved["state"], "param_groups": groups}


def tensors(state) -> Iterator[Tensor]:
    """Every tensor in nested dicts and lists; of one that is split, this rank's part."""
    if isinstance(state, Tensor):
        yield state.to_local() if isinstance(state, DTensor) else state
    elif isinstance(state, (dict, list, tuple)):
        for part in state.values() if isinstance(state, dict) else state:
            yield from tensors(part)
