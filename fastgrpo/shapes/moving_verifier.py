"""The moving world's judge: which objects a video shows in every frame, how they move, and how clean its frames are.

Each frame is read as the still world's verifier reads an image; an object's motion is the straight line that fits
its centres best.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from fastgrpo.shapes.moving_world import MAX_MOVERS, SPEEDS, MovingPrompt, MovingSlots, slots
from fastgrpo.shapes.verifier import Components, Matches, Reading, match_objects, read, segment
from fastgrpo.shapes.world import MAX_OBJECTS, SHAPES, Slots

# Lengths are in pixels of a 32-pixel frame, ways from the first frame to the last.
# An object of this credit is there, and its centre counts for its motion.
_PRESENT = 0.5
# Share of the frames in which each object must be there, exactly and alone, for the strict test.
_FRAMES = 0.85
# A way this long is motion, one this short is standing; between slow and fast.
_MOVES, _STANDS, _PACE = 3.5, 1.8, 9.0
# Root mean square distance of the centres from uniform motion, and the way across, that the strict test forgives.
_ROUGHNESS, _ACROSS = 0.9, 2.0
# An outline holds in every frame by the overlap with its own shape, of each of SHAPES, the coverage of its interior and
# the largest area over the smallest. Rendered and decoded ground truth stays within.
_OUTLINE = np.array([{"circle": 0.9, "square": 0.86, "triangle": 0.87, "cross": 0.81}[name] for name in SHAPES])
_FILL, _GROWTH = 0.75, 1.15
# Below these, and above this growth, an outline earns nothing.
_NO_OUTLINE, _NO_FILL, _MOST_GROWTH = 0.6, 0.4, 1.6
_CHUNK = 64


@dataclass(frozen=True)
class VideoResult:
    """The verdict on B videos; every score is float64 in [0, 1], NaN where the video holds a NaN."""

    score: np.ndarray  # [B]: half partial credit (objects and motion, equally), half strict
    strict: np.ndarray  # [B] bool: the video shows what the prompt says, from the first frame to the last
    objects: np.ndarray  # [B]: shape, colour and number of objects, over the frames
    motion: np.ndarray  # [B]: direction, speed and smoothness of every object asked for, where it is there
    aesthetics: np.ndarray  # [B]: clean shapes of pure colours in stable frames, whatever the prompt
    shape: np.ndarray  # [B]: corners and fill of every object asked for, frame by frame, and a constant size
    way: np.ndarray  # [B, MAX_MOVERS, 2]: (x, y) from the first frame to the last; 0 where no motion could be read


def verify(videos: np.ndarray | torch.Tensor, prompts: Sequence[MovingPrompt], outlines: bool = False) -> VideoResult:
    """Grades `videos` [B, 3, F, S, S], F > 2, values in [0, 1] (others are clipped), against one prompt each.

    outlines: `strict` asks that no outline ever loses its shape, fill or size too, and in `score` the credit of objects
    is multiplied by `shape`.
    Raises ValueError on another layout or number.
    """
    if isinstance(videos, torch.Tensor):
        videos = videos.detach().to("cpu", torch.float32).numpy()
    if videos.ndim != 5 or videos.shape[1] != 3 or videos.shape[3] != videos.shape[4] or videos.shape[2] < 3:
        raise ValueError(f"videos: expected [B, 3, F, S, S] with F > 2, got {list(videos.shape)}")
    if len(videos) != len(prompts) or not len(videos):
        raise ValueError(f"prompts: expected one a video ({len(videos)}), got {len(prompts)}")
    chunks = [slice(i, i + _CHUNK) for i in range(0, len(videos), _CHUNK)]
    parts = [_verify_chunk(videos[c].astype(np.float32), slots(prompts[c]), outlines) for c in chunks]
    return VideoResult(*(np.concatenate(column) for column in zip(*parts, strict=True)))


def _verify_chunk(videos: np.ndarray, wanted: MovingSlots, outlines: bool) -> tuple[np.ndarray, ...]:
    count, _, frames, size, _ = videos.shape
    unit = size / 32
    finite = ~np.isnan(videos.sum((1, 2, 3, 4)))
    videos = np.where(finite[:, None, None, None, None], videos, 0).clip(0, 1)
    components = segment(np.ascontiguousarray(videos.transpose(0, 2, 1, 3, 4)).reshape(-1, 3, size, size), unit)
    seen = read(components, unit)
    matches = match_objects(seen, components, _still(wanted, frames), unit)

    used = wanted.shape >= 0
    expected = used.sum(1)
    credit, match, center = (
        a.reshape(count, frames, MAX_MOVERS, *a.shape[2:])
        for a in (matches.credit[:, :MAX_MOVERS], matches.match[:, :MAX_MOVERS], _centers(seen, matches) / unit)
    )
    number, clutter = (a.reshape(count, frames) for a in (matches.number, matches.clutter))
    objects = (credit.sum(2) / np.maximum(expected[:, None], number + clutter)).mean(1)
    exact = (match | ~used[:, None]).all(2) & (number == expected[:, None]) & (clutter < 1)

    way, roughness, there = _motion(center, credit)
    quality, right = _grade_motion(way, roughness, wanted)
    motion = (quality * there * used).sum(1) / expected
    strict = (exact.mean(1) >= _FRAMES) & (right | ~used).all(1) & finite
    shape, firm = _outlines(seen, matches, wanted, credit)
    aesthetics = _aesthetics(seen, components, number, clutter)
    strict = strict & firm if outlines else strict
    score = 0.25 * (objects * shape if outlines else objects) + 0.25 * motion + 0.5 * strict
    known = [np.where(finite, a, np.nan) for a in (score, objects, motion, aesthetics, shape)]
    return known[0], strict, *known[1:], way


def _still(wanted: MovingSlots, frames: int) -> Slots:
    """What every frame must show, as the still verifier takes it."""
    spare = ((0, 0), (0, MAX_OBJECTS - MAX_MOVERS))
    shape, color = (
        np.repeat(np.pad(a, spare, constant_values=-1), frames, axis=0) for a in (wanted.shape, wanted.color)
    )
    return Slots(shape, color, np.zeros((len(shape), 2)))


def _centers(seen: Reading, matches: Matches) -> np.ndarray:
    return seen.center[np.arange(len(seen.center))[:, None], matches.chosen[:, :MAX_MOVERS]]


def _motion(center: np.ndarray, credit: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(way [B, slot, 2], roughness [B, slot], share of frames in which it is there [B, slot]) of every object.

    center: [B, frames, slot, 2]; credit: [B, frames, slot]. The line is fitted to the frames in which the object is
    there; where those are fewer than half, way and roughness are 0.
    """
    weight = (credit >= _PRESENT).astype(np.float64)
    there = weight.mean(1)
    weight = weight * (there >= 0.5)[:, None]
    total = np.maximum(weight.sum(1), 1.0)[..., None]
    time = np.linspace(0, 1, center.shape[1])[None, :, None, None]
    mean_time = (weight[..., None] * time).sum(1) / total
    mean = (weight[..., None] * center).sum(1) / total
    late, off = time - mean_time[:, None], center - mean[:, None]
    spread = np.maximum((weight[..., None] * late**2).sum(1), 1e-9)
    way = (weight[..., None] * late * off).sum(1) / spread
    residual = ((off - late * way[:, None]) ** 2).sum(-1)
    return way, np.sqrt((weight * residual).sum(1) / total[..., 0]), there


def _grade_motion(way: np.ndarray, roughness: np.ndarray, wanted: MovingSlots) -> tuple[np.ndarray, np.ndarray]:
    """(credit in [0, 1], passes the strict test), each [B, slot]."""
    moves = wanted.direction.any(-1)
    along = (way * wanted.direction).sum(-1)
    across = np.linalg.norm(way - along[..., None] * wanted.direction, axis=-1)
    faster = along - _PACE
    pace = np.where(wanted.speed == SPEEDS.index("fast"), faster, -faster)
    any_pace = wanted.speed < 0

    smooth = (1 - (roughness - 0.3) / 1.5).clip(0, 1)
    moving = (along / 5).clip(0, 1) * np.where(any_pace, 1, (0.5 + pace / 4).clip(0, 1))
    credit = np.where(moves, moving, 1) * (1 - (across - 0.5) / 4).clip(0, 1) * smooth
    right = np.where(moves, (along >= _MOVES) & (any_pace | (pace > 0)) & (across <= _ACROSS), across <= _STANDS)
    return credit, right & (roughness <= _ROUGHNESS)


def _outlines(
    seen: Reading, matches: Matches, wanted: MovingSlots, credit: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """(credit in [0, 1], whether it holds in every frame), each [B], of the outlines of the objects asked for.

    Corners: the overlap with the drawn shape. Fill: coverage in the interior. Constancy: the largest area over the
    smallest. An object that is not there in a frame has no outline in it.
    """
    frames = credit.shape[1]
    used, kind = wanted.shape >= 0, np.maximum(wanted.shape, 0)
    row, chosen = np.arange(len(seen.area))[:, None], matches.chosen[:, :MAX_MOVERS]
    there = credit >= _PRESENT
    overlap = seen.overlap[row, chosen, np.repeat(kind, frames, axis=0)].reshape(there.shape) * there
    level, area = (a[row, chosen].reshape(there.shape) * there for a in (seen.level, seen.area))
    limit = _OUTLINE[kind][:, None]
    corners = ((overlap - _NO_OUTLINE) / (limit - _NO_OUTLINE)).clip(0, 1)
    fill = ((level - _NO_FILL) / (_FILL - _NO_FILL)).clip(0, 1)
    growth = area.max(axis=1) / np.where(there, area, np.inf).min(axis=1).clip(1e-9, np.maximum(area.max(axis=1), 1e-9))
    constant = ((_MOST_GROWTH - growth) / (_MOST_GROWTH - _GROWTH)).clip(0, 1)
    quality = (corners * fill).mean(axis=1) * constant
    firm = ((overlap >= limit) & (level >= _FILL)).all(axis=1) & (growth <= _GROWTH)
    return (quality * used).sum(1) / used.sum(1), (firm | ~used).all(axis=1)


def _aesthetics(seen: Reading, found: Components, number: np.ndarray, clutter: np.ndarray) -> np.ndarray:
    """[B]: every component near a drawn shape and a pure colour, no haze, the same area from frame to frame."""
    count, frames = number.shape
    shape = (seen.overlap.max(-1) / 0.9).clip(0, 1)
    # The last hue is grey.
    color = ((seen.hue[..., :-1].max(-1) - 0.9) / 0.08).clip(0, 1)
    clean = (shape * color).sum(-1).reshape(count, frames) / np.maximum(number + clutter, 1)
    area = (np.bincount(found.image, found.area, count * frames) + found.haze).reshape(count, frames)
    change = np.abs(np.diff(area, axis=1)) / np.maximum(np.maximum(area[:, 1:], area[:, :-1]), 1e-9)
    steady = (1 - change).clip(0, 1) * (np.diff(number, axis=1) == 0)
    return clean.mean(1) * steady.mean(1)
