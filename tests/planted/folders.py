"""Hugging Face's folders, chat templates, adapters. See tests/mutants.py."""

from tests.planted.mutant import Mutant

LOOPS = "tests/test_loops.py::"
LORA = "tests/test_lora.py::"
TEMPLATE = "tests/test_template.py::"
HUGGING_FACE = "tests/test_huggingface.py::"

MUTANTS = [
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
        "torch.equal(head, embedding)",
        "True",
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
