"""Pairs whose sides share most of their tokens: edit distance, regions, and the gradient of each region.

A chosen answer has three regions: the `prefix` that both sides share, the `difference`, and the `rest`, which
both sides share again. Pal et al. 2024 (arXiv 2402.13228, section 3) derive DPO's failure from them.
"""

import math
import random
from itertools import takewhile
from statistics import mean

from dataset.store import TokenStore
from eval.explain import explain_rows
from model.transformer import Transformer
from training.objective import Objective, ObjectiveSettings

REGIONS = ("prefix", "difference", "rest")


def with_other(text: str, phrases: tuple[str, ...], rng: random.Random) -> str:
    """The text with the phrase that it begins or ends with replaced by another one."""
    for phrase in sorted(phrases, key=len, reverse=True):
        other = rng.choice([each for each in phrases if each != phrase])
        if text.startswith(phrase):
            return other + text.removeprefix(phrase)
        if text.endswith(phrase):
            return text.removesuffix(phrase) + other
    return text


def sides_of(store: TokenStore) -> tuple[list[list[int]], list[list[int]]]:
    """The tokens of all chosen and of all rejected answers, end tokens included."""
    rows = [store.row(row) for row in range(len(store))]
    return [chosen.tolist() for _, (chosen, _), _ in rows], [rejected.tolist() for *_, (rejected, _) in rows]


def edit_distance(a: list[int], b: list[int]) -> int:
    """The fewest insertions, deletions and replacements that turn a into b (Levenshtein 1966)."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, start=1):
        previous, row = row, [i]
        for j, y in enumerate(b, start=1):
            row.append(min(previous[j] + 1, row[-1] + 1, previous[j - 1] + (x != y)))
    return row[-1]


def shared(a: list[int], b: list[int]) -> int:
    """The number of equal tokens at the start of both."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False)))


def by_region(policy: Transformer, reference: Transformer, store: TokenStore) -> dict[str, dict[str, float]]:
    """Of the chosen answers' tokens in each region: gradient of the margin, and log-ratio; means over tokens.

    The gradient is that of log π_ref(y_w|x) − log π_ref(y_l|x) by the logit of the token y_t. A token of the
    prefix or the rest has a twin on the rejected side, whose logit counts as the same one. Its gradient is
    (1 − s_w) − (1 − s_l) with s = π_ref(y_t | x, y_<t), which is 0 in the prefix. In the difference it is
    1 − s_w.
    """
    gradients: dict[str, list[float]] = {region: [] for region in REGIONS}
    logratios: dict[str, list[float]] = {region: [] for region in REGIONS}
    objective = Objective(ObjectiveSettings())
    for row in range(len(store)):
        (chosen, rejected), _ = explain_rows(policy, reference, store, [row], objective)[0]
        first = shared(chosen.tokens, rejected.tokens)
        last = shared(chosen.tokens[first:][::-1], rejected.tokens[first:][::-1])
        for place, logp in enumerate(chosen.reference_logps):
            from_end = place - len(chosen.tokens)
            region = "prefix" if place < first else "rest" if -from_end <= last else "difference"
            twin = {"prefix": place, "rest": from_end}.get(region)
            other = 1.0 if twin is None else math.exp(rejected.reference_logps[twin])
            gradients[region].append(other - math.exp(logp))
            logratios[region].append(chosen.logratios[place])
    return {
        region: {"gradient": mean(gradients[region]), "logratio": mean(logratios[region])}
        for region in REGIONS
    }
