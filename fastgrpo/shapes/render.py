"""Ground truth of the embedded world: scenes that satisfy a prompt, drawn anti-aliased from signed distances."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fastgrpo.shapes.world import COLORS, MAX_OBJECTS, ShapesPrompt, slots

# Least and greatest radius in pixels of a 32-pixel image; the row is the number of objects in it.
_RADII = np.array([(0.0, 0.0), (5.5, 7.5), (4.5, 5.6), (4.0, 4.8), (3.8, 4.3)])
# Half the side of the box that holds any shape, in radii.
EXTENT = 1.08
# Clear pixels between two boxes, and between a box and the edge of the image.
GAP, BORDER = 2.5, 1.0
# A relation leads its axis by so many pixels: "left of" means dx >= |dy| + _LEAD.
_LEAD = 2.5
_CANDIDATES = 16
_CHUNK = 256

_PALETTE = np.array(list(COLORS.values()), dtype=np.float32)


@dataclass(frozen=True)
class Scenes:
    """What N images show. Objects are in the order of their prompt; an unused slot has shape -1."""

    shape: np.ndarray  # [N, MAX_OBJECTS], index into SHAPES
    color: np.ndarray  # [N, MAX_OBJECTS], index into COLORS
    center: np.ndarray  # [N, MAX_OBJECTS, 2], (x, y) in pixels
    radius: np.ndarray  # [N, MAX_OBJECTS], pixels

    def __getitem__(self, rows: slice | np.ndarray) -> "Scenes":
        """The scenes of some rows."""
        return Scenes(self.shape[rows], self.color[rows], self.center[rows], self.radius[rows])


def sample_scenes(prompts: Sequence[ShapesPrompt], rng: np.random.Generator, size: int = 32) -> Scenes:
    """One random scene per prompt that satisfies it, objects well apart, for images of `size` pixels."""
    shape, color, direction = slots(prompts)
    color = np.where(color < 0, rng.integers(len(COLORS), size=color.shape), color)
    low, high = _RADII[(shape >= 0).sum(1)].T[..., None] * (size / 32)
    radius = rng.uniform(low, high, size=shape.shape)
    return Scenes(shape, color, _place(shape >= 0, radius, direction, rng, size), radius)


def _place(
    used: np.ndarray, radius: np.ndarray, direction: np.ndarray, rng: np.random.Generator, size: int
) -> np.ndarray:
    """Centres [N, MAX_OBJECTS, 2] by rejection: boxes apart, relation (if any) clear."""
    unit = size / 32
    center = np.zeros((*radius.shape, 2))
    extent = np.where(used, radius * EXTENT, 0.0)
    first, second = np.triu_indices(MAX_OBJECTS, 1)
    apart = extent[:, first] + extent[:, second] + GAP * unit
    both = used[:, first] & used[:, second]
    related = np.abs(direction).sum(1) > 0
    pending = np.arange(len(radius))
    while len(pending):
        low = (extent[pending] + BORDER * unit)[:, None, :, None]
        trial = rng.uniform(low, size - low, size=(len(pending), _CANDIDATES, MAX_OBJECTS, 2))
        offset = np.abs(trial[:, :, first] - trial[:, :, second]).max(-1)
        spaced = np.logical_or(offset >= apart[pending, None], ~both[pending, None]).all(-1)
        delta = trial[:, :, 0] - trial[:, :, 1]
        along = (delta * direction[pending, None]).sum(-1)
        across = np.abs(delta).sum(-1) - np.abs(along)
        valid = np.logical_and(spaced, np.logical_or(along >= across + _LEAD * unit, ~related[pending, None]))
        found = valid.any(axis=1)
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


# Signed distance in pixels, negative inside, of (dx, dy, radius), in the order of SHAPES; dx and dy broadcast.
DISTANCES = (_circle, _square, _triangle, _cross)
# Area, and the centroid's distance below the centre, at radius 1.
AREAS = (np.pi, 1.76**2, 1.88**2 * 0.498 / 0.867, 8 * 1.05 * 0.36 - 4 * 0.36**2)
CENTROIDS = (0.0, 0.0, 0.94 / 3, 0.0)


def background_levels(count: int, rng: np.random.Generator) -> np.ndarray:
    """Dark grey levels [count, 1], slightly random."""
    return rng.uniform(22, 34, size=(count, 1)).astype(np.float32)


def draw(scenes: Scenes, rng: np.random.Generator, size: int = 32, background: np.ndarray | None = None) -> np.ndarray:
    """The images of `scenes`: uint8 [N, size, size, 3]. background: grey levels [N, 1], random ones by default."""
    n = len(scenes.shape)
    if background is None:
        background = background_levels(n, rng)
    images = np.empty((n, size, size, 3), dtype=np.uint8)
    for start in range(0, n, _CHUNK):
        part = slice(start, start + _CHUNK)
        images[part] = _draw_chunk(scenes[part], background[part], size)
    return images


def _draw_chunk(scenes: Scenes, background: np.ndarray, size: int) -> np.ndarray:
    pixel = np.arange(size, dtype=np.float32) + 0.5
    canvas = np.zeros((len(background), size, size, 3), dtype=np.float32) + background[:, None, None]
    for slot in range(MAX_OBJECTS):
        for index, distance in enumerate(DISTANCES):
            rows = np.flatnonzero(scenes.shape[:, slot] == index)
            x, y = scenes.center[rows, slot].astype(np.float32).T[:, :, None]
            r = scenes.radius[rows, slot, None, None].astype(np.float32)
            coverage = np.clip(0.5 - distance((pixel - x)[:, None, :], (pixel - y)[:, :, None], r), 0, 1)
            contrast = _PALETTE[scenes.color[rows, slot]] - background[rows]
            canvas[rows] += coverage[..., None] * contrast[:, None, None]
    return np.rint(canvas).astype(np.uint8)


def render_batch(prompts: Sequence[ShapesPrompt], rng: np.random.Generator, size: int = 32) -> np.ndarray:
    """One random image per prompt that shows exactly what it says: uint8 [N, size, size, 3]."""
    return draw(sample_scenes(prompts, rng, size), rng, size)


def render(prompt: ShapesPrompt, rng: np.random.Generator, size: int = 32) -> np.ndarray:
    """One random image that shows exactly what the prompt says: uint8 [size, size, 3]."""
    return render_batch([prompt], rng, size)[0]
