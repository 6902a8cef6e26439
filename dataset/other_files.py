"""Error messages for paths that are not data files: folders, and names of the Hugging Face hub."""

import re
from pathlib import Path

from errors import InputError

SUFFIXES = (".jsonl", ".json", ".jsonl.gz", ".json.gz", ".parquet", ".csv")


def require_data_file(path) -> None:
    """Raise `InputError` with the next step if ``path`` is missing or a folder."""
    path = Path(path)
    try:
        if path.is_dir():
            files = [*path.glob("*"), *path.glob("*/*")]
            names = sorted(str(file) for file in files if file.name.lower().endswith(SUFFIXES))
            example = f", such as {names[0]}" if names else ""
            raise InputError(f"{path}: cannot be read: it is a folder; name one data file{example}")
        if not path.exists():
            raise InputError(f"{path}: cannot be read: no such file{hub_advice(path)}")
    except OSError as error:
        raise InputError(f"{str(path)[:200]}: cannot be read ({error.strerror})") from None


def hub_advice(path: Path) -> str:
    """The command that downloads the data set "owner/name", as the end of a message; "" for other paths."""
    if not re.fullmatch(r"[\w-]+/[\w.-]+", str(path)) or path.parent.exists() or path.name.endswith(SUFFIXES):
        return ""
    command = f"hf download {path} --repo-type dataset --local-dir {path.name}"
    there = f"its files are then in {path.name}, often as {path.name}/data/train*.parquet; name them"
    return f"; to download a data set of the Hugging Face hub: {command}; {there}"
