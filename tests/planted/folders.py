"""Hugging Face's folders, chat templates, adapters. See tests/mutants.py."""

from tests.planted.mutant import catalogue

MUTANTS = catalogue(r"""
# ---- Hugging Face's folders

rope-scaling-ignored in model.rotary: rotary
Llama 3.1 loads without its scaled rotations and is subtly wrong on every text.
- scaled(frequencies, scaling)
+ frequencies
test_huggingface.py::test_linear_scaling_is_positions_closer_together

rope-scaling-upside-down in model.rotary: scaled
The short waves are slowed down instead of the long ones.
- kept + (1 - kept) / scaling["factor"]
+ 1 - kept + kept / scaling["factor"]
test_huggingface.py::test_llama3_scaling_is_the_published_rule

unknown-scaling-ignored in model.huggingface: read_rope
A YaRN model loads as if it had none.
- kind not in ("default", *SCALING)
+ False
test_huggingface.py::test_what_is_not_supported_is_refused_by_name

absent-key-means-ours in model.huggingface:
Llama does not tie its head unless it says so; our models do.
- ("LlamaForCausalLM", dict(tie_word_embeddings=False))
+ ("LlamaForCausalLM", dict())
test_huggingface.py::test_a_folder_is_read_as_what_it_says[llama]

window-forgotten in model.huggingface: read_config
A sliding window that text is longer than must not be dropped in silence.
- family != "mistral"
+ True
test_huggingface.py::test_a_folder_is_read_as_what_it_says[mistral-window]

tied-head-trusted in model.huggingface: read_weights
A file that says tied and holds another head loads as another model.
- torch.equal(head, embedding)
+ True
test_huggingface.py::test_stored_rotary_tables_and_a_copy_of_the_head_are_left_out

shard-outside-the-folder in model.weights: weight_files
An index may name any file of the machine.
- Path(name).name != name
+ False
test_huggingface.py::test_an_index_names_files_of_its_folder[outside]

tokenizer-of-another-model in model.config: ModelConfig.check_fits
Ids beyond the embedding end in an assertion of the device, or in another token's row.
- tokens > self.vocab_size
+ False
test_huggingface.py::test_more_ids_than_embeddings_are_refused[train_dpo]

sentencepieces-scores-forgotten in dataset.tokenizer: ChatTokenizer.save
llama.cpp cuts texts into other tokens than the model was trained on.
- {"tokenizer.json": self.json.encode(), **self.sentencepiece}
+ {"tokenizer.json": self.json.encode()}
test_huggingface.py::test_sentencepieces_own_file_goes_all_the_way

sentencepieces-scores-stay-behind in model.export: export
The run folder has them, the export has not.
- SENTENCEPIECE_FILES
+ ()
test_huggingface.py::test_sentencepieces_own_file_goes_all_the_way

experts-of-a-dense-minimind in model.huggingface: read_config
MiniMind writes num_experts for dense models, too; read as experts, their weights are missing.
- (ModelConfig.__dataclass_fields__.keys() & config.keys()) - {*OURS_ALONE}
+ ModelConfig.__dataclass_fields__.keys() & config.keys()
test_huggingface.py::test_a_folder_is_read_as_what_it_says[minimind-newest]

# ---- Our folders

digest-not-compared in model.weights: read_ours
A flipped bit in the weights loads as a weight, and the model is another one.
- file_hash(path) != digest
+ False
test_weights.py::test_a_flipped_bit_is_found

compressed-weights-are-read in model.weights: require_stored_zip
A small file fills the memory.
- entry.compress_type != zipfile.ZIP_STORED
+ False
test_weights.py::test_compressed_weights_are_refused

layers-not-counted in model.weights: require_counts
A config that names a thousand layers builds them before a weight is compared.
- found != expected
+ False
test_weights.py::test_absurd_sizes_are_refused_before_a_model_is_built[layers]

weights-read-and-copied in model.weights: read_ours
Each rank holds the file and the model at once.
- torch.load(path, map_location=device, mmap=not on_meta, weights_only=True)
+ torch.load(path, map_location=device, weights_only=True)
test_weights.py::test_a_file_of_weights_is_mapped_and_not_read_into_memory

# ---- Chat templates of folders

default-system-text-lost in dataset.template: read_template
Qwen's models were trained with a system text even where nobody wrote one.
- template = ChatTemplate(before_user=before_user, **...)
+ template = ChatTemplate(before_user=CHATML.before_user, **...)
test_template.py::test_templates_are_measured_as_what_they_are[qwen]

template-not-checked in dataset.template: check
A template that does more than we can write is used all the same.
- if theirs != ours: ...
+ pass
test_template.py::test_more_than_separators_is_refused

white-space-kept in dataset.template: ChatTemplate.content
Llama 3's template strips what people say; the model has never seen it otherwise.
- message.content.strip()
+ message.content
test_template.py::test_a_folder_is_written_in_its_own_format

template-not-in-the-key in dataset.tokenizer: ChatTokenizer.__init__
Data tokenised in one chat format is read back in another.
- f"{self.template}\n{self.json}"
+ self.json
test_template.py::test_the_template_is_part_of_the_fingerprint

# ---- Adapters

adapter-starts-at-random in model.lora: AdaptedLinear.__init__
With a random B the policy is not the reference at step 0, and the loss not ln 2.
- base.weight.new_zeros
+ base.weight.new_ones
test_lora.py::test_first_loss_is_ln_2_exactly[fp32]

adapter-not-scaled in model.lora: AdaptedLinear.forward
Without alpha / rank a larger rank is a larger learning rate, and peft reads another model.
- self.scale * F.linear(F.linear(x, self.lora_A), self.lora_B)
+ F.linear(F.linear(x, self.lora_A), self.lora_B)
test_lora.py::test_an_adapter_adds_what_the_paper_says

base-not-frozen in model.lora: add_adapters
Weights that move take the reference along, whose adapters are off.
- model.requires_grad_(False)
+ model.requires_grad_(True)
test_lora.py::test_training_changes_adapters_only

reference-keeps-its-adapters in model.lora: AdapterReference.__call__
Policy and reference are one model, and the loss is ln 2 for ever.
- with as_reference(self.model):
-     return self.model(stream)
+ return self.model(stream)
test_lora.py::test_training_changes_adapters_only

adapters-stay-off in model.lora: as_reference
After the reference's forward the policy has no adapters either, and no gradient.
- for layer in layers:
-     layer.on = True
+ for layer in layers:
+     layer.on = False
test_lora.py::test_gradients_reach_every_adapter_and_nothing_else

merged-without-scale in model.lora: AdaptedLinear.merged
What is exported is not what was trained.
- self.scale * self.lora_B
+ self.lora_B
test_lora.py::test_merged_equals_unmerged

merged-in-place in model.lora: AdaptedLinear.merged
Each save adds the adapter to the weights once more.
- self.weight + self.scale * self.lora_B @ self.lora_A
+ self.weight.data.add_(self.scale * self.lora_B @ self.lora_A)
test_lora.py::test_merging_leaves_the_model_alone

adapter-of-the-reference-is-trained in model.lora: AdaptedLinear.keep_reference
The reference's adapter is the policy's own: both move, and the loss is ln 2 for ever.
- nn.Parameter(self.lora_B.detach().clone(), requires_grad=False)
+ self.lora_B
test_peft.py::test_the_reference_does_not_follow

adapter-not-in-the-reference in training.reference: make_reference
The reference is the base without --adapter, so the first loss is not ln 2.
- layer.keep_reference()
+ pass
test_peft.py::test_policy_and_reference_start_with_the_adapter[beside]

rank-pattern-ignored in model.peft: read_layers
All layers have the rank of the config, and an adapter with a pattern cannot be read.
- pattern_value(config.get("rank_pattern"), name, config.get("r"))
+ config.get("r")
test_peft.py::test_each_layer_has_its_own_rank_and_alpha[False]

rank-stabilisation-ignored in model.peft: read_layers
An adapter with alpha / sqrt(r) is read with alpha / r: a weaker one.
- (math.sqrt(rank) if config.get("use_rslora") else rank)
+ rank
test_peft.py::test_each_layer_has_its_own_rank_and_alpha[True]

unknown-adapter-option-ignored in model.peft: require_lora
A DoRA adapter loads as plain LoRA.
- require(not used, f"{folder}: {name} {str(value)[:60]!r} is not supported in an adapter")
+ pass
test_peft.py::test_what_is_not_plain_lora_is_refused_by_name[options2-use_dora 'True' is not supported]

adapter-scale-not-in-the-digest in model.weights: weights_hash
A run continues, or takes cached log-probs, with another alpha than it started with.
- json.dumps(scales).encode() if scales else b""
+ b""
test_peft.py::test_a_stopped_run_goes_on_and_the_folder_may_move

seed-never-arrives in train_dpo: train
The data order ignores --seed, and runs that should differ are one.
- windows_of(pairs, settings.batch_size, settings.seed)
+ windows_of(pairs, settings.batch_size, 0)
test_loops.py::test_seed_changes_the_order_and_repeats_it
""")
