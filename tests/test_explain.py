"""One pair, token by token: eval/explain.py."""

import io
import json
import re
import sys

import pytest
import torch

from errors import InputError
from eval import explain, preference, terminal
from eval.common import load_model, run_settings
from tests.conftest import RAGGED, as_record, plain_ids, plain_logits, plain_logp, save_folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory, tokenizer) -> tuple[str, str]:
    """A policy and its reference; the policy's settings name the reference and beta 0.5."""
    parent = tmp_path_factory.mktemp("models")
    reference = str(save_folder(parent / "reference", tokenizer, seed=1))
    run = {"model": reference, "beta": 0.5, "loss": "sigmoid"}
    return str(save_folder(parent / "policy", tokenizer, settings=run, seed=2)), reference


def explained(folders, tokenizer, path, row):
    """The two answers and the loss of a row, and its record."""
    policy, reference = map(load_model, folders)
    record = explain.read_row(path, row)
    pair = explain.OnePair(record, explain.encode(record, tokenizer))
    settings = explain.Settings(model=folders[0])
    objective = preference.choose_objective(settings, run_settings(folders[0]), pair, path)
    return *explain.explain(policy, reference, pair, objective), record


@pytest.mark.parametrize("row", range(1, len(RAGGED) + 1))
def test_every_token_has_the_log_probs_of_a_plain_loop(row, folders, tokenizer, ragged):
    """Values of the neighbouring token, of the other side or of the prompt would look plausible too."""
    answers, _, _ = explained(folders, tokenizer, ragged, row)
    prompt, *texts = RAGGED[row - 1]
    for answer, text in zip(answers, texts, strict=True):
        x, y = plain_ids(tokenizer, prompt, text)
        assert answer.tokens == y
        for folder, logps in zip(folders, (answer.logps, answer.reference_logps), strict=True):
            model = load_model(folder).double()
            table = plain_logits(model, x + y).log_softmax(-1)[len(x) - 1 : -1]
            assert logps == pytest.approx(table.gather(1, torch.tensor(y)[:, None])[:, 0].tolist(), abs=1e-4)
            assert sum(logps) == pytest.approx(plain_logp(model, x, y).item(), abs=1e-3)


def test_tokens_sum_to_the_reward_and_the_loss_that_are_logged(folders, tokenizer, write_jsonl):
    """A view whose numbers do not add up to the training log explains nothing."""
    for row, pair in enumerate(RAGGED, start=1):
        path = write_jsonl("one.jsonl", [as_record(pair)])
        given = preference.Settings(model=folders[0], data=str(path), device="cpu", precision="fp32")
        logged = preference.measure(given, preference.World(0, 1, torch.device("cpu")))
        (chosen, rejected), loss, _ = explained(folders, tokenizer, path, 1)
        assert 0.5 * sum(chosen.logratios) == pytest.approx(logged["rewards/chosen"], abs=1e-4), row
        assert 0.5 * sum(rejected.logratios) == pytest.approx(logged["rewards/rejected"], abs=1e-4)
        assert loss == pytest.approx(logged["loss"], abs=1e-4)


@pytest.mark.parametrize("row", range(1, len(RAGGED) + 1))
def test_pieces_are_the_text_and_keep_the_sum(row, folders, tokenizer, ragged):
    """A character of several tokens appears once, with the sum of their log-ratios."""
    answers, _, record = explained(folders, tokenizer, ragged, row)
    for answer, text in zip(answers, (record.chosen, record.rejected), strict=True):
        pieces = list(explain.pieces_of(answer, tokenizer))
        assert "".join(piece for piece, _ in pieces) == f"{text}<|im_end|>"
        assert sum(value for _, value in pieces) == pytest.approx(sum(answer.logratios))


def test_half_a_character_at_the_end_is_shown(tokenizer):
    ids = tokenizer.text("a😀")[:-1]
    answer = explain.Answer(ids, [1.0] * len(ids), [0.0] * len(ids))
    pieces = list(explain.pieces_of(answer, tokenizer))
    assert sum(value for _, value in pieces) == len(ids) and "\ufffd" in pieces[-1][0]


@pytest.fixture
def run(monkeypatch, capsys):
    """Call eval.explain, on a terminal or in a pipe; return what it printed."""

    def call(*arguments: str, on_terminal: bool = False, text: str = "") -> str:
        monkeypatch.setattr(sys.stdout, "isatty", lambda: on_terminal, raising=False)
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode()), encoding="utf-8"))
        explain.main([*arguments, "--device", "cpu"])
        return capsys.readouterr().out

    return call


def test_colours_only_on_a_terminal_that_wants_them(run, folders, ragged, monkeypatch):
    flags = ["--model", folders[0], "--data", str(ragged), "--row", "3"]
    monkeypatch.delenv("NO_COLOR", raising=False)
    piped, coloured = run(*flags), run(*flags, on_terminal=True)
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b" not in piped and "\x1b[" in coloured and run(*flags, on_terminal=True) == piped
    bare = re.sub(r"\x1b\[[\d;]*m", "", coloured)
    assert "\x1b" not in bare and "还剩两个苹果。" in bare
    for name in ("chosen: log π/π_ref", "rejected: log π/π_ref", "margin: log-ratios", "(beta 0.5)"):
        assert name in bare and name in piped
    # In a pipe every token is followed by its value.
    values = re.findall(r"\[([+−]\d+\.\d\d)\]", piped)
    assert len(values) >= len("还剩两个苹果。不知道")


@pytest.mark.parametrize("colour", [True, False])
@pytest.mark.parametrize("width", [20, 33, 80])
def test_lines_fit_the_terminal(width, colour):
    """A Chinese character takes two cells; a long token is cut; a line feed ends a line."""
    pieces = [("苹果还剩两个", 0.2), (" apples", -4.0), ("\n", 0.0), ("averylongword" * 5, 1.0), ("个", 0)]
    lines = explain.lay_out(pieces, width, colour)
    bare = [re.sub(r"\x1b\[[\d;]*m", "", line) for line in lines]
    assert all(terminal.cells(line) <= width for line in bare)
    shown = "".join(bare) if colour else re.sub(r"\[[+−][\d.]+\]", "", "".join(bare))
    assert re.sub("[↵ ]", "", shown) == re.sub(r"\s", "", "".join(text for text, _ in pieces))


def test_stronger_and_opposite_log_ratios_have_other_colours():
    values = (-5, -1.5, -0.5, -0.2, 0, 0.2, 0.5, 1.5, 5)
    codes = [explain.colour_of(value) for value in values]
    assert len({*codes}) == len(values) and codes[4] == ""


def test_hostile_text_cannot_steer_the_terminal(run, folders, write_jsonl):
    rows = [{"prompt": "\x1b[2J?", "chosen": "ok \x1b]0;owned\x07", "rejected": "\x9b31m no"}]
    shown = run("--model", folders[0], "--data", str(write_jsonl("evil.jsonl", rows)))
    assert "\\x1b[2J" in shown and not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f]", shown)


def test_a_typed_pair_is_that_pair_of_a_file(run, folders, write_jsonl):
    """`--text` reads prompt, chosen and rejected, one line each."""
    rows = [{"prompt": "Hi", "chosen": "Hello", "rejected": "No."}]
    typed = run("--model", folders[0], "--text", text="Hi\nHello\nNo.\n")
    assert typed == run("--model", folders[0], "--data", str(write_jsonl("typed.jsonl", rows)))
    with pytest.raises(InputError, match="--text: the line of the rejected is missing"):
        run("--model", folders[0], "--text", text="Hi\nHello\n")


def test_rows_are_counted_from_one_and_missing_ones_named(run, folders, ragged, write_jsonl):
    with pytest.raises(InputError, match=r"--row 8: .*ragged\.jsonl has 7 records"):
        run("--model", folders[0], "--data", str(ragged), "--row", "8")
    with pytest.raises(InputError, match="--row must be at least 1, not 0"):
        run("--row", "0")
    bad = write_jsonl("bad.jsonl", [as_record(RAGGED[0]), {"prompt": "x", "chosen": 3, "rejected": "y"}])
    with pytest.raises(InputError, match=r"bad\.jsonl:2:"):
        run("--model", folders[0], "--data", str(bad), "--row", "2")
    assert "apples" in run("--model", folders[0], "--data", str(bad), "--row", "1")


def test_the_runs_held_out_pairs_are_the_default(run, folders, ragged, tokenizer, tmp_path):
    settings = {"model": folders[1], "beta": 0.5, "loss": "sigmoid", "eval_data": str(ragged)}
    save_folder(tmp_path / "run", tokenizer, settings=settings, seed=2)
    assert run("--model", str(tmp_path / "run")) == run("--model", folders[0], "--data", str(ragged))
    assert json.loads((tmp_path / "run" / "config.json").read_text())["settings"] == settings


def test_a_pair_of_a_wpo_run_has_its_weight(run, folders, ragged, tokenizer, tmp_path):
    """Without WPO's weights the objective has nothing to multiply by: a traceback for every such run."""
    settings = {"model": folders[1], "beta": 0.5, "loss": "sigmoid", "wpo": True}
    policy = str(save_folder(tmp_path / "run", tokenizer, settings=settings, seed=2))
    rows = [json.loads(line) for line in ragged.read_text("utf-8").splitlines()]
    (tmp_path / "one.jsonl").write_text(json.dumps(rows[0]) + "\n", "utf-8")
    data = str(tmp_path / "one.jsonl")
    given = preference.Settings(model=policy, data=data, device="cpu", precision="fp32")
    logged = preference.measure(given, preference.World(0, 1, torch.device("cpu")))["loss"]
    assert f"loss sigmoid: {logged:.4f}" in run("--model", policy, "--data", data)
