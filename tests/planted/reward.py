"""The reward model. See tests/mutants.py."""

from tests.planted.mutant import Mutant

REWARD = "tests/test_reward.py::"
SCORE = "tests/test_score.py::"
RESUME = "tests/test_resume.py::"

MUTANTS = [
    Mutant(
        "reward-before-the-end-token",
        "Read where the end token is predicted, the reward does not know whether the answer ended there.",
        "model.stream",
        "TokenStream.last_tokens",
        "torch.tensor(ends, dtype=torch.long, device=self.tokens.device) - 1",
        "torch.tensor(ends, dtype=torch.long, device=self.tokens.device) - 2",
        REWARD + "test_rewards_equal_brute_force[plain-forked]",
    ),
    Mutant(
        "reward-from-the-predictors",
        "One place after the last predictor is the end token, but not of an answer that is nothing else.",
        "model.stream",
        "TokenStream.last_tokens",
        "segments = self.segments.tolist()",
        "return self.predictors[self.lengths().cumsum(0) - 1] + 1\n"
        "segments = []",
        REWARD + "test_last_tokens_are_end_tokens[forked]",
    ),
    Mutant(
        "reward-turned",
        "The model learns to give the rejected answer the higher reward.",
        "losses",
        "bradley_terry_loss",
        "chosen_rewards - rejected_rewards",
        "rejected_rewards - chosen_rewards",
        REWARD + "test_loss_is_its_closed_form",
    ),
    Mutant(
        "reward-log-of-sigmoid",
        "A pair that is far on the wrong side has an infinite loss and no gradient.",
        "losses",
        "bradley_terry_loss",
        "F.logsigmoid(chosen_rewards - rejected_rewards)",
        "(chosen_rewards - rejected_rewards).sigmoid().log()",
        REWARD + "test_loss_is_finite_at_the_extremes",
    ),
    Mutant(
        "reward-in-bf16",
        "Autocast rounds the head's product to bf16, and close answers tie.",
        "model.reward",
        "RewardModel.forward",
        "(at_least_float32(hidden) * self.score.weight).sum(dim=-1)",
        "self.score(hidden)[:, 0].float()",
        REWARD + "test_rewards_are_float32_under_autocast",
    ),
    Mutant(
        "reward-keeps-the-vocabulary",
        "A matrix that no gradient reaches: ranks wait for it, and checkpoints carry it along.",
        "model.reward",
        "RewardModel.__init__",
        "if not config.tie_word_embeddings:\n"
        "    del self.lm_head",
        "if not config.tie_word_embeddings:\n"
        "    self.lm_head.requires_grad_()",
        REWARD + "test_a_fresh_reward_model_is_the_language_models_body[False]",
    ),
    Mutant(
        "reward-mean-of-micro-batches",
        "Each micro-batch is divided by its own size, so pairs of small micro-batches weigh more.",
        "train_reward",
        "train",
        "(losses + penalty).sum() * world.ranks / len(window)",
        "(losses + penalty).mean() / len([*micro_batches(pairs, window, world, max_tokens)])",
        REWARD + "test_accumulation_equals_one_big_batch[200]",
    ),
    Mutant(
        "reward-ranks-average-away",
        "DDP averages the ranks' gradients; without the factor two ranks learn at half the rate.",
        "train_reward",
        "train",
        "(losses + penalty).sum() * world.ranks",
        "(losses + penalty).sum()",
        REWARD + "test_two_ranks_equal_one_process",
    ),
    Mutant(
        "scores-by-row",
        "Rows are counted without the pairs that were dropped: every score after one goes to another pair.",
        "eval.score",
        "write_scored",
        "pairs.records.tolist()",
        "range(len(pairs))",
        "tests/test_score.py::test_scores_are_written_back[pairs.jsonl]",
    ),
    Mutant(
        "scores-by-line",
        "In a JSON array several records may stand on one line.",
        "dataset.store",
        "_write",
        "places.append(place)",
        "places.append(record.line - 1)",
        "tests/test_score.py::test_scores_are_written_back[pairs.json]",
    ),
    Mutant(
        "scores-swapped",
        "Soft labels then say of every pair that the rejected answer is the better one.",
        "eval.score",
        "write_scored.write",
        'record["score_chosen"], record["score_rejected"] = scores[place]',
        'record["score_rejected"], record["score_chosen"] = scores[place]',
        "tests/test_score.py::test_scores_are_written_back[pairs.jsonl]",
    ),
    Mutant(
        "any-model-for-any",
        "What a folder holds is not looked at, and a user reads a list of keys instead of a reason.",
        "model.weights",
        "load_model",
        '(kind := config.get("kind", Transformer.kind)) != model_class.kind',
        "(kind := model_class.kind) != kind",
        REWARD + "test_folders_tell_what_they_hold",
    ),
    Mutant(
        "delta-forgotten",
        "BCO's running mean begins anew after a resume, and the run is another one.",
        "train_dpo",
        "train",
        '{"objective": objective, **...}',
        "{**...}",
        RESUME + "test_the_state_of_an_objective_is_resumed[soft]",
    ),
    Mutant(
        "moved-reference-forgotten",
        "TR-DPO's reference falls back to where the run began.",
        "train_dpo",
        "train",
        "objective.moves_reference",
        "False",
        RESUME + "test_the_state_of_an_objective_is_resumed[hard]",
    ),
]
