"""How well a model prefers the chosen answers, measured on a file of pairs.

    python -m eval.preference --model runs/dpo --reference runs/sft --data pairs.jsonl [--json figures.json]
"""

import torch

from dataset.packing import build_stream
from dataset.store import TokenStore
from losses import dpo_loss, pair_metrics
from model.transformer import Transformer
from training.distributed import Precision, World
from training.metrics import Meter


@torch.no_grad()
def evaluate(
    policy: Transformer,
    reference: Transformer,
    pairs: TokenStore,
    world: World,
    precision: Precision,
    beta: float,
    layout: str = "forked",
    batch_size: int = 32,
) -> dict[str, float]:
    """Loss, rewards, accuracy and log-probs over all pairs, each counted once on any number of ranks."""
    meter = Meter(world)
    mine = range(world.rank, len(pairs), world.ranks)
    for start in range(0, len(mine), batch_size):
        stream = build_stream(pairs, mine[start : start + batch_size], layout).to(world.device)
        with precision.autocast():
            policy_chosen, policy_rejected = stream.sum_by_side(policy(stream))
            reference_chosen, reference_rejected = stream.sum_by_side(reference(stream))
        losses, *rewards = dpo_loss(policy_chosen, policy_rejected, reference_chosen, reference_rejected, beta)
        meter.add(len(losses), pair_metrics(losses, *rewards, policy_chosen, policy_rejected))
    return meter.mean()
