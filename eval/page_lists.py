"""The lists of the report, whose rows open: pairs token by token, judged answers, samples of a training.

    text, html = pair_section(measured)

A token is an element ``<b data-l=log π,log π_ref>``; its class is the colour of its log-ratio.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from dataset.records import Message
from eval.charts import esc
from eval.explain import SIDES, STEPS, Answer, signed, token_pieces
from eval.judge import Verdict
from eval.pairs import Measured, MeasuredPair
from eval.terminal import text_pieces
from eval.words import tr

TOKENS = 38_000  # of all answers of pairs, some 45 bytes each; longer answers are cut
PROMPT, REPLY = 1_500, 1_000  # bytes of a prompt and of a judged answer or a sample; longer ones are cut
SHOWN_STEPS = 12  # of the samples of one prompt


def listing(columns: list[tuple[str, str, str]], order: tuple[str, str], rows: Iterable[str]) -> str:
    """Rows below the heads that sort them. A column is (key, head, explanation); `order` is (key, order)."""
    heads = "".join(
        f"<button type=button data-sort={key} title=\"{tr('Sort by {key}', key=why)}\""
        f"{f' data-order={order[1]}' if key == order[0] else ''}>{head}</button>"
        for key, head, why in columns
    )
    head = f"<div class=heads><span></span><span>{tr('prompt')}</span>{heads}</div>"
    return f"{head}<div class=list>{''.join(rows)}</div>"


def row(change: float, question: str, values: dict[str, tuple[float, str]], inside: str, opened=False) -> str:
    """A row that opens, with a mark for the sign of `change`.

    `values` are {key of the column: (number to sort by, text)}; `inside` is HTML.
    """
    keys = " ".join(f"data-{key}={number:.6g}" for key, (number, _) in values.items())
    cells = "".join(f"<span>{text}</span>" for _, text in values.values())
    css, mark = ("blue", "✓") if change > 0 else ("orange", "✗") if change < 0 else ("pale", "=")
    return (
        f"<details {keys}{' open' if opened else ''}><summary><span class='sign {css}'>{mark}</span>"
        f"<span class=ask>{esc(cut(question, 300))}</span>{cells}</summary>"
        f"<div class=inside>{inside}</div></details>\n"
    )


def prompt_box(turns: Iterable[Message], note: str) -> str:
    """A prompt, greyed."""
    text = "\n".join(f"{turn.role}: {turn.content}" for turn in turns)
    return f"<p class=prompt><small>{note}</small>\n{esc(cut(text, PROMPT))}</p>"


def table_of(heads: list[str], rows: list[list[str]]) -> str:
    """A table that scrolls where it is too wide; the first cell of a row, all HTML, is its head."""
    head = "".join(f"<th scope=col>{head}" for head in heads)
    body = "".join(f"<tr><th scope=row>{name}<td>{'<td>'.join(cells)}" for name, *cells in rows)
    box = f"<div class=wide tabindex=0 role=region aria-label={tr('{head}s', head=heads[0])}>"
    return f"{box}<table><thead><tr>{head}<tbody>{body}</table></div>"


def cut(text: str, most: int) -> str:
    """The text, or as much of it as fits into `most` bytes."""
    kept = text.encode("utf-8", "replace")[:most].decode("utf-8", "ignore")
    more = tr(" … {count} more characters", count=f"{len(text) - len(kept):,}")
    return text if len(kept) == len(text) else kept + more


# ---- Pairs


def pair_section(measured: Measured) -> tuple[str, str]:
    """The list of pairs, the largest change first. The first one is open."""
    pairs = sorted(measured.pairs, key=lambda pair: -pair.change)
    limit, is_cut = token_limit(pairs)
    few = tr("All {shown}") if len(pairs) == measured.held_out else tr("{shown} of {all}")
    text = tr(
        "{few} held-out pairs of {data}. The colour of a token is log π/π<sub>ref</sub>: how much more "
        "likely training made it. These log-ratios sum to the log-ratio of the answer, and β times that is "
        "its reward. A dotted line marks the tokens that both answers start with: they cancel in the margin.",
        few=few.format(shown=len(pairs), all=measured.held_out), data=esc(Path(measured.data).name),
    )  # fmt: skip
    if is_cut:
        text += tr(" Answers are cut after {limit} tokens; the sums include all tokens.", limit=limit)
    keys = tr("Point at a token for its numbers. With the keyboard: Tab to an answer, then the arrow keys.")
    columns = [
        ("margin", tr("margin"), tr("log π(chosen) − log π(rejected), after training")),
        ("change", tr("change"), tr("margin after − margin before = log-ratio margin")),
        ("length", tr("length diff."), tr("tokens of chosen − tokens of rejected")),
    ]
    rows = (pair_row(pair, measured, limit, number == 0) for number, pair in enumerate(pairs))
    return text, f"{scale()}<p class=pale>{keys}</p>{listing(columns, ('change', 'falling'), rows)}"


def token_limit(pairs: list[MeasuredPair]) -> tuple[int, bool]:
    """The most tokens of an answer on the page, at least 8, and whether an answer is longer."""
    lengths = np.array([len(answer.tokens) for pair in pairs for answer in (pair.chosen, pair.rejected)])
    limits = range(lengths.max(), 8, -1)
    limit = next((n for n in limits if np.minimum(lengths, n).sum() <= TOKENS), 8)
    return limit, limit < lengths.max()


def scale() -> str:
    """The legend of the colours."""
    less = "".join(f"<span class=less-{i}>−{STEPS[i - 1]:g}</span>" for i in (4, 3, 2, 1))
    more = "".join(f"<span class=more-{i}>+{STEPS[i - 1]:g}</span>" for i in (1, 2, 3, 4))
    words = tr("less likely"), f"<span>{less}{more}</span>", tr("more likely, nats from this value on")
    return f"<div class=scale>{' '.join(words)}</div>"


def pair_row(pair: MeasuredPair, measured: Measured, limit: int, opened: bool) -> str:
    values = {
        "margin": (pair.after, signed(pair.after)),
        "change": (pair.change, signed(pair.change)),
        "length": (pair.longer, signed(pair.longer, 0)),
    }
    change = f"{signed(pair.after)} − ({signed(pair.before)}) = {signed(pair.change)}"
    sides = "".join(answer_column(side, getattr(pair, side), pair.shared, measured, limit) for side in SIDES)
    text = tr(
        "Margin after − before: {change} nats. Reward margin {reward}, loss {loss}.",
        change=change, reward=signed(measured.objective.beta * pair.change), loss=f"{pair.loss:.4f}",
    )  # fmt: skip
    box = prompt_box(pair.prompt, tr("Prompt, line {line}, not scored", line=pair.line))
    inside = f"{box}<div class=sides>{sides}</div><p class=pale>{text}</p>"
    return row(pair.change, pair.prompt[-1].content, values, inside, opened)


def answer_column(side: str, answer: Answer, shared: int, measured: Measured, limit: int) -> str:
    """One answer: its sums, and its tokens on their colours."""
    total, logp, reference = (sum(x) for x in (answer.logratios, answer.logps, answer.reference_logps))
    sums = f"log π/π<sub>ref</sub> {signed(total)} = {signed(logp)} − ({signed(reference)})"
    sums += tr(", reward {reward}", reward=signed(measured.objective.beta * total))
    tokens = "".join(token_marks(answer, measured.tokenizer, shared, limit))
    label = tr("{side} answer; the arrow keys move from token to token", side=side)
    length = tr("{count} tokens", count=len(answer.tokens))
    return (
        f"<div><h4>{side}, {length}<small>{sums}</small></h4>"
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
        yield f"<b{css} data-l={logp:.2f},{reference:.2f}>{visible}</b>"
    if limit < len(answer.tokens):
        yield tr(" … {count} more tokens", count=len(answer.tokens) - limit)


def colour(logratio: float) -> list[str]:
    """The class of a token's colour: ``["more-2"]``; [] below the first step."""
    strength = sum(abs(logratio) >= step for step in STEPS)
    return [f"{'more' if logratio > 0 else 'less'}-{strength}"] if strength else []


# ---- Judged answers


def answer_section(figures: dict) -> str:
    """A table of the tasks, and the first sampled answers of both models side by side, lost cases first."""
    after, before = figures["right_answers"]
    cases = [
        (case, [Verdict(**case["replies"][name]["verdict"]) for name in (before, after)])
        for case in figures.get("answers", ())
    ]
    tasks = task_table(figures["tasks"]) if "tasks" in figures else ""
    if not cases:
        return tasks
    cases.sort(key=lambda case: case[1][1].points - case[1][0].points)
    columns = [
        ("before", tr("before"), tr("the points of {model}, 0 to 3", model=esc(before))),
        ("after", tr("after"), tr("the points of {model}, 0 to 3", model=esc(after))),
        ("change", tr("change"), tr("points after − points before")),
    ]
    text = tr(
        "The first sampled answers to {count} prompts. A well-formed answer gets 2 points if it is right, "
        "and 1 if it is courteous. The answer with more points wins.",
        count=len(cases),
    )
    rows = (judged_row(case, (before, after), verdicts) for case, verdicts in cases)
    head = f"{tasks}<h3>{tr('Answers side by side')}</h3><p class=pale>{text}</p>"
    return head + listing(columns, ("change", "rising"), rows)


def judged_row(case: dict, names: tuple[str, str], verdicts: list[Verdict]) -> str:
    """A row for a prompt and the replies to it, before and after."""
    sides = ""
    for when, name, verdict in zip((tr("before"), tr("after")), names, verdicts, strict=True):
        marks = (
            tr("right") if verdict.right else tr("not right"),
            tr("courteous") if verdict.manner else tr("not courteous"),
            tr("well formed") if verdict.well_formed else tr("not well formed"),
        )
        reply = case["replies"][name]
        words = f"{tr(', ').join(marks)}; {tr('{count} tokens', count=esc(reply['tokens']))}"
        sides += (
            f"<div><h4>{when}: {esc(name)}<small>{words}</small></h4>"
            f"<p class=answer>{esc(cut(reply['text'], REPLY))}</p></div>"
        )
    before, after = verdicts
    points = {"before": before.points, "after": after.points}
    values = {when: (number, f"{number}") for when, number in points.items()}
    change = after.points - before.points
    values["change"] = change, signed(change, 0)
    note = {1: tr("became right: "), -1: tr("became wrong: ")}.get(after.right - before.right, "")
    turns = [Message(**turn) for turn in case["prompt"]]
    box = prompt_box(turns, tr("Prompt, task {task}", task=esc(cut(case["task"], 100))))
    return row(change, note + turns[-1].content, values, f"{box}<div class=sides>{sides}</div>")


def task_table(tasks: dict[str, dict]) -> str:
    """A table that opens: the judge's figures by task, most answers that became wrong first."""
    rows = []
    for task, f in sorted(tasks.items(), key=lambda item: -item[1].get("only_second_right", 0)):
        after, before = f["right_answers"].values()
        counts = [esc(f[name]) for name in ("prompts", "wins", "ties", "losses")]
        changed = esc(f.get("only_second_right", "–"))
        rows.append([esc(cut(task, 100)), *counts, f"{before:.0%}", f"{after:.0%}", changed])
    heads = [tr("task"), tr("prompts"), tr("wins"), tr("ties"), tr("losses")]
    heads += [tr("right before"), tr("right after"), tr("became wrong")]
    summary = f"<summary>{tr('Figures of {count} tasks', count=len(tasks))}</summary>"
    return f"<details class=more>{summary}{table_of(heads, rows)}</details>"


# ---- Samples


def sample_section(samples: dict[str, dict[int, dict]]) -> tuple[str, str]:
    """For each prompt the answers that the run gave during training, by step."""
    parts = []
    for number, (prompt, rows) in enumerate(samples.items()):
        steps = sorted(rows)
        few = {steps[i] for i in np.linspace(0, len(steps) - 1, SHOWN_STEPS).round().astype(int)}
        items = ""
        for step in sorted(few):
            words = tr("{count} tokens", count=rows[step].get("tokens"))
            words += "" if rows[step].get("finished") else tr(", not finished")
            answer = esc(cut(str(rows[step].get("answer")), REPLY))
            head = tr("step {step}", step=step)
            items += f"<li><b>{head}</b><span>{answer} <small>{esc(words)}</small></span></li>"
        inside = f"<summary>{esc(cut(prompt, 300))}</summary><ol class=steps>{items}</ol>"
        parts.append(f"<details class=more{' open' * (number == 0)}>{inside}</details>")
    return tr("Greedy answers to held-out prompts, written at each evaluation."), "".join(parts)
