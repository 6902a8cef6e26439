"""From prompts alone to pairs: the prompts of any file, sampled answers, their scores, and pairs of them."""

import json
import math
from argparse import Namespace
from collections import Counter

import numpy as np
import pytest
import torch.nn.functional as F

from dataset import pair
from dataset.formats import PREFERENCE_FORMATS, SFT_FORMATS
from dataset.jsonl import DataError
from dataset.prompts import read_prompts
from dataset.records import read_preferences
from errors import InputError
from eval import sample, score, scorers
from model.reward import RewardModel
from model.weights import load_model
from tests.conftest import RAGGED, as_record, plain_hidden, plain_ids, save_folder
from tests.ranks import forked
from tests.runs import ALONE
from tests.test_reward import make_reward_model

# ---- The prompts of any file


ALONE_FORMS = [
    {"prompt": "2 + 2?"}, {"prompt": [{"role": "user", "content": "2 + 2?"}]}, {"question": "2 + 2?"},
    {"messages": [{"role": "user", "content": "2 + 2?"}]}, {"instruction": "Add.", "input": "2 + 2"},
]  # fmt: skip


@pytest.mark.parametrize("record, reply", [
    *((form.example, None) for form in PREFERENCE_FORMATS.values()),
    *((form.example, "4") for form in SFT_FORMATS.values()),
    *((record, None) for record in ALONE_FORMS),
    ({"prompt": "2 + 2?", "completion": "5", "label": False}, "5"),
])  # fmt: skip
def test_every_format_has_its_prompt(record, reply, write_jsonl):
    """An answer that stays in the prompt is repeated by the model; a rule of the data must stay."""
    (found,) = read_prompts(write_jsonl("data.jsonl", [{**record, "judge": {"task": "sum"}}]))
    assert found["prompt"][-1]["role"] == "user" and "2 + 2" in found["prompt"][-1]["content"]
    assert found["judge"] == {"task": "sum"} and set(found) <= {"prompt", "reply", "judge"}
    assert found.get("reply") == reply


def test_a_text_file_has_a_prompt_a_line(tmp_path, write_jsonl):
    path = tmp_path / "questions.txt"
    path.write_text("\ufeffOne?\n\n  Two?\r\n\u2028", encoding="utf-8")
    assert [record["prompt"] for record in read_prompts(path)] == [
        [{"role": "user", "content": "One?"}], [{"role": "user", "content": "Two?"}]
    ]  # fmt: skip
    path.write_text(" \n")
    with pytest.raises(InputError, match="the file has no prompt"):
        read_prompts(path)
    for rows, reason in (
        ([{"prompt": "1"}, {"text": "2"}], "data.jsonl:2: found .*expected a prompt in one of the keys"),
        ([{"messages": [{"role": "assistant", "content": "1"}]}], "data.jsonl:1: messages: the last turn"),
        ([{"prompt": "1"}, 2], "data.jsonl:2: expected an object, found a number"),
    ):
        with pytest.raises(DataError, match=reason):
            read_prompts(write_jsonl("data.jsonl", rows))


# ---- Sampled answers


def run_sample(folder, source, out, *more) -> bytes:
    flags = ["--model", folder, "--data", str(source), "--out", str(out), "--device", "cpu", "--samples", "3"]
    sample.main([*flags, "--max-new-tokens", "5", *map(str, more)])
    assert not list(out.parent.glob("*.part"))
    return out.read_bytes()


def test_an_answer_depends_on_seed_and_place_alone(folders, ragged, tmp_path):
    """Another batch size, fewer prompts, or two ranks: the same answers, byte for byte."""
    whole = run_sample(folders[0], ragged, tmp_path / "a.jsonl")
    rows = [json.loads(line) for line in whole.splitlines()]
    assert len(rows) == len(RAGGED) and {len(row["answers"]) for row in rows} == {3}
    assert len({answer["text"] for row in rows for answer in row["answers"]}) > len(RAGGED)
    assert run_sample(folders[0], ragged, tmp_path / "b.jsonl", "--batch-size", 1) == whole
    few = run_sample(folders[0], ragged, tmp_path / "c.jsonl", "--prompts", 2)
    assert whole.startswith(few) and len(few.splitlines()) == 2
    assert run_sample(folders[0], ragged, tmp_path / "d.jsonl", "--seed", 1) != whole
    flags = ["--model", folders[0], "--data", ragged, "--out", tmp_path / "e.jsonl", "--device", "cpu"]
    flags += ["--samples", 3, "--max-new-tokens", 5, "--batch-size", 3]
    result = forked("eval.sample", *flags, ranks=2)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "e.jsonl").read_bytes() == whole


@pytest.mark.parametrize("after", [0, 1, 2])
def test_a_stopped_run_goes_on(after, folders, ragged, tmp_path, monkeypatch, capsys):
    """Without the cut a torn line breaks the file; with another seed the answers of two runs would mix."""
    whole = run_sample(folders[0], ragged, tmp_path / "whole.jsonl", "--batch-size", 6)
    out, calls, real = tmp_path / "out.jsonl", [], sample.answered

    def stopping(*arguments):
        if len(calls) == after:
            raise KeyboardInterrupt
        calls.append(arguments)
        return real(*arguments)

    monkeypatch.setattr(sample, "answered", stopping)
    with pytest.raises(KeyboardInterrupt):
        run_sample(folders[0], ragged, out, "--batch-size", 6)
    part = tmp_path / "out.jsonl.0.part"
    assert not out.exists() and len(part.read_bytes().splitlines()) == 1 + 2 * after
    with open(part, "ab") as file:
        file.write(b'{"place": 6, "rec')
    with pytest.raises(InputError, match=r"out\.jsonl\.0\.part was written with other seed: remove it"):
        run_sample(folders[0], ragged, out, "--batch-size", 6, "--seed", 7)
    answered = []
    monkeypatch.setattr(sample, "answered", lambda *given: answered.append(given[2]) or real(*given))
    assert run_sample(folders[0], ragged, out, "--batch-size", 6) == whole
    assert len(answered) == 4 - after
    with pytest.raises(InputError, match=r"out\.jsonl is there already"):
        run_sample(folders[0], ragged, out)


def test_answers_are_printed_without_a_file(folders, tmp_path, capsys):
    path = tmp_path / "q.txt"
    path.write_text("Hi\nHow many?\n")
    flags = ["--data", str(path), "--device", "cpu", "--max-new-tokens", "4"]
    sample.main(["--model", folders[0], *flags, "--samples", "1", "--temperature", "0"])
    printed = capsys.readouterr().out
    assert printed.startswith("> Hi\n") and "\n\n> How many?\n" in printed
    sample.main(
        ["--model", folders[0], "--against", folders[1], *flags, "--samples", "1", "--temperature", "0"]
    )
    both = capsys.readouterr().out.splitlines()
    assert (
        both[0] == "> Hi" and both[1].startswith(f"{folders[0]}: ") and both[2].startswith(f"{folders[1]}: ")
    )
    assert both[1].removeprefix(f"{folders[0]}: ") == printed.splitlines()[1]
    with pytest.raises(InputError, match="--samples must be 1 with --temperature 0, not 8"):
        sample.main([*flags, "--temperature", "0"])


# ---- Scores


ANSWERS = [
    {"prompt": as_record(one)["prompt"], "answers": [{"text": text} for text in texts]}
    for one, texts in zip(RAGGED, (["7", "Two"], ["!"], ["7", "long " * 90, "不"]), strict=False)
]


@pytest.fixture
def reward_folders(tmp_path, tokenizer):
    models = [make_reward_model(tokenizer.vocab_size, seed=seed).float() for seed in (1, 2)]
    return [str(save_folder(tmp_path / f"reward{i}", tokenizer, model)) for i, model in enumerate(models)]


def test_reward_models_score_every_answer(reward_folders, tokenizer, write_jsonl, tmp_path):
    """A score that lands on a neighbour's answer makes pairs of noise. Mean − k·std is by hand."""
    source, out = write_jsonl("answers.jsonl", ANSWERS), tmp_path / "scored.jsonl"
    flags = ["--data", str(source), "--out", str(out), "--device", "cpu", "--precision", "fp32"]
    score.main([*flags, "--model", ",".join(reward_folders), "--max-length", "120", "--pessimism", "0.5"])
    rows = [json.loads(line) for line in out.read_text("utf-8").splitlines()]
    models = [load_model(folder, model_class=RewardModel) for folder in reward_folders]
    for row, (prompt, *_) in zip(rows, RAGGED, strict=False):
        for answer in row["answers"]:
            x, y = plain_ids(tokenizer, prompt, answer["text"])
            rewards = [F.linear(plain_hidden(m, x + y)[-1], m.score.weight).item() for m in models]
            expected = np.mean(rewards) - 0.5 * np.std(rewards) if len(x + y) <= 120 else None
            assert answer["score"] == (expected if expected is None else pytest.approx(expected, abs=1e-5))
    assert rows[2]["answers"][1]["score"] is None
    flags = ["eval.score", *flags, "--model", ",".join(reward_folders), "--max-length", "120"]
    alone = scorers.make_scorer("", ",".join(reward_folders), 0, ALONE, "fp32", 120)(ANSWERS)
    result = forked(*flags, ranks=2)
    assert result.returncode == 0, result.stderr
    rows = [json.loads(line) for line in out.read_text("utf-8").splitlines()]
    for row, expected in zip(rows, alone, strict=True):
        values = [None if v is None else pytest.approx(v, abs=1e-5) for v in expected]
        assert [answer["score"] for answer in row["answers"]] == values


@pytest.fixture
def rules(tmp_path):
    path = tmp_path / "rules.py"
    path.write_text(
        "def length(record, answer):\n    return len(answer) + 100 * len(record['prompt'])\n"
        "def yes(record, answer):\n    return 'e' in answer\n"
        "def bad(record, answer):\n    return float('nan')\n"
    )
    return path


def test_a_function_scores_answers_and_pairs(rules, ragged, write_jsonl, tmp_path, capsys):
    out = tmp_path / "out.jsonl"
    score.main(
        ["--scorer", f"{rules}:length", "--data", str(write_jsonl("a.jsonl", ANSWERS)), "--out", str(out)]
    )
    rows = [json.loads(line) for line in out.read_text("utf-8").splitlines()]
    assert [a["score"] for a in rows[0]["answers"]] == [101, 103] and rows[1]["answers"][0]["score"] == 101
    assert "6 answers to 3 prompts" in capsys.readouterr().err
    score.main(["--scorer", f"{rules}:yes", "--data", str(ragged), "--out", str(out)])
    found = [record.scores for record in read_preferences(out)]
    assert found == [(float("e" in chosen), float("e" in rejected)) for _, chosen, rejected in RAGGED]
    for name, reason in (
        (f"{rules}:bad", "expected a finite number, found nan"), (f"{rules}:no", "has no function no"),
        ("gone.py:f", "there is no file gone.py"), ("rules", "expected judge, or file.py:function"),
        ("judge", "no `judge` field"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=reason):
            score.main(["--scorer", name, "--data", str(ragged), "--out", str(out)])


# ---- Pairs


def settings_of(**changes) -> Namespace:
    defaults = dict(method="best_worst", gap=0.0, beta=1.0, accept=2, max_tokens=0, seed=0)
    return Namespace(**{**defaults, **changes})


def record_of(*scores, texts=None, **more) -> dict:
    texts = texts or [f"answer {i}" for i in range(len(scores))]
    answers = [{"text": text, "score": value} for text, value in zip(texts, scores, strict=True)]
    return {"prompt": [{"role": "user", "content": "x"}], "answers": answers, **more}


@pytest.mark.parametrize("method, gap, expected", [
    ("best_worst", 0, [(3, 1)]), ("best_worst", 2.5, []),
    ("gap", 0, [(2, 1), (3, 1), (3, 2), (3, 2), (2, 1)]), ("gap", 1.5, [(3, 1)]),
])  # fmt: skip
def test_pairs_are_those_of_the_method(method, gap, expected):
    """Scores 2, 3, 1, 2: every pair has the higher score first, and keeps both."""
    made, _ = pair.make_records([record_of(2, 3, 1, 2, judge={})], settings_of(method=method, gap=gap))
    assert sorted((r["score_chosen"], r["score_rejected"]) for r in made) == sorted(expected)
    names = {f"answer {i}": value for i, value in enumerate((2, 3, 1, 2))}
    for r in made:
        assert (names[r["chosen"]], names[r["rejected"]]) == (r["score_chosen"], r["score_rejected"])
        assert r["prompt"] == [{"role": "user", "content": "x"}] and r["judge"] == {} and "answers" not in r


def test_a_ranking_has_the_best_first_and_no_ties():
    (made,), counts = pair.make_records(
        [record_of(2, 3, 1, 2), record_of(1, 1)], settings_of(method="ranked")
    )
    assert made["ranked"] == ["answer 1", "answer 0", "answer 2"] and made["scores"] == [3, 2, 1]
    assert counts == {"within the gap": 2, "prompt without a pair": 1}


def test_what_cannot_be_a_pair_is_dropped_and_counted(write_jsonl, tmp_path, capsys):
    """An unfinished answer as chosen teaches to never end."""
    record = record_of(5, 4, 3, None, 0, 0, 2, texts=["torn", "long", "good", "?", "bad", "bad", " "])
    record["answers"][0]["finished"], record["answers"][1]["tokens"] = False, 9
    rows = [record, record_of(1, 1)]
    path, out = write_jsonl("scored.jsonl", rows), tmp_path / "pairs.jsonl"
    pair.main([str(path), "--out", str(out), "--max-tokens", "8"])
    (found,) = read_preferences(out)
    assert (found.chosen, found.rejected, found.scores) == ("good", "bad", (3.0, 0.0))
    printed = capsys.readouterr().out
    for part in ("1 pairs of 2 prompts", "1 × unfinished", "1 × too long", "1 × without a score", "1 × empty",
                 "1 × duplicate", "1 × pair within the gap", "1 × prompt without a pair"):  # fmt: skip
        assert part in printed
    for rows, reason in (
        ([record_of(None, None)], "no answer has a score: run python -m eval.score"),
        ([record_of(1, 1)], "no pair is left; dropped: 1 × pair within the gap"),
        ([{"prompt": "x", "answers": []}], "scored.jsonl:1: expected a record of eval.sample"),
        ([record_of("1")], "score: expected a number or null"),
    ):
        with pytest.raises(InputError, match=reason):
            pair.main([str(write_jsonl("scored.jsonl", rows)), "--out", str(out)])


# ---- Statistical rejection sampling


def chi_square(counts, probabilities) -> float:
    expected = sum(counts) * np.asarray(probabilities)
    return float((((np.asarray(counts) - expected) ** 2) / expected).sum())


def test_accepted_answers_follow_the_tilted_distribution():
    """π·e^{r/β} / Z on four answers, from candidates that are drawn from π. 99.9 % of χ²₃ is 16.27."""
    draw, beta = np.random.default_rng(0), 1.5
    policy, rewards = np.array([0.5, 0.3, 0.15, 0.05]), np.array([0.0, 1.0, 2.0, 3.0])
    tilted = policy * np.exp(rewards / beta)
    tilted /= tilted.sum()
    counts = np.zeros(4)
    for _ in range(3000):
        candidates = draw.choice(4, size=300, p=policy)
        (first,) = pair.rejection_sample(rewards[candidates].tolist(), 1, beta, draw)
        counts[candidates[first]] += 1
    assert chi_square(counts, tilted) < 16.27
    assert chi_square(counts, policy) > 100


def test_acceptance_without_replacement_is_exact():
    """(first, second) of three candidates: softmax(r/β) of those that are left. 99.9 % of χ²₅ is 20.5."""
    rewards, beta, draw = [0.0, 1.0, 2.5], 1.0, np.random.default_rng(1)
    weights = np.exp(np.array(rewards) / beta)
    orders = [(i, j) for i in range(3) for j in range(3) if i != j]
    exact = [weights[i] / weights.sum() * weights[j] / (weights.sum() - weights[i]) for i, j in orders]
    assert math.isclose(sum(exact), 1)
    found = Counter(tuple(pair.rejection_sample(rewards, 2, beta, draw)) for _ in range(6000))
    assert chi_square([found[order] for order in orders], exact) < 20.5


def test_a_repeated_answer_weighs_as_often_as_it_was_drawn():
    """Nine times "a" and once "b": without the repetitions every pair would be (a, b), not one of five."""
    record = record_of(*[1] * 9, 0, texts=["a"] * 9 + ["b"])
    made, counts = pair.make_records([record] * 1000, settings_of(method="rso", beta=1e6))
    assert 150 < len(made) < 250 and counts["pair within the gap"] == 1000 - len(made)
    assert {(r["chosen"], r["rejected"]) for r in made} == {("a", "b")}
