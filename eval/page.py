"""The report of runs as one HTML page, without network, fonts or pictures of others.

    text = page([Shown("runs/dpo", curves, measured)])

Every text of a run, a file or a model passes through `esc`. The page's policy (CSP) runs only the script and
the style of this folder, by their digests: a script that came with the data would not run.
"""

import base64
import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from eval.charts import esc
from eval.common import describe_training, run_settings
from eval.curves import PARTS, Curve, is_preference, last_finite, shown_panels
from eval.explain import SIDES, signed
from eval.figures import curve_charts, distributions, judge_charts
from eval.page_lists import answer_section, pair_section, sample_section, table_of
from eval.pairs import Estimate, Measured, worries

COLOURS = ("blue", "orange", "green", "violet", "pink", "brown")  # of the runs
CHECKED = (
    "Checked: a loss near ln 2, a rising held-out loss, a gap between training and held-out pairs, chosen "
    "answers that become less likely, margins that follow the length; with a judge, also lost cases, fewer "
    "right or well-formed answers, and longer answers."
)

INTERVALS = "Thin upright lines are 95\u00a0% intervals."


@dataclass(frozen=True)
class Shown:
    """A run on the page. `reason` tells why its pairs could not be measured."""

    folder: str
    name: str  # short, in tables and legends
    colour: str  # a class of the style
    curves: dict[str, Curve]
    measured: Measured | None = None
    reason: str = ""
    judged: dict = field(default_factory=dict)  # the judge's figures and answers
    samples: dict[str, dict[int, dict]] = field(default_factory=dict)  # of `read_samples`

    @property
    def worries(self) -> list[str]:
        return worries(self.measured, self.curves, self.judged)

    @property
    def win_rate(self) -> Estimate | None:
        """The share of decided cases that the run's answers win; None without a judge or a decided case."""
        interval = self.judged.get("win_rate_ci95")
        return Estimate(self.judged["win_rate"], *interval) if interval else None


def page(runs: list[Shown]) -> str:
    """The whole page. Of several runs, the first one with answers, samples or pairs shows them."""

    def first(title: str, part: str, make: Callable) -> Iterator[tuple[str, str, str]]:
        for run in [run for run in runs if getattr(run, part)][:1]:
            yield f"{title} of {run.name}" if len(runs) > 1 else title, *make(run)

    sections = [
        ("Curves", *curve_section(runs)),
        *first("Answers, judged", "judged", judged_section),
        *first("Answers during training", "samples", lambda run: sample_section(run.samples)),
        *([("Distributions", *distribution_section(runs))] if any(run.measured for run in runs) else ()),
        *first("Pairs", "measured", lambda run: pair_section(run.measured)),
    ]
    links = " ".join(f'<a href="#s{number}">{esc(title)}</a>' for number, (title, *_) in enumerate(sections))
    head = headline(runs[0]) if len(runs) == 1 else comparison(runs)
    body = "".join(
        f"<section id=s{number}><h2>{esc(title)}</h2><p class=pale>{text}</p>{rest}</section>"
        for number, (title, text, rest) in enumerate(sections)
    )
    style, script = (Path(__file__).with_name(f"page.{kind}").read_text("utf-8") for kind in ("css", "js"))
    policy = f"default-src 'none'; style-src {digest(style)}; script-src {digest(script)}; base-uri 'none'"
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}; form-action 'none'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{esc(" · ".join(run.folder for run in runs))}</title>
<style>{style}</style>
</head>
<body>
<header>{head}<nav>{links}</nav></header>
{body}
<output id="readout" hidden></output>
<script>{script}</script>
</body>
</html>
"""


def digest(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


# ---- The headline


def headline(run: Shown) -> str:
    """What was trained on what, whether it worked, and what to worry about."""
    text = f"<p class=pale>Without pairs: {esc(run.reason)}.</p>" if run.reason else ""
    text = f"<p class=verdict>{verdict(run)}</p>{cards(run)}" if run.measured else text
    head = f"<h1>{esc(run.folder)}</h1><p>{' '.join(described(run))}</p>"
    return head + text + worry_box(run.worries, CHECKED if run.measured else "")


def worry_box(found: list[str], checked: str) -> str:
    """The list of worries; without one the text `checked`, if there is one."""
    if found:
        items = "".join(f"<li>{esc(sentence)}" for sentence in found)
        return f"<div class=worries><h3>What to worry about</h3><ul>{items}</ul></div>"
    box = f"<div class='worries good'><h3>Nothing to worry about</h3><p>{esc(checked)}</p></div>"
    return box if checked else ""


def described(run: Shown) -> tuple[str, str]:
    """Two sentences as HTML: data and start of a run; its steps and options."""
    settings = run_settings(run.folder) if (Path(run.folder) / "config.json").is_file() else {}
    words = [f"{max(max(curve) for curve in run.curves.values())} optimizer steps"]
    for name, label in (("batch_size", "batch"), ("lr", "learning rate"), ("loss", "loss"), ("beta", "β")):
        if name in settings and not (name == "loss" and "beta" not in settings):
            words.append(f"{label} {settings[name]}")
    start = describe_training(run.folder) if settings else ""
    what = start.removeprefix(f"{run.folder}: ") or f"{run.folder} contains no finished model"
    return f"{esc(what[:1].upper() + what[1:])}.", f"{esc(', '.join(words))}."


def verdict(run: Shown) -> str:
    """Whether the run worked, with its numbers, as HTML."""
    found, count = run.measured.accuracy, len(run.measured.pairs)
    harm = "It did harm." if found.high < 0.5 else "No effect is visible."
    text = (
        f"<b>{'It worked.' if found.low > 0.5 else harm}</b> The policy prefers the chosen answer more than "
        f"its reference does in {percent(found)} of {count} held-out pairs. The log-ratio margin, chosen − "
        f"rejected, is {nats(run.measured.margin)} nats; before training it is 0."
    )
    if won := run.win_rate:
        text += f" Its own answers win {percent(won)} of the cases that the judge decided."
    return text


def cards(run: Shown) -> str:
    """The figures of a run, each with its 95 % interval where it has one."""
    beta, margin = run.measured.objective.beta, run.measured.margin
    reward = Estimate(beta * margin.value, beta * margin.low, beta * margin.high)
    chosen, rejected = (signed(run.measured.logratio(side).value, 1) for side in SIDES)
    figures = [
        (f"{run.measured.accuracy.value:.0%}", f"reward accuracy, {interval(run.measured.accuracy, '.0%')}"),
        (signed(margin.value, 1), f"log-ratio margin, nats, {interval(margin, '.1f')}"),
        (signed(reward.value), f"reward margin, β\u00a0=\u00a0{beta:g}, {interval(reward, '.2f')}"),
        (f"{chosen} / {rejected}", "log-ratio of chosen / of rejected answers, nats"),
        (f"{run.measured.kl:.3f}", "KL(π‖π_ref) of the next token, nats, mean over held-out answers"),
    ]
    if won := run.win_rate:
        figures.insert(1, (f"{won.value:.0%}", f"win rate of its answers, {interval(won, '.0%')}"))
    items = "".join(f"<div><strong>{value}</strong><span>{what}</span></div>" for value, what in figures)
    return f"<div class=cards>{items}</div>"


def interval(estimate: Estimate, form: str) -> str:
    return f"95\u00a0%: {estimate.low:{form}} to {estimate.high:{form}}".replace("-", "−")


def percent(estimate: Estimate) -> str:
    return f"{estimate.value:.0%} ({interval(estimate, '.0%')})"


def nats(estimate: Estimate) -> str:
    return f"{signed(estimate.value)} ({interval(estimate, '.2f')})"


def comparison(runs: list[Shown]) -> str:
    """The headline of several runs: the best one, a table with a row for each, and what to worry about."""
    columns = {
        "loss": lambda run: esc(run.measured.objective.loss),
        "β": lambda run: f"{run.measured.objective.beta:g}",
        "accuracy": lambda run: percent(run.measured.accuracy),
        "win rate": lambda run: percent(run.win_rate) if run.win_rate else "–",
        "log-ratio margin, nats": lambda run: nats(run.measured.margin),
        "log-ratio chosen": lambda run: signed(run.measured.logratio("chosen").value),
        "rejected": lambda run: signed(run.measured.logratio("rejected").value),
        "KL per token": lambda run: f"{run.measured.kl:.3f}",
    }
    if not any(run.win_rate for run in runs):
        del columns["win rate"]
    rows = [
        [f"<i class='swatch {run.colour}'></i>{esc(run.name)}"]
        + [cell(run) if run.measured else "–" for cell in columns.values()]
        + [f"{loss[1]:.4f}" if (loss := last_finite(run.curves.get("eval_loss", {}))) else "–"]
        for run in runs
    ]
    found = [f"{run.name}: {sentence}" for run in runs for sentence in run.worries]
    found += [f"{run.name}, without pairs: {run.reason}." for run in runs if run.reason]
    data: dict[str, list[str]] = {}  # what a sentence describes: runs of the same data share it
    for run in runs:
        what, options = described(run)
        data.setdefault(what, []).append(f"{esc(run.name)}: {options}")
    text = "".join(f"<p class=pale>{what}<br>{'<br>'.join(names)}</p>" for what, names in data.items())
    table = table_of(["run", *columns, "held-out loss"], rows)
    return f"<h1>{len(runs)} runs</h1>{best(runs)}{table}{worry_box(found, '')}{text}"


def best(runs: list[Shown]) -> str:
    """The run with the highest accuracy, and whether the intervals of the others reach it, as HTML."""
    measured = sorted((run for run in runs if run.measured), key=lambda run: -run.measured.accuracy.value)
    if len(measured) < 2:
        return ""
    first, accuracy = measured[0], measured[0].measured.accuracy
    near = [run.name for run in measured[1:] if run.measured.accuracy.high >= accuracy.low]
    chance = f" The interval overlaps with that of {' and '.join(near)}: the difference may be chance."
    return (
        f"<p class=verdict><b>{esc(first.name)} has the highest accuracy,</b> {percent(accuracy)} of "
        f"{len(first.measured.pairs)} held-out pairs.{esc(chance) if near else ''}</p>"
    )


# ---- Sections: (text, rest), both HTML


def curve_section(runs: list[Shown]) -> tuple[str, str]:
    held_out = any(name.startswith(PARTS[1]) for run in runs for name in run.curves)
    reading = "Thin lines: training. Heavy lines with dots: held-out data." if held_out else "Training data."
    if len(runs) > 1 and is_preference(runs[0].curves):
        reading += " Where a chart has two lines of a run, the dashed one belongs to the rejected answers."
    panels = shown_panels([run.curves for run in runs])
    charts = curve_charts(panels, [(run.name, run.colour, run.curves) for run in runs])
    return reading, f"<div class=charts>{''.join(charts)}</div>"


def distribution_section(runs: list[Shown]) -> tuple[str, str]:
    measured = [(run.name, run.colour, run.measured) for run in runs if run.measured]
    name, _, first = measured[0]
    longer, before, after = (
        f"{sum(getattr(pair, name) > 0 for pair in first.pairs) / len(first.pairs):.0%}"
        for name in ("longer", "before", "after")
    )
    text = f"{esc(name)}: " if len(runs) > 1 else ""
    text += (
        f"The chosen answer is longer in {longer} of the pairs. It is the more likely one in "
        f"{before} before training and in {after} after it. Length difference and log-ratio margin correlate "
        f"with r = {signed(first.length_correlation)}. {INTERVALS}"
    )
    return text, f"<div class=charts>{''.join(distributions(measured))}</div>"


def judged_section(run: Shown) -> tuple[str, str]:
    """The run's own answers beside those of the model that it started from."""
    figures, won = run.judged, run.win_rate
    (after, length), (before, length_before) = figures["mean_tokens"].items()
    text = (
        f"{esc(after)} and {esc(before)} answered {figures['prompts']:,} prompts, {figures['samples']} times "
        f"each. A judge scored the answers: {figures['wins']:,} wins, {figures['ties']:,} ties, "
        f"{figures['losses']:,} losses. "
        + (f"{esc(after)} wins {percent(won)} of the decided cases. " if won else "")
        + f"Mean length: {length:.1f} tokens, before {length_before:.1f}. {INTERVALS}"
    )
    charts = f"<div class=charts>{''.join(judge_charts(figures))}</div>"
    return text, charts + answer_section(figures)
