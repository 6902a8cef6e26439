"""The training loops. See tests/mutants.py."""

from tests.planted.mutant import catalogue

MUTANTS = catalogue(r"""
margin-turned-in-the-loop in train_dpo: train
Rejected minus chosen: the loss starts at ln 2 and falls, and the model gets worse.
- chosen_logratios - rejected_logratios
+ rejected_logratios - chosen_logratios
test_loops.py::test_loss_starts_at_ln_2_and_falls[fp32]

dpo-mean-of-micro-batches in train_dpo: train
Each micro-batch is divided by its own size, so pairs of small micro-batches weigh more.
- losses.sum() * world.ranks / len(window)
+ losses.mean() * world.ranks / len([*micro_batches(pairs, window, world, max_tokens)])
test_loops.py::test_accumulation_equals_one_big_batch[130-dpo]

sft-mean-of-micro-batches in train_sft: train
Each micro-batch is divided by its own tokens, so tokens of short answers weigh more.
- (losses + penalty).sum() * world.ranks / window_tokens
+ (losses + penalty).mean() * world.ranks / len([*micro_batches(data, window, world, max_tokens)])
test_loops.py::test_accumulation_equals_one_big_batch[1-sft]

tail-divided-by-full-batch in train_dpo: train
The last short window is divided by --batch-size, so its pairs count less than all others.
- losses.sum() * world.ranks / len(window)
+ losses.sum() * world.ranks / settings.batch_size
test_loops.py::test_last_short_window_is_a_step_of_its_own_size

gradients-never-zeroed in train_dpo: train
Every step also takes all steps before it again.
- optimizer.zero_grad()
test_loops.py::test_last_short_window_is_a_step_of_its_own_size

ranks-average-away in train_dpo: train
DDP averages the ranks' gradients; without the factor two ranks learn at half the rate.
- losses.sum() * world.ranks
+ losses.sum()
test_loops.py::test_two_ranks_equal_one_process[train_dpo-pairs]

exchange-before-the-last-micro-batch in train_sft: train
Gradients meet too early, and what the last micro-batch adds stays on its rank.
- exchange_gradients(policy, when=is_last)
+ exchange_gradients(policy, when=not is_last)
test_loops.py::test_two_ranks_equal_one_process[train_sft-chats]

reference-is-the-policy in training.reference: make_reference
The reference moves with the policy: the loss is ln 2 for ever.
- wrap(copy.deepcopy(model).eval().requires_grad_(False), world, settings.shard)
+ model
test_loops.py::test_loss_starts_at_ln_2_and_falls[fp32]

reference-not-frozen in training.reference: make_reference
The reference's parameters ask for gradients, and an optimizer that finds them moves the goal.
- copy.deepcopy(model).eval().requires_grad_(False)
+ copy.deepcopy(model).eval()
test_loops.py::test_reference_is_frozen_and_shares_nothing

scaled-gradient-clipped in training.schedule: clip_gradients
fp16 gradients are clipped while still multiplied by the loss scale.
- scaler.unscale_(optimizer)
test_loops.py::test_clipping_sees_the_true_gradient

non-finite-goes-on in training.schedule: require_finite
One NaN in the gradient becomes a NaN in every weight at the next step.
- if meter.is_finite(0.0 if gradient_is_fine else math.nan):
-     return
+ return
test_faults.py::test_a_number_that_is_not_finite_stops_before_the_step

learning-rate-a-step-early in train_dpo: train
The schedule is read one step ahead: the first step is too large and the last is zero.
- cosine_lr(step, total_steps, settings.lr, settings.warmup_steps)
+ cosine_lr(step + 1, total_steps, settings.lr, settings.warmup_steps)
test_loops.py::test_learning_rate_is_its_closed_form

warm-up-from-zero in training.schedule: cosine_lr
The first step of the warm-up has learning rate 0: a step that does nothing.
- peak * (step + 1) / warmup_steps
+ peak * step / warmup_steps
test_loops.py::test_cosine_lr_edges

cosine-turns-back-up in training.schedule: cosine_lr
Past its end a cosine rises again.
- min(1.0, progress)
+ progress
test_loops.py::test_cosine_lr_edges

saved-in-half-precision in model.weights: save_model
At DPO's learning rates fp16 rounds away most of what was learned.
- merged_weights(model)
+ {k: v.half() for k, v in merged_weights(model).items()}
test_loops.py::test_saved_weights_are_the_live_ones_bit_for_bit

weights-loaded-loosely in model.weights: load_model
A checkpoint that does not fit leaves random weights, and training goes on from noise.
- require_fit(folder, model, weights)
- if not on_meta:
-     model.to_empty(device=device)
-     model.load_state_dict(weights, strict=True)
+ if not on_meta:
+     model.to_empty(device=device)
+     model.load_state_dict(weights, strict=False)
test_weights.py::test_weights_that_do_not_fit_are_refused_by_name[missing]

file-is-unpickled in model.weights: read_ours
Loading a model runs whatever code its file holds.
- torch.load(path, map_location=device, mmap=not on_meta, weights_only=True)
+ torch.load(path, map_location=device, mmap=not on_meta, weights_only=False)
test_weights.py::test_a_hostile_file_runs_nothing
""")
