"""Warnings of a run: what its rows show, one line for each problem, with what to do about it.

    watch = Watch()
    watch.see(row)                   # the lines that a row of metrics.jsonl gives; each line once in a run
    watch.see_answers(samples)       # the same for the rows of samples.jsonl of one evaluation

The functions below return a line or None. They look at DPO only: rows with log-ratios to a reference.
"""

import math
from statistics import median

# ---- Thresholds, and why

PATIENCE = 50  # steps. With a learning rate that suits the model, the demo's margin is above 2 nats by then.
STILL_NATS, STILL_REWARD = 0.02, 0.002  # A margin below both has moved the loss by less than 0.001.
NO_GRADIENT = (
    1e-5  # AdamW adds 1e-8 to each weight's gradient; over a million weights that is a norm of 1e-5.
)
SMALLEST_LR = 1e-10  # A smaller step of AdamW leaves a float32 weight of 0.001 as it is.
FALL_NATS = 20.0  # On close pairs, chosen answers that were still learned well fell by 5 nats.
DECIDED = 5.0  # A pair with this reward margin has σ(−5) = 0.7 % of its first gradient: it is won.
STANDS = 0.01  # Of the accuracy on 400 held-out pairs the standard error is 0.015.
# Politeness alone doubles an answer of five tokens, and the answers of a weak model double by chance.
LONGER, LONG_TOKENS = 2.5, 32
# Share of an answer's 10-character pieces that occurred before, as seq-rep-n (Welleck et al. 2020, arXiv
# 1908.04319). Of 1,996 UltraFeedback answers 0.3 % reach it, of 6,000 bundled ones none.
REPEATED, PIECE, SHORTEST = 0.5, 10, 60
RATIO = "logratios/chosen"
MOST = 0.75  # Share of the answers that show a problem: of 4 answers half do by chance.


class Watch:
    """What the checks need of a run's history, and the warnings already given."""

    def __init__(self):
        self.unmoved: list[dict] | None = []  # training rows until the loss moves; then None
        self.evaluations: list[dict] = []
        self.part = ""  # what the metrics of the first held-out set begin with; further sets are not watched
        self.answers: list[list[dict]] = []  # of the first and of the last evaluation
        self.given: set[str] = set()

    def see(self, row: dict) -> list[str]:
        """The new warnings after a row of training or of an evaluation."""
        if has_reference(row):
            if self.unmoved is not None and "still" not in self.given:
                self.unmoved = None if has_moved(row) else [*self.unmoved, row]
            return self.new(still=still(self.unmoved), falling=falling(row))
        part = next((name.removesuffix(RATIO) for name in row if name.endswith(f"_{RATIO}")), "eval_")
        if has_reference(row, part) and self.part in ("", part):
            self.part = part
            row = {name.replace(part, "eval_", 1): value for name, value in row.items()}
            self.evaluations.append(row)
            return self.new(falling=falling(row, "eval_"), exploding=exploding(self.evaluations))
        return []

    def see_answers(self, samples: list[dict]) -> list[str]:
        """The new warnings after the answers of an evaluation."""
        self.answers = [*self.answers[:1], samples]
        return self.new(long=longer(*self.answers), repeating=repeating(*self.answers))

    def new(self, **found: str | None) -> list[str]:
        """The lines that are found and were not given before, by name."""
        lines = {name: line for name, line in found.items() if line and name not in self.given}
        self.given |= lines.keys()
        return list(lines.values())


# ---- From rows of metrics.jsonl


def has_reference(row: dict, part: str = "") -> bool:
    """Whether a row has log-ratios to a reference. Losses without a reference log log π in their place."""
    ratio = row.get(f"{part}{RATIO}")
    return ratio is not None and not math.isclose(ratio, row[f"{part}logps/chosen"], rel_tol=1e-6)


def has_moved(row: dict) -> bool:
    """Whether a row of training shows another loss than at the start, where all log-ratios are 0."""
    at_ln_2 = abs(row["loss"] - math.log(2)) < 0.001
    nats, reward = abs(row["logratios/margins"]), abs(row["rewards/margins"])
    return reward >= STILL_REWARD or (nats >= STILL_NATS and not at_ln_2)


def still(rows: list[dict] | None) -> str | None:
    """The loss is where it began, after `PATIENCE` steps and the warm-up; the gradient norm gives the reason.

    `rows` are all rows of training so far, or None if the loss has moved.
    """
    if not rows or rows[-1]["step"] < PATIENCE:
        return None
    last, lr = rows[-1], max(row["learning_rate"] for row in rows)
    if len(rows) < 2 or last["learning_rate"] > rows[-2]["learning_rate"]:
        return None  # The warm-up is not over.
    norm, nats = last["grad_norm"], last["logratios/margins"]
    text = f"after {last['step']} steps the loss is still {last['loss']:.4f}, as at the start: "
    if abs(nats) >= STILL_NATS:
        return text + f"a margin of {nats:.2g} nats hardly changes it, so beta is too small; raise --beta"
    if norm < NO_GRADIENT:
        return text + (
            f"the gradient norm is {norm:.1e}, too small for AdamW; raise --beta, or look for pairs with "
            "almost equal sides (python -m dataset.inspect)"
        )
    if lr > SMALLEST_LR and all(row["logratios/margins"] == 0 for row in rows):
        # A frozen reference differs from the policy after one step, however small the step is.
        return text + (
            f"the gradient norm is {norm:.2g}, but all log-ratios are exactly 0, so the reference is the "
            "policy itself; copy the reference before training, without --tr-every 1 and --tr-alpha 1"
        )
    return (
        text + f"the gradient norm is {norm:.2g}, so the steps are too small; raise --lr ({lr:.1e}) tenfold"
    )


def falling(row: dict, part: str = "") -> str | None:
    """log π of chosen answers has more than doubled its distance from 0, by more than `FALL_NATS`."""
    fall, now = -row[f"{part}logratios/chosen"], row[f"{part}logps/chosen"]
    start = now + fall  # log π_ref
    if fall < max(FALL_NATS, -start):
        return None
    return (
        f"the log-probability of chosen {'held-out ' * bool(part)}answers fell from {start:.0f} to {now:.0f} "
        f"by step {row['step']}: lower --lr or raise --beta; --loss dpop or sigmoid,sft keeps them likely"
    )


def exploding(evaluations: list[dict]) -> str | None:
    """Held-out margins doubled beyond `DECIDED` since the accuracy had its present value."""
    accuracy, margin = (evaluations[-1][f"eval_rewards/{name}"] for name in ("accuracies", "margins"))
    before = next(row for row in evaluations if row["eval_rewards/accuracies"] >= accuracy - STANDS)
    if margin < max(DECIDED, 2 * before["eval_rewards/margins"]) or before is evaluations[-1]:
        return None
    return (
        f"held-out margins grew from {before['eval_rewards/margins']:.1f} (step {before['step']}) to "
        f"{margin:.1f} (step {evaluations[-1]['step']}), the accuracy did not ({accuracy:.0%}): the policy "
        "only moves away from the reference; train for fewer steps, lower --lr or raise --beta"
    )


# ---- From rows of samples.jsonl: the answers of the first and of the last evaluation
#
# A model that writes noise gets long and repetitive answers by chance, now to one prompt, now to another. So
# every first answer must be sound, and most answers must have changed.


def longer(first: list[dict], last: list[dict] = ()) -> str | None:
    """Most answers grew to `LONGER` times the first answer to their prompt, and by `LONG_TOKENS`.

    None if a first answer did not end: its length is unknown.
    """
    if not last or not all(answer["finished"] for answer in first):
        return None
    before, now = ([answer["tokens"] for answer in answers] for answers in (first, last))
    grown = [b >= max(LONGER * a, a + LONG_TOKENS) for a, b in zip(before, now, strict=True)]
    # An answer that loops is long as well: `repeating` counts it.
    grown = [is_long and repeated(a["answer"]) < REPEATED for is_long, a in zip(grown, last, strict=True)]
    if sum(grown) < MOST * len(last):
        return None
    lengths = f"{median(before):.0f} to {median(now):.0f} tokens"
    return (
        f"answers to held-out prompts grew from {lengths} by step {last[0]['step']}: "
        "DPO may learn length; see the line `longer` of python -m dataset.inspect, and try --ld-alpha 0.5"
    )


def repeating(first: list[dict], last: list[dict] = ()) -> str | None:
    """Most answers repeat themselves, and none of the first ones did."""
    before, now = (sum(repeated(a["answer"]) >= REPEATED for a in answers) for answers in (first, last))
    if not last or before or now < MOST * len(last):
        return None
    return (
        f"{now} of {len(last)} answers to held-out prompts repeat themselves at step {last[0]['step']} (see "
        "samples.jsonl): the policy collapses; lower --lr, raise --beta or train for fewer steps"
    )


def repeated(text: str) -> float:
    """The share of a text's pieces of `PIECE` characters that occurred before; 0 for a short text."""
    pieces = [text[start : start + PIECE] for start in range(len(text) - PIECE + 1)]
    return 1 - len({*pieces}) / len(pieces) if len(text) >= SHORTEST else 0.0
