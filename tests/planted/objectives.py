"""The objectives: what the libraries have got wrong. See tests/mutants.py."""

from tests.planted.mutant import catalogue

MUTANTS = catalogue(r"""
# ---- The objective

beta-forgotten in losses: sigmoid
The loss starts at ln 2 all the same, and the policy runs away from its reference.
- losses = -F.logsigmoid(beta * margins)
+ losses = -F.logsigmoid(margins)
test_losses.py::test_gradient_identity[at-the-start]

reference-sign-flipped in training.objective: Pairs.rejected_logratios
The reference is added instead of subtracted.
- self.policy_rejected_logps - self.reference_rejected_logps
+ self.policy_rejected_logps + self.reference_rejected_logps
test_losses.py::test_loss_is_exactly_ln_2_before_the_first_step[forked-fp32]

reference-omitted in training.objective: Pairs.chosen_logratios
Without the reference on one side the loss pushes the policy towards short answers.
- self.policy_chosen_logps - self.reference_chosen_logps
+ self.policy_chosen_logps
test_losses.py::test_loss_by_hand

margin-turned in training.objective: Objective.__call__
Rejected minus chosen: the loss starts at ln 2 and falls, the model gets worse.
- self.derivative(chosen) - self.derivative(rejected)
+ self.derivative(rejected) - self.derivative(chosen)
test_objectives.py::test_value_and_gradient_are_the_closed_form[sigmoid-0.1]

log-of-sigmoid in losses: sigmoid
log(sigmoid(z)) is -inf where sigmoid(z) rounds to 0, and its gradient NaN.
- losses = -F.logsigmoid(beta * margins)
+ losses = -(beta * margins).sigmoid().log()
test_objectives.py::test_extremes_are_finite[sigmoid-reverse_kl-dtype0]

rewards-with-gradient in losses: reward_metrics
Rewards that keep their graph hold the memory of every micro-batch until they are logged.
- value.detach().sum
+ value.sum
test_losses.py::test_rewards_carry_no_gradient

tie-counted-as-loss in losses: reward_metrics
Before the first step every pair is a tie; an accuracy of 0 there is an artefact.
- (margins > 0).float() + 0.5 * (margins == 0).float()
+ (margins > 0).float()
test_losses.py::test_metrics_are_sums_and_a_tie_is_half

# ---- Other objectives

cdpo-ignored in losses: sigmoid
The option is accepted, and the loss is DPO's all the same: what TRL does since 0.29.
- 1 - label_smoothing
+ 1.0
test_objectives.py::test_value_and_gradient_are_the_closed_form[sigmoid-0.2-0.1]

soft-label-made-hard in losses: soft
A pair that wins by a hair is learned like one that wins for sure.
- torch.sigmoid(score_scale * score_margins)
+ (score_margins > 0).to(margins)
test_objectives.py::test_value_and_gradient_are_the_closed_form[soft-0.1]

score-scale-ignored in losses: soft
Scores on a scale of ten are read as log odds.
- score_scale * score_margins
+ score_margins
test_objectives.py::test_value_and_gradient_are_the_closed_form[soft-0.25-0.1]

rebel-scores-swapped in losses: rebel
The gap with the other sign: the policy is taught to prefer the rejected answers.
- score_scale * score_margins
+ -score_scale * score_margins
test_objectives.py::test_a_gradient_step_widens_the_margin[rebel]

rebel-of-probabilities in losses: rebel
A squashed margin saturates: the gap of the scores is not reached.
- beta * margins - score_scale * score_margins
+ torch.sigmoid(beta * margins) - torch.sigmoid(score_scale * score_margins)
test_objectives.py::test_value_and_gradient_are_the_closed_form[rebel-0.1]

odpo-offset-turned in losses: odpo
A much better answer may win by less.
- beta * margins - odpo_alpha * score_margins.clamp(min=0).log()
+ beta * margins + odpo_alpha * score_margins.clamp(min=0).log()
test_objectives.py::test_offsets_are_dpo_where_there_is_nothing_to_offset

odpo-log-of-a-negative-gap in losses: odpo
The logarithm of a negative gap is NaN, and one such pair ends the run.
- score_margins.clamp(min=0)
+ score_margins
test_objectives.py::test_extremes_are_finite[odpo-reverse_kl-dtype0]

odpo-accepts-lost-pairs in training.objective: Objective.check_data
A pair whose rejected side scores higher has no loss, and nobody is told.
- (margins < 0) & (name == "odpo")
+ margins < margins
test_objectives.py::test_a_record_whose_scores_do_not_suffice

infinite-gap-accepted in training.objective: Objective.check_data
A win probability of 1 is an infinite gap, which no margin reaches: the loss is inf.
- np.isinf(margins) & (name != "soft")
+ margins < margins
test_objectives.py::test_a_record_whose_scores_do_not_suffice

length-offset-turned in losses: rdpo
A longer answer must win by more: length is rewarded, the opposite of the paper.
- beta * margins + rdpo_alpha * (chosen_lengths - rejected_lengths)
+ beta * margins - rdpo_alpha * (chosen_lengths - rejected_lengths)
test_objectives.py::test_offsets_are_dpo_where_there_is_nothing_to_offset

tdpo-without-stop-gradient in losses: tdpo2
The chosen side's KL enters with the other sign: the policy is driven away from its reference there.
- chosen_kl.detach()
+ chosen_kl
test_objectives.py::test_tdpo2_moves_only_the_rejected_kl

tdpo-kl-turned in losses: tdpo2
The KL along rejected answers is raised without bound.
- tdpo_alpha * gap
+ -tdpo_alpha * gap
test_objectives.py::test_tdpo2_moves_only_the_rejected_kl

tdpo-reverse-kl in training.objective: Objective.pairs
KL(π ‖ π_ref) is the divergence of DPO's constraint, and not the paper's.
- next_token_kl(reference, model, stream)
+ next_token_kl(model, reference, stream)
test_objectives.py::test_pairs_of_a_stream_are_those_of_single_sequences[forked]

kl-kept-whole in training.objective: next_token_kl
All chunks wait for backward: two tensors of tokens times vocabulary.
- recompute_in_backward(kl, *chunk)
+ kl(*chunk)
test_objectives.py::test_the_exact_kl_in_chunks_with_its_gradient

tdpo-with-a-cached-reference in training.reference: check_cached
The cache has one log-prob a token, and the run stops in its first step.
- require("rejected_kl" not in objective.inputs, ...)
test_objectives.py::test_tdpo2_needs_whole_models

reference-with-adapters in model.lora: AdapterReference.hidden_of
The reference's hidden states are the policy's: D is always 0.
- as_reference(self.model)
+ torch.no_grad()
test_objectives.py::test_tdpo2_with_adapters

simper-of-logs in losses: simper
Without the exponential it is a difference of log-probs, which has no lower bound.
- rejected_mean_logps.exp() - chosen_mean_logps.exp()
+ rejected_mean_logps - chosen_mean_logps
test_objectives.py::test_value_and_gradient_are_the_closed_form[simper-0.1]

chi2-without-its-logarithm in losses: chi2_kl
Pure chi-squared: f' is bounded below, and unlikely answers are not told apart.
- expm1(logratios) + logratios
+ expm1(logratios)
test_objectives.py::test_chi2_is_dpo_for_unlikely_answers_and_clipped_where_it_explodes

chi2-clip-of-the-margin in training.objective: Objective.__call__
The limit holds for a - b instead of beta (a - b): ten times too narrow at beta 0.1.
- self.settings.chi2_clip / self.settings.beta
+ self.settings.chi2_clip
test_objectives.py::test_chi2_is_dpo_for_unlikely_answers_and_clipped_where_it_explodes

robust-not-divided in losses: robust
Without its divisor the loss is biased, and weaker by 1 - 2 epsilon.
- (-(1 - flipped) * F.logsigmoid(h) + flipped * F.logsigmoid(-h)) / (1 - 2 * flipped)
+ -(1 - flipped) * F.logsigmoid(h) + flipped * F.logsigmoid(-h)
test_objectives.py::test_value_and_gradient_are_the_closed_form[robust-0.2-0.1]

hinge-without-its-margin in losses: hinge
A pair is let go as soon as it is won by nothing.
- 1 - beta * margins
+ -beta * margins
test_objectives.py::test_constants_where_policy_is_reference[0.1]

ipo-target-doubled in losses: ipo
1 / beta instead of 1 / (2 beta): a target twice as far.
- margins - 1 / (2 * beta)
+ margins - 1 / beta
test_objectives.py::test_value_and_gradient_are_the_closed_form[ipo-0.1]

ipo-norm-of-sums in training.objective: means
The averaged variant that forgets to average is the paper's loss under another name.
- pairs.chosen_logratios / w - pairs.rejected_logratios / r
+ pairs.chosen_logratios - pairs.rejected_logratios
test_objectives.py::test_value_and_gradient_are_the_closed_form[ipo_norm-0.1]

sigmoid-norm-by-one-length in training.objective: means
Both sides are divided by the chosen length, so that padding a rejected answer pays.
- pairs.rejected_logratios / r
+ pairs.rejected_logratios / w
test_objectives.py::test_value_and_gradient_are_the_closed_form[sigmoid_norm-0.1]

exo-forward-kl in losses: exo_pair
The divergence the other way round is cDPO, but for a constant.
- torch.sigmoid(-h) * (F.logsigmoid(-h) - math.log(label_smoothing))
+ label_smoothing * (math.log(label_smoothing) - F.logsigmoid(-h))
test_objectives.py::test_value_and_gradient_are_the_closed_form[exo_pair-0.1]

discopop-in-two-factors in losses: discopop
m e^-h of a lost pair is 0 times infinity: NaN from a log-ratio of -1000 on.
- (F.logsigmoid(h / discopop_tau) - h).exp()
+ torch.sigmoid(h / discopop_tau) * (-h).exp()
test_objectives.py::test_extremes_are_finite[discopop-reverse_kl-dtype0]

dpop-lambda-outside-beta in losses: dpop
The bracketing of the paper's first version, which its authors have withdrawn.
- beta * (chosen_logratios - rejected_logratios - dpop_lambda * fall)
+ beta * (chosen_logratios - rejected_logratios) - dpop_lambda * fall
test_objectives.py::test_value_and_gradient_are_the_closed_form[dpop-5.0-0.1]

dpop-rewards-a-rise in losses: dpop
Without the maximum a chosen side that rises is pushed on by lambda.
- torch.relu(-chosen_logratios)
+ -chosen_logratios
test_objectives.py::test_laws_between_losses

nca-without-halves in losses: nca_pair
The two noise terms count twice.
- (F.logsigmoid(-chosen) + F.logsigmoid(-rejected)) / 2
+ F.logsigmoid(-chosen) + F.logsigmoid(-rejected)
test_objectives.py::test_value_and_gradient_are_the_closed_form[nca_pair-0.1]

bco-without-delta in losses: bco_pair
The loss of TRL since 0.29: without the paper's shift it is another one.
- beta * chosen_logratios - delta
+ beta * chosen_logratios
test_objectives.py::test_value_and_gradient_are_the_closed_form[bco_pair-0.1]

delta-with-gradient in training.objective: Objective.__call__
The shift moves with the rewards it is compared with, and cancels half of their gradient.
- {**vars(pairs), **self.numbers, "delta": self.delta}
+ {**vars(pairs), **self.numbers,
+  "delta": self.settings.beta * (pairs.chosen_logratios + pairs.rejected_logratios).mean() / 2}
test_objectives.py::test_value_and_gradient_are_the_closed_form[bco_pair-0.1]

delta-in-evaluation in training.objective: Objective.__call__
Held-out pairs leak into training, as in old TRL, and looking changes the run.
- inputs = ...
+ self.add_rewards(pairs)
+ inputs = ...
test_objectives.py::test_evaluation_leaves_delta_alone

delta-never-learned in training.objective: Objective.training_losses
The loop forgets to say that it trains: delta stays 0.
- self.add_rewards(pairs)
+ pass
test_objectives.py::test_delta_follows_the_rewards_of_the_loop

delta-of-one-rank in training.objective: Objective.after_step
Each rank divides good from bad at a place of its own.
- sum_over_ranks(self.step_rewards)
+ self.step_rewards
test_objectives.py::test_two_ranks_have_one_delta

delta-mean-of-means in training.objective: Objective.add_rewards
Micro-batches count alike, whatever they hold.
- [rewards.sum(), rewards.new_tensor(len(rewards))]
+ [rewards.mean(), rewards.new_tensor(1.0)]
test_objectives.py::test_delta_is_the_mean_reward_of_the_steps_before

delta-lost-on-resume in training.objective: Objective.load_state_dict
A resumed run begins with a delta of 0.
- state["reward_sum"]
+ 0.0
test_objectives.py::test_delta_is_kept_in_a_checkpoint_and_has_no_gradient

kto-with-gradient in losses: kto_pair
The point that gains are measured from is itself trained, away from them.
- rejected_logratios.mean().clamp(min=0).detach()
+ rejected_logratios.mean().clamp(min=0)
test_objectives.py::test_value_and_gradient_are_the_closed_form[kto_pair-0.1]

kto-kl-of-the-own-side in losses: kto_pair
Each side is measured against itself.
- rejected_kl - chosen_logratios
+ chosen_kl - chosen_logratios
test_objectives.py::test_value_and_gradient_are_the_closed_form[kto_pair-0.1]

apo-down-pushes-up in losses: apo_down
APO-zero's first term in APO-down's place.
- beta * chosen_logratios
+ -beta * chosen_logratios
test_objectives.py::test_value_and_gradient_are_the_closed_form[apo_down-0.1]

sppo-one-target in losses: sppo_hard
Both sides are pulled to the chosen one's target.
- rejected_logratios + 1 / (2 * beta)
+ rejected_logratios - 1 / (2 * beta)
test_objectives.py::test_value_and_gradient_are_the_closed_form[sppo_hard-0.1]

aot-unsorted in losses: aot
Without sorting it is DPO.
- (policy_chosen_logps - policy_rejected_logps).sort().values
+ policy_chosen_logps - policy_rejected_logps
test_objectives.py::test_aot_is_a_plain_loop_over_quantiles[aot-0.0]

simpo-gamma-inside-beta in losses: simpo
The margin shrinks with beta.
- beta * (chosen_mean_logps - rejected_mean_logps) - simpo_gamma
+ beta * (chosen_mean_logps - rejected_mean_logps - simpo_gamma)
test_objectives.py::test_value_and_gradient_are_the_closed_form[simpo-0.1]

simpo-of-sums in training.objective: means
Mean for sum and sum for mean: SimPO's reward is the mean log-prob, or long answers lose.
- pairs.policy_rejected_logps / r
+ pairs.policy_rejected_logps
test_objectives.py::test_value_and_gradient_are_the_closed_form[simpo-0.1]

orpo-without-odds in losses: log_odds
Log-probs in the place of log odds.
- logp - (-logp.expm1()).log()
+ logp
test_objectives.py::test_value_and_gradient_are_the_closed_form[orpo-0.1]

orpo-infinite-odds in losses: log_odds
A certain answer has infinite odds; two of them differ by NaN.
- logp = logp.clamp(max=-1e-6)
test_objectives.py::test_extremes_are_finite[orpo-reverse_kl-dtype0]

sft-over-tokens-of-the-batch in training.objective: means
A mean over the batch's tokens: long answers weigh more than in the paper.
- pairs.policy_chosen_logps / w
+ pairs.policy_chosen_logps / w.mean()
test_objectives.py::test_value_and_gradient_are_the_closed_form[sft-0.1]

token-zero-skipped in model.transformer: token_logps
ignore_index=0 is a habit; 0 is a token like any other, and its log-prob is lost.
- F.cross_entropy(at_least_float32(logits), targets, reduction="none")
+ F.cross_entropy(at_least_float32(logits), targets, reduction="none", ignore_index=0)
test_model.py::test_token_logps_are_finite_at_the_extremes

forward-kl-overflows in losses: expm1
e^100 is inf in float32, and inf - inf NaN.
- kept = x.clamp(max=last)
+ kept = x
test_objectives.py::test_extremes_are_finite[sigmoid-forward_kl-dtype0]

divergence-clamped in losses: expm1
A clamp is finite as well, and lets go of the pairs that are most wrong.
- kept.expm1() + kept.exp() * (x - kept)
+ kept.expm1()
test_objectives.py::test_a_hopeless_answer_is_not_let_go

alpha-for-one-minus-alpha in losses: alpha
TRL's alpha: equal to the paper's at the default of one half only.
- -expm1(-divergence_alpha * logratios) / divergence_alpha
+ -expm1((divergence_alpha - 1) * logratios) / (1 - divergence_alpha)
test_objectives.py::test_a_score_is_the_derivative_of_its_divergence[alpha]

divergence-ignored in training.objective: Objective.__call__
The flag is accepted and reverse KL computed, as in TRL for a year.
- self.derivative(chosen) - self.derivative(rejected)
+ chosen - rejected
test_objectives.py::test_scores_by_hand

wpo-unclamped in training.objective: wpo_weights
A product of weights above 1 makes likely pairs more than pairs.
- (chosen / chosen_lengths + rejected / rejected_lengths).clamp(max=0)
+ chosen / chosen_lengths + rejected / rejected_lengths
test_objectives.py::test_collisions_of_two_tokens_by_hand

wpo-of-sums in training.objective: wpo_weights
Without the mean over tokens the weight of any real answer is 0.
- chosen / chosen_lengths + rejected / rejected_lengths
+ chosen + rejected
test_objectives.py::test_collisions_of_two_tokens_by_hand

wpo-with-gradient in training.objective: wpo_pair_weights
The policy learns to find its own pairs unlikely.
- policy_logps.detach()
+ policy_logps
test_objectives.py::test_pairs_of_a_stream_are_those_of_single_sequences[forked]

wpo-without-collisions in training.objective: wpo_pair_weights
Without the sum of squares the weight is an answer's plain likelihood.
- (2 * logps).logsumexp(-1)
+ logps.logsumexp(-1)
test_objectives.py::test_pairs_of_a_stream_are_those_of_single_sequences[twin]

ld-from-the-start-of-the-prompt in model.stream: TokenStream.beyond_the_shorter
Positions are counted from the prompt on, so an answer counts by alpha from its first token.
- torch.arange(len(self.owners), device=self.owners.device) - starts[self.owners]
+ self.positions[self.predictors] + 1
test_objectives.py::test_pairs_of_a_stream_are_those_of_single_sequences[forked]

ld-beyond-the-longer in model.stream: TokenStream.beyond_the_shorter
Nothing lies beyond the longer answer: the option does nothing.
- lengths.view(-1, self.branches).amin
+ lengths.view(-1, self.branches).amax
test_objectives.py::test_pairs_of_a_stream_are_those_of_single_sequences[twin]

ld-of-the-policy-only in training.objective: Pairs.of
The reference stays whole, and log-ratios compare unlike things.
- policy_logps - reference_logps
+ policy_logps
test_objectives.py::test_pairs_of_a_stream_are_those_of_single_sequences[forked]

ld-alpha-turned in training.objective: Objective.__call__
alpha for 1 - alpha.
- (1 - self.settings.ld_alpha) * pairs.rejected_tails
+ self.settings.ld_alpha * pairs.rejected_tails
test_objectives.py::test_ld_dpo_replaces_the_log_ratios[sigmoid]

tr-both-variants-at-once in training.options: check_options
A share of the way and a period together are neither of the paper's two variants.
- require(not both, ...)
+ require(True, ...)
test_objectives.py::test_what_makes_no_sense_is_refused

tr-alpha-turned in training.objective: Objective.after_step
The reference keeps the share that it should give away.
- old.lerp_(new, share)
+ old.lerp_(new, 1 - share)
test_objectives.py::test_tr_dpo_softly_at_every_step

tr-copies-the-pointer in training.objective: Objective.after_step
After the first copy the reference is the policy, and the loss ln 2 for ever.
- old.lerp_(new, share)
+ old.data = new.data
test_objectives.py::test_the_reference_follows_in_the_loop

tr-a-step-early in training.objective: Objective.after_step
The first copy comes after one step instead of tau.
- self.moves_reference and step % every == 0
+ self.moves_reference and step % every == 1 % every
test_objectives.py::test_the_reference_follows_in_the_loop

weights-of-losses-ignored in training.objective: Objective.__call__
MPO with three equal weights is another objective.
- weight * call(LOSSES[name], inputs)
+ call(LOSSES[name], inputs)
test_objectives.py::test_several_losses_are_a_weighted_sum

useless-option-accepted in training.options: check_options
An option that the loss does not look at is swallowed, and the user believes in it.
- name == "beta" or name in inputs or not users
+ True
test_objectives.py::test_what_makes_no_sense_is_refused

rewards-by-length in training.objective: pair_metrics
Rewards that are averaged when the loss is: margins of two runs cannot be compared.
- chosen, rejected = pairs.chosen_logratios.detach(), pairs.rejected_logratios.detach()
+ chosen = pairs.chosen_logratios.detach() / pairs.chosen_lengths
+ rejected = pairs.rejected_logratios.detach()
test_objectives.py::test_rewards_mean_the_same_whatever_the_loss[ipo_norm]

reference-free-copies-a-reference in training.reference: make_reference
A model's worth of memory for nothing.
- not objective.needs_reference
+ False
test_objectives.py::test_every_objective_trains_and_evaluates[simpo]

evaluated-with-another-loss in train_dpo: train.evaluate_now
The held-out loss is DPO's while another one is trained.
- evaluate(*data, precision, objective, *options)
+ evaluate(*data, precision, Objective(ObjectiveSettings(beta=settings.beta)), *options)
test_objectives.py::test_every_objective_trains_and_evaluates[ipo]

evaluation-mean-of-means in training.evaluate: evaluate
The last, short batch weighs as much as the others, so figures depend on the batch size.
- meter.add(len(losses), pair_metrics(losses, batch, settings.beta))
+ meter.add(1, {k: v / len(losses) for k, v in pair_metrics(losses, batch, settings.beta).items()})
test_objectives.py::test_evaluation_does_not_depend_on_its_batches[sigmoid-plain]

labels-of-other-rows in dataset.packing: build_stream
The first labels of the file instead of those of the micro-batch.
- store.score_margins[np.asarray(rows, int)]
+ store.score_margins[: len(rows)]
test_objectives.py::test_soft_reads_the_labels_of_the_data

scores-exchanged in dataset.store: score_margin
Rejected minus chosen: the soft labels prefer the wrong side.
- record.scores[0] - record.scores[1]
+ record.scores[1] - record.scores[0]
test_store.py::test_score_margins_are_those_of_the_records

probability-for-its-logit in dataset.store: score_margin
A win probability of 0.5 becomes a label of 0.62.
- math.log(p) - math.log1p(-p)
+ p
test_store.py::test_score_margins_are_those_of_the_records

# ---- Ranked replies

reply-above-itself in losses: plackett_luce
The tail of the k-th draw begins behind it; with j >= k the reply stands twice, and two replies are not DPO.
- (present[:, :, None] & present[:, None, :]).triu(1)
+ (present[:, :, None] & present[:, None, :]).triu(0)
test_rankings.py::test_two_replies_are_dpo_to_the_bit[dtype0]

missing-reply-ranked in losses: plackett_luce
A prompt with fewer replies has places without one; they must not count as replies of reward 0.
- ~reply_logratios.isnan()
+ reply_logratios.nan_to_num_() == reply_logratios
test_rankings.py::test_the_loss_is_the_likelihood_of_the_order

worst-reply-first in losses: plackett_luce
The list is read from its end: the model learns the reverse order.
- ~worse
+ ~worse.transpose(1, 2)
test_rankings.py::test_laws_of_the_loss

padded-behind-the-last in dataset.store: pad_bounds
Missing replies stand after the worst one, so that the rejected answer of a short row is empty.
- places[:, -1:] = widths - 1
+ places = np.minimum(columns, widths - 1)
test_rankings.py::test_a_row_with_fewer_replies_is_padded_before_its_last

missing-reply-copies-the-prompt in dataset.packing: stream_lengths
In the twin layout only replies that are there bring their prompt.
- (np.diff(store.bounds[:, 1:]) > 0).sum(axis=1)
+ store.bounds.shape[1] - 2
test_rankings.py::test_log_ratios_of_a_stream_are_those_of_single_sequences[twin]

only-the-ends-of-a-ranking in training.objective: Pairs.of
The replies between the best and the worst one are never learned.
- stream.branches > 2
+ stream.branches > 99
test_rankings.py::test_log_ratios_of_a_stream_are_those_of_single_sequences[forked]

# ---- Unpaired feedback

z0-from-matched-answers in training.objective: Objective.before_step
The mean of the trained answers themselves: their rewards are measured from their own mean.
- mismatched(data)
+ data
test_unpaired.py::test_z0_is_the_mean_over_mismatched_answers[forked]

gradient-through-z0 in training.objective: Objective.before_step
The policy lowers its loss by moving the point from which it is measured.
- torch.no_grad()
+ torch.enable_grad()
test_unpaired.py::test_z0_is_the_mean_over_mismatched_answers[twin]

z0-below-zero in training.objective: Objective.before_step
A KL is not negative; its estimate from a few answers is.
- (self.settings.beta * world.sum(total) / len(rows)).clamp(min=0)
+ self.settings.beta * world.sum(total) / len(rows)
test_unpaired.py::test_z0_is_the_mean_over_mismatched_answers[forked]

z0-of-each-rank in training.objective: Objective.before_step
Each rank has the sum of its own rows only, so that more ranks are another loss.
- world.sum(total)
+ total
test_unpaired.py::test_two_ranks_equal_one_process

partner-with-the-same-prompt in dataset.mismatched: partners
The next row of the file often answers the same prompt, and is not mismatched.
- return (...) % rows
+ return (places + 1) % rows
test_unpaired.py::test_partners_have_another_prompt

missing-answer-trained in losses: kto
The side without an answer adds a constant to the loss: half of it is no answer's.
- chosen_lengths > 0
+ chosen_lengths >= 0
test_unpaired.py::test_the_loss_and_its_slopes_by_hand

label-turned in dataset.records: Feedback.replies
Desirable answers are rejected: the loss falls, and the model learns what people disliked.
- return (self.completion, None) if self.label else (None, self.completion)
+ return (None, self.completion) if self.label else (self.completion, None)
test_unpaired.py::test_a_row_has_one_side

weights-of-labels-exchanged in losses: kto
λ_D and λ_U change places: the balance that they should restore is twice as bad.
- desirable_weight * desirable + undesirable_weight * undesirable
+ undesirable_weight * desirable + desirable_weight * undesirable
test_unpaired.py::test_the_loss_and_its_slopes_by_hand

rewards-of-a-label-over-all-rows in training.metrics: Meter.mean
The mean reward of desirable answers is divided by the number of all answers.
- sums.get(name + COUNT, weight)
+ weight
test_unpaired.py::test_evaluation_does_not_depend_on_its_batches
""")
