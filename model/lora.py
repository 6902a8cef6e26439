"""Low-rank adaptation (Hu et al. 2021, arXiv 2106.09685): train a small addition to frozen matrices.

    y = W x + (alpha / r) B A x                                       (section 4.1)

A is (r, in) and random, B is (out, r) and zero: at first the addition is zero, and the policy equals the
reference. The optimizer and the checkpoints contain A and B only. The reference is the same model with its
adapters off, so it has no weights of its own.

An adapter may also come from a file (--adapter). Then the reference is the base with that adapter: each layer
keeps a frozen copy of the first A and B beside the trained ones, and there is one base in memory.
"""

import math
import re
from collections import Counter
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from errors import InputError
from model.stream import TokenStream
from model.transformer import Transformer

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class AdaptedLinear(nn.Linear):
    """A linear layer with the weight and the name of `base`, plus the output of its adapter.

    While `on` is false it computes as in the reference: with `reference_A` and `reference_B`, or without.
    """

    def __init__(self, base: nn.Linear, rank: int, alpha: float, generator: torch.Generator):
        super().__init__(base.in_features, base.out_features, base.bias is not None, device="meta")
        self.weight, self.bias = base.weight, base.bias
        self.scale, self.on = alpha / rank, True
        # The distribution of nn.Linear, drawn on the CPU: a seed gives the same adapter on every device.
        bound = 1 / math.sqrt(base.in_features)
        start = torch.rand(rank, base.in_features, generator=generator) * 2 * bound - bound
        self.lora_A = nn.Parameter(start.to(base.weight))  # (r, in)
        self.lora_B = nn.Parameter(base.weight.new_zeros(base.out_features, rank))  # (out, r)
        self.reference_A = self.reference_B = None

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        if self.on:
            return y + self.scale * F.linear(F.linear(x, self.lora_A), self.lora_B)
        if self.reference_A is None:
            return y
        return y + self.scale * F.linear(F.linear(x, self.reference_A), self.reference_B)

    def keep_reference(self) -> None:
        """Let the adapter of this moment be the reference's: copies, which no optimizer trains."""
        self.reference_A = nn.Parameter(self.lora_A.detach().clone(), requires_grad=False)
        self.reference_B = nn.Parameter(self.lora_B.detach().clone(), requires_grad=False)

    def merged(self) -> Tensor:
        """W + (alpha / r) B A: the matrix of an equal layer without an adapter."""
        return self.weight + self.scale * self.lora_B @ self.lora_A


def add_adapters(model: Transformer, rank: int, alpha: float, targets: str, seed: int) -> None:
    """Freeze the model and add an adapter to every layer of `targets`: "all", or names with commas."""
    names = TARGETS if targets == "all" else targets.split(",")
    if unknown := [name for name in names if name not in TARGETS]:
        raise InputError(f"--lora-targets {unknown[0]!r} is neither all nor any of {', '.join(TARGETS)}")
    model.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if name in names:
                setattr(module, name, AdaptedLinear(child, rank, alpha, generator))


@torch.no_grad()
def continue_adapters(model: Transformer, adapters: dict[str, tuple[Tensor, Tensor, float]]) -> None:
    """Freeze the model and add these adapters, A, B and scale by the name of the layer."""
    model.requires_grad_(False)
    for name, (a, b, scale) in adapters.items():
        parent, _, child = name.rpartition(".")
        layer = AdaptedLinear(model.get_submodule(name), len(a), scale * len(a), torch.Generator())
        layer.lora_A.copy_(a)
        layer.lora_B.copy_(b)
        setattr(model.get_submodule(parent), child, layer)


@torch.no_grad()
def merge_adapters(model: Transformer) -> None:
    """Replace the layers with an adapter by equal ones without; all weights of the model can be trained."""
    for name, layer in adapted_layers(model).items():
        parent, _, child = name.rpartition(".")
        plain = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
        plain.weight, plain.bias = nn.Parameter(layer.merged()), layer.bias
        setattr(model.get_submodule(parent), child, plain)
    model.requires_grad_(True)


def adapted_layers(model: nn.Module) -> dict[str, AdaptedLinear]:
    """The layers with an adapter, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, AdaptedLinear)}


@contextmanager
def as_reference(model: nn.Module):
    """Within, the model computes as the reference, bit for bit as before its adapters were trained."""
    layers = adapted_layers(model).values()
    for layer in layers:
        layer.on = False
    try:
        yield
    finally:
        for layer in layers:
            layer.on = True


class AdapterReference:
    """The reference of a model with adapters: the same base, not a second copy."""

    def __init__(self, model: Transformer):
        self.model = model

    def __call__(self, stream: TokenStream) -> Tensor:
        with as_reference(self.model):
            return self.model(stream)

    def hidden_of(self, stream: TokenStream) -> Tensor:
        with as_reference(self.model):
            return self.model.hidden_of(stream)

    def logits(self, hidden: Tensor) -> Tensor:
        return self.model.logits(hidden)  # The head has no adapter.

    @property
    def positions_at_once(self) -> int:
        return self.model.positions_at_once


def adapter_weights(model: nn.Module) -> dict[str, Tensor]:
    """A and B of every adapter by name, all that training changes; empty for a model without adapters."""
    return {name: weight for name, weight in model.state_dict().items() if ".lora_" in name}


def base_weights(model: nn.Module) -> dict[str, Tensor]:
    """The weights by name without those of adapters, trained or the reference's."""
    state = model.state_dict()
    return {name: weight for name, weight in state.items() if not re.search(r"\.(lora|reference)_", name)}


class Adapters:
    """All adapters of a model, with the methods that a checkpoint calls."""

    def __init__(self, model: nn.Module):
        self.model = model

    def state_dict(self) -> dict[str, Tensor]:
        return adapter_weights(self.model)

    def load_state_dict(self, weights: dict[str, Tensor]) -> None:
        if other := weights.keys() ^ adapter_weights(self.model).keys():
            raise KeyError(f"adapters differ in {sorted(other)}")
        self.model.load_state_dict(weights, strict=False)  # The frozen weights are those of --model.


def trained_part(model: Transformer) -> Transformer | Adapters:
    """What training changes and a checkpoint contains: the adapters, or the model if it has no adapters."""
    return Adapters(model) if adapted_layers(model) else model


def adapter_shape(model: nn.Module) -> dict:
    """Ranks, alphas and layers of the adapters, under peft's names.

    The most frequent rank and alpha count for all layers that the patterns do not name.
    """
    layers = adapted_layers(model)
    ranks = {name: layer.lora_A.shape[0] for name, layer in layers.items()}
    alphas = {name: layer.scale * ranks[name] for name, layer in layers.items()}
    (rank, _), *_ = Counter(ranks.values()).most_common()
    (alpha, _), *_ = Counter(alphas.values()).most_common()
    targets = {name.rpartition(".")[2] for name in layers}
    named = {name for name, _ in model.named_modules() if name.rpartition(".")[2] in targets}
    return {
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": sorted(targets if named == layers.keys() else layers),
        "rank_pattern": {name: other for name, other in ranks.items() if other != rank},
        "alpha_pattern": {name: other for name, other in alphas.items() if other != alpha},
    }


@torch.no_grad()
def merged_weights(model: Transformer) -> dict[str, Tensor]:
    """The weights of an equal model without adapters; a model without adapters returns its own."""
    layers = adapted_layers(model)
    return base_weights(model) | {f"{name}.weight": layer.merged() for name, layer in layers.items()}
