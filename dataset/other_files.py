"""Error messages for paths that are not JSON data: folders, CSV, Parquet, names of the Hugging Face hub."""

import re
import shlex
from pathlib import Path

from errors import InputError

CONVERT = 'python -c "import {module}, json, sys; [print(json.dumps(row, default=str)) for row in {rows}]"'
READERS = {  # suffix: (name, module, expression that yields the rows as dictionaries)
    ".csv": ("CSV", "csv", "csv.DictReader(open(sys.argv[1], encoding='utf-8-sig', newline=''))"),
    ".parquet": ("Parquet", "pyarrow.parquet", "pyarrow.parquet.read_table(sys.argv[1]).to_pylist()"),
}
SUFFIXES = (".jsonl", ".json", ".gz", *READERS)


def require_data_file(path) -> None:
    """Raise `InputError` with the next step if ``path`` is missing, a folder, CSV or Parquet."""
    path = Path(path)
    try:
        if path.is_dir():
            files = [*path.glob("*"), *path.glob("*/*")]
            names = sorted(str(file) for file in files if file.suffix in SUFFIXES)
            example = f", such as {names[0]}" if names else ""
            raise InputError(f"{path}: cannot be read: it is a folder; name one data file{example}")
        if not path.exists():
            raise InputError(f"{path}: cannot be read: no such file{hub_advice(path)}")
    except OSError as error:
        raise InputError(f"{str(path)[:200]}: cannot be read ({error.strerror})") from None
    if path.suffix.lower() in READERS:
        name, module, rows = READERS[path.suffix.lower()]
        source, target = (shlex.quote(str(file)) for file in (path, path.with_suffix(".jsonl")))
        command = f"{CONVERT.format(module=module, rows=rows)} {source} > {target}"
        raise InputError(f"{path}: cannot be read: it is {name}; write it as JSON lines: {command}")


def hub_advice(path: Path) -> str:
    """The command that downloads the data set "owner/name", as the end of a message; "" for other paths."""
    if not re.fullmatch(r"[\w-]+/[\w.-]+", str(path)) or path.parent.exists() or path.suffix in SUFFIXES:
        return ""
    command = f"hf download {path} --repo-type dataset --local-dir {path.name}"
    return f"; to download a data set of the Hugging Face hub: {command}, then name a file in {path.name}"
