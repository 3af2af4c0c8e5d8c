"""The image processors of reward models as tensor operations, batched and on the device; and the images of prompts.

Samples are rounded to the 256 levels that an image file has, and resized with antialiasing, as PIL does; the result is
within a few levels of PIL's, and embeddings within 2e-3.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgrpo.data.images import source_pixels
from fastgrpo.data.prompts import Prompt
from fastgrpo.errors import ConfigError

OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)
OPENAI_STD = (0.26862954, 0.26130258, 0.27577711)
# PIL's numbers of its filters.
FILTERS = {2: "bilinear", 3: "bicubic"}


def resize(images: Tensor, height: int, width: int, mode: str = "bicubic") -> Tensor:
    """Images [B, 3, H, W] in [0, 1] at another size, at 256 levels before and after."""
    levels = (images.float() * 255).round()
    if images.shape[-2:] != (height, width):
        levels = F.interpolate(levels, (height, width), mode=mode, antialias=True).clamp(0, 255).round()
    return levels / 255


def normalize(images: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """(x − mean) / std per channel of [B, 3, H, W]."""
    shape = (1, -1, 1, 1)
    return (images - images.new_tensor(mean).view(shape)) / images.new_tensor(std).view(shape)


@dataclass(frozen=True)
class ImageProcessor:
    """Resizes to a square of `size` pixels and normalises.

    fit: `crop`, the shorter edge to `size` and the centre of the longer one; `pad`, the longer edge to `size` and
    black around it.
    """

    size: int
    mean: tuple[float, ...] = OPENAI_MEAN
    std: tuple[float, ...] = OPENAI_STD
    mode: str = "bicubic"
    fit: str = "crop"

    @staticmethod
    def of(config: dict[str, Any], where: str) -> ImageProcessor:
        """What a published preprocessor_config.json of a CLIP says. Raises ConfigError for what is not supported."""
        size: Any = config["size"]
        crop: Any = config.get("crop_size", size)
        edge: Any = size.get("shortest_edge", size.get("height")) if isinstance(size, dict) else size
        side: Any = crop.get("height", crop.get("shortest_edge")) if isinstance(crop, dict) else crop
        if edge != side or config["resample"] not in FILTERS:
            raise ConfigError(f"{where}: images resized to {size} and cropped to {crop} are not supported")
        return ImageProcessor(
            int(side), tuple(config["image_mean"]), tuple(config["image_std"]), FILTERS[config["resample"]]
        )

    def __call__(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] in [0, 1] -> [B, 3, size, size], float32, normalised."""
        height, width = images.shape[-2:]
        short, long = min(height, width), max(height, width)
        if self.fit == "crop":
            new = [self.size if side == short else int(self.size * side / short) for side in (height, width)]
            images = resize(images, new[0], new[1], self.mode)
            top, left = (new[0] - self.size) // 2, (new[1] - self.size) // 2
            images = images[:, :, top : top + self.size, left : left + self.size]
        else:
            new = [round(side * self.size / long) for side in (height, width)]
            images = resize(images, new[0], new[1], self.mode)
            down, right = self.size - new[0], self.size - new[1]
            images = F.pad(images, (right // 2, right - right // 2, down // 2, down - down // 2))
        return normalize(images, self.mean, self.std)


def middle_frame(samples: Tensor) -> Tensor:
    """[B, 3, H, W] of images as they are, of videos [B, 3, F, H, W] the middle frame: what an image reward judges."""
    return samples if samples.ndim == 4 else samples[:, :, samples.shape[2] // 2]


def to_pil(images: Tensor) -> list[Any]:
    """PIL images of [B, 3, H, W] in [0, 1]."""
    from PIL import Image

    pixels = (images.float().clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(picture) for picture in pixels]


def source_images(prompts: Sequence[Prompt], samples: Tensor) -> Tensor:
    """The images that the prompts name (`Prompt.image`), as large as the samples: what an edit started from.

    Returns:
        float32 [B, 3, H, W] in [0, 1], on the device of the samples [B, 3, H, W].

    Raises:
        ConfigError: For a prompt without an image.
    """
    pixels = source_pixels(prompts, *samples.shape[-2:])
    return torch.from_numpy(pixels).to(samples.device).permute(0, 3, 1, 2).float() / 255
