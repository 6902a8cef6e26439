"""How often one model's answers beat another's: the rate, its interval, and the rate at equal length."""

import math

import numpy as np

Z95 = 1.959964  # A normal variable lies within ± this many standard deviations 95 times in 100.


def contest(differences: list[list[float]], longer: list[list[float]]) -> dict:
    """Wins, ties, losses and rates from the differences of scores, first minus second, by prompt and sample.

    `longer` has the differences of lengths. A rate is None if all cases tie.
    """
    wins = [sum(difference > 0 for difference in row) for row in differences]
    losses = [sum(difference < 0 for difference in row) for row in differences]
    rate, interval = length_controlled(differences, longer)
    return {
        "wins": sum(wins),
        "ties": sum(row.count(0) for row in differences),
        "losses": sum(losses),
        "win_rate": sum(wins) / (sum(wins) + sum(losses)) if any(wins + losses) else None,
        "win_rate_ci95": win_interval(wins, losses),
        "win_rate_at_equal_length": rate,
        "win_rate_at_equal_length_ci95": interval,
    }


def win_interval(wins: list[int], losses: list[int]) -> list[float] | None:
    """95 % interval [low, high] of the win rate, from wins and losses per prompt; None if all cases tie.

    Samples of one prompt are correlated: a model that has learned the answer gives it every time. An interval
    over all cases as independent draws would be too narrow. This is Wilson's interval (1927) with Kish's
    effective sample size (1965), (sum of m)² / sum of m² for m decided cases per prompt. It is exact if all
    samples of a prompt agree, and too wide rather than too narrow if they do not.
    """
    decided = [won + lost for won, lost in zip(wins, losses, strict=True)]
    if not any(decided):
        return None
    return wilson(sum(wins) / sum(decided), sum(decided) ** 2 / sum(m * m for m in decided))


def wilson(rate: float, n: float) -> list[float]:
    """Wilson's 95 % interval [low, high] of a share that was observed in `n` independent cases."""
    centre = (rate + Z95**2 / (2 * n)) / (1 + Z95**2 / n)
    half = Z95 / (1 + Z95**2 / n) * math.sqrt(rate * (1 - rate) / n + Z95**2 / (4 * n * n))
    return [max(0.0, centre - half), min(1.0, centre + half)]


def length_controlled(
    differences: list[list[float]], longer: list[list[float]]
) -> tuple[float | None, list[float] | None]:
    """The win rate if both answers had the same length, and its 95 % interval; None if all cases tie.

    Fits P(win) = σ(a + b·x) to the decided cases, x = tanh(difference of lengths / its standard deviation),
    and returns σ(a): the length-controlled win rate of AlpacaEval (Dubois et al. 2024, arXiv 2404.04475)
    without its term for the difficulty of a prompt, which needs many models. The samples of a prompt are one
    cluster of the interval (the sandwich estimate of Liang and Zeger 1986).
    """
    cases = [
        (prompt, float(difference > 0), length)
        for prompt, (row, lengths) in enumerate(zip(differences, longer, strict=True))
        for difference, length in zip(row, lengths, strict=True)
        if difference
    ]
    if not cases:
        return None, None
    prompts, won, lengths = map(np.array, zip(*cases, strict=True))
    if won.min() == won.max():
        return float(won[0]), None  # σ(a) with a infinite
    scale = lengths.std() or 1.0
    x = np.stack([np.ones(len(lengths)), np.tanh(lengths / scale)], axis=1)  # (cases, 2)
    weights, prior = np.zeros(2), np.diag([0.0, 1.0])  # b ~ N(0, 1), so that b is finite
    for _ in range(50):  # Newton's method
        p = 1 / (1 + np.exp(-x @ weights))
        hessian = (x * (p * (1 - p))[:, None]).T @ x + prior
        step = np.linalg.solve(hessian, x.T @ (won - p) - prior @ weights)
        weights += step
        if abs(step).max() < 1e-10:
            break
    scores = np.zeros((len(differences), 2))
    np.add.at(scores, prompts, x * (won - p)[:, None])
    inverse = np.linalg.inv(hessian)
    half = Z95 * math.sqrt((inverse @ scores.T @ scores @ inverse)[0, 0])
    return sigmoid(weights[0]), [sigmoid(weights[0] - half), sigmoid(weights[0] + half)]


def sigmoid(x: float) -> float:
    return float(1 / (1 + math.exp(-x)))
