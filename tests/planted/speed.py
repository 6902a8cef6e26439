"""What makes it fast. See tests/mutants.py."""

from tests.planted.mutant import catalogue

MUTANTS = catalogue(r"""
cached-reference-of-any-weights in training.reference: cache_reference
The reference's log-probs are kept under a name that does not know which model they are of.
- [weights_hash(model), model.config.to_dict(), layout, store.fingerprint, *products]
+ [model.config.to_dict(), layout, store.fingerprint, *products]
test_reference.py::test_what_changes_a_log_prob_changes_the_file

cached-reference-of-any-shape in training.reference: cache_reference
Equal weights with another rotation or other heads are another model.
- [weights_hash(model), model.config.to_dict(), layout, store.fingerprint, *products]
+ [weights_hash(model), layout, store.fingerprint, *products]
test_reference.py::test_what_changes_a_log_prob_changes_the_file

cached-reference-of-any-precision in training.reference: cache_reference
Log-probs of rounded products are read by a run that asked for exact ones.
- [weights_hash(model), model.config.to_dict(), layout, store.fingerprint, *products]
+ [weights_hash(model), model.config.to_dict(), layout, store.fingerprint]
test_reference.py::test_what_changes_a_log_prob_changes_the_file

cached-reference-in-order-of-ranks in training.reference: token_logps
Each rank writes its log-probs at the start of a chunk, and the sum over ranks mixes them.
- chunk[bounds[rows.start] - first : bounds[rows.stop] - first] = logps
+ chunk[: len(logps)] = logps
test_reference.py::test_two_ranks_ask_as_one

cached-reference-of-a-neighbour in dataset.packing: build_stream
The cached log-probs are those of another row, as if data were shuffled afterwards.
- store.target_bounds[row : row + 2]
+ store.target_bounds[len(cached) : len(cached) + 2]
test_reference.py::test_each_token_has_its_own

cached-reference-that-moves in training.reference: check_cached
TR-DPO moves the reference, and the cache stays where it was.
- objective.moves_reference
+ False
test_reference.py::test_what_cannot_be_cached_is_refused

cached-reference-litter in files: write_whole
Each stopped run leaves its half of a file in the cache for ever.
- BaseException
+ Exception
test_reference.py::test_an_interrupted_file_is_no_file

chunks-without-checkpoint in model.transformer: Transformer.logps_in_chunks
Chunks of the vocabulary that autograd remembers until backward are together as large as the whole.
- recompute_in_backward(logps, *chunk)
+ logps(*chunk)
test_speed.py::test_what_is_kept_does_not_grow_with_the_vocabulary

chunks-never in model.transformer: Transformer.forward
All positions meet the vocabulary at once: with 152,000 tokens that is the memory of the whole run.
- len(predicting) > self.positions_at_once
+ False
test_speed.py::test_no_tensor_is_positions_times_vocabulary

last-chunk-dropped in model.transformer: Transformer.logps_in_chunks
Only whole chunks are computed, and the last tokens have no loss.
- zip(predicting.split(size), targets.split(size), strict=True)
+ list(zip(predicting.split(size), targets.split(size)))[: len(targets) // size]
test_speed.py::test_chunks_are_exact[plain]

activations-kept in model.transformer: Transformer.hidden
The flag that should save memory reaches nothing.
- self.checkpoint_activations
+ False
test_speed.py::test_checkpointed_activations_are_exact_and_not_kept[plain]

flops-of-a-square in bench.work: forward_flops
A causal mask hides half of the scores; counted as if it did not, the machine looks better used.
- own * (own + 1) // 2
+ own * own
test_bench.py::test_flops_are_those_that_torch_counts[forked]

reference-asked-in-every-epoch in bench.tables: per_epoch
What is asked once is counted in every epoch, as if nothing were gained by remembering it.
- run["reference"] / epochs
+ run["reference"]
test_bench.py::test_ratios_by_hand

benchmark-of-cut-pairs in bench.work: real_pairs
All real pairs are shortened, not only those to warm up: a benchmark of other data than it says.
- for place in case.windows[0]:
-     ...
+ for place in range(count):
+     ...
test_bench.py::test_real_pairs_are_the_rows_that_training_reads[ragged.jsonl]

clock-that-does-not-wait in bench.work: now
A GPU goes on after the call has returned, and the clock shows how fast one can ask.
- torch.cuda.synchronize()
+ pass
test_bench.py::test_the_clock_waits_for_a_gpu_that_works

growth-of-two-things in bench.growth: points
The prompt grows and the answers stay, so what is drawn over its share is length.
- (prompt, (total - prompt) // 2, (total - prompt) // 2)
+ (prompt, total // 2, total // 2)
test_bench.py::test_each_panel_changes_one_thing[False]

matmul-precision-ignored in training.precision: Precision.__init__
A flag that is read and never passed on: the run is as exact, and as slow, as before.
- torch.set_float32_matmul_precision(matmul)
+ torch.set_float32_matmul_precision('highest')
test_speed.py::test_matmul_precision_reaches_torch[train_dpo]

freed-memory-given-back in training.distributed: keep_freed_memory
With one threshold alone glibc still asks the kernel for every large block anew.
- mallopt(mmap_threshold, 2**30)
test_speed.py::test_freed_memory_is_used_again

autocast-with-a-cache in training.precision: Precision.autocast
It holds a copy of every weight, and adds up the gradients of chunks in bf16.
- torch.autocast(self.device_type, dtype, enabled=dtype is not None, cache_enabled=False)
+ torch.autocast(self.device_type, dtype, enabled=dtype is not None)
test_speed.py::test_chunks_add_up_in_float32

fused-attention-traced in model.attention: FusedAttention.attend
Inside a compiled layer FlexAttention sees a head of unknown size.
- torch.compiler.disable
+ (lambda function: function)
test_speed.py::test_fused_attention_stays_out_of_compiled_layers
""")
