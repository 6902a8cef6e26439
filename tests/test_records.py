"""Records: the meaning of each format, and an error for every bad record."""

import gzip
import itertools
import json
import os
import random
import re
import resource
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from dataset import jsonl
from dataset.records import (
    FEEDBACK_FORMATS,
    PREFERENCE_FORMATS,
    SFT_FORMATS,
    Conversation,
    DataError,
    Message,
    Preference,
    detect_format,
    read_conversations,
    read_preferences,
    read_records,
)
from errors import InputError
from tests.conftest import ROOT, run_python, shared


def user(content: str) -> Message:
    return Message("user", content)


def assistant(content: str) -> Message:
    return Message("assistant", content)


def role(name: str, content: str = "x") -> dict:
    return {"role": name, "content": content}


def dumps(record) -> bytes:
    return json.dumps(record, ensure_ascii=False).encode()


def errors(records) -> list[DataError]:
    return [record for record in records if isinstance(record, DataError)]


@pytest.fixture
def write(tmp_path):
    def write(data: bytes, name: str = "data.jsonl") -> Path:
        path = tmp_path / name
        path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
        return path

    return write


# ---- Bytes and JSON: one bad record (or file), its line and its reason

GOOD = b'{"prompt": "2 + 2?", "chosen": "4", "rejected": "5"}\n'


def text(**changes) -> bytes:
    """A good first line, and a second that is good but for ``changes``; None takes a key away."""
    record = {"prompt": "2 + 2?", "chosen": "4", "rejected": "5", **changes}
    return GOOD + dumps({key: value for key, value in record.items() if value is not ...}) + b"\n"


def chat(chosen, rejected=None, prompt=...) -> bytes:
    """A good record of messages, and a second with these."""
    good = {"chosen": [role("user"), role("assistant")], "rejected": [role("user"), role("assistant", "y")]}
    record = {"prompt": prompt, "chosen": chosen, "rejected": chosen if rejected is None else rejected}
    if prompt is ...:
        del record["prompt"]
    else:
        good["prompt"] = [role("user")]
    return dumps(good) + b"\n" + dumps(record) + b"\n"


TAG = "\n\nAssistant: "
HH = "\n\nHuman: q" + TAG

BAD = {
    # Encodings
    "bad UTF-8": (GOOD + b'{"prompt": "\xff"}\n', r"not UTF-8: byte 0xff at column 13", 2),
    "half a character": (GOOD + "{\"prompt\": \"你".encode()[:-1], r"not UTF-8.*looks truncated", 2),
    "byte-order mark inside": (GOOD + b"\xef\xbb\xbf" + GOOD, r"invalid JSON at column 1", 2),
    "UTF-16 with a mark": (GOOD.decode().encode("utf-16"), r"not UTF-8.*UTF-16", 1),
    "UTF-16 without a mark": (GOOD.decode().encode("utf-16-le"), r"not UTF-8.*UTF-16", 1),
    # JSON's grammar
    "no JSON": (GOOD + b"hello\n", r"invalid JSON at column 1", 2),
    "blank lines count": (b"\n \r\n" + GOOD + b"\nhello\n", r"invalid JSON", 5),
    "CRLF counts once": (GOOD.replace(b"\n", b"\r\n") + b"{]\r\n", r"invalid JSON at column 2", 2),
    "lone CR ends no line": (GOOD.replace(b", ", b",\r") + b"x\n", r"invalid JSON", 2),
    "form feed ends no line": (GOOD + b"\x0c" + GOOD, r"invalid JSON", 2),
    "raw control character": (GOOD + b'{"prompt": "a\x0bb"}\n', r"Invalid control character", 2),
    "two objects on a line": (GOOD + GOOD.strip() * 2 + b"\n", r"Extra data", 2),
    "truncated": (GOOD + GOOD[:30], r"invalid JSON.*looks truncated", 2),
    "broken but not the last": (GOOD[:30] + b"\n" + GOOD, r"column 31: (?!.*truncated)", 1),
    "NaN": (GOOD + b'{"a": NaN}\n', r"NaN is not JSON", 2),
    "1e400": (GOOD + b'{"a": 1e400}\n', r"number '1e400' is out of range", 2),
    "5000 digits": (GOOD + b'{"a": ' + b"7" * 5000 + b"}\n", r"number '7{39}\.\.\. is out of range", 2),
    "duplicate key": (GOOD + b'{"prompt": "a", "prompt": "b"}\n', r"duplicate key 'prompt'", 2),
    "nested duplicate key": (GOOD + b'{"m": [{"x": 1, "x": 1}]}\n', r"duplicate key 'x'", 2),
    "deep nesting": (GOOD + b"[" * 200_000 + b"\n", r"nested too deeply", 2),
    "lone surrogate": (
        GOOD + GOOD.replace(b"4", rb"4\ud800"), r"chosen: lone surrogate '\\ud800' at character 1", 2,
    ),
    "no object": (GOOD + b"[1]\n", r"expected an object, found a list", 2),
    "a string": (b'"prompt"\n' + GOOD, r"expected an object, found text", 1),
    "empty": (b"", r"holds no records", 1),
    "blank": (b"\n \n", r"holds no records", 1),
    # Types and keys
    "missing key": (text(rejected=...), r"missing key 'rejected'", 2),
    "missing prompt": (text(prompt=...), r"format text-implicit, the first has text", 2),
    "null prompt": (text(prompt=None), r"prompt: expected text, found null", 2),
    "number": (text(chosen=4), r"chosen: expected text, found a number", 2),
    "boolean": (text(rejected=True), r"rejected: expected text, found true or false", 2),
    "list of strings": (text(chosen=["4"], rejected=["5"]), r"format ultrafeedback, the first has text", 2),
    "list for a string": (text(chosen=["4"]), r"chosen\[0\]: expected a message, found text", 2),
    "list for the prompt": (text(prompt=["a"]), r"this record has format chat, the first has text", 2),
    "empty response": (text(chosen=""), r"chosen: turn 1 \(assistant\) is empty", 2),
    "blank response": (text(rejected=" \n\u3000"), r"rejected: turn 1 \(assistant\) is empty", 2),
    "blank prompt": (text(prompt=" "), r"prompt: turn 0 \(user\) is empty", 2),
    "system is no text": (text(system=3), r"system: expected text, found a number", 2),
    "win probability": (text(win_probability=1.5), r"expected a number from 0 to 1, found 1\.5", 2),
    "text probability": (text(win_probability="0.9"), r"expected a number from 0 to 1, found '0\.9'", 2),
    "text score": (text(score_chosen=9, score_rejected="7"), r"score_rejected: .* found text", 2),
    "true score": (text(score_chosen=True, score_rejected=7), r"score_chosen: .* found true or false", 2),
    "one score": (text(score_chosen=9), r"score_rejected: .* found null; a pair has both scores or none", 2),
    "one score of metadata": (text(metadata={"score_rejected": 9}), r"score_chosen: .* found null", 2),
    "tools": (text(tools=[{"name": "search"}]), r"the record: 'tools' is not supported", 2),
    "images": (text(images=["cat.png"]), r"the record: 'images' is not supported", 2),
    "unpaired": (GOOD + b'{"prompt": "a", "completion": "", "label": 1}\n', r"missing key 'chosen'", 2),
    "transcript as prompt": (text(prompt="Human: a\n\nAssistant:"), r"prompt: a Human/Assistant tra", 2),
    # Turns
    "no messages": (chat([]), r"chosen: expected messages, found an empty list", 2),
    "no message": (chat([None]), r"chosen\[0\]: expected a message, found null", 2),
    "no role": (chat([{"content": "x"}]), r"chosen\[0\]: missing key 'role'", 2),
    "no content": (chat([role("user"), {"role": "assistant"}]), r"chosen\[1\]: missing key 'content'", 2),
    "null content": (chat([role("user", None)]), r"chosen\[0\]: expected text, found null", 2),
    "unknown role": (chat([role("user"), role("bot")]), r"chosen\[1\]: unknown role 'bot'; accepted: sys", 2),
    "odd role": (chat([role({"a": 1})]), r"chosen\[0\]: unknown role an object", 2),
    "tool role": (chat([role("user"), role("tool")]), r"chosen\[1\]: unknown role 'tool'.*no tools", 2),
    "tool call": (
        chat([role("user"), {"role": "assistant", "content": None, "tool_calls": [{}]}]),
        r"chosen\[1\]: 'tool_calls' is not supported", 2,
    ),
    "an image part": (
        chat([role("user", [{"type": "image_url", "image_url": "x"}]), role("assistant")]),
        r"chosen\[0\], part 0: expected type 'text', found 'image_url'", 2,
    ),
    "two users": (
        chat([role("user"), role("user"), role("assistant")]), r"turn 1 is user, expected assistant", 2,
    ),
    "two assistants": (
        chat([role("user"), role("assistant"), role("assistant")]), r"turn 2 is assistant, expected user", 2,
    ),
    "assistant first": (chat([role("assistant")]), r"chosen: turn 0 is assistant, expected user", 2),
    "late system": (
        chat([role("user"), role("system"), role("assistant")]), r"turn 1 is system, expected assistant", 2,
    ),
    "no answer": (chat([role("user")]), r"chosen: the last turn \(0\) is user, expected assistant", 2),
    "only a system": (chat([role("system")]), r"chosen: the last turn \(0\) is system", 2),
    "different prompts": (
        chat([role("user"), role("assistant")], [role("user", "y"), role("assistant")]),
        r"chosen and rejected have different prompts: they differ from turn 0 on", 2,
    ),
    "one prompt is longer": (
        chat([role("user"), role("assistant")], [role("user"), role("assistant")] * 2),
        r"different prompts: they differ from turn 1 on", 2,
    ),
    "prompt ends in an answer": (
        chat("a", "b", [role("user"), role("assistant")]), r"prompt: the last turn \(1\) is assistant", 2,
    ),
    "two last answers": (
        b"".join(dumps({"chosen": HH + end, "rejected": HH + "c"}) + b"\n" for end in ("b", "a" + TAG + "b")),
        r"different prompts: they differ from turn 1 on", 2,
    ),
    "another question inside": (
        chat([role("user", "z"), role("assistant")], "b", [role("user")]), r"chosen: its first turns", 2,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_what_is_wrong_is_named_with_its_line(write, name):
    data, reason, line = BAD[name]
    path = write(data)
    try:
        found = errors(read_preferences(path))
    except DataError as error:
        found = [error]
    assert len(found) == 1
    assert str(found[0]) == f"{path}:{line}: {found[0].reason}"
    assert found[0].line == line and found[0].path == str(path)
    found[0].reason.encode()  # It can be printed.
    assert re.search(reason, found[0].reason), found[0].reason


def test_an_error_does_not_end_the_reading(write):
    records = list(read_preferences(write(b"{\n" + GOOD + b'{"prompt": 1e999}\n' + GOOD)))
    assert [type(record) for record in records] == [DataError, Preference, DataError, Preference]
    assert [record.line for record in records] == [1, 2, 3, 4]


@pytest.mark.parametrize("mark", ["\u2028", "\u2029", "\x85", "\\u000b", "\\u001c", "\\u0000", "\\u001b[31m"])
def test_what_only_looks_like_a_line_end_is_text(write, mark):
    line = f'{{"prompt": "a{mark}b", "chosen": "c", "rejected": "d"}}\n'.encode()
    first, second = read_preferences(write(line * 2))
    assert first.prompt == (user(json.loads(f'"a{mark}b"')),) and second.line == 2


@pytest.mark.parametrize("change", [
    lambda data: b"\xef\xbb\xbf" + data,
    lambda data: data.replace(b"\n", b"\r\n"),
    lambda data: data[:-1],
], ids=["byte-order mark", "CRLF", "no newline at the end"])  # fmt: skip
def test_harmless_differences_change_nothing(write, change):
    plain = list(read_preferences(write(GOOD * 2, "plain.jsonl")))
    assert list(read_preferences(write(change(GOOD * 2)))) == plain and len(plain) == 2


def test_messages_show_little_of_a_record(write):
    secret = "\x1b[31m" + "s3cret " * 100
    records = [text(prompt=[role(secret)]), chat([role(secret)]), chat([role("user", [{"type": secret}])])]
    for data in records:
        (error,) = errors(read_preferences(write(data)))
        assert error.reason.count("s3cret") <= 6 and "\x1b" not in error.reason and len(error.reason) < 150


# ---- Files: .jsonl, .json, .gz


ROWS = [{"prompt": f"{i}?", "chosen": "yes", "rejected": "no"} for i in range(3)]
EXPECTED = [((user(f"{i}?"),), "yes", "no") for i in range(3)]


@pytest.mark.parametrize("name, data, lines", [
    ("a.jsonl", b"\n".join(map(dumps, ROWS)), [1, 2, 3]),
    ("a.jsonl.gz", b"\n".join(map(dumps, ROWS)), [1, 2, 3]),
    ("a.json", json.dumps(ROWS, indent=2).encode(), [2, 7, 12]),
    ("a.json", b"\n\n " + json.dumps(ROWS).encode() + b"\n", [3, 3, 3]),
    ("a.json.gz", b"\xef\xbb\xbf" + json.dumps(ROWS, indent=0).encode(), [2, 7, 12]),
    ("a.json", b"\n".join(map(dumps, ROWS)), [1, 2, 3]),
    ("gzip_without_a_suffix", gzip.compress(json.dumps(ROWS).encode()), [1, 1, 1]),
], ids=["jsonl", "jsonl.gz", "json", "one line", "json.gz", "lines in json", "no suffix"])  # fmt: skip
def test_every_kind_of_file_reads_the_same(write, name, data, lines):
    records = list(read_preferences(write(data, name)))
    assert [(record.prompt, record.chosen, record.rejected) for record in records] == EXPECTED
    assert [record.line for record in records] == lines


def test_a_bad_element_does_not_end_an_array(write):
    """Duplicate keys and NaN are Python's to accept, so the array can be read past them."""
    data = b'[\n{"prompt": NaN},\n' + GOOD + b',{"a": 1, "a": 2}\n,\n3, ' + GOOD + b"]"
    records = list(read_preferences(write(data, "a.json")))
    assert [(type(record), record.line) for record in records] == [
        (DataError, 2), (Preference, 3), (DataError, 4), (DataError, 6), (Preference, 6)]  # fmt: skip


@pytest.mark.parametrize("block", [1, jsonl.BLOCK])
@pytest.mark.parametrize("data, reason, line", [
    (b"[\n" + GOOD, r"found the end of the file; no \] ends the array, so the file looks truncated", 3),
    (b"[\n" + GOOD + b",\n" + GOOD[:20], r"invalid JSON.*looks truncated", 4),
    (b"[\n" + GOOD + b",\n]", r"invalid JSON", 4),
    (b"[\n" + GOOD + GOOD + b"]", r"expected , or \], found '\{\"prompt\"", 3),
    (b"[\n" + GOOD + b"]\n[]", r"expected nothing after the array, found '\[\]'", 4),
    (b'[\n"' + b"\xff]", r"not UTF-8: byte 0xff at column 2", 2),
    (b'[\n"\xe4\xbd\xa0", "' + b"\xff]", r"not UTF-8: byte 0xff at column 7", 2),
    (b"[" + GOOD.strip() + b', {"a": 1,}]', r"at column 64: a comma before }; remove the comma", 1),
    (b"[\n" + GOOD + b",\n]", r"invalid JSON: a comma before \]; remove the comma", 4),
    (b"[\n[1, 2,], " + GOOD + b"]", r"a comma before \]; remove the comma", 2),
    (b"[\n1, truth]", r"invalid JSON at column 4", 2),
    (b"[" * 200_000 + b"]", r"nested too deeply", 1),
    (b"[ ]", r"holds no records", 1),
])  # fmt: skip
def test_a_broken_array_is_raised(write, monkeypatch, data, reason, line, block):
    monkeypatch.setattr(jsonl, "BLOCK", block)
    path = write(data, "a.json")
    with pytest.raises(DataError, match=reason) as caught:
        list(read_preferences(path))
    assert caught.value.line == line


@pytest.mark.parametrize("block", range(1, 12))
def test_an_array_is_read_in_blocks_of_any_size(write, monkeypatch, block):
    """A number, an escape or a character may be cut by the end of a block; json.loads is the oracle."""
    monkeypatch.setattr(jsonl, "BLOCK", block)
    data = '[12, -1.5e+2,\n3.0E1 ,true, null,"é你\\u0041\\n😀",\n\n[0,[]], {"a": {"b": -0}}, 7]'
    values = list(jsonl.read_values(write(data.encode(), "a.json")))
    assert [value for _, value in values] == json.loads(data)
    assert [line for line, _ in values] == [1, 1, 2, 2, 2, 2, 4, 4, 4]


ARRAY = """
from dataset.records import read_preferences
before = peak()
print(sum(1 for _ in read_preferences(sys.argv[1])), peak() - before)
"""


def test_a_zipped_array_is_read_in_bounded_memory(tmp_path):
    """A file of 0.3 MB took 620 MiB, because an array was unzipped and decoded whole."""
    path, rows = tmp_path / "array.json.gz", 20_000
    row = dumps({"prompt": "x" * 2000, "chosen": "a", "rejected": "b"})
    with gzip.open(path, "wb") as file:
        file.write(b"[" + b",\n".join([row] * rows) + b"]")
    assert path.stat().st_size < 300_000
    count, grown = map(int, run_python(ARRAY, path).split())
    assert count == rows and grown < 10, f"{grown} MiB"


def test_a_huge_element_of_an_array_is_refused(write, monkeypatch):
    monkeypatch.setattr(jsonl, "MAX_LINE", 100_000)
    data = b"[\n" + GOOD + b', {"prompt": "' + b"x" * 200_000 + b'"}]'
    with pytest.raises(DataError, match="record longer than") as caught:
        list(read_preferences(write(data, "a.json")))
    assert caught.value.line == 3


# ---- Files of other formats


def test_a_folder_names_a_file_in_it(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_bytes(GOOD)
    with pytest.raises(InputError, match=f"is a folder; name one data file, such as {tmp_path}/data/train"):
        list(read_preferences(tmp_path))


def test_a_name_of_the_hub_gets_the_download_command(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command = "hf download HuggingFaceH4/ultra --repo-type dataset --local-dir ultra; its files are then in"
    with pytest.raises(InputError, match=command):
        list(read_preferences("HuggingFaceH4/ultra"))
    (tmp_path / "runs").mkdir()
    for path in ("runs/pairs", "owner/pairs.jsonl", "/owner/name", "name"):
        with pytest.raises(InputError, match=r"cannot be read: no such file$"):
            list(read_preferences(path))


PRETTY = json.dumps({"prompt": "a", "chosen": "b", "rejected": "c"}, indent=2).encode()


def test_a_pretty_printed_object_gets_a_command(write, tmp_path):
    """Its first line is only a brace. The command makes it one line."""
    path = write(PRETTY, "one.json")
    error = next(read_preferences(path))
    assert error.line == 1 and "a record must stand on one line" in error.reason
    command = error.reason.split("one record: ")[1].replace("python", shlex.quote(sys.executable), 1)
    subprocess.run(command, shell=True, check=True, timeout=60)
    (record,) = read_preferences(tmp_path / "one.one-line.jsonl")
    assert (record.prompt, record.chosen, record.rejected) == ((user("a"),), "b", "c")


@pytest.mark.parametrize("line, reason", [
    (b'{"prompt": "a",}\n', "a comma before }; remove the comma"),
    (b'{"prompt": ["a", ]}\n', "a comma before ]; remove the comma"),
    (GOOD.strip() + b",\n", "a comma after the record; JSON lines have no commas between them: remove it"),
    (b"[\n", "for a file of one JSON array, a name that ends in .json"),
    (b'{"prompt": "a" "b"}\n', "Expecting ',' delimiter"),
    (b'{"prompt": "}",, "b": 1}\n', "Expecting property name"),
])  # fmt: skip
def test_a_comma_too_many_is_named(write, line, reason):
    _, error = read_preferences(write(GOOD + line))
    assert error.line == 2 and reason in error.reason


def test_files_that_cannot_be_read(write, tmp_path):
    for path, reason in [
        (tmp_path / "none.jsonl", "cannot be read"),
        (tmp_path, "cannot be read: it is a folder"),
        (tmp_path / ("x" * 300), "cannot be read"),
        (write(b"", "empty.jsonl.gz"), "holds no records"),
    ]:
        with pytest.raises(InputError, match=reason):
            list(read_preferences(path))
    whole = gzip.compress(GOOD * 1000)
    for data, reason in [
        (GOOD, "not gzip"),
        (whole[: len(whole) // 2], "damaged or truncated"),
        (whole[:-6] + b"abcdef", "damaged or truncated"),
        (whole[:60] + bytes([whole[60] ^ 255]) + whole[61:], "damaged or truncated"),
        (whole[:5], "damaged or truncated"),
        (whole + b"rubbish", "damaged or truncated"),
    ]:
        path = tmp_path / "raw.jsonl.gz"
        path.write_bytes(data)
        with pytest.raises(DataError, match=reason):
            list(read_preferences(path))


def test_a_huge_line_is_refused_in_bounded_memory(tmp_path):
    """A 200 MB line without an end must not become a 200 MB string."""
    path = tmp_path / "huge.jsonl"
    with open(path, "wb") as file:
        file.write(GOOD + b"{")
        file.seek(200 * 2**20, os.SEEK_CUR)  # A hole: zeros that take no room on the disk.
        file.write(b"}\n" + GOOD)
    code = (
        "from dataset.records import *\nbefore = peak()\n"
        "for r in read_preferences(sys.argv[1]): print(r.line, getattr(r, 'reason', 'fine'))\n"
        "print(peak() - before)"
    )
    lines = run_python(code, path).split("\n")
    assert lines[:3] == ["1 fine", "2 line longer than 16 MiB", "3 fine"]
    assert int(lines[3]) < 80, "MiB"


def test_a_line_of_just_the_cap_is_read(write, monkeypatch):
    monkeypatch.setattr(jsonl, "MAX_LINE", len(GOOD) - 1)
    assert not errors(read_preferences(write(GOOD * 2 + GOOD.strip())))
    records = list(read_preferences(write(GOOD + b" " + GOOD + GOOD)))
    assert [type(record) for record in records] == [Preference, DataError, Preference]
    assert [record.line for record in records] == [1, 2, 3]


def test_reading_streams(write, tmp_path):
    """The first records come before the rest is read: the file behind a pipe never ends, yet they arrive."""
    path = tmp_path / "pipe.jsonl"
    os.mkfifo(path)
    script = "import sys\nwith open(sys.argv[1], 'w') as pipe:\n  while True: pipe.write(sys.argv[2])"
    process = [sys.executable, "-c", script, str(path), GOOD.decode()]
    writer = subprocess.Popen(process, stderr=subprocess.DEVNULL)
    try:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        records = read_preferences(path)
        assert sum(1 for _ in itertools.islice(records, 100_000)) == 100_000
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 4 * 1024, "KiB, of 5 MB read"
        records.close()
    finally:
        writer.kill()
        writer.wait()


# ---- Shapes of preferences, each with what it must become

U, A, B = role("user", "Hi!"), role("assistant", "yes"), role("assistant", " no\n")
PROMPT = (user("Hi!"),)
S, SYSTEM = role("system", "Be brief."), Message("system", "Be brief.")
BLANK = role("system", " ")
YES_NO = {"chosen": "yes", "rejected": " no\n"}
LONG = (user("Hi!"), assistant("Hello."), user("And?\n"))
HISTORY = [U, role("assistant", "Hello."), role("user", "And?\n")]


def sharegpt(name: str, value: str) -> dict:
    return {"from": name, "value": value}


def part(value: str, key: str) -> dict:
    return {"type": "text", key: value}


def shaped(shape, record, prompt, chosen="yes", rejected=" no\n"):
    return pytest.param(shape, record, (tuple(prompt), chosen, rejected), id=f"{shape}-{len(str(record))}")


@pytest.mark.parametrize("shape, record, expected", [
    shaped("text", {"prompt": "Hi!", **YES_NO}, PROMPT),
    shaped("text", {"prompt": " Hi! ", **YES_NO, "system": "Be brief."}, [SYSTEM, user(" Hi! ")]),
    shaped("text", {"prompt": "Hi!", **YES_NO, "system": ""}, PROMPT),
    shaped("text", {"prompt": "</s>", "chosen": "{{x}}", "rejected": "\0"}, [user("</s>")], "{{x}}", "\0"),
    # A response may begin with the words of the prompt; only messages can repeat it.
    shaped("text", {"prompt": "Hi!", "chosen": "Hi! yes", "rejected": " no\n"}, PROMPT, "Hi! yes"),
    shaped("question", {"system": "Be brief.", "question": "Hi!", **YES_NO}, [SYSTEM, *PROMPT]),
    shaped("ultrafeedback", {"prompt": "Hi!", "chosen": [U, A], "rejected": [U, B]}, PROMPT),
    shaped("ultrafeedback", {"prompt": "Hi!\n", "chosen": [U, A], "rejected": [U, B]}, PROMPT),
    shaped("ultrafeedback", {"prompt": "Hi!", "chosen": [S, U, A], "rejected": [S, U, B]}, [SYSTEM, *PROMPT]),
    shaped("ultrafeedback", {"prompt": "Hi!", "chosen": [*HISTORY, A], "rejected": [*HISTORY, B]}, LONG),
    shaped("ultrafeedback", {"prompt": "Hi!", "chosen": [U, A], "rejected": [U, B], "messages": []}, PROMPT),
    shaped("ultrafeedback", {"prompt": "Hi!", "chosen": [A], "rejected": B}, PROMPT),
    shaped("chat", {"prompt": [S, *HISTORY], **YES_NO}, [SYSTEM, *LONG]),
    shaped("chat", {"prompt": [U], "chosen": A, "rejected": B}, PROMPT),
    shaped("chat", {"prompt": [U], "chosen": [A], "rejected": [B]}, PROMPT),
    shaped("chat", {"prompt": HISTORY, "chosen": [*HISTORY, A], "rejected": [*HISTORY, B]}, LONG),
    # A side of several turns: all but the last belong to the prompt, if they are shared.
    shaped("chat", {"prompt": [U], "chosen": [*HISTORY[1:], A], "rejected": [*HISTORY[1:], B]}, LONG),
    shaped("chat-implicit", {"chosen": [U, A], "rejected": [U, B]}, PROMPT),
    shaped("chat-implicit", {"chosen": [S, *HISTORY, A], "rejected": [S, *HISTORY, B]}, [SYSTEM, *LONG]),
    shaped("chat-implicit", {"chosen": [BLANK, U, A], "rejected": [BLANK, U, B]}, PROMPT),
    shaped("chosen_messages", {"chosen_messages": [*HISTORY, A], "rejected_messages": [*HISTORY, B]}, LONG),
    shaped("chosen_messages", {
        "chosen_messages": [role("user", [part("Hi", "value"), part("!", "text")]), A],
        "rejected_messages": [role("user", [part("Hi!", "text")]), B],
    }, PROMPT),
    shaped("sharegpt", {
        "conversations": [sharegpt("human", "Hi!"), sharegpt("gpt", "Hello."), sharegpt("human", "And?\n")],
        "chosen": sharegpt("gpt", "yes"), "rejected": sharegpt("gpt", " no\n"), "system": "Be brief.",
    }, [SYSTEM, *LONG]),
    shaped("sharegpt", {
        "conversations": [sharegpt("system", "Be brief."), sharegpt("user", "Hi!")],
        "chosen": sharegpt("assistant", "yes"), "rejected": sharegpt("gpt", " no\n"),
    }, [SYSTEM, *PROMPT]),
    shaped("alpaca", {"instruction": "Hi!", "input": "", "output": "?", **YES_NO}, PROMPT),
    shaped("alpaca", {"instruction": "Add:", "input": "1 + 1", **YES_NO}, [user("Add:\n1 + 1")]),
    shaped("alpaca", {
        "instruction": "And?\n", "input": None, **YES_NO,
        "history": [["Hi!", "Hello."]], "system": "Be brief.",
    }, [SYSTEM, *LONG]),
    shaped("ranked", {"instruction": "Hi!", "input": "", "output": ["yes", "well", " no\n"]}, PROMPT),
    shaped("ranked", {
        "instruction": "And?\n", "input": "", "output": ["yes", " no\n"], "history": [["Hi!", "Hello."]],
    }, LONG),
    shaped("output_1", {"input": "Hi!", "output_1": "yes", "output_2": " no\n", "label": 1}, PROMPT),
    shaped("output_1", {
        "instruction": "Add:", "input": "1 + 1", "output_1": " no\n", "output_2": "yes", "label": "2",
    }, [user("Add:\n1 + 1")]),
    shaped("output_1", {"prompt": HISTORY, "output_1": [B], "output_2": A, "label": 2.0}, LONG),
    shaped("response_a", {
        "prompt": "Hi!", "response_a": "yes", "response_b": " no\n", "winner": "model_a", "model_a": "x",
    }, PROMPT),
    shaped("response_a", {
        "question": "Hi!", "response_a": " no\n", "response_b": "yes", "winner": "B", "system": "Be brief.",
    }, [SYSTEM, *PROMPT]),
    shaped("hh", {
        "chosen": "\n\nHuman: Hi!\n\nAssistant: yes",
        "rejected": "\n\nHuman: Hi!\n\nAssistant:  no\n",
    }, PROMPT),
    shaped("hh", {
        "chosen": "Human: Hi!\n\nAssistant:yes",
        "rejected": "\nHuman: Hi!\n\nAssistant:  no\n",
    }, PROMPT),
    shaped("hh", {
        "chosen": "\n\nHuman: Hi!\n\nAssistant: Hello.\n\nHuman: And?\n\n\nAssistant: yes",
        "rejected": "\n\nHuman: Hi!\n\nAssistant: Hello.\n\nHuman: And?\n\n\nAssistant:  no\n",
    }, LONG),
    # A tag inside a line is text, and so is one that repeats the role.
    shaped("hh", {
        "chosen": "\n\nHuman: Hi! Human: you?\nAssistant: me\n\nHuman: ah\n\nAssistant: Human: yes",
        "rejected": "\n\nHuman: Hi! Human: you?\nAssistant: me\n\nHuman: ah\n\nAssistant:  no\n",
    }, [user("Hi! Human: you?\nAssistant: me\n\nHuman: ah")], "Human: yes"),
    shaped("text-implicit", {"chosen": "So it is", "rejected": "So it was"}, [user("So it")], "is", "was"),
])  # fmt: skip
@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.jsonl.gz", "a.json.gz"])
def test_every_shape_of_preferences(write, shape, record, expected, name):
    data = dumps([record]) if ".json" in name and ".jsonl" not in name else dumps(record) + b"\n"
    path = write(data, name)
    assert detect_format(record) == shape
    for name in ("auto", shape):
        (found,) = read_preferences(path, name)
        assert found == Preference(*expected, 1) and found.format == shape


def test_scores_and_win_probability(write):
    extras = [
        ({"score_chosen": 9, "score_rejected": 7.5}, (9.0, 7.5), None),
        ({"metadata": {"score_chosen": 1.0, "score_rejected": 1.0}}, (1.0, 1.0), None),
        ({"score_chosen": 9, "score_rejected": 0, "metadata": {"score_chosen": "?"}}, (9.0, 0.0), None),
        ({"score_chosen": None, "score_rejected": None, "metadata": None}, None, None),
        ({"win_probability": 0.25}, None, 0.25),
        ({"win_probability": 1}, None, 1.0),
        ({"win_probability": None}, None, None),
    ]
    path = write(b"".join(dumps({**ROWS[0], **extra}) + b"\n" for extra, *_ in extras))
    assert [(r.scores, r.win_probability) for r in read_preferences(path)] == [(s, p) for _, s, p in extras]


def test_votes_are_a_win_probability_of_the_side_that_wins(write):
    """The share of the chosen side, whichever of the two it was; a tie is half a vote for each."""
    votes = [
        (["a", "a", "b"], "yes", 2 / 3, False), (["b", "a", "b", "b"], "no", 3 / 4, False),
        (["model_a"], "yes", 1.0, False), (["tie", "b"], "no", 3 / 4, False),
        (["a", "b"], "yes", 0.5, True), (["tie", "tie"], "yes", 0.5, True),
        ("tie", "yes", None, True), ("Tie (bothbad)", "yes", None, True), ("model_b", "no", None, False),
    ]  # fmt: skip
    row = {"prompt": "Hi!", "response_a": "yes", "response_b": "no"}
    found = list(read_preferences(write(b"\n".join(dumps({**row, "winner": vote}) for vote, *_ in votes))))
    for record, (_, *expected) in zip(found, votes, strict=True):
        assert [record.chosen, record.win_probability, record.tie] == expected
        assert {record.chosen, record.rejected} == {"yes", "no"}
    row = {"input": "Hi!", "output_1": "yes", "output_2": "no"}
    labels = [2, 1, 2, 2], "tie"
    first, second = read_preferences(write(b"\n".join(dumps({**row, "label": label}) for label in labels)))
    assert (first.chosen, first.win_probability, first.tie) == ("no", 3 / 4, False) and second.tie


@pytest.mark.parametrize("change, reason", [
    ({"label": 0}, "label: expected 1, 2, 'model_a', 'model_b', 'tie' or a list of such votes, found 0"),
    ({"label": 1.5}, "label: expected 1, 2, .* found 1.5"),
    ({"label": True}, "label: expected 1, 2, .* found true or false"),
    ({"label": None}, "label: expected 1, 2, .* found null"),
    ({"label": "first"}, "label: expected 1, 2, .* found 'first'"),
    ({"label": []}, "label: expected a verdict, found an empty list"),
    ({"label": [1, [2]]}, "label: expected 1, 2, .* found a list"),
    ({"label": [1, "model_c"]}, "label: expected 1, 2, .* found 'model_c'"),
    ({"label": ...}, "missing key 'label'"),
    ({"input": ...}, "missing key 'prompt'"),
    ({"output_1": ""}, r"rejected: turn 1 \(assistant\) is empty"),
    ({"output_1": 3}, "output_1: expected text, found a number"),
    ({"output_2": ...}, "missing key 'output_2'"),
])  # fmt: skip
def test_a_verdict_that_is_wrong(write, change, reason):
    good = {"input": "Hi!", "output_1": "no", "output_2": "yes", "label": 2}
    bad = {key: value for key, value in (good | change).items() if value is not ...}
    first, error = read_preferences(write(dumps(good) + b"\n" + dumps(bad)))
    assert first.chosen == "yes" and error.line == 2 and re.search(reason, error.reason), error.reason


@pytest.mark.parametrize("chosen, rejected, prompt, sides", [
    ("The sky is blue.", "The sky is black.", "The sky is", ("blue.", "black.")),
    ("The answer is 12.", "The answer is 123.", "The answer is", ("12.", "123.")),
    ("The answer is 12", "The answer is 123", "The answer is", ("12", "123")),
    ("The answer is 12\nYes", "The answer is 12 or so", "The answer is 12", ("Yes", "or so")),
    ("Say it", "Say it loud", "Say", ("it", "it loud")),
    ("Say it ", "Say it loud", "Say", ("it ", "it loud")),
    ("Say it", "Say it", "Say", ("it", "it")),
    ("Q: a \n A: b ", "Q: a \n A: c\n", "Q: a \n A:", ("b ", "c\n")),
    (" a b", " a  c", " a", ("b", "c")),
    ("天空是蓝色的。", "天空是黑色的。", "天空是", ("蓝色的。", "黑色的。")),
    ("答案是12。", "答案是123。", "答案是", ("12。", "123。")),
    ("好的", "好的，再见", "好", ("的", "的，再见")),
    ("これは本です", "これは犬です", "これは", ("本です", "犬です")),
    ("これはか", "これはか\u3099", "これは", ("か", "か\u3099")),
    ("一二か\u3099三", "一二か三", "一二", ("か\u3099三", "か三")),
    ("用葛\U000e0100城", "用葛\U000e0101城", "用", ("葛\U000e0100城", "葛\U000e0101城")),
    ("The cafe", "The cafe\u0301", "The", ("cafe", "cafe\u0301")),
    ("Thumbs 👍🏻", "Thumbs 👍🏿", "Thumbs", ("👍🏻", "👍🏿")),
    ("家👨\u200d👩\u200d👧", "家👨\u200d👩\u200d👦", "家", ("👨\u200d👩\u200d👧", "👨\u200d👩\u200d👦")),
    ("I am 🇨🇳", "I am 🇨🇦", "I am", ("🇨🇳", "🇨🇦")),
])  # fmt: skip
def test_an_implicit_prompt_is_cut_between_words(write, chosen, rejected, prompt, sides):
    for first, second, expected in [(chosen, rejected, sides), (rejected, chosen, sides[::-1])]:
        (found,) = read_preferences(write(dumps({"chosen": first, "rejected": second})))
        assert found == Preference((user(prompt),), *expected, 1)


@pytest.mark.parametrize("chosen, rejected", [
    ("blue", "black"), ("Yes", "No"), ("word", "word"), ("word", "wordy"), (" a", " b"), ("a b", " a c"),
    ("天", "天"),
])  # fmt: skip
def test_no_shared_word_is_no_prompt(write, chosen, rejected):
    (error,) = read_preferences(write(dumps({"chosen": chosen, "rejected": rejected})))
    assert "share no first word" in error.reason and "add a key 'prompt'" in error.reason


def test_a_long_shared_beginning_is_fast(write):
    words = "word " * 200_000
    (found,) = read_preferences(write(dumps({"chosen": words + "a", "rejected": words + "b"})))
    assert found.chosen == "a" and len(found.prompt[0].content) == 999_999
    tags = "\n\nHuman: a" * 100_000 + "\n\nAssistant: "
    (found,) = read_preferences(write(dumps({"chosen": tags + "a", "rejected": tags + "b"})))
    assert found.chosen == "a" and len(found.prompt) == 1


# ---- Shapes of conversations

TURNS = (user("Hi!"), assistant("yes"))
THREE = (SYSTEM, *LONG, assistant("yes"))


@pytest.mark.parametrize("shape, record, expected", [
    ("messages", {"messages": [U, A]}, TURNS),
    ("messages", {"prompt": "Hi!", "messages": [S, *HISTORY, A]}, THREE),
    ("sharegpt", {"conversations": [sharegpt("human", "Hi!"), sharegpt("gpt", "yes")]}, TURNS),
    ("sharegpt", {"conversations": [*HISTORY, A], "system": "Be brief."}, THREE),
    ("alpaca", {"instruction": "Hi!", "input": "", "output": "yes"}, TURNS),
    ("alpaca", {"instruction": "Add:", "input": "1", "output": "2"}, (user("Add:\n1"), assistant("2"))),
    ("alpaca", {
        "instruction": "And?\n", "output": "yes", "history": [["Hi!", "Hello."]], "system": "Be brief.",
    }, THREE),
    ("response", {"prompt": "Hi!", "response": "yes"}, TURNS),
    ("completion", {"prompt": "Hi!", "completion": "yes"}, TURNS),
    ("completion", {"prompt": [S, *HISTORY], "completion": [A]}, THREE),
    ("question", {"question": "Hi!", "answer": "yes"}, TURNS),
])  # fmt: skip
@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.jsonl.gz", "a.json.gz"])
def test_every_shape_of_conversations(write, shape, record, expected, name):
    data = dumps([record]) if ".jsonl" not in name else dumps(record) + b"\n"
    path = write(data, name)
    for name in ("auto", shape):
        (found,) = read_conversations(path, name)
        assert found == Conversation(expected, 1) and found.format == shape


@pytest.mark.parametrize("change, reason", [
    ({"messages": [U]}, r"conversation: the last turn \(0\) is user, expected assistant"),
    ({"messages": [U, role("assistant", "")]}, r"conversation: turn 1 \(assistant\) is empty"),
    ({"messages": []}, r"messages: expected messages, found an empty list"),
    ({"messages": None}, r"messages: expected messages, found null"),
    ({"conversations": [U, A]}, r"this record has format sharegpt, the first has messages"),
    ({"messages": [U, A], "chosen": "a", "rejected": "b", "prompt": "c"}, r"found preferences \(format te"),
    ({"messages": [S, U, A], "system": "x"}, r"conversation: turn 1 is system, expected user"),
    ({}, r"missing key 'messages'"),
])  # fmt: skip
def test_a_conversation_that_is_wrong(write, change, reason):
    path = write(dumps({"messages": [U, A]}) + b"\n" + dumps(change) + b"\n")
    good, error = read_conversations(path)
    assert good == Conversation(TURNS, 1)
    assert error.line == 2 and re.search(reason, error.reason), error.reason


# ---- The tables, and refusals


def test_the_examples_of_the_tables_are_true(write):
    for shapes, read in [(PREFERENCE_FORMATS, read_preferences), (SFT_FORMATS, read_conversations)]:
        for name, shape in shapes.items():
            path = write(dumps(shape.example))
            (record,) = read(path)
            assert record.format == name and [record] == list(read_records(path))
            if shapes is PREFERENCE_FORMATS:
                assert (record.chosen[0], record.rejected[0]) == ("4", "5")
            else:
                assert record.messages[-1].content == "4"


def test_the_page_of_data_formats_lists_each_as_it_is():
    """docs/DATA.md: a format that is read but not listed is never found."""
    page = (ROOT / "docs" / "DATA.md").read_text("utf-8")
    for formats in (PREFERENCE_FORMATS, SFT_FORMATS, FEEDBACK_FORMATS):
        rows = [f"| `{name}`: {f.description} | `{json.dumps(f.example)}` |" for name, f in formats.items()]
        assert "\n".join(rows) in page


REFUSED = [
    (read_preferences, {"prompt": "a", "completion": "b", "label": True}, "found unpaired feedback"),
    (read_preferences, {"messages": [U, A], "label": False}, "found unpaired feedback"),
    (read_conversations, {"prompt": "a", "completion": "b", "label": False}, "found unpaired feedback"),
    (read_preferences, {"text": "a", "label": [1.0]}, "chosen and rejected on alternate lines"),
    (read_conversations, {"text": "a"}, "found plain text"),
    (read_preferences, {"question": "a", "6b": {"is_correct": True, "solution": "b"}}, "found graded sol"),
    (read_preferences, {"messages": [U, A]}, r"found conversations without a rejected side \(format mess"),
    (read_conversations, {"chosen": [U, A], "rejected": [U, B]}, r"found preferences \(format chat-implicit"),
    (read_preferences, {"prompt": "a", "chosen": None}, r"found \{'prompt': text, 'chosen': null\}"),
    # The prompt has an unknown key; cut out of the texts, it would be lost.
    (read_preferences, {"query": "a", "chosen": "The b", "rejected": "The c"}, r"found \{'query': text"),
]


@pytest.mark.parametrize("read, record, reason", REFUSED)
def test_a_shape_that_cannot_be_used_is_refused_at_once(write, read, record, reason):
    with pytest.raises(DataError, match=reason) as caught:
        list(read(write(dumps(record))))
    shapes = PREFERENCE_FORMATS if read is read_preferences else SFT_FORMATS
    assert f"accepted {read.__name__.removeprefix('read_')}: " in caught.value.reason
    assert all(f"{name} ({shape.description})" in caught.value.reason for name, shape in shapes.items())


@pytest.mark.parametrize("record, reason", [
    ({"prompt": "a", "choosen": "b", "rejected": "c"}, "did you mean 'chosen' instead of 'choosen'"),
    ({"prompt": "a", "chosen": "b", "reject": "c"}, "did you mean 'rejected' instead of 'reject'"),
    ({"promts": "a", "chosen": "The b", "rejected": "The c"}, "did you mean 'prompt' instead of 'promts'"),
    ({"chosen_message": [U, A], "rejected_message": [U, B]}, "did you mean 'chosen_messages' instead of"),
])  # fmt: skip
def test_a_misspelt_key_gets_the_right_spelling(write, record, reason):
    """A misspelt prompt, above all, must not make the file one whose prompts are cut out of its texts."""
    path = write(dumps(record) + b"\n")
    for read in (read_preferences, read_records):
        with pytest.raises(DataError, match=reason) as caught:
            list(read(path))
        assert "accepted preferences" in caught.value.reason


@pytest.mark.parametrize("key", ["prompt_id", "question_id", "id", "source", "x" * 10_000])
def test_other_keys_are_not_taken_for_misspelt(write, key):
    record = {"chosen": "So it is", "rejected": "So it was", key: "7"}
    (found,) = read_preferences(write(dumps(record)))
    assert found.format == "text-implicit" and found.prompt == (user("So it"),)


WEIGHTLESS = {**role("assistant", "Hello."), "weight": 0}


def test_a_weight_of_a_message_is_read(write):
    """As in OpenAI's files: 0 leaves an assistant turn out of the loss, 1 and null change nothing."""
    turns = [U, WEIGHTLESS, role("user", "And?\n"), {**A, "weight": 1}]
    path = write(dumps({"messages": turns}) + b"\n" + dumps({"messages": [U, {**A, "weight": None}]}))
    first, second = read_conversations(path)
    assert [m.weight for m in first.messages] == [1, 0, 1, 1]
    assert [m.weight for m in second.messages] == [1, 1]
    again = write(dumps({"messages": [vars(m) for m in first.messages]}))
    assert [m.weight for m in next(read_conversations(again)).messages] == [1, 0, 1, 1]


@pytest.mark.parametrize("weight, shown", [
    (0.5, "0.5"), (2, "2"), (-1, "-1"), (True, "true or false"), ("0", "'0'"), ([0], "a list"),
])  # fmt: skip
def test_other_weights_are_refused(write, weight, shown):
    data = dumps({"messages": [U, A]}) + b"\n" + dumps({"messages": [U, {**A, "weight": weight}]})
    _, error = read_conversations(write(data))
    assert error.reason == f"messages[1]: weight: expected 0 or 1, found {shown}"


def test_a_record_without_any_weight_is_refused(write):
    """A conversation without a supervised token, or a pair with half of its loss."""
    data = dumps({"messages": [U, A]}) + b"\n" + dumps({"messages": [U, WEIGHTLESS]})
    _, error = read_conversations(write(data))
    assert error.reason.startswith("conversation: every assistant turn has weight 0")
    (error,) = errors(read_preferences(write(chat([U, WEIGHTLESS], [U, A]))))
    assert error.reason == "chosen: the response has weight 0; a pair needs both responses"


def test_a_shape_can_be_forced(write):
    path = write(dumps({"instruction": "Hi!", "output": "yes", "chosen": "yes", "rejected": "no"}))
    with pytest.raises(DataError, match="found preferences"):
        list(read_conversations(path))
    assert list(read_conversations(path, "alpaca")) == [Conversation(TURNS, 1)]
    (error,) = read_preferences(path, "text")
    assert error.reason == "missing key 'prompt'"
    with pytest.raises(InputError, match="unknown format 'alpacca'; accepted preferences: text"):
        list(read_preferences(path, "alpacca"))


def test_one_file_has_one_shape(write):
    """Above all, a transcript after plain texts must not become a prompt with tags in it."""
    texts = {"chosen": "The sky is blue.", "rejected": "The sky is black."}
    transcripts = {side: f"\n\nHuman: The sky\n\nAssistant: {side}" for side in texts}
    turns = {"chosen": [U, A], "rejected": [U, B]}
    for first, second in itertools.permutations([texts, transcripts, turns, ROWS[0]], 2):
        good, error = read_preferences(write(dumps(first) + b"\n" + dumps(second)))
        names = detect_format(second), detect_format(first)
        assert isinstance(good, Preference) and error.line == 2
        assert error.reason.startswith("this record has format {}, the first has {};".format(*names))


# ---- Real files


HH_ROWS = {"empty": [86, 516, 925, 1103], "different prompts": [1254, 1688, 1950, 1952, 2036]}


@pytest.mark.parametrize("read, name, shape, count, bad", [
    (read_preferences, "preferences/hh_rlhf_harmless-base_test.jsonl.gz", "hh", 2312, HH_ROWS),
    (read_preferences, "preferences/ultrafeedback_train_1000.jsonl.gz", "text", 1000, {"empty": [478, 833]}),
    (read_preferences, "preferences/ultrafeedback_eval_200.jsonl.gz", "text", 200, {}),
    (read_preferences, "preferences/rasbt_instruction-data-with-preference.json.gz", "alpaca", 1100, {}),
    (read_preferences, "preferences/oasst_rm_zh.json.gz", "ranked", 775, {}),
    (read_preferences, "formats/llamafactory_v1_dpo_demo.jsonl.gz", "chosen_messages", 10, {}),
    (read_conversations, "sft/rasbt_instruction-data.json.gz", "alpaca", 1100, {}),
    (read_conversations, "sft/gsm8k_train.jsonl.gz", "question", 7473, {}),
    (read_conversations, "sft/ruozhiba_qa2449_gpt4t.json.gz", "alpaca", 2449, {}),
    (read_conversations, "sft/oasst_sft_zh.json.gz", "alpaca", 689, {}),
    (read_conversations, "formats/llamafactory_identity.json.gz", "alpaca", 91, {}),
])  # fmt: skip
def test_real_files_read_whole(read, name, shape, count, bad):
    records = list(read(shared(name)))
    assert len(records) == count
    for reason, rows in bad.items():
        assert [error.line - 1 for error in errors(records) if reason in error.reason] == rows
    good = [record for record in records if not isinstance(record, DataError)]
    assert len(good) == count - sum(map(len, bad.values()))
    assert {record.format for record in good} == {shape}


def test_real_transcripts_lose_no_character():
    """Every Preference of the HH file, written out again, is the transcript that it came from."""
    path = shared("preferences/hh_rlhf_harmless-base_test.jsonl.gz")
    rows = [json.loads(line) for line in gzip.decompress(path.read_bytes()).split(b"\n") if line]
    for record in read_preferences(path):
        if isinstance(record, Preference):
            tags = {"user": "Human", "assistant": "Assistant"}
            prompt = "".join(f"\n\n{tags[turn.role]}: {turn.content}" for turn in record.prompt)
            assert f"{prompt}\n\nAssistant: {record.chosen}" == rows[record.line - 1]["chosen"]
            assert f"{prompt}\n\nAssistant: {record.rejected}" == rows[record.line - 1]["rejected"]


# ---- Fuzz


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.jsonl.gz"])
def test_mutations_end_in_records_or_errors(tmp_path, name):
    """Whatever the bytes, the result is a record or an error that can be printed: nothing else escapes."""
    rng = random.Random(name)
    rows = [ROWS[0], {**ROWS[1], "score_chosen": 1e3, "score_rejected": -2, "win_probability": 0.5},
            {**ROWS[2], "system": "é你\U0001f600", "metadata": {"a": [None, True]}}]  # fmt: skip
    if "gz" not in name:
        rows = [{"prompt": [S, *HISTORY], "chosen": [A], "rejected": B}, {"prompt": [U], **YES_NO}]
    whole = dumps(rows) if ".jsonl" not in name else b"".join(dumps(row) + b"\n" for row in rows)
    whole = gzip.compress(whole) if "gz" in name else whole
    path = tmp_path / name
    outcomes = {Preference: 0, DataError: 0}
    tokens = [b"", b"\n", b"\r", b'"', b"\\", b"{", b"}", b"[", b"]", b",", b"null", b"NaN", b"\xff", b"\0"]
    tokens += [b"1e999", b"\\ud800", b"\xef\xbb\xbf", b"9" * 400, b"[" * 3000, b'"role": "tool"', b"[],"]
    for _ in range(700):
        data = bytearray(whole)
        for _ in range(rng.randint(1, 3)):
            at = rng.randrange(len(data) + 1)
            if rng.random() < 0.5:
                data[at : at + 1] = bytes([rng.randrange(256)])
            else:
                data[at : at + rng.choice([0, 0, 1, 5])] = rng.choice(tokens)
        path.write_bytes(data)
        for read in (read_preferences, read_conversations):
            try:
                for record in read(path):
                    assert str(record).encode()
                    outcomes[type(record)] += 1
            except InputError as error:
                assert str(error).startswith(str(path)) and str(error).encode()
    assert outcomes[DataError] > 50 and outcomes[Preference] > 50
