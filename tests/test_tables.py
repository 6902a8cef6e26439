"""Parquet and CSV: the records that they hold, and files that are not what their names say."""

import json

import pytest

from dataset import tables
from dataset.jsonl import DataError, read_values
from dataset.records import read_conversations, read_preferences
from errors import InputError

try:
    import pyarrow
    from pyarrow import parquet
except ImportError:
    pyarrow = None
needs_pyarrow = pytest.mark.skipif(pyarrow is None, reason="pyarrow (extra parquet) is not installed")


def message(role: str, content: str) -> dict:
    return {"role": role, "content": content}


def feedback(number: int) -> dict:
    """A row with the columns of UltraFeedback's binarized version."""
    prompt = f"Say {number}"
    sides = {
        name: [message("user", prompt), message("assistant", f"{name} {number}\0\u2028")]
        for name in ("chosen", "rejected")
    }
    return {"prompt": prompt, "prompt_id": "x", **sides, "messages": sides["chosen"],
            "score_chosen": 8.5, "score_rejected": number / 2}  # fmt: skip


def write_parquet(path, rows, **options):
    parquet.write_table(pyarrow.Table.from_pylist(rows), path, **options)
    return path


# ---- What is read


@needs_pyarrow
def test_ultrafeedback_is_read_as_from_json_lines(tmp_path, monkeypatch):
    """Oracle: the same rows as JSON lines. They come in several batches and groups of rows."""
    monkeypatch.setattr(tables, "BATCH", 3)
    rows = [feedback(number) for number in range(10)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = write_parquet(tmp_path / "a.PARQUET", rows, row_group_size=4)
    records = list(read_preferences(path))
    assert records == list(read_preferences(tmp_path / "a.jsonl")) and len(records) == 10
    assert records[3].scores == (8.5, 1.5) and records[3].line == 4 and records[3].format == "ultrafeedback"


@needs_pyarrow
def test_keys_that_other_rows_have_are_not_there(tmp_path):
    """Every struct of a column has the keys of all: null is a missing key. Dates and bytes are left out."""
    chats = [
        {"messages": [message("user", "Hi"), message("assistant", "No") | {"weight": 0},
                      message("user", "Hi"), message("assistant", "Yes")], "day": None, "raw": b"\xff"},
        {"messages": [message("user", "Hi") | {"tool_calls": ["x"]}, message("assistant", "Yo")]},
    ]  # fmt: skip
    good, bad = read_conversations(write_parquet(tmp_path / "a.parquet", chats))
    assert [turn.weight for turn in good.messages] == [1, 0, 1, 1]
    assert isinstance(bad, DataError) and bad.line == 2 and "tool_calls" in bad.reason


def test_csv_has_the_columns_of_the_formats(tmp_path):
    """Quotes, line breaks in a field, a byte-order mark, an index without a name, scores and empty ones."""
    path = tmp_path / "a.csv"
    rows = ',prompt,chosen,rejected,score_chosen,score_rejected\r\n0,"2, or\n3?",你好,"say ""no""",8,1.5\r\n'
    path.write_text(rows + "\r\n1,Hi,Yes,No,,\r\n", encoding="utf-8-sig", newline="")
    first, second = read_preferences(path)
    assert (first.prompt[0].content, first.chosen, first.rejected) == ("2, or\n3?", "你好", 'say "no"')
    assert first.scores == (8, 1.5) and second.scores is None and (first.line, second.line) == (2, 5)


# ---- What is refused


HEAD = b"prompt,chosen,rejected\n"
BAD_CSV = [
    (HEAD + b"a,b,c\na,b\n", 3, "found 2 fields, the header has 3 columns"),
    (HEAD + b"a,b,c,d\n", 2, "found 4 fields, the header has 3 columns"),
    (HEAD + b'a,"b,c\nd,e,f\n', 2, "invalid CSV: .* is a quote not closed"),
    (HEAD + b'a,"b"x,c\n', 2, "invalid CSV"),
    (HEAD + b"a,b\0,c\n", 2, "a NUL byte"),
    ("prompt,chosen,rejected\na,b,c\n".encode("utf-16"), 1, "NUL byte; save it as UTF-8"),
    (HEAD + b"a,b\xff,c\n", 2, "byte 0xff at column 4"),
    (HEAD + b"a," + b"b" * 3000 + b",c\n", 2, "longer than"),
    (HEAD + b'a,"' + b"b\n" * 3000 + b'",c\n', 2, "field larger than"),
    (b"prompt,chosen,chosen\na,b,c\n", 1, "two columns have the name 'chosen'"),
    (b"question,good,bad\na,b,c\n", 2, "found {'question': text"),
    (b"prompt,chosen,rejected,score_chosen\na,b,c,x\n", 2, "score_chosen: expected a number, found 'x'"),
    (b"\n\n", 1, "expected the names of the columns"),
    (HEAD, 1, "no records"),
    (b"", 1, "no records"),
]


@pytest.mark.parametrize("data, line, reason", BAD_CSV, ids=map(str, range(len(BAD_CSV))))
def test_a_csv_that_is_wrong_is_one_clear_line(data, line, reason, tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "MAX_LINE", 2000)
    path = tmp_path / "a.csv"
    path.write_bytes(data)
    with pytest.raises(DataError, match=f"{path}:{line}: .*{reason}"):
        for record in read_preferences(path):
            if isinstance(record, DataError):
                raise record


@needs_pyarrow
def test_a_parquet_that_is_wrong_is_one_clear_line(tmp_path, monkeypatch):
    good = write_parquet(tmp_path / "a.parquet", [feedback(number) for number in range(9)]).read_bytes()
    nested = "deep"
    for _ in range(30):
        nested = [nested]
    twice = pyarrow.table([["a"], ["b"]], names=["prompt", "prompt"])
    utf8 = pyarrow.Array.from_buffers(
        pyarrow.string(), 1, [None, *map(pyarrow.py_buffer, (b"\0\0\0\0\1\0\0\0", b"\xff"))]
    )
    pair = {"prompt": "a", "chosen": "b", "rejected": "c"}
    cases = {
        "not Parquet": [b"", b"PAR1", b"{}\n" * 99, good[:-9], good[:300] + bytes(200) + good[500:]],
        "no column contains text": [pyarrow.table({"a": [nested]}), pyarrow.table({"a": [b"x"]})],
        "two columns have the name 'prompt'": [twice],
        "not UTF-8: byte 0xff": [pyarrow.table({"prompt": utf8})],
        "row longer than": [pyarrow.Table.from_pylist([pair | {"chosen": "x" * 3000}])],
        "found {'good': text": [pyarrow.Table.from_pylist([{"good": "a", "bad": "b"}])],
        "no records": [pyarrow.table({"prompt": pyarrow.array([], pyarrow.string())})],
    }
    monkeypatch.setattr(tables, "MAX_LINE", 2000)
    path = tmp_path / "b.parquet"
    for reason, contents in cases.items():
        for content in contents:
            if isinstance(content, bytes):
                path.write_bytes(content)
            else:
                parquet.write_table(content, path)
            with pytest.raises(DataError, match=rf"{path}:\d+: .*{reason}"):
                for record in read_preferences(path):
                    if isinstance(record, DataError):
                        raise record


@needs_pyarrow
def test_a_changed_byte_of_a_parquet_raises_nothing_else(tmp_path):
    good = write_parquet(tmp_path / "a.parquet", [feedback(number) for number in range(9)]).read_bytes()
    path = tmp_path / "b.parquet"
    for place in range(0, len(good), max(1, len(good) // 150)):
        path.write_bytes(good[:place] + bytes([good[place] ^ 0x55]) + good[place + 1 :])
        try:
            for _, value in read_values(path):
                assert isinstance(value, (dict, DataError))
        except InputError:
            pass


def test_without_pyarrow_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(InputError, match=r"needs pyarrow \(extra parquet\): pip install pyarrow"):
        list(read_preferences(tmp_path / "a.parquet"))
