"""Seconds of a phase: arithmetic on its FLOPs and on the bytes of its collectives."""

from __future__ import annotations

from collections.abc import Iterable

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


def _members(key: Collective, local: int) -> int:
    """How many ranks of a group a node of `local` holds; all where the group is within one."""
    return key.group if _within(key, local) else max(1, local // key.apart)


def _within(key: Collective, local: int) -> bool:
    return (key.group - 1) * key.apart < local


def _rate(key: Collective, gpu: Gpu, local: int) -> float:
    """Groups within a node use its links; others the adapters of their ranks of a node at once, as rings do."""
    return gpu.link if _within(key, local) else min(gpu.link, gpu.nic * _members(key, local))


def link_bytes(phases: Iterable[Phase], local: int) -> tuple[float, float]:
    """(node, network) bytes of an iteration: what a GPU receives over its node's links, an adapter from other nodes."""
    node, network = 0.0, 0.0
    for phase in phases:
        for key, size in phase.cost.bytes.items():
            wire = _wire_bytes(key, size)
            members = _members(key, local)
            node += wire if members > 1 else 0.0
            network += 0.0 if _within(key, local) else wire / members
    return node, network


def seconds_by_limit(phases: Iterable[Phase], config: Config, gpu: Gpu, local: int) -> dict[str, float]:
    """Seconds of an iteration by what each phase waits for: compute, or the links that most of its transfer takes."""
    spent = {"compute": 0.0, "node links": 0.0, "network": 0.0}
    for phase in phases:
        compute, links = seconds(phase, config, gpu, local)
        if compute >= links:
            spent["compute"] += compute
            continue
        over = {True: 0.0, False: 0.0}
        for key, size in phase.cost.bytes.items():
            over[_within(key, local)] += _wire_bytes(key, size) / _rate(key, gpu, local)
        spent["node links" if over[True] >= over[False] else "network"] += links
    return spent
