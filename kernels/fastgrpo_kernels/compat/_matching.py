"""What the policy losses of forward-process objectives share: their target, and errors by the caller's names."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from .._checks import check_number
from .._noise_args import MatchingTarget
from ..noise import NoiseKey
from .loss import renamed


def times(t: float | Tensor, like: Tensor) -> float | Tensor:
    """Times of B samples as float32 rows: those projects have them as [B] or [B, 1, …], in any dtype."""
    if not isinstance(t, Tensor):
        return check_number("t", t)
    if t.numel() not in (1, like.shape[0]):
        raise ValueError(f"t: expected [{like.shape[0]}], one a sample, got shape {list(t.shape)}")
    rows = t.reshape(-1).to(torch.float32)
    return rows if rows.numel() == like.shape[0] else rows.expand(like.shape[0])


def target_of(x0: Tensor, noise: Tensor | NoiseKey) -> MatchingTarget:
    """The velocity ε - x̂0 of a rectified flow."""
    return MatchingTarget(detached(x0), noise)


def detached(value: Tensor) -> Tensor:
    """A tensor without its graph; what is none is left for the kernels to refuse."""
    return value.detach() if isinstance(value, Tensor) else value


@contextmanager
def names(**of_kernels: str) -> Iterator[None]:
    """Errors of the kernels have the names that their arguments have here."""
    try:
        yield
    except (TypeError, ValueError) as error:
        raise renamed(error, {"noise.x0": "x0", "b": "t", "s": "t", **of_kernels}) from None
