"""Talking to models: eval/chat.py, and text on a terminal: eval/terminal.py."""

import io
import os
import re
import subprocess
import sys
from contextlib import redirect_stdout

import pytest
import torch

from dataset.jsonl import printable
from dataset.records import Message
from dataset.tokenizer import START
from errors import InputError
from eval import chat, common, terminal
from eval.common import load_model_and_tokenizer
from model.weights import save_model
from tests.conftest import make_model, save_folder
from tests.loops import ROOT
from training.settings import SAMPLE

CPU = torch.device("cpu")


@pytest.fixture
def piped(monkeypatch, capsys):
    """Call eval.chat with a pipe as its input; return standard output and standard error."""

    def run(lines: str | bytes, *arguments: str) -> tuple[str, str]:
        data = lines if isinstance(lines, bytes) else lines.encode()
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), encoding="utf-8"))
        chat.main([*arguments, "--max-new-tokens", "8", "--device", "cpu"])
        return capsys.readouterr()

    return run


# ---- Through a pipe


def test_a_piped_chat_answers_a_line_with_a_line(folders):
    """Without a terminal there is no prompt, no cursor code, and no error at the end of the input."""
    command = [sys.executable, "-m", "eval.chat", "--model", folders[0], "--device", "cpu"]
    result = subprocess.run(
        [*command, "--max-new-tokens", "8", "--system", "Be brief."],
        input="Hello\n你好\n\nHow are you?".encode(), capture_output=True,
        cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=60,
    )  # fmt: skip
    assert result.returncode == 0 and result.stderr.count(b"\n") == 1
    assert result.stdout.count(b"\n") == 3 and b"\x1b" not in result.stdout


def test_the_first_line_names_model_size_device_and_precision(folders, piped):
    out, notes = piped("", "--model", folders[0])
    parameters = sum(p.numel() for p in load_model_and_tokenizer(folders[0], CPU)[0].parameters())
    assert (out, notes) == ("", f"{folders[0]} ({parameters:,} parameters) on cpu, fp32\n")


def test_a_piped_chat_of_two_prints_columns(folders, piped):
    out, _ = piped("Hello\nHi\n", "--model", folders[0], "--versus", folders[1])
    answers = out.split("\n\n")
    assert answers.pop() == "" and len(answers) == 2
    assert all(terminal.GAP.rstrip() in line for answer in answers for line in answer.split("\n"))


def test_bytes_that_are_not_utf8_do_not_end_a_chat(folders, piped):
    out, _ = piped(b"caf\xe9\nHi\n", "--model", folders[0])
    assert out.count("\n") == 2


def test_a_system_message_that_is_not_utf8_is_refused(folders):
    """A shell passes any bytes; Python turns bad ones into lone surrogates, which no tokenizer encodes."""
    with pytest.raises(InputError, match=r"--system must be UTF-8 text, not 'caf\\udce9'"):
        chat.main(["--model", folders[0], "--system", os.fsdecode(b"caf\xe9")])


def answers_by_text(monkeypatch, *answers: str) -> list[list[int]]:
    """Replace generation by these answers in turn; returns the list that will hold the prompts."""
    prompts, left = [], list(answers)

    def decode(model, rows, uniforms, end_id, **sampling):
        prompts.append(rows[0])
        yield from (([0], [token]) for token in left.pop(0))

    monkeypatch.setattr(chat, "decode_steps", decode)
    return prompts


def test_new_starts_over_and_help_helps(folders, piped, tokenizer, monkeypatch):
    """The system message stays; an answer after /new depends on nothing that came before it."""
    ids = tokenizer.response("Two apples.")
    prompts = answers_by_text(monkeypatch, ids, ids, ids)
    out, notes = piped("1?\n2?\n/help\n/new\n3?\n", "--model", folders[0], "--system", "Be brief.")
    assert out == "Two apples.\n" * 3
    assert chat.HELP in notes and "new conversation" in notes
    system = Message("system", "Be brief.")
    assert prompts[0] == tokenizer.prompt([system, Message("user", "1?")])
    assert len(prompts[1]) > len(prompts[0])
    assert prompts[2] == tokenizer.prompt([system, Message("user", "3?")])


def test_a_long_conversation_loses_its_oldest_turns(folders, piped, tokenizer, monkeypatch):
    """Beyond the length of training answers fall apart, and beyond a window the model stops with an error."""
    ids = tokenizer.response("Two apples.")
    prompts = answers_by_text(monkeypatch, *[ids] * 4)
    system = Message("system", "Be brief.")
    turn = Message("user", "1?"), Message("assistant", "Two apples.")
    fits = len(tokenizer.prompt([system, *turn, *turn, Message("user", "1?")]))
    limit = ["--max-length", str(fits + 8)]  # 8 tokens for the answer
    out, notes = piped("1?\n" * 4, "--model", folders[0], "--system", "Be brief.", *limit)
    assert out == "Two apples.\n" * 4 and notes.count("the oldest 2 messages were left out") == 1
    assert [len(prompt) for prompt in prompts[2:]] == [fits, fits] and prompts[2] == prompts[3]


def test_a_message_that_is_too_long_is_refused_and_the_chat_goes_on(folders, piped, tokenizer):
    """An empty line takes the place of the answer, so that output lines still belong to input lines."""
    short, long = "Hi", "How many apples are left? " * 9
    fits = len(tokenizer.prompt([Message("user", short)]))
    out, notes = piped(f"{short}\n{long}\n{short}\n", "--model", folders[0], "--max-length", str(fits + 8))
    assert len(out.split("\n")) == 4 and out.split("\n")[1] == ""
    tokens = len(tokenizer.prompt([Message("user", long.strip())]))
    assert f"not sent: the message has {tokens} tokens, more than {fits}" in notes


def test_two_models_lose_the_same_turns_or_none(folders, tokenizer):
    """If one model refuses a message, the other must not have it in its history either."""
    model, _ = load_model_and_tokenizer(folders[0], CPU)
    pair = [chat.Conversation(model, tokenizer, max_prompt) for max_prompt in (1000, 3)]
    assert not chat.add_message(pair, "Hello")
    assert [conversation.history for conversation in pair] == [[], []]


@pytest.mark.parametrize("run, asked, config, limit", [
    ({}, 0, {}, 4096),
    ({"max_length": 300}, 0, {}, 300),
    ({"max_length": 300}, 200, {}, 200),
    ({"max_length": 0}, 0, {"max_position_embeddings": 512}, 512),
    ({"max_length": "many"}, 0, {"sliding_window": 128}, 128),
])  # fmt: skip
def test_the_length_limit_is_the_flags_or_the_runs_or_the_models(run, asked, config, limit, tmp_path):
    model = make_model(10, **config)
    save_model(tmp_path, model, settings=run)
    assert common.length_limit(asked, tmp_path, model.config) == limit
    if "sliding_window" in config:
        with pytest.raises(InputError, match="sliding window of 128"):
            common.length_limit(129, tmp_path, model.config)


def test_an_answer_must_leave_room_for_a_message(folders):
    with pytest.raises(InputError, match="--max-new-tokens 256 leaves no room for a message"):
        chat.main(["--model", folders[0], "--max-length", "256"])


# ---- What the model was taught


def test_a_chat_begins_with_what_the_model_was_taught(folders, piped, tokenizer, tmp_path):
    """From the run's settings: file, records, and the tasks of the bundled data. Other folders: no line."""
    lines = (SAMPLE / "preferences.jsonl").read_text("utf-8").count("\n")
    run = {"data": str(SAMPLE / "preferences.jsonl"), "model": "runs/sft"}
    save_folder(tmp_path / "dpo", tokenizer, settings=run)
    _, notes = piped("", "--model", str(tmp_path / "dpo"), "--versus", folders[0])
    (line,) = [line for line in notes.splitlines() if "trained on" in line]
    assert f"dpo: trained on preferences.jsonl ({lines:,} records): sum, " in line
    assert line.endswith("in English and Chinese; started from runs/sft") and "capital" in line

    own = tmp_path / "mine.jsonl"
    own.write_text('{"a": 1}\n{"a": 2}\n')
    save_model(tmp_path / "own", make_model(9), settings={"data": str(own), "model": "tiny"})
    line = f"{tmp_path / 'own'}: trained on mine.jsonl"
    assert common.describe_training(tmp_path / "own") == f"{line} (2 records)"
    own.unlink()
    assert common.describe_training(tmp_path / "own") == line
    assert common.describe_training(folders[0]) == ""


def test_names_from_a_config_cannot_steer_the_terminal(piped, tokenizer, tmp_path):
    settings = {"data": "evil\x1b[2J.jsonl", "model": "\x1b]0;owned\x07"}
    save_folder(tmp_path / "hostile", tokenizer, settings=settings)
    _, notes = piped("/help\n", "--model", str(tmp_path / "hostile"))
    assert "\\x1b[2J" in notes and "\\x1b]0;owned\\x07" in notes and "\x1b" not in notes


# ---- One conversation


def test_a_conversation_keeps_its_messages(folders, monkeypatch):
    """Each answer is generated from all messages before it, with control tokens by id."""
    model, tokenizer = load_model_and_tokenizer(folders[0], CPU)
    ids = tokenizer.response("Two apples.")
    prompts = answers_by_text(monkeypatch, ids, ids)
    conversation = chat.Conversation(model, tokenizer, 1000, [Message("system", "Be brief.")])
    for text in ("How many?", f"And now? {START}"):
        conversation.history = conversation.with_message(text)
        assert "".join(conversation.reply(torch.rand(1, 4))) == "Two apples."
    assert [m.role for m in conversation.history] == ["system", "user", "assistant", "user", "assistant"]
    assert prompts[1] == tokenizer.prompt(conversation.history[:4])


def test_a_character_is_shown_when_it_is_complete(tokenizer):
    """A token can end within a character. Shown at once, it would be a replacement mark on the screen."""
    text = "a苹果😀b"
    ids = tokenizer.text(text)
    pieces = list(chat.text_pieces(tokenizer, iter(ids)))
    assert "".join(pieces) == text and "\ufffd" not in "".join(pieces)
    assert len(pieces) == len(ids) + 1 > len(text)
    broken = list(chat.text_pieces(tokenizer, iter(tokenizer.text("😀")[:-1])))
    assert set("".join(broken)) == {"\ufffd"} and not any(broken[:-1])


# ---- Text on a terminal


@pytest.mark.parametrize("text, shown", [
    ("\x1b[2J\x1b]0;owned\x07", "\\x1b[2J\\x1b]0;owned\\x07"),
    ("a\rb\x00\x7f\x9b", "a\\rb\\x00\\x7f\\x9b"),
    ("safe \u202egnp.exe", "safe \\u202egnp.exe"),
    ("\u2028\ud800", "\\u2028\\ud800"),
    ("one\ntwo\tthree", "one\ntwo    three"),
    ("苹果 é 👩\u200d🚀", "苹果 é 👩\u200d🚀"),
])  # fmt: skip
def test_no_answer_can_steer_the_terminal(text, shown):
    assert printable(text) == shown
    shown.encode()


@pytest.mark.parametrize("show", ["one", "two"])
def test_answers_are_escaped_on_the_screen(show, capsys):
    """An answer may contain any bytes: the model may have been trained on hostile text."""
    pieces = iter(["safe ", "\x1b[2J", "\x07"]), iter(["\x9b31m"])
    chat.show_one(pieces[0], True) if show == "one" else chat.show_two(*pieces, False)
    printed = capsys.readouterr().out
    assert "\\x1b[2J" in printed and not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f]", printed)


def test_columns_count_cells_not_characters():
    """A Chinese character takes two cells and a combining accent none; len() would bend the middle line."""
    assert terminal.cells("ab") == 2 and terminal.cells("苹果，") == 6 and terminal.cells("e\u0301") == 1
    rows = terminal.side_by_side("苹果还剩两个\nok", "two apples are left", 10)
    assert rows == ["苹果还剩两 │ two apples", "个         │ are left", "ok         │"]
    assert {terminal.cells(line.split("│")[0]) for line in rows} == {11}


TEXT = "The quick 棕色的狐狸 jumps over 懒狗, averyverylongword 和很长很长很长的句子\n\n end  x 苹 " * 2


@pytest.mark.parametrize("width", [10, 11, 27])
def test_wrapped_lines_fit_and_stay(width):
    """Printed rows cannot be changed, so more text may change the last line only."""
    for end in range(len(TEXT)):
        lines, more = terminal.wrap(TEXT[:end], width), terminal.wrap(TEXT[: end + 1], width)
        assert all(terminal.cells(line) <= width for line in lines)
        assert more[: len(lines) - 1] == lines[:-1]
    assert "".join(lines).replace(" ", "") == re.sub(r"\s", "", TEXT)


def screen(output: str) -> list[str]:
    """The rows of a terminal after this output: line feeds, "cursor up n" and "clear to the end" only."""
    rows, at = [""], 0
    for part in re.split(r"(\x1b\[\d+A|\x1b\[J|\n)", output):
        if part == "\n":
            at += 1
            rows += [""] * (at + 1 - len(rows))
        elif part == "\x1b[J":
            rows = [*rows[:at], ""]
        elif part.startswith("\x1b"):
            at -= int(part[2:-1])
            assert at >= 0
        else:
            rows[at] += part
    return rows


@pytest.mark.parametrize("on_terminal", [True, False])
@pytest.mark.parametrize("left, right", [(TEXT, "short\n" * 30), ("", TEXT), (TEXT, TEXT[::-1])])
def test_two_streams_end_as_two_columns(left, right, on_terminal, monkeypatch):
    """However often the screen was drawn again; in a pipe nothing is written twice."""
    monkeypatch.setattr(chat.shutil, "get_terminal_size", lambda _: os.terminal_size((60, 12)))
    with redirect_stdout(io.StringIO()) as output:
        chat.show_two(iter(left), iter(right), on_terminal)
    assert ("\x1b" in output.getvalue()) == on_terminal
    expected = terminal.side_by_side(left, right, terminal.column_width())
    assert screen(output.getvalue()) == [*expected, "", ""]
