"""The report of runs as one HTML page, without network, fonts or pictures of others.

    text = page([Shown("runs/dpo", curves, measured)])

Every text of a run, a file or a model passes through `esc`. The page's policy (CSP) runs only the script and
the style of this folder, by their digests: a script that came with the data would not run.
"""

import base64
import hashlib
from dataclasses import dataclass
from pathlib import Path

from eval.common import describe_training, run_settings
from eval.curves import PARTS, Curve, is_preference, last_finite, shown_panels
from eval.explain import SIDES, signed
from eval.figures import INTERVALS, curve_charts, distributions
from eval.judge import summary
from eval.page_pairs import esc, pair_section
from eval.pairs import Estimate, Measured, worries
from model.weights import read_json

COLOURS = ("blue", "orange", "green", "violet", "pink", "brown")  # of the runs


@dataclass(frozen=True)
class Shown:
    """A run on the page. `reason` tells why its pairs could not be measured."""

    folder: str
    curves: dict[str, Curve]
    measured: Measured | None
    reason: str = ""


def page(runs: list[Shown]) -> str:
    """The whole page. The first run with pairs shows its pairs and distributions."""
    first = next((run for run in runs if run.measured), None)
    title = esc(" · ".join(run.folder for run in runs))
    parts = [headline(runs[0]) if len(runs) == 1 else comparison(runs), curve_section(runs)]
    if first:
        sections = judged_section(first), distribution_section(first, len(runs) > 1)
        parts += [*sections, pair_section(first.measured)]
    style, script = (Path(__file__).with_name(f"page.{kind}").read_text("utf-8") for kind in ("css", "js"))
    policy = f"default-src 'none'; style-src {digest(style)}; script-src {digest(script)}; base-uri 'none'"
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}; form-action 'none'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
{"".join(parts)}
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
        parts.append(f"<p class=verdict>{verdict(run.measured)}</p>{cards(run.measured, judge_of(run))}")
    elif run.reason:
        parts.append(f"<p class=pale>Without pairs: {esc(run.reason)}.</p>")
    found = worries(run.measured, run.curves)
    if found:
        items = "".join(f"<li>{esc(sentence)}" for sentence in found)
        parts.append(f'<div class="worries"><h3>What to worry about</h3><ul>{items}</ul></div>')
    elif run.measured:
        parts.append(
            "<div class='worries good'><h3>Nothing to worry about</h3><p>Checked: a loss near ln 2, a rising "
            "held-out loss, a gap between training and held-out pairs, chosen answers that become less "
            "likely, and margins that follow the length.</p></div>"
        )
    return f"<header>{''.join(parts)}</header>"


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


def verdict(measured: Measured) -> str:
    """Whether the run worked, with its numbers, as HTML."""
    found = measured.accuracy
    harm = "It did harm." if found.high < 0.5 else "No effect is visible."
    return (
        f"<b>{'It worked.' if found.low > 0.5 else harm}</b> The policy prefers the chosen answer more than "
        f"its reference does in {percent(found)} of {len(measured.pairs)} held-out pairs. The log-ratio "
        f"margin, chosen − rejected, is {nats(measured.margin)} nats; before training it is 0."
    )


def cards(measured: Measured, judged: dict) -> str:
    """The figures of a run; the win rate if a judge compared it with its reference."""
    beta, margin = measured.objective.beta, measured.margin
    reward = Estimate(beta * margin.value, beta * margin.low, beta * margin.high)
    ranked = sum(pair.after > 0 for pair in measured.pairs), sum(pair.before > 0 for pair in measured.pairs)
    after, before = (f"{count / len(measured.pairs):.0%}" for count in ranked)
    figures = [
        (f"{measured.accuracy.value:.0%}", f"reward accuracy, {interval(measured.accuracy, '.0%')}"),
        (signed(margin.value, 1), f"log-ratio margin, nats, {interval(margin, '.1f')}"),
        (signed(reward.value), f"reward margin, β = {beta:g}, {interval(reward, '.2f')}"),
        *((signed(measured.logratio(side).value, 1), f"log-ratio of {side} answers, nats") for side in SIDES),
        (f"{before} → {after}", "of pairs have log π(chosen) > log π(rejected), before → after"),
    ]
    if judged and judged["win_rate_ci95"]:
        won = Estimate(judged["win_rate"], *judged["win_rate_ci95"])
        figures.insert(1, (f"{won.value:.0%}", f"win rate of its answers, {interval(won, '.0%')}"))
    items = "".join(f"<div><strong>{value}</strong><span>{what}</span></div>" for value, what in figures)
    return f"<div class=cards>{items}</div>"


def interval(estimate: Estimate, form: str) -> str:
    return f"95 %: {estimate.low:{form}} to {estimate.high:{form}}".replace("-", "−")


def percent(estimate: Estimate) -> str:
    return f"{estimate.value:.0%} ({interval(estimate, '.0%')})"


def nats(estimate: Estimate) -> str:
    return f"{signed(estimate.value)} ({interval(estimate, '.2f')})"


def comparison(runs: list[Shown]) -> str:
    """The headline of several runs: a table with a row for each, and what to worry about."""
    heads = ["run", "loss", "β", "accuracy", "log-ratio margin, nats", "log-ratio chosen", "rejected"]
    rows, found = [], []
    for colour, run in zip(COLOURS * len(runs), runs, strict=False):
        name = f"<i class='swatch {colour}'></i>{esc(run.folder)}"
        measured, loss = run.measured, last_finite(run.curves.get("eval_loss", {}))
        cells = ["–"] * 6 if not measured else [
            esc(measured.objective.loss), f"{measured.objective.beta:g}", percent(measured.accuracy),
            nats(measured.margin), *(signed(measured.logratio(side).value) for side in SIDES),
        ]  # fmt: skip
        cells = [name, *cells, f"{loss[1]:.4f}" if loss else "–"]
        rows.append("".join(f"<td>{cell}" for cell in cells))
        found += [f"{run.folder}: {sentence}" for sentence in worries(measured, run.curves)]
        found += [f"{run.folder}, without pairs: {run.reason}." for _ in range(bool(run.reason))]
    table = "".join(f"<tr>{row}" for row in rows)
    text = "".join(f"<p>{esc(run.folder)}: {described(run)}</p>" for run in runs)
    head = "".join(f"<th scope=col>{head}" for head in [*heads, "held-out loss"])
    table = f"<div class=wide tabindex=0><table><thead><tr>{head}<tbody>{table}</table></div>"
    items = "".join(f"<li>{esc(sentence)}" for sentence in found)
    worry = f"<div class=worries><h3>What to worry about</h3><ul>{items}</ul></div>" if found else ""
    return f"<header><h1>{len(runs)} runs</h1>{table}{worry}{text}</header>"


# ---- Curves and distributions


def curve_section(runs: list[Shown]) -> str:
    panels = shown_panels([run.curves for run in runs])
    named = [(run.folder, colour, run.curves) for run, colour in zip(runs, COLOURS * len(runs), strict=False)]
    held_out = any(name.startswith(PARTS[1]) for run in runs for name in run.curves)
    reading = "Thin lines: training. Heavy lines with dots: held-out data." if held_out else "Training data."
    if len(runs) > 1 and is_preference(runs[0].curves):
        reading += " Where a chart has two lines of a run, the dashed one belongs to the rejected answers."
    charts = "".join(curve_charts(panels, named))
    return f"<section><h2>Curves</h2><p class=pale>{reading}</p><div class=charts>{charts}</div></section>"


def distribution_section(run: Shown, name_it: bool) -> str:
    measured, of = run.measured, f" of {esc(run.folder)}" if name_it else ""
    longer = sum(pair.longer > 0 for pair in measured.pairs) / len(measured.pairs)
    text = (
        f"The chosen answer is longer in {longer:.0%} of the pairs. Length difference and margin correlate "
        f"with r = {signed(measured.length_correlation)}. {INTERVALS}"
    )
    head = f"<h2>Distributions{of}</h2><p class=pale>{text}</p>"
    return f"<section>{head}<div class='charts four'>{''.join(distributions(measured))}</div></section>"


def judge_of(run: Shown) -> dict:
    """The judge's figures, if a demo has written them beside the run; {} otherwise."""
    path = Path(run.folder).parent / "judge.json"
    figures = read_json(path) if path.is_file() else {}
    is_about_it = next(iter(figures.get("right_answers", ())), None) == Path(run.folder).name
    return figures if is_about_it else {}


def judged_section(run: Shown) -> str:
    """The comparison of a run's answers with those of the model that it started from."""
    if not (figures := judge_of(run)):
        return ""
    text = f"<pre class=wide tabindex=0>{esc(summary(figures))}</pre>"
    return f"<section><h2>Answers, judged</h2>{text}</section>"
