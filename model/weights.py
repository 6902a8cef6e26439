"""Model folders: ``config.json`` says the shape, ``model.pt`` holds the weights. Nothing is unpickled."""

import hashlib
import json
import os
from pathlib import Path

import torch

from errors import InputError
from model.transformer import ModelConfig, Transformer


def save_model(folder: Path, model: Transformer, **settings) -> None:
    """Write the weights as they are, bit for bit, and the config; `settings` are kept beside the shape."""
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / "model.pt", lambda file: torch.save(model.state_dict(), file))
    config = {"kind": model.kind, "model": model.config.to_dict(), **settings}
    write_whole(
        folder / "config.json", lambda file: file.write(json.dumps(config, indent=2).encode() + b"\n")
    )


def write_whole(path: Path, write) -> None:
    """Write beside, sync, rename: at no moment is there half a file under the final name."""
    unfinished = path.with_name(path.name + ".tmp")
    with open(unfinished, "wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(unfinished, path)


def weights_hash(model: torch.nn.Module) -> str:
    """SHA-256 of all weights with their names, types and shapes."""
    digest = hashlib.sha256()
    for name, value in model.state_dict().items():
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.contiguous().view(-1).view(torch.uint8).cpu().numpy())
    return digest.hexdigest()


def load_model(folder: str | Path, device="cpu", model_class: type[Transformer] = Transformer) -> Transformer:
    """The model of a run folder, with every weight accounted for.

    Raises `InputError` when the folder is none or holds another kind of model, or its weights do not fit its
    config.
    """
    folder = Path(folder)
    config = model_config(folder, model_class.kind)
    try:
        weights = torch.load(folder / "model.pt", map_location=device, weights_only=True)
    except FileNotFoundError:
        raise InputError(f"{folder}: there is a config.json but no model.pt; did training finish?") from None
    except Exception as error:  # torch.load raises many kinds for a damaged or hostile file.
        raise InputError(
            f"{folder / 'model.pt'}: unreadable ({str(error).partition(chr(10))[0] or 'it is empty'})"
        ) from None
    with torch.device("meta"):
        model = model_class(config)
    model.to_empty(device=device)
    try:
        model.load_state_dict(weights, strict=True)
    except RuntimeError as error:
        raise InputError(f"{folder}: the weights do not fit config.json: {error}") from None
    return model


def model_config(folder: Path, kind: str) -> ModelConfig:
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        shape, found = ModelConfig(**config["model"]), config.get("kind", Transformer.kind)
    except FileNotFoundError:
        raise InputError(f"{folder}: no model folder (it has no config.json)") from None
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{folder / 'config.json'}: not the config of a model ({error})") from None
    if found != kind:
        raise InputError(
            f"{folder} holds a {found}, not a {kind}: train_sft.py and train_dpo.py make language models, "
            "train_reward.py makes reward models"
        )
    return shape
