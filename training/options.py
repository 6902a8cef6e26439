"""The options of an objective: the flags, their ranges, and the combinations that are refused."""

import inspect
import itertools
import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass

from errors import InputError, require
from losses import DIVERGENCES, LOSSES
from training.settings import flag, trains_adapters

# A loss with one of these parameters compares the policy with a reference.
REFERENCE_INPUTS = {
    *("margins", "mean_margins", "chosen_logratios", "rejected_logratios"),
    *("reference_chosen_logps", "reference_rejected_logps", "reply_logratios"),
}
KINDS = {"plackett_luce": "rankings", "kto": "feedback"}  # records that are not preferences
SORTING = ("aot", "aot_unpaired")  # Their losses belong to quantiles, not to pairs.
OTHER_NAMES = {  # what other projects and papers call a loss or a combination
    "dpo": "sigmoid", "cdpo": "sigmoid with --label-smoothing", "slic": "hinge", "rso": "hinge",
    "exo": "exo_pair", "nca": "nca_pair", "bco": "bco_pair", "sppo": "sppo_hard",
    "apo": "apo_zero or apo_down", "dpo_norm": "sigmoid_norm", "ln-dpo": "sigmoid_norm",
    "robust_dpo": "robust", "rpo": "sigmoid,sft", "mpo": "sigmoid,bco_pair,sft", "wpo": "sigmoid with --wpo",
    "rpo_sq": "rebel", "r-dpo": "rdpo", "tdpo": "tdpo2", "chipo": "sigmoid with --f-divergence chi2_kl",
}  # fmt: skip


@dataclass
class ObjectiveSettings:
    beta: float = flag(0.1, "KL strength: a larger beta keeps the policy closer to the reference")
    loss: str = flag("sigmoid", f"one of {', '.join(LOSSES)}; or several, separated by commas")
    loss_weights: str = flag("", "weights of several losses, separated by commas; empty: 1 each")
    label_smoothing: float | None = flag(None, "share of labels assumed wrong; exo_pair 0.001, others 0")
    score_scale: float | None = flag(None, "soft, rebel: factor of score_chosen - score_rejected; 1")
    odpo_alpha: float | None = flag(None, "odpo: weight of the offset log(score_chosen - score_rejected); 1")
    rdpo_alpha: float | None = flag(None, "rdpo: reward of a token of length; rdpo needs it")
    dpop_lambda: float | None = flag(None, "dpop: weight of the penalty on a less likely chosen answer; 50")
    discopop_tau: float | None = flag(None, "discopop: temperature between logistic and exponential; 0.05")
    tdpo_alpha: float | None = flag(None, "tdpo2: weight of the difference of the two KLs; 0.5")
    simpo_gamma: float | None = flag(None, "simpo: required margin; 0.5")
    desirable_weight: float | None = flag(None, "kto: weight of desirable answers; 1")
    undesirable_weight: float | None = flag(None, "kto: weight of undesirable answers; 1")
    f_divergence: str = flag("reverse_kl", "divergence from the reference (f-DPO)", tuple(DIVERGENCES))
    divergence_alpha: float | None = flag(None, "alpha of --f-divergence alpha; 0.5")
    chi2_clip: float | None = flag(None, "chi2_kl: limit of |beta * margin|, the paper's 2 R_max; no limit")
    wpo: bool = flag(False, "WPO: weight each pair by its likelihood under the policy")
    ld_alpha: float | None = flag(None, "LD-DPO: weight of tokens beyond the shorter answer's length")
    tr_alpha: float | None = flag(None, "TR-DPO, soft: share by which the reference follows at every step")
    tr_every: int | None = flag(None, "TR-DPO, hard: steps between copies of the policy to the reference")


# The allowed range of each number. A NaN fails every comparison, so it is refused as well.
RANGES = {
    "beta": ("above 0", lambda x: 0 < x < math.inf),
    "label_smoothing": ("at least 0 and below 0.5", lambda x: 0 <= x < 0.5),
    "score_scale": ("above 0", lambda x: 0 < x < math.inf),
    "odpo_alpha": ("above 0", lambda x: 0 < x < math.inf),
    "rdpo_alpha": ("at least 0", lambda x: 0 <= x < math.inf),
    "dpop_lambda": ("above 0", lambda x: 0 < x < math.inf),
    "discopop_tau": ("above 0 and at most 1", lambda x: 0 < x <= 1),
    "tdpo_alpha": ("at least 0", lambda x: 0 <= x < math.inf),
    "simpo_gamma": ("at least 0", lambda x: 0 <= x < math.inf),
    "desirable_weight": ("above 0", lambda x: 0 < x < math.inf),
    "undesirable_weight": ("above 0", lambda x: 0 < x < math.inf),
    "divergence_alpha": ("above 0 and below 1", lambda x: 0 < x < 1),
    "chi2_clip": ("above 0", lambda x: 0 < x < math.inf),
    "ld_alpha": ("at least 0 and below 1", lambda x: 0 <= x < 1),
    "tr_alpha": ("above 0 and at most 1", lambda x: 0 < x <= 1),
    "tr_every": ("at least 1", lambda x: x >= 1),
}


def parse_losses(settings: ObjectiveSettings) -> dict[str, float]:
    """--loss and --loss-weights as {loss: weight}. Raises `InputError` for a name or number that is wrong."""
    names = [name.strip() for name in settings.loss.split(",")]
    for name in names:
        ours = name.lower() if name.lower() in LOSSES else OTHER_NAMES.get(name.lower())
        advice = f"there is no such loss; the losses are {', '.join(LOSSES)}"
        require(name in LOSSES, f"--loss {name}: {f'its name here is {ours}' if ours else advice}")
    require(len({*names}) == len(names), f"--loss {settings.loss} names a loss twice")
    text = settings.loss_weights
    try:
        weights = [float(weight) for weight in text.split(",")] if text else [1.0] * len(names)
    except ValueError:
        raise InputError(f"--loss-weights {text}: expected numbers separated by commas") from None
    found, expected = len(weights), len(names)
    require(found == expected, f"--loss-weights {text}: {found} weights for {expected} losses")
    require(all(0 < w < math.inf for w in weights), f"--loss-weights {text}: a weight must be above 0")
    return dict(zip(names, weights, strict=True))


def given_numbers(settings: ObjectiveSettings) -> dict[str, float]:
    """The numeric options that have a value, by name."""
    return {name: value for name, value in asdict(settings).items() if name in RANGES and value is not None}


def parameters(function: Callable) -> set[str]:
    return set(inspect.signature(function).parameters)


def inputs_of(names: Iterable[str]) -> set[str]:
    """The parameters of all these losses."""
    return set().union(*(parameters(LOSSES[name]) for name in names))


def kind_of(names: Iterable[str]) -> str:
    """The kind of records that these losses read: "rankings", "feedback", or "preferences"."""
    return next((KINDS[name] for name in names if name in KINDS), "preferences")


def check_options(settings: ObjectiveSettings) -> None:
    """Raise `InputError` for numbers out of range, options without effect and contradictions."""
    losses, numbers = parse_losses(settings), given_numbers(settings)
    inputs = inputs_of(losses)
    moves_reference = settings.tr_alpha is not None or settings.tr_every is not None
    needs_reference = bool(inputs & REFERENCE_INPUTS)
    loss = f"--loss {settings.loss}"
    for name, value in numbers.items():
        rule, holds = RANGES[name]
        flag_name = f"--{name.replace('_', '-')}"
        require(holds(value), f"{flag_name} must be {rule}, not {value}")
        users = [other for other, function in LOSSES.items() if name in parameters(function)]
        reason = f"{flag_name} has no effect on {loss}; it is an option of {', '.join(users)}"
        require(name == "beta" or name in inputs or not users, reason)
    required = {"label_smoothing": "share of flipped labels", "rdpo_alpha": "reward of a token of length"}
    for name, (option, meaning) in itertools.product(losses, required.items()):
        parameter = inspect.signature(LOSSES[name]).parameters.get(option)
        given = parameter is None or parameter.default is not parameter.empty or option in numbers
        require(given, f"--loss {name} needs --{option.replace('_', '-')}, the {meaning}")
    logarithm = "exo_pair" in losses and numbers.get("label_smoothing") == 0
    require(not logarithm, "--loss exo_pair takes the logarithm of --label-smoothing: it must be above 0")

    for option, divergence in (("divergence_alpha", "alpha"), ("chi2_clip", "chi2_kl")):
        stray = option in numbers and settings.f_divergence != divergence
        require(not stray, f"--{option.replace('_', '-')} is an option of --f-divergence {divergence}")
    useless = settings.f_divergence != "reverse_kl" and "margins" not in inputs
    require(not useless, f"--f-divergence changes margins, which {loss} does not use")

    if "kto" in losses:
        alone = len(losses) == 1
        require(alone, f"{loss}: kto trains on single answers, and other losses on pairs: it stands alone")
        several = getattr(settings, "batch_size", 2) > 1
        require(several, "--loss kto needs a --batch-size of at least 2: z0 is a mean over the batch")
    if kind_of(losses) != "preferences":
        changes = {"--wpo": settings.wpo, "--ld-alpha": settings.ld_alpha is not None}
        changes["--swap-by-score"] = getattr(settings, "swap_by_score", False)
        for name in (name for name, given in changes.items() if given):
            raise InputError(f"{name} changes pairs, but {loss} trains on {kind_of(losses)}")

    sorting = [name for name in losses if name in SORTING]
    reason = f"--wpo weights pairs, but {', '.join(sorting)} sorts them: its losses belong to quantiles"
    require(not (settings.wpo and sorting), reason)
    no_pairs = settings.wpo and list(losses) == ["sft"]
    require(not no_pairs, "--wpo weights pairs, but --loss sft does not use the rejected answers")

    split = "rejected_kl" in inputs and getattr(settings, "shard", False)
    require(not split, f"{loss} compares whole distributions, which --shard splits among the ranks")

    if settings.ld_alpha is not None:
        useless = not inputs & {"margins", "mean_margins", "chosen_logratios"}
        require(not useless, f"--ld-alpha changes log-ratios, which {loss} does not use")
        for name in losses:
            twice = {"mean_margins", "chosen_lengths"} & parameters(LOSSES[name])
            require(not twice, f"--ld-alpha and --loss {name} would both correct for length")

    both = settings.tr_alpha is not None and settings.tr_every is not None
    require(not both, "--tr-alpha moves the reference at every step, --tr-every copies it: choose one")
    adapted = moves_reference and trains_adapters(settings)
    flag_name = "--lora-rank" if getattr(settings, "lora_rank", 0) else "--adapter"
    require(not adapted, f"--tr-alpha and --tr-every move the reference, but {flag_name} keeps it frozen")
    nothing = moves_reference and not needs_reference
    require(not nothing, f"--tr-alpha and --tr-every move the reference, but {loss} does not use one")


def kto_advice(desirable: int, undesirable: int, numbers: dict[str, float]) -> str:
    """A line if the weighted counts of the two labels are out of the range that KTO's authors recommend.

    That is 1 <= λ_D n_D / (λ_U n_U) <= 4/3 (arXiv 2402.01306, section 4.2). "" within it.
    """
    good = desirable * numbers.get("desirable_weight", 1.0)
    bad = undesirable * numbers.get("undesirable_weight", 1.0)
    if bad <= good * (1 + 1e-9) and 3 * good <= 4 * bad * (1 + 1e-9):
        return ""
    found = f"{desirable} desirable and {undesirable} undesirable answers"
    if not good or not bad:
        return f"warning: {found}: KTO compares the two, and one is missing"
    middle = 7 / 6
    name = "desirable" if good < bad else "undesirable"
    number = middle * bad / desirable if good < bad else good / middle / undesirable
    return (
        f"warning: {found}: their weighted ratio is {good / bad:.2f}, and KTO works best from 1 to 1.33; "
        f"--{name}-weight {number:.3g} would give {middle:.2f}"
    )
