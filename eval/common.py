"""What the scripts of this folder share: loading a model, checking a flag, writing figures."""

import json
from pathlib import Path

import torch

from dataset.tokenizer import ChatTokenizer
from errors import InputError
from model.transformer import Transformer
from model.weights import load_model

DEVICES = ("auto", "cuda", "mps", "cpu")
DEVICE_WHY = "auto takes CUDA, then Apple's MPS, then the CPU"


def load_speaker(folder: str, device: torch.device) -> tuple[Transformer, ChatTokenizer]:
    """A model folder's model, not to be trained, and its tokenizer; `InputError` when either is missing."""
    model = load_model(folder, device).eval().requires_grad_(False)
    tokenizer = ChatTokenizer(Path(folder) / "tokenizer.json")
    model.config.check_fits(tokenizer.vocab_size)
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
