"""Trackers: the rows of metrics.jsonl also go to TensorBoard, Weights & Biases or SwanLab (--track).

Names are those of Hugging Face's Trainer: ``loss`` becomes ``train/loss``, and ``eval_rewards/margins``
``eval/rewards/margins``. Only the main rank opens a tracker. Nothing here is imported without --track.

    OUT/tensorboard/              TensorBoard's event files: tensorboard --logdir OUT
    OUT/wandb/, OUT/swanlab/      files of the other two; WANDB_MODE=offline, SWANLAB_MODE=offline: only these
    OUT/tracker.json              the id of the run at the tracker, with which a resumed run continues it
"""

import json
import os
import secrets
from importlib.util import find_spec
from pathlib import Path

from errors import InputError
from files import write_whole
from training.settings import TrainSettings


def require_tracker(name: str) -> None:
    """Raise `InputError` if the package of --track is missing. A run calls it before it loads anything."""
    if name != "none" and find_spec(name) is None:
        raise InputError(f"--track {name} needs the package {name}: pip install {name}")


def open_tracker(settings: TrainSettings, folder: Path, first_step: int):
    """The tracker of --track, with `log(step, row)` and `close()`; `InputError` if it cannot start."""
    kind = {"tensorboard": TensorBoard, "wandb": WeightsAndBiases, "swanlab": SwanLab}[settings.track]
    try:
        return kind(settings, folder, first_step)
    except InputError:
        raise
    except Exception as error:  # Of another library: no login, no network, a version without a function.
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise InputError(f"--track {settings.track}: it cannot start ({reason})") from None


def tracked(row: dict[str, float]) -> dict[str, float]:
    """A row under the names of Hugging Face's Trainer (`rewrite_logs` in its integrations)."""
    held_out = {name: name.removeprefix("eval_") for name in row if name.startswith("eval_")}
    return {f"eval/{held_out[k]}" if k in held_out else f"train/{k}": value for k, value in row.items()}


def run_id(folder: Path) -> str:
    """The id of the run at its tracker, written to tracker.json when the run begins."""
    path = folder / "tracker.json"
    if not path.exists():
        text = json.dumps({"id": secrets.token_hex(8)}) + "\n"
        write_whole(path, lambda file: file.write(text.encode()))
    try:
        return str(json.loads(path.read_text("utf-8"))["id"])
    except (OSError, ValueError, TypeError, KeyError):
        raise InputError(f"{path}: damaged; remove it, and the tracker begins a new run") from None


class TensorBoard:
    def __init__(self, settings: TrainSettings, folder: Path, first_step: int):
        from torch.utils.tensorboard import SummaryWriter

        # From `purge_step` on, TensorBoard hides what the stopped run wrote after its checkpoint.
        self.writer = SummaryWriter(folder / "tensorboard", purge_step=first_step + 1 if first_step else None)
        if not first_step:
            self.writer.add_text("settings", f"```\n{json.dumps(settings.to_dict(), indent=2)}\n```")

    def log(self, step: int, row: dict[str, float]) -> None:
        for name, value in tracked(row).items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()  # A killed run keeps its rows.

    def close(self) -> None:
        self.writer.close()


class WeightsAndBiases:
    """Rows that a resumed run computes again are logged again, at the same `train/global_step`."""

    def __init__(self, settings: TrainSettings, folder: Path, first_step: int):
        import wandb

        project = os.environ.get("WANDB_PROJECT", "minidpo")
        options = {"name": folder.name, "dir": str(folder), "config": settings.to_dict()}
        self.run = wandb.init(project=project, id=run_id(folder), resume="allow", **options)
        self.run.define_metric("train/global_step")
        self.run.define_metric("*", step_metric="train/global_step", step_sync=True)

    def log(self, step: int, row: dict[str, float]) -> None:
        self.run.log({**tracked(row), "train/global_step": step})

    def close(self) -> None:
        self.run.finish()


class SwanLab:
    def __init__(self, settings: TrainSettings, folder: Path, first_step: int):
        import swanlab

        project = os.environ.get("SWANLAB_PROJECT", "minidpo")
        options = {"name": folder.name, "log_dir": str(folder / "swanlab"), "config": settings.to_dict()}
        swanlab.init(project=project, id=run_id(folder), resume="allow", **options)
        self.swanlab = swanlab

    def log(self, step: int, row: dict[str, float]) -> None:
        self.swanlab.log(tracked(row), step=step)

    def close(self) -> None:
        self.swanlab.finish()
