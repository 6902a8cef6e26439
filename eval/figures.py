"""The charts of the report: curves of runs, the judge's figures, and the distributions of held-out pairs."""

from collections.abc import Iterator

import numpy as np

from eval.charts import Bars, Plot, around, esc, number
from eval.curves import BLUE, ORANGE, PARTS, Curve, Panel, last_finite
from eval.explain import signed
from eval.pairs import Measured, MeasuredPair, accuracy
from eval.win_rate import wilson
from eval.words import tr

NAMES = {BLUE: "blue", ORANGE: "orange"}  # other colours are violet
BINS, BUCKETS = 24, 5
SIDES = [("chosen", "blue"), ("rejected", "orange")]

Run = tuple[str, str, Measured]  # a run's name, the class of its colour, its pairs


def figure(title: str, unit: str, svg: str) -> str:
    return f"<figure><figcaption><b>{esc(title)}</b>{unit}</figcaption>{svg}</figure>"


def legend(series: list[tuple]) -> str:
    """The names of (name, class, …), each behind a spot of its colour, as HTML; "" without a name."""
    spots = (f"<span><i class='swatch {css}'></i>{esc(name)}</span>" for name, css, *_ in series if name)
    return f"<span class=legend>{''.join(spots)}</span>"


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
        plot = Plot((0, last_step), (0.0 if panel.from_zero else low, high), tr("step"))
        if panel.mark is not None:
            plot.level(panel.mark, tr(panel.mark_label))
        for points, css, end, _ in lines:
            plot.line(list(points.items()), css, end)
        ends = "; ".join(
            tr("{run} ends at {values}", run=name, values=end.replace("\n", " "))
            for _, _, end, name in lines if end
        )  # fmt: skip
        title = tr(panel.title)
        yield figure(title, esc(tr(panel.unit)), plot.svg(f"{title}: {ends}"))


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


# ---- The judge's figures


def judge_charts(figures: dict) -> Iterator[str]:
    """Wins, ties and losses; answers before and after; right answers that changed.

    Samples of one prompt are correlated, so the intervals count each prompt once. They are rather too wide.
    """
    after, before = figures["right_answers"]
    cases = figures["prompts"] * figures["samples"]

    def bar(value: float, css: str, words: str) -> tuple:
        return value, *wilson(value, figures["prompts"]), css, f"{words}: {value:.1%}"

    counts = {tr("wins"): ("wins", "blue"), tr("ties"): ("ties", "pale"), tr("losses"): ("losses", "orange")}
    shares = {name: [bar(figures[key] / cases, css, name)] for name, (key, css) in counts.items()}
    unit = tr("of {after} against {before}, {count} answers",
              after=esc(after), before=esc(before), count=f"{cases:,}")  # fmt: skip
    yield bars(tr("Wins, ties and losses"), unit, shares)
    rates = {tr("right"): "right_answers", tr("right, greedy"): "right_answers_greedy",
             tr("courteous"): "wanted_manner", tr("well formed"): "well_formed"}  # fmt: skip
    sides = [(f"{tr('before')}: {before}", "pale", before), (f"{tr('after')}: {after}", "blue", after)]
    shares = {
        name: [bar(figures[rate][model], css, f"{name}, {side}") for side, css, model in sides]
        for name, rate in rates.items()
    }
    yield bars(tr("Before and after"), f"{tr('share of the answers')} {legend(sides)}", shares)
    if "only_second_right" in figures:
        changed = {tr("became right"): ("only_first_right", "blue"),
                   tr("became wrong"): ("only_second_right", "orange")}  # fmt: skip
        shares = {name: [bar(figures[key] / cases, css, name)] for name, (key, css) in changed.items()}
        yield bars(tr("Right answers that changed"), tr("of {count} answers", count=f"{cases:,}"), shares)


def bars(title: str, unit: str, groups: dict[str, list[tuple]]) -> str:
    """A figure of named groups of bars, as `Bars.group` takes them. `unit` is HTML."""
    highest = max(high for shares in groups.values() for _, _, high, *_ in shares)
    plot = Bars(list(groups), top=next(top for top in (0.2, 0.5, 1) if highest <= top))
    for place, shares in enumerate(groups.values()):
        plot.group(place, shares)
    words = "; ".join(label for shares in groups.values() for *_, label in shares)
    return figure(title, unit, plot.svg(f"{title}: {words}"))


# ---- Distributions


def distributions(runs: list[Run]) -> Iterator[str]:
    """Margins, log-ratios by length, and accuracy by length. Several runs differ by their colours."""
    alone, first = len(runs) == 1, runs[0][2]
    after = [(tr("after") if alone else name, css, [p.after for p in of.pairs]) for name, css, of in runs]
    starts = {of.reference: (tr("before"), "pale", [p.before for p in of.pairs]) for *_, of in runs}
    unit = "log π(chosen) − log π(rejected)"
    yield histogram(tr("Margins before and after"), unit, [*starts.values(), *after])
    changes = [("" if alone else name, css, of.changes) for name, css, of in runs]
    unit = tr("margin after − margin before")
    yield histogram(tr("Log-ratio margins"), unit, changes, tr("before: all 0"))
    yield length_scatter(first, "" if alone else f"{runs[0][0]}: ")
    unit = tr("tokens of chosen − rejected")
    yield accuracy_bars(runs, tr("Accuracy by length difference"), unit, lambda pair: pair.longer)
    unit = tr("tokens of both answers")
    yield accuracy_bars(runs, tr("Accuracy by length"), unit, lambda pair: pair.tokens)


def histogram(title: str, unit: str, series: list[tuple], mark: str = "") -> str:
    """Outlines of the distributions of (name, class, values in nats). A border between bins is at 0."""
    low, high = around([0.0, *(value for *_, values in series for value in values)], 0.02)
    size = (high - low) / BINS
    edges = np.arange(np.floor(low / size), np.ceil(high / size) + 1) * size
    counts = [np.histogram(values, edges)[0] for *_, values in series]
    plot = Plot((edges[0], edges[-1]), (0, 1.12 * max(map(max, counts))), tr("nats"))
    plot.upright(0, mark)
    for (_, css, _), heights in zip(series, counts, strict=True):
        steps = zip(np.repeat(edges, 2), [0, *np.repeat(heights, 2), 0], strict=True)
        plot.line([(float(x), float(y)) for x, y in steps], css + " area" * (len(series) < 3))
    ranges = (
        tr("{name} {low} to {high}", name=name, low=signed(min(values)), high=signed(max(values)))
        for name, _, values in series
    )
    unit = f"{unit}; {tr('pairs')} {legend(series)}"
    return figure(title, unit, plot.svg(f"{title}: {'; '.join(ranges)} {tr('nats')}"))


def length_scatter(measured: Measured, of: str) -> str:
    """The log-ratio of each answer against its length."""
    points = [
        (len(answer.tokens), sum(answer.logratios), css)
        for pair in measured.pairs
        for answer, css in ((pair.chosen, "blue"), (pair.rejected, "orange"))
    ]
    lengths, logratios = [p[0] for p in points], [p[1] for p in points]
    plot = Plot((0, max(lengths) * 1.04), around([0.0, *logratios]), tr("tokens"))
    plot.level(0.0, "")
    for length, logratio, css in points:
        label = f"{length} {tr('tokens')}, {signed(logratio)} {tr('nats')}"
        plot.dot(length, logratio, f"{css} faint", label)
    title = tr("Log-ratio against length")
    unit = tr("log π/π_ref of an answer, nats")
    return figure(title, f"{esc(of)}{unit} {legend(SIDES)}", plot.svg(title))


def accuracy_bars(runs: list[Run], title: str, unit: str, key) -> str:
    """Accuracy of groups of pairs of about the same size, by a number of each pair, for each run."""
    edges = borders([key(pair) for pair in runs[0][2].pairs])
    groups = {}
    for of_runs in zip(*(buckets(measured.pairs, key, edges) for *_, measured in runs), strict=True):
        if values := [key(pair) for pairs in of_runs for pair in pairs]:
            low, high = (str(value).replace("-", "−") for value in (min(values), max(values)))
            name = low if low == high else f"{low}…{high}"
            groups[name] = [
                (share.value, share.low, share.high, css,
                 tr("{run} {group}: {share} of {count}",
                    run=run, group=name, share=f"{share.value:.0%}", count=len(pairs)))
                for (run, css, _), pairs in zip(runs, of_runs, strict=True) if pairs
                for share in [accuracy(pairs)]
            ]  # fmt: skip
    return bars(title, esc(unit), groups)


def borders(values: list[float]) -> np.ndarray:
    """Numbers that part the values into at most five groups of about the same size."""
    return np.unique(np.quantile(values, np.linspace(0, 1, BUCKETS + 1)[1:-1], method="lower"))


def buckets(pairs: list[MeasuredPair], key, edges: np.ndarray) -> list[list[MeasuredPair]]:
    """The pairs by rising `key`. A pair whose key equals a border is below it; a group may be empty."""
    numbers = np.searchsorted(edges, [key(pair) for pair in pairs])
    return [[pairs[i] for i in np.flatnonzero(numbers == number)] for number in range(len(edges) + 1)]
