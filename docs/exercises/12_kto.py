"""Exercise 12: make it KTO.

KTO (Ethayarajh et al. 2024, arXiv 2402.01306) needs no pairs. Each answer alone is desirable or not, and its
log-ratio r is compared with a reference point, the divergence `kl` between the two models:

    desirable answers:     1 − σ(β (r − kl))
    undesirable answers:   1 − σ(β (kl − r))

`logratios` is (B,), `desirable` is (B,) and boolean. Return the losses, (B,).
"""

from torch import Tensor


def kto(logratios: Tensor, desirable: Tensor, kl: float, beta: float) -> Tensor:
    raise NotImplementedError
