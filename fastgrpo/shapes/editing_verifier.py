"""The editing world's judge: is what should change changed, and is everything else as it was?

Objects are read as the still world's verifier reads them; their places are held against the source's scene.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from fastgrpo.shapes.editing_render import EditScenes
from fastgrpo.shapes.editing_world import MAX_SLOTS, EditPrompt, slots
from fastgrpo.shapes.render import CENTROIDS, DISTANCES
from fastgrpo.shapes.verifier import Components, Matches, match_objects, read, segment
from fastgrpo.shapes.world import MAX_OBJECTS, Slots

# Lengths are in pixels of a 32-pixel image; changes of intensity are in [0, 1].
# How far an object that stays may drift, how far one that is moved must go, and how far aside, in the strict test.
_STAYS, _MOVES, _ASIDE = 1.6, 4.0, 2.0
# A way that earns full credit: the shortest that is drawn.
_FULL_WAY = 6.0
# Pixels around the edited object, before and after, that may change too.
_RIM = 2.0
# A smaller change of a pixel is the autoencoder's.
_SEEN = 0.12
# Pixels, wholly changed, outside the edited object's region that leave nothing preserved: half a small object.
_LOST = 25.0
_CHUNK = 256


@dataclass(frozen=True)
class EditVerdict:
    """The verdict on B edited images."""

    score: np.ndarray  # [B] float64 in [0, 1]: a quarter edit, a quarter preserve, half strict; NaN with a NaN pixel
    strict: np.ndarray  # [B] bool: the edit is done, and nothing else has changed
    edit: np.ndarray  # [B] float64 in [0, 1]: credit for what should change
    preserve: np.ndarray  # [B] float64 in [0, 1]: how much of what should stay is as it was, pixel by pixel


def verify(images: np.ndarray | torch.Tensor, prompts: Sequence[EditPrompt], scenes: EditScenes) -> EditVerdict:
    """Grades edited `images` [B, 3, S, S], values in [0, 1] (others are clipped), of the scenes' source images.

    Raises ValueError on another layout or number.
    """
    if isinstance(images, torch.Tensor):
        images = images.detach().to("cpu", torch.float32).numpy()
    if images.ndim != 4 or images.shape[1] != 3 or images.shape[2] != images.shape[3] or len(images) == 0:
        raise ValueError(f"images: expected [B, 3, S, S] with B > 0, got {list(images.shape)}")
    if not len(images) == len(prompts) == len(scenes.radius):
        raise ValueError(f"prompts, scenes: expected one an image ({len(images)}), got {len(prompts)}")
    parts = []
    for start in range(0, len(images), _CHUNK):
        rows = slice(start, start + _CHUNK)
        part = scenes[rows]
        parts.append(_verify_chunk(images[rows].astype(np.float32), prompts[rows], part))
    return EditVerdict(*(np.concatenate(column) for column in zip(*parts, strict=True)))


def _verify_chunk(images: np.ndarray, prompts: Sequence[EditPrompt], scenes: EditScenes) -> tuple[np.ndarray, ...]:
    size = images.shape[-1]
    unit, wanted, batch = size / 32, slots(prompts), np.arange(len(images))
    images = images.clip(0, 1)
    finite = ~np.isnan(images.sum((1, 2, 3)))
    images[~finite] = 0
    spare = ((0, 0), (0, MAX_OBJECTS - MAX_SLOTS))
    shape, color = (np.pad(a, spare, constant_values=-1) for a in (wanted.shape, wanted.color))
    goal = Slots(shape, color, np.zeros((len(batch), 2)))
    found = segment(images, unit)
    seen = read(found, unit)
    matches = match_objects(seen, found, goal, unit)
    credit, match, chosen = (a[:, :MAX_SLOTS] for a in (matches.credit, matches.match, matches.chosen))

    there, before = wanted.shape >= 0, wanted.source_shape >= 0
    offset = (seen.center[batch[:, None], chosen] - _centroids(scenes)) / unit
    edited = np.arange(MAX_SLOTS) == wanted.edited[:, None]
    along = (offset * wanted.direction[:, None]).sum(-1)
    aside = np.linalg.norm(offset - along[..., None] * wanted.direction[:, None], axis=-1)
    moves = edited & (wanted.direction != 0).any(axis=-1, keepdims=True)
    in_place = np.where(moves, (along >= _MOVES) & (aside <= _ASIDE), aside <= _STAYS) | ~before
    exact = np.all(match & in_place | ~there, axis=1)
    strict = exact & (matches.number == there.sum(1)) & (matches.clutter < 1) & finite

    source = scenes.draw(result=False, size=size).astype(np.float32).transpose(0, 3, 1, 2) / 255
    region = _edited_region(scenes, wanted.edited, unit, size)
    region |= _around(_component(found, matches, wanted.edited), round(_RIM * unit))
    change = np.abs(images - source).max(1)
    lost = (np.where(region, 0, change) * (change > _SEEN)).sum((1, 2)) / unit**2
    preserve = (1 - lost / _LOST).clip(0, 1)

    near = (1 - (aside - 0.5) / 3).clip(0, 1)
    way = np.where(moves, (along / _FULL_WAY).clip(0, 1), 1.0)
    # Of an object that is only to change its colour, shape and place alone earn nothing.
    recolored = edited & before & there & ~moves
    credit = np.where(recolored, ((credit - 0.6) / 0.4).clip(0, 1), credit)
    done = np.where(before, credit * near * way, credit)[batch, wanted.edited]
    edit = np.where(there[batch, wanted.edited], done, _gone(images, source, scenes, wanted.edited, unit))
    score = 0.25 * edit + 0.25 * preserve + 0.5 * strict
    return np.where(finite, score, np.nan), strict, np.where(finite, edit, np.nan), np.where(finite, preserve, np.nan)


def _centroids(scenes: EditScenes) -> np.ndarray:
    """[N, MAX_SLOTS, 2]: where the verifier reads the source's objects, in pixel indices."""
    below = np.array([*CENTROIDS, 0.0])[scenes.shape[0]] * scenes.radius
    return scenes.center[0] - 0.5 + np.stack([np.zeros_like(below), below], axis=-1)


def _edited_region(scenes: EditScenes, edited: np.ndarray, unit: float, size: int) -> np.ndarray:
    """bool [N, S, S]: within the rim of the edited object in the source; nowhere for one that is added."""
    rows, pixel = np.arange(len(edited)), np.arange(size) + 0.5
    x, y = scenes.center[0, rows, edited].T[:, :, None]
    radius, shape = scenes.radius[rows, edited][:, None, None], scenes.shape[0, rows, edited]
    region = np.zeros((len(edited), size, size), dtype=bool)
    for index, distance in enumerate(DISTANCES):
        of = shape == index
        region[of] = distance((pixel - x[of])[:, None], (pixel - y[of])[:, :, None], radius[of]) <= _RIM * unit
    return region


def _component(found: Components, matches: Matches, edited: np.ndarray) -> np.ndarray:
    """bool [N, S, S]: the object of the result that answers to the edited slot, if any has any credit."""
    rows = np.arange(len(edited))
    order = np.lexsort((-found.area, found.image))
    first = np.searchsorted(found.image[order], rows)
    place = first + matches.chosen[rows, edited]
    there = (matches.credit[rows, edited] > 0) & (place < len(order))
    label = np.where(there, order[np.minimum(place, len(order) - 1)] + 1, -1) if len(order) else np.full(len(rows), -1)
    return found.label == label[:, None, None]


def _around(mask: np.ndarray, rim: int) -> np.ndarray:
    """`mask` [N, S, S], grown by `rim` pixels."""
    wide = np.pad(mask, ((0, 0), (rim, rim), (rim, rim)))
    size = mask.shape[-1]
    grown = np.zeros_like(mask)
    for down in range(2 * rim + 1):
        for right in range(2 * rim + 1):
            grown |= wide[:, down : down + size, right : right + size]
    return grown


def _gone(images: np.ndarray, source: np.ndarray, scenes: EditScenes, edited: np.ndarray, unit: float) -> np.ndarray:
    """[N] in [0, 1]: how much of the edited object is not there any more."""
    region = _edited_region(scenes, edited, unit, images.shape[-1])
    background = (scenes.background / 255)[:, None, None]
    left, was = ((np.abs(a - background).max(1) * region).sum((1, 2)) for a in (images, source))
    return (1 - left / np.maximum(was, 1e-6)).clip(0, 1)
