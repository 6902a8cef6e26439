"""Train on public preference data, and measure on held-out prompts.

    python -m eval.experiments.real_data ../shared/data --out runs/real

The argument is a folder of public preference data (see its MANIFEST.md). Trains a tokenizer on the same text,
then SFT on rasbt's instructions, DPO on rasbt's polite and rude answers, and, from the same SFT model, a few
DPO steps on Anthropic's HH and on UltraFeedback. A tenth of the prompts of each file is held out.
Writes OUT/results.json and prints a table.
"""

import json
from pathlib import Path

import train_dpo
import train_sft
from dataset import tokenizer
from dataset.records import DataError, Preference, prompt_digest, read_records
from errors import InputError, run_script
from eval import preference
from files import write_json
from training.distributed import World, pick_device
from training.settings import OneLineParser

SFT = "sft/rasbt_instruction-data.json.gz"
RASBT = "preferences/rasbt_instruction-data-with-preference.json.gz"
PAIRS = {
    # name: file, flags of the DPO run
    "rasbt": (RASBT, ["--epochs", "2"]),
    "hh": ("preferences/hh_rlhf_harmless-base_test.jsonl.gz", ["--max-steps", "40", "--lr", "2e-4"]),
    "ultrafeedback": ("preferences/ultrafeedback_train_1000.jsonl.gz", ["--max-steps", "20", "--lr", "2e-4"]),
}


def split_by_prompt(source: Path, train: Path, held_out: Path) -> dict[str, int]:
    """Write the records of a tenth of the prompts to `held_out`, the others to `train`. Returns the counts.

    The digest of a prompt decides. So a prompt is never on both sides and keeps its side when records are
    added. Bad records are skipped.
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
    """A record as this project reads it back: `prompt`, `chosen` and `rejected`, or `messages`."""
    if not isinstance(record, Preference):
        return {"messages": [vars(turn) for turn in record.messages]}
    prompt = [vars(turn) for turn in record.prompt]
    return {"prompt": prompt, "chosen": record.chosen, "rejected": record.rejected}


def main(arguments: list[str] | None = None) -> None:
    parser = OneLineParser(prog="python -m eval.experiments.real_data", description=__doc__.split("\n")[0])
    parser.add_argument("shared", type=Path, help="folder that contains preferences/ and sft/")
    parser.add_argument("--out", type=Path, default=Path("runs/real"), help="folder for runs and figures")
    settings = parser.parse_args(arguments)
    shared, out = settings.shared, settings.out
    if not (shared / SFT).is_file():
        raise InputError(f"{shared}: {SFT} not found")

    results = {"split": {}, "held out": {}}
    for name, (file, _) in PAIRS.items():
        train, held_out = out / f"{name}.train.jsonl", out / f"{name}.heldout.jsonl"
        results["split"][name] = split_by_prompt(shared / file, train, held_out)
    texts = tokenizer.texts_of([shared / SFT, *(out / f"{name}.train.jsonl" for name in PAIRS)])
    tokenizer.train(texts, 4096).save(str(out / "tokenizer.json"))
    write_instructions(shared / SFT, out / "sft.jsonl", out / "rasbt.heldout.jsonl")

    paths = ["--tokenizer", f"{out}/tokenizer.json", "--data", f"{out}/sft.jsonl", "--out", f"{out}/sft"]
    train_sft.main([*paths, "--epochs", "8", "--overwrite"])
    world = World(0, 1, pick_device("auto"))
    for name, (_, flags) in PAIRS.items():
        data = ["--data", f"{out}/{name}.train.jsonl", "--eval-data", "", "--out", f"{out}/dpo-{name}"]
        train_dpo.main(["--model", f"{out}/sft", "--batch-size", "16", "--overwrite", *data, *flags])
        given = preference.Settings(model=f"{out}/dpo-{name}", data=f"{out}/{name}.heldout.jsonl")
        results["held out"][name] = preference.measure(given, world)
    write_json(out / "results.json", results)
    print(f"\n{'held-out pairs':<16}{'pairs':>6}{'accuracy':>10}{'margin':>8}{'loss':>8}{'KL/token':>10}")
    for name, figures in results["held out"].items():
        accuracy, margin = figures["rewards/accuracies"], figures["rewards/margins"]
        print(f"{name:<16}{figures['pairs']:>6}{accuracy:>10.3f}{margin:>8.3f}", end="")
        print(f"{figures['loss']:>8.3f}{figures['kl_per_token']:>10.4f}")


def write_instructions(source: Path, target: Path, held_out: Path) -> None:
    """Copy the conversations of `source` except those with a prompt of the held-out pairs.

    The pairs have the same prompts as the instructions. SFT must not see the held-out ones.
    """
    prompts = {prompt_digest(record) for record in read_records(held_out)}
    with open(target, "w", encoding="utf-8") as file:
        for record in read_records(source):
            if not isinstance(record, DataError) and prompt_digest(record) not in prompts:
                file.write(json.dumps(as_json(record), ensure_ascii=False) + "\n")


if __name__ == "__main__":
    run_script(main)
