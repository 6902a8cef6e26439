"""SFT, then DPO on the bundled data, then what DPO changed: in minutes on two cores.

    python -m eval.demo --out runs/demo              # what `make demo` runs
    python -m eval.demo --out /tmp/quick --max-steps 20 --prompts 20

Trains OUT/sft and OUT/dpo with the default settings of the two scripts. Then measures both models on held-out
prompts: reward accuracy, sampled answers that a judge scores, and right answers by turn of a conversation.
OUT/results.json contains the figures.
"""

import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import train_dpo
import train_sft
from dataset.jsonl import printable
from errors import run_script
from eval import preference, report, turns
from eval.chat import column_width, side_by_side
from eval.common import load_model_and_tokenizer
from eval.judge import Reply, answer, compare, details, read_judged, summary
from eval.words import LANG_WHY, LANGUAGES, language, tr
from files import write_json
from training.distributed import World, pick_device
from training.settings import SAMPLE, Flags, flag, parse

HELD_OUT = str(SAMPLE / "heldout.jsonl")


@dataclass
class Settings(Flags):
    out: str = flag("runs/demo", "folder of the two runs and of results.json")
    seed: int = flag(0, "seed of the initial weights, the data order and the sampling")
    max_steps: int = flag(0, "optimizer steps of each training; 0 for all")
    prompts: int = flag(0, "number of held-out prompts to answer; 0 for all")
    samples: int = flag(4, "sampled answers to each prompt, in addition to the greedy one")
    precision: str = flag(
        "auto", "precision of both trainings: bf16 where the hardware has it", ("auto", "fp32", "bf16")
    )
    lang: str = flag("auto", LANG_WHY, LANGUAGES)

    def __post_init__(self) -> None:
        self.at_least(0, "max_steps", "prompts")
        self.at_least(1, "samples")


def main(arguments: list[str] | None = None) -> None:
    settings = parse(Settings, __doc__.split("\n")[0], arguments)
    with language(settings.lang):
        run(settings)


def run(settings: Settings) -> None:
    """Train both models, measure them, write the figures and print what was found."""
    out, seconds = Path(settings.out), {}
    sft, dpo = str(out / "sft"), str(out / "dpo")
    # If this run fails, figures of an earlier run must not stay behind.
    (out / "results.json").unlink(missing_ok=True)
    same = ["--overwrite", "--seed", str(settings.seed), "--max-steps", str(settings.max_steps)]
    same += ["--precision", settings.precision]

    with stage(tr("1. Supervised fine-tuning: learn to answer"), "sft", seconds):
        train_sft.main(["--out", sft, *same])
    with stage(tr("2. DPO: learn which answers are preferred"), "dpo", seconds):
        train_dpo.main(["--model", sft, "--out", dpo, "--eval-every", "20", *same])
    with stage(tr("3. Preference accuracy on held-out pairs"), "preference", seconds):
        asked = preference.Settings(model=dpo, reference=sft, data=HELD_OUT)
        preferred = preference.measure(asked, World(0, 1, pick_device(asked.device)))
        write_json(out / "preference.json", preferred)
    with stage(tr("4. Both answer held-out prompts, a judge compares"), "judge", seconds):
        records = read_judged(HELD_OUT)[: settings.prompts or None]
        replies = ask_both({"dpo": dpo, "sft": sft}, records, settings)
        judged = compare(records, replies)
        write_json(out / "judge.json", judged | details(records, replies))
    with stage(tr("5. DPO answers unrelated questions in one conversation"), "turns", seconds):
        model, tokenizer = load_model_and_tokenizer(dpo, pick_device("auto"))
        few = 40 if not settings.prompts else 2
        by_turn = turns.right_by_turn(model, tokenizer, read_judged(HELD_OUT), few, seed=settings.seed)

    results = {
        "preference_accuracy": preferred["rewards/accuracies"],
        "preference_margin": preferred["rewards/margins"],
        "kl_per_token": preferred["kl_per_token"],
        **judged,
        "right_by_turn": by_turn,
        "seconds": round(sum(seconds.values()), 1),
        "seconds_per_stage": {name: round(value, 1) for name, value in seconds.items()},
    }
    write_json(out / "results.json", results)
    page = report.write_page([dpo], pairs=preferred["pairs"])
    print("\n" + summary(judged))
    accuracy = f"{preferred['rewards/accuracies']:.1%}"
    print(tr("preference accuracy on held-out pairs: {share}", share=accuracy) + "\n")
    print(turns.table(by_turn) + "\n")
    print(examples(records, replies))
    took, file = f"{results['seconds']:.0f}", out / "results.json"
    print("\n" + tr("{took} seconds. Figures: {file}; by task: judge.json", took=took, file=file))
    print(tr("What DPO changed, token by token: open {page} in a browser", page=page))
    print(next_commands(sft, dpo))


def next_commands(sft: str, dpo: str) -> str:
    """Two commands to go on with."""
    return f"""{tr("Next:")}
  python -m eval.chat --model {dpo} --versus {sft}       # {tr("talk to both models")}
  python -m eval.preference --model {dpo} --reference {sft}   # {tr("evaluate on held-out pairs")}"""


@contextmanager
def stage(title: str, name: str, seconds: dict[str, float]):
    """Print the title; afterwards store the elapsed seconds under `name`."""
    print(f"\n{title}", flush=True)
    start = time.perf_counter()
    yield
    seconds[name] = time.perf_counter() - start


def ask_both(folders: dict[str, str], records: list[dict], settings: Settings) -> dict[str, list]:
    """Replies of each folder's model by name, from `eval.judge.answer` with its default settings."""
    device = pick_device("auto")
    return {
        name: answer(*load_model_and_tokenizer(folder, device), records, settings.samples, seed=settings.seed)
        for name, folder in folders.items()
    }


def examples(records: list[dict], replies: dict[str, list[list[Reply]]], most: int = 3) -> str:
    """First sampled answers of both models side by side, for `most` prompts; different points come first."""
    names = list(reversed(replies))  # sft first: before and after
    width = column_width()
    lines = side_by_side(*names, width)
    rows = list(zip(records, *(replies[name] for name in names), strict=True))
    rows.sort(key=lambda row: row[1][1].verdict.points == row[2][1].verdict.points)  # stable: ties last
    for record, *sides in rows[:most]:
        lines += ["", "> " + printable(record["prompt"][-1].content)]
        lines += side_by_side(*(printable(side[1].text) for side in sides), width)
    return "\n".join(lines)


if __name__ == "__main__":
    run_script(main)
