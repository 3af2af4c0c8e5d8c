"""Seconds of a phase: arithmetic on its FLOPs and on the bytes of its collectives."""

from __future__ import annotations

from fastgrpo.config import Config
from fastgrpo.planning.dry_run import Phase
from fastgrpo.planning.gpus import COMPUTE_EFFICIENCY, LINK_EFFICIENCY, Gpu
from fastgrpo.planning.meter import Collective


def seconds(phase: Phase, config: Config, gpu: Gpu, local: int) -> tuple[float, float]:
    """(compute, communication) of a phase at the stated efficiencies; they overlap, at best wholly."""
    peak = gpu.float32 if config.model.dtype == "float32" else gpu.bfloat16
    spent = sum(_wire_bytes(key, size) / _rate(key, gpu, local) for key, size in phase.cost.bytes.items())
    return phase.cost.flops / (peak * COMPUTE_EFFICIENCY), spent / LINK_EFFICIENCY


def _wire_bytes(key: Collective, size: int) -> float:
    """What a rank receives of a collective over full tensors of `size` bytes in all."""
    share = (key.group - 1) / max(key.group, 1)
    return {"all_reduce": 2 * share * size, "all_to_all": share * size}.get(key.kind, share * size)


def _rate(key: Collective, gpu: Gpu, local: int) -> float:
    """Groups within a node use its links; others every adapter of the node at once, as rings do."""
    return gpu.link if key.group <= local else min(gpu.link, gpu.nic * local)
