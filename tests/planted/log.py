"""What a run reports: warnings and trackers. See tests/mutants.py."""

from tests.planted.mutant import catalogue

MUTANTS = catalogue(r"""
warned-at-every-row in training.warnings: Watch.new
The same line after every row hides all others.
- self.given |= lines.keys()
test_warnings.py::test_a_warning_is_given_once

warned-during-the-warm-up in training.warnings: still
A slow warm-up looks like a learning rate that is too small.
- len(rows) < 2 or last['learning_rate'] > rows[-2]['learning_rate']
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

history-lost-at-resume in training.metrics: MetricsLog.__init__
A resumed run compares its answers with its own first ones and repeats old warnings.
- self.watch.see_answers(list(answers))
+ pass
test_warnings.py::test_a_resumed_run_repeats_no_warning

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
