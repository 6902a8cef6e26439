"""A reward model: one number for an answer, higher for the one that is preferred.

    python train_reward.py                                       # after train_sft.py; CPU, MPS or one GPU
    python train_reward.py --model DIR --data pairs.jsonl --eval-data heldout.jsonl --out runs/mine
    torchrun --standalone --nproc-per-node 4 train_reward.py     # four GPUs of one machine
    python train_reward.py --model runs/reward --score pairs.jsonl --to scored.jsonl

The data is pairs: a prompt x with a chosen answer y_w and a rejected answer y_l. The loss of a pair is

    -log sigmoid( r(x, y_w) - r(x, y_l) )

where r is the language model's body with a linear head, read at the answer's end token (Bradley & Terry 1952;
Ouyang et al. 2022, arXiv 2203.02155, eq. 1). Only differences of rewards of one prompt mean something:
their sigmoid is the probability that the first answer is preferred.

With --score nothing is trained: the pairs of a file are written back as JSON lines in their order, each
record as it was plus `score_chosen` and `score_rejected`, from which ``train_dpo.py --loss soft`` learns how
sure each preference is. Pairs that training would drop (too long, or equal sides) are left out and named in
what is printed: they have no scores, and a file in which every record has them is what soft labels need.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from dataset.jsonl import read_values
from dataset.packing import LAYOUTS, Windows, build_stream, deal, share
from dataset.store import TokenStore, open_store
from dataset.tokenizer import ChatTokenizer
from errors import InputError, run_script
from files import write_whole
from losses import bradley_terry_loss, reward_metrics
from model.moe import router_loss
from model.reward import RewardModel
from model.stream import sides
from model.transformer import compile_layers
from model.weights import load_model, weights_hash
from training.distributed import World, exchange_gradients, first_device, join, wrap
from training.metrics import Meter, MetricsLog
from training.precision import Precision
from training.run import RunFolder
from training.schedule import adamw, clip_gradients, cosine_lr, require_finite, set_lr
from training.settings import SAMPLE, TrainSettings, flag, parse


@dataclass
class Settings(TrainSettings):
    model: str = flag(
        "runs/sft", "language model folder whose body to start from; with --score, a reward model's"
    )
    data: str = flag(str(SAMPLE / "preferences.jsonl"), "preference pairs: .jsonl or .json, also .gz")
    eval_data: str = flag(
        str(SAMPLE / "heldout.jsonl"), "held-out pairs, evaluated now and then; empty for none"
    )
    out: str = flag("runs/reward", "run folder: config, weights, tokenizer, metrics")
    layout: str = flag("forked", "forked computes a prompt once for both sides, twin once for each", LAYOUTS)
    score: str = flag("", "score the pairs of this file with the reward model of --model, and do not train")
    to: str = flag("", "the .jsonl file of scored pairs that --score writes")

    def __post_init__(self) -> None:
        super().__post_init__()
        if bool(self.score) != bool(self.to):
            raise InputError("--score and --to belong together: the pairs to score, and where they go")
        if self.to and not self.to.endswith(".jsonl"):
            raise InputError(f"--to {self.to}: scored pairs are written as .jsonl")


def main(arguments: list[str] | None = None) -> None:
    settings = parse(Settings, __doc__.split("\n")[0], arguments)
    with join(settings.device) as world, RunFolder(settings, world) as run:
        if settings.score:
            score(settings, world)
        else:
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
    pairs = open_pairs(settings.data, tokenizer, settings, world)
    eval_pairs = open_pairs(settings.eval_data, tokenizer, settings, world) if settings.eval_data else None
    windows = Windows(len(pairs), settings.batch_size, settings.seed)
    total_steps = settings.max_steps or settings.epochs * windows.per_epoch

    precision = Precision(settings.precision, world.device, settings.matmul_precision)
    optimizer = adamw(model, settings.weight_decay)
    world.print(windows.describe(total_steps, world.ranks, settings.micro_batch_size))
    meter = Meter(world)

    # ---- what a checkpoint holds, and where an interrupted run goes on
    state = {"model": model, "optimizer": optimizer, "precision": precision, "meter": meter}
    first_step = run.begin(state, weights_hash(model), pairs.fingerprint, tokenizer.fingerprint)
    if first_step is None:  # --resume finds the run finished
        return
    log = MetricsLog(Path(settings.out), world, first_step, total_steps, unit="pairs")

    def evaluate_now(step: int) -> None:
        if eval_pairs:
            figures = mean_metrics(score_pairs(model, eval_pairs, settings, world, precision))
            log.write(step, {f"eval_{name}": value for name, value in figures.items()})

    if first_step == 0:
        evaluate_now(step=0)
    for step in range(first_step, total_steps):
        lr = cosine_lr(step, total_steps, settings.lr, settings.warmup_steps)
        set_lr(optimizer, lr)

        # ---- one window of pairs: forward, loss and backward, micro-batch by micro-batch
        window = windows[step]
        micro_batches = deal(window, pairs.lengths, world.ranks, settings.micro_batch_size)[world.rank]
        for number, rows in enumerate(micro_batches, start=1):
            stream = build_stream(pairs, rows, settings.layout).to(world.device)
            with exchange_gradients(reward, when=number == len(micro_batches)):
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
            meter.add(len(rows), {**figures, "aux_loss": aux_loss * len(rows)})

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


def open_pairs(path: str, tokenizer: ChatTokenizer, settings: Settings, world: World) -> TokenStore:
    how = settings.max_length, settings.shape, settings.skip_bad
    pairs = world.main_first(lambda: open_store(path, "preferences", tokenizer, *how))
    world.print(f"{path}: {pairs.report}")
    return pairs


@torch.no_grad()
def score_pairs(
    model: RewardModel, pairs: TokenStore, settings: Settings, world: World, precision: Precision
) -> Tensor:
    """The rewards of every pair's chosen and rejected answer, (P, 2), on every rank."""
    rewards = torch.zeros(len(pairs), 2, dtype=model.score.weight.dtype, device=world.device)
    for rows in share(len(pairs), world.rank, world.ranks, settings.micro_batch_size):
        stream = build_stream(pairs, rows, settings.layout).to(world.device)
        with precision.autocast():
            rewards[list(rows)] = torch.stack(sides(model(stream)), dim=1)
    return world.sum(rewards)


def mean_metrics(rewards: Tensor) -> dict[str, float]:
    """(P, 2) rewards to the figures of the training log."""
    chosen, rejected = rewards.unbind(dim=1)
    figures = reward_metrics(bradley_terry_loss(chosen, rejected), chosen, rejected)
    return {name: value.item() / len(rewards) for name, value in figures.items()}


def score(settings: Settings, world: World) -> None:
    """Write the pairs of a file back with the scores of both answers."""
    model = load_model(settings.model, world.device, RewardModel)
    tokenizer = ChatTokenizer(Path(settings.model) / "tokenizer.json")
    pairs = open_pairs(settings.score, tokenizer, settings, world)
    precision = Precision(settings.precision, world.device, settings.matmul_precision)
    rewards = score_pairs(model, pairs, settings, world, precision)
    if world.is_main:
        write_scored(Path(settings.to), settings.score, pairs, rewards)
    figures = mean_metrics(rewards)
    world.print(
        f"{settings.to}: {len(pairs)} pairs; the chosen answer has the higher score in "
        f"{figures['rewards/accuracies']:.1%}, by {figures['rewards/margins']:.3g} on average"
    )


def write_scored(path: Path, source: str, pairs: TokenStore, rewards: Tensor) -> None:
    """The records of `source` that are rows of `pairs`, whole or not at all."""
    scores = dict(zip(pairs.records.tolist(), rewards.tolist(), strict=True))  # place in the file: scores

    def write(file) -> None:
        for place, (_, record) in enumerate(read_values(source)):
            if place in scores:
                record["score_chosen"], record["score_rejected"] = scores[place]
                # A lone surrogate outside the texts is the one thing that UTF-8 cannot say; JSON escapes it.
                line = json.dumps(record, ensure_ascii=False) + "\n"
                file.write(line.encode("utf-8", "backslashreplace"))

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, write)
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror})") from None


if __name__ == "__main__":
    run_script(main)
