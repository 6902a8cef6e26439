"""Exercise 8: break the loss mask, and find a test that notices.

`encode` is dataset.store.encode for a pair. Each part is (ids, mask), and True is in the loss. Change the
mask so that it is wrong, but leave the ids as they are. For example: score the prompt too, or leave out the
end token. Then name a test that turns red.
"""


def encode(record, tokenizer) -> list[tuple[list[int], list[bool]]]:
    prompt = tokenizer.prompt(record.prompt)
    sides = [tokenizer.response(record.chosen), tokenizer.response(record.rejected)]
    return [(prompt, [False] * len(prompt)), *((side, [True] * len(side)) for side in sides)]


NOTICED_BY = ""  # such as tests/test_losses.py::test_name
