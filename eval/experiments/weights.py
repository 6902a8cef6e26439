"""How DPO's gradient weighs pairs: easy pairs lose their weight, wrongly labelled ones keep it.

    python -m eval.experiments.weights --model runs/sft --out runs/weights

The gradient of DPO's loss for one pair is −w [∇ log π(y_w|x) − ∇ log π(y_l|x)] with the weight

    w = β σ(r_l − r_w),    r = β log π/π_ref

(Rafailov et al. 2023, arXiv 2305.18290, section 4, "What does the DPO update do?"). The claim: a pair weighs
more, the more wrongly the implicit reward orders it. Three groups of pairs are known beforehand: `manners`
(the rejected answer is not courteous), `value` (both are courteous, the rejected one is wrong), and `flipped`
(pairs of manners whose sides are exchanged here). They train together, and w is recorded.
"""

import copy
import random
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean

from dataset.store import open_store
from errors import InputError, run_script
from eval.common import load_model_and_tokenizer
from eval.experiments import common
from eval.experiments.common import Step, dpo_steps, draw_curve, shown, table, write_lines
from eval.judge import read_judged
from eval.report import BLUE, INK, ORANGE, PALE, VIOLET, canvas, need_matplotlib, plain
from eval.verdict import is_courteous, normal
from files import write_json
from training.distributed import pick_device
from training.settings import SAMPLE, flag, parse

GROUPS = {"manners": BLUE, "value": VIOLET, "flipped": ORANGE}


@dataclass
class Settings(common.DPOSettings):
    data: str = flag(str(SAMPLE / "preferences.jsonl"), "pairs of the groups manners and value")
    out: str = flag("runs/weights", "folder for the figures and the picture")
    pairs: int = flag(200, "pairs of the group manners, flipped ones included")
    flipped: float = flag(0.1, "share of them whose sides are exchanged")
    epochs: int = flag(4, "passes over the pairs; each is one point of the curves")
    lr: float = flag(2e-4, "peak learning rate")


def main(arguments: list[str] | None = None) -> None:
    settings = parse(Settings, __doc__.split("\n")[0], arguments)
    settings = common.shortened(settings, pairs=20, epochs=2, batch_size=8)
    need_matplotlib()
    runs = [run(settings, seed) for seed in range(settings.seeds)]
    out = Path(settings.out)
    write_json(out / "results.json", {"settings": asdict(settings), "runs": runs})
    draw(runs, settings, out / "weights.png")
    print("\nlast epoch\n\n" + summary(runs))


def run(settings: Settings, seed: int) -> dict[str, dict[str, list[float]]]:
    """Train once. Returns for each group, by epoch, mean weight, share of all weight and accuracy."""
    groups = make_groups(settings, seed)
    records = [record for group in groups.values() for record in group]
    names = [name for name, group in groups.items() for _ in group]
    path = write_lines(Path(settings.out) / f"pairs-{seed}.jsonl", records)
    policy, tokenizer = load_model_and_tokenizer(settings.model, pick_device("auto"))
    pairs = open_store(str(path), "preferences", tokenizer, 512)
    owners = [names[line - 1] for line in pairs.lines]  # a dropped pair has no row
    flags = {key: getattr(settings, key) for key in ("model", "epochs", "batch_size", "lr", "beta")}
    reference = copy.deepcopy(policy)
    steps = list(dpo_steps(policy.requires_grad_(True), reference, pairs, seed, **flags))
    per_epoch = len(steps) // settings.epochs
    epochs = [
        by_group(steps[i : i + per_epoch], owners, settings.beta) for i in range(0, len(steps), per_epoch)
    ]
    found = {
        name: {key: [epoch[name][key] for epoch in epochs] for key in epochs[0][name]} for name in GROUPS
    }
    return found | {"sizes": {name: owners.count(name) / len(owners) for name in GROUPS}}


def make_groups(settings: Settings, seed: int) -> dict[str, list[dict]]:
    """The pairs of each group. A seed draws those of manners; the group value has all that there are."""
    manners, value = [], []
    for record in read_judged(settings.data):
        pair = {"prompt": [vars(message) for message in record["prompt"]]}
        pair |= {side: record[side] for side in ("chosen", "rejected")}
        courteous = is_courteous(record["judge"]["language"], normal(record["rejected"]))
        (value if courteous else manners).append(pair)
    if len(manners) < settings.pairs:
        found = f"{settings.data}: {len(manners)} pairs of manners"
        raise InputError(f"{found}, fewer than --pairs {settings.pairs}")
    random.Random(seed).shuffle(manners)
    wrong = max(1, round(settings.flipped * settings.pairs))
    flipped = [{**p, "chosen": p["rejected"], "rejected": p["chosen"]} for p in manners[:wrong]]
    return {"manners": manners[wrong : settings.pairs], "value": value[: settings.pairs], "flipped": flipped}


def weight(step: Step, beta: float) -> list[float]:
    """w = β σ(r_l − r_w) of each pair of a step, with r = β log π/π_ref."""
    return (beta * (-beta * step.margins).sigmoid()).tolist()


def by_group(steps: list[Step], owners: list[str], beta: float) -> dict[str, dict[str, float]]:
    """Of each group over these steps: mean weight, share of the sum of all weights, accuracy."""
    weights: dict[str, list[float]] = {name: [] for name in GROUPS}
    won: dict[str, list[bool]] = {name: [] for name in GROUPS}
    for step in steps:
        for row, w, margin in zip(step.rows, weight(step, beta), step.margins.tolist(), strict=True):
            weights[owners[row]].append(w)
            won[owners[row]].append(margin > 0)
    total = sum(map(sum, weights.values()))
    return {
        name: {
            "weight": sum(weights[name]) / len(weights[name]),
            "share": sum(weights[name]) / total,
            "accuracy": sum(won[name]) / len(won[name]),
        }
        for name in GROUPS
    }


def summary(runs: list[dict]) -> str:
    rows = []
    for name in GROUPS:
        last = {key: [run[name][key][-1] for run in runs] for key in ("weight", "share", "accuracy")}
        sizes = [run["sizes"][name] for run in runs]
        columns = shown(last["weight"], 4), shown(sizes), shown(last["share"]), shown(last["accuracy"])
        rows.append([name, *columns])
    return table(["pairs", "weight β σ(r_l − r_w)", "share of pairs", "share of weight", "accuracy"], rows)


def draw(runs: list[dict], settings: Settings, out: Path) -> None:
    """By epoch, of each group: the mean weight, the share of the sum of all weights, and the accuracy."""
    epochs = list(range(1, settings.epochs + 1))
    titles = {
        "weight": ("Weight of a pair", "β σ(r_l − r_w), mean of the epoch; dashed: β/2"),
        "share": ("Share of the gradient", "of the sum of all weights; dashed: share of the pairs"),
        "accuracy": ("Pairs in order", "share with r_w > r_l"),
    }
    dashed = dict(linewidth=1, linestyle=(0, (4, 3)), zorder=1)
    with canvas(11.5, 3.9, out) as figure:
        plots = figure.subplots(1, 3)
        for axes, (key, title) in zip(plots, titles.items(), strict=True):
            plain(axes, *title)
            axes.set_xlabel("epoch", color=PALE)
            axes.set_xticks(epochs)
            for name, colour in GROUPS.items():
                curves = [run[name][key] for run in runs]
                draw_curve(axes, epochs, curves, colour, "", marker="o", markersize=4, label=name)
                if key == "share":
                    axes.axhline(mean(run["sizes"][name] for run in runs), color=colour, **dashed)
            axes.set_ylim(0, settings.beta if key == "weight" else 1.02)
        plots[0].axhline(settings.beta / 2, color=INK, **dashed)
        plots[2].legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1), labelcolor="linecolor")
        figure.subplots_adjust(left=0.05, right=0.89, top=0.83, bottom=0.13, wspace=0.25)


if __name__ == "__main__":
    run_script(main)
