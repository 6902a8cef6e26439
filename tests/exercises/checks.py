"""Whether the exercises of docs/TOUR.md are solved: one check each, with a word about what is wrong.

    make exercise N=3
    python -m tests.exercises.checks 3

A check tries properties first and values last, so that its word names the idea that is missing. It never
prints the answer.
"""

import math
import re
import runpy
import subprocess
import sys
import tempfile
import traceback
from importlib.util import find_spec
from pathlib import Path
from unittest.mock import patch

import torch
from torch import Tensor

import losses
from dataset import records
from dataset.formats import PREFERENCE_FORMATS, Format
from dataset.records import Preference, read_preferences
from dataset.store import encode
from dataset.tokenizer import ChatTokenizer
from dataset.turns import Message

ROOT = Path(__file__).resolve().parent.parent.parent
FOLDER = ROOT / "docs" / "exercises"
MARGIN = 5.02  # of the pair in docs/TOUR.md


class Wrong(Exception):
    """The answer is not right; the text is the useful word."""


def need(holds: bool, word: str) -> None:
    if not holds:
        raise Wrong(word)


def need_losses(got, count: int) -> Tensor:
    fits = isinstance(got, Tensor) and got.shape == (count,)
    need(fits, f"Return one value for each: a tensor of shape ({count},) here.")
    return got


def near(got, want, tolerance: float = 1e-6) -> bool:
    return torch.allclose(torch.as_tensor(got).double(), torch.as_tensor(want).double(), tolerance, tolerance)


def floats(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def check_1(predicted: dict) -> None:
    need(all(isinstance(value, (int, float)) for value in predicted.values()), "Fill in the three numbers.")
    need(predicted.keys() == {0.05, 0.5, 1.0}, "Keep the three values of β.")
    low, high, highest = predicted[0.05], predicted[0.5], predicted[1.0]
    need(low > high > highest, "The margin is positive: the pair is won. What does a larger β do then?")
    need(low < math.log(2), "The margin is positive, so the loss is below its value at a margin of 0.")
    for beta, value in predicted.items():
        chance = 1 / (1 + math.exp(-beta * MARGIN))
        need(abs(value - (1 - chance)) > 0.004 or beta == 1, "A probability? The loss is a logarithm.")
        need(abs(value + math.log(chance)) < 0.01, f"The loss with β = {beta} is off by more than 0.01.")


def check_2(dpo) -> None:
    policy, reference = (torch.randn(2, 4, dtype=torch.float64, generator=seeded(s)) * 5 for s in (1, 2))
    got = need_losses(dpo(*policy, *reference, 0.1), 4)
    start = dpo(*policy, *policy, 0.1)
    need(near(start, math.log(2)), "Where the policy equals the reference, every loss must be ln 2 = 0.693.")
    better = dpo(policy[0] + 1, policy[1], *reference, 0.1)
    need(bool((better < got).all()), "A likelier chosen answer must lower the loss.")
    far = torch.full((1,), 1e5)
    extreme = dpo(-far, far, 0 * far, 0 * far, 0.1)
    need(bool(extreme.isfinite()), "The loss is infinite for a pair that is far from won: σ(x) rounds to 0.")
    margins = (policy[0] - reference[0]) - (policy[1] - reference[1])
    for beta in (0.1, 2.0):
        need(near(dpo(*policy, *reference, beta), losses.sigmoid(margins, beta)), "Look at the place of β.")


def check_3(log_prob_of_answers) -> None:
    logps, owners = floats(-1, -2, -3, -4, -5, -6).requires_grad_(), torch.tensor([0, 0, 1, 1, 1, 3])
    got = need_losses(log_prob_of_answers(logps, owners, 4), 4)
    need(got[2] == 0, "Answer 2 has no tokens here, and its place must contain 0.")
    means = floats(-1.5, -4, 0, -6)
    need(not near(got, means), "A mean hides the length. log π(y|x) of a product of probabilities is …?")
    need(near(got, floats(-3, -12, 0, -6)), "The sums of the answers are different.")
    need(got.requires_grad, "The gradient must flow back to the tokens: do not leave torch.")


def check_4(gradient) -> None:
    slopes = [gradient(margin, 0.1) for margin in (-20.0, 0.0, 20.0)]
    need(all(slope < 0 for slope in slopes), "A likelier chosen answer lowers the loss: which sign is that?")
    need(slopes[0] < slopes[1] < slopes[2], "A pair that is lost must pull harder than a pair that is won.")
    try:
        gradient(-1e5, 0.1), gradient(1e5, 0.1)
    except OverflowError:
        raise Wrong("math.exp overflows at a margin of 100,000 nats: give it negative numbers.") from None
    for margin in (-20.0, -1.0, 0.0, 3.0, 20.0):
        for beta in (0.1, 0.5):
            x = floats(margin).requires_grad_()
            losses.sigmoid(x, beta).sum().backward()
            need(near(gradient(margin, beta), x.grad.item()), f"Wrong at margin {margin:g} with β = {beta}.")


def check_5(ipo) -> None:
    for beta in (0.1, 0.5):
        target = 1 / (2 * beta)
        got = need_losses(ipo(target + floats(-2, -1, 0, 1, 2), beta), 5)
        need(near(got[2], 0), f"With β = {beta} the loss is not 0 at the margin's target.")
        need(near(got[0], got[4]) and near(got[1], got[3]), "Beyond the target is as bad as below it.")
        need(near(got[4], 4 * got[3]), "Twice the distance must cost four times as much.")
        need(near(got[3], 1), "The squared distance has no other factor.")


def check_6(predictors) -> None:
    got = predictors([False] * 3 + [True] * 3)
    need(len(got) == 3, "Return one index for each supervised token.")
    need(list(got) != [3, 4, 5], "The hidden state at an index has already read the token at that index.")
    need(max(got) < 5, "A hidden state must not come after the token that it predicts.")
    need(list(got) == [2, 3, 4], "The end of the prompt predicts the first token of the answer.")
    turns = [False, False, True, True, False, False, True]
    need(list(predictors(turns)) == [1, 2, 5], "A conversation with two answers comes out wrong.")


def check_7(positions) -> None:
    got = list(positions(3, 2, 4))
    need(len(got) == 9, "Return one position for each token.")
    need(got[:5] == [0, 1, 2, 3, 4], "Prompt and chosen answer are an ordinary sequence.")
    need(got[5] != 0, "The rejected answer follows a prompt too.")
    need(got[5] != 5, "The rejected answer does not see the chosen one. Where is it without it?")
    need(got == [0, 1, 2, 3, 4, 3, 4, 5, 6], "The rejected answer is at wrong positions.")
    need(list(positions(0, 1, 2)) == [0, 0, 1], "It must work without a prompt too.")


def check_8(namespace: dict) -> None:
    tokenizer = ChatTokenizer(ROOT / "dataset" / "sample" / "tokenizer.json")
    record = Preference((Message("user", "2 + 2?"),), "4", "I do not know.", 1)
    right, broken = encode(record, tokenizer), namespace["encode"](record, tokenizer)
    same_ids = [ids for ids, _ in broken] == [ids for ids, _ in right]
    need(same_ids, "The ids have changed. Break the mask only.")
    need(all(len(ids) == len(mask) for ids, mask in broken), "A mask has one value for each id.")
    masks = [list(map(bool, mask)) for _, mask in broken]
    need(masks != [mask for _, mask in right], "The mask is still right.")
    node = namespace["NOTICED_BY"]
    file, _, name = node.partition("::")
    known = re.fullmatch(r"tests/test_\w+\.py", file) and (ROOT / file).is_file()
    name = name.partition("[")[0]
    need(known and f"def {name}(" in (ROOT / file).read_text("utf-8"), f"There is no test {node!r}.")
    need(find_spec("pytest") is not None, "This exercise needs pytest: `make lint` installs it.")
    status = run_with(namespace["__file__"], node)
    need(status != 0, "This test stays green with your mask. Which file is about the mask?")
    need(status == 1, "pytest could not run this test.")


def run_with(exercise: str, node: str) -> int:
    """The exit status of pytest on one test, while `encode` of an exercise's file replaces ours for pairs."""
    code = """
import runpy, sys, pytest
from dataset import records, store
right, broken = store.encode, runpy.run_path(sys.argv[1])["encode"]
store.encode = lambda record, tokenizer: (
    broken if isinstance(record, records.Preference) else right)(record, tokenizer)
sys.exit(pytest.main(["-q", "-x", "-m", "", "-p", "no:cacheprovider", "-p", "no:xdist", sys.argv[2]]))
"""
    command = [sys.executable, "-c", code, exercise, node]
    return subprocess.run(command, cwd=ROOT, capture_output=True, timeout=600).returncode


def check_9(resting_margin) -> None:
    for beta, epsilon in ((0.1, 0.1), (0.5, 0.1), (0.1, 0.3), (0.1, 0.5)):
        x = floats(resting_margin(beta, epsilon)).requires_grad_()
        losses.sigmoid(x, beta, epsilon).sum().backward()
        slope, case = x.grad.item() / beta, f"with β = {beta} and ε = {epsilon}"
        need(slope > -1e-6, f"The loss still falls at your margin {case}: the margin is too small.")
        need(slope < 1e-6, f"The loss rises at your margin {case}: the margin is too large.")


def check_10(dpop) -> None:
    a, b = floats(2, 1, -1, -3), floats(1, -2, -4, 5)
    got = need_losses(dpop(a, b, 0.3, 5.0), 4)
    plain = losses.sigmoid(a - b, 0.3)
    need(near(got[:2], plain[:2]), "Where the chosen answer is likelier, DPOP is DPO.")
    need(bool((got[2:] > plain[2:]).all()), "Where the chosen answer is less likely, the loss must rise.")
    scaled = dpop(a / 2, b / 2, 0.6, 5.0)
    need(near(scaled, got), "Halve the log-ratios and double β: the loss must stay. One term is not under β.")
    need(near(got, losses.dpop(a, b, 0.3, 5.0)), "The size of the penalty is wrong.")


def check_11(mine: Format) -> None:
    record = {"query": "2 + 2?", "better": "4", "worse": "5"}
    need(isinstance(mine, Format), "FORMAT must be a Format.")
    need(mine.fits(record), "It does not fit the record of the exercise.")
    for name, other in PREFERENCE_FORMATS.items():
        need(not mine.fits(other.example), f"It also fits records of format {name}: `keys` has too little.")
    need(not mine.fits({**record, "worse": 5}), "`keys` must also give the type: a number is not text.")
    need(mine.fits(mine.example), "The example does not fit its own format.")
    with tempfile.TemporaryDirectory() as folder, patch.dict(PREFERENCE_FORMATS, {"mine": mine}):
        path = Path(folder, "mine.jsonl")
        path.write_text('{"query": "2 + 2?", "better": "4", "worse": "5"}\n', "utf-8")
        (found,) = read_preferences(path)
    need(not isinstance(found, records.DataError), f"Reading a record fails: {found}")
    need((found.chosen, found.rejected) != ("5", "4"), "Chosen and rejected are exchanged.")
    need((found.chosen, found.rejected) == ("4", "5"), "Chosen and rejected come from other keys.")
    need(found.prompt == (Message("user", "2 + 2?"),), "The prompt is not the query.")


def check_12(kto) -> None:
    ratios, beta, kl = floats(-40, -1, 0.5, 3, 40), 0.2, 0.5
    yes, no = torch.ones(5, dtype=torch.bool), torch.zeros(5, dtype=torch.bool)
    good, bad = need_losses(kto(ratios, yes, kl, beta), 5), need_losses(kto(ratios, no, kl, beta), 5)
    need(bool((good.diff() < 0).all()), "A likelier desirable answer must lower the loss.")
    need(bool((bad.diff() > 0).all()), "A likelier undesirable answer must raise the loss.")
    need(float(torch.cat([good, bad]).max()) <= 1, "KTO's losses are at most 1: no logarithm.")
    need(near(good[2], bad[2]), "At the reference point, r = kl, both kinds must have the same loss.")
    mixed, half = torch.tensor([True, False, True, False, True]), torch.tensor(0.5)
    need(near(kto(ratios, mixed, kl, beta), torch.where(mixed, good, bad)), "Mixed batches come out wrong.")
    want = torch.where(mixed, torch.sigmoid(-beta * (ratios - kl)), torch.sigmoid(beta * (ratios - kl)))
    need(near(good[2], half) and near(kto(ratios, mixed, kl, beta), want), "The values are wrong: look at β.")


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# The name that a reader fills in, "" for the whole file; and the check of it.
EXERCISES = {
    1: ("PREDICTED", check_1),
    2: ("dpo", check_2),
    3: ("log_prob_of_answers", check_3),
    4: ("gradient", check_4),
    5: ("ipo", check_5),
    6: ("predictors", check_6),
    7: ("positions", check_7),
    8: ("", check_8),
    9: ("resting_margin", check_9),
    10: ("dpop", check_10),
    11: ("FORMAT", check_11),
    12: ("kto", check_12),
}


def file_of(number: int) -> Path:
    return next(FOLDER.glob(f"{number:02}_*.py"))


def verdict(number: int, path: Path) -> str:
    """ "" if the answer in the file is right; else a sentence about what is wrong."""
    name, check = EXERCISES[number]
    try:
        namespace = {"__file__": str(path), **runpy.run_path(str(path))}
        need(not name or name in namespace, f"{path.name} does not define {name}.")
        check(namespace[name] if name else namespace)
    except Wrong as wrong:
        return str(wrong)
    except NotImplementedError:
        return f"Fill in {path.name}; a hint is in docs/TOUR.md."
    except Exception as error:
        frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
        line = f", line {frames[-1].lineno}" if frames else ""
        return f"{path.name}{line}: {type(error).__name__}: {error}"
    return ""


def main(arguments: list[str] | None = None) -> int:
    given = sys.argv[1:] if arguments is None else arguments
    number = int(given[0]) if given and given[0].isdecimal() else 0
    if number not in EXERCISES:
        print(f"Give the number of an exercise, from 1 to {len(EXERCISES)}: make exercise N=1")
        return 2
    path = file_of(number)
    word = verdict(number, path)
    print(f"Exercise {number}, {path.relative_to(ROOT)}: {'not yet. ' + word if word else 'right.'}")
    return 1 if word else 0


if __name__ == "__main__":
    sys.exit(main())
