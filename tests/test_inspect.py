"""The report on a data file: what training would do with it, before it does."""

import functools
import json
import random

import pytest
from tokenizers import Tokenizer

from dataset.inspect import PAIRS_COMPARED, edit_distance, main
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


# ---- the sides of a pair


def sides(count: int, chosen: str, rejected: str) -> list[dict]:
    return [{"prompt": f"Hi {i}", "chosen": chosen, "rejected": rejected} for i in range(count)]


def test_the_share_of_longer_chosen_sides(inspect, write_jsonl):
    """Lengths are in tokens, a tie is on neither side, and dropped pairs do not count."""
    rows = sides(2, "7!7!", "7") + sides(1, "7", "!7!") + sides(1, "7", "!") + sides(4, "7", "7")
    _, printed = inspect(write_jsonl("pairs.jsonl", rows))
    assert "longer    the chosen side in 50.0% of the pairs, the rejected side in 25.0%\n" in printed
    assert "the length alone decides few pairs" in printed
    _, printed = inspect(write_jsonl("long.jsonl", rows[:3] + rows[:3]))
    assert "longer    the chosen side in 66.7% of the pairs" in printed
    assert "DPO can win these pairs by longer answers alone; --ld-alpha 0.5 weakens that" in printed
    _, printed = inspect(write_jsonl("short.jsonl", sides(3, "7", "!7!")))
    assert "DPO can win these pairs by shorter answers alone" in printed


def plain_distance(one: list[int], other: list[int]) -> int:
    """Levenshtein's recursion, as it is defined."""

    @functools.cache
    def distance(i: int, j: int) -> int:
        if not i or not j:
            return i + j
        replaced = distance(i - 1, j - 1) + (one[i - 1] != other[j - 1])
        return min(distance(i - 1, j) + 1, distance(i, j - 1) + 1, replaced)

    return distance(len(one), len(other))


def test_the_edit_distance_is_levenshteins():
    draw = random.Random(1)
    for _ in range(300):
        one, other = ([draw.randrange(3) for _ in range(draw.randrange(9))] for _ in range(2))
        assert edit_distance(one, other) == plain_distance(one, other), (one, other)


def test_close_and_distant_sides(inspect, write_jsonl):
    """One token of six differs, the end tokens do not count; then all of them differ."""
    _, printed = inspect(write_jsonl("close.jsonl", sides(3, "7!7!7!", "7!7!77")))
    assert "distance  median 0.17 (10 %: 0.17, 90 %: 0.17) of 3 pairs: edits" in printed
    assert "the sides are close" in printed and "--loss dpop prevents it" in printed
    _, printed = inspect(write_jsonl("distant.jsonl", sides(3, "7777", "!!")))
    assert "distance  median 1.00" in printed and "the sides differ" in printed


def test_a_large_file_is_sampled_over_its_whole_length(inspect, write_jsonl):
    """Were only its first pairs compared, a file sorted by source would look like its first source."""
    rows = sides(PAIRS_COMPARED, "7777", "777!") + sides(3 * PAIRS_COMPARED, "7777", "!!!!")
    _, printed = inspect(write_jsonl("sorted.jsonl", rows), "--show", 0)
    assert f"distance  median 1.00 (10 %: 0.25, 90 %: 1.00) of {PAIRS_COMPARED} pairs" in printed


def test_conversations_have_no_sides(inspect, write_jsonl):
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "yes"}]
    _, printed = inspect(write_jsonl("chats.jsonl", [{"messages": chat}]))
    assert "1 to train on" in printed and "longer " not in printed and "distance" not in printed
