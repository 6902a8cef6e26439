"""Answers: the cache, sampling, the judge. See tests/mutants.py."""

from tests.planted.mutant import Mutant

GENERATE = "tests/test_generate.py::"

MUTANTS = [
    Mutant(
        "cache-position-off",
        "The first answered token is placed one position too far.",
        "model/generate.py",
        "lengths[rows] + step",
        "lengths[rows] + step + 1",
        GENERATE + "test_greedy_answers_equal_the_plain_loop[5-plain]",
    ),
    Mutant(
        "cache-hides-the-newest",
        "A token that does not see itself: the mask of a decoding step is off by one.",
        "model/generate.py",
        "<= self.positions[:, None]",
        "< self.positions[:, None]",
        GENERATE + "test_greedy_answers_equal_the_plain_loop[2-plain]",
    ),
    Mutant(
        "cache-shows-other-lengths",
        "Without the mask a short row attends to the empty places of a longer one.",
        "model/generate.py",
        "<= self.positions[:, None]",
        "<= self.positions.max()",
        GENERATE + "test_greedy_answers_equal_the_plain_loop[5-plain]",
    ),
    Mutant(
        "chunk-forgets-the-cache",
        "A second chunk of a prompt attends to itself and not to the first one.",
        "model/generate.py",
        "keys[row, :, :end], values[row, :, :end]",
        "keys[row, :, end - count : end], values[row, :, end - count : end]",
        GENERATE + "test_cache_equals_the_full_forward[chunks2-plain]",
    ),
    Mutant(
        "nucleus-loses-its-last",
        "The token that crosses p belongs to the nucleus; without it p = 0.5 may keep nothing at all.",
        "model/generate.py",
        "beyond = mass_before >=",
        "beyond = mass_before + probabilities >=",
        GENERATE + "test_sampling_follows_the_intended_distribution[0.9-3-1.0]",
    ),
    Mutant(
        "top-k-off-by-one",
        "One token too many.",
        "model/generate.py",
        "probabilities[:, top_k:] = 0",
        "probabilities[:, top_k + 1 :] = 0",
        GENERATE + "test_sampling_follows_the_intended_distribution[1.0-3-1.0]",
    ),
    Mutant(
        "temperature-inverted",
        "Hotter becomes colder.",
        "model/generate.py",
        "logits.double() / temperature",
        "logits.double() * temperature",
        GENERATE + "test_sampling_follows_the_intended_distribution[1.0-0-2.0]",
    ),
    Mutant(
        "draws-by-batch",
        "Every batch begins with the same draws, so that answers depend on the batch size.",
        "model/generate.py",
        "prompts[batch], uniforms[batch]",
        "prompts[batch], uniforms[: len(prompts[batch])]",
        GENERATE + "test_answers_depend_on_seed_and_place_alone",
    ),
    Mutant(
        "speaks-after-its-end",
        "A row that ended goes on speaking.",
        "model/generate.py",
        "speaking = tokens != end_id",
        "speaking = tokens >= 0",
        GENERATE + "test_a_row_falls_silent_after_its_end_token",
    ),
]
