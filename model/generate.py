"""Generation of answers: a KV cache, sampling, and batches in which a seed repeats every answer.

A prompt is computed once, in blocks, also if it gets several answers. Then each step computes one token of
every answer. Matrices are multiplied in the precision of the caller's autocast, as in training.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.attention import attention, causal_bias
from model.lora import AdaptedLinear
from model.rotary import rotary, rotate
from model.transformer import Layer, Transformer, at_least_float32

ROOM = 64  # The cache grows by this many tokens.
PREFILL = 512  # tokens of prompts in one forward: 8 heads of 512 x 8,192 scores are 134 MB
Piece = tuple[int, int, int]  # part of a prompt: its row, and its first and last place


class KVCache:
    """Keys and values of all tokens so far: the context of a transformer in place of a stream.

    Token t of a row is at place t. Places beyond a row's end are zero or outdated, and `decode` hides them.
    """

    def __init__(self, model: Transformer, rows: int, length: int):
        config, like, dtype = model.config, model.embed_tokens.weight, precision(model)
        shape = rows, config.num_key_value_heads, rounded(length), config.head_dim
        layers = range(config.num_hidden_layers)
        self.keys = [like.new_zeros(shape, dtype=dtype) for _ in layers]  # each (rows, G, capacity, D)
        self.values = [like.new_zeros(shape, dtype=dtype) for _ in layers]

    @property
    def capacity(self) -> int:
        """Places of a row."""
        return self.keys[0].shape[2]

    def resize(self, rows: Tensor, length: int) -> None:
        """Make row i a copy of the old row `rows[i]`, with room for `length` tokens."""
        for tensors in (self.keys, self.values):
            for layer, old in enumerate(tensors):
                _, groups, capacity, size = old.shape
                new = old.new_zeros(len(rows), groups, rounded(length), size)
                kept = min(capacity, rounded(length))
                new[:, :, :kept] = old[rows, :, :kept]
                tensors[layer] = new

    def prefill(self, pieces: list[Piece]) -> None:
        """Set the pieces of prompts that the next forward computes, in the order of its tokens."""
        self.pieces = pieces

    def decode(self, positions: Tensor) -> None:
        """Let the next forward compute one token of every row, at these positions, (rows,)."""
        self.pieces, self.positions = [], positions
        rows, _, capacity, _ = self.keys[0].shape
        self.rows = torch.arange(rows, device=positions.device)
        visible = torch.arange(capacity, device=positions.device) <= positions[:, None]
        bias = torch.zeros(visible.shape, dtype=self.keys[0].dtype, device=positions.device)
        self.bias = bias.masked_fill_(~visible, -torch.inf)[:, None, None]  # (rows, 1, 1, capacity)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Keep k and v, (G, T, D); each query of q (H, T, D) attends to its row up to itself: (H, T, D)."""
        keys, values = self.keys[layer], self.values[layer]
        k, v = k.to(keys.dtype), v.to(values.dtype)
        return (self._prefill if self.pieces else self._decode)(q, k, v, keys, values).to(q.dtype)

    def _prefill(self, q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Piece by piece."""
        outputs, start = [], 0
        for row, first, last in self.pieces:
            here = slice(start, start := start + last - first)
            keys[row, :, first:last], values[row, :, first:last] = k[:, here], v[:, here]
            bias = causal_bias(last - first, last, q.device)
            outputs.append(attention(q[:, here], keys[row, :, :last], values[row, :, :last], bias))
        return torch.cat(outputs, dim=1)

    def _decode(self, q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """All rows at once. The query heads of a key head are its queries, so that no key is copied."""
        keys[self.rows, :, self.positions] = k.transpose(0, 1)
        values[self.rows, :, self.positions] = v.transpose(0, 1)
        grouped = q.transpose(0, 1).unflatten(1, (keys.shape[1], -1)).to(keys.dtype)  # (rows, G, H/G, D)
        output = F.scaled_dot_product_attention(grouped, keys, values, attn_mask=self.bias)
        return output.flatten(1, 2).transpose(0, 1)


class DecodingLayer:
    """A layer whose queries, keys and values are one product, and whose gate and up are another.

    The matrices are copies, with their adapters merged, in the precision of the products: autocast would
    convert them again for every token.
    """

    def __init__(self, layer: Layer, dtype: torch.dtype):
        attention, self.layer, self.dtype = layer.self_attn, layer, dtype
        self.qkv = stacked([attention.q_proj, attention.k_proj, attention.v_proj], dtype)
        self.o = stacked([attention.o_proj], dtype)
        if not layer.has_experts:
            self.gate_up = stacked([layer.mlp.gate_proj, layer.mlp.up_proj], dtype)
            self.down = stacked([layer.mlp.down_proj], dtype)

    def __call__(self, x: Tensor, rotation: tuple[Tensor, Tensor], cache: KVCache, index: int) -> Tensor:
        """(A, d) to (A, d): one token of each of A rows, the same sums as in `Layer`."""
        attention, groups = self.layer.self_attn, cache.keys[index].shape[1]
        h = self.layer.input_layernorm(x).to(self.dtype)
        heads = F.linear(h, *self.qkv).unflatten(-1, (-1, attention.head_dim))  # (A, H + G + G, D)
        q, k, v = heads.tensor_split((-2 * groups, -groups), dim=1)
        q, k = rotate(attention.q_norm(q), rotation), rotate(attention.k_norm(k), rotation)
        attended = cache.attend(index, *(x.transpose(0, 1) for x in (q, k, v)))  # (H, A, D)
        x = x + F.linear(attended.transpose(0, 1).flatten(1), *self.o)
        h = self.layer.post_attention_layernorm(x)
        if self.layer.has_experts:
            return x + self.layer.mlp(h)[0]
        gate, up = F.linear(h.to(self.dtype), *self.gate_up).chunk(2, dim=-1)
        return x + F.linear(F.silu(gate) * up, *self.down)


class Decoder:
    """A model made ready for steps of one token a row; build it once for many answers."""

    def __init__(self, model: Transformer):
        self.model, dtype = model, precision(model)
        with torch.inference_mode():
            self.layers = [DecodingLayer(layer, dtype) for layer in model.layers]
            tied = model.config.tie_word_embeddings
            self.vocabulary = (model.embed_tokens if tied else model.lm_head).weight.to(dtype)  # (V, d)

    def hidden(self, tokens: Tensor, positions: Tensor, cache: KVCache) -> Tensor:
        """Final hidden states, (A, d), of the next token of each row: as `Transformer.hidden`."""
        config = self.model.config
        x = self.model.embed_tokens(tokens)
        rotation = rotary(positions, config.head_dim, config.rope_theta, config.rope_scaling)
        for index, layer in enumerate(self.layers):
            x = layer(x, rotation, cache, index)
        return self.model.norm(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores of the next token, (A, d) to (A, V)."""
        return F.linear(hidden.to(self.vocabulary.dtype), self.vocabulary)


def precision(model: Transformer) -> torch.dtype:
    """The dtype in which the caller's autocast multiplies matrices; without autocast the model's."""
    weight = model.embed_tokens.weight
    kind = weight.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype


def stacked(linears: list[nn.Linear], dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of one product in place of several; the outputs follow one another."""
    weights = [
        linear.merged() if isinstance(linear, AdaptedLinear) and linear.on else linear.weight
        for linear in linears
    ]
    biases = [linear.bias for linear in linears if linear.bias is not None]
    return torch.cat(weights).to(dtype), torch.cat(biases).to(dtype) if biases else None


def rounded(length: int) -> int:
    """A multiple of ROOM.

    SDPA adds the terms of a row in the same order for each of these lengths, so that a row has the same bits
    beside longer rows.
    """
    return -(-length // ROOM) * ROOM


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
    logits, order = at_least_float32(logits), None  # Apple's MPS has no float64.
    if top_k or top_p < 1:
        size = logits.shape[-1]
        logits, order = logits.topk(min(top_k or size, size), dim=-1)  # sorted, the likeliest first
    probabilities = (logits / temperature).softmax(dim=-1)
    cumulative = probabilities.cumsum(dim=-1)  # (A, V), or fewer
    if top_p < 1:
        probabilities[cumulative - probabilities >= top_p] = 0  # The mass before the likeliest token is 0.
        cumulative = probabilities.cumsum(dim=-1)
    total = cumulative[:, -1:].contiguous()
    choice = torch.searchsorted(cumulative, uniforms[:, None].to(total) * total, right=True)
    # Rounding can carry the largest draws to the total: they take the last token that has a probability.
    choice = choice.minimum(torch.searchsorted(cumulative, total))
    return choice[:, 0] if order is None else order.gather(1, choice)[:, 0]


def prefill(model: Transformer, prompts: list[list[int]], cache: KVCache) -> Tensor:
    """Fill the cache with the prompts; the final hidden state of each one's last token, (P, d).

    A forward has at most PREFILL tokens. Prompts are cut at multiples of PREFILL, whatever their neighbours.
    """
    device = model.embed_tokens.weight.device
    batches: list[list[Piece]] = [[]]
    free = PREFILL
    for row, prompt in enumerate(prompts):
        for first in range(0, len(prompt), PREFILL):
            piece = row, first, min(first + PREFILL, len(prompt))
            if piece[2] - first > free:
                batches.append([])
                free = PREFILL
            batches[-1].append(piece)
            free -= piece[2] - first
    hidden = []
    for pieces in batches:
        tokens = [token for row, first, last in pieces for token in prompts[row][first:last]]
        positions = torch.cat([torch.arange(first, last) for _, first, last in pieces])
        cache.prefill(pieces)
        states = model.hidden(torch.tensor(tokens, device=device), positions.to(device), cache)
        ends, end = [], 0
        for row, first, last in pieces:
            end += last - first
            if last == len(prompts[row]):
                ends.append(end - 1)
        hidden.append(states[ends])
    return torch.cat(hidden)


@torch.inference_mode()
def decode_steps(
    decoder: Decoder,
    prompts: list[list[int]],
    uniforms: Tensor,
    end_id: int,
    samples: int = 1,
    **sampling,
) -> Iterator[tuple[list[int], list[int]]]:
    """Yield, step by step, the answers that have not ended and the next token of each.

    Answer `samples` * i + j is number j of prompt i. `uniforms` is (answers, max_new_tokens). An answer ends
    with `end_id`.
    """
    model, steps = decoder.model, uniforms.shape[1]
    device = model.embed_tokens.weight.device
    lengths = [len(prompt) for prompt in prompts]
    model.config.check_fits(length=max(lengths) + steps)
    if steps == 0:
        return
    cache = KVCache(model, len(prompts), max(lengths))
    origins = torch.arange(len(prompts), device=device).repeat_interleave(samples)
    hidden = prefill(model, prompts, cache)[origins]  # (rows, d)
    positions, uniforms = torch.tensor(lengths, device=device)[origins], uniforms.to(device)
    answers = list(range(len(uniforms)))  # the answer of each row
    running = set(answers)
    cache.resize(origins, max(lengths) + 1)
    for step in range(steps):
        tokens = sample(decoder.logits(hidden), uniforms[:, step], **sampling)  # (rows,)
        ids = tokens.tolist()
        new = {answer: ids[row] for row, answer in enumerate(answers) if answer in running}
        yield list(new), list(new.values())
        running -= {answer for answer, token in new.items() if token == end_id}
        if not running or step == steps - 1:
            return
        # Rows that have ended leave. While they are few they stay, unseen: leaving copies the whole cache. A
        # row that stays needs room as well.
        longest = max(lengths[answer // samples] for answer in answers) + step + 1
        if len(running) <= 0.75 * len(answers) or longest > cache.capacity:
            rows = [row for row, answer in enumerate(answers) if answer in running]
            answers = [answers[row] for row in rows]
            rows = torch.tensor(rows, device=device)
            tokens, positions, uniforms = tokens[rows], positions[rows], uniforms[rows]
            cache.resize(rows, max(lengths[answer // samples] for answer in answers) + step + 1)
        cache.decode(positions)
        hidden = decoder.hidden(tokens, positions, cache)  # (rows, d)
        positions = positions + 1


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
    samples: int = 1,
    uniforms: Tensor | None = None,
) -> list[Answer]:
    """`samples` answers for each prompt: answer j of prompt i is number i * `samples` + j of the list.

    A batch has at most `batch_size` answers, or those of one prompt. The answers are the same for every batch
    size, and those of each prompt repeated `samples` times. `uniforms` are the draws in place of those of
    `seed`, (answers, max_new_tokens).
    """
    answers = [Answer() for _ in range(len(prompts) * samples)]
    if uniforms is None:
        uniforms = torch.rand(len(answers), max_new_tokens, generator=torch.Generator().manual_seed(seed))
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))  # Equal lengths waste no attention.
    decoder, sampling = Decoder(model), dict(temperature=temperature, top_k=top_k, top_p=top_p)
    size = max(1, batch_size // samples)
    for start in range(0, len(prompts), size):
        batch = order[start : start + size]
        places = [i * samples + j for i in batch for j in range(samples)]
        steps = decode_steps(
            decoder, [prompts[i] for i in batch], uniforms[places], end_id, samples, **sampling
        )
        for rows, tokens in steps:
            for row, token in zip(rows, tokens, strict=True):
                answer = answers[places[row]]
                answer.finished = token == end_id
                if not answer.finished:
                    answer.tokens.append(token)
    return answers
