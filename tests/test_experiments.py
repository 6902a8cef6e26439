"""Experiments: each runs from a model to figures and picture, and its figures are right."""

import json
import sys
from pathlib import Path

import pytest

from dataset.records import read_preferences
from errors import InputError
from eval.experiments import edit_distance, label_noise
from eval.preference import Settings, measure
from tests.conftest import save_folder
from tests.loops import metrics
from training.distributed import World, pick_device


@pytest.fixture
def start(tmp_path, tokenizer) -> str:
    """A folder with a tiny random language model."""
    return str(save_folder(tmp_path / "start", tokenizer, hidden_size=32))


def test_edit_distance(start, ragged, tmp_path):
    """A log-ratio is a reward divided by beta. Each point is the mean over an epoch, at its middle."""
    pytest.importorskip("matplotlib")
    out = tmp_path / "out"
    flags = ["--model", start, "--data", str(ragged), "--out", str(out), "--beta", "0.5", "--lr", "3e-3"]
    edit_distance.main([*flags, "--seeds", "2", "--epochs", "3", "--batch-size", "4"])
    runs = json.loads((out / "results.json").read_text())["runs"]
    assert (out / "edit_distance.png").read_bytes().startswith(b"\x89PNG")
    for name, curves in runs.items():
        for seed, curve in enumerate(curves):
            rows = metrics(out / f"{name}-{seed}")  # 7 pairs are 2 steps an epoch
            assert curve["step"] == [1.5, 3.5, 5.5]
            for side in ("chosen", "rejected"):
                rewards = [row[f"rewards/{side}"] for row in rows]
                expected = [rewards[i] + rewards[i + 1] for i in (0, 2, 4)]  # ÷ 2 steps, ÷ beta 0.5
                assert curve[side] == pytest.approx(expected)
    assert runs["sigmoid"] != runs["dpop"] and runs["dpop"][0] != runs["dpop"][1]


def test_label_noise(start, ragged, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    out = tmp_path / "out"
    flags = ["--model", start, "--data", str(ragged), "--eval-data", str(ragged), "--out", str(out)]
    label_noise.main([*flags, "--seeds", "1", "--pairs", "5", "--eval-pairs", "3", "--lr", "3e-3"])
    accuracies = json.loads((out / "results.json").read_text())["accuracies"]
    noisy = {name: ["20%", "40%"] for name in ("reward model", "soft", "cDPO", "robust")}
    expected = {"DPO": ["0%", "20%", "40%"], **noisy}
    assert {name: list(of_share) for name, of_share in accuracies.items()} == expected
    assert (out / "label_noise.png").read_bytes().startswith(b"\x89PNG")

    # The figure is the accuracy on pairs with true labels, of the model trained on flipped ones.
    def answers(path):
        return [(pair.chosen, pair.rejected) for pair in read_preferences(path)]

    assert answers(out / "heldout.jsonl") == answers(ragged)[:3]
    for name in ("robust", "soft"):
        given = Settings(model=str(out / "40%-0" / name), data=str(out / "heldout.jsonl"))
        measured = measure(given, World(0, 1, pick_device("auto")))
        assert accuracies[name]["40%"] == [measured["rewards/accuracies"]]
    # The settings of every run; the reward model was trained on noisy pairs too.
    folder = out / "40%-0"
    configs = {name: folder / name / "config.json" for name in label_noise.OBJECTIVES}
    ran = {name: json.loads(config.read_text())["settings"] for name, config in configs.items()}
    assert {name: (run["loss"], run["label_smoothing"], Path(run["data"])) for name, run in ran.items()} == {
        "DPO": ("sigmoid", None, folder / "noisy.jsonl"),
        "cDPO": ("sigmoid", 0.4, folder / "noisy.jsonl"),
        "robust": ("robust", 0.4, folder / "noisy.jsonl"),
        "soft": ("soft", None, folder / "scored.jsonl"),
    }
    reward = json.loads((folder / "reward" / "config.json").read_text())["settings"]
    assert Path(reward["data"]) == folder / "noisy.jsonl"
    assert answers(folder / "scored.jsonl") == answers(folder / "noisy.jsonl")


def test_flips_are_exact_and_nested(ragged):
    """Objectives are compared on the same pairs. 40 % also flips the pairs of 20 %; the rest is unchanged."""
    pairs = list(read_preferences(ragged))
    clean, few, many = (label_noise.flipped(pairs, 5, share, seed=1) for share in (0, 0.2, 0.4))
    assert len({pair.line for pair in clean}) == 5 and all(pair in pairs for pair in clean)
    for noisy, wrong in ((few, 1), (many, 2)):
        assert noisy[wrong:] == clean[wrong:]
        for flipped, true in zip(noisy[:wrong], clean[:wrong], strict=True):
            assert (flipped.chosen, flipped.rejected) == (true.rejected, true.chosen)
            assert flipped.prompt == true.prompt
    assert label_noise.flipped(pairs, 5, 0, seed=2) != clean


@pytest.mark.parametrize("experiment", [edit_distance, label_noise])
def test_matplotlib_is_checked_before_training(experiment, start, ragged, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(InputError, match="pip install matplotlib"):
        experiment.main(["--model", start, "--data", str(ragged), "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_too_few_pairs_are_refused(start, ragged, tmp_path):
    pytest.importorskip("matplotlib")
    flags = ["--model", start, "--data", str(ragged), "--eval-data", str(ragged), "--out", str(tmp_path)]
    with pytest.raises(InputError, match="has 7 pairs, fewer than --pairs 200"):
        label_noise.main(flags)
