"""The sizes and options of a model, and some presets."""

from dataclasses import asdict, dataclass

from errors import InputError


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a model. Names are those of Hugging Face's ``config.json``."""

    vocab_size: int
    hidden_size: int = 256
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    intermediate_size: int = 704
    head_dim: int | None = None  # None means hidden_size / num_attention_heads
    rope_theta: float = 10_000.0
    rope_scaling: dict | None = None  # rope_type linear or llama3, and its factors
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = True
    attention_bias: bool = False  # on q, k and v, as in Qwen2
    attention_output_bias: bool = False  # on o as well, which Llama and Qwen3 mean by `attention_bias`
    qk_norm: bool = False  # RMSNorm of each query and key head, as in Qwen3
    num_experts: int = 0  # feed-forward networks a layer to choose from (see moe.py); 0 is a dense model
    num_experts_per_tok: int = 2  # how many of them each token is sent to
    moe_intermediate_size: int | None = None  # of each expert; None means intermediate_size
    norm_topk_prob: bool = True  # weights of a token's experts sum to 1; a single one then teaches no router
    shared_expert_intermediate_size: int = 0  # of an expert that every token is sent to; 0 for none
    router_aux_loss_coef: float = 0.001  # what the load-balancing loss is multiplied by
    sliding_window: int | None = None  # as in Mistral: what is longer would need a mask that is not here
    max_position_embeddings: int = 32_768  # what an exported model promises; nothing here depends on it

    def __post_init__(self):
        if self.num_attention_heads % self.num_key_value_heads:
            raise InputError(
                f"num_attention_heads {self.num_attention_heads} is no multiple of "
                f"num_key_value_heads {self.num_key_value_heads}"
            )
        if self.head_dim is None and self.hidden_size % self.num_attention_heads:
            raise InputError(
                f"hidden_size {self.hidden_size} is no multiple of num_attention_heads "
                f"{self.num_attention_heads}; give head_dim"
            )
        if self.head_dim is None:
            object.__setattr__(self, "head_dim", self.hidden_size // self.num_attention_heads)
        if self.head_dim % 2:
            raise InputError(f"head_dim {self.head_dim} is odd; rotary positions turn pairs")
        if self.num_experts and not 1 <= self.num_experts_per_tok <= self.num_experts:
            raise InputError(
                f"num_experts_per_tok {self.num_experts_per_tok} is not from 1 to num_experts "
                f"{self.num_experts}"
            )
        if self.moe_intermediate_size is None:
            object.__setattr__(self, "moe_intermediate_size", self.intermediate_size)

    def to_dict(self) -> dict:
        return asdict(self)

    def admit(self, tokens: int = 0, length: int = 0) -> None:
        """Refuse a tokenizer with more ids than there are embeddings, and text longer than the window."""
        if tokens > self.vocab_size:
            raise InputError(
                f"the tokenizer has {tokens} ids, the model's embedding only {self.vocab_size}: "
                "they do not belong together"
            )
        if self.sliding_window and length > self.sliding_window:
            raise InputError(
                f"{length} tokens do not fit into this model's sliding window of {self.sliding_window}, "
                "and beyond it attention would need a mask that is not implemented: lower the length"
            )


# Each preset leaves out `vocab_size`: the tokenizer decides it.
PRESETS = {
    "tiny": dict(tie_word_embeddings=False),
    "tiny-moe": dict(tie_word_embeddings=False, num_experts=4, moe_intermediate_size=352),
    "26m": dict(
        hidden_size=512, num_hidden_layers=8, num_attention_heads=8, intermediate_size=1408, rope_theta=1e6
    ),
    "104m": dict(
        hidden_size=768, num_hidden_layers=16, num_attention_heads=8, intermediate_size=2048, rope_theta=1e6
    ),
    "qwen2.5-0.5b": dict(
        hidden_size=896,
        num_hidden_layers=24,
        num_attention_heads=14,
        intermediate_size=4864,
        rope_theta=1e6,
        attention_bias=True,
    ),
    "qwen3-0.6b": dict(
        hidden_size=1024,
        num_hidden_layers=28,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        intermediate_size=3072,
        rope_theta=1e6,
        qk_norm=True,
    ),
}
