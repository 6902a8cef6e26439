"""Preference objectives: summed log-probs in, one loss a pair out. Pure functions, no model in sight."""

import torch.nn.functional as F
from torch import Tensor


def dpo_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    reference_chosen_logps: Tensor,
    reference_rejected_logps: Tensor,
    beta: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Direct Preference Optimization (Rafailov et al. 2023, arXiv 2305.18290, eq. 7).

        loss = -log sigmoid( beta [ (log pi/pi_ref)(y_w) - (log pi/pi_ref)(y_l) ] )

    Takes the four log-probs of whole responses, each (B,): sums over tokens, not means. Returns (B,) losses
    and the (B,) implicit rewards beta * log(pi/pi_ref) of the chosen and rejected side, without gradient.
    """
    chosen_logratios = policy_chosen_logps - reference_chosen_logps
    rejected_logratios = policy_rejected_logps - reference_rejected_logps
    losses = -F.logsigmoid(beta * (chosen_logratios - rejected_logratios))
    return losses, beta * chosen_logratios.detach(), beta * rejected_logratios.detach()


def pair_metrics(
    losses: Tensor,
    chosen_rewards: Tensor,
    rejected_rewards: Tensor,
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
) -> dict[str, Tensor]:
    """What is logged of B pairs, as sums over them under the field's names. A tie is half an accuracy."""
    margins = chosen_rewards - rejected_rewards
    values = {
        "loss": losses,
        "rewards/chosen": chosen_rewards,
        "rewards/rejected": rejected_rewards,
        "rewards/accuracies": (margins > 0).float() + 0.5 * (margins == 0).float(),
        "rewards/margins": margins,
        "logps/chosen": policy_chosen_logps,
        "logps/rejected": policy_rejected_logps,
    }
    return {name: value.detach().sum() for name, value in values.items()}
