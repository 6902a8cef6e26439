"""What needs a GPU: the fused attention's gradients, and the three precisions through the whole loop."""

import math

import pytest
import torch

import train_dpo
from dataset.packing import LAYOUTS, build_stream
from dataset.store import open_store
from tests.conftest import make_model, save_folder
from tests.loops import metrics

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_fused_attention_has_the_gradients_of_twin(layout, tokenizer, ragged):
    """In float32, against the textbook layout with attention written out."""
    store = open_store(ragged, "preferences", tokenizer, max_length=512)
    found = []
    for fused, how in ((False, "twin"), (True, layout)):
        model = make_model(tokenizer.vocab_size, torch.float32, hidden_size=64).cuda()
        if fused:
            model.fuse_attention(torch.device("cuda"))
        stream = build_stream(store, range(7), how).to("cuda")
        sums = stream.sum_by_response(model(stream))
        (sums @ torch.linspace(-1, 2, len(sums), device="cuda")).backward()
        found.append([sums.detach(), *(p.grad for p in model.parameters())])
    for plain, fused in zip(*found, strict=True):
        torch.testing.assert_close(fused, plain, rtol=1e-3, atol=1e-3 * plain.abs().max().item())


@pytest.mark.parametrize("flags", [[], ["--fused-attention"]], ids=["blocks", "fused"])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_dpo_trains(precision, flags, tokenizer, ragged, tmp_path):
    """The first loss is ln 2, since policy and reference are one; then it falls."""
    save_folder(tmp_path / "start", tokenizer, hidden_size=64)
    train_dpo.main(
        ["--model", str(tmp_path / "start"), "--data", str(ragged), "--eval-data", "", "--device", "cuda",
         "--out", str(tmp_path / "dpo"), "--precision", precision, "--batch-size", "7", "--epochs", "20",
         "--log-every", "1", "--lr", "1e-3", "--warmup-steps", "0", *flags]
    )  # fmt: skip
    losses = [row["loss"] for row in metrics(tmp_path / "dpo")]
    assert losses[0] == pytest.approx(math.log(2), abs=1e-6) and losses[-1] < 0.5
