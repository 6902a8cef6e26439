"""One dataclass of settings per script: its fields are the flags, docs/FLAGS.md and ``config.json``."""

import argparse
import math
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
TRACKERS = ("none", "tensorboard", "wandb", "swanlab")
LONGEST = 4096  # tokens of a record, where --max-length is 0
DEVICES, PRECISIONS = ("auto", "cuda", "mps", "cpu"), ("auto", "fp32", "bf16", "fp16")
DEVICE_WHY = "auto: CUDA, else Apple's MPS, else the CPU"
SHAPE_WHY = "data format (see dataset/formats.py); auto detects it from the first record"
FILES_WHY = (
    ".jsonl or .json, also .gz, .parquet, .csv; several files, folders and patterns; FILE:0.7 FILE:0.3 mixes "
    "them in this proportion"
)
SEVERAL_WHY = "several files as NAME=FILE; empty: none"
SKIP_BAD_WHY = "skip bad records (at most 1 %) instead of stopping at the first"
REPLACED = {
    "--micro-batch-size": "--micro-batch-tokens (tokens in a forward, instead of records)",
    "--score": "python -m eval.score --model DIR --data FILE --out FILE",
}


def default_length(config: ModelConfig) -> int:
    """4,096 tokens, or fewer if the model has fewer positions or a shorter attention window."""
    return min(LONGEST, config.max_position_embeddings, config.sliding_window or LONGEST)


def flag(default, why: str, choices: tuple[str, ...] | None = None, several: bool = False):
    """A field of a settings class: its default, its help text in one line, and the allowed values.

    With `several` the flag takes one or more values: one is kept as text, more as a tuple.
    """
    return field(default=default, metadata={"why": why, "choices": choices, "several": several})


def each(value: str | tuple[str, ...]) -> list[str]:
    """The values of a flag that takes several; none if it is empty."""
    return [value] if isinstance(value, str) and value else list(value)


class Flags:
    """The checks that the settings of all commands share. NaN fails every comparison."""

    def require(self, holds: bool, name: str, rule: str) -> None:
        """Raise `InputError` about the flag of a field unless `holds`."""
        if not holds:
            raise InputError(f"--{name.replace('_', '-')} must be {rule}, not {getattr(self, name)}")

    def at_least(self, smallest: int, *names: str) -> None:
        """Raise `InputError` for the first of these fields that is infinite or less than `smallest`."""
        for name in names:
            self.require(smallest <= getattr(self, name) < math.inf, name, f"at least {smallest}")


@dataclass
class TrainSettings(Flags):
    """The flags of all training scripts. A script adds its own and changes defaults."""

    model: str = flag("tiny", "model folder to start from")
    data: str | tuple[str, ...] = flag("", f"training data: {FILES_WHY}", several=True)
    eval_data: str | tuple[str, ...] = flag(
        "", f"held-out data, evaluated every --eval-every steps; {SEVERAL_WHY}", several=True
    )
    eval_share: float = flag(0.0, "share of the prompts of --data that is held out and evaluated; 0: none")
    out: str = flag("", "run folder for config, weights, tokenizer, metrics and checkpoints")
    shape: str = flag("auto", SHAPE_WHY)
    skip_bad: bool = flag(False, SKIP_BAD_WHY)
    seed: int = flag(0, "seed of the data order and of a new model's weights")
    device: str = flag("auto", DEVICE_WHY, DEVICES)
    precision: str = flag(
        "auto", "forward pass; auto: bf16 on hardware with bf16, fp16 on other GPUs, else fp32", PRECISIONS
    )
    matmul_precision: str = flag(
        "highest", "float32 matrix products: high may use TF32, medium bf16", ("highest", "high", "medium")
    )
    checkpoint_activations: bool = flag(False, "recompute layers in backward: less memory, a third more time")
    fused_attention: bool = flag(False, "one FlexAttention call per layer, not one per block; CUDA only")
    compile: bool = flag(False, "torch.compile each layer, a minute at the start; for GPUs and bf16")
    shard: bool = flag(False, "split weights, gradients and optimizer state among the ranks (FSDP2)")
    epochs: int = flag(1, "passes over the training data")
    max_steps: int = flag(0, "stop after this number of optimizer steps; 0: after --epochs")
    batch_size: int = flag(32, "records per optimizer step, over all ranks and micro-batches")
    micro_batch_tokens: str = flag(
        "auto", "maximum tokens per forward on each rank; a longer record is alone; auto: as many as fit"
    )
    max_length: int = flag(
        0, "maximum tokens of a record; longer ones are dropped and counted. 0: 4,096, or the model's limit"
    )
    lr: float = flag(1e-3, "peak learning rate")
    warmup_steps: int = flag(10, "steps of linear warm-up before the cosine")
    weight_decay: float = flag(0.0, "weight decay of AdamW, on matrices only")
    grad_clip: float = flag(1.0, "maximum gradient norm; 0: no clipping")
    log_every: int = flag(10, "optimizer steps between rows of metrics.jsonl")
    eval_every: int = flag(100, "optimizer steps between evaluations on --eval-data")
    save_every: int = flag(500, "optimizer steps between checkpoints; 0: only when a signal stops the run")
    keep_checkpoints: int = flag(2, "number of newest checkpoints to keep, in case one is damaged")
    keep_best: str = flag(
        "",
        "held-out metric, such as eval_rewards/accuracies: OUT/best keeps the weights with its best value "
        "(lowest for a loss, else highest)",
    )
    track: str = flag("none", "tracker that also gets the rows of metrics.jsonl; needs its package", TRACKERS)
    overwrite: bool = flag(False, "replace the run that --out contains, finished or stopped")
    resume: bool = flag(False, "continue from the newest valid checkpoint in --out, or start if it has none")
    override: str = flag("", "settings that --resume may change, by name and separated by commas: lr,data")

    def __post_init__(self) -> None:
        """Raise `InputError` for a value outside its range."""
        self.at_least(1, "epochs", "batch_size", "log_every", "eval_every", "keep_checkpoints")
        self.at_least(0, "max_steps", "max_length", "lr", "warmup_steps", "weight_decay", "grad_clip")
        self.at_least(0, "save_every")
        self.require(self.keep_best[:5] in ("", "eval_"), "keep_best", "a metric that begins with eval_")
        self.require(0 <= self.seed < 2**63, "seed", "from 0 to 2^63 - 1")
        self.require(0 <= self.eval_share < 1, "eval_share", "at least 0 and below 1")
        tokens = self.micro_batch_tokens
        is_number = tokens.isdecimal() and int(tokens) > 0
        self.require(is_number or tokens == "auto", "micro_batch_tokens", "auto, or a number from 1")

    def to_dict(self) -> dict:
        return asdict(self)

    def length_limit(self, config: ModelConfig) -> int:
        """The most tokens of a record: --max-length, or `default_length` where that is 0."""
        return self.max_length or default_length(config)


@dataclass
class AdapterSettings(TrainSettings):
    """The further flags of the scripts that train a language model."""

    lora_rank: int = flag(0, "rank of the adapters to train (LoRA); 0: train all weights")
    lora_alpha: float = flag(32.0, "adapter output is scaled by alpha / rank")
    lora_targets: str = flag("all", "layers with an adapter: all (linear) layers, or names: q_proj,v_proj")
    optimizer: str = flag(
        "auto",
        "adamw, or muon: Muon for the matrices of the layers, AdamW for the rest. auto: muon for a new model "
        "and for a model that muon trained, without --shard and adapters; else adamw",
        ("auto", "adamw", "muon"),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.at_least(0, "lora_rank")
        self.require(0 < self.lora_alpha < math.inf, "lora_alpha", "above 0")
        self.require(self.optimizer != "muon" or not self.shard, "optimizer", "adamw beside --shard")


@dataclass
class StartAdapterSettings(AdapterSettings):
    """The further flags of a script that can start with an adapter from a file."""

    adapter: str = flag("", "peft folder: a LoRA adapter of --model, with which policy and reference start")
    merge_adapter: bool = flag(False, "merge --adapter into the weights first, then train as without it")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.merge_adapter and not self.adapter:
            raise InputError("--merge-adapter merges the adapter of --adapter, which is not given")
        if self.adapter and self.lora_rank and not self.merge_adapter:
            advice = "leave out --lora-rank to train it, or add --merge-adapter to train a new one"
            raise InputError(f"--adapter {self.adapter} has its own rank, targets and alpha: {advice}")


def trains_adapters(settings) -> bool:
    """Whether a run trains adapters: those of --lora-rank or that of --adapter."""
    continued = getattr(settings, "adapter", "") and not settings.merge_adapter
    return bool(continued or getattr(settings, "lora_rank", 0))


LARGE = 100_000_000  # weights


def learning_rate_advice(settings: TrainSettings, weights: int) -> str:
    """A line of advice if a model of more than 100 million weights trains with the default --lr; else ""."""
    default = type(settings).lr
    if weights <= LARGE or settings.lr != default or trains_adapters(settings):
        return ""
    advice = "try --lr 5e-6 for preferences, --lr 2e-5 for supervised fine-tuning"
    return f"--lr {default:g} is for models of a few million weights; this model has {weights:,}: {advice}"


@dataclass
class PairSettings(TrainSettings):
    """The flags of the scripts that train on preference pairs."""

    data: str | tuple[str, ...] = flag(
        str(SAMPLE / "preferences.jsonl"), f"preference pairs: {FILES_WHY}", several=True
    )
    eval_data: str | tuple[str, ...] = flag(
        "auto", f"held-out pairs; {SEVERAL_WHY}; auto: the bundled ones of the bundled --data", several=True
    )
    swap_by_score: bool = flag(False, "exchange the sides of a pair whose rejected side has the higher score")
    layout: str = flag("forked", "forked: both answers share the prompt; twin: each has its own", LAYOUTS)


class OneLineParser(argparse.ArgumentParser):
    def error(self, message: str):
        raise InputError(f"{message} (see {self.prog} --help)")


def parse(settings_class: type, description: str, arguments: list[str] | None = None):
    """The settings of a command line: ``--batch-size 8`` sets `batch_size`, ``--x`` and ``--no-x`` a bool."""
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
        if f.metadata["several"]:
            options["nargs"] = "+"
        parser.add_argument(f"--{f.name.replace('_', '-')}", **options)
    given = sys.argv[1:] if arguments is None else arguments
    for old, new in REPLACED.items():
        if any(argument == old or argument.startswith(f"{old}=") for argument in given):
            raise InputError(f"{old} was replaced by {new}")
    values = vars(parser.parse_args(arguments))
    for name, value in values.items():
        if isinstance(value, list):
            values[name] = value[0] if len(value) == 1 else tuple(value)
    return settings_class(**values)
