"""The cache of tokenised data: folders that are complete or not there."""

import contextlib
import os
import platform
import re
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from errors import InputError
from files import sync

DAY = 24 * 3600  # seconds
UNFINISHED = re.compile(r"unfinished-(?:(.+)-(\d+)-)?[a-z0-9_]{8}")  # host, process id


def cache_folder() -> Path:
    """$MINIDPO_CACHE, or minidpo in the user's cache folder."""
    for variable, below in (("MINIDPO_CACHE", ""), ("XDG_CACHE_HOME", "minidpo")):
        if os.environ.get(variable):
            return Path(os.environ[variable], below)
    try:
        return Path.home() / ".cache" / "minidpo"
    except RuntimeError:
        raise InputError("this user has no home folder; set $MINIDPO_CACHE to a folder for data") from None


def is_cached(folder: Path) -> bool:
    """Whether the folder exists, by a listing of its parent: NFS may cache that a single name is missing."""
    try:
        return folder.name in os.listdir(folder.parent)
    except OSError:
        return False


def build(folder: Path, write: Callable[[Path], None]) -> None:
    """Call ``write(unfinished)`` on a folder beside the final one, sync its files, rename it.

    If another process was faster, its folder stays. Raises `InputError` if the cache cannot be written.
    """
    cache = folder.parent
    try:
        cache.mkdir(parents=True, exist_ok=True)
        remove_stale(cache)
        name = f"unfinished-{platform.node()}-{os.getpid()}-"
        unfinished = Path(tempfile.mkdtemp(dir=cache, prefix=name))
        try:
            unfinished.chmod(0o755)  # Other users may share the cache.
            write(unfinished)
            for file in (*unfinished.iterdir(), unfinished):
                sync(file)  # Else a power cut could leave the name of the folder without its content.
            try:
                unfinished.rename(folder)
            except OSError:
                if not is_cached(folder):  # Another process was faster: its content is the same.
                    raise
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    except OSError as error:
        reason = error.strerror or error
        advice = "set $MINIDPO_CACHE to a folder that is writable and has room"
        raise InputError(f"{cache}: tokenised data cannot be written here ({reason}); {advice}") from None


def remove_stale(cache: Path) -> None:
    """Remove the unfinished folders of processes that were killed, and nothing else."""
    for folder in cache.glob("unfinished-*"):
        with contextlib.suppress(OSError):  # Another process may remove or rename it at the same time.
            if is_stale(folder):
                shutil.rmtree(folder, ignore_errors=True)


def is_stale(folder: Path) -> bool:
    """Whether a folder of `build` is unfinished and its process has ended or written nothing for a day."""
    name, files = UNFINISHED.fullmatch(folder.name), list(folder.iterdir())
    if not name or any(file.suffix not in (".bin", ".npy", ".json") for file in files):
        return False
    if os.name == "posix" and name[1] == platform.node():
        try:
            os.kill(int(name[2]), 0)  # Signal 0 only checks that the process exists.
        except ProcessLookupError:
            return True
        except OSError:
            pass
    return time.time() - max(file.stat().st_mtime for file in (folder, *files)) > DAY
