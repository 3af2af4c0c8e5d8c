"""Ground truth of the moving world: scenes that satisfy a prompt, frame by frame, drawn as the still world draws."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fastgrpo.shapes import render
from fastgrpo.shapes.moving_world import FRAMES, MAX_MOVERS, SPEEDS, MovingPrompt, MovingSlots, parse, slots
from fastgrpo.shapes.world import MAX_OBJECTS

# Least and greatest radius of an object, alone and beside another; pixels of a 32-pixel frame, as all lengths here.
_RADII = np.array([(0.0, 0.0), (5.0, 7.0), (4.0, 5.2)])
# Least and greatest way over the whole video, in the order of SPEEDS. Nothing moves at a speed between the two.
WAYS = np.array([(5.0, 7.0), (11.0, 13.5)])
_CANDIDATES = 16


@dataclass(frozen=True)
class MovingScenes:
    """What N videos show. Objects are in the order of their prompt; an unused slot has shape -1."""

    shape: np.ndarray  # [N, MAX_MOVERS], index into SHAPES
    color: np.ndarray  # [N, MAX_MOVERS], index into COLORS
    center: np.ndarray  # [N, frames, MAX_MOVERS, 2], (x, y) in pixels
    radius: np.ndarray  # [N, MAX_MOVERS], pixels

    @property
    def frames(self) -> render.Scenes:
        """Every frame of every video as a still scene, [N · frames]."""
        spare = MAX_OBJECTS - MAX_MOVERS
        count = self.center.shape[1]
        shape, color, radius = (np.repeat(a, count, axis=0) for a in (self.shape, self.color, self.radius))
        return render.Scenes(
            np.pad(shape, ((0, 0), (0, spare)), constant_values=-1),
            np.pad(color, ((0, 0), (0, spare))),
            np.pad(self.center.reshape(-1, MAX_MOVERS, 2), ((0, 0), (0, spare), (0, 0))),
            np.pad(radius, ((0, 0), (0, spare))),
        )


def sample_scenes(
    prompts: Sequence[MovingPrompt], rng: np.random.Generator, size: int = 32, frames: int = FRAMES
) -> MovingScenes:
    """One random scene per prompt that satisfies it, objects well apart in every frame, for frames of `size` pixels.

    Motion is uniform: an object that moves covers a way of WAYS from the first frame to the last. Sizes, speeds and
    places are drawn together until they fit.
    """
    wanted, unit = slots(prompts), size / 32
    used = wanted.shape >= 0
    center = np.zeros((len(used), frames, MAX_MOVERS, 2))
    radius = np.zeros(used.shape)
    pending = np.arange(len(used))
    while len(pending):
        part = MovingSlots(*(a[pending] for a in wanted))
        trial = _draw_radii(part, rng) * unit
        path = _draw_paths(part, rng, frames) * unit
        start, found = _place(part, trial, path, rng, size)
        center[pending[found]] = (start[:, None] + path)[found]
        radius[pending[found]] = trial[found]
        pending = pending[~found]
    return MovingScenes(wanted.shape, np.maximum(wanted.color, 0), center, radius)


def _draw_radii(wanted: MovingSlots, rng: np.random.Generator) -> np.ndarray:
    low, high = _RADII[(wanted.shape >= 0).sum(1)].T[..., None]
    return rng.uniform(low, high, size=wanted.shape.shape)


def _draw_paths(wanted: MovingSlots, rng: np.random.Generator, frames: int) -> np.ndarray:
    """[N, frames, MAX_MOVERS, 2]: where each centre is, from where it started."""
    pace = np.where(wanted.speed < 0, rng.integers(len(SPEEDS), size=wanted.speed.shape), wanted.speed)
    way = rng.uniform(*WAYS[pace].transpose(2, 0, 1))
    return np.linspace(0, 1, frames)[None, :, None, None] * (wanted.direction * way[..., None])[:, None]


def _place(
    wanted: MovingSlots, radius: np.ndarray, path: np.ndarray, rng: np.random.Generator, size: int
) -> tuple[np.ndarray, np.ndarray]:
    """First centres [N, MAX_MOVERS, 2], and whether they fit: inside the picture, boxes apart in every frame."""
    unit, used = size / 32, wanted.shape >= 0
    margin = np.where(used, radius * render.EXTENT + render.BORDER * unit, 0.0)[..., None]
    low, high = (margin - path.min(1))[:, None], (size - margin - path.max(1))[:, None]
    trial = rng.uniform(low, high, size=(len(used), _CANDIDATES, MAX_MOVERS, 2))
    offset = (trial[:, :, 0] - trial[:, :, 1])[:, :, None] + (path[:, :, 0] - path[:, :, 1])[:, None]
    apart = (radius * render.EXTENT).sum(1) + render.GAP * unit
    alone = ~used.all(axis=1, keepdims=True)
    valid = (np.abs(offset).max(-1).min(-1) >= apart[:, None]) | alone
    return trial[np.arange(len(used)), valid.argmax(1)], valid.any(1)


def draw(scenes: MovingScenes, rng: np.random.Generator, size: int = 32) -> np.ndarray:
    """The videos of `scenes`, each on one dark grey of slightly random level: uint8 [N, frames, size, size, 3]."""
    count, frames = scenes.center.shape[:2]
    background = np.repeat(render.background_levels(count, rng), frames, axis=0)
    return render.draw(scenes.frames, rng, size, background).reshape(count, frames, size, size, 3)


def render_batch(
    prompts: Sequence[MovingPrompt], rng: np.random.Generator, size: int = 32, frames: int = FRAMES
) -> np.ndarray:
    """One random video per prompt that shows exactly what it says: uint8 [N, frames, size, size, 3]."""
    return draw(sample_scenes(prompts, rng, size, frames), rng, size)


def first_frame(text: str, seed: int, size: int = 32, frames: int = FRAMES) -> np.ndarray:
    """The first frame of a random video of the prompt `text`: uint8 [size, size, 3], a function of its arguments."""
    return render_batch([parse(text)], np.random.default_rng([seed, *text.encode()]), size, frames)[0, 0]
