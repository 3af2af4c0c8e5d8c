"""Ground truth of the editing world: source images and what an edit makes of them, drawn as the still world draws."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fastgrpo.shapes import render
from fastgrpo.shapes.editing_world import MAX_SLOTS, EditPrompt, parse_image, slots
from fastgrpo.shapes.world import MAX_OBJECTS

# Least and greatest radius; the row is the number of objects of source and result together. Pixels of a 32-pixel image,
# as all lengths here.
_RADII = np.array([(0.0, 0.0), (5.0, 7.0), (4.4, 5.4), (3.9, 4.6)])
# Least and greatest way of an object that is moved.
WAY = (6.5, 9.5)
_CANDIDATES = 16


@dataclass(frozen=True)
class EditScenes:
    """What N edits start from and end with. Objects are in the slots of their prompt; an empty slot has shape -1."""

    shape: np.ndarray  # [2, N, MAX_SLOTS], index into SHAPES: of the source, of the result
    color: np.ndarray  # [2, N, MAX_SLOTS], index into COLORS
    center: np.ndarray  # [2, N, MAX_SLOTS, 2], (x, y) in pixels
    radius: np.ndarray  # [N, MAX_SLOTS], pixels
    background: np.ndarray  # [N, 1], grey level of both

    def __getitem__(self, rows: slice | np.ndarray) -> "EditScenes":
        """The scenes of some edits."""
        return EditScenes(
            self.shape[:, rows], self.color[:, rows], self.center[:, rows], self.radius[rows], self.background[rows]
        )

    @staticmethod
    def concatenate(parts: Sequence["EditScenes"]) -> "EditScenes":
        """The scenes of consecutive parts."""
        axes = {"shape": 1, "color": 1, "center": 1, "radius": 0, "background": 0}
        return EditScenes(*(np.concatenate([getattr(p, name) for p in parts], axis) for name, axis in axes.items()))

    def draw(self, result: bool, size: int = 32) -> np.ndarray:
        """uint8 [N, size, size, 3]: the source images, or the results."""
        spare = ((0, 0), (0, MAX_OBJECTS - MAX_SLOTS))
        scenes = render.Scenes(
            np.pad(self.shape[int(result)], spare, constant_values=-1),
            np.pad(self.color[int(result)], spare),
            np.pad(self.center[int(result)], (*spare, (0, 0))),
            np.pad(self.radius, spare),
        )
        return render.draw(scenes, np.random.default_rng(0), size, self.background)


def sample_scenes(prompts: Sequence[EditPrompt], rng: np.random.Generator, size: int = 32) -> EditScenes:
    """One random scene an edit: objects well apart in the source and in the result, for images of `size` pixels.

    Sizes, ways and places are drawn together until they fit.
    """
    wanted, unit = slots(prompts), size / 32
    count, there = len(prompts), (wanted.source_shape >= 0) | (wanted.shape >= 0)
    center, radius = np.zeros((2, count, MAX_SLOTS, 2)), np.zeros((count, MAX_SLOTS))
    pending = np.arange(count)
    while len(pending):
        used = there[pending]
        low, high = _RADII[used.sum(1)].T[..., None]
        trial = rng.uniform(low, high, size=used.shape) * unit
        way = np.zeros((len(pending), MAX_SLOTS, 2))
        direction = wanted.direction[pending] * rng.uniform(*WAY, size=(len(pending), 1)) * unit
        way[np.arange(len(pending)), wanted.edited[pending]] = direction
        start, found = _place(used, trial, way, rng, size)
        center[:, pending[found]] = np.stack([start, start + way])[:, found]
        radius[pending[found]] = trial[found]
        pending = pending[~found]
    return EditScenes(
        np.stack([wanted.source_shape, wanted.shape]),
        np.stack([wanted.source_color, wanted.color]).clip(0),
        center,
        radius,
        render.background_levels(count, rng),
    )


def _place(
    used: np.ndarray, radius: np.ndarray, way: np.ndarray, rng: np.random.Generator, size: int
) -> tuple[np.ndarray, np.ndarray]:
    """Centres in the source [N, MAX_SLOTS, 2], and whether they fit: inside the image and apart, before and after."""
    unit = size / 32
    extent = np.where(used, radius * render.EXTENT, 0.0)
    margin = (extent + render.BORDER * unit)[..., None]
    low, high = margin - np.minimum(way, 0), size - margin - np.maximum(way, 0)
    trial = rng.uniform(low[:, None], high[:, None], size=(len(used), _CANDIDATES, MAX_SLOTS, 2))
    first, second = np.triu_indices(MAX_SLOTS, 1)
    apart = (extent[:, first] + extent[:, second] + render.GAP * unit)[:, None]
    both = (used[:, first] & used[:, second])[:, None]
    valid = np.ones(trial.shape[:2], dtype=bool)
    for at in (trial, trial + way[:, None]):
        valid &= ((np.abs(at[:, :, first] - at[:, :, second]).max(-1) >= apart) | ~both).all(-1)
    return trial[np.arange(len(used)), valid.argmax(1)], valid.any(1)


def render_batch(
    prompts: Sequence[EditPrompt], rng: np.random.Generator, size: int = 32
) -> tuple[np.ndarray, np.ndarray]:
    """One random source image an edit, and what the edit makes of it: uint8 [N, size, size, 3] each."""
    scenes = sample_scenes(prompts, rng, size)
    return scenes.draw(result=False, size=size), scenes.draw(result=True, size=size)


@functools.lru_cache(maxsize=4096)
def scene_of(name: str, size: int = 32) -> EditScenes:
    """The one scene that the name of a source image stands for, a function of its arguments."""
    prompt, seed = parse_image(name)
    return sample_scenes([prompt], np.random.default_rng([seed, *name.encode()]), size)


def source_image(name: str, size: int = 32) -> np.ndarray:
    """The source image of a name (`editing_world.image_name`): uint8 [size, size, 3]."""
    return scene_of(name, size).draw(result=False, size=size)[0]
