"""A run folder that survives crashes and signals: one owner, checkpoints, exact resume, an orderly stop.

    with join(settings.device) as world, RunFolder(settings, world) as run:
        ...
        first_step = run.begin({"model": model, "optimizer": optimizer, ...}, digests...)
        if first_step is None:
            return  # --resume finds the run finished
        for step in range(first_step, total_steps):
            ...
            run.save_when_due(step + 1)
        run.finish(model, tokenizer)

An unfinished run's folder contains `checkpoints` and no model.pt; a finished run's folder, the opposite.
"""

import json
import os
import signal
import time
from contextlib import contextmanager
from pathlib import Path

from dataset.tokenizer import ChatTokenizer
from errors import InputError, NotFiniteError, require
from model.lora import Adapters
from model.transformer import Transformer
from model.weights import read_json, save_model
from training import checkpoint, folder, identity
from training.distributed import World, gathered
from training.settings import TrainSettings
from training.track import require_tracker

SIGNALS = (signal.SIGTERM, signal.SIGINT)
REPEATS = 10.0  # Seconds in which torchrun's ranks ignore further SIGTERMs.


class RunFolder:
    def __init__(self, settings: TrainSettings, world: World):
        require(folder.fcntl, "training locks its folder with fcntl, which Windows does not have: use WSL")
        require(settings.out.strip(), "--out is empty: name a folder for the run")
        both = settings.resume and settings.overwrite
        require(not both, "--resume continues a run and --overwrite replaces it: choose one of them")
        require_tracker(settings.track)
        self.settings, self.world = settings, world
        self.folder = Path(settings.out)
        self.checkpoints = self.folder / folder.CHECKPOINTS
        self.step = self.saved_step = 0  # optimizer steps done, and in the newest checkpoint
        self.best: dict = {}  # of --keep-best: {"metric": …, "value": …, "step": …}
        self.saved = None  # the state in the checkpoint to continue from, until it is restored
        self.signal, self.signal_time = 0, 0.0  # the first signal that stops the run, and when it came
        self.handlers: dict = {}
        self.lock = None

    def __enter__(self) -> "RunFolder":
        return self

    def __exit__(self, kind, error, traceback) -> None:
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        if isinstance(error, NotFiniteError) and self.lock:
            self._set_aside(error.step)
        if self.lock:
            self.lock.close()

    @property
    def is_split(self) -> bool:
        """Whether each rank holds a part of the weights and moments."""
        return self.settings.shard and self.world.ranks > 1

    def begin(self, state: dict, model: str, data: str, tokenizer: str, **more) -> int | None:
        """Take the folder; return the first step: 0 for a fresh run, None if --resume finds it finished.

        The values of `state` have state_dict() and load_state_dict(); they get the state in the checkpoint
        that --resume finds. `model`, `data` and `tokenizer` are digests of what the run starts from. `more`
        contains further text and numbers that must be the same when the run is resumed. If the flag of that
        name is "auto", a resumed run takes the value from its checkpoint: see `run.identity`.
        """
        self.state = state
        self.automatic = [name for name in more if getattr(self.settings, name, None) == "auto"]
        more |= {"model": model, "data": data, "tokenizer": tokenizer}
        self.identity = identity.identity_of(self.settings, self.world, state["precision"].name, **more)
        path, main, self.best = self.world.from_main(lambda: (self._prepare(), self.identity, self.best))
        self._take_automatic(main)
        if other := identity.differences(main, self.identity):
            listed = identity.listed(other)
            raise InputError(f"rank {self.world.rank} does not run what rank 0 runs: {listed}")
        if path is None:
            return None
        if path:
            path = Path(path)
            # The main rank has checked the parts.
            saved = self.saved or checkpoint.load_checkpoint(path, check_parts=False)
            checkpoint.restore(state, saved, path, self.world.mesh if self.is_split else None)
            self.saved = None
            self.step = self.saved_step = checkpoint.step_of(path)
            self.world.print(f"{path}: continuing after step {self.step}")
        for number in SIGNALS:
            self.handlers[number] = signal.signal(number, self._note_signal)
        return self.step

    def save_when_due(self, step: int) -> None:
        """Save every --save-every steps. After a signal to any rank, save on all and exit, 128 + signal."""
        # A finite loss in this step means that the weights before it were good: only now older ones can go.
        if self.world.is_main and self.saved_step == step - 1:
            checkpoint.prune(self.checkpoints, self.settings.keep_checkpoints)
        self.step = step
        number = self.world.largest(self.signal)
        every = self.settings.save_every
        if number or (every and step % every == 0):
            self._save()
        if number:
            self.world.wait()  # A rank that exits before the file exists makes torchrun kill the others.
            name = signal.Signals(number).name
            self.world.print(f"{name}: saved after step {step}; continue with --resume")
            raise SystemExit(128 + number)

    def finish(self, model: Transformer, tokenizer: ChatTokenizer) -> None:
        """Write the tokenizer, the config and the weights; then remove the checkpoints. All ranks call it.

        The last step is saved as a checkpoint first, so that a full disk loses nothing.
        """
        if self.saved_step < self.step:
            self._save()
        self._require_steps_at_the_end()
        with gathered(model, self.world):
            if self.world.is_main:
                with writing(self.folder):
                    self._write_model(self.folder, model, tokenizer)
                    self.remove_checkpoints()
                print(f"saved in {self.folder}; {next_commands(self.folder, model)}", flush=True)
                if self.best:
                    best = "{metric} {value:.4f} at step {step}".format(**self.best)
                    print(f"best held-out weights: {self.folder / folder.BEST} ({best})", flush=True)

    def keep_best(
        self, step: int, figures: dict[str, float], model: Transformer, tokenizer: ChatTokenizer
    ) -> None:
        """Write the weights to OUT/best if `figures` has the best value of --keep-best so far.

        Of equal values the first one counts. All ranks must call it. A resumed run keeps the best of the
        steps that it repeats: they have the same values again.
        """
        metric = self.settings.keep_best
        if not metric:
            return
        known = f"--keep-best {metric}: not a held-out metric; choose from {', '.join(figures)}"
        require(metric in figures, known)
        sign = -1 if metric.endswith("loss") else 1  # as `greater_is_better` of Hugging Face's Trainer
        if self.best and sign * figures[metric] <= sign * self.best["value"]:
            return
        self.best = {"metric": metric, "value": figures[metric], "step": step}

        def write() -> None:
            with writing(self.folder):
                folder.replace_best(self.folder, lambda path: self._write_model(path, model, tokenizer))

        with gathered(model, self.world):
            self.world.from_main(write)

    def _write_model(self, path: Path, model: Transformer, tokenizer: ChatTokenizer) -> None:
        """Write a model folder with the settings of the run, in the run's folder."""
        folder.require_same_folder(self.folder, self.lock)
        tokenizer.save(path)
        best = {"best": self.best} if self.best else {}
        save_model(path, model, settings=self.settings.to_dict(), run=self.identity, **best)

    def _require_steps_at_the_end(self) -> None:
        """Raise FloatingPointError if fp16 skipped the last steps; a single skip is normal."""
        precision = self.state["precision"]
        skipped = precision.skipped_in_a_row
        if skipped > 1 or precision.skipped == self.step > 0:
            advice = "use a lower --lr, more --max-steps, or --precision fp32"
            reason = f"the last {skipped} steps were skipped, because their gradients overflowed in fp16"
            raise FloatingPointError(f"step {self.step}: the run does not finish: {reason}; {advice}")

    def remove_checkpoints(self) -> None:
        folder.remove_checkpoints(self.folder)

    def _save(self) -> None:
        """Save a checkpoint. Every rank must call it: some states, such as running means, need all ranks."""
        state = {name: part.state_dict() for name, part in self.state.items()}
        if self.world.largest(int(not checkpoint.is_finite(state))):
            raise NotFiniteError(self.step, "a weight or a moment is not finite; this step is not saved")
        state |= {"step": self.step, "identity": self.identity}
        if self.world.is_main:
            folder.require_same_folder(self.folder, self.lock)
        # One more than --keep-checkpoints, until the next loss shows that these weights are good.
        keep = self.settings.keep_checkpoints + 1
        if self.is_split or self.world.is_main:
            world = self.world if self.is_split else None
            checkpoint.save_checkpoint(self.checkpoints, self.step, state, keep, world)
        self.saved_step = self.step

    def _set_aside(self, step: int) -> None:
        """Set aside the checkpoint of this step, whose weights gave a number that is not finite."""
        for path in checkpoint.checkpoints(self.checkpoints):
            if checkpoint.step_of(path) == step:
                checkpoint.set_aside(path)
                print(f"{path}: set aside, its loss or gradient is not finite", flush=True)

    def _note_signal(self, number: int, frame) -> None:
        """Note the first signal: all ranks must end the current step. A second one stops the process at once.

        Slurm and systemd send SIGTERM to torchrun and to the ranks, and torchrun forwards it to the ranks. So
        under torchrun a repeated SIGTERM is not a second signal.
        """
        if not self.signal:
            self.signal, self.signal_time = number, time.monotonic()
            name = signal.Signals(number).name
            message = f"\n{name}: saving after this step; a second Ctrl-C stops at once\n"
            os.write(2, message.encode())  # Not print(): the signal may interrupt a print().
            return
        repeated = "TORCHELASTIC_RUN_ID" in os.environ and time.monotonic() - self.signal_time < REPEATS
        if number == signal.SIGINT or not repeated:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    # ---- on the main rank, before the first step

    def _prepare(self) -> str | None:
        """Take the folder. Return the checkpoint to continue from; "" for a fresh run, None at its end."""
        start = Path(self.settings.model)
        try:
            if self.folder.exists() and start.exists() and self.folder.samefile(start):
                raise InputError(f"--out {self.folder} is --model: a run cannot overwrite where it starts")
            if self.settings.resume and folder.is_finished(self.folder):
                self._require_same_finished_run()
                return None
            return self._take_folder()
        except OSError as error:
            raise InputError(f"{self.folder}: cannot be read or written ({error.strerror})") from None

    def _require_same_finished_run(self) -> None:
        config = self.folder / "config.json"
        then = identity.recorded(read_json(config).get("run"), config)
        self._take_automatic(then)
        identity.require_same_finished_run(then, self.identity, self.settings)
        if self.checkpoints.exists():  # The run was killed before it had removed them.
            self.lock = folder.take_lock(self.folder)
            folder.remove_checkpoints(self.folder)
        print(f"{self.folder}: the run is finished, there is nothing to resume", flush=True)

    def _take_folder(self) -> str:
        resumes = self.settings.resume and checkpoint.checkpoints(self.checkpoints)
        if not resumes:
            folder.require_no_foreign_files(self.folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.lock = folder.take_lock(self.folder)
        if not resumes:
            replaces = self.settings.overwrite or self.settings.resume
            folder.require_replaceable(self.folder, replaces)
        folder.remove_unfinished(self.folder)
        self._require_room()
        if resumes:
            path, self.saved = checkpoint.newest_valid(self.checkpoints, print)
            then = identity.recorded(self.saved.get("identity"), path)
            self._take_automatic(then)
            identity.require_same_run(then, self.identity, self.settings.override, self.folder)
            self.best = self._best_so_far()
            return str(path)
        folder.remove_run(self.folder)
        self.checkpoints.mkdir(exist_ok=True)
        return ""

    def _best_so_far(self) -> dict:
        """The entry "best" in OUT/best/config.json; empty if its metric or its held-out data were others."""
        path = self.folder / folder.BEST / "config.json"
        if not self.settings.keep_best or not path.exists():
            return {}
        config = read_json(path)
        then, now = config.get("settings", {}), json.loads(json.dumps(self.settings.to_dict()))
        same = all(then.get(name) == now[name] for name in ("keep_best", "eval_data", "eval_share"))
        return config.get("best", {}) if same else {}

    def _require_room(self) -> None:
        """Raise `InputError` unless the disk can hold the checkpoints and the model, with merged adapters."""
        part = self.state["model"]
        trained = model = nbytes(part)
        if isinstance(part, Adapters):
            model += nbytes(part.model)
        reference = nbytes(self.state["reference"]) if "reference" in self.state else 0
        # AdamW has two moments for each weight that is trained.
        models = 3 if self.settings.keep_best else 1  # also the best one, and one that replaces it
        folder.require_room(
            self.folder, 3 * trained + reference, model * models, self.settings.keep_checkpoints
        )

    def _take_automatic(self, then: dict) -> None:
        """Take over the values that "auto" had when the run was started."""
        self.identity |= {name: then[name] for name in self.automatic if name in then}


@contextmanager
def writing(path: Path):
    """Turn an error of the disk into an `InputError`."""
    try:
        yield
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror})") from None


def nbytes(part) -> int:
    """Bytes of all tensors in the state of a part; of split ones, the parts of all ranks together."""
    return sum(tensor.numel() * tensor.element_size() for tensor in checkpoint.tensors(part.state_dict()))


def next_commands(path: Path, model: Transformer) -> str:
    """What a user can do with a finished run, as commands."""
    chat = f"talk to it: python -m eval.chat --model {path}; " if model.kind == Transformer.kind else ""
    return f"{chat}see it: python -m eval.report {path}"
