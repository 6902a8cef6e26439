"""The optimizer, and its learning rate as a pure function of the optimizer step."""

import math
from collections.abc import Collection

import numpy as np
import torch
from torch import nn
from torch.distributed.tensor import DTensor

from errors import NotFiniteError
from training.metrics import Meter
from training.precision import Precision

# Steps in a row that fp16 may skip. The scale starts at 2^16 and halves each time: then it is not too large.
MOST_SKIPS = 25
MAX_LINES = 32  # Data lines that an error message names.


def cosine_lr(step: int, total_steps: int, peak: float, warmup_steps: int) -> float:
    """Learning rate of optimizer step `step`, counted from 0.

    It rises linearly over `warmup_steps`, whose last step has the peak, and then falls along half a cosine.
    It would be 0 at step `total_steps`, which is never taken.
    """
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return peak * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def adamw(model: nn.Module, weight_decay: float, leave_out: Collection[str] = ()) -> torch.optim.AdamW:
    """AdamW (Loshchilov & Hutter 2019, arXiv 1711.05101) with weight decay on matrices only.

    Norm gains, biases and embeddings have no decay: it would change the scores of rare tokens instead of
    smoothing the model. The loop sets the learning rate before every step. Parameters have names, so that a
    checkpoint contains the names of its moments. `leave_out` names parameters that another optimizer has.
    """
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad and name not in leave_out]
    decayed = [(name, p) for name, p in named if p.dim() >= 2 and id(p) not in embeddings]
    plain = [(name, p) for name, p in named if p.dim() < 2 or id(p) in embeddings]
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]
    groups = [group for group in groups if group["params"]]  # Adapters are all matrices.
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.99), fused=True)


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr


def clip_gradients(optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, longest: float) -> float:
    """Unscale the window's gradient, clip its norm to `longest` (0: no clipping), return the norm before."""
    scaler.unscale_(optimizer)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    norm = nn.utils.clip_grad_norm_(parameters, longest or math.inf)
    return (norm.full_tensor() if isinstance(norm, DTensor) else norm).item()


def require_finite(meter: Meter, grad_norm: float, precision: Precision, step: int, lines: np.ndarray):
    """Raise `NotFiniteError` on all ranks, before the step, if the window's loss or gradient is not finite.

    One such element would make every weight NaN. Under fp16 gradients overflow now and then: the scaler skips
    that step and lowers its scale. Skips are counted, and at most `MOST_SKIPS` in a row are accepted.
    """
    if precision.scaler.is_enabled():
        precision.count_skip(not math.isfinite(grad_norm))
        gradient_is_fine = precision.skipped_in_a_row <= MOST_SKIPS
    else:
        gradient_is_fine = math.isfinite(grad_norm)
    if meter.is_finite(0.0 if gradient_is_fine else math.nan):
        return
    if not meter.is_finite():
        reason = "the loss is not finite"
    elif gradient_is_fine:
        reason = "the gradient of another rank is not finite"
    else:
        reason = f"the gradient norm is {grad_norm}"
    where = ", ".join(map(str, sorted(lines.tolist())[:MAX_LINES]))
    more = f" and {len(lines) - MAX_LINES} more" if len(lines) > MAX_LINES else ""
    raise NotFiniteError(step, f"{reason}; the step used the data lines {where}{more}")
