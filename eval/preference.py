"""Measure how well a model prefers the chosen answers of preference pairs.

    python -m eval.preference --model runs/dpo                 # on the held-out pairs of the run
    python -m eval.preference --model DIR --reference DIR --data pairs.jsonl --json figures.json
    torchrun --standalone --nproc-per-node 4 -m eval.preference --model DIR --reference DIR --data pairs.jsonl

Prints the figures of the training log, `pairs`, and `kl_per_token`. The latter is the exact KL(pi || pi_ref)
of the next-token distributions, in nats: the mean over all positions of the data that predict a token of a
response, chosen or rejected, end tokens included. It measures the distance of the models on this text, not on
text that the policy generates.

Beta, loss and reference are those of the run, unless flags give others. Runs with a different beta compare by
`logratios/…`, which do not contain beta. bco_pair's delta is 0 here, because a model folder does not keep it.
Rewards contain the reference even if the loss does not.
"""

from dataclasses import dataclass, fields

import numpy as np

from dataset.store import TokenStore, open_store
from errors import InputError, run_script
from eval import common
from files import write_json
from training.distributed import World, join
from training.evaluate import evaluate, evaluate_kl
from training.objective import Objective, ObjectiveSettings
from training.precision import Precision
from training.settings import SAMPLE, flag, parse
from training.setup import named_files


@dataclass
class Settings(common.PairFlags):
    model: str = flag("runs/dpo", "model folder of the policy")
    reference: str = flag("", "model folder of the reference; default: the model that the run started from")
    data: str = flag("", "preference pairs: .jsonl or .json, also .gz; default: the run's held-out pairs")
    json: str = flag("", "also write the figures to this file")
    beta: float | None = flag(None, "KL strength in rewards and loss; default: the run's, or 0.1")
    loss: str = flag("", "loss or losses (see losses.py); default: the run's with its options, or sigmoid")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.beta is None or self.beta > 0, "beta", "above 0")


def main(arguments: list[str] | None = None) -> None:
    settings = parse(Settings, __doc__.split("\n")[0], arguments)
    with join(settings.device) as world:
        figures = measure(settings, world)
    if world.is_main:
        if settings.json:
            write_json(settings.json, figures)
        print("\n".join(f"{name:<20} {value:>10.6g}" for name, value in figures.items()))


def measure(settings: Settings, world: World) -> dict[str, float]:
    """Load the two models and the data that the settings name, and evaluate: figures by name."""
    run = common.run_settings(settings.model)
    start = settings.reference or common.reference_of(settings.model)
    policy, reference, tokenizer = common.load_policy_and_reference(settings.model, start, world.device)
    length = common.length_limit(settings.max_length, settings.model, policy.config)
    reference.config.check_fits(length=length)
    precision = Precision(settings.precision, world.device)
    if world.is_main:
        models = {settings.model: policy, start: reference}
        common.print_start(models, world.device, precision.reason)
    data, share = (settings.data, 0.0) if settings.data else held_out_pairs(settings.model, run)
    swap = bool(run.get("swap_by_score")) and not settings.data
    options = length, settings.shape, settings.skip_bad, swap
    kind = run_objective(settings, run).kind
    pairs = world.node_first(lambda: open_store(data, kind, tokenizer, *options))
    pairs = pairs.split(share)[1] if share else pairs
    objective = choose_objective(settings, run, pairs, data)
    if world.is_main:
        used, part = objective.settings, f"; {share:.0%} of its prompts are held out" if share else ""
        common.print_note(f"{data}: {pairs.report}{part}")
        common.print_note(f"loss {used.loss}, beta {used.beta:g}, reference {start}")
    options = {"layout": settings.layout, "max_tokens": settings.micro_batch_tokens}
    return {
        "pairs": len(pairs),
        **evaluate(policy, reference, pairs, world, precision, objective, **options),
        **evaluate_kl(policy, reference, pairs, world, **options),
    }


def held_out_pairs(folder: str, run: dict) -> tuple[str, float]:
    """The held-out pairs of a DPO run: a file, and the share of its prompts that is held out (0: the file).

    A run on bundled data has the bundled held-out pairs. Raises `InputError` for other models, because
    figures on another task are meaningless.
    """
    data, eval_data, share = run.get("data"), run.get("eval_data"), run.get("eval_share")
    if "beta" in run and data and isinstance(share, float) and 0 < share < 1:
        return str(data), share
    if "beta" in run and isinstance(eval_data, (str, list)) and eval_data and eval_data != "auto":
        return next(iter(named_files(eval_data).values())), 0.0  # the first set
    if data and common.is_bundled(str(data)):
        return str(SAMPLE / "heldout.jsonl"), 0.0
    raise InputError(f"{folder} has no held-out pairs in its config.json; give --data")


def run_objective(settings: Settings, run: dict) -> Objective:
    """The run's objective, unless --loss or --beta change it."""
    # tr_alpha and tr_every move the reference during training; here it stands still.
    names = {f.name for f in fields(ObjectiveSettings)} - {"tr_alpha", "tr_every"}
    options = {name: run[name] for name in names & run.keys() if name == "beta" or not settings.loss}
    if settings.loss:
        options["loss"] = settings.loss
    if settings.beta is not None:
        options["beta"] = settings.beta
    try:
        return Objective(ObjectiveSettings(**options))
    except (TypeError, AttributeError, KeyError) as error:
        raise InputError(f"{settings.model}: the settings in its config.json are damaged ({error})") from None


def choose_objective(settings: Settings, run: dict, pairs: TokenStore, data: str) -> Objective:
    """`run_objective` for these pairs, whose labels it may need.

    A run with --loss soft is measured with DPO's loss if the data has no scores, and a line says so.
    """
    objective = run_objective(settings, run)
    unlabelled = "score_margins" in objective.inputs and np.isnan(pairs.score_margins).any()
    if unlabelled and not settings.loss:
        used = objective.settings
        common.print_note(f"{data} has no scores for --loss {used.loss}, so the loss is sigmoid")
        return Objective(ObjectiveSettings(beta=used.beta))
    objective.check_data(pairs, data)
    return objective


if __name__ == "__main__":
    run_script(main)
