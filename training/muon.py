"""Muon: an optimizer for matrices, beside AdamW for the rest of a model.

`torch.optim.Muon` computes the same, but always in bf16, and one matrix after another. On a CPU that does not
multiply bf16 a step of the tiny model took four seconds with it, and 0.18 here.
"""

import math
from collections import defaultdict

import torch
from torch import Tensor, nn

from training.schedule import adamw

MOMENTUM = 0.95


class MuonWithAdamW(torch.optim.Optimizer):
    """Muon (Jordan 2024) for the matrices of the layers, AdamW for embeddings, scores, norms and biases.

    Muon turns the averaged gradient of a matrix into the nearest orthogonal matrix, so that all directions
    move by the same amount. It is scaled to the size of an AdamW update (Liu et al. 2025, arXiv 2502.16982),
    so both have one learning rate. A new model needs fewer tokens with it. It needs whole matrices: not for
    weights that are split among ranks. Matrices are multiplied in `dtype`.
    """

    def __init__(self, model: nn.Module, weight_decay: float, dtype: torch.dtype = torch.float32):
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        matrices = {name: p for name, p in trained.items() if name.startswith("layers.") and p.dim() == 2}
        self.adamw = adamw(model, weight_decay, leave_out=matrices)
        groups = [dict(group) for group in self.adamw.param_groups]
        for group in groups:
            group["params"] = list(zip(group.pop("param_names"), group["params"], strict=True))
        muon = {"params": list(matrices.items()), "weight_decay": weight_decay, "lr": 0.0}
        super().__init__([muon, *groups], {})
        self.dtype = dtype

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Take one step with the gradients of all parameters."""
        self.adamw.param_groups = self.param_groups[1:]
        self.adamw.state = self.state  # Moments are kept here; AdamW only computes.
        self.adamw.step()

        muon = self.param_groups[0]
        of_shape = defaultdict(list)  # matrices of one shape are orthogonalised in one call
        for matrix in muon["params"]:
            if matrix.grad is not None:
                of_shape[matrix.shape].append(matrix)
        for shape, matrices in of_shape.items():
            directions = orthogonal(torch.stack([self.direction(matrix) for matrix in matrices]), self.dtype)
            for matrix, direction in zip(matrices, directions, strict=True):
                matrix.mul_(1 - muon["lr"] * muon["weight_decay"])
                matrix.add_(direction, alpha=-muon["lr"] * 0.2 * math.sqrt(max(shape)))

    def direction(self, matrix: Tensor) -> Tensor:
        """The gradient averaged over the steps, with Nesterov's look ahead."""
        state = self.state[matrix]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(matrix)
        average = state["momentum_buffer"].lerp_(matrix.grad, 1 - MOMENTUM)
        return matrix.grad.lerp(average, MOMENTUM)


def orthogonal(matrices: Tensor, dtype: torch.dtype, steps: int = 5) -> Tensor:
    """About the nearest orthogonal matrix to each of n matrices, (n, rows, columns), by Newton-Schulz steps.

    A step applies a s + b s³ + c s⁵ to each singular value s. With Jordan's a, b and c small values grow
    fast, and after five steps most of them lie between 0.7 and 1.2: near enough to 1 for an optimizer.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = matrices.shape[1] > matrices.shape[2]
    x = (matrices.mT if tall else matrices).to(dtype)
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)  # no singular value above 1
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x
