"""Mixture of experts: a router sends each token to a few of many feed-forward networks.

Only the chosen networks compute a token, so a model has more weights than it uses for one. A stream has no
padding: every token that is routed, and counted in the balance, is a token of the data. Modules are named as
in Hugging Face's Qwen2-MoE, so that checkpoints map name by name.
"""

import torch
from torch import Tensor, nn


class MixtureOfExperts(nn.Module):
    """The sum of a token's `num_experts_per_tok` likeliest experts, weighted by the router (Mixtral).

        y = sum over chosen e of w_e FFN_e(x),  w = softmax(W x)

    With `norm_topk_prob` the weights of the chosen experts are divided by their sum. A shared expert adds
    sigmoid(v x) FFN_shared(x) to every token (Qwen2-MoE).
    """

    def __init__(self, config, feed_forward: type[nn.Module]):
        super().__init__()
        self.chosen_per_token, self.normalized = config.num_experts_per_tok, config.norm_topk_prob
        size, shared_size = config.moe_intermediate_size, config.shared_expert_intermediate_size
        self.gate = nn.Linear(config.hidden_size, config.num_experts, bias=False)  # the router
        self.experts = nn.ModuleList(
            feed_forward(config.hidden_size, size) for _ in range(config.num_experts)
        )
        self.shared_expert = feed_forward(config.hidden_size, shared_size) if shared_size else None
        self.shared_expert_gate = nn.Linear(config.hidden_size, 1, bias=False) if shared_size else None

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(T, d) to (T, d), and the layer's load-balancing loss, a scalar."""
        logits = self.gate(x)  # (T, E)
        # At least float32, as in Mixtral, also under autocast: the balance sums over thousands of tokens.
        probabilities = logits.to(torch.promote_types(logits.dtype, torch.float32)).softmax(dim=-1)
        weights, chosen = probabilities.topk(self.chosen_per_token)  # (T, k)
        if self.normalized:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        counts = chosen.flatten().bincount(minlength=len(self.experts))  # (E,)

        # The T k choices, sorted by expert. Every expert is called, also without a token: its gradient is
        # then zeros rather than None, for which other ranks would wait.
        order = chosen.flatten().argsort(stable=True)  # (T k,)
        parts = x[order // self.chosen_per_token].split(counts.tolist())
        outputs = torch.cat([expert(part) for expert, part in zip(self.experts, parts, strict=True)])
        # Back in the order of the tokens, then a sum over k. `index_add` on CUDA adds in any order, and then
        # policy and reference would differ in the last bits.
        outputs = outputs[order.argsort()].unflatten(0, chosen.shape)  # (T, k, d)
        y = (weights[..., None] * outputs).sum(dim=1)  # (T, d)
        if self.shared_expert is not None:
            y = y + self.shared_expert_gate(x).sigmoid() * self.shared_expert(x)
        return y, load_balance(probabilities, counts)


def router_loss(balances: list[Tensor]) -> Tensor | float:
    """The mean of the layers' load-balancing losses; 0.0 for a dense model, whose list is empty."""
    return torch.stack(balances).mean() if balances else 0.0


def load_balance(probabilities: Tensor, counts: Tensor) -> Tensor:
    """E sum over e of f_e P_e (Fedus et al. 2021, arXiv 2101.03961, eq. 4 to 6; for k > 1 as in Mixtral).

    `probabilities` (T, E) are the router's; `counts` (E,) are the tokens that chose each expert. f_e is the
    share of the tokens that chose expert e, P_e its mean probability. The loss is k if all experts are used
    equally, and up to E if the same k always are. Only P has a gradient: it lowers the probability of experts
    that are chosen too often. Without tokens the loss is 0.
    """
    tokens, experts = max(1, len(probabilities)), len(counts)
    chosen_share = counts.to(probabilities) / tokens  # f, (E,), sums to k
    mean_probability = probabilities.sum(dim=0) / tokens  # P, (E,), sums to 1
    return experts * (chosen_share * mean_probability).sum()
