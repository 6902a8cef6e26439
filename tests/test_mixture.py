"""Several data files: their rows, the proportions of their weights, and patterns."""

import json
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest

import train_dpo
from dataset.mixture import Mixture, data_files, join, split_weight, windows_of
from dataset.store import open_store
from errors import InputError
from tests.faults import resume_from_each_step
from tests.runs import ALONE, PAIRS, run_flags, same_model

WEIGHTS = [Fraction("0.55"), Fraction("0.3"), Fraction("0.15")]


def test_every_window_has_the_proportions_and_every_source_its_epochs():
    """Oracle: counts. In 20 rows they are exact; each source's rows come once in each of its epochs."""
    sizes, batch = [40, 7, 30], 5
    mixture = Mixture(sizes, WEIGHTS, batch, seed=3)
    bounds = np.cumsum(sizes)
    drawn = [mixture[step] for step in range(400)]
    sources = np.searchsorted(bounds, np.concatenate(drawn), side="right")
    for start in range(0, len(sources), 20):
        assert Counter(sources[start : start + 20].tolist()) == {0: 11, 1: 6, 2: 3}
    for window in sources.reshape(-1, batch):
        for source, weight in enumerate(WEIGHTS):
            assert abs((window == source).sum() - batch * weight) < 2
    for source, size in enumerate(sizes):
        rows = np.concatenate(drawn)[sources == source]
        epochs = [rows[start : start + size].tolist() for start in range(0, len(rows) - size, size)]
        assert all(sorted(epoch) == sorted(epochs[0]) and len({*epoch}) == size for epoch in epochs)
        assert epochs[0] != epochs[1]
    again = Mixture(sizes, WEIGHTS, batch, seed=3)
    assert all(np.array_equal(again[step], drawn[step]) for step in (399, 7, 200, 0))
    assert not np.array_equal(Mixture(sizes, WEIGHTS, batch, seed=4)[0], drawn[0])


@pytest.fixture
def flags(tmp_path, tokenizer):
    for name, rows in (("a.jsonl", PAIRS[:6]), ("b.jsonl", PAIRS[6:])):
        (tmp_path / name).write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    made = run_flags(tmp_path, tokenizer, log_every=1, warmup_steps=0, epochs=2)
    return lambda out="run", *data, **changes: [
        *made(tmp_path / out, **changes),
        *(["--data", *data] * bool(data)),
    ]


def test_several_files_train_as_one_that_contains_them(flags, tmp_path):
    """Files, a pattern and a folder; the error of a step names the file."""
    train_dpo.main(flags("one"))
    (tmp_path / "shards").mkdir()
    for name in ("a.jsonl", "b.jsonl"):
        (tmp_path / "shards" / name).write_bytes((tmp_path / name).read_bytes())
    files = [str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")]
    cases = {"files": files, "pattern": [str(tmp_path / "?.jsonl")], "folder": [str(tmp_path / "shards")]}
    for name, data in cases.items():
        train_dpo.main(flags(name, *data))
        assert same_model(tmp_path / name, tmp_path / "one")
    assert json.loads((tmp_path / "files" / "config.json").read_text())["settings"]["data"] == files


def test_a_resumed_mixture_changes_no_bit(flags, tmp_path):
    data = [f"{tmp_path}/a.jsonl:0.25", f"{tmp_path}/b.jsonl:0.75"]
    found = resume_from_each_step(train_dpo, flags("x", *data, epochs=1), tmp_path / "r", ALONE)
    assert found == {str(step): [] for step in range(1, 4)}
    train_dpo.main(flags("stopped", *data, save_every=1))
    other = [data[0], f"{tmp_path}/b.jsonl:0.5"]
    with pytest.raises(InputError, match="has finished with data"):
        train_dpo.main(flags("stopped", *other, resume=True))


def test_a_joined_store_has_the_rows_of_its_files(flags, tmp_path, tokenizer):
    paths = [str(tmp_path / name) for name in ("a.jsonl", "b.jsonl", "pairs")]
    stores = {path: open_store(path, "preferences", tokenizer, 4096) for path in paths}
    joined = join(stores, [Fraction(1), Fraction(2), Fraction(1)])
    rows = [store.row(row) for store in stores.values() for row in range(len(store))]
    assert len(joined) == len(rows) == 20
    for index, row in enumerate(rows):
        assert [ids.tolist() for ids, _ in joined.row(index)] == [ids.tolist() for ids, _ in row]
    assert joined.lines[6] == f"{paths[1]}:1"
    held_out, kept = joined.split(0.5)
    assert len(held_out) + len(kept) == 20
    window = windows_of(joined, 4, 0)[0]
    assert sorted(np.searchsorted([6, 10], window, side="right").tolist()) == [0, 1, 1, 2]


def test_names_of_files_and_weights(tmp_path):
    (tmp_path / "c:3").write_text("")
    assert split_weight("a.jsonl:0.7") == ("a.jsonl", Fraction(7, 10))
    assert split_weight(f"{tmp_path}/c:3") == (f"{tmp_path}/c:3", None)
    for name in ("train-0.jsonl", "test-0.jsonl", "notes.md"):
        (tmp_path / name).write_text("")
    with pytest.raises(InputError, match=r"test-0.jsonl.* is for evaluation; name the files"):
        data_files(str(tmp_path))
    assert data_files(f"{tmp_path}/train*") == [f"{tmp_path}/train-0.jsonl"]
    for values, message in (
        (["no*file"], "no file fits this pattern"),
        (["a.jsonl:0"], "a weight must be above 0"),
    ):
        with pytest.raises(InputError, match=message):
            [data_files(split_weight(value)[0]) for value in values]


def test_weights_are_complete_and_have_few_digits(flags, tmp_path):
    a, b = f"{tmp_path}/a.jsonl", f"{tmp_path}/b.jsonl"
    for data, message in (
        ([f"{a}:1", b], "either every file has a weight"),
        ([f"{a}:0.123456", f"{b}:1"], "use fewer digits"),
        ([a, a], "names one file twice"),
    ):
        with pytest.raises(InputError, match=message):
            train_dpo.main(flags("refused", *data))
