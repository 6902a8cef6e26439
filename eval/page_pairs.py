"""The pairs of the report: a list to sort, whose rows open to prompt and answers, token by token.

    html = pair_section(measured)

A token is an element ``<b data-l=log π,log π_ref>``; its class is the colour of its log-ratio.
"""

import html
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from dataset.jsonl import printable
from eval.explain import SIDES, STEPS, Answer, signed, token_pieces
from eval.pairs import Measured, MeasuredPair
from eval.terminal import text_pieces

TOKENS = 50_000  # on the page, some 45 bytes each; longer answers are cut
PROMPT = 2_000  # characters of a prompt on the page
COLUMNS = [  # key, head, explanation
    ("margin", "margin", "log π(chosen) − log π(rejected), after training"),
    ("change", "change", "margin after − margin before = log-ratio margin"),
    ("length", "length diff.", "tokens of chosen − tokens of rejected"),
]


def esc(text: str) -> str:
    """Text for HTML, in an element or in an attribute; control characters are visible."""
    return html.escape(printable(str(text)))


def pair_section(measured: Measured) -> str:
    """The list of pairs, the largest change first. The first one is open."""
    pairs = sorted(measured.pairs, key=lambda pair: -pair.change)
    limit, is_cut = token_limit(pairs)
    rows = (pair_row(pair, measured, limit, number == 0) for number, pair in enumerate(pairs))
    few = f"{len(pairs)} of {measured.held_out}" if len(pairs) < measured.held_out else f"All {len(pairs)}"
    cut = f" Answers are cut after {limit} tokens; the sums include all tokens." if is_cut else ""
    return f"""<section><h2>Pairs</h2>
<p class=pale>{few} held-out pairs of {esc(Path(measured.data).name)}. The colour of a token is
log π/π<sub>ref</sub>: how much more likely training made it. These log-ratios sum to the log-ratio of the
answer, and β times that is its reward. A dotted line marks the tokens that both answers start with: they
cancel in the margin.{cut}</p>
{scale()}
<p class=pale>Point at a token for its numbers. With the keyboard: Tab to an answer, then the arrow keys.</p>
<div class=heads><span></span><span>prompt</span>{"".join(sort_button(*column) for column in COLUMNS)}</div>
<div id="list">{"".join(rows)}</div></section>"""


def token_limit(pairs: list[MeasuredPair]) -> tuple[int, bool]:
    """The most tokens of an answer on the page, at least 8, and whether an answer is longer."""
    lengths = np.array([len(answer.tokens) for pair in pairs for answer in (pair.chosen, pair.rejected)])
    limits = range(lengths.max(), 8, -1)
    limit = next((n for n in limits if np.minimum(lengths, n).sum() <= TOKENS), 8)
    return limit, limit < lengths.max()


def sort_button(key: str, head: str, why: str) -> str:
    order = " data-order=falling" if key == "change" else ""
    return f'<button type=button data-sort={key} title="Sort by {why}"{order}>{head}</button>'


def scale() -> str:
    """The legend of the colours."""
    less = "".join(f"<span class=less-{i}>−{STEPS[i - 1]:g}</span>" for i in (4, 3, 2, 1))
    more = "".join(f"<span class=more-{i}>+{STEPS[i - 1]:g}</span>" for i in (1, 2, 3, 4))
    words = "less likely", f"<span>{less}{more}</span>", "more likely, nats from this value on"
    return f"<div class=scale>{' '.join(words)}</div>"


def pair_row(pair: MeasuredPair, measured: Measured, limit: int, is_open: bool) -> str:
    css, sign = ("blue", "✓") if pair.change > 0 else ("orange", "✗")
    values = signed(pair.after), signed(pair.change), signed(pair.longer, 0)
    cells = "".join(f"<span>{value}</span>" for value in values)
    keys = f"data-margin={pair.after:.3f} data-change={pair.change:.3f} data-length={pair.longer}"
    question = shorten(pair.prompt[-1].content, 300)
    turns = shorten("\n".join(f"{turn.role}: {turn.content}" for turn in pair.prompt), PROMPT)
    change = f"{signed(pair.after)} − ({signed(pair.before)}) = {signed(pair.change)}"
    sides = "".join(answer_column(side, getattr(pair, side), pair.shared, measured, limit) for side in SIDES)
    return (
        f"<details {keys}{' open' if is_open else ''}>"
        f"<summary><span class='sign {css}'>{sign}</span><span class=ask>{esc(question)}</span>{cells}"
        "</summary><div class=inside>"
        f"<p class=prompt><small>Prompt, line {pair.line}, not scored</small>\n{esc(turns)}</p>"
        f"<div class=sides>{sides}</div>"
        f"<p class=pale>Margin after − before: {change} nats. "
        f"Reward margin {signed(measured.objective.beta * pair.change)}, loss {pair.loss:.4f}.</p>"
        "</div></details>\n"
    )


def answer_column(side: str, answer: Answer, shared: int, measured: Measured, limit: int) -> str:
    """One answer: its sums, and its tokens on their colours."""
    total, logp, reference = (sum(x) for x in (answer.logratios, answer.logps, answer.reference_logps))
    sums = (
        f"log π/π<sub>ref</sub> {signed(total)} = {signed(logp)} − ({signed(reference)}), "
        f"reward {signed(measured.objective.beta * total)}"
    )
    tokens = "".join(token_marks(answer, measured.tokenizer, shared, limit))
    label = f"{side} answer; the arrow keys move from token to token"
    return (
        f"<div><h4>{side}, {len(answer.tokens)} tokens<small>{sums}</small></h4>"
        f'<p class=answer tabindex=0 role=group aria-label="{label}">{tokens}</p></div>'
    )


def token_marks(answer: Answer, tokenizer, shared: int, limit: int) -> Iterator[str]:
    """An element for each token of an answer. The first `shared` tokens have a dotted line."""
    shown = Answer(answer.tokens[:limit], answer.logps[:limit], answer.reference_logps[:limit])
    # A piece is one character or more. If the answers part within a character, the whole of it differs.
    same = sum(map(bool, [*text_pieces(tokenizer, shown.tokens[:shared])][:-1]))
    pieces = list(token_pieces(shown, tokenizer))
    for number, (text, logp, reference) in enumerate(pieces, start=1):
        names = colour(logp - reference) + ["shared"] * (number <= same)
        if number == len(pieces) and shown.tokens[-1] == tokenizer.end_id:
            names.append("end")
        css = f" class={names[0]}" if len(names) == 1 else f' class="{" ".join(names)}"' * bool(names)
        visible = esc(text).replace("\n", "↵\n")
        yield f'<b{css} data-l={logp:.2f},{reference:.2f}>{visible}</b>'
    if limit < len(answer.tokens):
        yield f" … {len(answer.tokens) - limit} more tokens"


def colour(logratio: float) -> list[str]:
    """The class of a token's colour: ``["more-2"]``; [] below the first step."""
    strength = sum(abs(logratio) >= step for step in STEPS)
    return [f"{'more' if logratio > 0 else 'less'}-{strength}"] if strength else []


def shorten(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[:most]} … {len(text) - most:,} more characters"
