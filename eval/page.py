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
from eval.words import current, tr

COLOURS = ("blue", "orange", "green", "violet", "pink", "brown")  # of the runs


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
            yield tr("{title} of {run}", title=title, run=run.name) if len(runs) > 1 else title, *make(run)

    sections = [
        (tr("Curves"), *curve_section(runs)),
        *first(tr("Answers, judged"), "judged", judged_section),
        *first(tr("Answers during training"), "samples", lambda run: sample_section(run.samples)),
        *([(tr("Distributions"), *distribution_section(runs))] if any(run.measured for run in runs) else ()),
        *first(tr("Pairs"), "measured", lambda run: pair_section(run.measured)),
    ]
    links = " ".join(f'<a href="#s{number}">{esc(title)}</a>' for number, (title, *_) in enumerate(sections))
    head = headline(runs[0]) if len(runs) == 1 else comparison(runs)
    body = "".join(
        f"<section id=s{number}><h2>{esc(title)}</h2><p class=pale>{text}</p>{rest}</section>"
        for number, (title, text, rest) in enumerate(sections)
    )
    style, script = (Path(__file__).with_name(f"page.{kind}").read_text("utf-8") for kind in ("css", "js"))
    script = script.replace("difference", tr("difference"))  # its only word
    policy = f"default-src 'none'; style-src {digest(style)}; script-src {digest(script)}; base-uri 'none'"
    return f"""<!doctype html>
<html lang="{'zh-CN' if current() == 'zh' else 'en'}">
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
    text = tr("Without pairs: {reason}.", reason=esc(run.reason)) if run.reason else ""
    text = f"<p class=pale>{text}</p>" * bool(text)
    text = f"<p class=verdict>{verdict(run)}</p>{cards(run)}" if run.measured else text
    head = f"<h1>{esc(run.folder)}</h1><p>{' '.join(described(run))}</p>"
    return head + text + worry_box(run.worries, checked() if run.measured else "")


def checked() -> str:
    """What `eval.pairs.worries` has looked for."""
    return tr(
        "Checked: a loss near ln 2, a rising held-out loss, a gap between training and held-out pairs, "
        "chosen answers that become less likely, margins that follow the length; with a judge, also lost "
        "cases, fewer right or well-formed answers, and longer answers."
    )


def worry_box(found: list[str], checked: str) -> str:
    """The list of worries; without one the text `checked`, if there is one."""
    if found:
        items = "".join(f"<li>{esc(sentence)}" for sentence in found)
        return f"<div class=worries><h3>{tr('What to worry about')}</h3><ul>{items}</ul></div>"
    box = f"<div class='worries good'><h3>{tr('Nothing to worry about')}</h3><p>{esc(checked)}</p></div>"
    return box if checked else ""


def described(run: Shown) -> tuple[str, str]:
    """Two sentences as HTML: data and start of a run; its steps and options."""
    settings = run_settings(run.folder) if (Path(run.folder) / "config.json").is_file() else {}
    words = [tr("{count} optimizer steps", count=max(max(curve) for curve in run.curves.values()))]
    labels = {"batch_size": tr("batch"), "lr": tr("learning rate"), "loss": tr("loss"), "beta": "β"}
    for name, label in labels.items():
        if name in settings and not (name == "loss" and "beta" not in settings):
            words.append(f"{label} {settings[name]}")
    start = describe_training(run.folder) if settings else ""
    what = start.removeprefix(f"{run.folder}: ")
    what = what or tr("{folder} contains no finished model", folder=run.folder)
    what = what[:1].upper() + what[1:]
    return esc(tr("{sentence}.", sentence=what)), esc(tr("{sentence}.", sentence=tr(", ").join(words)))


def verdict(run: Shown) -> str:
    """Whether the run worked, with its numbers, as HTML."""
    found, count = run.measured.accuracy, len(run.measured.pairs)
    harm = tr("It did harm.") if found.high < 0.5 else tr("No effect is visible.")
    text = tr(
        "<b>{verdict}</b> The policy prefers the chosen answer more than its reference does in {share} of "
        "{count} held-out pairs. The log-ratio margin, chosen − rejected, is {margin} nats; before training "
        "it is 0.",
        verdict=tr("It worked.") if found.low > 0.5 else harm,
        share=percent(found), count=count, margin=nats(run.measured.margin),
    )  # fmt: skip
    if won := run.win_rate:
        text += tr(" Its own answers win {share} of the cases that the judge decided.", share=percent(won))
    return text


def cards(run: Shown) -> str:
    """The figures of a run, each with its 95 % interval where it has one."""
    beta, margin = run.measured.objective.beta, run.measured.margin
    reward = Estimate(beta * margin.value, beta * margin.low, beta * margin.high)
    chosen, rejected = (signed(run.measured.logratio(side).value, 1) for side in SIDES)
    figures = [
        (
            f"{run.measured.accuracy.value:.0%}",
            tr("reward accuracy, {interval}", interval=interval(run.measured.accuracy, ".0%")),
        ),
        (signed(margin.value, 1), tr("log-ratio margin, nats, {interval}", interval=interval(margin, ".1f"))),
        (
            signed(reward.value),
            tr("reward margin, β\u00a0=\u00a0{beta}, {interval}",
               beta=f"{beta:g}", interval=interval(reward, ".2f")),
        ),
        (f"{chosen} / {rejected}", tr("log-ratio of chosen / of rejected answers, nats")),
        (f"{run.measured.kl:.3f}", tr("KL(π‖π_ref) of the next token, nats, mean over held-out answers")),
    ]  # fmt: skip
    if won := run.win_rate:
        won_by = tr("win rate of its answers, {interval}", interval=interval(won, ".0%"))
        figures.insert(1, (f"{won.value:.0%}", won_by))
    items = "".join(f"<div><strong>{value}</strong><span>{what}</span></div>" for value, what in figures)
    return f"<div class=cards>{items}</div>"


def interval(estimate: Estimate, form: str) -> str:
    low, high = (f"{value:{form}}".replace("-", "−") for value in (estimate.low, estimate.high))
    return tr("95\u00a0%: {low} to {high}", low=low, high=high)


def percent(estimate: Estimate) -> str:
    return f"{estimate.value:.0%} ({interval(estimate, '.0%')})"


def nats(estimate: Estimate) -> str:
    return f"{signed(estimate.value)} ({interval(estimate, '.2f')})"


def comparison(runs: list[Shown]) -> str:
    """The headline of several runs: the best one, a table with a row for each, and what to worry about."""
    columns = {
        tr("loss"): lambda run: esc(run.measured.objective.loss),
        "β": lambda run: f"{run.measured.objective.beta:g}",
        tr("accuracy"): lambda run: percent(run.measured.accuracy),
        tr("win rate"): lambda run: percent(run.win_rate) if run.win_rate else "–",
        tr("log-ratio margin, nats"): lambda run: nats(run.measured.margin),
        tr("log-ratio chosen"): lambda run: signed(run.measured.logratio("chosen").value),
        "rejected": lambda run: signed(run.measured.logratio("rejected").value),
        tr("KL per token"): lambda run: f"{run.measured.kl:.3f}",
    }
    if not any(run.win_rate for run in runs):
        del columns[tr("win rate")]
    rows = [
        [f"<i class='swatch {run.colour}'></i>{esc(run.name)}"]
        + [cell(run) if run.measured else "–" for cell in columns.values()]
        + [f"{loss[1]:.4f}" if (loss := last_finite(run.curves.get("eval_loss", {}))) else "–"]
        for run in runs
    ]
    found = [f"{run.name}: {sentence}" for run in runs for sentence in run.worries]
    found += [
        tr("{run}, without pairs: {reason}.", run=run.name, reason=run.reason) for run in runs if run.reason
    ]
    data: dict[str, list[str]] = {}  # what a sentence describes: runs of the same data share it
    for run in runs:
        what, options = described(run)
        data.setdefault(what, []).append(f"{esc(run.name)}: {options}")
    text = "".join(f"<p class=pale>{what}<br>{'<br>'.join(names)}</p>" for what, names in data.items())
    table = table_of([tr("run"), *columns, tr("held-out loss")], rows)
    return f"<h1>{tr('{count} runs', count=len(runs))}</h1>{best(runs)}{table}{worry_box(found, '')}{text}"


def best(runs: list[Shown]) -> str:
    """The run with the highest accuracy, and whether the intervals of the others reach it, as HTML."""
    measured = sorted((run for run in runs if run.measured), key=lambda run: -run.measured.accuracy.value)
    if len(measured) < 2:
        return ""
    first, accuracy = measured[0], measured[0].measured.accuracy
    near = tr(" and ").join(
        run.name for run in measured[1:] if run.measured.accuracy.high >= accuracy.low
    )
    text = tr(
        "<b>{run} has the highest accuracy,</b> {share} of {count} held-out pairs.",
        run=esc(first.name), share=percent(accuracy), count=len(first.measured.pairs),
    )  # fmt: skip
    if near:
        text += tr(
            " The interval overlaps with that of {runs}: the difference may be chance.", runs=esc(near)
        )
    return f"<p class=verdict>{text}</p>"


# ---- Sections: (text, rest), both HTML


def curve_section(runs: list[Shown]) -> tuple[str, str]:
    held_out = any(name.startswith(PARTS[1]) for run in runs for name in run.curves)
    lines = tr("Thin lines: training. Heavy lines with dots: held-out data.")
    reading = lines if held_out else tr("Training data.")
    if len(runs) > 1 and is_preference(runs[0].curves):
        reading += tr(
            " Where a chart has two lines of a run, the dashed one belongs to the rejected answers."
        )
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
    text += tr(
        "The chosen answer is longer in {longer} of the pairs. It is the more likely one in {before} before "
        "training and in {after} after it. Length difference and log-ratio margin correlate with r = {r}. ",
        longer=longer, before=before, after=after, r=signed(first.length_correlation),
    ) + intervals()  # fmt: skip
    return text, f"<div class=charts>{''.join(distributions(measured))}</div>"


def intervals() -> str:
    return tr("Thin upright lines are 95\u00a0% intervals.")


def judged_section(run: Shown) -> tuple[str, str]:
    """The run's own answers beside those of the model that it started from."""
    figures, won = run.judged, run.win_rate
    (after, length), (before, length_before) = figures["mean_tokens"].items()
    counts = {name: f"{figures[name]:,}" for name in ("prompts", "samples", "wins", "ties", "losses")}
    text = tr(
        "{after} and {before} answered {prompts} prompts, {samples} times each. A judge scored the answers: "
        "{wins} wins, {ties} ties, {losses} losses. ",
        after=esc(after), before=esc(before), **counts,
    )  # fmt: skip
    if won:
        text += tr("{after} wins {share} of the decided cases. ", after=esc(after), share=percent(won))
    text += tr(
        "Mean length: {after} tokens, before {before}. ",
        after=f"{length:.1f}", before=f"{length_before:.1f}",
    ) + intervals()  # fmt: skip
    charts = f"<div class=charts>{''.join(judge_charts(figures))}</div>"
    return text, charts + answer_section(figures)
