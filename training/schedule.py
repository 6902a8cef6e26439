"""The optimizer, and its learning rate as a pure function of the optimizer step."""

import math

import numpy as np
import torch
from torch import nn


def cosine_lr(step: int, total_steps: int, peak: float, warmup_steps: int) -> float:
    """Learning rate of optimizer step `step`, counted from 0.

    Rises linearly over `warmup_steps`, the last of which already has the peak, then falls along half a
    cosine and would reach 0 at step `total_steps`, which is never taken.
    """
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return peak * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def adamw(model: nn.Module, weight_decay: float) -> torch.optim.AdamW:
    """AdamW (Loshchilov & Hutter 2019, arXiv 1711.05101) that decays matrices only.

    Norm gains, biases and embeddings are left alone: pulling them to 0 changes what the model says of rare
    tokens rather than how smooth it is. The learning rate is set before every step.
    """
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    trainable = [p for p in model.parameters() if p.requires_grad]
    decayed = [p for p in trainable if p.dim() >= 2 and id(p) not in embeddings]
    plain = [p for p in trainable if p.dim() < 2 or id(p) in embeddings]
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.99), fused=True)


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr


def clip_gradients(
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    longest: float,
    step: int,
    lines: np.ndarray,
) -> float:
    """Unscale the window's gradient and shorten it to `longest` (0: leave it); return the norm it had.

    The norm is the same on every rank, so all of them stop together when it is not finite. Under fp16 that
    is expected now and then, and the scaler skips the step instead.
    """
    scaler.unscale_(optimizer)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    norm = nn.utils.clip_grad_norm_(parameters, longest or math.inf).item()
    if not math.isfinite(norm) and not scaler.is_enabled():
        where = ", ".join(map(str, sorted(lines.tolist())))
        raise FloatingPointError(f"step {step}: the gradient norm is {norm}; the data lines were {where}")
    return norm
