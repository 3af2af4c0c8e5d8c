"""What every family may use: classifier-free guidance, pixels of what a VAE decodes, sizes that it takes, and the
pictures of prompts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastgrpo.config import Model
from fastgrpo.data.prompts import Prompt, open_image
from fastgrpo.errors import ConfigError, nearest_sizes

if TYPE_CHECKING:
    from PIL import Image


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


def prompt_images(prompts: Sequence[Prompt], family: str) -> list[Image.Image]:
    """The RGB picture of each prompt. Raises ConfigError for a prompt without one, and for one that cannot be read."""
    for prompt in prompts:
        if prompt.image is None:
            raise ConfigError(
                f"prompts: '{prompt.text[:60]}' has no image; {family} starts from a picture: give each prompt an "
                "'image' column"
            )
    return [open_image(p.image) for p in prompts if p.image is not None]
