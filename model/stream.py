"""The batch: a flat stream of tokens, and how its tokens attend to one another.

There is no padding and no ``[B, L]`` rectangle. All pairs of a micro-batch lie one after another in one run
of T tokens; `segments` says who sees whom. `predictors`, `targets` and `owners` are the loss mask, already
shifted: the hidden state at ``predictors[n]`` predicts token ``targets[n]`` of response ``owners[n]``.
"""

import math
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class TokenStream:
    """T tokens in S segments, of which N predict a supervised token of one of R responses."""

    tokens: Tensor  # (T,) token ids of all pairs, one after another
    positions: Tensor  # (T,) RoPE position; a fork restarts it at the end of its prompt
    # (S, 4) query start, query end, prefix start, prefix end; stays on the CPU. Segments lie one after
    # another and cover the stream; a prefix is a whole earlier segment.
    segments: Tensor
    predictors: Tensor  # (N,) index of the hidden state that predicts a supervised token
    targets: Tensor  # (N,) the supervised token's id
    owners: Tensor  # (N,) which response it belongs to: 2 * pair + (0 chosen, 1 rejected)
    responses: int  # R, so that a response keeps its place in a sum even when a rank holds none

    def to(self, device) -> "TokenStream":
        """The same stream on another device. `segments` drive a Python loop, so they never leave the CPU."""
        names = [f.name for f in fields(self) if f.name not in ("segments", "responses")]
        return replace(self, **{name: getattr(self, name).to(device, non_blocking=True) for name in names})

    def sum_by_response(self, token_logps: Tensor) -> Tensor:
        """log pi(y | x) = sum over t of log pi(y_t | x, y_<t): (N,) token log-probs to (R,) sums."""
        return token_logps.new_zeros(self.responses).index_add(0, self.owners, token_logps)

    def sum_by_side(self, token_logps: Tensor) -> tuple[Tensor, Tensor]:
        """The same for pairs: (N,) token log-probs to the (B,) sums of the chosen and the rejected side."""
        chosen, rejected = self.sum_by_response(token_logps).view(-1, 2).unbind(1)
        return chosen, rejected

    def lengths(self) -> Tensor:
        """|y|: the supervised tokens of each response, its end token included, (R,)."""
        return torch.bincount(self.owners, minlength=self.responses)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Each segment's queries see its prefix and, causally, themselves.

        q is (H, T, D), k and v are (G, T, D); returns (H, T, D). `layer` is for contexts that remember.
        """
        starts, ends, prefix_starts, prefix_ends = self.segments.T.tolist()
        segment_at = {span: index for index, span in enumerate(zip(starts, ends, strict=True))}
        lengths = [end - start for start, end in zip(starts, ends, strict=True)]
        # Split, not sliced: the gradient of S slices would be S tensors as long as the stream.
        queries, keys, values = (x.split(lengths, dim=1) for x in (q, k, v))
        outputs = []
        for query, key, value, prefix_start, prefix_end in zip(
            queries, keys, values, prefix_starts, prefix_ends, strict=True
        ):
            if prefix_end > prefix_start:
                prefix = segment_at[prefix_start, prefix_end]
                key, value = torch.cat([keys[prefix], key], dim=1), torch.cat([values[prefix], value], dim=1)
            outputs.append(causal_attention(query, key, value))
        return torch.cat(outputs, dim=1)


def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(D)) v, where the last query sees every key, the one before it one key less, ...

    q is (H, Lq, D); k and v are (G, Lk, D) with Lk >= Lq; each of the G key heads serves H / G query heads
    (Ainslie et al. 2023, arXiv 2305.13245). Written out because SDPA's `is_causal` aligns queries with the
    *first* keys, which is wrong as soon as there is a prefix. Returns (H, Lq, D).
    """
    (heads, queries, size), (groups, keys, _) = q.shape, k.shape
    # The query heads of a group are laid one below another, so that no key is ever copied.
    shared = heads // groups
    future = q.new_full((queries, keys), -math.inf).triu(keys - queries + 1).repeat(shared, 1)
    q = q.reshape(groups, shared * queries, size)
    scores = torch.baddbmm(future, q, k.transpose(1, 2), alpha=size**-0.5)  # (G, H / G * Lq, Lk)
    return (scores.softmax(dim=-1).to(v.dtype) @ v).view(heads, queries, size)
