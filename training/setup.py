"""What the training scripts do before their loops: load a model, open data, describe the run in a line."""

import re
from collections.abc import Callable
from pathlib import Path

import torch

from dataset.mismatched import mismatched
from dataset.mixture import data_files, join, split_weight
from dataset.store import TokenStore, open_store
from dataset.tokenizer import ChatTokenizer
from errors import InputError, require
from model.config import PRESETS
from model.lora import add_adapters, merge_adapters
from model.peft import add_adapter
from model.transformer import Transformer
from model.weights import load_model, run_settings
from training.distributed import World, first_device
from training.muon import MuonWithAdamW
from training.precision import Precision
from training.schedule import adamw
from training.settings import (
    SAMPLE,
    AdapterSettings,
    TrainSettings,
    each,
    learning_rate_advice,
    trains_adapters,
)


def load_policy(settings: AdapterSettings, world: World) -> tuple[Transformer, ChatTokenizer, int]:
    """The model of --model, with adapters if a flag gives some; its tokenizer; the longest record."""
    model = load_model(settings.model, first_device(world, settings.shard))
    tokenizer = ChatTokenizer(Path(settings.model) / "tokenizer.json")
    return model, tokenizer, prepare(model, tokenizer, settings, world)


def prepare(model: Transformer, tokenizer: ChatTokenizer, settings: TrainSettings, world: World) -> int:
    """Check that model and tokenizer fit; apply the flags that change the model; return the longest record.

    That is --max-length in tokens, or what the model allows. Raises `InputError` if something does not fit.
    """
    max_length = settings.length_limit(model.config)
    model.config.check_fits(tokenizer.vocab_size, max_length)
    model.checkpoint_activations = settings.checkpoint_activations
    if settings.fused_attention:
        model.fuse_attention(world.device)
    if folder := getattr(settings, "adapter", ""):
        add_adapter(model, folder)
        if settings.merge_adapter:
            merge_adapters(model)
    if getattr(settings, "lora_rank", 0):
        add_adapters(model, settings.lora_rank, settings.lora_alpha, settings.lora_targets, settings.seed)
    return max_length


def make_optimizer(
    settings: AdapterSettings, model: Transformer, precision: Precision
) -> torch.optim.Optimizer:
    """The optimizer of --optimizer. The choice of `auto` replaces it, so that config.json keeps it.

    Muon stays with a model: AdamW's steps of the same size disturb weights that Muon has trained (see "What
    was tried" in docs/RESULTS.md).
    """
    if settings.optimizer == "auto":
        whole = not settings.shard and not trains_adapters(settings)
        settings.optimizer = "muon" if whole and trained_by_muon(settings.model) else "adamw"
    if settings.optimizer == "adamw":
        return adamw(model, settings.weight_decay)
    dtype = torch.bfloat16 if precision.name == "bf16" else torch.float32
    return MuonWithAdamW(model, settings.weight_decay, dtype)


def trained_by_muon(model: str) -> bool:
    """Whether the model is new, or a folder whose run used Muon."""
    return model in PRESETS or run_settings(model).get("optimizer") == "muon"


def open_data(
    settings: TrainSettings,
    kind: str,
    tokenizer: ChatTokenizer,
    max_length: int,
    world: World,
    check: Callable[[TokenStore, str], str] = lambda store, path: "",
) -> tuple[TokenStore, dict[str, TokenStore]]:
    """The training data, and the held-out sets by name. `kind` is a key of `dataset.records.READERS`.

    Held out are the files of --eval-data; or, with --eval-share, that share of the prompts of --data.
    `check` raises `InputError` for a store that the objective cannot use, and returns a line of advice or "".
    """

    def open_file(path: str) -> TokenStore:
        options = max_length, settings.shape, settings.skip_bad, getattr(settings, "swap_by_score", False)
        store = world.node_first(lambda: open_store(path, kind, tokenizer, *options))
        advice = check(store, path)
        world.print(f"{path}: {store.report}")
        if advice:
            world.print(advice)
        return store

    def open_all(path: str) -> TokenStore:
        return join({file: open_file(file) for file in data_files(path)})

    def open_weighted(values: list[str]) -> TokenStore:
        paths, weights = zip(*map(split_weight, values or [""]), strict=True)
        require(len({*paths}) == len(paths), "--data names one file twice; weights, FILE:2, repeat rows")
        return join({path: open_all(path) for path in paths}, list(weights))

    settings.eval_data = held_out_data(settings)  # as config.json keeps it
    files = named_files(settings.eval_data)
    is_evaluated = bool(files or settings.eval_share)
    require(is_evaluated or not settings.keep_best, "--keep-best needs --eval-data or --eval-share")
    data = open_weighted(each(settings.data))
    held_out = {name: open_all(path) for name, path in files.items()}
    if settings.eval_share:
        data, held_out[""] = data.split(settings.eval_share)
    if kind == "feedback":
        for store in (data, *held_out.values()):
            mismatched(store)
    return data, held_out


def held_out_data(settings: TrainSettings) -> str | tuple[str, ...]:
    """The value of --eval-data; "" for none. ``auto`` is the bundled file beside the bundled pairs."""
    if settings.eval_data != "auto":
        if settings.eval_data and settings.eval_share:
            raise InputError("--eval-data names held-out data and --eval-share splits it off: choose one")
        return settings.eval_data
    bundled = [Path(path).resolve() for path in each(settings.data)] == [SAMPLE / "preferences.jsonl"]
    return str(SAMPLE / "heldout.jsonl") if bundled and not settings.eval_share else ""


def named_files(eval_data: str | tuple[str, ...]) -> dict[str, str]:
    """The files of --eval-data by name; a file without a name has the name "", which one file may have.

    A path that exists is a path, also with an equals sign.
    """
    files: dict[str, str] = {}
    for entry in each(eval_data):
        name, equals, path = entry.partition("=")
        if not equals or not re.fullmatch(r"[\w.-]+", name) or Path(entry).exists():
            name, path = "", entry
        advice = f"has the name of another one ({name})" if name else "needs a name of its own: NAME=FILE"
        require(name not in files, f"--eval-data {entry}: a held-out set {advice}")
        files[name] = path
    return files


def describe_run(
    settings: TrainSettings, world: World, precision: Precision, model: Transformer, objective: str
) -> None:
    """Print one line: device, precision and its reason, parameters, objective; and advice on --lr if any."""
    weights = list(model.parameters())
    total = sum(weight.numel() for weight in weights)
    trained = sum(weight.numel() for weight in weights if weight.requires_grad)
    adapters = f", {trained:,} of them trained" if trained < total else ""
    world.print(f"{world.device.type}, {precision.reason}; {total:,} parameters{adapters}; {objective}")
    if advice := learning_rate_advice(settings, total):
        world.print(advice)
