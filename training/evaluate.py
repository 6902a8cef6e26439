"""Loss, rewards and KL of a policy against its reference, measured on held-out pairs."""

import torch
from torch import Tensor

from dataset.packing import build_stream, share
from dataset.store import TokenStore
from model.stream import TokenStream
from model.transformer import Transformer
from training.distributed import World
from training.metrics import Meter
from training.objective import Objective, Pairs, pair_metrics, wpo_pair_weights
from training.precision import Precision


@torch.no_grad()
def evaluate(
    policy: Transformer,
    reference: Transformer,
    pairs: TokenStore,
    world: World,
    precision: Precision,
    objective: Objective,
    layout: str = "forked",
    batch_size: int = 32,
) -> dict[str, float]:
    """Loss, rewards, accuracy and log-probs over all pairs, each counted once on any number of ranks.

    They do not depend on the batch size; but the losses of `kto_pair`, `aot` and `aot_unpaired` do, since the
    pairs of a batch depend on one another there.
    """
    meter, settings = Meter(world), objective.settings
    for rows in share(len(pairs), world.rank, world.ranks, batch_size):
        stream = build_stream(pairs, rows, layout).to(world.device)
        with precision.autocast():
            policy_logps = policy(stream)
            pair_weights = wpo_pair_weights(policy, stream, policy_logps) if settings.wpo else None
            reference_logps = reference(stream)
        labels = pairs.score_margins[rows]
        batch = Pairs.of(stream, policy_logps, reference_logps, labels, pair_weights)
        losses = objective(batch)
        meter.add(len(losses), pair_metrics(losses, batch, settings.beta))
    return meter.mean()


@torch.no_grad()
def evaluate_kl(
    policy: Transformer,
    reference: Transformer,
    pairs: TokenStore,
    world: World,
    precision: Precision,
    layout: str = "forked",
    batch_size: int = 32,
) -> dict[str, float]:
    """``{"kl_per_token": …}``, the mean over all supervised tokens of all ranks, each counted once."""
    meter = Meter(world)
    for rows in share(len(pairs), world.rank, world.ranks, batch_size):
        stream = build_stream(pairs, rows, layout).to(world.device)
        with precision.autocast():
            divergences = next_token_kl(policy, reference, stream)
        meter.add(len(divergences), {"kl_per_token": divergences.sum()})
    return meter.mean()


def next_token_kl(policy: Transformer, reference: Transformer, stream: TokenStream) -> Tensor:
    """KL(pi || pi_ref) = sum over v of pi(v) [log pi(v) - log pi_ref(v)] at each predictor, (N,), in nats."""
    both = zip(policy.log_distributions(stream), reference.log_distributions(stream), strict=True)
    return torch.cat([(log_p.exp() * (log_p - log_q)).sum(dim=-1) for log_p, log_q in both])
