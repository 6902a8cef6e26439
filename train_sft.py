"""Supervised fine-tuning: teach a model to answer, before DPO teaches it which answers are preferred.

    python train_sft.py                                                 # bundled data; CPU, MPS or one GPU
    python train_sft.py --model 26m --data chats.jsonl --out runs/mine
    torchrun --standalone --nproc-per-node 4 train_sft.py               # four GPUs of one machine

The loss is −log π(y_t | x, y_<t), the mean over all tokens of assistant turns, end tokens included.
"""

from dataclasses import dataclass

import torch

from dataset.mixture import windows_of
from dataset.packing import micro_batches
from dataset.tokenizer import ChatTokenizer
from errors import InputError, run_script
from model.config import PRESETS, ModelConfig
from model.lora import trained_part
from model.moe import router_loss
from model.transformer import Transformer, compile_layers
from model.weights import weights_hash
from training.distributed import World, exchange_gradients, first_device, join, wrap
from training.evaluate import evaluate_sft
from training.memory import micro_batch_tokens
from training.metrics import Meter, MetricsLog
from training.precision import Precision
from training.run import RunFolder
from training.schedule import clip_gradients, cosine_lr, require_finite, set_lr
from training.settings import FILES_WHY, SAMPLE, SEVERAL_WHY, AdapterSettings, flag, parse
from training.setup import describe_run, load_policy, make_optimizer, open_data, prepare


@dataclass
class Settings(AdapterSettings):
    model: str = flag("tiny", f"size of a new model ({', '.join(PRESETS)}), or a model folder to start from")
    tokenizer: str = flag(str(SAMPLE / "tokenizer.json"), "tokenizer.json of a new model")
    data: str | tuple[str, ...] = flag(
        str(SAMPLE / "sft.jsonl"), f"conversations: {FILES_WHY}", several=True
    )
    eval_data: str | tuple[str, ...] = flag("", f"held-out conversations; {SEVERAL_WHY}", several=True)
    out: str = flag("runs/sft", "run folder: config, weights, tokenizer, metrics")
    epochs: int = flag(3, "passes over the data")
    batch_size: int = flag(32, "conversations per optimizer step, over all ranks and micro-batches")
    lr: float = flag(4e-3, "peak learning rate, for the tiny model; a billion weights need 1e-5")
    warmup_steps: int = flag(20, "steps of linear warm-up before the cosine")


def main(arguments: list[str] | None = None) -> None:
    settings = parse(Settings, __doc__.split("\n")[0], arguments)
    with join(settings.device) as world, RunFolder(settings, world) as run:
        train(settings, world, run)


def train(settings: Settings, world: World, run: RunFolder) -> None:
    # ---- set-up: the model, the conversations, the optimizer
    model, tokenizer, max_length = start_model(settings, world)
    policy = wrap(model, world, settings.shard)  # the same model, as several ranks train it together
    if settings.compile:
        compile_layers(model)
    data, held_out = open_data(settings, "conversations", tokenizer, max_length, world)
    windows = windows_of(data, settings.batch_size, settings.seed)  # the conversations of each step
    total_steps = settings.max_steps or settings.epochs * windows.per_epoch
    precision = Precision(settings.precision, world.device, settings.matmul_precision)
    max_tokens = micro_batch_tokens(settings, model, world, data, precision)  # in one forward
    optimizer, meter = make_optimizer(settings, model, precision), Meter(world)
    describe_run(settings, world, precision, model, "supervised fine-tuning")

    # ---- where a stopped run continues; `state` is what a checkpoint contains
    state = {"model": trained_part(model), "optimizer": optimizer, "precision": precision, "meter": meter}
    digests = weights_hash(model), data.fingerprint, tokenizer.fingerprint
    first_step = run.begin(state, *digests, max_length=max_length, micro_batch_tokens=max_tokens)
    if first_step is None:
        return  # The run has finished.
    max_tokens = run.identity["micro_batch_tokens"]  # of the checkpoint, if there is one
    log = MetricsLog(run.folder, world, settings, first_step, total_steps, unit="conversations")
    world.print(windows.describe(total_steps, world.ranks, max_tokens))

    for step in range(first_step, total_steps):
        lr = cosine_lr(step, total_steps, settings.lr, settings.warmup_steps)
        set_lr(optimizer, lr)
        window = windows[step]
        window_tokens = int(data.target_counts[window].sum())  # supervised tokens, over all ranks

        # ------------------------------------------------------- the gradient of one window of conversations
        for stream, is_last in micro_batches(data, window, world, max_tokens):
            exchange_gradients(policy, when=is_last)
            balances = []  # filled by experts; empty for a dense model
            with precision.autocast():
                losses = -policy(stream, balances)  # (N,) −log π(y_t | x, y_<t)
            if balances:
                meter.add(0, {"aux_loss": router_loss(balances) * len(losses)})
            penalty = model.config.router_aux_loss_coef * router_loss(balances)

            # The mean over the window's tokens. A mean of micro-batch means would give the tokens of short
            # micro-batches more weight. Ranks average their gradients, hence the factor.
            precision.backward((losses + penalty).sum() * world.ranks / window_tokens)
            meter.add(len(losses), {"loss": losses.sum()})
        # -------------------------------------------------------

        grad_norm = clip_gradients(optimizer, precision.scaler, settings.grad_clip)
        require_finite(meter, grad_norm, precision, step, data.lines[window])
        precision.step(optimizer)
        optimizer.zero_grad()

        done = step + 1
        log.advance(len(window))
        if done % settings.log_every == 0 or done == total_steps:
            metrics = {"grad_norm": grad_norm, "learning_rate": lr, **precision.metrics()}
            log.write(done, {**meter.mean(), **metrics})
        if done % settings.eval_every == 0 or done == total_steps:
            figures = {}  # of all held-out sets
            for name, eval_data in held_out.items():
                metrics = evaluate_sft(model, eval_data, world, precision, max_tokens)
                figures |= log.write_held_out(done, name, metrics)
            run.keep_best(done, figures, model, tokenizer)
        run.save_when_due(done)

    log.close()
    run.finish(model, tokenizer)


def start_model(settings: Settings, world: World) -> tuple[Transformer, ChatTokenizer, int]:
    """A new model of a preset's size, the same on every rank, or the model of a folder; as `load_policy`."""
    if settings.model not in PRESETS:
        return load_policy(settings, world)
    if settings.lora_rank:
        raise InputError(f"--lora-rank needs a model folder; {settings.model} is the size of a new model")
    tokenizer = ChatTokenizer(settings.tokenizer)
    torch.manual_seed(settings.seed)
    config = ModelConfig(vocab_size=tokenizer.vocab_size, **PRESETS[settings.model])
    device = first_device(world, settings.shard)
    with torch.device(
        "meta" if device.type == "meta" else "cpu"
    ):  # One seed gives one model on every device.
        model = Transformer(config).to(device)
    return model, tokenizer, prepare(model, tokenizer, settings, world)


if __name__ == "__main__":
    run_script(main)
