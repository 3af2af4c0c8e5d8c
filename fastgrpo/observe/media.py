"""Samples as files: contact sheets (PNG), animations (WebP), and films (MP4, by PyAV)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastgrpo.data.images import source_pixels
from fastgrpo.data.prompts import Prompt
from fastgrpo.errors import require

# Of every sheet: pictures in a row, and white pixels between them.
COLUMNS, MARGIN = 8, 4

# Frames of a video in a contact sheet.
SHEET_FRAMES = 9


def to_bytes(samples: Tensor) -> np.ndarray:
    """uint8 [n, H, W, 3] of images [n, 3, H, W] in [0, 1], or [n, F, H, W, 3] of videos [n, 3, F, H, W]."""
    channels_last = samples.movedim(1, -1).clamp(0, 1)
    return (channels_last.cpu().numpy() * 255).round().astype(np.uint8)


def enlarged(pixels: np.ndarray, smallest: int) -> np.ndarray:
    """Pictures [..., H, W, 3] at least `smallest` wide, enlarged without smoothing."""
    scale = max(1, smallest // pixels.shape[-2])
    return pixels.repeat(scale, axis=-3).repeat(scale, axis=-2)


def arrange(pictures: np.ndarray, columns: int, margin: int) -> np.ndarray:
    """Pictures [n, ..., H, W, 3] on one white sheet [..., rows · H, columns · W, 3]."""
    count, (height, width) = len(pictures), pictures.shape[-3:-1]
    columns = min(columns, count)
    rows = -(-count // columns)
    size = (rows * (height + margin) + margin, columns * (width + margin) + margin)
    sheet = np.full((*pictures.shape[1:-3], *size, 3), 255, np.uint8)
    for place, picture in enumerate(pictures):
        top, left = margin + place // columns * (height + margin), margin + place % columns * (width + margin)
        sheet[..., top : top + height, left : left + width, :] = picture
    return sheet


def write_grid(images: Tensor, path: Path, columns: int = COLUMNS, margin: int = MARGIN, smallest: int = 96) -> None:
    """A PNG contact sheet of images [n, 3, H, W] in [0, 1]; small ones are enlarged."""
    from PIL import Image

    Image.fromarray(arrange(enlarged(to_bytes(images), smallest), columns, margin)).save(path)


def beside_sources(prompts: Sequence[Prompt], *images: Tensor) -> Tensor:
    """Pictures [n, 3, H, k · W], from left to right: the image that each prompt names, if all do, then `images`.

    images: each [n, 3, H, W] in [0, 1]. Videos [n, 3, F, H, W] show their first frame themselves: nothing is added.
    """
    parts = list(images)
    if images[0].ndim == 4 and len(images[0]) and all(p.image is not None for p in prompts):
        pixels = source_pixels(prompts, *images[0].shape[-2:])
        parts.insert(0, torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255)
    return torch.cat([part.cpu() for part in parts], dim=-1)


def write_frames(videos: Tensor, path: Path, smallest: int = 64) -> None:
    """A PNG contact sheet of videos [n, 3, F, H, W] in [0, 1]: one a row, at most SHEET_FRAMES of its frames."""
    shown = np.linspace(0, videos.shape[2] - 1, min(videos.shape[2], SHEET_FRAMES)).round().astype(int)
    rows = videos[:, :, shown].transpose(1, 2).flatten(0, 1)
    write_grid(rows, path, columns=len(shown), smallest=smallest)


def animate(videos: Tensor, columns: int = COLUMNS, margin: int = MARGIN, smallest: int = 96) -> np.ndarray:
    """Frames [F, H, W, 3] of a sheet of videos [n, 3, F, h, w]."""
    return arrange(enlarged(to_bytes(videos), smallest), columns, margin)


def write_webp(frames: np.ndarray, path: Path, fps: float) -> None:
    """An animated WebP, without loss, that repeats for ever. frames: uint8 [F, H, W, 3]."""
    from PIL import Image

    first, *rest = (Image.fromarray(frame) for frame in frames)
    first.save(path, save_all=True, append_images=rest, duration=round(1000 / fps), loop=0, lossless=True, method=2)


def write_mp4(frames: np.ndarray, path: Path, fps: float) -> None:
    """An MP4 (H.264). frames: uint8 [F, H, W, 3]. Raises UserError where PyAV is not installed."""
    require("av", "an MP4 file")
    import av

    # Its chroma is halved: a side must be even.
    height, width = (side + side % 2 for side in frames.shape[1:3])
    padded = np.pad(frames, ((0, 0), (0, height - frames.shape[1]), (0, width - frames.shape[2]), (0, 0)), mode="edge")
    with av.open(path, "w") as container:
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1000), options={"crf": "16"})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for frame in padded:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def write_samples(samples: Tensor, out_dir: Path, names: Sequence[str], fps: float, mp4: bool = False) -> list[Path]:
    """One file a sample: PNG of an image; of a video an animated WebP, or with `mp4` an MP4. Gives their paths."""
    from PIL import Image

    out_dir.mkdir(parents=True, exist_ok=True)
    video = samples.ndim == 5
    paths = [out_dir / f"{name}{('.mp4' if mp4 else '.webp') if video else '.png'}" for name in names]
    for path, pixels in zip(paths, to_bytes(samples), strict=True):
        if video:
            (write_mp4 if mp4 else write_webp)(pixels, path, fps)
        else:
            Image.fromarray(pixels).save(path)
    return paths


def read_tiles(path: Path, count: int, largest: int, quality: int | None = None) -> list[tuple[str, bytes]]:
    """The `count` pictures of a sheet, shrunk to `largest` pixels, each with its kind.

    Args:
        path: A sheet that `write_grid` or `write_webp` wrote.
        count: How many pictures it holds.
        largest: Of a picture, the longer side in pixels at most.
        quality: 0 to 100, of a lossy WebP; None: without loss.

    Returns:
        Of each picture `png` or `webp`, and its bytes: WebP where the sheet is animated or a quality is given.
    """
    import io

    from PIL import Image, ImageSequence

    with Image.open(path) as file:
        duration = file.info.get("duration", 0)
        sheets = [frame.convert("RGB") for frame in ImageSequence.Iterator(file)]
    columns = min(COLUMNS, count)
    width = (sheets[0].width - MARGIN) // columns
    height = (sheets[0].height - MARGIN) // math.ceil(count / columns)
    lossy = {"lossless": True} if quality is None else {"quality": quality}
    tiles = []
    for place in range(count):
        left, top = MARGIN + place % columns * width, MARGIN + place // columns * height
        box = (left, top, left + width - MARGIN, top + height - MARGIN)
        first, *rest = (sheet.crop(box) for sheet in sheets)
        for picture in (first, *rest):
            picture.thumbnail((largest, largest))
        buffer = io.BytesIO()
        if rest:
            first.save(buffer, "WEBP", save_all=True, append_images=rest, duration=duration, loop=0, **lossy)
        elif quality is None:
            first.save(buffer, "PNG", optimize=True)
        else:
            first.save(buffer, "WEBP", quality=quality)
        tiles.append(("webp" if rest or quality is not None else "png", buffer.getvalue()))
    return tiles
