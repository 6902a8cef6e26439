"""The work that every implementation of the benchmark is given: pairs, weights, and their least cost.

    python -m bench.work                                # what each switch saves, counted and not timed
"""

import json
import math
import resource
import sys
import time
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch

from dataset.packing import Windows, build_stream
from dataset.store import TokenStore, open_store
from dataset.tokenizer import ChatTokenizer
from errors import InputError
from model.config import PRESETS, ModelConfig
from model.stream import TokenStream
from model.transformer import Transformer
from model.weights import save_model
from training.settings import ROOT, SAMPLE

BETA = 0.1
DATA = ROOT.parent / "shared" / "data"  # Real pairs, where the machine has them.


@dataclass(frozen=True)
class Case:
    """A model's shape, the longest pair, pairs an optimizer step, and steps that are timed."""

    shape: dict
    vocabulary: int
    max_length: int
    pairs: int
    steps: int
    data: str = ""  # a file in DATA whose pairs are taken, instead of synthetic ones
    lengths: tuple[int, int, int] | None = None  # of every prompt, chosen and rejected; None: drawn
    forward: int = 0  # pairs a forward, if those of a step are more than memory holds; 0: all of them
    warm_up: int = 10  # The first step's texts are so many times shorter, where a step is long enough.

    @property
    def micro_batch(self) -> int:
        """Pairs a forward, a divisor of those a step."""
        return math.gcd(self.pairs, self.forward)

    @property
    def windows(self) -> list[list[int]]:
        """Which pairs train_dpo.py takes in each step. In the first everyone warms up; it is not timed."""
        rows = self.pairs * (self.steps + 1)
        windows = Windows(rows, self.pairs, seed=0)
        return [windows[step].tolist() for step in range(self.steps + 1)]


SMALL = dict(hidden_size=256, num_hidden_layers=8, num_attention_heads=4, intermediate_size=704)
HALF_A_BILLION = {**PRESETS["qwen2.5-0.5b"], "attention_bias": False}
HH = "preferences/hh_rlhf_harmless-base_test.jsonl.gz"
ULTRAFEEDBACK = "preferences/ultrafeedback_train_1000.jsonl.gz"
CASES = {
    "7.5M, length 512": Case(SMALL, 6400, 512, pairs=8, steps=1),
    "26M, length 1024": Case(PRESETS["26m"], 6400, 1024, pairs=8, steps=1),
    "vocabulary 32,000": Case(SMALL, 32_000, 512, pairs=8, steps=1),
    "7.5M, HH": Case(SMALL, 6400, 512, pairs=8, steps=1, data=HH),
    "26M, UltraFeedback": Case(PRESETS["26m"], 6400, 1024, pairs=8, steps=1, data=ULTRAFEEDBACK),
}
# A GPU's first long step still asks for memory and looks for kernels, so the step to warm up is a long one.
CUDA_CASES = {
    "26M, 8 pairs": Case(PRESETS["26m"], 6400, 1024, 8, steps=20, warm_up=1),
    "26M, 64 pairs": Case(PRESETS["26m"], 6400, 1024, 64, steps=10, warm_up=1),
    "26M, vocabulary 32,000": Case(PRESETS["26m"], 32_000, 1024, 64, steps=10, warm_up=1),
    "26M, UltraFeedback": Case(PRESETS["26m"], 6400, 1024, 64, steps=4, warm_up=1, data=ULTRAFEEDBACK),
    "104M, 8 pairs": Case(PRESETS["104m"], 6400, 1024, 8, steps=10, warm_up=1),
    "104M, 64 pairs": Case(PRESETS["104m"], 6400, 1024, 64, steps=5, forward=32, warm_up=1),
    "0.5B, 8 pairs": Case(HALF_A_BILLION, 152_000, 2048, 8, steps=5, warm_up=1),
    "0.5B, 64 pairs": Case(HALF_A_BILLION, 152_000, 2048, 64, steps=2, forward=8, warm_up=1),
}
TINY = dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128)
QUICK = {
    "tiny": Case(TINY, 2048, 256, pairs=4, steps=2),
    "tiny, vocabulary 8,000": Case(TINY, 8000, 256, pairs=4, steps=2),
}


# ---- Pairs and weights


def make_pairs(case: Case) -> list[list[np.ndarray]]:
    """[prompt, chosen, rejected] ids of all steps, the same for everyone; those to warm up are shorter."""
    return real_pairs(case) if case.data else synthetic_pairs(case)


def synthetic_pairs(case: Case, seed: int = 0) -> list[list[np.ndarray]]:
    """Random ids: lengths are lognormal, sigma 0.7, medians 120 and 150, at most 512; or the case's own.

    Beyond a length of 1,024 they are so many times longer. A pair that is longer than the case allows is
    drawn again, as training would drop it.
    """
    generator, pairs = np.random.default_rng(seed), []
    warm_up, longer = set(case.windows[0]), max(1, case.max_length // 1024)
    while len(pairs) < case.pairs * (case.steps + 1):
        lengths = longer * generator.lognormal(np.log([120, 150, 150]), 0.7)
        lengths = np.array(case.lengths or lengths.astype(int).clip(2, 512 * longer))
        if len(pairs) in warm_up:
            lengths = lengths // case.warm_up + 2
        if lengths[0] + lengths[1:].max() <= case.max_length:
            pairs.append([generator.integers(10, case.vocabulary, length) for length in lengths])
    return pairs


def is_here(case: Case) -> bool:
    return not case.data or (DATA / case.data).is_file()


def real_pairs(case: Case) -> list[list[np.ndarray]]:
    """Pairs of a file of people's preferences, drawn at random, as training reads them."""
    tokenizer, count = ChatTokenizer(SAMPLE / "tokenizer.json"), case.pairs * (case.steps + 1)
    store = open_store(DATA / case.data, "preferences", tokenizer, case.max_length, skip_bad=True)
    if len(store) < count:
        raise InputError(f"{case.data}: {len(store)} pairs are not the {count} that --pairs and --steps want")
    rows = np.random.default_rng(0).permutation(len(store))[:count]
    pairs = [[np.asarray(ids) for ids, _ in store.row(row)] for row in rows]
    for place in case.windows[0]:
        pairs[place] = [ids[: len(ids) // case.warm_up + 2] for ids in pairs[place]]
    return pairs


def tokens(pairs: list[list[np.ndarray]], rows) -> int:
    """How many these rows have, every prompt twice, once for each side: the peers' without their padding."""
    return sum(len(prompt) + len(side) for row in rows for prompt, *sides in [pairs[row]] for side in sides)


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
    np.save(folder / "target_counts.npy", lengths[:, 1:].sum(axis=1))
    np.save(folder / "score_margins.npy", np.full(len(pairs), np.nan))
    np.save(folder / "digests.npy", np.arange(len(pairs), dtype=np.uint64))
    report = dict(format="synthetic", kept=len(pairs), dropped={}, longest=int(lengths.sum(axis=1).max()))
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


def forward_flops(config: ModelConfig, stream: TokenStream) -> int:
    """Multiplications and additions of matrix products that a forward of the stream cannot do without.

    Two for every weight of a layer and token; for scores and values, 4 D a query head and pair of tokens of
    which one sees the other; two for every entry of the vocabulary matrix and supervised token. Norms,
    softmax and rotary positions are left out, as is usual.
    """
    queries, keys = (n * config.head_dim for n in (config.num_attention_heads, config.num_key_value_heads))
    d = config.hidden_size
    weights = d * (2 * queries + 2 * keys) + 3 * d * config.intermediate_size
    seen = 0
    for start, end, prefix_start, prefix_end in stream.segments.tolist():
        own = end - start
        seen += own * (prefix_end - prefix_start) + own * (own + 1) // 2
    per_layer = 2 * len(stream.tokens) * weights + 4 * queries * seen
    return config.num_hidden_layers * per_layer + 2 * len(stream.targets) * d * config.vocab_size


def run_flops(case: Case, store: TokenStore) -> int:
    """Forward and backward (twice a forward) of the policy in all timed steps, each prompt computed once.

    The reference is left out: cached, it costs one forward for ever. So a live reference, a prompt computed
    twice and padding all show as a lower share of the machine.
    """
    config = ModelConfig(case.vocabulary, **case.shape)
    return 3 * forward_flops(config, build_stream(store, timed(case), "forked"))


def switches(case: Case) -> dict[str, int]:
    """FLOPs of the timed steps, one switch after another, from the textbook's rectangles to the floor."""
    config, pairs = ModelConfig(case.vocabulary, **case.shape), make_pairs(case)
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


# ---- What it takes


def now() -> float:
    """The time in seconds, when a GPU has done what it was asked: calls return before their work is done."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()


def peak_bytes(device: str) -> int:
    """The most memory that this process had: on a GPU what torch allocated there, else all of it."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def matrix_rate(device: str, dtype: torch.dtype, seconds: float = 2.0) -> float:
    """The best rate of the device's matrix products, in FLOP/s; on a CPU with the threads that are set."""
    size = 8192 if device == "cuda" else 1024
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    best, end = 0.0, now() + seconds
    while (start := now()) < end:
        a @ b
        best = max(best, 2 * size**3 / (now() - start))
    return best


def main() -> None:
    for name, case in CASES.items():
        if case.data:
            continue  # The table shall be the same on every machine.
        counted = switches(replace(case, steps=50))
        floor = min(counted.values())
        print(f"\n{name}, {case.pairs} pairs a step, mean of 50 steps\n")
        print("| one switch after another | GFLOP a step | × floor |\n|---|---|---|")
        for switch, flops in counted.items():
            print(f"| {switch} | {flops / 50e9:.0f} | {flops / floor:.2f} |")


if __name__ == "__main__":
    main()
