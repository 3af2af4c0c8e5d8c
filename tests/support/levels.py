"""Noise levels of a flow, without a pipeline that has them."""

from collections.abc import Sequence

from fastgrpo.algorithms.schedule import NoiseLevels


def flow_levels(sigmas: Sequence[float], modules: str | Sequence[str]) -> NoiseLevels:
    """Levels of a flow through T + 1 sigmas, whose model is told σ itself. modules: one name, or one for each step."""
    steps = len(sigmas) - 1
    names = (modules,) * steps if isinstance(modules, str) else tuple(modules)
    return NoiseLevels(tuple(sigmas[:-1]), tuple(sigmas[1:]), tuple(sigmas[:-1]), names)
