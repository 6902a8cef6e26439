"""Where a process runs and how ranks meet: device, precision, process group, gradient exchange."""

import ctypes
import itertools
import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from functools import cached_property

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from errors import InputError, require

TIMEOUT = timedelta(minutes=10)  # the longest wait in an exchange of tensors
PATIENCE = timedelta(days=1)  # the longest wait for work that other ranks do alone
FAREWELL = 10  # seconds that the host of the store waits for the other ranks to leave


@dataclass(frozen=True)
class World:
    """This process among the ranks of a run."""

    rank: int
    ranks: int
    device: torch.device
    store: dist.Store | None = None  # key-value store of all ranks
    messages: Iterator[int] = field(default_factory=itertools.count)  # numbers of the keys in it
    local_rank: int = 0  # this process among the ranks of its node
    local_ranks: int = 1

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def is_node_main(self) -> bool:
        """Whether this is the first rank of its node, which writes to the node's disk."""
        return self.local_rank == 0

    @cached_property
    def mesh(self) -> DeviceMesh:
        """All ranks in one dimension: --shard splits a model among them."""
        return init_device_mesh(self.device.type, (self.ranks,))

    def sum(self, values: Tensor) -> Tensor:
        """Sum over all ranks, in place."""
        if self.ranks > 1:
            dist.all_reduce(values)
        return values

    def largest(self, number: int) -> int:
        """The largest of the ranks' numbers."""
        if self.ranks == 1:
            return number
        numbers = torch.tensor(number, device=self.device)
        dist.all_reduce(numbers, dist.ReduceOp.MAX)
        return int(numbers)

    def print(self, *words) -> None:
        """Print on the main rank."""
        if self.is_main:
            print(*words, flush=True)

    # ---- Work of one rank, for which the others wait without the time limit of an exchange

    def wait(self, failed: bool = False) -> None:
        """Return when every rank has called this function. With `failed` on one rank, the others exit."""
        if self.ranks == 1:
            return
        name = f"wait_{next(self.messages)}"
        if failed:
            self.store.set(name, "failed")
            return
        if self.store.add(f"{name}_ranks", 1) == self.ranks:
            self.store.set(name, "all")
        self.store.wait([name], PATIENCE)
        if self.store.get(name) == b"failed":
            raise SystemExit(2)  # The failed rank prints the error.

    def from_main(self, function):
        """The result of `function()` on the main rank, on every rank, through JSON. If it fails, all exit."""
        name, message = f"from_main_{next(self.messages)}", ""
        if self.is_main:
            try:
                result = function()
                message = json.dumps(result)
            finally:
                if self.ranks > 1:
                    self.store.set(name, message)
            return result
        self.store.wait([name], PATIENCE)
        if not (result := self.store.get(name)):
            raise SystemExit(2)  # The main rank prints the error.
        return json.loads(result)

    def node_first(self, function):
        """`function()` on the main rank, then on the first rank of each other node, then on all others.

        For a function that writes a file unless it is there: each node may have a disk of its own, and ranks
        look for the file only when it is there. If the function fails on a rank, all exit.
        """
        turn = 0 if self.is_main else 1 if self.is_node_main else 2
        for now in range(3):
            failed = True
            try:
                if now == turn:
                    result = function()
                failed = False
            finally:
                self.wait(failed)
        return result


@contextmanager
def join(device: str):
    """Join the process group of torchrun, or of another launcher; yield this process's `World`.

    A launcher sets RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT, and on several nodes LOCAL_RANK and
    LOCAL_WORLD_SIZE. torchrun also hosts the store in which ranks meet; otherwise rank 0 hosts it.
    """
    ranks, rank = environment_number("WORLD_SIZE", 1), environment_number("RANK", 0)
    local_ranks = environment_number("LOCAL_WORLD_SIZE", ranks)
    local_rank = environment_number("LOCAL_RANK", rank)
    here = pick_device(device, local_rank)
    if here.type == "cpu":
        keep_freed_memory()
    if ranks == 1:
        yield World(0, 1, here)
        return
    hosted = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    store = connect(ranks, hosting=rank == 0 and not hosted)
    backend = "nccl" if here.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=ranks, timeout=TIMEOUT)
    try:
        yield World(rank, ranks, here, store, local_rank=local_rank, local_ranks=local_ranks)
    finally:
        dist.destroy_process_group()
        if not hosted:
            leave(store, rank, ranks)


def environment_number(name: str, default: int) -> int:
    """A whole number from an environment variable of the launcher."""
    value = os.environ.get(name, str(default))
    if not value.isdecimal():
        raise InputError(f"environment variable {name}: expected a whole number, found {value!r}")
    return int(value)


def connect(ranks: int, hosting: bool) -> dist.Store:
    """The store of all ranks at MASTER_ADDR:MASTER_PORT; with `hosting` this process opens it."""
    host, port = os.environ.get("MASTER_ADDR"), environment_number("MASTER_PORT", 0)
    unset = f"WORLD_SIZE is {ranks}, but MASTER_ADDR or MASTER_PORT is not set: start the ranks with torchrun"
    require(host and port, unset)
    try:
        store = dist.TCPStore(host, port, ranks, is_master=hosting, timeout=TIMEOUT)
    except dist.DistError as error:
        reason = str(error).partition("\n")[0]
        where = f"MASTER_ADDR {host}, MASTER_PORT {port}"
        raise InputError(f"{where}: ranks cannot meet there ({reason})") from None
    # A new prefix for each attempt: after a restart the store still contains the addresses of the dead
    # workers, and gloo would wait for them.
    return dist.PrefixStore(f"attempt_{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)


def leave(store: dist.Store, rank: int, ranks: int) -> None:
    """Let rank 0, which hosts the store, wait for the others: they may still read messages."""
    store.add("left", 1)
    deadline = time.monotonic() + FAREWELL
    while rank == 0 and store.add("left", 0) < ranks and time.monotonic() < deadline:
        time.sleep(0.01)


def pick_device(name: str, local_rank: int = 0) -> torch.device:
    """The device of --device; ``auto``: CUDA, else MPS, else the CPU. Each rank of a node has its own GPU."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if name == "cuda":
        devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
        require(devices > 0, "--device cuda: torch found no CUDA device")
        advice = "start one rank for each device, and on several nodes set LOCAL_RANK"
        many = f"--device cuda: this node has {devices} CUDA devices, and more ranks; {advice}"
        require(local_rank < devices, many)
        torch.cuda.set_device(local_rank)
        return torch.device("cuda", local_rank)
    if name == "mps" and not torch.backends.mps.is_available():
        raise InputError("--device mps: torch found no Apple GPU")
    return torch.device(name)


def keep_freed_memory() -> None:
    """Let this process keep the memory of freed tensors for the next ones.

    By default glibc returns large blocks to the kernel, which provides them again page by page, filled with
    zeros: a tenth of a step's time on a CPU. On GPUs torch's caching allocator does the same.
    """
    trim_threshold, mmap_threshold = -1, -3  # the numbers of <malloc.h>
    if sys.platform == "linux" and (mallopt := getattr(ctypes.CDLL(None), "mallopt", None)):
        mallopt(trim_threshold, 2**31 - 1)
        mallopt(mmap_threshold, 2**30)


def first_device(world: World, shard: bool) -> torch.device:
    """The device on which a model is loaded before `wrap`; on "meta" it has shapes and no memory.

    A model that will be split is loaded on the main rank's CPU only.
    """
    if world.ranks == 1 or not shard:
        return world.device
    return torch.device("cpu" if world.is_main else "meta")


def wrap(model: nn.Module, world: World, shard: bool = False) -> nn.Module:
    """The model for training on all ranks: itself on one rank, else with DDP, or split among the ranks.

    With `shard` each rank keeps a part of every weight, gradient and moment (ZeRO, arXiv 1910.02054; torch's
    FSDP2), and `model` itself is changed and returned. A layer is gathered for its forward and again for its
    backward. The weights come from the main rank, one after another, so a GPU never holds the whole model.
    """
    if world.ranks == 1:
        return model.to(world.device)
    if not shard:
        trained = any(weight.requires_grad for weight in model.parameters())
        return DistributedDataParallel(model) if trained else model  # A reference has no gradients.
    world.wait()  # The main rank may have loaded for longer than the time limit of an exchange.
    whole = model.state_dict() if world.is_main else {}
    model.to("meta")
    # Weights outside the layers, such as the embedding, are a group of their own. It is freed after a forward
    # like every group, so that all weights, also a reference's, are split between two forwards.
    for module in (*model.layers, model):
        fully_shard(module, mesh=world.mesh, reshard_after_forward=True)
    model.to_empty(device=world.device)
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(model, whole, options=options)
    return model


def exchange_gradients(model: nn.Module, when: bool) -> None:
    """Average the gradients of the next backward over the ranks, or leave that to a later micro-batch.

    Call it before the forward, which prepares the exchange. Split weights (--shard) are exchanged in every
    micro-batch: to wait would be to keep whole gradients meanwhile.
    """
    if isinstance(model, DistributedDataParallel):
        model.require_backward_grad_sync = when


@contextmanager
def unsharded(model: nn.Module) -> Iterator[None]:
    """Within, the embeddings, the last norm and the head of a split model are whole on every rank.

    A method of the model other than forward needs this. The layers gather their own weights when called.
    """
    if isinstance(model, FSDPModule):
        model.unshard()
    try:
        yield
    finally:
        if isinstance(model, FSDPModule):
            model.reshard()


@contextmanager
@torch.no_grad()
def gathered(model: nn.Module, world: World) -> Iterator[None]:
    """Within, the main rank has the whole weights of a split model, on its CPU. Every rank must call this."""
    split = []
    for module in model.modules():
        for name, weight in list(module.named_parameters(recurse=False)):
            if isinstance(weight, DTensor):
                whole = weight.full_tensor()
                if world.is_main:
                    split.append((module, name, weight))
                    setattr(module, name, nn.Parameter(whole.cpu(), requires_grad=False))
    try:
        yield
    finally:
        for module, name, weight in split:
            setattr(module, name, weight)
