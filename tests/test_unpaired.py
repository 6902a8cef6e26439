"""Unpaired feedback: single answers with a label, and KTO, whose z0 comes from answers to other prompts."""

import gzip
import json

import numpy as np
import pytest
import torch

import train_dpo
from dataset import inspect
from dataset.mismatched import mismatched, partners
from dataset.packing import build_stream, stream_lengths
from dataset.records import DataError, Feedback, read_feedback, read_preferences
from dataset.store import open_store
from errors import InputError
from eval import preference
from model.weights import load_model
from tests.conftest import RAGGED, as_record, make_model, plain_ids, plain_logits, save_folder, shared
from tests.loops import metrics, record_gradients
from tests.ranks import forked
from tests.runs import ALONE, FP32, assert_close, run_flags
from training.evaluate import evaluate
from training.objective import Objective, ObjectiveSettings, Pairs
from training.options import kto_advice
from training.settings import parse

LABELS = [True, False, False, True, True, False, True]
ROWS = [
    {"prompt": as_record(pair)["prompt"], "completion": pair[1], "label": label}
    for pair, label in zip(RAGGED, LABELS, strict=True)
]


@pytest.fixture
def path(write_jsonl):
    return write_jsonl("feedback.jsonl", ROWS)


@pytest.fixture
def stored(path, tokenizer):
    return open_store(path, "feedback", tokenizer, 512)


def logratio(model, reference, tokenizer, prompt, answer, longest=512) -> float:
    """log π(y|x) − log π_ref(y|x) of one sequence by itself, cut at so many tokens."""
    x, y = plain_ids(tokenizer, prompt, answer)
    y = y[: longest - len(x)]
    where = torch.arange(len(y)), torch.tensor(y)
    logits = (plain_logits(m, x + y)[len(x) - 1 : -1] for m in (model, reference))
    p, q = (each.log_softmax(-1)[where] for each in logits)
    return (p - q).sum().item()


# ---- Records


def test_feedback_is_read_from_its_formats_and_from_pairs(write_jsonl, ragged, path):
    for record, row, (prompt, *_) in zip(read_feedback(path), ROWS, RAGGED, strict=True):
        assert record == Feedback(tuple(prompt), row["completion"], row["label"], record.line)
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    (record,) = read_feedback(write_jsonl("messages.jsonl", [{"messages": turns, "label": False}]))
    assert (record.completion, record.label, record.replies) == ("b", False, (None, "b"))
    from_pairs = list(read_feedback(ragged))
    for place, pair in enumerate(read_preferences(ragged)):
        good, bad = from_pairs[2 * place : 2 * place + 2]
        assert (good.prompt, good.completion, good.label) == (pair.prompt, pair.chosen, True)
        assert (bad.prompt, bad.completion, bad.label) == (pair.prompt, pair.rejected, False)


@pytest.mark.parametrize("record, reason", [
    ({"prompt": "a", "completion": "b", "label": 1}, "label is true .desirable. or false"),
    ({"prompt": "a", "response": "b"}, "found conversations without a rejected side"),
])  # fmt: skip
def test_other_records_are_refused(write_jsonl, record, reason):
    with pytest.raises(DataError, match=reason):
        list(read_feedback(write_jsonl("other.jsonl", [record])))


def test_a_row_has_one_side(stored, tokenizer, path, capsys):
    for row, ((prompt, answer, _), label) in enumerate(zip(RAGGED, LABELS, strict=True)):
        x, y = plain_ids(tokenizer, prompt, answer)
        sides = [y, []] if label else [[], y]
        assert [ids.tolist() for ids, _ in stored.row(row)] == [x, *sides]
    tokenizer.save(path.parent / "tokenizer")
    assert inspect.main([str(path), "--tokenizer", str(path.parent / "tokenizer" / "tokenizer.json")]) == 0
    assert "4 desirable answers, 3 undesirable ones" in capsys.readouterr().out


# ---- Mismatched answers


def test_partners_have_another_prompt():
    """The next row of the file, in a circle; rows of equal prompts are passed over, and all are used."""
    assert partners(np.array([5, 3, 4])).tolist() == [1, 2, 0]
    assert partners(np.array([1, 1, 2, 2, 2, 3])).tolist() == [2, 3, 5, 5, 5, 0]
    assert partners(np.array([1, 2, 2, 1, 1])).tolist() == [1, 3, 4, 1, 2]
    for length in range(2, 12):
        digests = np.random.default_rng(length).integers(0, 3, length)
        digests[0] = 7
        assert (digests[partners(digests)] != digests).all()
    with pytest.raises(InputError, match="at least two prompts"):
        partners(np.array([4, 4, 4]))


@pytest.mark.parametrize("layout", ["forked", "twin"])
def test_z0_is_the_mean_over_mismatched_answers(layout, stored, tokenizer):
    """Of a window of four rows, by single sequences; a long answer behind a long prompt is cut."""
    model, reference = (make_model(tokenizer.vocab_size, seed=seed) for seed in (1, 2))
    rows, other = np.array([5, 0, 3, 6]), mismatched(stored)
    assert len(build_stream(other, rows, layout).tokens) == stream_lengths(other, layout)[rows].sum()
    longest = int(stored.lengths.max())
    answers = [RAGGED[(row + 1) % 7][1] for row in rows]
    ratios = [
        logratio(model, reference, tokenizer, RAGGED[row][0], answer, longest)
        for row, answer in zip(rows, answers, strict=True)
    ]
    for sign in (1, -1):
        made = Objective(ObjectiveSettings(loss="kto", beta=0.3))
        models = (model, reference)[::sign]
        made.before_step(*models, stored, rows, ALONE, FP32, layout, 10_000)
        expected = 0.3 * sign * sum(ratios) / 4
        assert made.z0.item() == pytest.approx(max(0, expected), rel=1e-6) and not made.z0.requires_grad
    assert abs(expected) > 0.01
    assert (other.lengths <= longest).all() and (stored.lengths[other.partners] > other.lengths).any()


def test_the_loss_and_its_slopes_by_hand(stored, tokenizer):
    """One answer of each label, from the tokens to the slope: z0 gets no gradient."""
    model, reference = (make_model(tokenizer.vocab_size, seed=seed) for seed in (1, 2))
    made = Objective(ObjectiveSettings(loss="kto", beta=0.3, desirable_weight=1.5, undesirable_weight=0.5))
    made.before_step(model, reference, stored, np.arange(7), ALONE, FP32, "forked", 10_000)
    made.z0 = made.z0 + 0.2
    stream = build_stream(stored, [0, 1])
    logps = model(stream)
    losses = made(Pairs.of(stream, logps, reference(stream).detach()))
    slopes = stream.sum_by_response(torch.autograd.grad(losses.sum(), logps)[0]) / stream.lengths()
    z0 = made.z0.item()
    for row, weight, sign in ((0, 1.5, 1), (1, 0.5, -1)):
        reward = 0.3 * logratio(model, reference, tokenizer, RAGGED[row][0], RAGGED[row][1])
        p = 1 / (1 + np.exp(-sign * (reward - z0)))
        assert losses[row].item() == pytest.approx(weight * (1 - p), rel=1e-6)
        mine = slopes[2 * row + (sign < 0)].item()
        assert mine == pytest.approx(-sign * weight * 0.3 * p * (1 - p), rel=1e-6)


# ---- Training


@pytest.fixture
def run_kto(tmp_path, tokenizer, path):
    made = run_flags(
        tmp_path, tokenizer, shape={"spread": 0.1}, epochs=3, log_every=1, eval_every=1, overwrite=True,
        loss="kto", sample_prompts=0, lr=1e-2,
    )  # fmt: skip

    def run(out="out", command=train_dpo.main, eval_data=True, data=path, **flags):
        command(made(tmp_path / out, eval_data=eval_data, data=data, **flags))
        return tmp_path / out

    return run


def test_a_run_raises_desirable_answers(run_kto, capsys):
    """The loss starts at a half; rewards are means over the answers of each label, z0 is logged."""
    folder = run_kto(batch_size=7, epochs=12)
    rows = metrics(folder)
    assert rows[0]["eval_loss"] == rows[1]["loss"] == 0.5 and rows[1]["z0"] == 0
    last = rows[-1]
    assert last["eval_loss"] < 0.45 and last["eval_rewards/accuracies"] > 0.8
    assert last["eval_rewards/chosen"] > 0.02 and last["eval_rewards/rejected"] < -0.02
    signed = (4 * last["eval_rewards/chosen"] - 3 * last["eval_rewards/rejected"]) / 7
    assert last["eval_rewards/margins"] == pytest.approx(signed, rel=1e-4)
    assert any(row.get("z0", 0) > 0 or row.get("eval_z0", 0) > 0 for row in rows)
    flags = ["--model", str(folder), "--device", "cpu", "--precision", "fp32"]
    measured = preference.measure(parse(preference.Settings, "", flags), ALONE)
    assert measured["loss"] == pytest.approx(last["eval_loss"], rel=1e-5)
    assert measured["rewards/chosen"] == pytest.approx(last["eval_rewards/chosen"], rel=1e-5)
    assert "warning" not in capsys.readouterr().out.split("held-out")[0]  # 4 to 3 is 4/3


def test_pairs_are_two_answers_each(run_kto, ragged):
    row = next(row for row in metrics(run_kto(data=ragged, batch_size=14)) if "loss" in row)
    assert row["loss"] == 0.5 and row["rewards/chosen"] == row["rewards/rejected"] == 0


SPLITS = {
    "twin": {"layout": "twin"},
    "split": {"micro_batch_tokens": 60},
    "cached": {"reference": "cached"},
    "lora": {"lora_rank": 4, "reference": "cached"},
}


@pytest.mark.parametrize("name", SPLITS)
def test_gradients_do_not_depend_on_how_they_are_computed(name, run_kto):
    """z0 is a mean over the window. Over a micro-batch it would change with --micro-batch-tokens."""
    plain = {"lora_rank": SPLITS[name].get("lora_rank", 0)}
    plain |= {"eval_data": "", "batch_size": 7, "epochs": 5, "lr": 5e-2}
    whole = record_gradients(train_dpo, lambda: run_kto("whole", **plain))
    other = record_gradients(train_dpo, lambda: run_kto("other", **{**plain, **SPLITS[name]}))
    z0 = [row["z0"] for row in metrics(run_kto("again", **plain))]
    assert len(whole) == len(other) == 5 and max(z0) > 1e-3
    assert_close(other, whole, 2e-3)


def test_two_ranks_equal_one_process(run_kto, tmp_path):
    """z0 is a mean over both ranks, of which one may have no rows in a micro-batch."""
    flags = {"eval_data": "", "micro_batch_tokens": 1, "batch_size": 7, "epochs": 4, "lr": 5e-2}
    alone = record_gradients(train_dpo, lambda: run_kto("one", **flags))

    def on_two_ranks(arguments):
        result = forked("tests.loops", "train_dpo", tmp_path / "two.pt", *arguments, ranks=2)
        assert result.returncode == 0, result.stderr

    run_kto("two", on_two_ranks, **flags)
    assert_close(torch.load(tmp_path / "two.pt", weights_only=True), alone, 2e-3)


def test_evaluation_does_not_depend_on_its_batches(stored, tokenizer):
    model, reference = (make_model(tokenizer.vocab_size, seed=seed) for seed in (1, 2))
    made = Objective(ObjectiveSettings(loss="kto"))
    whole, *others = (
        evaluate(model, reference, stored, ALONE, FP32, made, max_tokens=size) for size in (2000, 1, 60)
    )
    for other in others:
        assert other == pytest.approx(whole, rel=1e-5, abs=1e-6)
    ratios = [logratio(model, reference, tokenizer, pair[0], pair[1]) for pair in RAGGED]
    good = [ratio for ratio, label in zip(ratios, LABELS, strict=True) if label]
    assert whole["logratios/chosen"] == pytest.approx(sum(good) / 4, rel=1e-5)


# ---- Options and advice


@pytest.mark.parametrize("options, reason", [
    (dict(loss="kto,sft"), "--loss kto,sft: kto trains on single answers"),
    (dict(wpo=True), "--wpo changes pairs, but --loss kto trains on feedback"),
    (dict(ld_alpha=0.5), "--ld-alpha changes pairs, but --loss kto"),
    (dict(desirable_weight=0.0), "--desirable-weight must be above 0"),
    (dict(loss="kto_pair", undesirable_weight=1.0), "--undesirable-weight has no effect on --loss kto_pair"),
])  # fmt: skip
def test_what_makes_no_sense_is_refused(options, reason):
    with pytest.raises(InputError, match=reason):
        Objective(ObjectiveSettings(**{"loss": "kto", **options}))
    with pytest.raises(InputError, match="needs a --batch-size of at least 2"):
        Objective(train_dpo.Settings(loss="kto", batch_size=1))


def test_advice_about_the_weights():
    """λ_D n_D / (λ_U n_U) from 1 to 4/3; the weight that is named gives 7/6."""
    for counts in ((100, 100), (4, 3), (120, 100)):
        assert kto_advice(*counts, {}) == ""
    assert "--desirable-weight 2.33 would give 1.17" in kto_advice(50, 100, {})
    assert "ratio is 2.00" in kto_advice(100, 50, {})
    assert "--undesirable-weight 1.71" in kto_advice(100, 50, {})
    assert kto_advice(50, 100, {"desirable_weight": 2.33}) == ""
    assert kto_advice(100, 50, {"undesirable_weight": 1.71}) == ""
    assert "one is missing" in kto_advice(0, 3, {}) and "one is missing" in kto_advice(3, 0, {})


# ---- Real data


def test_real_feedback_trains(tmp_path, real_tokenizer, capsys):
    """Solutions of GSM8K with their verdicts, several for one question, made into unpaired feedback."""
    lines = gzip.decompress(shared("preferences/gsm8k_example_model_solutions.jsonl.gz").read_bytes())
    rows = []
    for line in lines.decode().splitlines()[:40]:
        record = json.loads(line)
        graded = [value for value in record.values() if isinstance(value, dict) and "is_correct" in value]
        answers = [{"completion": x["solution"], "label": x["is_correct"]} for x in graded]
        rows += [{"prompt": record["question"], **answer} for answer in answers]
    (tmp_path / "graded.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    store = open_store(tmp_path / "graded.jsonl", "feedback", real_tokenizer, 512)
    other = mismatched(store)
    assert store.report.total() == len(rows) and len(store) > 100
    assert (store.digests[other.partners] != store.digests).all()
    assert len({*other.partners.tolist()}) > len(store) / 2
    save_folder(tmp_path / "start", real_tokenizer)
    train_dpo.main([
        "--model", str(tmp_path / "start"), "--data", str(tmp_path / "graded.jsonl"), "--eval-share", "0.1",
        "--out", str(tmp_path / "out"), "--loss", "kto", "--max-steps", "2", "--sample-prompts", "0",
        "--device", "cpu", "--precision", "fp32", "--optimizer", "adamw",
    ])  # fmt: skip
    assert "-weight" in capsys.readouterr().out
    first = next(row for row in metrics(tmp_path / "out") if "loss" in row)
    assert first["step"] == 2 and 0.4 < first["loss"] < 0.6
    assert load_model(tmp_path / "out")
