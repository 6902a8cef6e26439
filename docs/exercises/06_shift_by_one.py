"""Exercise 6: the shift by one.

A sequence of tokens has a loss mask: `supervised[t]` is True if token t is in the loss. Return the indices of
the hidden states that predict the supervised tokens, in order. The first token is never supervised.
"""


def predictors(supervised: list[bool]) -> list[int]:
    raise NotImplementedError
