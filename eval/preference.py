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

from dataclasses import dataclass

from dataset.packing import LAYOUTS
from dataset.store import open_store
from errors import InputError, run_script
from eval.common import DEVICE_WHY, DEVICES, load_speaker, require, write_json
from training.distributed import World, join
from training.evaluate import evaluate, evaluate_kl
from training.objective import Objective, ObjectiveSettings
from training.precision import Precision
from training.settings import SAMPLE, flag, parse


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
    policy.config.check_fits(length=settings.max_length)
    reference.config.check_fits(length=settings.max_length)
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


if __name__ == "__main__":
    run_script(main)
