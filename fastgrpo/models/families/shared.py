"""What every family may use: classifier-free guidance, pixels of what a VAE decodes, sizes that it takes."""

from __future__ import annotations

import torch
from torch import Tensor

from fastgrpo.config import Model
from fastgrpo.errors import nearest_sizes


def guide(branches: Tensor, scale: float, rescale_norm: bool = False) -> Tensor:
    """Classifier-free guidance (arXiv 2207.12598) of a model output [2B, …], negative rows first: [B, …].

    negative + scale·(positive − negative), in float32 at least, rounded to the output's dtype (the gradient passes
    straight through to both branches); with `rescale_norm`, scaled along the last dimension to the norm of the positive
    branch, as Qwen-Image's pipeline does.
    """
    negative, positive = branches.to(torch.promote_types(branches.dtype, torch.float32)).chunk(2)
    guided = negative + scale * (positive - negative)
    if rescale_norm:
        guided = guided * (positive.norm(dim=-1, keepdim=True) / guided.norm(dim=-1, keepdim=True))
    return guided.to(branches.dtype)


def to_pixels(decoded: Tensor) -> Tensor:
    """A VAE's output in −1..1 as float32 pixels in 0..1."""
    return (decoded.float() / 2 + 0.5).clamp(0, 1)


def uneven_sides(config: Model, multiple: int) -> list[str]:
    """What is wrong unless model.height and model.width are multiples of `multiple`."""
    sizes = {"height": config.height, "width": config.width}
    return [
        f"model.{key}: {size} is not a multiple of {multiple}; {nearest_sizes(size, multiple)}"
        for key, size in sizes.items()
        if size % multiple
    ]
