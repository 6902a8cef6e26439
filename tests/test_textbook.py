"""docs/textbook.py against the real loop: the stream and the padded rectangle are one computation."""

import pytest
import torch
from torch.utils.data import DataLoader

import train_dpo
from dataset.packing import Windows, build_stream
from dataset.store import open_store
from docs import textbook
from losses import sigmoid
from model.weights import load_model
from tests.conftest import MODEL_OPTIONS, make_model
from tests.loops import metrics, record_gradients, weights
from tests.runs import PAIRS, assert_close, run_flags
from training.schedule import adamw


@pytest.mark.parametrize("options", ["plain", "all", "one_key_head"])
def test_loss_and_gradients_equal_the_streams(options, tokenizer, ragged):
    """In float64 nothing but rounding may differ: not the shift, the mask, nor the padding."""
    policy, reference = (make_model(tokenizer.vocab_size, seed=s, **MODEL_OPTIONS[options]) for s in (1, 2))
    ids, mask = textbook.collate(textbook.read_pairs(ragged, tokenizer))
    loss = textbook.dpo_loss(policy, reference, ids, mask, beta=0.3)
    loss.backward()
    got = [p.grad.clone() for p in policy.parameters()]
    policy.zero_grad()
    store = open_store(str(ragged), "preferences", tokenizer, 512)
    stream = build_stream(store, range(len(store)))
    with torch.no_grad():
        reference_chosen, reference_rejected = stream.sum_by_side(reference(stream))
    chosen, rejected = stream.sum_by_side(policy(stream))
    want = sigmoid((chosen - reference_chosen) - (rejected - reference_rejected), 0.3).mean()
    want.backward()
    assert loss.item() == pytest.approx(want.item(), abs=1e-12)
    for gradient, parameter in zip(got, policy.parameters(), strict=True):
        torch.testing.assert_close(gradient, parameter.grad, rtol=1e-9, atol=1e-12)


def test_a_scored_prompt_cancels_in_the_margin(tokenizer, ragged):
    """docs/TOUR.md states it: both answers have the same prompt, so only the rewards would be wrong."""
    policy, reference = (make_model(tokenizer.vocab_size, seed=seed) for seed in (1, 2))
    ids, mask = textbook.collate(textbook.read_pairs(ragged, tokenizer))
    to_the_last = mask | (mask.int().flip(1).cummax(1).values.flip(1) > 0)  # from index 0 to the last scored
    assert to_the_last.sum() > mask.sum()
    both = mask, to_the_last
    losses = [textbook.dpo_loss(policy, reference, ids, each, beta=0.3).item() for each in both]
    assert losses[0] == pytest.approx(losses[1], abs=1e-9)
    logps = [textbook.answer_logps(policy, ids, each) for each in both]
    assert (logps[1] < logps[0]).all()


def test_three_steps_equal_those_of_the_real_loop(tokenizer, tmp_path, monkeypatch):
    """The page is a bridge only if both loops arrive at the same weights."""
    of = run_flags(tmp_path, tokenizer)
    flags = of(tmp_path / "run", max_steps=3, warmup_steps=2, optimizer="adamw", log_every=1)
    theirs = record_gradients(train_dpo, lambda: train_dpo.main(flags))

    policy = load_model(tmp_path / "start")
    windows = Windows(len(PAIRS), 4, seed=0)
    batches = [windows[step].tolist() for step in range(3)]
    pairs = textbook.read_pairs(tmp_path / "pairs", tokenizer)
    loader = DataLoader(pairs, batch_sampler=batches, collate_fn=textbook.collate)
    ours, losses = [], []
    clip, dpo_loss = torch.nn.utils.clip_grad_norm_, textbook.dpo_loss

    def clip_and_keep(parameters, longest):
        in_order = [p for group in adamw(policy, 0.0).param_groups for p in group["params"]]
        ours.append([p.grad.clone() for p in in_order])
        return clip(parameters, longest)

    def loss_and_keep(*arguments):
        losses.append(loss := dpo_loss(*arguments))
        return loss

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", clip_and_keep)
    monkeypatch.setattr(textbook, "dpo_loss", loss_and_keep)
    textbook.train(policy, loader, beta=0.1, lr=1e-3, warmup_steps=2, total_steps=3)

    logged = [row["loss"] for row in metrics(tmp_path / "run") if "loss" in row]
    assert [loss.item() for loss in losses] == pytest.approx(logged, abs=1e-6)
    assert losses[-1].item() < losses[0].item() - 1e-3, "three steps without an effect compare nothing"
    assert_close(ours, theirs)
    trained = weights(tmp_path / "run")
    for name, weight in policy.state_dict().items():
        torch.testing.assert_close(weight, trained[name], rtol=1e-4, atol=2e-6)
