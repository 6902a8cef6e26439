"""The scripts as a user meets them: flags, errors, imports, and the tables of docs/."""

import os
import re
import subprocess
import sys
from dataclasses import fields

import pytest
import torch

import train_dpo
import train_reward
import train_sft
from errors import InputError
from losses import LOSSES
from model.config import ModelConfig
from model.weights import save_model
from tests.conftest import make_model
from tests.loops import ROOT
from tests.ranks import forked
from training.muon import MuonWithAdamW
from training.precision import Precision
from training.settings import learning_rate_advice, parse
from training.setup import make_optimizer

OBJECTIVES = ROOT / "docs" / "OBJECTIVES.md"
FLAGS = ROOT / "docs" / "FLAGS.md"
SCRIPTS = {"train_sft.py": train_sft, "train_dpo.py": train_dpo, "train_reward.py": train_reward}


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("arguments, reason", [
    (["--learning-rate", "1"], "unrecognized arguments: --learning-rate 1"),
    (["--lr", "fast"], "argument --lr: invalid float value: 'fast'"),
    (["--batch-size", "0"], "--batch-size must be at least 1, not 0"),
    (["--seed", "-1"], "--seed must be from 0 to 2^63 - 1, not -1"),
    (["--precision", "int4"], "argument --precision: invalid choice"),
    (["--model", "/nowhere"], "/nowhere"),
])  # fmt: skip
def test_bad_usage_is_one_line_and_status_2(script, arguments, reason, tmp_path):
    """A traceback tells a user nothing, and status 1 or 0 lets a shell script go on."""
    result = forked(script.removesuffix(".py"), *arguments, cwd=tmp_path)
    assert result.returncode == 2
    assert result.stderr.startswith("error: ") and reason in result.stderr
    assert result.stderr.count("\n") == 1 and result.stdout == ""
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_works_from_anywhere(script, tmp_path):
    """Paths that are relative to the script's folder break as soon as the shell stands elsewhere."""
    result = forked(script.removesuffix(".py"), "--help", cwd=tmp_path)
    assert result.returncode == 0
    for f in fields(SCRIPTS[script].Settings):
        assert f"--{f.name.replace('_', '-')}" in result.stdout


def test_a_script_starts_from_anywhere(tmp_path):
    """The same with a new interpreter, which finds the project's modules beside the script."""
    command = [sys.executable, ROOT / "train_dpo.py", "--help"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stderr) == (0, "") and "--beta" in result.stdout


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_flag_says_why_and_bools_go_both_ways(script):
    """`--flag False` read as true is a classic; here a bool is --flag or --no-flag."""
    settings_class = SCRIPTS[script].Settings
    assert all(f.metadata["why"] for f in fields(settings_class))
    assert parse(settings_class, "", ["--skip-bad"]).skip_bad is True
    assert parse(settings_class, "", ["--no-skip-bad"]).skip_bad is False
    with pytest.raises(InputError):
        parse(settings_class, "", ["--skip-bad", "False"])


@pytest.mark.parametrize("arguments, reason", [
    (["--seed", str(2**70)], f"--seed must be from 0 to 2^63 - 1, not {2**70}"),
    (["--lr", "nan"], "--lr must be at least 0, not nan"),
    (["--lr", "inf"], "--lr must be at least 0, not inf"),
    (["--max-length", "-1"], "--max-length must be at least 0, not -1"),
    (["--micro-batch-tokens", "0"], "--micro-batch-tokens must be auto, or a number from 1, not 0"),
    (["--micro-batch-tokens", "many"], "--micro-batch-tokens must be auto, or a number from 1, not many"),
    (["--micro-batch-size", "4"], "--micro-batch-size was replaced by --micro-batch-tokens"),
    (["--micro-batch-size=4"], "--micro-batch-size was replaced by --micro-batch-tokens"),
])  # fmt: skip
def test_values_out_of_range_are_refused_by_name(arguments, reason):
    with pytest.raises(InputError) as refusal:
        parse(train_dpo.Settings, "", arguments)
    assert reason in str(refusal.value)


def test_muon_is_for_whole_matrices(tmp_path):
    """Muon on a rank's part of a matrix is another update than on the matrix. And Muon stays with a model:
    AdamW's steps disturb weights that Muon has trained."""
    with pytest.raises(InputError, match="--optimizer must be adamw beside --shard, not muon"):
        train_sft.Settings(optimizer="muon", shard=True)
    model, precision = make_model(9), Precision("fp32", torch.device("cpu"))
    folders = {name: tmp_path / name for name in ("muon", "adamw", "other")}
    for name, folder in folders.items():
        save_model(folder, model, **({} if name == "other" else {"settings": {"optimizer": name}}))
    for options, expected in [
        ({"model": "tiny"}, "muon"), ({"model": "tiny", "shard": True}, "adamw"),
        ({"model": "tiny", "optimizer": "adamw"}, "adamw"), ({"model": folders["muon"]}, "muon"),
        ({"model": folders["muon"], "lora_rank": 2}, "adamw"), ({"model": folders["adamw"]}, "adamw"),
        ({"model": folders["other"]}, "adamw"), ({"model": folders["other"], "optimizer": "muon"}, "muon"),
    ]:  # fmt: skip
        settings = train_dpo.Settings(**{**options, "model": str(options["model"])})
        optimizer = make_optimizer(settings, model, precision)
        assert isinstance(optimizer, MuonWithAdamW) is (expected == "muon"), options
        assert settings.optimizer == expected, "config.json keeps the choice"


@pytest.mark.parametrize(
    "given, positions, window, expected",
    [(0, 32768, None, 4096), (0, 1024, None, 1024), (0, 32768, 2048, 2048), (300, 1024, None, 300)],
)
def test_the_length_limit_is_what_the_model_allows(given, positions, window, expected):
    """Without padding a long limit costs nothing, and 512 dropped a tenth of UltraFeedback."""
    config = ModelConfig(9, max_position_embeddings=positions, sliding_window=window)
    assert train_sft.Settings(max_length=given).length_limit(config) == expected


def test_advice_on_the_learning_rate():
    """The default is for the bundled model; a model of half a billion weights falls apart with it."""
    for script in SCRIPTS.values():
        assert learning_rate_advice(script.Settings(), 8_000_000) == ""
        assert "500,000,000" in learning_rate_advice(script.Settings(), 500_000_000)
        assert learning_rate_advice(script.Settings(lr=1e-6), 500_000_000) == ""
    assert learning_rate_advice(train_dpo.Settings(lora_rank=8), 500_000_000) == ""


def test_flags_are_no_abbreviations(tmp_path):
    """An abbreviated flag changes its meaning on the day that a longer one is added."""
    with pytest.raises(InputError, match="unrecognized"):
        parse(train_dpo.Settings, "", ["--bet", "1"])


# ---- the pages


def rows_of(settings_class, names) -> list[str]:
    def shown(value) -> str:
        if value == "":
            return ""
        return f"`{os.path.relpath(value, ROOT)}`" if str(value).startswith(str(ROOT)) else f"`{value}`"

    chosen = [f for f in fields(settings_class) if f.name in names]
    return [f"| `--{f.name.replace('_', '-')}` | {shown(f.default)} | {f.metadata['why']} |" for f in chosen]


def flag_tables() -> dict[str, str]:
    """The tables of docs/FLAGS.md: flags that mean the same in all scripts, then what each has of its own."""
    described = {
        name: {f.name: (f.default, f.metadata["why"]) for f in fields(script.Settings)}
        for name, script in SCRIPTS.items()
    }
    first, *others = described.values()
    shared = {name for name in first if all(first[name] == other.get(name) for other in others)}
    tables = {"all": rows_of(train_dpo.Settings, shared)}
    for name, script in SCRIPTS.items():
        tables[name] = rows_of(script.Settings, described[name].keys() - shared)
    return {
        name: "\n".join(["| flag | default | why |", "|---|---|---|", *rows]) for name, rows in tables.items()
    }


@pytest.mark.parametrize("table", ["all", *SCRIPTS])
def test_the_tables_of_flags_are_those_of_the_settings(table):
    """A table kept by hand drifts from the parser. When this fails, paste what it prints."""
    wanted = flag_tables()[table]
    assert wanted in FLAGS.read_text("utf-8"), f"docs/FLAGS.md lacks:\n{wanted}"


def test_the_page_of_objectives_lists_every_loss():
    """One row each, in the order of losses.py."""
    table = OBJECTIVES.read_text("utf-8").split("<!-- losses -->")[1].split("<!-- end -->")[0]
    assert re.findall(r"^\| `(\w+)` \|", table, re.M) == list(LOSSES)
