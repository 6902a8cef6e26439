"""What the training scripts do before their loops: held-out data, and the line that describes a run."""

import json

import pytest

import train_dpo
import train_sft
from dataset.store import open_store
from errors import InputError
from tests.loops import metrics
from tests.runs import run_flags
from training.settings import SAMPLE
from training.setup import held_out_data

HELD_OUT = str(SAMPLE / "heldout.jsonl")


@pytest.mark.parametrize("settings, path", [
    ({}, HELD_OUT),
    ({"data": "pairs.jsonl"}, ""),
    ({"data": "pairs.jsonl", "eval_data": "mine.jsonl"}, "mine.jsonl"),
    ({"eval_data": ""}, ""),
    ({"eval_share": 0.1}, ""),
    ({"data": "pairs.jsonl", "eval_share": 0.1}, ""),
])  # fmt: skip
def test_the_bundled_held_out_pairs_are_for_the_bundled_pairs(settings, path):
    """Beside a user's own data they would show held-out figures of another task."""
    assert held_out_data(train_dpo.Settings(**settings)) == path
    assert held_out_data(train_sft.Settings()) == ""


def test_held_out_data_is_named_once():
    with pytest.raises(InputError, match="--eval-data names held-out data and --eval-share splits it off"):
        held_out_data(train_dpo.Settings(eval_data="mine.jsonl", eval_share=0.1))


@pytest.fixture
def run(tmp_path, tokenizer):
    """Run train_dpo on the ten pairs with these flags; return the run folder."""
    shape = {"spread": 0.1}
    made = run_flags(tmp_path, tokenizer, shape=shape, eval_data="auto", batch_size=2, log_every=1)

    def call(*flags: str):
        train_dpo.main([*made(tmp_path / "run"), *flags])
        return tmp_path / "run"

    return call


def test_a_share_of_the_prompts_is_held_out_and_not_trained_on(run, tmp_path, tokenizer):
    """The steps are those of the other part alone, and the evaluation is that of the share."""
    folder = run("--eval-share", "0.4")
    store = open_store(tmp_path / "pairs", "preferences", tokenizer, 4096)
    train, held_out = store.split(0.4)
    assert 0 < len(held_out) < len(store) == len(train) + len(held_out)
    rows = metrics(folder)
    assert sum("loss" in row for row in rows) == -(-len(train) // 2)
    assert rows[0]["eval_rewards/accuracies"] == 0.5
    config = json.loads((folder / "config.json").read_text())
    assert config["settings"]["eval_share"] == 0.4 and config["settings"]["eval_data"] == ""


def test_own_data_has_no_held_out_pairs_unless_asked(run):
    assert not any("eval_loss" in row for row in metrics(run()))


def test_a_run_describes_itself(run, capsys):
    """A mute run leaves open which device, precision and objective it uses, and on how much data."""
    folder = run("--beta", "0.3")
    printed = capsys.readouterr().out
    assert "cpu, fp32 (--precision); " in printed and " parameters; DPO, --loss sigmoid, beta 0.3" in printed
    assert "10 of 10 records" in printed and "5 steps, 5 per epoch, of 2 records" in printed
    assert f"saved in {folder}" in printed
    assert json.loads((folder / "config.json").read_text())["run"]["micro_batch_tokens"] > 0
