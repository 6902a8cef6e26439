"""The benchmark gives everyone the same work and counts it right. Times are nobody's test."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from bench import work
from dataset.packing import LAYOUTS, Windows, build_stream
from model.transformer import ModelConfig

CASE = work.Case(work.TINY, 300, 400, pairs=3, steps=2)


def test_pairs_fit_repeat_and_come_in_our_order():
    """TRL and the textbook get the pairs of a step in the order in which train_dpo.py takes them."""
    pairs = work.synthetic_pairs(CASE)
    assert len(pairs) == 9
    for pair, again in zip(pairs, work.synthetic_pairs(CASE), strict=True):
        assert all((a == b).all() for a, b in zip(pair, again, strict=True))
    longest = [len(p) + max(len(c), len(r)) for p, c, r in pairs]
    assert max(longest) <= 400
    windows = Windows(9, 3, seed=0)
    assert CASE.windows == [windows[step].tolist() for step in range(3)]
    assert sorted(work.timed(CASE) + CASE.windows[0]) == list(range(9))
    assert max(longest[row] for row in CASE.windows[0]) <= 2 * 55  # The step to warm up is a short one.


def test_the_store_is_the_pairs(tmp_path):
    """Ours reads ids from a store; it must hold what the others are given."""
    pairs = work.synthetic_pairs(CASE)
    store = work.write_store(tmp_path, pairs)
    assert len(store) == 9
    for row, (prompt, chosen, rejected) in enumerate(pairs):
        for ids, (kept, supervised), answer in zip(
            (prompt, chosen, rejected), store.row(row), (False, True, True), strict=True
        ):
            assert kept.tolist() == ids.tolist() and (supervised == answer).all()
        assert store.targets[row] == len(chosen) + len(rejected)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_flops_are_those_that_torch_counts(layout, tmp_path):
    """Torch counts every product that is made; what a mask then hides is not counted by us."""
    store = work.write_store(tmp_path, work.synthetic_pairs(CASE))
    stream, model = build_stream(store, range(9), layout), work.make_model(CASE)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(stream)
    config = ModelConfig(CASE.vocabulary, **CASE.shape)
    hidden = sum(int(block.bias.isinf().sum()) for block in stream.blocks)
    wasted = 4 * config.num_attention_heads * config.head_dim * hidden * config.num_hidden_layers
    assert work.forward_flops(config, stream) == counter.get_total_flops() - wasted


def test_each_switch_saves_and_the_last_is_the_floor(tmp_path):
    """Counted twice: from the streams of the timed rows, and from lengths alone."""
    store = work.write_store(tmp_path, work.synthetic_pairs(CASE))
    counted = list(work.switches(CASE).values())
    assert counted == sorted(counted, reverse=True) and len(set(counted)) == 6
    assert counted[-1] == work.run_flops(CASE, store)


def test_a_moved_model_is_another():
    """With equal models every loss is ln 2, and no comparison of losses could fail."""
    one, same, moved = (work.make_model(CASE, seed) for seed in (0, 0, 1))
    assert torch.equal(one.norm.weight, same.norm.weight)
    assert not torch.equal(one.norm.weight, moved.norm.weight)
