"""How well a model prefers the chosen answers, measured on a file of pairs.

    python -m eval.preference --model runs/dpo --reference runs/sft            # on the bundled held-out pairs
    python -m eval.preference --model DIR --reference DIR --data pairs.jsonl --json figures.json
    torchrun --standalone --nproc-per-node 4 -m eval.preference --model DIR --reference DIR --data pairs.jsonl

Besides what the training log has: `pairs`, and `kl_per_token`, the exact KL(pi || pi_ref) between the two
models' next-token distributions, in nats, averaged over every position of the data that predicts a token of
a response, chosen or rejected, end tokens included. It says how far the model has moved on *this* text; on
text that the model writes itself the mean would be another one. The loss is DPO's, whatever the model was
trained with, so that models can be compared.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from dataset.packing import LAYOUTS, build_stream, share
from dataset.store import TokenStore, open_store
from dataset.tokenizer import ChatTokenizer
from errors import InputError, run_script
from model.stream import TokenStream
from model.transformer import Transformer
from model.weights import load_model
from objective import Objective, ObjectiveSettings, Pairs, pair_metrics
from training.distributed import Precision, World, join
from training.metrics import Meter
from training.settings import SAMPLE, flag, parse

DEVICES = ("auto", "cuda", "mps", "cpu")
DEVICE_WHY = "auto takes CUDA, then Apple's MPS, then the CPU"
CHUNK = 1024  # Positions that meet the vocabulary at once: with 150,000 tokens a row is 0.6 MB of float32.


@dataclass
class Settings:
    model: str = flag("runs/dpo", "model folder of the policy")
    reference: str = flag("runs/sft", "model folder that the policy started from")
    data: str = flag(str(SAMPLE / "heldout.jsonl"), "preference pairs: .jsonl or .json, also .gz")
    json: str = flag("", "write the figures into this file, too")
    beta: float = flag(0.1, "of the rewards and the loss: the one of the training")
    batch_size: int = flag(32, "pairs per forward per rank; changes the speed, not the figures")
    max_length: int = flag(512, "tokens of prompt and response; longer pairs are dropped and counted")
    layout: str = flag("forked", "forked computes a prompt once for both sides, twin once for each", LAYOUTS)
    shape: str = flag("auto", "force how records are read (see dataset/records.py); auto looks at the first")
    skip_bad: bool = flag(False, "leave bad records out (at most 1 %) instead of stopping at the first")
    device: str = flag("auto", DEVICE_WHY, DEVICES)
    precision: str = flag("auto", "of the forward pass, as in training", ("auto", "fp32", "bf16", "fp16"))

    def __post_init__(self) -> None:
        require(self.beta > 0, "--beta", self.beta, "must be positive")
        require(self.batch_size >= 1, "--batch-size", self.batch_size, "must be at least 1")
        require(self.max_length >= 1, "--max-length", self.max_length, "must be at least 1")


def main(arguments: list[str] | None = None) -> None:
    settings = parse(Settings, __doc__.split("\n")[0], arguments)
    with join(settings.device) as world:
        figures = measure(settings, world)
    if world.is_main:
        if settings.json:
            write_json(settings.json, figures)
        print("\n".join(f"{name:<20} {value:>10.6g}" for name, value in figures.items()))


def measure(settings: Settings, world: World) -> dict[str, float]:
    """Load the two models and the data that the settings name, and evaluate."""
    policy, tokenizer = load_speaker(settings.model, world.device)
    reference, reference_tokenizer = load_speaker(settings.reference, world.device)
    if tokenizer.fingerprint != reference_tokenizer.fingerprint:
        raise InputError(f"{settings.model} and {settings.reference} have different tokenizers")
    policy.config.admit(length=settings.max_length)
    reference.config.admit(length=settings.max_length)
    if policy.config.vocab_size != reference.config.vocab_size:
        raise InputError(f"{settings.model} and {settings.reference} have vocabularies of different sizes")
    how = settings.max_length, settings.shape, settings.skip_bad
    pairs = world.main_first(lambda: open_store(settings.data, "preferences", tokenizer, *how))
    world.print(f"{settings.data}: {pairs.report}")
    precision = Precision(settings.precision, world.device)
    objective = Objective(ObjectiveSettings(beta=settings.beta))
    asked = {"layout": settings.layout, "batch_size": settings.batch_size}
    return {
        "pairs": len(pairs),
        **evaluate(policy, reference, pairs, world, precision, objective, **asked),
        **evaluate_kl(policy, reference, pairs, world, precision, **asked),
    }


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
    policy.count_collisions = settings.wpo
    for rows in share(len(pairs), world.rank, world.ranks, batch_size):
        stream = build_stream(pairs, rows, layout).to(world.device)
        with precision.autocast():
            policy_logps = policy(stream)
            collisions = policy.collisions  # before the reference is asked: it may be the same model
            reference_logps = reference(stream)
        labels = pairs.score_margins[rows]
        batch = Pairs.of(stream, policy_logps, reference_logps, labels, collisions)
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

    def log_distributions(model: Transformer):
        """log pi(. | x, y_<t), at least float32, in chunks of (≤ CHUNK, V)."""
        hidden = model.hidden_of(stream)[stream.predictors]  # (N, d)
        for chunk in hidden.split(CHUNK):
            logits = model.logits(chunk)
            yield logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(dim=-1)

    both = zip(log_distributions(policy), log_distributions(reference), strict=True)
    return torch.cat([(log_p.exp() * (log_p - log_q)).sum(dim=-1) for log_p, log_q in both])


# ---- what the scripts of this folder share


def load_speaker(folder: str, device: torch.device) -> tuple[Transformer, ChatTokenizer]:
    """A model folder's model, not to be trained, and its tokenizer; `InputError` when either is missing."""
    model = load_model(folder, device).eval().requires_grad_(False)
    tokenizer = ChatTokenizer(Path(folder) / "tokenizer.json")
    model.config.admit(tokenizer.vocab_size)
    return model, tokenizer


def require(holds: bool, name: str, value, rule: str) -> None:
    """Refuse a flag whose value no run can mean. A NaN fails every comparison, so it is refused as well."""
    if not holds:
        raise InputError(f"{name} {rule}, not {value}")


def write_json(path: str | Path, figures: dict) -> None:
    """Write figures into a file, whose folder is made if need be."""
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(json.dumps(figures, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror})") from None


if __name__ == "__main__":
    run_script(main)
