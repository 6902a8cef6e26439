"""Bytes in, JSON values out, each with its physical line. What a value means is for `records.py` to say.

A ``.jsonl`` file is streamed, one value a line, so it may be larger than memory. A ``.json`` file that holds
one array is read whole, because an array has no lines to stop at; turn a large one into ``.jsonl``. A
``.json`` file that holds one object a line is read as lines. Either may be gzipped.
"""

import codecs
import gzip
import json
import math
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager

from errors import InputError

MAX_LINE = 16 * 2**20  # A longer line is no training example; the cap keeps memory bounded.
MAX_DIGITS = 300  # Longer integers do not fit a float, and Python refuses to parse the longest.
SPACES = re.compile(r"[ \t\n\r]*")  # JSON's own white space, which is less than Python's.


class DataError(InputError):
    """A record, or a whole file, that cannot be used: ``path:line: reason``."""

    def __init__(self, path, line: int, reason: str):
        super().__init__(f"{path}:{line}: {reason}")
        self.path, self.line, self.reason = str(path), line, reason


def kind(value) -> str:
    """The JSON type of ``value``, in words."""
    names = {type(None): "null", bool: "true or false", str: "text", list: "a list", dict: "an object"}
    return names.get(type(value), "a number")


def show(value) -> str:
    """``value`` as an error message may print it: escaped and short, never a whole record."""
    if not isinstance(value, str):
        return kind(value)
    shown = repr(value[:40])
    return shown if len(shown) <= 42 and len(value) <= 40 else f"{shown[:40]}..."


class StrictDecoder(json.JSONDecoder):
    """JSON and no more. What Python lets pass (NaN, 1e400, the last of two equal keys) is noted in `faults`.

    Noting instead of raising lets the decoder reach the end of a bad value, so an array can be read past it.
    """

    def __init__(self):
        self.faults: list[str] = []
        super().__init__(
            object_pairs_hook=self._object,
            parse_constant=lambda name: self.faults.append(f"{name} is not JSON"),
            parse_float=lambda digits: self._number(digits, float(digits)),
            parse_int=lambda digits: self._number(
                digits, int(digits) if len(digits) <= MAX_DIGITS else math.inf
            ),
        )

    def _object(self, pairs: list) -> dict:
        record = dict(pairs)
        if len(record) < len(pairs):
            last = {key: place for place, (key, _) in enumerate(pairs)}
            twice = next(key for place, (key, _) in enumerate(pairs) if last[key] != place)
            self.faults.append(f"duplicate key {show(twice)}")
        return record

    def _number(self, digits: str, value: float) -> float:
        if math.isinf(value):
            self.faults.append(f"number {show(digits)} is out of range")
        return value

    def checked(self, value, path, line: int):
        """``value``, or the `DataError` that stands in its place if the decoding noted a fault."""
        faults, self.faults[:] = self.faults[:], []
        return DataError(path, line, faults[0]) if faults else value


def read_values(path) -> Iterator[tuple[int, object]]:
    """Yield (line, value) for every JSON value; a value that cannot be decoded is a `DataError` in its place.

    What spoils the whole file is raised: it is missing, empty, UTF-16, damaged gzip, or a broken array.
    """
    line = 0
    try:
        with _opened(path) as stream:
            plain_name = str(path).lower().removesuffix(".gz")
            # A .jsonl file is lines whatever it begins with: a list on line 1 is then one bad line.
            array = not plain_name.endswith(".jsonl") and stream.peek(1).lstrip()[:1] == b"["
            for line, value in (_array if array else _lines)(stream, path):
                yield line, value
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(path, line + 1, f"the gzip data is damaged or truncated ({error})") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from None
    if line == 0:
        raise DataError(path, 1, "the file holds no records")


@contextmanager
def _opened(path):
    """A byte stream of the file's text, unzipped, its encoding checked, and past the byte-order mark."""
    with open(path, "rb") as raw:
        zipped = raw.peek(2)[:2] == b"\x1f\x8b"
        if str(path).lower().endswith(".gz") and not zipped:
            raise DataError(path, 1, "the name ends in .gz but the file is not gzip")
        stream = gzip.GzipFile(fileobj=raw) if zipped else raw
        head = stream.peek(4)[:4]
        if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or b"\0" in head:
            raise DataError(path, 1, "not UTF-8: the file looks like UTF-16; save it as UTF-8")
        if head.startswith(codecs.BOM_UTF8):
            stream.read(len(codecs.BOM_UTF8))
        yield stream


def _lines(stream, path) -> Iterator[tuple[int, object]]:
    """One value a line. Only b"\\n" ends a line: other marks that look like one may stand inside a string."""
    decoder, number = StrictDecoder(), 0
    while line := stream.readline(MAX_LINE + 1):
        number += 1
        if len(line) > MAX_LINE and not line.endswith(b"\n"):
            yield number, DataError(path, number, f"line longer than {MAX_LINE // 2**20} MiB")
            while line and not line.endswith(b"\n"):
                line = stream.readline(2**20)
        elif line.strip(b" \t\r\n"):
            try:
                value = decoder.decode(line.removesuffix(b"\n").decode("utf-8"))
                value = decoder.checked(value, path, number)
            except (ValueError, RecursionError) as error:
                decoder.faults.clear()
                torn = "" if line.endswith(b"\n") else "; no newline ends it, so the file looks truncated"
                value = DataError(path, number, _explain(error) + torn)
            yield number, value


def _array(stream, path) -> Iterator[tuple[int, object]]:
    """The elements of one array, walked one by one so that each knows the line on which it starts."""
    data = stream.read()
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(path, data.count(b"\n", 0, error.start) + 1, _explain(error)) from None
    del data
    torn = "" if text.rstrip().endswith("]") else "; no ] ends the array, so the file looks truncated"

    decoder, line, counted = StrictDecoder(), 1, 0
    at = SPACES.match(text, text.index("[") + 1).end()
    more = text[at : at + 1] != "]"
    while more:
        line, counted = line + text.count("\n", counted, at), at
        try:
            value, at = decoder.raw_decode(text, at)
        except (ValueError, RecursionError) as error:
            line = getattr(error, "lineno", line)
            raise DataError(path, line, _explain(error) + torn) from None
        yield line, decoder.checked(value, path, line)
        at = SPACES.match(text, at).end()
        more = text[at : at + 1] == ","
        if more:
            at = SPACES.match(text, at + 1).end()
    closed = text[at : at + 1] == "]"
    stray = SPACES.match(text, at + 1).end() if closed else at
    if not closed or stray < len(text):
        found = show(text[stray : stray + 20]) if stray < len(text) else "the end of the file"
        due = "nothing after the array" if closed else ", or ]"
        line = text.count("\n", 0, stray) + 1
        raise DataError(path, line, f"invalid JSON: expected {due}, found {found}{torn}")


def _explain(error: Exception) -> str:
    """One short reason for what a decoder raised, with the column and without the text around it."""
    if isinstance(error, UnicodeDecodeError):
        column = error.start - error.object.rfind(b"\n", 0, error.start)
        return f"not UTF-8: byte 0x{error.object[error.start]:02x} at column {column}"
    if isinstance(error, json.JSONDecodeError):
        return f"invalid JSON at column {error.colno}: {error.msg}"
    return "the value is nested too deeply"
