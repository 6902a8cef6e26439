"""Hugging Face folders, written here by hand, and folders that must be refused.

`make parity` compares with transformers.
"""

import json
import math
import re
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

import train_dpo
import train_reward
import train_sft
from dataset.tokenizer import ChatTokenizer
from errors import InputError
from model import export as module
from model import huggingface
from model.config import SCALING, ModelConfig
from model.export import export, export_adapter
from model.lora import add_adapters
from model.rotary import scaled
from model.transformer import Transformer
from model.weights import load_model, save_model
from tests.conftest import MODEL_OPTIONS, ROOT, make_model, save_folder
from tests.test_model import all_logits, one_stream

V = 50
BASE = dict(
    vocab_size=V, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    intermediate_size=24, hidden_act="silu", rms_norm_eps=1e-6, max_position_embeddings=64,
)  # fmt: skip
LLAMA3 = dict(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32)
OURS = dict(max_position_embeddings=64)
# Name: their config, and ours.
LLAMA, MISTRAL = dict(model_type="llama"), dict(model_type="mistral")
TIED, UNTIED = dict(tie_word_embeddings=True), dict(tie_word_embeddings=False)
SCALED_3 = dict(rope_scaling={"rope_type": "llama3", **LLAMA3})
FAMILIES = {
    "llama": (LLAMA, UNTIED),
    "llama-tied": (dict(**LLAMA, **TIED, rope_theta=5e5), dict(rope_theta=5e5)),
    "llama-biases": (
        dict(**LLAMA, **TIED, attention_bias=True, num_key_value_heads=None),
        dict(attention_bias=True, attention_output_bias=True, num_key_value_heads=4),
    ),
    "llama-3.1": (dict(**LLAMA, **TIED, **SCALED_3), SCALED_3),
    "linear-old-style": (
        dict(**LLAMA, **TIED, rope_scaling={"type": "linear", "factor": 2.0}),
        dict(rope_scaling={"rope_type": "linear", "factor": 2.0}),
    ),
    "rope-of-transformers-5": (
        dict(**LLAMA, rope_parameters={"rope_type": "default", "rope_theta": 77.0}),
        dict(**UNTIED, rope_theta=77.0),
    ),
    "mistral": (dict(**MISTRAL, sliding_window=None, head_dim=6), dict(**UNTIED, head_dim=6)),
    "mistral-window": (dict(**MISTRAL, sliding_window=32), dict(**UNTIED, sliding_window=32)),
    "mistral-defaults": (MISTRAL, dict(**UNTIED, sliding_window=4096)),
    "qwen2": (
        dict(model_type="qwen2", **TIED, use_sliding_window=False, sliding_window=32),
        dict(attention_bias=True),
    ),
    "qwen3": (
        dict(model_type="qwen3", **TIED, head_dim=8, attention_bias=False),
        dict(qk_norm=True, head_dim=8),
    ),
    "minimind": (dict(model_type="minimind", use_moe=False), dict(rope_theta=1e6)),
    # All keys of the newest MiniMindConfig: those of experts are written for dense models, too.
    "minimind-newest": (
        dict(
            model_type="minimind", use_moe=False, dropout=0.0, flash_attn=True, head_dim=4, bos_token_id=1,
            eos_token_id=2, rope_theta=1e6, rope_scaling=None, inference_rope_scaling=False,
            tie_word_embeddings=True, num_experts=4, num_experts_per_tok=1, moe_intermediate_size=24,
            norm_topk_prob=True, router_aux_loss_coef=5e-4, shared_expert_intermediate_size=8, qk_norm=1,
        ),
        dict(rope_theta=1e6, qk_norm=True),
    ),
    "minimind-with-norms": (
        dict(model_type="minimind", head_dim=6), dict(rope_theta=1e6, qk_norm=True, head_dim=6),
    ),
}  # fmt: skip


def test_the_tables_of_families_and_options_are_as_the_code():
    """Families that load, and options that are refused otherwise. When this fails, correct docs/MODELS.md."""
    text = (ROOT / "docs" / "MODELS.md").read_text("utf-8")
    rows = re.findall(r"^\| `(\w+)` \| `(\w+ForCausalLM)` \|", text, re.M)
    assert rows == [(family, name) for family, (name, _) in huggingface.FAMILIES.items()]

    def shown(values: tuple) -> str:
        return ", ".join(f"`{json.dumps(value)}`" for value in values).replace('"', "")

    wanted = "\n".join(f"| `{option}` | {shown(values)} |" for option, values in huggingface.ONLY.items())
    assert wanted in text, f"docs/MODELS.md lacks:\n{wanted}"
    assert all(f"`{kind}`" in text for kind in SCALING)


def write_folder(folder, theirs: dict, model: Transformer, dtype=torch.float32, shards=1):
    """Write a folder as their tools do: ``model.`` before all names but the head's, an index for shards."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**BASE, **theirs}))
    named = {
        name if name == "lm_head.weight" else f"model.{name}": weight.to(dtype)
        for name, weight in model.state_dict().items()
    }
    if shards == 1:
        save_file(named, folder / "model.safetensors")
        return folder
    files = [f"model-{shard:05}-of-{shards:05}.safetensors" for shard in range(1, shards + 1)]
    names = {name: files[place % shards] for place, name in enumerate(named)}
    for file in files:
        save_file({name: w for name, w in named.items() if names[name] == file}, folder / file)
    index = {"metadata": {"total_size": 1}, "weight_map": names}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


@pytest.fixture
def llama(tmp_path):
    model = make_model(V, torch.float32, tie_word_embeddings=False)
    return write_folder(tmp_path / "llama", dict(model_type="llama"), model)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_folder_is_read_as_what_it_says(family, tmp_path):
    """A missing key has the default of its family, not that of another."""
    theirs, ours = FAMILIES[family]
    model = make_model(V, torch.float32, **{**OURS, **ours})
    loaded = load_model(write_folder(tmp_path / family, theirs, model))
    assert loaded.config == model.config
    for name, weight in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], weight), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shards", [1, 3])
def test_half_precision_and_shards_load_into_float32(dtype, shards, tmp_path):
    """Weights in bf16 lose most of the updates of a small learning rate."""
    model = make_model(V, torch.float32, tie_word_embeddings=False)
    loaded = load_model(write_folder(tmp_path / "it", dict(model_type="llama"), model, dtype, shards))
    for name, weight in model.state_dict().items():
        assert loaded.state_dict()[name].dtype == torch.float32
        assert torch.equal(loaded.state_dict()[name], weight.to(dtype).float()), name


@pytest.mark.parametrize("edit, reason", [
    (dict(model_type="gemma2"), "model_type 'gemma2' is not one of llama, mistral"),
    (dict(model_type="mixtral"), "model_type 'mixtral'"),
    (dict(architectures=["LlamaForSequenceClassification"]), "LlamaForSequenceClassification"),
    (dict(hidden_act="gelu"), "hidden_act 'gelu' is not supported, only 'silu'"),
    (dict(mlp_bias=True), "mlp_bias True"),
    (dict(model_type="qwen2", use_sliding_window=True), "use_sliding_window True"),
    (dict(model_type="minimind", use_moe=True), "use_moe True"),
    (dict(rope_scaling={"type": "yarn", "factor": 4.0}), "rope_scaling of type 'yarn'"),
    (dict(rope_scaling={"rope_type": "dynamic", "factor": 4.0}), "rope_scaling of type 'dynamic'"),
    (dict(rope_scaling={"rope_type": "llama3", "factor": 4.0}), "lacks low_freq_factor"),
    (dict(partial_rotary_factor=0.5), "partial_rotary_factor 0.5"),
    (dict(rope_parameters={"rope_type": "default", "partial_rotary_factor": 0.5}), "partial_rotary_factor"),
    (dict(quantization_config={"quant_method": "gptq"}), "quantization_config"),
    (dict(hidden_size=None), "hidden_size missing"),
    (dict(num_key_value_heads=3), "num_attention_heads 4 is not a multiple"),
    (dict(hidden_size="16"), "hidden_size '16' is not an integer from 1"),
    (dict(hidden_act=["silu"]), "hidden_act"),
    (dict(rope_theta="big"), "rope_theta 'big' is not a finite number"),
])  # fmt: skip
def test_what_is_not_supported_is_refused_by_name(edit, reason, llama):
    """Without the option the model would load, answer, and be a different one."""
    (llama / "config.json").write_text(json.dumps({**BASE, "model_type": "llama", **edit}))
    with pytest.raises(InputError, match=reason) as raised:
        load_model(llama)
    assert str(llama) in str(raised.value)


def change(folder, edit) -> None:
    weights = load_file(folder / "model.safetensors")
    edit(weights)
    save_file(weights, folder / "model.safetensors")


@pytest.mark.parametrize("edit, reason", [
    (lambda w: w.pop("model.norm.weight"), r"norm\.weight is missing"),
    (lambda w: w.update({"model.extra": torch.zeros(1)}), "extra is unexpected"),
    (lambda w: w.update({"model.norm.weight": torch.ones(3)}), r"norm\.weight has the shape \(3,\), exp"),
    (lambda w: w.update({"model.norm.weight": torch.ones(16, dtype=torch.int8)}), "quantised"),
    (lambda w: w.update({"model.layers.0.self_attn.q_norm.weight": torch.ones(4)}), "q_norm.weight is unexp"),
], ids=["missing", "unexpected", "shape", "quantised", "other family"])  # fmt: skip
def test_weights_that_do_not_fit_are_listed(llama, edit, reason):
    change(llama, edit)
    with pytest.raises(InputError, match=f"(?s){reason}"):
        load_model(llama)


def test_stored_rotary_tables_and_a_copy_of_the_head_are_left_out(tmp_path):
    """Old files contain both. A head that is not a copy is refused: the model would be a different one."""
    model = make_model(V, torch.float32)
    folder = write_folder(tmp_path / "old", dict(model_type="llama", tie_word_embeddings=True), model)
    head = model.state_dict()["embed_tokens.weight"].clone()
    change(folder, lambda w: w.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2)}))
    change(folder, lambda w: w.update({"lm_head.weight": head}))
    assert torch.equal(load_model(folder).embed_tokens.weight, head)
    assert load_model(folder, "meta").embed_tokens.weight.is_meta, "which is a rank's that waits for its part"
    change(folder, lambda w: w.update({"lm_head.weight": head + 1}))
    with pytest.raises(InputError, match=r"lm_head\.weight is not embed_tokens\.weight"):
        load_model(folder)


@pytest.mark.parametrize("size", [0, 7, 1000])
def test_a_torn_file_is_refused(llama, size):
    data = (llama / "model.safetensors").read_bytes()
    (llama / "model.safetensors").write_bytes(data[:size])
    with pytest.raises(InputError, match="unreadable safetensors"):
        load_model(llama)


@pytest.mark.parametrize("name, reason", [
    ("../llama/model.safetensors", "is not a file of this folder"),
    ("model-00001-of-00002.safetensors", "no model-00001-of-00002"),
], ids=["outside", "missing"])  # fmt: skip
def test_an_index_names_files_of_its_folder(llama, name, reason):
    """A path out of the folder would let a stranger's index name any file."""
    index = {"weight_map": {"model.norm.weight": name}}
    (llama / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match=reason):
        load_model(llama)


def test_other_formats_and_a_missing_library_are_named(llama, monkeypatch):
    (llama / "model.safetensors").rename(llama / "pytorch_model.bin")
    with pytest.raises(InputError, match=r"no model\.safetensors; other formats"):
        load_model(llama)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(InputError, match="need safetensors: pip install safetensors"):
        load_model(llama)


# ---- Scaled rotations


def test_llama3_scaling_is_the_published_rule():
    """Low frequencies are divided, high ones kept, the rest interpolated: pair by pair, in wavelengths."""
    frequencies = torch.tensor([500.0 ** (-2 * i / 32) for i in range(16)], dtype=torch.float64)
    ours = scaled(frequencies, {"rope_type": "llama3", **LLAMA3})
    kinds = set()
    for frequency, got in zip(frequencies.tolist(), ours.tolist(), strict=True):
        wavelength = 2 * math.pi / frequency
        if wavelength < 32 / 4.0:
            kind, expected = "short", frequency
        elif wavelength > 32 / 1.0:
            kind, expected = "long", frequency / 8.0
        else:
            smooth = (32 / wavelength - 1.0) / (4.0 - 1.0)
            kind, expected = "between", (1 - smooth) * frequency / 8.0 + smooth * frequency
        kinds.add(kind)
        assert got == pytest.approx(expected, rel=1e-12)
    assert kinds == {"short", "long", "between"}


def test_linear_scaling_is_positions_closer_together():
    """Divided frequencies at position p equal plain ones at p / factor."""
    plain = make_model(V)
    linear = Transformer(ModelConfig(**{**plain.config.to_dict(), "rope_scaling": {
        "rope_type": "linear", "factor": 4.0,
    }})).double()  # fmt: skip
    linear.load_state_dict(plain.state_dict())
    ids = [3, 1, 4, 1, 5]
    assert not torch.allclose(all_logits(plain, ids), all_logits(linear, ids))
    positions = torch.arange(5) / 4
    hidden = plain.hidden(torch.tensor(ids), positions, one_stream(ids))
    torch.testing.assert_close(plain.logits(hidden), all_logits(linear, ids), rtol=0, atol=1e-12)


# ---- Out again


def run_folder(path, tokenizer, **options):
    model = make_model(tokenizer.vocab_size, torch.float32, **options)
    save_folder(path, tokenizer, model, settings={"model": "base"})
    return model


OUT = {
    **{name: options for name, options in MODEL_OPTIONS.items() if "num_experts" not in options},
    "all_biases": {"attention_bias": True, "attention_output_bias": True},
    "window": {"sliding_window": 48, "tie_word_embeddings": False},
    "llama3": {"rope_scaling": {"rope_type": "llama3", **LLAMA3}, "rope_theta": 500.0},
}


def test_experts_are_not_exported_as_something_else(tokenizer, tmp_path):
    run_folder(tmp_path / "run", tokenizer, num_experts=3)
    with pytest.raises(InputError, match="a mixture of experts cannot be exported yet"):
        export(tmp_path / "run", tmp_path / "out", torch.float32)


@pytest.mark.parametrize("options", OUT)
def test_export_and_load_is_the_identity(options, tokenizer, tmp_path):
    """Bit for bit; Qwen3 needs a bias of o_proj, which is then zeros."""
    model = run_folder(tmp_path / "run", tokenizer, **OUT[options])
    export(tmp_path / "run", tmp_path / "out", torch.float32)
    again = load_model(tmp_path / "out")
    for name, weight in again.state_dict().items():
        expected = model.state_dict().get(name, torch.zeros_like(weight))
        assert torch.equal(weight, expected), name
    ids = [3, 1, 4, 1, 5, 9, 2, 6]
    assert torch.equal(all_logits(again, ids), all_logits(model, ids))
    assert again.state_dict().keys() >= model.state_dict().keys()


@pytest.mark.parametrize("options, family", [
    ("plain", "LlamaForCausalLM"), ("attention_bias", "Qwen2ForCausalLM"), ("qk_norm", "Qwen3ForCausalLM"),
    ("window", "MistralForCausalLM"), ("all_biases", "LlamaForCausalLM"),
])  # fmt: skip
def test_export_names_a_family_that_computes_the_same(options, family, tokenizer, tmp_path):
    run_folder(tmp_path / "run", tokenizer, **OUT[options])
    export(tmp_path / "run", tmp_path / "out", torch.bfloat16)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architectures"] == [family] and config["torch_dtype"] == "bfloat16"
    assert config["eos_token_id"] == tokenizer.end_id
    assert {weight.dtype for weight in load_file(tmp_path / "out" / "model.safetensors").values()} == {
        torch.bfloat16
    }
    texts = {path.name for path in (tmp_path / "out").iterdir()}
    assert texts >= {"tokenizer.json", "tokenizer_config.json", "generation_config.json"}


def test_sentencepieces_own_file_goes_all_the_way(tokenizer, tmp_path):
    """Byte for byte from the first folder: llama.cpp's converter needs the scores in it."""
    files = {"tokenizer.model": bytes(range(256)), "added_tokens.json": b'{"<pad>": 3}\r\n'}
    tokenizer.save(tmp_path)
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    run_folder(tmp_path / "run", ChatTokenizer(tmp_path / "tokenizer.json"))
    export(tmp_path / "run", tmp_path / "out", torch.float32)
    assert {name: (tmp_path / "out" / name).read_bytes() for name in files} == files


def test_export_command(tokenizer, tmp_path, capsys):
    run_folder(tmp_path / "run", tokenizer)
    command = [str(tmp_path / "run"), "--to", str(tmp_path / "out"), "--dtype", "bf16"]
    module.main(command)
    assert load_model(tmp_path / "out").config.vocab_size == tokenizer.vocab_size
    assert capsys.readouterr().out == f"{tmp_path / 'out'}: {tmp_path / 'run'} in bf16\n"
    with pytest.raises(InputError, match="has no adapter: its run had no --lora-rank"):
        module.main([*command, "--adapter"])


def test_an_adapter_is_exported_as_peft_names_it(tokenizer, tmp_path):
    model = make_model(tokenizer.vocab_size, torch.float32)
    add_adapters(model, 3, 12.0, "q_proj,v_proj", seed=0)
    save_model(tmp_path / "run", model, settings={"model": "org/base"})
    export_adapter(tmp_path / "run", tmp_path / "out", torch.float32)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["target_modules"]) == (3, 12.0, ["q_proj", "v_proj"])
    assert config["base_model_name_or_path"] == "org/base"
    written = load_file(tmp_path / "out" / "adapter_model.safetensors")
    name = "base_model.model.model.layers.1.self_attn.v_proj.lora_A.weight"
    assert torch.equal(written[name], model.layers[1].self_attn.v_proj.lora_A) and len(written) == 8


# ---- The scripts


@pytest.mark.parametrize("script", [train_sft, train_dpo, train_reward])
def test_more_ids_than_embeddings_are_refused(script, tokenizer, tmp_path):
    """Otherwise an index error deep inside, or an assertion on the GPU, ends the run."""
    save_folder(tmp_path / "model", tokenizer, make_model(tokenizer.vocab_size - 1, torch.float32))
    with pytest.raises(InputError, match=f"has {tokenizer.vocab_size} ids, the model's embedding only"):
        script.main(["--model", str(tmp_path / "model"), "--out", str(tmp_path / "out")])


@pytest.mark.parametrize("script", [train_sft, train_dpo, train_reward])
def test_text_longer_than_a_sliding_window_is_refused(script, tokenizer, tmp_path):
    """Without the window, attention would use tokens that it did not use in pretraining."""
    run_folder(tmp_path / "model", tokenizer, sliding_window=64)
    arguments = ["--model", str(tmp_path / "model"), "--out", str(tmp_path / "out"), "--max-length"]
    with pytest.raises(InputError, match="65 tokens do not fit into the model's sliding window of 64"):
        script.main([*arguments, "65"])
    assert ModelConfig(V, sliding_window=64).check_fits(length=64) is None
