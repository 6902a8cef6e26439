"""Files that are complete or absent, whenever the machine stops."""

import contextlib
import errno
import hashlib
import json
import os
import re
from collections.abc import Iterable
from pathlib import Path

from errors import InputError

UNFINISHED = re.compile(r"(.+)\.\d+\.tmp")  # How `write_whole` names a file until it is complete.


class DigestingFile:
    """A binary file that is being written, and the SHA-256 of its content so far."""

    def __init__(self, file):
        self.file, self.digest = file, hashlib.sha256()

    def write(self, data) -> int:
        self.digest.update(data)
        return self.file.write(data)

    def writelines(self, lines) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        self.file.flush()


def write_whole(path: str | Path, write) -> Path:
    """Write a file by ``write(file)`` and return its path. A crash leaves the old file or the new one.

    The content goes to a file beside `path`, which is synced and renamed; then the folder is synced. The
    folder is created if necessary. The digest of the content replaces ``{sha256}`` in the name. Raises
    `InputError` if the disk fails.
    """
    path = Path(path)
    unfinished = path.with_name(f"{path.name}.{os.getpid()}.tmp")  # Another process may write the same file.
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(unfinished, "wb") as file:
            digesting = DigestingFile(file)
            write(digesting)
            file.flush()
            os.fsync(file.fileno())
        path = path.with_name(path.name.replace("{sha256}", digesting.digest.hexdigest()))
        os.replace(unfinished, path)
        sync(path.parent)
    except BaseException as error:  # Also Ctrl-C: an incomplete file is useless.
        with contextlib.suppress(OSError):  # It may not exist.
            unfinished.unlink()
        raise unwritable(path, error) from None
    return path


def write_json(path: str | Path, value: dict) -> None:
    """Write a JSON file in the manner of `write_whole`. Creates its folder if necessary."""
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    write_whole(path, lambda file: file.write(text.encode("utf-8", "backslashreplace")))


def write_lines(path: str | Path, records: Iterable[dict]) -> None:
    """Write JSON lines in the manner of `write_whole`.

    UTF-8 cannot encode a lone surrogate. Texts have none; in other fields JSON escapes it.
    """
    write_whole(path, lambda file: file.writelines(map(json_line, records)))


def json_line(record: dict) -> bytes:
    return (json.dumps(record, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace")


def unwritable(path: Path, error: BaseException) -> BaseException:
    """An `InputError` with the system's reason why a file cannot be written; other errors unchanged."""
    # torch.save raises RuntimeError("unexpected pos"); the error of the disk is its context.
    reason = error.__context__ if isinstance(error, RuntimeError) else error
    if not isinstance(reason, OSError):
        return error
    return InputError(f"{path}: cannot be written ({reason.strerror}); earlier files are intact")


def append_synced(file, data: bytes, path: str | Path) -> None:
    """Append to an unbuffered binary file; `data` is on the disk when this returns.

    Raises `InputError` if the disk fails; the file then has its old length.
    """
    length = file.seek(0, os.SEEK_END)
    try:
        if file.write(data) < len(data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        os.fsync(file.fileno())
    except OSError as error:
        with contextlib.suppress(OSError):
            file.truncate(length)  # Half a line would spoil the next one.
        raise unwritable(Path(path), error) from None


def sync(path: Path) -> None:
    """Make the content of a file durable, or the names in a folder: a rename changes its folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def file_hash(path: Path) -> str:
    """The SHA-256 of a file's content, read in blocks of 1 MiB."""
    with open(path, "rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
