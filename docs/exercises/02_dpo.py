"""Exercise 2: write DPO's loss yourself.

Each argument but beta is a sum over an answer's tokens, (B,). Return the losses of the B pairs, (B,).
"""

from torch import Tensor


def dpo(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    reference_chosen_logps: Tensor,
    reference_rejected_logps: Tensor,
    beta: float,
) -> Tensor:
    raise NotImplementedError
