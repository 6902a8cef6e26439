"""A reward model: the transformer without its vocabulary head, and a head that scores a whole answer."""

import torch
from torch import Tensor, nn

from model.config import ModelConfig
from model.stream import TokenStream
from model.transformer import Transformer, at_least_float32


class RewardModel(Transformer):
    """``model(stream)`` computes the reward of every response.

    The head is named as in Hugging Face's ``…ForSequenceClassification``.
    """

    kind = "reward model"

    def __init__(self, config: ModelConfig):
        super().__init__(config)
        if not config.tie_word_embeddings:
            del self.lm_head  # It is not used, and ranks would wait for its gradient.
        # A bias would cancel in every difference of rewards. A head of zeros makes the first loss ln 2.
        self.score = nn.Linear(config.hidden_size, 1, bias=False)
        nn.init.zeros_(self.score.weight)

    @classmethod
    def from_language_model(cls, model: Transformer) -> "RewardModel":
        """The weights of a language model, shared and not copied, with a fresh head."""
        with torch.device("meta"):
            reward = cls(model.config)
        weights = {name: value for name, value in model.state_dict().items() if name != "lm_head.weight"}
        weights["score.weight"] = torch.zeros_like(model.norm.weight)[None]
        reward.load_state_dict(weights, strict=True, assign=True)
        return reward

    def forward(self, stream: TokenStream, balances: list[Tensor] | None = None) -> Tensor:
        """r(x, y), the score of each response's last hidden state, (R,), at least float32.

        Each layer of experts appends its load-balancing loss, a scalar, to the empty list `balances`.
        """
        hidden = self.hidden_of(stream, balances)[stream.last_tokens()]  # (R, d)
        # Autocast would round a matrix product to bf16, in which close rewards are equal.
        return (at_least_float32(hidden) * self.score.weight).sum(dim=-1)
