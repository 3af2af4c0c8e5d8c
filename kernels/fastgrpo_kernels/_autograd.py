"""What the autograd functions share: keeping arguments of any kind, and refusing a second derivative."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def save_arguments(ctx: Any, arguments: Sequence[object]) -> None:
    """Keep tensors where autograd can see them, the rest beside them."""
    ctx.save_for_backward(*(a if isinstance(a, Tensor) else None for a in arguments))
    ctx.rest = [None if isinstance(a, Tensor) else a for a in arguments]


def saved_arguments(ctx: Any) -> list[Any]:
    """What `save_arguments` kept, in order."""
    return [other if tensor is None else tensor for tensor, other in zip(ctx.saved_tensors, ctx.rest, strict=True)]


def refuse_double_backward(operation: str) -> None:
    """Refuse a backward that is itself recorded: the second derivative does not exist."""
    if torch.is_grad_enabled():
        raise ValueError(f"{operation}: has no double backward; call backward without create_graph=True")
