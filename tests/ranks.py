"""Scripts in processes of their own, alone or on several gloo ranks, without the start of an interpreter.

A process is forked before the first test, when torch is imported and no thread runs. It forks the processes
of each script, which then start at once. `torchrun` takes six seconds: it is for tests of torchrun itself.
"""

import contextlib
import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from pathlib import Path

import torch.distributed as dist

ROOT = Path(__file__).resolve().parent.parent
PIPE = None  # to the process that forks, which `start` has made


@contextlib.contextmanager
def forking() -> Iterator[None]:
    """Within, `forked` works: a process waits for scripts to fork. It ends when its pipe is closed."""
    global PIPE
    PIPE, theirs = multiprocessing.Pipe()
    child = os.fork()
    if child == 0:
        PIPE.close()
        try:
            while True:
                theirs.send(run_job(*theirs.recv()))
        finally:
            os._exit(0)
    theirs.close()
    yield
    PIPE.close()
    os.waitpid(child, 0)


def forked(
    module: str, *arguments, ranks: int = 1, seconds: int = 120, cwd=ROOT
) -> subprocess.CompletedProcess:
    """`python -m module arguments…` on this many ranks: the first exit status that is not 0, and all output.

    Five seconds after a rank has failed the others are killed.
    """
    environment = dict(os.environ)
    if ranks > 1:
        store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
        environment |= {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "localhost", "MASTER_PORT": str(store.port)}
        environment["TORCHELASTIC_USE_AGENT_STORE"] = "True"  # As under torchrun, this store is ours.
    arguments = [str(argument) for argument in arguments]
    with tempfile.TemporaryDirectory() as folder:
        PIPE.send((module, arguments, ranks, environment, folder, str(cwd), seconds))
        status = PIPE.recv()
        stdout, stderr = (
            "".join(Path(folder, f"{name}-{rank}").read_text() for rank in range(ranks))
            for name in ("stdout", "stderr")
        )
    if status is None:
        raise subprocess.TimeoutExpired([module, *arguments], seconds, stdout, stderr)
    return subprocess.CompletedProcess([module, *arguments], status, stdout, stderr)


def free_port() -> int:
    """A port of this machine that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def run_job(module, arguments, ranks, environment, folder, cwd, seconds) -> int | None:
    """Fork the ranks and wait for them: the first exit status that is not 0; None after `seconds`."""
    running = set()
    for rank in range(ranks):
        child = os.fork()
        if child == 0:
            os.chdir(cwd)
            run_rank(module, arguments, {**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)}, folder)
        running.add(child)
    deadline, found = time.monotonic() + seconds, 0
    while running:
        child, status = os.waitpid(-1, os.WNOHANG)
        if child == 0:
            time.sleep(0.005)
            if time.monotonic() > deadline:
                found, deadline = found or None, float("inf")
                for other in running:
                    os.kill(other, signal.SIGKILL)
            continue
        running.remove(child)
        if status and found == 0:
            found, deadline = os.waitstatus_to_exitcode(status), min(deadline, time.monotonic() + 5)
    return found


def run_rank(module: str, arguments: list[str], environment: dict[str, str], folder: str) -> None:
    """Run the module as `python -m` does; called after a fork, never returns."""
    status = 1
    try:
        for number, name in ((1, "stdout"), (2, "stderr")):
            os.dup2(os.open(f"{folder}/{name}-{environment['RANK']}", os.O_WRONLY | os.O_CREAT), number)
            setattr(sys, name, os.fdopen(number, "w", buffering=1, encoding="utf-8", closefd=False))
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.environ.clear()
        os.environ.update(environment)
        sys.argv = [module, *arguments]
        runpy.run_module(module, run_name="__main__", alter_sys=True)
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
