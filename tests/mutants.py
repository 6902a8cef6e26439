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
LOOPS, RESUME = "tests/test_loops.py::", "tests/test_resume.py::"
CHECKPOINT, FAULTS = "tests/test_checkpoint.py::", "tests/test_faults.py::"
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
        "    elif meter.is_finite(grad_norm):\n",
        "    else:\n",
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
    # ---- Resuming and faults
    Mutant(
        "no-fsync",
        "A file is renamed before its bytes are on the disk; a power cut leaves its name and nothing in it.",
        "files.py",
        "            os.fsync(file.fileno())\n",
        "",
        CHECKPOINT + "test_a_crash_at_any_moment_leaves_a_whole_checkpoint[2]",
    ),
    Mutant(
        "folder-not-synced",
        "The new file is safe, its name is not: after a power cut the newest checkpoint is gone.",
        "files.py",
        "        sync(path.parent)\n",
        "",
        CHECKPOINT + "test_a_crash_at_any_moment_leaves_a_whole_checkpoint[2]",
    ),
    Mutant(
        "pruned-before-written",
        "Old checkpoints go first, to save room; a crash then leaves none.",
        "training/checkpoint.py",
        "    path = write_whole(",
        "    for old in checkpoints(folder)[keep - 1 :]:\n        old.unlink()\n    path = write_whole(",
        CHECKPOINT + "test_a_crash_at_any_moment_leaves_a_whole_checkpoint[1]",
    ),
    Mutant(
        "digest-not-checked",
        "torch.load takes a flipped bit for a weight, and so would the run.",
        "training/checkpoint.py",
        "if file_hash(path) != NAME.fullmatch(path.name)[2]:",
        "if False:",
        CHECKPOINT + "test_every_flipped_bit_is_found",
    ),
    Mutant(
        "checkpoint-is-unpickled",
        "A checkpoint from elsewhere runs whatever code it holds.",
        "training/checkpoint.py",
        'map_location="cpu", weights_only=True)',
        'map_location="cpu", weights_only=False)',
        CHECKPOINT + "test_a_hostile_file_runs_nothing",
    ),
    Mutant(
        "damaged-file-counts-as-kept",
        "Pruning by number keeps the damaged file and removes a good one.",
        "training/checkpoint.py",
        '            damaged.rename(damaged.with_suffix(".damaged"))\n',
        "",
        CHECKPOINT + "test_a_damaged_file_falls_back_and_is_named",
    ),
    Mutant(
        "moments-by-place",
        "Moments go to parameters by their place, so a changed order gives them to the wrong ones.",
        "training/checkpoint.py",
        "    if then != now:\n",
        "    if False:\n",
        CHECKPOINT + "test_state_goes_to_where_it_belongs_or_nowhere",
    ),
    Mutant(
        "optimizer-not-restored",
        "AdamW starts anew: the first steps after a resume are far too large, and nobody notices.",
        "train_sft.py",
        '"optimizer": optimizer, "precision": precision, "meter"',
        '"precision": precision, "meter"',
        RESUME + "test_resuming_at_any_step_changes_no_bit[train_sft-fp32]",
    ),
    Mutant(
        "loss-scale-not-restored",
        "fp16 starts with a scale that overflows, and skips steps that it had taken.",
        "training/distributed.py",
        '        self.scaler.load_state_dict(saved["scaler"])\n',
        "",
        RESUME + "test_resuming_restores_the_loss_scale_and_its_skips",
    ),
    Mutant(
        "resumed-a-step-late",
        "Off by one: each interruption skips a window of data.",
        "train_sft.py",
        "for step in range(first_step, total_steps):",
        "for step in range(first_step + bool(first_step), total_steps):",
        RESUME + "test_resuming_at_any_step_changes_no_bit[train_sft-fp32]",
    ),
    Mutant(
        "checkpoint-a-step-behind",
        "A checkpoint that names the step before is resumed into taking its step twice.",
        "train_sft.py",
        "run.save_when_due(done)",
        "run.save_when_due(step)",
        RESUME + "test_each_row_is_logged_once",
    ),
    Mutant(
        "reference-copied-after-resume",
        "The reference is what the policy had become: DPO starts anew at ln 2.",
        "train_dpo.py",
        "    log = MetricsLog(",
        "    reference.load_state_dict(model.state_dict())\n    log = MetricsLog(",
        RESUME + "test_the_reference_stays_the_original_one",
    ),
    Mutant(
        "rows-logged-twice",
        "Steps that a killed run had logged after its checkpoint stand in the log twice.",
        "training/metrics.py",
        'json.loads(line)["step"] <= step:',
        "json.loads(line):",
        RESUME + "test_each_row_is_logged_once",
    ),
    Mutant(
        "changed-settings-accepted",
        "A run goes on with another learning rate or data, and its config.json tells half of it.",
        "training/run.py",
        "if other.keys() - allowed:",
        "if False:",
        RESUME + "test_a_changed_setting_is_refused_by_name[beta]",
    ),
    Mutant(
        "old-settings-come-back",
        "The optimizer's saved state brings its own weight decay, whatever the flags say.",
        "training/checkpoint.py",
        'return {"state": saved["state"], "param_groups": groups}',
        "return saved",
        RESUME + "test_an_overridden_setting_takes_effect",
    ),
    Mutant(
        "stopped-run-thrown-away",
        "A start without --resume clears the folder of the night's work.",
        "training/run.py",
        "if not model.exists() and (left := checkpoints(self.checkpoints)):",
        "if left := []:",
        RESUME + "test_a_fresh_run_does_not_throw_a_stopped_one_away",
    ),
    Mutant(
        "old-model-left-standing",
        "When a run dies, the model of an earlier one is still there and is taken for its result.",
        "training/run.py",
        "        model.unlink(missing_ok=True)",
        "        pass",
        RESUME + "test_an_unfinished_run_has_no_model",
    ),
    Mutant(
        "signal-ends-in-success",
        "Status 0 after a signal: the shell goes on with half a model.",
        "training/run.py",
        "raise SystemExit(128 + number)",
        "raise SystemExit(0)",
        FAULTS + "test_a_signal_saves_after_the_step_and_leaves[2-SIGTERM]",
    ),
    Mutant(
        "signal-without-a-save",
        "The run leaves in good order, and without its last hours.",
        "training/run.py",
        "if number or (every and step % every == 0):",
        "if every and step % every == 0:",
        FAULTS + "test_a_signal_saves_after_the_step_and_leaves[2-SIGTERM]",
    ),
    Mutant(
        "no-lock",
        "Two runs write one folder.",
        "training/run.py",
        "            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)\n",
        "            pass\n",
        FAULTS + "test_a_folder_has_one_owner",
    ),
    Mutant(
        "nan-weights-saved",
        "The newest checkpoint is NaN, and every restart resumes it.",
        "training/run.py",
        "if not all(tensor.isfinite().all() for tensor in tensors(state)):",
        "if False:",
        FAULTS + "test_weights_that_are_none_are_never_saved",
    ),
    Mutant(
        "skips-without-end",
        "fp16 may skip every step of a run, and the loss that it logs looks well.",
        "training/schedule.py",
        "if precision.skipped_in_a_row <= MOST_SKIPS:",
        "if True:",
        FAULTS + "test_skipped_steps_are_counted_and_bounded",
    ),
    Mutant(
        "torn-cache-read",
        "Arrays that were cut short are read as other ids for the same rows.",
        "dataset/store.py",
        "if not len(self.tokens) == len(self.supervised) == self.bounds[-1, -1]:",
        "if False:",
        STORE + "test_a_torn_cache_is_refused[0.5-tokens.bin]",
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
