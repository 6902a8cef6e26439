"""Checkpoints: the complete state of training after an optimizer step, in a file that is complete or absent.

    OUT/checkpoints/00000120-<SHA-256 of the file>.pt

If ranks hold parts of the weights, a checkpoint is a folder with the same properties (see sharded.py).
A crash during a save leaves the earlier checkpoints (`files.write_whole`). The name contains the digest, so a
flipped bit is found before anything is read; torch.load alone would read it as a weight. Loading uses
``weights_only=True``, so a checkpoint cannot run code. Checkpoints are saved between optimizer steps, when
there are no partly summed gradients. They contain no state of a random generator: nothing draws random
numbers after the first weights, and the data order is a function of seed and step.
"""

import copy
import re
import shutil
from collections.abc import Callable
from contextlib import contextmanager
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from errors import InputError, require
from files import file_hash, write_whole
from training.distributed import World
from training.sharded import STATE, check_shards, each_tensor, place_tensors, write_shards

NAME = re.compile(r"(\d{8,})-([0-9a-f]{64})(\.pt|\.shards)")
# Also checkpoints that were set aside, that are being written, and folders that are being removed.
ANY_NAME = re.compile(
    r"\d{8,}-(([0-9a-f]{64})(\.pt|\.shards|\.damaged|\.tmp)|\{sha256\}(\.pt\.\d+|\.shards)\.tmp)"
)
# What the optimizers keep for a parameter: `step`, and tensors of the parameter's shape.
ADAMW, MUON = {"step", "exp_avg", "exp_avg_sq"}, {"momentum_buffer"}
MISFITS = (RuntimeError, ValueError, KeyError, TypeError, AttributeError, IndexError)


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a folder, the newest first."""
    found = [path for path in folder.glob("*-*.*") if NAME.fullmatch(path.name)]
    return sorted(found, key=step_of, reverse=True)


def step_of(path: Path) -> int:
    return int(NAME.fullmatch(path.name)[1])


def is_checkpoint_file(name: str) -> bool:
    """Whether a run wrote the file or folder of this name into its `checkpoints`, complete or not."""
    return bool(ANY_NAME.fullmatch(name))


def save_checkpoint(folder: Path, step: int, state: dict, keep: int, world: World | None = None) -> None:
    """Write the state after `step` steps; only then remove all but the newest `keep` checkpoints.

    With `world` the ranks hold parts of the tensors, and every rank must call it. Raises `InputError` if the
    disk fails.
    """
    name = f"{step:08d}-{{sha256}}"
    if world:
        write_shards(folder / f"{name}.shards", state, world)
    else:
        write_whole(folder / f"{name}.pt", lambda file: torch.save(state, file))
    if not world or world.is_main:
        prune(folder, keep)


def prune(folder: Path, keep: int) -> None:
    """Remove all but the newest `keep` checkpoints."""
    for old in checkpoints(folder)[keep:]:
        remove(old)


def remove(path: Path) -> None:
    """Remove a file or a folder. A folder is renamed first: a crash leaves no half under the old name."""
    try:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path.rename(path.with_suffix(".tmp")))
        else:
            path.unlink()
    except OSError as error:
        raise InputError(f"{path}: cannot be removed ({error.strerror})") from None


def set_aside(path: Path) -> None:
    """Rename a checkpoint to ``….damaged``: no run resumes from it, and it is not counted as kept."""
    target = path.with_suffix(".damaged")
    if target.exists():
        remove(target)
    path.rename(target)


def load_checkpoint(path: Path, check_parts: bool = True) -> dict:
    """The state in a checkpoint. Raises `InputError` with the reason if it is damaged or not a checkpoint.

    Tensors that were split among ranks are on "meta" until `sharded.place_tensors` reads them. With
    `check_parts` the digests of the files that contain them are checked here.
    """
    file = path / STATE if path.is_dir() else path
    try:
        if path.is_symlink() or file.is_symlink():
            raise InputError(f"{path}: a link; a checkpoint must be a file of its folder")
        if file_hash(file) != NAME.fullmatch(path.name)[2]:
            raise InputError(f"{path}: damaged, the content does not have the digest in the name")
        state = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
        for tensor in tensors(state):
            require_plain(tensor, may_be_split=file != path)
        if file != path and check_parts:
            check_shards(path, state)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    except InputError:
        raise
    except Exception as error:  # torch.load raises many kinds for files that torch.save did not write.
        raise InputError(f"{path}: not a checkpoint ({str(error).partition(chr(10))[0]})") from None
    if not isinstance(state, dict) or type(state.get("step")) is not int or state["step"] != step_of(path):
        raise InputError(f"{path}: not a checkpoint of step {step_of(path)}")
    return state


def require_plain(tensor: Tensor, may_be_split: bool) -> None:
    """Raise ValueError unless a tensor is dense, contiguous and finite: torch's kernels do not check it."""
    if type(tensor) is not Tensor or tensor.layout is not torch.strided or not tensor.is_contiguous():
        raise ValueError(f"a {type(tensor).__name__} that is not dense and contiguous")
    if tensor.is_meta:
        if not may_be_split:
            raise ValueError("a tensor without values")
    elif not tensor.isfinite().all():
        raise ValueError("a number that is not finite")


def newest_valid(folder: Path, report: Callable[[str], None]) -> tuple[Path, dict] | None:
    """The newest checkpoint that is valid, and its state; None if the folder contains no checkpoint.

    Newer ones that are damaged are reported and set aside. If all are damaged, raises `InputError` and
    changes nothing: they may be the only copy of the work, and can perhaps be repaired.
    """
    faults: dict[Path, str] = {}
    for path in checkpoints(folder):
        try:
            state = load_checkpoint(path)
        except InputError as error:
            faults[path] = str(error)
            continue
        for damaged, fault in faults.items():
            report(f"{fault}; going back to step {step_of(path)}")
            set_aside(damaged)
        return path, state
    require(not faults, f"--resume: no checkpoint can be used: {'; '.join(faults.values())}")
    return None


def restore(parts: dict, saved: dict, path: Path | None = None, mesh: DeviceMesh | None = None) -> None:
    """Give each part of the run its state in the checkpoint `saved`. Raises `InputError` if one does not fit.

    Every part is checked before any is changed. Split tensors are read from `path`, and split among the ranks
    of `mesh`. All ranks must call it together: the running means of the run are gathered from them.
    """
    for name, part in parts.items():
        if name not in saved:
            found = ", ".join(map(str, saved))
            raise InputError(f"--resume: the checkpoint does not contain {name}, only {found}")
        with fitting(name):
            if isinstance(part, torch.optim.Optimizer):
                check_moments(part, saved[name])
            else:
                check_like(saved[name], part.state_dict())
    placed = place_tensors({name: saved[name] for name in parts}, path, mesh)
    for name, part in parts.items():
        state = placed[name]
        if isinstance(part, torch.optim.Optimizer):
            # Moments are copied, since torch keeps the tensors that it is given and these are mapped from the
            # file. How the optimizer steps is for the settings to decide, not for the checkpoint.
            moments = state["state"] if mesh else copy.deepcopy(state["state"])
            state = {"state": moments, "param_groups": part.state_dict()["param_groups"]}
        with fitting(name):
            part.load_state_dict(state)


@contextmanager
def fitting(name: str):
    """Turn errors about the state of one part into an `InputError` that names the part."""
    try:
        yield
    except MISFITS as error:
        raise InputError(f"--resume: the checkpoint's {name} does not fit: {error}") from None


def check_like(saved, like, name: str = "state") -> None:
    """Raise ValueError unless `saved` has the keys, shapes and types of `like`. Lists may be longer."""
    if isinstance(like, Tensor):
        check_tensor(saved, like.shape, like.dtype, name)
    elif isinstance(like, dict):
        if not isinstance(saved, dict) or saved.keys() != like.keys():
            other = sorted(map(str, {*saved} ^ like.keys()))
            raise ValueError(f"{name} has other keys, which differ in {', '.join(other)}")
        for key, value in like.items():
            check_like(saved[key], value, key)
    elif isinstance(like, list):
        if not isinstance(saved, list):
            raise ValueError(f"{name} is not a list")
        for value in saved:
            check_like(value, like[0] if like else value, name)
    elif isinstance(saved, (int, float)) != isinstance(like, (int, float)):
        raise ValueError(f"{name} is {saved!r}, the run has {like!r}")


def check_tensor(saved, shape: torch.Size, dtype: torch.dtype, name: str) -> None:
    if not isinstance(saved, Tensor) or saved.shape != shape or saved.dtype != dtype:
        found = f"{saved.dtype} {[*saved.shape]}" if isinstance(saved, Tensor) else type(saved).__name__
        raise ValueError(f"{name} is {found}, the run has {dtype} {[*shape]}")


def check_moments(optimizer: torch.optim.Optimizer, saved: dict) -> None:
    """Raise an error of `MISFITS` unless the moments are those of the optimizer's parameters, in their order.

    torch assigns moments to parameters by position, and checks neither their names, shapes nor types; its
    fused kernels then read beyond the end of a tensor that is too small.
    """
    if saved.keys() != {"state", "param_groups"}:
        raise ValueError(f"it contains {', '.join(map(str, saved))}")
    now = [group["param_names"] for group in optimizer.state_dict()["param_groups"]]
    then = [group["param_names"] for group in saved["param_groups"]]
    if then != now:
        changed = sorted({*chain(*then)} ^ {*chain(*now)}) or "the same ones in another order"
        raise ValueError(f"it has other parameters: {changed}")
    groups = optimizer.param_groups
    kept = [ADAMW if "betas" in group else MUON for group in groups for _ in group["params"]]
    parameters = dict(enumerate(chain(*(group["params"] for group in groups))))
    for place, moments in saved["state"].items():
        name, parameter = [*chain(*now)][place], parameters[place]
        if moments.keys() != kept[place]:
            raise ValueError(f"the moments of {name} are {sorted(moments)}")
        for key, value in moments.items():
            like = (torch.Size(), torch.float32) if key == "step" else (parameter.shape, parameter.dtype)
            check_tensor(value, *like, f"{name}'s {key}")
        if "step" in moments and moments["step"] < 0:
            raise ValueError(f"{name}'s step is {moments['step']}")


def tensors(state) -> list[Tensor]:
    """Every tensor in nested dicts and lists."""
    found = []
    each_tensor(lambda name, tensor: found.append(tensor), state)
    return found


def is_finite(state) -> bool:
    """Whether all numbers in a state are finite; of a split tensor, those in this rank's part."""
    local = (tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors(state))
    return all(tensor.isfinite().all() for tensor in local)
