"""The held-out pairs of a run with the log-probs of every token, and what they show about the run.

measured = measure("runs/dpo", pairs=200)
measured.accuracy                       # Estimate(0.86, 0.81, 0.90)
worries(measured, curves)               # sentences; [] for a run without a visible problem
"""

import math
from dataclasses import dataclass, field
from functools import cached_property
from itertools import takewhile

import numpy as np

from dataset.packing import build_stream, fill, spread
from dataset.records import Message, Preference, read_preferences
from dataset.store import open_store
from dataset.tokenizer import ChatTokenizer
from eval.common import length_limit, load_policy_and_reference, print_start, reference_of, run_settings
from eval.curves import Curve, last_finite
from eval.explain import Answer, explain_rows, signed
from eval.preference import Settings, choose_objective, held_out_pairs
from eval.win_rate import Z95, wilson, win_interval
from eval.words import tr
from training.distributed import pick_device
from training.objective import next_token_kl
from training.options import ObjectiveSettings

MAX_TOKENS = 8192  # tokens in a forward


@dataclass(frozen=True)
class Estimate:
    """A mean and its 95 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class MeasuredPair:
    """One pair: log-ratios, in nats, and lengths in tokens, end tokens included."""

    line: int
    prompt: tuple[Message, ...]
    chosen: Answer
    rejected: Answer
    loss: float

    @cached_property
    def before(self) -> float:
        """log π_ref(y_w|x) − log π_ref(y_l|x)"""
        return sum(self.chosen.reference_logps) - sum(self.rejected.reference_logps)

    @cached_property
    def after(self) -> float:
        """log π(y_w|x) − log π(y_l|x)"""
        return sum(self.chosen.logps) - sum(self.rejected.logps)

    @cached_property
    def change(self) -> float:
        """The log-ratio margin, `after` − `before`. β times it is the reward margin, and 0 is the start."""
        return sum(self.chosen.logratios) - sum(self.rejected.logratios)

    @property
    def longer(self) -> int:
        """|y_w| − |y_l|"""
        return len(self.chosen.tokens) - len(self.rejected.tokens)

    @property
    def tokens(self) -> int:
        return len(self.chosen.tokens) + len(self.rejected.tokens)

    @property
    def shared(self) -> int:
        """The number of equal tokens at the start of both answers. Their log-ratios cancel in the margin."""
        both = zip(self.chosen.tokens, self.rejected.tokens, strict=False)
        return sum(1 for _ in takewhile(lambda tokens: tokens[0] == tokens[1], both))


@dataclass(frozen=True)
class Measured:
    """The pairs of a run, and what is needed to describe them."""

    folder: str
    reference: str
    data: str
    held_out: int  # pairs of the data, measured or not
    objective: ObjectiveSettings
    tokenizer: ChatTokenizer
    kl: float  # KL(π ‖ π_ref) of the next token, in nats: mean over the answers' tokens
    pairs: list[MeasuredPair] = field(repr=False)

    @cached_property
    def accuracy(self) -> Estimate:
        """Share of pairs with a positive change; a tie counts as a half."""
        return accuracy(self.pairs)

    @cached_property
    def changes(self) -> np.ndarray:
        return np.array([pair.change for pair in self.pairs])

    @cached_property
    def margin(self) -> Estimate:
        return mean_estimate(self.changes)

    def logratio(self, side: str) -> Estimate:
        """The mean log-ratio of the `chosen` or the `rejected` answers."""
        return mean_estimate(np.array([sum(getattr(pair, side).logratios) for pair in self.pairs]))

    @cached_property
    def length_correlation(self) -> float:
        """Pearson's r of the length difference and the change; 0 if one of them is constant."""
        longer = np.array([pair.longer for pair in self.pairs])
        if longer.std() == 0 or self.changes.std() == 0:
            return 0.0
        return float(np.corrcoef(longer, self.changes)[0, 1])


def accuracy(pairs: list[MeasuredPair]) -> Estimate:
    """Share of the pairs with a positive change, with Wilson's interval."""
    value = sum((pair.change > 0) + 0.5 * (pair.change == 0) for pair in pairs) / len(pairs)
    wins, losses = [int(pair.change > 0) for pair in pairs], [int(pair.change < 0) for pair in pairs]
    return Estimate(value, *(win_interval(wins, losses) or (0.0, 1.0)))


def mean_estimate(values: np.ndarray) -> Estimate:
    half = Z95 * values.std(ddof=1) / math.sqrt(len(values)) if len(values) > 1 else math.inf
    return Estimate(float(values.mean()), float(values.mean() - half), float(values.mean() + half))


def measure(
    folder: str, pairs: int = 200, data: str = "", reference: str = "", device: str = "auto"
) -> Measured:
    """Compute both models' log-probs of at most `pairs` held-out pairs, spread evenly over the data.

    Computes in float32. Raises `InputError` for a run without a policy, a reference or held-out pairs.
    """
    run, place = run_settings(folder), pick_device(device)
    path, share = (data, 0.0) if data else held_out_pairs(folder, run)
    reference = reference or reference_of(folder)
    policy, reference_model, tokenizer = load_policy_and_reference(folder, reference, place)
    print_start({folder: policy, reference: reference_model}, place, "fp32")
    length = length_limit(0, folder, policy.config)
    reference_model.config.check_fits(length=length)
    own = {} if data else run
    shape, skip_bad = str(own.get("shape") or "auto"), bool(own.get("skip_bad"))
    swap = bool(own.get("swap_by_score"))
    store = open_store(path, "preferences", tokenizer, length, shape, skip_bad, swap)
    store = store.split(share)[1] if share else store
    objective = choose_objective(Settings(model=folder), run, store, path)
    rows = spread(len(store), pairs)
    prompts = read_prompts(path, shape, store.records[rows])
    measured, divergences = [], []
    for batch in fill(range(len(rows)), store.lengths[rows], MAX_TOKENS):
        explained = explain_rows(policy, reference_model, store, rows[list(batch)], objective)
        for number, ((chosen, rejected), loss) in zip(batch, explained, strict=True):
            line = int(store.lines[rows[number]])
            measured.append(MeasuredPair(line, prompts[number], chosen, rejected, loss))
        stream = build_stream(store, rows[list(batch)]).to(place)
        divergences += next_token_kl(policy, reference_model, stream).tolist()
    kl = sum(divergences) / len(divergences)
    return Measured(folder, reference, path, len(store), objective.settings, tokenizer, kl, measured)


def read_prompts(path: str, shape: str, places: np.ndarray) -> list[tuple[Message, ...]]:
    """The prompts of the records at these places of a file, counted from 0."""
    wanted = {*places.tolist()}
    prompts = {
        place: record.prompt
        for place, record in enumerate(read_preferences(path, shape))
        if place in wanted and isinstance(record, Preference)
    }
    return [prompts[place] for place in places.tolist()]


def worries(measured: Measured | None, curves: dict[str, Curve], judged: dict) -> list[str]:
    """One sentence for each visible problem of a run, with what to do about it."""
    found = judge_worries(judged) if judged else []
    losses, held_out = curves.get("loss", {}), curves.get("eval_loss", {})
    bad = [step for curve in curves.values() for step, value in curve.items() if not math.isfinite(value)]
    if bad:
        found.append(tr("A metric of step {step} is not finite. Lower --lr.", step=min(bad)))
    if held_out and (last := last_finite(held_out)):
        best = min(held_out, key=held_out.get)
        if last[1] > held_out[best] + 0.05:
            found.append(tr(
                "Held-out loss was lowest at step {step} ({lowest}) and rose to {last}: the run overfits. "
                "Train for fewer steps.",
                step=best, lowest=f"{held_out[best]:.3f}", last=f"{last[1]:.3f}",
            ))  # fmt: skip
    if measured is None:
        return found
    if measured.accuracy.low <= 0.5 <= measured.accuracy.high:
        found.append(
            tr("The interval of the accuracy contains 50 %. Measure more pairs, or train longer.")
        )
    if measured.objective.loss == "sigmoid" and (last := last_finite(held_out or losses)) and last[1] > 0.68:
        text = tr("The loss, {loss}, is still close to ln 2 = 0.693. Raise --lr or train longer.",
                  loss=f"{last[1]:.3f}")  # fmt: skip
        found.append(text)
    train, test = (last_finite(curves.get(part + "rewards/accuracies", {})) for part in ("", "eval_"))
    if train and test and train[1] > test[1] + 0.15:
        text = tr("Accuracy is {train} on training pairs and {test} on held-out pairs.",
                  train=f"{train[1]:.0%}", test=f"{test[1]:.0%}")  # fmt: skip
        found.append(text)
    chosen, rejected = measured.logratio("chosen"), measured.logratio("rejected")
    if chosen.high < -1:
        found.append(tr(
            "Chosen answers became less likely too: their mean log-ratio is {chosen} nats (rejected: "
            "{rejected}). DPO constrains the difference only. --loss dpop or sigmoid,sft keeps the chosen "
            "answers likely.",
            chosen=signed(chosen.value), rejected=signed(rejected.value),
        ))  # fmt: skip
    r = measured.length_correlation
    if abs(r) > 0.5:
        found.append(tr(
            "The margin follows the length difference (r = {r}): the policy may have learned to prefer "
            "{kind} answers. See accuracy by length below.",
            r=signed(r), kind=tr("longer") if r > 0 else tr("shorter"),
        ))  # fmt: skip
    return found


def judge_worries(figures: dict) -> list[str]:
    """The same for the judge's figures. The first model is the run, the second one its start."""
    found = []
    interval = figures["win_rate_ci95"]
    if interval and interval[0] <= 0.5:
        text = tr("The judge's verdicts do not show a win: {low} to {high} of the decided cases.",
                  low=f"{interval[0]:.0%}", high=f"{interval[1]:.0%}")  # fmt: skip
        found.append(text)
    for name, label in (("right_answers", tr("right")), ("well_formed", tr("well-formed"))):
        after, before = figures[name].values()
        if before > wilson(after, figures["prompts"])[1]:
            found.append(tr(
                "Fewer answers are {label}: {after}, before {before}. A larger --beta or --loss sigmoid,sft "
                "keeps the policy closer to its start.",
                label=label, after=f"{after:.0%}", before=f"{before:.0%}",
            ))  # fmt: skip
    after, before = figures["mean_tokens"].values()
    if after > 1.5 * before:
        found.append(tr(
            "Answers became longer: {after} tokens, before {before}. --ld-alpha lowers the weight of the "
            "tokens beyond the shorter answer.",
            after=f"{after:.0f}", before=f"{before:.0f}",
        ))  # fmt: skip
    return found
