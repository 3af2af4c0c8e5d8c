"""Ground truth of the embedded world: scenes that satisfy a prompt, drawn anti-aliased from signed distances."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fastgrpo.shapes.world import COLORS, MAX_OBJECTS, SHAPES, ShapesPrompt

# Radii in pixels of a 32-pixel image, by the number of objects in it.
_RADII = {1: (5.5, 7.5), 2: (4.5, 5.6), 3: (4.0, 4.8), 4: (3.8, 4.3)}
# Half the side of the box that holds any shape, in radii.
_EXTENT = 1.08
# Clear pixels between two boxes, and between a box and the edge of the image.
_GAP, _BORDER = 2.5, 1.0
# A relation leads its axis by so many pixels: "left of" means dx >= |dy| + _LEAD.
_LEAD = 2.5
_CANDIDATES = 16
_CHUNK = 256

_PALETTE = np.array(list(COLORS.values()), dtype=np.float32)
_COLOR_INDEX = {name: i for i, name in enumerate(COLORS)}
_SHAPE_INDEX = {name: i for i, name in enumerate(SHAPES)}
# Unit vector (x, y; y points down) from the second object to the first.
_DIRECTION = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}


@dataclass(frozen=True)
class Scenes:
    """What N images show. Objects are in the order of their prompt; an unused slot has shape -1."""

    shape: np.ndarray  # [N, MAX_OBJECTS], index into SHAPES
    color: np.ndarray  # [N, MAX_OBJECTS], index into COLORS
    center: np.ndarray  # [N, MAX_OBJECTS, 2], (x, y) in pixels
    radius: np.ndarray  # [N, MAX_OBJECTS], pixels


def sample_scenes(prompts: Sequence[ShapesPrompt], rng: np.random.Generator, size: int = 32) -> Scenes:
    """One random scene per prompt that satisfies it, objects well apart, for images of `size` pixels."""
    n = len(prompts)
    shape = np.full((n, MAX_OBJECTS), -1)
    color = rng.integers(len(COLORS), size=(n, MAX_OBJECTS))
    direction = np.zeros((n, 2))
    for i, prompt in enumerate(prompts):
        slots = [o for o in prompt.objects for _ in range(o.count)]
        shape[i, : len(slots)] = [_SHAPE_INDEX[o.shape] for o in slots]
        for k, spec in enumerate(slots):
            if spec.color is not None:
                color[i, k] = _COLOR_INDEX[spec.color]
        if prompt.relation is not None:
            direction[i] = _DIRECTION[prompt.relation]
    low, high = np.array([_RADII[count] for count in (shape >= 0).sum(1)]).reshape(n, 2).T[..., None] * (size / 32)
    radius = rng.uniform(low, high, size=(n, MAX_OBJECTS))
    return Scenes(shape, color, _place(shape >= 0, radius, direction, rng, size), radius)


def _place(
    used: np.ndarray, radius: np.ndarray, direction: np.ndarray, rng: np.random.Generator, size: int
) -> np.ndarray:
    """Centres [N, MAX_OBJECTS, 2] by rejection: boxes apart, relation (if any) clear."""
    unit = size / 32
    center = np.zeros((*radius.shape, 2))
    extent = np.where(used, radius * _EXTENT, 0.0)
    first, second = np.triu_indices(MAX_OBJECTS, 1)
    apart = extent[:, first] + extent[:, second] + _GAP * unit
    both = used[:, first] & used[:, second]
    related = direction.any(1)
    pending = np.arange(len(radius))
    while len(pending):
        low = (extent[pending] + _BORDER * unit)[:, None, :, None]
        trial = rng.uniform(low, size - low, size=(len(pending), _CANDIDATES, MAX_OBJECTS, 2))
        offset = np.abs(trial[:, :, first] - trial[:, :, second]).max(-1)
        valid = ((offset >= apart[pending, None]) | ~both[pending, None]).all(-1)
        delta = trial[:, :, 0] - trial[:, :, 1]
        along = (delta * direction[pending, None]).sum(-1)
        across = np.abs(delta).sum(-1) - np.abs(along)
        valid &= (along >= across + _LEAD * unit) | ~related[pending, None]
        found = valid.any(1)
        center[pending[found]] = trial[found, valid[found].argmax(1)]
        pending = pending[~found]
    return center


def _circle(dx: np.ndarray, dy: np.ndarray, r: np.ndarray) -> np.ndarray:
    return np.sqrt(dx * dx + dy * dy) - r


def _square(dx: np.ndarray, dy: np.ndarray, r: np.ndarray) -> np.ndarray:
    return np.maximum(np.abs(dx), np.abs(dy)) - 0.88 * r


def _triangle(dx: np.ndarray, dy: np.ndarray, r: np.ndarray) -> np.ndarray:
    # Equilateral, pointing up: the base, and the two slanted edges by symmetry.
    return np.maximum(dy - 0.94 * r, 0.867 * np.abs(dx) - 0.498 * (dy + 0.94 * r))


def _cross(dx: np.ndarray, dy: np.ndarray, r: np.ndarray) -> np.ndarray:
    dx, dy, length, width = np.abs(dx), np.abs(dy), 1.05 * r, 0.36 * r
    return np.minimum(np.maximum(dx - length, dy - width), np.maximum(dx - width, dy - length))


# Signed distance in pixels, negative inside, in the order of SHAPES.
_DISTANCES = (_circle, _square, _triangle, _cross)


def draw(scenes: Scenes, rng: np.random.Generator, size: int = 32) -> np.ndarray:
    """The images of `scenes` on a dark grey background of slightly random level: uint8 [N, size, size, 3]."""
    n = len(scenes.shape)
    background = rng.uniform(22, 34, size=(n, 1)).astype(np.float32)
    images = np.empty((n, size, size, 3), dtype=np.uint8)
    for start in range(0, n, _CHUNK):
        part = slice(start, start + _CHUNK)
        images[part] = _draw_chunk(*(a[part] for a in vars(scenes).values()), background[part], size)
    return images


def _draw_chunk(
    shape: np.ndarray, color: np.ndarray, center: np.ndarray, radius: np.ndarray, background: np.ndarray, size: int
) -> np.ndarray:
    pixel = np.arange(size, dtype=np.float32) + 0.5
    canvas = np.zeros((len(shape), size, size, 3), dtype=np.float32) + background[:, None, None]
    for slot in range(MAX_OBJECTS):
        for index, distance in enumerate(_DISTANCES):
            rows = np.flatnonzero(shape[:, slot] == index)
            x, y = center[rows, slot].astype(np.float32).T[:, :, None]
            r = radius[rows, slot, None, None].astype(np.float32)
            coverage = np.clip(0.5 - distance((pixel - x)[:, None, :], (pixel - y)[:, :, None], r), 0, 1)
            contrast = _PALETTE[color[rows, slot]] - background[rows]
            canvas[rows] += coverage[..., None] * contrast[:, None, None]
    return np.rint(canvas).astype(np.uint8)


def render_batch(prompts: Sequence[ShapesPrompt], rng: np.random.Generator, size: int = 32) -> np.ndarray:
    """One random image per prompt that shows exactly what it says: uint8 [N, size, size, 3]."""
    return draw(sample_scenes(prompts, rng, size), rng, size)


def render(prompt: ShapesPrompt, rng: np.random.Generator, size: int = 32) -> np.ndarray:
    """One random image that shows exactly what the prompt says: uint8 [size, size, 3]."""
    return render_batch([prompt], rng, size)[0]
