"""Win rates by scores, another model as the reference, and rounds of DPO on a model's own answers."""

import json

import numpy as np
import pytest
import torch

import train_dpo
from dataset.records import Message
from dataset.store import open_store
from errors import InputError
from eval import judge, rounds, sample
from eval.common import load_model, reference_of
from eval.experiments import rounds as experiment
from eval.win_rate import contest, length_controlled, win_interval
from tests.conftest import make_model, plain_hidden, save_folder
from tests.loops import metrics
from tests.ranks import forked
from tests.runs import ALONE, FP32, command_line, same_model
from training.evaluate import evaluate
from training.objective import Objective, ObjectiveSettings

# ---- The win rate at equal length


def drawn(truth: float, slope: float, prompts: int, seed: int) -> tuple[list, list]:
    """Differences of scores and lengths: P(win) = σ(truth + slope·tanh(length / std)), one case a prompt."""
    draw = np.random.default_rng(seed)
    lengths = draw.normal(5, 20, prompts)  # The first model writes longer answers.
    chances = 1 / (1 + np.exp(-truth - slope * np.tanh(lengths / lengths.std())))
    won = np.where(draw.random(prompts) < chances, 1.0, -1.0)
    return won[:, None].tolist(), lengths[:, None].tolist()


def test_the_win_rate_at_equal_length_is_that_of_the_simulation():
    """Here length alone lifts the plain rate; the interval has the truth in about 57 of 60 samples."""
    inside = 0
    for seed in range(60):
        rate, (low, high) = length_controlled(*drawn(0.0, 2.0, 200, seed))
        inside += low <= 0.5 <= high
    assert inside >= 53
    wins, longer = drawn(0.4, 2.0, 20_000, 0)
    rate, (low, high) = length_controlled(wins, longer)
    assert rate == pytest.approx(1 / (1 + np.exp(-0.4)), abs=0.015) and low < rate < high
    assert contest(wins, longer)["win_rate"] > rate + 0.03


def test_laws_of_the_win_rate_at_equal_length():
    wins, longer = drawn(0.4, 1.0, 200, 3)
    rate, (low, high) = length_controlled(wins, longer)
    turned, (turned_low, turned_high) = length_controlled(
        *([[-x for x in row] for row in rows] for rows in (wins, longer))
    )
    assert [turned, turned_low, turned_high] == pytest.approx([1 - rate, 1 - high, 1 - low])
    equal = [[0] * len(row) for row in longer]
    figures = contest(wins, equal)
    assert figures["win_rate_at_equal_length"] == pytest.approx(figures["win_rate"])
    # Samples of a prompt count as one: four copies of each case leave the interval as it was.
    copies = length_controlled([row * 4 for row in wins], [row * 4 for row in longer])
    assert copies[1] == pytest.approx([low, high], abs=0.01)
    assert length_controlled([[0.0], [0.0]], [[1], [2]]) == (None, None)
    assert length_controlled([[1.0], [2.0]], [[1], [2]]) == (1.0, None)
    assert contest([[1, 0], [-2, 3]], [[0, 0], [0, 0]]) | {"win_rate_at_equal_length_ci95": 0} == {
        "wins": 2, "ties": 1, "losses": 1, "win_rate": 2 / 3, "win_rate_ci95": win_interval([1, 1], [0, 1]),
        "win_rate_at_equal_length": pytest.approx(2 / 3), "win_rate_at_equal_length_ci95": 0,
    }  # fmt: skip


@pytest.fixture
def rules(tmp_path):
    """The longer answer is better."""
    path = tmp_path / "rules.py"
    path.write_text("def long(record, answer):\n    return len(answer)\n")
    return f"{path}:long"


def test_any_prompts_are_judged_by_a_scorer(folders, rules, tmp_path, capsys):
    """The figures are counted by hand from the answers that `eval.sample` draws with the same seed."""
    (tmp_path / "q.txt").write_text("Hi\nHow many apples?\nWhy?\n")
    same = ["--data", str(tmp_path / "q.txt"), "--max-new-tokens", "6", "--device", "cpu", "--samples", "2"]
    judge.main(["--model", folders[0], "--versus", folders[1], *same, "--scorer", rules,
                "--json", str(tmp_path / "judge.json")])  # fmt: skip
    figures = json.loads((tmp_path / "judge.json").read_text())
    sample.main(["--model", folders[0], "--against", folders[1], *same, "--out", str(tmp_path / "a.jsonl")])
    rows = [json.loads(line)["answers"] for line in (tmp_path / "a.jsonl").read_text("utf-8").splitlines()]
    signs = [np.sign(len(row[i]["text"]) - len(row[2 + i]["text"])) for row in rows for i in (0, 1)]
    assert [figures[name] for name in ("wins", "ties", "losses")] == [signs.count(x) for x in (1, 0, -1)]
    mean = np.mean([len(row[i]["text"]) for row in rows for i in (0, 1)])
    assert figures["mean_score"]["model"] == figures["mean_characters"]["model"] == pytest.approx(mean)
    assert figures["mean_tokens"]["versus"] == np.mean([row[i]["tokens"] for row in rows for i in (2, 3)])
    assert f"{figures['wins']} wins" in capsys.readouterr().out
    with pytest.raises(InputError, match="two ways to score: choose one"):
        judge.main(["--scorer", "judge", "--reward", "x"])


# ---- Another model as the reference


def test_a_run_may_have_another_reference(folders, ragged, tokenizer, tmp_path):
    """With a copy of the policy in its place the first loss is ln 2, and rounds forget the first model."""
    out = tmp_path / "run"
    flags = {"data": ragged, "eval_data": ragged, "out": out, "batch_size": 4, "lr": 1e-3, "max_steps": 1}
    same = command_line(model=folders[0], reference_model=folders[1], device="cpu", precision="fp32", **flags)
    train_dpo.main(same)
    first = next(row for row in metrics(out) if "eval_loss" in row)
    store = open_store(ragged, "preferences", tokenizer, 4096)
    models = load_model(folders[0]), load_model(folders[1])
    expected = evaluate(*models, store, ALONE, FP32, Objective(ObjectiveSettings(beta=0.1)))
    assert first["step"] == 0 and first["eval_loss"] == pytest.approx(expected["loss"], rel=1e-5)
    assert abs(first["eval_loss"] - np.log(2)) > 1e-3
    assert reference_of(str(out)) == folders[1]
    for more, reason in (
        ({"reference": "cached"}, "--reference cached is for a reference that is --model"),
        ({"loss": "simpo"}, "--reference-model: --loss simpo does not use a reference"),
    ):
        with pytest.raises(InputError, match=reason):
            train_dpo.main([*same, *command_line(out=tmp_path / "other", **more)])


# ---- Rounds


@pytest.fixture(scope="session")
def start(tmp_path_factory, tokenizer) -> str:
    """A model that ends one answer in a few tokens: its end token has the direction of a common state."""
    model = make_model(tokenizer.vocab_size, torch.float32, tie_word_embeddings=False)
    state = plain_hidden(model, tokenizer.prompt([Message("user", "How many apples?")])).mean(0)
    with torch.no_grad():
        model.lm_head.weight[tokenizer.end_id] = 3 * state / state.dot(state)
    return str(save_folder(tmp_path_factory.mktemp("ends") / "start", tokenizer, model))


@pytest.fixture(scope="module")
def flags(start, tmp_path_factory):
    """A function that returns the flags of two rounds into a folder, which is scored by length."""
    folder = tmp_path_factory.mktemp("rounds")
    (folder / "q.txt").write_text("".join(f"{i} apples?\n" for i in range(6)))
    (folder / "rules.py").write_text("def long(record, answer):\n    return len(answer)\n")

    def of(out, **changes) -> list[str]:
        numbers = {"rounds": 2, "samples": 6, "max_new_tokens": 24, "batch_size": 8, "lr": 1e-3}
        names = {"model": start, "prompts": folder / "q.txt", "scorer": f"{folder / 'rules.py'}:long"}
        return command_line(
            **{**names, **numbers, "device": "cpu", "precision": "fp32", "out": out, **changes}
        )

    return of


@pytest.fixture(scope="module")
def whole(flags, tmp_path_factory):
    """The folder of two rounds that nothing stopped."""
    out = tmp_path_factory.mktemp("whole")
    rounds.main(flags(out))
    return out


FILES = ("answers.jsonl", "scored.jsonl", "pairs.jsonl", "judge.json")


def test_stopped_rounds_go_on(flags, whole, tmp_path, monkeypatch):
    """Whatever part of the second round a kill hits, the files and weights are those of a run without it."""
    calls = []

    def stop(module, name):
        real = getattr(module, name)

        def stopping(*arguments):
            calls.append(name)
            if len(calls) == 2:
                raise KeyboardInterrupt
            return real(*arguments)

        monkeypatch.setattr(module, name, stopping)

    for module, name in ((rounds.sample, "answered"), (rounds, "pair"), (rounds, "judge")):
        calls[:] = ["first round"] if calls else []
        stop(module, name)
        with pytest.raises(KeyboardInterrupt):
            rounds.main(flags(tmp_path / "out"))
        monkeypatch.undo()
    rounds.main(flags(tmp_path / "out"))
    for number in (1, 2):
        one, other = (folder / f"round-{number}" for folder in (whole, tmp_path / "out"))
        assert all((one / name).read_bytes() == (other / name).read_bytes() for name in FILES)
        assert same_model(one / "dpo", other / "dpo")


def test_each_round_starts_from_the_last_policy(flags, start, tmp_path, capsys):
    """A second round from the first model would learn nothing new; the reference is the flag's."""
    same = {"reference": "first", "method": "gap", "gap": 1}
    rounds.main(flags(tmp_path, **same))
    runs = [json.loads((tmp_path / f"round-{n}/dpo/config.json").read_text())["settings"] for n in (1, 2)]
    assert [run["model"] for run in runs] == [start, str(tmp_path / "round-1/dpo")]
    assert [run["reference_model"] for run in runs] == ["", start]
    assert [run["seed"] for run in runs] == [1, 2]
    pairs = [json.loads(line) for line in (tmp_path / "round-2/pairs.jsonl").read_text("utf-8").splitlines()]
    assert all(row["score_chosen"] - row["score_rejected"] > 1 for row in pairs)
    assert all(row["score_chosen"] == len(row["chosen"]) for row in pairs)
    assert "policy against start, 6 prompts" in capsys.readouterr().out
    with pytest.raises(InputError, match="has rounds with another --lr: give another --out"):
        rounds.main(flags(tmp_path, **same, lr=1e-2))
    with pytest.raises(InputError, match="give --scorer or --reward"):
        rounds.main(flags(tmp_path, scorer=""))


def test_rounds_on_two_ranks(flags, whole, tmp_path):
    """The answers and pairs of the first round are those of one rank; the ranks agree about the rest."""
    result = forked("eval.rounds", *flags(tmp_path, rounds=1), ranks=2)
    assert result.returncode == 0, result.stderr
    for name in FILES[:3]:
        assert (tmp_path / "round-1" / name).read_bytes() == (whole / "round-1" / name).read_bytes()
    assert (tmp_path / "round-1/judge.json").exists()


@pytest.mark.slow
def test_the_experiment(start, tmp_path, monkeypatch, capsys):
    """Every arm begins at the same answers and KL 0, and its policies differ from round to round."""
    pytest.importorskip("matplotlib")
    few = {"three reward models": ("three", "rso", "black")}
    monkeypatch.setattr(experiment, "ARMS", few)
    monkeypatch.setattr("eval.scorers.judge", lambda record, answer: float(len(answer["text"])))
    experiment.main(["--quick", "--model", start, "--out", str(tmp_path), "--lr", "3e-3"])
    found = json.loads((tmp_path / "results.json").read_text())["runs"]
    assert len(found) == 2
    for run in found:
        assert set(run["arms"]) == {experiment.OFFLINE, *experiment.ARMS}
        for arm, rows in run["arms"].items():
            assert rows[0]["kl"] == rows[0]["one"] == 0 and len(rows) == (
                2 if arm == experiment.OFFLINE else 3
            )
            assert (abs(rows[1]["kl"]) > 0 and rows[1]["kl"] != rows[-1]["kl"]) or len(rows) == 2
        assert [kl for kl, _ in run["best of"]][:2] == [0, pytest.approx(np.log(2) - 0.5)]
        assert [points for _, points in run["best of"]] == sorted(points for _, points in run["best of"])
    printed = capsys.readouterr().out
    assert "| three reward models, round 2 |" in printed and "| best of 8 |" in printed
    assert (tmp_path / "rounds.png").read_bytes().startswith(b"\x89PNG")
