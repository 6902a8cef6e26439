"""Resuming: an interrupted run ends like an uninterrupted one, bit for bit, or is refused by name."""

import json
import math
import random
import re
import shutil

import numpy as np
import pytest
import torch

import train_dpo
import train_reward
import train_sft
import training.checkpoint
import training.distributed
from errors import InputError
from eval import demo
from model.weights import load_model, save_model
from tests.conftest import make_model
from tests.faults import Keeping, resume_from_each_step, states, train
from tests.loops import metrics, weights
from tests.ranks import forked
from tests.runs import ALONE, run_flags, same_model, stopped
from training.checkpoint import checkpoints
from training.settings import parse

MODULES = {"train_dpo": train_dpo, "train_reward": train_reward, "train_sft": train_sft}


@pytest.fixture
def start(tmp_path):
    return tmp_path / "start"


@pytest.fixture
def flags(tmp_path, tokenizer):
    """Flags of a short run: 2 epochs of 3 steps, the last one short, of up to 2 micro-batches each.

    Rows are logged every 2 steps and evaluations every 3, so checkpoints come between them.
    """
    made = run_flags(
        tmp_path, tokenizer, eval_data=True, epochs=2, micro_batch_tokens=130, warmup_steps=2, log_every=2,
        eval_every=3,
    )  # fmt: skip

    def of(script: str, *more: str, out="run", **changes) -> list[str]:
        return [*made(tmp_path / out, "chats" if script == "train_sft" else "pairs", **changes), *more]

    return of


# ---- bit for bit


@pytest.mark.parametrize(
    "script, options",
    [
        *(pytest.param(name, {}, id=f"{name}-fp32") for name in MODULES),
        pytest.param("train_dpo", {"precision": "bf16"}, id="train_dpo-bf16"),
        pytest.param("train_sft", {"optimizer": "muon"}, id="train_sft-muon"),
    ],
)
def test_resuming_at_any_step_changes_no_bit(script, options, flags, tmp_path):
    """Weights, moments, running means and log rows, at every step, within an epoch and at its end."""
    found = resume_from_each_step(MODULES[script], flags(script, **options), tmp_path / "r", ALONE)
    assert found == {str(step): [] for step in range(1, 7)}


@pytest.mark.parametrize("options", [
    pytest.param(dict(loss="sigmoid,bco_pair", tr_alpha=0.3), id="soft"),
    pytest.param(dict(loss="bco_pair", tr_every=2), id="hard"),
])  # fmt: skip
def test_the_state_of_an_objective_is_resumed(options, flags, tmp_path):
    """BCO's running delta and a moving reference are state like the weights."""
    found = resume_from_each_step(train_dpo, flags("train_dpo", **options), tmp_path / "r", ALONE)
    assert found == {str(step): [] for step in range(1, 7)}


@pytest.mark.slow
@pytest.mark.parametrize("script", MODULES)
def test_resuming_at_any_step_changes_no_bit_on_two_ranks(script, flags, tmp_path):
    """Running means that are summed over the ranks too early round differently; each rank has its own."""
    arguments = flags(script, batch_size=3, micro_batch_tokens=1, epochs=1)
    where = tmp_path / "verdict", tmp_path / "r"
    result = forked("tests.faults", "resume", script, *where, *arguments, ranks=2)
    assert result.returncode == 0, result.stderr
    assert json.loads((tmp_path / "verdict").read_text()) == {str(step): [] for step in range(1, 5)}


@pytest.fixture
def lively_scaler(monkeypatch):
    """A loss scale that starts too high and grows every 2 steps, so that some steps are skipped."""
    original = torch.amp.GradScaler

    def lively(device, enabled):
        return original(device, init_scale=2.0**19, growth_interval=2, enabled=enabled)

    monkeypatch.setattr(training.distributed.torch.amp, "GradScaler", lively)


@pytest.mark.usefixtures("lively_scaler")
def test_resuming_restores_the_loss_scale_and_its_skips(flags, tmp_path):
    """Under fp16 the scale and the steps until it grows are part of the state."""
    arguments = flags("train_dpo", precision="fp16", log_every=1, max_steps=4)
    found = resume_from_each_step(train_dpo, arguments, tmp_path / "r", ALONE)
    assert found == {str(step): [] for step in range(1, 5)}
    skipped = [row["skipped_steps"] for row in metrics(tmp_path / "r" / "whole") if "skipped_steps" in row]
    assert 0 < skipped[-1] < 4, "the test needs steps of both kinds"


@pytest.mark.usefixtures("lively_scaler")
@pytest.mark.parametrize("forgotten, precision, what", [
    ("model", "fp32", {"state", "model"}),
    ("optimizer", "fp32", {"state", "model"}),
    ("meter", "fp32", {"rows"}),
    ("precision", "fp16", {"state", "rows"}),
])  # fmt: skip
def test_a_part_that_is_not_restored_is_noticed(forgotten, precision, what, flags, tmp_path, monkeypatch):
    """Negative control: a part that is not restored makes a difference, so the tests above can fail."""
    restore = training.checkpoint.restore

    def forgetful(parts, *more):
        restore({name: part for name, part in parts.items() if name != forgotten}, *more)

    monkeypatch.setattr(training.checkpoint, "restore", forgetful)
    arguments = flags("train_dpo", precision=precision, max_steps=4)
    found = resume_from_each_step(train_dpo, arguments, tmp_path / "r", ALONE)
    assert what <= {part for parts in found.values() for part in parts}


@pytest.mark.parametrize("script", MODULES)
def test_no_random_number_is_drawn_while_training(script, flags, tmp_path):
    """So a checkpoint needs no random state. Code that adds dropout must save it, and fails this test."""

    def states() -> list:
        return [torch.get_rng_state().tolist(), str(np.random.get_state()), random.getstate()]

    class Watching(Keeping):
        def begin(self, *arguments, **fingerprints):
            self.before = states()
            return super().begin(*arguments, **fingerprints)

        def finish(self, *arguments):
            assert states() == self.before
            self.watched = True

    module = MODULES[script]
    settings = parse(module.Settings, "", flags(script))
    with Watching(settings, ALONE) as run:
        module.train(settings, ALONE, run)
    assert run.watched


@pytest.mark.parametrize("script", MODULES)
def test_logging_saving_and_another_folder_change_no_bit(script, flags, tmp_path):
    """How often a run logs, evaluates or saves, and its folder, must not change the weights."""
    module = MODULES[script]
    module.main(flags(script, out="plain", eval_data="", log_every=100, save_every=0))
    busy = {"log_every": 1, "eval_every": 1, "save_every": 1, "keep_checkpoints": 1}
    module.main(flags(script, out="elsewhere/busy", **busy))
    assert same_model(tmp_path / "plain", tmp_path / "elsewhere" / "busy")


# ---- where a run begins, and where it ends


KEPT = {"save_every": 1, "keep_checkpoints": 9}


def test_the_reference_stays_the_original_one(flags, tmp_path, start, monkeypatch):
    """A reference copied from the restored policy would make DPO start again at ln 2."""
    seen = []
    evaluate = train_dpo.evaluate

    def noting(policy, reference, *more):
        seen.append(reference)
        return evaluate(policy, reference, *more)

    monkeypatch.setattr(train_dpo, "evaluate", noting)
    stopped(train_dpo, flags("train_dpo", **KEPT), after=4)
    train_dpo.main(flags("train_dpo", "--resume"))
    original = load_model(start).state_dict()
    for name, value in seen[-1].state_dict().items():
        assert torch.equal(value, original[name])
    rows = metrics(tmp_path / "run")
    assert rows[-1]["eval_rewards/margins"] != 0
    assert rows[-1]["eval_loss"] < math.log(2)


def test_each_row_is_logged_once(flags, tmp_path):
    """A killed run has logged steps after its checkpoint, which the resumed run logs again."""
    folder = tmp_path / "run"
    stopped(train_sft, flags("train_sft", log_every=1, **KEPT), after=5)
    for newest in checkpoints(folder / "checkpoints")[:3]:
        newest.unlink()
    assert max(row["step"] for row in metrics(folder)) == 5
    train_sft.main(flags("train_sft", "--resume", log_every=1))
    assert [row["step"] for row in metrics(folder) if "loss" in row] == [1, 2, 3, 4, 5, 6]


def test_resuming_a_finished_run_does_nothing(flags, tmp_path, capsys):
    """No further step is taken and no byte is changed."""
    arguments = flags("train_dpo")
    train_dpo.main(arguments)
    before = {p.name: (p.stat().st_mtime_ns, p.read_bytes()) for p in (tmp_path / "run").iterdir()}
    assert set(before) == {"model.pt", "config.json", "metrics.jsonl", "samples.jsonl", ".lock",
                           "tokenizer.json", "tokenizer_config.json", "generation_config.json"}  # fmt: skip
    train_dpo.main([*arguments, "--resume"])
    assert {p.name: (p.stat().st_mtime_ns, p.read_bytes()) for p in (tmp_path / "run").iterdir()} == before
    assert "the run is finished" in capsys.readouterr().out
    with pytest.raises(InputError, match=r"has finished with lr 0\.001, now 0\.002; choose another --out"):
        train_dpo.main([*arguments, "--resume", "--lr", "0.002"])


def test_another_model_or_data_is_not_a_finished_run(flags, tmp_path, start, tokenizer):
    """A pipeline that runs again on new data must not get the model of the old data, with status 0."""
    arguments = flags("train_dpo", "--resume", max_steps=1)
    train_dpo.main(arguments)
    before = (tmp_path / "run" / "model.pt").read_bytes()
    data = tmp_path / "pairs"
    original = data.read_bytes()
    data.write_bytes(original.replace(b"No 0", b"No 9"))
    with pytest.raises(InputError, match=r"has finished with data [0-9a-f]{12}, now [0-9a-f]{12}; choose"):
        train_dpo.main(arguments)
    data.write_bytes(original)
    save_model(start, make_model(tokenizer.vocab_size, torch.float32, seed=1))
    with pytest.raises(InputError, match=r"has finished with model [0-9a-f]{12}, now [0-9a-f]{12}; choose"):
        train_dpo.main(arguments)
    assert (tmp_path / "run" / "model.pt").read_bytes() == before


def test_config_json_keeps_what_identifies_the_run(flags, tmp_path):
    """The digests, and the values that `auto` took."""
    train_sft.main(flags("train_sft", max_steps=1, device="auto"))
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["run"]["device"] == "cpu" and config["settings"]["device"] == "auto"
    assert all(re.fullmatch("[0-9a-f]{64}", config["run"][name]) for name in ("model", "data", "tokenizer"))


def test_a_fresh_run_does_not_remove_a_stopped_one(flags, tmp_path):
    """A night's work must not be lost because --resume was forgotten."""
    folder = tmp_path / "run"
    stopped(train_sft, flags("train_sft", **KEPT), after=2)
    before = states(folder)
    with pytest.raises(InputError, match=r"stopped after step 2: continue it with --resume, or replace"):
        train_sft.main(flags("train_sft"))
    assert states(folder) == before
    train_sft.main(flags("train_sft", "--overwrite"))
    train_sft.main(flags("train_sft", out="fresh"))
    assert same_model(folder, tmp_path / "fresh")


def test_a_finished_run_is_replaced_only_with_overwrite(flags, tmp_path):
    """The same command typed twice must not replace the model of a night."""
    arguments = flags("train_sft", max_steps=1)
    train_sft.main(arguments)
    before = (tmp_path / "run" / "model.pt").read_bytes()
    (tmp_path / "run" / "adapter.pt").write_bytes(b"of the first run")
    with pytest.raises(InputError, match=r"contains a finished run \(.*model\.pt\): choose another"):
        train_sft.main([*arguments, "--lr", "1e-2"])
    assert (tmp_path / "run" / "model.pt").read_bytes() == before
    train_sft.main([*arguments, "--lr", "1e-2", "--overwrite"])
    assert (tmp_path / "run" / "model.pt").read_bytes() != before
    assert not (tmp_path / "run" / "adapter.pt").exists(), "it does not belong to the new model"
    with pytest.raises(InputError, match="--resume continues a run and --overwrite replaces it"):
        train_sft.main([*arguments, "--resume", "--overwrite"])


def test_a_stopped_demo_starts_again(flags, tmp_path, monkeypatch):
    """`make demo` has no --resume; after Ctrl-C the next one must not refuse."""
    main, begun = train_sft.main, []
    stopped(train_sft, flags("train_sft", out="sft", **KEPT), after=2)

    def short(arguments):
        main([*arguments, *flags("train_sft", out="sft", max_steps=1)])
        begun.append(arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(train_sft, "main", short)
    with pytest.raises(KeyboardInterrupt):
        demo.main(["--out", str(tmp_path)])
    assert begun and (tmp_path / "sft" / "model.pt").exists()


def test_an_unfinished_run_has_no_model(flags, tmp_path):
    """`train_sft && train_dpo`: the model of an earlier run must not be taken for this run's."""
    train_sft.main(flags("train_sft"))
    stopped(train_sft, flags("train_sft", "--overwrite", lr=1e-2, **KEPT), after=2)
    assert not (tmp_path / "run" / "model.pt").exists()


def test_out_must_not_be_the_model(flags, start):
    """The run would overwrite its own reference."""
    before = (start / "model.pt").read_bytes()
    with pytest.raises(InputError, match="a run cannot overwrite where it starts"):
        train_dpo.main(flags("train_dpo", out=start))
    assert (start / "model.pt").read_bytes() == before


# ---- what may differ, and what is refused


CHANGES = {
    "lr": 2e-3, "beta": 0.5, "batch_size": 5, "micro_batch_tokens": 90, "seed": 7, "epochs": 3,
    "max_length": 300, "layout": "twin", "precision": "bf16", "weight_decay": 0.1,
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGES)
def test_a_changed_setting_is_refused_by_name(name, flags, tmp_path):
    """Nobody can repeat a run whose settings changed on the way, unless --override records the intent."""
    folder = tmp_path / "run"
    stopped(train_dpo, flags("train_dpo", **KEPT), after=2)
    before = states(folder)
    changed = flags("train_dpo", "--resume", **{name: CHANGES[name]})
    with pytest.raises(InputError, match=rf"was started with {name} .*, now .*--override {name}"):
        train_dpo.main(changed)
    assert states(folder) == before
    with pytest.raises(InputError, match=rf"was started with {name}"):
        train_dpo.main([*changed, "--override", "skip_bad"])


def test_an_override_must_be_a_setting(flags, tmp_path):
    stopped(train_dpo, flags("train_dpo", **KEPT), after=2)
    with pytest.raises(InputError, match=r"--override learning_rate: not a setting; choose from .*lr"):
        train_dpo.main(flags("train_dpo", "--resume", "--override", "learning_rate"))


def test_an_overridden_setting_takes_effect(flags, tmp_path):
    """The optimizer's saved state contains the old weight decay, which must not come back."""
    ends = {}
    for name, decay in (("same", 0.0), ("other", 0.9)):
        stopped(train_dpo, flags("train_dpo", out=name, **KEPT), after=2)
        train_dpo.main(flags("train_dpo", "--resume", out=name, weight_decay=decay, override="weight_decay"))
        ends[name] = weights(tmp_path / name)
    assert any(not torch.equal(ends["same"][key], ends["other"][key]) for key in ends["same"])


def test_some_settings_may_change(flags, tmp_path):
    """How often a run logs and saves, and its evaluation data, change no bit of the weights."""
    train(train_dpo, flags("train_dpo", out="whole"), ALONE)
    stopped(train_dpo, flags("train_dpo", **KEPT), after=2)
    free = {"save_every": 2, "keep_checkpoints": 1, "log_every": 1, "eval_every": 1, "eval_data": ""}
    train_dpo.main(flags("train_dpo", "--resume", **free))
    assert same_model(tmp_path / "run", tmp_path / "whole")


def test_another_start_data_or_tokenizer_is_refused(flags, tmp_path, start, tokenizer):
    """Content is compared, not paths. A DPO run with another reference is another run."""
    folder = tmp_path / "run"
    stopped(train_dpo, flags("train_dpo", **KEPT), after=2)
    resumed = flags("train_dpo", "--resume")
    data = tmp_path / "pairs"
    original = data.read_bytes()

    data.write_bytes(original.replace(b"No 0", b"No 9"))
    with pytest.raises(InputError, match=r"was started with data [0-9a-f]{12}, now [0-9a-f]{12}; start"):
        train_dpo.main(resumed)
    data.write_bytes(original)

    shutil.copytree(start, tmp_path / "kept")
    (start / "tokenizer.json").write_text(tokenizer.json + "\n")
    with pytest.raises(InputError, match="was started with tokenizer "):
        train_dpo.main(resumed)
    tokenizer.save(start)

    save_model(start, make_model(tokenizer.vocab_size, torch.float32, seed=1))
    with pytest.raises(InputError, match="was started with model "):
        train_dpo.main(resumed)

    moved = [str(tmp_path / "kept") if each == str(start) else each for each in resumed]
    train_dpo.main(moved)
    assert (folder / "model.pt").exists()


@pytest.mark.slow
def test_another_number_of_ranks_must_be_named_and_changes_only_rounding(flags, tmp_path):
    """A window contains the records of all ranks, so only the rounding of sums changes."""
    train(train_sft, flags("train_sft", out="whole"), ALONE)
    stopped(train_sft, flags("train_sft", **KEPT), after=3)
    arguments = flags("train_sft", "--resume")
    result = forked("train_sft", *arguments, ranks=2)
    assert result.returncode != 0 and "was started with ranks 1, now 2" in result.stderr
    result = forked("train_sft", *arguments, "--override", "ranks", ranks=2)
    assert result.returncode == 0, result.stderr
    alone, together = weights(tmp_path / "whole"), weights(tmp_path / "run")
    for name, value in alone.items():
        assert torch.allclose(value, together[name], atol=1e-5)
    for one, two in zip(metrics(tmp_path / "whole"), metrics(tmp_path / "run"), strict=True):
        assert two.get("loss", 0) == pytest.approx(one.get("loss", 0), rel=1e-4)
