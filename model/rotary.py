"""Rotary positions (Su et al. 2021, arXiv 2104.09864): queries and keys are rotated by their position."""

import math

import torch
from torch import Tensor


def rotary(positions: Tensor, size: int, theta: float, scaling: dict | None = None) -> tuple[Tensor, Tensor]:
    """cos and sin of the rotary angles for heads of `size` D, each (T, 1, D/2) in float32."""
    frequencies = theta ** (-torch.arange(0, size, 2, device=positions.device).float() / size)  # (D/2,)
    angles = positions[:, None, None].float() * scaled(frequencies, scaling)
    return angles.cos(), angles.sin()


def scaled(frequencies: Tensor, scaling: dict | None) -> Tensor:
    """Rotary frequencies of a checkpoint that was trained for longer texts, (D/2,).

    ``linear`` divides all frequencies by a factor (Chen et al. 2023, arXiv 2306.15595). ``llama3`` (Llama
    3.1) counts the turns of a frequency over the original length: below `low_freq_factor` turns the frequency
    is divided, above `high_freq_factor` turns it is kept, and between the two it is interpolated linearly.
    """
    if scaling is None:
        return frequencies
    if scaling["rope_type"] == "linear":
        return frequencies / scaling["factor"]
    turns = scaling["original_max_position_embeddings"] * frequencies / (2 * math.pi)
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    kept = ((turns - low) / (high - low)).clamp(0, 1)  # 1: kept, 0: divided
    return frequencies * (kept + (1 - kept) / scaling["factor"])


def rotate(x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """(T, heads, D): each pair (x_i, x_{i + D/2}) rotated by its angle, the layout of Llama checkpoints."""
    cos, sin = rotation
    first, second = x.chunk(2, dim=-1)  # each (T, heads, D/2)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)
