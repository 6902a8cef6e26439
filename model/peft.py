"""Adapter folders of peft: ``adapter_config.json`` and ``adapter_model.safetensors``, in.

The weights name the layers and contain their ranks; the config contains alpha. A layer's scale is alpha / r,
or alpha / sqrt(r) with rank-stabilised LoRA (Kalajdzievski 2023, arXiv 2312.03732). `model.export` writes
such folders.
"""

import math
import re
from pathlib import Path

import torch
from torch import Tensor, nn

from errors import InputError, require
from model.lora import TARGETS, continue_adapters
from model.transformer import Transformer
from model.weights import import_safetensors, read_json

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model.model."
# Options that are used here, that the names of the weights make unnecessary, or that change no number.
READ = (
    *("peft_type", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
    *("task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode"),
    *("lora_dropout", "megatron_core", "qalora_group_size"),
)
# Further options and their values without effect, such as initialisations that leave the base as it is.
WITHOUT_EFFECT = {
    "bias": ("none",),
    "init_lora_weights": (True, False, "gaussian", "orthogonal"),
    "runtime_config": ({"ephemeral_gpu_offload": False},),
}


def add_adapter(model: Transformer, folder: str | Path) -> None:
    """Freeze the model and add the adapter of a peft folder, to be trained further.

    Raises `InputError` if the folder is missing or damaged, uses another method than LoRA, or does not fit.
    """
    folder = Path(folder)
    for name in (CONFIG, WEIGHTS):
        advice = "python -m model.export RUN --to DIR --adapter writes an adapter folder"
        require((folder / name).is_file(), f"--adapter {folder}: it has no {name}; {advice}")
    config = read_json(folder / CONFIG)
    require_lora(folder, config)
    try:
        adapters = read_layers(folder, config, model)
    except (TypeError, AttributeError, ValueError, re.error, RecursionError) as error:
        raise InputError(f"{folder / CONFIG}: not the config of a LoRA adapter ({error})") from None
    continue_adapters(model, adapters)


def require_lora(folder: Path, config: dict) -> None:
    """Raise `InputError` for a method or an option that changes the computation and is not implemented."""
    kind = config.get("peft_type")
    require(kind == "LORA", f"{folder}: peft_type {kind!r} is not supported, only 'LORA'")
    for name, value in config.items():
        used = value and name not in READ and value not in WITHOUT_EFFECT.get(name, ())
        require(not used, f"{folder}: {name} {str(value)[:60]!r} is not supported in an adapter")


def read_layers(folder: Path, config: dict, model: Transformer) -> dict[str, tuple[Tensor, Tensor, float]]:
    """A (r, in), B (out, r) and scale of each adapter by the name of its layer, in float32."""
    safetensors = import_safetensors()
    try:
        weights = safetensors.torch.load_file(folder / WEIGHTS)
    except safetensors.SafetensorError as error:
        raise InputError(f"{folder / WEIGHTS}: unreadable safetensors ({error})") from None
    linears = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    layers = {}
    for name in weights:
        match = re.fullmatch(rf"{re.escape(PREFIX)}(.*)\.lora_[AB]\.weight", name)
        known = match and match[1] in linears and match[1].rpartition(".")[2] in TARGETS
        reason = f"{folder}: {name} is not lora_A or lora_B of a layer of the model: {', '.join(TARGETS)}"
        require(known, reason)
        layers[match[1]] = None  # in the order of the file, once
    require(layers, f"{folder / WEIGHTS} contains no adapter")
    found = {}
    for name in layers:
        a, b = (weights.get(f"{PREFIX}{name}.lora_{part}.weight") for part in "AB")
        require(a is not None and b is not None, f"{folder}: {name} has only one of lora_A and lora_B")
        rank = pattern_value(config.get("rank_pattern"), name, config.get("r"))
        base = model.get_submodule(name)
        for part, weight, shape in (("A", a, (rank, base.in_features)), ("B", b, (base.out_features, rank))):
            fits = tuple(weight.shape) == shape and weight.is_floating_point()
            seen = f"has the shape {tuple(weight.shape)} and {weight.dtype}, expected {shape} and a float"
            require(fits, f"{folder}: {name}.lora_{part} {seen}")
        alpha = pattern_value(config.get("alpha_pattern"), name, config.get("lora_alpha"))
        scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
        require(math.isfinite(scale), f"{folder}: lora_alpha {alpha} of {name} is not finite")
        found[name] = a.to(torch.float32), b.to(torch.float32), scale
    return found


def pattern_value(pattern: dict | None, name: str, default):
    """The value of the first key that matches the end of a layer's name, as in peft; else `default`."""
    matching = (key for key in pattern or {} if re.match(rf"(.*\.)?({key})$", f"model.{name}"))
    return next((pattern[key] for key in matching), default)
