"""Run folders: the names that a run writes, the lock of its owner, and the room that its disk must have.

    OUT/.lock              process id of the run, which locks this file as long as it lives
    OUT/checkpoints/       while the run is unfinished
    OUT/metrics.jsonl      the log
    OUT/samples.jsonl      answers to held-out prompts, if the run generates them
    OUT/tracker.json, tensorboard/      with --track, see track.py
    OUT/best/              with --keep-best: the model with the best held-out figure so far
    OUT/config.json, tokenizer files, adapter.pt, model.pt      written at the end, model.pt last

A run overwrites and removes only files that a run wrote; their names identify them.
"""

import contextlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from errors import InputError
from files import UNFINISHED, sync
from training.checkpoint import checkpoints, is_checkpoint_file, remove, step_of

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

WEIGHTS = ("model.pt", "adapter.pt")
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "generation_config.json",
             "tokenizer.model", "added_tokens.json")  # fmt: skip
WRITTEN = (*WEIGHTS, "config.json", "metrics.jsonl", "samples.jsonl", "tracker.json", "tensorboard",
           *TOKENIZER)  # fmt: skip
MODEL = (*WEIGHTS, "config.json", *TOKENIZER)  # the files of a model folder
CHECKPOINTS, LOCK = "checkpoints", ".lock"
BESTS = BEST, NEXT_BEST, OLD_BEST = "best", "best.tmp", "best.old"


def take_lock(folder: Path):
    """Own the folder until this process ends, however it ends; return the locked file.

    Raises `InputError` if another process is the owner.
    """
    lock = open(folder / LOCK, "ab+", buffering=0)  # noqa: SIM115
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.seek(0)
        owner = lock.read().decode(errors="replace").strip()
        raise InputError(f"{folder}: another run writes to this folder (process {owner})") from None
    lock.truncate(0)
    lock.write(f"{os.getpid()}\n".encode())
    return lock


def require_same_folder(folder: Path, lock) -> None:
    """Raise `InputError` if the folder was removed or replaced since this process locked it."""
    try:
        same = os.path.samestat(os.stat(folder / LOCK), os.fstat(lock.fileno()))
    except OSError:
        same = False
    if not same:
        advice = "if it still exists elsewhere, continue with --out there and --resume"
        raise InputError(f"{folder} was removed, renamed or replaced while the run wrote to it; {advice}")


def is_finished(folder: Path) -> bool:
    """Whether the folder contains the model of a finished run. An empty model.pt is not a model."""
    model = folder / "model.pt"
    return model.is_file() and model.stat().st_size > 0


def require_no_foreign_files(folder: Path) -> None:
    """Raise `InputError` if a new run would overwrite or remove files that no run wrote."""
    foreign = [path for path in listed(folder / CHECKPOINTS) if not is_checkpoint_file(path.name)]
    models = [path for name in BESTS for path in listed(folder / name)]
    foreign += [path for path in models if plain_name(path) not in MODEL]
    if not (folder / LOCK).exists():
        foreign += [folder / name for name in (*WRITTEN, *BESTS) if (folder / name).exists()]
    if foreign:
        raise InputError(f"--out {folder}: a run did not write {foreign[0]}; choose another folder")


def require_replaceable(folder: Path, overwrite: bool) -> None:
    """Raise `InputError` if the folder contains a finished or stopped run, unless `overwrite` is true."""
    if overwrite:
        return
    if is_finished(folder):
        found, other = f"a finished run ({folder / 'model.pt'})", "choose another folder"
    elif (folder / BEST).exists() and not checkpoints(folder / CHECKPOINTS):
        found, other = f"the best weights of a stopped run ({folder / BEST})", "choose another folder"
    elif left := checkpoints(folder / CHECKPOINTS):
        found, other = f"a run that was stopped after step {step_of(left[0])}", "continue it with --resume"
    else:
        return
    raise InputError(f"--out {folder} contains {found}: {other}, or replace the run with --overwrite")


def remove_unfinished(folder: Path) -> None:
    """Remove the incomplete files that a killed run left."""
    for path in listed(folder):
        if UNFINISHED.fullmatch(path.name) and plain_name(path) in WRITTEN:
            remove(path)
    if (folder / OLD_BEST).exists() and not (folder / BEST).exists():
        (folder / OLD_BEST).rename(folder / BEST)
    for name in (NEXT_BEST, OLD_BEST):
        remove_model(folder / name)
    for path in listed(folder / CHECKPOINTS):
        if is_checkpoint_file(path.name) and path.suffix == ".tmp":
            remove(path)


def remove_run(folder: Path) -> None:
    """Remove weights, checkpoints, samples and curves of an earlier run: they are not the new one's."""
    for name in (*WEIGHTS, "samples.jsonl", "tracker.json"):
        (folder / name).unlink(missing_ok=True)
    for events in folder.glob("tensorboard/events.out.tfevents.*"):
        events.unlink()
    sync(folder)
    for name in BESTS:
        remove_model(folder / name)
    remove_checkpoints(folder)


def replace_best(folder: Path, write: Callable[[Path], None]) -> None:
    """Replace OUT/best by the model folder that ``write(path)`` writes; a crash leaves the old or new one.

    Between the two renames the old one is called best.old, and `remove_unfinished` restores it.
    """
    best, following, old = (folder / name for name in BESTS)
    following.mkdir()
    write(following)
    if best.exists():
        best.rename(old)
    following.rename(best)
    sync(folder)
    remove_model(old)


def remove_model(folder: Path) -> None:
    """Remove the files of a model from a folder, and the folder if it is then empty."""
    for path in listed(folder):
        if plain_name(path) in MODEL:
            remove(path)
    with contextlib.suppress(OSError):
        folder.rmdir()


def plain_name(path: Path) -> str:
    """The name of a file; of an incomplete one, the name that it would have got."""
    unfinished = UNFINISHED.fullmatch(path.name)
    return unfinished[1] if unfinished else path.name


def remove_checkpoints(folder: Path) -> None:
    """Remove all checkpoints, also damaged ones, and their folder if it is then empty."""
    for path in listed(folder / CHECKPOINTS):
        if is_checkpoint_file(path.name):
            remove(path)
    with contextlib.suppress(OSError):
        (folder / CHECKPOINTS).rmdir()


def require_room(folder: Path, checkpoint: int, model: int, keep: int) -> None:
    """Raise `InputError` unless the disk has room for `keep` + 1 checkpoints and the model, sizes in bytes.

    The space of the files that the run replaces or prunes counts as free.
    """
    replaced = [folder / name for name in (*WEIGHTS, BEST)] + checkpoints(folder / CHECKPOINTS)
    free = shutil.disk_usage(folder).free + sum(map(size, replaced))
    needed = checkpoint * (keep + 1) + model
    if free < needed:
        room = f"has {free / 2**20:.0f} MiB for this run, which needs {needed / 2**20:.0f} MiB"
        raise InputError(f"{folder}: the disk {room}; --keep-checkpoints 1 needs less")


def size(path: Path) -> int:
    """Bytes of a file, or of the files in a folder; 0 if it does not exist."""
    files = path.iterdir() if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())


def listed(folder: Path) -> list[Path]:
    return list(folder.iterdir()) if folder.is_dir() else []
