"""Ranks of several nodes: who writes to a node's disk, and how ranks wait and meet."""

import threading

import pytest
import torch
import torch.distributed as dist

from errors import InputError
from tests.ranks import forked, free_port
from tests.runs import run_flags, same_model
from training import distributed
from training.distributed import World, join


def on_threads(ranks: int, local_ranks: int, function) -> list:
    """The results of `function(world)` on this many ranks: threads with a store, and no process group."""
    store, results = dist.HashStore(), [None] * ranks

    def run(rank: int) -> None:
        local = {"local_rank": rank % local_ranks, "local_ranks": local_ranks}
        try:
            results[rank] = function(World(rank, ranks, torch.device("cpu"), store, **local))
        except BaseException as error:
            results[rank] = error

    threads = [threading.Thread(target=run, args=(rank,), daemon=True) for rank in range(ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    return results


def test_the_first_rank_of_each_node_goes_before_the_others():
    """With disks of their own, ranks of other nodes would not find what rank 0 alone has written."""
    order = []
    found = on_threads(6, 2, lambda world: world.node_first(lambda: order.append(world.rank) or world.rank))
    assert found == [*range(6)]
    assert order[0] == 0 and {*order[1:3]} == {2, 4} and {*order[3:]} == {1, 3, 5}


@pytest.mark.parametrize("failing", [0, 2, 3])
def test_when_one_rank_fails_all_leave(failing):
    """Otherwise the others wait for a day, and only the failed rank knows why."""

    def function(world):
        if world.rank == failing:
            raise InputError("line 7: not JSON")
        return world.rank

    found = on_threads(4, 2, lambda world: world.node_first(lambda: function(world)))
    assert isinstance(found.pop(failing), InputError)
    assert [type(error) for error in found] == [SystemExit] * 3 and {error.code for error in found} == {2}


def test_waiting_is_not_an_exchange(monkeypatch):
    """An exchange gives up after ten minutes, and a large file takes longer to tokenise."""
    monkeypatch.setattr(dist, "barrier", lambda: pytest.fail("a wait with the time limit of an exchange"))
    assert on_threads(3, 3, lambda world: world.wait()) == [None] * 3


@pytest.fixture
def flags(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setenv("MINIDPO_CACHE", str(tmp_path / "cache"))
    made = run_flags(tmp_path, tokenizer, eval_data=True, reference="cached")
    return lambda out: made(tmp_path / out)


def test_nodes_may_have_a_cache_each(flags, tmp_path):
    """Only the first node wrote the cached reference; the others stopped after the whole pass."""
    result = forked("tests.nodes", "nodes", "train_dpo", *flags("two"), ranks=2)
    assert result.returncode == 0, result.stderr
    found = [sorted((tmp_path / "cache" / str(node)).glob("*/*")) for node in (0, 1)]
    files = [{(file.parent.name, file.name): file.read_bytes() for file in each} for each in found]
    assert files[0] == files[1] and any(name.startswith("reference-") for _, name in files[0])


def test_ranks_of_a_plain_launcher_meet(flags, tmp_path):
    """RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT alone: nobody hosted the store, for ten minutes."""
    for out, how in (("nodes", "nodes"), ("plain", free_port())):
        result = forked("tests.nodes", how, "train_dpo", *flags(out), ranks=2, seconds=60)
        assert result.returncode == 0, result.stderr
    assert same_model(tmp_path / "nodes", tmp_path / "plain")


def test_a_plain_launcher_that_fails_is_one_line_on_each_rank(flags):
    """Rank 0 hosts the store; were it to leave at once, the other rank would end in a traceback."""
    arguments = [*flags("out"), "--data", "/nowhere"]
    result = forked("tests.nodes", free_port(), "train_dpo", *arguments, ranks=2, seconds=60)
    assert result.returncode == 2
    assert "/nowhere" in result.stderr and "Traceback" not in result.stderr


@pytest.mark.parametrize("environment, reason", [
    ({"WORLD_SIZE": "2", "RANK": "0"}, "MASTER_ADDR or MASTER_PORT is not set"),
    ({"WORLD_SIZE": "two"}, "WORLD_SIZE: expected a whole number, found 'two'"),
])  # fmt: skip
def test_a_launcher_that_sets_too_little_is_told(environment, reason, monkeypatch):
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=reason), join("cpu"):
        pass


def test_more_ranks_than_cards_are_refused(monkeypatch):
    """Two ranks would share one GPU, or torch would name an invalid device."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(InputError, match="this node has 2 CUDA devices, and more ranks"):
        distributed.pick_device("cuda", local_rank=2)
