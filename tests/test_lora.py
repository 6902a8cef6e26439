"""Adapters: their output, the weights they do not change, and the reference without them."""

import copy
import math

import pytest
import torch

import train_dpo
import train_sft
from dataset.packing import build_stream
from dataset.store import open_store
from errors import InputError
from losses import sigmoid
from model import lora
from model.moe import router_loss
from model.transformer import Transformer
from model.weights import load_model
from tests.conftest import make_model, save_folder
from tests.faults import resume_from_each_step
from tests.loops import metrics, weights
from tests.runs import command_line
from training import objective
from training.distributed import World
from training.schedule import adamw


def adapted(tokenizer, trained=True, targets="all", dtype=torch.float64, **options) -> Transformer:
    """A model with adapters of rank 3, whose output is zero unless they are `trained`."""
    model = make_model(tokenizer.vocab_size, dtype, attention_bias=True, **options)
    lora.add_adapters(model, 3, 12.0, targets, seed=1)
    if trained:
        torch.manual_seed(2)
        with torch.no_grad():
            for weight in lora.adapter_weights(model).values():
                weight.add_(torch.randn_like(weight) * 0.2)
    return model


@pytest.fixture
def stream(ragged, tokenizer):
    return build_stream(open_store(ragged, "preferences", tokenizer, max_length=512), range(7))


def dpo(policy: tuple, reference: tuple) -> torch.Tensor:
    """DPO's losses of the sums of both sides."""
    return sigmoid((policy[0] - reference[0]) - (policy[1] - reference[1]), beta=0.1)


def step(model: Transformer, stream, times: int = 1) -> None:
    """Optimizer steps on the pairs of `stream`, with the model without its adapters as the reference."""
    optimizer, reference = adamw(model, weight_decay=0.1), lora.AdapterReference(model)
    for group in optimizer.param_groups:
        group["lr"] = 0.05
    for _ in range(times):
        with torch.no_grad():
            before = stream.sum_by_side(reference(stream))
        dpo(stream.sum_by_side(model(stream)), before).mean().backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_first_loss_is_ln_2_exactly(tokenizer, stream, precision):
    """B is zero, so the policy starts equal to the reference; with a random B it would not."""
    model = adapted(tokenizer, trained=False, dtype=torch.float32)
    reference = lora.AdapterReference(model)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        policy_logps, reference_logps = model(stream), reference(stream)
    assert torch.equal(policy_logps, reference_logps)
    losses = dpo(stream.sum_by_side(policy_logps), stream.sum_by_side(reference_logps))
    assert torch.equal(losses, torch.full_like(losses, math.log(2)))


def test_an_adapter_adds_what_the_paper_says():
    """y = W x + b + (alpha / r) B A x, one number at a time."""
    torch.manual_seed(0)
    base = torch.nn.Linear(5, 4, dtype=torch.float64)
    layer = lora.AdaptedLinear(base, 2, 6.0, torch.Generator())
    torch.nn.init.normal_(layer.lora_B)
    x = torch.randn(5, dtype=torch.float64)
    for i in range(4):
        expected = base.bias[i] + sum(base.weight[i, j] * x[j] for j in range(5))
        for r in range(2):
            expected += 6.0 / 2 * layer.lora_B[i, r] * sum(layer.lora_A[r, j] * x[j] for j in range(5))
        assert (layer(x)[i] - expected).abs() < 1e-12


def test_training_changes_adapters_only(tokenizer, stream):
    """Not a bit of the base weights changes, so the reference stays the same."""
    model = adapted(tokenizer, trained=False)
    plain = make_model(tokenizer.vocab_size, attention_bias=True)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    step(model, stream, times=3)
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, before[name]) == (".lora_" not in name), name
    with torch.no_grad():
        assert torch.equal(lora.AdapterReference(model)(stream), plain(stream))
        assert not torch.equal(model(stream), plain(stream))


def test_gradients_reach_every_adapter_and_nothing_else(tokenizer, stream):
    """A forward without adapters just before must not remove the gradients of the policy."""
    model = adapted(tokenizer)
    with torch.no_grad():
        lora.AdapterReference(model)(stream)
    model(stream).sum().backward()
    for name, parameter in model.named_parameters():
        reached = parameter.grad is not None and bool(parameter.grad.any())
        assert reached == parameter.requires_grad == (".lora_" in name), name


def test_optimizer_holds_adapters_only(tokenizer):
    """Moments of frozen weights would be most of the memory that LoRA saves."""
    model = adapted(tokenizer)
    optimizer = adamw(model, weight_decay=0.0)
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for name, p in model.named_parameters() if ".lora_" in name}
    expected = 2 * len(lora.TARGETS) * model.config.num_hidden_layers
    assert len(held) == len(lora.adapter_weights(model)) == expected


def test_adapters_are_on_again_after_an_error(tokenizer):
    """An adapter left off makes policy and reference one model, and the loss ln 2 for ever."""
    model = adapted(tokenizer)
    with pytest.raises(KeyboardInterrupt), lora.as_reference(model):
        assert not any(layer.on for layer in lora.adapted_layers(model).values())
        raise KeyboardInterrupt
    assert all(layer.on for layer in lora.adapted_layers(model).values())


def test_merged_equals_unmerged(tokenizer, stream):
    """The exported weights compute the same as the trained model."""
    model = adapted(tokenizer)
    plain = Transformer(model.config).double()
    plain.load_state_dict(lora.merged_weights(model), strict=True)
    with torch.no_grad():
        torch.testing.assert_close(plain(stream), model(stream), rtol=0, atol=1e-10)


def test_merging_leaves_the_model_alone(tokenizer):
    """A merge in place would add the adapter a second time at the next save."""
    model = adapted(tokenizer)
    before = copy.deepcopy(model.state_dict())
    lora.merged_weights(model)
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())


def test_targets_are_the_named_layers(tokenizer):
    model = adapted(tokenizer, targets="q_proj,down_proj")
    assert {name.rpartition(".")[2] for name in lora.adapted_layers(model)} == {"q_proj", "down_proj"}
    with pytest.raises(InputError, match="'lm_head' is neither all nor any of q_proj"):
        lora.add_adapters(make_model(tokenizer.vocab_size), 3, 1.0, "q_proj,lm_head", seed=0)


def test_a_seed_gives_the_same_adapters_and_draws_from_no_other_source(tokenizer):
    """Ranks start equal, and the global random state does not change."""
    torch.manual_seed(5)
    state = torch.get_rng_state()
    one = make_model(tokenizer.vocab_size, seed=5)
    torch.set_rng_state(state)
    lora.add_adapters(one, 3, 12.0, "all", seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    two, other = (make_model(tokenizer.vocab_size, seed=5) for _ in range(2))
    lora.add_adapters(two, 3, 12.0, "all", seed=1)
    lora.add_adapters(other, 3, 12.0, "all", seed=2)
    for name, weight in lora.adapter_weights(one).items():
        assert torch.equal(weight, lora.adapter_weights(two)[name])
        assert torch.equal(weight, lora.adapter_weights(other)[name]) == name.endswith("lora_B")


# ---- The scripts


@pytest.fixture
def folder(tmp_path, tokenizer):
    save_folder(tmp_path / "base", tokenizer)
    return tmp_path / "base"


OPTIONS = command_line(precision="fp32", batch_size=4, log_every=1, warmup_steps=0, lora_rank=2)


def test_sft_then_dpo_keeps_the_first_adapter_in_the_reference(folder, ragged, write_jsonl, tmp_path):
    """If the reference lacked SFT's adapter, the first loss would not be ln 2."""
    rows = [{"prompt": str(place), "response": "Two apples are left."} for place in range(8)]
    chats = write_jsonl("chats.jsonl", rows)
    sft, dpo = tmp_path / "sft", tmp_path / "dpo"
    train_sft.main(
        ["--model", str(folder), "--data", str(chats), "--out", str(sft), "--lr", "0.01", *OPTIONS]
    )
    train_dpo.main(
        ["--model", str(sft), "--data", str(ragged), "--eval-data", str(ragged), "--out", str(dpo),
         "--lr", "0.01", "--epochs", "3", *OPTIONS]
    )  # fmt: skip
    rows = metrics(dpo)
    assert rows[0]["eval_loss"] == pytest.approx(math.log(2), abs=1e-7)
    assert rows[1]["loss"] == pytest.approx(math.log(2), abs=1e-7) and rows[-1]["eval_loss"] < math.log(2)
    start, taught, preferring = weights(folder), weights(sft), weights(dpo)
    name, gain = "layers.0.self_attn.q_proj.weight", "layers.0.input_layernorm.weight"
    assert not torch.equal(start[name], taught[name]) and not torch.equal(taught[name], preferring[name])
    assert torch.equal(start[gain], taught[gain]) and torch.equal(taught[gain], preferring[gain])
    adapter = torch.load(dpo / "adapter.pt", weights_only=True)
    layer = name.removesuffix(".weight")
    moved = 32 / 2 * adapter[f"{layer}.lora_B"] @ adapter[f"{layer}.lora_A"]
    torch.testing.assert_close(preferring[name], taught[name] + moved)
    assert load_model(dpo).config == load_model(folder).config


def test_experts_balance_is_the_policys(ragged, tmp_path, tokenizer, monkeypatch):
    """The reference runs the same routers without gradient; its balance would train nothing."""
    base = make_model(tokenizer.vocab_size, torch.float32, num_experts=3, router_aux_loss_coef=1.0)
    save_folder(tmp_path / "experts", tokenizer, base)
    seen = []

    def watched(balances):
        seen.append(router_loss(balances))
        return seen[-1]

    monkeypatch.setattr(objective, "router_loss", watched)
    train_dpo.main(
        ["--model", str(tmp_path / "experts"), "--data", str(ragged), "--out", str(tmp_path / "dpo"),
         "--eval-data", "", "--lora-targets", "q_proj,up_proj", *OPTIONS]
    )  # fmt: skip
    assert seen and all(balance.requires_grad for balance in seen)


def test_a_moving_reference_has_no_adapters(folder, ragged, tmp_path):
    """TR-DPO moves a copy of the model, and a run with adapters has no copy."""
    with pytest.raises(InputError, match="--lora-rank keeps it frozen"):
        train_dpo.main(["--model", str(folder), "--data", str(ragged), "--tr-alpha", "0.5", *OPTIONS])


def test_a_stopped_run_keeps_its_adapters_and_goes_on(folder, ragged, tmp_path):
    """A checkpoint contains only the adapters, and the resumed run ends in the same bits."""
    arguments = ["--model", str(folder), "--data", str(ragged), "--eval-data", "", "--epochs", "2", *OPTIONS]
    found = resume_from_each_step(train_dpo, arguments, tmp_path / "runs", World(0, 1, torch.device("cpu")))
    assert found and not any(found.values())


def test_a_checkpoint_of_other_adapters_is_refused(tokenizer):
    one, other = (adapted(tokenizer, targets=targets) for targets in ("all", "q_proj"))
    with pytest.raises(KeyError, match="down_proj"):
        lora.trained_part(one).load_state_dict(lora.trained_part(other).state_dict())
    assert all(".lora_" in name for name in lora.trained_part(one).state_dict())


def test_a_fresh_model_is_not_adapted(tmp_path):
    """Adapters cannot train a model whose random weights are frozen."""
    with pytest.raises(InputError, match="--lora-rank needs a model folder; tiny is the size of a new model"):
        train_sft.main(["--lora-rank", "4", "--out", str(tmp_path)])
