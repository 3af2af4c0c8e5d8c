"""The part of a sharded tensor that this rank holds; and weights that take one another's place."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch.distributed.tensor import DTensor


def local(tensor: torch.Tensor) -> torch.Tensor:
    """Returns the shard that this rank holds, without its history; all of a tensor that is not sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor.detach()


def locals_of(tensors: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    """Returns the shard of each tensor."""
    return [local(tensor) for tensor in tensors]


def local_bytes(tensor: torch.Tensor) -> int:
    """Returns the bytes of this rank's shard."""
    shard = local(tensor)
    return shard.numel() * shard.element_size()


def place(tensor: torch.Tensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Returns the shape of the shard that this rank holds, and where it begins in the whole tensor."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    if not isinstance(tensor, DTensor):
        return tuple(tensor.shape), (0,) * tensor.ndim
    shape, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return tuple(shape), tuple(offset)


def first_replica(tensor: DTensor) -> bool:
    """Returns whether no rank before this one holds the same shard."""
    coordinate = tensor.device_mesh.get_coordinate()
    assert coordinate is not None
    return not any(
        here for here, placement in zip(coordinate, tensor.placements, strict=True) if placement.is_replicate()
    )


@contextmanager
def exchanged(weights: Sequence[torch.Tensor], averages: Sequence[torch.Tensor]) -> Iterator[None]:
    """Within it weights and averages have each other's values."""
    _exchange(weights, averages)
    try:
        yield
    finally:
        _exchange(weights, averages)


@torch.no_grad()
def _exchange(weights: Sequence[torch.Tensor], averages: Sequence[torch.Tensor]) -> None:
    for weight, average in zip(weights, averages, strict=True):
        kept = weight.clone()
        weight.copy_(average)
        average.copy_(kept)
