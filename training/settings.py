"""One dataclass of settings a script: its fields are the flags, the README's table and ``config.json``."""

import argparse
import sys
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from types import NoneType
from typing import get_args, get_type_hints

from dataset.packing import LAYOUTS
from errors import InputError
from model.config import ModelConfig

ROOT = Path(__file__).resolve().parent.parent
SAMPLE = ROOT / "dataset" / "sample"
LONGEST = 4096  # tokens of a record, where --max-length is 0
REPLACED = {"--micro-batch-size": "--micro-batch-tokens (tokens in a forward, instead of records)"}


def default_length(config: ModelConfig) -> int:
    """4,096 tokens, or fewer if the model has fewer positions or a shorter attention window."""
    return min(LONGEST, config.max_position_embeddings, config.sliding_window or LONGEST)


def flag(default, why: str, choices: tuple[str, ...] | None = None):
    """A field of a settings class: its default, one line on why it is there, and what it may be."""
    return field(default=default, metadata={"why": why, "choices": choices})


@dataclass
class TrainSettings:
    """What every training script asks. A script adds its own and gives its own defaults."""

    model: str = flag("tiny", "model folder to start from")
    data: str = flag("", "training data: .jsonl or .json, also .gz")
    eval_data: str = flag("", "held-out data, evaluated every --eval-every steps; empty: none")
    eval_share: float = flag(0.0, "share of the prompts of --data to hold out and evaluate instead; 0: none")
    out: str = flag("", "run folder: config, weights, tokenizer, metrics, checkpoints")
    shape: str = flag("auto", "force how records are read (see dataset/records.py); auto looks at the first")
    skip_bad: bool = flag(False, "leave bad records out (at most 1 %) instead of stopping at the first")
    seed: int = flag(0, "of the data order and of a fresh model's weights")
    device: str = flag(
        "auto", "auto takes CUDA, then Apple's MPS, then the CPU", ("auto", "cuda", "mps", "cpu")
    )
    precision: str = flag(
        "auto",
        "of the forward pass; weights stay float32. auto: bf16 if the hardware has it",
        ("auto", "fp32", "bf16", "fp16"),
    )
    matmul_precision: str = flag(
        "highest",
        "of float32 products: high may use TF32, medium bf16, where that is faster",
        ("highest", "high", "medium"),
    )
    checkpoint_activations: bool = flag(
        False, "compute each layer again in backward instead of keeping it: less memory, a third more time"
    )
    fused_attention: bool = flag(
        False, "on CUDA: one FlexAttention call a layer, compiled at the first step, not one a block"
    )
    compile: bool = flag(
        False, "let torch.compile fuse a layer's small operations: a minute at the start, for GPUs and bf16"
    )
    shard: bool = flag(
        False, "split weights, gradients and optimizer state among the ranks (FSDP2), instead of a copy each"
    )
    epochs: int = flag(1, "times every record is seen")
    max_steps: int = flag(0, "stop after this many optimizer steps; 0 for all of --epochs")
    batch_size: int = flag(32, "records per optimizer step, over all ranks and micro-batches")
    micro_batch_tokens: str = flag(
        "auto",
        "most tokens in a forward on each rank (a longer record is alone); fewer need less memory",
    )
    max_length: int = flag(
        0,
        "most tokens of prompt and response; longer records are dropped and counted. "
        "0: 4,096, or fewer where the model has fewer positions",
    )
    lr: float = flag(1e-3, "peak learning rate")
    warmup_steps: int = flag(10, "steps of linear warm-up before the cosine")
    weight_decay: float = flag(0.0, "AdamW's, on matrices only")
    grad_clip: float = flag(1.0, "longest gradient norm; 0 to leave it alone")
    log_every: int = flag(10, "optimizer steps between rows of metrics.jsonl")
    eval_every: int = flag(100, "optimizer steps between evaluations on --eval-data")
    save_every: int = flag(500, "optimizer steps between checkpoints; 0 saves only when a signal stops it")
    keep_checkpoints: int = flag(2, "newest checkpoints to keep: a damaged one falls back to an older one")
    overwrite: bool = flag(False, "replace the run that --out contains, finished or stopped")
    resume: bool = flag(False, "go on from the newest valid checkpoint in --out; begin if it has none")
    override: str = flag("", "settings in which --resume may differ from the checkpoint, by name: lr,data")

    def __post_init__(self) -> None:
        """Refuse values that no run can mean."""
        counts = ("epochs", "batch_size", "log_every", "eval_every")
        for name in (*counts, "keep_checkpoints"):
            if getattr(self, name) < 1:
                raise InputError(f"--{name.replace('_', '-')} must be at least 1, not {getattr(self, name)}")
        tokens = self.micro_batch_tokens
        if tokens != "auto" and not (tokens.isdecimal() and int(tokens)):
            raise InputError(f"--micro-batch-tokens must be auto or a number of at least 1, not {tokens}")
        if not 0 <= self.eval_share < 1:
            raise InputError(f"--eval-share must be at least 0 and below 1, not {self.eval_share}")
        others = "max_steps", "max_length", "lr", "warmup_steps", "weight_decay", "grad_clip", "save_every"
        for name in others:
            if not getattr(self, name) >= 0:
                raise InputError(
                    f"--{name.replace('_', '-')} must not be negative, nor {getattr(self, name)}"
                )

    def to_dict(self) -> dict:
        return asdict(self)

    def length_limit(self, config: ModelConfig) -> int:
        """The most tokens of a record: --max-length, or `default_length` where that is 0."""
        return self.max_length or default_length(config)


@dataclass
class AdapterSettings(TrainSettings):
    """What the scripts that train a language model also ask."""

    lora_rank: int = flag(0, "train adapters of this rank and leave the model as it is; 0 trains all weights")
    lora_alpha: float = flag(32.0, "what an adapter says counts alpha / rank times")
    lora_targets: str = flag("all", "layers with an adapter: all linear ones, or names such as q_proj,v_proj")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.lora_rank < 0:
            raise InputError(f"--lora-rank must not be negative, nor {self.lora_rank}")
        if not self.lora_alpha > 0:
            raise InputError(f"--lora-alpha must be above 0, not {self.lora_alpha}")


@dataclass
class PairSettings(TrainSettings):
    """The flags of the scripts that train on preference pairs."""

    data: str = flag(str(SAMPLE / "preferences.jsonl"), "preference pairs: .jsonl or .json, also .gz")
    eval_data: str = flag(
        "auto", "held-out pairs; empty: none; auto: the bundled ones beside the bundled --data"
    )
    swap_by_score: bool = flag(False, "exchange the sides of a pair whose rejected side has the higher score")
    layout: str = flag(
        "forked", "forked: a prompt is computed once for both answers; twin: once for each", LAYOUTS
    )


class OneLineParser(argparse.ArgumentParser):
    def error(self, message: str):
        raise InputError(f"{message} (see {self.prog} --help)")


def parse(settings_class: type, description: str, arguments: list[str] | None = None):
    """Command line to settings: ``--batch-size 8`` sets `batch_size`, ``--x`` and ``--no-x`` set a bool."""
    parser = OneLineParser(
        description=description, allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    types = get_type_hints(settings_class)
    for f in fields(settings_class):
        options = {"default": f.default, "help": f.metadata["why"].replace("%", "%%")}
        kind = next((t for t in get_args(types[f.name]) if t is not NoneType), types[f.name])
        if kind is bool:
            options["action"] = argparse.BooleanOptionalAction
        else:
            options |= {"type": kind, "choices": f.metadata["choices"]}
        parser.add_argument(f"--{f.name.replace('_', '-')}", **options)
    given = sys.argv[1:] if arguments is None else arguments
    for old, new in REPLACED.items():
        if any(argument == old or argument.startswith(f"{old}=") for argument in given):
            raise InputError(f"{old} was replaced by {new}")
    return settings_class(**vars(parser.parse_args(arguments)))
