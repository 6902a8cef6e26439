"""Draw the curves of a training run: the figures of its `metrics.jsonl`, for SFT, DPO and reward models.

    python -m eval.report runs/dpo                    # writes runs/dpo/report.png
    python -m eval.report runs/dpo --out figure.png

Thin lines are means over the training steps between two rows. Heavy lines with dots are held-out data.
"""

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from dataset.jsonl import printable
from errors import InputError, run_script
from model.weights import require_folder
from training.settings import OneLineParser

INK, PALE, FAINT = "#262b33", "#7d8590", "#e6e8eb"
BLUE, ORANGE, VIOLET = "#2b6ca3", "#c4622d", "#6f5a9a"


@dataclass(frozen=True)
class Panel:
    """One plot of the picture, drawn if the run logged at least one of its metrics."""

    title: str
    curves: list[tuple[str, str, str]]  # metric, label, colour
    unit: str = ""
    mark: float | None = None  # height of a dashed line
    mark_label: str = ""  # its label
    from_zero: bool = False


GRADIENT = Panel("Gradient norm", [("grad_norm", "", VIOLET)], "before clipping", from_zero=True)
SFT_PANELS = [
    Panel("Loss", [("loss", "", BLUE)], "−log π, nats per token"),
    GRADIENT,
    Panel("Learning rate", [("learning_rate", "", VIOLET)], "of each step", from_zero=True),
    Panel("Speed", [("conversations_per_second", "", VIOLET)], "conversations per second", from_zero=True),
]
PREFERENCE_PANELS = [
    Panel("Loss", [("loss", "", BLUE)], "nats per pair", math.log(2), "ln 2"),
    Panel("Reward accuracy", [("rewards/accuracies", "", BLUE)], "share of pairs", 0.5, "chance"),
    GRADIENT,
    # Rewards contain beta, log-ratios do not: runs with a different beta compare by log-ratios.
    Panel("Log-ratio margin", [("logratios/margins", "", BLUE)], "chosen − rejected, nats", 0.0),
    Panel(
        "Log-ratios",
        [("logratios/chosen", "chosen", BLUE), ("logratios/rejected", "rejected", ORANGE)],
        "log π / π_ref, nats per answer",
        0.0,
    ),
    Panel(
        "Log-probability of answers",
        [("logps/chosen", "chosen", BLUE), ("logps/rejected", "rejected", ORANGE)],
        "log π, nats per answer",
    ),
    Panel("Reward margin", [("rewards/margins", "", BLUE)], "chosen − rejected", 0.0),
    Panel(
        "Rewards",
        [("rewards/chosen", "chosen", BLUE), ("rewards/rejected", "rejected", ORANGE)],
        "β · log π / π_ref, or a reward model's",
        0.0,
    ),
    Panel("Learning rate", [("learning_rate", "", VIOLET)], "of each step", from_zero=True),
]
PARTS = ("", "eval_")  # prefixes of the metrics: training, held-out

Curve = dict[int, float]  # step: value


def main(arguments: list[str] | None = None) -> None:
    parser = OneLineParser(prog="python -m eval.report", description=__doc__.split("\n")[0])
    parser.add_argument("run", help="run folder that contains metrics.jsonl")
    parser.add_argument("--out", help="file of the picture; default: RUN/report.png")
    given = parser.parse_args(arguments)
    print(printable(str(picture(given.run, given.out))))


def picture(run: str | Path, out: str | Path | None = None) -> Path:
    """Draw the run of a folder into `out`, by default RUN/report.png; return the path of the picture."""
    require_folder(Path(run))
    out = Path(out or Path(run) / "report.png")
    draw(read_curves(Path(run) / "metrics.jsonl"), str(run), out)
    return out


def read_curves(path: Path) -> dict[str, Curve]:
    """The numbers of a metrics file: ``{name: {step: value}}``. Of two rows of a step the later one counts.

    The last line is skipped if it is incomplete, because a killed run may leave half of it. Another line that
    is not a row of numbers raises `InputError`.
    """
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); is this a run folder?") from None
    curves: dict[str, Curve] = {}
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            step = int(row["step"])
        except (ValueError, TypeError, KeyError) as error:
            if number == len(lines):
                break
            raise InputError(f"{path}:{number}: not a row of metrics ({error})") from None
        for name, value in row.items():
            if name != "step" and isinstance(value, (int, float)):
                curves.setdefault(name, {})[step] = value
    if not curves:
        raise InputError(f"{path}: contains no row of metrics yet")
    return {name: dict(sorted(curve.items())) for name, curve in curves.items()}


def draw(curves: dict[str, Curve], title: str, out: Path) -> None:
    """Draw the panels whose metrics are in `curves` as a PNG, 1800 pixels wide."""
    known = PREFERENCE_PANELS if any(part + "rewards/margins" in curves for part in PARTS) else SFT_PANELS
    panels = [p for p in known if any(part + name in curves for name, *_ in p.curves for part in PARTS)]
    if not panels:
        raise InputError(f"{title}: metrics.jsonl contains none of the metrics that this picture shows")
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
    axes.text(0, 1.04, unit, transform=axes.transAxes, size=8.5, color=PALE, parse_math=False)
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


def last_finite(curve: Curve) -> tuple[int, float] | None:
    """The last (step, value) with a finite value; None without one."""
    return next(((step, value) for step, value in reversed(curve.items()) if math.isfinite(value)), None)


if __name__ == "__main__":
    run_script(main)
