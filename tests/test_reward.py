"""The reward model: what it reads, what its loss is, and how it trains."""

import json
import math

import numpy as np
import pytest
import torch

import train_reward
from dataset.packing import LAYOUTS, Windows, build_stream
from dataset.store import open_store
from errors import InputError
from losses import bradley_terry_loss
from model.reward import RewardModel
from model.stream import sides
from model.transformer import Transformer
from model.weights import load_model, save_model
from tests.conftest import MODEL_OPTIONS, RAGGED, as_record, make_model, plain_hidden, plain_ids, save_folder
from tests.loops import metrics, record_gradients, weights
from tests.ranks import forked
from tests.runs import assert_close
from training.distributed import World
from training.evaluate import score_pairs
from training.precision import Precision
from training.schedule import adamw
from training.settings import SAMPLE

RECORDS = [as_record(pair) for pair in RAGGED]


def make_reward_model(vocab_size: int, dtype=torch.float64, seed=0, **options) -> RewardModel:
    """A random body, and a head that is no longer zeros."""
    model = RewardModel.from_language_model(make_model(vocab_size, torch.float64, seed, **options))
    with torch.no_grad():
        model.score.weight.normal_(generator=torch.Generator().manual_seed(seed))
    return model.to(dtype)


@pytest.fixture
def pairs(tokenizer, ragged):
    return open_store(ragged, "preferences", tokenizer, 512)


# ---- The model


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("option", MODEL_OPTIONS)
def test_rewards_equal_brute_force(option, layout, tokenizer, pairs):
    """Read one token off, at the end of the prompt or of the other side, a reward still learns something."""
    model = make_reward_model(tokenizer.vocab_size, **MODEL_OPTIONS[option])
    with torch.no_grad():
        got = torch.stack(sides(model(build_stream(pairs, range(len(pairs)), layout))), dim=1)
        for row, (prompt, *answers) in enumerate(RAGGED):
            for side, answer in enumerate(answers):
                before, response = plain_ids(tokenizer, prompt, answer)
                hidden = plain_hidden(model, before + response)
                expected = sum(h * w for h, w in zip(hidden[-1], model.score.weight[0], strict=True))
                torch.testing.assert_close(got[row, side], expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_last_tokens_are_end_tokens(layout, tokenizer, pairs):
    """Also of an answer of one token, whose predictor stands in the prompt; and none of no answers."""
    stream = build_stream(pairs, range(len(pairs)), layout)
    last = stream.last_tokens()
    assert len(last) == stream.responses == 2 * len(pairs)
    assert (stream.tokens[last] == tokenizer.end_id).all()
    for response, place in enumerate(last.tolist()):
        assert place == stream.predictors[stream.owners == response].max() + 1

    class OnePair:
        reference_logps = score_margins = None

        def row(self, index):
            prompt, yes = np.array([5, 6, 7]), np.ones(1, bool)
            return [(prompt, np.zeros(3, bool)), (np.array([8]), yes), (np.array([9]), yes)]

    short = build_stream(OnePair(), [0, 0], layout)
    assert short.tokens[short.last_tokens()].tolist() == [8, 9, 8, 9]
    assert build_stream(pairs, [], layout).last_tokens().tolist() == []


@pytest.mark.parametrize("tied", [True, False])
def test_a_fresh_reward_model_is_the_language_models_body(tied, tokenizer, pairs):
    """All weights, not copied, but the vocabulary matrix, which no gradient would reach; all rewards 0."""
    language = make_model(tokenizer.vocab_size, tie_word_embeddings=tied)
    model = RewardModel.from_language_model(language)
    body = {name: value for name, value in language.state_dict().items() if name != "lm_head.weight"}
    assert set(model.state_dict()) == {*body, "score.weight"}
    assert all(model.state_dict()[name].data_ptr() == value.data_ptr() for name, value in body.items())
    stream = build_stream(pairs, [0, 1])
    rewards = model(stream)
    assert rewards.dtype == torch.float64 and not rewards.any()
    bradley_terry_loss(*sides(rewards)).sum().backward()
    assert all(p.grad is not None for p in model.parameters()) and model.score.weight.grad.any()


def test_rewards_are_float32_under_autocast(tokenizer, pairs):
    """In bf16 there are 256 numbers between 1 and 2 and many pairs would tie."""
    model = make_reward_model(tokenizer.vocab_size, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        rewards = model(build_stream(pairs, range(len(pairs))))
    assert rewards.dtype == torch.float32
    assert (rewards != rewards.bfloat16().float()).any()


def test_folders_tell_what_they_hold(tmp_path, tokenizer):
    """A reward model that is asked to speak, or a language model to judge, would load all but one matrix."""
    language = make_model(tokenizer.vocab_size, torch.float32)
    reward = make_reward_model(tokenizer.vocab_size, torch.float32)
    save_model(tmp_path / "language", language)
    save_model(tmp_path / "reward", reward)
    again = load_model(tmp_path / "reward", model_class=RewardModel)
    assert all(torch.equal(again.state_dict()[name], value) for name, value in reward.state_dict().items())
    with pytest.raises(InputError, match="reward contains a reward model, not a language model"):
        load_model(tmp_path / "reward")
    with pytest.raises(InputError, match="language contains a language model, not a reward model"):
        load_model(tmp_path / "language", model_class=RewardModel)
    # Folders that were written before there were reward models hold language models.
    config = json.loads((tmp_path / "language" / "config.json").read_text())
    del config["kind"]
    (tmp_path / "language" / "config.json").write_text(json.dumps(config))
    assert type(load_model(tmp_path / "language")) is Transformer


# ---- The loss


def test_loss_is_its_closed_form():
    """log(1 + exp(-d)), with slope -sigmoid(-d) in the chosen and +sigmoid(-d) in the rejected reward."""
    chosen = torch.tensor([0.0, 2.0, -1.0, 0.3], dtype=torch.float64, requires_grad=True)
    rejected = torch.tensor([0.0, -1.0, 1.5, 0.2], dtype=torch.float64, requires_grad=True)
    losses = bradley_terry_loss(chosen, rejected)
    difference = (chosen - rejected).detach()
    torch.testing.assert_close(losses.detach(), (1 + (-difference).exp()).log(), rtol=0, atol=1e-12)
    losses.sum().backward()
    slope = 1 / (1 + difference.exp())
    torch.testing.assert_close(chosen.grad, -slope, rtol=0, atol=1e-12)
    torch.testing.assert_close(rejected.grad, slope, rtol=0, atol=1e-12)
    assert torch.autograd.gradcheck(bradley_terry_loss, (chosen, rejected))
    # Bradley-Terry: exp(-loss) and exp(-loss of the swapped pair) are the two probabilities of one choice.
    swapped = bradley_terry_loss(rejected, chosen)
    torch.testing.assert_close((-losses).exp() + (-swapped).exp(), torch.ones_like(losses))
    torch.testing.assert_close(bradley_terry_loss(chosen + 7, rejected + 7), losses)


def test_loss_is_finite_at_the_extremes():
    d = torch.tensor([-1e4, 0.0, 1e4], requires_grad=True)
    losses = bradley_terry_loss(d, torch.zeros(3))
    losses.sum().backward()
    assert losses.tolist() == [1e4, pytest.approx(math.log(2)), 0] and d.grad.tolist() == [-1, -0.5, 0]


# ---- The loop


@pytest.fixture
def start(tmp_path, tokenizer):
    """A folder with a tiny random language model, its head not tied, and its tokenizer."""
    model = make_model(tokenizer.vocab_size, torch.float32, hidden_size=32, tie_word_embeddings=False)
    save_folder(tmp_path / "start", tokenizer, model)
    return tmp_path / "start"


@pytest.fixture
def arguments(start, ragged):
    """The flags of a run on the seven ragged pairs; the last of a flag counts."""

    def build(*more, out="reward") -> list[str]:
        fixed = ["--device", "cpu", "--precision", "fp32", "--eval-data", "", "--log-every", "1"]
        paths = ["--model", str(start), "--data", str(ragged), "--out", str(start.parent / out)]
        return [*paths, *fixed, "--overwrite", *map(str, more)]

    return build


@pytest.fixture
def trained(start, arguments):
    """A folder with a reward model whose head is not zeros."""
    train_reward.main(arguments("--batch-size", 3, "--epochs", 2))
    return start.parent / "reward"


def steps_of(flags) -> list:
    return record_gradients(train_reward, lambda: train_reward.main(flags))


@pytest.mark.parametrize("micro", [1, 200])
def test_accumulation_equals_one_big_batch(micro, arguments):
    """Windows of 5 and 2 pairs, whole, in forwards of 200 tokens, or pair by pair."""
    flags = ["--batch-size", 5, "--epochs", 2, "--lr", 1e-3, "--warmup-steps", 0]
    whole = steps_of(arguments(*flags, "--micro-batch-tokens", 500, out="whole"))
    assert len(whole) == 4
    split = steps_of(arguments(*flags, "--micro-batch-tokens", micro, out="split"))
    assert_close(split, whole, tolerance=2e-4)


def test_a_step_is_the_mean_over_its_window(trained, start, arguments, tokenizer, pairs):
    """The last short window divides by its own 2 pairs, and its gradient is that of the loss as written."""
    steps = steps_of(arguments("--batch-size", 5, "--lr", 0, out="still"))
    model = RewardModel.from_language_model(load_model(start))
    losses = bradley_terry_loss(*sides(model(build_stream(pairs, Windows(7, 5, 0)[1]))))
    assert len(losses) == 2
    losses.mean().backward()
    wanted = [p.grad for group in adamw(model, 0).param_groups for p in group["params"]]
    assert_close(steps[1:], [wanted])


def test_two_ranks_equal_one_process(start, arguments):
    """Windows of 3 over 2 ranks are uneven, the last one holds a single pair; no weight is left idle."""
    flags = arguments("--batch-size", 3, "--micro-batch-tokens", 1, "--epochs", 2, "--warmup-steps", 1)
    flags += ["--eval-data", flags[flags.index("--data") + 1]]
    alone, two = steps_of(flags), start.parent / "two"
    target = start.parent / "two.pt"
    result = forked("tests.loops", "train_reward", target, *flags, "--out", two, ranks=2)
    assert result.returncode == 0, result.stderr
    assert_close(torch.load(target, weights_only=True), alone, tolerance=5e-4)
    for one, other in zip(metrics(start.parent / "reward"), metrics(two), strict=True):
        for name in ("loss", "eval_loss", "rewards/margins", "eval_rewards/accuracies"):
            assert (name in other) == (name in one)
            assert other.get(name, 0) == pytest.approx(one.get(name, 0), rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_starts_at_ln_2_with_ties_and_saves_what_it_trained(precision, start, arguments):
    train_reward.main(arguments("--epochs", 40, "--batch-size", 7, "--lr", 3e-3, "--precision", precision))
    rows = metrics(start.parent / "reward")
    assert rows[0]["loss"] == pytest.approx(math.log(2), abs=1e-7)
    assert rows[0]["rewards/accuracies"] == 0.5 and rows[0]["rewards/margins"] == 0
    assert rows[-1]["loss"] < 0.1 and rows[-1]["rewards/accuracies"] == 1
    saved = weights(start.parent / "reward")
    assert "lm_head.weight" not in saved
    before = weights(start)
    assert all(not torch.equal(saved[name], before[name]) for name in saved if name != "score.weight")


def test_learns_the_bundled_preferences(tmp_path):
    """From random weights, a few steps are enough to tell manners apart in pairs that it never saw."""
    torch.manual_seed(0)
    tokenizer = train_reward.ChatTokenizer(SAMPLE / "tokenizer.json")
    save_folder(tmp_path / "start", tokenizer, spread=0, hidden_size=64)
    folders = ["--model", str(tmp_path / "start"), "--out", str(tmp_path / "out")]
    how = ["--max-steps", "40", "--lr", "3e-3", "--device", "cpu", "--precision", "fp32"]
    train_reward.main([*folders, *how])
    held_out = [row for row in metrics(tmp_path / "out") if "eval_loss" in row]
    assert held_out[0]["eval_rewards/accuracies"] == 0.5
    assert held_out[-1]["eval_rewards/accuracies"] > 0.75 and held_out[-1]["eval_loss"] < 0.55


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("count", [1, 2, 5, 7])
def test_every_pair_is_scored_once_on_any_ranks(count, ranks, tokenizer, write_jsonl):
    """What the ranks add up is the score of each pair by one of them and zeros by the others."""
    store = open_store(write_jsonl("pairs.jsonl", RECORDS[:count]), "preferences", tokenizer, 512)
    model = make_reward_model(tokenizer.vocab_size)

    class OneOfMany(World):
        def sum(self, values):
            return values

    cpu = torch.device("cpu")
    precision = Precision("fp32", cpu)
    worlds = [OneOfMany(rank, ranks, cpu) for rank in range(ranks)]
    parts = [score_pairs(model, store, world, precision, "forked", 100) for world in worlds]
    parts = torch.stack(parts)
    assert (parts != 0).sum(dim=0).eq(1).all()
    with torch.no_grad():
        expected = torch.stack(sides(model(build_stream(store, range(count)))), dim=1)
    torch.testing.assert_close(parts.sum(dim=0), expected)
