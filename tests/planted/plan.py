"""What the planner says of memory and time. See tests/mutants.py."""

from tests.planted.mutant import Mutant

PLAN = "tests/test_plan.py::"
PEAK = PLAN + "test_peaks_of_runs_are_as_planned"

MUTANTS = [
    Mutant(
        "plan-without-moments",
        "AdamW keeps two numbers for each weight, as much as weights and reference together.",
        "training/costs.py",
        '"optimizer": 2 * FLOAT * weights.trained',
        '"optimizer": 0 * FLOAT * weights.trained',
        PLAN + "test_peaks_with_the_vocabulary_in_chunks[]",
    ),
    Mutant(
        "plan-without-scores",
        "Written-out attention keeps what every query gives every key: the square of a length.",
        "training/costs.py",
        "2 * k + kept * sum(scores)",
        "2 * k",
        PEAK + "[64 x 3, 1024 x 1 --layout twin]",
    ),
    Mutant(
        "plan-keeps-layers-that-are-computed-again",
        "A switch that is tried and saves nothing is never named.",
        "training/costs.py",
        "each = FLOAT * T * d if again else layer.kept",
        "each = layer.kept",
        PEAK + "[64 x 3, 64 x 8 --checkpoint-activations]",
    ),
    Mutant(
        "plan-with-all-scores-at-once",
        "The vocabulary comes in chunks where it is large; planned whole, it would not fit where it does.",
        "training/costs.py",
        "scores = V * min(N, max(1, transformer.LOGITS // V))",
        "scores = V * N",
        PLAN + "test_peaks_with_the_vocabulary_in_chunks[]",
    ),
    Mutant(
        "plan-copies-where-parts-are",
        "With --shard a GPU holds its part; planned as a copy, no number of GPUs would do.",
        "training/costs.py",
        "return self.gpus if self.shard else 1",
        "return 1",
        PLAN + "test_sharding_leaves_each_gpu_its_part",
    ),
    Mutant(
        "plan-of-parts-alone",
        "With --shard layers and vocabulary are put together to be used: on many GPUs most of the peak.",
        "training/costs.py",
        "return FLOAT * (of_ends * ends + layer_weights)",
        "return 0",
        PLAN + "test_peaks_on_a_rank_of_two_are_as_planned[128 x 8, untied, 64 x 1 --shard]",
    ),
    Mutant(
        "plan-without-buckets",
        "DDP keeps a second copy of the gradients, which nobody asked for and many forget.",
        "training/costs.py",
        "return FLOAT * weights.trained if plan.gpus > 1 else 0",
        "return 0",
        PLAN + "test_peaks_on_a_rank_of_two_are_as_planned[128 x 8, untied, 64 x 1 --reference cached]",
    ),
    Mutant(
        "plan-names-the-slowest",
        "Of all switches with which a run fits, the planner would name those that cost most.",
        "training/plan.py",
        "return one.lora_rank, step_seconds(",
        "return -one.lora_rank, -step_seconds(",
        PLAN + "test_adapters_are_named_last",
    ),
    Mutant(
        "autocast-keeps-copies",
        "A bf16 copy of all weights, of split ones as well, stays to the end of each forward.",
        "training/distributed.py",
        ", cache_enabled=False",
        "",
        PLAN + "test_autocast_keeps_no_copy_of_the_weights",
    ),
    Mutant(
        "plan-copies-the-reference-of-adapters",
        "With LoRA the reference is the same weights; planned as a copy, half the model would not fit.",
        "training/costs.py",
        "if live and not lora else 0",
        "if live else 0",
        PEAK + "[128 x 8, untied, 64 x 1 --lora-rank 8]",
    ),
]
