"""Faults: signals, killed ranks, numbers that are none, full disks. Nothing is lost, nothing goes on wrong.

python -m pytest tests/test_faults.py -m ""
"""

import errno
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch

import files
import train_dpo
import train_sft
import training.run
from errors import InputError
from model.weights import save_model
from tests.conftest import make_model
from tests.faults import plant, states, timeless, train
from tests.loops import ROOT, metrics, torchrun
from tests.ranks import forked
from tests.test_loops import CHATS, PAIRS, command_line
from training.distributed import World
from training.run import RunFolder
from training.settings import parse

ALONE = World(0, 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def flags(tmp_path_factory, tokenizer):
    """Flags of six short steps with a checkpoint after each; the same files for all tests of this module."""
    folder = tmp_path_factory.mktemp("faults")
    save_model(folder / "start", make_model(tokenizer.vocab_size, torch.float32))
    tokenizer.save(folder / "start")
    for name, rows in (("pairs", PAIRS), ("chats", CHATS)):
        (folder / name).write_text("".join(f"{json.dumps(row)}\n" for row in rows))

    def of(out, data="pairs", **changes) -> list[str]:
        settings = {
            "model": folder / "start", "data": folder / data, "eval_data": folder / data, "batch_size": 4,
            "micro_batch_tokens": 1, "epochs": 2, "lr": 1e-3, "warmup_steps": 2, "log_every": 2,
            "eval_every": 3, "save_every": 1, "keep_checkpoints": 9, "device": "cpu", "precision": "fp32",
            **changes,
        }  # fmt: skip
        return command_line(out=out, **settings)

    return of


@pytest.fixture(scope="module")
def whole(flags, tmp_path_factory):
    """The run that nothing disturbs, on one rank: its checkpoints by step, and its folder."""
    folder = tmp_path_factory.mktemp("whole")
    train(train_dpo, flags(folder), ALONE)
    return folder


@pytest.fixture(scope="module")
def whole_of_two(flags, tmp_path_factory):
    """The same on two ranks."""
    folder = tmp_path_factory.mktemp("whole_of_two")
    result = forked(*faulty("none", 0, 0), *flags(folder), ranks=2)
    assert result.returncode == 0, result.stderr
    return folder


def faulty(fault: str, rank: int, step: int, script: str = "train_dpo") -> list[str]:
    return ["tests.faults", fault, str(rank), str(step), script]


def assert_same_run(folder, other) -> None:
    """The same model, the same state after every step that both still hold, the same rows."""
    assert (folder / "model.pt").read_bytes() == (other / "model.pt").read_bytes()
    found, wanted = states(folder), states(other)
    assert found and found.items() <= wanted.items()
    assert timeless(metrics(folder)) == timeless(metrics(other))


@pytest.fixture
def planted(monkeypatch):
    """Plant a fault in a script of this process; it is gone after the test."""

    def plant_here(module, fault: str, step: int) -> None:
        monkeypatch.setattr(module, "clip_gradients", module.clip_gradients)
        monkeypatch.setattr(module, "Objective", getattr(module, "Objective", None), raising=False)
        plant(module, fault, 0, step)

    return plant_here


# ---- signals


@pytest.mark.parametrize("step, name", [(0, "SIGINT"), (2, "SIGTERM"), (5, "SIGTERM")])
def test_a_signal_saves_after_the_step_and_leaves(name, step, flags, whole, tmp_path, planted, capfd):
    """Status 0 would let `train_sft && train_dpo` go on with half a model; no save would lose the work."""
    before = [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)]
    planted(train_dpo, name, step)
    with pytest.raises(SystemExit) as left:
        train(train_dpo, flags(tmp_path, save_every=0), ALONE)
    assert left.value.code == 128 + signal.Signals[name]
    assert list(states(tmp_path)) == [step + 1]
    said = capfd.readouterr()
    assert f"{name}: saved after step {step + 1}; --resume goes on" in said.out
    assert f"{name}: saving after this step; again to leave at once" in said.err
    assert [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)] == before
    train(train_dpo, [*flags(tmp_path), "--resume"], ALONE)
    assert_same_run(tmp_path, whole)


@pytest.mark.parametrize("place", ["evaluate", "save_checkpoint"])
def test_a_signal_while_evaluating_or_saving(place, flags, whole, tmp_path, monkeypatch):
    """What polls for signals in one place only sleeps through those that come in another."""
    module = {"evaluate": train_dpo, "save_checkpoint": training.run}[place]
    original, calls = getattr(module, place), []

    def interrupted(*arguments, **options):
        calls.append(arguments)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(module, place, interrupted)
        with pytest.raises(SystemExit):
            train(train_dpo, flags(tmp_path), ALONE)
    assert max(states(tmp_path)) == 3
    train(train_dpo, [*flags(tmp_path), "--resume"], ALONE)
    assert_same_run(tmp_path, whole)


def test_a_signal_before_the_first_step_leaves_at_once(flags, tmp_path, monkeypatch):
    """While data is read there is nothing to save, and nobody should wait for it."""
    open_store = train_dpo.open_store

    def interrupted(*arguments):
        os.kill(os.getpid(), signal.SIGINT)
        return open_store(*arguments)

    monkeypatch.setattr(train_dpo, "open_store", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(train_dpo, flags(tmp_path), ALONE)


def test_a_second_signal_leaves_at_once(flags, tmp_path):
    """Who asks twice does not want to wait for a step that may hang."""
    result = forked(*faulty("SIGTERM+SIGTERM", 0, 2), *flags(tmp_path, save_every=0))
    assert result.returncode == -signal.SIGTERM
    assert not states(tmp_path) and not (tmp_path / "model.pt").exists()


def test_a_signal_to_one_rank_stops_all_at_the_same_step(flags, whole_of_two, tmp_path):
    """One rank that leaves alone lets the other wait for it in the exchange of gradients."""
    result = torchrun(2, "-m", *faulty("SIGTERM", 1, 2), *flags(tmp_path, save_every=0))
    assert result.returncode != 0
    assert "SIGTERM: saved after step 3; --resume goes on" in result.stdout
    assert "exitcode  : 143" in result.stderr and "RuntimeError" not in result.stderr
    assert states(tmp_path).items() <= states(whole_of_two).items() and list(states(tmp_path)) == [3]


# ---- one owner


def test_a_folder_has_one_owner(flags, whole, tmp_path, monkeypatch):
    """Two runs that write one folder leave a mixture of both; the second one is told who is there."""
    clip_gradients, refusals = train_dpo.clip_gradients, []

    def second_run(*arguments):
        for resume in ([], ["--resume"]):
            with pytest.raises(InputError) as refused:
                train_sft.main([*flags(tmp_path, data="chats"), *resume])
            refusals.append(str(refused.value))
        return clip_gradients(*arguments)

    monkeypatch.setattr(train_dpo, "clip_gradients", second_run)
    train(train_dpo, flags(tmp_path), ALONE)
    assert len(refusals) == 12
    assert set(refusals) == {f"{tmp_path}: a run is at work there already (process {os.getpid()})"}
    assert_same_run(tmp_path, whole)


def test_all_ranks_must_be_in_the_same_run(flags, tmp_path, monkeypatch):
    """Another file under the same path on another machine: the ranks would train on different data."""

    def from_another_main(self, function):
        result = function()
        return [result[0], {**result[1], "data": "0" * 64}] if isinstance(result, tuple) else result

    monkeypatch.setattr(World, "from_main", from_another_main)
    with pytest.raises(InputError, match="rank 0 is not in the run of rank 0: data 000000000000, now "):
        train(train_dpo, flags(tmp_path), ALONE)


# ---- numbers that are none


@pytest.mark.parametrize("fault, wrong", [
    ("gradient", "the gradient norm is nan"),
    ("loss nan", "the gradient norm is nan"),
    ("loss inf", "the loss, on this rank or another, is not finite"),
])  # fmt: skip
def test_a_number_that_is_none_stops_before_the_step(fault, wrong, flags, whole, tmp_path, planted):
    """Named with its step and data lines; what was saved is the state before, from which one can go on."""
    planted(train_dpo, fault, 3)
    with pytest.raises(FloatingPointError, match=rf"step 3: {wrong}; the data lines were (\d+, ){{3}}\d+$"):
        train(train_dpo, flags(tmp_path), ALONE)
    assert states(tmp_path) == {step: state for step, state in states(whole).items() if step <= 3}
    planted(train_dpo, "none", 0)
    train(train_dpo, [*flags(tmp_path), "--resume"], ALONE)
    assert_same_run(tmp_path, whole)


def test_weights_that_are_none_are_never_saved(flags, tmp_path, monkeypatch):
    """A finite gradient can still make a step that is not; a checkpoint of it would be resumed for ever."""
    monkeypatch.setattr(train_dpo, "set_lr", lambda optimizer, lr: train_sft.set_lr(optimizer, float("inf")))
    with pytest.raises(
        FloatingPointError, match="step 1: a weight or its state is not finite; nothing was s"
    ):
        train(train_dpo, flags(tmp_path), ALONE)
    assert not states(tmp_path)
    with pytest.raises(FloatingPointError, match=r"the model is not saved, .* is not finite"):
        train(train_dpo, flags(tmp_path, save_every=0, max_steps=1), ALONE)
    assert not (tmp_path / "model.pt").exists()


def test_skipped_steps_are_counted_and_bounded(flags, tmp_path, monkeypatch):
    """A scaler that skips every step trains nothing, for ever, with a loss that looks well."""
    call = train_dpo.Objective.__call__
    monkeypatch.setattr(train_dpo.Objective, "__call__", lambda *a, **how: call(*a, **how) * float("nan"))
    settings = flags(tmp_path, precision="fp16", epochs=20, log_every=1, eval_data="", save_every=0)
    with pytest.raises(FloatingPointError, match="step 25: the gradient norm is nan; the data lines"):
        train(train_dpo, settings, ALONE)
    assert [row["skipped_steps"] for row in metrics(tmp_path)] == list(range(1, 26))


# ---- a disk that is full


def test_a_disk_that_fills_up_stops_the_run_and_leaves_what_was_saved(flags, whole, tmp_path, monkeypatch):
    """One line with the reason; with room again the run goes on as if nothing had been."""
    write, written = files.DigestingFile.write, 0

    def filling(self, data):
        nonlocal written
        written += len(data)
        if written > 300_000:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(self, data)

    with monkeypatch.context() as patch:
        patch.setattr(files.DigestingFile, "write", filling)
        with pytest.raises(InputError, match=r"checkpoints.*cannot be written \(No space left on device\)"):
            train(train_dpo, flags(tmp_path), ALONE)
    assert 1 <= len(states(tmp_path)) < 6
    train(train_dpo, [*flags(tmp_path), "--resume"], ALONE)
    assert_same_run(tmp_path, whole)


def test_a_disk_without_room_is_refused_before_the_start(flags, tmp_path, monkeypatch):
    """Better at once than at three in the morning."""
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=100_000))
    with pytest.raises(InputError, match=r"0 MiB are free, this run needs \d+"):
        train(train_dpo, flags(tmp_path), ALONE)


def test_a_folder_that_cannot_be_written_is_refused(flags, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(InputError, match=r"file.* cannot be written"):
        train(train_dpo, flags(tmp_path / "file" / "run"), ALONE)


# ---- ranks that die


def test_a_killed_rank_comes_back_to_the_same_bits(flags, whole_of_two, tmp_path):
    """kill -9 amid a step; torchrun starts all ranks anew, and the same command goes on."""
    result = torchrun(2, "-m", *faulty("SIGKILL", 1, 3), *flags(tmp_path), "--resume", restarts=1)
    assert result.returncode == 0, result.stderr
    assert "going on after step 3" in result.stdout
    assert_same_run(tmp_path, whole_of_two)


@pytest.mark.slow
@pytest.mark.parametrize("rank, step", [(0, 0), (0, 2), (0, 5), (1, 0), (1, 5)])
def test_a_rank_killed_anywhere_comes_back_to_the_same_bits(rank, step, flags, whole_of_two, tmp_path):
    result = torchrun(2, "-m", *faulty("SIGKILL", rank, step), *flags(tmp_path), "--resume", restarts=1)
    assert result.returncode == 0, result.stderr
    assert_same_run(tmp_path, whole_of_two)


@pytest.mark.slow
def test_a_signal_to_torchrun_reaches_the_ranks(flags, tmp_path):
    """What a cluster's scheduler sends goes to torchrun, which passes it on and waits half a minute."""
    longer = {"epochs": 60, "save_every": 0, "keep_checkpoints": 2}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += ["-m", *faulty("none", 0, 0), *flags(tmp_path / "run", **longer)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    agent = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
    try:
        wait_for(lambda: len(metrics(tmp_path / "run")) > 2)
        agent.terminate()
        said, _ = agent.communicate(timeout=60)
    finally:
        agent.kill()
    (step,) = states(tmp_path / "run")
    assert agent.returncode != 0 and f"SIGTERM: saved after step {step}; --resume goes on" in said
    for folder, resume in (("run", ["--resume"]), ("whole", [])):
        result = forked(*faulty("none", 0, 0), *flags(tmp_path / folder, **longer), *resume, ranks=2)
        assert result.returncode == 0, result.stderr
    same = [(tmp_path / folder / "model.pt").read_bytes() for folder in ("run", "whole")]
    assert same[0] == same[1] and timeless(metrics(tmp_path / "run")) == timeless(metrics(tmp_path / "whole"))


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_rank_ends_a_run_that_is_not_restarted(rank, flags, tmp_path):
    """Non-zero and soon: the bound on waiting is far above what a closed connection needs."""
    result = torchrun(2, "-m", *faulty("SIGKILL", rank, 2), *flags(tmp_path), seconds=90)
    assert result.returncode != 0
    assert max(states(tmp_path)) == 2


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["loss nan", "loss inf", "gradient"])
def test_a_number_that_is_none_on_one_rank_stops_both(fault, flags, whole_of_two, tmp_path):
    """The rank whose own numbers are fine must not step, save, or wait for the other."""
    result = forked(*faulty(fault, 1, 3), *flags(tmp_path), ranks=2)
    assert result.returncode != 0
    assert result.stderr.count("FloatingPointError: step 3: ") >= 2, result.stderr
    assert states(tmp_path) == {step: state for step, state in states(whole_of_two).items() if step <= 3}


@pytest.mark.slow
def test_bad_input_on_the_main_rank_ends_all(flags, tmp_path):
    """The others wait for the main rank to read the data; its error must reach them, and be told once."""
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"prompt": "a", "chosen": "b"}\n')
    result = torchrun(2, "train_dpo.py", *flags(tmp_path / "run", data=bad), seconds=60)
    assert result.returncode != 0
    assert len(re.findall(r"^error: .*bad\.jsonl:1: ", result.stderr, re.M)) == 1
    assert "Gloo" not in result.stderr and "RuntimeError" not in result.stderr


@pytest.mark.slow
def test_orphans_keep_their_folder_until_they_end(flags, tmp_path):
    """Kill torchrun itself and its workers go on; a second start into their folder is refused."""
    arguments = flags(tmp_path, epochs=400, log_every=1000, eval_every=1000, keep_checkpoints=2)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    agent = subprocess.Popen([*command, "train_dpo.py", *arguments], cwd=ROOT, env=environment)
    try:
        wait_for(lambda: len(states(tmp_path)) > 0)
        agent.kill()
        agent.wait()
        holder = owner(tmp_path)
        os.kill(holder, 0)  # It lives.
        with pytest.raises(InputError, match=f"at work there already .process {holder}."):
            train_dpo.main([*arguments, "--resume"])
    finally:
        agent.kill()
        for worker in workers_of(tmp_path):
            os.kill(worker, signal.SIGKILL)
    settings = parse(train_dpo.Settings, "", [*arguments, "--resume"])
    wait_for(lambda: not workers_of(tmp_path))
    with RunFolder(settings, ALONE) as run:
        run.folder = tmp_path
        run._take_lock()  # The lock died with its process.


def workers_of(folder) -> list[int]:
    """The processes that were started with this folder on their command line."""
    found = []
    for entry in os.scandir("/proc"):
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                with open(f"/proc/{entry.name}/cmdline", "rb") as file:
                    if str(folder).encode() in file.read().split(b"\0"):
                        found.append(int(entry.name))
            except OSError:
                continue
    return found


def wait_for(condition, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while True:
        try:
            if condition():
                return
        except (InputError, OSError):
            pass  # A file that was pruned while it was looked at.
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.slow
def test_killed_at_random_moments_again_and_again(flags, tmp_path):
    """Whenever a run is killed, at its start, in a step or a save, the same command ends in the same bits."""
    draw, killed, longer = random.Random(0), 0, {"epochs": 60, "keep_checkpoints": 2}
    train(train_dpo, flags(tmp_path / "whole", **longer), ALONE)
    folder = tmp_path / "run"
    command = [sys.executable, "-m", *faulty("none", 0, 0), *flags(folder, **longer), "--resume"]
    for _ in range(12):
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            wait_for(lambda started=process: owner(folder) == started.pid or started.poll() is not None)
            process.wait(timeout=draw.uniform(0, 0.5))
        except subprocess.TimeoutExpired:
            killed += 1
        finally:
            process.kill()
            process.wait()
    assert killed >= 3 and not (folder / "model.pt").exists(), "the kills must have come before the end"
    train(train_dpo, [*flags(folder, **longer), "--resume"], ALONE)
    assert_same_run(folder, tmp_path / "whole")


def owner(folder) -> int:
    """The process that took this run folder last."""
    return int((folder / ".lock").read_text() or 0)
