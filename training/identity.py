"""The identity of a run: the settings, digests and versions that must not change when it is resumed."""

import json
from pathlib import Path

import torch

from errors import InputError
from training.distributed import World
from training.settings import TrainSettings

# Settings that do not change the weights: a resumed run may have other values.
MAY_CHANGE = ("out", "eval_data", "log_every", "eval_every", "save_every", "keep_checkpoints", "keep_best",
              "resume", "override", "overwrite", "sample_prompts", "track")  # fmt: skip
DIGESTS = ("model", "data", "tokenizer")  # Compared by content, because a file may move.


def identity_of(settings: TrainSettings, world: World, precision: str, **more) -> dict:
    """Everything that could change a bit of the weights, as JSON values by name.

    `precision` is the one that the run uses; `more` contains the digests and the script's own entries.
    """
    changeable = (*MAY_CHANGE, *DIGESTS, "adapter")  # The digest of the model includes its adapters.
    identity = {name: value for name, value in settings.to_dict().items() if name not in changeable}
    # Values of `auto`, and whatever else decides how sums are rounded.
    identity |= {"device": world.device.type, "precision": precision, "ranks": world.ranks}
    identity |= {"torch": torch.__version__.split("+")[0], **more}
    return json.loads(json.dumps(identity))  # Tuples become lists, as they do in config.json.


def recorded(identity, path: Path) -> dict:
    """The identity that the file `path` contains. Raises `InputError` unless it is a JSON object."""
    try:
        if isinstance(identity, dict) and all(isinstance(name, str) for name in identity):
            return json.loads(json.dumps(identity))
    except (TypeError, ValueError, RecursionError):  # A tensor, for example.
        pass
    raise InputError(f"--resume: {path} does not record the settings of its run; choose another --out")


def require_same_run(then: dict, now: dict, override: str, folder: Path) -> None:
    """Raise `InputError` if a stopped run had other entries, unless `override` names them: ``lr,data``."""
    allowed = {name for name in override.split(",") if name}
    if unknown := allowed - then.keys() - now.keys():
        names = ", ".join(sorted(now))
        raise InputError(f"--override {','.join(sorted(unknown))}: not a setting; choose from {names}")
    other = differences(then, now)
    if other.keys() - allowed:
        names = ",".join(sorted(allowed | other.keys()))
        advice = f"start it with the same settings, or accept the change with --override {names}"
        raise InputError(f"--resume: the run in {folder} was started with {listed(other)}; {advice}")


def require_same_finished_run(then: dict, now: dict, settings: TrainSettings) -> None:
    """Raise `InputError` if a finished run had other settings, model, data or tokenizer.

    The machine may differ: device, precision, ranks and the version of torch are not compared.
    """
    names = {*settings.to_dict(), *DIGESTS} - {*MAY_CHANGE, "adapter", "device", "precision"}
    if other := differences(*({name: run.get(name) for name in names} for run in (then, now))):
        further = f"to train its model further, use --model {settings.out} and another --out"
        found = f"--resume: the run in {settings.out} has finished with {listed(other)}"
        raise InputError(f"{found}; choose another --out or --overwrite; {further}")


def differences(then: dict, now: dict) -> dict[str, tuple]:
    """The entries in which two identities differ: ``{name: (then, now)}``."""
    names = sorted(then.keys() | now.keys())
    return {name: (then.get(name), now.get(name)) for name in names if then.get(name) != now.get(name)}


def listed(changes: dict[str, tuple]) -> str:
    """``lr 0.001, now 0.002; data …``, with digests shortened."""
    return "; ".join(f"{name} {str(then)[:12]}, now {str(now)[:12]}" for name, (then, now) in changes.items())
