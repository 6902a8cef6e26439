"""What a run reports: warnings and trackers. See tests/mutants.py."""

from tests.planted.mutant import Mutant

WARNINGS, TRACK = "tests/test_warnings.py::", "tests/test_track.py::"

MUTANTS = [
    Mutant(
        "warned-at-every-row",
        "The same line after every row hides all others.",
        "training.warnings",
        "Watch.new",
        "self.given |= lines.keys()",
        "",
        WARNINGS + "test_a_warning_is_given_once",
    ),
    Mutant(
        "warned-during-the-warm-up",
        "A slow warm-up looks like a learning rate that is too small.",
        "training.warnings",
        "still",
        "len(rows) < 2 or last['learning_rate'] > rows[-2]['learning_rate']",
        "len(rows) < 2",
        WARNINGS + "test_a_slow_warm_up_is_not_a_standstill",
    ),
    Mutant(
        "fall-in-nats-alone",
        "Long answers fall by 20 nats in every healthy run.",
        "training.warnings",
        "falling",
        "max(FALL_NATS, -start)",
        "FALL_NATS",
        WARNINGS + "test_a_fall_is_measured_by_the_length_of_the_answers",
    ),
    Mutant(
        "log-probs-taken-for-log-ratios",
        "SimPO has no reference, and its log-probs look like a collapse.",
        "training.warnings",
        "has_reference",
        "math.isclose(..., **...)",
        "False",
        WARNINGS + "test_losses_without_a_reference_give_no_warning",
    ),
    Mutant(
        "history-lost-at-resume",
        "A resumed run compares its answers with its own first ones and repeats old warnings.",
        "training.metrics",
        "MetricsLog.__init__",
        "self.watch.see_answers(list(answers))",
        "pass",
        WARNINGS + "test_a_resumed_run_repeats_no_warning",
    ),
    Mutant(
        "steps-tracked-twice",
        "TensorBoard draws what the stopped run wrote after its checkpoint, and the curve jumps back.",
        "training.track",
        "TensorBoard.__init__",
        "first_step + 1 if first_step else None",
        "None",
        TRACK + "test_tensorboard_shows_a_resumed_run_once",
    ),
    Mutant(
        "old-curves-left-standing",
        "The curves of a replaced run are drawn as those of the new one.",
        "training.folder",
        "remove_run",
        "events.unlink()",
        "pass",
        TRACK + "test_a_replaced_run_leaves_no_curves",
    ),
    Mutant(
        "held-out-rows-named-as-training",
        "Held-out and training rows share one curve, or lie under names that no other project has.",
        "training.track",
        "tracked",
        'name.startswith("eval_")',
        "False",
        TRACK + "test_tensorboard_reads_back_the_rows",
    ),
]
