"""Files to arrays to batches: nothing lost, nothing cut, nothing twice, and all of it counted."""

import errno
import json
import math
import os
import platform
import shutil
import signal
import subprocess
import sys
from itertools import chain
from pathlib import Path

import numpy as np
import pytest

from dataset import store as module
from dataset.packing import Windows, build_stream, deal, share, stream_lengths
from dataset.records import DataError
from dataset.store import TokenStore, open_store
from dataset.tokenizer import ChatTokenizer
from errors import InputError
from tests.conftest import RAGGED, ROOT, as_record, plain_ids, run_python, turns


def contents(store: TokenStore) -> list:
    """All content of a store, as plain lists."""
    rows = [[(ids.tolist(), mask.tolist()) for ids, mask in store.row(i)] for i in range(len(store))]
    arrays = store.lines, store.target_counts, store.lengths
    return [rows, *(array.tolist() for array in arrays), vars(store.report)]


@pytest.fixture
def own_cache(tmp_path, monkeypatch) -> Path:
    """A cache folder for this test alone, so that its content can be counted."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("MINIDPO_CACHE", str(folder))
    return folder


# ---- What a store holds


def test_rows_are_the_records_in_order(tokenizer, ragged):
    """Prompt, chosen, rejected; the responses are supervised whole, the prompt is not."""
    store = open_store(ragged, "preferences", tokenizer, max_length=512)
    assert len(store) == len(RAGGED) and store.lines.tolist() == list(range(1, 8))
    for index, (prompt, *answers) in enumerate(RAGGED):
        (ids, supervised), *branches = store.row(index)
        assert ids.tolist() == plain_ids(tokenizer, prompt, "")[0] and not supervised.any()
        for (ids, supervised), answer in zip(branches, answers, strict=True):
            assert ids.tolist() == plain_ids(tokenizer, prompt, answer)[1] and supervised.all()
        assert store.lengths[index] == sum(len(ids) for ids, _ in store.row(index))
        assert store.target_counts[index] == sum(len(ids) for ids, _ in branches)


def test_ties_are_dropped_and_votes_are_labels(tokenizer, write_jsonl):
    """A tie trained on as a win teaches the order of the columns; half of the votes prefers nothing."""
    votes, sides = [["a", "b"], "b", "tie", ["b", "b", "a"], "a"], {"response_a": "yes", "response_b": "no"}
    rows = [{"prompt": f"{place}?", **sides, "winner": vote} for place, vote in enumerate(votes)]
    store = open_store(write_jsonl("votes.jsonl", rows), "preferences", tokenizer, max_length=512)
    assert store.report.dropped == {"the verdict is a tie": [1, 3]} and store.lines.tolist() == [2, 4, 5]
    assert "2 dropped: the verdict is a tie (line 1, 3)" in str(store.report)
    assert store.score_margins.tolist() == pytest.approx([math.nan, math.log(2), math.nan], nan_ok=True)
    sides = [[tokenizer.decode(ids[:-1].tolist()) for ids, _ in store.row(row)[1:]] for row in range(3)]
    assert sides == [["no", "yes"], ["no", "yes"], ["yes", "no"]]
    with pytest.raises(InputError, match=r"no record is left to train on: .*2 dropped: the verdict is a tie"):
        open_store(write_jsonl("ties.jsonl", [rows[0], rows[2]]), "preferences", tokenizer, max_length=512)


def test_score_margins_are_those_of_the_records(tokenizer, write_jsonl):
    """The logit of the win probability, else the difference of the scores, else NaN."""
    labels = [
        ({}, math.nan),
        ({"score_chosen": 9, "score_rejected": 7.5}, 1.5),
        ({"score_chosen": -1, "score_rejected": 1}, -2),
        ({"win_probability": 0.8}, math.log(4)),
        ({"win_probability": 0.8, "score_chosen": 1, "score_rejected": 2}, math.log(4)),
        ({"win_probability": 0}, -math.inf),
        ({"win_probability": 1}, math.inf),
    ]
    rows = [{**as_record(pair), **extra} for pair, (extra, _) in zip(RAGGED, labels, strict=True)]
    rows.insert(2, {**rows[1], "chosen": "same", "rejected": "same", "score_chosen": 0})  # Dropped.
    store = open_store(write_jsonl("scored.jsonl", rows), "preferences", tokenizer, 512)
    expected = np.array([margin for _, margin in labels])
    assert store.score_margins.dtype == np.float64
    np.testing.assert_allclose(store.score_margins, expected, rtol=1e-15)
    chat = write_jsonl("chat.jsonl", [{"messages": [vars(m) for m in turns("Hi", "Hello")]}])
    assert np.isnan(open_store(chat, "conversations", tokenizer, 512).score_margins).all()


def test_targets_of_conversations_are_what_assistants_say(tokenizer, write_jsonl):
    """The token count of a window divides the loss; it must equal the number of the stream's targets."""
    chats = [turns("Hi", "Hello"), turns("Hi", "Hello", "1", "It is 2", system="Short."), turns("a", "b")]
    path = write_jsonl("chats.jsonl", [{"messages": [vars(m) for m in chat]} for chat in chats])
    store = open_store(path, "conversations", tokenizer, max_length=512)
    answers = [[m.content for m in chat if m.role == "assistant"] for chat in chats]
    expected = [sum(len(tokenizer.text(content)) + 1 for content in contents) for contents in answers]
    assert store.target_counts.tolist() == expected
    stream = build_stream(store, range(3))
    assert stream.lengths().tolist() == expected and len(stream.targets) == sum(expected)


def test_a_file_of_one_record(tokenizer, write_jsonl):
    """The smallest data: arrays of one row keep their second dimension."""
    store = open_store(write_jsonl("one.jsonl", [as_record(RAGGED[0])]), "preferences", tokenizer, 512)
    assert len(store) == 1 and store.bounds.shape == (1, 4)
    assert build_stream(store, Windows(1, 8, seed=0)[0]).responses == 2


def scored(index: int, margin: float, prompt: str = "") -> dict:
    """A pair of its own prompt, whose chosen side scores higher by `margin`."""
    labels = {} if math.isnan(margin) else {"score_chosen": 5 + margin, "score_rejected": 5}
    return {"prompt": prompt or f"Hi {index}", "chosen": "yes", "rejected": "no", **labels}


def test_pairs_scored_the_other_way_round_are_counted(tokenizer, write_jsonl):
    """A label that contradicts the scores is trained on unchanged; the report must count it."""
    rows = [scored(i, margin) for i, margin in enumerate([1, -1, 0, math.nan, -0.5])]
    rows.append({**scored(5, 1), "win_probability": 0.3})  # The probability goes before the scores.
    rows.append({**scored(6, -1), "chosen": "long " * 500})  # Dropped, so not counted.
    store = open_store(write_jsonl("scored.jsonl", rows), "preferences", tokenizer, 200)
    assert store.report.rejected_higher == 3
    assert "3 pairs have a rejected side that scores higher: --swap-by-score exchanges" in str(store.report)
    agreeing = open_store(write_jsonl("agreeing.jsonl", rows[:1]), "preferences", tokenizer, 200)
    assert "scores higher" not in str(agreeing.report)


def test_swap_by_score_exchanges_what_the_scores_contradict(tokenizer, write_jsonl):
    """Sides and labels of exactly these pairs; the cache differs from that of the plain file."""
    rows = [scored(0, 2), scored(1, -2), scored(2, math.nan), {**scored(3, 1), "win_probability": 0.25}]
    path = write_jsonl("scored.jsonl", rows)
    plain = open_store(path, "preferences", tokenizer, 512)
    swapped = open_store(path, "preferences", tokenizer, 512, swap_by_score=True)
    for row, exchanged in enumerate([False, True, False, True]):
        prompt, *sides = ([ids.tolist() for ids, _ in store.row(row)] for store in (plain, swapped))
        assert sides[0][0] == prompt[0] and sides[0][1:] == (prompt[:0:-1] if exchanged else prompt[1:])
    np.testing.assert_allclose(plain.score_margins, [2, -2, math.nan, math.log(1 / 3)], rtol=1e-12)
    np.testing.assert_allclose(swapped.score_margins, [2, 2, math.nan, math.log(3)], rtol=1e-12)
    assert "2 pairs have a rejected side that scores higher: they were exchanged" in str(swapped.report)
    assert plain.folder != swapped.folder
    with pytest.raises(InputError, match="share of held-out rows"):
        plain.split(1.0)


# ---- A share held out, by prompt


def many_prompts(count: int) -> list[dict]:
    """Pairs of many prompts; each prompt stands twice, the second time with other white space and case."""
    twice = [prompt for i in range(count) for prompt in (f"Hi {i}, you", f" hi  {i},\tYou ")]
    return [{"prompt": prompt, "chosen": "a", "rejected": f"b{i}"} for i, prompt in enumerate(twice)]


def test_a_split_never_puts_a_prompt_on_both_sides(tokenizer, write_jsonl):
    """Every row is on one side, with its own tokens, counts and offsets."""
    rows = many_prompts(300)
    store = open_store(write_jsonl("pairs.jsonl", rows), "preferences", tokenizer, 512)
    train, held_out = store.split(0.2)
    assert sorted([*train.lines, *held_out.lines]) == store.lines.tolist()
    assert not {(line - 1) // 2 for line in train.lines} & {(line - 1) // 2 for line in held_out.lines}
    assert 0.12 < len(held_out) / len(store) < 0.28
    for view in (train, held_out):
        assert len(view) == len(view.lines) == len(view.lengths) == len(view.target_bounds) - 1
        for index, line in enumerate(view.lines):
            here, there = view.row(index), store.row(line - 1)
            assert all((a == b).all() and (m == n).all() for (a, m), (b, n) in zip(here, there, strict=True))
            assert view.lengths[index] == sum(len(ids) for ids, _ in here)
            assert view.target_counts[index] == np.diff(view.target_bounds)[index]
            assert view.records[index] == line - 1
        assert build_stream(view, [0, len(view) - 1]).lengths().tolist() == [
            len(ids) for index in (0, len(view) - 1) for ids, _ in view.row(index)[1:]
        ]
    assert store.fingerprint != train.fingerprint != held_out.fingerprint != store.split(0.3)[1].fingerprint


def test_a_split_is_stable_when_rows_are_added(tokenizer, write_jsonl):
    """A held-out prompt stays held out when rows are added, and under a larger share."""
    rows = many_prompts(200)
    store = open_store(write_jsonl("few.jsonl", rows[100:]), "preferences", tokenizer, 512)
    more = open_store(write_jsonl("more.jsonl", rows[::-1]), "preferences", tokenizer, 512)
    few_lines = {rows[99 + line]["prompt"] for line in store.split(0.1)[1].lines}
    more_lines = {rows[-line]["prompt"] for line in more.split(0.1)[1].lines}
    assert few_lines == more_lines & {row["prompt"] for row in rows[100:]} and few_lines
    assert more_lines < {rows[-line]["prompt"] for line in more.split(0.4)[1].lines}


def test_a_split_of_conversations(tokenizer, write_jsonl):
    """The prompt of a conversation is all but its last turn."""
    rows = [{"messages": [vars(m) for m in turns(f"Hi {i // 2}", f"Hello {i}")]} for i in range(200)]
    train, held_out = open_store(write_jsonl("c.jsonl", rows), "conversations", tokenizer, 512).split(0.25)
    assert len(train) + len(held_out) == 200 and len(held_out) > 10
    assert not {(line - 1) // 2 for line in train.lines} & {(line - 1) // 2 for line in held_out.lines}


@pytest.mark.parametrize("share", [0, 1, -0.1, 1.5, math.nan])
def test_a_share_outside_of_0_to_1_is_refused(share, tokenizer, ragged):
    with pytest.raises(InputError, match="expected a number between 0 and 1"):
        open_store(ragged, "preferences", tokenizer, 512).split(share)


def test_a_split_with_an_empty_side_is_refused(tokenizer, write_jsonl):
    store = open_store(write_jsonl("one.jsonl", [as_record(RAGGED[0])]), "preferences", tokenizer, 512)
    with pytest.raises(InputError, match=r"leaves no row to (hold out|train on)"):
        store.split(0.5)


# ---- What is left out, and that it is counted


def test_length_limit_keeps_whole_pairs_or_none(tokenizer, write_jsonl):
    """A response cut at the limit loses its end token, and a pair cut to nothing trains on nothing."""
    pair = RAGGED[0]
    path = write_jsonl("pair.jsonl", [as_record(pair)])
    prompt, chosen = plain_ids(tokenizer, pair[0], pair[1])
    rejected = plain_ids(tokenizer, pair[0], pair[2])[1]
    assert len(chosen) > len(rejected)
    longest = len(prompt) + len(chosen)
    for limit in range(1, longest + 3):
        if limit < longest:
            with pytest.raises(InputError, match=r"1 dropped: too long \(line 1\)"):
                open_store(path, "preferences", tokenizer, limit)
        else:
            rows = open_store(path, "preferences", tokenizer, limit).row(0)
            assert [ids.tolist() for ids, _ in rows] == [prompt, chosen, rejected]
            assert all(mask.all() for _, mask in rows[1:])


def test_dropped_records_are_counted_with_their_lines(tokenizer, write_jsonl):
    """The loss does not show dropped records, so the report must."""
    rows = [as_record(pair) for pair in RAGGED]
    rows[2]["rejected"] = rows[2]["chosen"]
    rows[4]["chosen"] = "long " * 200
    rows[5]["rejected"] = "long " * 200
    store = open_store(write_jsonl("pairs.jsonl", rows), "preferences", tokenizer, 120)
    assert store.lines.tolist() == [1, 2, 4, 7]
    assert store.report.dropped == {"chosen equals rejected": [3], "too long": [5, 6]}
    assert store.report.kept == 4 and store.report.total() == 7
    report = str(store.report)
    assert "4 of 7 records" in report
    assert "1 dropped: chosen equals rejected (line 3)" in report
    assert "2 dropped: too long (line 5, 6)" in report
    limit = store.report.longest
    assert f"--max-length {limit} would keep the long ones" in report
    for length, kept in ((limit - 1, 5), (limit, 6)):
        assert len(open_store(write_jsonl("pairs.jsonl", rows), "preferences", tokenizer, length)) == kept


HUGE = """
from dataset import store
from dataset.tokenizer import ChatTokenizer
data, tokenizer = sys.argv[1], ChatTokenizer(sys.argv[2])
before = peak()
opened = store.open_store(data, "preferences", tokenizer, 512)
print(len(opened), opened.report.dropped, opened.report.longest, peak() - before)
"""


def test_a_line_that_is_far_too_long_takes_little_memory(tokenizer, tokenizer_file, write_jsonl, own_cache):
    """A line of 10 MB took 1.3 GB to be tokenised, only to be dropped."""
    huge = "word " * 600_000
    rows = [{"prompt": "a", "chosen": chosen, "rejected": "b"} for chosen in ("c", huge)]
    path = write_jsonl("huge.jsonl", rows)
    kept, *dropped, longest, grown = run_python(HUGE, path, tokenizer_file).split()
    assert (kept, " ".join(dropped)) == ("1", "{'too long': [2]}") and int(grown) < 60, f"{grown} MiB"
    exact = len(tokenizer.prompt(turns("a"))) + len(tokenizer.response("word " * 60_000)) * 10
    assert 0.99 < int(longest) / exact < 1.01


def test_a_long_text_of_few_tokens_is_kept(tokenizer, write_jsonl, monkeypatch):
    """The limit on characters only saves work: a text that fits is kept whatever its length."""
    monkeypatch.setattr(module, "PIECE", 1)
    prompt, chosen, _ = RAGGED[0]
    length = sum(map(len, plain_ids(tokenizer, prompt, chosen)))
    path = write_jsonl("pair.jsonl", [as_record(RAGGED[0])])
    assert len(open_store(path, "preferences", tokenizer, length)) == 1
    monkeypatch.setattr(tokenizer, "longest_token", 0)  # Every text counts as too long to look at whole.
    monkeypatch.setattr(module, "PIECE", 1000)
    monkeypatch.setattr(module, "VERSION", -1)
    assert len(open_store(path, "preferences", tokenizer, length)) == 1


def test_pairs_are_compared_after_tokenisation(tokenizer_file, tmp_path, write_jsonl):
    """Two spellings of one text may have the same ids; such a pair has a loss of ln 2 and no gradient."""
    settings = json.loads(tokenizer_file.read_text(encoding="utf-8"))
    settings["normalizer"] = {"type": "NFC"}
    path = tmp_path / "normalising.json"
    path.write_text(json.dumps(settings), encoding="utf-8")
    pairs = [(turns("Hi"), "caf\u00e9", "cafe\u0301"), RAGGED[0]]
    data = write_jsonl("pairs.jsonl", [as_record(pair) for pair in pairs])
    store = open_store(data, "preferences", ChatTokenizer(path), 512)
    assert store.report.dropped == {"chosen equals rejected": [1]} and len(store) == 1


def many(count: int, bad: list[int]) -> list[dict]:
    """Records; those on the `bad` lines lack the rejected side."""
    rows = [{"prompt": f"Hi {i}", "chosen": "a", "rejected": "b"} for i in range(1, count + 1)]
    for line in bad:
        del rows[line - 1]["rejected"]
    return rows


def test_a_bad_record_stops_the_run_by_name(tokenizer, write_jsonl):
    """The default: an error with path, line and reason."""
    path = write_jsonl("pairs.jsonl", many(10, bad=[4]))
    with pytest.raises(DataError, match=rf"{path}:4: .*rejected"):
        open_store(path, "preferences", tokenizer, 512)


def test_skip_bad_counts_what_it_skips(tokenizer, write_jsonl):
    """One bad record of two hundred is left out, with its line, and the others keep theirs."""
    store = open_store(write_jsonl("p.jsonl", many(200, [7])), "preferences", tokenizer, 512, skip_bad=True)
    assert len(store) == 199 and 7 not in store.lines
    assert list(store.report.dropped.values()) == [[7]]


@pytest.mark.parametrize("count, bad", [(50, [3]), (300, [9, 20, 31, 77]), (199, [2, 3])])
def test_skip_bad_has_a_limit(count, bad, tokenizer, write_jsonl):
    """With more than one bad record in a hundred, the file is probably the wrong one."""
    path = write_jsonl("pairs.jsonl", many(count, bad))
    with pytest.raises(InputError, match=f"{path}: {len(bad)} of {count} records are bad, more than 1 %"):
        open_store(path, "preferences", tokenizer, 512, skip_bad=True)


def test_nothing_left_to_train_on(tokenizer, tmp_path, write_jsonl):
    """The error comes when the file is opened, with the reason."""
    pair = {"prompt": "Hi", "chosen": "same", "rejected": "same"}
    with pytest.raises(InputError, match=r"no record is left to train on: .*chosen equals rejected"):
        open_store(write_jsonl("same.jsonl", [pair]), "preferences", tokenizer, 512)
    (tmp_path / "empty.jsonl").write_text("")
    for path in (tmp_path / "empty.jsonl", tmp_path / "missing.jsonl", tmp_path):
        with pytest.raises(InputError, match=str(path)):
            open_store(path, "preferences", tokenizer, 512)


# ---- The cache


def test_whatever_changes_the_arrays_changes_the_cache(tokenizer, other_tokenizer, ragged, own_cache):
    """A cache found by path, or by size and time, would return the old content of an edited file."""
    open_store(ragged, "preferences", tokenizer, 512)
    open_store(ragged, "preferences", tokenizer, 511)
    open_store(ragged, "preferences", other_tokenizer, 512)
    assert len(list(own_cache.iterdir())) == 3
    before = ragged.stat()
    ragged.write_bytes(ragged.read_bytes().replace(b"Two apples", b"Six apples"))
    os.utime(ragged, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert ragged.stat().st_size == before.st_size
    store = open_store(ragged, "preferences", tokenizer, 512)
    assert tokenizer.decode(store.row(0)[1][0]).startswith("Six apples")
    assert len(list(own_cache.iterdir())) == 4


@pytest.fixture
def other_tokenizer(tokenizer_file, tmp_path) -> ChatTokenizer:
    """Another tokenizer over the same vocabulary: two ids changed places."""
    settings = json.loads(tokenizer_file.read_text(encoding="utf-8"))
    vocab = settings["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    path = tmp_path / "other.json"
    path.write_text(json.dumps(settings), encoding="utf-8")
    return ChatTokenizer(path)


def test_the_same_bytes_under_another_name_are_the_same_data(tokenizer, ragged, own_cache):
    """A copy of a file is not tokenised again."""
    copy = ragged.with_name("copy.jsonl")
    copy.write_bytes(ragged.read_bytes())
    open_store(ragged, "preferences", tokenizer, 512)
    open_store(copy, "preferences", tokenizer, 512)
    assert len(list(own_cache.iterdir())) == 1


def test_an_interrupted_build_leaves_nothing(tokenizer, ragged, own_cache, monkeypatch):
    """Half a store under the final name would be half the data in every later run."""
    encode, calls = module.encode, []

    def failing(*arguments):
        calls.append(arguments)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return encode(*arguments)

    monkeypatch.setattr(module, "encode", failing)
    with pytest.raises(KeyboardInterrupt):
        open_store(ragged, "preferences", tokenizer, 512)
    assert not list(own_cache.iterdir())
    assert len(open_store(ragged, "preferences", tokenizer, 512)) == len(RAGGED)


@pytest.mark.parametrize("name", ["bounds.npy", "lines.npy", "tokens.bin", "supervised.bin", "report.json"])
@pytest.mark.parametrize("keep", [0, 0.5])
def test_a_torn_cache_is_refused(tokenizer, ragged, own_cache, name, keep):
    """Arrays cut short by a full disk would give the rows other ids, or crash later."""
    open_store(ragged, "preferences", tokenizer, 512)
    (folder,) = own_cache.iterdir()
    whole = (folder / name).read_bytes()
    (folder / name).write_bytes(whole[: int(len(whole) * keep)])
    with pytest.raises(InputError, match=f"{folder}: damaged, remove it"):
        open_store(ragged, "preferences", tokenizer, 512)
    shutil.rmtree(folder)
    assert len(open_store(ragged, "preferences", tokenizer, 512)) == len(RAGGED)


def test_a_file_that_changes_while_it_is_read_is_refused(tokenizer, ragged, own_cache, monkeypatch):
    """Else the arrays would mix old and new content."""
    encode = module.encode

    def edited(*arguments):
        ragged.write_bytes(ragged.read_bytes() + b"\n")
        return encode(*arguments)

    monkeypatch.setattr(module, "encode", edited)
    with pytest.raises(InputError, match="changed while it was read"):
        open_store(ragged, "preferences", tokenizer, 512)
    assert not list(own_cache.iterdir())


def test_the_lookup_lists_the_cache(tokenizer, ragged, own_cache, monkeypatch):
    """Every rank, restart and later run maps the arrays of the first, also while NFS misses the name."""
    first = open_store(ragged, "preferences", tokenizer, 512)
    monkeypatch.setattr(Path, "is_dir", lambda path: False)
    monkeypatch.setattr(module, "encode", lambda *arguments: pytest.fail("tokenised twice"))
    assert contents(open_store(ragged, "preferences", tokenizer, 512)) == contents(first)
    assert len(list(own_cache.iterdir())) == 1


def test_the_slower_process_takes_the_folder_of_the_faster_one(tokenizer, ragged, own_cache, monkeypatch):
    """Also where the name of that folder is cached as missing."""
    inner, calls = module.build, []

    def build(folder, write):
        def slower(unfinished):
            write(unfinished)
            calls.append(folder)
            if len(calls) == 1:
                inner(folder, write)  # The other process finishes first.

        inner(folder, slower)

    monkeypatch.setattr(module, "build", build)
    monkeypatch.setattr(Path, "is_dir", lambda path: path.parent != own_cache and os.path.isdir(path))
    store = open_store(ragged, "preferences", tokenizer, 512)
    assert len(store) == len(RAGGED) and os.listdir(own_cache) == [store.folder.name]


KILLED = """
import os, signal, sys
from dataset import store
from dataset.tokenizer import ChatTokenizer
store.encode = lambda *arguments: os.kill(os.getpid(), signal.SIGKILL)
store.open_store(sys.argv[1], "preferences", ChatTokenizer(sys.argv[2]), 512)
"""


def test_what_a_killed_process_left_is_removed(tokenizer, tokenizer_file, ragged, own_cache):
    """Each killed process left an unfinished folder in the cache forever."""
    command = [sys.executable, "-c", KILLED, str(ragged), str(tokenizer_file)]
    assert subprocess.run(command, cwd=ROOT, timeout=60).returncode == -signal.SIGKILL
    (left,) = own_cache.iterdir()
    assert left.name.startswith("unfinished-")
    others = [own_cache / name for name in (
        f"unfinished-{platform.node()}-{os.getpid()}-abcd_123",  # This process lives.
        "unfinished-another-machine-1-abcd_123",  # Its process cannot be checked from here.
        "unfinished-abcd_123",  # As the first edition named them.
        "notes",
        "unfinished-symphony",  # A foreign folder, if $MINIDPO_CACHE also contains other work.
    )]  # fmt: skip
    for folder in others:
        folder.mkdir()
        (folder / "tokens.bin").touch()
    (others[4] / "score.txt").touch()
    store = open_store(ragged, "preferences", tokenizer, 512)
    assert sorted(own_cache.iterdir()) == sorted([store.folder, *others])
    for folder in others[1:]:
        for path in (*folder.iterdir(), folder):
            os.utime(path, (0, 0))
    os.utime(others[2])  # Written to only just now, in the folder or in its files.
    os.utime(others[1] / "tokens.bin")
    open_store(ragged, "preferences", tokenizer, 511)
    assert {*others} <= {*own_cache.iterdir()}
    os.utime(others[1] / "tokens.bin", (0, 0))
    open_store(ragged, "preferences", tokenizer, 510)
    assert {*own_cache.iterdir()} & {*others} == {others[0], others[2], others[3], others[4]}


def no_room(*arguments, **options):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("fault", ["a file", "below a file", "read-only", "full", "home", "no home"])
def test_a_cache_that_cannot_be_written_is_one_line(fault, tokenizer, ragged, tmp_path, monkeypatch):
    """The message names the variable that moves the cache elsewhere."""
    (tmp_path / "file").touch()
    reason = {"a file": "File exists", "full": "No space left", "no home": "home folder"}
    reason = reason.get(fault, "Not a directory")
    cache = {"a file": "file", "below a file": "file/cache"}.get(fault, "cache")
    monkeypatch.setenv("MINIDPO_CACHE", str(tmp_path / cache))
    if fault == "read-only":
        monkeypatch.setenv("MINIDPO_CACHE", "/proc/minidpo")
        reason = "No such file"  # Linux refuses a new folder there, also to root.
    if fault == "full":
        monkeypatch.setattr(module.np, "save", no_room)
    if "home" in fault:
        monkeypatch.delenv("MINIDPO_CACHE")
        monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
        monkeypatch.setenv("HOME", str(tmp_path / "file"))
    if fault == "no home":
        monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    with pytest.raises(InputError, match=rf"{reason}.*; set \$MINIDPO_CACHE to a folder") as caught:
        open_store(ragged, "preferences", tokenizer, 512)
    assert "\n" not in str(caught.value)
    if fault == "full":
        assert not list((tmp_path / "cache").iterdir())


def test_data_that_cannot_be_read_is_one_line(tokenizer, ragged, tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "pipe.jsonl")
    with pytest.raises(InputError, match="it is not a regular file"):
        open_store(tmp_path / "pipe.jsonl", "preferences", tokenizer, 512)
    unreadable = ragged.parent / ("x" * 300)
    with pytest.raises(InputError, match="cannot be read"):
        open_store(unreadable, "preferences", tokenizer, 512)

    def forbidden(path):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(module, "file_hash", forbidden)
    with pytest.raises(InputError, match=rf"{ragged}: cannot be read \(Permission denied\)"):
        open_store(ragged, "preferences", tokenizer, 512)


def test_what_happens_to_a_file_later_does_not_matter(tokenizer, ragged, own_cache):
    """A mapped file that is cut short kills its reader; the mapped arrays are copies that nothing edits."""
    store = open_store(ragged, "preferences", tokenizer, 512)
    before = contents(store)
    ragged.write_bytes(b"")
    assert contents(store) == before
    ragged.unlink()
    shutil.rmtree(own_cache)
    assert contents(store) == before


BIG = """
from dataset import store
from dataset.tokenizer import ChatTokenizer
path, tokenizer = sys.argv[1:]
# The real tokenizer would take an hour; what must not hold on to the records is all the rest.
store.encode = lambda record, tokenizer: [([1] * 300, [False] * 300), ([2] * 9, [True] * 9), ([3], [True])]
before = peak()
opened = store.open_store(path, "preferences", ChatTokenizer(tokenizer), 4096)
print(len(opened), opened.report.total(), len(opened.tokens), peak() - before)
"""


@pytest.mark.slow
def test_a_file_of_a_gibibyte_is_read_in_bounded_memory(tokenizer_file, tmp_path, own_cache):
    """Memory must not grow with the text. It does grow with the number of records, by 48 bytes each."""
    path, number = tmp_path / "big.jsonl", 0
    with open(path, "w") as file:
        while file.tell() < 2**30:
            number += 1
            row = {"prompt": f"{number}? " * 200, "chosen": "yes " * 100, "rejected": "no " * 100}
            file.write(json.dumps(row) + "\n")
    kept, total, tokens, grown = map(int, run_python(BIG, path, tokenizer_file, seconds=1000).split())
    assert kept == total == number and tokens == 310 * number
    assert grown < 100, f"{grown} MiB for {number} records"


# ---- Windows: which rows meet in a step


@pytest.mark.parametrize("rows, batch_size", [(1, 1), (1, 8), (10, 4), (12, 4), (7, 7), (99, 1), (5, 32)])
def test_an_epoch_sees_every_row_once(rows, batch_size):
    """A tail that does not fill a batch is trained on too, and no row comes twice before all came once."""
    windows = Windows(rows, batch_size, seed=0)
    assert windows.per_epoch == -(-rows // batch_size)
    for epoch in range(3):
        steps = range(epoch * windows.per_epoch, (epoch + 1) * windows.per_epoch)
        seen = [windows[step].tolist() for step in steps]
        assert sorted(chain(*seen)) == list(range(rows))
        assert all(len(window) == batch_size for window in seen[:-1])


def test_windows_are_a_function_of_seed_and_step():
    """A step's rows must not depend on what was asked before, or a resumed run goes another way."""
    one, two = Windows(50, 8, seed=3), Windows(50, 8, seed=3)
    steps = list(range(28))
    forwards = {step: one[step].tolist() for step in steps}
    assert {step: two[step].tolist() for step in steps[::-1]} == forwards
    assert Windows(50, 8, seed=3)[17].tolist() == forwards[17]
    epochs = [[*chain(*(forwards[step] for step in range(e * 7, e * 7 + 7)))] for e in range(4)]
    assert len({tuple(epoch) for epoch in epochs}) == 4, "every epoch has an order of its own"
    assert Windows(50, 8, seed=4)[0].tolist() != forwards[0]
    assert epochs[0] != sorted(epochs[0])


# ---- Dealing: who computes them


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("most", [1, 300, 700, 6000])
@pytest.mark.parametrize("count", [1, 2, 3, 8, 13, 32])
def test_deal_gives_every_row_to_one_micro_batch(count, most, ranks):
    """A row lost or dealt twice; a batch with too many tokens; ranks that wait for one another for ever."""
    draw = np.random.default_rng([count, most, ranks])
    lengths = np.concatenate([draw.integers(1, 300, 50), [5000]])
    window = np.concatenate([[50], draw.permutation(50)])[:count]
    dealt = deal(window, lengths, ranks, most)
    assert len(dealt) == ranks
    assert len({len(batches) for batches in dealt}) == 1
    assert all(batch.dtype.kind == "i" for batches in dealt for batch in batches)
    batches = [batch for rank in dealt for batch in rank]
    assert sorted(row for batch in batches for row in batch.tolist()) == sorted(window.tolist())
    assert all(len(batch) <= 1 or lengths[batch].sum() <= most for batch in batches)
    assert any(batch.tolist() == [50] for batch in batches) or most == 6000
    # Not many more than are needed: with a round less, a half of the batches would be full to a half.
    needed = np.minimum(lengths[window], most).sum() / most
    assert len(batches) - ranks < 2 * needed + ranks


@pytest.mark.parametrize("ranks, batches", [(1, 2), (2, 1), (4, 1)])
def test_deal_makes_no_more_forwards_than_it_must(ranks, batches):
    """Eight rows of 10 tokens, at most 40 in a forward: 4 + 4, or 2 on each of four ranks."""
    dealt = deal(np.arange(8), np.full(8, 10), ranks, 40)
    assert [len(rows) for rank in dealt for rows in rank] == [8 // ranks // batches] * ranks * batches


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("rows", [1, 5, 6, 7, 13])
def test_shares_of_an_evaluation_are_as_many_batches_on_every_rank(rows, ranks):
    """Where weights are split a forward is an exchange: a rank with fewer of them makes the others wait."""
    lengths = np.array([3, 9, 30, 4, 1, 9, 9, 2, 8, 8, 5, 1, 60])[:rows]
    shares = [share(lengths, rank, ranks, 12) for rank in range(ranks)]
    assert len({len(batches) for batches in shares}) == 1 <= len(shares[0])
    assert sorted(row for batches in shares for batch in batches for row in batch) == [*range(rows)]
    assert all(len(batch) <= 1 or lengths[batch].sum() <= 12 for batches in shares for batch in batches)


def test_deal_balances_tokens_not_rows():
    """Two long rows must not meet while there is another micro-batch: the longest one takes the memory."""
    (first, second), = deal(np.arange(8), np.array([900, 10, 10, 10, 900, 10, 10, 10]), 1, 1000)
    assert {0, 4} & set(first.tolist()) and {0, 4} & set(second.tolist())
    (first,), (second,) = deal(np.arange(5), np.array([10, 60, 30, 20, 40]), 2, 4000)
    assert sorted(first.tolist()) == [1, 3] and sorted(second.tolist()) == [0, 2, 4]  # 80 tokens each


@pytest.mark.parametrize("layout", ["forked", "twin"])
def test_lengths_are_those_of_streams(layout, ragged, tokenizer):
    """A pair has a second copy of its prompt in twin; counted once, its forwards would be too long."""
    store = open_store(ragged, "preferences", tokenizer, max_length=512)
    made = [len(build_stream(store, [row], layout).tokens) for row in range(len(store))]
    assert stream_lengths(store, layout).tolist() == made
