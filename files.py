"""Files that are whole or not there: what every room writes that must outlive a crash."""

import hashlib
import os
from pathlib import Path

from errors import InputError


class DigestingFile:
    """A file that is being written, and the SHA-256 of what went into it."""

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


def write_whole(path: Path, write) -> Path:
    """Call ``write(file)`` on a file beside `path`, sync it, rename it, sync the folder; return where it is.

    At no moment is there half a file under the final name, and what a power cut leaves is the old file or
    the new one. ``{sha256}`` in the name becomes the digest of the content.
    """
    unfinished = path.with_name(f"{path.name}.{os.getpid()}.tmp")  # Another run may be writing the same.
    try:
        with open(unfinished, "wb") as file:
            digesting = DigestingFile(file)
            write(digesting)
            file.flush()
            os.fsync(file.fileno())
        path = path.with_name(path.name.replace("{sha256}", digesting.digest.hexdigest()))
        os.replace(unfinished, path)
        sync(path.parent)
    except BaseException as error:  # Also Ctrl-C: half a file is of no use to anybody.
        unfinished.unlink(missing_ok=True)
        raise unwritable(path, error) from None
    return path


def unwritable(path: Path, error: BaseException) -> BaseException:
    """The disk's own word on why a file cannot be written; the error itself where it is another's."""
    # torch.save says only that its position is unexpected; what the disk said is behind it.
    reason = error.__context__ if isinstance(error, RuntimeError) else error
    if not isinstance(reason, OSError):
        return error
    return InputError(f"{path}: cannot be written ({reason.strerror}); what was there is whole")


def sync(path: Path) -> None:
    """Make a file's content durable, or the names in a folder: a rename is a change of its folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def file_hash(path: Path) -> str:
    """SHA-256 of a file's content, in memory that does not grow with it."""
    with open(path, "rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
