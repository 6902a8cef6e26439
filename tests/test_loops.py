"""The two training loops: what a window divides by, what stays frozen, what is saved."""

import copy
import math
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch

import losses
import train_dpo
import train_sft
from dataset.packing import Windows, build_stream
from dataset.store import open_store
from model.weights import load_model
from tests.loops import metrics, record_gradients, weights
from tests.ranks import forked
from tests.runs import assert_close, run_flags
from training import precision, setup
from training import reference as reference_module
from training.precision import Precision, automatic
from training.schedule import adamw, cosine_lr


@pytest.fixture
def start(tmp_path):
    """The folder of the model that the runs start from."""
    return tmp_path / "start"


@pytest.fixture
def flags(tmp_path, tokenizer):
    """The flags of a run on ten pairs or conversations, in windows of four."""
    return run_flags(tmp_path, tokenizer, shape={"hidden_size": 32}, overwrite=True)


@pytest.fixture
def dpo(flags, tmp_path):
    """Run train_dpo; return the run's folder."""

    def run(out="dpo", **changes):
        train_dpo.main(flags(tmp_path / out, **changes))
        return tmp_path / out

    return run


@pytest.fixture
def sft(flags, tmp_path):
    """Run train_sft for one epoch; return the run's folder."""

    def run(out="sft", **changes):
        train_sft.main(flags(tmp_path / out, "chats", **{"epochs": 1, **changes}))
        return tmp_path / out

    return run


# ---- windows: what the loss is divided by


@pytest.mark.parametrize("run, module", [("dpo", train_dpo), ("sft", train_sft)], ids=["dpo", "sft"])
@pytest.mark.parametrize("micro", [1, 130])
def test_accumulation_equals_one_big_batch(request, run, module, micro):
    """Dividing each micro-batch by its own size, instead of the window's, weighs short batches too much."""
    run = request.getfixturevalue(run)
    whole = record_gradients(module, lambda: run(batch_size=5, micro_batch_tokens=4096, lr=0))
    split = record_gradients(module, lambda: run(batch_size=5, micro_batch_tokens=micro, lr=0))
    assert_close(split, whole)


def test_last_short_window_is_a_step_of_its_own_size(dpo, start, tokenizer, tmp_path):
    """A tail of 2 pairs after windows of 4 is divided by 2, not by 4, and neither lost nor carried over."""
    steps = record_gradients(train_dpo, lambda: dpo(lr=0, log_every=1))
    assert len(steps) == 3
    assert [row["step"] for row in metrics(start.parent / "dpo")] == [1, 2, 3]

    model = load_model(start)
    store = open_store(tmp_path / "pairs", "preferences", tokenizer, 512)
    stream = build_stream(store, Windows(10, 4, seed=0)[2])
    chosen, rejected = stream.sum_by_side(model(stream))
    margins = (chosen - chosen.detach()) - (rejected - rejected.detach())
    assert len(margins) == 2
    losses.sigmoid(margins, beta=0.1).mean().backward()
    wanted = [p.grad for group in adamw(model, 0).param_groups for p in group["params"]]
    assert_close(steps[2:], [wanted])


@pytest.mark.parametrize(
    "script, data, lora_rank",
    [("train_dpo", "pairs", 0), ("train_sft", "chats", 0), ("train_dpo", "pairs", 2)],
    ids=["train_dpo-pairs", "train_sft-chats", "train_dpo-adapters"],
)
def test_two_ranks_equal_one_process(flags, tmp_path, script, data, lora_rank):
    """Ranks that divide by their own count, or exchange gradients of the wrong micro-batch, drift apart.

    Windows of 3 over 2 ranks are uneven, and the last window holds a single record: one rank has none.
    """
    uneven = {"batch_size": 3, "micro_batch_tokens": 1, "epochs": 2, "log_every": 1, "warmup_steps": 1}
    one, two = (flags(tmp_path / out, data, lora_rank=lora_rank, **uneven) for out in ("one", "two"))
    module = {"train_dpo": train_dpo, "train_sft": train_sft}[script]
    alone = record_gradients(module, lambda: module.main(one))
    result = forked("tests.loops", script, tmp_path / "two.pt", *two, ranks=2)
    assert result.returncode == 0, result.stderr
    assert_close(torch.load(tmp_path / "two.pt", weights_only=True), alone, tolerance=2e-4)
    for one, two in zip(metrics(tmp_path / "one"), metrics(tmp_path / "two"), strict=True):
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-4)
        assert two["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-3)


# ---- the reference


def test_reference_is_frozen_and_shares_nothing(dpo, monkeypatch):
    """An aliased reference keeps the loss at ln 2 for ever; a trained one moves the goal."""
    seen = {}

    def copying(model):
        seen["policy"], seen["reference"] = model, copy.deepcopy(model)
        seen["before"] = copy.deepcopy(seen["reference"].state_dict())
        return seen["reference"]

    def optimizing(model, weight_decay):
        seen["optimizer"] = adamw(model, weight_decay)
        return seen["optimizer"]

    monkeypatch.setattr(reference_module, "copy", SimpleNamespace(deepcopy=copying))
    monkeypatch.setattr(setup, "adamw", optimizing)
    dpo(out="frozen")
    policy, reference = dict(seen["policy"].named_parameters()), dict(seen["reference"].named_parameters())
    assert not {p.data_ptr() for p in policy.values()} & {p.data_ptr() for p in reference.values()}
    optimized = {id(p) for group in seen["optimizer"].param_groups for p in group["params"]}
    assert optimized == {id(p) for p in policy.values()}
    for name, parameter in reference.items():
        assert not parameter.requires_grad and parameter.grad is None
        assert torch.equal(parameter, seen["before"][name])
        assert not torch.equal(parameter, policy[name]), f"{name} was never trained"


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_loss_starts_at_ln_2_and_falls(precision, dpo):
    """The first step compares two equal models under one context: exactly ln 2, and every pair a tie."""
    rows = metrics(dpo(epochs=8, log_every=1, precision=precision))
    assert rows[0]["loss"] == pytest.approx(math.log(2), abs=1e-7)
    assert rows[0]["rewards/margins"] == 0 and rows[0]["rewards/accuracies"] == 0.5
    assert rows[0]["grad_norm"] > 0
    assert rows[-1]["loss"] < 0.6 and rows[-1]["rewards/margins"] > 0


def test_clipping_sees_the_true_gradient(dpo):
    """Clipped before it is unscaled, an fp16 gradient is cut far too early, and its norm is a lie."""
    scaled = metrics(dpo(out="fp16", precision="fp16", log_every=1, lr=0))
    plain = metrics(dpo(out="fp32", precision="fp32", log_every=1, lr=0))
    for one, two in zip(scaled, plain, strict=True):
        assert one["grad_norm"] == pytest.approx(two["grad_norm"], rel=0.05)


@pytest.mark.parametrize("multiplies", [True, False])
def test_auto_precision_knows_why(multiplies, monkeypatch):
    """T4 and V100 emulate bf16: torch says that they support it, and a run is slower than in float32."""

    def is_bf16_supported(including_emulation=True):
        return including_emulation or multiplies

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", is_bf16_supported)
    monkeypatch.setattr(precision, "cpu_multiplies_bf16", lambda: multiplies)
    no = "" if multiplies else "does not "
    many = "multiplies it" if multiplies else "multiply bf16"
    assert automatic(torch.device("cuda")) == ("bf16" if multiplies else "fp16", f"this GPU {no}{many}")
    made = Precision("auto", torch.device("cpu"))
    assert made.name == ("bf16" if multiplies else "fp32")
    assert made.reason == f"{made.name} (this CPU {no}{many})"
    assert Precision("fp32", torch.device("cpu")).reason == "fp32 (--precision)"
    assert automatic(torch.device("mps")) == ("fp32", "the default on mps")


# ---- learning rate, saving, logging


def test_learning_rate_is_its_closed_form(dpo):
    """One counter, optimizer steps, drives the learning rate: accumulation must not."""
    for micro in ("auto", 1):
        rows = metrics(dpo(epochs=4, log_every=1, warmup_steps=3, lr=1e-3, micro_batch_tokens=micro))
        assert len(rows) == 12
        for row in rows:
            step = row["step"] - 1
            cosine = 1e-3 * (1 + math.cos(math.pi * (step - 3) / 9)) / 2
            expected = (step + 1) / 3 * 1e-3 if step < 3 else cosine
            assert row["learning_rate"] == pytest.approx(expected, rel=1e-12)


def test_cosine_lr_edges():
    """Peak is the peak, nothing is above it, warm-up 0 divides by nothing, and past the end it stays down."""
    schedule = [cosine_lr(step, 100, 2.0, 10) for step in range(100)]
    assert max(schedule) == 2.0 == schedule[9] == schedule[10]
    assert all(a >= b for a, b in pairwise(schedule[10:]))
    assert schedule[0] == pytest.approx(0.2) and 0 < schedule[-1] < 0.01
    assert cosine_lr(0, 100, 2.0, 0) == 2.0
    assert cosine_lr(100, 100, 2.0, 10) == cosine_lr(150, 100, 2.0, 10) == pytest.approx(0, abs=1e-12)
    assert cosine_lr(5, 5, 1.0, 5) >= 0  # A run that is all warm-up.


def test_saved_weights_are_the_live_ones_bit_for_bit(dpo, monkeypatch):
    """Saving in half precision, or before the last short window's step, writes a model that never was."""
    seen = {}
    monkeypatch.setattr(setup, "load_model", lambda *a: seen.setdefault("model", load_model(*a)))
    saved = weights(dpo(epochs=2))
    live = seen["model"].state_dict()
    assert saved.keys() == live.keys()
    for name, value in live.items():
        assert saved[name].dtype == torch.float32 and torch.equal(saved[name], value)


def test_seed_changes_the_order_and_repeats_it(dpo):
    """A seed that never reaches the data order (or a global one that leaks in) makes runs unrepeatable."""
    runs = [metrics(dpo(out=f"seed{i}", seed=seed, log_every=1)) for i, seed in enumerate([3, 3, 4])]
    losses = [[row["grad_norm"] for row in rows] for rows in runs]
    assert losses[0] == losses[1] != losses[2]


def test_one_step_moves_nearly_every_weight(dpo, start):
    """Below float32's resolution norm gains cannot move up, and the model hardly trains."""
    before = weights(start)
    after = weights(dpo(epochs=1, lr=train_dpo.Settings.lr, warmup_steps=0, max_steps=1))
    used = after["embed_tokens.weight"].ne(before["embed_tokens.weight"]).any(dim=1)
    assert used.any()  # Rows of tokens that never occur meet the softmax, and move too.
    for name in before:
        assert after[name].ne(before[name]).float().mean() > 0.9, name


def test_held_out_figures_are_printed_as_they_come(dpo, capsys):
    """A user looked for them in metrics.jsonl after the run."""
    rows = metrics(dpo(epochs=2, eval_data=True, eval_every=3))
    evaluated = [row for row in rows if "eval_loss" in row]
    printed = [line for line in capsys.readouterr().out.splitlines() if "held-out" in line]
    assert printed == [
        f"step {row['step']} of 6: held-out loss {row['eval_loss']:.4f}, margin "
        f"{row['eval_rewards/margins']:.4f}, accuracy {row['eval_rewards/accuracies']:.4f}"
        for row in evaluated
    ]
    assert [row["step"] for row in evaluated] == [0, 3, 6]


def test_sft_evaluates_and_continues_from_a_folder(sft):
    """The held-out loss falls on text that was trained on; it is the mean over tokens, not over batches."""
    folder = sft(out="first", epochs=6, lr=3e-3, eval_data=True, eval_every=1, warmup_steps=0)
    losses = [row["eval_loss"] for row in metrics(folder) if "eval_loss" in row]
    assert losses[-1] < losses[0] - 0.5
    once = sft(out="second", model=folder, lr=0, batch_size=10, micro_batch_tokens=130, log_every=1)
    again = metrics(once)
    assert again[0]["loss"] == pytest.approx(losses[-1], rel=1e-5)
