"""Direct Preference Optimization: make chosen answers more likely than rejected ones.

    python train_dpo.py                                          # after train_sft.py; CPU, MPS or one GPU
    python train_dpo.py --model DIR --data pairs.jsonl --eval-share 0.05 --out runs/mine --beta 0.1
    torchrun --standalone --nproc-per-node 4 train_dpo.py        # four GPUs of one machine

A pair is a prompt x with a chosen answer y_w and a rejected answer y_l. The loss of a pair is

    −log σ( β [ log π(y_w|x)/π_ref(y_w|x)  −  log π(y_l|x)/π_ref(y_l|x) ] )

π is the model in training, the policy. π_ref, the reference, is a frozen copy of the model it started from
(Rafailov et al. 2023, arXiv 2305.18290, eq. 7).
"""

from dataclasses import dataclass

import torch

from dataset.mixture import windows_of
from dataset.packing import micro_batches
from errors import run_script
from losses import sigmoid
from model.lora import trained_part
from model.transformer import compile_layers
from model.weights import weights_hash
from training.distributed import World, exchange_gradients, join, wrap
from training.evaluate import KL_PAIRS, evaluate, evaluate_kl
from training.memory import micro_batch_tokens
from training.metrics import Meter, MetricsLog
from training.objective import Objective, Pairs, pair_metrics
from training.options import ObjectiveSettings
from training.precision import Precision
from training.reference import REFERENCES, cache_references, make_reference
from training.run import RunFolder
from training.samples import greedy_answers, held_out_prompts
from training.schedule import clip_gradients, cosine_lr, require_finite, set_lr
from training.settings import PairSettings, StartAdapterSettings, flag, parse
from training.setup import describe_run, load_policy, make_optimizer, open_data


@dataclass
class Settings(ObjectiveSettings, PairSettings, StartAdapterSettings):
    model: str = flag("runs/sft", "model folder to start from; a frozen copy of it is the reference")
    out: str = flag("runs/dpo", "run folder: config, weights, tokenizer, metrics")
    batch_size: int = flag(16, "pairs per optimizer step, over all ranks and micro-batches")
    lr: float = flag(2e-4, "peak learning rate for the tiny model with muon; a billion weights: 5e-7 to 5e-6")
    sample_prompts: int = flag(4, "held-out prompts to answer at every evaluation (samples.jsonl); 0: none")
    reference: str = flag("live", "live: a frozen model in every step; cached: computed once", REFERENCES)
    reference_model: str = flag("", "model folder of the reference; empty: --model")


def main(arguments: list[str] | None = None) -> None:
    settings = parse(Settings, __doc__.split("\n")[0], arguments)
    with join(settings.device) as world, RunFolder(settings, world) as run:
        train(settings, world, run)


def train(settings: Settings, world: World, run: RunFolder) -> None:
    # ---- set-up: the objective, the two models, the pairs, the optimizer
    objective = Objective(settings)  # DPO, unless --loss or one of its options is given
    model, tokenizer, max_length = load_policy(settings, world)
    reference = make_reference(settings, objective, model, world)  # π_ref, frozen
    policy = wrap(model, world, settings.shard)  # π: the same model, as several ranks train it together
    if settings.compile:
        compile_layers(model, reference)
    kind, check = objective.kind, objective.check_data  # the records that the objective reads: pairs for DPO
    pairs, held_out = open_data(settings, kind, tokenizer, max_length, world, check)
    windows = windows_of(pairs, settings.batch_size, settings.seed)  # the pairs of each optimizer step
    total_steps = settings.max_steps or settings.epochs * windows.per_epoch
    precision = Precision(settings.precision, world.device, settings.matmul_precision)
    fitted = settings, model, world, pairs, precision, reference, objective.forwards
    max_tokens = micro_batch_tokens(*fitted)  # in one forward
    cached = cache_references(settings, model, pairs, held_out, world, precision, max_tokens)
    prompts = held_out_prompts(settings, held_out, model, world)  # to be answered at every evaluation
    optimizer, meter = make_optimizer(settings, model, precision), Meter(world)
    plain_dpo = objective.is_dpo and not model.config.num_experts
    describe_run(settings, world, precision, model, f"DPO, --loss {settings.loss}, beta {settings.beta:g}")

    # ---- where a stopped run continues; `state` is what a checkpoint contains
    state = {"model": trained_part(model), "optimizer": optimizer, "precision": precision, "meter": meter}
    state |= {"objective": objective, **({"reference": reference} if objective.moves_reference else {})}
    digests = weights_hash(model), pairs.fingerprint, tokenizer.fingerprint
    first_step = run.begin(
        state, *digests, max_length=max_length, micro_batch_tokens=max_tokens, reference_logps=cached
    )
    if first_step is None:
        return  # The run has finished.
    max_tokens = run.identity["micro_batch_tokens"]  # of the checkpoint, if there is one
    log = MetricsLog(run.folder, world, settings, first_step, total_steps, unit="pairs")
    world.print(windows.describe(total_steps, world.ranks, max_tokens))

    def evaluate_now(step: int) -> None:
        figures = {}  # of all held-out sets
        for name, eval_pairs in held_out.items():
            data, options = (model, reference, eval_pairs, world), (settings.layout, max_tokens)
            metrics = evaluate(*data, precision, objective, *options)
            metrics |= evaluate_kl(*data, *options, KL_PAIRS)
            figures |= log.write_held_out(step, name, metrics)
        run.keep_best(step, figures, model, tokenizer)
        log.write_samples(step, greedy_answers(model, tokenizer, prompts, world, settings.compile))

    if first_step == 0:
        evaluate_now(step=0)
    for step in range(first_step, total_steps):
        lr = cosine_lr(step, total_steps, settings.lr, settings.warmup_steps)
        set_lr(optimizer, lr)
        window = windows[step]
        objective.before_step(  # KTO's z₀, the mean of the window
            model, reference, pairs, window, world, precision, settings.layout, max_tokens
        )

        # ------------------------------------------------------- the gradient of one window of pairs
        for stream, is_last in micro_batches(pairs, window, world, max_tokens, settings.layout):
            exchange_gradients(policy, when=is_last)
            balances = []  # filled by experts; empty for a dense model
            with precision.autocast():
                policy_logps = policy(stream, balances)  # (N,) log π(y_t | x, y_<t)
                with torch.no_grad():
                    reference_logps = reference(stream)  # (N,) log π_ref(y_t | x, y_<t)

            # log π(y|x) is the sum over the tokens of y: (N,) -> (B,) for each side
            policy_chosen_logps, policy_rejected_logps = stream.sum_by_side(policy_logps)
            reference_chosen_logps, reference_rejected_logps = stream.sum_by_side(reference_logps)

            # β times a log-ratio is the implicit reward of an answer
            chosen_logratios = policy_chosen_logps - reference_chosen_logps  # (B,) a
            rejected_logratios = policy_rejected_logps - reference_rejected_logps  # (B,) b
            if plain_dpo:
                margins = chosen_logratios - rejected_logratios
                losses = sigmoid(margins, settings.beta)  # (B,) −log σ(β (a − b)), eq. 7
            else:
                inputs = stream, policy_logps, reference_logps, balances
                losses = objective.training_losses(*inputs, model, reference, precision, meter)

            # The mean over the window's pairs. Ranks average their gradients, hence the factor.
            precision.backward(losses.sum() * world.ranks / len(window))
            batch = Pairs(
                policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps
            )
            meter.add(len(losses), pair_metrics(losses, batch, settings.beta))
        # -------------------------------------------------------

        grad_norm = clip_gradients(optimizer, precision.scaler, settings.grad_clip)
        require_finite(meter, grad_norm, precision, step, pairs.lines[window])
        precision.step(optimizer)
        optimizer.zero_grad()

        done = step + 1
        objective.after_step(done, model, reference, world.sum)  # BCO's δ, TR-DPO's reference
        log.advance(len(window))
        if done % settings.log_every == 0 or done == total_steps:
            metrics = {"grad_norm": grad_norm, "learning_rate": lr, **precision.metrics()}
            log.write(done, {**meter.mean(), **metrics})
        if done % settings.eval_every == 0 or done == total_steps:
            evaluate_now(done)
        run.save_when_due(done)

    log.close()
    run.finish(model, tokenizer)


if __name__ == "__main__":
    run_script(main)
