"""What the tests of the training loops share; also a program that torchrun can start on several ranks.

torchrun --standalone --nproc-per-node 2 -m tests.loops train_dpo GRADIENTS.pt --model DIR --data FILE …
"""

import importlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent


def record_gradients(module, run) -> list[list[torch.Tensor]]:
    """Call `run()` and return the gradients that the module's loop clipped, one list a step."""
    steps = []
    original = module.clip_gradients

    def spy(optimizer, *arguments):
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        steps.append([p.grad.clone() for p in parameters])
        return original(optimizer, *arguments)

    module.clip_gradients = spy
    try:
        run()
    finally:
        module.clip_gradients = original
    return steps


def torchrun(
    ranks: int, *command: str, seconds: int = 120, restarts: int = 0
) -> subprocess.CompletedProcess:
    """Start a command on several gloo ranks, in a process group of its own that is always cleaned up."""
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc-per-node={ranks}",
        f"--max-restarts={restarts}",
        *command,
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip
    try:
        stdout, stderr = process.communicate(timeout=seconds)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    return subprocess.CompletedProcess(command, process.returncode, stdout, stderr)


def metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(folder / "model.pt", weights_only=True)


if __name__ == "__main__":
    script, target, *arguments = sys.argv[1:]
    module = importlib.import_module(script)
    torch.set_num_threads(1)
    gradients = record_gradients(module, lambda: module.main(arguments))
    if os.environ.get("RANK", "0") == "0":
        torch.save(gradients, target)
