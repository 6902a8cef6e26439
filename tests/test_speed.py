"""Options that save time or memory change no result: vocabulary chunks, recomputation, precision."""

import shutil
import subprocess
import sys

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode

import train_dpo
import train_reward
import train_sft
from dataset.packing import build_stream
from dataset.store import open_store
from errors import InputError
from model import transformer
from model.moe import router_loss
from model.transformer import compile_layers
from model.weights import load_model
from tests.conftest import MODEL_OPTIONS, ROOT, make_model, save_folder
from tests.loops import weights
from training import setup
from training.precision import Precision

COMPILER = pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler: no g++")
SCRIPTS = {"train_dpo": train_dpo, "train_sft": train_sft, "train_reward": train_reward}


@pytest.fixture
def stream(ragged, tokenizer):
    return build_stream(open_store(ragged, "preferences", tokenizer, 512), range(7))


def outcome(model, stream, distributions=False) -> tuple[list, dict]:
    """Log-probs and experts' balance of a forward, and the gradients of a weighted sum over tokens."""
    model.zero_grad()
    balances = []
    found = [model(stream, balances)]
    balance = torch.as_tensor(router_loss(balances))
    weight = torch.linspace(-1, 2, len(stream.targets), dtype=found[0].dtype)
    (found[0] @ weight + 0.3 * balance).backward()
    assert len(balances) == (model.config.num_hidden_layers if model.config.num_experts else 0)
    if distributions:
        with torch.no_grad():
            found.append(torch.cat([logps.square().sum(-1) for logps in model.log_distributions(stream)]))
    return [*found, balance.detach()], {name: p.grad.clone() for name, p in model.named_parameters()}


def assert_same(one, two, tolerance=1e-11):
    for a, b in zip(one[0], two[0], strict=True):
        assert (a - b).abs().max() <= tolerance
    for name, gradient in one[1].items():
        assert (gradient - two[1][name]).abs().max() <= tolerance * max(1, gradient.abs().max()), name


class Largest(TorchDispatchMode):
    """The shape of the largest tensor that any operation returned, forward and backward."""

    shape = torch.Size()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for x in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(x, torch.Tensor) and x.numel() > self.shape.numel():
                self.shape = x.shape
        return result


def kept_bytes(run) -> int:
    """The bytes that autograd keeps from forward to backward, each storage once."""
    storages = {}

    def keep(x):
        storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with saved_tensors_hooks(keep, lambda x: x):
        graph = run()
    assert graph is not None
    return sum(storages.values())


# ---- The vocabulary


@pytest.mark.parametrize("options", MODEL_OPTIONS.values(), ids=MODEL_OPTIONS)
def test_chunks_are_exact(stream, tokenizer, options, monkeypatch):
    """Log-probs, distributions, balance and every gradient to 1e-11: chunks of 1, 7, nearly all and all."""
    model = make_model(tokenizer.vocab_size, **options)
    whole, positions = outcome(model, stream, distributions=True), len(stream.targets)
    for chunk in (1, 7, positions - 1, positions):
        monkeypatch.setattr(transformer, "MAX_LOGITS", chunk * tokenizer.vocab_size)
        assert_same(outcome(model, stream, distributions=True), whole)
        assert_same(outcome(model, stream), ([whole[0][0], whole[0][2]], whole[1]))


def test_chunks_add_up_in_float32(stream, tokenizer, monkeypatch):
    """Under bf16, too: with autocast's cache the gradients of all chunks are summed in one bf16 copy."""
    model = make_model(tokenizer.vocab_size, torch.float32, tie_word_embeddings=False)

    def gradient(chunk: int) -> torch.Tensor:
        monkeypatch.setattr(transformer, "MAX_LOGITS", chunk * tokenizer.vocab_size)
        model.zero_grad()
        with Precision("bf16", torch.device("cpu")).autocast():
            logps = model(stream)
        logps.sum().backward()
        return model.lm_head.weight.grad.clone()

    whole, chunks = gradient(len(stream.targets)), gradient(1)
    assert torch.equal(whole, whole.bfloat16().float()) and not torch.equal(chunks, chunks.bfloat16().float())
    assert (chunks - whole).norm() < 0.005 * whole.norm()


def test_no_tensor_is_positions_times_vocabulary(stream, monkeypatch):
    """For any vocabulary, every operation of forward and backward returns at most MAX_LOGITS scores."""
    monkeypatch.setattr(transformer, "MAX_LOGITS", 2**18)
    for vocabulary in (4000, 8000, 16000):
        model = make_model(vocabulary, torch.float32, hidden_size=8, intermediate_size=12)
        with Largest() as largest:
            outcome(model, stream, distributions=True)
        matrix = vocabulary * 8  # The weights and their gradient are as large as they are.
        assert largest.shape.numel() <= max(2**18, matrix), largest.shape
        assert len(stream.targets) * vocabulary > max(2**18, 4 * matrix)


def test_what_is_kept_does_not_grow_with_the_vocabulary(stream, monkeypatch):
    """Only the weights grow with the vocabulary, not the tensors kept between forward and backward."""
    monkeypatch.setattr(transformer, "MAX_LOGITS", 2**13)
    kept = []
    for vocabulary in (1000, 4000):
        model = make_model(vocabulary, torch.float32)
        own = sum(p.untyped_storage().nbytes() for p in model.parameters())
        kept.append(kept_bytes(lambda model=model: model(stream)) - own)
    assert kept[1] <= kept[0]


# ---- Layers


@pytest.mark.parametrize("options", MODEL_OPTIONS.values(), ids=MODEL_OPTIONS)
def test_checkpointed_activations_are_exact_and_not_kept(stream, tokenizer, options):
    """The same numbers, also of experts and their balance, with a fraction of the memory."""
    model = make_model(tokenizer.vocab_size, num_hidden_layers=4, **options)
    plain, needed = outcome(model, stream), kept_bytes(lambda: model(stream))
    model.checkpoint_activations = True
    assert_same(outcome(model, stream), plain)
    assert kept_bytes(lambda: model(stream)) < 0.4 * needed


# ---- Compiled


def test_one_compilation_serves_all_layers_and_streams(ragged, tokenizer, monkeypatch):
    """torch stops compiling a function after eight compilations and runs it uncompiled.

    Here the traced graphs run as they are; the slow test of `--compile` below compiles them to C++.
    """
    compile_module = torch.nn.Module.compile
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda module, **how: compile_module(module, backend="eager", **how)
    )
    model = make_model(tokenizer.vocab_size, num_hidden_layers=10)
    store = open_store(ragged, "preferences", tokenizer, 512)
    streams = [build_stream(store, rows) for rows in (range(7), [3], range(1, 6))]
    plain = [outcome(model, stream) for stream in streams]
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    compile_layers(model)
    for stream, wanted in zip(streams, plain, strict=True):
        assert_same(outcome(model, stream), wanted)
    # Before and after attention, of a layer and of its parts; lengths are constants the first time, at most.
    assert 0 < counters["stats"]["unique_graphs"] <= 8


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_fused_attention_stays_out_of_compiled_layers(stream, tokenizer, monkeypatch):
    """Traced into a layer, FlexAttention gets heads of symbolic size, which its kernels do not support."""
    graphs, compile_module = [], torch.nn.Module.compile

    def keep(graph, inputs):
        graphs.append(graph)
        return graph

    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda module, **how: compile_module(module, backend=keep, **how)
    )
    model = make_model(tokenizer.vocab_size)
    model.fused_attention = True
    with torch.no_grad():
        plain = model(stream)
        torch._dynamo.reset()
        compile_layers(model)
        assert (model(stream) - plain).abs().max() < 1e-11
    calls = [str(node.target) for graph in graphs for node in graph.graph.nodes]
    assert "linear" in " ".join(calls) and not any("flex" in call for call in calls)
    # unflatten(-1, (-1, D)): the number of heads may be inferred, their size is a constant.
    sizes = [node.args[2] for graph in graphs for node in graph.graph.nodes if node.target == "unflatten"]
    assert sizes and all(size == (-1, 4) for size in sizes), sizes


def test_experts_are_not_compiled():
    with pytest.raises(InputError, match="--compile does not work with a mixture of experts"):
        compile_layers(make_model(12, num_experts=2))


# ---- Through the loop


@pytest.mark.parametrize(
    "flags",
    ["--layout twin", "--checkpoint-activations", "chunks", "--micro-batch-tokens 200",
     pytest.param("--compile --micro-batch-tokens 200", marks=[pytest.mark.slow, COMPILER])],
)  # fmt: skip
def test_twenty_steps_are_the_same(flags, ragged, tokenizer, tmp_path, monkeypatch):
    """Layouts, chunks, recomputation, micro-batches: weights to 1e-9 in float64."""
    save_folder(tmp_path / "start", tokenizer)
    monkeypatch.setattr(setup, "load_model", lambda *arguments: load_model(*arguments).double())
    common = [
        *f"--model {tmp_path / 'start'} --data {ragged} --batch-size 7 --epochs 20 --lr 1e-3".split(),
        *("--warmup-steps", "2", "--device", "cpu", "--precision", "fp32", "--eval-data", ""),
    ]
    train_dpo.main([*common, "--out", str(tmp_path / "plain")])
    if flags == "chunks":
        monkeypatch.setattr(transformer, "MAX_LOGITS", 11 * tokenizer.vocab_size)
    others = flags.split() if flags != "chunks" else []
    train_dpo.main([*common, *others, "--out", str(tmp_path / "other")])
    plain, other = weights(tmp_path / "plain"), weights(tmp_path / "other")
    start = weights(tmp_path / "start")
    for name, value in plain.items():
        assert (value - other[name]).abs().max() < 1e-9, name
        assert (value - start[name]).abs().max() > 1e-3, name


@pytest.mark.parametrize("script", SCRIPTS)
def test_matmul_precision_reaches_torch(script, ragged, tokenizer, tmp_path, monkeypatch):
    """The flag sets torch's precision, and a later run does not inherit it."""
    save_folder(tmp_path / "start", tokenizer)
    seen = []
    module = SCRIPTS[script]
    mean = module.Meter.mean

    def spy(meter):
        seen.append(torch.get_float32_matmul_precision())
        return mean(meter)

    monkeypatch.setattr(module.Meter, "mean", spy)
    data = ragged
    if script == "train_sft":
        data = tmp_path / "chats.jsonl"
        data.write_text('{"prompt": "2 + 2?", "response": "4"}\n')
    flags = f"--model {tmp_path / 'start'} --data {data} --max-steps 1 --device cpu --out {tmp_path / 'out'}"
    module.main([*flags.split(), "--eval-data", "", "--matmul-precision", "medium"])
    module.main([*flags.split(), "--eval-data", "", "--overwrite"])
    assert set(seen[: len(seen) // 2]) == {"medium"} and set(seen[len(seen) // 2 :]) == {"highest"}


# ---- Memory on a CPU

FAULTS = """
import resource, torch
from training.distributed import keep_freed_memory
def pages():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        torch.ones(2**24)  # 64 MiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(pages(), keep_freed_memory(), pages(), pages())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have other allocators")
def test_freed_memory_is_used_again():
    """Ten tensors of 64 MiB in turn: the kernel provides pages for each, or once for all."""
    ran = subprocess.run([sys.executable, "-c", FAULTS], cwd=ROOT, capture_output=True, text=True, check=True)
    given_back, _, _, kept = ran.stdout.split()
    assert int(kept) * 5 < int(given_back)
