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

from fastgrpo.shapes.render import AREAS, CENTROIDS, DISTANCES
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
OBJECT_AREA = 12.0
# A larger component is a backdrop: it has no shape.
_LARGEST_AREA = 320.0
# Overlap (intersection over union) with the named shape that the strict test asks for.
_OVERLAP = 0.78
# Margins over the best wrong shape (overlap), wrong colour (cosine) and wrong axis (pixels) that earn full credit.
_SHAPE_MARGIN, _COLOR_MARGIN, _AXIS_MARGIN = 0.08, 0.15, 4.0
# Components whose shape is read, the largest first; all are counted.
_READ = MAX_OBJECTS + 1
_ASSIGNMENTS = np.array(list(itertools.permutations(range(_READ), MAX_OBJECTS)))
# Width in pixels of the edge of a drawn shape: between a rendered image's (1) and a blurred decoder's.
_EDGE = 1.4
_CHUNK = 256


@dataclass(frozen=True)
class VerifierResult:
    """The verdict on B images."""

    score: np.ndarray  # [B] float64 in [0, 1]: half partial credit, half strict; NaN where the image holds a NaN
    strict: np.ndarray  # [B] bool: the image shows what the prompt says, and nothing else
    objects: np.ndarray  # [B] float64 in [0, 1]: credit for shape, colour and number of objects
    relation: np.ndarray  # [B] float64 in [0, 1]: credit for the relation; NaN where the prompt names none
    found: np.ndarray  # [B] int: objects in the image, recognised or not


class Components(NamedTuple):
    label: np.ndarray  # [B, H, W]: 0 outside, else 1 + the component's index
    coverage: np.ndarray  # [B, H, W] in [0, 1]: how much of the pixel is the object's colour
    image: np.ndarray  # [K]: which image the component is in
    area: np.ndarray  # [K], pixels
    level: np.ndarray  # [K]: coverage in the component's interior
    hue: np.ndarray  # [K, colours + 1]: cosine with every colour, and grey
    haze: np.ndarray  # [B]: visible area outside all components, pixels


class Reading(NamedTuple):
    """The largest components of each image; an unused entry is 0 throughout."""

    overlap: np.ndarray  # [B, _READ, shapes]
    hue: np.ndarray  # [B, _READ, colours + 1]
    center: np.ndarray  # [B, _READ, 2]
    area: np.ndarray  # [B, _READ], pixels
    level: np.ndarray  # [B, _READ]: coverage in the interior


def verify(images: np.ndarray | torch.Tensor, prompts: Sequence[ShapesPrompt]) -> VerifierResult:
    """Grades `images` [B, 3, S, S], values in [0, 1] (others are clipped), against one prompt each.

    Partial credit is `objects`, or 0.7 `objects` + 0.3 `relation` where the prompt names a relation.
    An object earns 0.2 for being a shape at all, 0.4 for the right one and 0.4 for the right colour, in steps made
    smooth; the sum is divided by the number of objects asked for or found, whichever is larger.
    Raises ValueError on another layout or number.
    """
    if isinstance(images, torch.Tensor):
        images = images.detach().to("cpu", torch.float32).numpy()
    if images.ndim != 4 or images.shape[1] != 3 or images.shape[2] != images.shape[3] or len(images) == 0:
        raise ValueError(f"images: expected [B, 3, S, S] with B > 0, got {list(images.shape)}")
    if len(images) != len(prompts):
        raise ValueError(f"prompts: expected one an image ({len(images)}), got {len(prompts)}")
    chunks = [slice(i, i + _CHUNK) for i in range(0, len(images), _CHUNK)]
    parts = [_verify_chunk(images[c].astype(np.float32, copy=False), slots(prompts[c])) for c in chunks]
    return VerifierResult(*(np.concatenate(column) for column in zip(*parts, strict=True)))


def _verify_chunk(images: np.ndarray, wanted: Slots) -> tuple[np.ndarray, ...]:
    unit = images.shape[-1] / 32
    images = images.clip(0, 1)
    finite = ~np.isnan(images.sum((1, 2, 3)))
    images[~finite] = 0
    components = segment(images, unit)
    score, strict, *rest = _grade(read(components, unit), components, wanted, unit)
    return np.where(finite, score, np.nan), strict & finite, *rest


def segment(images: np.ndarray, unit: float) -> Components:
    """Connected components of one colour, specks left out."""
    red, green, blue = images.transpose(1, 0, 2, 3)
    shape = red.shape
    # No colour has a largest contrast below 0.6: the rest of the image cannot be visible.
    seen = np.flatnonzero(np.maximum(np.maximum(red, green), blue) > _BACKGROUND + 0.6 * _VISIBLE)
    contrast = np.stack([np.ravel(c)[seen] for c in (red, green, blue)], 1) - np.float32(_BACKGROUND)
    color = (contrast @ _HUE).argmax(1)
    amount = np.take_along_axis(contrast @ _COVERAGE, color[:, None], 1)[:, 0].clip(0, 1)

    coverage = np.zeros(shape, dtype=np.float32)
    coverage.ravel()[seen] = amount
    kind = np.zeros(shape, dtype=np.int8)
    kind.ravel()[seen] = np.where(amount >= _SOLID, color + 1, 0)
    label = _connect(kind)

    member = label.ravel()[seen]
    area = np.bincount(member, amount, minlength=1)
    keep = area >= OBJECT_AREA * unit**2
    keep[0] = False
    count = int(keep.sum())
    label = np.where(keep, keep.cumsum(), 0).astype(np.int32)[label]
    member = label.ravel()[seen]
    # A rim below the threshold belongs to the component it touches, but not to its statistics.
    label = _spread(label)
    image = seen // (shape[1] * shape[2])
    stray = (amount >= _VISIBLE) & (label.ravel()[seen] == 0)
    haze = np.bincount(image[stray], amount[stray], len(images))

    def total(weight: np.ndarray) -> np.ndarray:
        return np.bincount(member, weight * amount, count + 1)[1:]

    mass = total(np.ones_like(amount))
    mean = np.stack([total(channel) for channel in contrast.T], 1).astype(np.float32)
    hue = mean @ _HUE / np.linalg.norm(mean, axis=1, keepdims=True)
    where = np.zeros(count + 1, dtype=np.intp)
    where[member] = image
    return Components(label, coverage, where[1:], mass, total(amount) / mass, hue, haze)


def _connect(kind: np.ndarray) -> np.ndarray:
    """Labels [B, H, W] of the 4-connected regions of equal, non-zero `kind`, per image; 0 where `kind` is 0."""
    solid = np.flatnonzero(kind)
    node = np.zeros(kind.shape, dtype=np.int32)
    node.ravel()[solid] = np.arange(len(solid))
    edges = []
    for near, far in ((np.s_[:, :, :-1], np.s_[:, :, 1:]), (np.s_[:, :-1], np.s_[:, 1:])):
        joined = (kind[near] == kind[far]) & (kind[near] > 0)
        edges.append((node[near][joined], node[far][joined]))
    start, end = (np.concatenate(side) for side in zip(*edges, strict=True))
    graph = coo_array((np.ones(len(start), dtype=np.int8), (start, end)), shape=(len(solid), len(solid)))
    label = np.zeros(kind.shape, dtype=np.int32)
    label.ravel()[solid] = connected_components(graph, directed=False)[1] + 1
    return label


def _spread(label: np.ndarray) -> np.ndarray:
    """`label` [B, H, W], and in the pixels where it is 0 the largest label of the eight neighbours."""
    wide = label
    for near, far in ((np.s_[..., :-1], np.s_[..., 1:]), (np.s_[..., :-1, :], np.s_[..., 1:, :])):
        before, wide = wide, wide.copy()
        np.maximum(wide[near], before[far], out=wide[near])
        np.maximum(wide[far], before[near], out=wide[far])
    return np.where(label > 0, label, wide)


def read(found: Components, unit: float) -> Reading:
    """Overlap of each image's largest components with every shape."""
    order = np.lexsort((-found.area, found.image))
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order)) - np.searchsorted(found.image[order], found.image[order])

    label = found.label.ravel()
    pixels = np.flatnonzero(label)
    owner = label[pixels] - 1
    pixels, owner = (a[rank[owner] < _READ] for a in (pixels, owner))
    mass = (found.coverage.ravel()[pixels] / found.level[owner].astype(np.float32)).clip(0, 1)

    def total(weight: np.ndarray) -> np.ndarray:
        return np.bincount(owner, weight, len(order)).astype(np.float32)

    _, y, x = (a.astype(np.float32) for a in np.unravel_index(pixels, found.label.shape))
    area = np.maximum(total(mass), np.finfo(np.float32).tiny)
    center_x, center_y = total(x * mass) / area, total(y * mass) / area
    dx, dy = x - center_x[owner], y - center_y[owner]

    sized = found.area <= _LARGEST_AREA * unit**2
    edge = np.float32(_EDGE)
    kept = np.flatnonzero(rank < _READ)
    at = found.image[kept], rank[kept]
    overlap = np.zeros((len(found.label), _READ, len(SHAPES)))
    for index, distance in enumerate(DISTANCES):
        r = np.sqrt(area / np.float32(AREAS[index]))
        shift = np.float32(CENTROIDS[index]) * r
        drawn = (0.5 - distance(dx, dy + shift[owner], r[owner]) / edge).clip(0, 1)
        shared = total(np.minimum(drawn, mass))
        overlap[(*at, index)] = (sized * shared / (2 * area - shared))[kept]
    hue = np.zeros((len(found.label), _READ, found.hue.shape[1]))
    hue[at] = found.hue[kept]
    center = np.zeros((len(found.label), _READ, 2))
    center[at] = np.stack([center_x, center_y], 1)[kept]
    size, level = np.zeros((2, *overlap.shape[:2]))
    size[at], level[at] = found.area[kept], found.level[kept]
    return Reading(overlap, hue, center, size, level)


def _credit(scores: np.ndarray, margin: float) -> np.ndarray:
    """Credit in [0, 1] of each option of the last axis: 1 where it leads by `margin`, 0 where it trails by it."""
    best, second = np.partition(scores, -2, axis=-1)[..., :-3:-1].transpose(2, 0, 1)[..., None]
    rival = np.where(scores == best, second, best)
    return (0.5 + (scores - rival) / (2 * margin)).clip(0, 1)


class Matches(NamedTuple):
    """What of each image answers to which slot of its prompt."""

    credit: np.ndarray  # [B, slot] in [0, 1]: shape and colour; 0 in an unused slot
    match: np.ndarray  # [B, slot] bool: passes the strict test
    chosen: np.ndarray  # [B, slot]: index into the reading's components
    number: np.ndarray  # [B]: objects in the image
    clutter: np.ndarray  # [B]: haze, counted in objects


def match_objects(seen: Reading, found: Components, wanted: Slots, unit: float) -> Matches:
    """The assignment of components to slots with the most credit and matches."""
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
    number = np.bincount(found.image, minlength=len(used))
    clutter = found.haze / (OBJECT_AREA * unit**2)
    return Matches(credit[batch, slot, chosen], match[batch, slot, chosen], chosen, number, clutter)


def _grade(seen: Reading, found: Components, wanted: Slots, unit: float) -> tuple[np.ndarray, ...]:
    """(score, strict, objects, relation, found), each [B]."""
    used = wanted.shape >= 0
    batch = np.arange(len(used))
    credit, match, chosen, number, clutter = match_objects(seen, found, wanted, unit)
    expected = used.sum(1)
    objects = credit.sum(1) / np.maximum(expected, number + clutter)

    related = wanted.direction.any(1)
    delta = seen.center[batch, chosen[:, 0]] - seen.center[batch, chosen[:, 1]]
    along = (delta * wanted.direction).sum(1)
    lead = along - (np.abs(delta).sum(1) - np.abs(along))
    relation = (0.5 + lead / (2 * _AXIS_MARGIN * unit)).clip(0, 1) * credit[:, :2].min(1)

    holds = (lead > 0) | ~related
    strict = (match | ~used).all(1) & (number == expected) & (clutter < 1) & holds
    partial = np.where(related, 0.7 * objects + 0.3 * relation, objects)
    return 0.5 * partial + 0.5 * strict, strict, objects, np.where(related, relation, np.nan), number
