"""Checkpoints of a model that is split among ranks: each writes its part, any number can read them.

    OUT/checkpoints/00000120-<SHA-256 of state.pt>.shards/
        state.pt          small values, the shapes of split tensors, and the SHA-256 of every other file
        metadata.pt       the place of each part of each tensor, by torch.distributed.checkpoint (DCP)
        __0_0.distcp …    the parts of rank 0, …

The name of the folder contains the digest of state.pt, so it covers all files. They are on the disk before
the folder is renamed to that name, which makes the checkpoint valid. DCP would pickle its metadata, and
unpickling can run code; here metadata are written and read like weights.
"""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import filesystem, metadata
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor, empty

from errors import InputError
from files import file_hash, sync, unwritable, write_whole
from training.distributed import World

STATE, METADATA = "state.pt", "metadata.pt"
# The classes of DCP's metadata, plain records. BytesStorageMetadata is left out on purpose: it stands for an
# object that is not a tensor, which DCP would unpickle.
RECORDS = [
    metadata.ChunkStorageMetadata,
    metadata.Metadata,
    metadata.MetadataIndex,
    metadata.TensorProperties,
    metadata.TensorStorageMetadata,
    metadata._MEM_FORMAT_ENCODING,
    filesystem._StorageInfo,
]


class Writer(dcp.FileSystemWriter):
    """DCP's writer, with metadata that are not pickled, and the system's reason if the disk fails."""

    def write_data(self, plan, planner):
        try:
            return super().write_data(plan, planner)
        except (OSError, RuntimeError) as error:
            raise unwritable(self.path, error) from None

    def finish(self, metadata, results) -> None:
        metadata.storage_data = {found.index: found.storage_data for rank in results for found in rank}
        write_whole(self.path / METADATA, lambda file: torch.save(metadata, file))


class Reader(dcp.FileSystemReader):
    """DCP's reader, with metadata that are not unpickled."""

    def read_metadata(self) -> metadata.Metadata:
        with torch.serialization.safe_globals(RECORDS):
            return torch.load(self.path / METADATA, map_location="cpu", weights_only=True)


def write_shards(path: Path, state: dict, world: World) -> None:
    """Write a state with split tensors into a folder. Every rank must call it.

    The digest of state.pt replaces ``{sha256}`` in the folder's name. Raises `InputError` if a disk fails.
    """
    unfinished = path.with_name(path.name + ".tmp")
    split: dict[str, Tensor] = {}

    def leave_out(name: str, tensor: Tensor) -> Tensor:
        """A split tensor's type and shape on "meta"; other tensors unchanged."""
        if not isinstance(tensor, DTensor):
            return tensor
        split[name] = tensor
        return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")

    state = each_tensor(leave_out, state)
    try:
        dcp.save(split, storage_writer=Writer(unfinished))
        mine = {file.name: file_hash(file) for file in unfinished.glob(f"__{world.rank}_*.distcp")}
        digests: list[dict] = [{}] * world.ranks
        dist.all_gather_object(digests, mine)
        if world.is_main:
            files = {name: digest for each in digests for name, digest in each.items()}
            files[METADATA] = file_hash(unfinished / METADATA)
            write_whole(unfinished / STATE, lambda file: torch.save({**state, "files": files}, file))
            name = path.name.replace("{sha256}", file_hash(unfinished / STATE))
            os.replace(unfinished, path.with_name(name))
            sync(path.parent)
    except (OSError, InputError, dcp.CheckpointException) as error:
        if world.is_main:
            shutil.rmtree(unfinished, ignore_errors=True)
        raise unwritable(path, first_failure(error)) from None


def first_failure(error: BaseException) -> BaseException:
    """The error of the first rank that failed: DCP collects the errors of all ranks in one exception."""
    if isinstance(error, dcp.CheckpointException):
        return next(failure for failure, _ in error.failures.values())
    return error


def check_shards(path: Path, state: dict) -> None:
    """Raise `InputError` unless the files beside state.pt have the digests that it contains for them."""
    for name, digest in state["files"].items():
        file = path / name
        if Path(name).name != name or file.is_symlink():
            raise InputError(f"{path}: {name} is not a file of this checkpoint")
        if file_hash(file) != digest:
            raise InputError(f"{file}: damaged, the content does not have the digest in {STATE}")
    parts = Reader(path).read_metadata().storage_data.values()
    if other := {part.relative_path for part in parts} - state["files"].keys():
        raise InputError(f"{path}: {other.pop()} is not a file of this checkpoint")


def place_tensors(state: dict, path: Path | None, mesh: DeviceMesh | None) -> dict:
    """The state of a checkpoint with its tensors split among the ranks of `mesh`, or complete if it is None.

    Tensors on "meta" are read from the folder `path`, whatever number of ranks wrote it. Every rank must call
    it. Raises `InputError` if they cannot be read.
    """
    missing: dict[str, Tensor] = {}

    def place(name: str, tensor: Tensor) -> Tensor:
        if tensor.is_meta:
            if mesh:
                split = [Shard(0)]
                missing[name] = empty(tensor.shape, dtype=tensor.dtype, device_mesh=mesh, placements=split)
            else:
                missing[name] = torch.empty(tensor.shape, dtype=tensor.dtype)
            return missing[name]
        if not mesh or not tensor.dim():
            return tensor  # A count of steps has no dimension to split.
        return distribute_tensor(tensor, mesh, [Shard(0)], src_data_rank=None)

    state = each_tensor(place, state)
    if missing:
        try:
            dcp.load(missing, storage_reader=Reader(path))
        except dcp.CheckpointException as error:
            reason = str(first_failure(error)).partition("\n")[0]
            raise InputError(f"{path}: not a checkpoint ({reason})") from None
    return state


def each_tensor(function: Callable[[str, Tensor], Tensor], state, name: str = ""):
    """Nested dicts and lists with `function(name, tensor)` in place of every tensor."""
    if isinstance(state, Tensor):
        return function(name, state)
    if isinstance(state, dict):
        return {key: each_tensor(function, value, f"{name}/{key}") for key, value in state.items()}
    if isinstance(state, (list, tuple)):
        return [each_tensor(function, value, f"{name}/{place}") for place, value in enumerate(state)]
    return state
