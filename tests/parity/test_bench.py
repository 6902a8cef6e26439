"""The benchmark's implementations compute one thing. Run by `make parity`."""

import math
from dataclasses import replace

import pytest
import torch

pytest.importorskip("trl", reason="the extra `parity` is not installed")

from bench import peers, run, work

CASE = replace(work.QUICK["tiny"], pairs=2, steps=1)
ON_A_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
DEVICES = ["cpu", pytest.param("cuda", marks=ON_A_GPU)]
IN_BF16 = ["TRL, defaults", "textbook, padded", "ours, forked live"]


@pytest.mark.parametrize("device", DEVICES)
def test_all_agree_on_the_loss(device):
    """`check` refuses to time what differs; and the loss is none that equal models would have."""
    losses = run.check(CASE, device)
    assert set(losses) == {"TRL", "textbook", "ours, forked", "ours, twin"}
    assert max(losses.values()) - min(losses.values()) < 1e-4
    assert abs(losses["TRL"] - math.log(2)) > 0.01


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "name, precision", [(name, "fp32") for name in run.IMPLEMENTATIONS] + [(name, "bf16") for name in IN_BF16]
)
def test_every_implementation_runs(name, precision, device):
    """One timed step each; the reference is asked beforehand where the name says so."""
    if name == run.FUSED and device == "cpu":
        pytest.skip("FlexAttention has no backward but on CUDA")
    how = ["--steps", "1", "--device", device, "--precision", precision, "--worker", name]
    result = run.worker(["--quick", "--cases", "tiny", "--pairs", "2", *how], 1)
    assert result["seconds"] > 0 and result["peak_bytes"] > (1e8 if device == "cpu" else 1e6)
    assert (result["reference"] > 0) == ("cached" in name or name == "TRL, best")
    assert result["loss"] == pytest.approx(math.log(2), abs=0.1)
    if not name.endswith("auto"):
        assert result["precision"] == ("bf16" if name == "TRL, as shipped" else precision)


def test_trl_may_take_several_forwards_a_step(tmp_path):
    """Its optimizer steps, and what it says of them, stay the same but for rounding."""
    losses = []
    for forward in (0, 2):
        case = replace(CASE, pairs=4, steps=2, forward=forward)
        said = {}
        where = "cpu", "fp32", said.update
        peers.train_trl(case, tmp_path, work.make_pairs(case), work.make_model(case), "defaults", *where)
        losses.append(said["loss"])
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
