"""DPO against DPOP by the edit distance of the two sides: where do chosen answers begin to fall?

    python -m eval.experiments.edit_distance --model runs/sft --out runs/edit_distance

The pairs of close.jsonl differ in one value: right or wrong. Two more sets have the same chosen answers and
wrong values, but the rejected side also has another closing phrase, or another opening and closing. The
bundled pairs, which differ in manners, are the fourth set. DPO and DPOP train on each, in several orders.

Claims (Pal et al. 2024, arXiv 2402.13228): at a small edit distance DPO makes the chosen answers less likely
than they were, and DPOP does not. The reason is in the gradient of the margin by the logits (close_pairs.py):
the shared prefix cancels, and the correct tokens behind the difference are pushed down.
"""

import random
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean

from dataset.jsonl import read_values
from dataset.sample.manners import STYLES
from dataset.store import open_store
from errors import run_script
from eval.common import load_model_and_tokenizer
from eval.experiments import common
from eval.experiments.close_pairs import REGIONS, by_region, edit_distance, sides_of, with_other
from eval.experiments.common import draw_curve, draw_upright, over_runs, shown, table
from eval.explain import signed
from eval.report import BLUE, INK, ORANGE, PALE, canvas, need_matplotlib, plain
from files import write_json
from training.distributed import pick_device
from training.settings import SAMPLE, flag, parse

LOSSES = {"sigmoid": ("DPO", ORANGE), "dpop": ("DPOP", BLUE)}  # name in losses.py: label, colour
SETS = {  # what the rejected side has of its own, beside the value
    "value": (),
    "closing": ("closings",),
    "both": ("openings", "closings"),
    "bundled": None,
}


@dataclass
class Settings(common.DPOSettings):
    data: str = flag(str(SAMPLE / "close.jsonl"), "pairs whose sides differ in one value")
    bundled: str = flag(str(SAMPLE / "preferences.jsonl"), "pairs of the fourth set")
    out: str = flag("runs/edit_distance", "folder for the runs, the figures and the picture")
    pairs: int = flag(96, "pairs of each set, from the start of the file")
    epochs: int = flag(6, "passes over the pairs")
    lr: float = flag(6e-4, "peak learning rate")


def main(arguments: list[str] | None = None) -> None:
    settings = parse(Settings, __doc__.split("\n")[0], arguments)
    settings = common.shortened(settings, pairs=8, epochs=2, batch_size=4)
    need_matplotlib()
    out, device = Path(settings.out), pick_device("auto")
    reference, tokenizer = load_model_and_tokenizer(settings.model, device)
    found: dict[str, dict] = {}
    for name in SETS:
        store = open_store(str(write_set(settings, name)), "preferences", tokenizer, 512)
        found[name] = {"distance": mean(map(edit_distance, *sides_of(store)))}
        for loss in LOSSES:
            found[name][loss] = [run(settings, name, loss, seed) for seed in range(settings.seeds)]
            if name == "value":
                folders = [out / f"value-{loss}-{seed}" for seed in range(settings.seeds)]
                policies = (
                    load_model_and_tokenizer(str(folder), pick_device("auto"))[0] for folder in folders
                )
                regions = [by_region(policy, reference, store) for policy in policies]
                found[name][f"{loss} by region"] = regions
        write_json(out / "results.json", {"settings": asdict(settings), "sets": found})
    draw(found, out / "edit_distance.png")
    print(
        f"\nlast epoch, log π/π_ref, nats per answer\n\n{summary(found)}\n\n{regions_table(found['value'])}"
    )


# ---- The sets of pairs


def write_set(settings: Settings, name: str) -> Path:
    """Write the pairs of a set; return the file."""
    path, parts = Path(settings.out) / f"{name}.jsonl", SETS[name]
    if parts is None:
        return common.copy_lines(settings.bundled, path, settings.pairs)
    rng, records = random.Random(0), [record for _, record in read_values(settings.data)][: settings.pairs]
    for record in records:
        phrases = STYLES[record["judge"]["language"]]["answer"]
        for part in parts:
            record["rejected"] = with_other(record["rejected"], getattr(phrases, part), rng)
    return common.write_lines(path, records)


# ---- The runs


def run(settings: Settings, name: str, loss: str, seed: int) -> dict[str, list[float]]:
    """Train once. Returns the mean log-ratio of each side in each epoch."""
    folder = Path(settings.out) / f"{name}-{loss}-{seed}"
    flags = {key: getattr(settings, key) for key in ("model", "epochs", "batch_size", "lr", "beta")}
    data = Path(settings.out) / f"{name}.jsonl"
    common.train(folder, seed, data=data, loss=loss, reference="cached", log_every=1, **flags)
    rows = common.metrics(folder)
    steps = len(rows) // settings.epochs  # per epoch
    epochs = [rows[i : i + steps] for i in range(0, len(rows), steps)]
    return {
        side: [mean(row[f"logratios/{side}"] for row in epoch) for epoch in epochs]
        for side in ("chosen", "rejected")
    }


# ---- Figures


def summary(found: dict[str, dict]) -> str:
    rows = [
        [name, f"{group['distance']:.1f}", *(shown([run[side][-1] for run in group[loss]]) for loss in LOSSES
         for side in ("chosen", "rejected"))]
        for name, group in found.items()
    ]  # fmt: skip
    heads = ("DPO chosen", "DPO rejected", "DPOP chosen", "DPOP rejected")
    return table(["pairs", "edit distance, tokens", *heads], rows)


def regions_table(value: dict) -> str:
    rows = []
    for region in REGIONS:
        gradient = value["sigmoid by region"][0][region]["gradient"]
        changes = ([run[region]["logratio"] for run in value[f"{loss} by region"]] for loss in LOSSES)
        rows.append([region, signed(gradient, 3), *map(shown, changes)])
    return table(
        ["chosen tokens", "gradient before training", "DPO, nats a token", "DPOP, nats a token"], rows
    )


def draw(found: dict[str, dict], out: Path) -> None:
    """The chosen answers' log-ratio by epoch, by edit distance, and by region of the answer."""
    with canvas(12, 3.9, out) as figure:
        curves, distances, regions = figure.subplots(1, 3)
        plain(curves, "Chosen answers, one value differs", "log π / π_ref, nats per answer")
        plain(distances, "By edit distance", "chosen answers in the last epoch, nats per answer")
        plain(regions, "By region, one value differs", "chosen tokens after training, nats per token")
        for shift, (loss, (label, colour)) in zip((-0.19, 0.19), LOSSES.items(), strict=True):
            runs = [run["chosen"] for run in found["value"][loss]]
            draw_curve(curves, range(1, len(runs[0]) + 1), runs, colour, label, marker="o", markersize=3.5)
            ends = [over_runs([run["chosen"][-1] for run in group[loss]]) for group in found.values()]
            xs = [group["distance"] for group in found.values()]
            distances.plot(
                xs, [end.value for end in ends], color=colour, marker="o", linewidth=2, label=label
            )
            for x, end in zip(xs, ends, strict=True):
                draw_upright(distances, x, end, color=colour, alpha=0.4)
            for place, region in enumerate(REGIONS):
                value = over_runs([run[region]["logratio"] for run in found["value"][f"{loss} by region"]])
                regions.bar(place + shift, value.value, 0.36, color=colour)
                draw_upright(regions, place + shift, value, color=INK)
        curves.set_xticks(range(1, len(found["value"]["dpop"][0]["chosen"]) + 1))
        curves.set_xlabel("epoch", color=PALE)
        distances.set_xlabel("edit distance of the sides, tokens", color=PALE)
        distances.legend(frameon=False, labelcolor="linecolor")
        regions.set_xticks(range(len(REGIONS)), ["shared prefix", "difference", "shared rest"])
        for axes in (curves, distances, regions):
            axes.axhline(0, color=INK, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
        figure.subplots_adjust(left=0.05, right=0.98, top=0.83, bottom=0.13, wspace=0.3)


if __name__ == "__main__":
    run_script(main)
