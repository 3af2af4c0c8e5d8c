"""What the autograd functions share: keeping arguments of any kind, and refusing a second derivative."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def save_arguments(ctx: Any, arguments: Sequence[object]) -> None:
    """Keep tensors where autograd can see them, the rest beside them.

    So are tensors that a rollout made in inference mode: autograd does not see them change, and refuses to save them.
    """
    tensors = [a if isinstance(a, Tensor) and not a.is_inference() else None for a in arguments]
    ctx.save_for_backward(*tensors)
    ctx.rest = [None if tensor is argument else argument for tensor, argument in zip(tensors, arguments, strict=True)]


def saved_arguments(ctx: Any) -> list[Any]:
    """What `save_arguments` kept, in order."""
    kept = zip(ctx.saved_tensors, ctx.rest, strict=True)
    return [argument if tensor is None else tensor for tensor, argument in kept]


def refuse_double_backward(operation: str) -> None:
    """Refuse a backward that is itself recorded: the second derivative does not exist."""
    if torch.is_grad_enabled():
        raise ValueError(f"{operation}: has no double backward; call backward without create_graph=True")
