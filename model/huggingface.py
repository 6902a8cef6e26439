"""Hugging Face's ``config.json`` and weight names to ours and back; `weights.py` reads the files.

Llama (2, 3, SmolLM2, MiniMind's Llama export), Mistral, Qwen2 and Qwen3 (MiniMind's other export) are one
transformer with options. An option that changes the computation and is not implemented is refused by its
name: the model would load and compute something else.
"""

from collections.abc import Collection

import torch
from torch import Tensor

from errors import InputError, require
from model.config import SCALING, ModelConfig

# A family's class, and its defaults where they differ from ours.
FAMILIES = {
    "llama": ("LlamaForCausalLM", dict(tie_word_embeddings=False)),
    "mistral": (
        "MistralForCausalLM",
        dict(tie_word_embeddings=False, num_key_value_heads=8, sliding_window=4096),
    ),
    "qwen2": ("Qwen2ForCausalLM", dict(tie_word_embeddings=False)),
    "qwen3": ("Qwen3ForCausalLM", dict(tie_word_embeddings=False, head_dim=128, qk_norm=True)),
    "minimind": ("MiniMindForCausalLM", dict(num_key_value_heads=4, rope_theta=1e6)),
}
NEEDED = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
# Options that change the computation, and their implemented values.
ONLY = {
    "hidden_act": ("silu", "swish"),
    "mlp_bias": (False,),
    "use_moe": (False,),
    "use_sliding_window": (False,),  # of Qwen, for some of the layers
    "partial_rotary_factor": (1, None),
    "quantization_config": (None,),
    "is_causal": (True,),
}
# Options of ours that a family has by its name or not at all. They are ignored in a config: MiniMind writes
# `num_experts` also for its dense models.
OURS_ALONE = (
    "qk_norm", "attention_output_bias", "num_experts", "num_experts_per_tok", "moe_intermediate_size",
    "norm_topk_prob", "shared_expert_intermediate_size", "router_aux_loss_coef",
)  # fmt: skip


def read_config(config: dict, names: Collection[str]) -> ModelConfig:
    """Their config to ours. The `names` of the weights tell MiniMind's generations apart."""
    family = config["model_type"]
    require(family in FAMILIES, f"model_type {family!r} is not one of {', '.join(FAMILIES)}")
    expected, defaults = FAMILIES[family]
    if (classes := config.get("architectures") or [expected]) != [expected]:
        raise InputError(f"architectures {classes} is not {expected}, a causal language model")
    for option, values in ONLY.items():
        if config.get(option, values[0]) not in values:
            raise InputError(f"{option} {config[option]!r} is not supported, only {values[0]!r}")
    if missing := [name for name in NEEDED if not config.get(name)]:
        raise InputError(f"{', '.join(missing)} missing")

    shared = (ModelConfig.__dataclass_fields__.keys() & config.keys()) - {*OURS_ALONE}
    ours = {**defaults, **{name: config[name] for name in shared}, **read_rope(config)}
    ours["num_key_value_heads"] = ours.get("num_key_value_heads") or config["num_attention_heads"]
    if family == "qwen2":
        ours["attention_bias"] = True  # Qwen2 does not have the option, its biases are always there.
    else:
        ours["attention_output_bias"] = ours.get("attention_bias", False)  # The option means all four biases.
    if family == "minimind":
        ours["qk_norm"] = "model.layers.0.self_attn.q_norm.weight" in names
    if family != "mistral":
        ours["sliding_window"] = None  # Other families write it into the file and do not use it.
    return ModelConfig(**ours)


def read_rope(config: dict) -> dict:
    """`rope_theta` and `rope_scaling`, which transformers 4 writes apart and transformers 5 in one dict."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", *SCALING):
        raise InputError(f"rope_scaling of type {kind!r} is not supported, only {', '.join(SCALING)}")
    if rope.get("partial_rotary_factor", 1) != 1:
        raise InputError(f"partial_rotary_factor {rope['partial_rotary_factor']} is not supported, only 1")
    if missing := [name for name in SCALING.get(kind, ()) if name not in rope]:
        raise InputError(f"rope_scaling of type {kind!r} lacks {', '.join(missing)}")
    scaling = {"rope_type": kind, **{name: rope[name] for name in SCALING.get(kind, ())}}
    found = {"rope_scaling": None if kind == "default" else scaling}
    return found | ({"rope_theta": rope["rope_theta"]} if "rope_theta" in rope else {})


def write_config(config: ModelConfig, dtype: torch.dtype) -> dict:
    """Our config to theirs, of the simplest family that computes the same."""
    require(not config.num_experts, "a mixture of experts cannot be exported yet")
    if config.sliding_window and (config.qk_norm or config.attention_bias):
        raise InputError("a sliding window with QK-norm or attention_bias: no Hugging Face family has both")
    if config.sliding_window:
        family = "mistral"
    elif config.qk_norm:
        family = "qwen3"
    elif config.attention_bias and not config.attention_output_bias:
        family = "qwen2"
    else:
        family = "llama"
    left_out = (*OURS_ALONE, "sliding_window")
    theirs = {name: value for name, value in config.to_dict().items() if name not in left_out}
    biased = theirs.pop("attention_bias")
    if family == "mistral":
        theirs["sliding_window"] = config.sliding_window
    elif family != "qwen2":
        theirs["attention_bias"] = biased
    return {
        "architectures": [FAMILIES[family][0]],
        "model_type": family,
        "torch_dtype": str(dtype).removeprefix("torch."),
        "hidden_act": "silu",
        "use_cache": True,
        **theirs,
    }


def read_weights(weights: dict[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Their weights under our names, without the copy of a tied head and without stored rotary tables."""
    ours = {n.removeprefix("model."): w for n, w in weights.items() if not n.endswith("rotary_emb.inv_freq")}
    if unfit := [name for name, weight in ours.items() if not weight.is_floating_point()]:
        raise InputError(f"{unfit[0]} has {ours[unfit[0]].dtype} values: quantised weights are not supported")
    head = ours.pop("lm_head.weight", None) if config.tie_word_embeddings else None
    embedding = ours.get("embed_tokens.weight", torch.empty(0))
    # "meta" tensors have no values; the rank that loads the weights compares them.
    if not (head is None or head.is_meta or torch.equal(head, embedding)):
        raise InputError("tie_word_embeddings is true, but lm_head.weight is not embed_tokens.weight")
    return ours


def write_weights(weights: dict[str, Tensor], config: ModelConfig, dtype: torch.dtype) -> dict[str, Tensor]:
    """Our weights under their names, in `dtype`.

    Qwen3 has biases on all four projections or on none: a missing bias of o_proj is written as zeros.
    """
    theirs = {n if n.startswith("lm_head.") else f"model.{n}": w.to(dtype) for n, w in weights.items()}
    if config.qk_norm and config.attention_bias and not config.attention_output_bias:
        for layer in range(config.num_hidden_layers):
            name = f"model.layers.{layer}.self_attn.o_proj.bias"
            theirs[name] = torch.zeros(config.hidden_size, dtype=dtype)
    return theirs
