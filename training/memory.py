"""The tokens of a forward that fit into memory: ``--micro-batch-tokens auto``."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from dataset.packing import build_stream, stream_lengths
from dataset.store import TokenStore
from errors import InputError
from model.attention import BLOCK
from model.config import ModelConfig
from model.stream import TokenStream
from training.distributed import World
from training.precision import Precision
from training.settings import TrainSettings

MEMINFO = Path("/proc/meminfo")  # Linux
CONTAINER = Path("/sys/fs/cgroup")  # has memory.max in a container with a limit
MOST_TOKENS = 2**14  # Longer streams are not faster, on a CPU or on a GPU.
OUT_OF_MEMORY = (
    "even a single record does not fit into the GPU's memory; these flags need less, in this order: "
    "--reference cached, --checkpoint-activations, --lora-rank, --shard"
)


def micro_batch_tokens(
    settings: TrainSettings,
    model: nn.Module,
    world: World,
    store: TokenStore,
    precision: Precision,
    reference: Callable[[TokenStream], Tensor] | None = None,
    forwards: int = 1,
) -> int:
    """The maximum tokens of a forward: --micro-batch-tokens, or with ``auto`` the tokens that fit.

    `model` is the module inside DDP. The result of ``auto`` is a power of two, at most 16,384 and the same on
    every rank: of a formula on a CPU and for split weights, of a trial on CUDA. Every rank must call this.
    A step that keeps the activations of several `forwards` gets a part of the tokens.
    Raises `InputError` if a trial of the longest record does not fit.
    """
    if settings.micro_batch_tokens != "auto":
        return int(settings.micro_batch_tokens)
    layout, tokens = getattr(settings, "layout", "forked"), MOST_TOKENS
    lengths = stream_lengths(store, layout)
    # A backward that stops half-way would leave split weights in a state without return: no trial.
    if world.device.type != "cuda" or isinstance(model, FSDPModule):
        fitting = fitting_tokens(free_memory(world) // 4, model.config, int(lengths.max()))
        return -world.largest(-max(1, fitting // forwards))
    while True:
        rows = heaviest_rows(lengths, tokens, settings.batch_size)
        stream = build_stream(store, rows, layout)
        if not world.largest(int(not fits(stream, model, world, precision, reference))):
            return max(1, tokens // forwards)
        if len(rows) == 1:
            raise InputError(OUT_OF_MEMORY)
        tokens //= 2


def fitting_tokens(free: int, config: ModelConfig, longest: int) -> int:
    """The tokens whose activations fit into `free` bytes, rounded down to a power of two, at most 16,384.

    A layer keeps 24 d + 8 q + 8 k + 16 i bytes of each token for backward in float32 (d, q, k, i: the widths
    of the model, of all query heads, of all key heads, of the feed-forward), and about 4 H L bytes of
    attention scores (H query heads, records of at most L tokens, blocks of 256).
    """
    q, k = (heads * config.head_dim for heads in (config.num_attention_heads, config.num_key_value_heads))
    i = config.intermediate_size
    if config.num_experts:
        i = config.num_experts_per_tok * config.moe_intermediate_size + config.shared_expert_intermediate_size
    scores = 4 * config.num_attention_heads * max(longest, BLOCK)
    bytes_per_token = config.num_hidden_layers * (24 * config.hidden_size + 8 * q + 8 * k + 16 * i + scores)
    return min(MOST_TOKENS, 2 ** max(0, (free // bytes_per_token).bit_length() - 1))


def free_memory(world: World) -> int:
    """Free bytes for this rank: of its GPU, or an equal part of the node's memory."""
    if world.device.type == "cuda":
        return torch.cuda.mem_get_info(world.device)[0]
    free = 8 * 2**30  # where the system does not tell
    if MEMINFO.is_file():
        lines = (line.split() for line in MEMINFO.read_text().splitlines())
        free = next((1024 * int(line[1]) for line in lines if line[0] == "MemAvailable:"), free)
    limit = CONTAINER / "memory.max"
    if limit.is_file() and limit.read_text().strip() != "max":
        used = int((CONTAINER / "memory.current").read_text())
        free = min(free, max(0, int(limit.read_text()) - used))
    return free // world.local_ranks


def heaviest_rows(lengths: np.ndarray, max_tokens: int, most_rows: int) -> list[int]:
    """The longest row and the longest others that fit beside it: as heavy as a micro-batch can be."""
    rows, tokens = [], 0
    for row in np.argsort(-lengths, kind="stable").tolist():
        if not rows or (tokens + lengths[row] <= max_tokens and len(rows) < most_rows):
            rows.append(row)
            tokens += int(lengths[row])
    return rows


def fits(
    stream: TokenStream, model: nn.Module, world: World, precision: Precision, reference: Callable | None
) -> bool:
    """Whether a forward and a backward of the stream fit beside the two moments that AdamW will keep.

    Ranks exchange nothing here, so a rank without memory does not leave the others waiting.
    """

    def run() -> bool:
        try:
            trained = [weight for weight in model.parameters() if weight.requires_grad]
            moments = [torch.empty_like(weight) for weight in (*trained, *trained)]
            here = stream.to(world.device)
            with precision.autocast():
                outputs = model(here)
                if reference is not None:
                    with torch.no_grad():
                        reference(here)
            outputs.sum().backward()
            del moments
        except torch.OutOfMemoryError:
            return False
        return True

    fitted = run()  # A function of its own, so that its tensors are free here, also after an error.
    model.zero_grad()
    if world.device.type == "cuda":
        torch.cuda.empty_cache()
    return fitted
