"""DPO by hand, through a whole tiny model, and its evaluation. Each loss alone: tests/test_objectives.py."""

import copy
import math

import pytest
import torch

from dataset.packing import LAYOUTS, build_stream
from dataset.store import open_store
from tests.conftest import RAGGED, as_record, make_model, turns
from training.evaluate import evaluate, evaluate_kl, evaluate_sft
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


# ---- By hand


def test_loss_by_hand():
    """A reference left out, a sign turned, a beta forgotten. z = 3 ln 2, then its mirror image."""
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


def test_metrics_are_sums_and_a_tie_is_half():
    """A tie counted as a win makes step 0 look perfect; counted as a loss, hopeless."""
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
    """0.6914 would be a loss in bf16; any other value, two models that saw different tokens."""
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


@pytest.mark.parametrize("seed", [0, 1], ids=["at-the-start", "later-on"])
def test_gradient_identity(seed, tokenizer, stream):
    """grad L = -beta mean(w (grad log pi(y_w) - grad log pi(y_l))), w = sigmoid(-beta z): 1/2 at the start.

    A beta that scales only the rewards, a sum for a mean, sides that are split wrongly: all start at ln 2.
    """
    model, reference = make_model(tokenizer.vocab_size), make_model(tokenizer.vocab_size, seed=seed)
    batch = stream()
    losses, chosen_rewards, rejected_rewards = dpo_of(model, reference, batch, 0.5)
    weights = torch.sigmoid(rejected_rewards - chosen_rewards).detach()
    assert (weights == 0.5).all() if seed == 0 else weights.min() < 0.45 and weights.max() > 0.6
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


# ---- Over ranks


class OneOfMany:
    """A rank among others that are not there: it notes what it would add up with them."""

    def __init__(self, rank: int, ranks: int):
        self.rank, self.ranks, self.device, self.noted = rank, ranks, torch.device("cpu"), []

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        self.noted.append(values.clone())
        return torch.ones_like(values)


CHATS = [turns("Hi", "Hello"), turns("1", "The answer is 2"), turns("How many apples?", "7")]
ROWS = {
    "preferences": [as_record(pair) for pair in RAGGED],
    "conversations": [{"messages": [vars(message) for message in chat]} for chat in CHATS],
}


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize(
    ("kind", "count"),
    [
        *(("preferences", count) for count in (1, 2, 5, 7)),
        *(("kl", count) for count in (1, 5, 7)),
        *(("conversations", count) for count in (1, 2, 3)),
    ],
)
def test_evaluation_counts_every_record_once_on_any_ranks(kind, count, ranks, tokenizer, write_jsonl):
    """Samplers that pad count some pairs twice; a rank without data must still add up as many numbers."""
    records = "conversations" if kind == "conversations" else "preferences"
    data = open_store(write_jsonl("data.jsonl", ROWS[records][:count]), records, tokenizer, max_length=512)
    model, reference = make_model(tokenizer.vocab_size), make_model(tokenizer.vocab_size, seed=1)
    batch, precision = build_stream(data, range(count)), Precision("fp32", torch.device("cpu"))

    def measure(world: OneOfMany) -> torch.Tensor:
        if kind == "preferences":
            evaluate(model, reference, data, world, precision, DPO, max_tokens=100)
        elif kind == "kl":
            evaluate_kl(model, reference, data, world, max_tokens=100)
        else:
            evaluate_sft(model, data, world, precision, max_tokens=100)
        return world.noted[0]

    with torch.no_grad():
        if kind == "preferences":
            losses, *_ = dpo_of(model, reference, batch, 0.1)
            sums = pair_metrics(losses, Pairs.of(batch, model(batch), reference(batch)), 0.1)
            expected = torch.stack([*sums.values(), torch.tensor(float(count))])
        elif kind == "kl":
            expected = measure(OneOfMany(0, 1))  # test_eval.py compares it with a plain loop.
        else:
            expected = torch.stack([-model(batch).sum(), torch.tensor(float(len(batch.targets)))])
    totals = [measure(OneOfMany(rank, ranks)) for rank in range(ranks)]
    assert len({len(total) for total in totals}) == 1, "ranks that add up unlike tensors hang or crash"
    torch.testing.assert_close(sum(totals), expected, rtol=1e-5, atol=1e-5, check_dtype=False)
