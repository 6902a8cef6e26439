"""Exercise 5: write IPO yourself.

DPO always wants a larger margin. IPO (Azar et al. 2023, arXiv 2310.12036, eq. 17) gives the margin a target,
1 / (2 β), and punishes the squared distance to it. `margins` is a − b, (B,). Return the losses, (B,).
"""

from torch import Tensor


def ipo(margins: Tensor, beta: float) -> Tensor:
    raise NotImplementedError
