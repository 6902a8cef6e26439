"""Answers: the cache, sampling, the judge. See tests/mutants.py."""

from tests.planted.mutant import catalogue

MUTANTS = catalogue(r"""
cache-position-off in model.generate: decode_steps
The second answered token is placed one position too far.
- positions + 1
+ positions + 1 + (step == 0)
test_generate.py::test_greedy_answers_equal_the_plain_loop[5-plain]

cache-hides-the-newest in model.generate: KVCache.decode
A token that does not see itself: the mask of a decoding step is off by one.
- torch.arange(capacity, device=positions.device) <= positions[:, None]
+ torch.arange(capacity, device=positions.device) < positions[:, None]
test_generate.py::test_greedy_answers_equal_the_plain_loop[2-plain]

cache-shows-other-lengths in model.generate: KVCache.decode
Without the mask a short row attends to the empty places of a longer one.
- torch.arange(capacity, device=positions.device) <= positions[:, None]
+ torch.arange(capacity, device=positions.device) <= positions.max()
test_generate.py::test_greedy_answers_equal_the_plain_loop[5-plain]

chunk-forgets-the-cache in model.generate: KVCache._prefill
A second chunk of a prompt attends to itself and not to the first one.
- attention(q[:, here], keys[row, :, :last], values[row, :, :last], bias)
+ attention(q[:, here], keys[row, :, first:last], values[row, :, first:last], bias[:, first:])
test_generate.py::test_cache_equals_the_full_forward[chunks2-plain]

nucleus-loses-its-last in model.generate: sample
The token that crosses p belongs to the nucleus; without it p = 0.5 may keep nothing at all.
- cumulative - probabilities >= top_p
+ cumulative >= top_p
test_generate.py::test_sampling_follows_the_intended_distribution[0.9-3-1.0]

top-k-off-by-one in model.generate: sample
One token too many.
- min(top_k or size, size)
+ min(top_k + 1 if top_k else size, size)
test_generate.py::test_sampling_follows_the_intended_distribution[1.0-3-1.0]

temperature-inverted in model.generate: sample
Hotter becomes colder.
- logits / temperature
+ logits * temperature
test_generate.py::test_sampling_follows_the_intended_distribution[1.0-0-2.0]

draws-by-batch in model.generate: generate
Every batch begins with the same draws, so that answers depend on the batch size.
- uniforms[places]
+ uniforms[: len(places)]
test_generate.py::test_answers_depend_on_seed_and_place_alone

speaks-after-its-end in model.generate: decode_steps
A row that ended goes on speaking.
- token == end_id
+ token < 0
test_generate.py::test_a_row_ends_with_its_end_token

sampling-in-float64 in model.generate: sample
Apple's MPS has no float64: every chat there ends at its first token.
- at_least_float32(logits)
+ logits.double()
test_generate.py::test_generation_needs_no_float64[sampling0]

samples-of-another-prompt in model.generate: decode_steps
Each row starts from the keys of another prompt, and from the last state of its own.
- cache.resize(origins, max(lengths) + 1)
+ cache.resize(origins.flip(0), max(lengths) + 1)
test_generate.py::test_samples_are_those_of_a_repeated_prompt[sampling0]

samples-at-wrong-positions in model.generate: decode_steps
The positions of the prompts repeat as a whole, not one by one.
- torch.tensor(lengths, device=device)[origins]
+ torch.tensor(lengths, device=device).repeat(samples)
test_generate.py::test_samples_are_those_of_a_repeated_prompt[sampling0]

an-ended-row-writes-on in model.generate: decode_steps
An answer that ended, but whose row has not left, gets more tokens.
- {answer: ids[row] for row, answer in enumerate(answers) if answer in running}
+ {answer: ids[row] for row, answer in enumerate(answers)}
test_generate.py::test_answers_equal_the_plain_loop_while_rows_leave_and_the_cache_grows[plain]

an-ended-row-without-room in model.generate: decode_steps
A row that has ended stays among many that run; its place passes the end of the cache, and the run dies.
- longest = max(lengths[answer // samples] for answer in answers) + step + 1
+ longest = max(lengths[answer // samples] for answer in running) + step + 1
test_generate.py::test_a_row_that_has_ended_needs_room_while_it_stays

rows-leave-without-their-draws in model.generate: decode_steps
After a row has left, the others continue with the draws of their neighbours.
- uniforms[rows]
+ uniforms[: len(rows)]
test_generate.py::test_samples_are_those_of_a_repeated_prompt[sampling0]

a-larger-cache-loses-a-token in model.generate: KVCache.resize
The newest token before each growth is not copied.
- kept = min(capacity, rounded(length))
+ kept = min(capacity, rounded(length)) - 1
test_generate.py::test_answers_equal_the_plain_loop_while_rows_leave_and_the_cache_grows[plain]

a-piece-at-the-wrong-place in model.generate: prefill
The second piece of a long prompt has the positions of the first.
- torch.arange(first, last)
+ torch.arange(last - first)
test_generate.py::test_answers_equal_the_plain_loop_while_rows_leave_and_the_cache_grows[plain]
""")
