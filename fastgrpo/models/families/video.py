"""What the video families share: sizes that a video VAE takes, tiled decoding, first frames."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastgrpo.config import Model
from fastgrpo.data.prompts import Prompt
from fastgrpo.errors import ConfigError, nearest_sizes
from fastgrpo.models.families.shared import prompt_images, uneven_sides


def check_video_size(config: Model, multiple: int, stride: int) -> None:
    """Raises ConfigError unless height and width are multiples of `multiple`, and frames are stride·k + 1."""
    problems = uneven_sides(config, multiple)
    if (config.frames - 1) % stride:
        near = nearest_sizes(config.frames, stride, 1)
        problems.append(f"model.frames: {config.frames} is not {stride}k + 1, as the VAE takes them; {near}")
    if problems:
        raise ConfigError(*problems)


def latent_frames(config: Model, stride: int) -> int:
    """Latent frames of model.frames video frames: the first one alone, then one for every `stride`."""
    return (config.frames - 1) // stride + 1


def video_tokens(config: Model, space: int, time: int, patch: Sequence[int]) -> int:
    """Tokens of a sample's video.

    space, time: the VAE's pixels and frames a latent; patch: latents a token, [t, h, w].
    """
    frames, rows, columns = latent_frames(config, time), config.height // space, config.width // space
    t, h, w = patch
    return (frames // t) * (rows // h) * (columns // w)


def set_tiling(vae: Any, config: Model) -> None:
    """Decoding in overlapping tiles, blended where they overlap, where model.vae_tiling asks for it."""
    if config.vae_tiling:
        vae.enable_tiling()


def first_frames(pipeline: Any, prompts: Sequence[Prompt], config: Model, device: torch.device) -> Tensor:
    """The prompts' images as the pipeline prepares them: float32 [B, 3, H, W] in −1..1.

    Raises ConfigError for a prompt without one.
    """
    pictures = prompt_images(prompts, config.family)
    processed = [pipeline.video_processor.preprocess(p, height=config.height, width=config.width) for p in pictures]
    return torch.cat(processed).to(device, torch.float32)
