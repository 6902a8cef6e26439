"""The work that every implementation of the benchmark is given: pairs, weights, and their least cost.

    python -m bench.work                                # what each switch saves, counted and not timed
"""

import json
import time
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch

from dataset.packing import Windows, build_stream
from dataset.store import TokenStore
from dataset.tokenizer import ChatTokenizer
from model.stream import TokenStream
from model.transformer import ModelConfig, Transformer
from model.weights import save_model
from training.costs import forward_flops
from training.settings import SAMPLE

BETA = 0.1


@dataclass(frozen=True)
class Case:
    """A model's shape, the longest pair, pairs an optimizer step, and steps that are timed."""

    shape: dict
    vocabulary: int
    max_length: int
    pairs: int
    steps: int

    @property
    def windows(self) -> list[list[int]]:
        """Which pairs train_dpo.py takes in each step. In the first everyone warms up; it is not timed."""
        rows = self.pairs * (self.steps + 1)
        windows = Windows(rows, self.pairs, seed=0)
        return [windows[step].tolist() for step in range(self.steps + 1)]


SMALL = dict(hidden_size=256, num_hidden_layers=8, num_attention_heads=4, intermediate_size=704)
WIDE = dict(
    hidden_size=512, num_hidden_layers=8, num_attention_heads=8, intermediate_size=1408, rope_theta=1e6
)
CASES = {
    "7.5M, length 512": Case(SMALL, 6400, 512, pairs=8, steps=1),
    "26M, length 1024": Case(WIDE, 6400, 1024, pairs=8, steps=1),
    "vocabulary 32,000": Case(SMALL, 32_000, 512, pairs=8, steps=1),
}
TINY = dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128)
QUICK = {
    "tiny": Case(TINY, 2048, 256, pairs=4, steps=2),
    "tiny, vocabulary 8,000": Case(TINY, 8000, 256, pairs=4, steps=2),
}


# ---- Pairs and weights


def synthetic_pairs(case: Case, seed: int = 0) -> list[list[np.ndarray]]:
    """[prompt, chosen, rejected] ids: lengths are lognormal, sigma 0.7, medians 120 and 150, at most 512.

    A pair that is longer than the case allows is drawn again, as training would drop it. Those to warm up are
    short.
    """
    generator, pairs = np.random.default_rng(seed), []
    warm_up = set(case.windows[0])
    while len(pairs) < case.pairs * (case.steps + 1):
        lengths = generator.lognormal(np.log([120, 150, 150]), 0.7).astype(int).clip(2, 512)
        if len(pairs) in warm_up:
            lengths = lengths // 10 + 2
        if lengths[0] + lengths[1:].max() <= case.max_length:
            pairs.append([generator.integers(10, case.vocabulary, length) for length in lengths])
    return pairs


def timed(case: Case) -> list[int]:
    """The rows of the steps that are timed."""
    return [row for window in case.windows[1:] for row in window]


def write_store(folder: Path, pairs: list[list[np.ndarray]]) -> TokenStore:
    """The pairs as dataset/store.py keeps them, both responses supervised whole."""
    folder.mkdir(parents=True, exist_ok=True)
    lengths = np.array([[len(ids) for ids in pair] for pair in pairs])  # (rows, 3)
    ends = lengths.cumsum().reshape(lengths.shape)
    np.concatenate([ids for pair in pairs for ids in pair]).astype(np.int32).tofile(folder / "tokens.bin")
    supervised = [np.full(len(ids), place > 0) for pair in pairs for place, ids in enumerate(pair)]
    np.concatenate(supervised).tofile(folder / "supervised.bin")
    np.save(folder / "bounds.npy", np.concatenate([ends[:, :1] - lengths[:, :1], ends], axis=1))
    np.save(folder / "lines.npy", np.arange(1, len(pairs) + 1))
    np.save(folder / "records.npy", np.arange(len(pairs)))
    np.save(folder / "targets.npy", lengths[:, 1:].sum(axis=1))
    np.save(folder / "score_margins.npy", np.full(len(pairs), np.nan))
    report = dict(shape="synthetic", kept=len(pairs), dropped={}, longest=int(lengths.sum(axis=1).max()))
    (folder / "report.json").write_text(json.dumps(report))
    return TokenStore(folder, fingerprint="")


def make_model(case: Case, seed: int = 0) -> Transformer:
    """A random model; another seed is the same one moved a little, so that a loss is not ln 2."""
    torch.manual_seed(0)
    model = Transformer(ModelConfig(case.vocabulary, **case.shape))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters() if seed else ():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.02)
    return model


def write_model(folder: Path, case: Case) -> None:
    save_model(folder, make_model(case))
    ChatTokenizer(SAMPLE / "tokenizer.json").save(folder)


# ---- What it costs


def run_flops(case: Case, store: TokenStore) -> int:
    """Forward and backward (twice a forward) of the policy in all timed steps, each prompt computed once.

    The reference is left out: cached, it costs one forward for ever. So a live reference, a prompt computed
    twice and padding all show as a lower share of the machine.
    """
    config = ModelConfig(case.vocabulary, **case.shape)
    return 3 * forward_flops(config, build_stream(store, timed(case), "forked"))


def switches(case: Case) -> dict[str, int]:
    """FLOPs of the timed steps, one switch after another, from the textbook's rectangles to the floor."""
    config, pairs = ModelConfig(case.vocabulary, **case.shape), synthetic_pairs(case)
    padded = everywhere = twin = forked = 0
    for rows in case.windows[1:]:
        sides = [(pairs[row][0], pairs[row][side]) for row in rows for side in (1, 2)]
        lengths = [len(prompt) + len(answer) for prompt, answer in sides]
        answers = [len(answer) for _, answer in sides]
        padded += rows_flops(config, [max(lengths)] * len(sides), len(sides) * max(lengths))
        everywhere += rows_flops(config, lengths, sum(lengths))
        twin += rows_flops(config, lengths, sum(answers))
        shared = [len(pairs[row][0]) for row in rows]
        again = rows_flops(config, shared, 0)  # A prompt's second time, without any answer's scores.
        forked += rows_flops(config, lengths, sum(answers)) - again
    return {
        "padded, activations computed again, live reference": 5 * padded,
        "padded, live reference": 4 * padded,
        "no padding": 4 * everywhere,
        "only supervised positions meet the vocabulary": 4 * twin,
        "the prompt once": 4 * forked,
        "the reference cached: the floor": 3 * forked,
    }


def rows_flops(config: ModelConfig, lengths: list[int], targets: int) -> int:
    """A forward of separate rows of these lengths, of whose positions so many meet the vocabulary."""
    ends = np.cumsum([0, *lengths])
    segments = [(start, end, 0, 0) for start, end in pairwise(ends.tolist())]
    empty = torch.empty(0, dtype=torch.long)
    return forward_flops(
        config,
        TokenStream(
            tokens=empty.new_empty(int(ends[-1])), positions=empty, segments=torch.tensor(segments),
            predictors=empty, targets=empty.new_empty(targets), owners=empty, responses=0,
        ),
    )  # fmt: skip


def matrix_rate(seconds: float = 2.0, size: int = 1024) -> float:
    """The best float32 rate of this machine's matrix products, in FLOP/s, with the threads that are set."""
    a, b = torch.randn(size, size), torch.randn(size, size)
    best, end = 0.0, time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        a @ b
        best = max(best, 2 * size**3 / (time.perf_counter() - start))
    return best


def main() -> None:
    for name, case in CASES.items():
        counted = switches(replace(case, steps=50))
        floor = min(counted.values())
        print(f"\n{name}, {case.pairs} pairs a step, mean of 50 steps\n")
        print("| one switch after another | GFLOP a step | × floor |\n|---|---|---|")
        for switch, flops in counted.items():
            print(f"| {switch} | {flops / 50e9:.0f} | {flops / floor:.2f} |")


if __name__ == "__main__":
    main()
