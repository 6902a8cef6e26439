"""The batch: a flat stream of tokens, and how its tokens attend to one another.

There is no padding and no ``[B, L]`` rectangle. All pairs of a micro-batch lie one after another in one run
of T tokens; `segments` says who sees whom. `predictors`, `targets` and `owners` are the loss mask, already
shifted: the hidden state at ``predictors[n]`` predicts token ``targets[n]`` of response ``owners[n]``.
"""

import math
from dataclasses import dataclass, fields, replace
from functools import cache, cached_property
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

BLOCK = 256  # tokens that attend in one call, at most


@dataclass(frozen=True)
class TokenStream:
    """T tokens in S segments, of which N predict a supervised token of one of R responses."""

    tokens: Tensor  # (T,) token ids of all pairs, one after another
    positions: Tensor  # (T,) RoPE position; a fork restarts it at the end of its prompt
    # (S, 4) query start, query end, prefix start, prefix end; stays on the CPU. Segments lie one after
    # another and cover the stream. A tree is a segment without a prefix and those after it that fork from it.
    segments: Tensor
    predictors: Tensor  # (N,) index of the hidden state that predicts a supervised token
    targets: Tensor  # (N,) the supervised token's id
    owners: Tensor  # (N,) which response it belongs to: 2 * pair + (0 chosen, 1 rejected)
    responses: int  # R, so that a response keeps its place in a sum even when a rank holds none
    reference_logps: Tensor | None = None  # (N,) log pi_ref of the targets, if computed before training
    score_margins: Tensor | None = None  # (B,) score_chosen - score_rejected; NaN for a pair without scores

    def to(self, device) -> "TokenStream":
        """The same stream on another device. `segments` drive a Python loop, so they stay on the CPU."""
        names = [f.name for f in fields(self) if f.name not in ("segments", "responses")]
        here = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        return replace(self, **{name: move(x, torch.device(device)) for name, x in here.items()})

    def sum_by_response(self, token_logps: Tensor) -> Tensor:
        """log pi(y | x) = sum over t of log pi(y_t | x, y_<t): (N,) token log-probs to (R,) sums."""
        return token_logps.new_zeros(self.responses).index_add(0, self.owners, token_logps)

    def sum_by_side(self, token_logps: Tensor) -> tuple[Tensor, Tensor]:
        """The same for pairs: (N,) token log-probs to the (B,) sums of the chosen and the rejected side."""
        return sides(self.sum_by_response(token_logps))

    def lengths(self) -> Tensor:
        """|y|: the supervised tokens of each response, its end token included, (R,)."""
        return self.sum_by_response(torch.ones_like(self.owners))

    def beyond_the_shorter(self) -> Tensor:
        """Whether a token of a pair stands beyond the length of the pair's shorter response, (N,).

        Counted from the start of the response: the prompt is no part of it.
        """
        lengths = self.lengths()
        starts = lengths.cumsum(0) - lengths  # Responses lie one after another.
        shorter = lengths.view(-1, 2).amin(1).repeat_interleave(2)  # (R,)
        places = torch.arange(len(self.owners), device=self.owners.device) - starts[self.owners]
        return places >= shorter[self.owners]

    def last_tokens(self) -> Tensor:
        """Where each response ends, (R,): at the last token of a segment that is nobody's prefix."""
        segments = self.segments.tolist()
        prefixes = {(start, end) for _, _, start, end in segments}  # (0, 0) also where there is none
        ends = [end for start, end, _, _ in segments if (start, end) not in prefixes]
        return torch.tensor(ends, dtype=torch.long, device=self.tokens.device) - 1

    @torch.compiler.disable  # Every stream has blocks of its own sizes.
    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Each segment's queries see its prefix and, causally, themselves.

        q is (H, T, D), k and v are (G, T, D); returns (H, T, D). `layer` is for contexts that remember.
        """
        # Split, not sliced: the gradient of S slices would be S tensors as long as the stream.
        lengths = [len(block.bias) for block in self.blocks]
        queries, keys, values = (x.split(lengths, dim=1) for x in (q, k, v))
        outputs = []
        for block, query, key, value in zip(self.blocks, queries, keys, values, strict=True):
            if block.context:
                key = torch.cat([*(keys[index] for index in block.context), key], dim=1)
                value = torch.cat([*(values[index] for index in block.context), value], dim=1)
            outputs.append(attention(query, key, value, block.bias))
        return torch.cat(outputs, dim=1)

    @cached_property
    def blocks(self) -> list["Block"]:
        """The stream cut into runs that attend in one call each, the same for every layer and model.

        Many small calls cost more than some scores between strangers, computed and then hidden, and a large
        causal square is half hidden. So trees (a prompt with its branches, or a segment alone) share a block
        of up to BLOCK tokens, and a segment of a larger tree is cut into such blocks.
        """
        blocks: list[Block] = []
        for run in self._runs():
            if run[-1][1] - run[0][0] <= BLOCK:
                blocks.append(Block.of_trees(run, self.tokens.device))
            else:
                blocks += cut(run, len(blocks), self.tokens.device)
        return blocks

    @cached_property
    def fused(self) -> "FusedAttention | TokenStream":
        """The same stream as a context that attends in one call; without tokens there is nothing to fuse."""
        return FusedAttention(self) if len(self.tokens) else self

    def _runs(self) -> list[list[list[int]]]:
        """The segments of neighbouring trees that have BLOCK tokens at most together, or of one larger tree.

        A tree is a segment that has no prefix and those that fork from it.
        """
        trees: list[list[list[int]]] = []
        for segment in self.segments.tolist():
            _, _, prefix_start, prefix_end = segment
            if prefix_end == prefix_start:
                trees.append([])
            trees[-1].append(segment)
        runs: list[list[list[int]]] = []
        for tree in trees:
            if runs and tree[-1][1] - runs[-1][0][0] <= BLOCK:
                runs[-1] += tree
            else:
                runs.append(tree)
        return runs


def move(x: Tensor, device: torch.device) -> Tensor:
    """The tensor on `device`; the copy is asynchronous only to CUDA.

    CUDA reads a CPU tensor from pinned memory: an unpinned one would be copied while the program waits. On
    other devices an asynchronous copy may read memory that is already freed (Apple's MPS).
    """
    if device.type != "cuda" or x.device.type != "cpu":
        return x.to(device)
    return x.pin_memory().to(device, non_blocking=True)


def sides(values: Tensor) -> tuple[Tensor, Tensor]:
    """What responses have, (R,), to the chosen and the rejected side's, each (B,): they lie by turns."""
    chosen, rejected = values.view(-1, 2).unbind(1)
    return chosen, rejected


@dataclass(frozen=True)
class Block:
    """A run of Lq tokens that attend in one call, to the Lk tokens of its context and its own."""

    bias: Tensor  # (Lq, Lk) added to the scores: 0 where a query sees a key, -inf where it does not
    context: tuple[int, ...] = ()  # which earlier blocks come before its own tokens as keys

    @classmethod
    def of_trees(cls, run: list[list[int]], device: torch.device) -> "Block":
        """The block of neighbouring segments whose prefixes are among them."""
        first, last = run[0][0], run[-1][1]
        bias = torch.full((last - first, last - first), -math.inf, device=device)
        for start, end, prefix_start, prefix_end in run:
            bias[start - first : end - first, start - first : end - first].triu_(1)
            if prefix_end > prefix_start:
                bias[start - first : end - first, prefix_start - first : prefix_end - first] = 0
        return cls(bias)


def cut(tree: list[list[int]], first: int, device: torch.device) -> list[Block]:
    """A tree's segments in blocks of equal parts, of which the first is the stream's block number `first`.

    Every query of a block sees all of the blocks before it: its prefix's and those of its own segment.
    """
    blocks: list[Block] = []
    blocks_of: dict[int, list[int]] = {}  # of the segment that starts there
    for start, end, prefix_start, prefix_end in tree:
        context = list(blocks_of[prefix_start]) if prefix_end > prefix_start else []
        parts = -(-(end - start) // BLOCK)
        edges = [start + (end - start) * part // parts for part in range(parts + 1)]
        for here, there in pairwise(edges):
            keys = prefix_end - prefix_start + there - start
            blocks.append(Block(causal_bias(there - here, keys, device), tuple(context)))
            context.append(first + len(blocks) - 1)
        blocks_of[start] = context[-parts:]
    return blocks


def attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(D) + bias) v, where `bias` (Lq, Lk) is 0 or -inf.

    q is (H, Lq, D), k and v are (G, Lk, D): each of the G key heads serves H / G query heads (Ainslie et al.
    2023, arXiv 2305.13245). Written out because that is faster than SDPA on a CPU. Returns (H, Lq, D).
    """
    (heads, queries, size), groups = q.shape, len(k)
    # The query heads of a group are laid one below another, so that no key is ever copied.
    q = q.reshape(groups, heads // groups * queries, size)
    bias = bias.to(q).repeat(heads // groups, 1)
    scores = torch.baddbmm(bias, q, k.mT, alpha=size**-0.5)  # (G, H/G * Lq, Lk)
    return (scores.softmax(dim=-1).to(v.dtype) @ v).view(heads, queries, size)


class FusedAttention:
    """The whole stream in one FlexAttention call (Dong et al. 2024, arXiv 2412.05496), for CUDA.

    A query at i sees the keys from the start of its segment to i, and those of its prefix. The kernel leaves
    out whole tiles in which nobody sees anybody and never writes scores to memory. Its backward does not
    exist on CPUs, where `attend` is for forwards only.
    """

    def __init__(self, stream: TokenStream):
        length, device = len(stream.tokens), stream.tokens.device
        starts, ends, prefix_starts, prefix_ends = stream.segments.to(device).unbind(1)  # (S,)
        own, first, last = (
            x.repeat_interleave(ends - starts) for x in (starts, prefix_starts, prefix_ends)
        )  # (T,)

        def sees(batch, head, query, key):
            return (own[query] <= key) & (key <= query) | (first[query] <= key) & (key < last[query])

        make = compiled(create_block_mask) if stream.tokens.is_cuda else create_block_mask
        self.mask: BlockMask = make(sees, None, None, length, length, device=device)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """As `TokenStream.attend`: q (H, T, D), k and v (G, T, D) to (H, T, D)."""
        attention = compiled(flex_attention) if q.is_cuda else flex_attention
        return attention(q[None], k[None], v[None], block_mask=self.mask, enable_gqa=True)[0]


@cache
def compiled(function):
    """Compiled once, at the first call, for streams of any length."""
    return torch.compile(function, dynamic=True)


def causal_bias(queries: int, keys: int, device: torch.device) -> Tensor:
    """(Lq, Lk): the last query sees every key, the one before it one key less, ...

    Not SDPA's `is_causal`, which aligns queries with the *first* keys: wrong as soon as there is a prefix.
    """
    return torch.full((queries, keys), -math.inf, device=device).triu(keys - queries + 1)
