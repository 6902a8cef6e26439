"""The whole way in minutes: SFT, DPO, and what DPO changed, on the bundled data.

    python -m eval.demo --out runs/demo              # what `make demo` calls
    python -m eval.demo --out /tmp/quick --max-steps 20 --prompts 20

Trains OUT/sft and OUT/dpo with the scripts' own defaults, then measures both on held-out prompts: preference
accuracy, and sampled answers that a judge with the right solutions scores. OUT/results.json has the figures.
"""

import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import train_dpo
import train_sft
from dataset.jsonl import printable
from errors import InputError, run_script
from eval import preference, report
from eval.chat import column_width, side_by_side
from eval.common import load_model_and_tokenizer, require, write_json
from eval.judge import Reply, answer, compare, compare_tasks, read_judged, summary
from training.distributed import World, pick_device
from training.settings import SAMPLE, flag, parse

HELD_OUT = str(SAMPLE / "heldout.jsonl")


@dataclass
class Settings:
    out: str = flag("runs/demo", "folder of the two runs and of results.json")
    seed: int = flag(0, "of the first weights, the data order and the sampling")
    max_steps: int = flag(0, "stop each training after so many steps, for a quick look; 0 for all of it")
    prompts: int = flag(0, "ask only the first so many held-out prompts; 0 for all")
    samples: int = flag(4, "sampled answers to each prompt, beside the greedy one")

    def __post_init__(self) -> None:
        require(self.max_steps >= 0, "--max-steps", self.max_steps, "must not be negative")
        require(self.prompts >= 0, "--prompts", self.prompts, "must not be negative")
        require(self.samples >= 1, "--samples", self.samples, "must be at least 1")


def main(arguments: list[str] | None = None) -> None:
    settings = parse(Settings, __doc__.split("\n")[0], arguments)
    out, seconds = Path(settings.out), {}
    sft, dpo = str(out / "sft"), str(out / "dpo")
    (out / "results.json").unlink(
        missing_ok=True
    )  # Figures of an earlier run would outlive a failure of this.
    same = ["--overwrite", "--seed", str(settings.seed), "--max-steps", str(settings.max_steps)]

    with stage("1. Supervised fine-tuning: learn to answer", "sft", seconds):
        train_sft.main(["--out", sft, *same])
    with stage("2. DPO: learn which answers are preferred", "dpo", seconds):
        train_dpo.main(["--model", sft, "--out", dpo, *same])
    with stage("3. Preference accuracy on held-out pairs", "preference", seconds):
        asked = preference.Settings(model=dpo, reference=sft, data=HELD_OUT)
        preferred = preference.measure(asked, World(0, 1, pick_device(asked.device)))
        write_json(out / "preference.json", preferred)
    with stage("4. Both answer held-out prompts, a judge compares", "judge", seconds):
        records = read_judged(HELD_OUT)[: settings.prompts or None]
        replies = ask_both({"dpo": dpo, "sft": sft}, records, settings)
        judged = compare(records, replies)
        write_json(out / "judge.json", judged | {"tasks": compare_tasks(records, replies)})

    results = {
        "preference_accuracy": preferred["rewards/accuracies"],
        "preference_margin": preferred["rewards/margins"],
        "kl_per_token": preferred["kl_per_token"],
        **judged,
        "seconds": round(sum(seconds.values()), 1),
        "seconds_per_stage": {name: round(value, 1) for name, value in seconds.items()},
    }
    write_json(out / "results.json", results)
    pictures = draw(sft, dpo)
    print("\n" + summary(judged))
    print(f"preference accuracy on held-out pairs: {preferred['rewards/accuracies']:.1%}\n")
    print(examples(records, replies))
    print(
        f"\n{results['seconds']:.0f} seconds. Figures: {out / 'results.json'}, by task: {out / 'judge.json'}"
    )
    print(pictures)
    print(f"Talk to both: python -m eval.chat --model {dpo} --versus {sft}")


@contextmanager
def stage(title: str, name: str, seconds: dict[str, float]):
    """Say what comes, and note under `name` how long it took."""
    print(f"\n{title}", flush=True)
    start = time.perf_counter()
    yield
    seconds[name] = time.perf_counter() - start


def ask_both(folders: dict[str, str], records: list[dict], settings: Settings) -> dict[str, list]:
    """The replies of the model of each folder, from `answer`, with the judge's own defaults."""
    device = pick_device("auto")
    return {
        name: answer(*load_model_and_tokenizer(folder, device), records, settings.samples, seed=settings.seed)
        for name, folder in folders.items()
    }


def draw(*runs: str) -> str:
    """Draw the runs; say where the pictures are, or what they lack: the demo is one without them, too."""
    try:
        return "Pictures: " + ", ".join(str(report.picture(run)) for run in runs)
    except InputError as error:
        return f"No pictures: {error}"


def examples(records: list[dict], replies: dict[str, list[list[Reply]]], most: int = 3) -> str:
    """The first sampled answers of both models, side by side, to prompts where they differ in points."""
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
