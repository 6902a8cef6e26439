"""The DPO of tutorials on this project's model: padded rectangles, a loss mask, a DataLoader.

    python -m docs.textbook runs/demo/sft dataset/sample/preferences.jsonl          # 10 steps

A page to compare train_dpo.py with. Losses, gradients and weights are those of the real loop, and
tests/test_textbook.py shows it. What differs is the batch. Here it is a rectangle of B rows and L columns: a
prompt is computed once for each answer, short rows end in padding, and scores of the whole vocabulary are
computed at every position. The stream of model/stream.py computes each prompt once, has no padding, and
computes scores only where a supervised token is predicted.
"""

import copy
import sys

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader

from dataset.records import read_preferences
from dataset.store import encode
from dataset.tokenizer import ChatTokenizer
from model.transformer import Transformer
from model.weights import load_model
from training.schedule import adamw, cosine_lr, set_lr

PAD = 0  # The loss mask hides padding, so any id will do.


def read_pairs(path: str, tokenizer: ChatTokenizer) -> list[list[list[int]]]:
    """Ids of the prompt, of the chosen and of the rejected answer, for each pair of a file."""
    return [[ids for ids, _ in encode(record, tokenizer)] for record in read_preferences(path)]


def collate(pairs: list[list[list[int]]]) -> tuple[Tensor, Tensor]:
    """Pad B pairs to a rectangle: ids and loss mask, both (2B, L). Chosen rows first, then rejected rows."""
    rows = [(pair[0], pair[side]) for side in (1, 2) for pair in pairs]
    length = max(len(prompt) + len(answer) for prompt, answer in rows)
    ids = torch.full((len(rows), length), PAD)
    mask = torch.zeros(len(rows), length, dtype=torch.bool)
    for row, (prompt, answer) in enumerate(rows):
        end = len(prompt) + len(answer)
        ids[row, :end] = torch.tensor(prompt + answer)
        mask[row, len(prompt) : end] = True  # the answer and its end token
    return ids, mask


class Causal:
    """Attention within each row of a rectangle: a token attends to itself and to those before it.

    Padding is at the end of a row, where no real token attends to it. So it needs no attention mask.
    """

    def __init__(self, rows: int):
        self.rows = rows

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """(heads, B·L, D) to (heads, B·L, D)."""
        q, k, v = (x.unflatten(1, (self.rows, -1)).transpose(0, 1) for x in (q, k, v))  # (B, heads, L, D)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return out.transpose(0, 1).flatten(1, 2)


def answer_logps(model: Transformer, ids: Tensor, mask: Tensor) -> Tensor:
    """log π(y|x) of each row, (B,), from ids and loss mask, (B, L)."""
    rows, length = ids.shape
    positions = torch.arange(length, device=ids.device).repeat(rows)
    hidden = model.hidden(ids.flatten(), positions, Causal(rows)).view(rows, length, -1)
    logits = model.logits(hidden[:, :-1])  # (B, L − 1, V): position t predicts token t + 1
    targets, mask = ids[:, 1:], mask[:, 1:]  # the shift by one
    logps = logits.log_softmax(dim=-1).gather(2, targets.unsqueeze(2)).squeeze(2)  # (B, L − 1)
    return (logps * mask).sum(dim=1)


def dpo_loss(policy: Transformer, reference: Transformer, ids: Tensor, mask: Tensor, beta: float) -> Tensor:
    """The mean loss of B pairs, a scalar, from ids and loss mask, (2B, L)."""
    chosen, rejected = answer_logps(policy, ids, mask).chunk(2)  # (B,) each
    with torch.no_grad():
        reference_chosen, reference_rejected = answer_logps(reference, ids, mask).chunk(2)
    margins = (chosen - reference_chosen) - (rejected - reference_rejected)
    return -F.logsigmoid(beta * margins).mean()


def train(policy: Transformer, loader, beta: float, lr: float, warmup_steps: int, total_steps: int) -> None:
    """One optimizer step for each batch of the loader; changes the policy in place."""
    reference = copy.deepcopy(policy).eval().requires_grad_(False)
    optimizer = adamw(policy, weight_decay=0.0)
    for step, (ids, mask) in enumerate(loader):
        set_lr(optimizer, cosine_lr(step, total_steps, lr, warmup_steps))
        loss = dpo_loss(policy, reference, ids, mask, beta)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        print(f"step {step + 1}: loss {loss.item():.4f}, {mask.numel()} places for {mask.sum()} tokens")


def main(model: str, data: str, steps: int = 10, batch_size: int = 16) -> None:
    policy, tokenizer = load_model(model), ChatTokenizer(f"{model}/tokenizer.json")
    pairs = read_pairs(data, tokenizer)[: steps * batch_size]
    loader = DataLoader(pairs, batch_size, shuffle=True, collate_fn=collate)
    train(policy, loader, beta=0.1, lr=2e-5, warmup_steps=2, total_steps=steps)


if __name__ == "__main__":
    main(*sys.argv[1:3])
