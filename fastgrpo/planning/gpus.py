"""What plans and benches assume of GPUs and the links between them: vendors' figures, none of them measured here, and
the share of them that is reached."""

from __future__ import annotations

from dataclasses import dataclass

from fastgrpo.errors import UserError, nearest

GIB = 2**30

# The share of peak that large matrix products and attention reach together, and of a link's rate that collectives do.
COMPUTE_EFFICIENCY, LINK_EFFICIENCY = 0.45, 0.7

# Context, libraries' workspaces and communication buffers, which no tensor accounts for.
RESERVED = 2 * GIB

# Of a device's memory left free by a plan that fits.
SPARE = 0.1


@dataclass(frozen=True)
class Gpu:
    """memory: bytes. bfloat16, float32: dense FLOP/s. link: bytes/s a GPU takes from those of its node; nic: from other
    nodes, one adapter for each GPU. bandwidth: bytes/s of its memory. multiprocessors, clock: how many (compute units
    of AMD's), and their boost clock in Hz. 0: not known. source: who published them."""

    name: str
    memory: int
    bfloat16: float
    float32: float
    link: float
    nic: float = 50e9
    bandwidth: float = 0.0
    multiprocessors: int = 0
    clock: float = 0.0
    source: str = ""


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu(
            "a100-80", 80 * GIB, 312e12, 19.5e12, 300e9, 25e9, 2039e9, 108, 1.41e9,
            "NVIDIA A100 datasheet; A100 architecture whitepaper, table 4 (SMs, boost clock)",
        ),
        Gpu(
            "h100", 80 * GIB, 989e12, 67e12, 450e9, 50e9, 3350e9, 132, 1.98e9,
            "NVIDIA H100 datasheet (clock from 67 FP32 TFLOPS over 132 SMs × 256 FLOP), whitepaper (SMs)",
        ),
        Gpu("h200", 141 * 10**9, 989e12, 67e12, 450e9, 50e9, 4800e9, 132, 1.98e9, "NVIDIA H200 datasheet; H100's SMs"),
        Gpu(
            "b200", 180 * 10**9, 2250e12, 80e12, 900e9, 50e9, 8000e9, 148, 1.98e9,
            "NVIDIA HGX B200 datasheet (clock from 75 FP32 TFLOPS a GPU over 148 SMs × 256 FLOP)",
        ),
        Gpu(
            "mi300x", 192 * 10**9, 1307e12, 163e12, 448e9, 50e9, 5300e9, 304, 2.1e9,
            "AMD Instinct MI300X data sheet (compute units, peak engine clock); CDNA 3 ISA (SIMD width)",
        ),
        # Links of PCIe 4.0 and 5.0 with 16 lanes.
        Gpu(
            "rtx4090", 24 * 10**9, 165e12, 83e12, 32e9, 12.5e9, 1008e9, 128, 2.52e9,
            "NVIDIA Ada GPU architecture whitepaper",
        ),
        Gpu(
            "rtx5090", 32 * 10**9, 209e12, 105e12, 64e9, 12.5e9, 1792e9, 170, 2.407e9,
            "NVIDIA RTX Blackwell GPU architecture whitepaper",
        ),
    )
}  # fmt: skip


def gpu_named(name: str) -> Gpu:
    """Raises UserError, with the nearest match."""
    if name.lower() not in GPUS:
        raise UserError(f"--gpu: unknown GPU '{name}'; {nearest(name.lower(), GPUS)}(one of: {', '.join(GPUS)})")
    return GPUS[name.lower()]
