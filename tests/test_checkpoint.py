"""Checkpoint files: complete or absent, valid or refused, whatever the disk or the machine does."""

import contextlib
import copy
import errno
import io
import os
import random
import re
import resource
import sys
from pathlib import Path

import pytest
import torch

import files
from errors import InputError
from files import file_hash, write_whole
from model.weights import save_model
from tests.conftest import ROOT, make_model
from tests.faults import digest
from tests.test_weights import Evil
from training.checkpoint import (
    checkpoints,
    load_checkpoint,
    newest_valid,
    restore,
    save_checkpoint,
    step_of,
)
from training.distributed import World
from training.metrics import Meter
from training.precision import Precision
from training.schedule import adamw

ALONE = World(0, 1, torch.device("cpu"))


def state_of(step: int) -> dict:
    torch.manual_seed(step)
    tensors = {name: torch.randn(7, 5) for name in "abc"}
    return {"step": step, "model": tensors, "optimizer": {"state": {0: tensors["a"] * 2}}, "lr": step / 7}


@pytest.fixture
def folder(tmp_path) -> Path:
    """A folder with the checkpoints of steps 1 and 2."""
    for step in (1, 2):
        save_checkpoint(tmp_path / "checkpoints", step, state_of(step), keep=2)
    return tmp_path / "checkpoints"


def newest(folder: Path) -> tuple[int | None, list[str]]:
    """The step of the checkpoint that a run would resume, with its state checked to the bit; the reports."""
    reports: list[str] = []
    found = newest_valid(folder, reports.append)
    if found is None:
        return None, reports
    path, state = found
    assert digest(state) == digest(state_of(step_of(path)))
    return step_of(path), reports


# ---- damaged files


def test_what_is_saved_is_what_is_loaded(folder):
    assert newest(folder) == (2, [])
    assert [step_of(path) for path in checkpoints(folder)] == [2, 1]
    save_checkpoint(folder, 3, state_of(3), keep=2)
    assert [step_of(path) for path in checkpoints(folder)] == [3, 2]
    save_checkpoint(folder, 100_000_000, state_of(100_000_000), keep=1)  # Steps are compared as numbers.
    assert [step_of(path) for path in checkpoints(folder)] == [100_000_000]


def test_every_flipped_bit_is_found(folder):
    """torch.load reads a flipped bit as a weight; the control below counts how often."""
    path = checkpoints(folder)[0]
    whole, draw, silent = path.read_bytes(), random.Random(0), 0
    for bit in draw.sample(range(8 * len(whole)), 400):
        data = bytearray(whole)
        data[bit // 8] ^= 1 << bit % 8
        path.write_bytes(data)
        with pytest.raises(InputError, match="damaged"):
            load_checkpoint(path)
        with contextlib.suppress(Exception):
            silent += digest(torch.load(io.BytesIO(data), weights_only=True)) != digest(state_of(2))
    assert silent > 10, "without a digest, these would have been trained on"


def test_every_truncation_is_found(folder):
    """To nothing, to the header, in the middle, by one byte; and with bytes appended."""
    path = checkpoints(folder)[0]
    whole = path.read_bytes()
    ends = {0, 1, 10, len(whole) // 2, len(whole) - 1, *range(0, len(whole), 97)}
    for data in [*(whole[:end] for end in ends), whole + b"\0", whole + whole]:
        path.write_bytes(data)
        with pytest.raises(InputError, match="damaged"):
            load_checkpoint(path)


def test_a_damaged_file_falls_back_and_is_named(folder):
    """The run resumes the one before and reports it; the damaged one is not counted as kept."""
    path = checkpoints(folder)[0]
    path.write_bytes(path.read_bytes()[:-1])
    step, reports = newest(folder)
    assert step == 1 and len(reports) == 1
    assert path.name in reports[0] and "damaged" in reports[0] and "going back to step 1" in reports[0]
    assert [step_of(each) for each in checkpoints(folder)] == [1]
    save_checkpoint(folder, 2, state_of(2), keep=2)
    assert newest(folder) == (2, [])


def test_no_run_starts_if_all_checkpoints_are_damaged(folder):
    """They may be the only copy of a week's work, and can perhaps be repaired."""
    before = {path: b"x" + path.read_bytes() for path in checkpoints(folder)}
    for path, data in before.items():
        path.write_bytes(data)
    reason = r"no checkpoint can be used: .*00000002.*damaged.*00000001.*damaged"
    with pytest.raises(InputError, match=reason):
        newest_valid(folder, print)
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


def rename_to_digest(path: Path) -> Path:
    """Forge a checkpoint: the digest in the name is right, the content is not."""
    return path.rename(path.with_name(f"{path.name[:8]}-{file_hash(path)}.pt"))


def test_a_hostile_file_runs_nothing(folder, monkeypatch):
    """A digest is not a signature. Code cannot run because nothing is unpickled."""
    monkeypatch.chdir(folder)
    path = checkpoints(folder)[0]
    torch.save({"step": 2, "model": Evil()}, path)
    rename_to_digest(path)
    step, reports = newest(folder)
    assert step == 1 and "not a checkpoint (" in reports[0]
    assert not (folder / "PWNED").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_a_checkpoint_is_mapped(folder):
    """Eight ranks of a node that each read 100 GB need 800 GB of memory; mapped, they share the pages."""
    path = checkpoints(folder)[0]
    state = load_checkpoint(path)
    assert state and path.name in Path("/proc/self/maps").read_text()


def test_nothing_in_the_project_unpickles():
    """With one call without `weights_only=True`, a downloaded file could run any code."""
    sources = [p for p in ROOT.glob("**/*.py") if p.relative_to(ROOT).parts[0] not in ("tests", ".venv")]
    wrong = r"import (dill|joblib|yaml|pickle as)|from pickle|weights_only=False|allow_pickle=True"
    wrong += r"|pickle\.(?!UnpicklingError)\w"  # torch raises that error for a file that it refuses.
    assert len(sources) > 30
    for path in sources:
        text = path.read_text("utf-8")
        assert not re.search(wrong, text), path
        safe = re.findall(r"torch\.load\([^()]*weights_only=True\b", text)
        assert text.count("torch.load(") == len(safe), path


@pytest.mark.parametrize("state", [{"step": 7}, {"model": {}}, [1, 2], torch.zeros(3)], ids=str)
def test_another_content_under_a_right_digest_is_refused(state, folder):
    path = checkpoints(folder)[0]
    torch.save(state, path)
    with pytest.raises(InputError, match="not a checkpoint of step 2"):
        load_checkpoint(rename_to_digest(path))


def test_a_link_is_not_a_checkpoint(folder, tmp_path):
    """A link in the run folder must not make it read files outside."""
    path = checkpoints(folder)[0]
    path.rename(tmp_path / path.name)
    path.symlink_to(tmp_path / path.name)
    step, reports = newest(folder)
    assert step == 1 and "a link" in reports[0]


def test_other_files_are_left_alone(folder):
    """Files with other names are neither loaded nor pruned."""
    for name in ("notes.txt", "best.pt", "00000003-abc.pt", "unfinished.tmp"):
        (folder / name).write_text("mine")
    save_checkpoint(folder, 3, state_of(3), keep=1)
    assert newest(folder) == (3, [])
    assert (folder / "best.pt").read_text() == (folder / "00000003-abc.pt").read_text() == "mine"


# ---- checkpoints that do not fit the run


def test_state_that_does_not_fit_is_refused():
    """torch assigns moments to parameters by position; in another order they would go to the wrong ones."""
    model, optimizer, saved = trained()
    names = saved["optimizer"]["param_groups"][1]["param_names"]
    names[0], names[1] = names[1], names[0]
    with pytest.raises(InputError, match="other parameters: the same ones in another order"):
        restore({"optimizer": optimizer}, saved)
    names[0] = "gone.weight"
    with pytest.raises(InputError, match=r"other parameters: \['gone\.weight', "):
        restore({"optimizer": optimizer}, saved)

    lacking = {"model": {**saved["model"]}}
    del lacking["model"]["norm.weight"]
    with pytest.raises(InputError, match=r"model does not fit: state has other keys.* norm\.weight"):
        restore({"model": model}, lacking)
    with pytest.raises(InputError, match="the checkpoint does not contain objective, only model"):
        restore({"objective": model}, lacking)


def trained() -> tuple:
    """A model and an optimizer after one step, and a copy of their states."""
    model = make_model(20, torch.float32)
    optimizer = adamw(model, 0.1)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    saved = copy.deepcopy({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    return model, optimizer, saved


def moments(saved: dict) -> dict:
    return saved["optimizer"]["state"][0]


# Changes of a checkpoint whose digest is then right again: what a faulty tool could write, or an attacker.
FORGERIES = {
    "small moments": lambda saved: moments(saved).update(exp_avg=torch.zeros(3)),
    "large moments": lambda saved: moments(saved).update(exp_avg=torch.zeros(200, 160)),
    "fp16 moments": lambda saved: moments(saved).update(exp_avg=moments(saved)["exp_avg"].half()),
    "moments with strides": lambda saved: moments(saved).update(exp_avg=torch.zeros(1).expand(20, 16)),
    "sparse moments": lambda saved: moments(saved).update(exp_avg=torch.zeros(20, 16).to_sparse()),
    "moments on meta": lambda saved: moments(saved).update(exp_avg=torch.empty(20, 16, device="meta")),
    "moments that are text": lambda saved: moments(saved).update(exp_avg="0"),
    "moments that are NaN": lambda saved: moments(saved).update(exp_avg=torch.full((20, 16), float("nan"))),
    "a step of three numbers": lambda saved: moments(saved).update(step=torch.ones(3)),
    "a negative step": lambda saved: moments(saved).update(step=torch.tensor(-1.0)),
    "a step that is a list": lambda saved: moments(saved).update(step=[1]),
    "a missing moment": lambda saved: moments(saved).pop("exp_avg_sq"),
    "a further moment": lambda saved: moments(saved).update(max_exp_avg_sq=torch.zeros(20, 16)),
    "moments of no parameter": lambda saved: saved["optimizer"]["state"].update({99: moments(saved)}),
    "moments by name": lambda saved: saved["optimizer"]["state"].update({"x": moments(saved)}),
    "moments that are a list": lambda saved: saved["optimizer"].update(state=[1, 2]),
    "no groups": lambda saved: saved["optimizer"].pop("param_groups"),
    "groups of numbers": lambda saved: saved["optimizer"].update(param_groups=[1, 2]),
    "names of numbers": lambda saved: saved["optimizer"]["param_groups"][0].update(param_names=[[1]]),
    "an optimizer that is text": lambda saved: saved.update(optimizer="adamw"),
    "weights of another type": lambda saved: saved["model"].update(
        {"norm.weight": saved["model"]["norm.weight"].half()}
    ),
    "weights of another shape": lambda saved: saved["model"].update({"norm.weight": torch.zeros(3)}),
    "a weight that is a number": lambda saved: saved["model"].update({"norm.weight": 1.0}),
    "a missing weight": lambda saved: saved["model"].pop("norm.weight"),
    "a model that is a list": lambda saved: saved.update(model=[]),
    "no model": lambda saved: saved.pop("model"),
    "a deep nest": lambda saved: saved["optimizer"].update(more=nested(300)),
}


def nested(depth: int) -> list:
    nest: list = []
    for _ in range(depth):
        nest = [nest]
    return nest


@pytest.mark.parametrize("name", FORGERIES)
def test_a_forged_checkpoint_is_refused_before_anything_changes(name, tmp_path):
    """torch's fused AdamW reads moments of the wrong size beyond their end, and crashes the process."""
    model, optimizer, saved = trained()
    before = digest(copy.deepcopy({"model": model.state_dict(), "optimizer": optimizer.state_dict()}))
    FORGERIES[name](saved)
    save_checkpoint(tmp_path, 2, {"step": 2, **saved}, keep=1)
    with pytest.raises(InputError, match=r"does not fit|not a checkpoint|does not contain"):
        restore({"model": model, "optimizer": optimizer}, load_checkpoint(*checkpoints(tmp_path)))
    assert digest({"model": model.state_dict(), "optimizer": optimizer.state_dict()}) == before


def test_the_other_states_of_a_forged_checkpoint_are_checked():
    """The meter, the loss scale and an objective keep plain numbers, which text must not replace."""
    meter, precision = Meter(ALONE), Precision("fp32", torch.device("cpu"))
    for part, forged in [
        (meter, {"names": ["loss"], "rows": [[1.0]]}),
        (meter, {"names": ["loss"], "rows": [["1", "2"]]}),
        (meter, {"names": ["loss"], "rows": 1}),
        (meter, {"names": "loss"}),
        (precision, {"scaler": {}, "skipped": "1", "skipped_in_a_row": 0}),
        (precision, {"scaler": {"scale": 1.0}, "skipped": 1, "skipped_in_a_row": 0}),
        (precision, "fp32"),
    ]:
        with pytest.raises(InputError, match="the checkpoint's part does not fit: "):
            restore({"part": part}, {"part": forged})
    restore({"part": meter}, {"part": {"names": ["loss"], "rows": [[1.0, 2.0]]}})
    assert meter.mean() == {"loss": 0.5}


# ---- crash points: the possible contents of a disk after a crash at any moment


class Disk:
    """Records the operations on files, and computes what a crash at any moment can leave.

    A file's bytes are safe when the file is synced, its name when its folder is synced. A kill loses nothing;
    a power cut loses bytes that were not synced, and perhaps names.
    """

    def __init__(self, folder: Path, monkeypatch):
        self.folder, self.log, self.open_files = folder, [], {}
        self.before = {path.name: path.read_bytes() for path in folder.iterdir()}
        fsync, replace, unlink, os_open = os.fsync, os.replace, os.unlink, os.open

        def recording_open(path, mode):
            file = open(path, mode, buffering=0)  # noqa: SIM115
            self.log.append(("create", Path(path).name))
            self.open_files[file.fileno()] = Path(path).name
            write = file.write
            disk = self

            class Recorded:
                def __enter__(self):
                    return self

                def __exit__(self, *_):
                    file.close()

                def write(self, data):
                    disk.log.append(("write", Path(path).name, bytes(data)))
                    return write(data)

                def flush(self):
                    file.flush()

                def fileno(self):
                    return file.fileno()

            return Recorded()

        def recording_os_open(path, flags, *more, **others):
            descriptor = os_open(path, flags, *more, **others)
            if Path(path) == folder:
                self.open_files[descriptor] = None
            return descriptor

        def recording_fsync(descriptor):
            self.log.append(("sync", self.open_files[descriptor]))
            fsync(descriptor)

        def recording_replace(source, target):
            self.log.append(("rename", Path(source).name, Path(target).name))
            replace(source, target)

        def recording_unlink(path, **others):
            self.log.append(("unlink", Path(path).name))
            unlink(path, **others)

        monkeypatch.setattr(files, "open", recording_open, raising=False)
        monkeypatch.setattr(os, "open", recording_os_open)
        monkeypatch.setattr(os, "fsync", recording_fsync)
        monkeypatch.setattr(os, "replace", recording_replace)
        monkeypatch.setattr(os, "unlink", recording_unlink)

    def after_crash(self, moment: int, torn: bool):
        """The possible contents after the first `moment` operations, the last one half done if `torn`."""
        data = dict(enumerate(self.before.values()))
        safe_data = dict(data)
        names = {name: number for number, name in enumerate(self.before)}
        safe_names = dict(names)
        for place, (what, name, *more) in enumerate(self.log[:moment], start=1):
            if what == "create":
                names[name] = len(data)
                data[names[name]] = safe_data[names[name]] = b""
            elif what == "write":
                written = more[0][: len(more[0]) // 2] if torn and place == moment else more[0]
                data[names[name]] += written
            elif what == "sync" and name:
                safe_data[names[name]] = data[names[name]]
            elif what == "sync":
                safe_names = dict(names)
            elif what == "rename":
                names[more[0]] = names.pop(name)
            elif what == "unlink":
                del names[name]
        for kept_names, kept_data in ((names, data), (names, safe_data), (safe_names, safe_data)):
            yield {name: kept_data[number] for name, number in kept_names.items()}


@pytest.mark.parametrize("keep", [1, 2])
def test_a_crash_at_any_moment_leaves_a_whole_checkpoint(folder, tmp_path, monkeypatch, keep):
    """At every write, sync, rename and unlink: by a kill, by a power cut, and with a torn last write."""
    for old in checkpoints(folder)[keep:]:
        old.unlink()
    with monkeypatch.context() as patch:
        disk = Disk(folder, patch)
        save_checkpoint(folder, 3, state_of(3), keep)
    kinds = {what for what, *_ in disk.log}
    assert kinds == {"create", "write", "sync", "rename", "unlink"} and len(disk.log) > 20
    tried = 0
    for moment in range(len(disk.log) + 1):
        for torn in (False, True):
            for contents in disk.after_crash(moment, torn):
                left = tmp_path / f"left-{tried}"
                left.mkdir()
                for name, data in contents.items():
                    (left / name).write_bytes(data)
                step, _ = newest(left)
                assert step in (2, 3)
                if moment == len(disk.log):
                    assert step == 3, "after save_checkpoint returns, the new one must be safe"
                tried += 1
    assert tried > 150


def test_the_model_survives_a_crash_at_any_moment(tmp_path, monkeypatch):
    """The same for the final weights: the old model.pt or the new one, never a part."""
    save_model(tmp_path, make_model(20, seed=1))
    old = (tmp_path / "model.pt").read_bytes()
    with monkeypatch.context() as patch:
        disk = Disk(tmp_path, patch)
        save_model(tmp_path, make_model(20, seed=2))
    new = (tmp_path / "model.pt").read_bytes()
    assert old != new
    for moment in range(len(disk.log) + 1):
        for torn in (False, True):
            found = [contents["model.pt"] for contents in disk.after_crash(moment, torn)]
            assert set(found) <= {old, new}
    assert found == [new] * 3


# ---- a disk that fails


class FailingDisk:
    """A disk that does so many operations and then fails at every one."""

    def __init__(self, good: int, code: int, patch):
        self.left, self.code = good, code
        patch.setattr(files, "open", self.failing(open), raising=False)
        patch.setattr(files.DigestingFile, "write", self.failing(files.DigestingFile.write))
        patch.setattr(os, "fsync", self.failing(os.fsync))
        patch.setattr(os, "replace", self.failing(os.replace))

    def failing(self, function):
        def called(*arguments, **options):
            self.left -= 1
            if self.left < 0:
                raise OSError(self.code, os.strerror(self.code))
            return function(*arguments, **options)

        return called


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EACCES, errno.EROFS])
def test_a_disk_that_fails_at_any_moment_leaves_the_old_one(folder, monkeypatch, code):
    """Full, broken or read-only, at every operation in turn: one line, and earlier files are intact."""
    before = {path.name for path in folder.iterdir()}
    for good in range(1000):
        with monkeypatch.context() as patch:
            disk = FailingDisk(good, code, patch)
            try:
                save_checkpoint(folder, 3, state_of(3), keep=2)
            except InputError as error:
                assert f"({os.strerror(code)})" in str(error)  # torch.save reports `unexpected pos`.
        if disk.left >= 0:
            break
        assert before <= {path.name for path in folder.iterdir()}
        assert not list(folder.glob("*.tmp"))
        assert newest(folder)[0] in (2, 3)  # 3 if only the last sync of the folder failed.
        for path in checkpoints(folder)[:-2]:
            path.unlink()
    assert good > 20 and newest(folder) == (3, [])


def test_a_file_that_may_not_grow(folder):
    """A real limit of the system: the message contains the system's reason, not torch's guess."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(InputError, match=r"cannot be written .File too large.*are intact"):
            save_checkpoint(folder, 3, state_of(3), keep=2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert newest(folder) == (2, [])


def test_a_bug_is_not_reported_as_a_full_disk(tmp_path):
    """A bug in the code that writes must end in its own error."""
    with pytest.raises(RuntimeError, match="a bug"):
        write_whole(tmp_path / "x", lambda file: (_ for _ in ()).throw(RuntimeError("a bug")))
    assert not list(tmp_path.iterdir())
