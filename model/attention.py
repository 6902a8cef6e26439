"""Attention over a stream: which tokens attend in one call, and the call itself.

A token attends to the tokens before it in its own segment, to itself, and to the segment's prefix. A *tree*
is a segment without a prefix and the segments after it that fork from it: a prompt with its answers, or a
sequence alone. Tokens of different trees never attend to one another.
"""

import math
from dataclasses import dataclass
from functools import cache
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

BLOCK = 256  # tokens of an AttentionBlock, at most
Segment = tuple[int, int, int, int]  # query start, query end, prefix start, prefix end


@dataclass(frozen=True)
class AttentionBlock:
    """A run of Lq tokens whose queries attend in one call, to Lk keys: those of its context and its own."""

    bias: Tensor  # (Lq, Lk) added to the scores: 0 where a query attends to a key, else -inf
    context: tuple[int, ...] = ()  # the earlier blocks whose keys come before its own

    @classmethod
    def of_trees(cls, segments: list[Segment], device: torch.device) -> "AttentionBlock":
        """The block of neighbouring small trees, given by their segments."""
        first, last = segments[0][0], segments[-1][1]
        bias = torch.full((last - first, last - first), -math.inf, device=device)
        for start, end, prefix_start, prefix_end in segments:
            bias[start - first : end - first, start - first : end - first].triu_(1)
            if prefix_end > prefix_start:
                bias[start - first : end - first, prefix_start - first : prefix_end - first] = 0
        return cls(bias)


def attention_blocks(segments: list[Segment], device: torch.device) -> list[AttentionBlock]:
    """All tokens of a stream in blocks of at most BLOCK tokens, in the order of the stream.

    A call for each small segment would take longer than the scores between unrelated trees, which are
    computed and masked: so neighbouring trees share a block. Half of a large causal square is masked: so a
    larger tree is cut into several blocks.
    """
    blocks: list[AttentionBlock] = []
    for run in runs_of_trees(segments):
        if run[-1][1] - run[0][0] <= BLOCK:
            blocks.append(AttentionBlock.of_trees(run, device))
        else:
            blocks += cut(run, len(blocks), device)
    return blocks


def runs_of_trees(segments: list[Segment]) -> list[list[Segment]]:
    """The segments of neighbouring trees that have at most BLOCK tokens together, or of one larger tree."""
    trees: list[list[Segment]] = []
    for segment in segments:
        _, _, prefix_start, prefix_end = segment
        if prefix_end == prefix_start:
            trees.append([])
        trees[-1].append(segment)
    runs: list[list[Segment]] = []
    for tree in trees:
        if runs and tree[-1][1] - runs[-1][0][0] <= BLOCK:
            runs[-1] += tree
        else:
            runs.append(tree)
    return runs


def cut(tree: list[Segment], first: int, device: torch.device) -> list[AttentionBlock]:
    """Each segment of a tree in blocks of equal length; the first one is block number `first` of the stream.

    The queries of a block attend to all blocks of the prefix and to the earlier blocks of their segment.
    """
    blocks: list[AttentionBlock] = []
    blocks_of: dict[int, list[int]] = {}  # start of a segment: the numbers of its blocks
    for start, end, prefix_start, prefix_end in tree:
        context = list(blocks_of[prefix_start]) if prefix_end > prefix_start else []
        parts = -(-(end - start) // BLOCK)
        edges = [start + (end - start) * part // parts for part in range(parts + 1)]
        for block_start, block_end in pairwise(edges):
            keys = prefix_end - prefix_start + block_end - start
            blocks.append(AttentionBlock(causal_bias(block_end - block_start, keys, device), tuple(context)))
            context.append(first + len(blocks) - 1)
        blocks_of[start] = context[-parts:]
    return blocks


def causal_bias(queries: int, keys: int, device: torch.device) -> Tensor:
    """(Lq, Lk): the last query attends to every key, the query before it to one key less, and so on.

    SDPA's `is_causal` aligns the queries with the *first* keys, which is wrong if there is a prefix.
    """
    return torch.full((queries, keys), -math.inf, device=device).triu(keys - queries + 1)


def attend_in_blocks(blocks: list[AttentionBlock], q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of a whole stream: q (H, T, D), k and v (G, T, D) to (H, T, D)."""
    # Split rather than sliced: the gradient of each slice would be a tensor as long as the stream.
    lengths = [len(block.bias) for block in blocks]
    queries, keys, values = (x.split(lengths, dim=1) for x in (q, k, v))
    outputs = []
    for block, query, key, value in zip(blocks, queries, keys, values, strict=True):
        if block.context:
            key = torch.cat([*(keys[index] for index in block.context), key], dim=1)
            value = torch.cat([*(values[index] for index in block.context), value], dim=1)
        outputs.append(attention(query, key, value, block.bias))
    return torch.cat(outputs, dim=1)


def attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(D) + bias) v, where `bias` (Lq, Lk) is 0 or -inf.

    q is (H, Lq, D), k and v are (G, Lk, D); returns (H, Lq, D). Each of the G key heads serves H / G query
    heads (Ainslie et al. 2023, arXiv 2305.13245). On a CPU this is faster than SDPA.
    """
    (heads, queries, size), groups = q.shape, len(k)
    # The query heads of a group are stacked, so that no key is copied.
    q = q.reshape(groups, heads // groups * queries, size)
    bias = bias.to(q).repeat(heads // groups, 1)
    scores = torch.baddbmm(bias, q, k.mT, alpha=size**-0.5)  # (G, H/G * Lq, Lk)
    return (scores.softmax(dim=-1).to(v.dtype) @ v).view(heads, queries, size)


class FusedAttention:
    """The whole stream in one FlexAttention call (Dong et al. 2024, arXiv 2412.05496), for CUDA.

    The kernel skips tiles without a visible key and never writes scores to memory. FlexAttention has no
    backward on CPUs; there `attend` computes forwards only.
    """

    def __init__(self, segments: Tensor, device: torch.device):
        length = int(segments[-1, 1])
        starts, ends, prefix_starts, prefix_ends = segments.to(device).unbind(1)  # (S,)
        own, first, last = (
            x.repeat_interleave(ends - starts) for x in (starts, prefix_starts, prefix_ends)
        )  # (T,)

        def sees(batch, head, query, key):
            return (own[query] <= key) & (key <= query) | (first[query] <= key) & (key < last[query])

        make = compiled(create_block_mask) if device.type == "cuda" else create_block_mask
        self.mask: BlockMask = make(sees, None, None, length, length, device=device)

    @torch.compiler.disable  # Compiled on its own; inside a compiled layer the sizes of heads are unknown.
    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """As `TokenStream.attend`: q (H, T, D), k and v (G, T, D) to (H, T, D)."""
        attention = compiled(flex_attention) if q.is_cuda else flex_attention
        return attention(q[None], k[None], v[None], block_mask=self.mask, enable_gqa=True)[0]


@cache
def compiled(function):
    """The function, compiled at its first call for streams of any length."""
    return torch.compile(function, dynamic=True)
