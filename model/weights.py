"""Model folders, ours and Hugging Face's, in and out. Nothing is unpickled.

Our folders contain ``model.pt``, and a ``config.json`` with the shape under "model" and digests under
"sha256". A Hugging Face folder is accepted as well: its ``config.json`` has a "model_type", and its weights
are safetensors. `model.export` writes such a folder.
"""

import hashlib
import json
import re
import zipfile
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from errors import InputError, require
from files import file_hash, write_json, write_whole
from model import huggingface
from model.config import PRESETS, ModelConfig
from model.lora import adapted_layers, adapter_shape, adapter_weights, merged_weights
from model.transformer import Transformer

MAX_JSON = 2**26  # bytes of a JSON file; the index of the largest published models has 10 MB

# ---- Out


def save_model(folder: Path, model: Transformer, **settings) -> None:
    """Write the config, which contains `settings`, then the weights, bit for bit.

    The weights come last, so a folder with a model.pt is complete. Adapters are merged: a LoRA run is a model
    folder like any other; they are also written on their own. Raises FloatingPointError for a NaN.
    """
    if bad := [name for name, value in model.state_dict().items() if not value.isfinite().all()]:
        raise FloatingPointError(f"{folder}: the model is not saved, {bad[0]} is not finite")
    digests: dict[str, str] = {}
    config = {"kind": model.kind, "model": model.config.to_dict(), **settings, "sha256": digests}

    def write(file, name: str, weights: dict[str, Tensor]) -> None:
        torch.save(weights, file)
        digests[name] = file.digest.hexdigest()

    if adapter := adapter_weights(model):
        config["adapter"] = adapter_shape(model)
        write_whole(folder / "adapter.pt", lambda file: write(file, "adapter.pt", adapter))

    def write_both(file) -> None:
        write(file, "model.pt", merged_weights(model))
        write_json(folder / "config.json", config)  # Before model.pt has its name, but with its digest.

    write_whole(folder / "model.pt", write_both)


def weights_hash(model: torch.nn.Module) -> str:
    """SHA-256 of all weights with their names, types and shapes, and of the adapters' scales.

    All ranks must call it for a split model.
    """
    scales = {name: layer.scale for name, layer in adapted_layers(model).items()}
    digest = hashlib.sha256(json.dumps(scales).encode() if scales else b"")
    for name, value in model.state_dict().items():
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        value = value.full_tensor() if isinstance(value, DTensor) else value
        digest.update(value.contiguous().view(-1).view(torch.uint8).cpu().numpy())
    return digest.hexdigest()


# ---- In


def load_model(folder: str | Path, device="cpu", model_class: type[Transformer] = Transformer) -> Transformer:
    """The model of a folder in float32, with every weight accounted for. On "meta" no weight is read.

    Raises `InputError` if the folder is missing or damaged, contains another kind of model, or its weights do
    not fit its config.
    """
    folder, on_meta = Path(folder), torch.device(device).type == "meta"
    config = read_json(folder / "config.json")
    if (kind := config.get("kind", Transformer.kind)) != model_class.kind:
        advice = "train_reward.py writes reward models, the other scripts language models"
        raise InputError(f"{folder} contains a {kind}, not a {model_class.kind}: {advice}")
    # The weights are mapped, not read: ranks that load one folder share its pages.
    if "model_type" in config:
        shape, weights = read_hugging_face(folder, config, "meta" if on_meta else "cpu")
    else:
        shape, weights = model_config(folder, config), read_ours(folder, "model.pt", config, on_meta)
    require_counts(folder, shape, weights.keys())
    with torch.device("meta"):
        model = model_class(shape)
    require_fit(folder, model, weights)
    if not on_meta:
        model.to_empty(device=device)
        model.load_state_dict(weights, strict=True)  # Copies: the weights of a bf16 file become float32.
    return model


def require_folder(folder: Path) -> None:
    """Raise InputError, with the likely remedy, for a path that is not a folder."""
    if folder.is_dir():
        return
    if folder.exists():
        raise InputError(f"{folder} is a file, not a model folder: give the folder, {folder.parent}")
    name, demo = folder.name, folder.parent / "demo" / folder.name
    of_the_hub = re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", str(folder)) and folder.parent.name != "runs"
    remedy = f"python train_sft.py writes one to runs/sft, or starts from a preset: {', '.join(PRESETS)}"
    if demo.is_dir():
        remedy = f"make demo has left one in {demo}: give --model {demo}"
    elif of_the_hub and not folder.parent.exists():
        remedy = f"to download this model: hf download {folder} --local-dir {name}, then --model {name}"
    raise InputError(f"{folder}: there is no such model folder; {remedy}")


def read_json(path: Path) -> dict:
    """The object in a JSON file of a model folder."""
    require_folder(path.parent)
    try:
        require(path.exists(), f"{path.parent} is not a model folder: it has no {path.name}")
        require(path.is_file(), f"{path} is not a regular file")
        too_large = f"{path} is larger than {MAX_JSON >> 20} MiB, too large for a config"
        require(path.stat().st_size <= MAX_JSON, too_large)
        value = json.loads(path.read_text(encoding="utf-8"))
    except InputError:
        raise
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not the config of a model: damaged or incomplete JSON ({error})") from None
    require(isinstance(value, dict), f"{path}: not the config of a model: not a JSON object")
    return value


def run_settings(folder: str | Path) -> dict:
    """The settings of the run that wrote a model folder; {} for a folder from Hugging Face.

    Raises `InputError` if the folder is missing or has no readable config.json.
    """
    require_folder(Path(folder))
    run = read_json(Path(folder) / "config.json").get("settings")
    return run if isinstance(run, dict) else {}


def model_config(folder: Path, config: dict) -> ModelConfig:
    try:
        return ModelConfig(**config["model"])
    except KeyError:
        reason = 'no "model" in it'
    except (TypeError, InputError) as error:
        reason = str(error).replace("ModelConfig.__init__() ", "")
    raise InputError(f"{folder / 'config.json'}: not the config of a model: {reason}")


def read_ours(folder: Path, name: str, config: dict, on_meta: bool = False) -> dict[str, Tensor]:
    """The tensors of a file that `save_model` has written, mapped into memory; on "meta" their shapes."""
    path = folder / name
    require(path.exists(), f"{folder} has a config.json but no {name}: the training did not finish")
    require_stored_zip(path)
    digests = config.get("sha256")  # Older folders have none.
    digest = digests.get(name) if isinstance(digests, dict) else None
    if digest and not on_meta and file_hash(path) != digest:
        advice = 'copy or train it again; if the change is intended, remove "sha256" there'
        raise InputError(f"{path} is damaged: its SHA-256 is not the one in config.json; {advice}")
    device = "meta" if on_meta else "cpu"
    try:
        weights = torch.load(path, map_location=device, mmap=not on_meta, weights_only=True)
    except Exception as error:  # torch.load raises many types for a damaged or hostile file.
        reason = str(error).partition("\n")[0]
        if "Weights only load failed" in reason:
            reason = "it contains other objects than tensors"
        raise InputError(f"{path}: unreadable ({reason})") from None
    if not isinstance(weights, dict) or not all(map(is_weight, weights.keys(), weights.values())):
        raise InputError(f"{path}: unreadable, it is not a dict of weights by name")
    return weights


def is_weight(name, value) -> bool:
    dense = isinstance(value, Tensor) and value.layout == torch.strided
    return isinstance(name, str) and dense and value.is_floating_point()


def require_stored_zip(path: Path) -> None:
    """Raise InputError unless this is a regular file and, as torch.save writes, a zip without compression.

    A compressed entry may need a thousand times the memory of the file.
    """
    require(path.is_file(), f"{path} is not a regular file")
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    except (zipfile.BadZipFile, ValueError, NotImplementedError) as error:
        raise InputError(f"{path}: unreadable, damaged or incomplete ({error})") from None
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise InputError(f"{path}: unreadable, it has compressed entries, which torch.save never writes")


def require_counts(folder: Path, config: ModelConfig, names) -> None:
    """Compare the numbers of layers and experts before a model is built: a million modules take minutes."""
    for what, expected, pattern in (
        ("layers", config.num_hidden_layers, r"layers\.(\d+)\."),
        ("experts", config.num_experts, r"layers\.\d+\.mlp\.experts\.(\d+)\."),
    ):
        found = len({match[1] for name in names if (match := re.match(pattern, name))})
        if found != expected:
            raise InputError(f"{folder}: config.json has {expected} {what}, the weights have {found}")


def require_fit(folder: Path, model: Transformer, weights: dict[str, Tensor]) -> None:
    """Raise InputError unless the names and shapes of the weights are those of the model."""
    expected = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    found = {name: tuple(value.shape) for name, value in weights.items()}
    problems = [f"{name} is missing" for name in expected.keys() - found.keys()]
    problems += [f"{name} is unexpected" for name in found.keys() - expected.keys()]
    for name in expected.keys() & found.keys():
        if expected[name] != found[name]:
            problems.append(f"{name} has the shape {found[name]}, expected {expected[name]}")
    if problems:
        more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
        shown = "; ".join(sorted(problems)[:5]) + more
        raise InputError(f"{folder}: the weights do not fit config.json: {shown}")


# ---- Hugging Face's folders


def read_hugging_face(folder: Path, config: dict, device: str) -> tuple[ModelConfig, dict[str, Tensor]]:
    """Config and weights of a Hugging Face folder under our names; on "cpu" the weights are mapped."""
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
    except (TypeError, KeyError, AttributeError) as error:  # A number in place of a text, and so on.
        raise InputError(f"{folder / 'config.json'}: not the config of a model ({error})") from None


def import_safetensors():
    try:
        import safetensors.torch
    except ImportError:
        raise InputError("Hugging Face folders need safetensors: pip install safetensors") from None
    return safetensors


def weight_files(folder: Path) -> list[Path]:
    """The one file of weights, or the files that the index names, all in this folder."""
    index = folder / "model.safetensors.index.json"
    names = ["model.safetensors"]
    if index.is_file():
        names = sorted(set(read_json(index)["weight_map"].values()))
    if outside := [name for name in names if Path(name).name != name]:
        raise InputError(f"{index.name} names {outside[0]!r}, which is not a file of this folder")
    if missing := [name for name in names if not (folder / name).is_file()]:
        raise InputError(f"no {missing[0]}; other formats must be converted to safetensors first")
    return [folder / name for name in names]
