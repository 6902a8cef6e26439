"""Every number of one pair: eval/walkthrough.py."""

import math
import re

import pytest
import torch

from eval import explain, walkthrough
from eval.common import load_model
from eval.terminal import cells
from losses import sigmoid
from tests.conftest import RAGGED, as_record, plain_ids, plain_logits, save_folder, turns

BETA = 0.5


@pytest.fixture(scope="module")
def folders(tmp_path_factory, tokenizer) -> tuple[str, str]:
    """A policy and its reference; the policy's settings name the reference and beta."""
    parent = tmp_path_factory.mktemp("models")
    reference = str(save_folder(parent / "reference", tokenizer, seed=1))
    run = {"model": reference, "beta": BETA, "loss": "sigmoid"}
    return str(save_folder(parent / "policy", tokenizer, settings=run, seed=2)), reference


@pytest.fixture
def walk(folders, capsys):
    """Call eval.walkthrough; return its sections."""

    def call(*arguments: str) -> list[str]:
        walkthrough.main(["--model", folders[0], "--device", "cpu", *map(str, arguments)])
        return re.split(r"^\d\. .*\n", capsys.readouterr().out, flags=re.M)

    return call


def numbers(line: str) -> list[float]:
    return [float(x.replace("−", "-")) for x in re.findall(r"(?<=\s)[+−]?\d+(?:\.\d+)?(?=\s|$)", line)]


def rows(section: str) -> list[list[float]]:
    """The numbers after the token of each line that begins with an index."""
    lines = [line for line in section.splitlines() if re.match(r" +\d+  \"", line)]
    return [numbers(re.sub(r'^ +\d+  ".*["…]\s', " ", line)) for line in lines]


@pytest.mark.parametrize("row", [1, 3, 5])
def test_the_numbers_are_those_of_a_plain_loop(row, walk, folders, tokenizer, ragged):
    """A table that teaches must not be off by one, and its sums must be those of its columns."""
    _, _, _, _, logps, sums, loss, gradient = walk("--data", ragged, "--row", row)
    policy, reference = (load_model(folder).double() for folder in folders)
    prompt, *texts = RAGGED[row - 1]
    want, totals = [], []
    for text in texts:
        x, y = plain_ids(tokenizer, prompt, text)
        index = torch.tensor(y)[:, None]
        both = (plain_logits(m, x + y).log_softmax(-1)[len(x) - 1 : -1] for m in (policy, reference))
        columns = [table.gather(1, index)[:, 0].detach().requires_grad_() for table in both]
        want.append(columns)
        totals.append(columns[0].sum() - columns[1].sum())
    margin = totals[0] - totals[1]
    sigmoid(margin, BETA).backward()

    for got, (logp, reference_logp) in zip(
        rows(logps), ((p, r) for side in want for p, r in zip(*side, strict=True)), strict=True
    ):
        assert got[-3:] == pytest.approx([p := logp.item(), q := reference_logp.item(), p - q], abs=0.006)
    for side, (line, total) in enumerate(zip(sums.splitlines()[-3:-1], totals, strict=True)):
        policy_sum, reference_sum = (column.sum().item() for column in want[side])
        whole = [len(want[side][0]), policy_sum, reference_sum, total.item(), BETA * total.item()]
        assert numbers(line) == pytest.approx(whole, abs=0.006)
    assert f"{sigmoid(margin, BETA).item():.3f}" in loss or f"{sigmoid(margin, BETA).item():.4f}" in loss
    gradients = [(p, slope) for side in want for p, slope in zip(side[0], side[0].grad, strict=True)]
    for got, (logp, slope) in zip(rows(gradient), gradients, strict=True):
        chance = math.exp(logp.item())
        expected = [chance, slope.item(), slope.item(), slope.item() * (1 - chance)]
        assert got == pytest.approx(expected, abs=1.5e-4)


def test_the_stream_is_shown_token_by_token(walk, tokenizer, ragged):
    """Positions, segments and mask are what the page is about."""
    stream = walk("--data", ragged, "--row", 2)[3]
    prompt, *texts = RAGGED[1]
    (x, chosen), (_, rejected) = (plain_ids(tokenizer, prompt, text) for text in texts)
    shown = re.findall(r'^ *(\d+) +(\d+)  (\w+) +(\d+)  ".*" +([01])  (.*)$', stream, re.M)
    if len(x) > walkthrough.LONGEST_PROMPT:
        assert f"{len(x) - 2 * walkthrough.ENDS} more tokens of the prompt" in stream
    answers = [line for line in shown if line[2] != "prompt"]
    assert [int(line[3]) for line in answers] == chosen + rejected
    places = [*range(len(x), len(x) + len(chosen)), *range(len(x), len(x) + len(rejected))]
    assert [int(line[1]) for line in answers] == places
    assert {line[4] for line in answers} == {"1"}
    assert {line[4] for line in shown if line[2] == "prompt"} == {"0"}
    first = len(x) + len(chosen)
    assert answers[len(chosen)][5] == f"0–{len(x) - 1}, {first}"


@pytest.mark.parametrize("row", range(1, len(RAGGED) + 1))
def test_lines_fit_100_columns(row, walk, ragged):
    for section in walk("--data", ragged, "--row", row):
        assert all(cells(line) <= 100 for line in section.splitlines()), section


def test_a_long_prompt_is_cut_in_the_table_only(walk, write_jsonl):
    path = write_jsonl("long.jsonl", [as_record((turns("many words " * 40), "Yes.", "No."))])
    _, record, text, stream, *_ = walk("--data", path)
    assert record.count("many") == text.count("many") / 2 == 40
    assert "more tokens of the prompt" in stream and len(stream.splitlines()) < 40


def test_another_loss_has_its_own_gradient_and_no_formula_of_dpo(walk, ragged):
    """IPO's gradient is 2 (a − b − 1 / (2 β)), and −β σ(…) beside it would be wrong."""
    *_, loss, gradient = walk("--data", ragged, "--loss", "ipo")
    margin = float(re.search(r"= ([+−][\d.]+)\nreward", loss)[1].replace("−", "-"))
    slopes = [row[1] for row in rows(gradient)]
    assert abs(slopes[0]) == pytest.approx(abs(2 * (margin - 1 / (2 * BETA))), abs=0.03)
    assert slopes[-1] == -slopes[0] and "formula" not in gradient and "ipo" in loss


def test_a_wpo_run_has_its_weight_in_the_gradient(walk, folders, ragged, tokenizer, tmp_path):
    """WPO multiplies a pair's loss by a weight of at most 1, and its gradient by the same."""
    settings = {"model": folders[1], "beta": BETA, "loss": "sigmoid", "wpo": True}
    policy = str(save_folder(tmp_path / "run", tokenizer, settings=settings, seed=2))
    *_, plain_loss, plain = walk("--data", ragged)
    *_, loss, gradient = walk("--data", ragged, "--model", policy)
    weight = float(loss.split("= ")[-1]) / float(plain_loss.split("= ")[-1])
    assert 0.02 < weight < 1 and "formula" not in gradient
    for row, plain_row in zip(rows(gradient), rows(plain), strict=True):
        assert row[1] == pytest.approx(weight * plain_row[1], abs=2e-4)


def test_a_typed_pair(walk, folders, monkeypatch, capsys):
    record = explain.Preference(tuple(turns("Hi")), "Hello.", "No.", 1)
    monkeypatch.setattr(explain, "read_typed", lambda: record)
    _, record, text, *_ = walk("--text")
    assert '"chosen": "Hello."' in record and "«Hello.<|im_end|>»" in text
