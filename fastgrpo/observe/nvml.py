"""Energy, clock and throttling of a GPU by NVML (nvidia-ml-py, in fastgrpo[gpu]): the driver is asked, no stream."""

from __future__ import annotations

import importlib.util
import math
from dataclasses import dataclass
from typing import Any

import torch

# Bits of NVML's mask of reasons for a lower clock that tell of a limit reached: power, heat, and the board's brakes.
# The others (idle, clocks that someone set, boost in step with other boards) are wishes.
LIMITS = {
    0x04: "power cap",
    0x08: "hardware slowdown",
    0x20: "heat (software)",
    0x40: "heat (hardware)",
    0x80: "power brake",
}


@dataclass(frozen=True)
class Reading:
    """A GPU now. joules: since its driver was loaded, NaN where the board does not count them; clock: of its SMs."""

    joules: float
    watts: float
    clock_mhz: float
    reasons: int

    @property
    def limits(self) -> list[str]:
        """Why it runs slower than it could."""
        return [name for bit, name in LIMITS.items() if self.reasons & bit]


class Board:
    """The GPU of a torch device. Raises ModuleNotFoundError without nvidia-ml-py, pynvml.NVMLError where the driver
    does not know it."""

    def __init__(self, device: torch.device) -> None:
        import pynvml  # pyright: ignore[reportMissingImports]

        self._nvml: Any = pynvml
        pynvml.nvmlInit()
        uuid = torch.cuda.get_device_properties(device).uuid
        self._handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")

    def read(self) -> Reading:
        nvml, handle = self._nvml, self._handle
        try:
            joules = nvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1e3
        except nvml.NVMLError:
            joules = math.nan
        return Reading(
            joules,
            nvml.nvmlDeviceGetPowerUsage(handle) / 1e3,
            float(nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM)),
            int(nvml.nvmlDeviceGetCurrentClocksThrottleReasons(handle)),
        )


def board_of(device: torch.device) -> Board | None:
    """The board of a GPU; None on a CPU, without nvidia-ml-py, and where NVML does not know the device (a slice of a
    GPU, another vendor's)."""
    if device.type != "cuda" or importlib.util.find_spec("pynvml") is None:
        return None
    import pynvml  # pyright: ignore[reportMissingImports]

    try:
        return Board(device)
    except pynvml.NVMLError:
        return None
