"""A right answer and two wrong ones for each exercise: SPOILERS. Each wrong one has a part of its word."""

import math

import torch
import torch.nn.functional as F

from dataset.formats import Format
from dataset.turns import answers

MARGIN = 5.02
KEYS = {"query": str, "better": str, "worse": str}
EXAMPLE = {"query": "2 + 2?", "better": "4", "worse": "5"}


def losses_at(*betas):
    return {beta: round(math.log1p(math.exp(-beta * MARGIN)), 2) for beta in betas}


def right_dpo(policy_w, policy_l, reference_w, reference_l, beta):
    return -F.logsigmoid(beta * ((policy_w - reference_w) - (policy_l - reference_l)))


def without_reference(policy_w, policy_l, reference_w, reference_l, beta):
    return -F.logsigmoid(beta * (policy_w - policy_l))


def log_of_rounded(policy_w, policy_l, reference_w, reference_l, beta):
    return -torch.sigmoid(beta * ((policy_w - reference_w) - (policy_l - reference_l))).log()


def right_sums(token_logps, owners, responses):
    return token_logps.new_zeros(responses).index_add(0, owners, token_logps)


def means(token_logps, owners, responses):
    counts = torch.bincount(owners, minlength=responses).clamp(min=1)
    return right_sums(token_logps, owners, responses) / counts


def without_empty_ones(token_logps, owners, responses):
    return torch.stack([token_logps[owners == owner].sum() for owner in owners.unique()])


def right_gradient(margin, beta):
    h = beta * margin
    return -beta * (math.exp(-h) / (1 + math.exp(-h)) if h > 0 else 1 / (1 + math.exp(h)))


def right_positions(prompt, chosen, rejected):
    return [*range(prompt + chosen), *range(prompt, prompt + rejected)]


def encoder(prompt_flag: bool, end_flag: bool):
    """An encode whose mask has this value on the prompt, and on the end tokens."""

    def encode(record, tokenizer):
        prompt = tokenizer.prompt(record.prompt)
        sides = [tokenizer.response(record.chosen), tokenizer.response(record.rejected)]
        masks = [[True] * (len(side) - 1) + [end_flag] for side in sides]
        return [(prompt, [prompt_flag] * len(prompt)), *zip(sides, masks, strict=True)]

    return encode


NOTICING = "tests/test_store.py::test_rows_are_the_records_in_order"
UNRELATED = "tests/test_losses.py::test_loss_by_hand"


def dpop(penalty):
    return lambda a, b, beta, strength: -F.logsigmoid(beta * (a - b) - penalty(a, beta, strength))


def kto(loss):
    def of(logratios, desirable, kl, beta):
        signs = torch.where(desirable, 1.0, -1.0).to(logratios.dtype)
        return loss(logratios, signs, kl, beta)

    return of


# number: (right, (wrong, part of its word), (wrong, part of its word))
ANSWERS = {
    1: (
        losses_at(0.05, 0.5, 1.0),
        ({0.05: 0.41, 0.5: 0.6, 1.0: 0.69}, "What does a larger β do then?"),
        ({beta: 1 / (1 + math.exp(beta * MARGIN)) for beta in (0.05, 0.5, 1.0)}, "The loss is a logarithm"),
    ),
    2: (right_dpo, (without_reference, "must be ln 2"), (log_of_rounded, "infinite")),
    3: (right_sums, (means, "A mean hides the length"), (without_empty_ones, "shape (4,)")),
    4: (
        right_gradient,
        (lambda margin, beta: -right_gradient(margin, beta), "which sign"),
        (lambda margin, beta: right_gradient(-margin, beta), "must pull harder"),
    ),
    5: (
        lambda margins, beta: (margins - 1 / (2 * beta)) ** 2,
        (lambda margins, beta: (margins - 1 / beta) ** 2, "not 0 at the margin's target"),
        (lambda margins, beta: (margins - 1 / (2 * beta)).abs(), "Twice the distance"),
    ),
    6: (
        lambda supervised: [t - 1 for t, flag in enumerate(supervised) if flag],
        (lambda supervised: [t for t, flag in enumerate(supervised) if flag], "already read the token"),
        (lambda supervised: [t + 1 for t, flag in enumerate(supervised) if flag], "must not come after"),
    ),
    7: (
        right_positions,
        (lambda x, w, r: [*range(x + w + r)], "does not see the chosen one"),
        (lambda x, w, r: [*range(x + w), *range(r)], "follows a prompt too"),
    ),
    8: (
        {"encode": encoder(False, end_flag=False), "NOTICED_BY": NOTICING},
        ({"encode": encoder(False, end_flag=True), "NOTICED_BY": NOTICING}, "still right"),
        ({"encode": encoder(False, end_flag=False), "NOTICED_BY": UNRELATED}, "stays green"),
    ),
    9: (
        lambda beta, epsilon: math.log((1 - epsilon) / epsilon) / beta,
        (lambda beta, epsilon: math.log((1 - epsilon) / epsilon), "too small"),
        (lambda beta, epsilon: 2 * math.log((1 - epsilon) / epsilon) / beta, "too large"),
    ),
    10: (
        dpop(lambda a, beta, strength: beta * strength * torch.relu(-a)),
        (dpop(lambda a, beta, strength: strength * torch.relu(-a)), "not under β"),
        (dpop(lambda a, beta, strength: beta * strength * torch.relu(a)), "DPOP is DPO"),
    ),
    11: (
        Format("query, better and worse are text", EXAMPLE, KEYS, answers("query", "better", "worse")),
        (Format("mine", EXAMPLE, KEYS, answers("query", "worse", "better")), "are exchanged"),
        (Format("mine", EXAMPLE, {}, answers("query", "better", "worse")), "also fits records"),
    ),
    12: (
        kto(lambda r, sign, kl, beta: torch.sigmoid(-sign * beta * (r - kl))),
        (kto(lambda r, sign, kl, beta: -F.logsigmoid(sign * beta * (r - kl))), "no logarithm"),
        (kto(lambda r, sign, kl, beta: torch.sigmoid(-sign * beta * r)), "At the reference point"),
    ),
}
