"""Helpers that the commands of this folder share: their flags, loading a model, reading its run."""

import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch

from dataset.jsonl import printable, read_values
from dataset.packing import LAYOUTS
from dataset.tokenizer import ChatTokenizer
from errors import require
from eval.words import tr
from model.config import PRESETS, ModelConfig
from model.transformer import Transformer
from model.weights import load_model, run_settings
from training import settings
from training.precision import Precision
from training.settings import SAMPLE, Flags, default_length, flag

LANGUAGES = {"en": "English", "zh": "Chinese"}
TASKS_SHOWN = 10


@dataclass
class PairFlags(Flags):
    """The flags of the commands that read preference pairs and compute them in batches."""

    data: str = flag("", "preference pairs: .jsonl or .json, also .gz")
    micro_batch_tokens: int = flag(8192, "most tokens in a forward; changes the speed, not the results")
    max_length: int = flag(0, "most tokens of prompt and response, longer pairs are dropped. 0: the run's")
    layout: str = flag("forked", "forked: both answers share the prompt; twin: each has its own", LAYOUTS)
    shape: str = flag("auto", settings.SHAPE_WHY)
    skip_bad: bool = flag(False, settings.SKIP_BAD_WHY)
    device: str = flag("auto", settings.DEVICE_WHY, settings.DEVICES)
    precision: str = flag("auto", "of the forward pass, as in training", settings.PRECISIONS)

    def __post_init__(self) -> None:
        self.at_least(1, "micro_batch_tokens")
        self.at_least(0, "max_length")


# ---- Models


def load_model_and_tokenizer(
    folder: str, device: torch.device, model_class: type[Transformer] = Transformer
) -> tuple[Transformer, ChatTokenizer]:
    """The frozen model of a folder, in evaluation mode, and its tokenizer.

    Raises `InputError` if one is missing, or if the tokenizer has more ids than the model has embeddings.
    """
    model = load_model(folder, device, model_class).eval().requires_grad_(False)
    tokenizer = ChatTokenizer(Path(folder) / "tokenizer.json")
    model.config.check_fits(tokenizer.vocab_size)
    return model, tokenizer


def load_policy_and_reference(
    folder: str, reference_folder: str, device: torch.device
) -> tuple[Transformer, Transformer, ChatTokenizer]:
    """The models of two folders, and their tokenizer. Raises `InputError` if the tokenizers differ."""
    policy, tokenizer = load_model_and_tokenizer(folder, device)
    reference, reference_tokenizer = load_model_and_tokenizer(reference_folder, device)
    both = f"{folder} and {reference_folder} have"
    require(tokenizer.fingerprint == reference_tokenizer.fingerprint, f"{both} different tokenizers")
    same = policy.config.vocab_size == reference.config.vocab_size
    require(same, f"{both} vocabularies of different sizes")
    return policy, reference, tokenizer


def print_start(models: dict[str, Transformer], device: torch.device, precision: str) -> None:
    """Print one line on standard error: parameters by folder, the device, the precision and its reason."""
    counts = {name: sum(weight.numel() for weight in model.parameters()) for name, model in models.items()}
    sizes = ", ".join(f"{name} ({count:,} parameters)" for name, count in counts.items())
    print_note(f"{sizes} on {device.type}, {precision}")


def generating(model: Transformer) -> torch.autocast:
    """The context in which a model generates answers: autocast to bf16 if its device multiplies bf16."""
    return Precision("auto", model.embed_tokens.weight.device).autocast()


def print_note(text: str) -> None:
    """Print text for the person at the terminal. Standard output is for results."""
    print(printable(text), file=sys.stderr, flush=True)


# ---- The run that trained a model


def length_limit(asked: int, folder: str | Path, config: ModelConfig) -> int:
    """--max-length; if that is 0, the limit of the model's run; else 4,096 tokens or what the model allows.

    Raises `InputError` if the limit exceeds the model's sliding window.
    """
    length = asked or run_settings(folder).get("max_length")
    if not isinstance(length, int) or length < 1:
        length = default_length(config)
    config.check_fits(length=length)
    return length


def starting_model(folder: str, flag_name: str) -> str:
    """The model folder that a run started from: --model of its settings, relative to the current folder.

    Raises `InputError`, naming the flag to give instead, if the settings name no folder that exists here.
    """
    start = str(run_settings(folder).get("model") or "")
    named = start and (start not in PRESETS or Path(start).is_dir())
    reason = f"{folder}: its config.json does not name a model folder that it started from; give {flag_name}"
    require(named, reason)
    adapter = run_settings(folder).get("adapter")
    advice = f"give {flag_name}, a folder with both merged"
    require(not adapter, f"{folder} started from {start} with the adapter {adapter}; {advice}")
    absent = f"{folder} started from {start}, and that folder is not here; give {flag_name}"
    require(Path(start).is_dir(), absent)
    return start


def reference_of(folder: str) -> str:
    """The reference of the run that trained a model: its --reference-model, or the model it started from."""
    return str(run_settings(folder).get("reference_model") or starting_model(folder, "--reference"))


def is_bundled(path: str | Path) -> bool:
    """Whether a data file belongs to the data that comes with this project."""
    return Path(path).resolve().parent == SAMPLE


def describe_training(folder: str | Path) -> str:
    """One line: the data that a model was trained on and the model it started from; "" without a record."""
    run = run_settings(folder)
    if not run.get("data"):
        return ""
    data, start = Path(str(run["data"])), run.get("model")
    line = f"{folder}: " + tr("trained on {data}", data=data.name)
    if count := count_lines(data):
        line += tr(" ({count} records)", count=f"{count:,}")
    if is_bundled(data):
        line += f": {bundled_tasks()}"
    return line + (tr("; started from {model}", model=start) if start and start not in PRESETS else "")


def count_lines(path: Path) -> int:
    """Lines of a .jsonl file; 0 for other names or a missing file."""
    if path.suffix != ".jsonl" or not path.is_file():
        return 0
    with open(path, "rb") as file:
        return sum(1 for _ in file)


def bundled_tasks() -> str:
    """``sum, capital, … in English and Chinese``: the tasks of the bundled data, the most frequent first."""
    judges = [record["judge"] for _, record in read_values(SAMPLE / "heldout.jsonl")]
    tasks = [task for task, _ in Counter(judge["task"] for judge in judges).most_common()]
    languages = [name for code, name in LANGUAGES.items() if any(j["language"] == code for j in judges)]
    few = ", ".join(tasks[:TASKS_SHOWN])
    if len(tasks) > TASKS_SHOWN:
        few += tr(" and {count} more tasks", count=len(tasks) - TASKS_SHOWN)
    return tr("{tasks} in {languages}", tasks=few, languages=tr(" and ").join(map(tr, languages)))
