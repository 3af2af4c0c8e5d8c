"""Coefficients of a schedule, computed once: a training step then looks its columns up in one launch."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from .._checks import is_eager
from ..transitions import Transition

# Of a tensor of a schedule: the tensors' state when its tables were made, and the tables by settings.
_tables: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


class Step(NamedTuple):
    """A step's coefficients: floats, or rows [B].

    `less_one` is a - 1, which float32 would not keep if it were computed there. `density` is the standard deviation s
    where it is positive, else NaN: then there is no density. `extras` are what a step function needs besides.
    """

    a: float | Tensor
    b: float | Tensor
    s: float | Tensor
    less_one: float | Tensor
    density: float | Tensor
    extras: tuple[float | Tensor, ...] = ()


def tensor(coefficient: float | Tensor) -> Tensor:
    """A coefficient that is a tensor: torch.as_tensor would move it to the default device."""
    assert isinstance(coefficient, Tensor)
    return coefficient


def step_of(transition: Transition, *extras: float | Tensor) -> Step:
    """The coefficients of a transition: of floats, or of float64 tensors of one shape."""
    a, b, s = transition
    density = torch.where(s > 0.0, s, float("nan")) if isinstance(s, Tensor) else s if s > 0.0 else float("nan")
    return Step(a, b, s, a - 1.0, density, extras)


def table_of(transition: Transition, *extras: Tensor, device: torch.device) -> Tensor:
    """The coefficients of every step of a schedule, [rows, T] on `device`: float32, as kernels read them.

    On the CPU they stay float64.
    """
    step = step_of(transition, *extras)
    # By name: `torch.compile` of torch 2.8 does not trace a named tuple's slice.
    rows = (step.a, step.b, step.s, step.less_one, step.density, *step.extras)
    rows = torch.stack([tensor(row) for row in rows])
    dtype = torch.float64 if device.type == "cpu" else torch.float32
    return rows.to(device=device, dtype=dtype, non_blocking=True)


def look_up(table: Tensor, index: Tensor, batch: int) -> Step:
    """Columns of a table for B samples, in one launch; `index` has one element, or B."""
    columns = table.index_select(1, index.reshape(-1)).expand(-1, batch)
    a, b, s, less_one, density, *extras = columns.unbind(0)
    return Step(a, b, s, less_one, density, tuple(extras))


def cached(
    schedule: tuple[Tensor, ...], device: torch.device, settings: Hashable, build: Callable[[], tuple[Tensor, ...]]
) -> tuple[Tensor, ...]:
    """What `build` makes of a schedule's tensors for a device, made once for them as they are and for these settings.

    Tables are dropped with the first of the tensors, and when one of them is changed or replaced.
    """
    # Traced code and a captured graph hold the computation themselves; a tensor of the inference mode does not tell
    # whether it was changed.
    if not is_eager(*schedule) or any(tensor.is_inference() for tensor in schedule) or _is_capturing(device):
        return build()
    first, *others = schedule
    state = [(id(tensor), tensor._version) for tensor in schedule]
    kept = _tables.get(first)
    if kept is None or kept[0] != state:
        # Others are kept with their tables, so that their ids remain theirs.
        kept = _tables[first] = (state, others, {})
    tables, key = kept[2], (device, settings)
    if key not in tables:
        built = build()
        if not is_eager(*built):
            return built
        tables[key] = built
    return tables[key]


def _is_capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()
