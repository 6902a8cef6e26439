"""Run folders: what a run may remove, when it counts as finished, what a user reads when it stops."""

import errno
import importlib
import json
import os
import re
import shutil
import signal
import sys

import pytest

import files
import train_dpo
import train_reward
import train_sft
import training.folder
import training.metrics
import training.run
import training.setup
from errors import InputError, run_script
from tests.faults import plant, states, train
from tests.loops import metrics
from tests.runs import ALONE, run_flags, same_model, stopped
from training.checkpoint import checkpoints
from training.settings import parse


@pytest.fixture(scope="module")
def flags(tmp_path_factory, tokenizer):
    """Flags of three short steps with a checkpoint after each; the files are shared by this module."""
    saving = {"save_every": 1, "keep_checkpoints": 9, "log_every": 1, "epochs": 1}
    made = run_flags(tmp_path_factory.mktemp("folder"), tokenizer, **saving)
    return lambda out, data="chats", **changes: made(out, data, **changes)


@pytest.fixture
def killed(flags, tmp_path):
    """A run folder with three checkpoints and without a model."""
    stopped(train_sft, flags(tmp_path / "stopped"), after=3)
    return tmp_path / "stopped"


def content(folder) -> dict:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# ---- a run removes and overwrites only files that a run wrote


def test_out_in_a_project_loses_nothing(flags, tmp_path, monkeypatch):
    """`--out .` in a project with its own `checkpoints` and temporary files must not remove them."""
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "best.pt").write_text("a month of work")
    (tmp_path / "checkpoints" / "step.tmp").write_text("also mine")
    (tmp_path / "draft.tmp").write_text("a book")
    before = content(tmp_path)
    monkeypatch.chdir(tmp_path)
    for more in ([], ["--overwrite"], ["--resume"], []):
        with pytest.raises(InputError, match=r"a run did not write checkpoints/(best\.pt|step\.tmp)"):
            train_sft.main([*flags("."), *more])
        assert content(tmp_path) == before


@pytest.mark.parametrize(
    "name", ["config.json", "model.pt", "tokenizer.json", "metrics.jsonl", "samples.jsonl", "adapter.pt"]
)
def test_files_of_another_program_are_not_overwritten(name, flags, tmp_path):
    """A downloaded model also has a config.json and a tokenizer.json, which a run would overwrite."""
    (tmp_path / name).write_text("{}")
    for more in ([], ["--overwrite"], ["--resume"]):
        with pytest.raises(InputError, match=rf"not write .*{re.escape(name)}|not record|not a model"):
            train_sft.main([*flags(tmp_path), *more])
        assert content(tmp_path) == {name: b"{}"}


def test_other_files_stay_where_they_are(flags, tmp_path):
    """Also while a run replaces another one, and after a run has finished."""
    train_sft.main(flags(tmp_path))
    mine = {"notes.txt": b"1", "draft.tmp": b"2", "model.pt.backup": b"3", "plots/1.pt": b"4"}
    (tmp_path / "plots").mkdir()
    for name, data in mine.items():
        (tmp_path / name).write_bytes(data)
    train_sft.main([*flags(tmp_path), "--overwrite"])
    assert mine.items() <= content(tmp_path).items()


def test_checkpoints_that_a_user_added_are_kept(flags, killed):
    """A resumed run leaves other files in `checkpoints`; a new run then refuses the folder."""
    (killed / "checkpoints" / "best.pt").write_text("mine")
    train_sft.main([*flags(killed), "--resume"])
    assert [path.name for path in (killed / "checkpoints").iterdir()] == ["best.pt"]
    with pytest.raises(InputError, match=r"a run did not write .*best\.pt"):
        train_sft.main([*flags(killed), "--overwrite"])
    assert (killed / "model.pt").exists()


def test_what_a_killed_run_left_is_removed(flags, killed):
    """Incomplete files have names of their own, and would fill the disk."""
    digest = "0" * 64
    left = [
        "model.pt.12.tmp", "config.json.7.tmp", "checkpoints/00000009-{sha256}.pt.12.tmp",
        f"checkpoints/00000001-{digest}.tmp", f"checkpoints/00000008-{digest}.damaged",
    ]  # fmt: skip
    for name in left:
        (killed / name).write_bytes(b"incomplete")
    half = killed / "checkpoints" / "00000009-{sha256}.shards.tmp"
    half.mkdir()
    (half / "__0_0.distcp").write_bytes(b"incomplete")
    train_sft.main([*flags(killed), "--resume"])
    assert not (killed / "checkpoints").exists() and not list(killed.glob("*.tmp"))


def test_a_run_writes_only_the_names_that_it_may_overwrite(flags, tmp_path):
    """A name that is missing in `folder.WRITTEN` would be overwritten in the folder of another program."""
    train_dpo.main(flags(tmp_path, data="pairs", lora_rank=2, max_steps=1))
    names = {path.name for path in tmp_path.iterdir()}
    assert names - {".lock"} <= {*training.folder.WRITTEN} and "adapter.pt" in names


# ---- finished or not


def test_an_empty_model_is_not_a_finished_run(flags, killed):
    """A file of length 0 is what some file systems leave after a power cut."""
    (killed / "model.pt").touch()
    train_sft.main([*flags(killed), "--resume"])
    assert (killed / "model.pt").stat().st_size > 0 and not (killed / "checkpoints").exists()


def test_checkpoints_beside_a_finished_model_are_removed(flags, tmp_path, monkeypatch, capsys):
    """A kill after the model was written leaves them, and nothing would ever remove them."""
    arguments = flags(tmp_path / "run")
    train(train_sft, arguments, ALONE)  # keeps its checkpoints
    assert checkpoints(tmp_path / "run" / "checkpoints")
    before = (tmp_path / "run" / "model.pt").read_bytes()
    train_sft.main([*arguments, "--resume"])
    assert "the run is finished" in capsys.readouterr().out
    assert not (tmp_path / "run" / "checkpoints").exists()
    assert (tmp_path / "run" / "model.pt").read_bytes() == before


DAMAGED = ["", "{", "[1]", "null", '{"run": 3}', "\xff", None]


@pytest.mark.parametrize("config", DAMAGED)
def test_a_damaged_config_of_a_finished_run_is_reported(config, flags, tmp_path):
    """--resume reads it to compare the runs. `None`: a folder of that name."""
    train_sft.main(flags(tmp_path / "run", max_steps=1))
    path = tmp_path / "run" / "config.json"
    path.unlink()
    if config is None:
        path.mkdir()
    else:
        path.write_bytes(config.encode("latin-1"))
    with pytest.raises(InputError, match=r"config\.json|Is a directory"):
        train_sft.main([*flags(tmp_path / "run", max_steps=1), "--resume"])


def test_another_machine_may_find_the_run_finished(flags, tmp_path, capsys):
    """A pipeline that runs again elsewhere is still finished: device, ranks and torch are not compared."""
    arguments = flags(tmp_path / "run", max_steps=1)
    train_sft.main(arguments)
    path = tmp_path / "run" / "config.json"
    config = json.loads(path.read_text())
    config["run"] |= {"device": "cuda", "ranks": 8, "torch": "2.0.0", "precision": "bf16"}
    path.write_text(json.dumps(config))
    train_sft.main([*arguments, "--resume"])
    assert "the run is finished" in capsys.readouterr().out


def test_a_finished_run_names_the_next_commands(flags, tmp_path, capsys):
    """A newcomer must not search for what to do with the result. A reward model cannot chat."""
    for module, data, commands in (
        (train_sft, "chats", "talk to it: python -m eval.chat --model {0}; "),
        (train_reward, "pairs", ""),
    ):
        out = tmp_path / module.__name__
        module.main(flags(out, data=data, max_steps=1))
        last = f"saved in {out}; {commands.format(out)}see it: python -m eval.report {out}"
        assert capsys.readouterr().out.splitlines()[-1] == last


# ---- the identity of a run


class Recording(training.run.RunFolder):
    """A run folder whose run has the entries `more` in its identity."""

    def begin(self, *arguments, **identity):
        return super().begin(*arguments, **{**identity, **self.more})


def run_with(flags: list[str], **more) -> None:
    """Run train_sft with further entries of the identity."""
    settings = parse(train_sft.Settings, "", flags)
    with Recording(settings, ALONE) as run:
        run.more = more
        train_sft.train(settings, ALONE, run)


def test_further_entries_of_the_identity_are_compared(flags, tmp_path, monkeypatch):
    """For example the digest of the cached reference: a rebuilt cache can differ in the last bits."""
    with monkeypatch.context() as patch:
        patch.setattr(Recording, "finish", lambda *arguments: None)
        run_with(flags(tmp_path), reference="a" * 64)
    resumed = [*flags(tmp_path), "--resume"]
    with pytest.raises(InputError, match=r"was started with reference a{12}, now b{12}; start it"):
        run_with(resumed, reference="b" * 64)
    run_with([*resumed, "--override", "reference"], reference="b" * 64)


# ---- the order of writes at the end


def test_everything_is_durable_before_the_checkpoints_go(flags, tmp_path, monkeypatch):
    """A power cut after the checkpoints are gone must not leave an empty tokenizer, config or model."""
    synced, log, fsync, replace, remove = set(), [], os.fsync, os.replace, training.folder.remove

    def recording_fsync(descriptor):
        fsync(descriptor)
        synced.add(os.fstat(descriptor).st_ino)
        log.append(os.fstat(descriptor).st_ino)

    def recording_replace(source, target):
        replace(source, target)
        log.append(f"renamed in {os.path.dirname(target)}")

    def recording_remove(path):
        if not checked and (tmp_path / "model.pt").exists():
            written = {file.name: file.stat().st_ino for file in tmp_path.iterdir() if file.is_file()}
            assert {"model.pt", "config.json", "tokenizer.json", "tokenizer_config.json"} <= written.keys()
            assert [name for name, inode in written.items() if inode not in synced] in ([], [".lock"])
            last = max(place for place, entry in enumerate(log) if entry == f"renamed in {tmp_path}")
            assert tmp_path.stat().st_ino in log[last:], "the names are in the folder, which must be synced"
            checked.append(path)
        remove(path)

    checked: list = []
    monkeypatch.setattr(os, "fsync", recording_fsync)
    monkeypatch.setattr(os, "replace", recording_replace)
    monkeypatch.setattr(training.folder, "remove", recording_remove)
    train_sft.main(flags(tmp_path))
    assert checked


@pytest.mark.parametrize("save_every", [0, 1, 2])
def test_a_full_disk_at_the_end_loses_nothing(save_every, flags, tmp_path, monkeypatch):
    """The final write needs room, too. The last step is in a checkpoint, from which --resume finishes."""
    arguments = flags(tmp_path / "run", save_every=save_every)
    train_sft.main(flags(tmp_path / "whole"))
    with monkeypatch.context() as patch:
        fail_on(patch, "model.pt")
        with pytest.raises(InputError, match=r"model\.pt: cannot be written \(No space left on device\)"):
            train_sft.main(arguments)
    assert max(states(tmp_path / "run")) == 3 and not (tmp_path / "run" / "model.pt").exists()
    steps = []
    monkeypatch.setattr(train_sft, "clip_gradients", lambda *a: steps.append(a))
    train_sft.main([*arguments, "--resume"])
    assert not steps
    assert same_model(tmp_path / "run", tmp_path / "whole")


def fail_on(patch, name: str) -> None:
    """Let the disk be full for files of this name."""
    replace = os.replace

    def failing(source, target):
        if os.path.basename(target) == name:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        replace(source, target)

    patch.setattr(files.os, "replace", failing)


# ---- disks and folders that change while a run works


def test_a_log_row_on_a_full_disk_is_one_line(flags, killed, tmp_path, monkeypatch):
    """Status 2 and the path; with room again the run continues, and each row is logged once."""
    fsync, calls = os.fsync, []

    def full(descriptor):
        if os.readlink(f"/proc/self/fd/{descriptor}").endswith("metrics.jsonl"):
            calls.append(descriptor)
            if len(calls) > 1:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(InputError, match=r"metrics\.jsonl: cannot be written \(No space left"):
            train_sft.main(flags(tmp_path / "run"))
    train_sft.main([*flags(tmp_path / "run"), "--resume"])
    assert [row["step"] for row in metrics(tmp_path / "run")] == [1, 2, 3]


@pytest.mark.parametrize("change", ["removed", "moved", "a file", "another folder"])
@pytest.mark.parametrize("save_every", [1, 0])
def test_a_folder_that_is_replaced_stops_the_run(change, save_every, flags, tmp_path, monkeypatch):
    """The lock is gone with the folder, so another run could write there. A moved run can be resumed."""
    out, moved, clip, steps = tmp_path / "run", tmp_path / "moved", train_sft.clip_gradients, []

    def replacing(*arguments):
        steps.append(arguments)
        if len(steps) == 2:
            out.rename(moved)
            if change == "removed":
                shutil.rmtree(moved)
            elif change == "a file":
                out.write_text("mine")
            elif change == "another folder":
                out.mkdir()
                (out / "notes").write_text("mine")
        return clip(*arguments)

    monkeypatch.setattr(train_sft, "clip_gradients", replacing)
    with pytest.raises(InputError, match="was removed, renamed or replaced while the run wrote to it"):
        train_sft.main(flags(out, save_every=save_every))
    if change == "another folder":
        assert content(out) == {"notes": b"mine"}
    if change != "removed" and save_every:
        monkeypatch.setattr(train_sft, "clip_gradients", clip)
        train_sft.main([*flags(moved), "--resume"])
        assert (moved / "model.pt").exists()


# ---- starts that are refused, and stops


@pytest.mark.parametrize("out", ["", " "])
def test_an_empty_out_is_refused(out, flags, tmp_path, monkeypatch):
    """`--out "$OUT"` with an unset variable must not write into the current folder."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="--out is empty"):
        train_sft.main(flags(out))
    assert not content(tmp_path)


def test_without_fcntl_one_line_names_wsl(flags, tmp_path, monkeypatch):
    """Windows has no fcntl: importing it there must not end in a traceback."""
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "fcntl", None)
        folder = importlib.reload(training.folder)
        with pytest.raises(InputError, match="Windows does not have: use WSL"):
            train_sft.main(flags(tmp_path / "run"))
    importlib.reload(folder)
    assert not (tmp_path / "run").exists()


def test_an_early_ctrl_c_is_one_line(flags, tmp_path, monkeypatch, capsys):
    """Before the first step nothing is saved; status 130 is that of a program that Ctrl-C stopped."""

    def interrupted(*arguments, **options):
        signal.raise_signal(signal.SIGINT)  # os.kill may reach another thread, and this one goes on.

    monkeypatch.setattr(training.setup, "open_store", interrupted)
    with pytest.raises(SystemExit) as left:
        run_script(lambda: train_sft.main(flags(tmp_path / "run")))
    assert left.value.code == 130 and capsys.readouterr().err == "stopped by Ctrl-C\n"
    assert not (tmp_path / "run").exists()


def test_a_repeated_sigterm_under_torchrun_still_saves(flags, tmp_path, monkeypatch):
    """Slurm and systemd send SIGTERM to torchrun and to its ranks, and torchrun forwards it at once."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setattr(train_dpo, "clip_gradients", train_dpo.clip_gradients)
    monkeypatch.setattr(train_dpo, "sigmoid", train_dpo.sigmoid)
    plant(train_dpo, "SIGTERM+SIGTERM+SIGTERM", 0, 1)
    with pytest.raises(SystemExit) as left:
        train(train_dpo, flags(tmp_path, data="pairs", save_every=0), ALONE)
    assert left.value.code == 128 + signal.SIGTERM and list(states(tmp_path)) == [2]


@pytest.mark.parametrize("seconds, stops", [(1, False), (training.run.REPEATS + 1, True)])
def test_under_torchrun_a_late_sigterm_stops_at_once(seconds, stops, flags, monkeypatch):
    """Only a SIGTERM within seconds of the first one is a forwarded one."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    now, killed = [100.0], []
    monkeypatch.setattr(training.run.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(training.run.signal, "signal", lambda *arguments: None)
    monkeypatch.setattr(training.run.os, "kill", lambda *arguments: killed.append(arguments))
    run = training.run.RunFolder(parse(train_sft.Settings, "", flags("never")), ALONE)
    run._note_signal(signal.SIGTERM, None)
    now[0] += seconds
    run._note_signal(signal.SIGTERM, None)
    assert killed == ([(os.getpid(), signal.SIGTERM)] if stops else [])
