"""The report on a data file: what training would do with it, before it does."""

import json

import pytest
from tokenizers import Tokenizer

from dataset.inspect import main
from dataset.store import open_store
from dataset.tokenizer import ChatTokenizer
from tests.conftest import RAGGED, as_record

PAIR = {"prompt": "Hi", "chosen": "yes", "rejected": "no"}


@pytest.fixture
def inspect(tokenizer_file, capsys):
    """Call the command; return its exit status and what it printed."""

    def inspect(path, *flags) -> tuple[int, str]:
        status = main([str(path), "--tokenizer", str(tokenizer_file), "--no-colour", *map(str, flags)])
        return status, capsys.readouterr().out

    return inspect


def test_the_report_counts_what_training_counts(inspect, tokenizer, write_jsonl):
    """Kept and dropped records are those of the store, line by line."""
    rows = [as_record(pair) for pair in RAGGED]
    rows[2]["rejected"] = rows[2]["chosen"]
    rows[4]["chosen"] = "long " * 200
    path = write_jsonl("pairs.jsonl", rows)
    status, printed = inspect(path, "--max-length", 120, "--show", 1)
    store = open_store(path, "preferences", tokenizer, 120)
    assert status == 0 and f"records   7: {len(store)} to train on" in printed
    assert "format    chat: prompt is messages" in printed
    assert "dropped   1 chosen equals rejected: line 3" in printed
    assert "dropped   1 too long: line 5" in printed
    assert printed.count("---- line 1") == 2 and "«" in printed and "repeated  no prompt" in printed
    assert f"{store.report.longest}\n" in printed.split("whole")[1]


def test_bad_records_are_listed_with_status_1(inspect, write_jsonl):
    path = write_jsonl("pairs.jsonl", [PAIR, {**PAIR, "chosen": ""}, {**PAIR, "rejected": 3}])
    status, printed = inspect(path)
    assert status == 1 and "training stops at line 2" in printed
    assert "bad       1 rejected: expected text, found a number: line 3" in printed


@pytest.mark.parametrize("row", [{**PAIR, "chosen": "no"}, {**PAIR, "chosen": "long " * 600}])
def test_nothing_left_to_train_on_is_status_1(inspect, write_jsonl, row):
    """Training would stop at once; a pipeline must see that before."""
    status, printed = inspect(write_jsonl("pairs.jsonl", [row]))
    assert status == 1 and "records   1: 0 to train on" in printed


def test_overlap_ignores_case_and_white_space(inspect, write_jsonl):
    other = write_jsonl("heldout.jsonl", [{**PAIR, "prompt": " hi "}, {**PAIR, "prompt": "other"}])
    _, printed = inspect(write_jsonl("pairs.jsonl", [PAIR, {**PAIR, "prompt": "Ho"}]), "--against", other)
    assert f"overlap   1 records have a prompt that also stands in {other}: line 1" in printed


def test_records_are_printed_without_control_characters(inspect, write_jsonl):
    _, printed = inspect(write_jsonl("pairs.jsonl", [{**PAIR, "chosen": "\x1b[2J\x07\u202e"}]))
    assert "\\x1b[2J\\x07\\u202e" in printed and not set(printed) & {"\x1b", "\x07", "\u202e"}


def test_a_message_without_a_place_in_the_template_is_bad(tokenizer_file, tmp_path, write_jsonl, capsys):
    """It is one record among others, with its line; the report goes on."""
    Tokenizer.from_file(str(tokenizer_file)).save(str(tmp_path / "tokenizer.json"))
    template = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no') }}{% endif %}"
        "{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    )
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    assert ChatTokenizer(tmp_path / "tokenizer.json").template.before_system is None
    path = write_jsonl("pairs.jsonl", [PAIR, {**PAIR, "system": "Short."}])
    assert main([str(path), "--tokenizer", str(tmp_path / "tokenizer.json"), "--no-colour"]) == 1
    printed = capsys.readouterr().out
    assert "1 to train on" in printed and "no place for a system message: line 2" in printed
