"""Published figures of the devices the static table is for. Nothing here was measured.

`lanes` is thread instructions issued per cycle and SM: four warp schedulers of one warp instruction (32 threads) a
cycle on NVIDIA; four SIMDs of 16 lanes on CDNA3. Pipes narrower than that (integer multiply, square root, logarithm)
are not modelled, so the issue time is a lower bound.
"""

from __future__ import annotations

from typing import NamedTuple


class Device(NamedTuple):
    """A compile target and one device of it: bandwidth in bytes/s, boost clock in Hz."""

    target: str
    backend: str
    arch: int | str
    warp: int
    name: str
    bandwidth: float
    multiprocessors: int
    clock: float
    lanes: int
    source: str

    @property
    def issue_rate(self) -> float:
        """Thread instructions per second."""
        return self.multiprocessors * self.clock * self.lanes


DEVICES = {
    device.target: device
    for device in (
        Device(
            "sm_80", "cuda", 80, 32, "A100 SXM 80 GB", 2039e9, 108, 1.41e9, 128,
            "NVIDIA A100 datasheet (bandwidth); A100 architecture whitepaper, table 4 (SMs, boost clock)",
        ),
        Device(
            "sm_90", "cuda", 90, 32, "H100 SXM", 3350e9, 132, 1.98e9, 128,
            "NVIDIA H100 datasheet (bandwidth; clock from 67 FP32 TFLOPS over 132 SMs × 256 FLOP), whitepaper (SMs)",
        ),
        Device(
            "sm_100", "cuda", 100, 32, "B200", 8000e9, 148, 1.98e9, 128,
            "NVIDIA HGX B200 datasheet (bandwidth; clock from 75 FP32 TFLOPS a GPU over 148 SMs × 256 FLOP)",
        ),
        Device(
            "sm_120", "cuda", 120, 32, "GeForce RTX 5090", 1792e9, 170, 2.407e9, 128,
            "NVIDIA RTX Blackwell GPU architecture whitepaper (bandwidth, SMs, boost clock)",
        ),
        Device(
            "gfx942", "hip", "gfx942", 64, "Instinct MI300X", 5300e9, 304, 2.1e9, 64,
            "AMD Instinct MI300X data sheet (bandwidth, compute units, peak engine clock); CDNA 3 ISA (SIMD width)",
        ),
    )
}  # fmt: skip

# Latents per sample, and samples: [B, C, F, H, W] and packed [B, tokens, channels].
SHAPES = {"hunyuan": (8, 16, 14, 60, 104), "flux": (12, 4096, 64)}
