"""A reward model: one number for an answer, higher for the one that is preferred.

    python train_reward.py                                       # after train_sft.py; CPU, MPS or one GPU
    python train_reward.py --model DIR --data pairs.jsonl --eval-data heldout.jsonl --out runs/mine
    torchrun --standalone --nproc-per-node 4 train_reward.py     # four GPUs of one machine

The data is pairs: a prompt x with a chosen answer y_w and a rejected answer y_l. The loss of a pair is

    -log sigmoid( r(x, y_w) - r(x, y_l) )

where r is the language model's body with a linear head, read at the answer's end token (Bradley & Terry 1952;
Ouyang et al. 2022, arXiv 2203.02155, eq. 1). Only differences of rewards of one prompt mean something:
their sigmoid is the probability that the first answer is preferred.

``python -m eval.score`` writes the scores of a reward model into a file of pairs.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from dataset.packing import LAYOUTS, Windows, build_stream, micro_batches, share, stream_lengths
from dataset.store import TokenStore, open_store
from dataset.tokenizer import ChatTokenizer
from errors import run_script
from losses import bradley_terry_loss, reward_metrics
from model.moe import router_loss
from model.reward import RewardModel
from model.stream import sides
from model.transformer import compile_layers
from model.weights import load_model, weights_hash
from training.distributed import World, exchange_gradients, first_device, join, wrap
from training.memory import micro_batch_tokens
from training.metrics import Meter, MetricsLog
from training.precision import Precision
from training.run import RunFolder
from training.schedule import adamw, clip_gradients, cosine_lr, require_finite, set_lr
from training.settings import SAMPLE, TrainSettings, flag, parse


@dataclass
class Settings(TrainSettings):
    model: str = flag("runs/sft", "language model folder whose body to start from")
    data: str = flag(str(SAMPLE / "preferences.jsonl"), "preference pairs: .jsonl or .json, also .gz")
    eval_data: str = flag(
        str(SAMPLE / "heldout.jsonl"), "held-out pairs, evaluated now and then; empty for none"
    )
    out: str = flag("runs/reward", "run folder: config, weights, tokenizer, metrics")
    layout: str = flag("forked", "forked computes a prompt once for both sides, twin once for each", LAYOUTS)


def main(arguments: list[str] | None = None) -> None:
    settings = parse(Settings, __doc__.split("\n")[0], arguments)
    with join(settings.device) as world, RunFolder(settings, world) as run:
        train(settings, world, run)


def train(settings: Settings, world: World, run: RunFolder) -> None:
    # ---- the model: what the language model knows, and a head that knows nothing yet
    language_model = load_model(settings.model, first_device(world, settings.shard))
    model = RewardModel.from_language_model(language_model)
    tokenizer = ChatTokenizer(Path(settings.model) / "tokenizer.json")
    model.checkpoint_activations = settings.checkpoint_activations
    if settings.fused_attention:
        model.fuse_attention(world.device)
    reward = wrap(model, world, settings.shard)
    if settings.compile:
        compile_layers(model)

    # ---- the data: pairs, and which of them each optimizer step sees
    max_length = settings.length_limit(model.config)
    pairs = open_pairs(settings.data, tokenizer, max_length, settings, world)
    eval_pairs = None
    if settings.eval_data:
        eval_pairs = open_pairs(settings.eval_data, tokenizer, max_length, settings, world)
    windows = Windows(len(pairs), settings.batch_size, settings.seed)
    total_steps = settings.max_steps or settings.epochs * windows.per_epoch

    precision = Precision(settings.precision, world.device, settings.matmul_precision)
    max_tokens = micro_batch_tokens(settings, model, world, pairs, precision)
    optimizer = adamw(model, settings.weight_decay)
    meter = Meter(world)

    # ---- what a checkpoint holds, and where an interrupted run goes on
    state = {"model": model, "optimizer": optimizer, "precision": precision, "meter": meter}
    digests = weights_hash(model), pairs.fingerprint, tokenizer.fingerprint
    first_step = run.begin(state, *digests, micro_batch_tokens=max_tokens)
    if first_step is None:  # --resume finds the run finished
        return
    max_tokens = run.identity["micro_batch_tokens"]  # on --resume with auto: as before
    world.print(windows.describe(total_steps, world.ranks, max_tokens))
    log = MetricsLog(Path(settings.out), world, first_step, total_steps, unit="pairs")

    def evaluate_now(step: int) -> None:
        if eval_pairs:
            how = settings.layout, max_tokens
            figures = mean_metrics(score_pairs(model, eval_pairs, world, precision, *how))
            log.write(step, {f"eval_{name}": value for name, value in figures.items()})

    if first_step == 0:
        evaluate_now(step=0)
    for step in range(first_step, total_steps):
        lr = cosine_lr(step, total_steps, settings.lr, settings.warmup_steps)
        set_lr(optimizer, lr)

        # ---- one window of pairs: forward, loss and backward, micro-batch by micro-batch
        window = windows[step]
        for stream, last in micro_batches(pairs, window, world, max_tokens, settings.layout):
            with exchange_gradients(reward, when=last):
                with precision.autocast():
                    balances: list[Tensor] = []  # one for each layer of experts
                    chosen_rewards, rejected_rewards = sides(reward(stream, balances))  # r(x, y), twice (B,)
                aux_loss = torch.as_tensor(router_loss(balances), device=world.device)
                losses = bradley_terry_loss(chosen_rewards, rejected_rewards)
                # A mean over the window, however it was dealt: each pair carries the balance of its stream.
                # Ranks' gradients are averaged, hence `ranks`.
                total = (losses + model.config.router_aux_loss_coef * aux_loss).sum()
                precision.scaler.scale(total * world.ranks / len(window)).backward()
            figures = reward_metrics(losses, chosen_rewards, rejected_rewards)
            meter.add(len(losses), {**figures, "aux_loss": aux_loss * len(losses)})

        grad_norm = clip_gradients(optimizer, precision.scaler, settings.grad_clip)
        require_finite(meter, grad_norm, precision, step, pairs.lines[window])
        precision.scaler.step(optimizer)
        precision.scaler.update()
        optimizer.zero_grad()

        done = step + 1
        log.advance(len(window))
        if done % settings.log_every == 0 or done == total_steps:
            figures = {"grad_norm": grad_norm, "learning_rate": lr, **precision.figures()}
            log.write(done, {**meter.mean(), **figures})
        if done % settings.eval_every == 0 or done == total_steps:
            evaluate_now(done)
        run.save_when_due(done)

    log.close()
    run.finish(model, tokenizer)


def open_pairs(
    path: str, tokenizer: ChatTokenizer, max_length: int, settings: Settings, world: World
) -> TokenStore:
    how = max_length, settings.shape, settings.skip_bad
    pairs = world.node_first(lambda: open_store(path, "preferences", tokenizer, *how))
    world.print(f"{path}: {pairs.report}")
    return pairs


@torch.no_grad()
def score_pairs(
    model: RewardModel, pairs: TokenStore, world: World, precision: Precision, layout: str, max_tokens: int
) -> Tensor:
    """The rewards of every pair's chosen and rejected answer, (P, 2), on every rank."""
    rewards = torch.zeros(len(pairs), 2, dtype=model.score.weight.dtype, device=world.device)
    for rows in share(stream_lengths(pairs, layout), world.rank, world.ranks, max_tokens):
        stream = build_stream(pairs, rows, layout).to(world.device)
        with precision.autocast():
            rewards[list(rows)] = torch.stack(sides(model(stream)), dim=1)
    return world.sum(rewards)


def mean_metrics(rewards: Tensor) -> dict[str, float]:
    """(P, 2) rewards to the figures of the training log."""
    chosen, rejected = rewards.unbind(dim=1)
    figures = reward_metrics(bradley_terry_loss(chosen, rejected), chosen, rejected)
    return {name: value.item() / len(rewards) for name, value in figures.items()}


if __name__ == "__main__":
    run_script(main)
