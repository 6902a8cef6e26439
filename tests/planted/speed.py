"""What makes it fast. See tests/mutants.py."""

from tests.planted.mutant import Mutant

CACHED = "tests/test_reference.py::"
SPEED = "tests/test_speed.py::"

MUTANTS = [
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
        "training/costs.py",
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
