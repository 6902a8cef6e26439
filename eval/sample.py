"""Answers of a model to the prompts of any file.

    python -m eval.sample --model runs/dpo --data questions.txt --samples 1 --temperature 0     # prints them
    python -m eval.sample --model runs/sft --data pairs.jsonl --samples 8 --out answers.jsonl
    torchrun --standalone --nproc-per-node 4 -m eval.sample --model DIR --data FILE --out answers.jsonl

The file contains pairs, conversations, prompts alone, or one prompt a line (.txt). Every prompt has draws of
its own: an answer depends on --seed and on the place of its prompt, and not on the batch or the ranks. A run
that was stopped continues with the same command. `eval.score` and `dataset.pair` read the file of answers.
"""

import glob
import hashlib
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from dataset.jsonl import printable
from dataset.prompts import as_messages, read_prompts
from dataset.tokenizer import ChatTokenizer
from errors import InputError, require, run_script
from eval.common import generating, load_model_and_tokenizer, print_note, print_start
from files import append_synced, json_line, write_lines
from model.generate import generate
from model.transformer import Transformer
from model.weights import weights_hash
from training.distributed import World, join
from training.precision import Precision
from training.settings import DEVICE_WHY, DEVICES, Flags, flag, parse

Models = dict[str, tuple[Transformer, ChatTokenizer]]  # by their folders


@dataclass
class Settings(Flags):
    model: str = flag("runs/sft", "model folder")
    against: str = flag("", "folder of a second model, which answers too; empty: one model")
    data: str = flag(
        "", "prompts: pairs, conversations or prompts alone (.jsonl, .json), or text lines (.txt)"
    )
    out: str = flag("", ".jsonl file for the answers; empty: print them")
    prompts: int = flag(0, "number of prompts, from the start of the file; 0: all")
    samples: int = flag(8, "answers per prompt and model")
    temperature: float = flag(1.0, "of sampling; 0 is greedy, 1 keeps the model's distribution")
    top_p: float = flag(1.0, "sample from the fewest tokens whose probability mass reaches this value")
    top_k: int = flag(0, "sample from this many of the likeliest tokens; 0: all")
    max_new_tokens: int = flag(256, "maximum tokens of an answer; a longer one is unfinished")
    batch_size: int = flag(64, "answers generated at once; changes the speed, not the answers")
    seed: int = flag(0, "seed of the sampling, the same for both models")
    device: str = flag("auto", DEVICE_WHY, DEVICES)

    def __post_init__(self) -> None:
        require(self.data, "give --data, the file of prompts")
        self.at_least(1, "samples", "max_new_tokens", "batch_size")
        self.at_least(0, "prompts", "temperature", "top_k")
        self.require(0 <= self.seed < 2**31, "seed", "from 0 to 2^31 - 1")
        self.require(0 < self.top_p <= 1, "top_p", "above 0 and at most 1")
        self.require(self.temperature > 0 or self.samples == 1, "samples", "1 with --temperature 0")
        self.require(not self.out or self.out.endswith(".jsonl"), "out", "a name that ends in .jsonl")


def main(arguments: list[str] | None = None) -> None:
    settings = parse(Settings, __doc__.split("\n")[0], arguments)
    with join(settings.device) as world:
        sample(settings, world)


def sample(settings: Settings, world: World) -> None:
    """Answer the prompts of --data; write the answers to --out, or print them."""
    require(settings.out or world.ranks == 1, "give --out: several ranks cannot print the answers in order")
    finished = f"{settings.out} is there already: remove it, or give another --out"
    require(not (settings.out and Path(settings.out).exists()), finished)
    records = read_prompts(settings.data)[: settings.prompts or None]
    folders = [folder for folder in (settings.model, settings.against) if folder]
    models = {folder: load_model_and_tokenizer(folder, world.device) for folder in folders}
    reason = Precision("auto", world.device).reason
    if world.is_main:
        print_start({folder: model for folder, (model, _) in models.items()}, world.device, reason)
    if settings.out:
        answer_into_file(settings, models, records, world)
        return
    for batch in batches(len(records), settings.batch_size, settings.samples):
        for record in answered(models, records, batch, settings):
            print(readable(record) + "\n", flush=True)


def batches(prompts: int, batch_size: int, samples: int) -> list[range]:
    """The places of the prompts that are answered at once."""
    few = max(1, batch_size // samples)
    return [range(start, min(start + few, prompts)) for start in range(0, prompts, few)]


def answered(models: Models, records: list[dict], places: range, settings: Settings) -> list[dict]:
    """The records at these places with `answers`: those of --model, then those of --against."""
    names = "samples", "max_new_tokens", "temperature", "top_p", "top_k", "seed"
    options = {name: getattr(settings, name) for name in names}
    answers: list[list[dict]] = [[] for _ in places]
    for folder, (model, tokenizer) in models.items():
        for row, found in zip(answers, answer(model, tokenizer, records, places, **options), strict=True):
            row += [{**each, "model": folder} if len(models) > 1 else each for each in found]
    return [{**records[place], "answers": row} for place, row in zip(places, answers, strict=True)]


def answer_all(
    model: Transformer, tokenizer: ChatTokenizer, records: list[dict], batch_size: int, **options
) -> list[list[dict]]:
    """The answers to all records; `options` as in `answer`."""
    places = batches(len(records), batch_size, options["samples"])
    return [row for batch in places for row in answer(model, tokenizer, records, batch, **options)]


def answer(
    model: Transformer, tokenizer: ChatTokenizer, records: list[dict], places: range, samples: int,
    max_new_tokens: int, seed: int, **sampling,
) -> list[list[dict]]:  # fmt: skip
    """`samples` answers to each of the prompts at these places, as they stand in a file of answers.

    The draws of a prompt depend on the seed and on its place.
    """
    prompts = [tokenizer.prompt(as_messages(records[place])) for place in places]
    sources = (torch.Generator().manual_seed(seed * 1_000_003 + place) for place in places)
    uniforms = torch.cat([torch.rand(samples, max_new_tokens, generator=source) for source in sources])
    options = {"samples": samples, "uniforms": uniforms, "batch_size": len(uniforms), **sampling}
    with generating(model):
        found = generate(model, prompts, tokenizer.end_id, max_new_tokens, **options)
    answers = [
        {"text": tokenizer.decode(a.tokens), "tokens": len(a.tokens), "finished": a.finished} for a in found
    ]
    return [answers[i : i + samples] for i in range(0, len(answers), samples)]


def readable(record: dict) -> str:
    """The prompt and its answers for a reader at a terminal."""
    lines = [f"> {printable(record['prompt'][-1]['content'])}"]
    for answer in record["answers"]:
        end = "" if answer["finished"] else " …"  # It reached --max-new-tokens.
        name = f"{answer['model']}: " if "model" in answer else ""
        lines.append(f"{name}{printable(answer['text'])}{end}")
    return "\n".join(lines)


# ---- A file that survives a stop


def answer_into_file(settings: Settings, models: Models, records: list[dict], world: World) -> None:
    """Write the records with answers to --out.

    Each rank appends its finished batches to OUT.RANK.part, synced. When all are there, the main rank merges
    them in the order of the prompts, so --out is complete or absent.
    """
    out, identity = Path(settings.out), identity_of(settings, models, records)
    done = set(world.from_main(lambda: [*read_parts(out, identity)]))
    if world.is_main and done:
        print_note(f"{out}: continuing after {len(done)} of {len(records)} prompts")
    todo = [
        batch
        for batch in batches(len(records), settings.batch_size, settings.samples)
        if not done.issuperset(batch)
    ]
    own = todo[world.rank :: world.ranks]
    out.parent.mkdir(parents=True, exist_ok=True)
    with open(f"{out}.{world.rank}.part", "ab", buffering=0) as file:
        if file.tell() == 0:
            append(file, [identity])
        for batch in tqdm(own, unit="batch", disable=not world.is_main):
            found = answered(models, records, batch, settings)
            append(file, [{"place": p, "record": r} for p, r in zip(batch, found, strict=True)])
    world.wait()
    world.from_main(lambda: merge(out, identity, len(records)))


def identity_of(settings: Settings, models: Models, records: list[dict]) -> dict:
    """Everything that determines the answers."""
    without = ("model", "against", "data", "out", "prompts", "batch_size", "device")
    content = hashlib.sha256(json.dumps(records).encode()).hexdigest()
    weights = [[weights_hash(model), tokenizer.fingerprint] for model, tokenizer in models.values()]
    options = {name: value for name, value in asdict(settings).items() if name not in without}
    return {"models": weights, "prompts": content, **options}


def append(file, values: list[dict]) -> None:
    """Append JSON lines and sync them."""
    append_synced(file, b"".join(map(json_line, values)), file.name)


def part_files(out: Path) -> list[Path]:
    return sorted(map(Path, glob.glob(f"{glob.escape(str(out))}.*.part")))


def read_parts(out: Path, identity: dict) -> dict[int, dict]:
    """The answered records of all parts by their places. A torn last line is cut off its file.

    Raises `InputError` if a part belongs to other settings, prompts or models.
    """
    found = {}
    for path in part_files(out):
        *lines, torn = path.read_bytes().split(b"\n")
        if torn:
            os.truncate(path, path.stat().st_size - len(torn))
        first, *rest = map(json.loads, lines or [json.dumps(identity)])
        other = [name for name in identity if identity[name] != first.get(name)]
        reason = f"{path} was written with other {', '.join(other)}: remove it, or give another --out"
        require(not other, reason)
        found |= {line["place"]: line["record"] for line in rest}
    return found


def merge(out: Path, identity: dict, prompts: int) -> None:
    """Write the records of all parts to `out` in the order of the prompts, and remove the parts."""
    found = read_parts(out, identity)
    if missing := prompts - len(found):
        raise InputError(f"{out}: {missing} prompts have no answers: --out must be on a disk of all ranks")
    write_lines(out, (found[place] for place in range(prompts)))
    for path in part_files(out):
        path.unlink()
    print_note(f"{out}: answers to {prompts} prompts")


if __name__ == "__main__":
    run_script(main)
