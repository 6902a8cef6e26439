"""A reward model: the transformer's body, and a head that turns a whole answer into one number."""

import torch
from torch import Tensor, nn

from model.config import ModelConfig
from model.stream import TokenStream
from model.transformer import Transformer


class RewardModel(Transformer):
    """``model(stream)`` gives the reward of every response. The head is named as in Hugging Face's
    ``…ForSequenceClassification``.
    """

    kind = "reward model"

    def __init__(self, config: ModelConfig):
        super().__init__(config)
        if not config.tie_word_embeddings:
            del self.lm_head  # It says nothing here, and ranks would wait for its gradient.
        # No bias: it would cancel in every difference of rewards. Zeros, so that the first loss is ln 2.
        self.score = nn.Linear(config.hidden_size, 1, bias=False)
        nn.init.zeros_(self.score.weight)

    @classmethod
    def from_language_model(cls, model: Transformer) -> "RewardModel":
        """A language model's body with a fresh head."""
        with model.norm.weight.device:  # Made on "meta" it has no memory either.
            reward = cls(model.config).to(model.norm.weight)
        weights = {name: value for name, value in model.state_dict().items() if name != "lm_head.weight"}
        reward.load_state_dict({**weights, "score.weight": reward.score.weight}, strict=True)
        return reward

    def forward(self, stream: TokenStream, balances: list[Tensor] | None = None) -> Tensor:
        """r(x, y), read at the last token of each response, which has seen it all: (R,), at least float32."""
        hidden = self.hidden_of(stream, balances)[stream.last_tokens()]  # (R, d)
        # A dot product written out: autocast would round a matrix product to bf16, and close rewards tie.
        return (hidden.to(torch.promote_types(hidden.dtype, torch.float32)) * self.score.weight).sum(dim=-1)
