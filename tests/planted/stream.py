"""The stream: the shift, the sum, the sides. See tests/mutants.py."""

from tests.planted.mutant import Mutant

STREAM = "tests/test_stream.py::"

MUTANTS = [
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
        STREAM + "test_who_sees_whom[forked-128]",
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
    Mutant(
        "fused-without-prefix",
        "An answer that does not see its prompt still trains, on nothing.",
        "model/stream.py",
        "(own[query] <= key) & (key <= query) | (first[query] <= key) & (key < last[query])",
        "(own[query] <= key) & (key <= query)",
        STREAM + "test_fused_attention_is_attention[forked]",
    ),
]
