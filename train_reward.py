"""A reward model: a number for each answer, higher for the answer that is preferred.

    python train_reward.py                                       # after train_sft.py; CPU, MPS or one GPU
    python train_reward.py --model DIR --data pairs.jsonl --eval-share 0.05 --out runs/mine
    torchrun --standalone --nproc-per-node 4 train_reward.py     # four GPUs of one machine

A pair is a prompt x with a chosen answer y_w and a rejected answer y_l. The loss of a pair is

    −log σ( r(x, y_w) − r(x, y_l) )

r is the body of a language model with a linear head, read at the answer's end token (Bradley & Terry 1952;
Ouyang et al. 2022, arXiv 2203.02155, eq. 1). Only the difference of two rewards for one prompt has a meaning:
its sigmoid is the probability that the first answer is preferred. `eval/score.py` scores a file of pairs.
"""

from dataclasses import dataclass
from pathlib import Path

from dataset.mixture import windows_of
from dataset.packing import micro_batches
from dataset.tokenizer import ChatTokenizer
from errors import run_script
from losses import bradley_terry_loss, reward_metrics
from model.moe import router_loss
from model.reward import RewardModel
from model.stream import sides
from model.transformer import compile_layers
from model.weights import load_model, weights_hash
from training.distributed import World, exchange_gradients, first_device, join, wrap
from training.evaluate import evaluate_rewards, score_pairs
from training.memory import micro_batch_tokens
from training.metrics import Meter, MetricsLog
from training.precision import Precision
from training.run import RunFolder
from training.schedule import adamw, clip_gradients, cosine_lr, require_finite, set_lr
from training.settings import PairSettings, flag, parse
from training.setup import describe_run, open_data, prepare


@dataclass
class Settings(PairSettings):
    model: str = flag("runs/sft", "folder of the language model whose body is the start")
    out: str = flag("runs/reward", "run folder: config, weights, tokenizer, metrics")
    batch_size: int = flag(32, "pairs per optimizer step, over all ranks and micro-batches")


def main(arguments: list[str] | None = None) -> None:
    settings = parse(Settings, __doc__.split("\n")[0], arguments)
    with join(settings.device) as world, RunFolder(settings, world) as run:
        train(settings, world, run)


def train(settings: Settings, world: World, run: RunFolder) -> None:
    # ---- set-up: the model, the pairs, the optimizer
    model, tokenizer, max_length = start_model(settings, world)
    reward = wrap(model, world, settings.shard)  # the same model, as several ranks train it together
    if settings.compile:
        compile_layers(model)
    pairs, held_out = open_data(settings, "preferences", tokenizer, max_length, world)
    windows = windows_of(pairs, settings.batch_size, settings.seed)  # the pairs of each optimizer step
    total_steps = settings.max_steps or settings.epochs * windows.per_epoch
    precision = Precision(settings.precision, world.device, settings.matmul_precision)
    max_tokens = micro_batch_tokens(settings, model, world, pairs, precision)  # in one forward
    optimizer, meter = adamw(model, settings.weight_decay), Meter(world)
    describe_run(settings, world, precision, model, "reward model")

    # ---- where a stopped run continues; `state` is what a checkpoint contains
    state = {"model": model, "optimizer": optimizer, "precision": precision, "meter": meter}
    digests = weights_hash(model), pairs.fingerprint, tokenizer.fingerprint
    first_step = run.begin(state, *digests, max_length=max_length, micro_batch_tokens=max_tokens)
    if first_step is None:
        return  # The run has finished.
    max_tokens = run.identity["micro_batch_tokens"]  # of the checkpoint, if there is one
    log = MetricsLog(run.folder, world, settings, first_step, total_steps, unit="pairs")
    world.print(windows.describe(total_steps, world.ranks, max_tokens))

    def evaluate_now(step: int) -> None:
        figures = {}  # of all held-out sets
        for name, eval_pairs in held_out.items():
            rewards = score_pairs(model, eval_pairs, world, precision, settings.layout, max_tokens)
            figures |= log.write_held_out(step, name, evaluate_rewards(rewards))
        run.keep_best(step, figures, model, tokenizer)

    if first_step == 0:
        evaluate_now(step=0)
    for step in range(first_step, total_steps):
        lr = cosine_lr(step, total_steps, settings.lr, settings.warmup_steps)
        set_lr(optimizer, lr)
        window = windows[step]

        # ------------------------------------------------------- the gradient of one window of pairs
        for stream, is_last in micro_batches(pairs, window, world, max_tokens, settings.layout):
            exchange_gradients(reward, when=is_last)
            balances = []  # filled by experts; empty for a dense model
            with precision.autocast():
                chosen_rewards, rejected_rewards = sides(
                    reward(stream, balances)
                )  # (B,) r(x, y) of each side
            losses = bradley_terry_loss(chosen_rewards, rejected_rewards)  # (B,)
            if balances:
                meter.add(0, {"aux_loss": router_loss(balances) * len(losses)})
            penalty = model.config.router_aux_loss_coef * router_loss(balances)

            # The mean over the window's pairs. Ranks average their gradients, hence the factor.
            precision.backward((losses + penalty).sum() * world.ranks / len(window))
            meter.add(len(losses), reward_metrics(losses, chosen_rewards, rejected_rewards))
        # -------------------------------------------------------

        grad_norm = clip_gradients(optimizer, precision.scaler, settings.grad_clip)
        require_finite(meter, grad_norm, precision, step, pairs.lines[window])
        precision.step(optimizer)
        optimizer.zero_grad()

        done = step + 1
        log.advance(len(window))
        if done % settings.log_every == 0 or done == total_steps:
            metrics = {"grad_norm": grad_norm, "learning_rate": lr, **precision.metrics()}
            log.write(done, {**meter.mean(), **metrics})
        if done % settings.eval_every == 0 or done == total_steps:
            evaluate_now(done)
        run.save_when_due(done)

    log.close()
    run.finish(model, tokenizer)


def start_model(settings: Settings, world: World) -> tuple[RewardModel, ChatTokenizer, int]:
    """The body of a language model with a new head, its tokenizer, and the longest record in tokens."""
    language_model = load_model(settings.model, first_device(world, settings.shard))
    model = RewardModel.from_language_model(language_model)
    tokenizer = ChatTokenizer(Path(settings.model) / "tokenizer.json")
    return model, tokenizer, prepare(model, tokenizer, settings, world)


if __name__ == "__main__":
    run_script(main)
