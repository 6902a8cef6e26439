"""The equations of docs/DERIVATION.md against the functions that the page names, on numbers."""

import importlib
import math
import re
from itertools import permutations

import pytest
import torch

from dataset.packing import build_stream
from dataset.store import open_store
from tests.conftest import as_record, make_model, plain_ids, plain_logits, turns
from tests.loops import ROOT
from training.objective import Pairs

PAGES = {name: (ROOT / "docs" / f"DERIVATION{name}.md").read_text("utf-8") for name in ("", ".zh")}
EQUATION = r"^\$\$ (.*) \\tag\{(\d+)\} \$\$\n\n(?:In code: |代码：)\[(.*?)\]\(.*?\) `(.*?)`"
EQUATIONS = re.findall(EQUATION, PAGES[""], re.M)

# The finite example of the page: three answers, their reference probabilities and rewards.
BETA, REFERENCE, REWARDS = 0.5, (0.5, 0.3, 0.2), (0.0, 0.5, 1.0)
TERMS = [p * math.exp(r / BETA) for p, r in zip(REFERENCE, REWARDS, strict=True)]
Z = sum(TERMS)
LOGS = torch.tensor(REFERENCE, dtype=torch.float64).log()
BEST = [term / Z for term in TERMS]
A, B, C = range(3)


def sigma(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def goal(policy) -> float:
    """Equation (1): the expected reward minus β KL."""
    terms = zip(policy, REFERENCE, REWARDS, strict=True)
    return sum(p * (r - BETA * math.log(p / q)) for p, q, r in terms if p)


def logratios(*answers: int) -> list[torch.Tensor]:
    """log π*/π_ref of each of these answers."""
    return [torch.tensor([math.log(BEST[y] / REFERENCE[y])], dtype=torch.float64) for y in answers]


@pytest.fixture
def pair(tokenizer, write_jsonl, monkeypatch, tmp_path):
    """(prompt ids, chosen ids, rejected ids, stream) of a pair whose answers begin with equal tokens."""
    monkeypatch.setenv("MINIDPO_CACHE", str(tmp_path / "cache"))
    record = turns("How many?"), "The same, one!", "The same, two!!"
    path = write_jsonl("pair.jsonl", [as_record(record)])
    ids = [plain_ids(tokenizer, record[0], answer) for answer in record[1:]]
    stream = build_stream(open_store(str(path), "preferences", tokenizer, 512), [0])
    return ids[0][0], ids[0][1], ids[1][1], stream


# ---- One check an equation; each takes the function that the page names


def check_goal(next_token_kl, pair, tokenizer):
    """The KL of an answer is the sum of the KLs of its tokens, here along one answer."""
    prompt, chosen, _, stream = pair
    policy, reference = (make_model(tokenizer.vocab_size, seed=seed) for seed in (1, 2))
    tables = [plain_logits(model, prompt + chosen).softmax(-1) for model in (policy, reference)]
    p, q = (table[len(prompt) - 1 : -1] for table in tables)
    expected = (p * (p / q).log()).sum(-1)
    torch.testing.assert_close(next_token_kl(policy, reference, stream)[: len(chosen)], expected)


def check_solution(soft, *_):
    """π* has the highest goal, β log Z; and it is the minimum of the expected loss of all pairs."""
    assert goal(BEST) == pytest.approx(BETA * math.log(Z))
    for seed in range(20):
        other = torch.randn(3, generator=torch.Generator().manual_seed(seed)).softmax(0).tolist()
        assert goal(other) < goal(BEST)
    logits = torch.zeros(3, dtype=torch.float64, requires_grad=True)  # the policy, π_ref at the start
    optimizer = torch.optim.LBFGS([logits], max_iter=100, tolerance_grad=1e-12, tolerance_change=0)

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        ratios = (logits + LOGS).log_softmax(0) - LOGS
        gaps = {(i, j): torch.tensor(REWARDS[i] - REWARDS[j]) for i, j in permutations(range(3), 2)}
        total = sum(soft(ratios[i] - ratios[j], BETA, gap) for (i, j), gap in gaps.items())
        total.backward()
        return total

    optimizer.step(loss)
    assert (logits + LOGS).softmax(0).tolist() == pytest.approx(BEST, abs=1e-6)


def check_reward(pair_metrics, *_):
    """The logged reward plus β log Z is the reward that the policy is optimal for."""
    for won, lost in permutations(range(3), 2):
        probabilities = BEST[won], BEST[lost], REFERENCE[won], REFERENCE[lost]
        logps = (torch.tensor([math.log(p)], dtype=torch.float64) for p in probabilities)
        found = pair_metrics(torch.zeros(1), Pairs(*logps), BETA)
        for side, answer in (("chosen", won), ("rejected", lost)):
            reward = found[f"rewards/{side}"].item() + BETA * math.log(Z)
            assert reward == pytest.approx(REWARDS[answer])


def check_bradley_terry(bradley_terry_loss, *_):
    """exp(−loss) of the two orders are e^r_w and e^r_l over their sum: Bradley and Terry's own form."""
    for won, lost in permutations(range(3), 2):
        rewards = (torch.tensor([REWARDS[y]], dtype=torch.float64) for y in (won, lost))
        strengths = math.exp(REWARDS[won]), math.exp(REWARDS[lost])
        assert math.exp(-bradley_terry_loss(*rewards).item()) == pytest.approx(strengths[0] / sum(strengths))


def check_loss(sigmoid, *_):
    """At π* DPO gives every pair the likelihood that the rewards give it; at π_ref it is ln 2."""
    for won, lost in permutations(range(3), 2):
        a, b = logratios(won, lost)
        expected = -math.log(sigma(REWARDS[won] - REWARDS[lost]))
        assert sigmoid(a - b, BETA).item() == pytest.approx(expected)
    assert sigmoid(torch.zeros(1), BETA).item() == pytest.approx(math.log(2))


def check_gradient(sigmoid, *_):
    """Finite differences by the scores of a policy over the three answers."""
    scores = torch.tensor([0.3, -0.2, 0.9], dtype=torch.float64)

    def loss(z: torch.Tensor) -> float:
        ratios = z.log_softmax(0) - LOGS
        return sigmoid(ratios[C] - ratios[A], BETA).item()

    step = torch.eye(3, dtype=torch.float64) * 1e-6
    found = [(loss(scores + e) - loss(scores - e)) / 2e-6 for e in step]
    policy, ratios = scores.softmax(0), scores.log_softmax(0) - LOGS
    weight = sigma(BETA * (ratios[A] - ratios[C]).item())
    gradients = [torch.eye(3, dtype=torch.float64)[y] - policy for y in (C, A)]  # of log π(y)
    expected = -BETA * weight * (gradients[0] - gradients[1])
    assert found == pytest.approx(expected.tolist(), abs=1e-8)


def check_sum(sum_by_side, pair, tokenizer):
    """The probability of an answer is the product of its tokens' probabilities, in a dense loop."""
    prompt, chosen, rejected, stream = pair
    model = make_model(tokenizer.vocab_size)
    for answer, found in zip((chosen, rejected), sum_by_side(stream, model(stream)), strict=True):
        product = 1.0
        for t, token in enumerate(answer):
            product *= plain_logits(model, prompt + answer[:t])[-1].softmax(0)[token].item()
        assert found.item() == pytest.approx(math.log(product))


def check_token(token_logps, *_):
    """Finite differences of log π(y_t) by each score."""
    scores = torch.tensor([[0.3, -0.2, 0.9, 2.0]], dtype=torch.float64)
    for target in range(4):
        step = torch.eye(4, dtype=torch.float64) * 1e-6
        y = torch.tensor([target])
        found = [((token_logps(scores + e, y) - token_logps(scores - e, y)) / 2e-6).item() for e in step]
        expected = [(j == target) - scores.softmax(-1)[0, j].item() for j in range(4)]
        assert found == pytest.approx(expected, abs=1e-8)


def check_dpop(dpop, *_):
    for a, b in ((-1.0, -5.0), (2.0, 1.0)):
        sides = [torch.tensor([x], dtype=torch.float64, requires_grad=True) for x in (a, b)]
        loss = dpop(*sides, beta=0.1, dpop_lambda=5.0)
        assert loss.item() == pytest.approx(-math.log(sigma(0.1 * (a - b - 5 * max(0, -a)))))
        by_a, by_b = torch.autograd.grad(loss, sides)
        assert by_a.item() == pytest.approx(-by_b.item() * (6 if a < 0 else 1))


def check_soft(soft, *_):
    """The minimum of the loss over h, on a fine grid, is at logit p: the reward gap."""
    gap, h = 1.25, torch.linspace(-4, 4, 8001, dtype=torch.float64, requires_grad=True)
    p = sigma(gap)
    losses = soft(h, 1.0, torch.tensor(gap))
    expected = [-p * math.log(sigma(x)) - (1 - p) * math.log(sigma(-x)) for x in h.tolist()]
    assert losses.tolist() == pytest.approx(expected, rel=1e-6)
    assert h[losses.argmin()].item() == pytest.approx(math.log(p / (1 - p))) == pytest.approx(gap)
    (slope,) = torch.autograd.grad(losses.sum(), h)
    torch.testing.assert_close(slope, h.detach().sigmoid() - p, rtol=0, atol=1e-7)


CHECKS = [check_goal, check_solution, check_reward, check_bradley_terry, check_loss, check_gradient,
          check_sum, check_token, check_dpop, check_soft]  # fmt: skip


@pytest.mark.parametrize("equation", EQUATIONS, ids=lambda equation: f"{equation[1]} {equation[3]}")
def test_the_function_computes_the_equation(equation, pair, tokenizer):
    _, number, path, name = equation
    function = importlib.import_module(path.removesuffix(".py").replace("/", "."))
    for part in name.split("."):
        function = getattr(function, part)
    CHECKS[int(number) - 1](function, pair, tokenizer)


def test_every_equation_of_both_pages_names_its_function():
    assert [int(number) for _, number, *_ in EQUATIONS] == [*range(1, len(CHECKS) + 1)]
    assert re.findall(EQUATION, PAGES[".zh"], re.M) == EQUATIONS
    for text in PAGES.values():
        assert len(EQUATIONS) == text.count("\\tag{") == text.count("$$") / 2


# ---- The numbers and the claims of the page


@pytest.mark.parametrize("text", PAGES.values(), ids=["English", "Chinese"])
def test_the_example_is_computed(text):
    rows = [
        f"| {name} | {p:g} | {r:g} | {term:.4f} | {best:.4f} | {log:.4f} | {log + BETA * math.log(Z):.4f} |"
        for name, p, r, term, best in zip("ABC", REFERENCE, REWARDS, TERMS, BEST, strict=True)
        for log in [BETA * math.log(best / p)]
    ]
    for row in rows:
        assert row.replace("-", "−") in text, row
    values = [Z, BETA * math.log(Z), goal(BEST), goal(REFERENCE), goal((0, 0, 1)), sigma(1)]  # in this order
    values += [math.log(2), sigma(1), -math.log(sigma(1)), sigma(-1), sigma(-5)]
    prose = re.sub(r"^\|.*", "", text, flags=re.M)
    assert re.findall(r"(?<!\d)\d\.\d{4}", prose) == [f"{value:.4f}" for value in values]


def test_shared_tokens_move_although_they_have_no_gradient(pair, tokenizer):
    """Without the shared tokens the gradient is the same; a step along it changes their log-probs."""
    *_, chosen, rejected, stream = pair
    shared = next(i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b)
    first, second = 0, len(chosen)  # where each answer's tokens begin
    both = [*range(first, first + shared), *range(second, second + shared)]
    assert shared >= 2
    kept = torch.ones(len(stream.targets), dtype=torch.float64)
    kept[both] = 0
    model = make_model(tokenizer.vocab_size)
    weights = [*model.parameters()]

    def gradients(factors: torch.Tensor) -> list[torch.Tensor]:
        a, b = stream.sum_by_side(model(stream) * factors)
        return torch.autograd.grad((-(a - b)).sum(), weights, allow_unused=True)

    whole, without = gradients(torch.ones_like(kept)), gradients(kept)
    for one, other in zip(whole, without, strict=True):
        torch.testing.assert_close(one, other)
    with torch.no_grad():
        before = model(stream)[both]
        for weight, gradient in zip(weights, whole, strict=True):
            weight -= 0.01 * gradient
        after = model(stream)[both]
    torch.testing.assert_close(after[:shared], after[shared:])  # equal on both sides, so the margin is blind
    assert (after - before).abs().min() > 1e-4
