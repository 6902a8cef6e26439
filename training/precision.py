"""The number format of the forward pass, and the loss scaling that fp16 needs."""

import torch
from torch import Tensor


def cpu_multiplies_bf16() -> bool:
    """Whether this CPU has instructions for it; without them bf16 is emulated and slower than float32."""
    probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")  # Not public; absent in some versions.
    return any(getattr(torch.cpu, probe, lambda: False)() for probe in probes)


class Precision:
    """What the forward pass computes in. Weights, gradients and optimizer state stay float32.

    `matmul` says how torch multiplies matrices that *are* float32, in the whole process: "highest" as they
    are; "high" may round the factors to TF32 (10 bits of mantissa, on CUDA) or split them into two bf16;
    "medium" may round them to bf16 (7 bits). Sums stay float32. What that gains and costs depends on the
    hardware, from nothing at all to the error of --precision bf16, so it is a choice and not the default.
    """

    def __init__(self, name: str, device: torch.device, matmul: str = "highest"):
        torch.set_float32_matmul_precision(matmul)
        if name == "auto":
            name = "fp32"
            if device.type == "cuda":
                name = "bf16" if torch.cuda.is_bf16_supported() else "fp16"
            elif device.type == "cpu" and cpu_multiplies_bf16():
                name = "bf16"
        self.name = name
        self.reason = name
        self.device_type = device.type
        # Only fp16 can underflow; for the others the scaler passes everything through.
        self.scaler = torch.amp.GradScaler(device.type, enabled=name == "fp16")
        self.skipped, self.skipped_in_a_row = 0, 0

    def autocast(self) -> torch.autocast:
        dtype = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[self.name]
        # Its cache would keep a copy of every weight to the end of the forward, of a split model as well, and
        # the gradients of the vocabulary's chunks would be added up in that copy's precision.
        return torch.autocast(self.device_type, dtype, enabled=dtype is not None, cache_enabled=False)

    def count_skip(self, skipped: bool) -> None:
        """Count the steps that the scaler skips because a gradient overflowed."""
        self.skipped += skipped
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if skipped else 0

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of the loss to those of the parameters; under fp16 the loss is scaled first."""
        self.scaler.scale(loss).backward()

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        """Take the optimizer step. Under fp16 a step with an overflow is skipped and lowers the scale."""
        self.scaler.step(optimizer)
        self.scaler.update()

    def metrics(self) -> dict[str, int]:
        """Under fp16 the number of steps skipped so far, for the log; else nothing."""
        return {"skipped_steps": self.skipped} if self.scaler.is_enabled() else {}

    def state_dict(self) -> dict:
        skips = {"skipped": self.skipped, "skipped_in_a_row": self.skipped_in_a_row}
        return {"scaler": self.scaler.state_dict(), **skips}

    def load_state_dict(self, saved: dict) -> None:
        self.scaler.load_state_dict(saved["scaler"])
        self.skipped, self.skipped_in_a_row = saved["skipped"], saved["skipped_in_a_row"]
