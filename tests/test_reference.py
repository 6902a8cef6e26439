"""The reference asked once before training: the same numbers as the live one, and never another model's."""

import copy
import hashlib
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import train_dpo
from dataset.packing import build_stream
from dataset.store import open_store
from errors import InputError
from model.weights import load_model
from tests.conftest import RAGGED, as_record, make_model
from tests.loops import metrics, record_gradients, weights
from tests.ranks import forked
from tests.runs import ALONE, FP32, assert_close, run_flags
from training import reference, setup
from training.evaluate import evaluate_kl
from training.objective import Objective, ObjectiveSettings
from training.precision import Precision


@pytest.fixture(autouse=True)
def cache_of_its_own(monkeypatch, tmp_path):
    """Without what another test has kept."""
    monkeypatch.setenv("MINIDPO_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def flags(tmp_path, tokenizer):
    """The flags of a run on the ragged pairs, written three times over: 21 pairs in windows of 4."""
    pairs = [as_record(pair) for pair in RAGGED] * 3
    made = run_flags(
        tmp_path, tokenizer, pairs, eval_data=True, micro_batch_tokens=200, warmup_steps=2, epochs=4,
        max_steps=20, log_every=1, eval_every=10,
    )  # fmt: skip
    return lambda out, *others: [*made(tmp_path / out), *others]


@pytest.fixture
def in_float64(monkeypatch):
    """The loop over float64 weights, in which sums of long responses keep their digits."""
    monkeypatch.setattr(setup, "load_model", lambda *arguments: load_model(*arguments).double())


@pytest.mark.parametrize("layout", ["forked", "twin"])
@pytest.mark.parametrize("options", ["", "--ld-alpha 0.4", "--loss sigmoid,nca_pair --wpo"])
def test_twenty_steps_are_those_of_the_live_reference(flags, tmp_path, in_float64, layout, options):
    """Every logged figure, the weights after 20 steps and the evaluation, to 1e-9 in float64."""
    for how in ("live", "cached"):
        train_dpo.main(flags(how, "--reference", how, "--layout", layout, *options.split()))
    live, cached = (metrics(tmp_path / how) for how in ("live", "cached"))
    assert len(live) == len(cached) == 23
    for one, two in zip(live, cached, strict=True):
        # Before the first update margins are 0 but for rounding, and so no side has the larger reward.
        # A cache contains log-probs of tokens and no whole distributions, so it gives no KL.
        assert ("eval_kl_per_token" in one, "eval_kl_per_token" in two) == ("eval_loss" in one, False)
        left_out = {name for name in one if one["step"] <= 1 and "accuracies" in name}
        left_out |= {"pairs_per_second", "eval_kl_per_token"}
        one, two = ({k: v for k, v in row.items() if k not in left_out} for row in (one, two))
        # What is logged is rounded to float32 on its way through the meter; the weights are not.
        assert one == pytest.approx(two, rel=1e-5, abs=1e-6)
    live, cached = (weights(tmp_path / how) for how in ("live", "cached"))
    for name, value in live.items():
        assert value.dtype == torch.float64
        assert (value - cached[name]).abs().max() < 1e-9, name


def test_each_token_has_its_own(flags, tmp_path, tokenizer):
    """Row by row and token by token, whatever rows a stream takes and in whatever order."""
    model = make_model(tokenizer.vocab_size)
    store = open_store(tmp_path / "pairs", "preferences", tokenizer, 512)
    for layout in ("forked", "twin"):
        reference.cache_reference(model, store, ALONE, FP32, layout, max_tokens=250)
        assert store.reference_logps.dtype == np.float64
        stream = build_stream(store, [5, 0, 3], layout)
        assert (reference.cached_reference(stream) - model(stream)).abs().max() < 1e-11


def test_the_first_loss_is_ln_2(flags, tmp_path):
    """In float32 to rounding only: the two see a pair beside other pairs."""
    train_dpo.main(flags("cached", "--reference", "cached"))
    first = metrics(tmp_path / "cached")[0]
    assert first["eval_loss"] == pytest.approx(np.log(2), abs=2e-6)
    assert first["eval_rewards/margins"] == pytest.approx(0, abs=2e-5)


def test_no_copy_of_the_model_is_made(flags, monkeypatch):
    """What it saves is the second model in memory and its forward at every step."""
    monkeypatch.setattr(reference, "copy", SimpleNamespace(deepcopy=lambda model: pytest.fail("a copy")))
    train_dpo.main(flags("cached", "--reference", "cached", "--max-steps", "2"))


def test_a_second_run_asks_nothing(flags, monkeypatch, tmp_path):
    """Kept beside the data: other objectives, other seeds, more epochs read it again."""
    train_dpo.main(flags("one", "--reference", "cached", "--max-steps", "1"))
    monkeypatch.setattr(reference, "token_logps", lambda *a: pytest.fail("asked again"))
    train_dpo.main(flags("two", "--reference", "cached", "--max-steps", "1", "--loss", "ipo", "--seed", "7"))


def test_what_changes_a_log_prob_changes_the_file(flags, tmp_path, tokenizer):
    """Another model's answers would train without an error, towards the wrong reference."""
    data = tmp_path / "pairs"

    def file(model, layout="forked", precision="fp32", max_length=512, matmul="highest"):
        store = open_store(data, "preferences", tokenizer, max_length)
        how = Precision(precision, ALONE.device, matmul)
        reference.cache_reference(model, store, ALONE, how, layout, 250)
        return store.reference_logps.filename

    model = make_model(tokenizer.vocab_size, torch.float32)
    same_weights = make_model(tokenizer.vocab_size, torch.float32, rope_theta=100.0)
    moved = copy.deepcopy(model)
    with torch.no_grad():
        moved.norm.weight[0] += 1e-6
    files = [file(model), file(same_weights), file(moved), file(copy.deepcopy(model).double())]
    files += [file(model, layout="twin"), file(model, precision="bf16"), file(model, max_length=40)]
    files += [file(model, matmul="medium")]
    data.write_text(data.read_text().replace("Two apples", "Ten apples"))
    files.append(file(model))
    assert len(set(files)) == len(files) == 9
    assert file(model) == files[-1]


def test_two_ranks_ask_as_one(flags, tmp_path):
    """Each rank asks about its rows; another order would leave holes. The last window is of one pair."""
    train = ["--reference", "cached", "--max-steps", "7", "--micro-batch-tokens", "130"]
    alone = record_gradients(train_dpo, lambda: train_dpo.main(flags("one", *train)))
    [kept] = (tmp_path / "cache").glob("*/reference-*.bin")
    first = np.fromfile(kept, np.float32)
    kept.unlink()
    result = forked("tests.loops", "train_dpo", tmp_path / "two.pt", *flags("two", *train), ranks=2)
    assert result.returncode == 0, result.stderr
    assert np.allclose(first, np.fromfile(kept, np.float32), rtol=0, atol=1e-5)
    assert_close(torch.load(tmp_path / "two.pt", weights_only=True), alone, 2e-4)


def test_an_interrupted_file_is_no_file(flags, tmp_path, tokenizer, monkeypatch):
    """Half of the log-probs under the final name would be read as all of them."""
    store = open_store(tmp_path / "pairs", "preferences", tokenizer, 512)
    model = make_model(tokenizer.vocab_size, torch.float32)
    original = reference.token_logps

    def stops(*arguments):
        yield next(original(*arguments))
        raise KeyboardInterrupt

    monkeypatch.setattr(reference, "token_logps", stops)
    with pytest.raises(KeyboardInterrupt):
        reference.cache_reference(model, store, ALONE, FP32, "forked", 250)
    assert not [*store.folder.glob("reference-*"), *store.folder.glob("*.tmp")]


@pytest.mark.parametrize("options, reason", [
    ({"tr_alpha": 0.5}, "--tr-alpha and --tr-every change it"),
    ({"tr_every": 3}, "--tr-alpha and --tr-every change it"),
    ({"loss": "simpo"}, "does not use a reference"),
])  # fmt: skip
def test_what_cannot_be_cached_is_refused(options, reason):
    """A reference that moves is not the one that was asked."""
    objective = Objective(ObjectiveSettings(**options))
    with pytest.raises(InputError, match=reason):
        reference.check_cached(objective)


def test_a_truncated_cache_is_computed_again(flags, tmp_path):
    """Found by its name alone, it would be a traceback at every --resume."""
    train_dpo.main(flags("whole", "--reference", "cached", "--max-steps", "2"))
    [kept] = (tmp_path / "cache").glob("*/reference-*.bin")
    content = kept.read_bytes()
    kept.write_bytes(content[:-5])
    train_dpo.main(flags("again", "--reference", "cached", "--max-steps", "2"))
    assert kept.read_bytes() == content
    for name, value in weights(tmp_path / "whole").items():
        assert torch.equal(value, weights(tmp_path / "again")[name])


def test_the_cache_belongs_to_the_run(flags, tmp_path):
    """A cache that was computed again may differ in its last bits: a resumed run must not take it unseen."""
    stopped = flags("run", "--reference", "cached", "--save-every", "1")
    train_dpo.main([*stopped, "--max-steps", "2"])
    identity = json.loads((tmp_path / "run" / "config.json").read_text())["run"]
    [kept] = (tmp_path / "cache").glob("*/reference-*.bin")
    assert identity["reference_logps"] == hashlib.sha256(kept.read_bytes()).hexdigest()


def test_the_exact_kl_is_computed_without_autocast(tokenizer, ragged):
    """Rounded to bf16, equal models are 5e-5 nats apart, and a small KL reads as three times as much."""
    policy, other = (make_model(tokenizer.vocab_size, torch.float32, spread=0.1) for _ in range(2))
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(1e-3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    pairs = open_store(ragged, "preferences", tokenizer, 512)
    exact = evaluate_kl(copy.deepcopy(policy).double(), copy.deepcopy(other).double(), pairs, ALONE)
    with torch.autocast("cpu", torch.bfloat16):
        found = evaluate_kl(policy, other, pairs, ALONE)
    assert 0 < exact["kl_per_token"] < 2e-4
    assert found["kl_per_token"] == pytest.approx(exact["kl_per_token"], rel=0.02)
