"""Every objective and option: against closed forms written by hand, at its limits, and through the loop."""

import copy
import inspect
import itertools
import math
import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import train_dpo
from dataset.packing import build_stream
from dataset.store import open_store
from errors import InputError
from losses import DIVERGENCES, LOSSES
from model import transformer
from model.lora import AdapterReference, add_adapters
from model.weights import load_model
from tests.conftest import RAGGED, as_record, make_model, plain_ids, plain_logits
from tests.loops import metrics, record_gradients
from tests.ranks import forked
from tests.runs import ALONE, FP32, assert_close, run_flags
from training import reference as reference_module
from training.evaluate import evaluate
from training.objective import (
    Objective,
    ObjectiveSettings,
    Pairs,
    next_token_kl,
    pair_metrics,
    wpo_weights,
)
from training.reference import no_reference

REFERENCE_FREE = {"simpo", "simper", "orpo", "sft"}
REQUIRED = {"robust": {"label_smoothing": 0.1}, "rdpo": {"rdpo_alpha": 0.07}}  # options without a default


def objective(loss="sigmoid", beta=0.3, delta=0.0, z0=0.0, **options) -> Objective:
    made = Objective(ObjectiveSettings(loss=loss, beta=beta, **{**REQUIRED.get(loss, {}), **options}))
    made.load_state_dict({"reward_sum": 4 * delta, "reward_count": 4.0})
    made.z0 = z0
    return made


def float64(values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


# Six pairs: log-ratios of both signs, won and lost, near 0 and far from it. Lengths and scores go with them.
A = [0.4, -1.3, 5.0, -0.2, 2.1, -7.5]
B = [-0.9, 0.8, -3.0, 0.1, 2.0, -4.0]
REFERENCE = [-12.0, -9.5, -30.0, -17.0, -8.0, -25.0], [-11.0, -14.0, -21.0, -19.5, -10.0, -22.0]
LENGTHS = [4, 3, 9, 5, 2, 7], [3, 6, 5, 8, 4, 1]
SCORES = [1.5, -0.5, 0.0, 8.0, -3.0, 40.0]
KL = [0.3, 2.5, 0.0, 1.1, 7.0, 0.2], [0.9, 0.1, 4.0, 0.0, 6.0, 1.7]
DELTA, Z0 = 0.37, 0.21


def make_pairs(a=A, b=B, dtype=torch.float64, **more) -> Pairs:
    """Pairs with these log-ratios, of which the policy's log-probs ask for a gradient."""
    first, second, *rest = (torch.tensor(x, dtype=dtype) for x in (a, b, *REFERENCE, *LENGTHS, SCORES, *KL))
    policy = [(first + rest[0]).requires_grad_(), (second + rest[1]).requires_grad_()]
    names = ("chosen_lengths", "rejected_lengths", "score_margins", "chosen_kl", "rejected_kl")
    return Pairs(*policy, *rest[:2], **{**dict(zip(names, rest[2:], strict=True)), **more})


def swapped(pairs: Pairs) -> Pairs:
    """The same pairs with chosen and rejected exchanged."""
    other = {"chosen": "rejected", "rejected": "chosen"}

    def exchanged(name: str) -> str:
        return re.sub("chosen|rejected", lambda found: other[found[0]], name)

    return Pairs(**{exchanged(name): value for name, value in vars(pairs).items()})


def gradients(losses: torch.Tensor, pairs: Pairs) -> list[torch.Tensor]:
    wrt = [pairs.policy_chosen_logps, pairs.policy_rejected_logps]
    return list(torch.autograd.grad(losses.sum(), wrt, materialize_grads=True))


# ---- The closed forms: of one pair its loss, and its slopes in log pi(y_w) and log pi(y_l)


def s(z: float) -> float:
    return 1 / (1 + math.exp(-z))


def ls(z: float) -> float:
    return -math.log(1 + math.exp(-z))


def of_margin(value, slope):
    """A loss of h = beta (a - b), from its value and its slope in h."""

    def form(a, b, beta, **o):
        h = beta * (a - b)
        return value(h, **o), beta * slope(h, **o), -beta * slope(h, **o)

    return lambda p, beta, **o: form(p["a"], p["b"], beta, **o)


def logistic(z, slope_w, slope_l):
    return -ls(z), -s(-z) * slope_w, -s(-z) * slope_l


def square_form(p, beta, by_length):
    w, r = (p["nw"], p["nl"]) if by_length else (1, 1)
    x = p["a"] / w - p["b"] / r - 1 / (2 * beta)
    return x * x, 2 * x / w, -2 * x / r


def exo_form(h, e=1e-3):
    return s(h) * (ls(h) - math.log(1 - e)) + s(-h) * (ls(-h) - math.log(e))


def discopop_form(h, t=0.05):
    m = s(h / t)
    return (1 - m) * -ls(h) + m * math.exp(-h)


def discopop_slope(h, t=0.05):
    m = s(h / t)
    return m * (1 - m) / t * (ls(h) + math.exp(-h)) - (1 - m) * s(-h) - m * math.exp(-h)


def dpop_form(p, beta, k=50.0):
    a, b = p["a"], p["b"]
    return logistic(beta * (a - b - k * max(0, -a)), beta * (1 + k * (a < 0)), -beta)


def nca_form(p, beta):
    a, b = beta * p["a"], beta * p["b"]
    return -ls(a) - ls(-a) / 2 - ls(-b) / 2, beta * (s(a) / 2 - s(-a)), beta * s(b) / 2


def bco_form(p, beta):
    a, b = beta * p["a"] - DELTA, beta * p["b"] - DELTA
    return -ls(a) - ls(-b), -beta * s(-a), beta * s(b)


def kto_form(p, beta):
    kl_w, kl_l = max(0, p["mean a"]), max(0, p["mean b"])
    a, b = s(beta * (p["a"] - kl_l)), s(beta * (kl_w - p["b"]))
    return (1 - a + 1 - b) / 2, -beta * a * (1 - a) / 2, beta * b * (1 - b) / 2


def kto_single_form(p, beta, good=1.0, bad=1.0):
    """Of a row with both answers it is the sum of the two."""
    a, b = s(beta * p["a"] - Z0), s(Z0 - beta * p["b"])
    return good * (1 - a) + bad * (1 - b), -good * beta * a * (1 - a), bad * beta * b * (1 - b)


def apo_zero_form(p, beta):
    a, b = s(beta * p["a"]), s(beta * p["b"])
    return 1 - a + b, -beta * a * (1 - a), beta * b * (1 - b)


def apo_down_form(p, beta):
    a, h = s(beta * p["a"]), s(beta * (p["a"] - p["b"]))
    return a + 1 - h, beta * (a * (1 - a) - h * (1 - h)), beta * h * (1 - h)


def sppo_form(p, beta):
    a, b = p["a"] - 0.5 / beta, p["b"] + 0.5 / beta
    return a * a + b * b, 2 * a, 2 * b


def simpo_form(p, beta, g=0.5):
    return logistic(beta * (p["pw"] / p["nw"] - p["pl"] / p["nl"]) - g, beta / p["nw"], -beta / p["nl"])


def rebel_form(p, beta, scale):
    gap = beta * (p["a"] - p["b"]) - scale * p["score"]
    return gap * gap, 2 * beta * gap, -2 * beta * gap


def odpo_form(p, beta, k=1.0):
    if p["score"] <= 0:
        return 0, 0, 0
    return logistic(beta * (p["a"] - p["b"]) - k * math.log(p["score"]), beta, -beta)


def rdpo_form(p, beta, k=0.07):
    return logistic(beta * (p["a"] - p["b"]) + k * p["nw"] - k * p["nl"], beta, -beta)


def tdpo_form(p, beta, k=0.5):
    return logistic(beta * (p["a"] - p["b"]) - k * (beta * p["kl l"] - beta * p["kl w"]), beta, -beta)


def simper_form(p, beta):
    w, r = math.exp(p["pw"] / p["nw"]), math.exp(p["pl"] / p["nl"])
    return r - w, -w / p["nw"], r / p["nl"]


def orpo_form(p, beta):
    w, r = p["pw"] / p["nw"], p["pl"] / p["nl"]
    z = math.log(math.exp(w) / (1 - math.exp(w))) - math.log(math.exp(r) / (1 - math.exp(r)))
    slopes = beta / (1 - math.exp(w)) / p["nw"], -beta / (1 - math.exp(r)) / p["nl"]
    value, *odds = logistic(z, *slopes)
    return beta * value - w, odds[0] - 1 / p["nw"], odds[1]


CLOSED_FORMS = [
    ("sigmoid", {}, of_margin(lambda h: -ls(h), lambda h: -s(-h))),
    ("sigmoid", {"label_smoothing": 0.2},
     of_margin(lambda h: -0.8 * ls(h) - 0.2 * ls(-h), lambda h: s(h) - 0.8)),
    ("soft", {}, lambda p, beta: soft_form(p, beta, 1.0)),
    ("soft", {"score_scale": 0.25}, lambda p, beta: soft_form(p, beta, 0.25)),
    ("rebel", {}, lambda p, beta: rebel_form(p, beta, 1.0)),
    ("rebel", {"score_scale": 0.25}, lambda p, beta: rebel_form(p, beta, 0.25)),
    ("odpo", {}, odpo_form),
    ("odpo", {"odpo_alpha": 0.4}, lambda p, beta: odpo_form(p, beta, 0.4)),
    ("rdpo", {}, rdpo_form),
    ("rdpo", {"rdpo_alpha": 0.5}, lambda p, beta: rdpo_form(p, beta, 0.5)),
    ("tdpo2", {}, tdpo_form),
    ("tdpo2", {"tdpo_alpha": 1.5}, lambda p, beta: tdpo_form(p, beta, 1.5)),
    ("simper", {}, simper_form),
    ("robust", {"label_smoothing": 0.2},
     of_margin(lambda h: (-0.8 * ls(h) + 0.2 * ls(-h)) / 0.6, lambda h: (-0.8 * s(-h) - 0.2 * s(h)) / 0.6)),
    ("hinge", {}, of_margin(lambda h: max(0, 1 - h), lambda h: -1 if h < 1 else 0)),
    ("ipo", {}, lambda p, beta: square_form(p, beta, by_length=False)),
    ("ipo_norm", {}, lambda p, beta: square_form(p, beta, by_length=True)),
    ("exo_pair", {}, of_margin(exo_form, lambda h: s(h) * s(-h) * (h - math.log(0.999 / 0.001)))),
    ("exo_pair", {"label_smoothing": 0.2},
     of_margin(lambda h: exo_form(h, 0.2), lambda h: s(h) * s(-h) * (h - math.log(0.8 / 0.2)))),
    ("discopop", {}, of_margin(discopop_form, discopop_slope)),
    ("discopop", {"discopop_tau": 0.7},
     of_margin(lambda h: discopop_form(h, 0.7), lambda h: discopop_slope(h, 0.7))),
    ("dpop", {}, dpop_form),
    ("dpop", {"dpop_lambda": 5.0}, lambda p, beta: dpop_form(p, beta, 5.0)),
    ("sigmoid_norm", {}, lambda p, beta:
     logistic(beta * (p["a"] / p["nw"] - p["b"] / p["nl"]), beta / p["nw"], -beta / p["nl"])),
    ("nca_pair", {}, nca_form),
    ("bco_pair", {}, bco_form),
    ("kto_pair", {}, kto_form),
    ("kto", {}, lambda p, beta: kto_single_form(p, beta)),
    ("kto", {"desirable_weight": 1.5, "undesirable_weight": 0.5},
     lambda p, beta: kto_single_form(p, beta, 1.5, 0.5)),
    ("plackett_luce", {}, of_margin(lambda h: -ls(h), lambda h: -s(-h))),  # of two replies
    ("apo_zero", {}, apo_zero_form),
    ("apo_down", {}, apo_down_form),
    ("sppo_hard", {}, sppo_form),
    ("simpo", {}, simpo_form),
    ("simpo", {"simpo_gamma": 1.25}, lambda p, beta: simpo_form(p, beta, 1.25)),
    ("orpo", {}, orpo_form),
    ("sft", {}, lambda p, beta: (-p["pw"] / p["nw"], -1 / p["nw"], 0)),
]  # fmt: skip
IDS = ["-".join([name, *map(str, options.values())]) for name, options, _ in CLOSED_FORMS]


def soft_form(p, beta, scale):
    wins, h = s(min(scale * p["score"], 700)), beta * (p["a"] - p["b"])
    return -wins * ls(h) - (1 - wins) * ls(-h), beta * (s(h) - wins), -beta * (s(h) - wins)


def described(pairs: Pairs) -> list[dict]:
    """Each pair as plain numbers under short names."""
    names = {
        "a": pairs.chosen_logratios, "b": pairs.rejected_logratios,
        "pw": pairs.policy_chosen_logps, "pl": pairs.policy_rejected_logps,
        "nw": pairs.chosen_lengths, "nl": pairs.rejected_lengths, "score": pairs.score_margins,
        "kl w": pairs.chosen_kl, "kl l": pairs.rejected_kl,
        "mean a": pairs.chosen_logratios.mean().repeat(len(A)),
        "mean b": pairs.rejected_logratios.mean().repeat(len(A)),
    }  # fmt: skip
    columns = [column.tolist() for column in names.values()]
    return [dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True)]


@pytest.mark.parametrize("beta", [0.1, 0.9])
@pytest.mark.parametrize("name, options, form", CLOSED_FORMS, ids=IDS)
def test_value_and_gradient_are_the_closed_form(name, options, form, beta):
    """Value and both slopes of each pair, in float64. The slopes are derived by hand, not by autograd."""
    for shift in (0, 3):  # With positive means, kto_pair's KLs are not 0.
        pairs = make_pairs([x + shift for x in A], [x + shift for x in B])
        losses = objective(name, beta, DELTA, Z0, **options)(pairs)
        expected = float64([form(pair, beta) for pair in described(pairs)]).T
        found = torch.stack([losses.detach(), *gradients(losses, pairs)])
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("name", ["aot", "aot_unpaired"])
def test_aot_is_a_plain_loop_over_quantiles(name, smoothing):
    """Quantile by quantile; a slope goes back to the pair that holds the quantile."""
    beta, pairs = 0.4, make_pairs()
    rows = described(pairs)
    r_w, r_l = REFERENCE
    if name == "aot":
        first, second = [p["pw"] - p["pl"] for p in rows], [w - x for w, x in zip(r_w, r_l, strict=True)]
    else:
        first, second = A, B
    by_first, by_second = (sorted(range(6), key=values.__getitem__) for values in (first, second))
    values, slopes = [], ([0.0] * 6, [0.0] * 6)
    for i, j in zip(by_first, by_second, strict=True):
        h = beta * (first[i] - second[j])
        values.append(-(1 - smoothing) * ls(h) - smoothing * ls(-h))
        slopes[0][i] = beta * (s(h) - (1 - smoothing))
        slopes[1][i if name == "aot" else j] = -slopes[0][i]
    losses = objective(name, beta, label_smoothing=smoothing or None)(pairs)
    torch.testing.assert_close(losses.detach(), float64(values), rtol=1e-10, atol=1e-10)
    for found, expected in zip(gradients(losses, pairs), slopes, strict=True):
        torch.testing.assert_close(found, float64(expected), rtol=1e-10, atol=1e-10)
    assert by_first != by_second


def test_every_loss_has_a_closed_form():
    assert {name for name, *_ in CLOSED_FORMS} | {"aot", "aot_unpaired"} == LOSSES.keys()


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("name", LOSSES)
def test_gradcheck(name, divergence):
    """Finite differences in the policy's log-probs. The means are negative, so kto_pair's KLs rest at 0."""
    options = {"f_divergence": divergence} if uses("margins", name) else {}
    made, pairs = objective(name, delta=DELTA, **options), make_pairs()

    def loss(chosen, rejected):
        return made(replace(pairs, policy_chosen_logps=chosen, policy_rejected_logps=rejected))

    at = [x.detach().requires_grad_() for x in (pairs.policy_chosen_logps, pairs.policy_rejected_logps)]
    assert torch.autograd.gradcheck(loss, at)


def uses(parameter: str, name: str) -> bool:
    return parameter in LOSSES[name].__code__.co_varnames[: LOSSES[name].__code__.co_argcount]


# ---- Where policy and reference agree; where the sides are exchanged; far out


@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_constants_where_policy_is_reference(beta):
    """What the first row of a log must show."""
    ln2, zeros = math.log(2), [0.0] * 6
    smoothed = -ln2 - (math.log(0.999) + math.log(0.001)) / 2
    constants = {
        **dict.fromkeys(["sigmoid", "soft", "robust", "dpop", "sigmoid_norm", "aot", "aot_unpaired"], ln2),
        **{"plackett_luce": ln2, "kto": 1},
        **{"hinge": 1, "ipo": 1 / (4 * beta**2), "ipo_norm": 1 / (4 * beta**2), "exo_pair": smoothed},
        **{"nca_pair": 2 * ln2, "bco_pair": 2 * ln2, "kto_pair": 0.5, "apo_zero": 1, "apo_down": 1},
        **{"sppo_hard": 1 / (2 * beta**2), "discopop": ln2 / 2 + 0.5},
        **{"rebel": 1, "odpo": ln2, "rdpo": ln2, "tdpo2": ln2},  # a gap of 1, equal lengths, no KL
    }
    same = {"chosen_lengths": float64(LENGTHS[0]), "rejected_lengths": float64(LENGTHS[0])}
    same |= dict.fromkeys(["chosen_kl", "rejected_kl"], float64(zeros))
    assert constants.keys() == LOSSES.keys() - REFERENCE_FREE
    for name, constant in constants.items():
        pairs = make_pairs(zeros, zeros, score_margins=float64([1.0] * 6), **same)
        losses = objective(name, beta)(pairs)
        torch.testing.assert_close(losses.detach(), torch.full((6,), constant, dtype=torch.float64), msg=name)
        assert all(gradient.any() for gradient in gradients(losses, pairs)) or name == "apo_down"


@pytest.mark.parametrize("name", LOSSES)
def test_a_gradient_step_widens_the_margin(name):
    """The direction of every loss, without its formula: a sign may be wrong in code and closed form."""
    for a, b in ((0.0, 0.0), (-2.0, 1.0)):
        pairs = make_pairs([a] * 6, [b] * 6, score_margins=float64([2.0] * 6))
        chosen, rejected = gradients(objective(name)(pairs), pairs)
        # DiscoPOP as published is not convex: near h = 0 its slope has the other sign.
        narrows = name == "discopop" and a == b
        assert ((rejected - chosen > 0) != narrows).all(), "a step against the gradient widens the margin"
        assert (chosen <= 0).all() or narrows or name == "apo_down"


def test_laws_between_losses():
    """Each says the same as another where it should."""
    pairs = make_pairs()
    scores = {p: replace(pairs, score_margins=float64([math.log(p / (1 - p))] * 6)) for p in (0.7, 0.5)}
    certain = replace(pairs, score_margins=float64([math.inf] * 6))
    assert torch.equal(objective("soft")(certain), objective("sigmoid")(pairs))
    smoothed = objective("sigmoid", label_smoothing=0.3)(pairs)
    torch.testing.assert_close(objective("soft")(scores[0.7]), smoothed)
    torch.testing.assert_close(objective("soft")(scores[0.5]), objective("soft")(swapped(scores[0.5])))
    # Robust: labels of which a tenth is flipped give, on average, DPO's loss of the clean ones.
    robust = objective("robust", label_smoothing=0.1)
    mean = 0.9 * robust(pairs) + 0.1 * robust(swapped(pairs))
    torch.testing.assert_close(mean, objective("sigmoid")(pairs))
    # DPOP punishes nothing while the chosen side has not fallen.
    risen = make_pairs(a=[abs(a) for a in A])
    torch.testing.assert_close(objective("dpop")(risen), objective("sigmoid")(risen))
    # Answers of one token have nothing to be averaged.
    single = replace(pairs, chosen_lengths=torch.ones(6), rejected_lengths=torch.ones(6))
    for name in ("sigmoid", "ipo"):
        torch.testing.assert_close(objective(f"{name}_norm")(single), objective(name)(pairs))


def test_rebel_stops_at_the_gap_of_the_scores():
    """The minimum is 0, and it is a place: a pair that is won by too much is pulled back."""
    pairs = make_pairs([2 * a for a in range(6)], [0.5] * 6)
    scores = 0.5 * (pairs.chosen_logratios - pairs.rejected_logratios).detach() / 0.25  # h / scale
    pairs = replace(pairs, score_margins=scores)
    losses = objective("rebel", 0.5, score_scale=0.25)(pairs)
    assert not losses.any() and not any(gradient.any() for gradient in gradients(losses, pairs))
    less = replace(pairs, score_margins=scores - 1)
    chosen, _ = gradients(objective("rebel", 0.5, score_scale=0.25)(less), less)
    assert (chosen > 0).all()
    turned = replace(swapped(pairs), score_margins=-pairs.score_margins)
    torch.testing.assert_close(objective("rebel")(turned), objective("rebel")(pairs))


def test_offsets_are_dpo_where_there_is_nothing_to_offset():
    """A gap of 1, equal lengths, alpha 0; the other laws give the sign, which a closed form may repeat."""
    pairs, dpo = make_pairs(), objective("sigmoid")
    one, two, none = (replace(pairs, score_margins=float64([gap] * 6)) for gap in (1.0, 2.0, 0.0))
    assert torch.equal(objective("odpo")(one), dpo(pairs))
    assert (objective("odpo")(two) > dpo(pairs)).all(), "a larger gap must be won by more"
    losses = objective("odpo")(none)
    assert not losses.any() and not any(gradient.any() for gradient in gradients(losses, none))
    even = replace(pairs, rejected_lengths=pairs.chosen_lengths)
    assert torch.equal(objective("rdpo")(even), dpo(pairs))
    longer = pairs.chosen_lengths > pairs.rejected_lengths
    assert torch.equal(objective("rdpo")(pairs) < dpo(pairs), longer), "length explains a part of a win"
    assert torch.equal(objective("rdpo", rdpo_alpha=0)(pairs), dpo(pairs))
    # A policy that wins by length alone, h = -alpha (|y_w| - |y_l|), is where DPO's is at the start.
    gap = -0.07 * (pairs.chosen_lengths - pairs.rejected_lengths) / 0.3
    by_length = make_pairs(a=gap.tolist(), b=[0.0] * 6)
    torch.testing.assert_close(objective("rdpo")(by_length).detach(), float64([math.log(2)] * 6))


def test_tdpo2_moves_only_the_rejected_kl():
    """Without the stop the chosen side's KL would be raised: it enters with the other sign."""
    ks = [float64(kl).requires_grad_() for kl in KL]
    pairs = make_pairs(chosen_kl=ks[0], rejected_kl=ks[1])
    dpo, zeros = objective("sigmoid")(pairs), float64([0.0] * 6)
    assert torch.equal(objective("tdpo2", tdpo_alpha=0)(pairs), dpo)
    assert torch.equal(objective("tdpo2")(replace(pairs, chosen_kl=zeros, rejected_kl=zeros)), dpo)
    losses = objective("tdpo2", tdpo_alpha=0.7)(pairs)
    chosen, rejected = torch.autograd.grad(losses.sum(), ks, allow_unused=True)
    assert chosen is None
    torch.testing.assert_close(rejected, -0.7 * 0.3 * torch.expm1(-losses.detach()))


def test_simper_is_bounded_and_odd():
    pairs = make_pairs()
    losses = objective("simper")(pairs)
    torch.testing.assert_close(objective("simper")(swapped(pairs)), -losses)
    assert losses.abs().max() < 1
    assert torch.equal(objective("simper", beta=0.9)(pairs), losses)
    certain = make_pairs([-x for x in REFERENCE[0]], [-1e4] * 6)
    assert torch.equal(objective("simper")(certain).detach(), float64([-1.0] * 6))


def extreme_pairs(dtype) -> Pairs:
    """Log-ratios of 0 and ±1e4 in all combinations; a policy that is certain of an answer says exactly 0."""
    chosen, rejected = zip(*itertools.product([-1e4, 0.0, 1e4], repeat=2), strict=True)
    reference = torch.full((9,), -1e4, dtype=dtype)
    policy = [(reference + torch.tensor(side, dtype=dtype)).requires_grad_() for side in (chosen, rejected)]
    lengths = [torch.full((9,), length, dtype=dtype) for length in (3.0, 200.0)]
    scores = torch.linspace(-1e4, 1e4, 9, dtype=dtype)
    kl = {"chosen_kl": scores.abs(), "rejected_kl": scores + 1e4}
    return Pairs(*policy, reference, reference, *lengths, score_margins=scores, **kl)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("name", LOSSES)
def test_extremes_are_finite(name, divergence, dtype):
    """e^1000 is inf, and 0 times inf NaN: value and gradient of hopeless and of certain answers."""
    options = {"f_divergence": divergence} if uses("margins", name) else {}
    for beta in (0.1, 1.0):
        pairs = extreme_pairs(dtype)
        losses = objective(name, beta, **options)(pairs)
        assert losses.isfinite().all()
        assert all(gradient.isfinite().all() for gradient in gradients(losses, pairs))


# ---- Divergences

ALPHA = 0.3
# f of each divergence, with f(1) = 0, from which f' is taken by differences (f-DPO's table).
GENERATORS = {
    "reverse_kl": lambda u: u * math.log(u),
    "forward_kl": lambda u: -math.log(u),
    "js": lambda u: u * math.log(u) - (u + 1) * math.log((u + 1) / 2),
    "alpha": lambda u: (u ** (1 - ALPHA) - (1 - ALPHA) * u - ALPHA) / (ALPHA * (ALPHA - 1)),
    "chi2_kl": lambda u: (u - 1) ** 2 / 2 + u * math.log(u),
}


@pytest.mark.parametrize("name", DIVERGENCES)
def test_a_score_is_the_derivative_of_its_divergence(name):
    """f'(pi / pi_ref) up to a constant: TRL's alpha is the paper's 1 - alpha, and both look plausible."""

    def margin(a, b):
        slopes = []
        for u in (math.exp(a), math.exp(b)):
            h = 1e-5 * u
            slopes.append((GENERATORS[name](u + h) - GENERATORS[name](u - h)) / (2 * h))
        return slopes[0] - slopes[1]

    options = {"divergence_alpha": ALPHA} if name == "alpha" else {}
    found = objective("sigmoid", 0.3, f_divergence=name, **options)(make_pairs())
    expected = [-ls(0.3 * margin(a, b)) for a, b in zip(A, B, strict=True)]
    torch.testing.assert_close(found.detach(), float64(expected), rtol=1e-6, atol=1e-6)


def test_scores_by_hand():
    a, b = 0.7, -0.4
    pairs = make_pairs([a] * 6, [b] * 6)
    margins = {
        "reverse_kl": a - b,
        "forward_kl": math.exp(-b) - math.exp(-a),
        "js": (a - math.log(1 + math.exp(a))) - (b - math.log(1 + math.exp(b))),
        "alpha": (math.exp(-0.5 * b) - math.exp(-0.5 * a)) / 0.5,
        "chi2_kl": math.exp(a) + a - math.exp(b) - b,
    }
    for name, margin in margins.items():
        losses = objective("ipo", 0.3, f_divergence=name)(pairs)
        expected = float64([(margin - 1 / 0.6) ** 2] * 6)
        torch.testing.assert_close(losses.detach(), expected, rtol=1e-10, atol=1e-10)


def test_chi2_is_dpo_for_unlikely_answers_and_clipped_where_it_explodes():
    """As pi / pi_ref goes to 0 the chi-squared part goes; beyond the clip a pair has no gradient."""
    unlikely = make_pairs([a - 50 for a in A], [b - 50 for b in B])
    found = objective("sigmoid", f_divergence="chi2_kl")(unlikely)
    torch.testing.assert_close(found, objective("sigmoid")(unlikely), rtol=1e-12, atol=0)
    pairs, clip = make_pairs(), 2.0
    plain = objective("sigmoid", f_divergence="chi2_kl")(pairs).detach()
    losses = objective("sigmoid", f_divergence="chi2_kl", chi2_clip=clip)(pairs)
    inside = (plain > -ls(clip)) & (plain < -ls(-clip))
    assert 0 < inside.sum() < 6
    expected = torch.where(inside, plain, plain.clamp(-ls(clip), -ls(-clip)))
    torch.testing.assert_close(losses.detach(), expected)
    for gradient in gradients(losses, pairs):
        assert torch.equal(gradient != 0, inside)


def test_a_hopeless_answer_is_not_let_go():
    """A clamp would also be finite, and leave the pair that is most wrong without a gradient."""
    for divergence in DIVERGENCES:
        pairs = extreme_pairs(torch.float32)
        losses = objective("sigmoid", 0.3, f_divergence=divergence)(pairs)
        chosen, _ = gradients(losses, pairs)
        assert chosen[1] < 0, divergence  # a = -1e4, b = 0
        if divergence == "reverse_kl":  # The loss of a lost pair is -beta z, of a won pair 0.
            assert losses.tolist()[1::5] == [3000, 0] and chosen[1] == pytest.approx(-0.3)


# ---- Several losses, and what an option changes


def test_several_losses_are_a_weighted_sum():
    """MPO, RPO: each term with its own weight, and an unset option keeps each loss's own default."""
    pairs = make_pairs()
    found = objective("sigmoid, bco_pair,sft", delta=DELTA, loss_weights="0.8,0.2,1")(pairs)
    terms = [objective(name, delta=DELTA)(pairs) for name in ("sigmoid", "bco_pair", "sft")]
    torch.testing.assert_close(found, 0.8 * terms[0] + 0.2 * terms[1] + terms[2])
    # exo_pair's own smoothing must not leak into the others.
    both = objective("sigmoid,exo_pair")(pairs)
    torch.testing.assert_close(both, objective("sigmoid")(pairs) + objective("exo_pair")(pairs))


def test_only_losses_of_log_ratios_need_a_reference():
    assert {name for name in LOSSES if not objective(name).needs_reference} == REFERENCE_FREE
    assert objective("orpo,sigmoid").needs_reference and not objective("simpo,sft").needs_reference


@pytest.mark.parametrize("name", LOSSES)
def test_rewards_mean_the_same_whatever_the_loss(name):
    """beta times the log-ratio of whole answers: margins must not shrink because a loss averages."""
    tails = {"chosen_tails": float64([9.0] * 6), "rejected_tails": float64([9.0] * 6)}
    made, pairs = objective(name, 0.3), make_pairs(**tails)
    logged = pair_metrics(made(pairs), pairs, 0.3)
    assert logged["rewards/chosen"].item() == pytest.approx(0.3 * sum(A))
    assert logged["rewards/rejected"].item() == pytest.approx(0.3 * sum(B))
    assert logged["rewards/margins"].item() == pytest.approx(0.3 * (sum(A) - sum(B)))
    assert logged["rewards/accuracies"].item() == sum(a > b for a, b in zip(A, B, strict=True))
    assert logged["logps/chosen"].item() == pytest.approx(sum(A) + sum(REFERENCE[0]))


REFUSED = [
    (dict(loss="dpo"), "--loss dpo: its name here is sigmoid"),
    (dict(loss="IPO"), "--loss IPO: its name here is ipo"),
    (dict(loss="sigmoid,KTO"), "--loss KTO: its name here is kto"),
    (dict(loss="rpo_sq"), "--loss rpo_sq: its name here is rebel"),
    (dict(loss="elo"), "--loss elo: there is no such loss; the losses are sigmoid, robust, hinge"),
    (dict(loss=""), "--loss : there is no such loss"),
    (dict(loss="sigmoid,sigmoid"), "names a loss twice"),
    (dict(loss="sigmoid,sft", loss_weights="1"), "--loss-weights 1: 1 weights for 2 losses"),
    (dict(loss_weights="heavy"), "--loss-weights heavy: expected numbers"),
    (dict(loss_weights="-1"), "a weight must be above 0"),
    (dict(loss_weights="nan"), "a weight must be above 0"),
    (dict(beta=0.0), "--beta must be above 0, not 0.0"),
    (dict(beta=math.nan), "--beta must be above 0, not nan"),
    (dict(label_smoothing=0.5), "--label-smoothing must be at least 0 and below 0.5, not 0.5"),
    (dict(loss="hinge", label_smoothing=0.1), "--label-smoothing has no effect on --loss hinge; it is an"),
    (dict(loss="soft", label_smoothing=0.1), "--label-smoothing has no effect on --loss soft"),
    (dict(loss="exo_pair", label_smoothing=0.0), "exo_pair takes the logarithm of --label-smoothing"),
    (dict(loss="robust"), "--loss robust needs --label-smoothing, the share of flipped labels"),
    (dict(loss="rebel", odpo_alpha=1.0), "--odpo-alpha has no effect on --loss rebel; it is an option"),
    (dict(loss="odpo", odpo_alpha=0.0), "--odpo-alpha must be above 0, not 0.0"),
    (dict(loss="rdpo"), "--loss rdpo needs --rdpo-alpha, the reward of a token of length"),
    (dict(loss="rdpo", rdpo_alpha=-0.1), "--rdpo-alpha must be at least 0"),
    (dict(loss="rdpo", rdpo_alpha=0.1, ld_alpha=0.5), "--ld-alpha and --loss rdpo would both correct"),
    (dict(loss="tdpo2", f_divergence="js"), "--f-divergence changes margins, which --loss tdpo2"),
    (dict(chi2_clip=1.0), "--chi2-clip is an option of --f-divergence chi2_kl"),
    (dict(f_divergence="chi2_kl", chi2_clip=0.0), "--chi2-clip must be above 0, not 0.0"),
    (dict(score_scale=1.0), "--score-scale has no effect on --loss sigmoid; it is an option of soft"),
    (dict(loss="soft", score_scale=0.0), "--score-scale must be above 0"),
    (dict(dpop_lambda=5.0), "--dpop-lambda has no effect on --loss sigmoid; it is an option of dpop"),
    (dict(loss="dpop", dpop_lambda=-5.0), "--dpop-lambda must be above 0"),
    (dict(simpo_gamma=1.0), "it is an option of simpo"),
    (dict(discopop_tau=1.0), "it is an option of discopop"),
    (dict(loss="discopop", discopop_tau=2.0), "--discopop-tau must be above 0 and at most 1, not 2.0"),
    (dict(divergence_alpha=0.5), "--divergence-alpha is an option of --f-divergence alpha"),
    (dict(f_divergence="alpha", divergence_alpha=1.0), "--divergence-alpha must be above 0 and below 1"),
    (dict(loss="nca_pair", f_divergence="js"), "--f-divergence changes margins, which --loss nca_p"),
    (dict(loss="simpo", f_divergence="js"), "--f-divergence changes margins"),
    (dict(loss="aot", wpo=True), "--wpo weights pairs, but aot sorts them"),
    (dict(loss="sigmoid,aot_unpaired", wpo=True), "--wpo weights pairs, but aot_unpaired sorts them"),
    (dict(loss="sft", wpo=True), "--wpo weights pairs, but --loss sft does not use the rejected answers"),
    (dict(loss="simpo", ld_alpha=0.5), "--ld-alpha changes log-ratios, which --loss simpo does not use"),
    (dict(loss="sigmoid_norm", ld_alpha=0.5), "--ld-alpha and --loss sigmoid_norm would both correct for"),
    (dict(loss="sigmoid,ipo_norm", ld_alpha=0.5), "--ld-alpha and --loss ipo_norm"),
    (dict(ld_alpha=1.5), "--ld-alpha must be at least 0 and below 1, not 1.5"),
    (dict(tr_alpha=0.6, tr_every=512), "--tr-alpha moves the reference at every step, --tr-every copies it"),
    (dict(tr_alpha=0.0), "--tr-alpha must be above 0"),
    (dict(tr_every=0), "--tr-every must be at least 1"),
    (dict(loss="orpo", tr_alpha=0.6), "move the reference, but --loss orpo does not"),
    (dict(loss="simper", tr_every=5), "move the reference, but --loss simper does not"),
    (dict(loss="simpo", tr_every=5), "move the reference, but --loss simpo does not"),
]


@pytest.mark.parametrize("settings, reason", REFUSED, ids=[reason[:36] for _, reason in REFUSED])
def test_what_makes_no_sense_is_refused(settings, reason):
    """An option that is silently ignored is the commonest lie of the libraries."""
    with pytest.raises(InputError, match=re.escape(reason)):
        Objective(ObjectiveSettings(**settings))


@pytest.mark.parametrize("settings", [
    dict(loss="sigmoid,sft", ld_alpha=0.5, label_smoothing=0.1, wpo=True, tr_alpha=0.5),
    dict(loss="sigmoid,bco_pair,sft", loss_weights="0.8,0.2,1", tr_every=2, f_divergence="js"),
    dict(loss="simpo,sft", loss_weights="1,0.2", wpo=True, simpo_gamma=0.0),
    dict(loss="dpop", dpop_lambda=5, ld_alpha=0.0),
    dict(loss="soft", score_scale=2.0, f_divergence="alpha", divergence_alpha=0.2, wpo=True),
    dict(loss="kto_pair", wpo=True),
    dict(loss="rebel,sft", loss_weights="1,0.2", score_scale=0.5, f_divergence="chi2_kl", chi2_clip=4.0),
    dict(loss="odpo,tdpo2", odpo_alpha=0.5, tdpo_alpha=0.0, tr_alpha=0.5),
])  # fmt: skip
def test_what_makes_sense_together_is_accepted(settings):
    assert Objective(ObjectiveSettings(**settings))


def test_flags_tell_the_defaults_of_the_signatures():
    """The defaults stand in the signatures; the flags' texts only repeat them."""
    texts = {f.name: f.metadata["why"] for f in ObjectiveSettings.__dataclass_fields__.values()}
    for function in (*LOSSES.values(), *DIVERGENCES.values()):
        for parameter in inspect.signature(function).parameters.values():
            if parameter.default is not parameter.empty:
                assert re.search(rf"\b{parameter.default:g}\b", texts[parameter.name]), (function, parameter)


# ---- Options that look at tokens: WPO and LD-DPO, through a tiny model


@pytest.fixture
def stored(tokenizer, ragged):
    return open_store(ragged, "preferences", tokenizer, max_length=512)


def by_hand(model, reference, tokenizer) -> list[list[dict]]:
    """The log-probs of every ragged answer's tokens, and of collisions, one sequence at a time."""
    pairs = []
    for prompt, *answers in RAGGED:
        sides = []
        for answer in answers:
            x, y = plain_ids(tokenizer, prompt, answer)
            p, q = (plain_logits(m, x + y)[len(x) - 1 : -1].log_softmax(-1) for m in (model, reference))
            where = torch.arange(len(y)), torch.tensor(y)
            collisions, kl = p.exp().pow(2).sum(1).log(), (q.exp() * (q - p)).sum(1)
            sides.append({"p": p[where], "q": q[where], "collisions": collisions, "kl": kl})
        pairs.append(sides)
    return pairs


@pytest.mark.parametrize("layout", ["forked", "twin"])
def test_pairs_of_a_stream_are_those_of_single_sequences(layout, stored, tokenizer):
    """Sums, lengths, what lies beyond the shorter answer, and how surprising the tokens are."""
    model, reference = (make_model(tokenizer.vocab_size, seed=seed) for seed in (1, 2))
    stream = build_stream(stored, range(7), layout)
    policy_logps = model(stream)
    made = objective("sigmoid,tdpo2", wpo=True)
    found = made.pairs(stream, policy_logps, reference(stream), model, reference)
    expected = {name: [] for name in vars(found) if name not in ("score_margins", "ranked_logratios")}
    for w, x in by_hand(model, reference, tokenizer):
        shorter, surprise = min(len(w["p"]), len(x["p"])), 0
        for name, side in (("chosen", w), ("rejected", x)):
            expected[f"policy_{name}_logps"].append(side["p"].sum())
            expected[f"reference_{name}_logps"].append(side["q"].sum())
            expected[f"{name}_lengths"].append(torch.tensor(float(len(side["p"])), dtype=torch.float64))
            expected[f"{name}_tails"].append((side["p"] - side["q"])[shorter:].sum())
            expected[f"{name}_kl"].append(side["kl"].sum())
            surprise = surprise + (side["p"] - side["collisions"]).mean()
        expected["pair_weights"].append(surprise.exp().clamp(max=1))
    for name, values in expected.items():
        torch.testing.assert_close(getattr(found, name), torch.stack(values), rtol=1e-9, atol=1e-9, msg=name)
    assert not found.pair_weights.requires_grad and found.chosen_tails.any() and found.rejected_tails.any()


def test_the_exact_kl_in_chunks_with_its_gradient(stored, tokenizer, monkeypatch):
    """Chunks change nothing, no tensor of (tokens, vocabulary) waits for backward, equal models are at 0."""
    model, reference = (make_model(tokenizer.vocab_size, seed=seed) for seed in (1, 2))
    stream, weights = build_stream(stored, range(3)), list(model.parameters())
    p, q = (torch.cat([*m.log_distributions(stream)]) for m in (model, reference))
    whole = (q.exp() * (q - p)).sum(1)
    coefficients = torch.linspace(-1, 2, len(whole), dtype=torch.float64)
    expected = torch.autograd.grad(whole @ coefficients, weights)
    monkeypatch.setattr(transformer, "MAX_LOGITS", 3 * tokenizer.vocab_size)
    shapes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: shapes.append(x.shape) or x, lambda x: x):
        found = next_token_kl(reference.requires_grad_(False), model, stream)
    assert shapes and not any(shape[-1:] == (tokenizer.vocab_size,) for shape in shapes)
    torch.testing.assert_close(found, whole)
    for one, other in zip(torch.autograd.grad(found @ coefficients, weights), expected, strict=True):
        torch.testing.assert_close(one, other)
    same = next_token_kl(copy.deepcopy(model).requires_grad_(False), model, stream)
    assert not same.any()
    assert max(g.abs().max() for g in torch.autograd.grad(same.sum(), weights)) < 1e-12


def test_tdpo2_needs_whole_models():
    """A cache of log-probs has no distributions; a split model has no whole head."""
    with pytest.raises(InputError, match="--loss tdpo2 compares whole distributions, which --shard splits"):
        Objective(train_dpo.Settings(loss="tdpo2", shard=True))
    with pytest.raises(InputError, match="--reference cached keeps one number a token, but --loss tdpo2"):
        reference_module.check_cached(objective("tdpo2"))


def test_tdpo2_with_adapters(stored, tokenizer):
    """The reference is the model without them: D is 0 at the start, that of two models afterwards."""
    model = make_model(tokenizer.vocab_size, seed=1)
    start, stream = copy.deepcopy(model), build_stream(stored, range(3))
    add_adapters(model, 2, 4, "all", seed=0)
    without = AdapterReference(model)
    assert not next_token_kl(without, model, stream).any()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("lora_B"):
                weight.fill_(0.3)
    found = next_token_kl(without, model, stream)
    assert found.min() > 0
    torch.testing.assert_close(found, next_token_kl(start, model, stream))


def test_collisions_of_two_tokens_by_hand():
    """pi = (0.9, 0.1): two draws agree with probability 0.82. A likely pair would weigh 1.2; it weighs 1."""
    collisions = float64([math.log(0.82)])
    likely = float64([math.log(0.9)]) - collisions
    assert (2 * likely).exp().item() == pytest.approx(1.2046, abs=1e-4)
    one, unlikely = float64([1.0]), float64([math.log(0.1)]) - collisions
    assert wpo_weights(likely, likely, one, one).item() == 1
    assert wpo_weights(likely, unlikely, one, one).item() == pytest.approx(0.9 * 0.1 / 0.82**2)
    assert wpo_weights(10 * unlikely, likely, 10 * one, one).item() == pytest.approx(0.9 * 0.1 / 0.82**2)


@pytest.mark.parametrize("name", ["sigmoid", "hinge", "sigmoid,sft", "simpo"])
def test_wpo_weighs_losses_and_has_no_gradient_of_its_own(name):
    """A weight with a gradient teaches the policy to find its own pairs unlikely."""
    weights = torch.linspace(0.1, 1, 6, dtype=torch.float64)
    pairs = make_pairs(pair_weights=weights)
    plain, weighed = objective(name)(pairs), objective(name, wpo=True)(pairs)
    torch.testing.assert_close(weighed, plain * weights)
    for found, expected in zip(gradients(weighed, pairs), gradients(plain, pairs), strict=True):
        torch.testing.assert_close(found, expected * weights)


@pytest.mark.parametrize("name", ["sigmoid", "ipo", "dpop", "apo_zero", "aot_unpaired"])
def test_ld_dpo_replaces_the_log_ratios(name):
    """Policy and reference alike; alpha near 1 changes nothing; an SFT term beside it stays whole."""
    tails = {"chosen_tails": float64([0, 0.5, 1, 0, -2, 0]), "rejected_tails": float64([0.3, 0, 0, -1, 0, 2])}
    for alpha in (0.0, 0.6):
        a, b = (
            (float64(x) - (1 - alpha) * tail).tolist()
            for x, tail in zip((A, B), tails.values(), strict=True)
        )
        found = objective(name, ld_alpha=alpha)(make_pairs(**tails))
        torch.testing.assert_close(found, objective(name)(make_pairs(a, b)))
        with_sft = objective(f"{name},sft", ld_alpha=alpha)(make_pairs(**tails))
        torch.testing.assert_close(with_sft - found, objective("sft")(make_pairs()))


# ---- What changes from step to step


class Bare(torch.nn.Module):
    def __init__(self, value: float):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor([value, -value]))


def test_tr_dpo_softly_at_every_step():
    """pi_ref <- alpha pi + (1 - alpha) pi_ref."""
    made, model, reference = objective(tr_alpha=0.25), Bare(1.0), Bare(0.0).requires_grad_(False)
    expected = 0.0
    for step in (1, 2, 3):
        made.after_step(step, model, reference, lambda x: x)
        expected = 0.25 + 0.75 * expected
        assert reference.weight.tolist() == pytest.approx([expected, -expected])
    assert model.weight.tolist() == [1, -1]


def run_steps(made: Objective, steps: list[list[list[int]]], sum_over_ranks=lambda x: x) -> list[float]:
    """Train on rows of (A, B), by steps and micro-batches: delta before each step, and after the last."""
    deltas = []
    for step, micro_batches in enumerate(steps, start=1):
        deltas.append(made.delta)
        for rows in micro_batches:
            made.add_rewards(take(make_pairs(), rows))
        made.after_step(step, None, None, sum_over_ranks)
    return [*deltas, made.delta]


def take(pairs: Pairs, rows: list[int]) -> Pairs:
    return Pairs(**{name: value if value is None else value[rows] for name, value in vars(pairs).items()})


def test_delta_is_the_mean_reward_of_the_steps_before():
    """(r_w + r_l) / 2, all pairs alike, however the windows are dealt: a mean of means is another number."""
    means = [0.3 * (A[i] + B[i]) / 2 for i in range(6)]
    expected = [0, sum(means[:3]) / 3, sum(means) / 6]
    for steps in ([[[0, 1, 2]], [[3, 4, 5]]], [[[0], [1, 2]], [[3, 4], [], [5]]]):
        made = objective("bco_pair")
        made.load_state_dict({"reward_sum": 0.0, "reward_count": 0.0})
        assert run_steps(made, steps) == pytest.approx(expected)


def test_two_ranks_have_one_delta():
    """Each rank sees its own rows; both must divide at the same place, that of one process."""
    alone = objective("bco_pair")
    wanted = run_steps(alone, [[[0, 1, 2]], [[3, 4, 5]]])
    ranks, found = [objective("bco_pair"), objective("bco_pair")], []
    for step, shares in enumerate([([0, 1], [2]), ([3, 4, 5], [])], start=1):
        for made, rows in zip(ranks, shares, strict=True):
            made.add_rewards(take(make_pairs(), rows))
        total = sum(made.step_rewards for made in ranks)
        for made in ranks:
            made.after_step(step, None, None, lambda mine, total=total: total)
        found.append([made.delta for made in ranks])
    assert found[0] == pytest.approx([wanted[1]] * 2) and found[1] == pytest.approx([wanted[2]] * 2)


def test_delta_is_kept_in_a_checkpoint_and_has_no_gradient():
    made = objective("bco_pair")
    run_steps(made, [[[0, 1]], [[2, 3, 4]]])
    again = Objective(ObjectiveSettings(loss="bco_pair", beta=0.3))
    again.load_state_dict(made.state_dict())
    assert again.delta == made.delta != 0
    assert torch.equal(again(make_pairs()), made(make_pairs()))
    assert isinstance(made.delta, float)  # A number knows no graph.


def test_evaluation_leaves_delta_alone():
    made = objective("bco_pair", delta=DELTA)
    made(make_pairs())
    made.after_step(1, None, None, lambda x: pytest.fail("nothing was trained on"))
    assert made.delta == pytest.approx(DELTA)


def test_dpo_exchanges_nothing_and_leaves_the_reference_alone():
    made, reference = objective("sigmoid"), Bare(0.7)
    made.add_rewards(make_pairs())
    made.after_step(1, Bare(0.1), reference, lambda x: pytest.fail("an exchange that no loss needs"))
    assert reference.weight.tolist() == pytest.approx([0.7, -0.7])


# ---- Evaluation


@pytest.mark.parametrize("options", [{}, {"wpo": True}, {"ld_alpha": 0.5}], ids=["plain", "wpo", "ld"])
@pytest.mark.parametrize("name", ["sigmoid", "bco_pair", "nca_pair"])
def test_evaluation_does_not_depend_on_its_batches(name, options, stored, tokenizer):
    """A mean of the means of batches weighs a short one too much. (Coupled losses do depend on them.)"""
    model, reference = (make_model(tokenizer.vocab_size, seed=seed) for seed in (1, 2))
    made = objective(name, 0.1, DELTA, **options)
    whole, *others = (
        evaluate(model, reference, stored, ALONE, FP32, made, max_tokens=size) for size in (500, 1, 130, 250)
    )
    for other in others:
        assert other == pytest.approx(whole, rel=1e-5, abs=1e-6)
    assert whole["rewards/accuracies"] * 7 == pytest.approx(round(whole["rewards/accuracies"] * 7))


# ---- Through the training loop

LABELS = [
    {"score_chosen": 7 + i, "score_rejected": 6.5} if i % 2 else {"win_probability": 0.8} for i in range(7)
]


@pytest.fixture
def run_dpo(tmp_path, tokenizer, write_jsonl):
    """Run train_dpo from a tiny model on the ragged pairs; flags as they stand on a command line."""
    rows = [{**as_record(pair), **labels} for pair, labels in zip(RAGGED, LABELS, strict=True)]
    data = write_jsonl("labelled.jsonl", rows)
    made = run_flags(
        tmp_path, tokenizer, shape={"spread": 0.1}, epochs=2, log_every=1, eval_every=1, overwrite=True
    )

    def run(*flags: str, out="out", data=data, command=train_dpo.main):
        command([*made(tmp_path / out, data=data, eval_data=data), *flags])
        return tmp_path / out

    return run


FLAGS = {
    **{name: ["--loss", name] for name in LOSSES if name != "kto"},  # tests/test_unpaired.py
    "robust": ["--loss", "robust", "--label-smoothing", "0.1"],
    "rdpo": ["--loss", "rdpo", "--rdpo-alpha", "0.05"],
    "chi2": ["--f-divergence", "chi2_kl", "--chi2-clip", "3"],
    "mpo": ["--loss", "sigmoid,bco_pair,sft", "--loss-weights", "0.8,0.2,1", "--wpo", "--ld-alpha", "0.5"],
    "f-dpo": ["--f-divergence", "alpha", "--divergence-alpha", "0.3", "--label-smoothing", "0.1"],
    "tr-soft": ["--loss", "ipo", "--tr-alpha", "0.5"],
    "tr-hard": ["--tr-every", "2"],
}


@pytest.mark.parametrize("flags", FLAGS.values(), ids=FLAGS)
def test_every_objective_trains_and_evaluates(flags, run_dpo, tokenizer, stored, monkeypatch):
    """The flags reach the loss: log and evaluation begin with what the objective says of two equal models."""
    copies = []
    deepcopy = SimpleNamespace(deepcopy=lambda model: copies.append(model) or copy.deepcopy(model))
    monkeypatch.setattr(reference_module, "copy", deepcopy)
    folder = run_dpo(*flags, "--batch-size", "7")
    rows = metrics(folder)
    made = Objective(train_dpo.parse(train_dpo.Settings, "", flags))
    model = load_model(folder.parent / "start")
    data = open_store(folder.parent / "labelled.jsonl", "preferences", tokenizer, 512)
    stream = build_stream(data, range(7))
    with torch.no_grad():
        logps = model(stream)
        reference = logps if made.needs_reference else no_reference(stream)
        expected = made(made.pairs(stream, logps, reference, model, model)).mean().item()
    assert next(row["loss"] for row in rows if "loss" in row) == pytest.approx(expected, rel=1e-5)
    assert rows[0]["eval_loss"] == pytest.approx(expected, rel=1e-5)
    assert len(copies) == made.needs_reference
    assert all(math.isfinite(value) for row in rows for value in row.values())
    assert rows[-2]["grad_norm"] > 0


@pytest.mark.parametrize("name", ["bco_pair", "mpo", "tr-soft", "tr-hard", "simpo", "soft", "tdpo2"])
def test_accumulation_equals_one_big_batch(name, run_dpo):
    """Also of what is remembered between steps: four steps, the windows whole or in pieces."""
    flags = [*FLAGS[name], "--eval-data", ""]
    whole = record_gradients(train_dpo, lambda: run_dpo(*flags, out="whole"))
    split = record_gradients(train_dpo, lambda: run_dpo(*flags, "--micro-batch-tokens", "130", out="split"))
    assert len(whole) == len(split) == 4
    assert_close(split, whole, 1e-4)


def test_delta_follows_the_rewards_of_the_loop(run_dpo, monkeypatch):
    """Two steps over all seven pairs: delta is the mean of both rows, and of nothing else."""
    made = []
    monkeypatch.setattr(train_dpo, "Objective", lambda settings: made.append(Objective(settings)) or made[0])
    rows = [row for row in metrics(run_dpo("--loss", "bco_pair", "--batch-size", "7")) if "loss" in row]
    means = [(row["rewards/chosen"] + row["rewards/rejected"]) / 2 for row in rows]
    assert len(means) == 2 and made[0].reward_count == 14
    assert made[0].delta == pytest.approx(sum(means) / 2, rel=1e-5) and abs(made[0].delta) > 1e-4


def test_two_ranks_equal_one_process_with_everything_on(run_dpo, tmp_path):
    """delta meets across ranks, both references move alike, and a rank's last micro-batch may be empty."""
    losses = ["--loss", "sigmoid,bco_pair,sft,tdpo2", "--loss-weights", "0.8,0.2,1,0.5"]
    flags = [*FLAGS["mpo"], *losses, "--tr-alpha", "0.5", "--eval-data", "", "--micro-batch-tokens", "1"]
    alone = record_gradients(train_dpo, lambda: run_dpo(*flags, out="one"))

    def on_two_ranks(arguments):
        result = forked("tests.loops", "train_dpo", tmp_path / "two.pt", *arguments, ranks=2)
        assert result.returncode == 0, result.stderr

    run_dpo(*flags, out="two", command=on_two_ranks)
    assert_close(torch.load(tmp_path / "two.pt", weights_only=True), alone, 2e-4)


def test_the_reference_follows_in_the_loop(run_dpo):
    """Copied at every step it is the policy, so each loss is ln 2; at every other step, every other is."""

    def losses(*flags):
        return [row["loss"] for row in metrics(run_dpo(*flags)) if "loss" in row]

    ln2 = pytest.approx(math.log(2), abs=1e-6)
    assert losses("--tr-every", "1") == [ln2] * 4
    alternate = losses("--tr-every", "2")
    assert alternate[0::2] == [ln2] * 2 and all(loss != ln2 for loss in alternate[1::2])
    assert losses("--tr-alpha", "1") == [ln2] * 4
    assert all(loss != ln2 for loss in losses()[1:])


def test_soft_reads_the_labels_of_the_data(run_dpo, tokenizer):
    """By pair: another label is another gradient. Scores count by their difference, times the scale."""
    folder = run_dpo("--loss", "soft", "--score-scale", "0.5", "--batch-size", "7", "--epochs", "1")
    probabilities = [s(0.5 * (i + 0.5)) if i % 2 else s(0.5 * math.log(4)) for i in range(7)]
    model = load_model(folder.parent / "start")
    data = open_store(folder.parent / "labelled.jsonl", "preferences", tokenizer, 512)
    stream = build_stream(data, range(7))
    chosen, rejected = stream.sum_by_side(model(stream))
    # Where policy is reference the slope in h is sigmoid(0) - p.
    ((0.5 - torch.tensor(probabilities)) * 0.1 * (chosen - rejected)).mean().backward()
    norm = torch.cat([p.grad.flatten() for p in model.parameters()]).norm().item()
    row = next(row for row in metrics(folder) if "grad_norm" in row)
    assert row["grad_norm"] == pytest.approx(norm, rel=1e-4)


def test_soft_needs_labels(run_dpo, write_jsonl):
    """Said before a step is made, with the line. Other losses do not ask."""
    rows = [as_record(pair) for pair in RAGGED]
    rows[0] |= {"score_chosen": 2, "score_rejected": 1}
    path = write_jsonl("bare.jsonl", rows)
    with pytest.raises(InputError, match=rf"{path}:2: --loss soft needs score_chosen and score_rejected, or"):
        run_dpo("--loss", "soft", data=path)
    run_dpo("--max-steps", "1", data=path)


@pytest.mark.parametrize("loss, labels, reason", [
    ("rebel", {}, "--loss rebel needs score_chosen and score_rejected, or win_probability"),
    ("rebel", {"win_probability": 1}, "--loss rebel needs a finite difference of scores; a win_prob"),
    ("odpo", {"win_probability": 0}, "--loss odpo needs a finite difference of scores"),
    ("odpo", {"score_chosen": 1, "score_rejected": 2}, "--loss odpo needs score_chosen above score_rejected"),
])  # fmt: skip
def test_a_record_whose_scores_do_not_suffice(loss, labels, reason, tmp_path, tokenizer, write_jsonl):
    rows = [as_record(pair) | {"score_chosen": 2, "score_rejected": 1} for pair in RAGGED]
    rows[3] = as_record(RAGGED[3]) | labels
    path = write_jsonl("scored.jsonl", rows)
    store = open_store(path, "preferences", tokenizer, max_length=512)
    with pytest.raises(InputError, match=rf"{path}:4: {reason}"):
        objective(loss).check_data(store, path)
    objective("sigmoid").check_data(store, path)
    if "score_chosen" in labels:
        mended = open_store(path, "preferences", tokenizer, max_length=512, swap_by_score=True)
        objective("odpo").check_data(mended, path)
        objective("rebel").check_data(store, path)  # A negative gap can be fitted.
