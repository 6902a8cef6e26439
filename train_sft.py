"""Supervised fine-tuning: teach a model to answer, before preferences teach it how.

    python train_sft.py                                                 # bundled data; CPU, MPS or one GPU
    python train_sft.py --model 26m --data chats.jsonl --out runs/mine
    torchrun --standalone --nproc-per-node 4 train_sft.py               # four GPUs of one machine

The loss is -log pi(y_t | x, y_<t), averaged over every token that an assistant says, end tokens included.
"""

from dataclasses import dataclass
from pathlib import Path

import torch

from dataset.packing import Windows, build_stream, deal, share
from dataset.store import TokenStore, open_store
from dataset.tokenizer import ChatTokenizer
from errors import InputError, run_script
from model.lora import add_adapters, trained_part
from model.transformer import PRESETS, ModelConfig, Transformer, compile_layers
from model.weights import load_model, save_model, weights_hash
from training.distributed import Precision, exchange_gradients, first_device, gather, join, wrap
from training.metrics import Meter, MetricsLog
from training.run import RunFolder
from training.schedule import adamw, clip_gradients, cosine_lr, require_finite, set_lr
from training.settings import SAMPLE, AdapterSettings, flag, parse


@dataclass
class Settings(AdapterSettings):
    model: str = flag(
        "tiny", f"a fresh model of this size ({', '.join(PRESETS)}), or a model folder to go on from"
    )
    tokenizer: str = flag(str(SAMPLE / "tokenizer.json"), "tokenizer.json of a fresh model")
    data: str = flag(str(SAMPLE / "sft.jsonl"), "conversations: .jsonl or .json, also .gz")
    eval_data: str = flag("", "held-out conversations, evaluated now and then; empty for none")
    out: str = flag("runs/sft", "run folder: config, weights, tokenizer, metrics")
    epochs: int = flag(4, "times every conversation is seen")
    batch_size: int = flag(16, "conversations per optimizer step, over all ranks and micro-batches")
    lr: float = flag(2.5e-3, "peak learning rate")
    warmup_steps: int = flag(50, "steps of linear warm-up before the cosine")


def main(arguments: list[str] | None = None) -> None:
    settings = parse(Settings, __doc__.split("\n")[0], arguments)
    with join(settings.device) as world, RunFolder(settings, world) as run:
        train(settings, world, run)


def train(settings: Settings, world, run) -> None:
    if run.is_finished():
        return

    # ---- the model
    model, tokenizer = start_model(settings, first_device(world, settings.shard))
    model.config.admit(tokenizer.vocab_size, settings.max_length)
    if settings.lora_rank:
        add_adapters(model, settings.lora_rank, settings.lora_alpha, settings.lora_targets, settings.seed)
    model.checkpoint_activations = settings.checkpoint_activations
    if settings.fused_attention:
        model.fuse_attention(world.device)
    policy = wrap(model, world, settings.shard)
    if settings.compile:
        compile_layers(model)

    # ---- the data: conversations, and which of them each optimizer step sees
    def open_conversations(path):
        how = settings.max_length, settings.shape, settings.skip_bad
        return world.main_first(lambda: open_store(path, "conversations", tokenizer, *how))

    conversations = open_conversations(settings.data)
    eval_conversations = open_conversations(settings.eval_data) if settings.eval_data else None
    windows = Windows(len(conversations), settings.batch_size, settings.seed)
    total_steps = settings.max_steps or settings.epochs * windows.per_epoch

    precision = Precision(settings.precision, world.device, settings.matmul_precision)
    optimizer = adamw(model, settings.weight_decay)
    world.print(f"{settings.data}: {conversations.report}")
    world.print(windows.describe(total_steps, world.ranks, settings.micro_batch_size))
    meter = Meter(world)

    # ---- what a checkpoint holds, and where an interrupted run goes on
    state = {"model": trained_part(model), "optimizer": optimizer, "precision": precision, "meter": meter}
    first_step = run.begin(state, weights_hash(model), conversations.fingerprint, tokenizer.fingerprint)
    log = MetricsLog(Path(settings.out), world, first_step, total_steps, unit="conversations")

    for step in range(first_step, total_steps):
        lr = cosine_lr(step, total_steps, settings.lr, settings.warmup_steps)
        set_lr(optimizer, lr)

        # ---- one window of conversations: forward, loss and backward, micro-batch by micro-batch
        window = windows[step]
        window_tokens = int(conversations.targets[window].sum())  # supervised, over all ranks
        micro_batches = deal(window, conversations.lengths, world.ranks, settings.micro_batch_size)[
            world.rank
        ]
        for number, rows in enumerate(micro_batches, start=1):
            stream = build_stream(conversations, rows).to(world.device)
            with exchange_gradients(policy, when=number == len(micro_batches)):
                with precision.autocast():
                    losses = -policy(stream)  # (N,) -log pi(y_t | x, y_<t)
                aux_loss = model.aux_loss()  # how unevenly the experts are loaded; 0 for a dense model
                # A mean over the window's tokens, however they were dealt: a mean of micro-batch means would
                # weigh the tokens of short batches more. Each token carries the balance of its stream, too.
                # Ranks' gradients are averaged, hence `ranks`.
                total = (losses + model.config.router_aux_loss_coef * aux_loss).sum()
                precision.scaler.scale(total * world.ranks / window_tokens).backward()
            meter.add(len(losses), {"loss": losses.sum(), "aux_loss": aux_loss * len(losses)})

        grad_norm = clip_gradients(optimizer, precision.scaler, settings.grad_clip)
        require_finite(meter, grad_norm, precision, step, conversations.lines[window])
        precision.scaler.step(optimizer)
        precision.scaler.update()
        optimizer.zero_grad()

        done = step + 1
        log.advance(len(window))
        if done % settings.log_every == 0 or done == total_steps:
            figures = {"grad_norm": grad_norm, "learning_rate": lr, **precision.figures()}
            log.write(done, {**meter.mean(), **figures})
        if eval_conversations and (done % settings.eval_every == 0 or done == total_steps):
            loss = evaluate(model, eval_conversations, world, precision, settings.micro_batch_size)
            log.write(done, {"eval_loss": loss})
        run.save_when_due(done)

    gather(model, world)  # if it was split
    if world.is_main:
        tokenizer.save(Path(settings.out))
        save_model(Path(settings.out), model, settings=settings.to_dict())
    log.close()
    run.finish()


def start_model(settings: Settings, device: torch.device) -> tuple[Transformer, ChatTokenizer]:
    """A fresh model of a preset's size, the same on every rank; or the model of a folder."""
    if settings.model not in PRESETS:
        if not Path(settings.model).is_dir():
            raise InputError(f"--model {settings.model}: neither a folder nor one of {', '.join(PRESETS)}")
        return load_model(settings.model, device), ChatTokenizer(Path(settings.model) / "tokenizer.json")
    if settings.lora_rank:
        raise InputError(f"--lora-rank adapts a model folder; {settings.model} is a fresh model")
    tokenizer = ChatTokenizer(settings.tokenizer)
    torch.manual_seed(settings.seed)
    config = ModelConfig(vocab_size=tokenizer.vocab_size, **PRESETS[settings.model])
    with torch.device("meta" if device.type == "meta" else "cpu"):  # One seed, one model on every device.
        return Transformer(config).to(device), tokenizer


@torch.no_grad()
def evaluate(model: Transformer, data: TokenStore, world, precision: Precision, batch_size: int) -> float:
    """Mean loss a supervised token, each conversation once on any number of ranks."""
    meter = Meter(world)
    for rows in share(len(data), world.rank, world.ranks, batch_size):
        stream = build_stream(data, rows).to(world.device)
        with precision.autocast():
            losses = -model(stream)
        meter.add(len(losses), {"loss": losses.sum()})
    return meter.mean()["loss"]


if __name__ == "__main__":
    run_script(main)
