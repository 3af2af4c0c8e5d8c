"""What the image families share: what their autoencoder and text take, how a flow's scheduler shifts by size, and the
source images of an edit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fastgrpo.config import Model
from fastgrpo.data.prompts import Prompt
from fastgrpo.errors import ConfigError
from fastgrpo.models.families.shared import prompt_images, to_pixels, uneven_sides

# Text tokens of a CLIP, whatever it is given.
CLIP_TOKENS = 77


def vae_factor(config: Mapping[str, Any]) -> int:
    """Pixels a latent of an AutoencoderKL, along a side."""
    return 2 ** (len(config["block_out_channels"]) - 1)


def decode_latents(vae: Any, latents: Tensor, dtype: torch.dtype) -> Tensor:
    """Pixels in 0..1 of the latents [B, C, h, w] that a pipeline has of an AutoencoderKL."""
    drawn = latents / vae.config.scaling_factor + (vae.config.shift_factor or 0.0)
    return to_pixels(vae.decode(drawn.to(dtype), return_dict=False)[0])


def scaled_latents(vae: Any, drawn: Tensor) -> Tensor:
    """An AutoencoderKL's own latents as its pipeline has them: `decode_latents`' first step undone."""
    return (drawn - (vae.config.shift_factor or 0.0)) * vae.config.scaling_factor


def encode_pixels(vae: Any, images: Tensor, dtype: torch.dtype, generator: torch.Generator | None) -> Tensor:
    """The latents, float32, that a pipeline has of images in 0..1: `decode_latents` undone."""
    return scaled_latents(vae, vae.encode((images * 2 - 1).to(dtype)).latent_dist.sample(generator).float())


def check_image_size(config: Model, multiple: int, family: str) -> None:
    """Raises ConfigError unless model.height and width are multiples of `multiple` and model.frames is 1."""
    problems = uneven_sides(config, multiple)
    if config.frames != 1:
        problems.append(f"model.frames: {config.frames}, but {family} makes images; set it to 1")
    if problems:
        raise ConfigError(*problems)


def check_text_length(config: Model, longest: int, family: str) -> None:
    """Raises ConfigError for more text tokens than a family's pipeline takes."""
    if config.max_sequence_length > longest:
        raise ConfigError(
            f"model.max_sequence_length: {config.max_sequence_length}, but the pipeline of {family} takes at most "
            f"{longest} text tokens"
        )


def dynamic_mu(config: Any, tokens: int) -> float:
    """μ of a scheduler that shifts by resolution: linear in the number of image tokens, as the pipelines have it."""
    base, largest = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
    shortest, longest = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    slope = (largest - base) / (longest - shortest)
    return base + slope * (tokens - shortest)


def source_images(processor: Any, prompts: Sequence[Prompt], config: Model, device: torch.device) -> Tensor:
    """The prompts' images at model.height × width, as a pipeline's image processor makes them.

    Returns:
        float32 [B, 3, H, W] in −1..1.

    Raises:
        ConfigError: For a prompt without an image.
    """
    resized = [processor.resize(p, config.height, config.width) for p in prompt_images(prompts, config.family)]
    return processor.preprocess(resized, config.height, config.width).to(device, torch.float32)
