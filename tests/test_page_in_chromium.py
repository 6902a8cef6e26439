"""The report's page in headless Chromium: its boxes, its colours, its keys, and hostile text."""

import dataclasses
import re

import pytest

from dataset.records import Message
from eval import page
from eval.curves import read_curves
from eval.explain import Answer, signed
from eval.pairs import MeasuredPair
from eval.words import language
from tests.browser import Browser, chromium
from tests.test_report import HOSTILE, dpo_rows, judged_figures, measured_of, noisy, write_run

pytestmark = pytest.mark.slow

# Elements that are wider than their box; marks and labels outside of their figure; labels on one another.
OUTSIDE = """(() => {
  const found = [], name = (e) => `<${e.tagName} ${e.getAttribute("class")}> ${e.textContent.slice(0, 60)}`;
  const box = (e) => e.getBoundingClientRect();
  const within = (r, f) => r.left >= f.left - 1 && r.right <= f.right + 1
    && r.top >= f.top - 1 && r.bottom <= f.bottom + 1;
  const meet = (r, s) => r.left < s.right - 1 && s.left < r.right - 1
    && r.top < s.bottom - 4 && s.top < r.bottom - 4;
  if (document.documentElement.scrollWidth > innerWidth) found.push("the page");
  for (const e of document.body.querySelectorAll("*")) {
    const style = getComputedStyle(e), svg = e.closest("svg");
    if (svg && e !== svg && !e.closest("title")) {
      if (!within(box(e), box(e.closest("figure")))) found.push(name(e));
    } else if (style.display !== "inline" && style.overflowX === "visible"
      && e.scrollWidth > e.clientWidth + 1) found.push(name(e));
  }
  for (const svg of document.querySelectorAll("svg")) {
    const texts = [...svg.querySelectorAll("text")].map((e) => [e, box(e)]);
    for (const [a, r] of texts) for (const [b, s] of texts)
      if (a !== b && meet(r, s))
        found.push(`${svg.getAttribute("aria-label").slice(0, 30)}: ${a.textContent} on ${b.textContent}`);
  }
  return found;
})()"""

# The texts whose contrast with the colour behind them is below 4.5 (WCAG 2.2, 1.4.3).
FAINT = """(() => {
  const numbers = (colour) => colour.match(/[\\d.]+/g).map(Number);
  const light = (colour) => numbers(colour).slice(0, 3).map((c) => c / 255)
    .map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4))
    .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = (e) => {
    for (; e; e = e.parentElement) {
      const colour = getComputedStyle(e).backgroundColor, [, , , alpha = 1] = numbers(colour);
      if (alpha) return colour;
    }
    return "rgb(255, 255, 255)";
  };
  const found = [], texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  let count = 0;
  while (texts.nextNode()) {
    const e = texts.currentNode.parentElement, style = getComputedStyle(e);
    const unseen = !e.getClientRects().length || e.closest("script, style, title");
    if (unseen || !texts.currentNode.textContent.trim()) continue;
    const two = [light(e.closest("svg") ? style.fill : style.color), light(behind(e))].sort((a, b) => b - a);
    const contrast = (two[0] + 0.05) / (two[1] + 0.05);
    count += 1;
    if (contrast < 4.5) found.push(`${contrast.toFixed(1)}: ${e.className} ${e.textContent.slice(0, 40)}`);
  }
  return [count, found];
})()"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if not chromium():
        pytest.skip("needs Chromium (Debian: apt-get install chromium)")
    with Browser(tmp_path_factory.mktemp("chromium")) as browser:
        yield browser


@pytest.fixture(scope="module")
def shown(tmp_path_factory, tokenizer) -> page.Shown:
    """A run with everything that a page can show; its texts are hostile."""
    made = noisy(40, 1, -3)
    for i, logratio in enumerate((-4.0, -1.5, -0.5, -0.2, 0.2, 0.5, 1.5, 4.0)):  # every colour of a token
        ids = tokenizer.text(f"{i} {HOSTILE}")
        answers = [Answer(ids, [r - 1.0] * len(ids), [-1.0] * len(ids)) for r in (logratio, -logratio)]
        made.append(MeasuredPair(i, (Message("user", HOSTILE),), *answers, 0.5))
    curves = read_curves(write_run(tmp_path_factory.mktemp("run"), dpo_rows()) / "metrics.jsonl")
    samples = {HOSTILE: {step: {"answer": HOSTILE, "tokens": 9, "finished": step > 3} for step in range(30)}}
    judged = judged_figures(HOSTILE, "sft", HOSTILE)
    return page.Shown(HOSTILE, HOSTILE, "blue", curves, measured_of(made, tokenizer), "", judged, samples)


@pytest.fixture(scope="module", params=["one run", "three runs", "one run in Chinese"])
def written(request, shown, tmp_path_factory):
    """The file of a page."""
    others = [dataclasses.replace(shown, name=f"run-{colour}", colour=colour) for colour in page.COLOURS[1:3]]
    path = tmp_path_factory.mktemp("page") / "page.html"
    with language("zh" if "Chinese" in request.param else "en"):
        text = page.page([shown, *others] if request.param == "three runs" else [shown])
    path.write_text(text, "utf-8")
    return path


@pytest.mark.parametrize("width", [360, 1400])
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_everything_is_in_its_box_and_readable(browser, written, width, dark):
    browser.open(written, width, dark=dark)
    assert browser.run("getComputedStyle(document.body).backgroundColor") == (
        "rgb(20, 23, 27)" if dark else "rgb(255, 255, 255)"
    )
    for opened in ("", "document.querySelectorAll('details').forEach((e) => { e.open = true; })"):
        browser.run(opened)
        assert browser.run(OUTSIDE) == []
    count, faint = browser.run(FAINT)
    assert count > 1000 and faint == []


def test_hostile_text_runs_nothing(browser, written):
    """No error, no dialog, no request, no element of the data's making."""
    browser.errors.clear(), browser.requests.clear()
    browser.open(written, 1400)
    assert browser.errors == [] and {*browser.requests} == {written.as_uri()}
    assert browser.run("[document.images.length, document.scripts.length]") == [0, 1]
    assert "onerror=alert(1)" in browser.run("document.body.innerText")


def test_a_pointer_shows_the_numbers_of_a_token(browser, written):
    browser.open(written, 1400)
    token = "document.querySelector('details[open] b[data-l]')"
    browser.run(f"{token}.scrollIntoView({{block: 'center'}})")
    browser.run("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")
    x, y, values = browser.run(
        f"(({{left, top, width, height}}, values) => [left + width / 2, top + height / 2, values])"
        f"({token}.getBoundingClientRect(), {token}.dataset.l)"
    )
    browser.point(x, y)
    logp, reference = map(float, values.split(","))
    readout = browser.run("document.querySelector('#readout').innerText")
    word = {"en": "difference", "zh": "差"}[browser.run("document.documentElement.lang.slice(0, 2)")]
    shown = f"log π {signed(logp)}   log π_ref {signed(reference)}\n{word} {signed(logp - reference)}"
    assert readout.endswith(shown.replace("π +", "π ").replace("ref +", "ref "))
    browser.point(1, 1)
    assert browser.run("document.querySelector('#readout').hidden")


def test_every_control_works_with_the_keyboard(browser, written):
    """Tab reaches links, heads, rows and answers. Enter sorts and opens. Arrows walk over the tokens."""
    browser.open(written, 1400)
    active, seen = "document.activeElement", []
    for _ in range(200):
        browser.press("Tab")
        seen.append(browser.run(f"[{active}.tagName, {active}.className, {active}.dataset.sort || '']"))
        if seen[-1][1] == "answer" and browser.run(f"!!{active}.querySelector('b')"):
            break
    tags = {tag for tag, *_ in seen}
    assert {"A", "SUMMARY", "BUTTON", "P"} <= tags
    assert {"margin", "change", "length"} <= {key for *_, key in seen}
    for _ in range(3):
        browser.press("ArrowRight")
    walked = f"[...{active}.parentElement.querySelectorAll('b')].indexOf({active})"
    assert browser.run(walked) == 2 and not browser.run("document.querySelector('#readout').hidden")
    browser.press("ArrowLeft")
    assert browser.run(walked) == 1
    browser.press("Escape")
    assert browser.run("document.querySelector('#readout').hidden")


@pytest.mark.parametrize("mine, key, largest_first", [
    (0, "before", True), (0, "change", True), (1, "margin", True), (1, "length", True), (1, "change", False)
])  # fmt: skip
def test_heads_sort_their_own_list(browser, written, mine, key, largest_first):
    """Enter puts the largest on top, then the smallest, then the largest; the other list stays as it is.

    The answers begin with the smallest change, the pairs with the largest one.
    """
    browser.open(written, 1400)
    lists = "[...document.querySelectorAll('.list')]"
    orders = f"{lists}.map((list) => [...list.children].map((e) => e.outerHTML))"
    before = browser.run(orders)
    browser.run(f"{lists}[{mine}].previousElementSibling.querySelector('[data-sort={key}]').focus()")
    for falling in (largest_first, not largest_first):
        browser.press("Enter")
        after = browser.run(orders)
        numbers = [float(re.search(f'data-{key}="([^"]*)"', row)[1]) for row in after[mine]]
        assert numbers == sorted(numbers, reverse=falling) and len({*numbers}) > 1
        assert sorted(after[mine]) == sorted(before[mine]) and after[1 - mine] == before[1 - mine]
