"""The pictures that prompts name, as arrays: what rewards compare an edit with, and sheets show beside it."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np

from fastgrpo.data.prompts import Prompt, open_image
from fastgrpo.errors import ConfigError


def source_pixels(prompts: Sequence[Prompt], height: int, width: int) -> np.ndarray:
    """The image of each prompt (`Prompt.image`): uint8 [B, height, width, 3].

    One of another size is resized as diffusers' image processors do (Lanczos).

    Raises:
        ConfigError: For a prompt without an image, or one that cannot be read.
    """
    for prompt in prompts:
        if prompt.image is None:
            raise ConfigError(f"'{prompt.text[:60]}' has no image: an edit is judged beside what it started from")
    return np.stack([_pixels(p.image, height, width) for p in prompts if p.image is not None])


# The samples of a group share their source.
@functools.lru_cache(maxsize=64)
def _pixels(image: str, height: int, width: int) -> np.ndarray:
    from PIL import Image

    picture = open_image(image)
    if picture.size != (width, height):
        picture = picture.resize((width, height), Image.Resampling.LANCZOS)
    return np.asarray(picture)
