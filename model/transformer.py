"""A decoder-only transformer of the Llama / Qwen family, over a flat stream of tokens.

RMSNorm, rotary positions, grouped-query attention, SwiGLU; optional QK-norm, attention bias, tied
embeddings, mixture of experts. There is no dropout: DPO compares two models on the same tokens, and noise
between them is a bug. Modules are named as in Hugging Face's Llama, so that checkpoints map name by name.
"""

import math
from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from errors import InputError
from model.config import ModelConfig
from model.moe import MixtureOfExperts
from model.rotary import rotary, rotate
from model.stream import TokenStream

MAX_LOGITS = 2**25  # scores in one chunk, 128 MB of float32: 5,200 positions of 6,400 tokens, 220 of 152,000


class Transformer(nn.Module):
    """``model(stream)`` computes the log-probability of every supervised token."""

    kind = "language model"  # in the config.json of a model folder

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.checkpoint_activations = False  # keep each layer's input alone, recompute the rest in backward
        self.fused_attention = False  # one call of attention for the whole stream: fuse_attention()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.init_weights()

    def forward(self, stream: TokenStream, balances: list[Tensor] | None = None) -> Tensor:
        """log pi(y_t | x, y_<t) of every supervised token, (N,), float32 (float64 for a float64 model).

        Each layer of experts appends its load-balancing loss, a scalar, to the empty list `balances`.
        """
        hidden = self.hidden_of(stream, balances)  # (T, d)
        predicting = hidden[stream.predictors]  # (N, d): only these are multiplied by the vocabulary matrix
        if len(predicting) > self.positions_at_once:
            return self.logps_in_chunks(predicting, stream.targets)
        return token_logps(self.logits(predicting), stream.targets)

    def hidden(
        self, tokens: Tensor, positions: Tensor, context, balances: list[Tensor] | None = None
    ) -> Tensor:
        """Final hidden states, (T, d). `context.attend` computes attention: a stream or a KV cache."""
        x = self.embed_tokens(tokens)  # (T, d)
        rotation = rotary(positions, self.config.head_dim, self.config.rope_theta, self.config.rope_scaling)
        for index, layer in enumerate(self.layers):
            run = partial(recompute_in_backward, layer) if self.checkpoint_activations else layer
            x, balance = run(x, rotation, context, index)  # (T, d), and a scalar if the layer has experts
            if balances is not None and balance is not None:
                balances.append(balance)
        return self.norm(x)

    def hidden_of(self, stream: TokenStream, balances: list[Tensor] | None = None) -> Tensor:
        """Final hidden states of a stream, (T, d)."""
        context = stream.fused if self.fused_attention else stream
        return self.hidden(stream.tokens, stream.positions, context, balances)

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores of the next token, (…, d) to (…, V)."""
        return F.linear(
            hidden, self.embed_tokens.weight if self.config.tie_word_embeddings else self.lm_head.weight
        )

    # ---- A large vocabulary

    @property
    def positions_at_once(self) -> int:
        """The number of positions that have at most MAX_LOGITS scores together."""
        return max(1, MAX_LOGITS // self.config.vocab_size)

    def logps_in_chunks(self, predicting: Tensor, targets: Tensor) -> Tensor:
        """The same log-probs, (N, d) and (N,) to (N,), without a tensor of shape (N, V)."""

        def logps(hidden: Tensor, targets: Tensor) -> Tensor:
            return token_logps(self.logits(hidden), targets)

        size = self.positions_at_once
        chunks = zip(predicting.split(size), targets.split(size), strict=True)
        return torch.cat([recompute_in_backward(logps, *chunk) for chunk in chunks])

    def log_distributions(self, stream: TokenStream) -> Iterator[Tensor]:
        """log pi(. | x, y_<t) at each predictor, at least float32, in chunks of (<= MAX_LOGITS / V, V)."""
        for predicting in self.hidden_of(stream)[stream.predictors].split(self.positions_at_once):
            yield at_least_float32(self.logits(predicting)).log_softmax(dim=-1)

    # ---- Set-up

    @torch.no_grad()
    def init_weights(self) -> None:
        """Draw fresh weights: matrices have variance 1 / fan-in, which keeps a signal's size at any width.

        The vocabulary matrix is small, so that the loss of a fresh model is ln V. A layer normalises its
        input; its output is scaled to the size of the embeddings, and down by depth as in GPT-2.
        """
        residual = 0.02 if self.config.tie_word_embeddings else 1.0  # standard deviation of the embeddings
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

    def fuse_attention(self, device: torch.device) -> None:
        """Let a stream attend in one FlexAttention call from now on; `InputError` for a device but CUDA."""
        if device.type != "cuda":
            raise InputError(f"--fused-attention needs CUDA: FlexAttention has no backward on {device.type}")
        self.fused_attention = True


class Layer(nn.Module):
    """Attention, then a feed-forward network or a mixture of experts; each adds to its input."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.self_attn = Attention(config)
        self.has_experts = config.num_experts > 0
        if self.has_experts:
            self.mlp = MixtureOfExperts(config, FeedForward)
        else:
            self.mlp = FeedForward(config.hidden_size, config.intermediate_size)
        self.input_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self, x: Tensor, rotation: tuple[Tensor, Tensor], context, index: int
    ) -> tuple[Tensor, Tensor | None]:
        """(T, d) to (T, d), and the load-balancing loss of the experts: a scalar, None in a dense layer."""
        # Returned rather than appended to a list: a recomputed layer would append it twice, and FSDP copies
        # the lists that are passed to a layer.
        x = x + self.self_attn(self.input_layernorm(x), rotation, context, index)
        h = self.post_attention_layernorm(x)
        y, balance = self.mlp(h) if self.has_experts else (self.mlp(h), None)
        return x + y, balance


class Attention(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.head_dim = config.head_dim
        queries = config.num_attention_heads * config.head_dim
        keys = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, queries, bias=config.attention_bias)
        self.k_proj = nn.Linear(config.hidden_size, keys, bias=config.attention_bias)
        self.v_proj = nn.Linear(config.hidden_size, keys, bias=config.attention_bias)
        self.o_proj = nn.Linear(queries, config.hidden_size, bias=config.attention_output_bias)
        self.q_norm = HeadNorm(config.head_dim, config.rms_norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = HeadNorm(config.head_dim, config.rms_norm_eps) if config.qk_norm else nn.Identity()

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor], context, index: int) -> Tensor:
        """(T, d) to (T, d). A KV cache keeps the keys of each layer under its `index`."""
        q, k, v = (
            project(x).unflatten(-1, (-1, self.head_dim))  # (T, heads, D)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = rotate(self.q_norm(q), rotation), rotate(self.k_norm(k), rotation)
        q, k, v = (x.transpose(0, 1) for x in (q, k, v))  # (heads, T, D)
        return self.o_proj(context.attend(index, q, k, v).transpose(0, 1).flatten(1))  # (T, d)


class HeadNorm(nn.RMSNorm):
    """RMSNorm of each query or key head, computed in float32 also under autocast (Qwen3)."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(at_least_float32(x)).to(x.dtype)


class FeedForward(nn.Module):
    """SwiGLU (Shazeer 2020, arXiv 2002.05202)."""

    def __init__(self, hidden_size: int, intermediate_size: int):
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


def token_logps(logits: Tensor, targets: Tensor) -> Tensor:
    """log softmax(logits)[target]: (N, V) and (N,) to (N,), at least float32.

    A bf16 log-softmax summed over 512 tokens is off by nats, and CPU autocast would compute it in bf16 where
    CUDA would not.
    """
    return -F.cross_entropy(at_least_float32(logits), targets, reduction="none")


def at_least_float32(x: Tensor) -> Tensor:
    """A float64 tensor unchanged, any other in float32."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def recompute_in_backward(function, *arguments):
    """The values and gradients of ``function(*arguments)``; backward calls it again to save memory."""
    # Without dropout the state of the random generator does not matter.
    return checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=False)


def compile_layers(*models) -> None:
    """Let torch.compile fuse the operations of each layer, for streams of any length; attention stays a call.

    Arguments that are not a Transformer are skipped. Raises `InputError` for experts: each computes its own
    number of tokens, and every new number would be compiled again.
    """
    for model in models:
        if isinstance(model, Transformer):
            if model.config.num_experts:
                raise InputError("--compile does not work with a mixture of experts")
            for layer in model.layers:
                layer.compile(dynamic=True)
