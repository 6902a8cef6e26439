"""What goes wrong: five known bugs of DPO, each beside the right run, with the curves that it gives.

    python -m eval.experiments.bugs --model runs/sft --out runs/bugs

Every bug is a few lines below. All runs have the same pairs, order and settings. `logged` is the loss that a
run with the bug reports. The other curves are measured with the right code on held-out pairs, and at the end
on sampled answers. Claim: most bugs do not show in the logged loss.

tests/planted has more than a hundred bugs like these, each with the test that finds it.
"""

import copy
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import mean

from torch import Tensor

from errors import run_script
from eval.common import load_model_and_tokenizer
from eval.experiments import common
from eval.experiments.common import dpo_steps, draw_curve, open_first, pair_logps, shown, table
from eval.experiments.overoptimisation import implicit, true
from eval.judge import read_judged
from eval.report import BLUE, INK, ORANGE, PALE, canvas, need_matplotlib, plain
from files import write_json
from model.stream import TokenStream
from model.transformer import Transformer
from training.distributed import pick_device
from training.settings import SAMPLE, flag, parse

GREEN, ROSE = "#3f7d58", "#b0406a"


@dataclass
class Settings(common.DPOSettings):
    data: str = flag(str(SAMPLE / "preferences.jsonl"), "training pairs")
    held_out: str = flag(str(SAMPLE / "heldout.jsonl"), "held-out pairs with a `judge` field")
    out: str = flag("runs/bugs", "folder for the figures and the picture")
    pairs: int = flag(400, "training pairs, from the start of the file")
    prompts: int = flag(100, "held-out pairs and prompts, from the start of the file")
    points: int = flag(4, "evaluations during a run, at equal distances")
    epochs: int = flag(1, "passes over the pairs")
    lr: float = flag(3e-4, "peak learning rate")


# ---- The bugs


def means(model: Transformer, stream: TokenStream) -> tuple[Tensor, Tensor]:
    """The mean over an answer's tokens in place of the sum: β is divided by the length."""
    lengths = stream.sum_by_side(stream.targets.new_ones(len(stream.targets)).float())
    return tuple(logps / n for logps, n in zip(pair_logps(model, stream), lengths, strict=True))


def without_end(model: Transformer, stream: TokenStream) -> tuple[Tensor, Tensor]:
    """The last token of each answer, its end token, is not scored."""
    return pair_logps(model, kept(stream, stream.owners == next_owner(stream)))


def unshifted(model: Transformer, stream: TokenStream) -> tuple[Tensor, Tensor]:
    """The targets are not shifted: the state at a token, which predicts the next one, is scored on itself."""
    same = replace(stream, targets=stream.targets.roll(1))
    return pair_logps(model, kept(same, stream.owners == stream.owners.roll(1)))


def next_owner(stream: TokenStream) -> Tensor:
    """The response of the next supervised token, (N,); behind the last one a number that no response has."""
    owners = stream.owners.roll(-1)
    owners[-1] = -1
    return owners


def kept(stream: TokenStream, mask: Tensor) -> TokenStream:
    """The stream with these of its supervised tokens, (N,)."""
    names = "predictors", "targets", "owners"
    return replace(stream, **{name: getattr(stream, name)[mask] for name in names})


@dataclass(frozen=True)
class Variant:
    colour: str
    pair_logps: Callable = pair_logps
    lr: float | None = None  # None: that of the settings
    aliased: bool = False  # the reference is the policy itself, not a frozen copy


VARIANTS = {
    "right": Variant(INK),
    "mean for sum": Variant(BLUE, pair_logps=means),
    "learning rate 1e-8": Variant(PALE, lr=1e-8),
    "no end token": Variant(GREEN, pair_logps=without_end),
    "aliased reference": Variant(ORANGE, aliased=True),
    "mask not shifted": Variant(ROSE, pair_logps=unshifted),
}


# ---- The runs


def main(arguments: list[str] | None = None) -> None:
    settings = parse(Settings, __doc__.split("\n")[0], arguments)
    settings = common.shortened(settings, pairs=8, prompts=4, points=2, batch_size=4, epochs=1)
    need_matplotlib()
    runs = {name: [run(settings, v, seed) for seed in range(settings.seeds)] for name, v in VARIANTS.items()}
    out = Path(settings.out)
    write_json(out / "results.json", {"settings": asdict(settings), "runs": runs})
    draw(runs, out / "bugs.png")
    print("\nafter the last step\n\n" + summary(runs))


def run(settings: Settings, variant: Variant, seed: int) -> dict[str, list[float]]:
    """Train once, with a bug or without. Returns the logged loss and the right code's measurements."""
    policy, tokenizer = load_model_and_tokenizer(settings.model, pick_device("auto"))
    frozen = copy.deepcopy(policy)
    out = Path(settings.out)
    training = open_first(settings.data, out / "train.jsonl", settings.pairs, tokenizer)
    pairs = open_first(settings.held_out, out / "heldout.jsonl", settings.prompts, tokenizer)

    reference = policy if variant.aliased else frozen
    flags = {key: getattr(settings, key) for key in ("model", "epochs", "batch_size", "beta")}
    flags |= dict(lr=variant.lr or settings.lr, pair_logps=variant.pair_logps)
    total = settings.epochs * math.ceil(len(training) / settings.batch_size)
    measured_at = {round(total * (i + 1) / settings.points) for i in range(settings.points)}
    figures, losses = (
        [{"step": 0, "logged": math.log(2), **implicit(policy, frozen, pairs, settings.beta)}],
        [],
    )
    for step in dpo_steps(policy.requires_grad_(True), reference, training, seed, **flags):
        losses += step.losses.tolist()
        if step.number in measured_at:
            found = implicit(policy, frozen, pairs, settings.beta)
            figures.append({"step": step.number, "logged": mean(losses), **found})
            losses = []
    curves = {name: [each[name] for each in figures] for name in figures[0]}
    return curves | true(policy, frozen, tokenizer, read_judged(str(out / "heldout.jsonl")), seed)


# ---- Figures

PANELS = {
    "logged": ("Logged loss", "what the run reports, mean since the point before"),
    "accuracy": ("Held-out accuracy", "r_w > r_l, by the right code"),
    "margin": ("Held-out reward margin", "r_w − r_l, by the right code"),
    "chosen": ("Chosen answers", "log π / π_ref, nats, by the right code"),
}


def summary(runs: dict[str, list[dict]]) -> str:
    heads = ["", "logged loss", "accuracy", "margin", "chosen, nats", "right answers", "points", "end token"]
    rows = []
    for name, group in runs.items():
        curves = [shown([run[key][-1] for run in group], 3 if key == "logged" else 2) for key in PANELS]
        rows.append(
            [name, *curves, *(shown([run[key] for run in group]) for key in ("right", "points", "ended"))]
        )
    return table(heads, rows)


def draw(runs: dict[str, list[dict]], out: Path) -> None:
    """One plot per figure, one line per bug; the right run is thick."""
    with canvas(9.5, 6.4, out) as figure:
        grid = figure.subplots(2, 2, sharex=True)
        for axes, (key, title) in zip(grid.flat, PANELS.items(), strict=True):
            plain(axes, *title)
            for name, group in runs.items():
                line = dict(linewidth=4, alpha=0.35) if name == "right" else dict(marker="o", markersize=3.5)
                colour, curves = VARIANTS[name].colour, [run[key] for run in group]
                draw_curve(axes, group[0]["step"], curves, colour, "", **line, label=name)
        for axes in grid[1]:
            axes.set_xlabel("optimizer step", color=PALE)
        lines, names = grid[0, 0].get_legend_handles_labels()
        figure.legend(lines, names, frameon=False, loc="center right", labelcolor="linecolor")
        figure.subplots_adjust(left=0.06, right=0.8, top=0.91, bottom=0.08, wspace=0.25, hspace=0.4)


if __name__ == "__main__":
    run_script(main)
