"""The report of runs as one HTML page, without network, fonts or pictures of others.

    text = page([Shown("runs/dpo", curves, measured)])

Every text of a run, a file or a model passes through `esc`. The page's policy (CSP) runs only the script and
the style of this folder, by their digests: a script that came with the data would not run.
"""

import base64
import hashlib
import html
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from dataset.jsonl import printable
from eval.charts import number
from eval.common import describe_training, run_settings
from eval.curves import PARTS, Curve, is_preference, last_finite, shown_panels
from eval.explain import STEPS, Answer, token_pieces
from eval.figures import ACCURACY, curve_charts, distributions
from eval.pairs import Estimate, Measured, MeasuredPair, signed, worries

COLOURS = ("blue", "orange", "green", "violet", "pink", "brown")  # of the runs
TOKENS = 60_000  # on the page; longer answers are cut
PROMPT = 2_000  # characters of a prompt on the page
STYLE, SCRIPT = (Path(__file__).with_name(f"page.{kind}").read_text("utf-8") for kind in ("css", "js"))


@dataclass(frozen=True)
class Shown:
    """A run on the page. `reason` tells why its pairs could not be measured."""

    folder: str
    curves: dict[str, Curve]
    measured: Measured | None
    reason: str = ""


def esc(text: str) -> str:
    """Text for HTML, in an element or in an attribute; control characters are visible."""
    return html.escape(printable(str(text)))


def page(runs: list[Shown]) -> str:
    """The whole page. The first run with pairs shows its pairs and distributions."""
    first = next((run for run in runs if run.measured), None)
    title = esc(" · ".join(run.folder for run in runs))
    parts = [headline(runs[0]) if len(runs) == 1 else comparison(runs), curve_section(runs)]
    if first:
        parts += [distribution_section(first, len(runs) > 1), pair_section(first.measured)]
    policy = f"default-src 'none'; style-src {digest(STYLE)}; script-src {digest(SCRIPT)}; base-uri 'none'"
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}; form-action 'none'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{STYLE}</style>
</head>
<body>
{"".join(parts)}
<output id="readout" hidden></output>
<script>{SCRIPT}</script>
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
        parts.append(f"<p class=verdict>{verdict(run.measured)}</p>{cards(run.measured)}")
    elif run.reason:
        parts.append(f"<p class=pale>Without pairs: {esc(run.reason)}.</p>")
    found = worries(run.measured, run.curves)
    if found:
        items = "".join(f"<li>{esc(sentence)}" for sentence in found)
        parts.append(f'<div class="worries"><h3>What to worry about</h3><ul>{items}</ul></div>')
    elif run.measured:
        parts.append(
            '<div class="worries good"><h3>Nothing to worry about</h3><p>The loss moved and held-out loss did '
            "not rise. Chosen answers kept their probability. The margin does not follow the length.</p></div>"
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
    word = "It worked." if found.low > 0.5 else "It did harm." if found.high < 0.5 else "No effect is visible."
    return (
        f"<b>{word}</b> The policy prefers the chosen answer more than its reference does in "
        f"{percent(found)} of {len(measured.pairs)} held-out pairs. The margin log π/π<sub>ref</sub> of chosen "
        f"minus rejected is {nats(measured.margin)} nats; before training it is 0."
    )


def cards(measured: Measured) -> str:
    beta, margin = measured.objective.beta, measured.margin
    reward = Estimate(beta * margin.value, beta * margin.low, beta * margin.high)
    ranked = sum(pair.after > 0 for pair in measured.pairs), sum(pair.before > 0 for pair in measured.pairs)
    after, before = (f"{count / len(measured.pairs):.0%}" for count in ranked)
    figures = [
        (f"{measured.accuracy.value:.0%}", f"reward accuracy, {interval(measured.accuracy, '.0%')}"),
        (signed(margin.value, 1), f"log-ratio margin, nats, {interval(margin, '.1f')}"),
        (signed(reward.value), f"reward margin, β = {beta:g}, {interval(reward, '.2f')}"),
        *((nats_only(measured.logratio(side)), f"log-ratio of {side} answers, nats") for side in SIDES),
        (f"{before} → {after}", "pairs with log π(chosen) > log π(rejected), before and after"),
    ]
    return f"<div class=cards>{''.join(f'<div><strong>{a}</strong><span>{b}</span></div>' for a, b in figures)}</div>"


SIDES = ("chosen", "rejected")


def interval(estimate: Estimate, form: str) -> str:
    return f"95 %: {estimate.low:{form}} to {estimate.high:{form}}".replace("-", "−")


def percent(estimate: Estimate) -> str:
    return f"{estimate.value:.0%} ({interval(estimate, '.0%')})"


def nats(estimate: Estimate) -> str:
    return f"{signed(estimate.value)} ({interval(estimate, '.2f')})"


def nats_only(estimate: Estimate) -> str:
    return signed(estimate.value, 1)


def comparison(runs: list[Shown]) -> str:
    """The headline of several runs: a table with a row for each, and what to worry about."""
    heads = "run", "loss", "β", "accuracy", "log-ratio margin, nats", "log-ratio chosen", "rejected", "held-out loss"
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
    head = "".join(f"<th scope=col>{head}" for head in heads)
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
        f"with r = {signed(measured.length_correlation)}. {ACCURACY}"
    )
    charts = "".join(distributions(measured))
    return f"<section><h2>Distributions{of}</h2><p class=pale>{text}</p><div class=charts>{charts}</div></section>"


# ---- The pairs


def pair_section(measured: Measured) -> str:
    """The list of pairs, the largest change first; each opens to its tokens."""
    pairs = sorted(measured.pairs, key=lambda pair: -pair.change)
    lengths = [len(getattr(pair, side).tokens) for pair in pairs for side in SIDES]
    limits = (2**i for i in range(14, 2, -1))
    limit = next((n for n in limits if sum(min(length, n) for length in lengths) <= TOKENS), 4)
    rows = (pair_row(pair, measured, limit, number == 0) for number, pair in enumerate(pairs))
    few = f"{len(pairs)} of {measured.held_out} held-out pairs" if len(pairs) < measured.held_out else "All held-out pairs"
    cut = f" Answers are cut after {limit} tokens; sums include all." if limit < max(lengths) else ""
    return f"""<section><h2>Pairs</h2>
<p class=pale>{few} of {esc(Path(measured.data).name)}. Each token is coloured by log π/π<sub>ref</sub>, how much
more likely training made it. The log-ratios of an answer sum to its log-ratio; β times that is its reward.
A dotted line marks the tokens that both answers start with: they cancel in the margin.{cut}</p>
{scale()}<p class=pale>Point at a token for its numbers. With the keyboard: Tab to an answer, then the arrow keys.</p>
<div class=heads><span></span><span>prompt</span>{"".join(sort_button(*column) for column in COLUMNS)}</div>
<div id="list">{"".join(rows)}</div></section>"""


COLUMNS = [  # key, head, explanation
    ("margin", "margin", "log π(chosen) − log π(rejected), after training"),
    ("change", "change", "margin after − margin before = log-ratio margin"),
    ("length", "length diff.", "tokens of chosen − tokens of rejected"),
]


def sort_button(key: str, head: str, why: str) -> str:
    order = " data-order=falling" if key == "change" else ""
    return f'<button type=button data-sort={key} title="Sort by {why}"{order}>{head}</button>'


def scale() -> str:
    """The legend of the colours."""
    less = "".join(f"<span class=less-{i}>−{STEPS[i - 1]:g}</span>" for i in (4, 3, 2, 1))
    more = "".join(f"<span class=more-{i}>+{STEPS[i - 1]:g}</span>" for i in (1, 2, 3, 4))
    return f"<div class=scale>less likely <span>{less}{more}</span> more likely, nats from this value on</div>"


def pair_row(pair: MeasuredPair, measured: Measured, limit: int, is_open: bool) -> str:
    right = pair.change > 0
    question = shorten(pair.prompt[-1].content, 300)
    sign = f'<span class="sign {"blue" if right else "orange"}">{"✓" if right else "✗"}</span>'
    cells = f"<span>{signed(pair.after)}</span><span>{signed(pair.change)}</span><span>{pair.longer:+d}</span>"
    keys = f"data-margin={pair.after:.3f} data-change={pair.change:.3f} data-length={pair.longer}"
    head = f"<summary>{sign}<span class=ask>{esc(question)}</span>{cells.replace('>-', '>−')}</summary>"
    turns = "\n".join(f"{message.role}: {message.content}" for message in pair.prompt)
    margin, beta = f"{signed(pair.after)} − ({signed(pair.before)}) = {signed(pair.change)}", measured.objective.beta
    sides = "".join(answer_column(side, getattr(pair, side), pair.shared, measured, limit) for side in SIDES)
    return (
        f"<details {keys}{' open' if is_open else ''}>{head}<div class=inside>"
        f"<p class=prompt><small>Prompt, line {pair.line}, not scored</small>\n{esc(shorten(turns, PROMPT))}</p>"
        f"<div class=sides>{sides}</div>"
        f"<p class=pale>Margin after − before: {margin} nats. Reward margin {signed(beta * pair.change)}, "
        f"loss {pair.loss:.4f}.</p></div></details>\n"
    )


def answer_column(side: str, answer: Answer, shared: int, measured: Measured, limit: int) -> str:
    """One answer: its sums, and its tokens on their colours."""
    total, logp, reference = (sum(x) for x in (answer.logratios, answer.logps, answer.reference_logps))
    sums = (
        f"log π/π<sub>ref</sub> {signed(total)} = {signed(logp)} − ({signed(reference)}), "
        f"reward {signed(measured.objective.beta * total)}, {len(answer.tokens)} tokens"
    )
    tokens = "".join(token_marks(answer, measured.tokenizer, shared, limit))
    label = f"{side} answer; the arrow keys move from token to token"
    return (
        f'<div><h4>{side}<small>{sums}</small></h4><p class=answer tabindex=0 role=group aria-label="{label}">'
        f"{tokens}</p></div>"
    )


def token_marks(answer: Answer, tokenizer, shared: int, limit: int) -> Iterator[str]:
    """An element for each token: its class is the colour, `data-l` is log π and log π_ref."""
    shown = Answer(answer.tokens[:limit], answer.logps[:limit], answer.reference_logps[:limit])
    last = len(answer.tokens) - 1
    if shared:
        yield "<span class=shared>"
    done = 0
    for text, logp, reference in token_pieces(shown, tokenizer):
        logratio = logp - reference
        strength = sum(abs(logratio) >= step for step in STEPS)
        names = [f"{'more' if logratio > 0 else 'less'}-{strength}"] if strength else []
        names += ["end"] if done == last and answer.tokens[-1] == tokenizer.end_id else []
        css = f' class="{" ".join(names)}"' if names else ""
        visible = esc(text).replace("\n", "↵\n")
        yield f'<b{css} data-l="{logp:.2f} {reference:.2f}">{visible}</b>'
        done += 1
        if done == shared:
            yield "</span>"
    if 0 < done < shared:
        yield "</span>"
    if limit < len(answer.tokens):
        yield f" … {len(answer.tokens) - limit} more tokens"


def shorten(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[:most]} … {len(text) - most:,} more characters"


def write_number(value: float) -> str:
    return number(value)
