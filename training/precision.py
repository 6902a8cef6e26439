"""The number format of the forward pass, and the loss scaling of fp16."""

import torch
from torch import Tensor


def cpu_multiplies_bf16() -> bool:
    """Whether this CPU has bf16 instructions. Without them bf16 is emulated, and slower than float32."""
    probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")  # Not public; absent in some versions.
    return any(getattr(torch.cpu, probe, lambda: False)() for probe in probes)


def automatic(device: torch.device) -> tuple[str, str]:
    """The precision that ``auto`` means on this device, and the reason."""
    if device.type == "cuda":
        # Emulated bf16 (V100, T4) is slow; fp16 is fast on every GPU.
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return "bf16", "this GPU multiplies it"
        return "fp16", "this GPU does not multiply bf16"
    if device.type == "cpu":
        if cpu_multiplies_bf16():
            return "bf16", "this CPU multiplies it"
        return "fp32", "this CPU does not multiply bf16"
    return "fp32", f"the default on {device.type}"


class Precision:
    """The number format of the forward pass. Weights, gradients and optimizer state stay float32.

    `name` is fp32, bf16 or fp16, `reason` is a phrase for the log. `matmul` is how torch multiplies float32
    matrices in the whole process: "highest" in float32; "high" may round the factors to TF32 (10 bits of
    mantissa, on CUDA) or split them into two bf16; "medium" may round them to bf16 (7 bits). Sums stay
    float32. The gain depends on the hardware, from nothing to that of --precision bf16.
    """

    def __init__(self, name: str, device: torch.device, matmul: str = "highest"):
        torch.set_float32_matmul_precision(matmul)
        self.name, why = automatic(device) if name == "auto" else (name, "--precision")
        self.reason = f"{self.name} ({why})"
        self.device_type = device.type
        # Only fp16 gradients underflow. For the others the scaler changes nothing.
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.name == "fp16")
        self.skipped, self.skipped_in_a_row = 0, 0

    def autocast(self) -> torch.autocast:
        """A context in which matrices are multiplied in this precision."""
        dtype = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[self.name]
        # Autocast's cache would keep a copy of every weight until the forward ends, also of a split model.
        # And it would add up the gradients of the vocabulary's chunks in the copy's precision.
        return torch.autocast(self.device_type, dtype, enabled=dtype is not None, cache_enabled=False)

    def count_skip(self, skipped: bool) -> None:
        """Count an optimizer step, and whether the scaler skips it because a gradient overflowed."""
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
