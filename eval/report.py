"""Show whether a run worked: one HTML page with its figures, curves and held-out pairs, token by token.

    python -m eval.report runs/dpo                    # writes runs/dpo/report.html
    python -m eval.report runs/dpo runs/ipo --out compare.html
    python -m eval.report runs/dpo --png              # the curves only, as runs/dpo/report.png
    python -m eval.report runs/dpo --lang zh          # in Chinese, as by default where LANG is Chinese

The page needs no network and no other file. It also shows RUN/samples.jsonl, which training writes, and
RUN/judge.json (of `eval.judge --json`) or the demo's, if they exist. Thin lines are means over the training
steps between two rows of `metrics.jsonl`. Heavy lines with dots are held-out data. `--png` needs matplotlib.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import cycle
from pathlib import Path

from dataset.jsonl import printable
from dataset.other_files import require_data_file
from errors import InputError, run_script
from eval import page
from eval.common import print_note
from eval.curves import (
    BLUE,
    FAINT,
    INK,
    ORANGE,
    PALE,
    PARTS,
    VIOLET,
    Curve,
    Panel,
    last_finite,
    read_curves,
    read_samples,
    shown_panels,
)
from eval.pairs import measure
from eval.words import LANG_WHY, LANGUAGES, language
from files import write_whole
from model.weights import read_json, require_folder
from training.settings import DEVICE_WHY, DEVICES, OneLineParser

__all__ = ["BLUE", "ORANGE", "VIOLET"]  # for the pictures of the experiments


def main(arguments: list[str] | None = None) -> None:
    parser = OneLineParser(prog="python -m eval.report", description=__doc__.split("\n")[0])
    parser.add_argument("run", nargs="+", help="run folders that contain metrics.jsonl")
    parser.add_argument("--out", help="file to write; default: report.html or report.png in the first folder")
    parser.add_argument("--png", action="store_true", help="draw the curves of one run as a PNG instead")
    parser.add_argument("--pairs", type=int, default=200, help="most held-out pairs to measure and to show")
    parser.add_argument("--data", default="", help="preference pairs; default: the run's held-out pairs")
    parser.add_argument("--reference", default="", help="model folder; default: the start of the run")
    parser.add_argument("--device", default="auto", choices=DEVICES, help=DEVICE_WHY)
    parser.add_argument("--lang", default="auto", choices=LANGUAGES, help=LANG_WHY)
    given = parser.parse_args(arguments)
    if given.pairs < 1:
        raise InputError(f"--pairs must be at least 1, not {given.pairs}")
    if given.png:
        if len(given.run) > 1:
            raise InputError(f"--png takes one run, not {' '.join(given.run)}")
        print(printable(str(picture(given.run[0], given.out))))
        return
    if given.data:
        require_data_file(Path(given.data))
    if given.reference:
        require_folder(Path(given.reference))
    options = {name: getattr(given, name) for name in ("pairs", "data", "reference", "device")}
    with language(given.lang):
        print(printable(str(write_page(given.run, given.out, **options))))


def write_page(runs: list[str], out: str | Path | None = None, **options) -> Path:
    """Write the report of runs as a page; return its path. `options` are those of `eval.pairs.measure`.

    A run whose pairs cannot be measured, such as SFT, has its curves only; the page names the reason.
    """
    for run in runs:
        require_folder(Path(run))
    curves = [read_curves(Path(run) / "metrics.jsonl") for run in runs]
    require_panels(curves, runs[0])
    names = [Path(run).resolve().name for run in runs]
    names = names if len({*names}) == len(runs) else runs
    shown = [shown_run(*run, options) for run in zip(runs, names, cycle(page.COLOURS), curves, strict=False)]
    out = Path(out or Path(runs[0]) / "report.html")
    text = page.page(shown).encode("utf-8", "backslashreplace")
    write_whole(out, lambda file: file.write(text))
    return out


def shown_run(folder: str, name: str, colour: str, curves: dict[str, Curve], options: dict) -> page.Shown:
    """A run with everything that its page shows: curves, pairs, the judge's file, samples."""
    measured, reason = None, ""
    try:
        measured = measure(folder, **options)
    except InputError as error:
        reason = str(error)
        print_note(f"no pairs on the page: {error}")
    samples = read_samples(Path(folder) / "samples.jsonl")
    return page.Shown(folder, name, colour, curves, measured, reason, judge_of(folder), samples)


def judge_of(folder: str) -> dict:
    """The figures in RUN/judge.json, or in that of a demo, beside the run; {} without such a file.

    Figures of `eval.judge` with --scorer or --reward have no right answers, and the page does not show them.
    """
    own, demo = Path(folder) / "judge.json", Path(folder).parent / "judge.json"
    if own.is_file():
        figures = read_json(own)
        return figures if "right_answers" in figures else {}
    figures = read_json(demo) if demo.is_file() else {}
    is_about_it = next(iter(figures.get("right_answers", ())), None) == Path(folder).name
    return figures if is_about_it else {}


def require_panels(runs: list[dict[str, Curve]], title: str) -> list[Panel]:
    """The panels of the runs. Raises `InputError` if there are none."""
    if not (panels := shown_panels(runs)):
        raise InputError(f"{title}: metrics.jsonl contains none of the metrics that this picture shows")
    return panels


def picture(run: str | Path, out: str | Path | None = None) -> Path:
    """Draw the run of a folder into `out`, by default RUN/report.png; return the path of the picture."""
    require_folder(Path(run))
    out = Path(out or Path(run) / "report.png")
    draw(read_curves(Path(run) / "metrics.jsonl"), str(run), out)
    return out


def draw(curves: dict[str, Curve], title: str, out: Path) -> None:
    """Draw the panels whose metrics are in `curves` as a PNG, 1800 pixels wide."""
    panels = require_panels([curves], title)
    columns = 3 if len(panels) > 4 else min(2, len(panels))
    rows = math.ceil(len(panels) / columns)
    with canvas(12, 1.3 + 2.9 * rows, out) as figure:
        grid = figure.subplots(rows, columns, sharex=True, squeeze=False).flat
        last_step = max(max(curve) for curve in curves.values())
        for place, axes in enumerate(grid):
            if place >= len(panels):
                axes.remove()
                continue
            draw_panel(axes, panels[place], curves, last_step)
            if place + columns >= len(panels):  # no panel below it
                axes.tick_params(labelbottom=True)
                axes.set_xlabel("optimizer step", color=PALE)
        header(figure, curves, title, last_step)


def need_matplotlib() -> None:
    """Raise `InputError` if matplotlib is missing. Long experiments call it before they train."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise InputError("pictures need matplotlib: pip install matplotlib") from None


@contextmanager
def canvas(width: float, height: float, out: Path) -> Iterator:
    """A matplotlib figure, `width` by `height` inches, that is saved as a PNG with 150 pixels per inch."""
    need_matplotlib()
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with rc_context({"font.size": 9.5, "text.color": INK, "axes.edgecolor": PALE}):
        figure = Figure(figsize=(width, height), facecolor="white")
        FigureCanvasAgg(figure)
        yield figure
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
            figure.savefig(out, dpi=150, format="png")
        except OSError as error:
            raise InputError(f"{out}: cannot be written ({error.strerror})") from None


def header(figure, curves: dict[str, Curve], title: str, last_step: int) -> None:
    """Write the run's name, its last figures and a legend above the panels."""
    inch = 1 / figure.get_figheight()
    words = [f"{last_step} steps"]
    for label, name in (("loss", "loss"), ("accuracy", "rewards/accuracies"), ("margin", "rewards/margins")):
        held_out = "eval_" + name in curves
        if value := last_finite(curves.get("eval_" + name if held_out else name, {})):
            words.append(f"{'held-out ' if held_out else ''}{label} {value[1]:.3g}")
    figure.text(0.055, 1 - 0.42 * inch, title, size=16, weight="bold", parse_math=False)
    figure.text(0.055, 1 - 0.70 * inch, "   ·   ".join(words), size=10, color=PALE)
    if any(name.startswith("eval_") for name in curves):
        reading = "thin: training      heavy: held-out data"
        figure.text(0.985, 1 - 0.70 * inch, reading, size=10, color=PALE, ha="right")
    figure.subplots_adjust(
        left=0.055, right=0.935, top=1 - 1.55 * inch, bottom=0.55 * inch, wspace=0.46, hspace=0.42
    )


def plain(axes, title: str, unit: str) -> None:
    """Set title and unit of a plot, and remove the lines that carry no information."""
    axes.set_title(title, loc="left", size=11, weight="bold", pad=19)
    place = {"xycoords": "axes fraction", "textcoords": "offset points"}
    axes.annotate(unit, (0, 1), (0, 5), size=8.5, color=PALE, parse_math=False, **place)
    axes.grid(axis="y", color=FAINT, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(colors=PALE, length=0, labelsize=8.5)


def draw_panel(axes, panel: Panel, curves: dict[str, Curve], last_step: int) -> None:
    """Draw the curves of one panel, each with its label and last value at its end."""
    plain(axes, panel.title, panel.unit)
    axes.locator_params(axis="both", nbins=5)
    ends = []  # (height, label, colour) of each curve
    for name, label, colour in panel.curves:
        training, held_out = (curves.get(part + name, {}) for part in PARTS)
        thin = {"linewidth": 1.0, "alpha": 0.45} if held_out else {"linewidth": 1.6}
        heavy = {"linewidth": 2.0, "marker": "o", "markersize": 4, "clip_on": False, "zorder": 3}
        axes.plot(list(training), list(training.values()), color=colour, **thin)
        axes.plot(list(held_out), list(held_out.values()), color=colour, **heavy)
        if end := last_finite(held_out or training):
            ends.append((end[1], f"{label}\n{end[1]:.3g}".strip().replace("-", "−"), colour))
    axes.set_xlim(0, max(1, last_step))
    if panel.from_zero:
        axes.set_ylim(bottom=0)
    if panel.mark is not None:
        axes.axhline(panel.mark, color=PALE, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
        place = {"xycoords": axes.get_yaxis_transform(), "textcoords": "offset points", "ha": "right"}
        axes.annotate(panel.mark_label, (1, panel.mark), (0, 3), size=8.5, color=PALE, **place)
    name_ends(axes, ends)


def name_ends(axes, ends: list[tuple[float, str, str]]) -> None:
    """Write each label right of the plot at the height of its curve, without overlaps."""
    low, high = axes.get_ylim()
    floor, gap = -math.inf, 0.16  # the gap is two lines of text, as a share of the plot's height
    for value, label, colour in sorted(ends):
        floor = max((value - low) / (high - low), floor + gap)
        axes.text(
            1.025, floor, label, transform=axes.transAxes, color=colour, va="center", weight="bold", size=9
        )


if __name__ == "__main__":
    run_script(main)
