"""The benchmark's implementations compute one thing. Run by `make parity`."""

import math
from dataclasses import replace

import pytest

pytest.importorskip("trl", reason="the extra `parity` is not installed")

from bench import run, work

CASE = replace(work.QUICK["tiny"], pairs=2, steps=1)


def test_all_agree_on_the_loss():
    """`check` refuses to time what differs; and the loss is none that equal models would have."""
    losses = run.check(CASE)
    assert set(losses) == {"TRL", "textbook", "ours, forked", "ours, twin"}
    assert max(losses.values()) - min(losses.values()) < 1e-4
    assert abs(losses["TRL"] - math.log(2)) > 0.01


@pytest.mark.parametrize("name", run.IMPLEMENTATIONS)
def test_every_implementation_runs(name):
    """One timed step each; the reference is asked beforehand where the name says so."""
    result = run.worker(["--quick", "--cases", "tiny", "--pairs", "2", "--steps", "1", "--worker", name], 1)
    assert result["seconds"] > 0 and result["peak_bytes"] > 1e8
    assert (result["reference"] > 0) == ("cached" in name or name == "TRL, best")
    assert result["loss"] == pytest.approx(math.log(2), abs=0.1)
