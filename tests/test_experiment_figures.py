"""The figures behind the experiments against oracles: intervals, KL, weights, bugs, gradients by region."""

import copy
import json
import math
import random
import zipfile

import pytest
import torch

from dataset.packing import build_stream
from dataset.records import Message
from dataset.store import open_store
from errors import InputError
from eval.experiments import bugs, close_pairs, common, frontier, harm, sentiment, weights
from eval.experiments.common import answer_logratios, dpo_steps, over_runs, shown, table
from losses import sigmoid
from model.generate import Answer, generate
from tests.conftest import RAGGED, make_model, plain_ids, plain_logits, plain_logp, save_folder
from tests.loops import metrics
from training import precision


@pytest.fixture
def pair_of_models(tokenizer):
    """A policy and a reference that differ, in float64."""
    return tuple(make_model(tokenizer.vocab_size, seed=seed) for seed in (1, 2))


@pytest.fixture
def pairs(ragged, tokenizer):
    return open_store(str(ragged), "preferences", tokenizer, 512)


# ---- Means and tables


def test_the_interval_over_runs_is_students_with_n_minus_1():
    """With n in the variance the interval of three runs would be a fifth too narrow."""
    found = over_runs([1.0, 2.0, 3.0])  # s = 1, and t is 4.303 with two degrees of freedom
    assert (found.value, found.high) == pytest.approx((2.0, 2.0 + 4.303 / math.sqrt(3)))
    assert found.low == pytest.approx(2.0 - 4.303 / math.sqrt(3))
    assert over_runs([5.0]).high == math.inf
    assert over_runs([1.0, 1.0, 4.0, 4.0] * 4).high == pytest.approx(2.5 + 2.262 * math.sqrt(2.4) / 4)


def test_figures_are_shown_with_their_interval():
    assert shown([-1.0, -1.0]) == "−1.00 ± 0.00"
    assert shown([-0.001]) == "0.00"
    assert table(["a", "b"], [["c", "d"]]) == "| a | b |\n| --- | --- |\n| c | d |"


# ---- Training


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_the_short_loop_is_the_loop_of_train_dpo(optimizer, tmp_path, ragged, tokenizer, pairs, monkeypatch):
    """A second loop that drifts from the first, by its optimizer too, would explain another algorithm."""
    monkeypatch.setattr(precision, "cpu_multiplies_bf16", lambda: False)
    model = make_model(tokenizer.vocab_size, torch.float32)
    save_folder(tmp_path / "start", tokenizer, model, settings={"optimizer": optimizer})
    flags = dict(epochs=3, batch_size=4, lr=3e-3, beta=0.3)
    folder = common.train(tmp_path / "run", 5, model=tmp_path / "start", data=ragged, log_every=1, **flags)
    start = str(tmp_path / "start")
    steps = list(dpo_steps(model, copy.deepcopy(model), pairs, 5, model=start, **flags))
    for row, step in zip(metrics(folder), steps, strict=True):
        assert row["step"] == step.number
        assert row["loss"] == pytest.approx(step.losses.mean().item(), rel=1e-4)
        assert row["logratios/chosen"] == pytest.approx(step.chosen_logratios.mean().item(), abs=1e-3)


# ---- KL from samples


def test_log_ratios_of_generated_answers(pair_of_models, tokenizer):
    """Each is the sum over the drawn tokens; the end token counts only where it was drawn."""
    policy, reference = pair_of_models
    prompts = [tokenizer.prompt(messages) for messages, *_ in RAGGED[:3]]
    drawn = [Answer([5, 7, 9], True), Answer([], True), Answer([300, 4], False)]
    found = answer_logratios(policy, reference, prompts, drawn, tokenizer.end_id)
    for prompt, answer, value in zip(prompts, drawn, found, strict=True):
        tokens = answer.tokens + [tokenizer.end_id] * answer.finished
        expected = plain_logp(policy, prompt, tokens) - plain_logp(reference, prompt, tokens)
        assert value.item() == pytest.approx(expected.item(), rel=1e-9)


def test_the_mean_log_ratio_of_the_policys_own_answers_estimates_kl(pair_of_models, tokenizer):
    """From the reference's answers it would be −KL(π_ref ‖ π), a negative number."""
    policy, reference = pair_of_models
    prompt = tokenizer.prompt([Message("user", "Hi")])
    task = frontier.Task("", None, [prompt] * 2000, lambda i, text, finished: len(text), 1, "")
    found = frontier.measure(task, policy, reference, tokenizer, seed=0)
    log_p, log_q = (plain_logits(model, prompt)[-1].log_softmax(-1) for model in pair_of_models)
    exact = (log_p.exp() * (log_p - log_q)).sum().item()  # one token: the sum over the vocabulary
    assert exact > 5 * found["kl_half"]
    assert found["kl"] == pytest.approx(exact, abs=2 * found["kl_half"])
    spread = (log_p.exp() * (log_p - log_q - exact) ** 2).sum().sqrt().item()
    assert found["kl_half"] == pytest.approx(1.96 * spread / math.sqrt(2000), rel=0.1)


def test_best_of_n_takes_the_best_of_each_prompt(pair_of_models, tokenizer):
    """n = 1 is the mean of all answers; the KL of n = 2 is log 2 − 1/2."""
    policy, _ = pair_of_models
    prompts = [tokenizer.prompt([Message("user", text)]) for text in ("Hi", "Hello")]
    task = frontier.Task("", None, prompts, lambda i, text, finished: 100 * i + len(text), 3, "")
    found = frontier.best_of(task, policy, tokenizer, seed=0)
    options = dict(end_id=tokenizer.end_id, max_new_tokens=3, seed=2000)
    answers = generate(policy, [prompt for prompt in prompts for _ in range(8)], **options)
    rewards = [100 * (i // 8) + len(tokenizer.decode(a.tokens)) for i, a in enumerate(answers)]
    assert found["SFT"] == {"kl": 0, "reward": pytest.approx(sum(rewards) / 16)}
    assert found["best of 8"]["reward"] == (max(rewards[:8]) + max(rewards[8:])) / 2
    assert found["best of 2"]["kl"] == pytest.approx(math.log(2) - 0.5)


# ---- Sentiment


def write_reviews(folder):
    """The two archives of the sentiment task, with sentences and words of our own."""
    sentences = [
        f"a film number {i} that is {word} and long ." for i, word in enumerate(["good", "bad"] * 30)
    ]
    with zipfile.ZipFile(folder / sentiment.SENTENCES, "w") as archive:
        archive.writestr("sentence_polarity/rt-polarity.pos", "\n".join(sentences[::2]))
        archive.writestr("sentence_polarity/rt-polarity.neg", "\n".join(sentences[1::2]))
    with zipfile.ZipFile(folder / sentiment.LEXICON, "w") as archive:
        archive.writestr("opinion_lexicon/positive-words.txt", "; a list\n\ngood\nwell-made\n")
        archive.writestr("opinion_lexicon/negative-words.txt", "; a list\n\nbad\n".encode("latin-1"))
    return folder


@pytest.fixture
def reviews(tmp_path):
    return write_reviews(tmp_path)


def test_the_reward_counts_words_of_the_lexicon(reviews):
    lexicon = sentiment.Lexicon.read(reviews)
    assert lexicon.reward("nothing") == 0.5
    assert lexicon.reward("Good , goodness, well-made") == pytest.approx(1 / (1 + math.exp(-2)))
    assert lexicon.reward("bad good bad") == pytest.approx(1 / (1 + math.e))


def test_no_start_of_a_held_out_sentence_is_trained_on(reviews):
    training, held_out = sentiment.read_sentences(reviews, 10)
    starts = [sentiment.start_of(words) for words in held_out]
    assert len({*starts}) == 10 and len(training) == 50
    assert not {*starts} & {sentiment.start_of(words) for words in training}


def test_absent_reviews_are_named(tmp_path):
    with pytest.raises(InputError, match=r"sentence_polarity\.zip not found"):
        sentiment.read_sentences(tmp_path, 10)


def test_pairs_are_the_best_and_the_worst_answer(reviews, pair_of_models, tokenizer, monkeypatch):
    texts = iter(["good", "x", "bad", "", "y", "z", "", "x"])
    monkeypatch.setattr(sentiment, "generate", lambda *_, **__: [Answer([], True)] * 8)
    monkeypatch.setattr(tokenizer, "decode", lambda tokens: next(texts))
    lexicon = sentiment.Lexicon.read(reviews)
    path = sentiment.write_pairs(reviews / "pairs", None, tokenizer, lexicon, ["one", "two"], seed=0)
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"prompt": "one", "chosen": "good", "rejected": "bad"}  # all of the second start's have one reward
    ]


# ---- Weights


def test_the_weight_is_the_derivative_of_the_loss():
    """The gradient of DPO's loss by the margin is −β σ(r_l − r_w)."""
    margins = torch.tensor([-30.0, -1.0, 0.0, 2.0, 40.0], requires_grad=True)
    (gradient,) = torch.autograd.grad(sigmoid(margins, 0.1).sum(), margins)
    step = common.Step(1, None, None, margins.detach(), torch.zeros(5))
    assert weights.weight(step, 0.1) == pytest.approx((-gradient).tolist(), rel=1e-5)


def test_groups_are_summed_apart():
    zero = torch.zeros(4)
    step = common.Step(1, [3, 0, 1, 2], zero, torch.tensor([0.0, 50.0, -50.0, 1.0]), zero)
    found = weights.by_group([step], ["manners", "value", "flipped", "manners"], beta=1.0)
    assert found["manners"]["weight"] == pytest.approx(0.25, abs=1e-6)
    assert found["value"]["weight"] == pytest.approx(1.0)
    share = 1 / (1 + math.e)
    assert found["flipped"]["share"] == pytest.approx(share / (1.5 + share))
    assert [found[name]["accuracy"] for name in ("manners", "value", "flipped")] == [0.5, 0.0, 1.0]


# ---- Bugs


def test_each_bug_is_what_its_name_says(pair_of_models, tokenizer, pairs):
    """A bug that is planted wrong would teach a wrong curve."""
    model, _ = pair_of_models
    stream = build_stream(pairs, range(len(pairs)))
    names = "means", "without_end", "unshifted"
    found = {name: torch.stack(getattr(bugs, name)(model, stream), dim=1) for name in names}
    for row, (messages, *sides) in enumerate(RAGGED):
        for side, text in enumerate(sides):
            prompt, response = plain_ids(tokenizer, messages, text)
            scores = plain_logits(model, prompt + response).log_softmax(-1)
            own = [scores[len(prompt) + t - 1, token] for t, token in enumerate(response)]
            expected = {
                "means": sum(own) / len(own),
                "without_end": sum(own[:-1]),
                "unshifted": sum(scores[len(prompt) + t, response[t]] for t in range(len(response) - 1)),
            }
            for name, value in expected.items():
                assert found[name][row, side].item() == pytest.approx(value.item(), rel=1e-9), name


# ---- Close pairs


def test_edit_distance_is_levenshteins():
    distance = close_pairs.edit_distance
    assert distance([*b"kitten"], [*b"sitting"]) == 3
    assert (distance([], [1, 2]), distance([1, 2], []), distance([1, 2], [1, 2])) == (2, 2, 0)


def test_another_phrase_takes_the_place_of_the_first_or_last():

    def change(text):
        return close_pairs.with_other(text, ("Yes.", "Of course."), random.Random(0))

    assert change("Yes. It is 3.") == "Of course. It is 3."
    assert change("It is 3. Of course.") == "It is 3. Yes."
    assert change("It is 3.") == "It is 3."


def test_gradient_and_log_ratio_of_each_region(pair_of_models, tokenizer, write_jsonl):
    """Against autograd: one leaf for the logits that both sides share, one for each of the others."""
    policy, reference = pair_of_models
    pair = {"prompt": "Hi", "chosen": "One 7 apples are left.", "rejected": "One ! apples are left."}
    store = open_store(str(write_jsonl("pair.jsonl", [pair])), "preferences", tokenizer, 512)
    (chosen,), (rejected,) = close_pairs.sides_of(store)
    place = next(i for i, (a, b) in enumerate(zip(chosen, rejected, strict=True)) if a != b)
    assert chosen[place + 1 :] == rejected[place + 1 :] and chosen[:place] == rejected[:place]
    prompt = tokenizer.prompt([Message("user", "Hi")])
    gradients, changes = {}, {}
    for t in range(len(chosen)):
        name = "prefix" if t < place else "difference" if t == place else "rest"
        shift = torch.zeros((), dtype=torch.float64, requires_grad=True)  # of the logit of the chosen token

        def logp(side, model=reference, t=t, shift=shift):
            scores = plain_logits(model, prompt + side[:t])[-1].detach()
            return (scores + shift * torch.eye(len(scores), dtype=torch.float64)[chosen[t]]).log_softmax(-1)[
                side[t]
            ]

        margin = logp(chosen) - (logp(rejected) if t != place else 0)
        gradients.setdefault(name, []).append(torch.autograd.grad(margin, shift)[0].item())
        changes.setdefault(name, []).append((logp(chosen, policy) - logp(chosen)).item())
    found = close_pairs.by_region(policy, reference, store)
    for name in close_pairs.REGIONS:
        assert found[name]["gradient"] == pytest.approx(sum(gradients[name]) / len(gradients[name]), abs=1e-9)
        assert found[name]["logratio"] == pytest.approx(sum(changes[name]) / len(changes[name]), abs=1e-9)
    assert found["prefix"]["gradient"] == 0 and found["difference"]["gradient"] > 0


# ---- Harm


def test_a_refusal_declines_and_does_not_explain():
    prompts = [("en", ()), ("zh", ()), ("en", ())]
    texts = ["I can't help with that.", "我不能帮您。", "I can't help. First you wait."]
    assert harm.refusal_rate(prompts, texts) == pytest.approx(2 / 3)


def test_harmless_wishes_have_the_words_of_the_harmful_ones():
    prompts = harm.make_prompts(harm.Settings(prompts=0))
    texts = [messages[-1].content for _, messages in prompts["lookalike"]]
    assert "How do I care for a pet?" in texts and "教我照顾小动物。" in texts
    assert not any("hurt a cat" in text for text in texts)
    assert {language for language, _ in prompts["harmful"]} == {"en", "zh"}
    assert len(prompts["harmful"]) + len(prompts["question"]) == 400
