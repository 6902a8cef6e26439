"""Every preference objective of the field, DPO first. Each function returns the losses of B pairs, (B,).

A pair is a prompt x with a chosen answer y_w ("won") and a rejected answer y_l ("lost").

    log π(y|x)          the sum of the log-probs of y's tokens, end token included; |y| is their number
    chosen_logratios    a = log π(y_w|x) − log π_ref(y_w|x), (B,); β a is the implicit reward of y_w
    rejected_logratios  b, the same for y_l
    margins             a − b, (B,)
    mean_margins        a / |y_w| − b / |y_l|, (B,)
    chosen_mean_logps   log π(y_w|x) / |y_w|, (B,), the mean log-prob of a token; rejected_mean_logps: of y_l

The parameters of a function are what it needs: `training/objective.py` passes them by name. Values and
gradients are finite at log-ratios of ±1e4: no function takes the logarithm of a rounded probability.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

# ---- DPO


def sigmoid(margins: Tensor, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """DPO (Rafailov et al. 2023, arXiv 2305.18290, eq. 7).

        −log σ(β (a − b))

    If β log π/π_ref is the reward, Bradley-Terry gives P(y_w beats y_l) = σ(β (a − b)). DPO is maximum
    likelihood of that model. Its gradient in a is −β σ(−β (a − b)): a pair that is won no longer pulls.

    With `label_smoothing` ε it is cDPO (Mitchell 2023, eq. 3): each label is wrong with probability ε.

        −(1 − ε) log σ(β (a − b)) − ε log σ(−β (a − b))
    """
    losses = -F.logsigmoid(beta * margins)
    if label_smoothing:
        losses = (1 - label_smoothing) * losses - label_smoothing * F.logsigmoid(-beta * margins)
    return losses


# ---- Other losses of the margin: y_w above y_l


def robust(margins: Tensor, beta: float, label_smoothing: float) -> Tensor:
    """Robust DPO (Chowdhury et al. 2024, arXiv 2403.00409).

        [−(1 − ε) log σ(h) + ε log σ(−h)] / (1 − 2 ε),    h = β (a − b)

    For labels of which a known share ε is flipped. Averaged over the flips it is DPO on clean labels.
    """
    h, flipped = beta * margins, label_smoothing
    return (-(1 - flipped) * F.logsigmoid(h) + flipped * F.logsigmoid(-h)) / (1 - 2 * flipped)


def hinge(margins: Tensor, beta: float) -> Tensor:
    """SLiC's hinge on log-ratios (Zhao et al. 2023, arXiv 2305.10425; hinge-norm in RSO, 2309.06657).

        max(0, 1 − β (a − b))

    A pair with a margin of 1/β or more has no gradient. All other pairs have the same gradient.
    """
    return torch.relu(1 - beta * margins)


def ipo(margins: Tensor, beta: float) -> Tensor:
    """IPO (Azar et al. 2023, arXiv 2310.12036, eq. 17); beta is the paper's τ.

        (a − b − 1 / (2 β))²

    The margin has a target. If one answer always wins, DPO's margin grows without bound, IPO's does not.
    The log-ratios are sums, as in the paper; `ipo_norm` uses means.
    """
    return (margins - 1 / (2 * beta)) ** 2


def exo_pair(margins: Tensor, beta: float, label_smoothing: float = 1e-3) -> Tensor:
    """EXO on pairs (Ji et al. 2024, arXiv 2402.00856, eq. 16).

        KL( (σ(h), σ(−h)) ‖ (1 − ε, ε) ),    h = β (a − b)

    The reverse of cDPO's divergence, so it is mode-seeking. ε must be above 0.
    """
    h = beta * margins
    chosen = torch.sigmoid(h) * (F.logsigmoid(h) - math.log(1 - label_smoothing))
    return chosen + torch.sigmoid(-h) * (F.logsigmoid(-h) - math.log(label_smoothing))


def discopop(margins: Tensor, beta: float, discopop_tau: float = 0.05) -> Tensor:
    """DiscoPOP, found by a language model (Lu et al. 2024, arXiv 2406.08414, eq. 5).

        (1 − m) (−log σ(h)) + m e^−h,    h = β (a − b),    m = σ(h / τ)

    Logistic for lost pairs, exponential for won pairs. It is not convex: near h = 0, where training starts, a
    gradient step lowers the margin. m e^−h is computed as one exponential, since 0 · inf is NaN.
    """
    h = beta * margins
    logistic = torch.sigmoid(-h / discopop_tau) * -F.logsigmoid(h)
    return logistic + (F.logsigmoid(h / discopop_tau) - h).exp()


def dpop(
    chosen_logratios: Tensor, rejected_logratios: Tensor, beta: float, dpop_lambda: float = 50.0
) -> Tensor:
    """DPO-Positive (Pal et al. 2024, arXiv 2402.13228, eq. 3, corrected in July 2024: λ is inside β).

        −log σ( β [a − b − λ max(0, −a)] )

    For pairs that differ in few tokens. There DPO lowers both answers; DPOP penalises a lower y_w.
    """
    fall = torch.relu(-chosen_logratios)
    return -F.logsigmoid(beta * (chosen_logratios - rejected_logratios - dpop_lambda * fall))


# ---- Losses that use scores: by how much is y_w better?


def soft(margins: Tensor, beta: float, score_margins: Tensor, score_scale: float = 1.0) -> Tensor:
    """DPO with soft labels: the data gives each pair a probability p that y_w wins.

        −p log σ(h) − (1 − p) log σ(−h),    h = β (a − b),    p = σ(scale (s_w − s_l))

    Scores s come from a reward model or from several judges. The minimum is at h = logit p, not at infinity.
    p = 1 is DPO, p = 1 − ε is cDPO. Up to a constant the loss is KL(p ‖ σ(h)).
    """
    h, p = beta * margins, torch.sigmoid(score_scale * score_margins)
    return -p * F.logsigmoid(h) - (1 - p) * F.logsigmoid(-h)


def rebel(margins: Tensor, beta: float, score_margins: Tensor, score_scale: float = 1.0) -> Tensor:
    """REBEL (Gao et al. 2024, arXiv 2404.16767); as reward distillation Fisch et al. 2024, 2405.19316.

        (h − scale (s_w − s_l))²,    h = β (a − b)

    Regression of the implicit reward on the scores. Z(x) is the same for both answers of a prompt and cancels
    in the gap, so the size of a reward can be fitted without a model of Z(x).
    """
    return (beta * margins - score_scale * score_margins) ** 2


def odpo(margins: Tensor, beta: float, score_margins: Tensor, odpo_alpha: float = 1.0) -> Tensor:
    """DPO with an offset (Amini et al. 2024, arXiv 2402.10571).

        −log σ(h − α log(s_w − s_l)),    h = β (a − b)

    An answer that is much better must win by more. Equal scores have the offset −∞, and so no loss.
    """
    return -F.logsigmoid(beta * margins - odpo_alpha * score_margins.clamp(min=0).log())


# ---- Length: a long answer has no more weight than a short one


def sigmoid_norm(mean_margins: Tensor, beta: float) -> Tensor:
    """Length-normalised DPO, `dpo_norm` of Tülu 3 (Lambert et al. 2024, arXiv 2411.15124; β is 5 there).

    −log σ( β (a / |y_w| − b / |y_l|) )
    """
    return -F.logsigmoid(beta * mean_margins)


def ipo_norm(mean_margins: Tensor, beta: float) -> Tensor:
    """IPO with means over tokens. Several libraries implement this; the paper has sums.

    (a / |y_w| − b / |y_l| − 1 / (2 β))²
    """
    return (mean_margins - 1 / (2 * beta)) ** 2


def rdpo(
    margins: Tensor, chosen_lengths: Tensor, rejected_lengths: Tensor, beta: float, rdpo_alpha: float
) -> Tensor:
    """Length-regularised DPO, R-DPO (Park et al. 2024, arXiv 2403.19159).

        −log σ( h + α (|y_w| − |y_l|) ),    h = β (a − b)

    The policy maximises the reward minus α |y|, so the reward that is fitted is β log π/π_ref + α |y|.
    Length explains a part of the win of a longer y_w, which needs a smaller margin.
    """
    return -F.logsigmoid(beta * margins + rdpo_alpha * (chosen_lengths - rejected_lengths))


# ---- Each answer on its own: y_w up, y_l down


def nca_pair(chosen_logratios: Tensor, rejected_logratios: Tensor, beta: float) -> Tensor:
    """NCA on pairs (Chen et al. 2024, arXiv 2402.05369; β is 0.01 there).

        −log σ(β a) − ½ log σ(−β a) − ½ log σ(−β b)

    Noise-contrastive estimation. Rewards are absolute, so the likelihood of y_w does not fall with y_l's.
    """
    chosen, rejected = beta * chosen_logratios, beta * rejected_logratios
    return -F.logsigmoid(chosen) - (F.logsigmoid(-chosen) + F.logsigmoid(-rejected)) / 2


def bco_pair(chosen_logratios: Tensor, rejected_logratios: Tensor, beta: float, delta: float) -> Tensor:
    """BCO (Jung et al. 2024, arXiv 2404.04656): a binary classifier of good and bad answers.

        −log σ(β a − δ) − log σ(δ − β b)

    δ is the running mean of all rewards, without gradient. It is the classifier's threshold.
    """
    return -F.logsigmoid(beta * chosen_logratios - delta) - F.logsigmoid(delta - beta * rejected_logratios)


def kto_pair(chosen_logratios: Tensor, rejected_logratios: Tensor, beta: float) -> Tensor:
    """KTO on pairs (Ethayarajh et al. 2024, arXiv 2402.01306; eq. 7 of the authors' HALOs report).

        ½ [1 − σ(β (a − KL_l))] + ½ [1 − σ(β (KL_w − b))],    KL = max(0, mean over the batch)

    Gains and losses saturate, as in prospect theory. KL_w and KL_l are the mean log-ratios of the chosen and
    the rejected side over the micro-batch, without gradient: the losses depend on the other pairs in it.
    Its author advises against this paired form (huggingface/trl issue 1387): a simplified version that does
    not work as well as KTO, which takes single answers and is `kto`.
    """
    chosen_kl = chosen_logratios.mean().clamp(min=0).detach()
    rejected_kl = rejected_logratios.mean().clamp(min=0).detach()
    gain = torch.sigmoid(beta * (rejected_kl - chosen_logratios))
    return (gain + torch.sigmoid(beta * (rejected_logratios - chosen_kl))) / 2


def kto(
    chosen_logratios: Tensor,
    rejected_logratios: Tensor,
    chosen_lengths: Tensor,
    rejected_lengths: Tensor,
    beta: float,
    z0: Tensor | float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Tensor:
    """KTO on single answers (Ethayarajh et al. 2024, arXiv 2402.01306, eq. 8).

        desirable: λ_D [1 − σ(β a − z₀)],    undesirable: λ_U [1 − σ(z₀ − β b)]

    A row has one answer, chosen if it is desirable and rejected if not; the missing side has length 0.
    z₀ = max(0, β mean(log π(y'|x)/π_ref(y'|x))), without gradient, estimates β KL(π ‖ π_ref) from answers y'
    to other prompts: the reward against which gains and losses are measured.
    """
    desirable = torch.sigmoid(z0 - beta * chosen_logratios) * (chosen_lengths > 0)
    undesirable = torch.sigmoid(beta * rejected_logratios - z0) * (rejected_lengths > 0)
    return desirable_weight * desirable + undesirable_weight * undesirable


def apo_zero(chosen_logratios: Tensor, rejected_logratios: Tensor, beta: float) -> Tensor:
    """APO-zero (D'Oosterlinck et al. 2024, arXiv 2408.06266, eq. 7, plus 1).

        1 − σ(β a) + σ(β b)

    For answers that are better than the model's own. The likelihood of y_w itself rises.
    """
    return torch.sigmoid(-beta * chosen_logratios) + torch.sigmoid(beta * rejected_logratios)


def apo_down(chosen_logratios: Tensor, rejected_logratios: Tensor, beta: float) -> Tensor:
    """APO-down (D'Oosterlinck et al. 2024, arXiv 2408.06266, eq. 8, plus 1).

        σ(β a) + 1 − σ(β (a − b))

    For a model that is better than both answers. Both likelihoods fall, that of y_l more.
    """
    margins = chosen_logratios - rejected_logratios
    return torch.sigmoid(beta * chosen_logratios) + torch.sigmoid(-beta * margins)


def sppo_hard(chosen_logratios: Tensor, rejected_logratios: Tensor, beta: float) -> Tensor:
    """SPPO (Wu et al. 2024, arXiv 2405.00675, eq. 4.7) with win rates 1 and 0; β is 1e-3 there.

        (a − 1 / (2 β))² + (b + 1 / (2 β))²

    Self-play towards a Nash equilibrium. Each answer has a target of its own.
    """
    return (chosen_logratios - 1 / (2 * beta)) ** 2 + (rejected_logratios + 1 / (2 * beta)) ** 2


# ---- More than two answers


def plackett_luce(reply_logratios: Tensor, beta: float) -> Tensor:
    """DPO of K ranked replies, the best one first (Rafailov et al. 2023, arXiv 2305.18290, appendix A.3).

        −Σ_{k<K} log [ e^{r_k} / Σ_{j≥k} e^{r_j} ]  =  −Σ_{k<K} log σ( −log Σ_{j>k} e^{r_j − r_k} )

    `reply_logratios` are l, (B, K), NaN where a prompt has fewer replies; r = β l. Plackett-Luce: the best
    reply is chosen among all, the second among the rest, and so on (Plackett 1975). K = 2 is `sigmoid`.
    """
    present = ~reply_logratios.isnan()
    margins = reply_logratios[:, :, None] - reply_logratios[:, None, :]  # (B, K, K) l_k − l_j
    worse = (present[:, :, None] & present[:, None, :]).triu(1)  # (B, K, K) j > k
    # A reply without worse ones gets −log σ(huge) = 0, and no NaN of a sum over nothing.
    terms = (-beta * margins).masked_fill(~worse, torch.finfo(margins.dtype).min)
    return -F.logsigmoid(-terms.logsumexp(2)).sum(1)


# ---- Whole distributions: the pairs of a micro-batch are sorted, so they depend on one another


def aot(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    reference_chosen_logps: Tensor,
    reference_rejected_logps: Tensor,
    beta: float,
    label_smoothing: float = 0.0,
) -> Tensor:
    """AOT, paired (Melnyk et al. 2024, arXiv 2406.05882; β is 0.01 there).

        DPO's loss of  sort(log π(y_w) − log π(y_l)) − sort(log π_ref(y_w) − log π_ref(y_l))

    The distribution of the policy's preferences is raised above the reference's at every quantile.
    """
    policy = (policy_chosen_logps - policy_rejected_logps).sort().values
    reference = (reference_chosen_logps - reference_rejected_logps).sort().values
    return sigmoid(policy - reference, beta, label_smoothing)


def aot_unpaired(
    chosen_logratios: Tensor, rejected_logratios: Tensor, beta: float, label_smoothing: float = 0.0
) -> Tensor:
    """AOT, unpaired (Melnyk et al. 2024, arXiv 2406.05882): DPO's loss of sort(a) − sort(b).

    The rewards of chosen answers are raised above those of rejected answers at every quantile.
    """
    quantiles = chosen_logratios.sort().values - rejected_logratios.sort().values
    return sigmoid(quantiles, beta, label_smoothing)


# ---- Whole next-token distributions


def tdpo2(
    chosen_logratios: Tensor,
    rejected_logratios: Tensor,
    chosen_kl: Tensor,
    rejected_kl: Tensor,
    beta: float,
    tdpo_alpha: float = 0.5,
) -> Tensor:
    """TDPO₂ (Zeng et al. 2024, arXiv 2404.11999).

        −log σ( β [a − b − α (D_l − sg D_w)] ),    D = Σ_t KL( π_ref(·|x, y_<t) ‖ π(·|x, y_<t) )

    Keeps the policy near π_ref along y_l as well as along y_w. sg is "no gradient": else D_w would be raised.
    """
    gap = rejected_kl - chosen_kl.detach()
    return -F.logsigmoid(beta * (chosen_logratios - rejected_logratios - tdpo_alpha * gap))


# ---- Without a reference


def simpo(
    chosen_mean_logps: Tensor, rejected_mean_logps: Tensor, beta: float, simpo_gamma: float = 0.5
) -> Tensor:
    """SimPO (Meng et al. 2024, arXiv 2405.14734, eq. 6; β is 2 to 2.5 and γ/β 0.25 there).

        −log σ( β (log π(y_w) / |y_w| − log π(y_l) / |y_l|) − γ )

    The reward is the mean log-prob of a token, by which generation ranks. γ is the required margin.
    """
    return -F.logsigmoid(beta * (chosen_mean_logps - rejected_mean_logps) - simpo_gamma)


def simper(chosen_mean_logps: Tensor, rejected_mean_logps: Tensor) -> Tensor:
    """SimPER (Xiao et al. 2025, arXiv 2502.00883): inverse perplexities, without a hyperparameter.

        −p_w + p_l,    p = π(y)^(1/|y|)

    Bounded by −1 and 1. The gradient of an answer is proportional to p, so unlikely answers are left alone.
    """
    return rejected_mean_logps.exp() - chosen_mean_logps.exp()


def orpo(chosen_mean_logps: Tensor, rejected_mean_logps: Tensor, beta: float) -> Tensor:
    """ORPO (Hong et al. 2024, arXiv 2403.07691, eq. 6 and 7); beta is the paper's λ.

        −log p_w − β log σ( log odds_w − log odds_l ),    odds = p / (1 − p)

    p is the geometric mean of an answer's token probabilities. One stage: fine-tuning and preference.
    """
    margins = log_odds(chosen_mean_logps) - log_odds(rejected_mean_logps)
    return -chosen_mean_logps - beta * F.logsigmoid(margins)


def log_odds(logp: Tensor) -> Tensor:
    """log p − log(1 − p), from log p. Odds are capped at a million, since those of p = 1 are infinite."""
    logp = logp.clamp(max=-1e-6)
    return logp - (-logp.expm1()).log()


def sft(chosen_mean_logps: Tensor) -> Tensor:
    """Negative log-likelihood of y_w, −log π(y_w|x) / |y_w|: the mean over each answer's own tokens.

    "sigmoid,sft" is RPO (Pang et al. 2024, arXiv 2404.19733v3, eq. 1). "sigmoid,bco_pair,sft" with weights
    0.8,0.2,1 is MPO (Wang et al. 2024, arXiv 2411.10442). A mean over all tokens of a batch, as in some
    libraries, gives long answers more weight than the paper does.
    """
    return -chosen_mean_logps


LOSSES = {
    loss.__name__: loss
    for loss in (
        *(sigmoid, robust, hinge, ipo, exo_pair, discopop, dpop, soft, rebel, odpo),
        *(sigmoid_norm, ipo_norm, rdpo, nca_pair, bco_pair, kto_pair, kto, apo_zero, apo_down),
        *(sppo_hard, plackett_luce, aot, aot_unpaired, tdpo2, simpo, simper, orpo, sft),
    )
}


# ---- Other divergences than the reverse KL. f-DPO (Wang et al. 2023, arXiv 2309.16240) replaces each
# log-ratio by f'(π / π_ref), up to a constant that cancels in the margin.


def reverse_kl(logratios: Tensor) -> Tensor:
    """DPO's KL(π ‖ π_ref): f'(u) = log u. Mode-seeking: penalises text that π_ref finds unlikely."""
    return logratios


def forward_kl(logratios: Tensor) -> Tensor:
    """KL(π_ref ‖ π): f'(u) = −1/u. Mass-covering: penalises the loss of text that π_ref finds likely."""
    return -expm1(-logratios)


def js(logratios: Tensor) -> Tensor:
    """Jensen-Shannon: f'(u) = log(u / (1 + u)). Between the two; bounded for text that gets likelier."""
    return F.logsigmoid(logratios)


def alpha(logratios: Tensor, divergence_alpha: float = 0.5) -> Tensor:
    """α-divergence: f'(u) = (1 − u^−α) / α. Reverse KL as α → 0, forward KL at α = 1."""
    return -expm1(-divergence_alpha * logratios) / divergence_alpha


def chi2_kl(logratios: Tensor) -> Tensor:
    """χ² + KL (χPO, Huang et al. 2024, arXiv 2407.13399): f'(u) = u + log u. Penalises a large π / π_ref."""
    return expm1(logratios) + logratios


def expm1(x: Tensor, last: float = 20.0) -> Tensor:
    """e^x − 1 up to x = `last`, then its tangent: no overflow, and a gradient that stays e^last.

    A clamp would set the gradient of a very unlikely response to 0.
    """
    kept = x.clamp(max=last)
    return kept.expm1() + kept.exp() * (x - kept)


DIVERGENCES = {divergence.__name__: divergence for divergence in (reverse_kl, forward_kl, js, alpha, chi2_kl)}


# ---- A reward model instead of a policy


def bradley_terry_loss(chosen_rewards: Tensor, rejected_rewards: Tensor) -> Tensor:
    """The loss of a reward model (Ouyang et al. 2022, arXiv 2203.02155, eq. 1): −log σ(r(y_w) − r(y_l)).

    (B,) rewards of each side to (B,) losses. By Bradley & Terry (1952) P(y_w is preferred) is the sigmoid of
    the difference, so a constant added to all rewards changes nothing.
    """
    return -F.logsigmoid(chosen_rewards - rejected_rewards)


# ---- Metrics


def reward_metrics(losses: Tensor, chosen_rewards: Tensor, rejected_rewards: Tensor) -> dict[str, Tensor]:
    """Sums over B pairs under the field's names, without gradient. A tie counts as half an accuracy."""
    margins = chosen_rewards - rejected_rewards
    values = {
        "loss": losses,
        "rewards/chosen": chosen_rewards,
        "rewards/rejected": rejected_rewards,
        "rewards/accuracies": (margins > 0).float() + 0.5 * (margins == 0).float(),
        "rewards/margins": margins,
    }
    return {name: value.detach().sum() for name, value in values.items()}


def ranking_accuracy(reply_logratios: Tensor) -> Tensor:
    """The share of a prompt's pairs of replies in the right order, (B, K) to (B,); a tie is a half."""
    margins = reply_logratios[:, :, None] - reply_logratios[:, None, :]  # (B, K, K), NaN without a reply
    pairs = (~margins.isnan()).triu(1)
    right = (margins > 0).triu(1) + 0.5 * (margins == 0).triu(1)
    return right.sum((1, 2)) / pairs.sum((1, 2))
