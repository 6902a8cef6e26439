"""Figures of eval/ and its experiments: a wrong figure looks like a finding. See tests/mutants.py."""

from tests.planted.mutant import Mutant

EXPERIMENTS = "tests/test_experiments.py::"
EVAL = "tests/test_eval.py::"
CHAT = "tests/test_chat.py::"
REPORT = "tests/test_report.py::"

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
        "A policy that has learned the true preferences is counted as wrong.",
        "eval.experiments.label_noise",
        "main",
        'write(out / "heldout.jsonl", held_out)',
        'write(out / "heldout.jsonl", flipped(held_out, len(held_out), 0.4, 0))',
        EXPERIMENTS + "test_label_noise",
    ),
    Mutant(
        "reward-model-sees-true-labels",
        "Soft labels win because only their reward model has seen the true labels.",
        "eval.experiments.label_noise",
        "compare",
        "train_reward.main([*common, *data, ...])",
        'train_reward.main([*common, *data, f"--data={settings.data}", ...])',
        EXPERIMENTS + "test_label_noise",
    ),
    Mutant(
        "every-run-measured-with-default-beta",
        "Rewards and loss of a run with another beta differ from its own log, and look plausible.",
        "eval.preference",
        "choose_objective",
        "{name: run[name] for name in ... if ...}",
        "{}",
        EVAL + "test_a_run_is_measured_as_it_was_trained[--beta 0.7]",
    ),
    Mutant(
        "cut-conversation-loses-its-system-message",
        "After a long conversation the model no longer follows the system message.",
        "eval.chat",
        "Conversation.with_message",
        'int(history[0].role == "system")',
        "0",
        CHAT + "test_a_long_conversation_loses_its_oldest_turns",
    ),
    Mutant(
        "explained-without-the-reference",
        "The colours show how likely a token is, not what training changed.",
        "eval.explain",
        "Answer.logratios",
        "logp - reference",
        "logp",
        "tests/test_explain.py::test_tokens_sum_to_the_reward_and_the_loss_that_are_logged",
    ),
    Mutant(
        "explained-sides-swapped",
        "The rejected answer is shown as the one that became more likely.",
        "eval.explain",
        "explain_rows",
        "answers[2 * i : 2 * i + 2]",
        "answers[2 * i : 2 * i + 2][::-1]",
        "tests/test_explain.py::test_every_token_has_the_log_probs_of_a_plain_loop[1]",
    ),
    Mutant(
        "report-lets-markup-of-the-data-through",
        "A prompt with an image tag draws an image; only the policy of the page stops its script.",
        "eval.charts",
        "esc",
        "html.escape(printable(str(text)))",
        "printable(str(text))",
        REPORT + "test_hostile_text_is_inert",
    ),
    Mutant(
        "report-shows-the-prompt-of-another-pair",
        "After a dropped record every answer stands below a wrong prompt.",
        "eval.pairs",
        "measure",
        "store.records[rows]",
        "rows",
        REPORT + "test_a_pair_has_its_own_prompt",
    ),
]
