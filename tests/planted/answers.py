"""Answers: the cache, sampling, the judge. See tests/mutants.py."""

from tests.planted.mutant import Mutant

GENERATE = "tests/test_generate.py::"

MUTANTS = [
    Mutant(
        "cache-position-off",
        "The first answered token is placed one position too far.",
        "model.generate",
        "decode_steps",
        "lengths[rows] + step",
        "lengths[rows] + step + 1",
        GENERATE + "test_greedy_answers_equal_the_plain_loop[5-plain]",
    ),
    Mutant(
        "cache-hides-the-newest",
        "A token that does not see itself: the mask of a decoding step is off by one.",
        "model.generate",
        "KVCache._decode",
        "torch.arange(end, device=q.device) <= self.positions[:, None]",
        "torch.arange(end, device=q.device) < self.positions[:, None]",
        GENERATE + "test_greedy_answers_equal_the_plain_loop[2-plain]",
    ),
    Mutant(
        "cache-shows-other-lengths",
        "Without the mask a short row attends to the empty places of a longer one.",
        "model.generate",
        "KVCache._decode",
        "self.positions[:, None]",
        "self.positions.max()",
        GENERATE + "test_greedy_answers_equal_the_plain_loop[5-plain]",
    ),
    Mutant(
        "chunk-forgets-the-cache",
        "A second chunk of a prompt attends to itself and not to the first one.",
        "model.generate",
        "KVCache._prefill",
        "attention(query, keys[row, :, :end], values[row, :, :end], bias)",
        "attention(query, keys[row, :, end - count : end], values[row, :, end - count : end], bias)",
        GENERATE + "test_cache_equals_the_full_forward[chunks2-plain]",
    ),
    Mutant(
        "nucleus-loses-its-last",
        "The token that crosses p belongs to the nucleus; without it p = 0.5 may keep nothing at all.",
        "model.generate",
        "sample",
        "mass_before >= top_p * probabilities.sum(dim=-1, keepdim=True)",
        "mass_before + probabilities >= top_p * probabilities.sum(dim=-1, keepdim=True)",
        GENERATE + "test_sampling_follows_the_intended_distribution[0.9-3-1.0]",
    ),
    Mutant(
        "top-k-off-by-one",
        "One token too many.",
        "model.generate",
        "sample",
        "probabilities[:, top_k:] = 0",
        "probabilities[:, top_k + 1 :] = 0",
        GENERATE + "test_sampling_follows_the_intended_distribution[1.0-3-1.0]",
    ),
    Mutant(
        "temperature-inverted",
        "Hotter becomes colder.",
        "model.generate",
        "sample",
        "logits.double() / temperature",
        "logits.double() * temperature",
        GENERATE + "test_sampling_follows_the_intended_distribution[1.0-0-2.0]",
    ),
    Mutant(
        "draws-by-batch",
        "Every batch begins with the same draws, so that answers depend on the batch size.",
        "model.generate",
        "generate",
        "decode_steps(model, prompts[batch], uniforms[batch], ..., **...)",
        "decode_steps(model, prompts[batch], uniforms[: len(prompts[batch])], ..., **...)",
        GENERATE + "test_answers_depend_on_seed_and_place_alone",
    ),
    Mutant(
        "speaks-after-its-end",
        "A row that ended goes on speaking.",
        "model.generate",
        "decode_steps",
        "speaking = tokens != end_id",
        "speaking = tokens >= 0",
        GENERATE + "test_a_row_falls_silent_after_its_end_token",
    ),
]
