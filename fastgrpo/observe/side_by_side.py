"""A picture for documents: what models draw of the same prompts, each with its prompt and its marks."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from fastgrpo.observe.media import SHEET_FRAMES, enlarged, to_bytes

INK, RIGHT, WRONG, PAPER = (28, 36, 48), (31, 111, 46), (176, 42, 12), (255, 255, 255)

# Pixels: of text, between lines, between prompts, and between a prompt's pictures.
TEXT, LINE, GAP, SEAM = 13, 17, 14, 3


@dataclass(frozen=True)
class Labels:
    """Of a row of pictures: its prompt, and of each picture what is said, with whether it is right; None: neither."""

    prompt: str
    marks: Sequence[tuple[str, bool | None]]


def write_side_by_side(pictures: Mapping[str, Tensor], labels: Sequence[Labels], path: Path) -> None:
    """Writes a PNG of the same prompts drawn by several models: images beside each other, frames of videos below.

    Args:
        pictures: By name, such as before and after: images [n, 3, H, W] in [0, 1], or videos [n, 3, F, H, W], of which
            at most SHEET_FRAMES frames are shown.
        labels: Of each of the n prompts.
        path: Of the PNG.
    """
    from PIL import Image, ImageDraw

    video = next(iter(pictures.values())).ndim == 5
    strips = {name: _strips(samples) for name, samples in pictures.items()}
    height, width = next(iter(strips.values())).shape[1:3]
    count = len(strips)
    cell = width if video else count * (width + SEAM) - SEAM
    columns = min(len(labels), 2 if video else max(1, 8 // count))
    wrapped = [textwrap.wrap(label.prompt, max(8, cell // 7)) or [""] for label in labels]
    tall = count * (height + LINE + SEAM) - SEAM if video else height + LINE
    rows = range(0, len(labels), columns)
    heights = [tall + LINE * max(len(lines) for lines in wrapped[i : i + columns]) + GAP for i in rows]
    sheet = Image.new("RGB", (columns * (cell + GAP) + GAP, sum(heights) + GAP), PAPER)
    draw = ImageDraw.Draw(sheet)
    top = GAP
    for row, row_height in zip(rows, heights, strict=True):
        for place in range(row, min(row + columns, len(labels))):
            left = GAP + (place - row) * (cell + GAP)
            for i, text in enumerate(wrapped[place]):
                draw.text((left, top + i * LINE), text, INK, font=_font())
            y = top + LINE * max(len(lines) for lines in wrapped[row : row + columns])
            for (name, strip), mark in zip(strips.items(), labels[place].marks, strict=True):
                sheet.paste(Image.fromarray(strip[place]), (left, y))
                _mark(draw, (left, y + height + 1), name, mark)
                left, y = (left, y + height + LINE + SEAM) if video else (left + width + SEAM, y)
        top += row_height
    sheet.save(path, optimize=True)


def _strips(samples: Tensor) -> np.ndarray:
    """uint8 [n, H, W, 3]: images, or the frames of each video in a row."""
    if samples.ndim == 4:
        return enlarged(to_bytes(samples), 96)
    shown = np.linspace(0, samples.shape[2] - 1, min(samples.shape[2], SHEET_FRAMES)).round().astype(int)
    frames = enlarged(to_bytes(samples[:, :, shown]), 64)
    return np.concatenate(list(frames.transpose(1, 0, 2, 3, 4)), axis=2)


def _mark(draw: Any, at: tuple[int, int], name: str, mark: tuple[str, bool | None]) -> None:
    text, right = mark
    draw.text(at, f"{name} ", INK, font=_font())
    color = INK if right is None else RIGHT if right else WRONG
    draw.text((at[0] + draw.textlength(f"{name} ", font=_font()), at[1]), text, color, font=_font())


def _font() -> Any:
    """matplotlib's own, which has the marks."""
    import matplotlib
    from PIL import ImageFont

    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"), TEXT)
