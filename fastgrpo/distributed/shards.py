"""The part of a sharded tensor that this rank holds."""

from __future__ import annotations

import torch
from torch.distributed.tensor import DTensor


def local(tensor: torch.Tensor) -> torch.Tensor:
    """The shard that this rank holds, without its history."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor.detach()
