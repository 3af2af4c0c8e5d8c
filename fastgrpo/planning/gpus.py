"""What a plan assumes of GPUs and the links between them: vendors' figures, and the share of them that is reached."""

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
    nodes, one adapter for each GPU."""

    name: str
    memory: int
    bfloat16: float
    float32: float
    link: float
    nic: float = 50e9


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("a100-80", 80 * GIB, 312e12, 19.5e12, 300e9, 25e9),
        Gpu("h100", 80 * GIB, 989e12, 67e12, 450e9),
        Gpu("h200", 141 * 10**9, 989e12, 67e12, 450e9),
        Gpu("b200", 180 * 10**9, 2250e12, 80e12, 900e9),
        Gpu("mi300x", 192 * 10**9, 1307e12, 163e12, 448e9),
        Gpu("rtx4090", 24 * 10**9, 165e12, 83e12, 32e9, 12.5e9),
    )
}


def gpu_named(name: str) -> Gpu:
    """Raises UserError, with the nearest match."""
    if name.lower() not in GPUS:
        raise UserError(f"--gpu: unknown GPU '{name}'; {nearest(name.lower(), GPUS)}(one of: {', '.join(GPUS)})")
    return GPUS[name.lower()]
