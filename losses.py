"""Every preference objective of the field: what policy and reference say of B pairs in, (B,) losses out.

Read from top to bottom, this is a tour. A pair is a prompt x with a chosen answer y_w and a rejected y_l.

    log pi(y|x)         the sum of the log-probs of y's tokens, the end token included; |y| is their number
    chosen_logratios    a = log pi(y_w|x) - log pi_ref(y_w|x), (B,); beta a is the implicit reward of y_w
    rejected_logratios  b, the same of y_l
    margins             a - b, (B,); with another f-divergence, what takes its place

The parameters of a function say what it looks at: `training/objective.py` passes them by name.
So its signature also
says which options a loss has, with their defaults, and whether it needs a reference at all. No loss takes the
logarithm of a rounded probability: values and gradients are finite at log-ratios of ±1e4.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

# ---- What a log-ratio counts: the derivative f'(pi / pi_ref) of the divergence that holds the policy back
# (f-DPO, Wang et al. 2023, arXiv 2309.16240), but for a constant that cancels in the margin.


def reverse_kl(logratios: Tensor) -> Tensor:
    """KL(pi || pi_ref), as in DPO: f'(u) = log u. It seeks modes: it is dear to say what pi_ref does not."""
    return logratios


def forward_kl(logratios: Tensor) -> Tensor:
    """KL(pi_ref || pi): f'(u) = -1/u. It covers mass: it is dear not to say what pi_ref says."""
    return -expm1(-logratios)


def js(logratios: Tensor) -> Tensor:
    """Jensen-Shannon: f'(u) = log(u / (1 + u)). Between the two, and bounded for what became likelier."""
    return F.logsigmoid(logratios)


def alpha(logratios: Tensor, divergence_alpha: float = 0.5) -> Tensor:
    """The alpha-divergence: f'(u) = (1 - u^-alpha) / alpha, from reverse KL (towards 0) to forward KL (1)."""
    return -expm1(-divergence_alpha * logratios) / divergence_alpha


def expm1(x: Tensor, last: float = 20.0) -> Tensor:
    """e^x - 1 up to x = `last`, and from there on its tangent.

    So a hopeless response neither overflows nor, as with a clamp, is let go: its gradient stays e^last.
    """
    kept = x.clamp(max=last)
    return kept.expm1() + kept.exp() * (x - kept)


# ---- The margin should be large: y_w above y_l, wherever the two are


def sigmoid(margins: Tensor, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """DPO (Rafailov et al. 2023, arXiv 2305.18290, eq. 7); smoothed it is cDPO (Mitchell 2023, eq. 3).

        -log sigmoid(beta margins)

    Maximum likelihood of the preferences when beta log pi/pi_ref is the reward of a Bradley-Terry model.
    cDPO takes each label to be wrong with probability `label_smoothing`, so no margin is worth infinity.
    """
    return cross_entropy(beta * margins, 1 - label_smoothing)


def soft(margins: Tensor, beta: float, score_margins: Tensor, score_scale: float = 1.0) -> Tensor:
    """DPO with soft labels: each pair has its own probability p that y_w wins.

        -p log sigmoid(h) - (1 - p) log sigmoid(-h),    h = beta margins,    p = sigmoid(scale (s_w - s_l))

    For pairs scored by a reward model or by many judges: it is least at h = logit p instead of at infinity.
    With p = 1 it is DPO, with p = 1 - epsilon cDPO; but for a constant it is KL(p || sigmoid(h)).
    """
    return cross_entropy(beta * margins, torch.sigmoid(score_scale * score_margins))


def cross_entropy(h: Tensor, p: float | Tensor) -> Tensor:
    """-p log sigmoid(h) - (1 - p) log sigmoid(-h)."""
    return -p * F.logsigmoid(h) - (1 - p) * F.logsigmoid(-h)


def robust(margins: Tensor, beta: float, label_smoothing: float) -> Tensor:
    """Robust DPO (Chowdhury et al. 2024, arXiv 2403.00409).

        [-(1 - epsilon) log sigmoid(h) + epsilon log sigmoid(-h)] / (1 - 2 epsilon),    h = beta margins

    For labels of which a known share epsilon is flipped: its mean over the flips is DPO on clean labels.
    """
    h, flipped = beta * margins, label_smoothing
    return (-(1 - flipped) * F.logsigmoid(h) + flipped * F.logsigmoid(-h)) / (1 - 2 * flipped)


def hinge(margins: Tensor, beta: float) -> Tensor:
    """SLiC's hinge on log-ratios (Zhao et al. 2023, arXiv 2305.10425; RSO's hinge-norm, 2309.06657).

        max(0, 1 - beta margins)

    A pair that is won by 1 / beta is let go altogether; all others pull alike.
    """
    return torch.relu(1 - beta * margins)


def ipo(margins: Tensor, beta: float) -> Tensor:
    """IPO (Azar et al. 2023, arXiv 2310.12036, eq. 17); beta is the paper's tau.

        (margins - 1 / (2 beta))^2

    A target instead of "ever more": where one answer always wins, DPO's reference loses its hold, IPO's not.
    The log-ratios are sums, as in the paper; `ipo_norm` averages them.
    """
    return (margins - 1 / (2 * beta)) ** 2


def exo_pair(margins: Tensor, beta: float, label_smoothing: float = 1e-3) -> Tensor:
    """EXO on pairs (Ji et al. 2024, arXiv 2402.00856, eq. 16).

        KL( (sigmoid(h), sigmoid(-h)) || (1 - epsilon, epsilon) ),    h = beta margins

    The reverse of cDPO's divergence, so that it seeks the mode; epsilon must be above 0.
    """
    h = beta * margins
    chosen = torch.sigmoid(h) * (F.logsigmoid(h) - math.log(1 - label_smoothing))
    return chosen + torch.sigmoid(-h) * (F.logsigmoid(-h) - math.log(label_smoothing))


def discopop(margins: Tensor, beta: float, discopop_tau: float = 0.05) -> Tensor:
    """DiscoPOP, a loss that a language model found (Lu et al. 2024, arXiv 2406.08414, eq. 5).

        (1 - m) (-log sigmoid(h)) + m e^-h,    h = beta margins,    m = sigmoid(h / tau)

    Logistic for lost pairs, exponential for won ones. m e^-h is one exponential: 0 times infinity is NaN.
    """
    h = beta * margins
    logistic = torch.sigmoid(-h / discopop_tau) * -F.logsigmoid(h)
    return logistic + (F.logsigmoid(h / discopop_tau) - h).exp()


def dpop(
    chosen_logratios: Tensor, rejected_logratios: Tensor, beta: float, dpop_lambda: float = 50.0
) -> Tensor:
    """DPO-Positive (Pal et al. 2024, arXiv 2402.13228, eq. 3 as corrected in July 2024: lambda inside beta).

        -log sigmoid( beta [a - b - lambda max(0, -a)] )

    For pairs that differ in few tokens, where DPO lowers both sides: y_w must not fall below the reference.
    """
    fall = torch.relu(-chosen_logratios)
    return -F.logsigmoid(beta * (chosen_logratios - rejected_logratios - dpop_lambda * fall))


# ---- The same by the token: long answers weigh no more than short ones


def sigmoid_norm(
    chosen_logratios: Tensor,
    rejected_logratios: Tensor,
    chosen_lengths: Tensor,
    rejected_lengths: Tensor,
    beta: float,
) -> Tensor:
    """Length-normalised DPO, Tülu 3's `dpo_norm` (Lambert et al. 2024, arXiv 2411.15124), with beta 5 there.

        -log sigmoid( beta (a / |y_w| - b / |y_l|) )
    """
    return -F.logsigmoid(beta * (chosen_logratios / chosen_lengths - rejected_logratios / rejected_lengths))


def ipo_norm(
    chosen_logratios: Tensor,
    rejected_logratios: Tensor,
    chosen_lengths: Tensor,
    rejected_lengths: Tensor,
    beta: float,
) -> Tensor:
    """IPO on averages, as several libraries have it and the paper has not.

        (a / |y_w| - b / |y_l| - 1 / (2 beta))^2
    """
    margins = chosen_logratios / chosen_lengths - rejected_logratios / rejected_lengths
    return (margins - 1 / (2 * beta)) ** 2


# ---- Each side by itself: y_w up, y_l down


def nca_pair(chosen_logratios: Tensor, rejected_logratios: Tensor, beta: float) -> Tensor:
    """NCA on pairs (Chen et al. 2024, arXiv 2402.05369), with beta 0.01 there.

        -log sigmoid(beta a) - 1/2 log sigmoid(-beta a) - 1/2 log sigmoid(-beta b)

    Noise-contrastive: rewards are absolute, so that y_w's likelihood does not fall along with y_l's.
    """
    chosen, rejected = beta * chosen_logratios, beta * rejected_logratios
    return -F.logsigmoid(chosen) - (F.logsigmoid(-chosen) + F.logsigmoid(-rejected)) / 2


def bco_pair(chosen_logratios: Tensor, rejected_logratios: Tensor, beta: float, delta: float) -> Tensor:
    """BCO (Jung et al. 2024, arXiv 2404.04656): a binary classifier of good and bad answers.

        -log sigmoid(beta a - delta) - log sigmoid(delta - beta b)

    delta, the running mean of all rewards, is where the classifier divides; it has no gradient.
    """
    return -F.logsigmoid(beta * chosen_logratios - delta) - F.logsigmoid(delta - beta * rejected_logratios)


def kto_pair(chosen_logratios: Tensor, rejected_logratios: Tensor, beta: float) -> Tensor:
    """KTO on pairs (Ethayarajh et al. 2024, arXiv 2402.01306; eq. 7 of the authors' HALOs report).

        1/2 [1 - sigmoid(beta (a - KL_l))] + 1/2 [1 - sigmoid(beta (KL_w - b))],    KL = max(0, batch mean)

    Prospect theory's value of gains and losses: both saturate. The point they are measured from is the mean
    log-ratio of the other side over the micro-batch, without gradient, so pairs that meet in a micro-batch
    depend on one another. The half makes it a mean over answers, as in the paper.
    """
    chosen_kl = chosen_logratios.mean().clamp(min=0).detach()
    rejected_kl = rejected_logratios.mean().clamp(min=0).detach()
    gain = torch.sigmoid(beta * (rejected_kl - chosen_logratios))
    return (gain + torch.sigmoid(beta * (rejected_logratios - chosen_kl))) / 2


def apo_zero(chosen_logratios: Tensor, rejected_logratios: Tensor, beta: float) -> Tensor:
    """APO-zero (D'Oosterlinck et al. 2024, arXiv 2408.06266, eq. 7, plus 1).

        1 - sigmoid(beta a) + sigmoid(beta b)

    For answers that are better than the model's own: y_w becomes likelier, not only likelier than y_l.
    """
    return torch.sigmoid(-beta * chosen_logratios) + torch.sigmoid(beta * rejected_logratios)


def apo_down(chosen_logratios: Tensor, rejected_logratios: Tensor, beta: float) -> Tensor:
    """APO-down (D'Oosterlinck et al. 2024, arXiv 2408.06266, eq. 8, plus 1).

        sigmoid(beta a) + 1 - sigmoid(beta (a - b))

    For a model that is better than both answers: both become less likely, y_l more so.
    """
    margins = chosen_logratios - rejected_logratios
    return torch.sigmoid(beta * chosen_logratios) + torch.sigmoid(-beta * margins)


def sppo_hard(chosen_logratios: Tensor, rejected_logratios: Tensor, beta: float) -> Tensor:
    """SPPO (Wu et al. 2024, arXiv 2405.00675, eq. 4.7), with labels 1 and 0 as win rates; beta 1e-3 there.

        (a - 1 / (2 beta))^2 + (b + 1 / (2 beta))^2

    Self-play towards a Nash equilibrium: each side has a target of its own, whatever the other does.
    """
    return (chosen_logratios - 1 / (2 * beta)) ** 2 + (rejected_logratios + 1 / (2 * beta)) ** 2


# ---- Whole distributions: the pairs of a micro-batch are sorted, so they depend on one another


def aot(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    reference_chosen_logps: Tensor,
    reference_rejected_logps: Tensor,
    beta: float,
    label_smoothing: float = 0.0,
) -> Tensor:
    """AOT, paired (Melnyk et al. 2024, arXiv 2406.05882), with beta 0.01 there.

        DPO's loss of the margins  sort(log pi(y_w) - log pi(y_l)) - sort(log pi_ref(y_w) - log pi_ref(y_l))

    The policy's preferences, as a distribution, should lie above the reference's at every quantile.
    """
    policy = (policy_chosen_logps - policy_rejected_logps).sort().values
    reference = (reference_chosen_logps - reference_rejected_logps).sort().values
    return cross_entropy(beta * (policy - reference), 1 - label_smoothing)


def aot_unpaired(
    chosen_logratios: Tensor, rejected_logratios: Tensor, beta: float, label_smoothing: float = 0.0
) -> Tensor:
    """AOT, unpaired (Melnyk et al. 2024, arXiv 2406.05882): DPO's loss of the margins sort(a) - sort(b).

    The rewards of good answers should lie above those of bad ones at every quantile, whoever met whom.
    """
    quantiles = chosen_logratios.sort().values - rejected_logratios.sort().values
    return cross_entropy(beta * quantiles, 1 - label_smoothing)


# ---- Without a reference


def simpo(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    chosen_lengths: Tensor,
    rejected_lengths: Tensor,
    beta: float,
    simpo_gamma: float = 0.5,
) -> Tensor:
    """SimPO (Meng et al. 2024, arXiv 2405.14734, eq. 6), with beta 2 to 2.5 there, and gamma / beta 0.25.

        -log sigmoid( beta (log pi(y_w) / |y_w| - log pi(y_l) / |y_l|) - gamma )

    The reward is what generation ranks by, the mean log-prob of a token; gamma is the margin to be won by.
    """
    margins = policy_chosen_logps / chosen_lengths - policy_rejected_logps / rejected_lengths
    return -F.logsigmoid(beta * margins - simpo_gamma)


def orpo(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    chosen_lengths: Tensor,
    rejected_lengths: Tensor,
    beta: float,
) -> Tensor:
    """ORPO (Hong et al. 2024, arXiv 2403.07691, eq. 6 and 7); beta is the paper's lambda.

        -log p_w - beta log sigmoid( log odds_w - log odds_l ),    odds = p / (1 - p)

    p is the geometric mean of an answer's token probabilities. Fine-tuning and preference in one stage.
    """
    chosen_means = policy_chosen_logps / chosen_lengths
    margins = log_odds(chosen_means) - log_odds(policy_rejected_logps / rejected_lengths)
    return -chosen_means - beta * F.logsigmoid(margins)


def log_odds(logp: Tensor) -> Tensor:
    """log p - log(1 - p) of log p. Odds are capped at a million: those of a certain answer are infinite."""
    logp = logp.clamp(max=-1e-6)
    return logp - (-logp.expm1()).log()


def sft(policy_chosen_logps: Tensor, chosen_lengths: Tensor) -> Tensor:
    """Likelihood of y_w, -log pi(y_w|x) / |y_w|: a mean over each answer's own tokens.

    With DPO it is RPO, "sigmoid,sft" (Pang et al. 2024, arXiv 2404.19733v3, eq. 1); with DPO and BCO it is
    MPO, "sigmoid,bco_pair,sft" weighted 0.8, 0.2, 1 (Wang et al. 2024, arXiv 2411.10442).
    A mean over the tokens of a batch, as elsewhere, would weigh long answers more than the paper does.
    """
    return -policy_chosen_logps / chosen_lengths


LOSSES = {
    loss.__name__: loss
    for loss in (
        *(sigmoid, soft, robust, hinge, ipo, exo_pair, discopop, dpop, sigmoid_norm, ipo_norm),
        *(nca_pair, bco_pair, kto_pair, apo_zero, apo_down, sppo_hard, aot, aot_unpaired, simpo, orpo, sft),
    )
}
DIVERGENCES = {divergence.__name__: divergence for divergence in (reverse_kl, forward_kl, js, alpha)}


# ---- A reward model instead of a policy


def bradley_terry_loss(chosen_rewards: Tensor, rejected_rewards: Tensor) -> Tensor:
    """A reward model's loss (Ouyang et al. 2022, arXiv 2203.02155, eq. 1): -log sigmoid(r(y_w) - r(y_l)).

    Takes the (B,) rewards of each side and returns (B,) losses. Bradley & Terry (1952): the probability that
    y_w is preferred is the sigmoid of the difference, so a constant added to all rewards changes nothing.
    """
    return -F.logsigmoid(chosen_rewards - rejected_rewards)


# ---- What is logged


def reward_metrics(losses: Tensor, chosen_rewards: Tensor, rejected_rewards: Tensor) -> dict[str, Tensor]:
    """What is logged of B pairs, as sums over them under the field's names. A tie is half an accuracy."""
    margins = chosen_rewards - rejected_rewards
    values = {
        "loss": losses,
        "rewards/chosen": chosen_rewards,
        "rewards/rejected": rejected_rewards,
        "rewards/accuracies": (margins > 0).float() + 0.5 * (margins == 0).float(),
        "rewards/margins": margins,
    }
    return {name: value.detach().sum() for name, value in values.items()}
