"""Preference figures, the judge, and the start of every command: eval/."""

import io
import json
import sys
from dataclasses import fields

import pytest
import torch

import train_dpo
from dataset.packing import build_stream
from dataset.records import DataError
from dataset.store import open_store
from dataset.tokenizer import ChatTokenizer, train
from errors import InputError, run_script
from eval import chat, common, demo, explain, judge, preference, report, rounds, sample, score
from eval.judge import Reply, compare
from eval.verdict import Verdict
from eval.win_rate import win_interval
from model import transformer
from model.reward import RewardModel
from model.weights import save_model
from tests.conftest import (
    RAGGED,
    TEXTS,
    NoFloat64,
    as_record,
    make_model,
    plain_ids,
    plain_logits,
    save_folder,
)
from tests.loops import metrics
from tests.ranks import forked
from tests.runs import ALONE, FP32
from training import precision as precision_module
from training.evaluate import evaluate, evaluate_kl
from training.objective import Objective, ObjectiveSettings, next_token_kl
from training.settings import SAMPLE

CPU = torch.device("cpu")
HELD_OUT = str(SAMPLE / "heldout.jsonl")
DPO = Objective(ObjectiveSettings(beta=0.1))
PATHS = ["--data", "x.jsonl", "--out", "y.jsonl"]  # of eval.score
JUDGE = {"task": "sum", "language": "en", "check": "number", "accept": ["3"], "given": ["1", "2"]}


@pytest.fixture
def pairs(write_jsonl, tokenizer):
    """A store of n pairs: the ragged ones, and then the same again with longer rejected answers."""

    def first(n: int):
        rows = [as_record(RAGGED[i % len(RAGGED)]) for i in range(n)]
        for i, row in enumerate(rows):
            row["rejected"] += " 7" * (i // len(RAGGED))
        return open_store(write_jsonl("pairs.jsonl", rows), "preferences", tokenizer, max_length=200)

    return first


@pytest.fixture
def reward_folder(tmp_path, tokenizer) -> str:
    """A folder with a reward model."""
    model = RewardModel.from_language_model(make_model(tokenizer.vocab_size, torch.float32))
    return str(save_folder(tmp_path / "reward", tokenizer, model))


@pytest.fixture
def judged(write_jsonl):
    """A file of three pairs with a `judge` field."""
    return write_jsonl("judged.jsonl", [{**as_record(pair), "judge": JUDGE} for pair in RAGGED[:3]])


# ---- preference figures


@pytest.mark.parametrize("scores_at_once", [2**25, 1600], ids=["whole", "in-chunks"])
@pytest.mark.parametrize("layout", ["forked", "twin"])
def test_kl_is_that_of_a_plain_loop(pairs, tokenizer, layout, scores_at_once, monkeypatch):
    """KL(reference || policy), a sampled estimate, or a mean over prompt tokens would all look plausible."""
    monkeypatch.setattr(transformer, "MAX_LOGITS", scores_at_once)
    policy, reference = (make_model(tokenizer.vocab_size, seed=seed) for seed in (1, 2))
    total = count = 0
    for prompt, *sides in RAGGED:
        for side in sides:
            x, y = plain_ids(tokenizer, prompt, side)
            p, q = (plain_logits(model, x + y).log_softmax(-1) for model in (policy, reference))
            for t in range(len(y)):
                at = len(x) + t - 1
                total += (p[at].exp() * (p[at] - q[at])).sum().item()
                count += 1
    found = evaluate_kl(policy, reference, pairs(7), ALONE, layout, max_tokens=130)
    assert found["kl_per_token"] == pytest.approx(total / count, rel=1e-6)
    assert total / count > 0.1


def test_the_kl_of_an_evaluation_in_training_is_that_of_rows_spread_over_the_data(pairs, tokenizer):
    """The first rows of a sorted file are about one thing."""
    policy, reference = (make_model(tokenizer.vocab_size, seed=seed) for seed in (1, 2))
    data, most = pairs(7), 3
    stream = build_stream(data, [0, 3, 6])
    expected = next_token_kl(policy, reference, stream).mean().item()
    for max_tokens in (130, 10_000):
        found = evaluate_kl(policy, reference, data, ALONE, max_tokens=max_tokens, most=most)
        assert found["kl_per_token"] == pytest.approx(expected, rel=1e-6)


def test_two_ranks_print_the_figures_of_one(folders, ragged, tmp_path, capsys):
    command = ["--model", folders[0], "--reference", folders[1], "--data", str(ragged), "--device", "cpu"]
    preference.main([*command, "--json", str(tmp_path / "new" / "one.json")])
    assert "rewards/accuracies" in capsys.readouterr().out
    result = forked("eval.preference", *command, "--json", tmp_path / "two.json", ranks=2)
    assert result.returncode == 0, result.stderr
    one, two = (json.loads((tmp_path / path).read_text()) for path in ("new/one.json", "two.json"))
    assert two == pytest.approx(one, rel=1e-5)
    assert one["pairs"] == len(RAGGED) and result.stdout.count("kl_per_token") == 1


def test_models_of_different_tokenizers_are_refused(folders, tmp_path, ragged):
    """Log-probs of one text under two tokenizers are of different events, and nothing would crash."""
    train(TEXTS[::-1], vocab_size=300).save(str(tmp_path / "tokenizer.json"))
    other = save_folder(tmp_path / "model", ChatTokenizer(tmp_path / "tokenizer.json"))
    with pytest.raises(InputError, match="different tokenizers"):
        preference.main(["--model", folders[0], "--reference", str(other), "--data", str(ragged)])


# ---- the run's own objective, reference and data


@pytest.fixture
def trained(folders, ragged, tmp_path, capsys):
    """Train with these flags from the first folder, on and with the ragged pairs; return the run's folder."""

    def run(*flags: str, out="run") -> str:
        paths = ["--model", folders[0], "--data", str(ragged), "--out", str(tmp_path / out)]
        data = [] if "--eval-data" in flags else ["--eval-data", str(ragged)]
        how = ["--device", "cpu", "--precision", "fp32", "--lr", "3e-3", "--epochs", "4", "--batch-size", "4"]
        train_dpo.main([*paths, *data, *how, *flags])
        capsys.readouterr()
        return str(tmp_path / out)

    return run


def measured(folder: str, tmp_path, *flags: str) -> dict:
    """The figures that eval.preference writes for a folder."""
    out = tmp_path / "figures.json"
    preference.main(["--model", folder, "--device", "cpu", "--precision", "fp32", "--json", str(out), *flags])
    return json.loads(out.read_text())


@pytest.mark.parametrize("flags", [
    ["--beta", "0.7"],
    ["--loss", "ipo", "--beta", "0.3"],
    ["--loss", "sigmoid,sft", "--loss-weights", "1,0.2", "--label-smoothing", "0.1"],
    ["--f-divergence", "js", "--beta", "2"],
    ["--loss", "dpop", "--dpop-lambda", "3"],
    ["--wpo"],
    ["--ld-alpha", "0.5"],
    ["--lora-rank", "4"],
], ids=" ".join)  # fmt: skip
def test_a_run_is_measured_as_it_was_trained(flags, trained, tmp_path, folders, capsys):
    """With beta 0.1 and DPO's loss for every run, the figures differ from those of its own log, silently."""
    folder = trained(*flags)
    *_, last = (row for row in metrics(tmp_path / "run") if "eval_loss" in row)
    figures = measured(folder, tmp_path)
    logged = {name.removeprefix("eval_"): value for name, value in last.items() if name.startswith("eval_")}
    assert logged["kl_per_token"] > 1e-4
    assert {name: figures[name] for name in logged} == pytest.approx(logged, rel=1e-4, abs=1e-6)
    assert logged["rewards/margins"] != 0
    loss = flags[flags.index("--loss") + 1] if "--loss" in flags else "sigmoid"
    beta = float(flags[flags.index("--beta") + 1]) if "--beta" in flags else 0.1
    assert f"loss {loss}, beta {beta:g}, reference {folders[0]}\n" in capsys.readouterr().err


def test_flags_come_before_the_run(trained, tmp_path, folders, ragged):
    """--loss replaces the run's loss with all its options, --beta its beta."""
    folder = trained("--loss", "exo_pair", "--label-smoothing", "0.2", "--beta", "0.5")
    own, other = measured(folder, tmp_path), measured(folder, tmp_path, "--beta", "0.25")
    assert other["rewards/margins"] == pytest.approx(own["rewards/margins"] / 2)
    sigmoid = measured(folder, tmp_path, "--loss", "sigmoid")
    assert sigmoid["rewards/margins"] == own["rewards/margins"] and sigmoid["loss"] != own["loss"]
    swapped = measured(folder, tmp_path, "--reference", folders[1])
    assert swapped["logps/chosen"] == own["logps/chosen"] and swapped["kl_per_token"] != own["kl_per_token"]


def test_soft_labels_need_scores_only_if_asked_for(trained, tmp_path, write_jsonl, ragged, capsys):
    """A run with soft labels has held-out pairs without scores more often than not."""
    scored = [{**as_record(pair), "score_chosen": i, "score_rejected": 0} for i, pair in enumerate(RAGGED)]
    path = str(write_jsonl("scored.jsonl", scored))
    folder = trained("--loss", "soft", "--data", path, "--eval-data", path, "--beta", "0.5")
    figures = measured(folder, tmp_path, "--data", str(ragged))
    assert "has no scores for --loss soft, so the loss is sigmoid" in capsys.readouterr().err
    assert figures == measured(folder, tmp_path, "--data", str(ragged), "--loss", "sigmoid")
    assert figures["loss"] != measured(folder, tmp_path)["loss"]
    with pytest.raises(InputError, match="needs score_chosen and score_rejected"):
        measured(folder, tmp_path, "--data", str(ragged), "--loss", "soft")


def test_held_out_pairs_are_the_runs_own(trained, tmp_path, folders, ragged, capsys):
    """Figures on the pairs of another task look plausible. Bundled pairs fit runs on bundled data only."""
    with pytest.raises(InputError, match="no held-out pairs in its config"):
        measured(trained("--eval-data", ""), tmp_path)
    with pytest.raises(InputError, match="no held-out pairs in its config"):
        measured(folders[0], tmp_path, "--reference", folders[1])
    measured(trained(out="with"), tmp_path)
    assert f"{ragged}: 7 of 7 records" in capsys.readouterr().err
    dpo = {"data": str(SAMPLE / "preferences.jsonl"), "eval_data": "", "beta": 1}
    sft = {"data": str(SAMPLE / "sft.jsonl"), "eval_data": "chats.jsonl"}
    auto = {"data": str(SAMPLE / "preferences.jsonl"), "eval_data": "auto", "eval_share": 0.0, "beta": 1}
    assert all(preference.held_out_pairs("x", run) == (HELD_OUT, 0) for run in (dpo, sft, auto))
    with pytest.raises(InputError, match="give --data"):
        preference.held_out_pairs("x", {"data": "mine.jsonl", "eval_data": "auto", "beta": 1})


def test_a_share_of_the_training_data_is_measured_as_it_was_held_out(folders, tmp_path, ragged, tokenizer):
    """Figures on all pairs of the file would contain the pairs that the model was trained on."""
    run = {"model": folders[1], "data": str(ragged), "eval_data": "auto", "eval_share": 0.5, "beta": 0.1}
    save_folder(tmp_path / "run", tokenizer, settings=run, seed=1)
    held_out = open_store(ragged, "preferences", tokenizer, 4096).split(0.5)[1]
    assert 0 < len(held_out) < 7
    expected = evaluate(*map(common.load_model, (folders[0], folders[1])), held_out, ALONE, FP32, DPO)
    figures = measured(str(tmp_path / "run"), tmp_path)
    assert figures["pairs"] == len(held_out)
    assert {name: figures[name] for name in expected} == pytest.approx(expected, rel=1e-5)


def test_a_folder_without_a_run_has_defaults_and_no_reference(folders, tmp_path, ragged, capsys):
    with pytest.raises(InputError, match=r"does not name a model folder .*give --reference"):
        preference.main(["--model", folders[0], "--data", str(ragged)])
    with pytest.raises(InputError, match=r"does not name a model folder .*give --versus"):
        judge.main(["--model", folders[0]])
    measured(folders[0], tmp_path, "--reference", folders[1], "--data", str(ragged))
    assert f"loss sigmoid, beta 0.1, reference {folders[1]}" in capsys.readouterr().err


@pytest.mark.parametrize("run, reason", [
    ({"model": "/gone"}, "started from /gone, and that folder is not here; give --reference"),
    ({"model": "tiny"}, "does not name a model folder"),
    ({"model": None}, "does not name a model folder"),
    ([], "does not name a model folder"),
])  # fmt: skip
def test_a_starting_model_that_is_not_here_is_named(run, reason, tmp_path):
    save_model(tmp_path, make_model(9), settings=run)
    with pytest.raises(InputError, match=reason):
        common.starting_model(str(tmp_path), "--reference")


def test_a_relative_starting_model_is_found_from_the_same_folder(folders, tmp_path, monkeypatch):
    (tmp_path / "runs" / "sft").mkdir(parents=True)
    save_model(tmp_path / "dpo", make_model(9), settings={"model": "runs/sft"})
    monkeypatch.chdir(tmp_path)
    assert common.starting_model("dpo", "--reference") == "runs/sft"


@pytest.mark.parametrize("damage", [{"beta": "x"}, {"loss": 5}, {"loss": "none"}, {"f_divergence": "x"}])
def test_damaged_settings_are_an_error_not_a_traceback(damage, folders, tmp_path, ragged, tokenizer):
    run = {"model": folders[0], "beta": 0.1, "loss": "sigmoid", "eval_data": str(ragged), **damage}
    save_folder(tmp_path / "run", tokenizer, settings=run)
    with pytest.raises(InputError, match=r"damaged|there is no such loss"):
        measured(str(tmp_path / "run"), tmp_path)


# ---- the start of every command


@pytest.mark.parametrize("main, arguments, reason", [
    (preference.main, ["--model", "/nowhere"], "/nowhere: there is no such model folder"),
    (preference.main, ["--beta", "0"], "--beta must be above 0, not 0.0"),
    (preference.main, ["--micro-batch-tokens", "0"], "--micro-batch-tokens must be at least 1, not 0"),
    (preference.main, ["--max-length", "-1"], "--max-length must be at least 0, not -1"),
    (judge.main, ["--model", "/nowhere"], "/nowhere: there is no such model folder"),
    (judge.main, ["--samples", "0"], "--samples must be at least 1, not 0"),
    (judge.main, ["--temperature", "nan"], "--temperature must be above 0, not nan"),
    (chat.main, ["--model", "/nowhere"], "/nowhere: there is no such model folder"),
    (chat.main, ["--top-p", "0"], "--top-p must be above 0 and at most 1, not 0.0"),
    (report.main, ["/nowhere"], "/nowhere: there is no such model folder"),
    (report.main, [], "the following arguments are required: run"),
    (report.main, [".", "--pairs", "0"], "--pairs must be at least 1, not 0"),
    (report.main, [".", "--data", "/nowhere.jsonl"], "/nowhere.jsonl: "),
    (report.main, [".", "--reference", "/nowhere"], "/nowhere: there is no such model folder"),
    (report.main, ["a", "b", "--png"], "--png takes one run, not a b"),
    (demo.main, ["--samples", "-1"], "--samples must be at least 1, not -1"),
    (score.main, ["--model", "/nowhere", *PATHS], "/nowhere: there is no such model folder"),
    (score.main, ["--data", "x.jsonl"], "give --data, the pairs to score, and --out"),
    (score.main, ["--out", "x.jsonl"], "give --data, the pairs to score, and --out"),
    (score.main, ["--data", "x.jsonl", "--out", "x.json"], "--out x.json: the name must end in .jsonl"),
    (score.main, [*PATHS, "--micro-batch-tokens", "0"], "--micro-batch-tokens must"),
    (sample.main, [], "give --data, the file of prompts"),
    (sample.main, ["--data", "x.txt", "--seed", "-1"], "--seed must be from 0 to 2^31 - 1, not -1"),
    (sample.main, ["--data", "x.txt"], "x.txt: cannot be read: no such file"),
    (rounds.main, ["--scorer", "judge"], "give --prompts, the file of prompts"),
])  # fmt: skip
def test_bad_usage_is_one_line_and_status_2(main, arguments, reason, capsys):
    with pytest.raises(SystemExit) as stopped:
        run_script(lambda: main(arguments))
    printed = capsys.readouterr()
    assert stopped.value.code == 2
    assert printed.err.startswith(f"error: {reason}") and printed.err.count("\n") == 1 and printed.out == ""


@pytest.mark.parametrize("main, arguments", [
    (preference.main, []), (judge.main, []), (chat.main, []), (explain.main, []), (report.main, ["runs/dpo"]),
    (score.main, ["--model", "runs/dpo", *PATHS]),
])  # fmt: skip
def test_a_default_that_is_missing_names_the_folder_of_the_demo(main, arguments, tmp_path, monkeypatch):
    """After `make demo` the models are in runs/demo, and the default, runs/dpo, does not exist."""
    (tmp_path / "runs" / "demo" / "dpo").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=r"runs/dpo: there is no such .*runs/demo/dpo"):
        main(arguments)


@pytest.mark.parametrize("main, arguments", [
    (preference.main, []), (judge.main, []), (chat.main, []), (explain.main, []), (score.main, PATHS),
])  # fmt: skip
def test_a_model_file_in_place_of_its_folder_is_named(main, arguments, folders):
    with pytest.raises(InputError, match=r"model\.pt is a file, not a model folder: give the folder"):
        main(["--model", f"{folders[0]}/model.pt", *arguments])


@pytest.mark.parametrize("module", [preference, judge, chat, report, demo, score, explain, sample, rounds])
def test_help_is_complete(module, capsys):
    """A bare % in a flag's help text ends --help with a traceback."""
    with pytest.raises(SystemExit) as stopped:
        module.main(["--help"])
    assert stopped.value.code == 0
    shown = capsys.readouterr().out
    names = ["out"] if module is report else [f.name.replace("_", "-") for f in fields(module.Settings)]
    assert all(f"--{name}" in shown for name in names)


@pytest.mark.parametrize("multiplies_bf16", [True, False])
def test_one_line_names_models_device_and_precision(multiplies_bf16, folders, ragged, monkeypatch, capsys):
    """Figures in bf16 differ from those in float32 in the third digit, so the output names the precision."""
    monkeypatch.setattr(precision_module, "cpu_multiplies_bf16", lambda: multiplies_bf16)
    flags = ["--model", folders[0], "--reference", folders[1], "--data", str(ragged), "--device", "cpu"]
    preference.main(flags)
    preference.main([*flags, "--precision", "fp32"])
    first, second = (line for line in capsys.readouterr().err.splitlines() if "parameters" in line)
    parameters = sum(p.numel() for p in common.load_model(folders[0]).parameters())
    for folder in folders:
        assert f"{folder} ({parameters:,} parameters)" in first
    reason = "bf16 (this CPU multiplies it)" if multiplies_bf16 else "fp32 (this CPU does not multiply bf16)"
    assert first.endswith(f"on cpu, {reason}")
    assert second.endswith("on cpu, fp32 (--precision)")


def test_no_command_needs_float64(folders, ragged, judged, tmp_path, monkeypatch, reward_folder):
    """MPS has no float64: a command that is fine on a CPU would end with a TypeError on every Mac."""
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"Hi\n")))
    both = ["--model", folders[0], "--device", "cpu", "--reference", folders[1], "--data", str(ragged)]
    versus = ["--model", folders[0], "--device", "cpu", "--versus", folders[1], "--max-new-tokens", "2"]
    scored = ["--model", reward_folder, "--device", "cpu", "--data", str(ragged)]
    with NoFloat64():
        preference.main(both)
        explain.main(both)
        chat.main(versus)
        judge.main([*versus, "--data", str(judged)])
        sample.main([*versus[:4], "--data", str(ragged), "--max-new-tokens", "2"])
        score.main([*scored, "--out", str(tmp_path / "scored.jsonl")])
        with pytest.raises(TypeError, match="float64"):
            torch.ones(1).double()


# ---- the comparison of two models


def replies(*points: str) -> list[list[Reply]]:
    """One string per prompt, the greedy reply first: 0 or 3 points, or r for right but rude."""
    flags = {"0": (False, False, False), "3": (True, True, True), "r": (True, True, False)}
    verdicts = {mark: Verdict(*each) for mark, each in flags.items()}
    return [[Reply("x" * 8, 4, verdicts[mark]) for mark in row] for row in points]


def test_compare_counts_verdicts():
    """Comparing each sample with every other one, or counting the greedy reply, gives other numbers."""
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
    assert [(f["only_first_right"], f["only_second_right"]) for f in (figures, swapped)] == [(2, 0), (0, 2)]
    tasks = judge.compare_tasks(records, both)
    counts = {task: [f[key] for key in ("prompts", "wins", "ties", "losses")] for task, f in tasks.items()}
    assert counts == {"day": [1, 0, 2, 0], "sum": [2, 3, 1, 0]}
    assert "3 wins, 3 ties, 0 losses" in judge.summary(figures)
    assert "day" in judge.task_table(tasks)


def test_the_interval_is_wilsons_over_prompts():
    """Ten prompts with four equal answers each are ten observations, not forty. Textbook values."""
    once = win_interval([1] * 9 + [0], [0] * 9 + [1])
    assert once == pytest.approx([0.5958, 0.9821], abs=1e-4)
    assert win_interval([4] * 9 + [0], [0] * 9 + [4]) == pytest.approx(once)
    assert win_interval([1] * 10 + [0] * 5, [0] * 15) == pytest.approx([0.7225, 1.0], abs=1e-4)
    # Ten decided cases, nine of them of one prompt, are worth 100 / 82 observations.
    low, high = win_interval([9, 0], [0, 1])
    assert low < 0.3 and high > 0.95
    assert win_interval([0, 0], [0, 0]) is None and win_interval([], []) is None


def test_the_interval_covers_the_true_rate():
    """Samples of a prompt are correlated: an interval over all samples covers the rate in 78 %, not 95."""
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
    """Both get the same random numbers. A win rate of 0 of 0 cases is None, neither 0 nor an error."""
    arguments = ["--data", str(judged), "--samples", "2", "--max-new-tokens", "6", "--batch-size", "4"]
    out = tmp_path / "figures.json"
    judge.main(["--model", folders[0], "--versus", folders[0], *arguments, "--json", str(out)])
    figures = json.loads(out.read_text())
    assert (figures["wins"], figures["ties"], figures["losses"]) == (0, 6, 0)
    assert figures["win_rate"] is None and figures["win_rate_ci95"] is None
    assert figures["tasks"]["sum"]["ties"] == 6
    assert "0 wins, 6 ties, 0 losses" in capsys.readouterr().out
    other = ["--versus", folders[1], "--prompts", "2"]
    judge.main(["--model", folders[0], *other, *arguments, "--json", str(out)])
    assert json.loads(out.read_text())["prompts"] == 2


def test_sampled_replies_belong_to_their_prompts(tokenizer, judged, monkeypatch):
    """The greedy reply first, then the samples of the same prompt. A transposed list would mix prompts."""
    temperatures = []

    def echo(model, prompts, end_id, temperature, samples=1, **options):
        temperatures.append(temperature)
        marks = tokenizer.text("!") if temperature else []
        return [judge.Answer([*prompt, *marks], finished=True) for prompt in prompts for _ in range(samples)]

    monkeypatch.setattr(judge, "generate", echo)
    records = judge.read_judged(judged)
    rows = judge.answer(make_model(8), tokenizer, records, samples=3, temperature=0.5)
    assert temperatures == [0, 0.5]
    for record, row in zip(records, rows, strict=True):
        prompt = tokenizer.decode(tokenizer.prompt(record["prompt"]))
        assert [reply.text for reply in row] == [prompt, *[prompt + "!"] * 3]


@pytest.mark.parametrize("rule, reason", [
    (None, "no `judge` field"),
    ({"task": "sum", "language": "en", "given": []}, "lacks accept, check"),
    ({**JUDGE, "check": "vibes"}, "unknown check 'vibes'"),
])  # fmt: skip
def test_records_that_cannot_be_judged_are_named(write_jsonl, rule, reason):
    rows = [{**as_record(RAGGED[0]), "judge": JUDGE}, {**as_record(RAGGED[1]), "judge": rule}]
    with pytest.raises(DataError, match=reason) as error:
        judge.read_judged(write_jsonl("bad.jsonl", rows))
    assert error.value.line == 2


def test_task_names_cannot_steer_the_terminal(folders, write_jsonl, capsys):
    rows = [{**as_record(pair), "judge": {**JUDGE, "task": "\x1b[2Jsum"}} for pair in RAGGED[:2]]
    flags = ["--data", str(write_jsonl("evil.jsonl", rows)), "--samples", "1", "--max-new-tokens", "2"]
    judge.main(["--model", folders[0], "--versus", folders[1], "--device", "cpu", *flags])
    printed = capsys.readouterr()
    assert "\\x1b[2Jsum" in printed.out and "\x1b" not in printed.out + printed.err


# ---- the demo


@pytest.mark.slow
def test_the_demo_writes_its_results(tmp_path, capsys):
    demo.main(["--out", str(tmp_path), "--max-steps", "2", "--prompts", "3", "--samples", "2"])
    results = json.loads((tmp_path / "results.json").read_text())
    assert {"preference_accuracy", "win_rate", "win_rate_ci95", "well_formed", "seconds"} <= results.keys()
    assert results["wins"] + results["ties"] + results["losses"] == 6 and results["prompts"] == 3
    assert results["right_answers"].keys() == results["right_answers_greedy"].keys() == {"sft", "dpo"}
    printed = capsys.readouterr().out
    assert "eval.chat --model" in printed and str(tmp_path / "dpo" / "report.html") in printed
    assert "Answers, judged" in (tmp_path / "dpo" / "report.html").read_text("utf-8")
