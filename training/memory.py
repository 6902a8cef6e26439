"""How many tokens a forward may hold: ``--micro-batch-tokens auto``."""

import os

import numpy as np
import torch
from torch import nn

from dataset.packing import build_stream, stream_lengths
from dataset.store import TokenStore
from errors import InputError
from model.config import ModelConfig
from training.distributed import World
from training.precision import Precision
from training.settings import TrainSettings

MOST_TOKENS = 2**14  # Longer streams are not faster, on a CPU or on a GPU.
OUT_OF_MEMORY = (
    "not even one record fits into the device's memory; these flags need less, the cheapest first: "
    "--reference cached, --checkpoint-activations, --lora-rank, --shard"
)


def micro_batch_tokens(
    settings: TrainSettings,
    model: nn.Module,
    world: World,
    store: TokenStore,
    precision: Precision,
    reference: nn.Module | None = None,
) -> int:
    """The most tokens of a forward: --micro-batch-tokens, or what fits where that is ``auto``.

    On a CPU that is a formula, on CUDA a trial of the data's heaviest micro-batch. The result is a power of
    two and the same on every rank. Every rank must call this function.
    """
    if settings.micro_batch_tokens != "auto":
        return int(settings.micro_batch_tokens)
    layout = getattr(settings, "layout", "forked")
    if world.device.type != "cuda":
        tokens = fitting_tokens(free_memory() // (4 * world.local_ranks), model.config)
        return -world.largest(-tokens)
    lengths, tokens = stream_lengths(store, layout), MOST_TOKENS
    while True:
        rows = heaviest_rows(lengths, tokens, settings.batch_size)
        if not world.largest(int(not fits(rows, model, world, store, precision, reference, layout))):
            return tokens
        if len(rows) == 1:
            raise InputError(OUT_OF_MEMORY)
        tokens //= 2


def fitting_tokens(free: int, config: ModelConfig) -> int:
    """The tokens whose activations fit into `free` bytes, rounded down to a power of two, at most 16,384.

    A layer keeps 24 d + 8 q + 8 k + 16 i bytes of each token for backward (d, q, k, i: the widths of the
    stream, of all query heads, of all key heads, and of the feed-forward), measured in float32.
    """
    q, k = (heads * config.head_dim for heads in (config.num_attention_heads, config.num_key_value_heads))
    i = config.intermediate_size
    if config.num_experts:
        i = config.num_experts_per_tok * config.moe_intermediate_size + config.shared_expert_intermediate_size
    bytes_a_token = config.num_hidden_layers * (24 * config.hidden_size + 8 * q + 8 * k + 16 * i)
    return min(MOST_TOKENS, 2 ** max(0, (free // bytes_a_token).bit_length() - 1))


def free_memory() -> int:
    """Bytes of memory that programs of this machine can still have; all of it where that is unknown."""
    try:
        with open("/proc/meminfo") as file:
            return next(1024 * int(line.split()[1]) for line in file if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def heaviest_rows(lengths: np.ndarray, max_tokens: int, most_rows: int) -> list[int]:
    """The longest row and then the longest others that fit: at least as heavy as any micro-batch of a run."""
    rows, tokens = [], 0
    for row in np.argsort(-lengths, kind="stable").tolist():
        if not rows or (tokens + lengths[row] <= max_tokens and len(rows) < most_rows):
            rows.append(row)
            tokens += int(lengths[row])
    return rows


def fits(
    rows: list[int],
    model: nn.Module,
    world: World,
    store: TokenStore,
    precision: Precision,
    reference: nn.Module | None,
    layout: str,
) -> bool:
    """Whether a forward and a backward of these rows fit beside the two moments that AdamW will keep.

    `model` is the module inside DDP, so that a rank without memory leaves no other rank in an exchange.
    """

    def run() -> bool:
        try:
            trained = [weight for weight in model.parameters() if weight.requires_grad]
            moments = [torch.empty_like(weight) for weight in (*trained, *trained)]
            stream = build_stream(store, rows, layout).to(world.device)
            with precision.autocast():
                outputs = model(stream)
                if reference is not None:
                    with torch.no_grad():
                        reference(stream)
            outputs.sum().backward()
            del moments
        except torch.OutOfMemoryError:
            return False
        return True

    fitted = run()  # A function of its own: its tensors are free here, also after an error.
    model.zero_grad()
    if world.device.type == "cuda":
        torch.cuda.empty_cache()
    return fitted
