"""JSON values of a data file, each with its line number.

A ``.jsonl`` file contains one value a line. A ``.json`` file contains one array, or one value a line. Either
may be gzipped. Both are read piece by piece, so a file may be larger than memory. `tables.py` reads Parquet
and CSV.
"""

import codecs
import gzip
import json
import math
import re
import shlex
import unicodedata
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dataset.other_files import require_data_file
from errors import InputError

MAX_LINE = 16 * 2**20  # bytes or characters of a record; the limit bounds memory
BLOCK = 2**16  # characters of an array that are read at a time
MAX_DIGITS = 300  # Longer integers do not fit into a float, and Python refuses the longest.
SPACES = re.compile(r"[ \t\n\r]*")  # JSON's white space, which is less than Python's
LONGEST_QUOTE = 40  # characters of data in an error message


class DataError(InputError):
    """A record, or a whole file, that cannot be used: ``path:line: reason``."""

    def __init__(self, path, line: int, reason: str):
        super().__init__(f"{path}:{line}: {reason}")
        self.path, self.line, self.reason = str(path), line, reason


# ---- Data in messages


def kind(value) -> str:
    """The JSON type of ``value``, in words."""
    names = {type(None): "null", bool: "true or false", str: "text", list: "a list", dict: "an object"}
    return names.get(type(value), "a number")


def show(value, limit: int = LONGEST_QUOTE) -> str:
    """``value`` for an error message: a number, or text quoted, escaped and cut to ``limit``, or its type."""
    if not isinstance(value, str):
        return f"{value:g}" if kind(value) == "a number" else kind(value)
    shown = repr(value[:limit])
    return shown if len(shown) <= limit + 2 and len(value) <= limit else f"{shown[:limit]}..."


def printable(text: str) -> str:
    """``text`` with control characters escaped and tabs as spaces, safe to print in a terminal.

    Escaped: C0 and C1 controls (an ESC moves the cursor or worse), line and paragraph separators, lone
    surrogates, and format characters, some of which change the writing direction. Kept: line feeds, and the
    two joiners that some scripts and emoji need.
    """

    def escape(c: str) -> str:
        if c == "\t":
            return "    "
        harmless = c in "\n\u200c\u200d" or unicodedata.category(c) not in ("Cc", "Cf", "Cs", "Zl", "Zp")
        return c if harmless else c.encode("unicode_escape").decode()

    return "".join(map(escape, text))


# ---- JSON


class StrictDecoder(json.JSONDecoder):
    """Decodes JSON and notes in `faults` what only Python accepts: NaN, 1e400, the last of two equal keys.

    Noted, not raised: the decoder still reaches the end of a bad value, and the array can be read past it.
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
        """``value``, or a `DataError` in its place if the decoder noted a fault."""
        faults, self.faults[:] = self.faults[:], []
        return DataError(path, line, faults[0]) if faults else value


def read_values(path) -> Iterator[tuple[int, object]]:
    """Yield (line, value) for every JSON value; a value that cannot be decoded is a `DataError` in its place.

    Raises `InputError` if the whole file cannot be used: missing, empty, another format, UTF-16, damaged
    gzip, or a broken array.
    """
    require_data_file(path)
    from dataset.tables import READERS  # which imports this module

    line = 0
    try:
        if reader := READERS.get(Path(path).suffix.lower()):
            for line, value in reader(path):
                yield line, value
        else:
            with _opened(path) as stream:
                plain_name = str(path).lower().removesuffix(".gz")
                # A .jsonl file is read by lines whatever its first byte is: a list on line 1 is one bad line.
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
    """A byte stream of the file, unzipped, after the byte-order mark; its first bytes are not UTF-16."""
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
    """One value a line. Only b"\\n" ends a line: other line separators may stand inside a string."""
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
                value = DataError(path, number, _explain(error) + _advice(line, path))
            yield number, value


def _advice(line: bytes, path) -> str:
    """What to do about a line that is not JSON, as the end of its message."""
    if not line.endswith(b"\n"):
        return "; no newline ends it, so the file looks truncated"
    if line.strip() == b"{":
        source, target = shlex.quote(str(path)), shlex.quote(str(Path(path).with_suffix(".one-line.jsonl")))
        command = f"python -m json.tool --compact {source} {target}"
        return f"; a record must stand on one line, and this one goes on; for a file of one record: {command}"
    return "; for a file of one JSON array, a name that ends in .json" if line.strip() == b"[" else ""


class _Text:
    """The text of a stream, read on demand, and the line and column of its next character."""

    def __init__(self, stream, path):
        self.stream, self.path = stream, path
        self.decode = codecs.getincrementaldecoder("utf-8")().decode
        self.text, self.at, self.line, self.column, self.ended = "", 0, 1, 1, False

    def grow(self) -> None:
        """Forget the characters before `at`, and read as many again as are left."""
        self.text, self.at = self.text[self.at :], 0
        data = self.stream.read(max(BLOCK, len(self.text)))
        try:
            self.text += self.decode(data, not data)
        except UnicodeDecodeError as error:
            self.text += error.object[: error.start].decode("utf-8")
            line, column = self.place(len(self.text))
            raise DataError(self.path, line, _not_utf8(error, column)) from None
        self.ended = not data

    def place(self, at: int) -> tuple[int, int]:
        """Line and column of a character, which is not before `self.at`."""
        ends = self.text.count("\n", self.at, at)
        start = self.text.rfind("\n", self.at, at)
        return self.line + ends, at - start if ends else self.column + at - self.at

    def move(self, to: int) -> None:
        (self.line, self.column), self.at = self.place(to), to

    def next(self) -> str:
        """Move to the next character that is not white space, and return it; "" at the end."""
        while True:
            self.move(SPACES.match(self.text, self.at).end())
            if self.at < len(self.text) or self.ended:
                return self.text[self.at : self.at + 1]
            self.grow()

    def value(self, decoder: StrictDecoder):
        """The JSON value that starts here; move behind it. Reads on until the value is whole."""
        while True:
            decoder.faults.clear()
            try:
                value, end = decoder.raw_decode(self.text, self.at)
                following = self.text[end : end + 1]
                # A number before another character may go on; all other values have an end of their own.
                if self.ended or kind(value) != "a number" or (following and following in " \t\n\r,]"):
                    self.move(end)
                    return value
            except RecursionError as error:
                raise DataError(self.path, self.line, _explain(error)) from None
            except json.JSONDecodeError as error:
                if self.ended:
                    line, column = self.place(error.pos)
                    raise DataError(self.path, line, _explain(error, column) + self.torn()) from None
            if len(self.text) - self.at > MAX_LINE:
                raise DataError(self.path, self.line, f"record longer than {MAX_LINE // 2**20} MiB")
            self.grow()

    def torn(self) -> str:
        torn = self.ended and not self.text.rstrip().endswith("]")
        return "; no ] ends the array, so the file looks truncated" * torn


def _array(stream, path) -> Iterator[tuple[int, object]]:
    """The elements of one array, each with the line on which it starts; memory holds one at a time."""
    text, decoder = _Text(stream, path), StrictDecoder()
    text.next()
    text.move(text.at + 1)
    more = text.next() != "]"
    while more:
        line = text.line
        yield line, decoder.checked(text.value(decoder), path, line)
        more = text.next() == ","
        if more:
            text.move(text.at + 1)
            if text.next() == "]":
                raise DataError(path, text.line, "invalid JSON: a comma before ]; remove the comma")
    expected = ", or ]"
    if text.next() == "]":
        text.move(text.at + 1)
        expected = "nothing after the array"
    if expected == ", or ]" or text.next():
        found = show(text.text[text.at : text.at + 20]) if text.next() else "the end of the file"
        raise DataError(path, text.line, f"invalid JSON: expected {expected}, found {found}{text.torn()}")


def _explain(error: Exception, column: int | None = None) -> str:
    """One short reason for a decoder's exception, with the column and without the text around it."""
    if isinstance(error, UnicodeDecodeError):
        return _not_utf8(error, error.start - error.object.rfind(b"\n", 0, error.start))
    if isinstance(error, json.JSONDecodeError):
        return f"invalid JSON at column {column or error.colno}: {_comma(error) or error.msg}"
    return "the value is nested too deeply"


def _not_utf8(error: UnicodeDecodeError, column: int) -> str:
    return f"not UTF-8: byte 0x{error.object[error.start]:02x} at column {column}"


def _comma(error: json.JSONDecodeError) -> str:
    """What to do about a comma too many, or "" for other errors. Versions of Python differ in `pos`."""
    before = error.doc[max(0, error.pos - 100) : error.pos + 1].rstrip("}] \t\r\n")
    after = error.doc[error.pos : error.pos + 100].lstrip(", \t\r\n")
    if error.msg == "Extra data" and not after:
        return "a comma after the record; JSON lines have no commas between them: remove it"
    trailing = before.endswith(",") and after[:1] in ("}", "]") and after
    return f"a comma before {after[0]}; remove the comma" if trailing else ""
