"""Measuring, judging, talking, drawing: what `eval/` says of models must be true of them."""

import io
import json
import math
import os
import re
import subprocess
import sys
from contextlib import redirect_stdout
from dataclasses import fields

import pytest
import torch

from dataset.records import DataError, Message
from dataset.store import open_store
from dataset.tokenizer import START, ChatTokenizer, train
from errors import InputError, run_script
from eval import chat, demo, judge, preference, report
from eval.common import load_speaker
from eval.judge import Reply, compare, win_interval
from eval.verdict import Verdict
from model import transformer
from model.weights import save_model
from tests.conftest import RAGGED, TEXTS, as_record, make_model, plain_ids, plain_logits
from tests.loops import ROOT, torchrun
from training.distributed import World
from training.evaluate import evaluate, evaluate_kl
from training.objective import Objective, ObjectiveSettings
from training.precision import Precision

CPU = torch.device("cpu")
ALONE = World(0, 1, CPU)
FP32 = Precision("fp32", CPU)
DPO = Objective(ObjectiveSettings(beta=0.1))
JUDGE = {"task": "sum", "language": "en", "check": "number", "accept": ["3"], "given": ["1", "2"]}


def save(folder, tokenizer, **options):
    """A model folder; returns its name and the model."""
    model = make_model(tokenizer.vocab_size, torch.float32, **options)
    save_model(folder, model)
    tokenizer.save(folder)
    return str(folder), model


@pytest.fixture(scope="module")
def folders(tmp_path_factory, tokenizer) -> tuple[str, str]:
    """Two model folders that agree in all but their weights."""
    return tuple(save(tmp_path_factory.mktemp("model"), tokenizer, seed=seed)[0] for seed in (1, 2))


@pytest.fixture
def pairs(write_jsonl, tokenizer):
    """A store of the first n ragged pairs, which begin anew after the last with another last answer."""

    def first(n: int):
        rows = [as_record(RAGGED[i % len(RAGGED)]) for i in range(n)]
        for i, row in enumerate(rows):
            row["rejected"] += " 7" * (i // len(RAGGED))
        return open_store(write_jsonl("pairs.jsonl", rows), "preferences", tokenizer, max_length=200)

    return first


@pytest.fixture
def judged(write_jsonl):
    """A file of three pairs that say how to judge an answer."""
    return write_jsonl("judged.jsonl", [{**as_record(pair), "judge": JUDGE} for pair in RAGGED[:3]])


# ---- preference accuracy and its company


def on_ranks(ranks: int, measure) -> tuple[dict[str, float], float]:
    """What `measure(world)` would return on so many ranks: each runs alone, and their sums are added here."""
    sums = []

    class Rank(World):
        def sum(self, values):
            sums.append(values)
            return torch.ones_like(values)  # Its own mean is nothing that counts.

    names = [list(measure(Rank(rank, ranks, CPU))) for rank in range(ranks)]
    assert all(name == names[0] for name in names)
    *totals, weight = torch.stack(sums).sum(0).tolist()
    return {name: total / weight for name, total in zip(names[0], totals, strict=True)}, weight


@pytest.mark.parametrize("n", [1, 5, 7, 10])
def test_each_pair_counts_once_on_any_number_of_ranks(pairs, tokenizer, n):
    """A sampler that pads to equal shares counts some pairs twice, and a mean of means weighs a short batch
    too much; a rank without any pair must still take part in the sum."""
    store = pairs(n)
    policy, reference = (make_model(tokenizer.vocab_size, torch.float32, seed=s) for s in (1, 2))
    for measure in (evaluate, evaluate_kl):
        options = {"objective": DPO} if measure is evaluate else {}

        def call(world, size=n, measure=measure, options=options):
            return measure(policy, reference, store, world, FP32, **options, batch_size=size)

        wanted = call(ALONE)
        items = n if options else sum(store.targets.tolist())
        for ranks in (1, 2, 3):
            found, weight = on_ranks(ranks, call)
            assert weight == items
            assert found == pytest.approx(wanted, rel=1e-5)
        for size in (1, 2, 3):
            assert call(ALONE, size) == pytest.approx(wanted, rel=1e-5)


def test_a_policy_that_is_its_reference_has_loss_ln_2_and_accuracy_a_half(pairs, tokenizer):
    """Counting ties as right or wrong would give 1 or 0."""
    model = make_model(tokenizer.vocab_size, torch.float32)
    figures = evaluate(model, model, pairs(7), ALONE, FP32, DPO)
    assert figures["loss"] == pytest.approx(math.log(2), abs=1e-7)
    assert figures["rewards/accuracies"] == 0.5
    assert figures["rewards/margins"] == figures["rewards/chosen"] == figures["rewards/rejected"] == 0
    assert evaluate_kl(model, model, pairs(7), ALONE, FP32) == {"kl_per_token": 0}


@pytest.mark.parametrize("layout", ["forked", "twin"])
def test_kl_is_that_of_a_plain_loop(pairs, tokenizer, layout):
    """KL(reference || policy), a sampled estimate, or a mean over prompt tokens would all look plausible."""
    policy, reference = (make_model(tokenizer.vocab_size, seed=seed) for seed in (1, 2))
    total = count = 0
    for prompt, *sides in RAGGED:
        for side in sides:
            x, y = plain_ids(tokenizer, prompt, side)
            p, q = (plain_logits(model, x + y).log_softmax(-1) for model in (policy, reference))
            for t in range(len(y)):
                at = len(x) + t - 1
                total += sum(
                    math.exp(a) * (a - b) for a, b in zip(p[at].tolist(), q[at].tolist(), strict=True)
                )
                count += 1
    found = evaluate_kl(policy, reference, pairs(7), ALONE, FP32, layout, batch_size=3)
    assert found["kl_per_token"] == pytest.approx(total / count, rel=1e-6)
    assert total / count > 0.1


def test_kl_does_not_depend_on_how_the_vocabulary_is_met(pairs, tokenizer, monkeypatch):
    policy, reference = (make_model(tokenizer.vocab_size, seed=seed) for seed in (1, 2))
    whole = evaluate_kl(policy, reference, pairs(7), ALONE, FP32)
    monkeypatch.setattr(transformer, "MAX_LOGITS", 5 * tokenizer.vocab_size)
    assert evaluate_kl(policy, reference, pairs(7), ALONE, FP32) == pytest.approx(whole, rel=1e-6)


def test_the_command_line_on_two_ranks_says_what_one_rank_says(folders, ragged, tmp_path, capsys):
    command = ["--model", folders[0], "--reference", folders[1], "--data", str(ragged), "--device", "cpu"]
    preference.main([*command, "--json", str(tmp_path / "new" / "one.json")])
    assert "rewards/accuracies" in capsys.readouterr().out
    result = torchrun(2, "-m", "eval.preference", *command, "--json", str(tmp_path / "two.json"))
    assert result.returncode == 0, result.stderr
    one, two = (
        json.loads(path.read_text()) for path in (tmp_path / "new" / "one.json", tmp_path / "two.json")
    )
    assert two == pytest.approx(one, rel=1e-5)
    assert one["pairs"] == len(RAGGED) and result.stdout.count("kl_per_token") == 1


def test_models_of_different_tokenizers_are_refused(folders, tmp_path, ragged):
    """Log-probs of the same text under two tokenizers are of different events, and nothing would crash."""
    train(TEXTS[::-1], vocab_size=300).save(str(tmp_path / "tokenizer.json"))
    other, _ = save(tmp_path / "model", ChatTokenizer(tmp_path / "tokenizer.json"))
    with pytest.raises(InputError, match="different tokenizers"):
        preference.main(["--model", folders[0], "--reference", other, "--data", str(ragged)])


@pytest.mark.parametrize(
    "main, arguments, reason",
    [
        (preference.main, ["--model", "/nowhere"], "/nowhere: no model folder"),
        (preference.main, ["--beta", "0"], "--beta must be positive, not 0.0"),
        (preference.main, ["--batch-size", "0"], "--batch-size must be at least 1, not 0"),
        (judge.main, ["--versus", "/nowhere", "--model", "/nowhere"], "/nowhere: no model folder"),
        (judge.main, ["--samples", "0"], "--samples must be at least 1, not 0"),
        (judge.main, ["--temperature", "nan"], "--temperature must be positive, not nan"),
        (chat.main, ["--model", "/nowhere"], "/nowhere: no model folder"),
        (chat.main, ["--top-p", "0"], "--top-p must be above 0 and at most 1, not 0.0"),
        (report.main, ["/nowhere"], "/nowhere/metrics.jsonl: cannot be read"),
        (report.main, [], "the following arguments are required: run"),
        (demo.main, ["--samples", "-1"], "--samples must be at least 1, not -1"),
    ],
)
def test_bad_usage_is_one_line_and_status_2(main, arguments, reason, capsys):
    with pytest.raises(SystemExit) as stopped:
        run_script(lambda: main(arguments))
    said = capsys.readouterr()
    assert stopped.value.code == 2
    assert said.err.startswith(f"error: {reason}") and said.err.count("\n") == 1 and said.out == ""


@pytest.mark.parametrize("module", [preference, judge, chat, report, demo])
def test_help_is_complete(module, capsys):
    """A bare % in a flag's line ends --help in a traceback."""
    with pytest.raises(SystemExit) as stopped:
        module.main(["--help"])
    assert stopped.value.code == 0
    shown = capsys.readouterr().out
    names = ["out"] if module is report else [f.name.replace("_", "-") for f in fields(module.Settings)]
    assert all(f"--{name}" in shown for name in names)


# ---- the comparison of two models


def replies(*points: str) -> list[list[Reply]]:
    """A string a prompt, the greedy reply first: 0 and 3 points, or r for right but rude."""
    verdicts = {
        "0": Verdict(False, False, False),
        "3": Verdict(True, True, True),
        "r": Verdict(True, True, False),
    }
    return [[Reply("x" * 8, 4, verdicts[mark]) for mark in row] for row in points]


def test_compare_counts_what_the_verdicts_say():
    """Comparing each sample with every other, or counting the greedy reply, would give other numbers."""
    records = [{"judge": {"task": task}} for task in ("sum", "sum", "day")]
    both = {"dpo": replies("333", "00r", "r30"), "sft": replies("00r", "000", "330")}
    figures = compare(records, both)
    assert (figures["wins"], figures["ties"], figures["losses"]) == (3, 3, 0)
    assert (figures["prompts"], figures["samples"]) == (3, 2)
    assert figures["win_rate"] == 1
    assert figures["right_answers"] == {"dpo": 4 / 6, "sft": 2 / 6}
    assert figures["right_answers_greedy"] == {"dpo": 2 / 3, "sft": 1 / 3}
    assert figures["well_formed"] == {"dpo": 4 / 6, "sft": 2 / 6}
    assert figures["wanted_manner"] == {"dpo": 3 / 6, "sft": 1 / 6}
    assert figures["mean_tokens"] == {"dpo": 4, "sft": 4}
    assert figures["mean_characters"] == {"dpo": 8, "sft": 8}
    swapped = compare(records, dict(reversed(both.items())))
    assert (swapped["wins"], swapped["ties"], swapped["losses"]) == (0, 3, 3)
    tasks = judge.compare_tasks(records, both)
    assert {task: (f["prompts"], f["wins"], f["ties"], f["losses"]) for task, f in tasks.items()} == {
        "day": (1, 0, 2, 0),
        "sum": (2, 3, 1, 0),
    }
    assert "3 wins, 3 ties, 0 losses" in judge.summary(figures)
    assert "day" in judge.task_table(tasks)


def test_the_interval_is_wilsons_over_prompts():
    """Ten prompts answered alike four times are ten observations, not forty. Figures for 9 of 10 and 10 of 10
    are the textbook's."""
    once = win_interval([1] * 9 + [0], [0] * 9 + [1])
    assert once == pytest.approx([0.5958, 0.9821], abs=1e-4)
    assert win_interval([4] * 9 + [0], [0] * 9 + [4]) == pytest.approx(once)
    assert win_interval([1] * 10 + [0] * 5, [0] * 15) == pytest.approx([0.7225, 1.0], abs=1e-4)
    # One prompt that decides nine times in ten cases of two prompts is worth 100 / 82 observations.
    low, high = win_interval([9, 0], [0, 1])
    assert low < 0.3 and high > 0.95
    assert win_interval([0, 0], [0, 0]) is None and win_interval([], []) is None


def test_the_interval_covers_what_it_should():
    """Prompts have win chances of their own here, so samples of one prompt are alike; in at least 95 of 100
    experiments the true rate must lie inside. An interval over all samples reaches 78 only."""
    generator = torch.Generator().manual_seed(0)
    chances = torch.tensor([0.02, 0.5, 0.98])
    inside = 0
    for _ in range(300):
        prompts = chances[torch.randint(3, (30,), generator=generator)]
        wins = (torch.rand(30, 4, generator=generator) < prompts[:, None]).sum(1).tolist()
        low, high = win_interval(wins, [4 - won for won in wins])
        inside += low <= 0.5 <= high
    assert inside / 300 >= 0.95


def test_identical_models_tie_everywhere(folders, judged, tmp_path, capsys):
    """Both draw the same random numbers. A win rate of 0 of 0 cases is nothing, neither 0 nor an error."""
    arguments = ["--data", str(judged), "--samples", "2", "--max-new-tokens", "6", "--batch-size", "4"]
    out = tmp_path / "figures.json"
    judge.main(["--model", folders[0], "--versus", folders[0], *arguments, "--json", str(out)])
    figures = json.loads(out.read_text())
    assert (figures["wins"], figures["ties"], figures["losses"]) == (0, 6, 0)
    assert figures["win_rate"] is None and figures["win_rate_ci95"] is None
    assert figures["tasks"]["sum"]["ties"] == 6
    assert "0 wins, 6 ties, 0 losses" in capsys.readouterr().out
    judge.main(
        ["--model", folders[0], "--versus", folders[1], "--prompts", "2", *arguments, "--json", str(out)]
    )
    assert json.loads(out.read_text())["prompts"] == 2


def test_sampled_replies_belong_to_their_prompts(tokenizer, judged, monkeypatch):
    """The greedy reply first, then the samples of the same prompt: a transposed list would mix prompts."""
    asked = []

    def echo(model, prompts, end_id, temperature, **options):
        asked.append(temperature)
        marks = tokenizer.text("!") if temperature else []
        return [judge.Answer([*prompt, *marks], finished=True) for prompt in prompts]

    monkeypatch.setattr(judge, "generate", echo)
    records = judge.read_judged(judged)
    rows = judge.answer(None, tokenizer, records, samples=3, temperature=0.5)
    assert asked == [0, 0.5]
    for record, row in zip(records, rows, strict=True):
        prompt = tokenizer.decode(tokenizer.prompt(record["prompt"]))
        assert [reply.text for reply in row] == [prompt, *[prompt + "!"] * 3]


@pytest.mark.parametrize(
    "wanted, reason",
    [
        (None, "no `judge` field"),
        ({"task": "sum", "language": "en", "given": []}, "lacks accept, check"),
        ({**JUDGE, "check": "vibes"}, "unknown check 'vibes'"),
    ],
)
def test_records_that_cannot_be_judged_are_named(write_jsonl, wanted, reason):
    rows = [{**as_record(RAGGED[0]), "judge": JUDGE}, {**as_record(RAGGED[1]), "judge": wanted}]
    with pytest.raises(DataError, match=reason) as error:
        judge.read_judged(write_jsonl("bad.jsonl", rows))
    assert error.value.line == 2


# ---- the chat


def piped(lines: str, *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "eval.chat", *arguments, "--max-new-tokens", "8", "--device", "cpu"],
        cwd=ROOT, input=lines.encode(), capture_output=True, timeout=60,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def test_a_piped_chat_answers_a_line_with_a_line(folders):
    """Without a terminal there is no prompt to print, no cursor to move, and the end of input is no error."""
    result = piped("Hello\n你好\n\nHow are you?", "--model", folders[0], "--system", "Be brief.")
    assert (result.returncode, result.stderr) == (0, b"")
    assert result.stdout.count(b"\n") == 3 and b"\x1b" not in result.stdout


def test_a_piped_chat_of_two_prints_columns(folders):
    result = piped("Hello\nHi\n", "--model", folders[0], "--versus", folders[1])
    assert (result.returncode, result.stderr) == (0, b"")
    answers = result.stdout.decode().split("\n\n")
    assert answers.pop() == "" and len(answers) == 2
    assert all(chat.GAP.rstrip() in line for answer in answers for line in answer.split("\n"))


def test_a_speaker_remembers_what_was_said(folders, monkeypatch):
    """Each turn is asked with all turns before it, control tokens by id."""
    model, tokenizer = load_speaker(folders[0], CPU)
    asked = []

    def decode(model, prompts, uniforms, end_id, **sampling):
        asked.append(prompts[0])
        yield from (([0], [token]) for token in tokenizer.response("Two apples."))

    monkeypatch.setattr(chat, "decode_steps", decode)
    speaker = chat.Speaker(model, tokenizer, [Message("system", "Be brief.")])
    for text in ("How many?", f"And now? {START}"):
        assert "".join(speaker.reply(text, torch.rand(1, 4))) == "Two apples."
    assert [m.role for m in speaker.history] == ["system", "user", "assistant", "user", "assistant"]
    assert asked[1] == tokenizer.prompt(speaker.history[:4])


def test_a_character_is_shown_when_it_is_whole(tokenizer):
    """A token can end within a character; shown at once, it would be a replacement mark on the screen."""
    text = "a苹果😀b"
    ids = tokenizer.text(text)
    pieces = list(chat.text_pieces(tokenizer, iter(ids)))
    assert "".join(pieces) == text and "\ufffd" not in "".join(pieces)
    assert len(pieces) == len(ids) + 1 > len(text)
    broken = list(chat.text_pieces(tokenizer, iter(tokenizer.text("😀")[:-1])))
    assert set("".join(broken)) == {"\ufffd"} and not any(broken[:-1])


@pytest.mark.parametrize(
    "text, shown",
    [
        ("\x1b[2J\x1b]0;owned\x07", "\\x1b[2J\\x1b]0;owned\\x07"),
        ("a\rb\x00\x7f\x9b", "a\\rb\\x00\\x7f\\x9b"),
        ("safe \u202egnp.exe", "safe \\u202egnp.exe"),
        ("\u2028\ud800", "\\u2028\\ud800"),
        ("one\ntwo\tthree", "one\ntwo    three"),
        ("苹果 é 👩\u200d🚀", "苹果 é 👩\u200d🚀"),
    ],
)
def test_no_answer_can_steer_the_terminal(text, shown):
    assert chat.printable(text) == shown
    shown.encode()


def test_columns_count_cells_not_characters():
    """A Chinese character is two cells wide, an accent of its own none; len() would bend the middle line."""
    assert chat.cells("ab") == 2 and chat.cells("苹果，") == 6 and chat.cells("e\u0301") == 1
    rows = chat.side_by_side("苹果还剩两个\nok", "two apples are left", 10)
    assert rows == ["苹果还剩两 │ two apples", "个         │ are left", "ok         │"]
    assert {chat.cells(line.split("│")[0]) for line in rows} == {11}


TEXT = "The quick 棕色的狐狸 jumps over 懒狗, averyverylongword 和很长很长很长的句子\n\n end  x 苹 " * 2


@pytest.mark.parametrize("width", [10, 11, 27])
def test_wrapped_lines_fit_and_stay(width):
    """Rows that were printed cannot be taken back, so more text may change the last line only."""
    for end in range(len(TEXT)):
        lines, more = chat.wrap(TEXT[:end], width), chat.wrap(TEXT[: end + 1], width)
        assert all(chat.cells(line) <= width for line in lines)
        assert more[: len(lines) - 1] == lines[:-1]
    assert "".join(lines).replace(" ", "") == re.sub(r"\s", "", TEXT)


def screen(output: str) -> list[str]:
    """What a terminal shows after this output: line feeds, "cursor up n" and "clear to the end" only."""
    rows, at = [""], 0
    for part in re.split(r"(\x1b\[\d+A|\x1b\[J|\n)", output):
        if part == "\n":
            at += 1
            rows += [""] * (at + 1 - len(rows))
        elif part == "\x1b[J":
            rows = [*rows[:at], ""]
        elif part.startswith("\x1b"):
            at -= int(part[2:-1])
            assert at >= 0
        else:
            rows[at] += part
    return rows


@pytest.mark.parametrize("terminal", [True, False])
@pytest.mark.parametrize("left, right", [(TEXT, "short\n" * 30), ("", TEXT), (TEXT, TEXT[::-1])])
def test_two_streams_end_as_two_columns(left, right, terminal, monkeypatch):
    """However the screen was drawn anew on the way; and to a file nothing is written twice."""
    monkeypatch.setattr(chat.shutil, "get_terminal_size", lambda _: os.terminal_size((60, 12)))
    with redirect_stdout(io.StringIO()) as output:
        chat.show_two(iter(left), iter(right), terminal)
    assert ("\x1b" in output.getvalue()) == terminal
    assert screen(output.getvalue()) == [*chat.side_by_side(left, right, chat.column_width()), "", ""]


# ---- the picture


def dpo_rows(steps: int = 6) -> list[dict]:
    names = ("loss", "rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins",
             "logps/chosen", "logps/rejected")  # fmt: skip
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


@pytest.mark.parametrize(
    "rows",
    [
        dpo_rows(),
        dpo_rows(1),
        [{"step": s, "loss": 5 / s, "grad_norm": 1.0, "learning_rate": 1e-3} for s in (1, 2, 3)],
        [{"step": 1, "loss": float("nan")}],
    ],
    ids=["dpo", "one evaluation", "sft", "nan"],
)
def test_a_run_becomes_a_picture(rows, tmp_path, capsys):
    """Also while it is written: the last line of a run that was killed is torn."""
    image = pytest.importorskip("matplotlib.image")
    run = write_run(tmp_path / "run $1_2$", rows, torn='{"step": 9, "loss": 0.')
    report.main([str(run)])
    assert capsys.readouterr().out.strip() == str(run / "report.png")
    pixels = image.imread(run / "report.png")
    assert pixels.shape[1] == 1800 and pixels.var() > 1e-3


def test_a_step_that_was_repeated_after_a_resume_counts_once(tmp_path):
    rows = [
        {"step": 1, "loss": 1.0},
        {"step": 2, "loss": 9.0},
        {"step": 2, "loss": 2.0},
        {"step": 3, "loss": 3.0},
    ]
    curves = report.read_curves(write_run(tmp_path / "run", rows) / "metrics.jsonl")
    assert curves == {"loss": {1: 1.0, 2: 2.0, 3: 3.0}}


@pytest.mark.parametrize(
    "text, reason",
    [('{"step": 1}\ntorn\n{"step": 2}\n', ":2: not a row"), ("", "no row"), ("torn", "no row")],
)
def test_damaged_metrics_are_named(text, reason, tmp_path):
    (tmp_path / "metrics.jsonl").write_text(text)
    with pytest.raises(InputError, match=reason):
        report.main([str(tmp_path)])


def test_a_picture_without_matplotlib_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(InputError, match=r"minidpo\[plots\]"):
        report.main([str(write_run(tmp_path / "run", dpo_rows()))])


def test_labels_of_curves_never_lie_on_one_another(tmp_path):
    """The two log-probs often end at the same height."""
    figure = pytest.importorskip("matplotlib.figure").Figure()
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1])
    report.name_ends(axes, [(0.5, "chosen", "k"), (0.5, "rejected", "k"), (0.51, "third", "k")])
    low, middle, high = sorted(text.get_position()[1] for text in axes.texts)
    assert middle - low > 0.1 and high - middle > 0.1


# ---- the demo


@pytest.mark.slow
def test_the_demo_writes_its_results(tmp_path, capsys):
    demo.main(["--out", str(tmp_path), "--max-steps", "2", "--prompts", "3", "--samples", "2"])
    results = json.loads((tmp_path / "results.json").read_text())
    assert {"preference_accuracy", "win_rate", "win_rate_ci95", "well_formed", "seconds"} <= results.keys()
    assert results["wins"] + results["ties"] + results["losses"] == 6 and results["prompts"] == 3
    assert results["right_answers"].keys() == results["right_answers_greedy"].keys() == {"sft", "dpo"}
    assert "eval.chat --model" in capsys.readouterr().out
