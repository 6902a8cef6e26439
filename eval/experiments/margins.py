"""The curve of TRL's documentation on public data: reward margins rise. And the rewards behind them?

    python -m eval.experiments.margins --shared ../shared/data --out runs/margins

HH (harmless) and UltraFeedback from a folder of public preference data (see its MANIFEST.md). A tenth of the
prompts is held out. One model is trained on the chosen answers of both (SFT); from it DPO runs on each, with
several orders of the data. Draws margins and rewards over the steps.

Claim (TRL, documentation of DPOTrainer): "rewards/margins" rises over training. The margin is a difference:
it rises as well if both rewards fall (Rafailov et al. 2024, arXiv 2404.12358; Pal et al. 2024, 2402.13228).
"""

from dataclasses import asdict, dataclass
from pathlib import Path

import train_sft
from dataset import tokenizer
from errors import InputError, run_script
from eval.experiments import common
from eval.experiments.common import draw_curve, read_all, shown, table, write_lines
from eval.experiments.real_data import PAIRS, split_by_prompt
from eval.report import BLUE, INK, ORANGE, PALE, canvas, need_matplotlib, plain
from files import write_json
from training.settings import flag, parse

DATA = {"hh": "HH, harmless", "ultrafeedback": "UltraFeedback"}
COLUMNS = {"accuracies": "accuracy", "margins": "margin", "chosen": "chosen", "rejected": "rejected"}


@dataclass
class Settings(common.DPOSettings):
    model: str = flag("tiny", "size of the model that is trained on the chosen answers")
    shared: str = flag("../shared/data", "folder that contains preferences/")
    out: str = flag("runs/margins", "folder for the runs, the figures and the picture")
    sft_epochs: int = flag(2, "passes of SFT over the chosen answers")
    steps: int = flag(40, "optimizer steps of each DPO run")
    max_length: int = flag(320, "maximum tokens of prompt and response; longer pairs are dropped")
    lr: float = flag(2e-4, "peak learning rate of DPO")
    eval_every: int = flag(10, "optimizer steps between evaluations on the held-out pairs")
    records: int = flag(0, "pairs of each file to use, from its start; 0: all")


def main(arguments: list[str] | None = None) -> None:
    settings = parse(Settings, __doc__.split("\n")[0], arguments)
    settings = common.shortened(
        settings, sft_epochs=1, steps=2, batch_size=4, eval_every=1, records=40
    )
    need_matplotlib()
    out = Path(settings.out)
    start = prepare(settings, out)
    runs = {name: [run(settings, start, name, seed) for seed in range(settings.seeds)] for name in DATA}
    write_json(out / "results.json", {"settings": asdict(settings), "runs": runs})
    draw(runs, out / "margins.png")
    print("\nheld-out pairs, after the last step\n\n" + summary(runs))


def prepare(settings: Settings, out: Path) -> Path:
    """Write the pairs of both files, split by prompt, and train a model on the chosen answers; its folder."""
    chosen = []
    for name in DATA:
        source, train = Path(settings.shared) / PAIRS[name][0], out / f"{name}.train.jsonl"
        if not source.is_file():
            raise InputError(f"{source} not found; --shared names a folder of public preference data")
        held_out = out / f"{name}.heldout.jsonl"
        split_by_prompt(source, train, held_out)
        for path in (train, held_out) if settings.records else ():
            common.copy_lines(path, path, settings.records)
        for pair in read_all(train):
            answer = {"role": "assistant", "content": pair.chosen}
            chosen.append({"messages": [*map(vars, pair.prompt), answer]})
    write_lines(out / "chosen.jsonl", chosen)
    texts = tokenizer.texts_of([out / f"{name}.train.jsonl" for name in DATA])
    tokenizer.train(texts, 4096).save(str(out / "tokenizer.json"))
    flags = dict(model=settings.model, tokenizer=out / "tokenizer.json", data=out / "chosen.jsonl")
    flags |= dict(epochs=settings.sft_epochs, batch_size=16, max_length=settings.max_length, log_every=50)
    return common.train(out / "sft", 0, train_sft.main, **flags)


def run(settings: Settings, start: Path, name: str, seed: int) -> dict[str, list[float]]:
    """Train once. Returns the steps of the evaluations, held-out metrics there, and the training margin."""
    folder, files = Path(settings.out) / f"{name}-{seed}", Path(settings.out) / name
    flags = {key: getattr(settings, key) for key in ("batch_size", "max_length", "lr", "beta", "eval_every")}
    data = dict(data=f"{files}.train.jsonl", eval_data=f"{files}.heldout.jsonl", reference="cached")
    flags |= dict(max_steps=settings.steps, log_every=settings.eval_every)
    common.train(folder, seed, model=start, **data, **flags)
    rows = common.metrics(folder)
    held_out = [row for row in rows if "eval_loss" in row]
    curves = {metric: [row[f"eval_rewards/{metric}"] for row in held_out] for metric in COLUMNS}
    # The training margin of a row is the mean since the row before; it is 0 before the first step.
    training = [0.0, *(row["rewards/margins"] for row in rows if "loss" in row)]
    return {"step": [row["step"] for row in held_out], "training": training, **curves}


def summary(runs: dict[str, list[dict]]) -> str:
    rows = [
        [label, *(shown([run[key][-1] for run in runs[name]], 3) for key in (*COLUMNS, "training"))]
        for name, label in DATA.items()
    ]
    return table(["", *COLUMNS.values(), "training margin"], rows)


def draw(runs: dict[str, list[dict]], out: Path) -> None:
    """For each data set the margin in training and on held-out pairs, and the two held-out rewards."""
    with canvas(9, 6.4, out) as figure:
        for row, (name, label) in zip(figure.subplots(2, 2, sharex=True), DATA.items(), strict=True):
            steps = runs[name][0]["step"]
            plain(row[0], label, "reward margin, chosen − rejected")
            for key, colour, end in (("training", PALE, "training"), ("margins", INK, "held out")):
                draw_curve(row[0], steps, [run[key] for run in runs[name]], colour, end)
            plain(row[1], "", "held-out rewards, β log π / π_ref")
            for side, colour in (("chosen", BLUE), ("rejected", ORANGE)):
                draw_curve(row[1], steps, [run[side] for run in runs[name]], colour, side)
            for axes in row:
                axes.axhline(0, color=PALE, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
                axes.set_xlim(0, steps[-1])
        for axes in row:
            axes.set_xlabel("optimizer step", color=PALE)
        figure.subplots_adjust(left=0.07, right=0.92, top=0.91, bottom=0.08, wspace=0.35, hspace=0.35)


if __name__ == "__main__":
    run_script(main)
