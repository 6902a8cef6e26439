"""The reference asked once, before training: ``--reference cached``.

Data, layout and reference never change in a run, so neither does log pi_ref(y_t | x, y_<t). It is computed
for every supervised token and kept beside the tokenised data; a step then costs no forward of the reference,
and no copy of the model stays in memory. Later epochs read it again, as do later runs from the same model.

Tokens are kept rather than sums: an array as long as the supervised tokens, from which every option of an
objective can be had (LD-DPO looks at a part of a response). The values are those of the live reference but
for rounding, since other pairs stand beside a pair in the two streams.
"""

import hashlib
import json
from collections import deque
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from dataset.packing import build_stream, fill, stream_lengths
from dataset.store import TokenStore
from errors import InputError
from files import write_whole
from model.stream import TokenStream
from model.transformer import Transformer
from model.weights import weights_hash
from training.distributed import World
from training.objective import Objective
from training.precision import Precision

REFERENCES = ("live", "cached")


def check_reference(reference: str, objective: Objective) -> None:
    """Refuse to remember what moves, or what nobody asks for."""
    if reference == "cached" and objective.moves_reference:
        raise InputError("--reference cached remembers one reference, and TR-DPO (--tr-…) moves it")
    if reference == "cached" and not objective.needs_reference:
        raise InputError(f"--reference cached: --loss {objective.settings.loss} has no reference")


def cached_reference(stream: TokenStream) -> Tensor:
    """Takes the live reference's place: what it said of the stream's targets, (N,)."""
    return stream.reference_logps


def cache_reference(
    model: Transformer, store: TokenStore, world: World, precision: Precision, layout: str, max_tokens: int
) -> None:
    """Set `store.reference_logps` to what `model` says of the store's supervised tokens, now if it never did.

    The store's folder is named after data, tokenizer, template and length; the file after all else that can
    change a log-prob.
    """
    torch_dtype = torch.promote_types(model.norm.weight.dtype, torch.float32)
    dtype = torch.empty(0, dtype=torch_dtype).numpy().dtype
    products = precision.name, torch.get_float32_matmul_precision(), world.device.type
    key = [store.fingerprint, weights_hash(model), model.config.to_dict(), layout, *products]
    path = store.folder / f"reference-{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:32]}.bin"
    # Ranks compute together or not at all. The first rank of each node looks for the file and writes it: a
    # node may have a disk of its own, and another run may write the same file now.
    if world.largest(int(world.is_node_main and not path.exists())):
        world.print(f"asking the reference about {len(store)} pairs")
        chunks = token_logps(model, store, world, precision, layout, max_tokens)
        if world.is_node_main:
            write_whole(path, lambda file: file.writelines(chunks))
        else:
            deque(chunks, maxlen=0)  # Every rank computes its part of each chunk.
        world.wait()
    store.reference_logps = np.memmap(path, dtype, "r")


@torch.no_grad()
def token_logps(
    model: Transformer, store: TokenStore, world: World, precision: Precision, layout: str, max_tokens: int
) -> Iterator[np.ndarray]:
    """log pi(y_t | x, y_<t) of all rows in their order, in chunks: one batch of each rank at a time."""
    bounds = store.target_bounds
    batches = fill(range(len(store)), stream_lengths(store, layout), max_tokens)
    for start in range(0, len(batches), world.ranks):
        group = batches[start : start + world.ranks]
        first, stop = bounds[group[0].start], bounds[group[-1].stop]
        rows = group[world.rank] if world.rank < len(group) else range(0)
        with precision.autocast():
            logps = model(build_stream(store, rows, layout).to(world.device))
        chunk = logps.new_zeros(stop - first)
        if rows:
            chunk[bounds[rows.start] - first : bounds[rows.stop] - first] = logps
        yield world.sum(chunk).cpu().numpy()
