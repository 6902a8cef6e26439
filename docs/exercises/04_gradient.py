"""Exercise 4: the gradient of DPO's loss, without autograd.

Return the derivative of −log σ(β (a − b)) by a, the log-ratio of the chosen answer. `margin` is a − b.
"""


def gradient(margin: float, beta: float) -> float:
    raise NotImplementedError
