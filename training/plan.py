"""Before a run is started: will it fit, how long will a step take, and what to switch on if it does not fit.

    python -m training.plan --model 26m --vocab-size 6400 --length 1024 --memory 24
    python -m training.plan --model path/to/Qwen2.5-0.5B-Instruct --length 2048   # reads config.json only
    python -m training.plan --model llama-3-70b --gpus 32 --length 2048 --batch-size 64 --pairs 60000

The formulas stand in costs.py; docs/SCALE.md explains them and says which of the figures were ever measured.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from errors import InputError, run_script
from model.huggingface import read_config
from model.transformer import PRESETS, ModelConfig
from model.weights import model_config, read_json
from training.costs import Plan, exchanged_bytes, make_stream, peak, step_flops, step_seconds
from training.settings import parse

GIB = 2**30
MOST_GPUS = 4096

# Published shapes, for planning without their files.
LLAMA_3 = dict(vocab_size=128_256, num_key_value_heads=8, rope_theta=5e5, tie_word_embeddings=False)
SHAPES = {
    "llama-3-8b": dict(
        LLAMA_3, hidden_size=4096, num_hidden_layers=32, num_attention_heads=32, intermediate_size=14_336
    ),
    "llama-3-70b": dict(
        LLAMA_3, hidden_size=8192, num_hidden_layers=80, num_attention_heads=64, intermediate_size=28_672
    ),
}


def read_shape(plan: Plan) -> ModelConfig:
    """The config of a preset, of a published shape, or of a folder, whose weights are not touched."""
    if plan.model in SHAPES:
        config = ModelConfig(**SHAPES[plan.model])
    elif plan.model in PRESETS:
        if not plan.vocab_size:
            raise InputError(f"--model {plan.model} has no vocabulary of its own: --vocab-size, such as 2048")
        config = ModelConfig(plan.vocab_size, **PRESETS[plan.model])
    else:
        folder = Path(plan.model)
        found = read_json(folder / "config.json")
        config = read_config(found, ()) if "model_type" in found else model_config(folder, found)
    if config.num_experts:
        raise InputError(f"--model {plan.model}: a mixture of experts cannot be planned yet")
    return config


# ---- What to switch on


def switched(plan: Plan) -> Iterator[Plan]:
    """The same run with switches; those that are named last here change first."""
    halves = [max(1, plan.pairs_at_once >> n) for n in range(plan.pairs_at_once.bit_length())]
    return (
        replace(
            plan, lora_rank=rank, shard=shard, checkpoint_activations=again, micro_batch_size=pairs,
            fused_attention=fused, reference=reference,
        )
        for rank in dict.fromkeys([plan.lora_rank, plan.lora_rank or 16])
        for shard in sorted({plan.shard, plan.gpus > 1})
        for again in sorted({plan.checkpoint_activations, True})
        for pairs in halves
        for fused in sorted({plan.fused_attention, plan.device == "cuda"})
        for reference in dict.fromkeys([plan.reference, "cached"])
    )  # fmt: skip


def cheapest_that_fits(config: ModelConfig, plan: Plan) -> Plan | None:
    """The fastest that fits, of equally fast ones the first; adapters, another training, after all others.

    A cached reference is no faster here: in one epoch it costs before the first step what it saves later.
    """

    def cost(one: Plan) -> tuple[int, float]:
        live = replace(one, reference="live")
        return one.lora_rank, step_seconds(config, make_stream(live), live)

    return min((one for one in switched(plan) if needed(config, one) <= one.memory), key=cost, default=None)


def needed(config: ModelConfig, plan: Plan) -> float:
    """GiB at the peak."""
    return sum(peak(config, make_stream(plan), plan)[1].values()) / GIB


def more_gpus(plan: Plan) -> Iterator[Plan]:
    """The same run on two, four, eight … GPUs, with all that saves memory and leaves the run what it is."""
    gpus = 1
    while (gpus := 2 * gpus) <= MOST_GPUS:
        if gpus > plan.gpus:
            yield replace(
                plan, gpus=gpus, batch_size=max(plan.batch_size, gpus), micro_batch_size=1, shard=True,
                checkpoint_activations=True, fused_attention=plan.device == "cuda", reference="cached",
            )  # fmt: skip


def flags(plan: Plan) -> str:
    """What train_dpo.py is to be told."""
    said = f"--batch-size {plan.batch_size} --micro-batch-size {plan.pairs_at_once}"
    said += f" --precision {plan.precision} --layout {plan.layout} --reference {plan.reference}"
    said += " --fused-attention" * plan.fused_attention
    said += " --checkpoint-activations" * plan.checkpoint_activations + " --shard" * plan.shard
    return said + f" --lora-rank {plan.lora_rank}" * bool(plan.lora_rank)


# ---- What is said


def summary(config: ModelConfig, plan: Plan) -> str:
    """Parts and total of the peak, the step's time, and the flags."""
    stream = make_stream(plan)
    moment, parts = peak(config, stream, plan)
    total, seconds = sum(parts.values()) / GIB, step_seconds(config, stream, plan)
    tokens = len(stream.tokens) * plan.micro_batches * plan.gpus
    lines = [f"{part:<16}{size / GIB:10.2f} GiB" for part, size in parts.items() if size]
    lines.append(f"{'at the peak':<16}{total:10.2f} GiB of {plan.memory:g}: {moment}")
    lines.append(
        f"a step: {seconds:.3g} s for {step_flops(config, stream, plan) / 1e12:.3g} TFLOP a GPU, "
        f"{exchanged_bytes(config, plan) / 1e9:.3g} GB exchanged; {tokens / seconds:,.0f} tokens a second"
    )
    if plan.pairs:
        lines.append(f"{plan.pairs:,} pairs: {plan.pairs / plan.batch_size * seconds / 3600:,.1f} hours")
    return "\n".join([*lines, f"train_dpo.py {flags(plan)}"])


def main(arguments: list[str] | None = None) -> None:
    plan = parse(Plan, __doc__.split("\n")[0], arguments)
    config = read_shape(plan)
    print(f"{plan.model}, {plan.gpus} GPU(s)\n{summary(config, plan)}")
    if needed(config, plan) <= plan.memory:
        return
    fits = cheapest_that_fits(config, plan)
    if fits:
        print(f"\nDoes not fit. The cheapest that does:\n{summary(config, fits)}")
    if fits and fits.lora_rank == plan.lora_rank:
        return
    said = "Or" if fits else "Does not fit, but would"
    more = next((one for one in more_gpus(plan) if needed(config, one) <= one.memory), None)
    if more:
        print(f"\n{said} on {more.gpus} GPUs:\n{summary(config, more)}")
    elif not fits:
        print(f"\nDoes not fit, not on {MOST_GPUS} GPUs either")


if __name__ == "__main__":
    run_script(main)
