"""Train on data that people really use, and measure on prompts that were held out.

    python -m eval.experiments.real_data ../shared/data --out runs/real

Takes a folder with public preference data (see its MANIFEST.md) and, with a tokenizer trained on the same
text: SFT on rasbt's instructions, DPO on rasbt's polite-against-rude pairs; then, from the same SFT model,
some DPO steps on Anthropic's HH and on UltraFeedback. A tenth of each file, split by prompt, is held out.
Writes OUT/results.json and prints a table.
"""

import argparse
import json
from pathlib import Path

import train_dpo
import train_sft
from dataset import tokenizer
from dataset.inspect import prompt_digest
from dataset.records import DataError, Preference, read_records
from errors import InputError, run_script
from eval import common, preference
from training.distributed import World, pick_device

SFT = "sft/rasbt_instruction-data.json.gz"
RASBT = "preferences/rasbt_instruction-data-with-preference.json.gz"
PAIRS = {
    # name: file, flags of the DPO run
    "rasbt": (RASBT, ["--epochs", "2"]),
    "hh": ("preferences/hh_rlhf_harmless-base_test.jsonl.gz", ["--max-steps", "40", "--lr", "2e-4"]),
    "ultrafeedback": ("preferences/ultrafeedback_train_1000.jsonl.gz", ["--max-steps", "20", "--lr", "2e-4"]),
}


def split_by_prompt(source: Path, train: Path, held_out: Path) -> dict[str, int]:
    """Write a tenth of the prompts, and all records with them, apart. Returns what was counted.

    By the digest of the prompt, so that a prompt never stands on both sides, nor changes sides when records
    are added. Bad records are left out.
    """
    counts = {"train": 0, "held_out": 0, "bad": 0}
    train.parent.mkdir(parents=True, exist_ok=True)
    with (
        open(train, "w", encoding="utf-8") as train_file,
        open(held_out, "w", encoding="utf-8") as held_out_file,
    ):
        for record in read_records(source):
            if isinstance(record, DataError):
                counts["bad"] += 1
                continue
            side = "held_out" if int.from_bytes(prompt_digest(record)[:4], "big") % 10 == 0 else "train"
            counts[side] += 1
            file = held_out_file if side == "held_out" else train_file
            file.write(json.dumps(as_json(record), ensure_ascii=False) + "\n")
    return counts


def as_json(record) -> dict:
    if not isinstance(record, Preference):
        return {"messages": [vars(turn) for turn in record.messages]}
    prompt = [vars(turn) for turn in record.prompt]
    return {"prompt": prompt, "chosen": record.chosen, "rejected": record.rejected}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m eval.experiments.real_data", description=__doc__.split("\n")[0]
    )
    parser.add_argument("shared", type=Path, help="folder with preferences/ and sft/")
    parser.add_argument("--out", type=Path, default=Path("runs/real"))
    settings = parser.parse_args(arguments)
    if not (settings.shared / SFT).is_file():
        raise InputError(f"{settings.shared}: there is no {SFT}")

    out = settings.out
    results = {"split": {}, "held out": {}}
    for name, (file, _) in PAIRS.items():
        train, held_out = out / f"{name}.train.jsonl", out / f"{name}.heldout.jsonl"
        results["split"][name] = split_by_prompt(settings.shared / file, train, held_out)
    texts = tokenizer.texts_of([settings.shared / SFT, *(out / f"{name}.train.jsonl" for name in PAIRS)])
    tokenizer.train(texts, 4096).save(str(out / "tokenizer.json"))

    # The preference file has the prompts of the instructions: what is held out there must not be taught here.
    held_out = {prompt_digest(record) for record in read_records(out / "rasbt.heldout.jsonl")}
    with open(out / "sft.jsonl", "w", encoding="utf-8") as file:
        for record in read_records(settings.shared / SFT):
            if prompt_digest(record) not in held_out:
                file.write(json.dumps(as_json(record), ensure_ascii=False) + "\n")
    train_sft.main(
        [
            "--tokenizer",
            f"{out}/tokenizer.json",
            "--data",
            f"{out}/sft.jsonl",
            "--out",
            f"{out}/sft",
            "--epochs",
            "8",
            "--overwrite",
        ]
    )
    world = World(0, 1, pick_device("auto"))
    for name, (_, flags) in PAIRS.items():
        data = ["--data", f"{out}/{name}.train.jsonl", "--eval-data", "", "--out", f"{out}/dpo-{name}"]
        train_dpo.main(["--model", f"{out}/sft", "--batch-size", "16", "--overwrite", *data, *flags])
        asked = preference.Settings(
            model=f"{out}/dpo-{name}", reference=f"{out}/sft", data=f"{out}/{name}.heldout.jsonl"
        )
        results["held out"][name] = preference.measure(asked, world)
    common.write_json(out / "results.json", results)
    print(f"\n{'held-out pairs':<16}{'pairs':>6}{'accuracy':>10}{'margin':>8}{'loss':>8}{'KL/token':>10}")
    for name, figures in results["held out"].items():
        accuracy, margin = figures["rewards/accuracies"], figures["rewards/margins"]
        print(f"{name:<16}{figures['pairs']:>6}{accuracy:>10.3f}{margin:>8.3f}", end="")
        print(f"{figures['loss']:>8.3f}{figures['kl_per_token']:>10.4f}")


if __name__ == "__main__":
    run_script(main)
