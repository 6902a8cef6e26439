"""How cost grows: pairs a second and memory against the prompt's share, length, vocabulary and model size.

    python -m bench.growth                       # docs/growth.png, and the table of docs/PERFORMANCE.md
    python -m bench.growth --minutes 10          # what fits; a point of which no run did is left out
    python -m bench.growth --quick               # does it work? into runs/

Our loop alone, one thing changed at a time, each run in a process of its own as in bench/run.py. All pairs of
a point have the same lengths. The reference is cached, so that the step is what the floor counts: forward and
backward of the policy, each prompt once.
"""

import argparse
import json
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from bench.run import describe, look_at, run_one, save, worker
from bench.tables import header, line
from bench.work import SMALL, TINY, Case
from errors import run_script
from eval.report import BLUE, ORANGE, PALE, canvas, need_matplotlib, plain
from model.config import PRESETS, ModelConfig
from model.transformer import Transformer
from training.settings import ROOT

PANELS = {
    "prompt": ("The prompt's share", "share of the tokens of a pair"),
    "length": ("Length", "tokens of prompt and answer"),
    "vocabulary": ("Vocabulary", "tokens"),
    "model": ("Model", "parameters"),
}
SMALLER = dict(hidden_size=128, num_hidden_layers=6, num_attention_heads=4, intermediate_size=352)
LAYOUTS = {"forked": BLUE, "twin": ORANGE}
PAIRS = 4  # a step


@dataclass(frozen=True)
class Point:
    panel: str
    x: float
    layout: str
    case: Case

    @property
    def name(self) -> str:
        return f"{self.panel} {short(self.x)} {self.layout}"


def points(quick: bool = False) -> list[Point]:
    """Each panel changes one thing of a 7.5M model with 6,400 tokens, whose texts are all 256 long."""
    total, half, shape = (96, 32, TINY) if quick else (768, 256, SMALL)
    found = []

    def add(panel, x, lengths, layout="forked", shape=shape, vocabulary=6400) -> None:
        case = Case(shape, vocabulary, lengths[0] + lengths[1], PAIRS, steps=1, lengths=lengths)
        found.append(Point(panel, x, layout, case))

    for eighths in (1, 4, 7) if quick else (1, 2, 3, 4, 5, 6, 7):
        prompt = total * eighths // 8
        for layout in LAYOUTS:
            add("prompt", eighths / 8, (prompt, (total - prompt) // 2, (total - prompt) // 2), layout)
    for length in (64, 128) if quick else (128, 256, 512, 1024, 2048):
        add("length", length, (length // 2,) * 3)
    for vocabulary in (2_048, 8_000) if quick else (2_048, 6_400, 32_000, 152_000):
        add("vocabulary", vocabulary, (half,) * 3, vocabulary=vocabulary)
    for shape in (TINY, SMALLER) if quick else (TINY, SMALLER, SMALL, PRESETS["26m"], PRESETS["104m"]):
        add("model", parameters(shape, 6400), (half,) * 3, shape=shape)
    return found


def parameters(shape: dict, vocabulary: int) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in Transformer(ModelConfig(vocabulary, **shape)).parameters())


def measure(options: argparse.Namespace) -> dict[str, list[dict]]:
    """The runs of each point; rounds of all points, as long as there is time."""
    deadline, runs = time.perf_counter() + 60 * options.minutes, {}
    for number in range(options.rounds):
        for point in points(options.quick):
            if time.perf_counter() < deadline:
                how = ["--precision", options.precision, "--worker", point.name]
                how += ["--quick"] if options.quick else []
                run = worker(how, options.threads, "bench.growth")
                runs.setdefault(point.name, []).append(run)
                print(f"round {number + 1}  {point.name:<30} {run['seconds']:8.2f} s", flush=True)
    return runs


def figures(point: Point, runs: list[dict], rate: float) -> dict:
    """Medians of a point, and what cannot be passed.

    `fastest`: pairs a second if the device did the counted products and nothing else. `least_bytes`: weights,
    gradients and AdamW's two moments in float32, which are always there.
    """
    counted = describe(point.case)
    seconds = statistics.median(run["seconds"] for run in runs)
    return {
        "panel": point.panel, "x": point.x, "layout": point.layout, "rounds": len(runs),
        "pairs_per_second": counted["pairs"] / seconds,
        "fastest": counted["pairs"] / counted["flops"] * rate,
        "peak_bytes": statistics.median(run["peak_bytes"] for run in runs),
        "least_bytes": 16 * parameters(point.case.shape, point.case.vocabulary),
    }  # fmt: skip


def table(rows: list[dict]) -> str:
    lines = header("what grows", "", "layout", "rounds", "pairs/s", "floor, pairs/s", "of it", "peak, GB")
    for row in rows:
        speed, fastest = row["pairs_per_second"], row["fastest"]
        what = [PANELS[row["panel"]][0], short(row["x"]), row["layout"], row["rounds"]]
        of_it, peak = f"{speed / fastest:.0%}", f"{row['peak_bytes'] / 1e9:.2f}"
        lines.append(line(*what, f"{speed:.2f}", f"{fastest:.2f}", of_it, peak))
    return "\n".join(lines)


def draw(rows: list[dict], out: Path) -> None:
    """Above pairs a second, below memory; a column for each thing that grows."""
    with canvas(12, 6.2, out) as figure:
        speeds, peaks = figure.subplots(2, len(PANELS), sharex="col")
        for speed, peak, (panel, (title, unit)) in zip(speeds, peaks, PANELS.items(), strict=True):
            mine = [row for row in rows if row["panel"] == panel]
            plain(speed, title, "pairs a second")
            plain(peak, "", "peak memory, GB")
            curves(speed, mine, "pairs_per_second", "fastest", unit=1)
            curves(peak, mine, "peak_bytes", "least_bytes", unit=1e9)
            peak.set_xlabel(unit, color=PALE)
        how = dict(ncols=3, loc="upper right", frameon=False, labelcolor="linecolor")
        figure.legend(handles=speeds[0].get_lines(), **how)
        figure.subplots_adjust(left=0.05, right=0.985, top=0.85, bottom=0.085, wspace=0.3, hspace=0.32)


def curves(axes, rows: list[dict], name: str, floor: str, unit: float) -> None:
    """What was measured, a line for each layout; dashed what cannot be passed. All but shares by ratios."""
    from matplotlib.ticker import LogLocator

    for layout, colour in LAYOUTS.items():
        mine = [row for row in rows if row["layout"] == layout]
        xs = [row["x"] for row in mine]
        if xs:
            axes.plot(xs, [row[name] / unit for row in mine], "o-", color=colour, markersize=5, label=layout)
        if xs and layout == "forked":
            bounds = [row[floor] / unit for row in mine]
            axes.plot(xs, bounds, "--", color=PALE, label="floor: products alone; weights and moments")
    if rows and rows[0]["panel"] == "prompt":
        axes.set_ylim(bottom=0)
    elif rows:
        axes.loglog()
        axes.minorticks_off()
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.set_xticks([row["x"] for row in rows], [short(row["x"]) for row in rows])
        axes.yaxis.set_major_formatter("{x:g}")


def short(x: float) -> str:
    """0.25, 2048, 152k, 7.5M, 26M."""
    if x < 1e4:
        return f"{x:g}"
    return f"{x / 1e3:.0f}k" if x < 1e6 else f"{x / 1e6:.1f}M" if x < 1e7 else f"{x / 1e6:.0f}M"


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="tiny models: does everything work?")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--minutes", type=float, default=30, help="start no run after these")
    parser.add_argument("--precision", default="fp32", choices=("fp32", "bf16"))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", default="runs/growth.json", help="where the figures are saved")
    parser.add_argument("--out", help="the picture; default docs/growth.png, with --quick runs/growth.png")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    if options.worker:
        [point] = [point for point in points(options.quick) if point.name == options.worker]
        how = f"ours, {point.layout} cached"
        print(json.dumps(run_one(point.case, how, "cpu", options.precision)))
        return
    need_matplotlib()
    machine, rates = look_at("cpu", options.threads)
    print(f"timed in {options.precision} on {machine}")
    runs = measure(options)
    rate = rates[options.precision]
    rows = [figures(p, runs[p.name], rate) for p in points(options.quick) if p.name in runs]
    print(f"\n{table(rows)}")
    save(options.json, {"machine": machine, "precision": options.precision, "points": rows})
    out = Path(options.out) if options.out else ROOT / ("runs" if options.quick else "docs") / "growth.png"
    draw(rows, out)
    print(f"drawn in {out}")


if __name__ == "__main__":
    run_script(main)
