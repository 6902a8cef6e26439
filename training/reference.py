"""The reference model: frozen, so that the policy can be compared with where it started.

    reference = make_reference(settings, objective, model, world)
    reference_logps = reference(stream)                           # (N,) log π_ref(y_t | x, y_<t)

Five kinds: a frozen copy of the model (the default); another model (--reference-model); the same model with
its adapters off (--lora-rank), or with a frozen copy of the adapter it started with (--adapter); log-probs
computed once before training (--reference cached); and none, for losses without a reference.

Neither data nor reference change in a run, so --reference cached computes log π_ref once for every supervised
token and keeps it beside the tokenised data. A step then needs no forward of the reference and no copy of
the model; later epochs and runs read the file again. Tokens are kept, not sums, because some options of an
objective use a part of an answer (LD-DPO).
"""

import copy
import hashlib
import json
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dataset.packing import build_stream, fill, stream_lengths
from dataset.store import TokenStore
from dataset.tokenizer import ChatTokenizer
from errors import require
from files import file_hash, write_whole
from model.lora import AdapterReference, adapted_layers
from model.stream import TokenStream
from model.transformer import Transformer
from model.weights import load_model, weights_hash
from training.distributed import World, first_device, wrap
from training.objective import Objective
from training.precision import Precision

REFERENCES = ("live", "cached")


def make_reference(
    settings, objective: Objective, model: Transformer, world: World
) -> Callable[[TokenStream], Tensor]:
    """The reference of a run, from the model before its first step. Call it before the model is wrapped."""
    other = getattr(settings, "reference_model", "")
    if settings.reference == "cached":
        check_cached(objective)
        require(
            not other, "--reference cached is for a reference that is --model; leave out one of the flags"
        )
        return cached_reference  # Its file is filled by `cache_reference`, once the data is open.
    if not objective.needs_reference:
        require(not other, f"--reference-model: --loss {objective.settings.loss} does not use a reference")
        return no_reference
    if other:
        return wrap(load_reference(settings, world).eval().requires_grad_(False), world, settings.shard)
    if layers := adapted_layers(model):
        if settings.adapter and not settings.merge_adapter:
            for layer in layers.values():
                layer.keep_reference()
        return AdapterReference(model)
    return wrap(copy.deepcopy(model).eval().requires_grad_(False), world, settings.shard)


def load_reference(settings, world: World) -> Transformer:
    """The model of --reference-model. Raises `InputError` if its tokenizer differs from that of --model."""
    folders = settings.model, settings.reference_model
    tokenizers = {ChatTokenizer(Path(folder) / "tokenizer.json").fingerprint for folder in folders}
    require(len(tokenizers) == 1, f"{' and '.join(folders)} have different tokenizers")
    return load_model(settings.reference_model, first_device(world, settings.shard))


def no_reference(stream: TokenStream) -> Tensor:
    """Zeros, (N,), so that a log-ratio is log π: the reference of a loss that needs none."""
    return torch.zeros(len(stream.targets), device=stream.targets.device)


def cached_reference(stream: TokenStream) -> Tensor:
    """The reference log-probs of the stream's targets, (N,), computed before training."""
    return stream.reference_logps


def check_cached(objective: Objective) -> None:
    """Raise `InputError` if the reference changes during training or the loss does not use it."""
    moves = "--reference cached keeps one reference, but --tr-alpha and --tr-every change it"
    unused = f"--reference cached: --loss {objective.settings.loss} does not use a reference"
    whole = f"--reference cached keeps one number a token, but --loss {objective.settings.loss} compares "
    require(not objective.moves_reference, moves)
    require("rejected_kl" not in objective.inputs, whole + "whole distributions")
    require(objective.needs_reference, unused)


def cache_references(
    settings,
    model: Transformer,
    pairs: TokenStore,
    held_out: dict[str, TokenStore],
    world: World,
    precision: Precision,
    max_tokens: int,
) -> str | None:
    """With --reference cached, fill the caches of all data; return the digest of the training data.

    The digest belongs to the identity of a run: the last bits of a log-prob depend on the other pairs of its
    forward, so a cache that was computed again could change a resumed run.
    """
    if settings.reference != "cached":
        return None
    every = (store for data in (*held_out.values(), pairs) for store in (data.mismatched, data) if store)
    digests = [cache_reference(model, each, world, precision, settings.layout, max_tokens) for each in every]
    return digests[-1] if pairs.mismatched is None else "-".join(digests[-2:])


def cache_reference(
    model: Transformer, store: TokenStore, world: World, precision: Precision, layout: str, max_tokens: int
) -> str:
    """Set `store.reference_logps`, one for each supervised token; return the SHA-256 of its file.

    The file is computed now if it is not there. The store's folder is named after data, tokenizer, template
    and length; the file after everything else that changes a log-prob.
    """
    dtype = torch.empty(0, dtype=torch.promote_types(model.norm.weight.dtype, torch.float32)).numpy().dtype
    products = precision.name, torch.get_float32_matmul_precision(), world.device.type
    key = [weights_hash(model), model.config.to_dict(), layout, store.fingerprint, *products]
    path = store.folder / f"reference-{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:32]}.bin"

    def is_missing() -> bool:
        return not path.is_file() or path.stat().st_size != int(store.target_bounds[-1]) * dtype.itemsize

    # Ranks compute together or not at all. The first rank of each node looks for the file and writes it: a
    # node may have a disk of its own, and another run may write the same file now.
    if world.largest(int(world.is_node_main and is_missing())):
        world.print(f"computing reference log-probs of {len(store)} pairs")
        chunks = token_logps(model, store, world, precision, layout, max_tokens)
        if world.is_node_main:
            write_whole(path, lambda file: file.writelines(chunks))
        else:
            deque(chunks, maxlen=0)  # Every rank computes its part of each chunk.
        world.from_main(lambda: None)  # A slow disk may take longer than an exchange waits.
        world.wait()
    store.reference_logps = np.memmap(path, dtype, "r")
    return world.from_main(lambda: file_hash(path))


@torch.no_grad()
def token_logps(
    model: Transformer, store: TokenStore, world: World, precision: Precision, layout: str, max_tokens: int
) -> Iterator[np.ndarray]:
    """log π(y_t | x, y_<t) of all rows in their order, in chunks: one batch of each rank at a time."""
    bounds, batches = store.target_bounds, fill(range(len(store)), stream_lengths(store, layout), max_tokens)
    for place in range(0, len(batches), world.ranks):
        group = batches[place : place + world.ranks]
        first, stop = bounds[group[0].start], bounds[group[-1].stop]
        rows = group[world.rank] if world.rank < len(group) else range(0)
        with precision.autocast():
            logps = model(build_stream(store, rows, layout).to(world.device))
        chunk = logps.new_zeros(stop - first)
        if rows:
            chunk[bounds[rows.start] - first : bounds[rows.stop] - first] = logps
        yield world.sum(chunk).cpu().numpy()
