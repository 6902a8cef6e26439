"""A decoder-only transformer of the Llama / Qwen family, over a flat run of tokens.

RMSNorm, rotary positions, grouped-query attention, SwiGLU; optional QK-norm, attention bias, tied
embeddings, mixture of experts. No dropout anywhere: DPO compares two models on the same tokens, and noise
between them is a bug. Modules are named as in Hugging Face's Llama, so that checkpoints map name by name.
"""

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from errors import InputError
from model.config import ModelConfig
from model.moe import MixtureOfExperts
from model.stream import TokenStream

MAX_LOGITS = 2**25  # scores in one chunk, 128 MB of float32: 5,200 positions of 6,400 tokens, 220 of 152,000


class Transformer(nn.Module):
    """``model(stream)`` gives the log-probability of every supervised token."""

    kind = "language model"  # as a model folder calls it

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.checkpoint_activations = False  # keep only what enters a layer, and compute it again in backward
        self.fused_attention = False  # one call for the whole stream: see fuse_attention()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config, index) for index in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Fresh weights: matrices have variance 1 / fan-in, which keeps a signal's size at any width.

        The vocabulary matrix is small, so that a fresh model's loss is ln V. Blocks normalise what they read;
        what they write is scaled to the embedding that is there, and down by depth as in GPT-2.
        """
        residual = 0.02 if self.config.tie_word_embeddings else 1.0  # size of what an embedding says
        for name, module in self.named_modules():
            if isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=residual)
            elif isinstance(module, nn.Linear):
                std = module.in_features**-0.5
                if name == "lm_head":
                    std = 0.02
                elif name.endswith(("o_proj", "down_proj")):
                    std *= residual / math.sqrt(2 * self.config.num_hidden_layers)
                nn.init.normal_(module.weight, std=std)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, stream: TokenStream, balances: list[Tensor] | None = None) -> Tensor:
        """log pi(y_t | x, y_<t) of every supervised token, (N,), float32 (float64 for a float64 model).

        Each layer of experts appends its load-balancing loss, a scalar, to `balances`.
        """
        # Only the positions that predict a supervised token are multiplied by the vocabulary matrix.
        hidden, targets = self.hidden_of(stream, balances)[stream.predictors], stream.targets  # (N, d), (N,)
        positions = self.positions_at_once()
        if len(targets) <= positions:
            return self.predict(hidden, targets)
        # Each chunk is computed again in backward, so a tensor of shape (N, V) never exists.
        parts = zip(hidden.split(positions), targets.split(positions), strict=True)
        return torch.cat([recompute_in_backward(self.predict, *part) for part in parts])

    def predict(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """log pi of the targets, (N,), from the hidden states that predict them, (N, d)."""
        return token_logps(self.logits(hidden), targets)

    def log_distributions(self, stream: TokenStream) -> Iterator[Tensor]:
        """log pi(. | x, y_<t) at each predictor, at least float32, in chunks of (<= MAX_LOGITS / V, V)."""
        for hidden in self.hidden_of(stream)[stream.predictors].split(self.positions_at_once()):
            logits = self.logits(hidden)
            yield logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(dim=-1)

    def positions_at_once(self) -> int:
        """How many positions have at most MAX_LOGITS scores together."""
        return max(1, MAX_LOGITS // self.config.vocab_size)

    def hidden_of(self, stream: TokenStream, balances: list[Tensor] | None = None) -> Tensor:
        """Final hidden states of a stream, (T, d)."""
        context = stream.fused if self.fused_attention else stream
        return self.hidden(stream.tokens, stream.positions, context, balances)

    def hidden(
        self, tokens: Tensor, positions: Tensor, context, balances: list[Tensor] | None = None
    ) -> Tensor:
        """Final hidden states, (T, d). `context.attend` computes attention: a stream or a KV cache."""
        x = self.embed_tokens(tokens)  # (T, d)
        rotation = rotary(positions, self.config.head_dim, self.config.rope_theta, self.config.rope_scaling)
        for layer in self.layers:
            if self.checkpoint_activations and torch.is_grad_enabled():
                x, balance = recompute_in_backward(layer, x, rotation, context)
            else:
                x, balance = layer(x, rotation, context)
            if balances is not None and balance is not None:
                balances.append(balance)
        return self.norm(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores of the next token, (…, d) to (…, V)."""
        return F.linear(
            hidden, self.embed_tokens.weight if self.config.tie_word_embeddings else self.lm_head.weight
        )

    def fuse_attention(self, device: torch.device) -> None:
        """Let a stream attend in one FlexAttention call from now on; `InputError` where it cannot train."""
        if device.type != "cuda":
            raise InputError("--fused-attention: FlexAttention has no backward but on CUDA")
        self.fused_attention = True


class Layer(nn.Module):
    def __init__(self, config: ModelConfig, index: int):
        super().__init__()
        self.self_attn = Attention(config, index)
        self.has_experts = config.num_experts > 0
        if self.has_experts:
            self.mlp = MixtureOfExperts(config, FeedForward)
        else:
            self.mlp = FeedForward(config.hidden_size, config.intermediate_size)
        self.input_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor], context) -> tuple[Tensor, Tensor | None]:
        """(T, d) to (T, d), and the load-balancing loss of the experts: a scalar, None in a dense layer."""
        # Returned rather than appended to a list: a recomputed layer would append it twice, and FSDP copies
        # the lists that are passed to a layer.
        x = x + self.self_attn(self.input_layernorm(x), rotation, context)
        h = self.post_attention_layernorm(x)
        y, balance = self.mlp(h) if self.has_experts else (self.mlp(h), None)
        return x + y, balance


class Attention(nn.Module):
    def __init__(self, config: ModelConfig, index: int):
        super().__init__()
        self.index = index
        self.head_dim = config.head_dim
        queries = config.num_attention_heads * config.head_dim
        keys = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, queries, bias=config.attention_bias)
        self.k_proj = nn.Linear(config.hidden_size, keys, bias=config.attention_bias)
        self.v_proj = nn.Linear(config.hidden_size, keys, bias=config.attention_bias)
        self.o_proj = nn.Linear(queries, config.hidden_size, bias=config.attention_output_bias)
        self.q_norm = nn.RMSNorm(config.head_dim, config.rms_norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = nn.RMSNorm(config.head_dim, config.rms_norm_eps) if config.qk_norm else nn.Identity()

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor], context) -> Tensor:
        q, k, v = (
            project(x).unflatten(-1, (-1, self.head_dim))  # (T, heads, D)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = rotate(self.q_norm(q), rotation), rotate(self.k_norm(k), rotation)
        q, k, v = (x.transpose(0, 1) for x in (q, k, v))  # (heads, T, D)
        return self.o_proj(context.attend(self.index, q, k, v).transpose(0, 1).flatten(1))  # (T, d)


class FeedForward(nn.Module):
    """SwiGLU (Shazeer 2020, arXiv 2002.05202)."""

    def __init__(self, hidden_size: int, intermediate_size: int):
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


def compile_layers(*models) -> None:
    """Let torch.compile fuse the operations of each layer, for streams of any length; attention stays a call.

    What is no Transformer, such as a reference that is none, is left as it is. Raises `InputError` for
    experts: each is given its own number of tokens, and for every number more would be compiled.
    """
    torch._dynamo.config.allow_unspec_int_on_nn_module = True  # Layers differ by their number alone.
    for model in models:
        if isinstance(model, Transformer):
            if model.config.num_experts:
                raise InputError("--compile: not with a mixture of experts")
            for layer in model.layers:
                layer.compile(dynamic=True)


def recompute_in_backward(function, *arguments):
    """The same values and gradients, for a second forward instead of the memory of what lies between."""
    # There is no dropout, so no state of a random generator is worth keeping.
    return checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=False)


def rotary(positions: Tensor, size: int, theta: float, scaling: dict | None = None) -> tuple[Tensor, Tensor]:
    """cos and sin of the rotary angles, each (T, 1, D/2) in float32 (Su et al. 2021, arXiv 2104.09864)."""
    frequencies = theta ** (-torch.arange(0, size, 2, device=positions.device).float() / size)  # (D/2,)
    angles = positions[:, None, None].float() * scaled(frequencies, scaling)
    return angles.cos(), angles.sin()


def scaled(frequencies: Tensor, scaling: dict | None) -> Tensor:
    """Rotary frequencies as a checkpoint made for longer texts turns them, (D/2,).

    ``linear`` divides all by a factor (Chen et al. 2023, arXiv 2306.15595). ``llama3`` divides those that
    turn less than `low_freq_factor` times over the original length, leaves alone those that turn more than
    `high_freq_factor` times, and goes over from one to the other in a straight line (Llama 3.1).
    """
    if scaling is None:
        return frequencies
    if scaling["rope_type"] == "linear":
        return frequencies / scaling["factor"]
    turns = scaling["original_max_position_embeddings"] * frequencies / (2 * math.pi)
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    kept = ((turns - low) / (high - low)).clamp(0, 1)  # 1: as it is, 0: divided
    return frequencies * (kept + (1 - kept) / scaling["factor"])


def rotate(x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """Turn each pair (x_i, x_{i + D/2}) by its angle: the half-split layout of Llama checkpoints."""
    cos, sin = rotation
    first, second = x.chunk(2, dim=-1)  # each (T, heads, D/2)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)


def token_logps(logits: Tensor, targets: Tensor) -> Tensor:
    """log softmax(logits)[target]: (N, V) and (N,) to (N,).

    At least float32 whatever the autocast: a bf16 log-softmax summed over 512 tokens is off by nats, and
    CPU autocast would leave it in bf16 where CUDA would not.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return -F.cross_entropy(logits, targets, reduction="none")
