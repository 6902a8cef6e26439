"""The charts of the report: curves of runs, and the distributions of a run's held-out pairs."""

import html
from collections.abc import Iterator
from itertools import pairwise

import numpy as np

from eval.charts import HEIGHT, RIGHT, WIDTH, Plot, around, number
from eval.curves import BLUE, ORANGE, PARTS, Curve, Panel, last_finite
from eval.explain import signed
from eval.pairs import Measured, MeasuredPair, accuracy

NAMES = {BLUE: "blue", ORANGE: "orange"}  # other colours are violet
BINS, BUCKETS = 24, 5
INTERVALS = "Thin upright lines are 95 % intervals."


def figure(title: str, unit: str, svg: str) -> str:
    return f"<figure><figcaption><b>{html.escape(title)}</b>{unit}</figcaption>{svg}</figure>"


# ---- Curves


def curve_charts(panels: list[Panel], runs: list[tuple[str, str, dict[str, Curve]]]) -> Iterator[str]:
    """A figure for each panel. `runs` are (name, colour, curves); a single run has the panel's colours."""
    last_step = max(max(curve) for _, _, curves in runs for curve in curves.values())
    for panel in panels:
        lines = list(panel_lines(panel, runs))
        values = [y for points, *_ in lines for y in points.values() if np.isfinite(y)]
        if not values:
            continue
        low, high = around(values)
        if panel.mark is not None:
            low, high = min(low, panel.mark), max(high, panel.mark)
        plot = Plot((0, last_step), (0.0 if panel.from_zero else low, high), "step")
        if panel.mark is not None:
            plot.level(panel.mark, panel.mark_label)
        for points, css, end, _ in lines:
            plot.line(list(points.items()), css, end)
        ends = "; ".join(f"{name} ends at {end.replace(chr(10), ' ')}" for _, _, end, name in lines if end)
        yield figure(panel.title, html.escape(panel.unit), plot.svg(f"{panel.title}: {ends}"))


def panel_lines(panel: Panel, runs) -> Iterator[tuple[Curve, str, str, str]]:
    """(points, classes, text at the end, run's name) of each line of a panel."""
    for name, run_colour, curves in runs:
        for place, (metric, label, colour) in enumerate(panel.curves):
            training, held_out = (curves.get(part + metric, {}) for part in PARTS)
            alone = len(runs) == 1
            css = NAMES.get(colour, "violet") if alone else run_colour + " dashed" * place
            end = last_finite(held_out or training)
            text = "\n".join([label] * bool(label and alone) + [number(end[1])]) if end else ""
            yield training, css + (" thin" if held_out else ""), "" if held_out else text, name
            yield held_out, css + " heavy", text if held_out else "", name


# ---- Distributions


def distributions(measured: Measured) -> Iterator[str]:
    yield margin_histogram(measured)
    yield length_scatter(measured)
    yield accuracy_bars(
        measured, "Accuracy by length difference", "tokens of chosen − rejected", lambda pair: pair.longer
    )
    yield accuracy_bars(
        measured, "Accuracy by length", "tokens of both answers",
        lambda pair: len(pair.chosen.tokens) + len(pair.rejected.tokens),
    )  # fmt: skip


def margin_histogram(measured: Measured) -> str:
    """The log-ratio margins of the pairs; before training all are 0."""
    low, high = around([0.0, *measured.changes], 0.02)
    size = (high - low) / BINS
    first = np.floor(low / size)  # A border of the bins is at 0: no bin mixes right and wrong pairs.
    edges = np.arange(first, np.ceil(high / size) + 1) * size
    counts, _ = np.histogram(measured.changes, edges)
    plot = Plot((edges[0], edges[-1]), (0, max(counts) * 1.12), "nats")
    for count, (left, right) in zip(counts, pairwise(edges), strict=True):
        if count:
            css = "blue" if left >= -size / 2 else "orange"
            plot.bar(left, right, count, css, f"{signed(left, 1)} to {signed(right, 1)} nats: {count} pairs")
    plot.upright(0, "before: all 0")
    about = f"margins from {signed(measured.changes.min())} to {signed(measured.changes.max())} nats"
    return figure("Log-ratio margins", "pairs; chosen − rejected", plot.svg(f"Histogram: {about}"))


def length_scatter(measured: Measured) -> str:
    """The log-ratio of each answer against its length."""
    points = [
        (len(answer.tokens), sum(answer.logratios), css)
        for pair in measured.pairs
        for answer, css in ((pair.chosen, "blue"), (pair.rejected, "orange"))
    ]
    lengths, logratios = [p[0] for p in points], [p[1] for p in points]
    plot = Plot((0, max(lengths) * 1.04), around([0.0, *logratios]), "tokens")
    plot.level(0.0, "")
    for length, logratio, css in points:
        plot.dot(length, logratio, f"{css} faint", f"{length} tokens, {signed(logratio)} nats")
    legend = "<span class=blue>● chosen</span> <span class=orange>● rejected</span>, log π/π_ref in nats"
    return figure("Log-ratio against length", legend, plot.svg("Log-ratio of each answer against its length"))


def accuracy_bars(measured: Measured, title: str, unit: str, key) -> str:
    """Accuracy of five groups of pairs of about the same size, by a number of each pair."""
    groups = buckets(measured.pairs, key)
    plot = Plot((0, len(groups)), (0, 1), percent=True)
    plot.marks = [mark for mark in plot.marks if "text-anchor=middle" not in mark]  # groups, not numbers
    words = []
    for place, group in enumerate(groups):
        values, found = [key(pair) for pair in group], accuracy(group)
        low, high = (f"{value}".replace("-", "−") for value in (min(values), max(values)))
        name = low if low == high else f"{low}…{high}"
        words.append(f"{name}: {found.value:.0%} of {len(group)}")
        plot.bar(place + 0.12, place + 0.88, found.value, "blue faint", words[-1])
        plot.interval(place + 0.5, found.low, found.high)
        plot.text(plot.across(place + 0.5), HEIGHT - 10, name, "middle", "small")
    plot.level(0.5, "")
    plot.text(WIDTH - RIGHT + 6, plot.down(0.5) + 3.5, "chance")
    return figure(title, html.escape(unit), plot.svg(f"{title}: {', '.join(words)}"))


def buckets(pairs: list[MeasuredPair], key) -> list[list[MeasuredPair]]:
    """The pairs in at most five groups by rising `key`; pairs with equal keys are in one group."""
    values = np.array([key(pair) for pair in pairs])
    edges = np.quantile(values, np.linspace(0, 1, BUCKETS + 1)[1:-1], method="lower")
    numbers = np.searchsorted(edges, values)  # values equal to an edge are below it
    groups = ([pairs[i] for i in np.flatnonzero(numbers == number)] for number in range(len(edges) + 1))
    return [group for group in groups if group]
