"""What the static table compiles for, and the GPU of each target whose published figures it reckons with.

`lanes` is thread instructions issued per cycle and multiprocessor: four warp schedulers of one warp instruction (32
threads) a cycle on NVIDIA; four SIMDs of 16 lanes on CDNA3. Pipes narrower than that (integer multiply, square root,
logarithm) are not modelled, so the issue time is a lower bound.
"""

from __future__ import annotations

from typing import NamedTuple

from fastgrpo.planning.gpus import GPUS, Gpu


class Device(NamedTuple):
    """A compile target and one device of it."""

    target: str
    backend: str
    arch: int | str
    warp: int
    lanes: int
    name: str
    gpu: Gpu

    @property
    def issue_rate(self) -> float:
        """Thread instructions per second."""
        return self.gpu.multiprocessors * self.gpu.clock * self.lanes


DEVICES = {
    device.target: device
    for device in (
        Device("sm_80", "cuda", 80, 32, 128, "A100 SXM 80 GB", GPUS["a100-80"]),
        Device("sm_90", "cuda", 90, 32, 128, "H100 SXM", GPUS["h100"]),
        Device("sm_100", "cuda", 100, 32, 128, "B200", GPUS["b200"]),
        Device("sm_120", "cuda", 120, 32, 128, "GeForce RTX 5090", GPUS["rtx5090"]),
        Device("gfx942", "hip", "gfx942", 64, 64, "Instinct MI300X", GPUS["mi300x"]),
    )
}

# Latents per sample, and samples: [B, C, F, H, W] and packed [B, tokens, channels].
SHAPES = {"hunyuan": (8, 16, 14, 60, 104), "flux": (12, 4096, 64)}
