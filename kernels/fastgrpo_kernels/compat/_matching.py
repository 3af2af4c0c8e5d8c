"""What the policy losses of forward-process objectives share: their target, and errors by the caller's names."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from .._noise_args import MatchingTarget
from ..noise import NoiseKey
from .loss import renamed


def times(t: float | Tensor, like: Tensor) -> float | Tensor:
    """Times of B samples as float32 rows: those projects have them as [B] or [B, 1, …], in any dtype."""
    if not isinstance(t, Tensor):
        return t
    if t.numel() not in (1, like.shape[0]):
        raise ValueError(f"t: expected [{like.shape[0]}], one a sample, got shape {list(t.shape)}")
    rows = t.reshape(-1).to(torch.float32)
    return rows if rows.numel() == like.shape[0] else rows.expand(like.shape[0])


def target_of(x0: Tensor, noise: Tensor | NoiseKey) -> MatchingTarget:
    """The velocity ε - x̂0 of a rectified flow."""
    return MatchingTarget(x0.detach() if isinstance(x0, Tensor) else x0, noise)


@contextmanager
def names(**of_kernels: str) -> Iterator[None]:
    """Errors of the kernels have the names that their arguments have here."""
    try:
        yield
    except (TypeError, ValueError) as error:
        raise renamed(error, {"noise.x0": "x0", "b": "t", "s": "t", **of_kernels}) from None
