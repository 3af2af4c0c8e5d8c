"""Small samples and sizes for rewards with weights."""

from __future__ import annotations

import torch

from fastgrpo.shapes.tiny_clip import TinyClipSizes

SIZES = TinyClipSizes(image_size=32, patch=8, width=32, vision_layers=2, text_layers=2, embedding=16)


def samples(height=48, width=40, count=4, seed=0):
    """Smooth random images with edges in them."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, height // 8, width // 8, generator=generator)
    return torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear").clamp(0, 1)
