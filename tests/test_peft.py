"""peft's adapter folders as the start of a run: their numbers, what is refused, and the frozen reference."""

import json
import math

import pytest
import torch

import train_dpo
from dataset.packing import build_stream
from dataset.store import open_store
from errors import InputError
from eval.common import starting_model
from model import lora
from model.export import export_adapter
from model.peft import add_adapter
from model.weights import load_model, save_model
from tests.conftest import make_model, save_folder
from tests.faults import resume_from_each_step
from tests.loops import metrics, weights
from tests.runs import ALONE, command_line

safetensors = pytest.importorskip("safetensors.torch", reason="the extra `hf` is not installed")

RANKS = {"self_attn.q_proj": (2, 6.0), "self_attn.v_proj": (3, 12.0), "mlp.down_proj": (3, 6.0)}
OPTIONS = command_line(precision="fp32", batch_size=4, log_every=1, warmup_steps=0, lr=0.01, sample_prompts=0)
LAYER = "layers.1.self_attn.q_proj"


@pytest.fixture
def base(tmp_path, tokenizer):
    save_folder(tmp_path / "base", tokenizer)
    return tmp_path / "base"


@pytest.fixture
def adapter(tmp_path):
    """An adapter folder, written by hand: ranks and alphas of three kinds of layers, far from zero."""
    model = make_model(320, torch.float32)
    torch.manual_seed(3)
    tensors = {}
    for place in range(2):
        for kind, (rank, _) in RANKS.items():
            name = f"layers.{place}.{kind}"
            rows, columns = model.get_submodule(name).weight.shape
            tensors[f"base_model.model.model.{name}.lora_A.weight"] = torch.randn(rank, columns) * 0.3
            tensors[f"base_model.model.model.{name}.lora_B.weight"] = torch.randn(rows, rank) * 0.3
    config = {
        "peft_type": "LORA", "r": 3, "lora_alpha": 6, "target_modules": [*RANKS], "bias": "none",
        "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"self_attn.v_proj": 12}, "modules_to_save": None,
        "use_dora": False, "use_rslora": False, "init_lora_weights": True, "lora_dropout": 0.05,
    }  # fmt: skip
    (tmp_path / "adapter").mkdir()
    safetensors.save_file(tensors, tmp_path / "adapter" / "adapter_model.safetensors")
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    return tmp_path / "adapter"


def change(adapter, **options) -> None:
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **options}))


def expected_weights(base, adapter, scale=lambda rank, alpha: alpha / rank) -> dict:
    """W + scale B A for each layer of the folder, and the other weights of the base."""
    found, tensors = weights(base), safetensors.load_file(adapter / "adapter_model.safetensors")
    for place in range(2):
        for kind, (rank, alpha) in RANKS.items():
            name = f"layers.{place}.{kind}"
            a, b = (tensors[f"base_model.model.model.{name}.lora_{part}.weight"] for part in "AB")
            found[f"{name}.weight"] = found[f"{name}.weight"] + scale(rank, alpha) * b @ a
    return found


def same(got: dict, want: dict, tolerance=1e-6) -> bool:
    return got.keys() == want.keys() and all((got[n] - want[n]).abs().max() <= tolerance for n in want)


@pytest.mark.parametrize("stabilised", [False, True])
def test_each_layer_has_its_own_rank_and_alpha(base, adapter, stabilised):
    """One rank for all layers, or alpha / r with rank stabilisation, is another model."""
    change(adapter, use_rslora=stabilised)
    model = load_model(base)
    add_adapter(model, adapter)
    divisor = math.sqrt if stabilised else float
    want = expected_weights(base, adapter, lambda rank, alpha: alpha / divisor(rank))
    assert same(lora.merged_weights(model), want)
    assert not same(want, weights(base), tolerance=0.1)


def test_the_trained_adapter_is_exported_with_its_patterns(base, adapter, tmp_path):
    """Without the patterns peft would read other scales, or refuse the shapes."""
    model = load_model(base)
    add_adapter(model, adapter)
    save_model(tmp_path / "run", model, settings={"model": str(base)})
    export_adapter(tmp_path / "run", tmp_path / "out", torch.float32)
    names = ("adapter_config.json", "adapter_model.safetensors")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(names)
    again = load_model(base)
    add_adapter(again, tmp_path / "out")
    assert same(lora.merged_weights(again), lora.merged_weights(model), tolerance=0)
    config = json.loads((tmp_path / "out" / names[0]).read_text())
    assert (config["r"], config["lora_alpha"]) == (3, 6.0) and config["target_modules"] == sorted(
        kind.rpartition(".")[2] for kind in RANKS
    )
    assert config["rank_pattern"] == {f"layers.{place}.self_attn.q_proj": 2 for place in range(2)}


def test_an_adapter_of_some_layers_names_them(base, adapter):
    """With `q_proj` as its target, peft would look for adapters in all layers."""
    tensors = safetensors.load_file(adapter / "adapter_model.safetensors")
    some = {name: value for name, value in tensors.items() if LAYER in name}
    safetensors.save_file(some, adapter / "adapter_model.safetensors")
    model = load_model(base)
    add_adapter(model, adapter)
    assert lora.adapter_shape(model)["target_modules"] == [LAYER]


@pytest.mark.parametrize(
    "options, reason",
    [
        ({"peft_type": "IA3"}, "peft_type 'IA3' is not supported, only 'LORA'"),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save \"\['lm_head'\]\" is not supported"),
        ({"use_dora": True}, "use_dora 'True' is not supported"),
        ({"bias": "all"}, "bias 'all' is not supported"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights 'pissa' is not supported"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
        ({"rank_pattern": {}}, r"q_proj.lora_A has the shape \(2, 16\) .*, expected \(3, 16\)"),
        ({"rank_pattern": {"(": 2}}, "not the config of a LoRA adapter"),
        ({"rank_pattern": [2]}, "not the config of a LoRA adapter"),
        ({"lora_alpha": None}, "not the config of a LoRA adapter"),
        ({"lora_alpha": 1e999}, "lora_alpha inf of .* is not finite"),
    ],
)
def test_what_is_not_plain_lora_is_refused_by_name(base, adapter, options, reason):
    change(adapter, **options)
    with pytest.raises(InputError, match=reason):
        add_adapter(load_model(base), adapter)


def test_other_files_and_weights_are_refused(base, adapter):
    tensors = {"base_model.model.model.embed_tokens.lora_embedding_A": torch.zeros(2, 320)}
    safetensors.save_file(tensors, adapter / "adapter_model.safetensors")
    with pytest.raises(InputError, match=r"embed_tokens.lora_embedding_A is not lora_A or lora_B of a layer"):
        add_adapter(load_model(base), adapter)
    (adapter / "adapter_model.safetensors").write_bytes(b"damaged")
    with pytest.raises(InputError, match="unreadable safetensors"):
        add_adapter(load_model(base), adapter)
    with pytest.raises(InputError, match=r"base: it has no adapter_config.json; python -m model.export"):
        add_adapter(load_model(base), base)


# ---- The script


@pytest.mark.parametrize(
    "options",
    [[], ["--reference", "cached"], ["--merge-adapter"], ["--merge-adapter", "--lora-rank", "2"]],
    ids=["beside", "cached", "merged", "merged-and-new"],
)
def test_policy_and_reference_start_with_the_adapter(base, adapter, ragged, tmp_path, options):
    """A reference without the adapter gives another first loss than ln 2."""
    data = ["--data", str(ragged), "--eval-data", str(ragged), "--adapter", str(adapter)]
    out = tmp_path / "run"
    train_dpo.main(["--model", str(base), *data, "--out", str(out), "--epochs", "1", *OPTIONS, *options])
    rows = metrics(out)
    assert rows[0]["eval_loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert rows[-1]["eval_loss"] < math.log(2) - 1e-3
    start, trained = expected_weights(base, adapter), weights(out)
    moved = {name for name in start if (start[name] - trained[name]).abs().max() > 1e-5}
    adapted = {name for name in start if "norm" not in name and "embed" not in name}
    if "--lora-rank" in options:
        assert moved == adapted
    elif "--merge-adapter" not in options:
        assert moved == {name for name in adapted if name.split(".", 2)[-1].removesuffix(".weight") in RANKS}
    else:
        assert moved == start.keys()
    if "--lora-rank" in options:
        with pytest.raises(InputError, match="its run merged --adapter into the base"):
            export_adapter(out, tmp_path / "out", torch.float32)
    with pytest.raises(InputError, match=r"with the adapter .*; give --reference, a folder with both merged"):
        starting_model(str(out), "--reference")


def test_the_reference_does_not_follow(base, adapter, ragged, tokenizer):
    """The reference's adapter is a copy outside the optimizer: its log-probs stay, to the bit."""
    stream = build_stream(open_store(ragged, "preferences", tokenizer, max_length=512), range(7))
    model = load_model(base)
    add_adapter(model, adapter)
    for layer in lora.adapted_layers(model).values():
        layer.keep_reference()
    reference = lora.AdapterReference(model)
    with torch.no_grad():
        before = reference(stream)
        assert torch.equal(model(stream), before)
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    assert len(trained) == len(lora.adapter_weights(model)) == 12
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(stream).mean().backward()
    optimizer.step()
    with torch.no_grad():
        assert torch.equal(reference(stream), before)
        assert (model(stream) - before).abs().max() > 1e-3
    assert not [name for name in lora.merged_weights(model) if "reference" in name or "lora" in name]


def test_a_stopped_run_goes_on_and_the_folder_may_move(base, adapter, ragged, tmp_path):
    """A checkpoint has the trained adapter only; the reference's comes from --adapter again."""
    arguments = ["--model", str(base), "--data", str(ragged), "--eval-data", "", "--adapter", str(adapter)]
    found = resume_from_each_step(train_dpo, [*arguments, *OPTIONS], tmp_path / "runs", ALONE)
    assert found and not any(found.values())
    change(adapter, lora_alpha=7)
    with pytest.raises(InputError, match="has finished with model"):
        train_dpo.main([*arguments, *OPTIONS, "--out", str(tmp_path / "runs" / "whole"), "--resume"])


@pytest.mark.parametrize(
    "options, reason",
    [
        ({"merge_adapter": True}, "--merge-adapter merges the adapter of --adapter, which is not given"),
        ({"adapter": "DIR", "lora_rank": 2}, "--adapter DIR has its own rank"),
        ({"adapter": "DIR", "tr_alpha": 0.5}, "but --adapter keeps it frozen"),
        ({"adapter": "DIR"}, "--adapter DIR: it has no adapter_config.json"),
    ],
)
def test_contradictions_are_refused(base, options, reason):
    with pytest.raises(InputError, match=reason):
        train_dpo.main(command_line(model=base, **options))
