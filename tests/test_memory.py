"""Micro-batches by tokens: what `auto` is, and that results do not depend on it."""


import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

import train_dpo
from dataset.packing import build_stream
from dataset.store import open_store
from errors import InputError
from model.stream import TokenStream
from tests.conftest import make_model
from tests.loops import record_gradients
from tests.runs import PAIRS, assert_close, run_flags, same_model, stopped
from training import memory
from training.distributed import World
from training.precision import Precision

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
LONG = {"prompt": "Count. " * 40, "chosen": "1 2 3 " * 90, "rejected": "No. " * 60}


@pytest.fixture
def flags(tmp_path, tokenizer):
    """Flags of a run on ten short pairs and a long one."""
    made = run_flags(
        tmp_path, tokenizer, [*PAIRS, LONG], batch_size=6, epochs=2, warmup_steps=1, log_every=1
    )
    return lambda out="out", **changes: made(tmp_path / out, **changes)


# ---- the same result


@pytest.mark.parametrize("layout", ["forked", "twin"])
def test_the_result_does_not_depend_on_the_budget(layout, flags, monkeypatch):
    """Three budgets, the smallest below one record; no forward is longer, but for a record alone."""
    lengths = []
    made = train_dpo.micro_batches

    def noting(*arguments):
        for stream, last in made(*arguments):
            lengths.append((len(stream.tokens), stream.responses // 2))
            yield stream, last

    monkeypatch.setattr(train_dpo, "micro_batches", noting)
    steps = {}
    for most in (20, 150, 100_000):
        arguments = flags(str(most), micro_batch_tokens=most, layout=layout)
        lengths.clear()
        steps[most] = record_gradients(train_dpo, lambda given=arguments: train_dpo.main(given))
        assert all(tokens <= most or pairs == 1 for tokens, pairs in lengths)
        assert max(lengths)[0] > 800
    assert len(lengths) == len(steps[20]) == 4
    for most in (20, 150):
        assert_close(steps[most], steps[100_000], 2e-4)


# ---- auto on a CPU


def kept_by_autograd(model, stream) -> int:
    """The bytes that a forward keeps for backward, beside the weights."""
    parameters = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    storages = {}

    def note(tensor):
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage
        return tensor

    with saved_tensors_hooks(note, lambda tensor: tensor):
        output = model.hidden_of(stream)
    assert output.requires_grad
    return sum(storage.nbytes() for place, storage in storages.items() if place not in parameters)


@pytest.mark.parametrize("long", [False, True], ids=["short", "long"])
def test_bytes_per_token_are_those_that_backward_keeps(long, tokenizer, ragged, write_jsonl):
    """The formula against what autograd keeps: never less than three quarters, and not twice as much."""
    model = make_model(tokenizer.vocab_size, torch.float32, hidden_size=256, intermediate_size=704)
    path = write_jsonl("long.jsonl", [LONG, {**LONG, "rejected": "1 " * 700}]) if long else ragged
    store = open_store(path, "preferences", tokenizer, 4096)
    longest, rows = int(store.lengths.max()), [0, 1] if long else [*range(7)] * 5
    stream = build_stream(store, rows)
    kept = kept_by_autograd(model, stream)
    fitting = max(n for n in range(8) if memory.fitting_tokens(kept, model.config, longest) >= 2**n)
    per_token = 2 * (24 * 256 + 8 * 256 + 8 * 128 + 16 * 704 + 4 * 4 * max(256, longest))
    assert memory.fitting_tokens(per_token * 64, model.config, longest) == 64
    assert memory.fitting_tokens(per_token * 64 - 1, model.config, longest) == 32
    assert fitting == 7 and 0.75 < per_token * len(stream.tokens) / kept < 2


@pytest.fixture
def machine_memory(tmp_path, monkeypatch):
    """A function that sets the free memory of the machine, and the limit and use of its container, in MB."""
    monkeypatch.setattr(memory, "MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(memory, "CONTAINER", tmp_path)

    def write(free: float, limit: float | str = "max", used: float = 0) -> None:
        (tmp_path / "meminfo").write_text(f"MemTotal: 9 kB\nMemAvailable: {int(free * 1024)} kB\n")
        (tmp_path / "memory.max").write_text(limit if limit == "max" else str(int(limit * 2**20)))
        (tmp_path / "memory.current").write_text(str(int(used * 2**20)))

    return write


def test_auto_is_a_power_of_two_for_each_rank_of_a_node(tokenizer, ragged, monkeypatch, machine_memory):
    """A number that followed the free memory byte by byte would change the rounding from run to run.

    A token of this model takes 48 kB. Four ranks share a node; a container may allow less than is free.
    """
    model = make_model(tokenizer.vocab_size, hidden_size=256, intermediate_size=704)
    settings, found = train_dpo.Settings(), []
    store = open_store(ragged, "preferences", tokenizer, 512)
    monkeypatch.setattr(World, "largest", lambda world, number: number)
    machines = (1, 400), (1, 600), (4, 600), (1, 160_000), (1, 600, 300, 100), (1, 600, 100, 200)
    for ranks, *megabytes in machines:
        machine_memory(*megabytes)
        world = World(0, ranks, CPU, local_ranks=ranks)
        found.append(memory.micro_batch_tokens(settings, model, world, store, Precision("fp32", CPU)))
    assert found == [2048, 2048, 512, 16384, 1024, 1]
    machine_memory(400)
    one = World(0, 1, CPU)  # TDPO's second forward keeps as much as the first.
    assert memory.micro_batch_tokens(settings, model, one, store, Precision("fp32", CPU), forwards=2) == 1024


def test_auto_where_the_system_does_not_tell_its_memory(tmp_path, monkeypatch):
    """macOS has no /proc: 8 GB are taken to be free."""
    monkeypatch.setattr(memory, "MEMINFO", tmp_path / "none")
    monkeypatch.setattr(memory, "CONTAINER", tmp_path / "none")
    assert memory.free_memory(World(0, 1, CPU)) == 2**33


def test_a_given_number_is_taken(tokenizer):
    settings = train_dpo.Settings(micro_batch_tokens="777")
    world = World(0, 1, CPU)
    assert memory.micro_batch_tokens(settings, make_model(9), world, None, Precision("fp32", CPU)) == 777


def test_resuming_keeps_what_auto_was(flags, tmp_path, tokenizer, monkeypatch):
    """With other free memory other pairs would share a forward, and the weights differ in their last bits."""

    store = open_store(tmp_path / "pairs", "preferences", tokenizer, 4096)
    per_token = 2 * (24 * 16 + 8 * 16 + 8 * 8 + 16 * 24 + 4 * 4 * int(store.lengths.max()))

    def auto(tokens):
        monkeypatch.setattr(memory, "free_memory", lambda world: 4 * tokens * per_token)

    auto(128)
    train_dpo.main(flags("whole", save_every=2, max_steps=4))
    changes = {"save_every": 2, "max_steps": 4}
    stopped(train_dpo, flags("stopped", **changes), after=2)
    auto(4096)
    train_dpo.main(flags("stopped", **changes, resume=True))
    assert same_model(tmp_path / "whole", tmp_path / "stopped")


# ---- auto on CUDA: a trial, with a memory that is simulated


@pytest.fixture
def card(tokenizer, ragged, monkeypatch):
    """A function: `auto` on a card whose memory holds this many tokens, in forward or in backward."""
    monkeypatch.setattr(TokenStream, "to", lambda stream, device: stream)
    store = open_store(ragged, "preferences", tokenizer, 512)
    model = make_model(tokenizer.vocab_size, torch.float32)

    def auto(most: int, where="forward", batch_size=7, ranks=1):
        tried = []

        def trying(stream):
            tried.append(len(stream.tokens))
            logps = type(model).forward(model, stream)
            if len(stream.tokens) <= most:
                return logps
            if where == "forward":
                raise torch.OutOfMemoryError("CUDA out of memory")
            logps.register_hook(out_of_memory)
            return logps

        def out_of_memory(gradient):
            raise torch.OutOfMemoryError("CUDA out of memory")

        monkeypatch.setattr(model, "forward", trying)
        settings, world = train_dpo.Settings(batch_size=batch_size), World(0, ranks, CUDA)
        before = [p.clone() for p in model.parameters()]
        try:
            return memory.micro_batch_tokens(settings, model, world, store, Precision("fp32", CPU)), tried
        finally:
            assert all(p.grad is None for p in model.parameters())
            assert all(torch.equal(p, was) for p, was in zip(model.parameters(), before, strict=True))

    return auto


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_a_trial_halves_until_the_heaviest_fits(where, card):
    """The pairs have 34 to 85 tokens, 448 in all. Nothing of a failed trial may stay in the gradients."""
    tokens, tried = card(300, where)
    assert tokens == 256 and tried[0] == 448 and tried[-1] <= 256 and max(tried[:-1]) > 300
    assert card(448)[0] == 2**14
    assert card(100, batch_size=1) == (2**14, [85])  # No micro-batch has more pairs than a step.


def test_all_ranks_take_the_smallest(card, monkeypatch):
    """This rank has memory for all, and another one only for 130 tokens."""
    answers = iter([1] * 7 + [0])
    monkeypatch.setattr(World, "largest", lambda world, number: max(number, next(answers)))
    assert card(10_000, ranks=2)[0] == 128


def test_a_record_that_does_not_fit_names_the_flags_that_help(card):
    with pytest.raises(InputError, match="cached, --checkpoint-activations, --lora-rank, --shard"):
        card(80)
