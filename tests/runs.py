"""Tiny training runs: their data, their command lines, a run that is killed, the comparison of two runs."""

import json
from pathlib import Path

import pytest
import torch

from tests.conftest import save_folder
from tests.faults import Keeping
from training.distributed import World
from training.precision import Precision
from training.settings import parse

ALONE = World(0, 1, torch.device("cpu"))
FP32 = Precision("fp32", ALONE.device)

PAIRS = [
    {
        "prompt": "Hi!" * (i % 4 + 1),
        "chosen": "Hello, " * (i % 5 + 1) + "you.",
        "rejected": f"No{'!' * (i % 3)} {i}",
    }
    for i in range(10)
]
CHATS = [{"prompt": "Count " * (i % 3 + 1), "response": "1 2 " * (i % 6 + 1)} for i in range(10)]


def command_line(**flags) -> list[str]:
    """Keywords to flags: ``lr=1e-3`` to ``--lr 1e-3``, ``skip_bad=True`` to ``--skip-bad``."""
    arguments = []
    for name, value in flags.items():
        name = f"--{name.replace('_', '-')}"
        arguments += [name] if value is True else [name, str(value)]
    return arguments


def run_flags(folder: Path, tokenizer, pairs=PAIRS, shape=None, **defaults):
    """A model, pairs and chats in the folder, and a function that returns the flags of a run on them.

    `eval_data=True` evaluates on the data that the run trains on.
    """
    save_folder(folder / "start", tokenizer, **(shape or {}))
    for name, rows in (("pairs", pairs), ("chats", CHATS)):
        (folder / name).write_text("".join(f"{json.dumps(row)}\n" for row in rows))

    def of(out, data="pairs", **changes) -> list[str]:
        settings = {
            "model": folder / "start", "data": folder / data, "eval_data": "", "batch_size": 4, "lr": 1e-3,
            "device": "cpu", "precision": "fp32", **defaults, **changes,
        }  # fmt: skip
        if settings["eval_data"] is True:
            settings["eval_data"] = settings["data"]
        return command_line(out=out, **settings)

    return of


def stopped(module, arguments: list[str], after: int) -> None:
    """Start a run and end it after so many steps as a kill would."""

    class Stopping(Keeping):
        def save_when_due(self, step):
            super().save_when_due(step)
            if step == after:
                raise KeyboardInterrupt

    settings = parse(module.Settings, "", arguments)
    with pytest.raises(KeyboardInterrupt), Stopping(settings, ALONE) as run:
        module.train(settings, ALONE, run)


def same_model(one: Path, other: Path) -> bool:
    """Whether two run folders have the same weights, to the bit."""
    return (one / "model.pt").read_bytes() == (other / "model.pt").read_bytes()


def assert_close(got, want, tolerance=2e-5):
    """Gradients of steps that are equal up to rounding, relative to the largest one of each tensor."""
    assert len(got) == len(want)
    for got_step, want_step in zip(got, want, strict=True):
        for a, b in zip(got_step, want_step, strict=True):
            assert (a - b).abs().max() <= tolerance * b.abs().max().clamp(min=1e-3)
