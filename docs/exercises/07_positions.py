"""Exercise 7: positions in a stream.

A stream contains the prompt once, then the chosen answer, then the rejected answer. Both answers attend to
the prompt and not to each other. Return the position of every token for the rotary embedding; the arguments
are the three lengths. Each answer must get the log-probs that it would have in a sequence of its own.
"""


def positions(prompt: int, chosen: int, rejected: int) -> list[int]:
    raise NotImplementedError
