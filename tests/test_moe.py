"""Mixture of experts: the output of a token, the balance of a layer, and how both enter the loss.

Experts are among `MODEL_OPTIONS`, so other files test them with a cache, in both layouts, saved and loaded.
"""

import json
import math

import pytest
import torch
import torch.nn.functional as F

import train_dpo
import train_reward
import train_sft
from dataset.packing import Windows, build_stream, deal
from dataset.store import open_store
from model.config import PRESETS, ModelConfig
from model.moe import MixtureOfExperts, load_balance, router_loss
from model.reward import RewardModel
from model.transformer import FeedForward, Transformer
from model.weights import load_model
from tests.conftest import RAGGED, as_record, make_model, save_folder, turns
from tests.loops import metrics, record_gradients
from tests.ranks import forked
from training.schedule import adamw

# Experts, experts a token, normalised weights, size of a shared expert.
SHAPES = [(4, 2, True, 0), (4, 2, False, 0), (3, 3, True, 0), (5, 1, False, 7), (4, 3, True, 7)]


def make_layer(experts: int, chosen: int, normalized: bool, shared: int) -> MixtureOfExperts:
    torch.manual_seed(0)
    config = ModelConfig(
        9, hidden_size=8, num_experts=experts, num_experts_per_tok=chosen, norm_topk_prob=normalized,
        moe_intermediate_size=6, shared_expert_intermediate_size=shared,
    )  # fmt: skip
    return MixtureOfExperts(config, FeedForward).double()


def plain_mixture(layer: MixtureOfExperts, x, chosen: int, normalized: bool):
    """One token and one expert at a time."""
    outputs = []
    for token in x:
        scores = (layer.gate.weight @ token).exp()
        best = scores.argsort(descending=True)[:chosen].tolist()
        whole = sum(scores[e] for e in best) if normalized else scores.sum()
        y = sum(scores[e] / whole * layer.experts[e](token) for e in best)
        if layer.shared_expert is not None:
            y = y + (layer.shared_expert_gate.weight[0] @ token).sigmoid() * layer.shared_expert(token)
        outputs.append(y)
    return torch.stack(outputs)


@pytest.mark.parametrize("shape", SHAPES)
def test_mixture_equals_a_loop_over_tokens_and_experts(shape):
    """Experts with the inputs, weights or places of other tokens give plausible numbers and a worse model."""
    layer = make_layer(*shape)
    x = torch.randn(23, 8, dtype=torch.float64, requires_grad=True)
    direction = torch.randn(23, 8, dtype=torch.float64)
    inputs = [x, *layer.parameters()]
    (y, _), expected = layer(x), plain_mixture(layer, x, *shape[1:3])
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-12)
    # An expert without a token has a gradient of zeros here, and None in the loop.
    gradients = torch.autograd.grad((y * direction).sum(), inputs)
    wanted = torch.autograd.grad((expected * direction).sum(), inputs, allow_unused=True)
    for got, want in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(got, torch.zeros_like(got) if want is None else want, rtol=0, atol=1e-11)


def build_context(length: int):
    """A context in which one text of this length attends to itself."""

    class OneText:
        def attend(self, layer, q, k, v):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    return OneText()


@pytest.mark.parametrize("tokens", [0, 1, 3])
def test_experts_without_a_token_have_zero_gradients_not_none(tokens):
    """Ranks wait for the gradient of every expert; a missing one blocks them all."""
    layer = make_layer(5, 1, False, 7)
    y, balance = layer(torch.randn(tokens, 8, dtype=torch.float64))
    (y.sum() + balance).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())
    idle = [expert for expert in layer.experts if not expert.down_proj.weight.grad.any()]
    assert len(idle) >= 5 - tokens
    assert balance.isfinite()


# ---- The balance


@pytest.mark.parametrize("experts, chosen", [(4, 1), (4, 2), (8, 3), (5, 5)])
def test_balance_is_k_when_even_and_rises_to_the_number_of_experts(experts, chosen):
    """A reader of the log compares the figure with its least value, so a constant factor would mislead."""
    tokens = 2 * experts
    even = torch.full((tokens, experts), 1 / experts)
    counts = torch.full((experts,), tokens * chosen // experts)
    assert load_balance(even, counts).item() == pytest.approx(chosen)
    always = torch.zeros(tokens, experts)
    always[:, :chosen] = 1 / chosen
    counts = torch.tensor([tokens] * chosen + [0] * (experts - chosen))
    assert load_balance(always, counts).item() == pytest.approx(experts)


def test_balance_of_a_layer_equals_its_definition():
    """Through the router: one-hot choices and probabilities, token by token."""
    layer = make_layer(4, 2, True, 0)
    x = torch.randn(13, 8, dtype=torch.float64)
    _, balance = layer(x)
    share, mean = [0] * 4, [0.0] * 4
    for token in x:
        scores = (layer.gate.weight @ token).softmax(0).tolist()
        for e in range(4):
            share[e] += sum(other > scores[e] for other in scores) < 2  # One of the two likeliest.
            mean[e] += scores[e]
    expected = 4 * sum(share[e] / 13 * mean[e] / 13 for e in range(4))
    assert balance.item() == pytest.approx(expected, rel=1e-12)


def test_gradient_of_the_balance():
    """Finite differences through the softmax; and the closed form E f_e / T: shares are constants."""
    torch.manual_seed(0)
    logits, counts = torch.randn(6, 4, dtype=torch.float64, requires_grad=True), torch.tensor([6, 3, 2, 1])
    assert torch.autograd.gradcheck(lambda scores: load_balance(scores.softmax(-1), counts), logits)
    probabilities = logits.detach().softmax(-1).requires_grad_()
    load_balance(probabilities, counts).backward()
    expected = (4 * counts.double() / 6 / 6).expand(6, 4)
    torch.testing.assert_close(probabilities.grad, expected, rtol=0, atol=1e-12)


def test_router_loss_is_the_mean_over_layers_and_0_for_a_dense_model():
    """Each layer appends its own balance; a dense model appends nothing."""
    model, dense, places = make_model(50, num_experts=4), make_model(50), torch.arange(20)
    seen, balances, nothing = [], [], []
    for layer in model.layers:
        layer.mlp.register_forward_hook(lambda module, inputs, output: seen.append(output[1]))
    model.hidden(places, places, build_context(20), balances)
    dense.hidden(places, places, build_context(20), nothing)
    assert balances == seen and balances[0] != balances[1]
    torch.testing.assert_close(router_loss(balances), sum(seen) / 2)
    assert nothing == [] and router_loss(nothing) == 0


def test_a_recomputed_layer_appends_its_balance_once():
    """Backward runs the layer again; a second append would be a balance that no loss has used."""
    model, balances, places = make_model(50, num_experts=4), [], torch.arange(20)
    model.checkpoint_activations = True
    model.hidden(places, places, build_context(20), balances).sum().backward()
    assert len(balances) == 2


def test_router_is_float32_under_autocast():
    """In bf16 the mean probability of thousands of tokens is off by far more than its last bits."""
    layer = make_layer(4, 2, True, 7).float()
    x = torch.randn(300, 8)
    exact, _ = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        rounded, balance = layer(x)
    assert balance.dtype == torch.float32
    assert (rounded - exact).abs().median() < 0.02


# ---- The model


def test_modules_are_named_as_in_hugging_face():
    """A checkpoint of Qwen2-MoE maps name by name."""
    model = make_model(50, num_experts=2, shared_expert_intermediate_size=8)
    parts = {f"{part}_proj.weight" for part in ("gate", "up", "down")}
    expected = {"gate.weight", "shared_expert_gate.weight", *(f"shared_expert.{part}" for part in parts)}
    expected |= {f"experts.{i}.{part}" for i in range(2) for part in parts}
    names = set(model.state_dict())
    assert {n.removeprefix("layers.1.mlp.") for n in names if n.startswith("layers.1.mlp.")} == expected


def test_tiny_moe_computes_as_much_a_token_as_tiny():
    """Its experts have twice the weights of tiny's feed-forward network; a token uses half of them."""
    with torch.device("meta"):
        tiny, moe = (Transformer(ModelConfig(100, **PRESETS[name])) for name in ("tiny", "tiny-moe"))
    assert moe.config.num_experts_per_tok * moe.config.moe_intermediate_size == tiny.config.intermediate_size
    feed_forward = sum(p.numel() for p in tiny.layers[0].mlp.parameters())
    experts = sum(p.numel() for p in moe.layers[0].mlp.experts.parameters())
    assert experts == 2 * feed_forward


# ---- The training loops

CHATS = [turns("Hi", "Hello, hello, hello again."), turns("Hello", "!"), turns("1", "2"), turns("苹", "两个")]
RECORDS = {
    "preferences": [as_record(pair) for pair in RAGGED[:5]],
    "conversations": [{"messages": [vars(message) for message in chat]} for chat in CHATS],
}


@pytest.fixture
def start(tmp_path, tokenizer):
    """A model folder with five experts, one for each token, and a large coefficient of the balance."""
    options = {"num_experts": 5, "num_experts_per_tok": 1, "norm_topk_prob": False}
    model = make_model(tokenizer.vocab_size, torch.float32, router_aux_loss_coef=0.7, **options)
    save_folder(tmp_path / "start", tokenizer, model)
    return tmp_path / "start"


def arguments(start, data, *more, out="run") -> list[str]:
    fixed = ["--device", "cpu", "--precision", "fp32", "--eval-data", "", "--log-every", "1", "--lr", "0"]
    return ["--model", str(start), "--data", str(data), "--out", str(start.parent / out), *fixed, *more]


SCRIPTS = {"dpo": train_dpo, "sft": train_sft, "reward": train_reward}


@pytest.mark.parametrize("micro", [1, 150, 500])
@pytest.mark.parametrize("name", SCRIPTS)
def test_each_window_counts_the_balance_once(name, micro, start, tokenizer, write_jsonl):
    """Added whole in every micro-batch, the balance would count once for each of them."""
    module, kind = SCRIPTS[name], "conversations" if name == "sft" else "preferences"
    data = write_jsonl("data.jsonl", RECORDS[kind])
    flags = ["--batch-size", "5", "--micro-batch-tokens", str(micro), "--max-steps", "1", "--grad-clip", "0"]
    got = record_gradients(module, lambda: module.main(arguments(start, data, *flags)))[0]
    config = json.loads((start / "config.json").read_text())
    config["model"]["router_aux_loss_coef"] = 0.0
    (start / "config.json").write_text(json.dumps(config))
    plain = record_gradients(module, lambda: module.main(arguments(start, data, *flags, out="plain")))[0]

    store, model, aux_loss, weight = open_store(data, kind, tokenizer, 512), load_model(start), 0.0, 0
    if name == "reward":
        model = RewardModel.from_language_model(model)
    for rows in deal(Windows(len(store), 5, 0)[0], store.lengths, 1, micro)[0]:
        stream, balances = build_stream(store, rows), []
        model(stream, balances)
        part = len(stream.targets) if name == "sft" else len(rows)
        aux_loss, weight = aux_loss + part * router_loss(balances), weight + part
    aux_loss = aux_loss / weight
    assert metrics(start.parent / "run")[0]["aux_loss"] == pytest.approx(aux_loss.item(), rel=1e-5)
    assert metrics(start.parent / "plain")[0]["loss"] == metrics(start.parent / "run")[0]["loss"]

    (0.7 * aux_loss).backward()
    parameters = [p for group in adamw(model, 0).param_groups for p in group["params"]]
    for parameter, with_it, without in zip(parameters, got, plain, strict=True):
        expected = 0 if parameter.grad is None else parameter.grad
        torch.testing.assert_close(with_it, without + expected, rtol=1e-3, atol=2e-5)
    assert max(p.grad.abs().max() for p in parameters if p.grad is not None) > 1e-3


@pytest.mark.parametrize("script, kind", [("train_dpo", "preferences"), ("train_sft", "conversations")])
def test_two_ranks_equal_one_process(script, kind, start, write_jsonl):
    """An expert without a token, and a rank without a record, take part in every exchange of gradients."""
    data = write_jsonl("data.jsonl", RECORDS[kind])
    flags = ["--batch-size", "3", "--micro-batch-tokens", "1", "--epochs", "2", "--lr", "1e-3"]
    flags = arguments(start, data, *flags, "--warmup-steps", "1")
    module = {"train_dpo": train_dpo, "train_sft": train_sft}[script]
    alone = record_gradients(module, lambda: module.main(flags))
    two, target = [*flags, "--out", str(start.parent / "two")], start.parent / "two.pt"
    result = forked("tests.loops", script, target, *two, ranks=2)
    assert result.returncode == 0, result.stderr
    for one, other in zip(alone, torch.load(target, weights_only=True), strict=True):
        for a, b in zip(one, other, strict=True):
            torch.testing.assert_close(b, a, rtol=2e-4, atol=2e-4 * max(1e-3, a.abs().max().item()))
    for one, other in zip(metrics(start.parent / "run"), metrics(start.parent / "two"), strict=True):
        assert other["aux_loss"] == pytest.approx(one["aux_loss"], rel=1e-4)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_dpo_starts_at_ln_2(precision, start, write_jsonl):
    """The balance is not part of the logged loss, and both models route a token to the same experts."""
    data = write_jsonl("data.jsonl", RECORDS["preferences"])
    train_dpo.main(arguments(start, data, "--max-steps", "1", "--precision", precision))
    row = metrics(start.parent / "run")[0]
    assert row["loss"] == pytest.approx(math.log(2), abs=1e-7)
    assert row["rewards/margins"] == 0 and row["aux_loss"] > 1
