"""Exercise 10: keep the chosen answer likely.

DPO constrains the difference a − b only, so log π(y_w|x) may fall as long as log π(y_l|x) falls more. DPOP
(Pal et al. 2024, arXiv 2402.13228, eq. 3) subtracts a penalty from the margin where the chosen answer has
become less likely than under the reference: λ times the loss of log-probability, or 0 where there is no loss.
β multiplies the whole difference. Both log-ratios are (B,). Return the losses, (B,).
"""

from torch import Tensor


def dpop(chosen_logratios: Tensor, rejected_logratios: Tensor, beta: float, dpop_lambda: float) -> Tensor:
    raise NotImplementedError
