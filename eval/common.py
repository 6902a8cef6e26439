"""Helpers that the commands of this folder share: load a model, read its run, print and write results."""

import json
import sys
from collections import Counter
from pathlib import Path

import torch

from dataset.jsonl import printable, read_values
from dataset.tokenizer import ChatTokenizer
from errors import InputError
from files import write_whole
from model.config import PRESETS, ModelConfig
from model.transformer import Transformer
from model.weights import load_model, read_json, require_folder
from training.settings import SAMPLE, default_length

DEVICES = ("auto", "cuda", "mps", "cpu")
DEVICE_WHY = "auto takes CUDA, then Apple's MPS, then the CPU"
LANGUAGES = {"en": "English", "zh": "Chinese"}
TASKS_SHOWN = 10


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
    if tokenizer.fingerprint != reference_tokenizer.fingerprint:
        raise InputError(f"{folder} and {reference_folder} have different tokenizers")
    if policy.config.vocab_size != reference.config.vocab_size:
        raise InputError(f"{folder} and {reference_folder} have vocabularies of different sizes")
    return policy, reference, tokenizer


def print_start(models: dict[str, Transformer], device: torch.device, precision: str) -> None:
    """Print one line on standard error: parameters by folder, the device, the precision and its reason."""
    sizes = [f"{name} ({count_parameters(model):,} parameters)" for name, model in models.items()]
    print_note(f"{', '.join(sizes)} on {device.type}, {precision}")


def count_parameters(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def print_note(text: str) -> None:
    """Print text for the person at the terminal. Standard output is for results."""
    print(printable(text), file=sys.stderr, flush=True)


# ---- The run that trained a model


def run_settings(folder: str | Path) -> dict:
    """The settings of the run that wrote a model folder; {} for a folder from Hugging Face.

    Raises `InputError` if the folder is missing or has no readable config.json.
    """
    require_folder(Path(folder))
    settings = read_json(Path(folder) / "config.json").get("settings")
    return settings if isinstance(settings, dict) else {}


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
    if not start or (start in PRESETS and not Path(start).is_dir()):
        raise InputError(
            f"{folder}: its config.json does not name a model folder that it started from; give {flag_name}"
        )
    if not Path(start).is_dir():
        raise InputError(f"{folder} started from {start}, and that folder is not here; give {flag_name}")
    return start


def is_bundled(path: str | Path) -> bool:
    """Whether a data file belongs to the data that comes with this project."""
    return Path(path).resolve().parent == SAMPLE


def describe_training(folder: str | Path) -> str:
    """One line: the data that a model was trained on and the model it started from; "" without a record."""
    run = run_settings(folder)
    if not run.get("data"):
        return ""
    data, start = Path(str(run["data"])), run.get("model")
    line = f"{folder}: trained on {data.name}"
    if count := count_lines(data):
        line += f" ({count:,} records)"
    if is_bundled(data):
        line += f": {bundled_tasks()}"
    return line + (f"; started from {start}" if start and start not in PRESETS else "")


def count_lines(path: Path) -> int:
    """Lines of a .jsonl file; 0 for other names or a missing file."""
    if path.suffix != ".jsonl" or not path.is_file():
        return 0
    with open(path, "rb") as file:
        return sum(block.count(b"\n") for block in iter(lambda: file.read(1 << 20), b""))


def bundled_tasks() -> str:
    """``sum, capital, … in English and Chinese``: the tasks of the bundled data, the most frequent first."""
    judges = [record["judge"] for _, record in read_values(SAMPLE / "heldout.jsonl")]
    tasks = [task for task, _ in Counter(judge["task"] for judge in judges).most_common()]
    languages = [name for code, name in LANGUAGES.items() if any(j["language"] == code for j in judges)]
    more = f" and {len(tasks) - TASKS_SHOWN} more tasks" if len(tasks) > TASKS_SHOWN else ""
    return f"{', '.join(tasks[:TASKS_SHOWN])}{more} in {' and '.join(languages)}"


# ---- Flags and figures


def require(holds: bool, name: str, value, rule: str) -> None:
    """Raise `InputError` unless the value of a flag is valid. NaN fails every comparison."""
    if not holds:
        raise InputError(f"{name} {rule}, not {value}")


def write_json(path: str | Path, figures: dict) -> None:
    """Write figures to a JSON file. Creates its folder if necessary."""
    text = json.dumps(figures, indent=2, ensure_ascii=False) + "\n"
    write_file(path, lambda file: file.write(text.encode("utf-8", "backslashreplace")))


def write_file(path: str | Path, write) -> None:
    """Call ``write(file)`` on a binary file that appears at `path` only when it is complete.

    Creates the folder if necessary. Raises `InputError` if the disk refuses.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror})") from None
    write_whole(path, write)
