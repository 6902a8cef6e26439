"""The transformer: what it computes, in what precision, and how large it is."""

import math

import pytest
import torch
import torch.nn.functional as F

from errors import InputError
from model.attention import attention, causal_bias
from model.config import PRESETS, ModelConfig
from model.rotary import rotary, rotate
from model.stream import TokenStream
from model.transformer import Transformer, token_logps
from tests.conftest import MODEL_OPTIONS, ROOT, make_model, plain_logits
from training.muon import MuonWithAdamW, orthogonal
from training.schedule import adamw, set_lr

V = 50


def one_stream(ids: list[int]) -> TokenStream:
    """One sequence, every token after the first supervised."""
    count = len(ids) - 1
    return TokenStream(
        tokens=torch.tensor(ids),
        positions=torch.arange(len(ids)),
        segments=torch.tensor([(0, len(ids), 0, 0)]),
        predictors=torch.arange(count),
        targets=torch.tensor(ids[1:]),
        owners=torch.zeros(count, dtype=torch.long),
        responses=1,
    )


def all_logits(model: Transformer, ids: list[int]) -> torch.Tensor:
    stream = one_stream(ids)
    return model.logits(model.hidden(stream.tokens, stream.positions, stream))


IDS = [3, 14, 15, 9, 2, 6, 5, 3, 5, 8, 9, 7]


@pytest.mark.parametrize("option", MODEL_OPTIONS)
def test_forward_equals_the_formulas(option):
    """Heads, norms, rotations and residuals spelled out one by one give the same scores, all V of them."""
    model = make_model(V, **MODEL_OPTIONS[option])
    with torch.no_grad():
        torch.testing.assert_close(all_logits(model, IDS), plain_logits(model, IDS), rtol=0, atol=1e-10)


# ---- Rotary positions


def test_rope_turns_halves_not_neighbours():
    """Llama checkpoints pair x_i with x_{i + D/2}; a model that pairs neighbours loads them and is wrong."""
    for i in range(4):
        x = torch.zeros(1, 1, 8)
        x[0, 0, i] = 1.0
        turned = rotate(x, rotary(torch.tensor([3]), 8, 100.0))[0, 0]
        angle = 3 * 100.0 ** (-2 * i / 8)
        expected = torch.zeros(8)
        expected[i], expected[i + 4] = math.cos(angle), math.sin(angle)
        torch.testing.assert_close(turned, expected)


def test_rope_angles_are_float32_under_autocast():
    """In bf16 the positions 256 and 257 are the same number."""
    positions = torch.tensor([0, 1, 255, 257, 4001])
    with torch.autocast("cpu", torch.bfloat16):
        cos, sin = rotary(positions, 16, 10_000.0)
    angles = positions[:, None, None].double() * 10_000.0 ** (-torch.arange(8).double() / 8)
    assert cos.dtype == sin.dtype == torch.float32
    torch.testing.assert_close(cos.double(), angles.cos(), rtol=0, atol=5e-4)
    torch.testing.assert_close(sin.double(), angles.sin(), rtol=0, atol=5e-4)


# ---- Attention


@pytest.mark.parametrize("queries, keys", [(5, 5), (1, 5), (3, 7), (4, 4)])
@pytest.mark.parametrize("groups", [1, 2, 6])
def test_causal_attention_equals_sdpa_with_a_mask(queries, keys, groups):
    """The last query attends to every key; with SDPA's `is_causal` a single one attends to the first key."""
    torch.manual_seed(1)
    q = torch.randn(6, queries, 4, dtype=torch.float64)
    k, v = torch.randn(2, groups, keys, 4, dtype=torch.float64)
    mask = torch.tensor([[key <= keys - queries + query for key in range(keys)] for query in range(queries)])
    expected = F.scaled_dot_product_attention(
        q, k.repeat_interleave(6 // groups, 0), v.repeat_interleave(6 // groups, 0), attn_mask=mask
    )
    got = attention(q, k, v, causal_bias(queries, keys, q.device))
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)


# ---- Log-probs, and their precision


def test_token_logps_are_finite_at_the_extremes():
    """Scores of 10 000 overflow exp, and a token of probability 0 must not turn its row into NaN."""
    logits = torch.tensor([[1e4, -1e4, 0.0], [0.0, -math.inf, 0.0], [-1e4, -1e4, 1e4]], requires_grad=True)
    logps = token_logps(logits, torch.tensor([1, 0, 2]))
    logps.sum().backward()
    torch.testing.assert_close(logps.detach(), torch.tensor([-2e4, -math.log(2), 0.0]))
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize("autocast", [True, False])
def test_log_softmax_is_float32_even_of_bf16_scores(autocast):
    """CPU autocast leaves log_softmax in bf16, where 512 tokens add up to an error of nats."""
    torch.manual_seed(0)
    logits, targets = (3 * torch.randn(512, 1000)).bfloat16(), torch.randint(1000, (512,))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        logps = token_logps(logits, targets)
    exact = logits.double().log_softmax(-1)[torch.arange(512), targets]
    assert logps.dtype == torch.float32
    assert (logps.double() - exact).abs().max() < 1e-5
    assert abs(logps.sum().double() - exact.sum()) < 1e-2


# ---- A fresh model


@pytest.mark.parametrize("tied", [True, False])
def test_fresh_weights_keep_a_signals_size(tied):
    """With one deviation for every width, a narrow model has tiny activations and hardly learns to copy."""
    torch.manual_seed(0)
    options = {"num_attention_heads": 8, "attention_bias": True, "qk_norm": True, "tie_word_embeddings": tied}
    embedding = 0.02 if tied else 1.0
    config = ModelConfig(500, num_hidden_layers=8, hidden_size=128, **options)
    for name, parameter in Transformer(config).named_parameters():
        if name.endswith("bias"):
            assert not parameter.any(), name
        elif parameter.dim() == 1:
            assert (parameter == 1).all(), name
        else:
            std = parameter.shape[1] ** -0.5
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                std *= embedding / 4
            std = {"embed_tokens.weight": embedding, "lm_head.weight": 0.02}.get(name, std)
            assert parameter.std().item() == pytest.approx(std, rel=0.05), name


# ---- Weights: names, tying, sizes


def test_modules_are_named_as_in_hugging_face():
    """A checkpoint of that family maps name by name, with ``model.`` before all but the head."""
    names = set(make_model(V, **MODEL_OPTIONS["all"]).state_dict())
    layer = {f"self_attn.{part}_proj.weight" for part in "qkvo"}
    layer |= {f"self_attn.{part}_proj.bias" for part in "qkv"}
    layer |= {"self_attn.q_norm.weight", "self_attn.k_norm.weight"}
    layer |= {f"mlp.{part}_proj.weight" for part in ("gate", "up", "down")}
    layer |= {"input_layernorm.weight", "post_attention_layernorm.weight"}
    expected = {f"layers.{i}.{name}" for i in range(2) for name in layer}
    assert names == expected | {"embed_tokens.weight", "norm.weight", "lm_head.weight"}


@pytest.mark.parametrize("preset, vocab_size, parameters", [
    ("26m", 6400, 25_829_888),
    ("qwen2.5-0.5b", 151_936, 494_032_768),
    ("qwen3-0.6b", 151_936, 596_049_920),
])  # fmt: skip
def test_presets_have_the_published_sizes(preset, vocab_size, parameters):
    """The parameter counts that MiniMind and Qwen publish; a wrong width, bias or norm changes them."""
    with torch.device("meta"):
        model = Transformer(ModelConfig(vocab_size, **PRESETS[preset]))
    assert sum(p.numel() for p in model.parameters()) == parameters


def preset_row(name: str) -> str:
    """The row of a preset in docs/MODELS.md."""
    with torch.device("meta"):
        model = Transformer(ModelConfig(2, **PRESETS[name]))
    c, defaults = model.config, ModelConfig(2)
    vocabulary = ("embed_tokens.weight", "lm_head.weight")
    count = sum(p.numel() for n, p in model.named_parameters() if n not in vocabulary)
    shown = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    shown += ("intermediate_size", "moe_intermediate_size")
    options = ", ".join(
        f"`{key}` {str(value).lower() if isinstance(value, bool) else format(value, ',.0f')}"
        for key, value in PRESETS[name].items()
        if key not in shown and value != getattr(defaults, key)
    )
    sizes = c.num_hidden_layers, c.hidden_size, c.num_attention_heads, c.num_key_value_heads
    width = c.moe_intermediate_size if c.num_experts else c.intermediate_size
    return f"| `{name}` | {count:,} | {' | '.join(map(str, sizes))} | {width} | {options} |"


def test_the_table_of_presets_is_as_the_code():
    """A table kept by hand drifts. When this fails, paste what it prints."""
    rows = "\n".join(map(preset_row, PRESETS))
    assert rows in (ROOT / "docs" / "MODELS.md").read_text("utf-8"), f"docs/MODELS.md lacks:\n{rows}"


@pytest.mark.parametrize("options, reason", [
    ({"num_attention_heads": 6, "num_key_value_heads": 4}, "num_attention_heads 6 is not a multiple"),
    ({"head_dim": 5}, "head_dim 5 is odd"),
    ({"num_hidden_layers": 10**6}, "num_hidden_layers 1000000 is not an integer from 0 to 1024"),
    ({"hidden_size": -16}, "hidden_size -16 is not an integer from 1"),
    ({"intermediate_size": 0}, "intermediate_size 0 is not an integer from 1"),
    ({"num_key_value_heads": 0}, "num_key_value_heads 0 is not an integer from 1"),
    ({"num_key_value_heads": 2.0}, r"num_key_value_heads 2\.0 is not an integer"),
    ({"head_dim": True}, "head_dim True is not an integer"),
    ({"num_experts": 4, "num_experts_per_tok": 0}, "num_experts_per_tok 0 is not from 1 to num_experts 4"),
    ({"num_experts": 4, "num_experts_per_tok": 5}, "num_experts_per_tok 5 is not from 1 to num_experts 4"),
    ({"num_experts": 10**9}, "num_experts 1000000000 is not an integer from 0 to 1024"),
    ({"rope_theta": math.nan}, "rope_theta nan is not a finite number above 0"),
    ({"rope_theta": 10**400}, "rope_theta 1000"),
    ({"rope_theta": "1e4"}, "rope_theta '1e4' is not a finite number"),
    ({"rms_norm_eps": -1e-6}, "rms_norm_eps -1e-06 is not a finite number above 0"),
    ({"router_aux_loss_coef": math.inf}, "router_aux_loss_coef inf is not a finite number"),
    ({"tie_word_embeddings": 1}, "tie_word_embeddings 1 is not true or false"),
    ({"rope_scaling": "linear"}, "rope_scaling 'linear' is not of type linear or llama3"),
    ({"rope_scaling": {"rope_type": ["linear"]}}, "is not of type linear or llama3"),
    ({"rope_scaling": {"rope_type": "linear", "factor": 0}}, "factor of rope_scaling 0 is not a finite"),
    ({"rope_scaling": {"rope_type": "linear"}}, "factor of rope_scaling None is not a finite number"),
    ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 4.0, "high_freq_factor": 4.0,
                       "original_max_position_embeddings": 64}}, "high_freq_factor .* not above low_freq"),
])  # fmt: skip
def test_impossible_shapes_are_refused(options, reason):
    """A wrong size in config.json is named; otherwise it is a reshape error deep inside the model."""
    with pytest.raises(InputError, match=reason):
        ModelConfig(V, **options)


@pytest.mark.parametrize("option", ["all", "plain"])
def test_weight_decay_is_for_matrices(option):
    """Each parameter once, decayed if it is a matrix of a layer: decay shrinks embeddings of rare tokens."""
    model = make_model(V, **MODEL_OPTIONS[option])
    groups = adamw(model, 0.3).param_groups
    decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    assert sum(len(group["params"]) for group in groups) == len(decay)
    for name, parameter in model.named_parameters():
        matrix = name == "lm_head.weight" or "_proj.weight" in name
        assert decay.pop(id(parameter)) == (0.3 if matrix else 0.0), name
    assert not decay


def test_muon_is_for_the_matrices_of_the_layers_and_adamw_for_the_rest():
    """Each parameter moves once, as torch's own Muon or our AdamW moves it; embeddings are not orthogonal."""
    both, expected = (make_model(V, **MODEL_OPTIONS["all"]) for _ in range(2))
    matrices = {name for name, p in both.named_parameters() if name.startswith("layers.") and p.dim() == 2}
    assert {name.split(".")[-2] for name in matrices} == {
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
    }  # fmt: skip
    named = dict(expected.named_parameters())
    options = dict(lr=0.01, weight_decay=0.3, adjust_lr_fn="match_rms_adamw")
    muon = torch.optim.Muon([named[name] for name in sorted(matrices)], **options)
    others = adamw(expected, 0.3)
    for group in others.param_groups:
        group["params"] = [p for p in group["params"] if all(p is not named[name] for name in matrices)]
    optimizer = MuonWithAdamW(both, 0.3, torch.bfloat16)  # as torch's
    set_lr(optimizer, 0.01)
    set_lr(others, 0.01)
    for _ in range(3):
        for ours, theirs in zip(both.parameters(), expected.parameters(), strict=True):
            ours.grad = torch.randn_like(ours)
            theirs.grad = ours.grad.clone()
        optimizer.step()
        muon.step()
        others.step()
    start = make_model(V, **MODEL_OPTIONS["all"])
    for (name, ours), theirs, old in zip(
        both.named_parameters(), expected.parameters(), start.parameters(), strict=True
    ):
        step = (theirs - old).norm()
        assert step > 0 and (ours - theirs).norm() <= (0.02 * step if name in matrices else 0), name


@pytest.mark.parametrize("shape", [(3, 8, 8), (2, 5, 12), (2, 12, 5)])
def test_orthogonal_maps_the_singular_values_alone(shape):
    """Oracle: the singular values of torch.linalg.svd, each through five steps of the quintic by itself."""
    matrices = torch.randn(shape, dtype=torch.float64)
    left, values, right = torch.linalg.svd(matrices, full_matrices=False)
    values = values / values.norm(dim=1, keepdim=True)
    for _ in range(5):
        values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
    expected = left * values[:, None] @ right
    torch.testing.assert_close(orthogonal(matrices, torch.float64), expected, rtol=0, atol=1e-9)
    torch.testing.assert_close(orthogonal(matrices, torch.float32).double(), expected, rtol=0, atol=1e-3)
