"""Files to arrays to batches: nothing lost, nothing cut, nothing twice, and all of it counted."""

import json
import math
import os
import shutil
import subprocess
import sys
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch

from dataset import store as module
from dataset.packing import Windows, build_stream, deal, share, stream_lengths
from dataset.records import DataError
from dataset.store import TokenStore, open_store
from dataset.tokenizer import ChatTokenizer
from errors import InputError
from tests.conftest import RAGGED, ROOT, as_record, plain_ids, turns


def contents(store: TokenStore) -> list:
    """All that a store says, as plain lists."""
    rows = [[(ids.tolist(), mask.tolist()) for ids, mask in store.row(i)] for i in range(len(store))]
    return [rows, store.lines.tolist(), store.target_counts.tolist(), store.lengths.tolist(), vars(store.report)]


@pytest.fixture
def own_cache(tmp_path, monkeypatch) -> Path:
    """A cache folder of this test alone, so that what lies in it can be counted."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("MINIDPO_CACHE", str(folder))
    return folder


# ---- What a store holds


def test_rows_are_the_records_in_order(tokenizer, ragged):
    """Prompt, chosen, rejected; each response supervised whole, the prompt not at all."""
    store = open_store(ragged, "preferences", tokenizer, max_length=512)
    assert len(store) == len(RAGGED) and store.lines.tolist() == list(range(1, 8))
    for index, (prompt, *answers) in enumerate(RAGGED):
        (ids, supervised), *branches = store.row(index)
        assert ids.tolist() == plain_ids(tokenizer, prompt, "")[0] and not supervised.any()
        for (ids, supervised), answer in zip(branches, answers, strict=True):
            assert ids.tolist() == plain_ids(tokenizer, prompt, answer)[1] and supervised.all()
        assert store.lengths[index] == sum(len(ids) for ids, _ in store.row(index))
        assert store.target_counts[index] == sum(len(ids) for ids, _ in branches)


def test_score_margins_are_those_of_the_records(tokenizer, write_jsonl):
    """A difference of scores, or the logit of a win probability, which goes first; NaN without either."""
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
    """The window's token count, by which the loss is divided, is that of the stream's targets."""
    chats = [turns("Hi", "Hello"), turns("Hi", "Hello", "1", "It is 2", system="Short."), turns("a", "b")]
    path = write_jsonl("chats.jsonl", [{"messages": [vars(m) for m in chat]} for chat in chats])
    store = open_store(path, "conversations", tokenizer, max_length=512)
    spoken = [[m.content for m in chat if m.role == "assistant"] for chat in chats]
    expected = [sum(len(tokenizer.text(content)) + 1 for content in contents) for contents in spoken]
    assert store.target_counts.tolist() == expected
    stream = build_stream(store, range(3))
    assert stream.lengths().tolist() == expected and len(stream.targets) == sum(expected)


def test_a_file_of_one_record(tokenizer, write_jsonl):
    """The smallest data there is: arrays of one row keep their second dimension."""
    store = open_store(write_jsonl("one.jsonl", [as_record(RAGGED[0])]), "preferences", tokenizer, 512)
    assert len(store) == 1 and store.bounds.shape == (1, 4)
    assert build_stream(store, Windows(1, 8, seed=0)[0]).responses == 2


# ---- What is left out, and that it is counted


def test_length_limit_keeps_whole_pairs_or_none(tokenizer, write_jsonl):
    """A response cut at the limit loses its end token, and a pair cut to nothing trains on nothing, silently.

    So the limit is swept over one pair: it is kept if and only if prompt and longer response fit whole.
    """
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
    """What disappears without a word is missed by nobody, least of all by the loss."""
    rows = [as_record(pair) for pair in RAGGED]
    rows[2]["rejected"] = rows[2]["chosen"]
    rows[4]["chosen"] = "long " * 200
    rows[5]["rejected"] = "long " * 200
    store = open_store(write_jsonl("pairs.jsonl", rows), "preferences", tokenizer, 120)
    assert store.lines.tolist() == [1, 2, 4, 7]
    assert store.report.dropped == {"chosen equals rejected": [3], "too long": [5, 6]}
    assert store.report.kept == 4 and store.report.total() == 7
    said = str(store.report)
    assert "4 of 7 records" in said
    assert "1 dropped: chosen equals rejected (line 3)" in said and "2 dropped: too long (line 5, 6)" in said
    limit = store.report.longest
    assert f"--max-length {limit} would keep the long ones" in said
    for length, kept in ((limit - 1, 5), (limit, 6)):
        assert len(open_store(write_jsonl("pairs.jsonl", rows), "preferences", tokenizer, length)) == kept


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
    """Records, of which those on the `bad` lines have no rejected side."""
    rows = [{"prompt": f"Hi {i}", "chosen": "a", "rejected": "b"} for i in range(1, count + 1)]
    for line in bad:
        del rows[line - 1]["rejected"]
    return rows


def test_a_bad_record_stops_the_run_by_name(tokenizer, write_jsonl):
    """The default: path, line and reason, and nothing is trained on the rest."""
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
    """More than one bad record in a hundred is another kind of file, and is not to be skipped in silence."""
    path = write_jsonl("pairs.jsonl", many(count, bad))
    with pytest.raises(InputError, match=f"{path}: {len(bad)} of {count} records are bad, more than 1 %"):
        open_store(path, "preferences", tokenizer, 512, skip_bad=True)


def test_nothing_left_to_train_on(tokenizer, tmp_path, write_jsonl):
    """No step over nothing: said when the file is opened, with the reason."""
    pair = {"prompt": "Hi", "chosen": "same", "rejected": "same"}
    with pytest.raises(InputError, match=r"no record is left to train on: .*chosen equals rejected"):
        open_store(write_jsonl("same.jsonl", [pair]), "preferences", tokenizer, 512)
    (tmp_path / "empty.jsonl").write_text("")
    for path in (tmp_path / "empty.jsonl", tmp_path / "missing.jsonl", tmp_path):
        with pytest.raises(InputError, match=str(path)):
            open_store(path, "preferences", tokenizer, 512)


# ---- The cache


def test_a_second_open_tokenises_nothing(tokenizer, ragged, own_cache, monkeypatch):
    """Every rank, restart and later run maps the arrays of the first."""
    first = open_store(ragged, "preferences", tokenizer, 512)
    monkeypatch.setattr(module, "encode", lambda *arguments: pytest.fail("tokenised twice"))
    assert contents(open_store(ragged, "preferences", tokenizer, 512)) == contents(first)
    assert len(list(own_cache.iterdir())) == 1


def test_whatever_changes_the_arrays_changes_the_cache(tokenizer, other_tokenizer, ragged, own_cache):
    """A cache that is found by path, or by size and time, goes on serving a file that was edited."""
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
    """A copy of a file is not tokenised anew."""
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
    """Arrays that a full disk cut short would be other ids for the same rows, or a crash in the night."""
    open_store(ragged, "preferences", tokenizer, 512)
    (folder,) = own_cache.iterdir()
    whole = (folder / name).read_bytes()
    (folder / name).write_bytes(whole[: int(len(whole) * keep)])
    with pytest.raises(InputError, match=f"{folder}: damaged, remove it"):
        open_store(ragged, "preferences", tokenizer, 512)
    shutil.rmtree(folder)
    assert len(open_store(ragged, "preferences", tokenizer, 512)) == len(RAGGED)


def test_a_file_that_changes_while_it_is_read_is_refused(tokenizer, ragged, own_cache, monkeypatch):
    """Half of the old content and half of the new is the data of nobody."""
    encode = module.encode

    def edited(*arguments):
        ragged.write_bytes(ragged.read_bytes() + b"\n")
        return encode(*arguments)

    monkeypatch.setattr(module, "encode", edited)
    with pytest.raises(InputError, match="changed while it was read"):
        open_store(ragged, "preferences", tokenizer, 512)
    assert not list(own_cache.iterdir())


def test_what_happens_to_a_file_later_does_not_matter(tokenizer, ragged, own_cache):
    """A mapped file that is cut short ends its reader without a word; ours are copies that nobody edits."""
    store = open_store(ragged, "preferences", tokenizer, 512)
    before = contents(store)
    ragged.write_bytes(b"")
    assert contents(store) == before
    ragged.unlink()
    shutil.rmtree(own_cache)
    assert contents(store) == before


BIG = """
import resource, sys
from dataset import store
from dataset.tokenizer import ChatTokenizer
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
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
    process = [sys.executable, "-c", BIG, str(path), str(tokenizer_file)]
    done = subprocess.run(process, cwd=ROOT, capture_output=True, text=True, check=True, timeout=1000)
    kept, total, tokens, grown = map(int, done.stdout.split())
    assert kept == total == number and tokens == 310 * number
    assert grown < 100, f"{grown} MiB for {number} records"


BUILDER = """
import sys, time
from pathlib import Path
from dataset import store
from dataset.tokenizer import ChatTokenizer

data, tokenizer, meeting, me = sys.argv[1:]
encode = store.encode

def meet(*arguments):
    "Go on when the other process is building as well."
    Path(meeting, me).touch()
    deadline = time.monotonic() + 30
    while len(list(Path(meeting).iterdir())) < 2:
        assert time.monotonic() < deadline, "the other process never came"
        time.sleep(0.005)
    return encode(*arguments)

store.encode = meet
opened = store.open_store(data, "preferences", ChatTokenizer(tokenizer), 512)
print([[ids.tolist() for ids, _ in opened.row(i)] for i in range(len(opened))], opened.lines.tolist())
"""


def test_two_processes_may_build_at_once(tokenizer, tokenizer_file, ragged, own_cache, tmp_path):
    """Ranks, or two runs on one machine, open a new file in the same second; the slower one must not fail."""
    meeting = tmp_path / "meeting"
    meeting.mkdir()
    command = [sys.executable, "-c", BUILDER, str(ragged), str(tokenizer_file), str(meeting)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    processes = [subprocess.Popen([*command, me], cwd=ROOT, **pipes) for me in "ab"]
    try:
        results = [process.communicate(timeout=60) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert all(process.returncode == 0 for process in processes), results
    store = open_store(ragged, "preferences", tokenizer, 512)
    rows = [[ids.tolist() for ids, _ in store.row(i)] for i in range(len(store))]
    assert [out.decode().strip() for out, _ in results] == [f"{rows} {store.lines.tolist()}"] * 2
    assert len(list(own_cache.iterdir())) == 1


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
    """A row lost or dealt twice; a batch with too many tokens; or ranks that wait for one another for ever.

    One row of 5,000 tokens is longer than most of the bounds.
    """
    draw = np.random.default_rng([count, most, ranks])
    lengths = np.concatenate([draw.integers(1, 300, 50), [5000]])
    window = np.concatenate([[50], draw.permutation(50)])[:count]
    dealt = deal(window, lengths, ranks, most)
    assert len(dealt) == ranks
    assert len({len(batches) for batches in dealt}) == 1
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
    (first,), (second,) = deal(np.arange(8), np.array([900, 10, 10, 10, 900, 10, 10, 10]), 2, 4000)
    assert len(first) == len(second) == 4


@pytest.mark.parametrize("layout", ["forked", "twin"])
def test_lengths_are_those_of_streams(layout, ragged, tokenizer):
    """A pair has a second copy of its prompt in twin; counted once, its forwards would be too long."""
    store = open_store(ragged, "preferences", tokenizer, max_length=512)
    made = [len(build_stream(store, [row], layout).tokens) for row in range(len(store))]
    assert stream_lengths(store, layout).tolist() == made


def test_streams_carry_the_labels_of_their_rows(write_jsonl, tokenizer):
    """(B,) beside the pairs, in the order of the rows."""
    pair = {"prompt": "a", "chosen": "b", "rejected": "c"}
    rows = [pair, {**pair, "score_chosen": 3, "score_rejected": 1.5}, {**pair, "win_probability": 0.5}]
    store = open_store(write_jsonl("pairs.jsonl", rows), "preferences", tokenizer, 64)
    margins = build_stream(store, [2, 0, 1]).score_margins
    assert margins.dtype == torch.float32
    torch.testing.assert_close(margins, torch.tensor([0, math.nan, 1.5]), equal_nan=True)
    assert build_stream(store, []).score_margins.shape == (0,)


def test_a_window_smaller_than_the_ranks_is_dealt():
    """Some ranks get an empty micro-batch, and with it a part in the exchange of gradients."""
    dealt = deal(np.array([5]), np.arange(10), 3, 40)
    assert sorted(len(hand) for hands in dealt for hand in hands) == [0, 0, 1]
    assert all(hand.dtype.kind == "i" for hands in dealt for hand in hands)
