"""Prompts alone: sampled answers, scores, pairs, win rates. See tests/mutants.py."""

from tests.planted.mutant import catalogue

MUTANTS = catalogue(r"""
answers-by-place-in-the-batch in eval.sample: answer
The draws depend on the batch, so that a stopped run goes on with other answers.
- seed * 1_000_003 + place
+ seed * 1_000_003 + place - places[0]
test_prompts_to_pairs.py::test_an_answer_depends_on_seed_and_place_alone

torn-line-stays in eval.sample: read_parts
A line that a kill has cut makes one line with the next record, and neither can be read.
- os.truncate(path, path.stat().st_size - len(torn))
+ pass
test_prompts_to_pairs.py::test_a_stopped_run_goes_on[1]

answers-in-the-order-of-ranks in eval.sample: read_parts
Each rank's answers follow one another, and the answers stand beside other prompts than on one rank.
- found |= {line["place"]: line["record"] for line in rest}
+ found |= {len(found) + i: line["record"] for i, line in enumerate(rest)}
test_prompts_to_pairs.py::test_an_answer_depends_on_seed_and_place_alone

rewards-without-the-dropped in eval.scorers: AnswerRows.__init__
Scores of later answers land on the answer that was too long.
- [(i, j) for j in short]
+ [(i, j) for j in range(len(short))]
test_prompts_to_pairs.py::test_reward_models_score_every_answer

ensemble-optimistic in eval.scorers: ensemble
Mean + k·std prefers answers on which the reward models disagree: over-optimisation on purpose.
- pessimism * np.std(values)
+ -pessimism * np.std(values)
test_prompts_to_pairs.py::test_reward_models_score_every_answer

unfinished-answers-are-paired in dataset.pair: usable
An answer without an end token becomes the chosen one.
- not answer.get("finished", True)
+ False
test_prompts_to_pairs.py::test_what_cannot_be_a_pair_is_dropped_and_counted

rso-without-repetitions in dataset.pair: pairs_of
Without its repetitions a candidate has the weight of π = uniform, and not that of the policy.
- settings.method != "rso"
+ True
test_prompts_to_pairs.py::test_a_repeated_answer_weighs_as_often_as_it_was_drawn

rso-highest-of-all in dataset.pair: rejection_sample
β enters inversely: high rewards lose their weight.
- np.exp((scores[left[place]] - highest) / beta)
+ np.exp((scores[left[place]] - highest) * beta)
test_prompts_to_pairs.py::test_accepted_answers_follow_the_tilted_distribution

rso-accepts-again in dataset.pair: rejection_sample
An accepted answer stays a candidate and is paired with itself.
- left.pop(place)
+ left[place]
test_prompts_to_pairs.py::test_acceptance_without_replacement_is_exact

ties-are-pairs in dataset.pair: pairs_of
Equal scores make pairs whose label is the order of the answers.
- scores[i] - scores[j] > settings.gap
+ scores[i] - scores[j] >= settings.gap
test_prompts_to_pairs.py::test_pairs_are_those_of_the_method[gap-0-expected2]

length-stays-in-the-rate in eval.win_rate: length_controlled
Without the lengths the fit is the plain win rate.
- np.tanh(lengths / scale)
+ np.zeros(len(lengths))
test_rounds.py::test_the_win_rate_at_equal_length_is_that_of_the_simulation

another-reference-ignored in training.reference: make_reference
The reference of a later round is the last policy, whatever --reference-model names.
- load_reference(settings, world).eval()
+ copy.deepcopy(model).eval()
test_rounds.py::test_a_run_may_have_another_reference

rounds-from-the-start in eval.rounds: main
Every round trains the first model again.
- policy = next_policy(settings, policy, number, world)
+ policy = next_policy(settings, settings.model, number, world)
test_rounds.py::test_each_round_starts_from_the_last_policy
""")
