"""The batch: a flat stream of tokens, without padding.

A pair with prompt p p p, chosen answer c c and rejected answer r r r, in the forked layout:

    index         0  1  2 | 3  4 | 5  6  7
    token         p  p  p | c  c | r  r  r
    position      0  1  2 | 3  4 | 3  4  5     the rejected answer restarts at the end of the prompt
    attends to              0-2    0-2         and, causally, to its own segment
    predicted by            2  3   2  5  6     the end of the prompt predicts both first tokens

    tokens      p p p c c r r r                           (T,)
    positions   0 1 2 3 4 3 4 5                           (T,)
    segments    (0, 3, 0, 0)  (3, 5, 0, 3)  (5, 8, 0, 3)  (S, 4)
    predictors  2 3 2 5 6                                 (N,)
    targets     c c r r r                                 (N,)
    owners      0 0 1 1 1                                 (N,)

The prompt is computed once, and both answers attend to it. The pairs of a micro-batch follow one another.
`predictors`, `targets` and `owners` are the loss mask, already shifted: the hidden state at ``predictors[n]``
predicts token ``targets[n]`` of response ``owners[n]``. In the twin layout each answer has its own copy of
the prompt. A conversation of SFT is one segment and one response.
"""

from dataclasses import dataclass, fields, replace
from functools import cached_property

import torch
from torch import Tensor

from model.attention import AttentionBlock, FusedAttention, attend_in_blocks, attention_blocks


@dataclass(frozen=True)
class TokenStream:
    """T tokens in S segments; N of them predict a supervised token of one of R responses."""

    tokens: Tensor  # (T,) ids
    positions: Tensor  # (T,) rotary positions
    # (S, 4) query start, query end, prefix start, prefix end; on the CPU. The segments cover the stream in
    # order. A prefix is an earlier segment that has no prefix itself.
    segments: Tensor
    predictors: Tensor  # (N,) index of the hidden state that predicts a supervised token
    targets: Tensor  # (N,) id of that token
    owners: Tensor  # (N,) its response: K * row + place; for pairs K is 2: 0 chosen, 1 rejected
    responses: int  # R: a sum has a place for every response, also on a rank without tokens
    branches: int = 2  # K: responses of each row. The sum of a missing one is 0.
    reference_logps: Tensor | None = None  # (N,) log pi_ref of the targets, if computed before training
    score_margins: Tensor | None = None  # (B,) score_chosen - score_rejected, NaN for a pair without scores

    def to(self, device) -> "TokenStream":
        """The same stream on another device. A Python loop reads `segments`, so they stay on the CPU."""
        names = [f.name for f in fields(self) if f.name not in ("segments", "responses", "branches")]
        tensors = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        return replace(self, **{name: move(x, torch.device(device)) for name, x in tensors.items()})

    def sum_by_response(self, token_logps: Tensor) -> Tensor:
        """log pi(y | x) = sum over t of log pi(y_t | x, y_<t): (N,) token log-probs to (R,) sums."""
        return token_logps.new_zeros(self.responses).index_add(0, self.owners, token_logps)

    def sum_by_side(self, token_logps: Tensor) -> tuple[Tensor, Tensor]:
        """The sums of the chosen and of the rejected responses: (N,) token log-probs to (B,) twice.

        Of K ranked replies these are the best and the worst one.
        """
        return sides(self.sum_by_response(token_logps), self.branches)

    def lengths(self) -> Tensor:
        """|y|: the number of supervised tokens of each response, its end token included, (R,)."""
        return self.sum_by_response(torch.ones_like(self.owners))

    def beyond_the_shorter(self) -> Tensor:
        """Whether a token's place in its response is beyond the length of the pair's shorter one, (N,)."""
        lengths = self.lengths()
        starts = lengths.cumsum(0) - lengths  # The targets of a response are consecutive.
        shorter = lengths.view(-1, self.branches).amin(1).repeat_interleave(self.branches)  # (R,)
        places = torch.arange(len(self.owners), device=self.owners.device) - starts[self.owners]
        return places >= shorter[self.owners]

    def last_tokens(self) -> Tensor:
        """The index of the last token of each response, (R,)."""
        segments = self.segments.tolist()
        prefixes = {(start, end) for _, _, start, end in segments}
        # Segments that are prefixes are prompts. (0, 0), in place of a missing prefix, is not a segment.
        ends = [end for start, end, _, _ in segments if (start, end) not in prefixes]
        return torch.tensor(ends, dtype=torch.long, device=self.tokens.device) - 1

    @torch.compiler.disable  # The sizes of the blocks differ from stream to stream.
    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Each query attends to its prefix and, causally, to its segment.

        q is (H, T, D), k and v are (G, T, D); returns (H, T, D). A KV cache needs `layer`, a stream does not.
        """
        return attend_in_blocks(self.blocks, q, k, v)

    @cached_property
    def blocks(self) -> list[AttentionBlock]:
        """The calls of attention, the same for every layer and model."""
        return attention_blocks(self.segments.tolist(), self.tokens.device)

    @cached_property
    def fused(self) -> "FusedAttention | TokenStream":
        """A context that attends in one call; the stream itself if it has no tokens."""
        return FusedAttention(self.segments, self.tokens.device) if len(self.tokens) else self


def move(x: Tensor, device: torch.device) -> Tensor:
    """The tensor on `device`. The copy is asynchronous only to CUDA, from pinned memory.

    An asynchronous copy to Apple's MPS may read memory that is already freed. A copy of unpinned memory to
    CUDA waits for all earlier work of the device.
    """
    if device.type != "cuda" or x.device.type != "cpu":
        return x.to(device)
    return x.pin_memory().to(device, non_blocking=True)


def sides(values: Tensor, branches: int = 2) -> tuple[Tensor, Tensor]:
    """(R,) values of responses to (B,) of the chosen and (B,) of the rejected: a row's first and last."""
    chosen, *_, rejected = values.view(-1, branches).unbind(1)
    return chosen, rejected
