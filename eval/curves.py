"""The metrics of a run as curves, and the panels that show them.

curves = read_curves("runs/dpo/metrics.jsonl")        # {"loss": {1: 0.693, 10: 0.672, …}, …}
shown_panels([curves])                                # the panels of which the run logged a metric
"""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from errors import InputError

INK, PALE, FAINT = "#262b33", "#7d8590", "#e6e8eb"
BLUE, ORANGE, VIOLET = "#2b6ca3", "#c4622d", "#6f5a9a"


@dataclass(frozen=True)
class Panel:
    """One plot of the picture, drawn if the run logged at least one of its metrics."""

    title: str
    curves: list[tuple[str, str, str]]  # metric, label, colour
    unit: str = ""
    mark: float | None = None  # height of a dashed line
    mark_label: str = ""  # its label
    from_zero: bool = False


GRADIENT = Panel("Gradient norm", [("grad_norm", "", VIOLET)], "before clipping", from_zero=True)
SFT_PANELS = [
    Panel("Loss", [("loss", "", BLUE)], "−log π, nats per token"),
    GRADIENT,
    Panel("Learning rate", [("learning_rate", "", VIOLET)], "of each step", from_zero=True),
    Panel("Speed", [("conversations_per_second", "", VIOLET)], "conversations per second", from_zero=True),
]
PREFERENCE_PANELS = [
    Panel("Loss", [("loss", "", BLUE)], "nats per pair", math.log(2), "ln 2"),
    Panel("Reward accuracy", [("rewards/accuracies", "", BLUE)], "share of pairs", 0.5, "chance"),
    GRADIENT,
    # Rewards contain beta, log-ratios do not: runs with a different beta compare by log-ratios.
    Panel("Log-ratio margin", [("logratios/margins", "", BLUE)], "chosen − rejected, nats", 0.0),
    Panel(
        "Log-ratios",
        [("logratios/chosen", "chosen", BLUE), ("logratios/rejected", "rejected", ORANGE)],
        "log π / π_ref, nats per answer",
        0.0,
    ),
    Panel(
        "Log-probability of answers",
        [("logps/chosen", "chosen", BLUE), ("logps/rejected", "rejected", ORANGE)],
        "log π, nats per answer",
    ),
    Panel("Reward margin", [("rewards/margins", "", BLUE)], "chosen − rejected", 0.0),
    Panel(
        "Rewards",
        [("rewards/chosen", "chosen", BLUE), ("rewards/rejected", "rejected", ORANGE)],
        "β · log π / π_ref, or a reward model's",
        0.0,
    ),
    Panel("KL(π ‖ π_ref)", [("kl_per_token", "", VIOLET)], "of the next token, nats", from_zero=True),
]
PARTS = ("", "eval_")  # prefixes of the metrics: training, held-out

Curve = dict[int, float]  # step: value


def read_rows(path: Path) -> Iterator[tuple[int, dict]]:
    """(step, row) of each line of a run's log.

    The last line is skipped if it is incomplete, because a killed run may leave half of it. Another line that
    is not a row with a step raises `InputError`.
    """
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").removesuffix("\n").split("\n")
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); is this a run folder?") from None
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            yield int(row["step"]), row
        except (ValueError, TypeError, KeyError) as error:
            if number < len(lines):
                raise InputError(f"{path}:{number}: not a row with a step ({error})") from None


def read_curves(path: Path) -> dict[str, Curve]:
    """The numbers of a metrics file, ``{name: {step: value}}``. The last row of a step counts."""
    curves: dict[str, Curve] = {}
    for step, row in read_rows(path):
        for name, value in row.items():
            if name != "step" and isinstance(value, (int, float)):
                curves.setdefault(name, {})[step] = value
    if not curves:
        raise InputError(f"{path}: contains no row of metrics yet")
    return {name: dict(sorted(curve.items())) for name, curve in curves.items()}


def read_samples(path: Path) -> dict[str, dict[int, dict]]:
    """The answers that a run wrote during training: ``{prompt: {step: row}}``; {} without the file."""
    samples: dict[str, dict[int, dict]] = {}
    for step, row in read_rows(path) if path.is_file() else ():
        samples.setdefault(str(row.get("prompt", "")), {})[step] = row
    return {prompt: dict(sorted(rows.items())) for prompt, rows in samples.items()}


def shown_panels(runs: list[dict[str, Curve]]) -> list[Panel]:
    """The panels of which at least one run logged a metric.

    Raises `InputError` if SFT is among preference runs, because their losses have different units.
    """
    tables = [PREFERENCE_PANELS if is_preference(curves) else SFT_PANELS for curves in runs]
    if any(table is not tables[0] for table in tables):
        raise InputError("the runs have different losses: compare SFT with SFT, preferences with preferences")
    names = {name for curves in runs for name in curves}
    return [p for p in tables[0] if any(part + name in names for name, *_ in p.curves for part in PARTS)]


def is_preference(curves: dict[str, Curve]) -> bool:
    """Whether a run compares pairs: DPO or a reward model."""
    return any(part + "rewards/margins" in curves for part in PARTS)


def last_finite(curve: Curve) -> tuple[int, float] | None:
    """The last (step, value) with a finite value; None without one."""
    return next(((step, value) for step, value in reversed(curve.items()) if math.isfinite(value)), None)
