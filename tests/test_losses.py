"""The objective: by hand, by its gradient, at its extremes, and through a whole tiny model."""

import copy
import math

import pytest
import torch

from dataset.packing import LAYOUTS, build_stream
from dataset.store import open_store
from tests.conftest import RAGGED, as_record, make_model, turns
from training.evaluate import evaluate, evaluate_sft
from training.objective import Objective, ObjectiveSettings, Pairs, pair_metrics
from training.precision import Precision

DPO = Objective(ObjectiveSettings(beta=0.1))
LN_2 = 0.6931471824645996  # The float32 that is nearest to ln 2.


def numbers(*values: float, dtype=torch.float64) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype)


def dpo_loss(*inputs) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The default objective of four sums and beta, and the rewards that it logs of each pair, (B,) each."""
    *logps, beta = inputs
    losses = Objective(ObjectiveSettings(beta=beta))(Pairs(*logps))
    logged = [pair_metrics(loss, Pairs(*pair), beta) for loss, *pair in zip(losses, *logps, strict=True)]
    return losses, *(torch.stack([m[f"rewards/{side}"] for m in logged]) for side in ("chosen", "rejected"))


def loss_of_margin(z, beta: float) -> torch.Tensor:
    """The loss where the log-ratios of the two sides differ by z."""
    zero = torch.zeros_like(z)
    return dpo_loss(z, zero, zero, zero, beta)[0]


# ---- By hand


def test_loss_by_hand():
    """Round numbers: a reference left out, a sign turned or a beta forgotten changes each of them.

    The policy gains ln 2 on the chosen side and loses ln 4 on the rejected one, so z = 3 ln 2. With beta 1
    the loss is -ln(8 / 9), and the rewards are ln 2 and -2 ln 2. The second pair is the mirror image.
    """
    gain = math.log(2)
    policy = numbers(-10 + gain, -30), numbers(-20 - 2 * gain, -7 + 3 * gain)
    reference = numbers(-10, -30), numbers(-20, -7)
    losses, chosen, rejected = dpo_loss(*policy, *reference, 1.0)
    torch.testing.assert_close(losses, numbers(math.log(9 / 8), math.log(9)))
    torch.testing.assert_close(chosen, numbers(gain, 0.0))
    torch.testing.assert_close(rejected, numbers(-2 * gain, 3 * gain))
    losses, chosen, rejected = dpo_loss(*policy, *reference, 1 / 3)
    torch.testing.assert_close(losses, numbers(math.log(3 / 2), math.log(3)))
    torch.testing.assert_close(rejected, numbers(-2 * gain / 3, gain))


def test_rewards_carry_no_gradient():
    """They are figures for a log; a gradient through them would be a second objective."""
    inputs = [numbers(-1.0, -2.0).requires_grad_() for _ in range(4)]
    losses = Objective(ObjectiveSettings())(Pairs(*inputs))
    metrics = pair_metrics(losses, Pairs(*inputs), beta=0.1)
    assert losses.requires_grad and not any(value.requires_grad for value in metrics.values())


def test_swapping_the_sides_turns_the_margin():
    """L(z) - L(-z) = -beta z, pair by pair: what mixes up the sides or the rows of a batch breaks it."""
    torch.manual_seed(0)
    a, b, c, d = 10 * torch.randn(4, 5, dtype=torch.float64)
    loss, chosen, rejected = dpo_loss(a, b, c, d, 0.3)
    swapped, *rewards = dpo_loss(b, a, d, c, 0.3)
    z = (a - c) - (b - d)
    torch.testing.assert_close(loss - swapped, -0.3 * z, rtol=0, atol=1e-12)
    assert torch.equal(rewards[0], rejected) and torch.equal(rewards[1], chosen)
    order = torch.tensor([3, 1, 4, 0, 2])
    assert torch.equal(dpo_loss(a[order], b[order], c[order], d[order], 0.3)[0], loss[order])


# ---- Its derivative


def test_gradient_is_minus_beta_sigmoid():
    """d L / d log pi(y_w) = -beta sigmoid(-beta z), and the opposite for y_l (eq. 7 of the paper derived)."""
    chosen, rejected = (numbers(*v).requires_grad_() for v in ((-9.0, -4.0, -1.0), (-5.0, -8.0, -1.0)))
    dpo_loss(chosen, rejected, numbers(-8, -8, -1), numbers(-8, -8, -1), 0.5)[0].sum().backward()
    z = chosen.detach() - rejected.detach()
    torch.testing.assert_close(chosen.grad, -0.5 / (1 + (0.5 * z).exp()))
    torch.testing.assert_close(rejected.grad, 0.5 / (1 + (0.5 * z).exp()))


def test_gradcheck():
    """Finite differences in each of the four log-probs, in float64."""
    torch.manual_seed(0)
    inputs = [torch.randn(4, dtype=torch.float64, requires_grad=True) for _ in range(4)]
    assert torch.autograd.gradcheck(lambda *logps: dpo_loss(*logps, 0.7)[0], inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extremes_are_finite(dtype):
    """log(sigmoid(z)) is -inf from z = -800 on, its gradient NaN; the loss of a lost pair is -beta z."""
    z = numbers(-1e4, -200.0, 0.0, 200.0, 1e4, dtype=dtype).requires_grad_()
    losses = loss_of_margin(z, 1.0)
    losses.sum().backward()
    torch.testing.assert_close(losses.detach(), numbers(1e4, 200.0, math.log(2), 0.0, 0.0, dtype=dtype))
    torch.testing.assert_close(z.grad, numbers(-1.0, -1.0, -0.5, 0.0, 0.0, dtype=dtype))


def test_a_larger_beta_lets_go_of_won_pairs_sooner():
    """A larger beta is a shorter leash: it pulls more at the start, and less once a pair is won."""
    for margin, smaller_pulls_more in ((0.0, False), (1.0, False), (60.0, True)):
        pulls = []
        for beta in (0.1, 0.5):
            z = numbers(margin).requires_grad_()
            loss_of_margin(z, beta).sum().backward()
            pulls.append(-z.grad.item())
        assert (pulls[0] > pulls[1]) == smaller_pulls_more, margin


def test_metrics_are_sums_and_a_tie_is_half():
    """A tie counted as a win makes step 0 look perfect, as a loss hopeless; it is neither."""
    policy = numbers(-1, -2, -3), numbers(-4, -5, -6)
    reference = numbers(-7, -12, -17), numbers(-10, -17, -8)
    metrics = pair_metrics(numbers(1, 2, 4), Pairs(*policy, *reference), beta=0.5)
    assert {name: value.item() for name, value in metrics.items()} == {
        "loss": 7.0,
        "rewards/chosen": 15.0,
        "rewards/rejected": 10.0,
        "rewards/accuracies": 1.5,
        "rewards/margins": 5.0,
        "logratios/chosen": 30.0,
        "logratios/rejected": 20.0,
        "logratios/margins": 10.0,
        "logps/chosen": -6.0,
        "logps/rejected": -15.0,
    }


# ---- Through a whole tiny model


@pytest.fixture
def stream(tokenizer, ragged):
    def build(layout="forked", rows=range(7)):
        return build_stream(open_store(ragged, "preferences", tokenizer, max_length=512), rows, layout)

    return build


def dpo_of(policy, reference, stream, beta: float):
    """The four sums as the training loop makes them, and the losses."""
    with torch.no_grad():
        reference_sums = stream.sum_by_side(reference(stream))
    return dpo_loss(*stream.sum_by_side(policy(stream)), *reference_sums, beta)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_loss_is_exactly_ln_2_before_the_first_step(layout, precision, tokenizer, stream):
    """Equal models say equal things to the last bit, so the margin is 0, not nearly 0, in bf16 too.

    A loss of 0.6914 says that something was computed in bf16, any other that the two models saw different
    things. The gradient must not be zero all the same.
    """
    policy = make_model(tokenizer.vocab_size, dtype=torch.float32, spread=0.1)
    reference = copy.deepcopy(policy)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        losses, chosen, rejected = dpo_of(policy, reference, stream(layout), 0.1)
    assert losses.dtype == chosen.dtype == torch.float32
    assert losses.tolist() == [LN_2] * 7
    assert not chosen.any() and not rejected.any()
    losses.mean().backward()
    assert all(parameter.grad.any() for parameter in policy.parameters())


def flat_gradient(loss, model) -> torch.Tensor:
    return torch.cat([grad.flatten() for grad in torch.autograd.grad(loss, list(model.parameters()))])


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


def test_gradient_identity_at_the_start(tokenizer, stream):
    """grad L = -(beta / 2) mean(grad log pi(y_w) - grad log pi(y_l)) while the policy is the reference.

    A beta that scales only the rewards, a sum for a mean, sides that are split wrongly: all start at ln 2.
    """
    model, batch = make_model(tokenizer.vocab_size), stream()
    loss = dpo_of(model, copy.deepcopy(model), batch, 0.3)[0].mean()
    chosen, rejected = batch.sum_by_side(model(batch))
    expected = -0.3 / 2 * flat_gradient((chosen - rejected).mean(), model)
    assert relative(flat_gradient(loss, model), expected) < 1e-10


def test_gradient_identity_later_on(tokenizer, stream):
    """Away from the start each pair is weighted by sigmoid(-beta z): what is already won is left alone."""
    model, reference = make_model(tokenizer.vocab_size), make_model(tokenizer.vocab_size, seed=1)
    batch = stream()
    losses, chosen_rewards, rejected_rewards = dpo_of(model, reference, batch, 0.5)
    weights = torch.sigmoid(rejected_rewards - chosen_rewards)
    assert weights.min() < 0.45 and weights.max() > 0.6  # The pairs differ, or this would be the test above.
    chosen, rejected = batch.sum_by_side(model(batch))
    expected = -0.5 * flat_gradient((weights * (chosen - rejected)).mean(), model)
    assert relative(flat_gradient(losses.mean(), model), expected) < 1e-10


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradient_equals_finite_differences(layout, tokenizer, stream):
    """The slope of the loss along random directions through all weights, from values alone."""
    model, reference = make_model(tokenizer.vocab_size), make_model(tokenizer.vocab_size, seed=1)
    batch, h = stream(layout, [0, 2, 3]), 1e-5

    def loss() -> torch.Tensor:
        return dpo_of(model, reference, batch, 0.3)[0].mean()

    gradient = flat_gradient(loss(), model)
    parameters = list(model.parameters())
    start = torch.nn.utils.parameters_to_vector(parameters).detach()
    # The gradient's own direction has the largest slope; another one must agree as well.
    for seed in (None, 1):
        direction = gradient.clone()
        if seed:
            direction *= torch.rand(len(gradient), generator=torch.Generator().manual_seed(seed)).double()
        direction /= direction.norm()
        values = []
        for sign in (1, -1):
            torch.nn.utils.vector_to_parameters(start + sign * h * direction, parameters)
            with torch.no_grad():
                values.append(loss().item())
        torch.nn.utils.vector_to_parameters(start, parameters)
        slope = (values[0] - values[1]) / (2 * h)
        assert slope == pytest.approx((gradient @ direction).item(), rel=1e-6)


def test_one_step_raises_the_margin(tokenizer, stream):
    """The direction: after a small step the chosen answers are likelier, relative to the rejected ones."""
    model, batch = make_model(tokenizer.vocab_size), stream()
    reference = copy.deepcopy(model)
    dpo_of(model, reference, batch, 0.1)[0].mean().backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter -= 1e-4 * parameter.grad
        losses, chosen, rejected = dpo_of(model, reference, batch, 0.1)
    assert losses.mean() < math.log(2) and (chosen - rejected).mean() > 0


# ---- Over ranks


class OneOfMany:
    """A rank among others that are not there: it notes what it would add up with them."""

    def __init__(self, rank: int, ranks: int):
        self.rank, self.ranks, self.device, self.noted = rank, ranks, torch.device("cpu"), []

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        self.noted.append(values.clone())
        return torch.ones_like(values)


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("count", [1, 2, 5, 7])
def test_evaluation_counts_every_pair_once_on_any_ranks(count, ranks, tokenizer, write_jsonl):
    """Samplers that pad count some pairs twice; a rank without pairs must still add up as many numbers."""
    path = write_jsonl("pairs.jsonl", [as_record(pair) for pair in RAGGED[:count]])
    pairs = open_store(path, "preferences", tokenizer, max_length=512)
    model, reference = make_model(tokenizer.vocab_size), make_model(tokenizer.vocab_size, seed=1)
    batch = build_stream(pairs, range(count))
    with torch.no_grad():
        losses, *_ = dpo_of(model, reference, batch, 0.1)
        sums = pair_metrics(losses, Pairs.of(batch, model(batch), reference(batch)), 0.1)
    worlds = [OneOfMany(rank, ranks) for rank in range(ranks)]
    for world in worlds:
        evaluate(model, reference, pairs, world, Precision("fp32", world.device), DPO, max_tokens=100)
    totals = [world.noted[0] for world in worlds]
    assert len({len(total) for total in totals}) == 1, "ranks that add up unlike tensors hang or crash"
    expected = torch.stack([*sums.values(), torch.tensor(float(count))])
    torch.testing.assert_close(sum(totals), expected, rtol=1e-5, atol=1e-5, check_dtype=False)


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_sft_evaluation_counts_every_token_once_on_any_ranks(count, ranks, tokenizer, write_jsonl):
    """The same for conversations, whose loss is a mean over tokens: a rank may have none of them."""
    chats = [turns("Hi", "Hello"), turns("1", "The answer is 2"), turns("How many apples?", "7")][:count]
    path = write_jsonl("chats.jsonl", [{"messages": [vars(message) for message in chat]} for chat in chats])
    data = open_store(path, "conversations", tokenizer, max_length=512)
    model = make_model(tokenizer.vocab_size)
    batch = build_stream(data, range(count))
    with torch.no_grad():
        expected = torch.stack([-model(batch).sum(), torch.tensor(float(len(batch.targets)))])
    worlds = [OneOfMany(rank, ranks) for rank in range(ranks)]
    for world in worlds:
        evaluate_sft(model, data, world, Precision("fp32", world.device), max_tokens=100)
    totals = [world.noted[0] for world in worlds]
    assert len({len(total) for total in totals}) == 1, "ranks that add up unlike tensors hang or crash"
    torch.testing.assert_close(sum(totals), expected, rtol=1e-5, atol=1e-5, check_dtype=False)
