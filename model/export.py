"""Write a model folder as a Hugging Face folder, for transformers, vLLM and llama.cpp's converter.

    python -m model.export runs/dpo --to DIR
    python -m model.export runs/dpo --to DIR --dtype bf16
    python -m model.export runs/dpo --to DIR --adapter      # only the adapter of a LoRA run, for peft
"""

import argparse
import shutil
from pathlib import Path

import torch
from torch import Tensor

from errors import InputError, require, run_script
from files import write_json, write_whole
from model import huggingface
from model.weights import import_safetensors, load_model, read_json, read_ours

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# The files of `ChatTokenizer.save`, always and for some tokenizers; an export copies them.
TEXT_FILES = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")
SENTENCEPIECE_FILES = ("tokenizer.model", "added_tokens.json")


def export(source: Path, target: Path, dtype: torch.dtype) -> None:
    """Write config, weights as safetensors, tokenizer, chat template and generation config to `target`."""
    model = load_model(source)
    weights = huggingface.write_weights(model.state_dict(), model.config, dtype)
    write_safetensors(target / "model.safetensors", weights)
    for name in (*TEXT_FILES, *SENTENCEPIECE_FILES):
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
        elif name in TEXT_FILES:
            raise InputError(f"{source}: no {name}; an older version saved this tokenizer")
    config, generation = huggingface.write_config(model.config, dtype), read_json(target / TEXT_FILES[-1])
    # Older readers look for the ids of the end tokens in config.json.
    ids = {name: value for name, value in generation.items() if name.endswith("_token_id")}
    write_json(target / "config.json", {**config, **ids})


def export_adapter(source: Path, target: Path, dtype: torch.dtype) -> None:
    """Write the adapter of a LoRA run as peft reads it; its base is the model that the run started from."""
    config = read_json(source / "config.json")
    if "adapter" not in config:
        raise InputError(f"{source} has no adapter: its run had no --lora-rank")
    merged = config["settings"].get("merge_adapter")
    reason = f"{source}: its run merged --adapter into the base, so its own adapter fits no saved model"
    require(not merged, f"{reason}; export the whole model without --adapter")
    weights = {
        f"base_model.model.model.{name}.weight": weight.to(dtype)
        for name, weight in read_ours(source, "adapter.pt", config).items()
    }
    write_safetensors(target / "adapter_model.safetensors", weights)
    described = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": config["settings"]["model"],
        "inference_mode": True,
        "lora_dropout": 0.0,
        "bias": "none",
        **config["adapter"],
    }
    write_json(target / "adapter_config.json", described)


def write_safetensors(path: Path, weights: dict[str, Tensor]) -> None:
    # transformers requires the format in the metadata.
    data = import_safetensors().torch.save(weights, metadata={"format": "pt"})
    write_whole(path, lambda file: file.write(data))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m model.export", description=__doc__.split("\n")[0])
    parser.add_argument("source", metavar="RUN", type=Path, help="model folder")
    parser.add_argument("--to", metavar="DIR", type=Path, required=True, help="folder of the export")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32", help="type of the exported weights")
    parser.add_argument("--adapter", action="store_true", help="only the adapter of a LoRA run, for peft")
    options = parser.parse_args(arguments)
    write = export_adapter if options.adapter else export
    write(options.source, options.to, DTYPES[options.dtype])
    print(f"{options.to}: {options.source} in {options.dtype}")


if __name__ == "__main__":
    run_script(main)
