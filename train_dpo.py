"""Direct Preference Optimization: make the chosen answers likelier than the rejected ones.

    python train_dpo.py                                          # after train_sft.py; CPU, MPS or one GPU
    python train_dpo.py --model DIR --data pairs.jsonl --eval-data heldout.jsonl --out runs/mine --beta 0.1
    python train_dpo.py --loss simpo --beta 2                    # another objective: README, losses.py
    torchrun --standalone --nproc-per-node 4 train_dpo.py        # four GPUs of one machine

The data is pairs: a prompt x with a chosen answer y_w and a rejected answer y_l. The loss of a pair is

    -log sigmoid( beta [ log pi(y_w|x)/pi_ref(y_w|x)  -  log pi(y_l|x)/pi_ref(y_l|x) ] )

where pi is the model in training and pi_ref a frozen copy of where it started (arXiv 2305.18290, eq. 7).
That is `losses.sigmoid`, the default of --loss.
"""

import copy
from dataclasses import dataclass
from pathlib import Path

import torch

from dataset.packing import LAYOUTS, Windows, micro_batches
from dataset.store import open_store
from dataset.tokenizer import ChatTokenizer
from errors import run_script
from model.lora import WithoutAdapters, add_adapters, trained_part
from model.moe import router_loss
from model.transformer import compile_layers
from model.weights import load_model, weights_hash
from training.distributed import exchange_gradients, first_device, join, wrap
from training.evaluate import evaluate
from training.memory import micro_batch_tokens
from training.metrics import Meter, MetricsLog
from training.objective import (
    Objective,
    ObjectiveSettings,
    Pairs,
    no_reference,
    pair_metrics,
    wpo_pair_weights,
)
from training.precision import Precision
from training.reference import REFERENCES, cache_reference, cached_reference, check_reference
from training.run import RunFolder
from training.schedule import adamw, clip_gradients, cosine_lr, require_finite, set_lr
from training.settings import SAMPLE, AdapterSettings, flag, parse


@dataclass
class Settings(ObjectiveSettings, AdapterSettings):
    model: str = flag("runs/sft", "model folder to start from; its frozen copy is the reference")
    data: str = flag(str(SAMPLE / "preferences.jsonl"), "preference pairs: .jsonl or .json, also .gz")
    eval_data: str = flag(
        str(SAMPLE / "heldout.jsonl"), "held-out pairs, evaluated now and then; empty for none"
    )
    out: str = flag("runs/dpo", "run folder: config, weights, tokenizer, metrics")
    batch_size: int = flag(16, "pairs per optimizer step, over all ranks and micro-batches")
    lr: float = flag(1e-4, "peak learning rate; with much more the tiny model's answers fall apart")
    layout: str = flag("forked", "forked computes a prompt once for both sides, twin once for each", LAYOUTS)
    reference: str = flag(
        "live", "live runs the frozen copy at every step; cached asks it once, before training", REFERENCES
    )


def main(arguments: list[str] | None = None) -> None:
    settings = parse(Settings, __doc__.split("\n")[0], arguments)
    with join(settings.device) as world, RunFolder(settings, world) as run:
        train(settings, world, run)


def train(settings: Settings, world, run) -> None:
    objective = Objective(settings)  # what is minimised: DPO's loss, unless other flags say otherwise
    check_reference(settings.reference, objective)

    # ---- the two models: the policy learns, the reference remembers where it started
    model = load_model(settings.model, first_device(world, settings.shard))
    tokenizer = ChatTokenizer(Path(settings.model) / "tokenizer.json")
    max_length = settings.length_limit(model.config)
    model.config.admit(tokenizer.vocab_size, max_length)
    if settings.fused_attention:
        model.fuse_attention(world.device)
    if settings.lora_rank:
        add_adapters(model, settings.lora_rank, settings.lora_alpha, settings.lora_targets, settings.seed)
    if not objective.needs_reference:
        reference = no_reference
    elif settings.reference == "cached":
        reference = cached_reference  # What it says is asked below, as long as the policy has not moved.
    elif settings.lora_rank:
        reference = WithoutAdapters(model)  # The same weights, no second copy.
    else:
        reference = wrap(copy.deepcopy(model).eval().requires_grad_(False), world, settings.shard)
    model.checkpoint_activations = settings.checkpoint_activations
    policy = wrap(model, world, settings.shard)
    if settings.compile:
        compile_layers(model, reference)

    # ---- the data: pairs, and which of them each optimizer step sees
    def open_pairs(path):
        how = max_length, settings.shape, settings.skip_bad
        store = world.node_first(lambda: open_store(path, "preferences", tokenizer, *how))
        objective.check_data(store, path)
        return store

    pairs = open_pairs(settings.data)
    eval_pairs = open_pairs(settings.eval_data) if settings.eval_data else None
    windows = Windows(len(pairs), settings.batch_size, settings.seed)
    total_steps = settings.max_steps or settings.epochs * windows.per_epoch

    precision = Precision(settings.precision, world.device, settings.matmul_precision)
    max_tokens = micro_batch_tokens(settings, model, world, pairs, precision, reference)
    if settings.reference == "cached":
        for store in filter(None, [pairs, eval_pairs]):
            cache_reference(model, store, world, precision, settings.layout, max_tokens)
    optimizer = adamw(model, settings.weight_decay)
    world.print(f"{settings.data}: {pairs.report}")
    meter = Meter(world)

    # ---- what a checkpoint holds, and where an interrupted run goes on
    state = {"model": trained_part(model), "optimizer": optimizer, "precision": precision, "meter": meter}
    state["objective"] = objective
    if objective.moves_reference:
        state["reference"] = reference  # TR-DPO's is no longer the model of --model.
    digests = weights_hash(model), pairs.fingerprint, tokenizer.fingerprint
    first_step = run.begin(state, *digests, micro_batch_tokens=max_tokens)
    if first_step is None:  # --resume finds the run finished
        return
    max_tokens = run.identity["micro_batch_tokens"]  # on --resume with auto: as before
    world.print(windows.describe(total_steps, world.ranks, max_tokens))
    log = MetricsLog(Path(settings.out), world, first_step, total_steps, unit="pairs")

    def evaluate_now(step: int) -> None:
        if eval_pairs:
            how = objective, settings.layout, max_tokens
            figures = evaluate(model, reference, eval_pairs, world, precision, *how)
            log.write(step, {f"eval_{name}": value for name, value in figures.items()})

    if first_step == 0:
        evaluate_now(step=0)
    for step in range(first_step, total_steps):
        lr = cosine_lr(step, total_steps, settings.lr, settings.warmup_steps)
        set_lr(optimizer, lr)

        # ---- one window of pairs: forward, loss and backward, micro-batch by micro-batch
        window = windows[step]
        for stream, last in micro_batches(pairs, window, world, max_tokens, settings.layout):
            with exchange_gradients(policy, when=last):
                with precision.autocast():
                    balances: list[torch.Tensor] = []  # one for each layer of experts
                    policy_logps = policy(stream, balances)  # (N,) log pi(y_t | x, y_<t)
                    pair_weights = wpo_pair_weights(model, stream, policy_logps) if settings.wpo else None
                    with torch.no_grad():
                        reference_logps = reference(stream)  # (N,)

                # A response's log-prob is the sum over its tokens: (N,) to (B,) for each side and model. DPO:
                # -log sigmoid(beta [(policy - reference)(chosen) - (policy - reference)(rejected)])
                labels = stream.score_margins  # (B,), which only --loss soft looks at
                batch = Pairs.of(stream, policy_logps, reference_logps, labels, pair_weights)
                losses = objective(batch, training=True)  # (B,)
                aux_loss = torch.as_tensor(router_loss(balances), device=world.device)
                # A mean over the window, however it was dealt: each pair carries the balance of its stream.
                # Ranks' gradients are averaged, hence `ranks`.
                total = (losses + model.config.router_aux_loss_coef * aux_loss).sum()
                precision.scaler.scale(total * world.ranks / len(window)).backward()
            figures = pair_metrics(losses, batch, settings.beta)
            meter.add(len(losses), {**figures, "aux_loss": aux_loss * len(losses)})

        grad_norm = clip_gradients(optimizer, precision.scaler, settings.grad_clip)
        require_finite(meter, grad_norm, precision, step, pairs.lines[window])
        precision.scaler.step(optimizer)
        precision.scaler.update()
        optimizer.zero_grad()

        done = step + 1
        objective.after_step(done, model, reference, world.sum)
        log.advance(len(window))
        if done % settings.log_every == 0 or done == total_steps:
            figures = {"grad_norm": grad_norm, "learning_rate": lr, **precision.figures()}
            log.write(done, {**meter.mean(), **figures})
        if done % settings.eval_every == 0 or done == total_steps:
            evaluate_now(done)
        run.save_when_due(done)

    log.close()
    run.finish(model, tokenizer)


if __name__ == "__main__":
    run_script(main)
