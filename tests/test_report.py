"""The report of a run: one HTML page, and the curves as a PNG: eval/report.py, page.py and what they use."""

import base64
import hashlib
import html
import json
import math
import re
import shutil
import sys
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from dataset.records import Message
from errors import InputError
from eval import charts, curves, figures, judge, page, page_lists, pairs, preference, report
from eval.common import load_model
from eval.explain import Answer
from eval.verdict import Verdict
from tests.conftest import RAGGED, as_record, plain_ids, plain_logits, save_folder
from training.distributed import World
from training.options import ObjectiveSettings

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(1)>\"' onfocus=alert(1) \x1b[2J\u202e"
VOID = {"meta", "polyline", "path", "circle", "rect", "li", "br", "td", "th", "tr", "thead", "tbody"}


class Parsed(HTMLParser):
    """The elements of a page: (tag, attributes, text inside)."""

    def __init__(self, text: str):
        super().__init__()
        self.elements: list[SimpleNamespace] = []
        self.open: list[SimpleNamespace] = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        element = SimpleNamespace(tag=tag, attributes=dict(attributes), text="")
        self.elements.append(element)
        if tag not in VOID:
            self.open.append(element)

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop().tag == tag, f"</{tag}> closes another element"

    def handle_data(self, data):
        for element in self.open:
            element.text += data

    def all(self, tag: str, name: str = "") -> list[SimpleNamespace]:
        """The elements with this tag, and with this class if it is given."""
        found = (e for e in self.elements if e.tag == tag)
        return [e for e in found if not name or name in (e.attributes.get("class") or "").split()]


# ---- the page


@pytest.fixture(scope="module")
def folders(tmp_path_factory, tokenizer) -> tuple[str, str]:
    """A DPO run with beta 0.5, and the reference that its settings name."""
    parent = tmp_path_factory.mktemp("runs")
    reference = str(save_folder(parent / "reference", tokenizer, seed=1))
    run = {"model": reference, "beta": 0.5, "loss": "sigmoid", "batch_size": 4}
    policy = save_folder(parent / "policy", tokenizer, settings=run, seed=2)
    write_run(policy, dpo_rows())
    return str(policy), reference


@pytest.fixture
def written(tmp_path):
    """Call eval.report; return the text of the page."""

    def call(*arguments: str) -> str:
        out = tmp_path / "page.html"
        report.main([*map(str, arguments), "--out", str(out), "--device", "cpu"])
        return out.read_text(encoding="utf-8")

    return call


def token_values(parsed: Parsed) -> list[list[list[float]]]:
    """[log π, log π_ref] of each token of each answer of the page."""
    values: list[list[list[float]]] = []
    for element in parsed.elements:
        if "answer" in (element.attributes.get("class") or "").split():
            values.append([])
        elif element.tag == "b" and "data-l" in element.attributes:
            values[-1].append([float(x) for x in element.attributes["data-l"].split(",")])
    return values


def test_tokens_of_the_page_are_those_of_a_plain_loop(folders, written, tokenizer, write_jsonl):
    """Log-probs of the neighbouring token, the other side or the other model would look plausible too."""
    prompt, *texts = RAGGED[0]
    text = written(folders[0], "--data", write_jsonl("one.jsonl", [as_record(RAGGED[0])]))
    for answer, values in zip(texts, token_values(Parsed(text)), strict=True):
        x, y = plain_ids(tokenizer, prompt, answer)
        assert len(values) == len(y)  # No token of this pair shares a character with another one.
        for place, folder in enumerate(folders):
            table = plain_logits(load_model(folder).double(), x + y).log_softmax(-1)[len(x) - 1 : -1]
            oracle = table.gather(1, torch.tensor(y)[:, None])[:, 0].tolist()
            assert [pair[place] for pair in values] == pytest.approx(oracle, abs=0.0051)


def test_headline_figures_are_those_of_the_evaluation(folders, ragged):
    found = pairs.measure(folders[0], data=str(ragged), device="cpu")
    asked = preference.Settings(model=folders[0], data=str(ragged), device="cpu", precision="fp32")
    logged = preference.measure(asked, World(0, 1, torch.device("cpu")))
    assert found.accuracy.value == pytest.approx(logged["rewards/accuracies"])
    assert found.margin.value == pytest.approx(logged["logratios/margins"], abs=1e-3)
    assert found.logratio("rejected").value == pytest.approx(logged["logratios/rejected"], abs=1e-3)
    assert np.mean([pair.loss for pair in found.pairs]) == pytest.approx(logged["loss"], abs=1e-4)
    assert found.kl == pytest.approx(logged["kl_per_token"], rel=1e-4)
    assert found.accuracy.low < found.accuracy.value < found.accuracy.high


def test_a_pair_has_its_own_prompt(folders, write_jsonl, tokenizer):
    """Dropped records leave gaps, and pairs are spread over the file: rows are not lines."""
    rows = [{"prompt": f"Question {i}", "chosen": f"Yes {i}", "rejected": "No"} for i in range(9)]
    rows[2]["chosen"] = rows[2]["rejected"]  # dropped
    path = write_jsonl("gaps.jsonl", rows)
    found = pairs.measure(folders[0], pairs=4, data=str(path), device="cpu")
    assert found.held_out == 8 and [pair.line for pair in found.pairs] == [1, 4, 7, 9]
    for pair in found.pairs:
        number = pair.prompt[-1].content.removeprefix("Question ")
        assert tokenizer.decode(pair.chosen.tokens).startswith(f"Yes {number}")
        assert pair.line == int(number) + 1


def test_hostile_text_is_inert(written, folders, tmp_path, write_jsonl):
    """Text of the data, of names and of settings becomes text: not an element, not an attribute."""
    rows = [{"prompt": HOSTILE, "chosen": f"a {HOSTILE}", "rejected": f"b {HOSTILE}"}]
    evil = tmp_path / "x<img src=x onerror=alert(1)>"
    shutil.copytree(folders[0], evil)
    config = json.loads((evil / "config.json").read_text())
    config["settings"] |= {"data": HOSTILE, "batch_size": HOSTILE, "lr": HOSTILE}
    (evil / "config.json").write_text(json.dumps(config))
    path = write_jsonl("<script>1.jsonl", rows)
    for runs in ([evil], [evil, folders[0]]):
        text = written(*runs, "--data", path)
        parsed = Parsed(text)
        assert len(parsed.all("script")) == 1 and not parsed.all("img") and not parsed.open
        assert not [e for e in parsed.elements for name in e.attributes if name.startswith("on")]
        assert not {"src", "style"} & {name for e in parsed.elements for name in e.attributes}
        assert all(re.fullmatch(r"#s\d", link.attributes["href"]) for link in parsed.all("a"))
        assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]", text)
        shown = parsed.all("p", "prompt")[0].text
        assert "</script><script>alert(1)</script><img src=x onerror=alert(1)>" in shown


def test_the_page_needs_nothing_else(written, folders, ragged, monkeypatch):
    """The policy allows this script and this style only; without matplotlib there are curves as well."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    text = written(folders[0], "--data", ragged)
    parsed = Parsed(text)
    assert not re.search(r"https?:|url\(|@import|<link", text)
    policy = next(e for e in parsed.all("meta") if "http-equiv" in e.attributes).attributes["content"]
    for tag in ("script", "style"):
        (element,) = parsed.all(tag)
        sum_of_it = base64.b64encode(hashlib.sha256(element.text.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{sum_of_it}'" in policy
    assert "default-src 'none'" in policy and "unsafe" not in policy
    titles = [e.text for e in parsed.all("figcaption")]
    for title in ("Loss", "Reward accuracy", "Gradient norm", "Log-ratios", "Log-probability of answers",
                  "Rewards", "Margins before and after", "Log-ratio margins", "Log-ratio against length",
                  "Accuracy by length difference", "Accuracy by length"):  # fmt: skip
        assert any(found.startswith(title) for found in titles), title


def test_runs_are_compared(written, folders, tmp_path, ragged):
    """One row and one colour for each run. A run that has not finished has its curves only."""
    unfinished = write_run(tmp_path / "unfinished", dpo_rows())
    text = written(folders[0], unfinished, folders[0], "--data", ragged)  # two of one name: whole paths
    parsed = Parsed(text)
    spots = [parsed.all("i", colour)[0].attributes["class"] for colour in page.COLOURS[:3]]
    assert spots == ["swatch blue", "swatch orange", "swatch green"]
    assert len(parsed.all("details")) == len(RAGGED)  # of one run
    for colour in page.COLOURS[:3]:
        assert any(colour in e.attributes["class"].split() for e in parsed.all("polyline"))
    assert any(f"{unfinished}, without pairs: " in e.text for e in parsed.all("ul"))


def test_the_chinese_page_is_the_english_one_in_other_words(written, folders, tmp_path, ragged):
    """The same elements with the same numbers; a text that a page passes by `tr` would stay English."""
    shutil.copytree(folders[0], tmp_path / "dpo")
    (tmp_path / "judge.json").write_text(json.dumps(judged_figures("dpo", "sft")))
    for runs in ([tmp_path / "dpo"], [tmp_path / "dpo", folders[0]]):
        texts = [written(*runs, "--data", ragged, "--lang", name) for name in ("en", "zh")]
        english, chinese = pages = [*map(Parsed, texts)]
        assert [e.tag for e in chinese.elements] == [e.tag for e in english.elements]
        assert token_values(chinese) == token_values(english)
        shown = (html.unescape(re.sub("<[^>]*>", " ", text.partition("<body>")[2])) for text in texts)
        numbers = [sorted(re.findall(r"\d+(?:\.\d+)?", text)) for text in shown]
        assert numbers[0] == numbers[1]
        assert [page.all("html")[0].attributes["lang"] for page in pages] == ["en", "zh-CN"]
        for tag in ("h2", "h3", "button", "figcaption", "nav"):
            for element in chinese.all(tag):
                assert re.search("[\u4e00-\u9fff]", element.text), element.text
        assert "差" in chinese.all("script")[0].text


def test_sft_has_curves_only_and_is_not_compared_with_dpo(written, folders, tmp_path):
    sft = write_run(tmp_path / "sft", SFT_ROWS)
    shutil.copy(f"{folders[1]}/config.json", sft)
    parsed = Parsed(written(sft))
    assert len(parsed.all("svg")) == 3 and not parsed.all("details") and not parsed.all("div", "worries")
    with pytest.raises(InputError, match="different losses: compare SFT with SFT"):
        written(sft, folders[0])


def judged_figures(after: str, before: str, text: str = "Hello.") -> dict:
    """The figures of a judge about two models: of four answers one became wrong, and one right."""
    records = [{"prompt": (Message("user", text),), "judge": {"task": text}}] * 4
    verdicts = (True, True, True), (True, True, False), (True, False, False)
    marks = {mark: Verdict(*verdict) for mark, verdict in zip("320", verdicts, strict=True)}
    points = {after: "0332", before: "3022"}
    replies = {
        name: [[judge.Reply(f"{text} {mark}", 5, marks[mark])] * 3 for mark in row]
        for name, row in points.items()
    }
    return judge.compare(records, replies) | judge.details(records, replies)


def test_the_judge_of_a_run_is_quoted(written, folders, tmp_path, ragged):
    """Only if the judge compared this run: in its own folder, or with its name beside it."""
    shutil.copytree(folders[0], tmp_path / "dpo")
    (tmp_path / "judge.json").write_text(json.dumps(judged_figures("dpo", "sft")))
    text = written(tmp_path / "dpo", "--data", ragged)
    assert "4 wins, 2 ties, 2 losses" in text and "win rate of its answers, 95\u00a0%: 21% to 94%" in text
    (tmp_path / "dpo").rename(tmp_path / "other")
    assert "4 wins" not in written(tmp_path / "other", "--data", ragged)
    (tmp_path / "judge.json").rename(tmp_path / "other" / "judge.json")
    assert "4 wins" in written(tmp_path / "other", "--data", ragged)


def test_judged_answers_stand_side_by_side():
    """Before is left, after is right; a lost answer is first; the sign is that of after − before."""
    parsed = Parsed(page_lists.answer_section(judged_figures("dpo", "sft")))
    rows = [e.attributes for e in parsed.all("details") if "data-change" in e.attributes]
    assert [(e["data-before"], e["data-after"], e["data-change"]) for e in rows] == [
        ("3", "0", "-3"), ("2", "2", "0"), ("2", "3", "1"), ("0", "3", "3")
    ]  # fmt: skip
    assert [e.text for e in parsed.all("p", "answer")][:2] == ["Hello. 3", "Hello. 0"]
    notes = [e.text.partition(": ")[0] for e in parsed.all("span", "ask")]
    assert notes == ["became wrong", "Hello.", "Hello.", "became right"]
    assert parsed.all("table")[0].text.endswith("became wrong" + "Hello.4422" + "75%75%2")


def test_bars_have_the_heights_of_the_judges_figures():
    """Before and after swapped, or counts of prompts for counts of answers, look plausible."""
    charts = [Parsed(svg) for svg in figures.judge_charts(judged_figures("dpo", "sft"))]
    titles = [[e.text for e in chart.all("title")] for chart in charts]
    assert titles == [
        ["wins: 50.0%", "ties: 25.0%", "losses: 25.0%"],
        [f"{name}, {side}" for name, *sides in (
            ("right", "before: sft: 75.0%", "after: dpo: 75.0%"),
            ("right, greedy", "before: sft: 75.0%", "after: dpo: 75.0%"),
            ("courteous", "before: sft: 25.0%", "after: dpo: 50.0%"),
            ("well formed", "before: sft: 100.0%", "after: dpo: 100.0%"),
        ) for side in sides],
        ["became right: 25.0%", "became wrong: 25.0%"],
    ]  # fmt: skip
    heights = [float(e.attributes["height"]) for e in charts[0].all("rect")]
    assert heights[0] == pytest.approx(2 * heights[1], abs=0.11) and heights[1] == heights[2]


def test_samples_of_a_run_are_shown_by_step(written, folders, tmp_path, ragged):
    """Twelve of many steps, the first and the last among them; the last row of a step counts."""
    run = shutil.copytree(folders[0], tmp_path / "run")
    rows = [
        {"step": step, "prompt": "Hi?", "answer": f"Answer {step}.", "finished": step > 0, "tokens": step}
        for step in range(40)
    ]
    rows += [{**rows[-1], "answer": "Again."}]
    (run / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 41, "pro')
    (steps,) = Parsed(written(run, "--data", ragged)).all("ol")
    assert steps.text.startswith("step 0Answer 0. 0 tokens, not finishedstep 4Answer 4. 4 tokensstep")
    assert steps.text.endswith("step 39Again. 39 tokens") and steps.text.count("step") == 12


# ---- pairs without a model


def made_pair(chosen: list[float], rejected: list[float], prompt: str = "?") -> pairs.MeasuredPair:
    """A pair with these log-ratios, without equal tokens; every log π_ref is −1."""
    answers = [
        Answer([first + i % 50 for i in range(len(x))], [v - 1.0 for v in x], [-1.0] * len(x))
        for first, x in ((3, chosen), (70, rejected))
    ]
    return pairs.MeasuredPair(1, (Message("user", prompt),), *answers, 0.5)


def measured_of(made: list[pairs.MeasuredPair], tokenizer=None, **options) -> pairs.Measured:
    return pairs.Measured(
        "run", "reference", "x.jsonl", len(made), ObjectiveSettings(**options), tokenizer, 0.1, made
    )


def test_a_page_of_200_long_pairs_stays_small(tokenizer):
    """Answers of a thousand tokens are cut, and their sums are not."""
    made = [made_pair([0.5] * 1000, [-0.5] * 900, "What? " * 999) for _ in range(200)]
    measured = measured_of(made, tokenizer)
    text = "".join(page_lists.pair_section(measured))
    assert text.count("<details") == 200
    assert "cut after 95 tokens" in text and "+500.00 = −500.00 − (−1000.00)" in text
    few = measured_of([made_pair([0.5] * 20, [0.5] * 9)] * 200, tokenizer)
    assert "cut after" not in page_lists.pair_section(few)[0]
    long = judged_figures("dpo", "sft", "What? " * 999)
    answers = page_lists.answer_section(long | {"answers": long["answers"] * 50})
    assert len(text.encode()) + len(answers.encode()) < 2.8e6


@pytest.mark.parametrize("text, kept", [("a" * 50, 20), ("猫" * 50, 6), ("\ud800" * 50, 20), ("猫" * 6, 6)])
def test_texts_are_cut_between_characters(text, kept):
    """By bytes: a Chinese prompt takes three times the room of its characters."""
    rest = f" … {len(text) - kept} more characters" * (len(text) > kept)
    assert page_lists.cut(text, 20) == text[:kept].replace("\ud800", "?") + rest


def test_equal_tokens_at_the_start_are_marked(tokenizer):
    """猫 and 猪 share two of three bytes. A character is marked only if all of it is equal."""
    for texts, same in ((("one two", "one six"), "one "), (("a猫", "a猪"), "a"), (("x", "y"), "")):
        ids = [tokenizer.text(text) for text in texts]
        answers = [Answer(x, [-1.0] * len(x), [-1.0] * len(x)) for x in ids]
        pair = pairs.MeasuredPair(1, (Message("user", "?"),), *answers, 0.5)
        for answer in answers:
            parsed = Parsed("".join(page_lists.token_marks(answer, tokenizer, pair.shared, 100)))
            assert "".join(e.text for e in parsed.all("b", "shared")) in (same, same.rstrip())


def test_colours_follow_size_and_sign():
    found = [page_lists.colour(value) for value in (-5, -1.5, -0.5, -0.2, 0.05, 0.2, 0.5, 1.5, 5)]
    assert found[0] == ["less-4"] and found[4] == [] and found[-1] == ["more-4"]
    assert len({*map(tuple, found)}) == 9
    style = Path(page.__file__).with_name("page.css").read_text()
    assert all(f".{name[0]} " in style for name in found if name)


def noisy(n: int, chosen: float, rejected: float) -> list[pairs.MeasuredPair]:
    noise = np.random.default_rng(0).normal(size=(n, 2))
    lengths = np.random.default_rng(1).integers(3, 9, (n, 2))
    return [
        made_pair([chosen + a] + [0.0] * int(i), [rejected + b] + [0.0] * int(j))
        for (a, b), (i, j) in zip(noise, lengths, strict=True)
    ]


GOOD = {"eval_loss": {0: 0.693, 9: 0.4}, "loss": {9: 0.4}, "rewards/accuracies": {9: 0.9},
        "eval_rewards/accuracies": {9: 0.88}}  # fmt: skip


@pytest.mark.parametrize("made, changed, expected", [
    (noisy(60, 1, -3), {}, None),
    (noisy(60, 0, 0), {}, "contains 50 %"),
    (noisy(60, -4, -9), {}, "less likely too: their mean log-ratio is −4."),
    ([made_pair([1.0 + i], [0.0] * (20 - i)) for i in range(20)], {}, r"length difference (r = +1.00)"),
    (noisy(60, 1, -3), {"eval_loss": {0: 0.69, 5: 0.4, 9: 0.5}}, "at step 5 (0.400) and rose to 0.500"),
    (noisy(60, 1, -3), {"eval_loss": {0: 0.693, 9: 0.69}}, "0.690, is still close to ln 2"),
    (noisy(60, 1, -3), {"rewards/accuracies": {9: 1}, "eval_rewards/accuracies": {9: 0.7}}, "100% on train"),
    (noisy(60, 1, -3), {"grad_norm": {4: math.nan}}, "step 4 is not finite"),
])  # fmt: skip
def test_each_worry_has_its_reason(made, changed, expected):
    found = pairs.worries(measured_of(made), GOOD | changed, {})
    assert len(found) == (expected is not None), found
    assert expected is None or expected in found[0]


JUDGED = {"prompts": 400, "win_rate_ci95": [0.7, 0.8], "right_answers": {"dpo": 0.8, "sft": 0.82},
          "well_formed": {"dpo": 0.97, "sft": 0.98}, "mean_tokens": {"dpo": 20, "sft": 18}}  # fmt: skip


@pytest.mark.parametrize("changed, expected", [
    ({}, None),
    ({"win_rate_ci95": None}, None),
    ({"win_rate_ci95": [0.45, 0.55]}, "do not show a win: 45% to 55%"),
    ({"right_answers": {"dpo": 0.7, "sft": 0.82}}, "Fewer answers are right: 70%, before 82%"),
    ({"well_formed": {"dpo": 0.9, "sft": 0.98}}, "Fewer answers are well-formed: 90%, before 98%"),
    ({"mean_tokens": {"dpo": 30, "sft": 18}}, "Answers became longer: 30 tokens, before 18"),
])  # fmt: skip
def test_each_worry_about_answers_has_its_reason(changed, expected):
    found = pairs.worries(None, {}, JUDGED | changed)
    assert len(found) == (expected is not None), found
    assert expected is None or expected in found[0]


def test_groups_hold_every_pair_once_and_equal_keys_together():
    made = [made_pair([1.0] * n, [0.0]) for n in (1, 1, 1, 1, 1, 1, 1, 2, 3, 9)]
    edges = figures.borders([pair.longer for pair in made])
    groups = [group for group in figures.buckets(made, lambda pair: pair.longer, edges) if group]
    keys = [{pair.longer for pair in group} for group in groups]
    assert sum(map(len, groups)) == len(made) and len(set().union(*keys)) == sum(map(len, keys))
    assert [min(key) for key in keys] == sorted(min(key) for key in keys)


@pytest.mark.parametrize(
    "low, high", [(0, 1), (-8.3, 0.4), (0, 188), (1e-9, 2e-4), (-3, 1e6), (0.68, 0.6932)]
)
def test_ticks_are_few_round_and_within(low, high):
    found = charts.ticks(low, high)
    assert 2 <= len(found) <= 6 and all(low - 1e-9 * high <= x <= high * (1 + 1e-9) for x in found)
    assert all(float(f"{x:.3g}") == pytest.approx(x) for x in found)


def test_ends_of_lines_do_not_overlap():
    """Two log-probs often end at the same height, also at the border of the chart."""
    for heights in ([0.5, 0.5, 0.51], [0.0, 0.0, 0.0], [1.0, 1.0, 1.0]):
        plot = charts.Plot((0, 1), (0, 1))
        for height in heights:
            plot.line([(0, 0.5), (1, height)], "blue", "label\n0.5")
        ends = [e for e in Parsed(plot.svg("")).all("text") if "end" in (e.attributes.get("class") or "")]
        places = sorted(float(e.attributes["y"]) for e in ends)
        assert len(places) == 6 and min(np.diff(places)) >= charts.LINE - 0.11
        assert places[0] > 0 and places[-1] < charts.HEIGHT


def test_a_line_skips_what_is_not_finite_and_keeps_its_last_point():
    plot = charts.Plot((0, 5000), (0, 1))
    plot.line([(i, 0.5 if i % 2 else math.nan) for i in range(5000)] + [(5000, 1.0)], "blue", "1")
    (line,) = Parsed(plot.svg("")).all("polyline")
    places = line.attributes["points"].split()
    assert len(places) <= charts.MOST + 1 and "nan" not in line.attributes["points"]
    assert places[-1] == f"{charts.WIDTH - charts.RIGHT:.1f},{charts.TOP:.1f}"


# ---- the picture


def dpo_rows(steps: int = 6) -> list[dict]:
    names = ("loss", "rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins",
             "logps/chosen", "logps/rejected", "logratios/chosen", "logratios/rejected",
             "logratios/margins")  # fmt: skip
    rows = [{"step": 0} | {f"eval_{name}": 0.5 for name in names}]
    for step in range(1, steps):
        figures = {name: math.sin(step + i) for i, name in enumerate(names)}
        rows += [
            {"step": step} | figures | {"grad_norm": 1.0},
            {"step": step} | {f"eval_{n}": 0.1 for n in names},
        ]
    return rows


def write_run(folder, rows: list[dict], torn: str = ""):
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    folder.mkdir(exist_ok=True)
    (folder / "metrics.jsonl").write_text(lines + torn, encoding="utf-8")
    return folder


SFT_ROWS = [{"step": s, "loss": 5 / s, "grad_norm": 1.0, "learning_rate": 1e-3} for s in (1, 2, 3)]


@pytest.mark.parametrize(
    "rows",
    [dpo_rows(), dpo_rows(1), SFT_ROWS, [{"step": 1, "loss": float("nan")}]],
    ids=["dpo", "one evaluation", "sft", "nan"],
)
def test_a_run_becomes_a_picture(rows, tmp_path, capsys):
    """Also if the run was killed: its last line is incomplete."""
    image = pytest.importorskip("matplotlib.image")
    run = write_run(tmp_path / "run $1_2$", rows, torn='{"step": 9, "loss": 0.')
    report.main([str(run), "--png"])
    assert capsys.readouterr().out.strip() == str(run / "report.png")
    pixels = image.imread(run / "report.png")
    assert pixels.shape[1] == 1800 and pixels.var() > 1e-3


def titles_of(names: list[str], monkeypatch, tmp_path) -> list[str]:
    """The titles of the panels that are drawn for a run with these metrics."""
    titles = []
    draw_panel = report.draw_panel

    def spy(axes, panel, *rest):
        titles.append(panel.title)
        draw_panel(axes, panel, *rest)

    monkeypatch.setattr(report, "draw_panel", spy)
    report.draw({name: {1: 0.5, 2: 0.6} for name in names}, "run", tmp_path / "out.png")
    return titles


def test_log_ratios_are_drawn_beside_rewards(monkeypatch, tmp_path):
    """Rewards grow with beta while the policy hardly differs. Log-ratios compare runs of different beta."""
    pytest.importorskip("matplotlib")
    rewards = ["loss", "rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins"]
    logratios = ["logratios/chosen", "logratios/rejected", "logratios/margins"]
    dpo = titles_of([*rewards, *logratios, "eval_kl_per_token"], monkeypatch, tmp_path)
    assert dpo == [
        "Loss", "Reward accuracy", "Log-ratio margin", "Log-ratios", "Reward margin", "Rewards",
        "KL(π ‖ π_ref)",
    ]  # fmt: skip
    reward_model = titles_of(rewards, monkeypatch, tmp_path)
    assert reward_model == ["Loss", "Reward accuracy", "Reward margin", "Rewards"]


def test_a_step_that_was_repeated_after_a_resume_counts_once(tmp_path):
    rows = [{"step": step, "loss": loss} for step, loss in ((1, 1.0), (2, 9.0), (2, 2.0), (3, 3.0))]
    found = curves.read_curves(write_run(tmp_path / "run", rows) / "metrics.jsonl")
    assert found == {"loss": {1: 1.0, 2: 2.0, 3: 3.0}}


@pytest.mark.parametrize(
    "text, reason",
    [('{"step": 1}\ntorn\n{"step": 2}\n', ":2: not a row with a step"), ("", "no row"), ("torn", "no row")],
)
def test_damaged_metrics_are_named(text, reason, tmp_path):
    (tmp_path / "metrics.jsonl").write_text(text)
    with pytest.raises(InputError, match=reason):
        report.main([str(tmp_path), "--png"])


def test_a_picture_without_matplotlib_names_the_library(tmp_path, monkeypatch):
    """The project is not on PyPI: `pip install "minidpo[plots]"` would fail or install another package."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(InputError, match=r"pictures need matplotlib: pip install matplotlib$"):
        report.main([str(write_run(tmp_path / "run", dpo_rows())), "--png"])


def test_labels_of_curves_do_not_overlap(tmp_path):
    """The two log-probs often end at the same height."""
    figure = pytest.importorskip("matplotlib.figure").Figure()
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1])
    report.name_ends(axes, [(0.5, "chosen", "k"), (0.5, "rejected", "k"), (0.51, "third", "k")])
    low, middle, high = sorted(text.get_position()[1] for text in axes.texts)
    assert middle - low > 0.1 and high - middle > 0.1
