"""Metrics on held-out data. Each record counts once on any number of ranks."""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from dataset.packing import build_stream, share, spread, stream_lengths
from dataset.store import TokenStore
from losses import bradley_terry_loss, reward_metrics
from model.reward import RewardModel
from model.stream import sides
from model.transformer import Transformer
from training.distributed import World, unsharded
from training.metrics import Meter
from training.objective import Objective, next_token_kl, pair_metrics
from training.precision import Precision

KL_PAIRS = 64  # of an evaluation during training: whole distributions in float32 are expensive
MAX_TOKENS = 16_384  # tokens a forward without gradients, where the caller gives no other number


def batches(
    data: TokenStore, world: World, max_tokens: int, layout: str, most: int | None = None
) -> Iterator:
    """This rank's part of the data: the rows of each batch, and their stream. Every rank gets as many.

    The data is at most `most` rows, spread evenly; None: all of them.
    """
    rows = spread(len(data), most)
    for places in share(stream_lengths(data, layout)[rows], world.rank, world.ranks, max_tokens):
        batch = rows[list(places)]
        yield batch, build_stream(data, batch, layout).to(world.device)


@torch.no_grad()
def evaluate(
    policy: Transformer,
    reference: Transformer,
    pairs: TokenStore,
    world: World,
    precision: Precision,
    objective: Objective,
    layout: str = "forked",
    max_tokens: int = MAX_TOKENS,
) -> dict[str, float]:
    """Mean loss, log-ratios, rewards, accuracy and log-probs over all pairs.

    `max_tokens` does not change them, except for the losses of `kto_pair`, `aot` and `aot_unpaired`: there
    the pairs of a batch depend on one another.
    """
    meter, settings = Meter(world), objective.settings
    rows = np.arange(len(pairs))
    objective.before_step(policy, reference, pairs, rows, world, precision, layout, max_tokens)
    for _, stream in batches(pairs, world, max_tokens, layout):
        with precision.autocast():
            policy_logps = policy(stream)
            batch = objective.pairs(stream, policy_logps, reference(stream), policy, reference)
        losses = objective(batch)
        meter.add(len(losses), pair_metrics(losses, batch, settings.beta))
        meter.add(0, objective.metrics(batch))
    return meter.mean()


@torch.no_grad()
def evaluate_kl(
    policy: Transformer,
    reference: Transformer,
    pairs: TokenStore,
    world: World,
    layout: str = "forked",
    max_tokens: int = MAX_TOKENS,
    most: int | None = None,
) -> dict[str, float]:
    """``{"kl_per_token": …}``: KL(π ‖ π_ref) in nats, the mean over all supervised tokens.

    With `most`, of that many pairs, spread evenly over the data. Returns {} if the reference has no
    distributions: cached log-probs, or no reference. Without autocast: rounded to bf16, two equal models are
    5e-5 nats apart.
    """
    if not hasattr(reference, "hidden_of"):
        return {}
    meter = Meter(world)
    for _, stream in batches(pairs, world, max_tokens, layout, most):
        with torch.autocast(world.device.type, enabled=False), unsharded(policy), unsharded(reference):
            kl = next_token_kl(policy, reference, stream)
        meter.add(len(kl), {"kl_per_token": kl.sum()})
    return meter.mean()


@torch.no_grad()
def evaluate_sft(
    model: Transformer, data: TokenStore, world: World, precision: Precision, max_tokens: int = MAX_TOKENS
) -> dict[str, float]:
    """``{"loss": …}``: −log π of a supervised token, the mean over all of them."""
    meter = Meter(world)
    for _, stream in batches(data, world, max_tokens, "forked"):
        with precision.autocast():
            losses = -model(stream)
        meter.add(len(losses), {"loss": losses.sum()})
    return meter.mean()


@torch.no_grad()
def score_pairs(
    model: RewardModel,
    pairs: TokenStore,
    world: World,
    precision: Precision,
    layout: str = "forked",
    max_tokens: int = MAX_TOKENS,
) -> Tensor:
    """The rewards of every pair's chosen and rejected answer, (P, 2), on every rank."""
    rewards = torch.zeros(len(pairs), 2, dtype=model.score.weight.dtype, device=world.device)
    for rows, stream in batches(pairs, world, max_tokens, layout):
        with precision.autocast():
            rewards[rows] = torch.stack(sides(model(stream)), dim=1)
    return world.sum(rewards)


def evaluate_rewards(rewards: Tensor) -> dict[str, float]:
    """Mean loss, rewards, margin and accuracy of a reward model, from the (P, 2) rewards of all pairs."""
    chosen, rejected = rewards.unbind(dim=1)
    metrics = reward_metrics(bradley_terry_loss(chosen, rejected), chosen, rejected)
    return {name: value.item() / len(rewards) for name, value in metrics.items()}
