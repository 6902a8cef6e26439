"""Model folders, ours and Hugging Face's. Nothing is unpickled.

Ours hold ``model.pt``, and a ``config.json`` that says the shape under "model". Wherever a model folder is
asked for, one of Hugging Face's may be given: ``config.json`` with a "model_type", and safetensors. The way
back, for transformers, vLLM and llama.cpp's converter:

    python -m model.weights export runs/dpo --to DIR
    python -m model.weights export runs/dpo --to DIR --dtype bf16
    python -m model.weights export runs/dpo --to DIR --adapter      # a LoRA run's adapter alone, for peft
"""

import argparse
import hashlib
import json
import shutil
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from errors import InputError, run_script
from files import write_whole
from model import huggingface
from model.config import ModelConfig
from model.lora import adapter_shape, adapter_weights, merged_weights
from model.transformer import Transformer

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# What `ChatTokenizer.save` writes, always and for some tokenizers; an export takes it along as it is.
TEXT_FILES = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")
SENTENCEPIECE_FILES = ("tokenizer.model", "added_tokens.json")


def save_model(folder: Path, model: Transformer, **settings) -> None:
    """Write the config, then the weights as they are, bit for bit; `settings` are kept beside the shape.

    The weights come last: a folder that has a model.pt is whole. Weights that are no numbers are not saved.
    Adapters are merged, so that a LoRA run is a model folder like any other, and also written by themselves.
    """
    if bad := [name for name, value in model.state_dict().items() if not value.isfinite().all()]:
        raise FloatingPointError(f"{folder}: the model is not saved, {bad[0]} is not finite")
    folder.mkdir(parents=True, exist_ok=True)
    config = {"kind": model.kind, "model": model.config.to_dict()}
    if adapter := adapter_weights(model):
        config["adapter"] = adapter_shape(model)
        write_whole(folder / "adapter.pt", lambda file: torch.save(adapter, file))
    write_json(folder / "config.json", {**config, **settings})
    write_whole(folder / "model.pt", lambda file: torch.save(merged_weights(model), file))


def weights_hash(model: torch.nn.Module) -> str:
    """SHA-256 of all weights with their names, types and shapes. Split ones need all ranks to call it."""
    digest = hashlib.sha256()
    for name, value in model.state_dict().items():
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        value = value.full_tensor() if isinstance(value, DTensor) else value
        digest.update(value.contiguous().view(-1).view(torch.uint8).cpu().numpy())
    return digest.hexdigest()


def write_json(path: Path, value: dict) -> None:
    write_whole(path, lambda file: file.write(json.dumps(value, indent=2).encode() + b"\n"))


def load_model(folder: str | Path, device="cpu", model_class: type[Transformer] = Transformer) -> Transformer:
    """The model of a folder in float32, with every weight accounted for; on "meta" without reading any.

    Raises `InputError` when the folder is none or holds another kind of model, or its weights do not fit its
    config.
    """
    folder = Path(folder)
    config = read_json(folder / "config.json")
    if (kind := config.get("kind", Transformer.kind)) != model_class.kind:
        raise InputError(
            f"{folder} holds a {kind}, not a {model_class.kind}: train_sft.py and train_dpo.py make language "
            "models, train_reward.py makes reward models"
        )
    if "model_type" in config:
        config, weights = read_hugging_face(folder, config, device)
    else:
        config, weights = model_config(folder, config), read_ours(folder / "model.pt", device)
    with torch.device("meta"):
        model = model_class(config)
    model.to_empty(device=device)
    try:
        model.load_state_dict(weights, strict=True)  # Copies, so that weights of a bf16 file become float32.
    except RuntimeError as error:
        raise InputError(f"{folder}: the weights do not fit config.json: {error}") from None
    return model


def read_json(path: Path) -> dict:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path.parent}: no model folder (it has no {path.name})") from None
    except ValueError as error:
        raise InputError(f"{path}: not the config of a model ({error})") from None
    if not isinstance(value, dict):
        raise InputError(f"{path}: not the config of a model (no object)")
    return value


def model_config(folder: Path, config: dict) -> ModelConfig:
    try:
        return ModelConfig(**config["model"])
    except (KeyError, TypeError) as error:
        raise InputError(f"{folder / 'config.json'}: not the config of a model ({error})") from None


def read_ours(path: Path, device="cpu") -> dict[str, Tensor]:
    try:
        return torch.load(path, map_location=device, weights_only=True)
    except FileNotFoundError:
        raise InputError(
            f"{path.parent}: there is a config.json but no {path.name}; did training finish?"
        ) from None
    except Exception as error:  # torch.load raises many kinds for a damaged or hostile file.
        raise InputError(
            f"{path}: unreadable ({str(error).partition(chr(10))[0] or 'it is empty'})"
        ) from None


# ---- Hugging Face's folders


def read_hugging_face(folder: Path, config: dict, device) -> tuple[ModelConfig, dict[str, Tensor]]:
    """The config and the weights of such a folder, as ours."""
    safetensors = import_safetensors()
    try:
        files = [safetensors.safe_open(path, "pt") for path in weight_files(folder)]
        found = {name: file for file in files for name in file.keys()}  # noqa: SIM118
        ours = huggingface.read_config(config, found.keys())
        weights = {name: file.get_tensor(name).to(device) for name, file in found.items()}
        return ours, huggingface.read_weights(weights, ours)
    except safetensors.SafetensorError as error:
        raise InputError(f"{folder}: unreadable safetensors ({error})") from None
    except InputError as error:
        raise InputError(f"{folder}: {error}") from None
    except (TypeError, KeyError, AttributeError) as error:  # A number where text belongs, and so on.
        raise InputError(f"{folder / 'config.json'}: not the config of a model ({error})") from None


def import_safetensors():
    try:
        import safetensors.torch
    except ImportError:
        need = "Hugging Face folders need safetensors, of the extra `hf`: pip install safetensors"
        raise InputError(need) from None
    return safetensors


def weight_files(folder: Path) -> list[Path]:
    """The one file of weights, or the files that an index names; none outside the folder."""
    index = folder / "model.safetensors.index.json"
    names = ["model.safetensors"]
    if index.is_file():
        names = sorted(set(read_json(index)["weight_map"].values()))
    if outside := [name for name in names if Path(name).name != name]:
        raise InputError(f"{index.name} names {outside[0]!r}, which is no file of this folder")
    if missing := [name for name in names if not (folder / name).is_file()]:
        raise InputError(f"no {missing[0]}; other formats must be saved as safetensors first")
    return [folder / name for name in names]


def export(source: Path, target: Path, dtype: torch.dtype) -> None:
    """Write a model folder as one of Hugging Face's: config, safetensors, and all that concerns text."""
    safetensors = import_safetensors()
    model = load_model(source)
    target.mkdir(parents=True, exist_ok=True)
    weights = huggingface.write_weights(model.state_dict(), model.config, dtype)
    # The format is said because transformers looks for it.
    data = safetensors.torch.save(weights, metadata={"format": "pt"})
    write_whole(target / "model.safetensors", lambda file: file.write(data))
    for name in TEXT_FILES:
        if not (source / name).is_file():
            raise InputError(f"{source}: no {name}; its tokenizer was not saved by this version")
        shutil.copyfile(source / name, target / name)
    for name in SENTENCEPIECE_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
    config, speech = huggingface.write_config(model.config, dtype), read_json(target / TEXT_FILES[-1])
    # Older readers look for the ends of a text in config.json.
    ids = {name: value for name, value in speech.items() if name.endswith("_token_id")}
    write_json(target / "config.json", {**config, **ids})


def export_adapter(source: Path, target: Path, dtype: torch.dtype) -> None:
    """Write the adapter of a LoRA run as peft reads it; it belongs on the model that the run started from."""
    safetensors = import_safetensors()
    config = read_json(source / "config.json")
    if "adapter" not in config:
        raise InputError(f"{source}: no adapter there, the run was not made with --lora-rank")
    weights = {
        f"base_model.model.model.{name}.weight": weight.to(dtype)
        for name, weight in read_ours(source / "adapter.pt").items()
    }
    described = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": config["settings"]["model"],
        "inference_mode": True,
        "lora_dropout": 0.0,
        "bias": "none",
        **config["adapter"],
    }
    target.mkdir(parents=True, exist_ok=True)
    data = safetensors.torch.save(weights, metadata={"format": "pt"})
    write_whole(target / "adapter_model.safetensors", lambda file: file.write(data))
    write_json(target / "adapter_config.json", described)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m model.weights", description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("export", help="write a folder that transformers, vLLM and llama.cpp read")
    command.add_argument("source", metavar="RUN", type=Path, help="model folder")
    command.add_argument("--to", metavar="DIR", type=Path, required=True, help="where the new folder goes")
    command.add_argument("--dtype", choices=DTYPES, default="fp32", help="of the exported weights")
    command.add_argument("--adapter", action="store_true", help="the adapter of a LoRA run alone, for peft")
    arguments = parser.parse_args()
    write = export_adapter if arguments.adapter else export
    write(arguments.source, arguments.to, DTYPES[arguments.dtype])
    print(f"{arguments.to}: {arguments.source} in {arguments.dtype}")


if __name__ == "__main__":
    run_script(main)
