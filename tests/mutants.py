"""Plant a known bug, watch the named test go red: a catalogue of what goes wrong in preference training.

    python -m tests.mutants                                       # plant them all, one after another
    python -m tests.mutants --list                                # what there is, and why each is a bug
    python -m tests.mutants reference-omitted rope-not-restarted  # only these

Nearly all of these bugs train without an error and with a loss that falls. So it is not enough that the tests
are green: each mutant shows that one of them can be red. Reading the catalogue beside the code is also a way
to learn what each line is for. To look at a bug longer, make the same change by hand and draw its curve.

Each mutant changes one place in a copy of the project and runs one test there, in a forked child: torch is
imported once, the project's own modules are not imported before the fork.
"""

import argparse
import gc
import importlib
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SECONDS = 60  # A test that takes longer under a mutant counts as one that says nothing.


@dataclass(frozen=True)
class Mutant:
    """One bug: in `file`, the only occurrence of `old` becomes `new`, and `test` must fail."""

    name: str
    why: str
    file: str
    old: str
    new: str
    test: str


STREAM, MODEL, LOSSES = "tests/test_stream.py::", "tests/test_model.py::", "tests/test_losses.py::"
LOOPS, OBJECTIVES = "tests/test_loops.py::", "tests/test_objectives.py::"
CLOSED = OBJECTIVES + "test_value_and_gradient_are_the_closed_form"
CACHED, SPEED = "tests/test_reference.py::", "tests/test_speed.py::"
MOE, REWARD = "tests/test_moe.py::", "tests/test_reward.py::"
GENERATE, TOKENIZER, STORE = "tests/test_generate.py::", "tests/test_tokenizer.py::", "tests/test_store.py::"

MUTANTS = [
    # ---- The shift, the sum, the sides
    Mutant(
        "target-not-shifted",
        "A position is asked for its own token, which it has just been given.",
        "dataset/packing.py",
        "np.where(where == 0, before, start + where - 1)",
        "np.where(where == 0, before, start + where)",
        STREAM + "test_there_is_one_shift[forked]",
    ),
    Mutant(
        "target-shifted-twice",
        "A token is predicted from two places before it, as when the library and the loop both shift.",
        "dataset/packing.py",
        "np.where(where == 0, before, start + where - 1)",
        "np.where(where == 0, before, start + where - 2)",
        STREAM + "test_there_is_one_shift[twin]",
    ),
    Mutant(
        "first-rejected-from-last-chosen",
        "In a shared run the place before the rejected side is the end of the chosen one, not of the prompt.",
        "dataset/packing.py",
        "supervise(ids, supervised, start, prefix[1] - 1, responses)",
        "supervise(ids, supervised, start, start - 1, responses)",
        STREAM + "test_every_preference_shape_equals_brute_force[text-forked]",
    ),
    Mutant(
        "rope-not-restarted",
        "The rejected side goes on counting after the chosen one, so it stands too far from its prompt.",
        "dataset/packing.py",
        "start = append(ids, len(prompt), prefix)",
        "start = append(ids, end - prefix[0], prefix)",
        STREAM + "test_forked_equals_twin[plain]",
    ),
    Mutant(
        "rejected-sees-chosen",
        "The mask of a shared run lets the rejected side attend to the chosen one.",
        "dataset/packing.py",
        "start = append(ids, len(prompt), prefix)",
        "start = append(ids, len(prompt), (prefix[0], end))",
        STREAM + "test_who_sees_whom[forked]",
    ),
    Mutant(
        "mean-for-sum",
        "Eq. 7 of the paper has sums; a mean over tokens is another objective, that of other papers.",
        "model/stream.py",
        ".index_add(0, self.owners, token_logps)",
        '.index_reduce(0, self.owners, token_logps, "mean", include_self=False)',
        STREAM + "test_a_response_in_two_parts_adds_up",
    ),
    Mutant(
        "sides-split-into-halves",
        "Chosen and rejected lie by turns; split into halves, answers to different prompts are compared.",
        "model/stream.py",
        ".view(-1, 2).unbind(1)",
        ".view(2, -1).unbind(0)",
        STREAM + "test_sides_are_split_by_turns",
    ),
    Mutant(
        "sides-swapped",
        "The model learns to prefer what people rejected, and every curve looks well.",
        "model/stream.py",
        "return chosen, rejected",
        "return rejected, chosen",
        STREAM + "test_every_preference_shape_equals_brute_force[chat-twin]",
    ),
    Mutant(
        "rejected-owned-by-chosen",
        "Both sides are added up under one response, as when the chosen mask is used for both.",
        "dataset/packing.py",
        "np.full(len(where), owner)",
        "np.full(len(where), owner - owner % 2)",
        STREAM + "test_every_preference_shape_equals_brute_force[hh-forked]",
    ),
    Mutant(
        "empty-stream-fails",
        "A rank without rows stops with an error, and the others wait for its gradients.",
        "dataset/packing.py",
        "segments or [(0, 0, 0, 0)]",
        "segments",
        STREAM + "test_an_empty_stream_has_zero_gradients_not_none[forked]",
    ),
    Mutant(
        "segments-on-the-device",
        "The loop over segments then makes the program wait for the GPU in every layer.",
        "model/stream.py",
        'not in ("segments", "responses")',
        'not in ("responses",)',
        STREAM + "test_segments_stay_on_the_cpu",
    ),
    # ---- The transformer
    Mutant(
        "prefix-mask-top-left",
        "With a prefix there are more keys than queries; a mask that starts at the first key hides most.",
        "model/stream.py",
        ".triu(keys - queries + 1)",
        ".triu(1)",
        MODEL + "test_causal_attention_equals_sdpa_with_a_mask[1-1-5]",
    ),
    Mutant(
        "future-is-visible",
        "Off by one in the mask: each token sees the next one, which it is asked to predict.",
        "model/stream.py",
        ".triu_(1)",
        ".triu_(2)",
        STREAM + "test_a_changed_future_leaves_the_past_bitwise_equal",
    ),
    Mutant(
        "strangers-share-a-mask",
        "Pairs that attend in one call see their neighbours, as in packing without a block mask.",
        "model/stream.py",
        "bias[start - first : end - first, start - first : end - first].triu_(1)",
        "bias[start - first : end - first, : end - first].triu_(start - first + 1)",
        STREAM + "test_who_sees_whom[twin-128]",
    ),
    Mutant(
        "stranger-joins-a-branch",
        "The pair after a long one attends with its last branch, and loses its own mask.",
        "model/stream.py",
        "                room = -1\n",
        "                room = BLOCK\n",
        STREAM + "test_block_size_changes_nothing[40-forked]",
    ),
    Mutant(
        "sdpa-is-causal",
        "SDPA's is_causal aligns the queries with the first keys, which is wrong where there is a prefix.",
        "model/stream.py",
        "    # The query heads of a group are laid one below another, so that no key is ever copied.\n",
        "    return torch.nn.functional.scaled_dot_product_attention(\n"
        "        q, k, v, is_causal=True, enable_gqa=True)\n",
        STREAM + "test_forked_equals_twin[plain]",
    ),
    Mutant(
        "gqa-head-order",
        "Query heads share key heads in the other order; checkpoints load, and speak nonsense.",
        "model/stream.py",
        "q = q.reshape(groups, heads // groups * queries, size)",
        "q = q.unflatten(0, (-1, groups)).transpose(0, 1).reshape(groups, heads // groups * queries, size)",
        MODEL + "test_gqa_equals_mha_with_repeated_heads",
    ),
    Mutant(
        "scores-not-scaled",
        "Scores that are not divided by sqrt(D) saturate the softmax.",
        "model/stream.py",
        ", alpha=size**-0.5",
        "",
        MODEL + "test_forward_equals_the_formulas[plain]",
    ),
    Mutant(
        "rope-neighbours",
        "Pairs of neighbours are turned instead of halves: Llama's weights load and mean something else.",
        "model/transformer.py",
        "x.chunk(2, dim=-1)",
        "(x[..., 0::2], x[..., 1::2])",
        MODEL + "test_rope_turns_halves_not_neighbours",
    ),
    Mutant(
        "rope-in-bf16",
        "Positions above 256 collide in bf16.",
        "model/transformer.py",
        "positions[:, None, None].float()",
        "positions[:, None, None].bfloat16().float()",
        MODEL + "test_rope_angles_are_float32_under_autocast",
    ),
    Mutant(
        "qk-norm-after-rope",
        "The gains of a norm differ by coordinate, so norm and rotation must not change places.",
        "model/transformer.py",
        "rotate(self.q_norm(q), rotation)",
        "self.q_norm(rotate(q, rotation))",
        MODEL + "test_forward_equals_the_formulas[qk_norm]",
    ),
    Mutant(
        "head-not-tied",
        "Scores are read off another tensor than the embeddings, or not at all.",
        "model/transformer.py",
        "self.embed_tokens.weight if self.config.tie_word_embeddings else",
        "self.embed_tokens.weight.detach() if self.config.tie_word_embeddings else",
        LOSSES + "test_gradient_equals_finite_differences[forked]",
    ),
    Mutant(
        "log-softmax-in-bf16",
        "CPU autocast leaves log_softmax in bf16; over 512 tokens the sum is off by nats.",
        "model/transformer.py",
        'return -F.cross_entropy(logits, targets, reduction="none")',
        "return logits.bfloat16().log_softmax(-1).gather(1, targets[:, None])[:, 0]",
        MODEL + "test_log_softmax_is_float32_even_of_bf16_scores[True]",
    ),
    Mutant(
        "embeddings-decayed",
        "Weight decay pulls the embeddings of rare tokens to 0.",
        "training/schedule.py",
        "{id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}",
        "set()",
        MODEL + "test_weight_decay_is_for_matrices[all]",
    ),
    # ---- Mixture of experts
    Mutant(
        "expert-weights-of-all-experts",
        "The chosen experts' weights sum to less than 1 where the checkpoint was trained with a sum of 1.",
        "model/moe.py",
        "weights = weights / weights.sum(dim=-1, keepdim=True)",
        "weights = weights",
        MOE + "test_mixture_equals_a_loop_over_tokens_and_experts[shape0]",
    ),
    Mutant(
        "weight-of-the-other-expert",
        "Each of a token's experts gets the weight of another one.",
        "model/moe.py",
        "y = (weights[..., None] * outputs)",
        "y = (weights.flip(-1)[..., None] * outputs)",
        MOE + "test_mixture_equals_a_loop_over_tokens_and_experts[shape1]",
    ),
    Mutant(
        "experts-weighted-twice",
        "What enters an expert is weighted, and what leaves it once more.",
        "model/moe.py",
        "parts = x[order // self.chosen_per_token].split(",
        "parts = (weights.flatten()[order, None] * x[order // self.chosen_per_token]).split(",
        MOE + "test_mixture_equals_a_loop_over_tokens_and_experts[shape4]",
    ),
    Mutant(
        "experts-answer-other-tokens",
        "What the experts said is not put back in the order of the tokens.",
        "model/moe.py",
        "outputs[order.argsort()]",
        "outputs[order]",
        "tests/test_generate.py::test_cache_equals_the_full_forward[chunks0-experts]",
    ),
    Mutant(
        "shared-expert-not-gated",
        "The shared expert counts in full for every token.",
        "model/moe.py",
        "self.shared_expert_gate(x).sigmoid() * self.shared_expert(x)",
        "self.shared_expert(x)",
        MOE + "test_mixture_equals_a_loop_over_tokens_and_experts[shape3]",
    ),
    Mutant(
        "idle-experts-left-out",
        "An expert without a token on one rank has no gradient there, and the other ranks wait for it.",
        "model/moe.py",
        "expert(part) for expert, part in zip(self.experts, parts, strict=True)",
        "expert(part) for expert, part in zip(self.experts, parts, strict=True) if len(part)",
        MOE + "test_experts_without_a_token_have_zero_gradients_not_none[1]",
    ),
    Mutant(
        "balance-not-times-experts",
        "Its least value then depends on how many experts there are, and so does what a coefficient means.",
        "model/moe.py",
        "return experts * (chosen_share",
        "return (chosen_share",
        MOE + "test_balance_is_k_when_even_and_rises_to_the_number_of_experts[4-2]",
    ),
    Mutant(
        "balance-of-no-tokens",
        "A rank without a record divides by 0, and its NaN is what all ranks log.",
        "model/moe.py",
        "max(1, len(probabilities))",
        "len(probabilities)",
        MOE + "test_experts_without_a_token_have_zero_gradients_not_none[0]",
    ),
    Mutant(
        "balance-whole-in-every-micro-batch",
        "With n micro-batches the load-balancing loss weighs n times as much.",
        "train_dpo.py",
        "(losses + model.config.router_aux_loss_coef * aux_loss).sum()",
        "losses.sum() + model.config.router_aux_loss_coef * aux_loss * len(window)",
        MOE + "test_each_window_counts_the_balance_once[dpo-2]",
    ),
    Mutant(
        "balance-of-the-reference",
        "The frozen copy's balance is added: the figure is right at first, and moves no router.",
        "train_dpo.py",
        "aux_loss = model.aux_loss()",
        "aux_loss = reference.aux_loss()",
        MOE + "test_each_window_counts_the_balance_once[dpo-5]",
    ),
    Mutant(
        "balance-without-its-coefficient",
        "The option is read, saved and shown, and never reaches the loss.",
        "train_sft.py",
        "(losses + model.config.router_aux_loss_coef * aux_loss).sum()",
        "(losses + aux_loss).sum()",
        MOE + "test_each_window_counts_the_balance_once[sft-5]",
    ),
    # ---- The objective
    Mutant(
        "beta-forgotten",
        "The loss starts at ln 2 all the same, and the policy runs away from its reference.",
        "losses.py",
        "cross_entropy(beta * margins, 1 - label_smoothing)",
        "cross_entropy(margins, 1 - label_smoothing)",
        LOSSES + "test_gradient_identity_at_the_start",
    ),
    Mutant(
        "reference-sign-flipped",
        "The reference is added instead of subtracted.",
        "objective.py",
        "self.policy_rejected_logps - self.reference_rejected_logps",
        "self.policy_rejected_logps + self.reference_rejected_logps",
        LOSSES + "test_loss_is_exactly_ln_2_before_the_first_step[forked-fp32]",
    ),
    Mutant(
        "reference-omitted",
        "Without the reference on one side the loss pushes the policy towards short answers.",
        "objective.py",
        "self.policy_chosen_logps - self.reference_chosen_logps",
        "self.policy_chosen_logps",
        LOSSES + "test_loss_by_hand",
    ),
    Mutant(
        "margin-turned",
        "Rejected minus chosen: the loss starts at ln 2 and falls, the model gets worse.",
        "objective.py",
        "self.score(chosen) - self.score(rejected)",
        "self.score(rejected) - self.score(chosen)",
        LOSSES + "test_gradient_is_minus_beta_sigmoid",
    ),
    Mutant(
        "log-of-sigmoid",
        "log(sigmoid(z)) is -inf where sigmoid(z) rounds to 0, and its gradient NaN.",
        "losses.py",
        "-p * F.logsigmoid(h) - (1 - p) * F.logsigmoid(-h)",
        "-p * h.sigmoid().log() - (1 - p) * (-h).sigmoid().log()",
        LOSSES + "test_extremes_are_finite[dtype0]",
    ),
    Mutant(
        "rewards-with-gradient",
        "Rewards that keep their graph hold the memory of every micro-batch until they are logged.",
        "losses.py",
        "value.detach().sum() for",
        "value.sum() for",
        LOSSES + "test_rewards_carry_no_gradient",
    ),
    Mutant(
        "tie-counted-as-loss",
        "Before the first step every pair is a tie; an accuracy of 0 there is an artefact.",
        "losses.py",
        " + 0.5 * (margins == 0).float()",
        "",
        LOSSES + "test_metrics_are_sums_and_a_tie_is_half",
    ),
    # ---- Other objectives
    Mutant(
        "cdpo-ignored",
        "The option is accepted, and the loss is DPO's all the same: what TRL does since 0.29.",
        "losses.py",
        "cross_entropy(beta * margins, 1 - label_smoothing)",
        "cross_entropy(beta * margins, 1.0)",
        CLOSED + "[sigmoid-0.2-0.1]",
    ),
    Mutant(
        "soft-label-made-hard",
        "A pair that wins by a hair is learned like one that wins for sure.",
        "losses.py",
        "torch.sigmoid(score_scale * score_margins)",
        "(score_margins > 0).to(margins)",
        CLOSED + "[soft-0.1]",
    ),
    Mutant(
        "score-scale-ignored",
        "Scores on a scale of ten are read as log odds.",
        "losses.py",
        "torch.sigmoid(score_scale * score_margins)",
        "torch.sigmoid(score_margins)",
        CLOSED + "[soft-0.25-0.1]",
    ),
    Mutant(
        "robust-not-divided",
        "Without its divisor the loss is biased, and weaker by 1 - 2 epsilon.",
        "losses.py",
        " / (1 - 2 * flipped)",
        "",
        CLOSED + "[robust-0.2-0.1]",
    ),
    Mutant(
        "hinge-without-its-margin",
        "A pair is let go as soon as it is won by nothing.",
        "losses.py",
        "torch.relu(1 - beta * margins)",
        "torch.relu(-beta * margins)",
        OBJECTIVES + "test_constants_where_policy_is_reference[0.1]",
    ),
    Mutant(
        "ipo-target-doubled",
        "1 / beta instead of 1 / (2 beta): a target twice as far.",
        "losses.py",
        "`ipo_norm` averages them.\n"
        '    """\n'
        "    return (margins - 1 / (2 * beta)) ** 2",
        "`ipo_norm` averages them.\n"
        '    """\n'
        "    return (margins - 1 / beta) ** 2",
        CLOSED + "[ipo-0.1]",
    ),
    Mutant(
        "ipo-norm-of-sums",
        "The averaged variant that forgets to average is the paper's loss under another name.",
        "losses.py",
        "    margins = chosen_logratios / chosen_lengths - rejected_logratios / rejected_lengths\n",
        "    margins = chosen_logratios - rejected_logratios\n",
        CLOSED + "[ipo_norm-0.1]",
    ),
    Mutant(
        "sigmoid-norm-by-one-length",
        "Both sides are divided by the chosen length, so that padding a rejected answer pays.",
        "losses.py",
        "beta * (chosen_logratios / chosen_lengths - rejected_logratios / rejected_lengths)",
        "beta * (chosen_logratios - rejected_logratios) / chosen_lengths",
        CLOSED + "[sigmoid_norm-0.1]",
    ),
    Mutant(
        "exo-forward-kl",
        "The divergence the other way round is cDPO, but for a constant.",
        "losses.py",
        "torch.sigmoid(-h) * (F.logsigmoid(-h) - math.log(label_smoothing))",
        "label_smoothing * (math.log(label_smoothing) - F.logsigmoid(-h))",
        CLOSED + "[exo_pair-0.1]",
    ),
    Mutant(
        "discopop-in-two-factors",
        "m e^-h of a lost pair is 0 times infinity: NaN from a log-ratio of -1000 on.",
        "losses.py",
        "(F.logsigmoid(h / discopop_tau) - h).exp()",
        "torch.sigmoid(h / discopop_tau) * (-h).exp()",
        OBJECTIVES + "test_extremes_are_finite[discopop-reverse_kl-dtype0]",
    ),
    Mutant(
        "dpop-lambda-outside-beta",
        "The bracketing of the paper's first version, which its authors have withdrawn.",
        "losses.py",
        "beta * (chosen_logratios - rejected_logratios - dpop_lambda * fall)",
        "beta * (chosen_logratios - rejected_logratios) - dpop_lambda * fall",
        CLOSED + "[dpop-5.0-0.1]",
    ),
    Mutant(
        "dpop-rewards-a-rise",
        "Without the maximum a chosen side that rises is pushed on by lambda.",
        "losses.py",
        "fall = torch.relu(-chosen_logratios)",
        "fall = -chosen_logratios",
        OBJECTIVES + "test_laws_between_losses",
    ),
    Mutant(
        "nca-without-halves",
        "The two noise terms count twice.",
        "losses.py",
        "(F.logsigmoid(-chosen) + F.logsigmoid(-rejected)) / 2",
        "(F.logsigmoid(-chosen) + F.logsigmoid(-rejected))",
        CLOSED + "[nca_pair-0.1]",
    ),
    Mutant(
        "bco-without-delta",
        "The loss of TRL since 0.29: without the paper's shift it is another one.",
        "losses.py",
        "-F.logsigmoid(beta * chosen_logratios - delta)",
        "-F.logsigmoid(beta * chosen_logratios)",
        CLOSED + "[bco_pair-0.1]",
    ),
    Mutant(
        "delta-with-gradient",
        "The shift moves with the rewards it is compared with, and cancels half of their gradient.",
        "objective.py",
        '"delta": self.delta}',
        '"delta": self.settings.beta * (pairs.chosen_logratios + pairs.rejected_logratios).mean() / 2}',
        CLOSED + "[bco_pair-0.1]",
    ),
    Mutant(
        "delta-in-evaluation",
        "Held-out pairs leak into training, as in old TRL, and looking changes the run.",
        "objective.py",
        'if training and "delta" in self.looks_at:',
        'if "delta" in self.looks_at:',
        OBJECTIVES + "test_evaluation_leaves_delta_alone",
    ),
    Mutant(
        "delta-never-learned",
        "The loop forgets to say that it trains: delta stays 0.",
        "train_dpo.py",
        "objective(batch, training=True)",
        "objective(batch)",
        OBJECTIVES + "test_delta_follows_the_rewards_of_the_loop",
    ),
    Mutant(
        "delta-of-one-rank",
        "Each rank divides good from bad at a place of its own.",
        "objective.py",
        "sum_over_ranks(self.under_way).tolist()",
        "self.under_way.tolist()",
        OBJECTIVES + "test_two_ranks_have_one_delta",
    ),
    Mutant(
        "delta-mean-of-means",
        "Micro-batches count alike, whatever they hold.",
        "objective.py",
        "torch.stack([rewards.sum(), rewards.new_tensor(len(rewards))])",
        "torch.stack([rewards.mean(), rewards.new_tensor(1.0)])",
        OBJECTIVES + "test_delta_is_the_mean_reward_of_the_steps_before",
    ),
    Mutant(
        "delta-lost-on-resume",
        "A resumed run begins with a delta of 0.",
        "objective.py",
        'self.reward_sum, self.reward_count = state["reward_sum"], state["reward_count"]',
        'self.reward_sum, self.reward_count = 0.0, state["reward_count"]',
        OBJECTIVES + "test_delta_is_kept_in_a_checkpoint_and_has_no_gradient",
    ),
    Mutant(
        "kto-with-gradient",
        "The point that gains are measured from is itself trained, away from them.",
        "losses.py",
        "rejected_kl = rejected_logratios.mean().clamp(min=0).detach()",
        "rejected_kl = rejected_logratios.mean().clamp(min=0)",
        CLOSED + "[kto_pair-0.1]",
    ),
    Mutant(
        "kto-kl-of-the-own-side",
        "Each side is measured against itself.",
        "losses.py",
        "beta * (rejected_kl - chosen_logratios)",
        "beta * (chosen_kl - chosen_logratios)",
        CLOSED + "[kto_pair-0.1]",
    ),
    Mutant(
        "apo-down-pushes-up",
        "APO-zero's first term in APO-down's place.",
        "losses.py",
        "torch.sigmoid(beta * chosen_logratios) + torch.sigmoid(-beta * margins)",
        "torch.sigmoid(-beta * chosen_logratios) + torch.sigmoid(-beta * margins)",
        CLOSED + "[apo_down-0.1]",
    ),
    Mutant(
        "sppo-one-target",
        "Both sides are pulled to the chosen one's target.",
        "losses.py",
        "(rejected_logratios + 1 / (2 * beta)) ** 2",
        "(rejected_logratios - 1 / (2 * beta)) ** 2",
        CLOSED + "[sppo_hard-0.1]",
    ),
    Mutant(
        "aot-unsorted",
        "Without sorting it is DPO.",
        "losses.py",
        "policy = (policy_chosen_logps - policy_rejected_logps).sort().values",
        "policy = policy_chosen_logps - policy_rejected_logps",
        OBJECTIVES + "test_aot_is_a_plain_loop_over_quantiles[aot-0.0]",
    ),
    Mutant(
        "simpo-gamma-inside-beta",
        "The margin shrinks with beta.",
        "losses.py",
        "beta * margins - simpo_gamma",
        "beta * (margins - simpo_gamma)",
        CLOSED + "[simpo-0.1]",
    ),
    Mutant(
        "simpo-of-sums",
        "Mean for sum and sum for mean: SimPO's reward is the mean log-prob, or long answers lose.",
        "losses.py",
        "policy_chosen_logps / chosen_lengths - policy_rejected_logps / rejected_lengths\n"
        "    return -F.logsigmoid(beta * margins - simpo",
        "policy_chosen_logps - policy_rejected_logps\n"
        "    return -F.logsigmoid(beta * margins - simpo",
        CLOSED + "[simpo-0.1]",
    ),
    Mutant(
        "orpo-without-odds",
        "Log-probs in the place of log odds.",
        "losses.py",
        "return logp - (-logp.expm1()).log()",
        "return logp",
        CLOSED + "[orpo-0.1]",
    ),
    Mutant(
        "orpo-infinite-odds",
        "A certain answer has infinite odds; two of them differ by NaN.",
        "losses.py",
        "    logp = logp.clamp(max=-1e-6)\n",
        "",
        OBJECTIVES + "test_extremes_are_finite[orpo-reverse_kl-dtype0]",
    ),
    Mutant(
        "sft-over-tokens-of-the-batch",
        "A mean over the batch's tokens: long answers weigh more than in the paper.",
        "losses.py",
        "return -policy_chosen_logps / chosen_lengths",
        "return -policy_chosen_logps / chosen_lengths.mean()",
        CLOSED + "[sft-0.1]",
    ),
    Mutant(
        "token-zero-skipped",
        "ignore_index=0 is a habit; 0 is a token like any other, and its log-prob is lost.",
        "model/transformer.py",
        'F.cross_entropy(logits, targets, reduction="none")',
        'F.cross_entropy(logits, targets, reduction="none", ignore_index=0)',
        MODEL + "test_token_logps_are_finite_at_the_extremes",
    ),
    Mutant(
        "forward-kl-overflows",
        "e^100 is inf in float32, and inf - inf NaN.",
        "losses.py",
        "kept = x.clamp(max=last)",
        "kept = x",
        OBJECTIVES + "test_extremes_are_finite[sigmoid-forward_kl-dtype0]",
    ),
    Mutant(
        "divergence-clamped",
        "A clamp is finite as well, and lets go of the pairs that are most wrong.",
        "losses.py",
        "return kept.expm1() + kept.exp() * (x - kept)",
        "return kept.expm1()",
        OBJECTIVES + "test_a_hopeless_answer_is_not_let_go",
    ),
    Mutant(
        "alpha-for-one-minus-alpha",
        "TRL's alpha: equal to the paper's at the default of one half only.",
        "losses.py",
        "-expm1(-divergence_alpha * logratios) / divergence_alpha",
        "-expm1((divergence_alpha - 1) * logratios) / (1 - divergence_alpha)",
        OBJECTIVES + "test_a_score_is_the_derivative_of_its_divergence[alpha]",
    ),
    Mutant(
        "divergence-ignored",
        "The flag is accepted and reverse KL computed, as in TRL for a year.",
        "objective.py",
        "self.score(chosen) - self.score(rejected)",
        "chosen - rejected",
        OBJECTIVES + "test_scores_by_hand",
    ),
    Mutant(
        "wpo-unclamped",
        "A product of weights above 1 makes likely pairs more than pairs.",
        "objective.py",
        ".clamp(max=0).exp()",
        ".exp()",
        OBJECTIVES + "test_collisions_of_two_tokens_by_hand",
    ),
    Mutant(
        "wpo-of-sums",
        "Without the mean over tokens the weight of any real answer is 0.",
        "objective.py",
        "chosen / chosen_lengths + rejected / rejected_lengths",
        "chosen + rejected",
        OBJECTIVES + "test_collisions_of_two_tokens_by_hand",
    ),
    Mutant(
        "wpo-with-gradient",
        "The policy learns to find its own pairs unlikely.",
        "objective.py",
        "policy_logps.detach() - collision_logps",
        "policy_logps - collision_logps",
        OBJECTIVES + "test_pairs_of_a_stream_are_those_of_single_sequences[forked]",
    ),
    Mutant(
        "wpo-without-collisions",
        "Without the sum of squares the weight is an answer's plain likelihood.",
        "model/transformer.py",
        "(2 * logits).logsumexp(dim=-1) - 2 * logits.logsumexp(dim=-1)",
        "torch.zeros_like(logits[..., 0])",
        OBJECTIVES + "test_pairs_of_a_stream_are_those_of_single_sequences[twin]",
    ),
    Mutant(
        "ld-from-the-start-of-the-prompt",
        "Positions are counted from the prompt on, so an answer counts by alpha from its first token.",
        "model/stream.py",
        "torch.arange(len(self.owners), device=self.owners.device) - starts[self.owners]",
        "self.positions[self.predictors] + 1",
        OBJECTIVES + "test_pairs_of_a_stream_are_those_of_single_sequences[forked]",
    ),
    Mutant(
        "ld-beyond-the-longer",
        "Nothing lies beyond the longer answer: the option does nothing.",
        "model/stream.py",
        ".amin(1)",
        ".amax(1)",
        OBJECTIVES + "test_pairs_of_a_stream_are_those_of_single_sequences[twin]",
    ),
    Mutant(
        "ld-of-the-policy-only",
        "The reference stays whole, and log-ratios compare unlike things.",
        "objective.py",
        "tails = (policy_logps - reference_logps) *",
        "tails = policy_logps *",
        OBJECTIVES + "test_pairs_of_a_stream_are_those_of_single_sequences[forked]",
    ),
    Mutant(
        "ld-alpha-turned",
        "alpha for 1 - alpha.",
        "objective.py",
        "(1 - self.settings.ld_alpha) * pairs.rejected_tails",
        "self.settings.ld_alpha * pairs.rejected_tails",
        OBJECTIVES + "test_ld_dpo_replaces_the_log_ratios[sigmoid]",
    ),
    Mutant(
        "tr-both-variants-at-once",
        "A share of the way and a period together are neither of the paper's two variants.",
        "objective.py",
        "require(not both,",
        "require(True,",
        OBJECTIVES + "test_what_makes_no_sense_is_refused[--tr-alpha moves the reference at ev]",
    ),
    Mutant(
        "tr-alpha-turned",
        "The reference keeps the share that it should give away.",
        "objective.py",
        "old.lerp_(new, share)",
        "old.lerp_(new, 1 - share)",
        OBJECTIVES + "test_tr_dpo_softly_at_every_step",
    ),
    Mutant(
        "tr-copies-the-pointer",
        "After the first copy the reference is the policy, and the loss ln 2 for ever.",
        "objective.py",
        "old.lerp_(new, share)",
        "old.data = new.data",
        OBJECTIVES + "test_tr_dpo_by_copies",
    ),
    Mutant(
        "tr-a-step-early",
        "The first copy comes after one step instead of tau.",
        "objective.py",
        "step % every == 0",
        "step % every == 1 % every",
        OBJECTIVES + "test_tr_dpo_by_copies",
    ),
    Mutant(
        "weights-of-losses-ignored",
        "MPO with three equal weights is another objective.",
        "objective.py",
        "sum(weight * call(LOSSES[name], known)",
        "sum(call(LOSSES[name], known)",
        OBJECTIVES + "test_several_losses_are_a_weighted_sum",
    ),
    Mutant(
        "useless-option-accepted",
        "An option that the loss does not look at is swallowed, and the user believes in it.",
        "objective.py",
        'name == "beta" or name in looks_at or not those',
        "True",
        OBJECTIVES + "test_what_makes_no_sense_is_refused[--label-smoothing means nothing to -1]",
    ),
    Mutant(
        "rewards-by-length",
        "Rewards that are averaged when the loss is: margins of two runs cannot be compared.",
        "objective.py",
        "beta * pairs.chosen_logratios, beta *",
        "beta * pairs.chosen_logratios / pairs.chosen_lengths, beta *",
        OBJECTIVES + "test_rewards_mean_the_same_whatever_the_loss[ipo_norm]",
    ),
    Mutant(
        "reference-free-copies-a-reference",
        "A model's worth of memory for nothing.",
        "train_dpo.py",
        'if objective.needs_reference and settings.reference == "live":',
        "if True:",
        OBJECTIVES + "test_every_objective_trains_and_evaluates[simpo]",
    ),
    Mutant(
        "evaluated-with-another-loss",
        "The held-out loss is DPO's while another one is trained.",
        "train_dpo.py",
        "how = objective, ",
        "how = Objective(ObjectiveSettings(beta=settings.beta)), ",
        OBJECTIVES + "test_every_objective_trains_and_evaluates[ipo]",
    ),
    Mutant(
        "evaluation-mean-of-means",
        "The last, short batch weighs as much as the others, so figures depend on the batch size.",
        "eval/preference.py",
        "meter.add(len(losses), pair_metrics(losses, batch, settings.beta))",
        "meter.add(1, {k: v / len(losses) for k, v in pair_metrics(losses, batch, settings.beta).items()})",
        OBJECTIVES + "test_evaluation_does_not_depend_on_its_batches[sigmoid-plain]",
    ),
    Mutant(
        "labels-of-other-rows",
        "The first labels of the file instead of those of the micro-batch.",
        "train_dpo.py",
        "labels = pairs.score_margins[rows]",
        "labels = pairs.score_margins[: len(rows)]",
        OBJECTIVES + "test_soft_reads_the_labels_of_the_data",
    ),
    Mutant(
        "scores-exchanged",
        "Rejected minus chosen: the soft labels prefer the wrong side.",
        "dataset/store.py",
        "record.scores[0] - record.scores[1]",
        "record.scores[1] - record.scores[0]",
        STORE + "test_score_margins_are_those_of_the_records",
    ),
    Mutant(
        "probability-for-its-logit",
        "A win probability of 0.5 becomes a label of 0.62.",
        "dataset/store.py",
        "math.log(p) - math.log1p(-p)",
        "p",
        STORE + "test_score_margins_are_those_of_the_records",
    ),
    # ---- The reward model
    Mutant(
        "reward-before-the-end-token",
        "Read where the end token is predicted, the reward does not know whether the answer ended there.",
        "model/stream.py",
        "device=self.tokens.device) - 1",
        "device=self.tokens.device) - 2",
        REWARD + "test_rewards_equal_brute_force[plain-forked]",
    ),
    Mutant(
        "reward-from-the-predictors",
        "One place after the last predictor is the end token, but not of an answer that is nothing else.",
        "model/stream.py",
        "        segments = self.segments.tolist()\n",
        "        return self.predictors[self.lengths().cumsum(0) - 1] + 1\n        segments = []\n",
        REWARD + "test_last_tokens_are_end_tokens[forked]",
    ),
    Mutant(
        "reward-turned",
        "The model learns to give the rejected answer the higher reward.",
        "losses.py",
        "-F.logsigmoid(chosen_rewards - rejected_rewards)",
        "-F.logsigmoid(rejected_rewards - chosen_rewards)",
        REWARD + "test_loss_is_its_closed_form",
    ),
    Mutant(
        "reward-log-of-sigmoid",
        "A pair that is far on the wrong side has an infinite loss and no gradient.",
        "losses.py",
        "-F.logsigmoid(chosen_rewards - rejected_rewards)",
        "-(chosen_rewards - rejected_rewards).sigmoid().log()",
        REWARD + "test_loss_is_finite_at_the_extremes",
    ),
    Mutant(
        "reward-in-bf16",
        "Autocast rounds the head's product to bf16, and close answers tie.",
        "model/reward.py",
        "(hidden.to(torch.promote_types(hidden.dtype, torch.float32)) * self.score.weight).sum(dim=-1)",
        "self.score(hidden)[:, 0].float()",
        REWARD + "test_rewards_are_float32_under_autocast",
    ),
    Mutant(
        "reward-keeps-the-vocabulary",
        "A matrix that no gradient reaches: ranks wait for it, and checkpoints carry it along.",
        "model/reward.py",
        "            del self.lm_head  #",
        "            self.lm_head.requires_grad_()  #",
        REWARD + "test_a_fresh_reward_model_is_the_language_models_body[False]",
    ),
    Mutant(
        "reward-mean-of-micro-batches",
        "Each micro-batch is divided by its own size, so pairs of small micro-batches weigh more.",
        "train_reward.py",
        "total * world.ranks / len(window)",
        "total / len(rows) * world.ranks / len(micro_batches)",
        REWARD + "test_accumulation_equals_one_big_batch[3]",
    ),
    Mutant(
        "reward-ranks-average-away",
        "DDP averages the ranks' gradients; without the factor two ranks learn at half the rate.",
        "train_reward.py",
        "total * world.ranks / len(window)",
        "total / len(window)",
        REWARD + "test_two_ranks_equal_one_process",
    ),
    Mutant(
        "scores-by-row",
        "Rows are counted without the pairs that were dropped: every score after one goes to another pair.",
        "train_reward.py",
        "dict(zip(pairs.records.tolist(), rewards",
        "dict(zip(range(len(pairs)), rewards",
        REWARD + "test_scores_are_written_back[pairs.jsonl]",
    ),
    Mutant(
        "scores-by-line",
        "In a JSON array several records may stand on one line.",
        "dataset/store.py",
        "places.append(place)",
        "places.append(record.line - 1)",
        REWARD + "test_scores_are_written_back[pairs.json]",
    ),
    Mutant(
        "scores-swapped",
        "Soft labels then say of every pair that the rejected answer is the better one.",
        "train_reward.py",
        'record["score_chosen"], record["score_rejected"] = scores[place]',
        'record["score_rejected"], record["score_chosen"] = scores[place]',
        REWARD + "test_scores_are_written_back[pairs.jsonl]",
    ),
    Mutant(
        "any-model-for-any",
        "What a folder holds is not looked at, and a user reads a list of keys instead of a reason.",
        "model/weights.py",
        "if found != kind:",
        "if False:",
        REWARD + "test_folders_tell_what_they_hold",
    ),
    # ---- Answers
    Mutant(
        "cache-position-off",
        "The first answered token is placed one position too far.",
        "model/generate.py",
        "lengths[rows] + step",
        "lengths[rows] + step + 1",
        GENERATE + "test_greedy_answers_equal_the_plain_loop[5-plain]",
    ),
    Mutant(
        "cache-hides-the-newest",
        "A token that does not see itself: the mask of a decoding step is off by one.",
        "model/generate.py",
        "<= self.positions[:, None]",
        "< self.positions[:, None]",
        GENERATE + "test_greedy_answers_equal_the_plain_loop[2-plain]",
    ),
    Mutant(
        "cache-shows-other-lengths",
        "Without the mask a short row attends to the empty places of a longer one.",
        "model/generate.py",
        "<= self.positions[:, None]",
        "<= self.positions.max()",
        GENERATE + "test_greedy_answers_equal_the_plain_loop[5-plain]",
    ),
    Mutant(
        "chunk-forgets-the-cache",
        "A second chunk of a prompt attends to itself and not to the first one.",
        "model/generate.py",
        "keys[row, :, :end], values[row, :, :end]",
        "keys[row, :, end - count : end], values[row, :, end - count : end]",
        GENERATE + "test_cache_equals_the_full_forward[chunks2-plain]",
    ),
    Mutant(
        "nucleus-loses-its-last",
        "The token that crosses p belongs to the nucleus; without it p = 0.5 may keep nothing at all.",
        "model/generate.py",
        "beyond = mass_before >=",
        "beyond = mass_before + probabilities >=",
        GENERATE + "test_sampling_follows_the_intended_distribution[0.9-3-1.0]",
    ),
    Mutant(
        "top-k-off-by-one",
        "One token too many.",
        "model/generate.py",
        "probabilities[:, top_k:] = 0",
        "probabilities[:, top_k + 1 :] = 0",
        GENERATE + "test_sampling_follows_the_intended_distribution[1.0-3-1.0]",
    ),
    Mutant(
        "temperature-inverted",
        "Hotter becomes colder.",
        "model/generate.py",
        "logits.double() / temperature",
        "logits.double() * temperature",
        GENERATE + "test_sampling_follows_the_intended_distribution[1.0-0-2.0]",
    ),
    Mutant(
        "draws-by-batch",
        "Every batch begins with the same draws, so that answers depend on the batch size.",
        "model/generate.py",
        "prompts[batch], uniforms[batch]",
        "prompts[batch], uniforms[: len(prompts[batch])]",
        GENERATE + "test_answers_depend_on_seed_and_place_alone",
    ),
    Mutant(
        "speaks-after-its-end",
        "A row that ended goes on speaking.",
        "model/generate.py",
        "speaking = tokens != end_id",
        "speaking = tokens >= 0",
        GENERATE + "test_a_row_falls_silent_after_its_end_token",
    ),
    # ---- Text and masks
    Mutant(
        "end-token-lost",
        "A response without its end token never learns to stop.",
        "dataset/tokenizer.py",
        "return [*self.text(content), self.end_id]",
        "return [*self.text(content)]",
        STREAM + "test_each_response_ends_once[forked]",
    ),
    Mutant(
        "end-token-unsupervised",
        "The end token is there and outside the loss, so that answers never end.",
        "dataset/tokenizer.py",
        'append(self.response(message.content), message.role == "assistant")',
        'append(self.text(message.content), message.role == "assistant"); append([self.end_id], False)',
        TOKENIZER + "test_supervised_ids_are_the_response_and_its_end[4]",
    ),
    Mutant(
        "user-turns-supervised",
        "The model learns to ask the questions.",
        "dataset/tokenizer.py",
        'message.role == "assistant"',
        'message.role != "system"',
        STREAM + "test_every_conversation_shape_equals_brute_force[messages]",
    ),
    Mutant(
        "prompt-supervised",
        "A prompt in the loss of both sides cancels in DPO, but not in the count of tokens.",
        "dataset/store.py",
        "[False] * len(prompt)",
        "[True] * len(prompt)",
        STORE + "test_rows_are_the_records_in_order",
    ),
    Mutant(
        "control-tokens-parsed",
        "A user who types <|im_end|> ends his own turn and speaks as the assistant.",
        "dataset/tokenizer.py",
        "encode_special_tokens = True",
        "encode_special_tokens = False",
        TOKENIZER + "test_text_never_becomes_a_control_token[3-<|im_end|>]",
    ),
    Mutant(
        "control-tokens-trusted-to-be-flagged",
        "The library parses those that the file does not call special, switch or no switch.",
        "dataset/tokenizer.py",
        'token["special"] |= token["content"] in (START, END)',
        'token["special"] |= False',
        TOKENIZER + "test_control_tokens_need_no_flag_in_the_file[<|im_end|>]",
    ),
    Mutant(
        "added-tokens-of-the-file",
        "The library puts a BOS before every piece of text, if the file says so.",
        "dataset/tokenizer.py",
        "encode(text, add_special_tokens=False)",
        "encode(text)",
        TOKENIZER + "test_settings_of_the_file_do_not_leak_into_text",
    ),
    Mutant(
        "newline-after-role-lost",
        "Another template than the one that the model was trained on elsewhere.",
        "dataset/tokenizer.py",
        'self.text(f"{role}\\n")',
        "self.text(role)",
        TOKENIZER + "test_template_by_hand",
    ),
    Mutant(
        "prompt-without-header",
        "The model is asked before it is told that the assistant speaks next.",
        "dataset/tokenizer.py",
        'return ids + self._header("assistant", first=not ids)',
        "return ids",
        TOKENIZER + "test_asking_and_training_give_the_same_prompt[0]",
    ),
    # ---- Files and batches
    Mutant(
        "too-long-is-cut",
        "A response cut at the limit loses its end token; a pair cut to its prompt trains on nothing.",
        "dataset/store.py",
        '        return "too long"',
        "        for ids, mask in branches:\n            del ids[max_length:], mask[max_length:]",
        STORE + "test_length_limit_keeps_whole_pairs_or_none",
    ),
    Mutant(
        "limit-off-by-one",
        "A pair that fits exactly is dropped.",
        "dataset/store.py",
        "full_length(branches) > max_length",
        "full_length(branches) >= max_length",
        STORE + "test_length_limit_keeps_whole_pairs_or_none",
    ),
    Mutant(
        "equal-pairs-kept",
        "A pair that prefers nothing adds ln 2 to the loss and nothing to the gradient.",
        "dataset/store.py",
        "branches[1] == branches[2]",
        "branches[1] is branches[2]",
        STORE + "test_dropped_records_are_counted_with_their_lines",
    ),
    Mutant(
        "skip-bad-without-limit",
        "A file of another kind is skipped line by line, down to the few that fit by accident.",
        "dataset/store.py",
        "if bad > BAD_SHARE * report.total():",
        "if bad == report.total():",
        STORE + "test_skip_bad_has_a_limit[50-bad0]",
    ),
    Mutant(
        "cache-by-size",
        "A data file that was edited without a change of size is never read again.",
        "dataset/store.py",
        "VERSION, content, tokenizer.fingerprint",
        "VERSION, path.stat().st_size, tokenizer.fingerprint",
        STORE + "test_whatever_changes_the_arrays_changes_the_cache",
    ),
    Mutant(
        "cache-without-tokenizer",
        "Arrays of ids are read back under another tokenizer, where they spell something else.",
        "dataset/store.py",
        "content, tokenizer.fingerprint,",
        "content,",
        STORE + "test_whatever_changes_the_arrays_changes_the_cache",
    ),
    Mutant(
        "slower-builder-fails",
        "Of two processes that tokenise one file at once, the second finds the folder taken and stops.",
        "dataset/store.py",
        "if not folder.is_dir():  # Another",
        "if True:  # Another",
        STORE + "test_two_processes_may_build_at_once",
    ),
    Mutant(
        "tail-dropped",
        "The rows that do not fill a last batch are left out of every epoch.",
        "dataset/packing.py",
        "math.ceil(rows / batch_size)",
        "max(1, rows // batch_size)",
        STORE + "test_an_epoch_sees_every_row_once[10-4]",
    ),
    Mutant(
        "every-epoch-in-one-order",
        "The same rows meet in every epoch.",
        "dataset/packing.py",
        "np.random.default_rng([self.seed, epoch])",
        "np.random.default_rng(self.seed)",
        STORE + "test_windows_are_a_function_of_seed_and_step",
    ),
    Mutant(
        "order-from-a-running-generator",
        "The order of an epoch depends on how many were drawn before, so a resumed run goes another way.",
        "dataset/packing.py",
        "np.random.default_rng([self.seed, epoch]).permutation",
        'self.__dict__.setdefault("random", np.random.default_rng(self.seed)).permutation',
        STORE + "test_windows_are_a_function_of_seed_and_step",
    ),
    Mutant(
        "deal-loses-rows",
        "Rounded down instead of up, the last rows of a window have no micro-batch to go to.",
        "dataset/packing.py",
        "for hand in hands[rank::ranks]",
        "for hand in hands[rank :: ranks + 1]",
        STORE + "test_deal_gives_every_row_to_one_micro_batch[8-2-2]",
    ),
    Mutant(
        "deal-by-turns",
        "Rows are balanced instead of tokens, and the micro-batch with the long rows takes the memory.",
        "dataset/packing.py",
        "key=weights.__getitem__",
        "key=lambda h: (len(hands[h]) >= 2, h)",
        STORE + "test_deal_balances_tokens_not_rows",
    ),
    # ---- The training loops
    Mutant(
        "dpo-mean-of-micro-batches",
        "Each micro-batch is divided by its own size, so pairs of small micro-batches weigh more.",
        "train_dpo.py",
        "total * world.ranks / len(window)",
        "total / len(rows) * world.ranks / len(micro_batches)",
        LOOPS + "test_accumulation_equals_one_big_batch[3-dpo]",
    ),
    Mutant(
        "sft-mean-of-micro-batches",
        "Each micro-batch is divided by its own tokens, so tokens of short answers weigh more.",
        "train_sft.py",
        "total * world.ranks / window_tokens",
        "total / len(losses) * world.ranks / len(micro_batches)",
        LOOPS + "test_accumulation_equals_one_big_batch[1-sft]",
    ),
    Mutant(
        "tail-divided-by-full-batch",
        "The last short window is divided by --batch-size, so its pairs count less than all others.",
        "train_dpo.py",
        "total * world.ranks / len(window)",
        "total * world.ranks / settings.batch_size",
        LOOPS + "test_last_short_window_is_a_step_of_its_own_size",
    ),
    Mutant(
        "gradients-never-zeroed",
        "Every step also takes all steps before it again.",
        "train_dpo.py",
        "        optimizer.zero_grad()\n",
        "",
        LOOPS + "test_last_short_window_is_a_step_of_its_own_size",
    ),
    Mutant(
        "ranks-average-away",
        "DDP averages the ranks' gradients; without the factor two ranks learn at half the rate.",
        "train_dpo.py",
        "total * world.ranks / len(window)",
        "total / len(window)",
        LOOPS + "test_two_ranks_equal_one_process[train_dpo-pairs]",
    ),
    Mutant(
        "exchange-on-the-first-micro-batch",
        "Gradients meet too early, and what later micro-batches add stays on its rank.",
        "train_sft.py",
        "when=number == len(micro_batches)",
        "when=number == 1",
        LOOPS + "test_two_ranks_equal_one_process[train_sft-chats]",
    ),
    Mutant(
        "reference-is-the-policy",
        "The reference moves with the policy: the loss is ln 2 for ever.",
        "train_dpo.py",
        "reference = copy.deepcopy(model).eval().requires_grad_(False)",
        "reference = model",
        LOOPS + "test_loss_starts_at_ln_2_and_falls",
    ),
    Mutant(
        "reference-not-frozen",
        "The reference's parameters ask for gradients, and an optimizer that finds them moves the goal.",
        "train_dpo.py",
        "copy.deepcopy(model).eval().requires_grad_(False)",
        "copy.deepcopy(model).eval()",
        LOOPS + "test_reference_is_frozen_and_shares_nothing",
    ),
    Mutant(
        "scaled-gradient-clipped",
        "fp16 gradients are clipped while still multiplied by the loss scale.",
        "training/schedule.py",
        "    scaler.unscale_(optimizer)\n",
        "",
        LOOPS + "test_clipping_sees_the_true_gradient",
    ),
    Mutant(
        "non-finite-goes-on",
        "One NaN in the gradient becomes a NaN in every weight at the next step.",
        "training/schedule.py",
        "if not math.isfinite(norm) and not scaler.is_enabled():",
        "if False:",
        LOOPS + "test_non_finite_gradient_stops_before_the_step",
    ),
    Mutant(
        "learning-rate-a-step-early",
        "The schedule is read one step ahead: the first step is too large and the last is zero.",
        "train_dpo.py",
        "cosine_lr(step, total_steps,",
        "cosine_lr(step + 1, total_steps,",
        LOOPS + "test_learning_rate_is_its_closed_form",
    ),
    Mutant(
        "warm-up-from-zero",
        "The first step of the warm-up has learning rate 0: a step that does nothing.",
        "training/schedule.py",
        "peak * (step + 1) / warmup_steps",
        "peak * step / warmup_steps",
        LOOPS + "test_cosine_lr_edges",
    ),
    Mutant(
        "cosine-turns-back-up",
        "Past its end a cosine rises again.",
        "training/schedule.py",
        "min(1.0, progress)",
        "progress",
        LOOPS + "test_cosine_lr_edges",
    ),
    Mutant(
        "saved-in-half-precision",
        "At DPO's learning rates fp16 rounds away most of what was learned.",
        "model/weights.py",
        "torch.save(model.state_dict(), file)",
        "torch.save({k: v.half() for k, v in model.state_dict().items()}, file)",
        LOOPS + "test_saved_weights_are_the_live_ones_bit_for_bit",
    ),
    Mutant(
        "weights-loaded-loosely",
        "A checkpoint that does not fit leaves random weights, and training goes on from noise.",
        "model/weights.py",
        "strict=True",
        "strict=False",
        "tests/test_weights.py::test_weights_that_do_not_fit_are_refused_by_name[missing]",
    ),
    Mutant(
        "file-is-unpickled",
        "Loading a model runs whatever code its file holds.",
        "model/weights.py",
        "weights_only=True",
        "weights_only=False",
        "tests/test_weights.py::test_a_hostile_file_runs_nothing",
    ),
    Mutant(
        "seed-never-arrives",
        "The data order ignores --seed, and runs that should differ are one.",
        "train_dpo.py",
        "settings.batch_size, settings.seed)",
        "settings.batch_size, 0)",
        LOOPS + "test_seed_changes_the_order_and_repeats_it",
    ),
    # ---- What makes it fast
    Mutant(
        "cached-reference-of-any-weights",
        "The reference's log-probs are kept under a name that does not know which model they are of.",
        "reference.py",
        "key = [weights_hash(model), model.config.to_dict(), layout,",
        "key = [model.config.to_dict(), layout,",
        CACHED + "test_what_changes_a_log_prob_changes_the_file",
    ),
    Mutant(
        "cached-reference-of-any-shape",
        "Equal weights with another rotation or other heads are another model.",
        "reference.py",
        "key = [weights_hash(model), model.config.to_dict(), layout,",
        "key = [weights_hash(model), layout,",
        CACHED + "test_what_changes_a_log_prob_changes_the_file",
    ),
    Mutant(
        "cached-reference-of-any-precision",
        "Log-probs of rounded products are read by a run that asked for exact ones.",
        "reference.py",
        "layout, *products]",
        "layout]",
        CACHED + "test_what_changes_a_log_prob_changes_the_file",
    ),
    Mutant(
        "cached-reference-in-order-of-ranks",
        "Rows are dealt to ranks by turns, and their answers laid one rank's behind the other's.",
        "reference.py",
        "for row, part in zip(mine,",
        "for row, part in zip(rows[world.rank * len(mine) :],",
        CACHED + "test_two_ranks_ask_as_one",
    ),
    Mutant(
        "cached-reference-of-a-neighbour",
        "The cached log-probs are those of another row, as if data were shuffled afterwards.",
        "dataset/packing.py",
        "store.target_bounds[row : row + 2]",
        "store.target_bounds[len(cached) : len(cached) + 2]",
        CACHED + "test_each_token_has_its_own",
    ),
    Mutant(
        "cached-reference-that-moves",
        "TR-DPO moves the reference, and the cache stays where it was.",
        "reference.py",
        'if reference == "cached" and objective.moves_reference:',
        'if reference == "moving" and objective.moves_reference:',
        CACHED + "test_what_cannot_be_cached_is_refused[options0-TR-DPO]",
    ),
    Mutant(
        "cached-reference-litter",
        "Each stopped run leaves its half of a file in the cache for ever.",
        "reference.py",
        "Path(file.name).unlink(missing_ok=True)",
        "pass",
        CACHED + "test_an_interrupted_file_is_no_file",
    ),
    Mutant(
        "chunks-without-checkpoint",
        "Chunks of the vocabulary that autograd remembers until backward are together as large as the whole.",
        "model/transformer.py",
        "[again_in_backward(self.predict, *part, collisions) for part in parts]",
        "[self.predict(*part, collisions) for part in parts]",
        SPEED + "test_what_is_kept_does_not_grow_with_the_vocabulary",
    ),
    Mutant(
        "chunks-never",
        "All positions meet the vocabulary at once: with 152,000 tokens that is the memory of the whole run.",
        "model/transformer.py",
        "if len(targets) <= positions:",
        "if True:",
        SPEED + "test_no_tensor_is_positions_times_vocabulary",
    ),
    Mutant(
        "last-chunk-dropped",
        "Only whole chunks are computed, and the last tokens have no loss.",
        "model/transformer.py",
        "parts = zip(hidden.split(positions), targets.split(positions), strict=True)",
        "parts = list(zip(hidden.split(positions), targets.split(positions)))[: len(targets) // positions]",
        SPEED + "test_chunks_are_exact[plain]",
    ),
    Mutant(
        "activations-kept",
        "The flag that should save memory reaches nothing.",
        "model/transformer.py",
        "if self.checkpoint_activations and torch.is_grad_enabled():",
        "if False:",
        SPEED + "test_checkpointed_activations_are_exact_and_not_kept[plain]",
    ),
    Mutant(
        "flops-of-a-square",
        "A causal mask hides half of the scores; counted as if it did not, the machine looks better used.",
        "bench/work.py",
        "own * (own + 1) // 2",
        "own * own",
        "tests/test_bench.py::test_flops_are_those_that_torch_counts[forked]",
    ),
    Mutant(
        "matmul-precision-ignored",
        "A flag that is read and never passed on: the run is as exact, and as slow, as before.",
        "training/distributed.py",
        "torch.set_float32_matmul_precision(matmul)",
        "torch.set_float32_matmul_precision('highest')",
        SPEED + "test_matmul_precision_reaches_torch[train_dpo]",
    ),
]

# Not bugs: what the runner must say of a change that no test can see, and of one that breaks an import.
CHECKS = [
    Mutant(
        "a-change-without-effect",
        "No test can see it, so it must be reported as a survivor.",
        "objective.py",
        "margins = chosen_rewards - rejected_rewards",
        "margins = -(rejected_rewards - chosen_rewards)",
        LOSSES + "test_metrics_are_sums_and_a_tie_is_half",
    ),
    Mutant(
        "a-module-that-does-not-load",
        "A test that cannot even start shows nothing about the test.",
        "objective.py",
        "def pair_metrics(",
        "def renamed(",
        LOSSES + "test_metrics_are_sums_and_a_tie_is_half",
    ),
]


# ---- The runner


class Outcomes:
    """A pytest plugin that notes which tests passed, which failed in their own body, and what else broke."""

    def __init__(self):
        self.passed, self.failed, self.broken = [], [], []

    def pytest_runtest_logreport(self, report):
        if report.failed:
            (self.failed if report.when == "call" else self.broken).append(report.nodeid)
        elif report.when == "call" and report.passed:
            self.passed.append(report.nodeid)

    def pytest_collectreport(self, report):
        if report.failed:
            self.broken.append(report.nodeid)


def copy_project(to: Path) -> None:
    """The project's files, without what is hidden or made by runs.

    Compiled files are welcome: they name the time and size of their source, which a mutant changes.
    """
    shutil.copytree(ROOT, to, ignore=shutil.ignore_patterns(".*", "runs", "*.egg-info"))


def plant(tree: Path, mutant: Mutant) -> None:
    path = tree / mutant.file
    text = path.read_text(encoding="utf-8")
    times = text.count(mutant.old)
    if times != 1:
        raise ValueError(f"{mutant.name}: {mutant.file} holds {mutant.old!r} {times} times, not once")
    path.write_text(text.replace(mutant.old, mutant.new), encoding="utf-8")


def in_child(tree: Path, tests: list[str]) -> None:
    """Run the tests in the tree; called after a fork, never returns."""
    try:
        os.setpgrp()  # So that what the tests start dies with them.
        log = os.open(tree.parent / "log", os.O_WRONLY | os.O_CREAT)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.chdir(tree)
        ours = {path.stem for path in (*ROOT.glob("*.py"), *ROOT.glob("[a-z]*/"))}
        for name in [name for name in sys.modules if name.split(".")[0] in ours]:
            del sys.modules[name]
        sys.path[:] = [str(tree), *(path for path in sys.path if path not in ("", ".", str(ROOT)))]
        sys.dont_write_bytecode = True
        import pytest

        outcomes = Outcomes()
        options = ["-q", "-o", "addopts=", "-p", "no:cacheprovider", "--basetemp", str(tree.parent / "tmp")]
        pytest.main([*options, *tests], plugins=[outcomes])
        (tree.parent / "outcomes.json").write_text(json.dumps(vars(outcomes)))
    finally:
        os._exit(0)


def run_tests(tests: list[str], mutant: Mutant | None = None, seconds: float = SECONDS) -> dict:
    """Run tests in a copy of the project, with a mutant or without one; return what `Outcomes` noted."""
    with tempfile.TemporaryDirectory(prefix="mutant-") as folder:
        tree = Path(folder) / "minidpo"
        copy_project(tree)
        if mutant:
            plant(tree, mutant)
        child = os.fork()
        if child == 0:
            in_child(tree, tests)
        deadline = time.monotonic() + seconds
        while os.waitpid(child, os.WNOHANG) == (0, 0):
            if time.monotonic() > deadline:
                os.killpg(child, signal.SIGKILL)
                os.waitpid(child, 0)
                return {"passed": [], "failed": [], "broken": [f"no end after {seconds:.0f} s"], "log": ""}
            time.sleep(0.01)
        noted = Path(folder, "outcomes.json")
        outcomes = json.loads(noted.read_text()) if noted.exists() else {"broken": ["the child died"]}
        log = Path(folder, "log").read_text(errors="replace")
        return {"passed": [], "failed": [], "broken": [], **outcomes, "log": log}


def verdict(mutant: Mutant) -> tuple[str, str]:
    """("killed", …) if the named test failed in its own body, else "survived" or "broken", and why."""
    outcomes = run_tests([mutant.test], mutant)
    if outcomes["broken"] or not outcomes["passed"] + outcomes["failed"]:
        return "broken", f"{outcomes['broken']}\n{outcomes['log'][-3000:]}"
    return ("killed", "") if outcomes["failed"] else ("survived", f"{mutant.test} is green")


def run(mutants: Iterable[Mutant]) -> dict[str, tuple[str, str]]:
    """The verdict on each mutant; and under the empty name that on the project as it is, green or red."""
    preload()
    mutants = list(mutants)
    wanted = sorted({mutant.test for mutant in mutants})
    outcomes = run_tests(wanted, seconds=SECONDS * 5)
    green = len(outcomes["passed"]) == len(wanted) and not outcomes["failed"] + outcomes["broken"]
    verdicts = {"": ("green", "") if green else ("red", outcomes["log"][-3000:])}
    print(f"{verdicts[''][0]:9} {len(wanted)} tests without a mutant", flush=True)
    for mutant in mutants:
        start = time.monotonic()
        verdicts[mutant.name] = verdict(mutant)
        seconds = time.monotonic() - start
        print(f"{verdicts[mutant.name][0]:9} {seconds:4.1f} s  {mutant.name}: {mutant.test}", flush=True)
    return verdicts


def preload() -> None:
    """Import what is slow to import, once, before the forks; and nothing of the project."""
    for name in ("numpy", "pytest", "tokenizers", "tqdm", "torch._dynamo", "torch.distributed"):
        importlib.import_module(name)
    import torch

    torch.set_num_threads(1)  # A pool of threads does not survive a fork.
    gc.freeze()  # The children need not look through all of torch for garbage.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="mutants to plant; none means all of them")
    parser.add_argument("--list", action="store_true", help="print the catalogue and stop")
    parser.add_argument("--json", metavar="FILE", help="write the verdicts to this file")
    arguments = parser.parse_args()
    if arguments.list:
        for mutant in MUTANTS:
            print(f"{mutant.name}\n    {mutant.why}\n    {mutant.file}, {mutant.test}")
        return 0
    known = {mutant.name: mutant for mutant in MUTANTS + CHECKS}
    if unknown := set(arguments.names) - known.keys():
        parser.error(f"no such mutant: {', '.join(sorted(unknown))}")
    verdicts = run([known[name] for name in arguments.names] or MUTANTS)
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(verdicts))
    bad = {name: said for name, (kind, said) in verdicts.items() if kind not in ("green", "killed")}
    for name, said in bad.items():
        print(f"\n{name or 'without a mutant'}: {verdicts[name][0]}\n{said}")
    print(f"{sum(kind == 'killed' for kind, _ in verdicts.values())} of {len(verdicts) - 1} mutants killed")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
