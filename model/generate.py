"""Generation of answers: a KV cache, sampling, and batches in which a seed repeats every answer."""

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from model.attention import attention, causal_bias
from model.config import ModelConfig
from model.transformer import Transformer, at_least_float32


class KVCache:
    """Keys and values of all tokens so far: the context of a transformer in place of a stream.

    Each of the `rows` is a sequence with room for `capacity` tokens. Before each call of the model `place`
    sets the row and the position of each token of the flat run.
    """

    def __init__(self, config: ModelConfig, rows: int, capacity: int, like: Tensor):
        config.check_fits(length=capacity)
        shape = (config.num_hidden_layers, rows, config.num_key_value_heads, capacity, config.head_dim)
        self.keys, self.values = like.new_zeros(shape), like.new_zeros(shape)

    def place(self, rows: Tensor, positions: Tensor) -> None:
        """Set rows and positions of the next tokens, (T,): equal rows together, positions ascending."""
        self.rows, self.positions = rows, positions
        self.one_each = len(rows.unique()) == len(rows)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Keep k and v, (G, T, D); each query of q (H, T, D) attends to its row up to itself: (H, T, D)."""
        keys, values = self.keys[layer], self.values[layer]  # (rows, G, capacity, D)
        keys[self.rows, :, self.positions] = k.transpose(0, 1).to(keys.dtype)
        values[self.rows, :, self.positions] = v.transpose(0, 1).to(values.dtype)
        return (self._decode if self.one_each else self._prefill)(q, keys, values).to(q.dtype)

    def _prefill(self, q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Any number of tokens a row, row by row."""
        outputs, start = [], 0
        rows, counts = self.rows.unique_consecutive(return_counts=True)
        for row, count in zip(rows.tolist(), counts.tolist(), strict=True):
            end = int(self.positions[start + count - 1]) + 1
            query, bias = q[:, start : start + count], causal_bias(count, end, q.device)
            outputs.append(attention(query, keys[row, :, :end], values[row, :, :end], bias))
            start += count
        return torch.cat(outputs, dim=1)

    def _decode(self, q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """One token a row, all rows at once. Rows differ in length, so a mask hides the empty places."""
        end = int(self.positions.max()) + 1
        visible = torch.arange(end, device=q.device) <= self.positions[:, None]  # (T, end)
        return F.scaled_dot_product_attention(
            q.transpose(0, 1)[:, :, None],  # (T, H, 1, D)
            keys[self.rows, :, :end],
            values[self.rows, :, :end],  # (T, G, end, D)
            attn_mask=visible[:, None, None],
            enable_gqa=True,
        )[:, :, 0].transpose(0, 1)


def sample(
    logits: Tensor, uniforms: Tensor, temperature: float, top_k: int = 0, top_p: float = 1.0
) -> Tensor:
    """One token a row: logits (A, V) and uniform draws (A,) in [0, 1) to ids (A,).

    Temperature 0 is greedy. `top_k` keeps the k likeliest tokens (0: all); `top_p` keeps the fewest tokens
    whose mass reaches p (Holtzman et al. 2020, arXiv 1904.09751). The draw inverts the cumulative
    distribution, so an answer does not depend on the other answers of its batch.
    """
    if temperature == 0:
        return logits.argmax(dim=-1)
    logits = at_least_float32(logits)  # Apple's MPS has no float64.
    probabilities, order = (logits / temperature).softmax(dim=-1).sort(dim=-1, descending=True)
    if top_k:
        probabilities[:, top_k:] = 0
    mass_before = probabilities.cumsum(dim=-1) - probabilities
    beyond = mass_before >= top_p * probabilities.sum(dim=-1, keepdim=True)
    probabilities[beyond & (mass_before > 0)] = 0  # The likeliest token always stays.
    cumulative = probabilities.cumsum(dim=-1)  # (A, V)
    choice = (cumulative <= uniforms[:, None].to(cumulative) * cumulative[:, -1:]).sum(dim=-1)
    return order.gather(1, choice[:, None])[:, 0]


@torch.no_grad()
def decode_steps(
    model: Transformer, prompts: list[list[int]], uniforms: Tensor, end_id: int, **sampling
) -> Iterator[tuple[list[int], list[int]]]:
    """Yield, step by step, the rows that have not ended and the next token of each.

    `uniforms` is (rows, max_new_tokens). A row ends with `end_id`.
    """
    like = model.embed_tokens.weight
    device, lengths = like.device, torch.tensor([len(prompt) for prompt in prompts])
    cache = KVCache(model.config, len(prompts), int(lengths.max()) + uniforms.shape[1], like)
    rows = torch.arange(len(prompts))
    tokens = torch.tensor([token for prompt in prompts for token in prompt])
    positions = torch.cat([torch.arange(length) for length in lengths.tolist()])
    token_rows, last = rows.repeat_interleave(lengths), lengths.cumsum(0) - 1
    for step in range(uniforms.shape[1]):
        cache.place(token_rows.to(device), positions.to(device))
        hidden = model.hidden(tokens.to(device), cache.positions, cache)[last.to(device)]  # (A, d)
        tokens = sample(model.logits(hidden), uniforms[rows, step].to(device), **sampling).cpu()
        yield rows.tolist(), tokens.tolist()
        running = tokens != end_id
        rows, tokens = rows[running], tokens[running]
        if len(rows) == 0:
            return
        token_rows, positions, last = rows, lengths[rows] + step, torch.arange(len(rows))


@dataclass
class Answer:
    """The tokens of one answer without its end token; `finished`: the model generated the end token."""

    tokens: list[int] = field(default_factory=list)
    finished: bool = False


def generate(
    model: Transformer,
    prompts: list[list[int]],
    end_id: int,
    max_new_tokens: int = 256,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    batch_size: int = 64,
    uniforms: Tensor | None = None,
) -> list[Answer]:
    """One `Answer` for each prompt, in the order of the prompts; the same for every `batch_size`.

    `uniforms`, (answers, max_new_tokens), are the draws in place of those of `seed`.
    """
    answers = [Answer() for _ in prompts]
    if uniforms is None:
        uniforms = torch.rand(len(prompts), max_new_tokens, generator=torch.Generator().manual_seed(seed))
    for start in range(0, len(prompts), batch_size):
        batch = slice(start, start + batch_size)
        steps = decode_steps(
            model, prompts[batch], uniforms[batch], end_id, temperature=temperature, top_k=top_k, top_p=top_p
        )
        for rows, tokens in steps:
            for row, token in zip(rows, tokens, strict=True):
                answer = answers[start + row]
                answer.finished = token == end_id
                if not answer.finished:
                    answer.tokens.append(token)
    return answers
