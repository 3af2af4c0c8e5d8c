"""What the autograd functions share: keeping arguments of any kind, and refusing a second derivative."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def save_arguments(ctx: Any, arguments: Sequence[object]) -> None:
    """Keep tensors where autograd can see them, the rest beside them."""
    tensors = [i for i, argument in enumerate(arguments) if isinstance(argument, Tensor)]
    ctx.save_for_backward(*(arguments[i] for i in tensors))  # pyright: ignore[reportArgumentType]
    ctx.rest = tensors, [None if isinstance(argument, Tensor) else argument for argument in arguments]


def saved_arguments(ctx: Any) -> list[Any]:
    """What `save_arguments` kept, in order."""
    tensors, rest = ctx.rest
    arguments = list(rest)
    for index, tensor in zip(tensors, ctx.saved_tensors, strict=True):
        arguments[index] = tensor
    return arguments


def refuse_double_backward(operation: str) -> None:
    """Refuse a backward that is itself recorded: the second derivative does not exist."""
    if torch.is_grad_enabled():
        raise ValueError(f"{operation}: has no double backward; call backward without create_graph=True")
