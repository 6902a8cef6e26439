"""Small charts as SVG, without a library. Colours are CSS classes, so they follow the page's theme.

plot = Plot(x=(0, 188), y=(0, 1))
plot.line([(0, 0.5), (188, 0.86)], "blue heavy", "step")
page += plot.svg("Accuracy rises from 0.5 to 0.86")
"""

import html
import math

from dataset.jsonl import printable
from eval.words import tr

WIDTH, HEIGHT = 300, 180
LEFT, RIGHT, TOP, BOTTOM = 42, 58, 14, 24  # margins; the labels of the curves' ends are in the right one
LINE = 12  # height of a line of text
MOST = 400  # points of a line

Point = tuple[float, float]


def esc(text: str) -> str:
    """Text for HTML, in an element or in an attribute; control characters are visible."""
    return html.escape(printable(str(text)))


class Plot:
    """A chart of 300 × 180 units. Marks are drawn in the order of the calls, in data coordinates."""

    right = WIDTH - RIGHT  # where the plot ends

    def __init__(self, x: tuple[float, float], y: tuple[float, float], x_label: str = ""):
        self.x, self.y = widen(*x), widen(*y)
        self.ends: list[tuple[float, str, str]] = []  # (height, text, class) of each line's end
        self.marks: list[str] = []
        for value in ticks(*self.y):
            self.grid(value, number(value))
        for value in ticks(*self.x):
            self.below(value, number(value))
        self.text(WIDTH - 2, HEIGHT - BOTTOM + 14, x_label, "end")

    def across(self, x: float) -> float:
        low, high = self.x
        return LEFT + (x - low) / (high - low) * (self.right - LEFT)

    def down(self, y: float) -> float:
        low, high = self.y
        return HEIGHT - BOTTOM - (y - low) / (high - low) * (HEIGHT - TOP - BOTTOM)

    def grid(self, y: float, label: str) -> None:
        """A faint horizontal line with a label left of the plot."""
        height = self.down(y)
        self.marks.append(f'<path class=grid d="M{LEFT} {height:.1f}H{self.right}"/>')
        self.text(LEFT - 6, height + 3.5, label, "end")

    def below(self, x: float, label: str) -> None:
        """A label below the plot."""
        self.text(self.across(x), HEIGHT - BOTTOM + 14, label, "middle")

    def text(self, x: float, y: float, text: str, anchor: str = "start", css: str = "") -> None:
        place = f'x={x:.1f} y={y:.1f} text-anchor={anchor} class="{css}"'
        self.marks.append(f"<text {place}>{esc(text)}</text>" * bool(text))

    def line(self, points: list[Point], css: str, end: str = "") -> None:
        """A line through the finite points; `heavy` in `css` adds dots. `end` is written at its end."""
        points = [(x, y) for x, y in points if math.isfinite(y)]
        if not points:
            return
        shown = points[:: math.ceil(len(points) / MOST)]
        shown += points[-1:] if shown[-1] != points[-1] else []
        places = " ".join(f"{self.across(x):.1f},{self.down(y):.1f}" for x, y in shown)
        self.marks.append(f'<polyline class="{css}" points="{places}"/>')
        if "heavy" in css:
            for x, y in shown:
                self.dot(x, y, css, tr("step {step}", step=x) + f": {number(y)}")
        self.ends.append((self.down(points[-1][1]), end, css))

    def dot(self, x: float, y: float, css: str, label: str) -> None:
        """A dot; a pointer that rests on it shows the label."""
        place = f"cx={self.across(x):.1f} cy={self.down(y):.1f} r=2.6"
        self.marks.append(f'<circle class="{css}" {place}><title>{esc(label)}</title></circle>')

    def bar(self, left: float, right: float, height: float, css: str, label: str) -> None:
        """A bar from the bottom to `height`."""
        x, y = self.across(left), self.down(height)
        size = f"width={max(self.across(right) - x - 1, 0.5):.1f} height={HEIGHT - BOTTOM - y:.1f}"
        title = f"<title>{esc(label)}</title>"
        self.marks.append(f'<rect class="{css}" x={x:.1f} y={y:.1f} {size}>{title}</rect>')

    def interval(self, x: float, low: float, high: float) -> None:
        """An upright line from `low` to `high`."""
        place = f"M{self.across(x):.1f} {self.down(low):.1f}V{self.down(high):.1f}"
        self.marks.append(f'<path class=interval d="{place}"/>')

    def level(self, y: float, label: str) -> None:
        """A dashed horizontal line with a label, if `y` is in the range of the axis."""
        if self.y[0] <= y <= self.y[1]:
            height = self.down(y)
            self.marks.append(f'<path class=mark d="M{LEFT} {height:.1f}H{self.right}"/>')
            self.text(self.right, height - 4, label, "end")

    def upright(self, x: float, label: str) -> None:
        """A dashed vertical line with a label."""
        place = self.across(x)
        self.marks.append(f'<path class=mark d="M{place:.1f} {TOP}V{HEIGHT - BOTTOM}"/>')
        self.text(place + 4, TOP - 3, label)

    def svg(self, label: str) -> str:
        """The chart; `label` describes it to readers who do not see it."""
        self.name_ends()
        size = f'viewBox="0 0 {WIDTH} {HEIGHT}" role=img'
        return f'<svg {size} aria-label="{esc(label)}">{"".join(self.marks)}</svg>'

    def name_ends(self) -> None:
        """Write the labels of the lines right of their ends, from below, without overlaps."""
        ends = sorted((height, text.split("\n"), css) for height, text, css in self.ends if text)
        free = HEIGHT - BOTTOM + 2  # the room above this height is free
        for i, (height, lines, css) in reversed([*enumerate(ends)]):
            above = sum(len(other) for _, other, _ in ends[:i]) * LINE  # room that the other labels need
            bottom = min(free, height + len(lines) * LINE / 2)
            free = max(bottom, above + len(lines) * LINE) - len(lines) * LINE
            for j, line in enumerate(lines, start=1):
                self.text(self.right + 6, free + j * LINE - 2.5, line, css=f"end {css}")


class Bars(Plot):
    """A chart of shares for named groups: bars side by side, each with its value and its 95 % interval."""

    right = WIDTH - 4

    def __init__(self, names: list[str], top: float = 1.0):
        super().__init__((0, len(names)), (0, top))
        self.marks.clear()
        for value in (0, top / 2, top):
            self.grid(value, f"{value:.0%}")
        for place, name in enumerate(names):
            self.below(place + 0.5, name)

    def group(self, place: int, shares: list[tuple[float, float, float, str, str]]) -> None:
        """Draw (value, low, high, class, label) of each bar of the group with this number."""
        width = 0.8 / len(shares)
        for i, (value, low, high, css, label) in enumerate(shares):
            left = place + 0.1 + i * width
            self.bar(left, left + width, value, css, label)
            self.interval(left + width / 2, low, high)
            if self.across(width) - LEFT > 20:  # wide enough for its number
                middle = self.across(left + width / 2)
                self.text(middle, self.down(high) - 3, f"{value:.0%}", "middle", "small")


def widen(low: float, high: float) -> tuple[float, float]:
    """The range, or a wider one if it is a point."""
    return (low, high) if high > low else (low - 0.5 * (abs(low) or 1), low + 0.5 * (abs(low) or 1))


def around(values: list[float], share: float = 0.05) -> tuple[float, float]:
    """A range that contains the values, with a margin on both sides."""
    low, high = widen(min(values), max(values))
    return low - share * (high - low), high + share * (high - low)


def ticks(low: float, high: float, most: int = 5) -> list[float]:
    """At most `most` + 1 round numbers in a range, at equal distances."""
    rough = (high - low) / most
    unit = 10 ** math.floor(math.log10(rough))
    step = next(factor * unit for factor in (1, 2, 2.5, 5, 10, 20) if factor * unit >= rough * (1 - 1e-9))
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


def number(value: float) -> str:
    """Three significant digits, with a true minus sign."""
    return f"{value:.3g}".replace("e-0", "e-").replace("-", "−")
