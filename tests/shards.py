"""A program for tests/test_shard.py: training runs, one after another, and the bytes of each rank in them.

torchrun --standalone --nproc-per-node 2 -m tests.shards JOBS.json
"""

import importlib
import json
import sys
import weakref
from contextlib import ExitStack
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

import model.transformer
import training.reference
from errors import run_script
from tests.faults import train
from training.distributed import World, join, wrap


class LiveBytes(TorchDispatchMode):
    """Bytes of all live tensors that operations returned: now, and at the peak.

    A storage counts once, whatever its number of views, and with its size at the time: FSDP2 keeps buffers
    and empties them between uses. A split tensor counts with this rank's part.
    """

    def __init__(self):
        super().__init__()
        self.peak = 0
        self.alive = weakref.WeakValueDictionary()  # storages by address

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if DTensor in types:
            return NotImplemented  # It comes back with operations on its part.
        result = function(*args, **(kwargs or {}))
        for x in result if isinstance(result, (tuple, list)) else [result]:
            # The storage has the true device: DTensor computes shapes with tensors that claim "cpu".
            if isinstance(x, torch.Tensor) and (storage := x.untyped_storage()).device.type == "cpu":
                self.alive[storage._cdata] = storage
        self.peak = max(self.peak, self.now)
        return result

    @property
    def now(self) -> int:
        return sum(storage.nbytes() for storage in self.alive.values())


def bytes_here(tensors) -> int:
    """Bytes of the tensors on this rank."""
    return sum((t.to_local() if isinstance(t, DTensor) else t).nbytes for t in tensors)


def weigh(module, held: dict[str, int], live: LiveBytes, counting: ExitStack) -> None:
    """Fill `held` with the bytes of a script's rank in a step, right before it clips the gradient.

    Under "loading" stands the peak of `live` until the last model was wrapped. Counting makes each operation
    slow, so it ends at the first clipping.
    """
    clip_gradients, wrapped = module.clip_gradients, []

    def noting_wrap(model, *arguments):
        wrapped.append(wrap(model, *arguments))
        held["loading"] = live.peak
        return wrapped[-1]

    def weighing_clip(optimizer, *arguments):
        counting.close()
        weights = {"reference": [], "policy": []}
        for each in wrapped:
            own = list(each.parameters())
            weights["policy" if any(weight.requires_grad for weight in own) else "reference"] += own
        state = [value for moments in optimizer.state.values() for value in moments.values()]
        held.update({name: bytes_here(own) for name, own in weights.items()})
        held["gradients"] = bytes_here(w.grad for w in weights["policy"] if w.grad is not None)
        held["moments"] = bytes_here(value for value in state if isinstance(value, Tensor) and value.dim())
        return clip_gradients(optimizer, *arguments)

    module.wrap = training.reference.wrap = noting_wrap
    module.clip_gradients = weighing_clip


def run(job: dict, world: World) -> None:
    """Train a job: its script, its arguments, the file for the bytes it held, and its scores at a time."""
    module = importlib.reload(importlib.import_module(job["script"]))
    model.transformer.MAX_LOGITS = job.get("logits", 2**25)
    held: dict[str, int] = {}
    with ExitStack() as counting:
        weigh(module, held, counting.enter_context(LiveBytes()), counting)
        train(module, job["arguments"], world)
    Path(f"{job['held']}-{world.rank}.json").write_text(json.dumps(held))


def main() -> None:
    torch.set_num_threads(1)
    with join("cpu") as world:
        for job in json.loads(Path(sys.argv[1]).read_text()):
            run(job, world)


if __name__ == "__main__":
    run_script(main)
