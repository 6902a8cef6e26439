"""Experiments: each runs from a model to figures and picture, and its figures are right."""

import gzip
import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from dataset.records import read_preferences
from errors import InputError
from eval.experiments import (
    bugs,
    edit_distance,
    frontier,
    harm,
    label_noise,
    margins,
    overoptimisation,
    real_data,
    weights,
)
from eval.preference import Settings, measure
from model.config import PRESETS
from tests.conftest import save_folder
from tests.loops import metrics
from tests.test_experiment_figures import write_reviews
from training.distributed import World, pick_device
from training.settings import SAMPLE

EXPERIMENTS = [bugs, edit_distance, frontier, harm, label_noise, margins, overoptimisation, weights]


@pytest.fixture
def start(tmp_path, tokenizer) -> str:
    """A folder with a tiny random language model."""
    return str(save_folder(tmp_path / "start", tokenizer, hidden_size=32))


def quick(experiment, start, out, *flags) -> dict:
    """Run an experiment with --quick; its results.json. It draws a picture."""
    pytest.importorskip("matplotlib")
    experiment.main(["--quick", "--model", start, "--out", str(out), *flags])
    (picture,) = out.glob("*.png")
    assert picture.read_bytes().startswith(b"\x89PNG")
    return json.loads((out / "results.json").read_text())


def test_edit_distance(start, tmp_path, capsys):
    """Each point is the mean log-ratio over an epoch. Every set has the same chosen answers but the last."""
    found = quick(edit_distance, start, tmp_path / "out", "--beta", "0.5", "--lr", "3e-3")["sets"]
    for name, group in found.items():
        for loss in ("sigmoid", "dpop"):
            for seed, curve in enumerate(group[loss]):
                rows = metrics(tmp_path / "out" / f"{name}-{loss}-{seed}")  # 8 pairs are 2 steps an epoch
                for side in ("chosen", "rejected"):
                    rewards = [row[f"rewards/{side}"] for row in rows]
                    expected = [rewards[i] + rewards[i + 1] for i in (0, 2)]  # ÷ 2 steps, ÷ beta 0.5
                    assert curve[side] == pytest.approx(expected)
    sides = [list(read_preferences(tmp_path / "out" / f"{name}.jsonl")) for name in found]
    assert [p.chosen for p in sides[0]] == [p.chosen for p in sides[1]] == [p.chosen for p in sides[2]]
    distances = [group["distance"] for group in found.values()]
    assert distances[0] < distances[1] < distances[2]
    value = found["value"]
    assert value["sigmoid"] != value["dpop"] and value["dpop"][0] != value["dpop"][1]
    printed = capsys.readouterr().out
    for region in ("prefix", "difference", "rest"):
        assert f"| {region} |" in printed
        assert all(math.isfinite(run[region]["logratio"]) for run in value["dpop by region"])


@pytest.fixture
def tiny_preset(monkeypatch):
    """Experiments that train their first model train one of 16 dimensions."""
    monkeypatch.setitem(PRESETS, "tiny", dict(hidden_size=16, num_hidden_layers=1, intermediate_size=24))


@pytest.fixture
def one_beta(monkeypatch):
    """The frontier with one beta of DPO in place of four."""
    left = {name: flags for name, flags in frontier.OBJECTIVES.items() if name not in list(frontier.DPO)[1:]}
    monkeypatch.setattr(frontier, "OBJECTIVES", left)


def test_frontier(start, one_beta, tmp_path, capsys):
    found = quick(frontier, start, tmp_path / "out")["runs"]
    assert all(len(runs) == 2 for runs in found.values())
    assert {*frontier.OBJECTIVES} < {*found} and found["SFT"][0]["kl"] == 0
    for name, flags in frontier.OBJECTIVES.items():
        folder = tmp_path / "out" / f"{name.replace(' ', '-')}-1"
        ran = json.loads((folder / "config.json").read_text())["settings"]
        assert {key: ran[key] for key in flags} == flags and ran["seed"] == 1
    assert "| DPO β 0.03 |" in capsys.readouterr().out


def test_frontier_of_sentiment(tiny_preset, one_beta, tmp_path):
    """Both seeds start from one model; each has pairs of its own."""
    flags = "--sentiment", str(write_reviews(tmp_path))
    found = quick(frontier, "unused", tmp_path / "out", *flags)["runs"]
    assert all(0 <= run["reward"] <= 1 for runs in found.values() for run in runs)
    pairs = [(tmp_path / "out" / f"pairs-{seed}.jsonl").read_text() for seed in (0, 1)]
    assert pairs[0] != pairs[1]


def test_margins(tiny_preset, tmp_path, write_jsonl):
    """The curves are the held-out rewards of the runs' logs."""
    asked = [f"\n\nHuman: Question {i}?\n\nAssistant: " for i in range(60)]
    answers = [("Yes.", "No."), ("Two apples.", "7")] * 30
    hh = [{"chosen": q + good, "rejected": q + bad} for q, (good, bad) in zip(asked, answers, strict=True)]
    feedback = [
        {"prompt": f"Count {i}", "chosen": good, "rejected": bad}
        for i, (good, bad) in enumerate([("One.", "Two, I think."), ("Well.", "!")] * 30)
    ]
    for name, rows in (("hh", hh), ("ultrafeedback", feedback)):
        path = tmp_path / real_data.PAIRS[name][0]
        path.parent.mkdir(exist_ok=True)
        with gzip.open(path, "wt", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
    found = quick(margins, "tiny", tmp_path / "out", "--shared", str(tmp_path))["runs"]
    for name, runs in found.items():
        for seed, run in enumerate(runs):
            rows = [row for row in metrics(tmp_path / "out" / f"{name}-{seed}") if "eval_loss" in row]
            assert run["step"] == [0, 1, 2]
            assert run["margins"] == [row["eval_rewards/margins"] for row in rows]
            assert run["chosen"][0] == run["rejected"][0] == 0
            rows = [row for row in metrics(tmp_path / "out" / f"{name}-{seed}") if "loss" in row]
            assert run["training"] == [0, *(row["rewards/margins"] for row in rows)] and len(rows) == 2
    with pytest.raises(InputError, match="--shared names a folder of public preference data"):
        margins.main(["--shared", str(tmp_path / "none"), "--out", str(tmp_path / "other")])


def test_weights(start, tmp_path):
    """Before the first step every pair weighs β / 2; the shares of an epoch sum to 1."""
    found = quick(weights, start, tmp_path / "out", "--beta", "0.5", "--lr", "3e-3")
    for run in found["runs"]:
        assert sum(run["sizes"].values()) == pytest.approx(1)
        for epoch in (0, 1):
            assert sum(run[name]["share"][epoch] for name in weights.GROUPS) == pytest.approx(1)
        assert run["manners"]["weight"][0] == pytest.approx(0.25, abs=0.1)
    pairs = list(read_preferences(tmp_path / "out" / "pairs-0.jsonl"))
    originals = {(p.chosen, p.rejected) for p in read_preferences(SAMPLE / "preferences.jsonl")}
    flipped = [(p.chosen, p.rejected) not in originals for p in pairs]
    assert flipped == [False] * (len(pairs) - 2) + [True] * 2  # a tenth of 20
    assert all((p.rejected, p.chosen) in originals for p in pairs[-2:])


def test_overoptimisation(start, tmp_path):
    """One point before training, where policy and reference are the same, and one after each epoch."""
    (first, second) = quick(overoptimisation, start, tmp_path / "out", "--lr", "3e-3")["runs"]
    assert {len(values) for values in first.values()} == {3}
    assert first["margin"][0] == first["kl"][0] == 0 and first["margin"][1] != 0
    assert first["margin"][2] != second["margin"][2]


def test_bugs(start, tmp_path, capsys, monkeypatch):
    """An aliased reference logs ln 2 while the policy moves; a rate of 1e-8 does not move it."""
    # In bf16 a weight that moves by 1e-8 may round to its neighbour, and the margin is not 0.
    monkeypatch.setattr("training.precision.cpu_multiplies_bf16", lambda: False)
    found = quick(bugs, start, tmp_path / "out", "--lr", "3e-2")["runs"]
    assert list(found) == list(bugs.VARIANTS)
    aliased, slow, right = (found[name][0] for name in ("aliased reference", "learning rate 1e-8", "right"))
    assert aliased["logged"] == pytest.approx([math.log(2)] * 3) and abs(aliased["margin"][-1]) > 1e-3
    assert slow["margin"][-1] == pytest.approx(0, abs=1e-5) and abs(right["margin"][-1]) > 1e-3
    assert right["step"] == [0, 1, 2]
    assert "| mask not shifted |" in capsys.readouterr().out


def test_harm(start, tmp_path, capsys):
    """The figures are the shares of refusals among the transcripts' answers."""
    found = quick(harm, start, tmp_path / "out")
    for kind, rows in found["transcripts"].items():
        assert len(rows) == 2
        prompts = harm.make_prompts(harm.Settings(prompts=2))[kind]
        for when in ("before", "after"):
            rate = harm.refusal_rate(prompts, [row[when] for row in rows])
            assert found["refusals"][when][kind][0] == rate
    assert "| Harmful wishes | 2 |" in capsys.readouterr().out


def test_label_noise(start, ragged, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    one_seed = lambda settings, **few: replace(settings, seeds=1, **few)  # noqa: E731
    monkeypatch.setattr(label_noise.common, "shortened", one_seed)
    data = "--data", str(ragged), "--eval-data", str(ragged)
    accuracies = quick(label_noise, start, out, *data, "--lr", "3e-3")["accuracies"]
    noisy = {name: ["20%", "40%"] for name in ("reward model", "soft", "cDPO", "robust")}
    expected = {"DPO": ["0%", "20%", "40%"], **noisy}
    assert {name: list(of_share) for name, of_share in accuracies.items()} == expected
    assert "| robust |  |" in capsys.readouterr().out

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


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_matplotlib_is_checked_before_training(experiment, start, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(InputError, match="pip install matplotlib"):
        experiment.main(["--model", start, "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_too_few_pairs_are_refused(start, ragged, tmp_path):
    pytest.importorskip("matplotlib")
    flags = ["--model", start, "--data", str(ragged), "--eval-data", str(ragged), "--out", str(tmp_path)]
    with pytest.raises(InputError, match="has 7 pairs, fewer than --pairs 128"):
        label_noise.main(flags)
