"""DPO against DPOP on pairs that differ in one or two tokens: does the chosen answer become less likely?

    python -m eval.experiments.edit_distance --model runs/sft --out runs/edit_distance

DPO's loss depends only on the difference of the two log-ratios. If both answers consist of almost the same
tokens, a step that lowers one lowers the other too, and the chosen answers become less likely than they were
(Pal et al. 2024, arXiv 2402.13228). DPOP adds a penalty for that. Both losses train on the same pairs, in
several orders of the data. Writes OUT/results.json and OUT/edit_distance.png.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean

import train_dpo
from errors import run_script
from eval.report import BLUE, INK, ORANGE, PALE, canvas, need_matplotlib, plain
from files import write_json
from training.settings import SAMPLE, flag, parse

LOSSES = {"sigmoid": ("DPO", ORANGE), "dpop": ("DPOP", BLUE)}  # name in losses.py: label, colour
SIDES = {"chosen": "Chosen answers", "rejected": "Rejected answers"}


@dataclass
class Settings:
    model: str = flag("runs/sft", "model folder to start from; its frozen copy is the reference")
    data: str = flag(str(SAMPLE / "close.jsonl"), "pairs whose sides differ in one or two tokens")
    out: str = flag("runs/edit_distance", "folder for the runs, the figures and the picture")
    seeds: int = flag(3, "runs of each loss, each with its own order of the data")
    epochs: int = flag(8, "passes over the pairs")
    batch_size: int = flag(32, "pairs per optimizer step")
    lr: float = flag(5e-4, "peak learning rate")
    beta: float = flag(0.1, "KL strength: a larger beta keeps the policy closer to the reference")


def main(arguments: list[str] | None = None) -> None:
    settings = parse(Settings, __doc__.split("\n")[0], arguments)
    need_matplotlib()
    out = Path(settings.out)
    runs = {name: [run(settings, name, seed) for seed in range(settings.seeds)] for name in LOSSES}
    write_json(out / "results.json", {"settings": asdict(settings), "runs": runs})
    draw(runs, out / "edit_distance.png")
    print(f"\nlog π/π_ref, nats per answer, in the last epoch: mean (range) of {settings.seeds} runs")
    for name, (label, _) in LOSSES.items():
        for side in SIDES:
            low, middle, high = spread([curve[side][-1] for curve in runs[name]])
            print(f"{label:<6}{side:<10}{middle:>8.2f}  ({low:.2f} to {high:.2f})")


def run(settings: Settings, loss: str, seed: int) -> dict[str, list[float]]:
    """Train once. Returns the middle step of each epoch, and the mean log-ratio of each side in it."""
    folder = Path(settings.out) / f"{loss}-{seed}"
    names = ("model", "data", "epochs", "batch_size", "lr", "beta")
    flags = [f"--{name.replace('_', '-')}={getattr(settings, name)}" for name in names]
    flags += [f"--loss={loss}", f"--seed={seed}", "--eval-data=", "--log-every=1"]
    flags += ["--overwrite", f"--out={folder}"]
    train_dpo.main(flags)

    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text("utf-8").splitlines()]
    steps = len(rows) // settings.epochs  # per epoch; each epoch ends with a short window
    epochs = [rows[i : i + steps] for i in range(0, len(rows), steps)]
    ratios = {
        side: [mean(row[f"rewards/{side}"] for row in epoch) / settings.beta for epoch in epochs]
        for side in SIDES
    }
    return {"step": [mean(row["step"] for row in epoch) for epoch in epochs], **ratios}


def spread(values: list[float]) -> tuple[float, float, float]:
    """Lowest value, mean, highest value."""
    return min(values), mean(values), max(values)


def draw(runs: dict[str, list[dict]], out: Path) -> None:
    """One plot per side of the pairs: the mean over the runs, shaded from the lowest to the highest run."""
    with canvas(9, 3.9, out) as figure:
        for axes, (side, title) in zip(figure.subplots(1, 2), SIDES.items(), strict=True):
            plain(axes, title, "log π / π_ref, nats per answer, mean of each epoch")
            axes.axhline(0, color=INK, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
            axes.set_xlabel("optimizer step", color=PALE)
            for name, (label, colour) in LOSSES.items():
                # All runs start at the reference, where both log-ratios are 0.
                steps = [0, *runs[name][0]["step"]]
                curves = zip(*(curve[side] for curve in runs[name]), strict=True)
                low, middle, high = zip((0, 0, 0), *map(spread, curves), strict=True)
                axes.fill_between(steps, low, high, color=colour, alpha=0.2, linewidth=0)
                axes.plot(steps, middle, color=colour, linewidth=2, marker="o", markersize=3.5)
                name_at_end = f" {label}\n {middle[-1]:.1f}".replace("-", "−")
                axes.text(steps[-1], middle[-1], name_at_end, color=colour, va="center", weight="bold")
            axes.set_xlim(0, steps[-1])
        figure.subplots_adjust(left=0.06, right=0.93, top=0.83, bottom=0.13, wspace=0.35)


if __name__ == "__main__":
    run_script(main)
