"""The reward model. See tests/mutants.py."""

from tests.planted.mutant import catalogue

MUTANTS = catalogue(r"""
reward-before-the-end-token in model.stream: TokenStream.last_tokens
Read where the end token is predicted, the reward does not know whether the answer ended there.
- torch.tensor(ends, dtype=torch.long, device=self.tokens.device) - 1
+ torch.tensor(ends, dtype=torch.long, device=self.tokens.device) - 2
test_reward.py::test_rewards_equal_brute_force[plain-forked]

reward-from-the-predictors in model.stream: TokenStream.last_tokens
One place after the last predictor is the end token, but not of an answer that is nothing else.
- segments = self.segments.tolist()
+ return self.predictors[self.lengths().cumsum(0) - 1] + 1
+ segments = []
test_reward.py::test_last_tokens_are_end_tokens[forked]

reward-turned in losses: bradley_terry_loss
The model learns to give the rejected answer the higher reward.
- chosen_rewards - rejected_rewards
+ rejected_rewards - chosen_rewards
test_reward.py::test_loss_is_its_closed_form

reward-log-of-sigmoid in losses: bradley_terry_loss
A pair that is far on the wrong side has an infinite loss and no gradient.
- F.logsigmoid(chosen_rewards - rejected_rewards)
+ (chosen_rewards - rejected_rewards).sigmoid().log()
test_reward.py::test_loss_is_finite_at_the_extremes

reward-in-bf16 in model.reward: RewardModel.forward
Autocast rounds the head's product to bf16, and close answers tie.
- (at_least_float32(hidden) * self.score.weight).sum(dim=-1)
+ self.score(hidden)[:, 0].float()
test_reward.py::test_rewards_are_float32_under_autocast

reward-keeps-the-vocabulary in model.reward: RewardModel.__init__
A matrix that no gradient reaches: ranks wait for it, and checkpoints carry it along.
- if not config.tie_word_embeddings:
-     del self.lm_head
+ if not config.tie_word_embeddings:
+     self.lm_head.requires_grad_()
test_reward.py::test_a_fresh_reward_model_is_the_language_models_body[False]

reward-mean-of-micro-batches in train_reward: train
Each micro-batch is divided by its own size, so pairs of small micro-batches weigh more.
- (losses + penalty).sum() * world.ranks / len(window)
+ (losses + penalty).mean() * world.ranks / len([*micro_batches(pairs, window, world, max_tokens)])
test_reward.py::test_accumulation_equals_one_big_batch[200]

reward-ranks-average-away in train_reward: train
DDP averages the ranks' gradients; without the factor two ranks learn at half the rate.
- (losses + penalty).sum() * world.ranks
+ (losses + penalty).sum()
test_reward.py::test_two_ranks_equal_one_process

scores-by-row in eval.score: pairs_by_models
Rows are counted without the pairs that were dropped: every score after one goes to another pair.
- pairs.records.tolist()
+ range(len(pairs))
test_score.py::test_scores_are_written_back[pairs.jsonl]

scores-by-line in dataset.store: _write
In a JSON array several records may stand on one line.
- places.append(place)
+ places.append(record.line - 1)
test_score.py::test_scores_are_written_back[pairs.json]

scores-swapped in eval.score: write_scored.scored
Soft labels then say of every pair that the rejected answer is the better one.
- record["score_chosen"], record["score_rejected"] = scores[place]
+ record["score_rejected"], record["score_chosen"] = scores[place]
test_score.py::test_scores_are_written_back[pairs.jsonl]

any-model-for-any in model.weights: load_model
What a folder holds is not looked at, and a user reads a list of keys instead of a reason.
- (kind := config.get("kind", Transformer.kind)) != model_class.kind
+ (kind := model_class.kind) != kind
test_reward.py::test_folders_tell_what_they_hold

delta-forgotten in train_dpo: train
BCO's running mean begins anew after a resume, and the run is another one.
- {"objective": objective, **...}
+ {**...}
test_resume.py::test_the_state_of_an_objective_is_resumed[soft]

moved-reference-forgotten in train_dpo: train
TR-DPO's reference falls back to where the run began.
- objective.moves_reference
+ False
test_resume.py::test_the_state_of_an_objective_is_resumed[hard]
""")
