"""A checkpoint of a model that is split among ranks: each writes its part, any number of them can read it.

    OUT/checkpoints/00000120-<SHA-256 of state.pt>.shards/
        state.pt          what is small, the shapes of what is split, and the SHA-256 of every other file
        metadata.pt       where each part of each tensor lies, as torch.distributed.checkpoint (DCP) has it
        __0_0.distcp …    the parts of rank 0, …

What holds of a checkpoint of one file holds here: the name of the folder is the digest of its digests, and
renaming the folder is the moment at which all of it becomes valid. DCP would pickle its metadata, which
whoever reads it would unpickle; here they are written and read like weights.
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
# Plain records, all that metadata consist of. BytesStorageMetadata is none of them on purpose: it says that
# something other than a tensor is to be read, which DCP would unpickle.
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
    """DCP's, but for how metadata are written, and what is said of a disk that fails."""

    def write_data(self, plan, planner):
        try:
            return super().write_data(plan, planner)
        except (OSError, RuntimeError) as error:
            raise unwritable(self.path, error) from None

    def finish(self, metadata, results) -> None:
        metadata.storage_data = {found.index: found.storage_data for rank in results for found in rank}
        write_whole(self.path / METADATA, lambda file: torch.save(metadata, file))


class Reader(dcp.FileSystemReader):
    """DCP's, but for how metadata are read."""

    def read_metadata(self) -> metadata.Metadata:
        with torch.serialization.safe_globals(RECORDS):
            return torch.load(self.path / METADATA, map_location="cpu", weights_only=True)


def write_shards(path: Path, state: dict, world: World) -> None:
    """Write a state whose split tensors lie on all ranks, each of which must call it.

    ``{sha256}`` in the folder's name becomes the digest of its state.pt.
    """
    unfinished = path.with_name(path.name + ".tmp")
    split: dict[str, Tensor] = {}

    def leave_out(name: str, tensor: Tensor) -> Tensor:
        """Type and shape alone of a tensor that is split."""
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
        raise told(path, error) from None


def told(path: Path, error: BaseException) -> BaseException:
    """What went wrong, as the first of the ranks tells it on which something did."""
    if isinstance(error, dcp.CheckpointException):
        error = next(first for first, _ in error.failures.values())
    return unwritable(path, error)


def check_shards(path: Path, state: dict) -> None:
    """Raise `InputError` unless the files beside state.pt are those it was written with."""
    for name, digest in state["files"].items():
        file = path / name
        if Path(name).name != name or file.is_symlink():
            raise InputError(f"{path}: {name} is no file of this checkpoint")
        if file_hash(file) != digest:
            raise InputError(f"{file}: damaged, its content is not that of the digest in {STATE}")
    parts = Reader(path).read_metadata().storage_data.values()
    if strangers := {part.relative_path for part in parts} - state["files"].keys():
        raise InputError(f"{path}: {strangers.pop()} is no file of this checkpoint")


def settle(state: dict, path: Path, mesh: DeviceMesh | None) -> dict:
    """The state of a checkpoint in tensors as this run holds them: split among the ranks of `mesh`, or whole.

    Tensors that were split are read here, however many ranks wrote them. Every rank must call it.
    """
    missing: dict[str, Tensor] = {}

    def place(name: str, tensor: Tensor) -> Tensor:
        if tensor.is_meta:
            shape, dtype = tensor.shape, tensor.dtype
            how = {"dtype": dtype, "device_mesh": mesh, "placements": [Shard(0)]}
            missing[name] = empty(shape, **how) if mesh else torch.empty(shape, dtype=dtype)
            return missing[name]
        if not mesh or not tensor.dim():
            return tensor  # A count of steps has no dimension to split.
        return distribute_tensor(tensor, mesh, [Shard(0)], src_data_rank=None)

    state = each_tensor(place, state)
    if missing:
        try:
            dcp.load(missing, storage_reader=Reader(path))
        except dcp.CheckpointException as error:
            reason = next(str(first) for first, _ in error.failures.values())
            raise InputError(f"{path}: no checkpoint ({reason.partition(chr(10))[0]})") from None
    return state


def each_tensor(function: Callable[[str, Tensor], Tensor], state, name: str = ""):
    """Nested dicts and lists with `function(name, tensor)` in the place of every tensor."""
    if isinstance(state, Tensor):
        return function(name, state)
    if isinstance(state, dict):
        return {key: each_tensor(function, value, f"{name}/{key}") for key, value in state.items()}
    if isinstance(state, (list, tuple)):
        return [each_tensor(function, value, f"{name}/{place}") for place, value in enumerate(state)]
    return state
