"""What many tests share: a tokenizer, tiny models, data files, and the plainest statements of what is right.

The functions without a fixture are oracles. They say in another way what the project computes: one sequence
at a time, no batch, no cache, every formula spelled out. They are slow, and short enough to be believed.
"""

import functools
import gzip
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dataset.records import Message
from dataset.tokenizer import END, START, ChatTokenizer, train
from model.config import ModelConfig
from model.export import export_adapter
from model.lora import adapter_weights, add_adapters
from model.transformer import Transformer
from model.weights import save_model
from tests import ranks
from tests.planted.mutant import force_bf16

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared" / "data"  # Real data and a real tokenizer, where the machine has them.

TEXTS = [
    "How many apples are left? Two apples are left.",
    "Please answer in one sentence. The answer is short.",
    "user assistant system im_start im_end",
    "苹果还剩几个？还剩两个苹果。",
    "请用一句话回答。今天天气很好，谢谢你。",
    "Thank you! 😀 👍🏽 Hello, hello, hello again. 123 456",
]


if "MINIDPO_TEST_BF16" in os.environ:  # 0 or 1: as on a CPU without, or with, bf16 instructions
    force_bf16(os.environ["MINIDPO_TEST_BF16"])


# ---- The machine: one thread, a cache of our own, no network


@pytest.fixture(scope="session", autouse=True)
def machine(tmp_path_factory):
    """One thread, so that sums repeat bit for bit; a cache of our own; no network; English words."""
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MINIDPO_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("LC_ALL", "C.UTF-8")  # English words, also where the developer's shell is Chinese
        patch.setenv("TOKENIZERS_PARALLELISM", "false")
        for name in ("connect", "connect_ex"):
            patch.setattr(socket.socket, name, local_only(getattr(socket.socket, name)))
        with ranks.forking():
            yield


def local_only(connect):
    """A test that downloads anything passes or fails with the weather; only this machine may be called."""

    def checked(self, address):
        here = ("localhost", "127.0.0.1", "::1", os.uname().nodename)
        assert self.family == socket.AF_UNIX or address[0] in here, f"a test tried to reach {address}"
        return connect(self, address)

    return checked


MEASURED = """
import resource, sys
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
"""


def run_python(code: str, *arguments, seconds=60) -> str:
    """The output of a script in a new interpreter, in which `peak()` is its largest memory so far in MiB."""
    command = [sys.executable, "-c", MEASURED + code, *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=seconds)
    return done.stdout


def shared(name: str) -> Path:
    """A file of real data, or a skip that says why."""
    path = SHARED / name
    if not path.exists():
        pytest.skip(f"needs {path}, which is not on this machine")
    return path


# ---- Tokenizers and models


@pytest.fixture(scope="session")
def tokenizer_file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    train(TEXTS, vocab_size=320).save(str(path))
    return path


@pytest.fixture(scope="session")
def tokenizer(tokenizer_file) -> ChatTokenizer:
    """Byte-level BPE over a few sentences: 256 bytes, 3 control tokens and some sixty merges."""
    return ChatTokenizer(tokenizer_file)


@pytest.fixture(scope="session")
def real_tokenizer(tmp_path_factory) -> ChatTokenizer:
    """A tokenizer that this project did not train, with control tokens that ChatML does not use."""
    path = tmp_path_factory.mktemp("real") / "tokenizer.json"
    path.write_bytes(gzip.decompress(shared("tokenizers/minimind_tokenizer.json.gz").read_bytes()))
    return ChatTokenizer(path)


def make_model(vocab_size: int, dtype=torch.float64, seed=0, spread=0.15, **options) -> Transformer:
    """Two layers, four query and two key heads; weights so large that every token matters to the next."""
    shape = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    torch.manual_seed(seed)
    model = Transformer(ModelConfig(vocab_size, **{**shape, "intermediate_size": 24, **options}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * spread)
    return model.to(dtype)


# The options of the family, one by one and all together.
MODEL_OPTIONS = {
    "plain": {},
    "untied": {"tie_word_embeddings": False},
    "qk_norm": {"qk_norm": True, "head_dim": 6},
    "attention_bias": {"attention_bias": True},
    "one_key_head": {"num_key_value_heads": 1},
    "a_key_head_each": {"num_key_value_heads": 4},
    "experts": {"num_experts": 4, "moe_intermediate_size": 10},
    "one_expert_and_a_shared_one": {
        "num_experts": 5,
        "num_experts_per_tok": 1,
        "norm_topk_prob": False,
        "shared_expert_intermediate_size": 12,
    },
    "all": {
        "tie_word_embeddings": False,
        "qk_norm": True,
        "attention_bias": True,
        "head_dim": 8,
        "rope_theta": 100.0,
    },
}


def save_folder(path: Path, tokenizer: ChatTokenizer, model=None, settings=None, **options) -> Path:
    """A model folder with its tokenizer: of this model, or of `make_model` with these options in float32."""
    model = model or make_model(tokenizer.vocab_size, **{"dtype": torch.float32, **options})
    save_model(path, model, settings=settings)
    tokenizer.save(path)
    return path


def save_adapter(path: Path, tokenizer: ChatTokenizer, targets="all") -> Path:
    """A peft folder with an adapter of rank 2 for `make_model`, far from zero."""
    model = make_model(tokenizer.vocab_size, torch.float32)
    add_adapters(model, 2, 4.0, targets, seed=1)
    for weight in adapter_weights(model).values():
        weight.add_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(2)) * 0.2)
    save_model(path / "run", model, settings={"model": "base"})
    export_adapter(path / "run", path, torch.float32)
    return path


@pytest.fixture(scope="session")
def folders(tmp_path_factory, tokenizer) -> tuple[str, str]:
    """Two model folders that differ in their weights only; not to be written to."""
    parent = tmp_path_factory.mktemp("models")
    return tuple(str(save_folder(parent / str(seed), tokenizer, seed=seed)) for seed in (1, 2))


class NoFloat64(TorchDispatchMode):
    """Within, an operation that returns float64 raises TypeError, as on Apple's MPS."""

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        result = function(*arguments, **(options or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            from_numpy = function is torch.ops.aten.lift_fresh.default  # on the CPU, before it is converted
            if isinstance(tensor, torch.Tensor) and tensor.dtype == torch.float64 and not from_numpy:
                raise TypeError(f"{function} returns float64")
        return result


# ---- Data


@pytest.fixture
def write_jsonl(tmp_path):
    """Write rows as a JSONL file of this name; return its path."""

    def write(name: str, rows: list[dict]) -> Path:
        path = tmp_path / name
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        return path

    return write


def turns(*texts: str, system: str | None = None) -> list[Message]:
    """Texts of user and assistant by turns, as messages."""
    spoken = [Message(("user", "assistant")[place % 2], text) for place, text in enumerate(texts)]
    return ([] if system is None else [Message("system", system)]) + spoken


# Prompt, chosen, rejected: ragged, an odd number of them, no two alike. "!" and "7" are one token each in the
# small tokenizer, and white space at the edges of a response belongs to it.
RAGGED = [
    (turns("How many apples are left?"), "Two apples are left.", "7"),
    (turns("Hi"), "!", "Thank you, the answer is short. Hello again, hello."),
    (turns("苹果还剩几个？"), "还剩两个苹果。", "不知道"),
    (turns("😀 👍🏽", system="Please answer in one sentence."), "Thank you! 😀", "👍🏽 👍🏽 👍🏽"),
    (turns("Hello", "Hello, how are you?", "很好，谢谢你。"), "  今天天气很好\n", "\nNo.\n\n"),
    (turns("1", "2", "3", "4", "5?", system="系统"), "6", "The answer is 123 456"),
    (turns("A\nB\n"), "The same beginning, then one", "The same beginning, then two, and more"),
]


def as_record(pair: tuple[list[Message], str, str]) -> dict:
    """A pair in the messages shape: prompt as messages, answers as text."""
    prompt, chosen, rejected = pair
    return {"prompt": [vars(message) for message in prompt], "chosen": chosen, "rejected": rejected}


@pytest.fixture
def ragged(write_jsonl) -> Path:
    """A JSONL file of the `RAGGED` pairs."""
    return write_jsonl("ragged.jsonl", [as_record(pair) for pair in RAGGED])


# ---- Oracles


@functools.cache
def plain_encoder(tokenizer_json: str) -> Tokenizer:
    """The library's own tokenizer, told to read control tokens as text."""
    encoder = Tokenizer.from_str(tokenizer_json)
    encoder.encode_special_tokens = True
    return encoder


def plain_ids(tokenizer: ChatTokenizer, messages: list[Message], response: str) -> tuple[list, list]:
    """The template once more: ids of the prompt, and ids of the response with its end token."""
    encoder = plain_encoder(tokenizer.json)
    encode = encoder.encode
    start, end = (encoder.token_to_id(token) for token in (START, END))
    prompt: list[int] = []
    for place, (role, content) in enumerate([*((m.role, m.content) for m in messages), ("assistant", None)]):
        if place:
            prompt += encode("\n").ids
        prompt += [start, *encode(role + "\n").ids]
        if content is not None:
            prompt += [*encode(content).ids, end]
    return prompt, [*encode(response).ids, end]


def plain_logits(model: Transformer, ids: list[int]) -> Tensor:
    """The scores of each next token, (L, V)."""
    head = "embed_tokens" if model.config.tie_word_embeddings else "lm_head"
    return plain_hidden(model, ids) @ model.state_dict(keep_vars=True)[f"{head}.weight"].T


def plain_hidden(model: Transformer, ids: list[int]) -> Tensor:
    """The transformer once more, for one sequence: dense causal attention, one head at a time, (L, d).

    Rotary positions are complex rotations, key heads are looked up by h // (H / G), norms are spelled out,
    and a token is shown to its experts one by one.
    """
    config, weights = model.config, model.state_dict(keep_vars=True)

    def norm(x: Tensor, name: str) -> Tensor:
        return x / (x.pow(2).mean(-1, keepdim=True) + config.rms_norm_eps).sqrt() * weights[f"{name}.weight"]

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ weights[f"{name}.weight"].T + weights.get(f"{name}.bias", 0)

    def turn(x: Tensor) -> Tensor:
        # Angles are float32 by convention, in a float64 model too.
        frequencies = config.rope_theta ** (-torch.arange(0, size, 2).float() / size)
        angles = torch.arange(len(x)).float()[:, None] * frequencies
        by = torch.complex(angles.cos(), angles.sin()).to(torch.complex128)
        turned = torch.complex(x[:, : size // 2].double(), x[:, size // 2 :].double()) * by
        return torch.cat([turned.real, turned.imag], dim=1).to(x.dtype)

    def swiglu(x: Tensor, name: str) -> Tensor:
        gated = F.silu(linear(x, f"{name}.gate_proj")) * linear(x, f"{name}.up_proj")
        return linear(gated, f"{name}.down_proj")

    def mixture(h: Tensor, name: str) -> Tensor:
        outputs = []
        for token in h:
            router = linear(token, f"{name}.gate").exp()
            best = sorted(range(config.num_experts), key=lambda e: -router[e].item())
            best = best[: config.num_experts_per_tok]
            whole = sum(router[e] for e in (best if config.norm_topk_prob else range(config.num_experts)))
            y = sum(router[e] / whole * swiglu(token, f"{name}.experts.{e}") for e in best)
            if config.shared_expert_intermediate_size:
                how_much = 1 / (1 + (-linear(token, f"{name}.shared_expert_gate")).exp())
                y = y + how_much * swiglu(token, f"{name}.shared_expert")
            outputs.append(y)
        return torch.stack(outputs)

    size, seen = config.head_dim, torch.ones(len(ids), len(ids), dtype=torch.bool).tril()
    group = config.num_attention_heads // config.num_key_value_heads
    x = weights["embed_tokens.weight"][torch.tensor(ids)]
    for layer in range(config.num_hidden_layers):
        name = f"layers.{layer}"
        h = norm(x, f"{name}.input_layernorm")
        q, k, v = (linear(h, f"{name}.self_attn.{part}_proj") for part in "qkv")
        heads = []
        for head in range(config.num_attention_heads):
            key_head = head // group
            query = q[:, head * size : (head + 1) * size]
            key, value = (part[:, key_head * size : (key_head + 1) * size] for part in (k, v))
            if config.qk_norm:
                query, key = norm(query, f"{name}.self_attn.q_norm"), norm(key, f"{name}.self_attn.k_norm")
            query, key = turn(query), turn(key)
            scores = query @ key.T / size**0.5
            heads.append(scores.masked_fill(~seen, -torch.inf).softmax(1) @ value)
        x = x + linear(torch.cat(heads, dim=1), f"{name}.self_attn.o_proj")
        h = norm(x, f"{name}.post_attention_layernorm")
        x = x + (mixture(h, f"{name}.mlp") if config.num_experts else swiglu(h, f"{name}.mlp"))
    return norm(x, "norm")


def plain_logp(model: Transformer, prompt: list[int], response: list[int]) -> Tensor:
    """log pi(y | x): feed prompt + y[:t], read the last position, add up log pi(y_t | x, y_<t)."""
    total = torch.zeros((), dtype=torch.float64)
    for t, token in enumerate(response):
        scores = plain_logits(model, prompt + response[:t])[-1]
        total = total + scores[token] - scores.logsumexp(0)
    return total
