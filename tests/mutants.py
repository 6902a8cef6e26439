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
LOOPS, LORA = "tests/test_loops.py::", "tests/test_lora.py::"
HUGGING_FACE, TEMPLATE = "tests/test_huggingface.py::", "tests/test_template.py::"
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
        ".triu(keys - queries + 1)",
        ".triu(keys - queries + 2)",
        STREAM + "test_a_changed_future_leaves_the_past_bitwise_equal",
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
        "q = q.reshape(groups, shared * queries, size)",
        "q = q.unflatten(0, (-1, groups)).transpose(0, 1).reshape(groups, shared * queries, size)",
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
    # ---- The objective
    Mutant(
        "beta-forgotten",
        "The loss starts at ln 2 all the same, and the policy runs away from its reference.",
        "losses.py",
        "-F.logsigmoid(beta * (chosen_logratios - rejected_logratios))",
        "-F.logsigmoid(chosen_logratios - rejected_logratios)",
        LOSSES + "test_gradient_identity_at_the_start",
    ),
    Mutant(
        "reference-sign-flipped",
        "The reference is added instead of subtracted.",
        "losses.py",
        "policy_rejected_logps - reference_rejected_logps",
        "policy_rejected_logps + reference_rejected_logps",
        LOSSES + "test_loss_is_exactly_ln_2_before_the_first_step[forked-fp32]",
    ),
    Mutant(
        "reference-omitted",
        "Without the reference on one side the loss pushes the policy towards short answers.",
        "losses.py",
        "policy_chosen_logps - reference_chosen_logps",
        "policy_chosen_logps",
        LOSSES + "test_loss_by_hand",
    ),
    Mutant(
        "margin-turned",
        "Rejected minus chosen: the loss starts at ln 2 and falls, the model gets worse.",
        "losses.py",
        "beta * (chosen_logratios - rejected_logratios)",
        "beta * (rejected_logratios - chosen_logratios)",
        LOSSES + "test_gradient_is_minus_beta_sigmoid",
    ),
    Mutant(
        "log-of-sigmoid",
        "log(sigmoid(z)) is -inf where sigmoid(z) rounds to 0, and its gradient NaN.",
        "losses.py",
        "-F.logsigmoid(beta * (chosen_logratios - rejected_logratios))",
        "-(beta * (chosen_logratios - rejected_logratios)).sigmoid().log()",
        LOSSES + "test_extremes_are_finite[dtype0]",
    ),
    Mutant(
        "rewards-with-gradient",
        "Rewards that keep their graph hold the memory of every micro-batch until they are logged.",
        "losses.py",
        "beta * chosen_logratios.detach()",
        "beta * chosen_logratios",
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
        'Message("assistant", content)), self.end_id]',
        'Message("assistant", content))]',
        STREAM + "test_each_response_ends_once[forked]",
    ),
    Mutant(
        "end-token-unsupervised",
        "The end token is there and outside the loss, so that answers never end.",
        "dataset/tokenizer.py",
        "append(self.response(message.content), True)",
        "append(self.response(message.content)[:-1], True); append([self.end_id], False)",
        TOKENIZER + "test_supervised_ids_are_the_response_and_its_end[4]",
    ),
    Mutant(
        "user-turns-supervised",
        "The model learns to ask the questions.",
        "dataset/tokenizer.py",
        'if message.role == "assistant":',
        'if message.role != "system":',
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
        'token["special"] |= of_template',
        'token["special"] |= False and of_template',
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
        "dataset/template.py",
        'system_to_user="<|im_end|>\\n<|im_start|>user\\n",',
        'system_to_user="<|im_end|>\\n<|im_start|>user",',
        TOKENIZER + "test_template_by_hand",
    ),
    Mutant(
        "prompt-without-header",
        "The model is asked before it is told that the assistant speaks next.",
        "dataset/tokenizer.py",
        "return ids + self._joints[self.template.user_to_answer]",
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
        "losses.sum() * world.ranks / len(window)",
        "losses.mean() * world.ranks / len(micro_batches)",
        LOOPS + "test_accumulation_equals_one_big_batch[3-dpo]",
    ),
    Mutant(
        "sft-mean-of-micro-batches",
        "Each micro-batch is divided by its own tokens, so tokens of short answers weigh more.",
        "train_sft.py",
        "losses.sum() * world.ranks / window_tokens",
        "losses.mean() * world.ranks / len(micro_batches)",
        LOOPS + "test_accumulation_equals_one_big_batch[1-sft]",
    ),
    Mutant(
        "tail-divided-by-full-batch",
        "The last short window is divided by --batch-size, so its pairs count less than all others.",
        "train_dpo.py",
        "losses.sum() * world.ranks / len(window)",
        "losses.sum() * world.ranks / settings.batch_size",
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
        "losses.sum() * world.ranks / len(window)",
        "losses.sum() / len(window)",
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
        "torch.save(merged_weights(model), file)",
        "torch.save({k: v.half() for k, v in merged_weights(model).items()}, file)",
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
    # ---- Hugging Face's folders
    Mutant(
        "rope-scaling-ignored",
        "Llama 3.1 loads without its scaled rotations and is subtly wrong on every text.",
        "model/transformer.py",
        "* scaled(frequencies, scaling)",
        "* frequencies",
        HUGGING_FACE + "test_linear_scaling_is_positions_closer_together",
    ),
    Mutant(
        "rope-scaling-upside-down",
        "The short waves are slowed down instead of the long ones.",
        "model/transformer.py",
        "(kept + (1 - kept) / scaling",
        "(1 - kept + kept / scaling",
        HUGGING_FACE + "test_llama3_scaling_is_the_published_rule",
    ),
    Mutant(
        "unknown-scaling-ignored",
        "A YaRN model loads as if it had none.",
        "model/huggingface.py",
        'if kind not in ("default", *SCALING):',
        "if False:",
        HUGGING_FACE + "test_what_is_not_supported_is_refused_by_name[edit7-rope_scaling of type 'yarn']",
    ),
    Mutant(
        "absent-key-means-ours",
        "Llama does not tie its head unless it says so; our models do.",
        "model/huggingface.py",
        '("LlamaForCausalLM", dict(tie_word_embeddings=False))',
        '("LlamaForCausalLM", dict())',
        HUGGING_FACE + "test_a_folder_is_read_as_what_it_says[llama]",
    ),
    Mutant(
        "window-forgotten",
        "A sliding window that text is longer than must not be dropped in silence.",
        "model/huggingface.py",
        'if family != "mistral":',
        "if True:",
        HUGGING_FACE + "test_a_folder_is_read_as_what_it_says[mistral-window]",
    ),
    Mutant(
        "tied-head-trusted",
        "A file that says tied and holds another head loads as another model.",
        "model/huggingface.py",
        "not torch.equal(head,",
        "head is ours and not torch.equal(head,",
        HUGGING_FACE + "test_stored_rotary_tables_and_a_copy_of_the_head_are_left_out",
    ),
    Mutant(
        "shard-outside-the-folder",
        "An index may name any file of the machine.",
        "model/weights.py",
        "if Path(name).name != name",
        "if False",
        HUGGING_FACE + "test_an_index_names_files_of_its_folder[outside]",
    ),
    Mutant(
        "tokenizer-of-another-model",
        "Ids beyond the embedding end in an assertion of the device, or in another token's row.",
        "model/transformer.py",
        "if tokens > self.vocab_size:",
        "if False:",
        HUGGING_FACE + "test_more_ids_than_embeddings_are_refused[train_dpo]",
    ),
    # ---- Chat templates of folders
    Mutant(
        "default-system-text-lost",
        "Qwen's models were trained with a system text even where nobody wrote one.",
        "dataset/template.py",
        "        before_user=before_user,",
        "        before_user=CHATML.before_user,",
        TEMPLATE + "test_templates_are_measured_as_what_they_are[qwen]",
    ),
    Mutant(
        "template-not-checked",
        "A template that does more than we can write is used all the same.",
        "dataset/template.py",
        "if not (theirs == ours",
        "if not (True or theirs == ours",
        TEMPLATE + "test_what_is_no_row_of_joints_is_refused[source6-is no row of joints]",
    ),
    Mutant(
        "white-space-kept",
        "Llama 3's template strips what people say; the model has never seen it otherwise.",
        "dataset/template.py",
        "message.content.strip() if",
        "message.content if",
        TEMPLATE + "test_a_folder_is_written_in_its_own_format",
    ),
    Mutant(
        "template-not-in-the-key",
        "Data tokenised in one chat format is read back in another.",
        "dataset/tokenizer.py",
        'f"{self.template}\\n{self.json}"',
        "self.json",
        TEMPLATE + "test_the_template_is_part_of_the_fingerprint",
    ),
    # ---- Adapters
    Mutant(
        "adapter-starts-at-random",
        "With a random B the policy is not the reference at step 0, and the loss not ln 2.",
        "model/lora.py",
        "base.weight.new_zeros(base.out_features, rank)",
        "base.weight.new_ones(base.out_features, rank)",
        LORA + "test_first_loss_is_ln_2_exactly[fp32]",
    ),
    Mutant(
        "adapter-not-scaled",
        "Without alpha / rank a larger rank is a larger learning rate, and peft reads another model.",
        "model/lora.py",
        "return y + self.scale * F.linear",
        "return y + F.linear",
        LORA + "test_an_adapter_adds_what_the_paper_says",
    ),
    Mutant(
        "base-not-frozen",
        "Weights that move take the reference along, whose adapters are off.",
        "model/lora.py",
        "model.requires_grad_(False)",
        "model.requires_grad_(True)",
        LORA + "test_training_changes_adapters_only",
    ),
    Mutant(
        "reference-keeps-its-adapters",
        "Policy and reference are one model, and the loss is ln 2 for ever.",
        "model/lora.py",
        "        with adapters_off(self.model):\n            return self.model(stream)",
        "        return self.model(stream)",
        LORA + "test_training_changes_adapters_only",
    ),
    Mutant(
        "adapters-stay-off",
        "After the reference's forward the policy has no adapters either, and no gradient.",
        "model/lora.py",
        "            layer.on = True",
        "            layer.on = False",
        LORA + "test_gradients_reach_every_adapter_and_nothing_else",
    ),
    Mutant(
        "merged-without-scale",
        "What is exported is not what was trained.",
        "model/lora.py",
        "self.weight + self.scale * self.lora_B",
        "self.weight + self.lora_B",
        LORA + "test_merged_equals_unmerged",
    ),
    Mutant(
        "merged-in-place",
        "Each save adds the adapter to the weights once more.",
        "model/lora.py",
        "return self.weight + self.scale * self.lora_B @ self.lora_A",
        "return self.weight.data.add_(self.scale * self.lora_B @ self.lora_A)",
        LORA + "test_merging_leaves_the_model_alone",
    ),
    Mutant(
        "seed-never-arrives",
        "The data order ignores --seed, and runs that should differ are one.",
        "train_dpo.py",
        "settings.batch_size, settings.seed)",
        "settings.batch_size, 0)",
        LOOPS + "test_seed_changes_the_order_and_repeats_it",
    ),
]

# Not bugs: what the runner must say of a change that no test can see, and of one that breaks an import.
CHECKS = [
    Mutant(
        "a-change-without-effect",
        "No test can see it, so it must be reported as a survivor.",
        "losses.py",
        "margins = chosen_rewards - rejected_rewards",
        "margins = -(rejected_rewards - chosen_rewards)",
        LOSSES + "test_metrics_are_sums_and_a_tie_is_half",
    ),
    Mutant(
        "a-module-that-does-not-load",
        "A test that cannot even start shows nothing about the test.",
        "losses.py",
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
