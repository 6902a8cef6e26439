"""Folders as transformers writes them: tiny random models of each family, and tokenizers like theirs."""

import json
from pathlib import Path

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from dataset.template import CHATML
from dataset.tokenizer import train
from tests.conftest import TEXTS

transformers = pytest.importorskip("transformers", reason="the extra `parity` is not installed")
transformers.logging.set_verbosity_error()

V = 420
SHAPE = dict(
    vocab_size=V, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    intermediate_size=48, max_position_embeddings=512,
)  # fmt: skip
LLAMA3_ROPE = {
    "rope_type": "llama3", "rope_theta": 500.0, "original_max_position_embeddings": 64,
    "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
}  # fmt: skip
LINEAR_ROPE = {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}
# Name: their class, and what sets the family apart.
FAMILIES = {
    "llama-2": ("Llama", dict(rms_norm_eps=1e-5)),
    "llama-3": ("Llama", dict(rope_parameters=LLAMA3_ROPE, num_key_value_heads=1)),
    "llama-linear": ("Llama", dict(rope_parameters=LINEAR_ROPE)),
    "llama-biases": ("Llama", dict(attention_bias=True, head_dim=10)),
    "smollm2": ("Llama", dict(tie_word_embeddings=True, rope_theta=1e5)),
    "mistral": ("Mistral", dict(sliding_window=None, head_dim=12)),
    "mistral-wide-window": ("Mistral", dict(sliding_window=512)),
    "qwen2.5": ("Qwen2", dict(tie_word_embeddings=True, rope_theta=1e6)),
    "qwen3": ("Qwen3", dict(head_dim=16, rope_theta=1e6)),
    "qwen3-biases": ("Qwen3", dict(head_dim=16, attention_bias=True, tie_word_embeddings=True)),
    "minimind": ("Qwen3", dict(head_dim=8, rope_theta=1e6, tie_word_embeddings=True, num_key_value_heads=4)),
}


def their_model(family: str, **shape):
    """A random model of transformers' whose every weight matters: a fresh one has biases of 0, gains of 1."""
    name, options = FAMILIES[family]
    config = getattr(transformers, f"{name}Config")(**{**SHAPE, **options, **shape})
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.15)
    return model


def byte_level(specials: list[str]) -> Tokenizer:
    """Byte-level BPE, as Llama 3, Qwen and SmolLM have it, with these control tokens."""
    tokenizer = train(TEXTS, vocab_size=V - 40)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in specials])
    return tokenizer


def sentencepiece(specials: list[str]) -> Tokenizer:
    """BPE over spaces made visible, one of them before every text, and bytes for the unknown: as Llama 2."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()  # While it learns: no piece goes on behind a space.
    pieces = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(pieces)
    first = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    options = {"vocab_size": V - 40, "show_progress": False, "max_token_length": 8}
    trainer = trainers.BpeTrainer(special_tokens=first, **options)
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.pre_tokenizer = None
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    settings = json.loads(tokenizer.to_str())
    settings["added_tokens"] = settings["added_tokens"][:1]  # Bytes are ordinary tokens.
    tokenizer = Tokenizer.from_str(json.dumps(settings))
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in specials])
    return tokenizer


def metaspace(specials: list[str]) -> Tokenizer:
    """The same as newer files have it: a space before the first text only, and none behind control tokens."""
    tokenizer = sentencepiece(specials)
    settings = json.loads(tokenizer.to_str()) | {"normalizer": None}
    settings["pre_tokenizer"] = {
        "type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False,
    }  # fmt: skip
    return Tokenizer.from_str(json.dumps(settings))


def write_tokenizer(folder: Path, tokenizer: Tokenizer, template: str, **specials) -> None:
    """A tokenizer and its template as transformers saves them."""
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **specials)
    theirs.chat_template = template
    theirs.save_pretrained(folder)


@pytest.fixture(scope="session", params=FAMILIES)
def family(request) -> str:
    return request.param


@pytest.fixture(scope="session")
def folder(family, tmp_path_factory) -> Path:
    """A folder that transformers wrote: a random model of the family, and a ChatML tokenizer."""
    path = tmp_path_factory.mktemp(family)
    their_model(family).save_pretrained(path)
    write_tokenizer(path, byte_level([]), CHATML.source, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    return path
