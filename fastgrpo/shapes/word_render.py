"""Ground truth of the world of words: signs drawn by Pillow in matplotlib's copies of DejaVu and STIX."""

import functools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from fastgrpo.shapes.word_world import FONTS, WordPrompt
from fastgrpo.shapes.world import COLORS

# Height of the capitals' font in pixels of a sign of 32, and the free pixels at both ends of a line.
SIZES = (18, 20, 22)
MARGIN = 3
_PALETTE = np.array([*COLORS.values(), (235, 235, 235)], dtype=np.float32)


@functools.cache
def font(name: str, pixels: int) -> ImageFont.FreeTypeFont:
    """One of `FONTS`."""
    import matplotlib

    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{FONTS[name]}.ttf", pixels)


@functools.lru_cache(maxsize=16384)
def glyphs(word: str, name: str, pixels: int, height: int, width: int) -> np.ndarray:
    """Coverage [H, W] in 0..255 of a word in the middle of a sign: the next smaller size where it is too wide."""
    while True:
        left, top, right, bottom = font(name, pixels).getbbox(word)
        if right - left <= width - 2 * MARGIN:
            break
        pixels -= 1
    canvas = Image.new("L", (width, height))
    at = ((width - right - left) / 2, (height - bottom - top) / 2)
    ImageDraw.Draw(canvas).text(at, word, fill=255, font=font(name, pixels))
    return np.asarray(canvas)


def grounds(count: int, rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Dark grounds [N, H, W, 1], grey levels: plain ones, and ones with slanted stripes."""
    level = rng.uniform(20, 40, size=(count, 1, 1)).astype(np.float32)
    contrast = np.where(rng.random(count) < 0.5, 0, rng.uniform(5, 14, size=count)).astype(np.float32)[:, None, None]
    period, slant = rng.uniform(5, 9, size=(2, count, 1, 1)).astype(np.float32)
    y, x = np.mgrid[:height, :width].astype(np.float32)
    stripes = np.sin(2 * np.pi * (x / period + y / slant))
    return (level + contrast * stripes)[..., None]


def render_batch(
    prompts: Sequence[WordPrompt], rng: np.random.Generator, height: int = 32, width: int = 64
) -> np.ndarray:
    """One random picture of each prompt: uint8 [N, H, W, 3]. Size, colour, place to within a pixel or two and ground
    are random."""
    n = len(prompts)
    ground = grounds(n, rng, height, width)
    color = _PALETTE[rng.integers(len(_PALETTE), size=n)][:, None, None]
    size = np.array(SIZES)[rng.integers(len(SIZES), size=n)] * height // 32
    shift = rng.integers(-1, 2, size=(n, 2))
    cover = np.stack(
        [
            np.roll(glyphs(p.word, p.font, int(s), height, width), tuple(by), axis=(0, 1))
            for p, s, by in zip(prompts, size, shift, strict=True)
        ]
    )
    share = cover[..., None].astype(np.float32) / 255
    return np.rint(np.clip(ground + share * (color - ground), 0, 255)).astype(np.uint8)
