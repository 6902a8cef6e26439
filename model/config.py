"""The sizes and options of a model, and presets."""

from dataclasses import asdict, dataclass, fields

from errors import InputError, require

# The least and the greatest value of each size. A config may come from a stranger: a greater size builds for
# minutes, or fills the memory.
SIZES = {
    "vocab_size": (1, 2**24),
    "hidden_size": (1, 2**17),
    "num_hidden_layers": (0, 2**10),
    "num_attention_heads": (1, 2**12),
    "num_key_value_heads": (1, 2**12),
    "intermediate_size": (1, 2**20),
    "head_dim": (1, 2**12),
    "num_experts": (0, 2**10),
    "num_experts_per_tok": (0, 2**10),
    "moe_intermediate_size": (1, 2**20),
    "shared_expert_intermediate_size": (0, 2**20),
    "sliding_window": (1, 2**31),
    "max_position_embeddings": (1, 2**31),
}

# The types of rope_scaling and the numbers that each needs.
SCALING = {
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}


@dataclass(frozen=True)
class ModelConfig:
    """The sizes and options of a model, named as in Hugging Face's ``config.json``.

    Raises `InputError` for a value that is out of range or of the wrong type.
    """

    vocab_size: int
    hidden_size: int = 256
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    intermediate_size: int = 704
    head_dim: int | None = None  # None: hidden_size / num_attention_heads
    rope_theta: float = 10_000.0
    rope_scaling: dict | None = None  # rope_type linear or llama3, and its factors
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = True
    attention_bias: bool = False  # on q, k and v, as in Qwen2
    attention_output_bias: bool = False  # on o as well: `attention_bias` of Llama and Qwen3 means all four
    qk_norm: bool = False  # RMSNorm of each query and key head, as in Qwen3
    num_experts: int = 0  # feed-forward networks of a layer (moe.py); 0: a dense model
    num_experts_per_tok: int = 2  # experts that compute a token
    moe_intermediate_size: int | None = None  # of each expert; None: intermediate_size
    norm_topk_prob: bool = True  # the weights of a token's experts sum to 1
    shared_expert_intermediate_size: int = 0  # of an expert that computes every token; 0: there is not one
    router_aux_loss_coef: float = 0.001  # factor of the load-balancing loss
    sliding_window: int | None = None  # as in Mistral; longer texts are refused, the mask is not implemented
    max_position_embeddings: int = 32_768  # written into exports; nothing here depends on it

    def __post_init__(self):
        for field in fields(self):
            name, value = field.name, getattr(self, field.name)
            if value is None and field.default is None:
                continue
            if name in SIZES:
                low, high = SIZES[name]
                holds = type(value) is int and low <= value <= high
                require(holds, f"{name} {value!r} is not an integer from {low} to {high}")
            elif field.type is bool:
                require(isinstance(value, bool), f"{name} {value!r} is not true or false")
            elif field.type is float and (name, value) != ("router_aux_loss_coef", 0):
                check_number(name, value)
        check_rope_scaling(self.rope_scaling)
        self._check_heads_and_experts()

    def _check_heads_and_experts(self) -> None:
        """Raise InputError for sizes that do not fit one another; replace those that are None."""
        d, heads, key_heads = self.hidden_size, self.num_attention_heads, self.num_key_value_heads
        rule = "is not a multiple of"
        require(heads % key_heads == 0, f"num_attention_heads {heads} {rule} num_key_value_heads {key_heads}")
        if self.head_dim is None:
            require(d % heads == 0, f"hidden_size {d} {rule} num_attention_heads {heads}; give head_dim")
            object.__setattr__(self, "head_dim", d // heads)
        require(self.head_dim % 2 == 0, f"head_dim {self.head_dim} is odd; rotary positions need pairs")
        chosen, experts = self.num_experts_per_tok, self.num_experts
        fits = not experts or 1 <= chosen <= experts
        require(fits, f"num_experts_per_tok {chosen} is not from 1 to num_experts {experts}")
        if self.moe_intermediate_size is None:
            object.__setattr__(self, "moe_intermediate_size", self.intermediate_size)

    def to_dict(self) -> dict:
        return asdict(self)

    def check_fits(self, tokens: int = 0, length: int = 0) -> None:
        """Raise InputError if a tokenizer has more ids than the embedding, or a text exceeds the window."""
        size, window = self.vocab_size, self.sliding_window
        if tokens > self.vocab_size:
            raise InputError(f"the tokenizer has {tokens} ids, the model's embedding only {size}")
        limit = f"the model's sliding window of {window}: a mask for more is not implemented"
        fits = not window or length <= window
        require(fits, f"{length} tokens do not fit into {limit}; lower --max-length")


def check_number(name: str, value) -> None:
    # NaN fails the comparison, too.
    holds = type(value) in (int, float) and 0 < value < 1e30
    require(holds, f"{name} {value!r} is not a finite number above 0")


def check_rope_scaling(scaling) -> None:
    if scaling is None:
        return
    if not isinstance(scaling, dict) or scaling.get("rope_type") not in tuple(SCALING):
        raise InputError(f"rope_scaling {scaling!r} is not of type {' or '.join(SCALING)}")
    for name in SCALING[scaling["rope_type"]]:
        check_number(f"{name} of rope_scaling", scaling.get(name))
    if scaling["rope_type"] == "llama3" and scaling["high_freq_factor"] <= scaling["low_freq_factor"]:
        raise InputError("high_freq_factor of rope_scaling is not above low_freq_factor")


# Presets do not contain `vocab_size`: it is the tokenizer's.
PRESETS = {
    "tiny": dict(tie_word_embeddings=False, qk_norm=True),
    "tiny-moe": dict(tie_word_embeddings=False, qk_norm=True, num_experts=4, moe_intermediate_size=352),
    "26m": dict(hidden_size=512, num_hidden_layers=8, num_attention_heads=8, intermediate_size=1408,
                rope_theta=1e6),
    "104m": dict(hidden_size=768, num_hidden_layers=16, num_attention_heads=8, intermediate_size=2048,
                 rope_theta=1e6),
    "qwen2.5-0.5b": dict(hidden_size=896, num_hidden_layers=24, num_attention_heads=14,
                         intermediate_size=4864, rope_theta=1e6, attention_bias=True),
    "qwen3-0.6b": dict(hidden_size=1024, num_hidden_layers=28, num_attention_heads=16, num_key_value_heads=8,
                       head_dim=128, intermediate_size=3072, rope_theta=1e6, qk_norm=True),
}  # fmt: skip
