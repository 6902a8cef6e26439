"""The report of runs as one HTML page, without network, fonts or pictures of others.

    text = page([Shown("runs/dpo", curves, measured)])

Every text of a run, a file or a model passes through `esc`. The page's policy (CSP) runs only the script and
the style of this folder, by their digests: a script that came with the data would not run.
"""

import base64
import hashlib
from dataclasses import dataclass, field
from pathlib import Path

from eval.charts import esc
from eval.common import describe_training, run_settings
from eval.curves import PARTS, Curve, is_preference, last_finite, shown_panels
from eval.explain import SIDES, signed
from eval.figures import curve_charts, distributions, judge_charts
from eval.page_lists import answer_section, pair_section, sample_section
from eval.pairs import Estimate, Measured, worries

COLOURS = ("blue", "orange", "green", "violet", "pink", "brown")  # of the runs
CHECKED = (
    "Checked: a loss near ln 2, a rising held-out loss, a gap between training and held-out pairs, chosen "
    "answers that become less likely, margins that follow the length; with a judge, also lost cases, fewer "
    "right or well-formed answers, and longer answers."
)


@dataclass(frozen=True)
class Shown:
    """A run on the page. `reason` tells why its pairs could not be measured."""

    folder: str
    curves: dict[str, Curve]
    measured: Measured | None
    reason: str = ""
    judged: dict = field(default_factory=dict)  # the judge's figures and answers
    samples: dict[str, dict[int, dict]] = field(default_factory=dict)  # of `read_samples`

    @property
    def worries(self) -> list[str]:
        return worries(self.measured, self.curves, self.judged)


def page(runs: list[Shown]) -> str:
    """The whole page. Of several runs, the first one with pairs, answers or samples shows them."""
    coloured = list(zip(runs, COLOURS * len(runs), strict=False))
    sections = [("curves", "Curves", *curve_section(coloured))]
    if judged := next((run for run in runs if run.judged), None):
        sections.append(("answers", "Answers, judged", *judged_section(judged)))
    if sampled := next((run for run in runs if run.samples), None):
        sections.append(("samples", "Answers during training", *sample_section(sampled.samples)))
    if pairs := [(run.folder, colour, run.measured) for run, colour in coloured if run.measured]:
        sections.append(("distributions", "Distributions", *distribution_section(pairs)))
        sections.append(("pairs", "Pairs", *pair_section(pairs[0][2])))
    of = {"answers": judged, "samples": sampled, "pairs": next((run for run in runs if run.measured), None)}
    if len(runs) > 1:
        sections = [(key, f"{title} of {of[key].folder}" if key in of else title, *rest)
                    for key, title, *rest in sections]  # fmt: skip
    links = " ".join(f'<a href="#{key}">{esc(title)}</a>' for key, title, *_ in sections)
    head = headline(runs[0]) if len(runs) == 1 else comparison(coloured)
    body = "".join(
        f"<section id={key}><h2>{esc(title)}</h2><p class=pale>{text}</p>{rest}</section>"
        for key, title, text, rest in sections
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
    parts = [f"<h1>{esc(run.folder)}</h1><p>{described(run)}</p>"]
    if run.measured:
        parts.append(f"<p class=verdict>{verdict(run)}</p>{cards(run)}")
    elif run.reason:
        parts.append(f"<p class=pale>Without pairs: {esc(run.reason)}.</p>")
    return "".join(parts) + worry_box(run.worries, CHECKED if run.measured else "")


def worry_box(found: list[str], checked: str) -> str:
    """The list of worries; without one the text `checked`, if there is one."""
    if found:
        items = "".join(f"<li>{esc(sentence)}" for sentence in found)
        return f"<div class=worries><h3>What to worry about</h3><ul>{items}</ul></div>"
    box = f"<div class='worries good'><h3>Nothing to worry about</h3><p>{esc(checked)}</p></div>"
    return box if checked else ""


def described(run: Shown) -> str:
    """Data, reference and options of a run, as sentences."""
    settings = run_settings(run.folder) if (Path(run.folder) / "config.json").is_file() else {}
    steps = max(max(curve) for curve in run.curves.values())
    words = [f"{steps} optimizer steps"]
    for name, label in (("batch_size", "batch"), ("lr", "learning rate"), ("loss", "loss"), ("beta", "β")):
        if name in settings and not (name == "loss" and "beta" not in settings):
            words.append(f"{label} {settings[name]}")
    start = describe_training(run.folder) if settings else ""
    what = start.removeprefix(f"{run.folder}: ") or f"{run.folder} contains no finished model"
    return f"{esc(what[:1].upper() + what[1:])}. {esc(', '.join(words))}."


def verdict(run: Shown) -> str:
    """Whether the run worked, with its numbers, as HTML."""
    found, count = run.measured.accuracy, len(run.measured.pairs)
    harm = "It did harm." if found.high < 0.5 else "No effect is visible."
    text = (
        f"<b>{'It worked.' if found.low > 0.5 else harm}</b> The policy prefers the chosen answer more than "
        f"its reference does in {percent(found)} of {count} held-out pairs. The log-ratio margin, chosen − "
        f"rejected, is {nats(run.measured.margin)} nats; before training it is 0."
    )
    if won := win_rate(run):
        text += f" Its own answers win {percent(won)} of the cases that the judge decided."
    return text


def win_rate(run: Shown) -> Estimate | None:
    """The share of decided cases that the run's answers win; None without a judge or a decided case."""
    interval = run.judged.get("win_rate_ci95")
    return Estimate(run.judged["win_rate"], *interval) if interval else None


def cards(run: Shown) -> str:
    """The figures of a run, each with its 95 % interval where it has one."""
    beta, margin = run.measured.objective.beta, run.measured.margin
    reward = Estimate(beta * margin.value, beta * margin.low, beta * margin.high)
    chosen, rejected = (signed(run.measured.logratio(side).value, 1) for side in SIDES)
    figures = [
        (f"{run.measured.accuracy.value:.0%}", f"reward accuracy, {interval(run.measured.accuracy, '.0%')}"),
        (signed(margin.value, 1), f"log-ratio margin, nats, {interval(margin, '.1f')}"),
        (signed(reward.value), f"reward margin, β = {beta:g}, {interval(reward, '.2f')}"),
        (f"{chosen} / {rejected}", "log-ratio of chosen / of rejected answers, nats"),
        (f"{run.measured.kl:.3f}", "KL(π‖π_ref) of the next token, nats, mean over held-out answers"),
    ]
    if won := win_rate(run):
        figures.insert(1, (f"{won.value:.0%}", f"win rate of its answers, {interval(won, '.0%')}"))
    items = "".join(f"<div><strong>{value}</strong><span>{what}</span></div>" for value, what in figures)
    return f"<div class=cards>{items}</div>"


def interval(estimate: Estimate, form: str) -> str:
    return f"95 %: {estimate.low:{form}} to {estimate.high:{form}}".replace("-", "−")


def percent(estimate: Estimate) -> str:
    return f"{estimate.value:.0%} ({interval(estimate, '.0%')})"


def nats(estimate: Estimate) -> str:
    return f"{signed(estimate.value)} ({interval(estimate, '.2f')})"


def comparison(coloured: list[tuple[Shown, str]]) -> str:
    """The headline of several runs: the best one, a table with a row for each, and what to worry about."""
    heads = {
        "loss": lambda run: esc(run.measured.objective.loss),
        "β": lambda run: f"{run.measured.objective.beta:g}",
        "accuracy": lambda run: percent(run.measured.accuracy),
        "win rate": lambda run: percent(won) if (won := win_rate(run)) else "–",
        "log-ratio margin, nats": lambda run: nats(run.measured.margin),
        "chosen": lambda run: signed(run.measured.logratio("chosen").value),
        "rejected": lambda run: signed(run.measured.logratio("rejected").value),
        "KL per token": lambda run: f"{run.measured.kl:.3f}",
    }
    rows = ""
    for run, colour in coloured:
        loss = last_finite(run.curves.get("eval_loss", {}))
        cells = [cell(run) if run.measured else "–" for cell in heads.values()]
        cells += [f"{loss[1]:.4f}" if loss else "–"]
        name = f"<th scope=row><i class='swatch {colour}'></i>{esc(run.folder)}"
        rows += f"<tr>{name}{''.join(f'<td>{cell}' for cell in cells)}"
    runs = [run for run, _ in coloured]
    found = [f"{run.folder}: {sentence}" for run in runs for sentence in run.worries]
    found += [f"{run.folder}, without pairs: {run.reason}." for run in runs if run.reason]
    text = "".join(f"<p class=pale>{esc(run.folder)}: {described(run)}</p>" for run in runs)
    head = "".join(f"<th scope=col>{head}" for head in ["run", *heads, "held-out loss"])
    table = f"<div class=wide tabindex=0><table><thead><tr>{head}<tbody>{rows}</table></div>"
    return f"<h1>{len(runs)} runs</h1>{best(runs)}{table}{worry_box(found, '')}{text}"


def best(runs: list[Shown]) -> str:
    """The run with the highest accuracy, and whether the intervals of the others reach it, as HTML."""
    measured = sorted((run for run in runs if run.measured), key=lambda run: -run.measured.accuracy.value)
    if len(measured) < 2:
        return ""
    first, rest = measured[0], measured[1:]
    near = [run.folder for run in rest if run.measured.accuracy.high >= first.measured.accuracy.low]
    overlap = f"with that of {', '.join(near)}" if near else "with no other"
    return (
        f"<p class=verdict><b>{esc(first.folder)} has the highest accuracy,</b> {percent(first.measured.accuracy)} "
        f"of {len(first.measured.pairs)} held-out pairs. Its interval overlaps {esc(overlap)}.</p>"
    )


# ---- Sections: (text, rest), both HTML


def curve_section(coloured: list[tuple[Shown, str]]) -> tuple[str, str]:
    named = [(run.folder, colour, run.curves) for run, colour in coloured]
    curves = [run.curves for run, _ in coloured]
    held_out = any(name.startswith(PARTS[1]) for names in curves for name in names)
    reading = "Thin lines: training. Heavy lines with dots: held-out data." if held_out else "Training data."
    if len(curves) > 1 and is_preference(curves[0]):
        reading += " Where a chart has two lines of a run, the dashed one belongs to the rejected answers."
    charts = "".join(curve_charts(shown_panels(curves), named))
    return reading, f"<div class=charts>{charts}</div>"


def distribution_section(runs: list[tuple[str, str, Measured]]) -> tuple[str, str]:
    first = runs[0][2]
    longer, before, after = (
        f"{sum(getattr(pair, name) > 0 for pair in first.pairs) / len(first.pairs):.0%}"
        for name in ("longer", "before", "after")
    )
    of = f" (figures of {esc(runs[0][0])})" if len(runs) > 1 else ""
    text = (
        f"The chosen answer is longer in {longer} of the pairs. It is the more likely one in {before} before "
        f"training and in {after} after it. Length difference and log-ratio margin correlate with r = "
        f"{signed(first.length_correlation)}{of}. Thin upright lines are 95 % intervals."
    )
    return text, f"<div class=charts>{''.join(distributions(runs))}</div>"


def judged_section(run: Shown) -> tuple[str, str]:
    """The run's own answers beside those of the model that it started from."""
    after, before = run.judged["right_answers"]
    figures, tokens = run.judged, run.judged["mean_tokens"]
    won = win_rate(run)
    text = (
        f"{esc(after)} and {esc(before)} answered {figures['prompts']:,} prompts, {figures['samples']} times "
        f"each. A judge scored the answers: {figures['wins']:,} wins, {figures['ties']:,} ties, "
        f"{figures['losses']:,} losses. "
        + (f"{esc(after)} wins {percent(won)} of the decided cases. " if won else "")
        + f"Mean length: {tokens[after]:.1f} tokens, before {tokens[before]:.1f}. "
        "Thin upright lines are 95 % intervals."
    )
    charts = f"<div class=charts>{''.join(judge_charts(figures))}</div>"
    return text, charts + answer_section(figures)
