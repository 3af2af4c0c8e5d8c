"""The part of a sharded tensor that this rank holds."""

from __future__ import annotations

from collections.abc import Iterable

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
