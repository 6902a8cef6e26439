"""The experiments: a wrong figure looks like a finding. See tests/mutants.py."""

from tests.planted.mutant import Mutant

EXPERIMENTS = "tests/test_experiments.py::"

MUTANTS = [
    Mutant(
        "rewards-shown-as-log-ratios",
        "A reward is beta times a log-ratio: the fall of the chosen answers looks ten times smaller.",
        "eval.experiments.edit_distance",
        "run",
        'mean(row[f"rewards/{side}"] for row in epoch) / settings.beta',
        'mean(row[f"rewards/{side}"] for row in epoch)',
        EXPERIMENTS + "test_edit_distance",
    ),
    Mutant(
        "held-out-labels-flipped",
        "Whoever has learned what was meant is then said to be wrong.",
        "eval.experiments.label_noise",
        "main",
        'write(out / "heldout.jsonl", held_out)',
        'write(out / "heldout.jsonl", flipped(held_out, len(held_out), 0.4, 0))',
        EXPERIMENTS + "test_label_noise",
    ),
    Mutant(
        "reward-model-sees-true-labels",
        "Soft labels then win by what the other objectives were not shown.",
        "eval.experiments.label_noise",
        "compare",
        "train_reward.main([*common, *data, ...])",
        'train_reward.main([*common, *data, f"--data={settings.data}", ...])',
        EXPERIMENTS + "test_label_noise",
    ),
]
