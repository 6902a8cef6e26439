"""Scores of a reward model in a file of pairs: eval/score.py."""

import gzip
import json
import os
from contextlib import nullcontext

import pytest
import torch.nn.functional as F

import files
import train_reward
from dataset.records import read_preferences
from errors import InputError
from eval import score
from model.reward import RewardModel
from model.weights import load_model
from tests.conftest import RAGGED, as_record, make_model, plain_hidden, plain_ids, save_folder
from tests.ranks import forked
from tests.test_reward import make_reward_model


@pytest.fixture
def reward_folder(tmp_path, tokenizer):
    """A folder with a reward model whose head is not zeros."""
    return save_folder(tmp_path / "reward", tokenizer, make_reward_model(tokenizer.vocab_size).float())


def run_score(model, source, out, *more) -> list[dict]:
    """Call the command on the CPU in float32; return the records that it wrote."""
    paths = ["--model", str(model), "--data", str(source), "--out", str(out)]
    score.main([*paths, "--device", "cpu", "--precision", "fp32", *map(str, more)])
    return [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]


# A file with other keys, old scores, pairs that training drops, and a character that UTF-8 cannot encode.
EXTRA = [
    {**as_record(pair), "place": place, "nested": {"α": [1, 2.5, None]}} for place, pair in enumerate(RAGGED)
]
EXTRA[2]["score_chosen"], EXTRA[2]["score_rejected"] = 9, -9
EXTRA[4]["note"] = "\ud800 alone"
EXTRA.insert(1, {**EXTRA[0], "rejected": EXTRA[0]["chosen"]})
EXTRA.insert(4, {**EXTRA[0], "chosen": "long " * 500})
KEPT = [row for place, row in enumerate(EXTRA) if place not in (1, 4)]


@pytest.mark.parametrize("name", ["pairs.jsonl", "pairs.json", "pairs.jsonl.gz"])
def test_scores_are_written_back(name, reward_folder, tmp_path, tokenizer, capsys):
    """Each record keeps its fields and place and gets its own scores, also if others are dropped."""
    text = json.dumps(EXTRA) if name == "pairs.json" else "".join(json.dumps(row) + "\n" for row in EXTRA)
    data = text.encode()
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    out = tmp_path / "deep" / "scored.jsonl"
    rows = run_score(reward_folder, tmp_path / name, out, "--max-length", 200)
    notes = capsys.readouterr().err
    assert "7 of 9 records" in notes and "1 dropped: too long" in notes and f"{out}: 7 pairs" in notes
    assert os.listdir(out.parent) == ["scored.jsonl"]  # no temporary file

    model = load_model(reward_folder, model_class=RewardModel)
    for row, before in zip(rows, KEPT, strict=True):
        no_scores = {"score_chosen": 0, "score_rejected": 0}
        assert row | no_scores == before | no_scores
        prompt, *answers = RAGGED[before["place"]]
        for side, answer in zip(("chosen", "rejected"), answers, strict=True):
            x, y = plain_ids(tokenizer, prompt, answer)
            expected = F.linear(plain_hidden(model, x + y)[-1], model.score.weight).item()
            assert row[f"score_{side}"] == pytest.approx(expected, abs=1e-5)
    assert len({row["score_chosen"] for row in rows}) == 7

    read_again = list(read_preferences(out))
    written = [(row["score_chosen"], row["score_rejected"]) for row in rows]
    assert [record.scores for record in read_again] == written


def test_an_old_win_probability_is_removed(reward_folder, write_jsonl, tmp_path, capsys):
    """`--loss soft` uses a win_probability before scores, so an old one would make the new scores useless."""
    rows = [as_record(pair) for pair in RAGGED]
    rows[0]["win_probability"], rows[3]["win_probability"] = 0.9, None
    rows[5]["win_probability"] = 0.2
    scored = run_score(reward_folder, write_jsonl("old.jsonl", rows), tmp_path / "scored.jsonl")
    assert not any("win_probability" in row for row in scored)
    assert all(record.win_probability is None for record in read_preferences(tmp_path / "scored.jsonl"))
    assert "removed win_probability from 2 records" in capsys.readouterr().err
    run_score(reward_folder, tmp_path / "scored.jsonl", tmp_path / "twice.jsonl")
    assert "removed" not in capsys.readouterr().err


def test_a_file_may_be_replaced_by_its_scores(reward_folder, ragged):
    assert len(run_score(reward_folder, ragged, ragged)) == 7
    assert len(run_score(reward_folder, ragged, ragged)) == 7


def test_two_ranks_write_the_same_scores(reward_folder, ragged, tmp_path):
    alone = run_score(reward_folder, ragged, tmp_path / "one.jsonl")
    flags = ["--model", reward_folder, "--data", ragged, "--out", tmp_path / "two.jsonl", "--device", "cpu"]
    result = forked("eval.score", *flags, "--precision", "fp32", ranks=2)
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("parameters") == 1
    two = [json.loads(line) for line in (tmp_path / "two.jsonl").read_text(encoding="utf-8").splitlines()]
    for one, other in zip(alone, two, strict=True):
        assert other == {**one, **{key: pytest.approx(one[key], abs=1e-5) for key in one if "score" in key}}


def test_a_failed_write_leaves_the_old_file(reward_folder, ragged, tmp_path, monkeypatch):
    """Half a file of pairs would train without an error, on half of the data."""
    out = tmp_path / "scored.jsonl"
    out.write_text("as it was")

    def full(_):
        raise OSError(28, "disk full")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(InputError, match=r"scored\.jsonl: cannot be written \(disk full\)"):
        run_score(reward_folder, ragged, out)
    assert out.read_text() == "as it was" and not list(tmp_path.glob("*.tmp"))


@pytest.mark.parametrize("kind, config, length, reason", [
    ("language", {}, 65, "contains a language model, not a reward model"),
    ("reward", {"vocab_size": 319}, 65, "the tokenizer has 320 ids"),
    ("reward", {"sliding_window": 64}, 65, "65 tokens do not fit into the model's sliding window of 64"),
    ("reward", {"sliding_window": 64}, 64, ""),
])  # fmt: skip
def test_models_that_cannot_score_are_refused(kind, config, length, reason, tokenizer, ragged, tmp_path):
    """Ids without an embedding, or full attention beyond a window: the scores would look plausible."""
    make = make_reward_model if kind == "reward" else make_model
    model = make(**{"vocab_size": tokenizer.vocab_size, **config}).float()
    save_folder(tmp_path / "model", tokenizer, model)
    with pytest.raises(InputError, match=reason) if reason else nullcontext():
        run_score(tmp_path / "model", ragged, tmp_path / "out.jsonl", "--max-length", length)


def test_the_old_flag_names_the_new_command():
    """Scoring was a flag of train_reward.py."""
    with pytest.raises(InputError, match=r"--score was replaced by python -m eval\.score"):
        train_reward.main(["--model", "runs/reward", "--score", "pairs.jsonl", "--to", "scored.jsonl"])
