"""The stream: the shift, the sum, the sides. See tests/mutants.py."""

from tests.planted.mutant import catalogue

MUTANTS = catalogue(r"""
target-not-shifted in dataset.packing: build_stream.supervise
A position is asked for its own token, which it has just been given.
- np.where(where == 0, before, start + where - 1)
+ np.where(where == 0, before, start + where)
test_stream.py::test_there_is_one_shift[forked]

target-shifted-twice in dataset.packing: build_stream.supervise
A token is predicted from two places before it, as when the library and the loop both shift.
- np.where(where == 0, before, start + where - 1)
+ np.where(where == 0, before, start + where - 2)
test_stream.py::test_there_is_one_shift[twin]

first-rejected-from-last-chosen in dataset.packing: build_stream
In a shared run the place before the rejected side is the end of the chosen one, not of the prompt.
- supervise(ids, supervised, start, prefix[1] - 1, owner)
+ supervise(ids, supervised, start, start - 1, owner)
test_stream.py::test_pairs_equal_brute_force[all-forked]

rope-not-restarted in dataset.packing: build_stream
The rejected side goes on counting after the chosen one, so it stands too far from its prompt.
- append(ids, len(prompt), prefix)
+ append(ids, end - prefix[0], prefix)
test_stream.py::test_forked_equals_twin[plain]

rejected-sees-chosen in dataset.packing: build_stream
The mask of a shared run lets the rejected side attend to the chosen one.
- append(ids, len(prompt), prefix)
+ append(ids, len(prompt), (prefix[0], end))
test_stream.py::test_who_sees_whom[forked-128]

mean-for-sum in model.stream: TokenStream.sum_by_response
Eq. 7 of the paper has sums; a mean over tokens is another objective, that of other papers.
- token_logps.new_zeros(self.responses).index_add(0, self.owners, token_logps)
+ token_logps.new_zeros(self.responses).index_reduce(0, self.owners, token_logps, "mean", include_self=False)
test_stream.py::test_pairs_equal_brute_force[all-forked]

sides-split-into-halves in model.stream: sides
Chosen and rejected lie by turns; split into halves, answers to different prompts are compared.
- values.view(-1, branches).unbind(1)
+ values.view(branches, -1).unbind(0)
test_stream.py::test_pairs_equal_brute_force[all-twin]

sides-swapped in model.stream: sides
The model learns to prefer what people rejected, and every curve looks well.
- return chosen, rejected
+ return rejected, chosen
test_stream.py::test_pairs_equal_brute_force[all-twin]

rejected-owned-by-chosen in dataset.packing: build_stream.supervise
Both sides are added up under one response, as when the chosen mask is used for both.
- np.full(len(where), owner)
+ np.full(len(where), owner - owner % 2)
test_stream.py::test_pairs_equal_brute_force[all-forked]

empty-stream-fails in dataset.packing: build_stream
A rank without rows stops with an error, and the others wait for its gradients.
- segments or [(0, 0, 0, 0)]
+ segments
test_stream.py::test_an_empty_stream_has_zero_gradients_not_none[forked]

segments-on-the-device in model.stream: TokenStream.to
The loop over segments then makes the program wait for the GPU in every layer.
- ("segments", "responses", "branches")
+ ("responses", "branches")
test_stream.py::test_segments_stay_on_the_cpu

fused-without-prefix in model.attention: FusedAttention.__init__.sees
An answer that does not see its prompt still trains, on nothing.
- (own[query] <= key) & (key <= query) | (first[query] <= key) & (key < last[query])
+ (own[query] <= key) & (key <= query)
test_stream.py::test_fused_attention_is_attention[forked]

copies-that-nobody-waits-for in model.stream: move
On a Mac the memory is freed and used again before it is copied.
- x.to(device)
+ x.to(device, non_blocking=True)
test_stream.py::test_only_pinned_memory_is_copied_asynchronously[mps-False]
""")
