"""Faults: signals, killed ranks, numbers that are not finite, full disks. No saved work is lost."""

import errno
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
import training.checkpoint
from errors import InputError, NotFiniteError, run_script
from tests.faults import plant, states, timeless, train
from tests.loops import ROOT, metrics, torchrun, weights
from tests.ranks import forked
from tests.runs import ALONE, run_flags, same_model, stopped
from training.distributed import World
from training.folder import take_lock


@pytest.fixture(scope="module")
def flags(tmp_path_factory, tokenizer):
    """Flags of six short steps with a checkpoint after each; all tests of this module use the same files."""
    return run_flags(
        tmp_path_factory.mktemp("faults"), tokenizer, eval_data=True, micro_batch_tokens=1, epochs=2,
        warmup_steps=2, log_every=2, eval_every=3, save_every=1, keep_checkpoints=9,
    )  # fmt: skip


@pytest.fixture(scope="module")
def whole(flags, tmp_path_factory):
    """The folder of an undisturbed run on one rank, with its checkpoints."""
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
    """Assert the same model, the same state in every checkpoint that both have, and the same log rows."""
    assert same_model(folder, other)
    found, wanted = states(folder), states(other)
    assert found and found.items() <= wanted.items()
    assert timeless(metrics(folder)) == timeless(metrics(other))


@pytest.fixture
def planted(monkeypatch):
    """Plant a fault in a script of this process until the test ends."""

    def plant_here(module, fault: str, step: int) -> None:
        monkeypatch.setattr(module, "clip_gradients", module.clip_gradients)
        monkeypatch.setattr(module, "sigmoid", getattr(module, "sigmoid", None), raising=False)
        plant(module, fault, 0, step)

    return plant_here


# ---- signals


@pytest.mark.parametrize("step, name", [(0, "SIGINT"), (2, "SIGTERM"), (5, "SIGTERM")])
def test_a_signal_saves_after_the_step_and_leaves(name, step, flags, whole, tmp_path, planted, capfd):
    """Status 0 would let `train_sft && train_dpo` continue without a model; no save would lose the work."""
    before = [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)]
    planted(train_dpo, name, step)
    with pytest.raises(SystemExit) as left:
        train(train_dpo, flags(tmp_path, save_every=0), ALONE)
    assert left.value.code == 128 + signal.Signals[name]
    assert list(states(tmp_path)) == [step + 1]
    output = capfd.readouterr()
    assert f"{name}: saved after step {step + 1}; continue with --resume" in output.out
    assert f"{name}: saving after this step; a second Ctrl-C stops at once" in output.err
    assert [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)] == before
    train(train_dpo, [*flags(tmp_path), "--resume"], ALONE)
    assert_same_run(tmp_path, whole)


@pytest.mark.parametrize("place", ["evaluate", "save_checkpoint"])
def test_a_signal_while_evaluating_or_saving(place, flags, whole, tmp_path, monkeypatch):
    """Code that checks for signals in one place only would miss signals that come in another."""
    module = {"evaluate": train_dpo, "save_checkpoint": training.checkpoint}[place]
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


@pytest.mark.parametrize("under_torchrun, second", [(False, "SIGTERM"), (True, "SIGINT")])
def test_a_second_signal_stops_at_once(under_torchrun, second, flags, tmp_path, monkeypatch):
    """It does not wait for the step, which may hang. torchrun forwards SIGTERM twice, but never Ctrl-C."""
    if under_torchrun:
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    result = forked(*faulty(f"SIGTERM+{second}", 0, 2), *flags(tmp_path, save_every=0))
    assert result.returncode == -signal.Signals[second]
    assert not states(tmp_path) and not (tmp_path / "model.pt").exists()


def test_a_signal_to_one_rank_stops_all_at_the_same_step(flags, whole_of_two, tmp_path):
    """If one rank stopped alone, the other would wait for it in the exchange of gradients."""
    result = torchrun(2, "-m", *faulty("SIGTERM", 1, 2), *flags(tmp_path, save_every=0))
    assert result.returncode != 0
    assert "SIGTERM: saved after step 3; continue with --resume" in result.stdout
    assert "exitcode  : 143" in result.stderr and "RuntimeError" not in result.stderr
    assert states(tmp_path).items() <= states(whole_of_two).items() and list(states(tmp_path)) == [3]


# ---- one owner


def test_a_folder_has_one_owner(flags, whole, tmp_path, monkeypatch):
    """Two runs that write to one folder leave a mixture; the second one is refused and names the first."""
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
    assert set(refusals) == {f"{tmp_path}: another run writes to this folder (process {os.getpid()})"}
    assert_same_run(tmp_path, whole)


def test_all_ranks_must_be_in_the_same_run(flags, tmp_path, monkeypatch):
    """If machines have different files under the same path, ranks would train on different data."""

    def from_another_main(self, function):
        if not isinstance(result := function(), tuple):
            return result
        path, identity, *rest = result
        return [path, {**identity, "data": "0" * 64}, *rest]

    monkeypatch.setattr(World, "from_main", from_another_main)
    with pytest.raises(InputError, match="rank 0 does not run what rank 0 runs: data 000000000000, now "):
        train(train_dpo, flags(tmp_path), ALONE)


# ---- numbers that are not finite


@pytest.mark.parametrize("fault, wrong", [
    ("gradient", "the gradient norm is nan"),
    ("loss nan", "the loss is not finite"),
    ("loss inf", "the loss is not finite"),
])  # fmt: skip
def test_a_number_that_is_not_finite_stops_before_the_step(fault, wrong, flags, whole, tmp_path, planted):
    """The message names the step and the data lines. Checkpoints of weights with a finite loss remain."""
    planted(train_dpo, fault, 3)
    lines = r"the step used the data lines (\d+, ){3}\d+; a restart with the same settings stops here again"
    with pytest.raises(NotFiniteError, match=f"step 3: {wrong}; {lines}"):
        train(train_dpo, flags(tmp_path), ALONE)
    assert states(tmp_path) == {step: state for step, state in states(whole).items() if step <= 2}
    planted(train_dpo, "none", 0)
    train(train_dpo, [*flags(tmp_path), "--resume"], ALONE)
    assert_same_run(tmp_path, whole)


@pytest.mark.parametrize("keep", [1, 2])
def test_the_kept_checkpoint_is_older_than_ruined_weights(keep, flags, whole, tmp_path, monkeypatch, capsys):
    """One step with a huge learning rate is saved, since its weights are finite; their loss is not."""
    set_lr, steps = train_dpo.set_lr, []

    def huge_once(optimizer, lr):
        steps.append(lr)
        set_lr(optimizer, 1e20 if len(steps) == 4 else lr)

    with monkeypatch.context() as patch:
        patch.setattr(train_dpo, "set_lr", huge_once)
        with pytest.raises(NotFiniteError, match=r"step 4: .* is (nan|not finite); the step used"):
            train(train_dpo, flags(tmp_path, keep_checkpoints=keep, eval_data=""), ALONE)
    assert "00000004" in capsys.readouterr().out
    assert max(states(tmp_path)) == 3 and len(list(tmp_path.glob("checkpoints/00000004-*.damaged"))) == 1
    train(train_dpo, [*flags(tmp_path, keep_checkpoints=keep), "--resume"], ALONE)
    assert same_model(tmp_path, whole)


def test_an_error_is_one_line_on_standard_error(capsys):
    """A traceback hides the reason among lines of code. Control characters could change the terminal."""
    errors = [
        (NotFiniteError(7, "the loss is not finite"), 1, "error: step 7: the loss is not finite; a restart "),
        (InputError("a\nb \x1b[31mred"), 2, "error: a b \\x1b[31mred\n"),
        (InputError("x" * 10_000), 2, f"error: {'x' * 1000}"),
        (KeyboardInterrupt(), 130, "stopped by Ctrl-C\n"),
    ]
    for error, status, message in errors:
        with pytest.raises(SystemExit) as stopped:
            run_script(lambda error=error: (_ for _ in ()).throw(error).send(None))
        output = capsys.readouterr().err
        assert stopped.value.code == status and output.startswith(message)
        assert output.count("\n") == 1 and len(output) < 2100


def test_weights_that_are_not_finite_are_never_saved(flags, tmp_path, monkeypatch):
    """A finite gradient can make a step that is not; every restart would resume a checkpoint of it."""
    monkeypatch.setattr(train_dpo, "set_lr", lambda optimizer, lr: train_sft.set_lr(optimizer, float("inf")))
    for every in (1, 0):
        with pytest.raises(NotFiniteError, match="step 1: a weight or a moment is not finite; this step is"):
            train(train_dpo, flags(tmp_path, save_every=every, max_steps=1, eval_data=""), ALONE)
        assert not states(tmp_path) and not (tmp_path / "model.pt").exists()


def test_an_evaluation_that_is_not_finite_is_not_a_success(flags, tmp_path, monkeypatch):
    """Status 0 with an eval_loss of NaN would let a pipeline take the model for a good one."""
    evaluate = train_dpo.evaluate
    monkeypatch.setattr(train_dpo, "evaluate", lambda *a: {**evaluate(*a), "loss": float("nan")})
    with pytest.raises(NotFiniteError, match="step 0: eval_loss is nan"):
        train(train_dpo, flags(tmp_path), ALONE)
    assert not (tmp_path / "model.pt").exists()


def test_a_loss_must_be_finite_under_fp16_too(flags, tmp_path, planted):
    """The scaler skips steps whose gradients overflow. A loss that is not finite is an error at once."""
    planted(train_dpo, "loss nan", 2)
    with pytest.raises(NotFiniteError, match="step 2: the loss is not finite"):
        train(train_dpo, flags(tmp_path, precision="fp16"), ALONE)


@pytest.mark.parametrize("steps", [1, 4])
def test_a_run_that_skips_at_its_end_does_not_finish(steps, flags, tmp_path, monkeypatch):
    """Its model would be that of an earlier step, or the untrained one. The checkpoint remains."""
    skip_from(monkeypatch, steps - 2)
    with pytest.raises(FloatingPointError, match=rf"the last {min(steps, 2)} steps were skipped"):
        train(train_dpo, flags(tmp_path, precision="fp16", max_steps=steps, save_every=0), ALONE)
    assert list(states(tmp_path)) == [steps] and not (tmp_path / "model.pt").exists()


def skip_from(monkeypatch, step: int) -> None:
    """From this step on, give every gradient an infinite element, which makes fp16's scaler skip the step."""
    clip, calls = train_dpo.clip_gradients, []

    def overflowing(optimizer, *arguments):
        calls.append(optimizer)
        if len(calls) > step:
            optimizer.param_groups[0]["params"][0].grad[0, 0] = float("inf")
        return clip(optimizer, *arguments)

    monkeypatch.setattr(train_dpo, "clip_gradients", overflowing)


def test_skipped_steps_are_counted_and_bounded(flags, tmp_path, monkeypatch):
    """A scaler that skips every step trains nothing, for ever, while the logged loss looks good."""
    skip_from(monkeypatch, 0)
    settings = flags(tmp_path, precision="fp16", epochs=20, log_every=1, eval_data="", save_every=0)
    with pytest.raises(FloatingPointError, match=r"step 25: the gradient norm is (inf|nan); the step"):
        train(train_dpo, settings, ALONE)
    assert [row["skipped_steps"] for row in metrics(tmp_path)] == list(range(1, 26))


# ---- a disk that is full


def test_a_disk_that_fills_up_stops_the_run_and_leaves_what_was_saved(flags, whole, tmp_path, monkeypatch):
    """One line with the reason; when there is room again, --resume ends in the same bits."""
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
    """A run that will not fit is refused at once and not at three in the morning."""
    free_space(monkeypatch, 100_000)
    with pytest.raises(InputError, match=r"the disk has 0 MiB for this run, which needs \d+ MiB"):
        train(train_dpo, flags(tmp_path), ALONE)


def free_space(monkeypatch, free: int) -> None:
    usage = shutil.disk_usage("/tmp")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=free))


def test_a_lora_run_needs_room_for_the_merged_model(flags, tmp_path, monkeypatch):
    """The checkpoints contain only the adapters, but the merged model is written at the end."""
    lora = {"lora_rank": 2, "keep_checkpoints": 1, "max_steps": 1}
    train(train_dpo, flags(tmp_path / "whole", **lora), ALONE)
    adapters = sum(value.nbytes for value in adapter_weights_of(tmp_path / "whole").values())
    model = sum(value.nbytes for value in weights(tmp_path / "whole").values())
    assert model > 3 * adapters, "otherwise the test cannot tell them apart"
    needed = 7 * adapters + model  # two checkpoints with two moments each, adapter.pt, and model.pt
    with monkeypatch.context() as patch:
        free_space(patch, needed - 1)
        with pytest.raises(InputError, match="the disk has 0 MiB for this run"):
            train(train_dpo, flags(tmp_path / "run", **lora), ALONE)
    free_space(monkeypatch, needed + 2 * adapters)  # The frozen model of the run holds its adapters too.
    train(train_dpo, flags(tmp_path / "run", **lora), ALONE)


def adapter_weights_of(folder) -> dict:
    return torch.load(folder / "adapter.pt", weights_only=True)


def test_resuming_needs_no_room_for_the_checkpoints_that_exist(flags, whole, tmp_path, monkeypatch):
    """A disk that had room for a run has room for its resumption: old checkpoints are replaced."""
    room = 10 * sum(value.nbytes for value in weights(whole).values())  # three checkpoints and the model
    full = flags(tmp_path, keep_checkpoints=2, save_every=1)
    with monkeypatch.context() as patch:
        free_space(patch, room)
        stopped(train_dpo, full, after=3)
    used = sum(path.stat().st_size for path in (tmp_path / "checkpoints").iterdir())
    free_space(monkeypatch, room - used)
    train(train_dpo, [*full, "--resume"], ALONE)
    assert same_model(tmp_path, whole)


def test_a_folder_that_cannot_be_written_is_refused(flags, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(InputError, match=r"file/run: cannot be read or written \(Not a directory\)"):
        train(train_dpo, flags(tmp_path / "file" / "run"), ALONE)


# ---- ranks that die


ANYWHERE = [pytest.param(*at, marks=pytest.mark.slow) for at in ((0, 0), (0, 2), (0, 5), (1, 0), (1, 5))]


@pytest.mark.parametrize("rank, step", [(1, 3), *ANYWHERE])
def test_a_killed_rank_comes_back_to_the_same_bits(rank, step, flags, whole_of_two, tmp_path):
    """kill -9 within a step; torchrun starts all ranks again, and the same command continues."""
    result = torchrun(2, "-m", *faulty("SIGKILL", rank, step), *flags(tmp_path), "--resume", restarts=1)
    assert result.returncode == 0, result.stderr
    assert step == 0 or f"continuing after step {step}" in result.stdout
    assert_same_run(tmp_path, whole_of_two)


@pytest.mark.slow
@pytest.mark.parametrize("to_all", [False, True])
def test_a_signal_to_torchrun_reaches_the_ranks(to_all, flags, tmp_path):
    """A scheduler sends SIGTERM to torchrun, which forwards it to the ranks and waits for 30 seconds.

    Slurm and systemd send it `to_all` processes, so that the ranks get it twice.
    """
    longer = {"epochs": 60, "save_every": 0, "keep_checkpoints": 2}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += ["-m", *faulty("none", 0, 0), *flags(tmp_path / "run", **longer)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    agent = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
    try:
        wait_for(lambda: len(metrics(tmp_path / "run")) > 2)
        for process in workers_of(tmp_path / "run") if to_all else [agent.pid]:
            os.kill(process, signal.SIGTERM)
        output, _ = agent.communicate(timeout=60)
    finally:
        agent.kill()
    (step,) = states(tmp_path / "run")
    assert agent.returncode != 0 and f"SIGTERM: saved after step {step}; continue with --resume" in output
    for folder, resume in (("run", ["--resume"]), ("whole", [])):
        result = forked(*faulty("none", 0, 0), *flags(tmp_path / folder, **longer), *resume, ranks=2)
        assert result.returncode == 0, result.stderr
    assert same_model(tmp_path / "run", tmp_path / "whole")
    assert timeless(metrics(tmp_path / "run")) == timeless(metrics(tmp_path / "whole"))


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_rank_ends_a_run_that_is_not_restarted(rank, flags, tmp_path):
    """The status is not 0, and the other rank notices the closed connection at once."""
    result = torchrun(2, "-m", *faulty("SIGKILL", rank, 2), *flags(tmp_path), seconds=90)
    assert result.returncode != 0
    assert max(states(tmp_path)) == 2


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["loss nan", "loss inf", "gradient"])
def test_a_number_that_is_not_finite_on_one_rank_stops_both(fault, flags, whole_of_two, tmp_path):
    """The rank with finite numbers must not step, save, or wait for the other."""
    result = forked(*faulty(fault, 1, 3), *flags(tmp_path), ranks=2)
    assert result.returncode != 0
    assert "error: step 3: " in result.stderr and "Traceback" not in result.stderr, result.stderr
    assert states(tmp_path) == {step: state for step, state in states(whole_of_two).items() if step <= 2}


@pytest.mark.slow
def test_bad_input_on_the_main_rank_ends_all(flags, tmp_path):
    """The others wait for the main rank to read the data; its error ends them and is printed once."""
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"prompt": "a", "chosen": "b"}\n')
    result = torchrun(2, "train_dpo.py", *flags(tmp_path / "run", data=bad), seconds=60)
    assert result.returncode != 0
    assert len(re.findall(r"^error: .*bad\.jsonl:1: ", result.stderr, re.M)) == 1
    assert "Gloo" not in result.stderr and "RuntimeError" not in result.stderr


@pytest.mark.slow
def test_orphans_keep_their_folder_until_they_end(flags, tmp_path):
    """If torchrun itself is killed, its workers continue; a second start in their folder is refused."""
    arguments = flags(tmp_path, epochs=400, log_every=1000, eval_every=1000, keep_checkpoints=2)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    agent = subprocess.Popen([*command, "train_dpo.py", *arguments], cwd=ROOT, env=environment)
    try:
        wait_for(lambda: len(states(tmp_path)) > 0)
        agent.kill()
        agent.wait()
        holder = owner(tmp_path)
        os.kill(holder, 0)  # It is alive.
        with pytest.raises(InputError, match=f"another run writes to this folder .process {holder}."):
            train_dpo.main([*arguments, "--resume"])
    finally:
        agent.kill()
        for worker in workers_of(tmp_path):
            os.kill(worker, signal.SIGKILL)
    wait_for(lambda: not workers_of(tmp_path))
    wait_for(lambda: take_lock(tmp_path).close() is None)  # The system releases the lock of a dead process.


def workers_of(folder) -> list[int]:
    """The processes with this folder on their command line, torchrun included."""
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
            pass  # A file was pruned while it was read.
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.slow
def test_killed_at_random_moments_again_and_again(flags, tmp_path):
    """Whenever a run is killed, at its start, in a step or a save, --resume ends in the same bits."""
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
    """The process that took the lock of this run folder last."""
    return int((folder / ".lock").read_text() or 0)
