"""Warnings: each is provoked by a run that deserves it, and healthy runs give none."""

import json
import math
import re

import pytest
import torch

import train_dpo
import train_sft
from dataset.tokenizer import ChatTokenizer
from model.config import ModelConfig
from model.transformer import Transformer
from tests.conftest import save_folder, shared
from tests.loops import metrics
from tests.runs import command_line, stopped
from training.settings import SAMPLE
from training.warnings import Watch, exploding, falling, longer, repeated, repeating, still

# ---- Runs that deserve a warning

PROMPTS = ["Hi", "Hello", "How many?", "1 2 3", "123", "Please answer", "Thank you", "apples"]
SHORT, LOOP = "Two apples.", "123 456 " * 12
LONG = "The answer is short. Two apples are left. Thank you, the answer is 123 456. Please answer again."
COMMON = {"device": "cpu", "precision": "fp32"}


@pytest.fixture(scope="module")
def taught(tmp_path_factory, tokenizer):
    """A folder with a tiny model that gives a short answer, and two others half as often; and pairs."""
    folder = tmp_path_factory.mktemp("taught")

    def write(name: str, records: list[dict]):
        (folder / name).write_text("".join(json.dumps(record) + "\n" for record in records))
        return folder / name

    save_folder(folder / "new", tokenizer, hidden_size=32, spread=0.02)
    answers = SHORT, SHORT, LONG, LOOP
    chats = [{"prompt": prompt, "response": answer} for prompt in PROMPTS for answer in answers]
    for name, chosen in (("long", LONG), ("loop", LOOP)):
        pairs = [{"prompt": prompt, "chosen": chosen, "rejected": SHORT} for prompt in PROMPTS]
        write(f"{name}.jsonl", pairs)
    flags = {"model": folder / "new", "data": write("chats.jsonl", chats), "out": folder / "sft"}
    rates = {"epochs": 50, "batch_size": 16, "lr": 0.01, "warmup_steps": 5}
    train_sft.main(command_line(**flags, **rates, **COMMON))
    return folder


@pytest.fixture
def flags_of(taught):
    def flags_of(pairs="long", **flags) -> list[str]:
        data = taught / f"{pairs}.jsonl"
        always = {"model": taught / "sft", "data": data, "eval_data": data, "batch_size": 8, "log_every": 5}
        return command_line(**{**always, "warmup_steps": 2, **COMMON, **flags})

    return flags_of


@pytest.fixture
def warned(flags_of, tmp_path, capsys):
    """Run train_dpo with these flags; return its warnings."""

    def run(**flags) -> list[str]:
        capsys.readouterr()
        train_dpo.main(flags_of(out=tmp_path / "run", **flags))
        return warnings_in(capsys.readouterr().out)

    return run


def warnings_in(printed: str) -> list[str]:
    return [line.removeprefix("warning: ") for line in printed.splitlines() if line.startswith("warning: ")]


@pytest.mark.parametrize(
    "flags, wanted",
    [
        ({"lr": 1e-9}, r"the gradient norm is [\d.]+, so the steps are too small; raise --lr \(1\.0e-09\)"),
        (
            {"beta": 1e-13},
            "the gradient norm is .*e-.*, too small for AdamW; raise --beta, or look for pairs",
        ),
        ({"beta": 1e-7}, r"a margin of .* nats hardly changes it, so beta is too small; raise --beta"),
        ({"tr_every": 1}, "all log-ratios are exactly 0, so the reference is the policy itself"),
        ({}, "all log-ratios are exactly 0, so the reference is the policy itself"),
    ],
    ids=["lr", "gradient", "beta", "reference-follows", "reference-aliased"],
)
def test_a_loss_that_stays_at_ln_2(flags, wanted, warned, monkeypatch):
    """Five causes with one curve; the gradient norm and the log-ratios tell them apart."""
    if not flags:
        monkeypatch.setattr(train_dpo, "make_reference", lambda settings, objective, model, world: model)
    found = warned(**flags, max_steps=50, eval_every=50, sample_prompts=0)
    start = r"after 50 steps the loss is still 0\.6931, as at the start: "
    assert len(found) == 1 and re.match(f"{start}.*{wanted}", found[0]), found


def test_chosen_answers_that_fall(warned):
    """At this learning rate the accuracy and the loss look good, and both sides become impossible."""
    found = warned(lr=2e-2, max_steps=20, eval_every=20, sample_prompts=0)
    falls = [
        line for line in found if re.search(r"of chosen (held-out )?answers fell from -\d to -\d\d", line)
    ]
    assert len(falls) == 1 and "--loss dpop" in falls[0], found


def test_margins_that_explode(warned, tmp_path):
    """All pairs are won at the first evaluation, and the margins grow without end."""
    found = warned(lr=5e-3, beta=1, max_steps=30, eval_every=2, sample_prompts=0)
    rows = [row for row in metrics(tmp_path / "run") if "eval_loss" in row]
    assert all(row["eval_rewards/accuracies"] == 1 for row in rows[1:])
    grown = [line for line in found if "the accuracy did not (100%)" in line]
    assert len(grown) == 1 and re.match(r"held-out margins grew from \d", grown[0]), found


def test_answers_that_grow(warned):
    """The rejected answers are short, and nothing else distinguishes them."""
    found = warned(lr=2e-3, max_steps=20, eval_every=10)
    grown = [line for line in found if re.match("answers to held-out prompts grew from 4 to ..", line)]
    assert len(grown) == 1 and "--ld-alpha" in grown[0], found


def test_answers_that_repeat_themselves(warned):
    found = warned(pairs="loop", lr=2e-3, max_steps=20, eval_every=10)
    assert any(re.search("of 4 answers to held-out prompts repeat themselves", line) for line in found), found


def test_a_resumed_run_has_the_history_of_its_rows(flags_of, tmp_path, capsys):
    """It repeats no warning, and compares its answers with the first ones of the whole run."""
    flags = flags_of(out=tmp_path / "run", lr=2e-2, max_steps=20, eval_every=10, save_every=1)
    stopped(train_dpo, flags, after=6)
    before = warnings_in(capsys.readouterr().out)
    train_dpo.main([*flags, "--resume"])
    after = warnings_in(capsys.readouterr().out)
    assert [len([line for line in lines if "fell from" in line]) for lines in (before, after)] == [1, 0]
    assert any("answers to held-out prompts" in line for line in after)


# ---- Healthy runs


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bundled", "rasbt", "ultrafeedback"])
def test_a_healthy_run_gives_no_warning(name, tmp_path, capsys):
    """A small model after SFT on each data set, with the learning rate that its size needs."""
    sft, rasbt = "sft/rasbt_instruction-data.json.gz", "rasbt_instruction-data-with-preference.json.gz"
    chats, pairs, more = {
        "bundled": (SAMPLE / "sft.jsonl", SAMPLE / "preferences.jsonl", {}),
        "rasbt": (sft, f"preferences/{rasbt}", {}),
        "ultrafeedback": (sft, "preferences/ultrafeedback_train_1000.jsonl.gz", {"skip_bad": True}),
    }[name]
    if name != "bundled":
        chats, pairs = shared(chats), shared(pairs)
    tokenizer = ChatTokenizer(SAMPLE / "tokenizer.json")
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    new = Transformer(ModelConfig(tokenizer.vocab_size, **sizes, intermediate_size=128))
    save_folder(tmp_path / "new", tokenizer, new)
    common = {**COMMON, "batch_size": 8, "max_length": 300, **more}
    sft = {"model": tmp_path / "new", "data": chats, "out": tmp_path / "sft", "lr": 3e-3, "max_steps": 300}
    train_sft.main(command_line(**sft, **common))
    dpo = {"model": tmp_path / "sft", "data": pairs, "eval_share": 0.1, "out": tmp_path / "dpo"}
    rates = {"lr": 3e-4, "max_steps": 100, "eval_every": 20}
    train_dpo.main(command_line(**dpo, **rates, **common))
    assert not warnings_in(capsys.readouterr().out)
    assert metrics(tmp_path / "dpo")[-1]["eval_rewards/margins"] > 0.01  # It has learned something.


# ---- The thresholds, row by row


def training(step: int, margin: float = 0.0, lr: float = 1e-4, norm: float = 1.0, beta: float = 0.1) -> dict:
    rewards = {"rewards/margins": beta * margin, "rewards/accuracies": 0.5, "logratios/margins": margin}
    logps = {"logratios/chosen": 0.0, "logps/chosen": -30.0}
    loss = math.log1p(math.exp(-beta * margin))
    return {"step": step, "loss": loss, **rewards, **logps, "grad_norm": norm, "learning_rate": lr}


def test_a_slow_warm_up_is_not_a_standstill():
    """At a small learning rate the loss may stay where it is; the warning waits for the peak."""
    rising = [training(10 * step, 1e-4, lr=1e-6 * step) for step in range(1, 31)]
    assert not any(still(rising[:end]) for end in range(1, 31))
    assert "raise --lr (3.0e-05)" in still([*rising, training(310, 1e-4, lr=rising[-1]["learning_rate"])])


def test_a_warning_is_given_once():
    watch = Watch()
    rows = [held_out(step, 0.9, 1.0, **{"logratios/chosen": -99.0}) for step in range(9)]
    assert [len(watch.see(row)) for row in rows] == [1, *[0] * 8]


def test_a_loss_that_has_moved_once_is_not_still():
    """A healthy margin can pass 0 again by chance."""
    watch = Watch()
    found = [watch.see(training(10 * step, 0.5 * (step == 2))) for step in range(1, 30)]
    assert not any(found)


def held_out(step: int, accuracy: float, margin: float, **more) -> dict:
    row = {"rewards/accuracies": accuracy, "rewards/margins": margin, "logratios/chosen": 0.0, **more}
    return {"step": step, **{f"eval_{name}": value for name, value in {"logps/chosen": -30.0, **row}.items()}}


@pytest.mark.parametrize(
    "rows, warns",
    [
        ([(0, 0.5, 0), (10, 0.9, 3), (20, 0.9, 6)], True),
        ([(0, 0.5, 0), (10, 0.9, 3), (20, 0.9, 5.9)], False),  # not doubled
        ([(0, 0.5, 0), (10, 0.9, 2), (20, 0.9, 4.9)], False),  # not decided
        ([(0, 0.5, 0), (10, 0.9, 3), (20, 0.92, 6)], False),  # the accuracy rises, too
        ([(0, 0.5, 0), (10, 0.9, 3), (20, 0.8, 6)], True),  # it even falls
        ([(0, 0.5, 0), (10, 0.5, 6)], True),
        ([(0, 0.5, 0)], False),
    ],
)
def test_exploding_margins(rows, warns):
    assert bool(exploding([held_out(*row) for row in rows])) == warns


@pytest.mark.parametrize(
    "start, fall, warns",
    [(-30, 29, False), (-30, 30, True), (-5, 19, False), (-5, 20, True), (-300, 200, False)],
)
def test_a_fall_is_measured_by_the_length_of_the_answers(start, fall, warns):
    """200 nats are little for an answer of 300 tokens, and 20 are much for a short one."""
    ratios = {"logratios/chosen": -fall, "logps/chosen": start - fall}
    assert bool(falling({"step": 9, **ratios})) == warns
    assert bool(Watch().see(held_out(9, 0.9, 1.0, **ratios))) == warns


def test_losses_without_a_reference_give_no_warning():
    """They log log π in place of log-ratios: nothing has fallen."""
    assert not Watch().see({**training(60), "logratios/chosen": -300.0, "logps/chosen": -300.0})
    assert not Watch().see({"step": 60, "loss": 3.0, "grad_norm": 1.0, "learning_rate": 0.0})  # SFT


def sampled(*lengths: int, text: str = "", finished: bool = True) -> list[dict]:
    return [{"step": 9, "answer": text, "tokens": length, "finished": finished} for length in lengths]


def test_one_long_answer_is_not_a_trend():
    assert not longer(sampled(10, 10, 10, 10), sampled(10, 10, 12, 128))
    assert not longer(sampled(5, 5), sampled(36, 36)) and longer(sampled(5, 5), sampled(37, 37))
    assert not longer(sampled(50, 50), sampled(124, 124)) and longer(sampled(50, 50), sampled(125, 125))


def test_a_model_that_writes_noise_is_not_a_baseline():
    """Before DPO one of its answers did not end, or repeated itself: what changes, changes by chance."""
    ended, cut = sampled(9, 9, 9), sampled(128, finished=False)
    assert longer(ended, sampled(99, 99, 99)) and not longer([*ended, *cut], sampled(200, 200, 200, 200))
    sound, noise = sampled(9, 9, 9, text="ha"), sampled(9, text="ha" * 99)
    assert not longer(ended, sampled(99, 99, 99, text="ha" * 99))
    assert repeating(sampled(9, 9, 9, 9, text="ha"), [*sound[:1], *noise * 3])
    assert not repeating([*sound, *noise], noise * 4)


def test_repetition_is_the_share_of_pieces_that_occurred_before():
    """Half of a text that stands twice is a repetition, whatever the language; a short one is left alone."""
    once = "".join(chr(0x4E00 + place) for place in range(60))
    assert repeated(once) == 0 and repeated(once * 2) == pytest.approx(51 / 111)
    assert repeated("ha" * 20) == 0 and repeated("ha" * 30) == pytest.approx(1 - 2 / 51)
    assert not repeating(sampled(9, text="ha" * 99), sampled(9, text="ha" * 99))
    assert repeating(sampled(9, text="ha"), sampled(9, text="ha" * 99))
    once = [*sampled(9, text="ha" * 99), *sampled(9, 9, text="ha")]
    assert not repeating(sampled(9, text="ha"), once), "one of three answers"
