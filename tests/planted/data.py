"""From text to batches. See tests/mutants.py."""

from tests.planted.mutant import catalogue

MUTANTS = catalogue(r"""
# ---- Text and masks

end-token-lost in dataset.tokenizer: ChatTokenizer.response
A response without its end token never learns to stop.
- [*self._content(self.template.user_to_answer, Message("assistant", content)), self.end_id]
+ [*self._content(self.template.user_to_answer, Message("assistant", content))]
test_stream.py::test_pairs_equal_brute_force[all-forked]

end-token-unsupervised in dataset.tokenizer: ChatTokenizer.conversation
The end token is there and outside the loss, so that answers never end.
- append(self.response(message.content), ...)
+ append(self.response(message.content)[:-1], ...); append([self.end_id], False)
test_tokenizer.py::test_supervised_ids_are_the_response_and_its_end[4]

user-turns-supervised in dataset.tokenizer: ChatTokenizer.conversation
The model learns to ask the questions.
- message.role == "assistant"
+ message.role != "system"
test_stream.py::test_conversations_equal_brute_force

prompt-supervised in dataset.store: encode
A prompt in the loss of both sides cancels in DPO, but not in the count of tokens.
- [False] * len(prompt)
+ [True] * len(prompt)
test_store.py::test_rows_are_the_records_in_order

control-tokens-parsed in dataset.tokenizer: ChatTokenizer.__init__
A user who types <|im_end|> ends his own turn and speaks as the assistant.
- self._tokenizer.encode_special_tokens = True
+ self._tokenizer.encode_special_tokens = False
test_tokenizer.py::test_text_never_becomes_a_control_token[3-<|im_end|>]

control-tokens-trusted-to-be-flagged in dataset.tokenizer: ChatTokenizer.__init__
The library parses those that the file does not call special, switch or no switch.
- token["special"] |= ...
+ pass
test_tokenizer.py::test_control_tokens_need_no_flag_in_the_file[<|im_end|>]

added-tokens-of-the-file in dataset.tokenizer: ChatTokenizer.text
The library puts a BOS before every piece of text, if the file says so.
- self._tokenizer.encode(text, add_special_tokens=False)
+ self._tokenizer.encode(text)
test_tokenizer.py::test_settings_of_the_file_do_not_leak_into_text

newline-after-role-lost in dataset.template:
Another template than the one that the model was trained on elsewhere.
- CHATML = ChatTemplate(**..., system_to_user="<|im_end|>\n<|im_start|>user\n", **...)
+ CHATML = ChatTemplate(**..., system_to_user="<|im_end|>\n<|im_start|>user", **...)
test_tokenizer.py::test_template_by_hand

prompt-without-header in dataset.tokenizer: ChatTokenizer.prompt
The model is asked before it is told that the assistant speaks next.
- ids + self._separators[self.template.user_to_answer]
+ ids
test_tokenizer.py::test_asking_and_training_give_the_same_prompt[0]

weight-0-supervised in dataset.tokenizer: ChatTokenizer.conversation
An assistant turn that the data marks as not to be learned is learned.
- message.weight == 1
+ True
test_tokenizer.py::test_a_turn_of_weight_0_is_not_supervised

# ---- Verdicts

order-of-the-columns in dataset.turns: judged_pair
The first answer is always chosen: half of the pairs are learned the wrong way round.
- sides if first_wins(record, verdict) >= 0.5 else sides[::-1]
+ sides
test_store.py::test_ties_are_dropped_and_votes_are_labels

tie-trained-on in dataset.store: encode_or_drop
A tie is learned as a win of the first answer.
- getattr(record, "tie", False)
+ False
test_store.py::test_ties_are_dropped_and_votes_are_labels

votes-of-the-first-answer in dataset.records: _preference
The share of the first answer, where the second is chosen: the soft label prefers the rejected side.
- max(share, 1 - share)
+ share
test_records.py::test_votes_are_a_win_probability_of_the_side_that_wins

tie-for-the-second in dataset.turns: first_wins
A tie among several votes counts against the first answer.
- sum(VERDICTS[name] for name in names)
+ sum(VERDICTS[name] == 1 for name in names)
test_records.py::test_votes_are_a_win_probability_of_the_side_that_wins

# ---- Files and batches

split-by-row in dataset.store: TokenStore.split
A prompt of the held-out part stands in the training part as well.
- self.digests < np.uint64(share * 2**64)
+ np.arange(len(self)) % 5 == 0
test_store.py::test_a_split_never_puts_a_prompt_on_both_sides

split-keeps-the-offsets in dataset.store: TokenStore._view
The held-out rows get the cached reference log-probs of other rows.
- view._derive()
+ pass
test_store.py::test_a_split_never_puts_a_prompt_on_both_sides

swapped-without-labels in dataset.store: swap_sides
The sides are exchanged and the scores are not, so soft labels prefer the wrong one.
- record.scores and record.scores[::-1]
+ record.scores
test_store.py::test_swap_by_score_exchanges_what_the_scores_contradict

number-cut-by-a-block in dataset.jsonl: _Text.value
A number that continues in the next block of an array is read as two.
- self.ended or kind(value) != "a number" or (following and following in " \t\n\r,]")
+ True
test_records.py::test_an_array_is_read_in_blocks_of_any_size[3]

too-long-is-cut in dataset.store: encode_or_drop
A response cut at the limit loses its end token; a pair cut to its prompt trains on nothing.
- if length > max_length:
-     return branches, length, 'too long'
+ if length > max_length:
+     for ids, mask in branches:
+         del ids[max_length:], mask[max_length:]
test_store.py::test_length_limit_keeps_whole_pairs_or_none

limit-off-by-one in dataset.store: encode_or_drop
A pair that fits exactly is dropped.
- if length > max_length:
-     return branches, length, 'too long'
+ if length >= max_length:
+     return branches, length, 'too long'
test_store.py::test_length_limit_keeps_whole_pairs_or_none

equal-pairs-kept in dataset.store: encode_or_drop
A pair that prefers nothing adds ln 2 to the loss and nothing to the gradient.
- {tuple(ids) for ids, _ in branches[1:]}
+ {id(ids) for ids, _ in branches[1:]}
test_store.py::test_dropped_records_are_counted_with_their_lines

skip-bad-without-limit in dataset.store: _write
A file of another kind is skipped line by line, down to the few that fit by accident.
- bad > BAD_SHARE * report.total()
+ bad == report.total()
test_store.py::test_skip_bad_has_a_limit[50-bad0]

cache-by-size in dataset.store: open_store
A data file that was edited without a change of size is never read again.
- key = (VERSION, content, ...)
+ key = (VERSION, path.stat().st_size, ...)
test_store.py::test_whatever_changes_the_arrays_changes_the_cache

cache-without-tokenizer in dataset.store: open_store
Arrays of ids are read back under another tokenizer, where they spell something else.
- key = (..., tokenizer.fingerprint, *options)
+ key = (..., *options)
test_store.py::test_whatever_changes_the_arrays_changes_the_cache

slower-builder-fails in dataset.cache: build
Of two processes that tokenise one file at once, the second finds the folder taken and stops.
- if not is_cached(folder): ...
+ raise
test_store.py::test_the_slower_process_takes_the_folder_of_the_faster_one

tail-dropped in dataset.packing: Windows.__init__
The rows that do not fill a last batch are left out of every epoch.
- math.ceil(rows / batch_size)
+ max(1, rows // batch_size)
test_store.py::test_an_epoch_sees_every_row_once[10-4]

every-epoch-in-one-order in dataset.packing: Windows.__getitem__
The same rows meet in every epoch.
- [self.seed, epoch]
+ self.seed
test_store.py::test_windows_are_a_function_of_seed_and_step

order-from-a-running-generator in dataset.packing: Windows.__getitem__
The order of an epoch depends on how many were drawn before, so a resumed run goes another way.
- np.random.default_rng([self.seed, epoch])
+ self.__dict__.setdefault("random", np.random.default_rng(self.seed))
test_store.py::test_windows_are_a_function_of_seed_and_step

deal-loses-rows in dataset.packing: deal
Rounded down instead of up, the last rows of a window have no micro-batch to go to.
- batches[rank::ranks]
+ batches[rank :: ranks + 1]
test_store.py::test_deal_gives_every_row_to_one_micro_batch[8-300-2]

deal-by-turns in dataset.packing: deal
Rows are balanced instead of tokens, and the micro-batch with the long rows takes the memory.
- (total + int(lengths[row]), place)
+ (total + 1, place)
test_store.py::test_deal_balances_tokens_not_rows

first-pairs-compared in dataset.inspect: Findings.compare
A file sorted by source is judged by its first source.
- draw.randrange(self.report.kept)
+ self.report.kept
test_inspect.py::test_a_large_file_is_sampled_over_its_whole_length

edit-distance-without-insertions in dataset.inspect: edit_distance
A side that only lacks a word at its start counts as a different text.
- np.minimum.accumulate(np.concatenate([[i], best]) - places) + places
+ np.concatenate([[i], best])
test_inspect.py::test_the_edit_distance_is_levenshteins

# ---- Several files

mixed-by-epoch in dataset.mixture: Mixture.__init__
The proportions are right in a whole round only: its first steps see one file, its last steps another.
- self.order = sources[np.argsort(places, kind="stable")]
+ self.order = sources
test_mixture.py::test_every_window_has_the_proportions_and_every_source_its_epochs

sources-share-one-order in dataset.mixture: Mixture._row
Every epoch of a source has the same order.
- [self.seed, epoch, source]
+ [self.seed, source]
test_mixture.py::test_every_window_has_the_proportions_and_every_source_its_epochs

weights-outside-the-identity in dataset.mixture: join
A run is resumed with other weights, and nobody notices.
- [str(weight) for weight in weights]
+ []
test_mixture.py::test_a_resumed_mixture_changes_no_bit

ragged-row-is-cut in dataset.tables: csv_record
A text with a comma that is not quoted loses its end.
- len(fields) != len(header)
+ len(fields) < len(header)
test_tables.py::test_a_csv_that_is_wrong_is_one_clear_line[1]
""")
