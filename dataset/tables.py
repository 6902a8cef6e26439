"""Rows of tables as records: Parquet (extra `parquet`) and CSV, read piece by piece.

A record is the dictionary that a JSON line would be, so the formats of `formats.py` hold for both. An empty
field of a table is a missing key. Errors name the file and the row: in Parquet counted from 1, in CSV the
line on which it begins.
"""

import codecs
import csv
from collections.abc import Iterator

from dataset.jsonl import MAX_LINE, DataError, show
from errors import InputError

BATCH = 64  # rows of a Parquet file that are in memory at once
NUMBERS = ("score_chosen", "score_rejected", "win_probability")  # the columns of a CSV that are not text
OPTIONAL = (*NUMBERS, "history", "system")  # An empty field of these CSV columns is a missing key.


# ---- Parquet


def read_parquet(path) -> Iterator[tuple[int, object]]:
    """Yield (row, record) for every row; a row that cannot be used is a `DataError` in its place.

    Columns whose type JSON does not have, such as dates and bytes, are not read. Raises `InputError` without
    pyarrow, `DataError` for a damaged file.
    """
    try:
        import pyarrow as arrow
        from pyarrow import parquet
    except ImportError:
        raise InputError(f"{path}: Parquet needs pyarrow (extra parquet): pip install pyarrow") from None
    row = 0
    try:
        # Without pre_buffer and with a buffer, pages are read one after another, not whole groups of rows.
        with parquet.ParquetFile(path, pre_buffer=False, buffer_size=2**20) as file:
            columns = [field.name for field in file.schema_arrow if is_json(field.type, arrow.types)]
            if twice := [name for name in columns if columns.count(name) > 1]:
                raise DataError(path, 1, f"two columns have the name {show(twice[0])}")
            if not columns:
                raise DataError(path, 1, "no column contains text, numbers or lists of them")
            for batch in file.iter_batches(BATCH, columns=columns, use_threads=False):
                for record in parquet_records(batch, path, row + 1):
                    row += 1
                    yield row, record
    except (arrow.ArrowException, OSError, RecursionError) as error:
        reason = str(error).strip().partition("\n")[0][:200]
        raise DataError(path, row + 1, f"not Parquet, or the file is damaged ({reason})") from None


def is_json(kind, types, depth: int = 0) -> bool:
    """Whether JSON has this type of pyarrow's: text, number, truth value, or lists and structs of them."""
    if depth > 16:
        return False
    if types.is_dictionary(kind):
        return is_json(kind.value_type, types, depth + 1)
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        return is_json(kind.value_type, types, depth + 1)
    if types.is_struct(kind):
        return all(is_json(field.type, types, depth + 1) for field in kind)
    plain = types.is_string(kind) or types.is_large_string(kind) or types.is_boolean(kind)
    return plain or types.is_integer(kind) or types.is_floating(kind) or types.is_null(kind)


def parquet_records(batch, path, number: int) -> list:
    """The records of a batch whose first row has this number; a `DataError` in place of each bad one."""
    reason = f"row longer than {MAX_LINE // 2**20} MiB"
    if batch.nbytes <= MAX_LINE:
        try:
            return [without_nulls(record) for record in batch.to_pylist()]
        except UnicodeDecodeError as error:
            reason = f"not UTF-8: byte 0x{error.object[error.start]:02x} in a text"
    if len(batch) == 1:
        return [DataError(path, number, reason)]
    rows = ((place, batch.slice(place, 1)) for place in range(len(batch)))
    return [record for place, row in rows for record in parquet_records(row, path, number + place)]


def without_nulls(value):
    """The value without keys whose value is null: every struct of a column has all keys of its type."""
    if isinstance(value, dict):
        return {key: without_nulls(part) for key, part in value.items() if part is not None}
    return [without_nulls(part) for part in value] if isinstance(value, list) else value


# ---- CSV


def read_csv(path) -> Iterator[tuple[int, object]]:
    """Yield (line, record) for every row below the header; a bad row is a `DataError` in its place.

    Fields are text; those of `NUMBERS` are numbers. A column without a name, such as an index, is not read.
    Raises `DataError` where the rows that follow cannot be told apart.
    """
    csv.field_size_limit(MAX_LINE)
    header = None
    with open(path, "rb") as file:
        rows = csv.reader(text_lines(file, path), strict=True)
        while True:
            line = rows.line_num + 1
            try:
                fields = next(rows, None)
            except csv.Error as error:
                advice = "; is a quote not closed, or not doubled?"
                raise DataError(path, line, f"invalid CSV: {error}{advice}") from None
            if fields is None:
                return
            if header is None:
                header = checked_header(fields, path, line)
            elif fields:  # An empty line has no fields.
                yield line, csv_record(header, fields, path, line)


def text_lines(file, path) -> Iterator[str]:
    """The decoded lines of a CSV file, which may be in the middle of a field."""
    number = 0
    while line := file.readline(MAX_LINE + 1):
        number += 1
        line = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
        if len(line) > MAX_LINE:
            raise DataError(path, number, f"line longer than {MAX_LINE // 2**20} MiB")
        if b"\0" in line:
            raise DataError(path, number, "not UTF-8 text: the line contains a NUL byte; save it as UTF-8")
        try:
            yield line.decode("utf-8")
        except UnicodeDecodeError as error:
            column = error.start + 1
            reason = f"not UTF-8: byte 0x{line[error.start]:02x} at column {column}; save the file as UTF-8"
            raise DataError(path, number, reason) from None


def checked_header(names: list[str], path, line: int) -> list[str]:
    if twice := [name for name in names if name and names.count(name) > 1]:
        raise DataError(path, line, f"two columns have the name {show(twice[0])}")
    if not any(names):
        raise DataError(path, line, "expected the names of the columns, found an empty line")
    return names


def csv_record(header: list[str], fields: list[str], path, line: int):
    """The record of a row, or a `DataError` in its place."""
    if len(fields) != len(header):
        found = f"found {len(fields)} fields, the header has {len(header)} columns"
        return DataError(path, line, f"{found}; a text with a comma, a quote or a line break needs quotes")
    record: dict = {name: text for name, text in zip(header, fields, strict=True) if name}
    for name in OPTIONAL:
        if name in record and not record[name].strip():
            del record[name]
        elif name in record and name in NUMBERS:
            try:
                record[name] = float(record[name])
            except ValueError:
                return DataError(path, line, f"{name}: expected a number, found {show(record[name])}")
    return record


READERS = {".parquet": read_parquet, ".csv": read_csv}
