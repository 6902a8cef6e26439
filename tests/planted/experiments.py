"""Figures of eval/ and its experiments: a wrong figure looks like a finding. See tests/mutants.py."""

from tests.planted.mutant import catalogue

MUTANTS = catalogue(r"""
rewards-shown-as-log-ratios in eval.experiments.edit_distance: run
A reward is beta times a log-ratio: the fall of the chosen answers looks ten times smaller.
- row[f"logratios/{side}"]
+ row[f"rewards/{side}"]
test_experiments.py::test_edit_distance

held-out-labels-flipped in eval.experiments.label_noise: main
A policy that has learned the true preferences is counted as wrong.
- write(out / "heldout.jsonl", held_out)
+ write(out / "heldout.jsonl", flipped(held_out, len(held_out), 0.4, 0))
test_experiments.py::test_label_noise

reward-model-sees-true-labels in eval.experiments.label_noise: compare
Soft labels win because only their reward model has seen the true labels.
- train_reward.main([*flags, *data, ...])
+ train_reward.main([*flags, *data, f"--data={settings.data}", ...])
test_experiments.py::test_label_noise

kl-from-the-references-answers in eval.experiments.frontier: measure
From answers of the reference the mean log-ratio is −KL(π_ref ‖ π): a frontier at a wrong place.
- generate(policy, task.prompts, **...)
+ generate(reference, task.prompts, **...)
test_experiment_figures.py::test_the_mean_log_ratio_of_the_policys_own_answers_estimates_kl

interval-over-runs-with-n in eval.experiments.common: over_runs
With three runs the interval is a fifth too narrow, and chance looks like a difference.
- stdev(values)
+ stdev(values) * math.sqrt((len(values) - 1) / len(values))
test_experiment_figures.py::test_the_interval_over_runs_is_students_with_n_minus_1

end-token-that-was-not-drawn in eval.experiments.common: Generated.__init__
An answer that did not end gets an end token: its log-ratio contains a token that was not drawn.
- [end_id] * a.finished
+ [end_id]
test_experiment_figures.py::test_log_ratios_of_generated_answers

weight-of-the-won-pairs in eval.experiments.weights: weight
The sigmoid of the margin, not of its negative: easy pairs seem to weigh the most.
- -beta * step.margins
+ beta * step.margins
test_experiment_figures.py::test_the_weight_is_the_derivative_of_the_loss

held-out-starts-in-training in eval.experiments.sentiment: read_sentences
The policy has seen the sentences that it is measured on.
- [words for words in sentences if ...]
+ sentences
test_experiment_figures.py::test_no_start_of_a_held_out_sentence_is_trained_on

every-run-measured-with-default-beta in eval.preference: run_objective
Rewards and loss of a run with another beta differ from its own log, and look plausible.
- {name: run[name] for name in ... if ...}
+ {}
test_eval.py::test_a_run_is_measured_as_it_was_trained[--beta 0.7]

cut-conversation-loses-its-system-message in eval.chat: Conversation.with_message
After a long conversation the model no longer follows the system message.
- int(history[0].role == "system")
+ 0
test_chat.py::test_a_long_conversation_loses_its_oldest_turns

explained-without-the-reference in eval.explain: Answer.logratios
The colours show how likely a token is, not what training changed.
- logp - reference
+ logp
test_explain.py::test_tokens_sum_to_the_reward_and_the_loss_that_are_logged

explained-sides-swapped in eval.explain: explain_rows
The rejected answer is shown as the one that became more likely.
- answers[2 * i : 2 * i + 2]
+ answers[2 * i : 2 * i + 2][::-1]
test_explain.py::test_every_token_has_the_log_probs_of_a_plain_loop[1]

report-lets-markup-of-the-data-through in eval.charts: esc
A prompt with an image tag draws an image; only the policy of the page stops its script.
- html.escape(printable(str(text)))
+ printable(str(text))
test_report.py::test_hostile_text_is_inert

report-shows-the-prompt-of-another-pair in eval.pairs: measure
After a dropped record every answer stands below a wrong prompt.
- store.records[rows]
+ rows
test_report.py::test_a_pair_has_its_own_prompt

report-draws-the-same-answers-twice in eval.figures: judge_charts
The bars before training show the trained model: DPO seems to change nothing.
- (f"{tr('before')}: {before}", "pale", before)
+ (f"{tr('before')}: {before}", "pale", after)
test_report.py::test_bars_have_the_heights_of_the_judges_figures

language-of-lang-before-lc-all in eval.words: language
LC_ALL=C, with which scripts ask for English, would be ignored.
- ("LC_ALL", "LC_MESSAGES", "LANG")
+ ("LANG", "LC_MESSAGES", "LC_ALL")
test_words.py::test_auto_is_the_language_of_the_environment

language-stays-after-the-page in eval.words: language
Whatever is printed after a Chinese page would be Chinese too.
- _current.reset(token)
+ None
test_words.py::test_auto_is_the_language_of_the_environment

heading-passes-by-the-translation in eval.page: page
One heading of the Chinese page stays English, and no error shows it.
- tr("Distributions")
+ "Distributions"
test_report.py::test_the_chinese_page_is_the_english_one_in_other_words

dpo-without-beta-in-the-derivation in losses: sigmoid
The loss has its minimum at another policy than the goal that it was derived from.
- -F.logsigmoid(beta * margins)
+ -F.logsigmoid(margins)
test_derivation.py::test_the_function_computes_the_equation
""")
