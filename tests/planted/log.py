"""What a run reports: samples, warnings, trackers. See tests/mutants.py."""

from tests.planted.mutant import catalogue

MUTANTS = catalogue(r"""
rows-split-at-line-separators in training.metrics: rows_until
An answer with U+2028 in it becomes two torn rows, and a resumed run drops them.
- path.read_text("utf-8", errors="replace").split("\n")[:-1]
+ path.read_text("utf-8", errors="replace").splitlines()
test_samples.py::test_an_answer_with_a_line_separator_is_one_row

samples-of-the-reference in train_dpo: train
The answers to held-out prompts never change, and nobody sees what the policy writes.
- greedy_answers(model, tokenizer, prompts, world, settings.compile)
+ greedy_answers(reference, tokenizer, prompts, world, settings.compile)
test_samples.py::test_a_sample_is_the_greedy_answer_of_the_policy_at_that_step

samples-of-the-first-rows in training.samples: held_out_prompts
The first rows of a sorted file are about one thing.
- spread(len(rows), settings.sample_prompts)
+ np.arange(min(settings.sample_prompts, len(rows)))
test_samples.py::test_prompts_are_different_and_spread_over_the_data

kl-of-the-first-rows in dataset.packing: spread
The KL of the curve, the samples and the pairs of the report are those of the first topic of a sorted file.
- np.linspace(0, count - 1, min(count if most is None else most, count)).round().astype(int)
+ np.arange(min(count if most is None else most, count))
test_eval.py::test_the_kl_of_an_evaluation_in_training_is_that_of_rows_spread_over_the_data

kl-of-the-policy-to-itself in model.lora: AdapterReference.hidden_of
With adapters the KL of every evaluation is 0.
- with as_reference(self.model):
-     return self.model.hidden_of(stream)
+ return self.model.hidden_of(stream)
test_eval.py::test_a_run_is_measured_as_it_was_trained

kl-the-other-way-round in train_dpo: train
KL(π_ref ‖ π) looks plausible: both are 0 at first and grow.
- metrics |= evaluate_kl(*data, *options, KL_PAIRS)
+ metrics |= evaluate_kl(reference, model, *data[2:], *options, KL_PAIRS)
test_eval.py::test_a_run_is_measured_as_it_was_trained

old-samples-left-standing in training.folder: remove_run
A run without samples shows those of the run that it replaced.
- (*WEIGHTS, "samples.jsonl", "tracker.json")
+ (*WEIGHTS, "tracker.json")
test_samples.py::test_a_run_without_samples_leaves_none_of_an_earlier_one

warned-at-every-row in training.warnings: Watch.new
The same line after every row hides all others.
- self.given |= lines.keys()
test_warnings.py::test_a_warning_is_given_once

noise-taken-for-a-baseline in training.warnings: longer
A weak model, whose answers end or do not end by chance, is warned of growing answers in a healthy run.
- not last or not all(answer["finished"] for answer in first)
+ not last
test_warnings.py::test_a_model_that_writes_noise_is_not_a_baseline

loops-taken-for-learned-length in training.warnings: longer
The advice against learned length is given to a policy that repeats itself.
- is_long and repeated(a["answer"]) < REPEATED
+ is_long
test_warnings.py::test_a_model_that_writes_noise_is_not_a_baseline

warned-during-the-warm-up in training.warnings: still
A slow warm-up looks like a learning rate that is too small.
- len(rows) < 2 or last["learning_rate"] > rows[-2]["learning_rate"]
+ len(rows) < 2
test_warnings.py::test_a_slow_warm_up_is_not_a_standstill

fall-in-nats-alone in training.warnings: falling
Long answers fall by 20 nats in every healthy run.
- max(FALL_NATS, -start)
+ FALL_NATS
test_warnings.py::test_a_fall_is_measured_by_the_length_of_the_answers

log-probs-taken-for-log-ratios in training.warnings: has_reference
SimPO has no reference, and its log-probs look like a collapse.
- math.isclose(..., **...)
+ False
test_warnings.py::test_losses_without_a_reference_give_no_warning

warned-again-after-a-resume in training.metrics: MetricsLog.__init__
A resumed run does not know the rows before it, and repeats their warnings.
- self.watch.see(row)
+ pass
test_warnings.py::test_a_resumed_run_has_the_history_of_its_rows

first-answers-lost-at-resume in training.metrics: MetricsLog.__init__
Answers that have grown since the start are compared with those after the resume.
- self.watch.see_answers(list(answers))
+ pass
test_warnings.py::test_a_resumed_run_has_the_history_of_its_rows

steps-tracked-twice in training.track: TensorBoard.__init__
TensorBoard draws what the stopped run wrote after its checkpoint, and the curve jumps back.
- first_step + 1 if first_step else None
+ None
test_track.py::test_tensorboard_shows_a_resumed_run_once

old-curves-left-standing in training.folder: remove_run
The curves of a replaced run are drawn as those of the new one.
- events.unlink()
+ pass
test_track.py::test_a_replaced_run_leaves_no_curves

held-out-rows-named-as-training in training.track: tracked
Held-out and training rows share one curve, or lie under names that no other project has.
- name.startswith("eval_")
+ False
test_track.py::test_tensorboard_reads_back_the_rows
""")
