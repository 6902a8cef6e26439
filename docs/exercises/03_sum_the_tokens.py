"""Exercise 3: from the log-probs of tokens to the log-prob of an answer.

`owners[n]` is the number of the answer, from 0 to `responses` − 1, to which `token_logps[n]` belongs.
Both are (N,). Return log π(y|x) of each answer, (responses,).
"""

from torch import Tensor


def log_prob_of_answers(token_logps: Tensor, owners: Tensor, responses: int) -> Tensor:
    raise NotImplementedError
