"""Generation: the cache equals the full forward, draws follow the distribution, a seed repeats answers."""

import pytest
import torch

import model.generate as module
from errors import InputError
from model.generate import Answer, Decoder, KVCache, generate, prefill, sample
from model.lora import adapter_weights, add_adapters
from tests.conftest import MODEL_OPTIONS, NoFloat64, make_model, plain_logits

PROBES = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
CPU_MULTIPLIES_BF16 = any(getattr(torch.cpu, name, bool)() for name in PROBES)
V, END = 40, 7
PROMPTS = [[1, 2, 3, 4, 5, 6], [9], [11, 12, 13], [9, 8], [30, 31, 32, 33, 34, 35, 36, 37, 38, 39]]


def cached_logits(model, chunks: list[list[int]]) -> torch.Tensor:
    """Feed one sequence to a cache, chunk by chunk; the scores at every position, (L, V)."""
    cache, logits, start = KVCache(model, 3, 20), [], 0
    for chunk in chunks:
        positions = torch.arange(start, start + len(chunk))
        cache.prefill([(1, start, start + len(chunk))])  # Row 1 of three, so that a wrong row shows.
        logits.append(model.logits(model.hidden(torch.tensor(chunk), positions, cache)))
        start += len(chunk)
    return torch.cat(logits)


IDS = [3, 14, 15, 9, 2, 6, 5, 35, 8, 9]


@pytest.mark.parametrize("option", MODEL_OPTIONS)
@pytest.mark.parametrize("chunks", [[10], [1] * 10, [4, 1, 1, 4], [1, 5, 4], [9, 1], [3, 3, 3, 1]])
@torch.no_grad()
def test_cache_equals_the_full_forward(option, chunks):
    """Wrong positions, or a mask aligned with the first key, change the scores only after the prompt."""
    model = make_model(V, **MODEL_OPTIONS[option])
    starts = [sum(chunks[:i]) for i in range(len(chunks))]
    pieces = [IDS[start : start + size] for start, size in zip(starts, chunks, strict=True)]
    got = cached_logits(model, pieces)
    torch.testing.assert_close(got, plain_logits(model, IDS), rtol=0, atol=1e-9)


@torch.no_grad()
def greedy(model, prompt: list[int], steps: int, end: int = END) -> Answer:
    """Without cache and batch: the likeliest next token of the whole sequence, again and again."""
    answer: list[int] = []
    for _ in range(steps):
        token = int(plain_logits(model, prompt + answer)[-1].argmax())
        if token == end:
            return Answer(answer, True)
        answer.append(token)
    return Answer(answer, False)


@pytest.mark.parametrize("option", ["plain", "all"])
@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_greedy_answers_equal_the_plain_loop(option, batch_size):
    """Prompts of unequal length in one batch: the answers do not depend on one another."""
    model = make_model(V, **MODEL_OPTIONS[option])
    expected = [greedy(model, prompt, 12) for prompt in PROMPTS]
    assert generate(model, PROMPTS, END, 12, temperature=0, batch_size=batch_size) == expected


def test_a_row_ends_with_its_end_token():
    """The other rows continue unchanged. The end token finishes an answer and is not part of it."""
    model = make_model(V, **MODEL_OPTIONS["all"])
    answers = [greedy(model, prompt, 12) for prompt in PROMPTS]
    # Make a token that occurs early in one answer the end token: some rows end there, others do not.
    end = answers[0].tokens[2]
    got = generate(model, PROMPTS, end, 12, temperature=0)
    for answer, plain in zip(got, answers, strict=True):
        tokens = plain.tokens if not plain.finished else [*plain.tokens, END]
        cut = tokens.index(end) if end in tokens else None
        assert answer.finished == (cut is not None)
        assert answer.tokens[: len(tokens)] == tokens[:cut]
        assert end not in answer.tokens
    assert any(answer.finished for answer in got) and any(not answer.finished for answer in got)


def test_a_row_that_has_ended_needs_room_while_it_stays():
    """The longest prompt ends at once, among many that go on: its place passes the end of the cache first."""
    model, longest = make_model(V), [*range(1, 6)] * 12
    end = greedy(model, longest, 1).tokens[0]
    prompts = [prompt for prompt in ([i] * 9 for i in range(V)) if greedy(model, prompt, 1, end).tokens]
    answers = generate(model, [longest, *prompts], end, 8, temperature=0)
    assert answers[0] == Answer([], True) and not all(answer.finished for answer in answers)
    assert answers[1:] == [greedy(model, prompt, 8, end) for prompt in prompts]


def test_answers_depend_on_seed_and_place_alone():
    """The same for every batch size; another seed is another answer; two equal prompts get two answers."""
    model = make_model(V, dtype=torch.float64, spread=0.1)
    prompts = [*PROMPTS, PROMPTS[0]]
    runs = {size: generate(model, prompts, END, 10, 1.0, seed=3, batch_size=size) for size in (1, 4, 6, 64)}
    assert all(run == runs[1] for run in runs.values())
    assert runs[1] != generate(model, prompts, END, 10, 1.0, seed=4)
    assert runs[1][0] != runs[1][-1]


def test_generation_leaves_the_model_and_the_global_generator_alone():
    """Sampling must not change a training run: no gradient, no draw from the global state."""
    model = make_model(V)
    state = torch.random.get_rng_state()
    generate(model, PROMPTS, END, 3, 1.0)
    assert torch.equal(torch.random.get_rng_state(), state) and torch.is_grad_enabled()
    assert all(parameter.grad is None for parameter in model.parameters())


def test_no_prompts_and_no_tokens():
    """Without prompts the list is empty; without room for a token the answers are empty and unfinished."""
    model = make_model(V)
    assert generate(model, [], END) == []
    assert generate(model, PROMPTS[:2], END, max_new_tokens=0) == [Answer(), Answer()]


# ---- The distribution


def intended(logits: list[float], temperature: float, top_k: int, top_p: float) -> list[float]:
    """Step by step: temperature, the k likeliest, the fewest of those that reach p, renormalised."""
    weights = [2.718281828459045 ** (score / temperature) for score in logits]
    likeliest = sorted(range(len(logits)), key=lambda token: -weights[token])[: top_k or None]
    total = sum(weights[token] for token in likeliest)
    kept, mass = [], 0.0
    for token in likeliest:
        kept.append(token)
        mass += weights[token] / total
        if mass >= top_p:
            break
    total = sum(weights[token] for token in kept)
    return [weights[token] / total if token in kept else 0.0 for token in range(len(logits))]


LOGITS = [0.3, -1.0, 2.0, 0.1, 1.2, -2.0, 1.9]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("top_k", [0, 1, 3, 7, 50])
@pytest.mark.parametrize("top_p", [1.0, 0.9, 0.5, 0.01])
def test_sampling_follows_the_intended_distribution(temperature, top_k, top_p):
    """A nucleus without the token that crosses p, a cut before the temperature, or no renormalisation."""
    grid = 20_000
    uniforms = (torch.arange(grid) + 0.5).double() / grid
    tokens = sample(torch.tensor(LOGITS).expand(grid, -1), uniforms, temperature, top_k, top_p)
    frequencies = torch.bincount(tokens, minlength=7) / grid
    expected = torch.tensor(intended(LOGITS, temperature, top_k, top_p))
    assert (frequencies - expected).abs().max() <= 2 / grid
    assert torch.equal(frequencies > 0, expected > 0)


def test_sampling_at_the_edges_of_a_draw():
    """A draw of 0 gives the first token, or the likeliest if they are sorted; the largest gives the last."""
    logits = torch.tensor([[0.0, 1.0, -1.0], [0.0, 1.0, -1.0]])
    assert sample(logits, torch.tensor([0.0, 1 - 2**-24]), 1.0).tolist() == [0, 2]
    assert sample(logits, torch.tensor([0.0, 1 - 2**-24]), 1.0, top_k=3).tolist() == [1, 2]
    impossible = torch.tensor([[0.0, -torch.inf, 0.0, -torch.inf]] * 2)
    assert set(sample(impossible, torch.tensor([0.0, 1 - 2**-24]), 1.0).tolist()) <= {0, 2}


@pytest.mark.parametrize("sampling", [{}, {"top_k": 3}, {"top_p": 0.9}, {"temperature": 0}])
def test_generation_needs_no_float64(sampling):
    """On a Mac a chat at its default temperature stopped with an error at the first token."""
    model = make_model(V, dtype=torch.float32)
    with NoFloat64():
        assert len(generate(model, PROMPTS, END, 5, **sampling)) == len(PROMPTS)


# ---- Several answers of a prompt, rows that leave, a cache that grows


@pytest.mark.parametrize("option", MODEL_OPTIONS)
def test_answers_equal_the_plain_loop_while_rows_leave_and_the_cache_grows(option, monkeypatch):
    """Three answers of each prompt, which is computed in pieces of four tokens; the cache grows every two."""
    monkeypatch.setattr(module, "ROOM", 2)
    monkeypatch.setattr(module, "PREFILL", 4)
    model = make_model(V, **MODEL_OPTIONS[option])
    plain = [greedy(model, prompt, 12) for prompt in PROMPTS]
    end = next(token for answer in plain for token in answer.tokens[1:6])
    answers = generate(model, PROMPTS, end, 12, temperature=0, samples=3)
    expected = [greedy(model, prompt, 12, end) for prompt in PROMPTS]
    assert answers == [answer for answer in expected for _ in range(3)]
    assert len({len(answer.tokens) for answer in answers}) > 1


@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.7, "top_k": 20}, {"top_p": 0.9}])
def test_samples_are_those_of_a_repeated_prompt(sampling, monkeypatch):
    """In any batch size and order: wrong places or draws mix the answers of two prompts."""
    monkeypatch.setattr(module, "ROOM", 4)
    model = make_model(V, spread=0.1)
    repeated = [prompt for prompt in PROMPTS for _ in range(4)]
    expected = [generate(model, repeated, END, 10, seed=3, batch_size=size, **sampling) for size in (1, 64)]
    assert expected[0] == expected[1]
    for size in (1, 4, 9, 64):
        assert (
            generate(model, PROMPTS, END, 10, seed=3, batch_size=size, samples=4, **sampling) == expected[0]
        )
    assert len({tuple(answer.tokens) for answer in expected[0][:4]}) > 1


@torch.inference_mode()
def test_a_step_of_every_row_equals_the_full_forward():
    """Scores of rows of unequal length, step by step, with an adapter that is on: to the last digits."""
    model = make_model(V, **MODEL_OPTIONS["all"])
    add_adapters(model, rank=2, alpha=4, targets="all", seed=0)
    for weights in adapter_weights(model).values():
        weights.add_(0.1)
    decoder, cache = Decoder(model), KVCache(model, 2, 10)
    prefill(model, [IDS[:3], IDS[:6]], cache)
    for step in range(4):
        places = torch.tensor([3 + step, 6 + step])
        cache.decode(places)
        scores = decoder.logits(decoder.hidden(torch.tensor(IDS)[places], places, cache))
        expected = cached_logits(model, [IDS])[places]
        torch.testing.assert_close(scores, expected, rtol=0, atol=1e-9)


def test_bf16_answers_are_the_same_for_every_batch_size():
    """To the bit: one sum in another order would change a rounded score, and later the answer."""
    if not CPU_MULTIPLIES_BF16:
        pytest.skip("this CPU does not multiply bf16, and its emulation may add in another order")
    model = make_model(V, dtype=torch.float32, spread=0.1)
    with torch.autocast("cpu", torch.bfloat16):
        runs = [generate(model, PROMPTS, END, 40, batch_size=size, samples=3) for size in (1, 3, 7, 15)]
    assert all(run == runs[0] for run in runs)


def test_precision_is_the_callers_autocast(monkeypatch):
    """Answers in bf16 are those of a model whose products are rounded, in a cache of half the size."""
    model = make_model(V, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert Decoder(model).vocabulary.dtype == KVCache(model, 1, 1).keys[0].dtype == torch.bfloat16
    assert Decoder(model).vocabulary.dtype == KVCache(model, 1, 1).keys[0].dtype == torch.float32


def test_a_window_refuses_a_longer_text():
    model = make_model(V, sliding_window=8)
    assert len(generate(model, [[1, 2, 3]], END, 5, temperature=0)) == 1
    with pytest.raises(InputError, match="9 tokens do not fit"):
        generate(model, [[1, 2, 3]], END, 6)
