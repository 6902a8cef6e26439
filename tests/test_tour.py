"""docs/TOUR.md and its translation against the program: what they quote is what eval.walkthrough prints."""

import json
import math
import re

import pytest

from dataset.packing import Windows
from dataset.tokenizer import ChatTokenizer
from docs import textbook
from eval import walkthrough
from eval.explain import signed
from tests.conftest import ROOT, save_folder
from training.settings import SAMPLE

PAGES = ["docs/TOUR.md", "docs/TOUR.zh.md"]
ROW = "203"


def quotes(page: str) -> list[str]:
    """The code blocks of a page that are not commands."""
    blocks = re.findall(r"^```\n(.*?)^```$", (ROOT / page).read_text("utf-8"), re.M | re.S)
    return [block for block in blocks if not block.startswith(("python ", "make "))]


def numbers(text: str) -> list[float]:
    return [float(x.replace("−", "-")) for x in re.findall(r"[+−]?\d+(?:\.\d+)?", text)]


@pytest.fixture(scope="module")
def printed(tmp_path_factory) -> list[str]:
    """The lines of the page's command, with an untrained model in place of the demo's."""
    parent, tokenizer = tmp_path_factory.mktemp("tour"), ChatTokenizer(SAMPLE / "tokenizer.json")
    folders = [str(save_folder(parent / str(seed), tokenizer, seed=seed)) for seed in (1, 2)]
    lines: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(walkthrough, "terminal_width", lambda: 100)  # as the page
        patch.setattr(walkthrough, "print", lambda text: lines.extend(text.splitlines()), raising=False)
        data = "--data", str(SAMPLE / "heldout.jsonl"), "--row", ROW, "--device", "cpu"
        walkthrough.main(["--model", folders[0], "--reference", folders[1], *data])
    return lines


def without_floats(line: str) -> str:
    """A line without the numbers that depend on weights, and without the width of its columns."""
    return " ".join(re.sub(r"[+−]?\d+\.\d+", "#", line).split())


def test_the_page_quotes_the_program(printed):
    """Text, ids, mask, positions, segments and layout of the page; its floats are of the demo's models."""
    lines, place = [without_floats(line) for line in printed], 0
    for block in quotes(PAGES[0]):
        for line in block.splitlines():
            if line != "…":
                wanted = without_floats(line)
                assert wanted in lines[place:], f"eval.walkthrough --row {ROW} does not print: {line}"
                place = lines.index(wanted, place)
    assert len(quotes(PAGES[0])) == 7


def test_both_languages_quote_the_same_numbers():
    assert quotes(PAGES[0]) == quotes(PAGES[1])


def test_the_numbers_of_the_page_belong_together():
    """One figure of an older run beside new ones, and the page adds up to nothing."""
    *_, logps, sums, loss, gradient = quotes(PAGES[0])
    beta, beta_margin = numbers(re.search(r"= ([\d.]+) ·.*= (.*)$", loss, re.M)[0])[0::2]
    totals, probabilities = [], {}
    for side, line in zip(logps.split("\nrejected"), sums.splitlines()[1:], strict=True):
        rows = [numbers(row.rpartition('"')[2]) for row in side.splitlines() if re.match(r" +\d", row)]
        indices = [int(row.split()[0]) for row in side.splitlines() if re.match(r" +\d", row)]
        count, policy, reference, ratio, reward = numbers(line)
        assert count == len(rows)
        for index, (_, logp, reference_logp, logratio) in zip(indices, rows, strict=True):
            assert logratio == pytest.approx(logp - reference_logp, abs=0.016)
            probabilities[index] = math.exp(logp)
        columns = [sum(column) for column in zip(*rows, strict=True)][1:]
        assert [policy, reference, ratio] == pytest.approx(columns, abs=0.05)
        assert reward == pytest.approx(beta * ratio, abs=0.001)
        totals.append(ratio)
    for readme in ("README.md", "README.zh.md"):  # The README tells of the same pair and the same models.
        text = (ROOT / readme).read_text("utf-8")
        assert all(signed(total) in text for total in totals), f"{readme} has other log-ratios: {totals}"
    margin = totals[0] - totals[1]
    assert beta_margin == pytest.approx(beta * margin, abs=0.0015)
    assert numbers(loss)[-1] == pytest.approx(math.log1p(math.exp(-beta_margin)), abs=0.0005)
    pull = beta / (1 + math.exp(beta_margin))
    rows = [row for row in gradient.splitlines() if re.match(r" +\d", row)]
    assert len(rows) > 5
    for row in rows:
        index, sign = int(row.split()[0]), -1 if int(row.split()[0]) < 33 else 1
        chance, slope, formula, by_logit = numbers(row.rpartition('"')[2])
        assert chance == pytest.approx(probabilities[index], abs=0.006)
        assert slope == formula == pytest.approx(sign * pull, abs=1e-4)
        assert by_logit == pytest.approx(sign * pull * (1 - chance), abs=1e-4)


def test_the_counts_of_the_pages_are_those_of_the_bundled_data():
    """What the stream buys, and how many answers begin with "Of course!"."""
    path = SAMPLE / "preferences.jsonl"
    pairs = textbook.read_pairs(str(path), ChatTokenizer(SAMPLE / "tokenizer.json"))
    windows = Windows(len(pairs), 16, seed=0)
    masks = [textbook.collate([pairs[row] for row in windows[step]])[1] for step in range(windows.per_epoch)]
    tokens = sum(len(ids) for pair in pairs for ids in pair)
    counts = [sum(mask.numel() for mask in masks), tokens, sum(mask.sum().item() for mask in masks)]
    records = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    for side in ("chosen", "rejected"):
        counts.append(sum(record[side].startswith("Of course!") for record in records))
    for page in PAGES:
        for count in counts:
            assert re.search(rf"(?<![\d,]){count:,} ", (ROOT / page).read_text("utf-8")), f"{page}: {count:,}"
