"""A run folder, and what lets one leave its run alone: one owner, checkpoints, and a way to stop in order.

    with join(settings.device) as world, RunFolder(settings, world) as run:
        ...
        first_step = run.begin({"model": model, "optimizer": optimizer, ...}, digests...)
        if first_step is None:
            return  # --resume found the run finished
        for step in range(first_step, total_steps):
            ...
            run.save_when_due(step + 1)
        run.finish(model, tokenizer)

While a run is unfinished its folder has ``checkpoints`` and no ``model.pt``; afterwards it is the other way.
"""

import fcntl
import json
import os
import shutil
import signal
from pathlib import Path

import torch

from dataset.tokenizer import ChatTokenizer
from errors import InputError
from files import sync
from model.transformer import Transformer
from model.weights import save_model
from training.checkpoint import (
    checkpoints,
    load_checkpoint,
    newest_valid,
    remove,
    restore,
    save_checkpoint,
    step_of,
    tensors,
)
from training.distributed import World, gather
from training.settings import TrainSettings
from training.sharded import settle

SIGNALS = (signal.SIGTERM, signal.SIGINT)
# These change no bit of the weights, so a resumed run may have others than before.
FREE = ("out", "eval_data", "log_every", "eval_every", "save_every", "keep_checkpoints", "resume", "override")
BY_CONTENT = ("model", "data", "tokenizer")  # Compared by what is in them: a file may have moved.


class RunFolder:
    def __init__(self, settings: TrainSettings, world: World):
        self.settings, self.world = settings, world
        self.folder = Path(settings.out)
        self.checkpoints = self.folder / "checkpoints"
        self.signal = 0  # the one that asked the run to stop
        self.handlers: dict = {}
        self.lock = None

    def __enter__(self) -> "RunFolder":
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        if self.lock:
            self.lock.close()

    @property
    def is_split(self) -> bool:
        """Whether ranks hold a part each of weights and moments."""
        return self.settings.shard and self.world.ranks > 1

    def begin(self, things: dict, model: str, data: str, tokenizer: str, **identity) -> int | None:
        """Take the folder; return the first step: 0 for a fresh run, None if --resume finds it finished.

        The values of `things` have state_dict() and load_state_dict(), and are set to the checkpoint that
        --resume finds. `model`, `data` and `tokenizer` are digests of what the run starts from. `identity`
        is what else must be the same when the run is resumed; its values are JSON.
        """
        self.things = things
        self.identity = {
            **{k: v for k, v in self.settings.to_dict().items() if k not in (*FREE, *BY_CONTENT)},
            # What `auto` became, and what else decides how sums are rounded.
            "device": self.world.device.type,
            "precision": things["precision"].name,
            "ranks": self.world.ranks,
            "torch": torch.__version__.split("+")[0],
            "model": model,
            "data": data,
            "tokenizer": tokenizer,
            **identity,
        }
        state = None  # of the checkpoint to go on from

        def prepare() -> tuple[str | None, dict]:
            nonlocal state
            if self.settings.resume and self._is_finished():
                return None, self.identity
            path, state = self._prepare()
            return str(path or ""), self.identity

        path, identity = self.world.from_main(prepare)
        self._keep_micro_batch_tokens(identity)
        if other := differences(identity, self.identity):
            raise InputError(f"rank {self.world.rank} is not in the run of rank 0: {listed(other)}")
        if path is None:
            return None
        if path:
            mesh = self.world.mesh if self.is_split else None
            state = state or load_checkpoint(Path(path), check_parts=False)  # The main rank has done that.
            restore(things, settle(state, Path(path), mesh))
            self.world.print(f"{path}: going on after step {step_of(Path(path))}")
        for number in SIGNALS:
            self.handlers[number] = signal.signal(number, self._note_signal)
        return step_of(Path(path)) if path else 0

    def save_when_due(self, step: int) -> None:
        """Save after every --save-every steps. When a signal came to any rank, all save here and leave."""
        number = self.world.largest(self.signal)
        every = self.settings.save_every
        if number or (every and step % every == 0):
            self._save(step)
        if number:
            self.world.wait()  # No rank may leave before the file is there: torchrun would end the others.
            self.world.print(f"{signal.Signals(number).name}: saved after step {step}; --resume goes on")
            raise SystemExit(128 + number)

    def finish(self, model: Transformer, tokenizer: ChatTokenizer) -> None:
        """Write the tokenizer, the config and the weights; then remove the checkpoints. All ranks call it."""
        gather(model, self.world)  # if it was split
        if self.world.is_main:
            tokenizer.save(self.folder)
            save_model(self.folder, model, settings=self.settings.to_dict(), run=self.identity)
        self.remove_checkpoints()

    def remove_checkpoints(self) -> None:
        if self.world.is_main:
            shutil.rmtree(self.checkpoints, ignore_errors=True)

    def _save(self, step: int) -> None:
        """Every rank must call it: some state, such as running means, is gathered from all."""
        state = {name: thing.state_dict() for name, thing in self.things.items()}
        if self.world.largest(int(not all(tensor.isfinite().all() for tensor in tensors(state)))):
            raise FloatingPointError(f"step {step}: a weight or its state is not finite; nothing was saved")
        state |= {"step": step, "identity": self.identity}
        keep = self.settings.keep_checkpoints
        if self.is_split:
            save_checkpoint(self.checkpoints, step, state, keep, self.world)
        elif self.world.is_main:
            save_checkpoint(self.checkpoints, step, state, keep)

    def _note_signal(self, number: int, frame) -> None:
        """Only note it: all ranks must end the step that is under way. A second signal leaves at once."""
        self.signal = number
        for each in SIGNALS:
            signal.signal(each, signal.SIG_DFL)
        said = f"\n{signal.Signals(number).name}: saving after this step; again to leave at once\n"
        os.write(2, said.encode())  # Not print(): the signal may have come in the middle of one.

    # ---- what the main rank does before a run

    def _is_finished(self) -> bool:
        """Whether the folder contains this run's model. Raises `InputError` for the model of another run.

        The machine may differ: device, precision, ranks and version of torch are not compared.
        """
        if not (self.folder / "model.pt").exists():
            return False
        config = json.loads((self.folder / "config.json").read_text("utf-8"))
        then = {**config.get("settings", {}), **config.get("run", {})}
        self._keep_micro_batch_tokens(then)
        names = {*self.settings.to_dict(), *BY_CONTENT} - {*FREE, "device", "precision"}
        if other := differences(*({name: run.get(name) for name in names} for run in (then, self.identity))):
            raise InputError(f"--resume: {self.folder} has finished with other settings: {listed(other)}")
        print(f"{self.folder}: the run is finished, there is nothing to resume")
        return True

    def _prepare(self) -> tuple[Path | None, dict | None]:
        """Take the folder; return the checkpoint to go on from and its state, or None twice."""
        start = Path(self.settings.model)
        if self.folder.exists() and start.exists() and self.folder.samefile(start):
            raise InputError(f"--out {self.folder} is --model: a run must not write over where it starts")
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            self._take_lock()
            for unfinished in (*self.folder.glob("*.tmp"), *self.checkpoints.glob("*.tmp")):
                remove(unfinished)
            self._require_room()
            if self.settings.resume and (found := newest_valid(self.checkpoints, print)):
                self._require_same_run(found[1]["identity"])
                return found
            self._clear()
        except OSError as error:
            raise InputError(f"{self.folder}: cannot be written ({error.strerror})") from None
        return None, None

    def _take_lock(self) -> None:
        """Own the folder until this process ends, however it ends."""
        self.lock = open(self.folder / ".lock", "a+")  # noqa: SIM115
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.lock.seek(0)
            holder = self.lock.read().strip()
            raise InputError(f"{self.folder}: a run is at work there already (process {holder})") from None
        self.lock.truncate(0)
        self.lock.write(f"{os.getpid()}\n")
        self.lock.flush()

    def _require_room(self) -> None:
        """Weights and AdamW's two moments, for the checkpoints to keep, the next one and the final model."""
        weights = sum(tensor.nbytes for tensor in self.things["model"].state_dict().values())
        needed = weights * (3 * (self.settings.keep_checkpoints + 1) + 1)
        free = shutil.disk_usage(self.folder).free
        if free < needed:
            raise InputError(
                f"{self.folder}: {free / 2**20:.0f} MiB are free, this run needs {needed / 2**20:.0f} "
                "(--keep-checkpoints 1 needs less)"
            )

    def _require_same_run(self, then: dict) -> None:
        """Refuse to go on with what would change the run, unless it was named."""
        allowed = {name for name in self.settings.override.split(",") if name}
        if unknown := allowed - then.keys() - self.identity.keys():
            known = ", ".join(sorted(self.identity))
            raise InputError(f"--override {','.join(sorted(unknown))}: no such setting; there are {known}")
        self._keep_micro_batch_tokens(then)
        other = differences(then, self.identity)
        if other.keys() - allowed:
            raise InputError(
                f"--resume: the run in {self.folder} was started otherwise: {listed(other)}; start it as "
                f"before, or accept the change with --override {','.join(sorted(allowed | other.keys()))}"
            )

    def _keep_micro_batch_tokens(self, then: dict) -> None:
        """With --micro-batch-tokens auto, take the number of `then`: other streams would round otherwise."""
        name = "micro_batch_tokens"
        if self.settings.micro_batch_tokens == "auto":
            self.identity[name] = then.get(name, self.identity[name])

    def _clear(self) -> None:
        """Make room for a fresh run. A finished one is replaced, a stopped one is not thrown away."""
        model = self.folder / "model.pt"
        if not model.exists() and (left := checkpoints(self.checkpoints)):
            raise InputError(
                f"{self.folder} holds a run that was stopped after step {step_of(left[0])}: go on with "
                f"--resume, or remove {self.checkpoints} to start anew"
            )
        shutil.rmtree(self.checkpoints)
        self.checkpoints.mkdir()
        model.unlink(missing_ok=True)  # What a run leaves half done must not be taken for a model.
        sync(self.folder)


def differences(then: dict, now: dict) -> dict[str, tuple]:
    """What two descriptions of a run do not agree in, by name."""
    names = sorted(then.keys() | now.keys())
    return {name: (then.get(name), now.get(name)) for name in names if then.get(name) != now.get(name)}


def listed(changes: dict[str, tuple]) -> str:
    """``lr 0.001, now 0.002; data …``, with digests cut short."""
    return "; ".join(f"{name} {str(then)[:12]}, now {str(now)[:12]}" for name, (then, now) in changes.items())
