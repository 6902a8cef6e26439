"""Pages that teach: the walk through one pair, the textbook's step. See tests/mutants.py."""

from tests.planted.mutant import catalogue

MUTANTS = catalogue(r"""
textbook-without-the-shift in docs.textbook: answer_logps
A hidden state that predicts the token it has read: the classic error of a first DPO.
- ids[:, 1:], mask[:, 1:]
+ ids[:, :-1], mask[:, :-1]
test_textbook.py::test_loss_and_gradients_equal_the_streams[plain]

textbook-without-the-end-token in docs.textbook: collate
The end token is not in the loss. A scored prompt would change nothing, since it cancels in the margin.
- mask[row, len(prompt) : end] = True
+ mask[row, len(prompt) : end - 1] = True
test_textbook.py::test_three_steps_equal_those_of_the_real_loop

textbook-counts-padding in docs.textbook: collate
Padding behind a short answer is scored too.
- mask[row, len(prompt) : end] = True
+ mask[row, len(prompt) :] = True
test_textbook.py::test_loss_and_gradients_equal_the_streams[plain]

textbook-moves-the-reference in docs.textbook: train
The reference is the policy itself, so the loss stays ln 2.
- copy.deepcopy(policy).eval().requires_grad_(False)
+ policy
test_textbook.py::test_three_steps_equal_those_of_the_real_loop

walk-off-by-one in eval.walkthrough: supervised_indices
The table names the index before each token.
- range(start, end)
+ range(start - 1, end - 1)
test_tour.py::test_the_page_quotes_the_program

walk-with-the-other-sign in eval.walkthrough: gradient_lines
The formula pulls the rejected answer up.
- pull if side else -pull
+ -pull
test_walkthrough.py::test_the_numbers_are_those_of_a_plain_loop[1]

walk-swaps-the-models in eval.walkthrough: walk
The log-probs of the reference stand in the policy's column.
- opened.policy(stream), opened.reference(stream)
+ opened.reference(stream), opened.policy(stream)
test_walkthrough.py::test_the_numbers_are_those_of_a_plain_loop[1]

exercise-mean-accepted in tests.exercises.checks: check_3
A mean in place of a sum passes.
- need(not near(got, means), ...)
- need(near(got, floats(-3, -12, 0, -6)), ...)
test_exercises.py::test_a_right_answer_is_accepted_and_two_wrong_ones_are_not[3]
""")
