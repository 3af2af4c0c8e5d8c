"""The embedded world's judge: reads which shapes an image shows, of which colour and where, and grades the prompt.

Colours are segmented into connected components; a component's shape is found by synthesis: every shape is drawn
at the component's own centroid and area, and the one that overlaps best is the reading.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from fastgrpo.shapes.render import DISTANCES
from fastgrpo.shapes.world import COLORS, MAX_OBJECTS, SHAPES, ShapesPrompt, Slots, slots

# Lengths are in pixels of a 32-pixel image, areas in their squares; intensities are in [0, 1].
_BACKGROUND = 28 / 255
# Contrast against the background of every colour, and of the grey that no prompt asks for.
_CONTRAST = (np.array([*COLORS.values(), (165, 165, 165)]) / 255 - _BACKGROUND).astype(np.float32)
_HUE = (_CONTRAST / np.linalg.norm(_CONTRAST, axis=1, keepdims=True)).T
_COVERAGE = (_CONTRAST / (_CONTRAST**2).sum(1, keepdims=True)).T
# Coverage from which a pixel is part of an object, and from which it is visible at all.
_SOLID, _VISIBLE = 0.4, 0.2
# A smaller component is a speck; specks and haze of this area in all fail the strict test.
_OBJECT_AREA = 12.0
# Overlap (intersection over union) with the named shape that the strict test asks for.
_OVERLAP = 0.78
# Margins over the best wrong shape (overlap), wrong colour (cosine) and wrong axis (pixels) that earn full credit.
_SHAPE_MARGIN, _COLOR_MARGIN, _AXIS_MARGIN = 0.08, 0.15, 4.0
# Components whose shape is read, the largest first; all are counted.
_READ = MAX_OBJECTS + 1
_ASSIGNMENTS = np.array(list(itertools.permutations(range(_READ), MAX_OBJECTS)))
# Half the side of the window in which a component is compared with the shapes.
_REACH = 10
_CHUNK = 256
# Area, and centroid's y below the centre, at radius 1.
_AREA = np.array([np.pi, 1.76**2, 0.94 * 2.16, 8 * 1.05 * 0.36 - 4 * 0.36**2], dtype=np.float32)
_CENTROID_Y = np.array([0, 0, 0.94 / 3, 0], dtype=np.float32)


@dataclass(frozen=True)
class VerifierResult:
    """The verdict on B images."""

    score: np.ndarray  # [B] float64 in [0, 1]: half partial credit, half strict; NaN where the image is not finite
    strict: np.ndarray  # [B] bool: the image shows what the prompt says, and nothing else
    objects: np.ndarray  # [B] float64 in [0, 1]: credit for shape, colour and number of objects
    relation: np.ndarray  # [B] float64 in [0, 1]: credit for the relation; NaN where the prompt names none
    found: np.ndarray  # [B] int: objects in the image, recognised or not


class _Components(NamedTuple):
    label: np.ndarray  # [B, H, W]: 0 outside, else 1 + the component's index
    coverage: np.ndarray  # [B, H, W] in [0, 1]: how much of the pixel is the object's colour
    image: np.ndarray  # [K]: which image the component is in
    area: np.ndarray  # [K], pixels
    center: np.ndarray  # [K, 2]: (x, y), pixels
    level: np.ndarray  # [K]: coverage in the component's interior
    hue: np.ndarray  # [K, colours + 1]: cosine with every colour, and grey
    haze: np.ndarray  # [B]: visible area outside all components, pixels


class _Reading(NamedTuple):
    """The largest components of each image; an unused entry has overlap, hue and centre 0."""

    overlap: np.ndarray  # [B, _READ, shapes]
    hue: np.ndarray  # [B, _READ, colours + 1]
    center: np.ndarray  # [B, _READ, 2]


def verify(images: np.ndarray | torch.Tensor, prompts: Sequence[ShapesPrompt]) -> VerifierResult:
    """Grades `images` [B, 3, S, S], values in [0, 1] (others are clipped), against one prompt each.

    Deterministic, and independent of the rest of the batch. Raises ValueError on another layout or number.
    """
    if isinstance(images, torch.Tensor):
        images = images.detach().to("cpu", torch.float32).numpy()
    if images.ndim != 4 or images.shape[1] != 3 or images.shape[2] != images.shape[3]:
        raise ValueError(f"images: expected [B, 3, S, S], got {list(images.shape)}")
    if len(images) != len(prompts):
        raise ValueError(f"prompts: expected one an image ({len(images)}), got {len(prompts)}")
    chunks = [slice(i, i + _CHUNK) for i in range(0, len(images), _CHUNK)]
    parts = [_verify_chunk(images[c].astype(np.float32, copy=False), slots(prompts[c])) for c in chunks]
    return VerifierResult(*(np.concatenate(column) for column in zip(*parts, strict=True)))


def _verify_chunk(images: np.ndarray, wanted: Slots) -> tuple[np.ndarray, ...]:
    unit = images.shape[-1] / 32
    finite = np.logical_and.reduce(np.isfinite(images), axis=(1, 2, 3))
    pixels = np.where(finite[:, None, None, None], images, 0.0).clip(0, 1).transpose(0, 2, 3, 1)
    components = _segment(pixels, unit)
    score, strict, *rest = _grade(_read(components, unit), components, wanted, unit)
    return np.where(finite, score, np.nan), strict & finite, *rest


def _segment(pixels: np.ndarray, unit: float) -> _Components:
    """Connected components of one colour, specks left out."""
    shape = pixels.shape[:3]
    contrast = pixels - np.float32(_BACKGROUND)
    # No colour has a largest contrast below 0.6: the rest of the image cannot be visible.
    seen = np.flatnonzero(contrast.max(-1) > 0.6 * _VISIBLE)
    contrast = contrast.reshape(-1, 3)[seen]
    color = (contrast @ _HUE).argmax(1)
    amount = np.take_along_axis(contrast @ _COVERAGE, color[:, None], 1)[:, 0].clip(0, 1)

    coverage = np.zeros(shape, dtype=np.float32)
    coverage.flat[seen] = amount
    kind = np.zeros(shape, dtype=np.int8)
    kind.flat[seen] = np.where(amount >= _SOLID, color + 1, 0)
    label = _connect(kind)

    member = label.flat[seen]
    area = np.bincount(member, amount, minlength=1)
    keep = area >= _OBJECT_AREA * unit**2
    keep[0] = False
    count = int(keep.sum())
    label = np.where(keep, keep.cumsum(), 0)[label]
    visible = np.where((coverage >= _VISIBLE) & ~_grow(label > 0), coverage, 0)

    member = label.flat[seen]

    def total(weight: np.ndarray) -> np.ndarray:
        return np.bincount(member, weight * amount, count + 1)[1:]

    image, y, x = np.unravel_index(seen, shape)
    mass = total(np.ones_like(amount))
    center = np.stack([total(x + 0.5), total(y + 0.5)], 1) / mass[:, None]
    mean = np.stack([total(channel) for channel in contrast.T], 1).astype(np.float32)
    hue = mean @ _HUE / np.linalg.norm(mean, axis=1, keepdims=True)
    owner = np.rint(total(image) / mass).astype(int)
    return _Components(label, coverage, owner, mass, center, total(amount) / mass, hue, visible.sum((1, 2)))


def _connect(kind: np.ndarray) -> np.ndarray:
    """Labels [B, H, W] of the 4-connected regions of equal, non-zero `kind`, per image; 0 where `kind` is 0."""
    solid = np.flatnonzero(kind)
    node = np.zeros(kind.shape, dtype=np.int32)
    node.flat[solid] = np.arange(len(solid))
    edges = []
    for near, far in ((np.s_[:, :, :-1], np.s_[:, :, 1:]), (np.s_[:, :-1], np.s_[:, 1:])):
        joined = (kind[near] == kind[far]) & (kind[near] > 0)
        edges.append((node[near][joined], node[far][joined]))
    start, end = (np.concatenate(side) for side in zip(*edges, strict=True))
    graph = coo_array((np.ones(len(start), dtype=np.int8), (start, end)), shape=(len(solid), len(solid)))
    label = np.zeros(kind.shape, dtype=np.int64)
    label.flat[solid] = connected_components(graph, directed=False)[1] + 1
    return label


def _grow(mask: np.ndarray) -> np.ndarray:
    """`mask` [..., H, W] and its eight neighbours."""
    mask = mask.copy()
    for near, far in ((np.s_[..., :-1], np.s_[..., 1:]), (np.s_[..., :-1, :], np.s_[..., 1:, :])):
        before = mask.copy()
        mask[near] |= before[far]
        mask[far] |= before[near]
    return mask


def _soften(model: np.ndarray) -> np.ndarray:
    """`model` [K, H, W] under a blur of half a pixel: midway between a rendered and a decoded image."""
    for before, after in ((np.s_[:, :-1], np.s_[:, 1:]), (np.s_[:, :, :-1], np.s_[:, :, 1:])):
        soft = 0.75 * model
        soft[before] += 0.125 * model[after]
        soft[after] += 0.125 * model[before]
        model = soft
    return model


def _read(found: _Components, unit: float) -> _Reading:
    """Overlap of each image's largest components with every shape."""
    images = len(found.label)
    order = np.lexsort((-found.area, found.image))
    image = found.image[order]
    rank = np.arange(len(order)) - np.searchsorted(image, image)
    order, image, rank = (a[rank < _READ] for a in (order, image, rank))

    reach = round(_REACH * unit)
    offset = np.arange(-reach, reach + 1)
    corner = np.floor(found.center[order]).astype(int)
    column = corner[:, 0, None, None] + offset
    row = corner[:, 1, None, None] + offset[:, None]
    pad = ((0, 0), (reach, reach), (reach, reach))
    at = (image[:, None, None], row + reach, column + reach)
    label = np.pad(found.label, pad)[at]
    own = label == order[:, None, None] + 1
    # The rim below the threshold is part of the object; the rim of a neighbour is not.
    own |= _grow(own) & (label == 0)
    level = found.level[order, None, None].astype(np.float32)
    mass = np.where(own, (np.pad(found.coverage, pad)[at] / level).clip(0, 1), 0)
    inside = mass.sum((1, 2))
    x = ((column + 0.5) * mass).sum((1, 2)) / inside
    y = ((row + 0.5) * mass).sum((1, 2)) / inside
    # What lies beyond the window overlaps with nothing.
    total = np.maximum(inside, found.area[order])

    overlap = np.zeros((images, _READ, len(SHAPES)))
    for index, distance in enumerate(DISTANCES):
        r = np.sqrt(total / _AREA[index]).astype(np.float32)
        dx = (column + 0.5 - x[:, None, None]).astype(np.float32)
        dy = (row + 0.5 - (y - _CENTROID_Y[index] * r)[:, None, None]).astype(np.float32)
        model = _soften((0.5 - distance(dx, dy, r[:, None, None])).clip(0, 1))
        shared = np.minimum(model, mass).sum((1, 2))
        overlap[image, rank, index] = shared / (total + _AREA[index] * r * r - shared)
    hue = np.zeros((images, _READ, found.hue.shape[1]))
    hue[image, rank] = found.hue[order]
    center = np.zeros((images, _READ, 2))
    center[image, rank] = np.stack([x, y], 1)
    return _Reading(overlap, hue, center)


def _credit(scores: np.ndarray, margin: float) -> np.ndarray:
    """Credit in [0, 1] of each option of the last axis: 1 where it leads by `margin`, 0 where it trails by it."""
    best, second = np.partition(scores, -2, axis=-1)[..., :-3:-1].transpose(2, 0, 1)[..., None]
    rival = np.where(scores == best, second, best)
    return (0.5 + (scores - rival) / (2 * margin)).clip(0, 1)


def _grade(seen: _Reading, found: _Components, wanted: Slots, unit: float) -> tuple[np.ndarray, ...]:
    """(score, strict, objects, relation, found), each [B]."""
    used = wanted.shape >= 0
    batch = np.arange(len(used))[:, None]
    any_color = wanted.color < 0

    # [B, slot, component]
    overlap = seen.overlap.transpose(0, 2, 1)[batch, wanted.shape]
    shape = _credit(seen.overlap, _SHAPE_MARGIN).transpose(0, 2, 1)[batch, wanted.shape]
    color = _credit(seen.hue, _COLOR_MARGIN).transpose(0, 2, 1)[batch, wanted.color]
    color = np.where(any_color[..., None], 1.0, color)
    real = seen.overlap.max(-1)[:, None]
    credit = (real / 0.8).clip(0, 1) * (0.2 + 0.4 * shape + 0.4 * color) * used[..., None]
    match = (overlap >= _OVERLAP) & (shape > 0.5) & (color > 0.5) & used[..., None]

    slot = np.arange(MAX_OBJECTS)
    best = (credit + match)[:, slot, _ASSIGNMENTS].sum(-1).argmax(1)
    chosen = _ASSIGNMENTS[best]
    credit = credit[batch, slot, chosen]
    match = match[batch, slot, chosen]

    expected = used.sum(1)
    number = np.bincount(found.image, minlength=len(used))
    clutter = found.haze / (_OBJECT_AREA * unit**2)
    objects = credit.sum(1) / np.maximum(expected, number + clutter)

    related = wanted.direction.any(1)
    delta = seen.center[batch[:, 0], chosen[:, 0]] - seen.center[batch[:, 0], chosen[:, 1]]
    along = (delta * wanted.direction).sum(1)
    lead = along - (np.abs(delta).sum(1) - np.abs(along))
    relation = (0.5 + lead / (2 * _AXIS_MARGIN * unit)).clip(0, 1) * credit[:, :2].min(1)

    holds = (lead > 0) | ~related
    strict = (match | ~used).all(1) & (number == expected) & (clutter < 1) & holds
    partial = np.where(related, 0.7 * objects + 0.3 * relation, objects)
    return 0.5 * partial + 0.5 * strict, strict, objects, np.where(related, relation, np.nan), number
