"""From losses to an objective: which of them, weighted how, with which options; and what is logged of it.

    objective = Objective(ObjectiveSettings(loss="sigmoid,sft", loss_weights="1,0.2", beta=0.1))
    losses = objective(Pairs.of(stream, policy_logps, reference_logps))        # (B,)

By default it is DPO: one loss, `losses.sigmoid`, whose equation stands in train_dpo.py. The rest of this file
serves the other objectives. A loss is given what its parameters name, and an option that none of the chosen
losses looks at is refused.
"""

import inspect
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass

import numpy as np
import torch
from torch import Tensor, nn

from dataset.store import TokenStore
from errors import InputError
from losses import DIVERGENCES, LOSSES, reward_metrics
from model.stream import TokenStream
from model.transformer import Transformer
from training.distributed import unsharded
from training.settings import flag

SORTING = ("aot", "aot_unpaired")  # Their losses belong to quantiles, not to pairs.


@dataclass
class ObjectiveSettings:
    beta: float = flag(0.1, "how strongly the reference holds the policy back: larger stays closer")
    loss: str = flag("sigmoid", f"one of {', '.join(LOSSES)}; or several, with commas between")
    loss_weights: str = flag("", "weights of several losses, with commas between; empty for 1 each")
    label_smoothing: float | None = flag(None, "share of labels taken to be wrong; exo_pair 0.001, others 0")
    score_scale: float | None = flag(None, "soft: p is sigmoid(scale * (score_chosen - score_rejected)); 1")
    dpop_lambda: float | None = flag(None, "dpop: what it costs to make the chosen answer less likely; 50")
    discopop_tau: float | None = flag(None, "discopop: temperature between logistic and exponential; 0.05")
    simpo_gamma: float | None = flag(None, "simpo: the margin to be won by; 0.5")
    f_divergence: str = flag("reverse_kl", "what holds the policy to the reference", tuple(DIVERGENCES))
    divergence_alpha: float | None = flag(None, "of --f-divergence alpha; 0.5")
    wpo: bool = flag(False, "WPO: weigh a pair by how likely the policy itself is to write it")
    ld_alpha: float | None = flag(None, "LD-DPO: weight of tokens beyond the shorter answer's length")
    tr_alpha: float | None = flag(None, "TR-DPO, soft: the reference goes this share of the way each step")
    tr_every: int | None = flag(None, "TR-DPO, hard: the policy becomes the reference every so many steps")


# What a number may be. A NaN fails every comparison, so it is refused as well.
RANGES = {
    "beta": ("above 0", lambda x: 0 < x < math.inf),
    "label_smoothing": ("at least 0 and below 0.5", lambda x: 0 <= x < 0.5),
    "score_scale": ("above 0", lambda x: 0 < x < math.inf),
    "dpop_lambda": ("above 0", lambda x: 0 < x < math.inf),
    "discopop_tau": ("above 0 and at most 1", lambda x: 0 < x <= 1),
    "simpo_gamma": ("at least 0", lambda x: 0 <= x < math.inf),
    "divergence_alpha": ("above 0 and below 1", lambda x: 0 < x < 1),
    "ld_alpha": ("at least 0 and below 1", lambda x: 0 <= x < 1),
    "tr_alpha": ("above 0 and at most 1", lambda x: 0 < x <= 1),
    "tr_every": ("at least 1", lambda x: x >= 1),
}


# ---- What an objective sees


@dataclass(frozen=True)
class Pairs:
    """What two models say of B pairs, (B,) each. A log-prob is that of a whole answer, a sum over tokens."""

    policy_chosen_logps: Tensor  # log pi(y_w|x)
    policy_rejected_logps: Tensor
    reference_chosen_logps: Tensor  # log pi_ref(y_w|x), or 0 where there is no reference
    reference_rejected_logps: Tensor
    chosen_lengths: Tensor | None = None  # |y_w|
    rejected_lengths: Tensor | None = None
    chosen_tails: Tensor | None = None  # what of a log-ratio lies beyond the length of the shorter answer
    rejected_tails: Tensor | None = None
    score_margins: Tensor | None = None  # score_chosen - score_rejected, of the data
    pair_weights: Tensor | None = None  # WPO's

    @classmethod
    def of(
        cls,
        stream: TokenStream,
        policy_logps: Tensor,
        reference_logps: Tensor,
        score_margins: np.ndarray | None = None,
        pair_weights: Tensor | None = None,
    ) -> "Pairs":
        """Add up the log-probs of a stream's tokens, (N,), by answer."""
        lengths = stream.sum_by_side(torch.ones_like(policy_logps))
        tails = (policy_logps - reference_logps) * stream.beyond_the_shorter()
        if score_margins is not None:
            score_margins = policy_logps.new_tensor(score_margins)
        sums = stream.sum_by_side(policy_logps), stream.sum_by_side(reference_logps)
        return cls(*sums[0], *sums[1], *lengths, *stream.sum_by_side(tails), score_margins, pair_weights)

    @property
    def chosen_logratios(self) -> Tensor:
        return self.policy_chosen_logps - self.reference_chosen_logps

    @property
    def rejected_logratios(self) -> Tensor:
        return self.policy_rejected_logps - self.reference_rejected_logps


@torch.no_grad()
def wpo_pair_weights(model: Transformer, stream: TokenStream, policy_logps: Tensor) -> Tensor:
    """WPO's weights of a stream's pairs, (B,). One more forward computes sum over v of pi(v)^2."""
    with unsharded(model):
        # log sum over v of pi(v)^2 at each predictor, (N,)
        collisions = torch.cat([(2 * logps).logsumexp(-1) for logps in model.log_distributions(stream)])
    surprise = stream.sum_by_side(policy_logps - collisions)
    return wpo_weights(*surprise, *stream.sum_by_side(torch.ones_like(policy_logps)))


def wpo_weights(
    chosen: Tensor, rejected: Tensor, chosen_lengths: Tensor, rejected_lengths: Tensor
) -> Tensor:
    """WPO (Zhou et al. 2024, arXiv 2406.11827, eq. 2): pairs that the policy might have written weigh more.

        w(y_w) w(y_l), at most 1,    w(y) = exp( 1/|y| sum over t of log [pi(y_t) / sum over v of pi(v)^2] )

    `chosen` and `rejected` are the two sums over t, (B,), without gradient. The clamp is the authors'.
    """
    return (chosen / chosen_lengths + rejected / rejected_lengths).clamp(max=0).exp()


def no_reference(stream: TokenStream) -> Tensor:
    """Takes the reference's place where none is needed: 0 a token, (N,), so that a log-ratio is log pi."""
    return torch.zeros(len(stream.targets), device=stream.targets.device)


def pair_metrics(losses: Tensor, pairs: Pairs, beta: float) -> dict[str, Tensor]:
    """What is logged of B pairs, as sums over them under the field's names.

    Rewards are beta times the log-ratios of whole answers, whatever the losses look at, so that runs with
    different objectives can be compared. Without a reference they are beta log pi.
    """
    chosen_rewards, rejected_rewards = beta * pairs.chosen_logratios, beta * pairs.rejected_logratios
    return {
        **reward_metrics(losses, chosen_rewards, rejected_rewards),
        "logps/chosen": pairs.policy_chosen_logps.detach().sum(),
        "logps/rejected": pairs.policy_rejected_logps.detach().sum(),
    }


# ---- The objective


def parameters(function: Callable) -> set[str]:
    return set(inspect.signature(function).parameters)


def call(function: Callable, known: dict) -> Tensor:
    """Call a loss with what its parameters name; what is not known keeps its default."""
    return function(**{name: known[name] for name in parameters(function) & known.keys()})


class Objective:
    """The losses that the settings name, weighted and added up, with their options."""

    def __init__(self, settings: ObjectiveSettings):
        names = [name.strip() for name in settings.loss.split(",")]
        for name in names:
            require(name in LOSSES, f"--loss {name}: there is no such loss; there are {', '.join(LOSSES)}")
        require(len({*names}) == len(names), f"--loss {settings.loss} names a loss twice")
        self.settings = settings
        self.weights = dict(zip(names, parse_weights(settings.loss_weights, len(names)), strict=True))
        self.looks_at = set().union(*(parameters(LOSSES[name]) for name in names))
        self.divergence = DIVERGENCES[settings.f_divergence]
        self.numbers = {
            name: value for name, value in asdict(settings).items() if name in RANGES and value is not None
        }
        check_options(self)
        # bco_pair's delta is the mean reward of all optimizer steps so far: a sum, and of how many pairs.
        self.reward_sum, self.reward_count = 0.0, 0.0
        self.under_way: Tensor | None = None  # the same of the present step on this rank, (2,)

    def __call__(self, pairs: Pairs, training: bool = False) -> Tensor:
        """B pairs to (B,) losses. `training` says that these pairs enter bco_pair's delta after this step."""
        known = {**vars(pairs), **self.numbers, "delta": self.delta}
        chosen, rejected = pairs.chosen_logratios, pairs.rejected_logratios
        if self.settings.ld_alpha is not None:
            # LD-DPO (Liu et al. 2024, arXiv 2409.06411): tokens beyond the shorter answer count by alpha.
            chosen = chosen - (1 - self.settings.ld_alpha) * pairs.chosen_tails
            rejected = rejected - (1 - self.settings.ld_alpha) * pairs.rejected_tails
        known |= {"chosen_logratios": chosen, "rejected_logratios": rejected}
        known["margins"] = self.score(chosen) - self.score(rejected)

        losses = sum(weight * call(LOSSES[name], known) for name, weight in self.weights.items())
        if training and "delta" in self.looks_at:
            rewards = self.settings.beta * (chosen + rejected).detach() / 2
            seen = torch.stack([rewards.sum(), rewards.new_tensor(len(rewards))])
            self.under_way = seen if self.under_way is None else self.under_way + seen
        return losses * pairs.pair_weights if self.settings.wpo else losses

    def score(self, logratios: Tensor) -> Tensor:
        """What the divergence makes of log-ratios; DPO's reverse KL leaves them as they are."""
        return call(self.divergence, {**self.numbers, "logratios": logratios})

    @property
    def needs_reference(self) -> bool:
        logratios = {"margins", "chosen_logratios", "rejected_logratios"}
        return bool(self.looks_at & (logratios | {"reference_chosen_logps", "reference_rejected_logps"}))

    # ---- What changes from step to step

    @property
    def delta(self) -> float:
        """bco_pair's delta (arXiv 2404.04656): the running mean of (reward of y_w + reward of y_l) / 2.

        Over the steps before this one: so it does not depend on how a window is dealt to micro-batches and
        ranks. In the first step all rewards are 0, and so is it.
        """
        return self.reward_sum / self.reward_count if self.reward_count else 0.0

    @torch.no_grad()
    def after_step(
        self, step: int, model: nn.Module, reference: nn.Module, sum_over_ranks: Callable[[Tensor], Tensor]
    ) -> None:
        """What must happen when `step` optimizer steps are done; for DPO that is nothing.

        bco_pair: delta takes in the rewards of the step. TR-DPO (Gorbatovski et al. 2024, arXiv 2404.09656):
        the reference follows the policy, either softly, pi_ref <- alpha pi + (1 - alpha) pi_ref at every
        step, or by a copy every tau steps.
        """
        if self.under_way is not None:
            rewards, count = sum_over_ranks(self.under_way).tolist()
            self.reward_sum, self.reward_count = self.reward_sum + rewards, self.reward_count + count
            self.under_way = None
        every, share = self.settings.tr_every or 1, self.settings.tr_alpha or 1.0
        if self.moves_reference and step % every == 0:
            for old, new in zip(reference.parameters(), model.parameters(), strict=True):
                old.lerp_(new, share)

    @property
    def moves_reference(self) -> bool:
        return self.settings.tr_alpha is not None or self.settings.tr_every is not None

    def state_dict(self) -> dict[str, float]:
        """What a checkpoint needs to go on; a moving reference is a model of its own."""
        return {"reward_sum": self.reward_sum, "reward_count": self.reward_count}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.reward_sum, self.reward_count = state["reward_sum"], state["reward_count"]

    def check_data(self, data: TokenStore, path: str) -> None:
        """Refuse records without the labels that a loss looks at."""
        missing = np.isnan(data.score_margins)
        require(
            "score_margins" not in self.looks_at or not missing.any(),
            f"{path}:{data.lines[missing.argmax()]}: --loss soft needs score_chosen and score_rejected, "
            "or win_probability, and this record has neither",
        )


# ---- What makes no sense


def require(holds: bool, otherwise: str) -> None:
    if not holds:
        raise InputError(otherwise)


def parse_weights(text: str, losses: int) -> list[float]:
    try:
        weights = [float(weight) for weight in text.split(",")] if text else [1.0] * losses
    except ValueError:
        raise InputError(f"--loss-weights {text}: expected numbers with commas between") from None
    require(len(weights) == losses, f"--loss-weights {text}: {len(weights)} weights for {losses} losses")
    require(all(0 < w < math.inf for w in weights), f"--loss-weights {text}: a weight must be above 0")
    return weights


def check_options(objective: Objective) -> None:
    """Refuse numbers out of range, options that nothing looks at, and combinations that mean nothing."""
    settings, numbers, looks_at = objective.settings, objective.numbers, objective.looks_at
    for name, value in numbers.items():
        rule, holds = RANGES[name]
        flag_name = f"--{name.replace('_', '-')}"
        require(holds(value), f"{flag_name} must be {rule}, not {value}")
        those = [loss for loss, function in LOSSES.items() if name in parameters(function)]
        reason = f"{flag_name} means nothing to --loss {settings.loss}; it is for {', '.join(those)}"
        require(name == "beta" or name in looks_at or not those, reason)
    for name in objective.weights:
        smoothing = inspect.signature(LOSSES[name]).parameters.get("label_smoothing")
        given = smoothing is None or smoothing.default is not smoothing.empty or "label_smoothing" in numbers
        require(given, f"--loss {name} needs --label-smoothing, the share of labels that are flipped")
    logarithm = "exo_pair" in objective.weights and numbers.get("label_smoothing") == 0
    require(not logarithm, "--loss exo_pair takes the logarithm of --label-smoothing: it must be above 0")

    stray = "divergence_alpha" in numbers and settings.f_divergence != "alpha"
    require(not stray, "--divergence-alpha is for --f-divergence alpha")
    useless = settings.f_divergence != "reverse_kl" and "margins" not in looks_at
    require(not useless, f"--f-divergence changes margins, at which --loss {settings.loss} does not look")

    sorting = [name for name in objective.weights if name in SORTING]
    reason = f"--wpo weighs pairs; {', '.join(sorting)} sorts them, and its losses are those of quantiles"
    require(not (settings.wpo and sorting), reason)
    no_pairs = settings.wpo and list(objective.weights) == ["sft"]
    require(not no_pairs, "--wpo weighs preferences, and --loss sft looks at no rejected answer")

    if settings.ld_alpha is not None:
        useless = not looks_at & {"margins", "chosen_logratios"}
        require(not useless, f"--ld-alpha changes log-ratios, at which --loss {settings.loss} does not look")
        for name in objective.weights:
            twice = {"chosen_logratios", "chosen_lengths"} <= parameters(LOSSES[name])
            require(not twice, f"--ld-alpha and --loss {name} would allow for lengths twice")

    both = settings.tr_alpha is not None and settings.tr_every is not None
    require(not both, "--tr-alpha moves the reference at every step, --tr-every copies it: choose one")
    adapted = objective.moves_reference and getattr(settings, "lora_rank", 0)
    require(not adapted, "--tr-alpha and --tr-every move the reference, which --lora-rank keeps frozen")
    nothing = objective.moves_reference and not objective.needs_reference
    require(not nothing, f"--tr-alpha and --tr-every move the reference, and --loss {settings.loss} has none")
