"""Where a process runs and how ranks meet: device, precision, process group, gradient exchange."""

import ctypes
import itertools
import json
import os
import sys
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

from errors import InputError

TIMEOUT = timedelta(minutes=10)  # A rank that waits longer than this in an exchange gives up.
PATIENCE = timedelta(days=1)  # How long the others wait for what only the main rank does.


@dataclass(frozen=True)
class World:
    """This process among the ranks."""

    rank: int
    ranks: int
    device: torch.device
    store: dist.Store | None = None  # where ranks leave messages for one another
    messages: Iterator[int] = field(default_factory=itertools.count)
    local_rank: int = 0  # this process among the ranks of its machine
    local_ranks: int = 1

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @cached_property
    def mesh(self) -> DeviceMesh:
        """All ranks in a row, among which --shard splits a model."""
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

    def wait(self) -> None:
        if self.ranks > 1:
            dist.barrier()

    def print(self, *words) -> None:
        if self.is_main:
            print(*words, flush=True)

    def from_main(self, function):
        """What `function()` returns on the main rank, on every rank, through JSON. If it fails, all leave.

        The others wait for as long as it takes, which is long for a large data file. Should the main rank
        die, torchrun ends them.
        """
        name = f"from_main_{next(self.messages)}"
        if not self.is_main:
            self.store.wait([name], PATIENCE)
            if not (said := self.store.get(name)):
                raise SystemExit(2)  # The main rank says why.
            return json.loads(said)
        said = ""
        try:
            result = function()
            said = json.dumps(result)
        finally:
            if self.ranks > 1:
                self.store.set(name, said)
        return result

    def main_first(self, function):
        """`function()` on the main rank, then on the others, which find on disk what it left there."""
        kept = []
        self.from_main(lambda: kept.append(function()))
        return kept[0] if self.is_main else function()


@contextmanager
def join(device: str):
    """Join the process group that torchrun set up, if it did, and leave it in the end. Yields a `World`."""
    ranks, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    local_rank = int(os.environ.get("LOCAL_RANK", rank))
    local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", ranks))
    here = pick_device(device)
    if here.type == "cpu":
        keep_freed_memory()
    if ranks == 1:
        yield World(0, 1, here)
        return
    # A prefix of its own for each attempt: after a restart the store still holds the addresses of the
    # workers that died, and gloo would wait for them.
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(host, port, ranks, is_master=False, timeout=TIMEOUT)
    store = dist.PrefixStore(f"attempt_{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    backend = "nccl" if here.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=ranks, timeout=TIMEOUT)
    try:
        yield World(rank, ranks, here, store, local_rank=local_rank, local_ranks=local_ranks)
    finally:
        dist.destroy_process_group()


def pick_device(name: str) -> torch.device:
    """``auto`` is CUDA, then MPS, then the CPU. Under torchrun each rank has a card of its own."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if name == "cuda":
        if not torch.cuda.is_available():
            raise InputError("--device cuda: this torch sees no CUDA device")
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
        return device
    if name == "mps" and not torch.backends.mps.is_available():
        raise InputError("--device mps: this torch sees no Apple GPU")
    return torch.device(name)


def keep_freed_memory() -> None:
    """Let this process keep the memory that tensors free, for the next ones.

    By default glibc hands large blocks back to the kernel, which hands them out again page by page, filled
    with zeros: a tenth of a step's time on a CPU. GPUs have torch's caching allocator for that.
    """
    trim_threshold, mmap_threshold = -1, -3  # as <malloc.h> numbers them
    if sys.platform == "linux" and (mallopt := getattr(ctypes.CDLL(None), "mallopt", None)):
        mallopt(trim_threshold, 2**31 - 1)
        mallopt(mmap_threshold, 2**30)


def first_device(world: World, shard: bool) -> torch.device:
    """Where a model is made before `wrap`: on "meta" it is shapes alone, without memory.

    What is to be split is whole on the main rank's CPU and nowhere else.
    """
    if world.ranks == 1 or not shard:
        return world.device
    return torch.device("cpu" if world.is_main else "meta")


def wrap(model: nn.Module, world: World, shard: bool = False) -> nn.Module:
    """The model as ranks train it together. A single rank holds all of it in any case.

    With `shard` each rank keeps its part of every weight, and so of gradients and of what the optimizer
    remembers (ZeRO, arXiv 1910.02054; torch's FSDP2). A layer is put together for its forward, and once more
    for its backward; `model` and what is returned are then one and the same. What is in it comes from the
    main rank, weight by weight, so that no card ever holds it whole.
    """
    if world.ranks == 1:
        return model.to(world.device)
    if not shard:
        trained = any(weight.requires_grad for weight in model.parameters())
        return DistributedDataParallel(model) if trained else model  # A reference has nothing to exchange.
    world.from_main(lambda: None)  # It may have loaded for longer than an exchange waits.
    whole = model.state_dict() if world.is_main else {}
    model.to("meta")
    # The rest of the model, embeddings above all, is a group of its own, which is let go after a forward
    # like any other: so weights are split wherever one looks at them, a reference's too.
    for module in (*model.layers, model):
        fully_shard(module, mesh=world.mesh, reshard_after_forward=True)
    model.to_empty(device=world.device)
    set_model_state_dict(
        model, whole, options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    )
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


@torch.no_grad()
def gather(model: nn.Module, world: World) -> None:
    """After training, put a split model together, on the main rank's CPU. Every rank must call it."""
    for module in model.modules():
        for name, weight in list(module.named_parameters(recurse=False)):
            if isinstance(weight, DTensor):
                whole = weight.full_tensor()
                if world.is_main:
                    setattr(module, name, nn.Parameter(whole.cpu(), requires_grad=False))
