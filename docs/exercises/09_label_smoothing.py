"""Exercise 9: where cDPO comes to rest.

With label smoothing ε the loss is −(1 − ε) log σ(β m) − ε log σ(−β m), where m = a − b. It has a lowest
point, and there the pair stops pulling. Return that margin m.
"""


def resting_margin(beta: float, epsilon: float) -> float:
    raise NotImplementedError
