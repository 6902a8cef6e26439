"""The objective of a run: which losses, with which weights and options. The default is plain DPO.

    objective = Objective(ObjectiveSettings(loss="sigmoid,sft", loss_weights="1,0.2", beta=0.1))
    losses = objective(Pairs.of(stream, policy_logps, reference_logps))        # (B,)

The losses themselves are in `losses.py`, the flags in `training/options.py`. This file passes each loss the
values that its parameters name.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass

import numpy as np
import torch
from torch import Tensor, nn

from dataset.mismatched import mismatched
from dataset.packing import micro_batches
from dataset.store import TokenStore
from errors import InputError
from losses import DIVERGENCES, LOSSES, ranking_accuracy, reward_metrics
from model.moe import router_loss
from model.stream import TokenStream
from model.transformer import Transformer, at_least_float32, recompute_in_backward
from training import options
from training.distributed import World, unsharded
from training.metrics import COUNT, Meter
from training.options import ObjectiveSettings, parameters
from training.precision import Precision

# ---- The input of an objective


@dataclass(frozen=True)
class Pairs:
    """Log-probs, lengths and labels of B pairs, (B,) each. A log-prob is a sum over an answer's tokens."""

    policy_chosen_logps: Tensor  # log π(y_w|x)
    policy_rejected_logps: Tensor
    reference_chosen_logps: Tensor  # log π_ref(y_w|x), or 0 without a reference
    reference_rejected_logps: Tensor
    chosen_lengths: Tensor | None = None  # |y_w|
    rejected_lengths: Tensor | None = None
    chosen_tails: Tensor | None = None  # part of the log-ratio beyond the shorter answer's length (LD-DPO)
    rejected_tails: Tensor | None = None
    score_margins: Tensor | None = None  # score_chosen − score_rejected of the data; NaN without scores
    chosen_kl: Tensor | None = None  # Σ_t KL(π_ref ‖ π) along y_w (TDPO₂)
    rejected_kl: Tensor | None = None
    pair_weights: Tensor | None = None  # WPO's
    ranked_logratios: Tensor | None = None  # (B, K) of ranked replies, NaN for a missing one; None for pairs

    @classmethod
    def of(
        cls,
        stream: TokenStream,
        policy_logps: Tensor,
        reference_logps: Tensor,
        token_kl: Tensor | None = None,
        pair_weights: Tensor | None = None,
    ) -> "Pairs":
        """Sum the token log-probs of a stream, (N,), and the KL at each token, (N,), by answer."""
        lengths = stream.sum_by_side(torch.ones_like(policy_logps))
        tails = (policy_logps - reference_logps) * stream.beyond_the_shorter()
        sums = stream.sum_by_side(policy_logps), stream.sum_by_side(reference_logps)
        kl = (None, None) if token_kl is None else stream.sum_by_side(token_kl)
        tails, scores, ranked = stream.sum_by_side(tails), stream.score_margins, None
        if stream.branches > 2:
            logratios = stream.sum_by_response(policy_logps) - stream.sum_by_response(reference_logps)  # (R,)
            ranked = logratios.masked_fill(stream.lengths() == 0, torch.nan).view(-1, stream.branches)
        return cls(*sums[0], *sums[1], *lengths, *tails, scores, *kl, pair_weights, ranked)

    @property
    def chosen_logratios(self) -> Tensor:
        return self.policy_chosen_logps - self.reference_chosen_logps

    @property
    def rejected_logratios(self) -> Tensor:
        return self.policy_rejected_logps - self.reference_rejected_logps

    @property
    def reply_logratios(self) -> Tensor:
        """(B, K), the best reply first; a pair is a ranking of two."""
        both = self.chosen_logratios, self.rejected_logratios
        return torch.stack(both, dim=1) if self.ranked_logratios is None else self.ranked_logratios


def means(pairs: Pairs) -> dict[str, Tensor]:
    """The inputs of losses that take means over the tokens of an answer, (B,) each; {} without lengths."""
    w, r = pairs.chosen_lengths, pairs.rejected_lengths
    if w is None or r is None:
        return {}
    return {
        "mean_margins": pairs.chosen_logratios / w - pairs.rejected_logratios / r,
        "chosen_mean_logps": pairs.policy_chosen_logps / w,
        "rejected_mean_logps": pairs.policy_rejected_logps / r,
    }


def pair_metrics(losses: Tensor, pairs: Pairs, beta: float) -> dict[str, Tensor]:
    """Sums over B pairs under the field's names, without gradient.

    Rewards are β times the log-ratios of whole answers, for every loss. Log-ratios are logged as well:
    runs of different β compare by them. Without a reference a log-ratio is log π. Of ranked replies the best
    and the worst one are the pair.
    """
    chosen, rejected = pairs.chosen_logratios.detach(), pairs.rejected_logratios.detach()
    return {
        **reward_metrics(losses, beta * chosen, beta * rejected),
        "logratios/chosen": chosen.sum(),
        "logratios/rejected": rejected.sum(),
        "logratios/margins": (chosen - rejected).sum(),
        "logps/chosen": pairs.policy_chosen_logps.detach().sum(),
        "logps/rejected": pairs.policy_rejected_logps.detach().sum(),
    }


# ---- The objective


class Objective:
    """A weighted sum of losses, with their options. The default is DPO."""

    def __init__(self, settings: ObjectiveSettings):
        self.settings = settings
        self.weights = options.parse_losses(settings)
        self.inputs = options.inputs_of(self.weights)
        self.divergence = DIVERGENCES[settings.f_divergence]
        self.numbers = options.given_numbers(settings)
        options.check_options(settings)
        # bco_pair's δ is the mean reward of all optimizer steps so far: a sum and a count of pairs.
        self.reward_sum, self.reward_count = 0.0, 0.0
        self.step_rewards: Tensor | None = None  # the same for the current step on this rank, (2,)
        self.z0: Tensor | float = 0.0  # kto's, of the current window or of held-out data

    @property
    def is_dpo(self) -> bool:
        """Whether this is DPO's loss and no option changes it: then `losses.sigmoid` is all there is."""
        plain = ObjectiveSettings(beta=self.settings.beta)
        return all(getattr(self.settings, name) == value for name, value in asdict(plain).items())

    def __call__(self, pairs: Pairs) -> Tensor:
        """The losses of B pairs, (B,)."""
        chosen, rejected = pairs.chosen_logratios, pairs.rejected_logratios
        if self.settings.ld_alpha is not None:
            # LD-DPO (Liu et al. 2024, arXiv 2409.06411): tokens beyond the shorter answer have weight α.
            chosen = chosen - (1 - self.settings.ld_alpha) * pairs.chosen_tails
            rejected = rejected - (1 - self.settings.ld_alpha) * pairs.rejected_tails
        inputs = {**vars(pairs), **self.numbers, "delta": self.delta}
        inputs |= {"chosen_logratios": chosen, "rejected_logratios": rejected, **means(pairs)}
        inputs |= {"reply_logratios": pairs.reply_logratios, "z0": self.z0}
        inputs["margins"] = self.derivative(chosen) - self.derivative(rejected)
        if self.settings.chi2_clip is not None:  # χPO: no reward gap is larger, so none is fitted.
            limit = self.settings.chi2_clip / self.settings.beta
            inputs["margins"] = inputs["margins"].clamp(-limit, limit)
        losses = sum(weight * call(LOSSES[name], inputs) for name, weight in self.weights.items())
        return losses * pairs.pair_weights if self.settings.wpo else losses

    def pairs(
        self,
        stream: TokenStream,
        policy_logps: Tensor,
        reference_logps: Tensor,
        model: Transformer,
        reference: Callable[[TokenStream], Tensor],
    ) -> Pairs:
        """The `Pairs` of a stream, with all that the objective uses: WPO's weights, TDPO₂'s KL.

        Each of the two costs one more forward. Call it under the autocast of the log-probs, (N,) each.
        """
        weights = wpo_pair_weights(model, stream, policy_logps) if self.settings.wpo else None
        kl = next_token_kl(reference, model, stream) if "rejected_kl" in self.inputs else None
        return Pairs.of(stream, policy_logps, reference_logps, kl, weights)

    def training_losses(
        self,
        stream: TokenStream,
        policy_logps: Tensor,
        reference_logps: Tensor,
        balances: list[Tensor],
        model: Transformer,
        reference: Callable[[TokenStream], Tensor],
        precision: Precision,
        meter: Meter,
    ) -> Tensor:
        """The losses of a training step, (B,), with BCO's δ and the experts' balance.

        `policy_logps` and `reference_logps` are (N,). The policy's forward filled `balances`; their mean is
        logged as ``aux_loss``.
        """
        with precision.autocast():
            pairs = self.pairs(stream, policy_logps, reference_logps, model, reference)
        losses = self(pairs)
        self.add_rewards(pairs)
        meter.add(0, self.metrics(pairs))
        if balances:
            # Each pair carries the balance of its stream, so the mean over a window has one scale however the
            # window was split. Only its gradient is added: the logged loss is the objective's alone.
            aux_loss = router_loss(balances)
            meter.add(0, {"aux_loss": aux_loss * len(losses)})
            losses = losses + model.config.router_aux_loss_coef * (aux_loss - aux_loss.detach())
        return losses

    def metrics(self, pairs: Pairs) -> dict[str, Tensor]:
        """Sums over B pairs of figures that only this objective logs, beside those of `pair_metrics`."""
        if self.kind == "rankings":
            return {"rewards/order": ranking_accuracy(pairs.reply_logratios.detach()).sum()}
        if self.kind == "feedback":
            lengths = {"chosen": pairs.chosen_lengths, "rejected": pairs.rejected_lengths}
            counts = {side: (each > 0).sum() for side, each in lengths.items()}
            parts = ("rewards", "logratios", "logps")
            counts = {f"{part}/{side}{COUNT}": n for part in parts for side, n in counts.items()}
            return {**counts, "z0": torch.as_tensor(self.z0) * len(pairs.chosen_lengths)}
        return {}

    def derivative(self, logratios: Tensor) -> Tensor:
        """f'(π / π_ref) of the divergence, from log-ratios. DPO's reverse KL returns them unchanged."""
        return call(self.divergence, {**self.numbers, "logratios": logratios})

    @property
    def kind(self) -> str:
        """The records that the losses read, as `dataset.store.open_store` names them."""
        return options.kind_of(self.weights)

    @property
    def forwards(self) -> int:
        """The forwards of the policy with gradient in a step: TDPO₂'s KL takes a second one."""
        return 1 + ("rejected_kl" in self.inputs)

    @property
    def needs_reference(self) -> bool:
        return bool(self.inputs & options.REFERENCE_INPUTS)

    # ---- State that changes from step to step: KTO, BCO and TR-DPO only

    @torch.no_grad()
    def before_step(
        self,
        policy: Callable[[TokenStream], Tensor],
        reference: Callable[[TokenStream], Tensor],
        data: TokenStore,
        rows: np.ndarray,
        world: World,
        precision: Precision,
        layout: str,
        max_tokens: int,
    ) -> None:
        """Compute kto's z₀ of these rows: one more forward of both models, on prompts with other answers.

        The mean is over all rows of the window on all ranks, before the first micro-batch. So micro-batches
        and ranks do not change it. Every rank must call this; for other losses it does nothing.
        """
        if "z0" not in self.inputs:
            return
        total = torch.zeros((), device=world.device)
        for stream, _ in micro_batches(mismatched(data), rows, world, max_tokens, layout):
            with precision.autocast():
                total = total + (policy(stream) - reference(stream)).sum()
        self.z0 = (self.settings.beta * world.sum(total) / len(rows)).clamp(min=0)

    @property
    def delta(self) -> float:
        """bco_pair's δ (arXiv 2404.04656): the running mean of (reward of y_w + reward of y_l) / 2.

        The mean is over the steps before this one, so micro-batches and ranks do not change it. In the
        first step all rewards are 0, and so is δ.
        """
        return self.reward_sum / self.reward_count if self.reward_count else 0.0

    def add_rewards(self, pairs: Pairs) -> None:
        """Add the rewards of a training step's pairs to those that change δ after the step."""
        if "delta" in self.inputs:
            rewards = self.settings.beta * (pairs.chosen_logratios + pairs.rejected_logratios).detach() / 2
            found = torch.stack([rewards.sum(), rewards.new_tensor(len(rewards))])
            self.step_rewards = found if self.step_rewards is None else self.step_rewards + found

    @torch.no_grad()
    def after_step(
        self, step: int, model: nn.Module, reference: nn.Module, sum_over_ranks: Callable[[Tensor], Tensor]
    ) -> None:
        """Update the state after `step` optimizer steps; for DPO there is none.

        bco_pair: δ includes the rewards of this step. TR-DPO (Gorbatovski et al. 2024, arXiv 2404.09656):
        the reference follows the policy, softly, π_ref ← α π + (1 − α) π_ref at every step, or by a copy
        every τ steps.
        """
        if self.step_rewards is not None:
            rewards, count = sum_over_ranks(self.step_rewards).tolist()
            self.reward_sum, self.reward_count = self.reward_sum + rewards, self.reward_count + count
            self.step_rewards = None
        every, share = self.settings.tr_every or 1, self.settings.tr_alpha or 1.0
        if self.moves_reference and step % every == 0:
            for old, new in zip(reference.parameters(), model.parameters(), strict=True):
                old.lerp_(new, share)

    @property
    def moves_reference(self) -> bool:
        return self.settings.tr_alpha is not None or self.settings.tr_every is not None

    def state_dict(self) -> dict[str, float]:
        """The state of a checkpoint; a moving reference is saved as a model."""
        return {"reward_sum": self.reward_sum, "reward_count": self.reward_count}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.reward_sum, self.reward_count = state["reward_sum"], state["reward_count"]

    def check_data(self, data: TokenStore, path: str) -> str:
        """A line of advice about the data, or "". Raises `InputError` at the first record without scores."""
        margins = np.asarray(data.score_margins)
        for name in self.weights:
            if "score_margins" not in options.parameters(LOSSES[name]):
                continue
            neither = "needs score_chosen and score_rejected, or win_probability; this record has neither"
            certain = "needs a finite difference of scores; a win_probability of 0 or 1 has none"
            worse = "needs score_chosen above score_rejected; --swap-by-score exchanges the sides"
            for bad, reason in (
                (np.isnan(margins), neither),
                (np.isinf(margins) & (name != "soft"), certain),
                ((margins < 0) & (name == "odpo"), worse),
            ):
                if bad.any():
                    raise InputError(f"{path}:{data.lines[bad.argmax()]}: --loss {name} {reason}")
        if self.kind != "feedback":
            return ""
        desirable = int((data.bounds[:, 2] > data.bounds[:, 1]).sum())
        return options.kto_advice(desirable, len(data) - desirable, self.numbers)


def call(function: Callable, values: dict) -> Tensor:
    """Call a loss with the values that its parameters name; parameters without a value keep their default."""
    return function(**{name: values[name] for name in parameters(function) & values.keys()})


def next_token_kl(first: Transformer, second: Transformer, stream: TokenStream) -> Tensor:
    """KL(p ‖ q) = Σ_v p(v) [log p(v) − log q(v)] of two models at each predictor, (N,), in nats.

    Exact, and without a tensor of shape (N, V): each chunk of the vocabulary's scores is computed again in
    backward.
    """

    def kl(*hidden: Tensor) -> Tensor:  # (n, d) twice
        scores = (model.logits(h) for model, h in zip((first, second), hidden, strict=True))
        log_p, log_q = (at_least_float32(score).log_softmax(dim=-1) for score in scores)  # (n, V)
        return (log_p.exp() * (log_p - log_q)).sum(dim=-1)

    hidden = [model.hidden_of(stream)[stream.predictors] for model in (first, second)]  # (N, d)
    chunks = zip(*(h.split(second.positions_at_once) for h in hidden), strict=True)
    return torch.cat([recompute_in_backward(kl, *chunk) for chunk in chunks])


def wpo_pair_weights(model: Transformer, stream: TokenStream, policy_logps: Tensor) -> Tensor:
    """WPO's weights of a stream's pairs, (B,), without gradient; one more forward of the policy.

    `policy_logps` are the policy's log-probs of the stream's targets, (N,).
    """
    with unsharded(model), torch.no_grad():
        # log Σ_v π(v | x, y_<t)², the log-probability that two draws are the same token, (N,)
        collisions = torch.cat([(2 * logps).logsumexp(-1) for logps in model.log_distributions(stream)])
    surprise = stream.sum_by_side(policy_logps.detach() - collisions)
    return wpo_weights(*surprise, *stream.sum_by_side(torch.ones_like(policy_logps)))


def wpo_weights(chosen: Tensor, rejected: Tensor, chosen_lengths: Tensor, rejected_lengths: Tensor) -> Tensor:
    """WPO (Zhou et al. 2024, arXiv 2406.11827, eq. 2): pairs that the policy may well generate weigh more.

        w(y_w) w(y_l), at most 1,    w(y) = exp( 1/|y| Σ_t log [ π(y_t) / Σ_v π(v)² ] )

    `chosen` and `rejected` are the two sums over t, (B,). The clamp at 1 is the authors'.
    """
    return (chosen / chosen_lengths + rejected / rejected_lengths).clamp(max=0).exp()
