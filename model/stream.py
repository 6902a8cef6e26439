"""The batch: a flat stream of tokens, and how its tokens attend to one another.

There is no padding and no ``[B, L]`` rectangle. All pairs of a micro-batch lie one after another in one run
of T tokens; `segments` says who sees whom. `predictors`, `targets` and `owners` are the loss mask, already
shifted: the hidden state at ``predictors[n]`` predicts token ``targets[n]`` of response ``owners[n]``.
"""

import math
from dataclasses import dataclass, fields, replace
from functools import cache, cached_property

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

BLOCK = 256  # tokens that attend in one call, if they are of several trees


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
    reference_logps: Tensor | None = None  # (N,) of the targets, where the reference was asked beforehand

    def to(self, device) -> "TokenStream":
        """The same stream on another device. `segments` drive a Python loop, so they never leave the CPU."""
        names = [f.name for f in fields(self) if f.name not in ("segments", "responses")]
        here = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        return replace(self, **{name: x.to(device, non_blocking=True) for name, x in here.items()})

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

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Each segment's queries see its prefix and, causally, themselves.

        q is (H, T, D), k and v are (G, T, D); returns (H, T, D). `layer` is for contexts that remember.
        """
        # Split, not sliced: the gradient of S slices would be S tensors as long as the stream.
        lengths = [len(block.bias) for block in self.blocks]
        queries, keys, values = (x.split(lengths, dim=1) for x in (q, k, v))
        outputs = []
        for block, query, key, value in zip(self.blocks, queries, keys, values, strict=True):
            if block.prefix is not None:
                key = torch.cat([keys[block.prefix], key], dim=1)
                value = torch.cat([values[block.prefix], value], dim=1)
            outputs.append(attention(query, key, value, block.bias.to(q)))
        return torch.cat(outputs, dim=1)

    @cached_property
    def blocks(self) -> list["Block"]:
        """The stream cut into runs that attend in one call each, the same for every layer and model.

        Many small calls cost more than some scores between strangers, computed and then hidden. So trees (a
        prompt with its branches, or a segment alone) share a block of up to BLOCK tokens. In a larger tree
        each segment is a block, and its prefix another.
        """
        runs: list[list[list[int]]] = []
        room = -1  # what the last run has left; -1 where it takes no more
        for tree in self._trees():
            length = tree[-1][1] - tree[0][0]
            if length <= room:
                runs[-1] += tree
                room -= length
            elif length <= BLOCK:
                runs.append(tree)
                room = BLOCK - length
            else:
                runs += [[segment] for segment in tree]
                room = -1
        block_at = {run[0][0]: index for index, run in enumerate(runs)}
        return [Block.of(run, block_at, self.tokens.device) for run in runs]

    @cached_property
    def fused(self) -> "FusedAttention | TokenStream":
        """The same stream as a context that attends in one call; without tokens there is nothing to fuse."""
        return FusedAttention(self) if len(self.tokens) else self

    def _trees(self) -> list[list[list[int]]]:
        """The segments, each that has no prefix followed by those that fork from it."""
        trees: list[list[list[int]]] = []
        for segment in self.segments.tolist():
            _, _, prefix_start, prefix_end = segment
            if prefix_end == prefix_start:
                trees.append([])
            trees[-1].append(segment)
        return trees


def sides(values: Tensor) -> tuple[Tensor, Tensor]:
    """What responses have, (R,), to the chosen and the rejected side's, each (B,): they lie by turns."""
    chosen, rejected = values.view(-1, 2).unbind(1)
    return chosen, rejected


@dataclass(frozen=True)
class Block:
    """A run of Lq tokens that attend in one call, to the Lk tokens of its prefix and its own."""

    bias: Tensor  # (Lq, Lk) added to the scores: 0 where a query sees a key, -inf where it does not
    prefix: int | None  # which earlier block comes before its own tokens as keys; None: none

    @classmethod
    def of(cls, run: list[list[int]], block_at: dict[int, int], device: torch.device) -> "Block":
        """The block of neighbouring segments whose prefixes are among them, or of one segment."""
        first, last = run[0][0], run[-1][1]
        bias = torch.full((last - first, last - first), -math.inf, device=device)
        for start, end, prefix_start, prefix_end in run:
            bias[start - first : end - first, start - first : end - first].triu_(1)
            if prefix_start >= first:
                bias[start - first : end - first, prefix_start - first : prefix_end - first] = 0
            elif prefix_end > prefix_start:
                return cls(F.pad(bias, (prefix_end - prefix_start, 0)), block_at[prefix_start])
        return cls(bias, None)


def attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(D) + bias) v, where `bias` (Lq, Lk) is 0 or -inf.

    q is (H, Lq, D), k and v are (G, Lk, D): each of the G key heads serves H / G query heads (Ainslie et al.
    2023, arXiv 2305.13245). Written out because that is faster than SDPA on a CPU. Returns (H, Lq, D).
    """
    (heads, queries, size), groups = q.shape, len(k)
    # The query heads of a group are laid one below another, so that no key is ever copied.
    q = q.reshape(groups, heads // groups * queries, size)
    scores = torch.baddbmm(bias.repeat(heads // groups, 1), q, k.mT, alpha=size**-0.5)  # (G, H/G * Lq, Lk)
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


def causal_bias(queries: int, keys: int, like: Tensor) -> Tensor:
    """(Lq, Lk): the last query sees every key, the one before it one key less, ...

    Not SDPA's `is_causal`, which aligns queries with the *first* keys: wrong as soon as there is a prefix.
    """
    return like.new_full((queries, keys), -math.inf).triu(keys - queries + 1)
