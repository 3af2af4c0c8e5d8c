"""Prompts of the moving world: one or two coloured shapes that stand, or move at a steady speed.

The prompt set is closed: `all_prompts` enumerates it, `parse` inverts it, `split` divides it by meaning. Colours and
shapes are those of the still world (`world.py`).
"""

import difflib
import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from fastgrpo.shapes.world import COLORS, SHAPES, ObjectSpec, split_by_meaning

DIRECTIONS: dict[str, tuple[int, int]] = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
SPEEDS: tuple[str, ...] = ("slowly", "fast")
CATEGORIES: tuple[str, ...] = ("stand", "direction", "speed", "one_moves", "both_move")
MAX_MOVERS = 2
# Frames of a video unless said otherwise: 4k + 1, as the video autoencoders take them.
FRAMES = 9


@dataclass(frozen=True)
class Mover:
    """One object and its motion; `direction` None stands, `speed` None is any speed."""

    shape: str
    color: str
    direction: str | None = None
    speed: str | None = None

    @property
    def object(self) -> ObjectSpec:
        """What it is, as the still world says it."""
        return ObjectSpec(self.shape, self.color)

    @property
    def phrase(self) -> str:
        """'a red circle stands', 'a red circle moves right', 'a red circle moves right slowly'."""
        motion = "stands" if self.direction is None else f"moves {self.direction}"
        return " ".join(word for word in (self.object.phrase, motion, self.speed) if word)


@dataclass(frozen=True)
class MovingPrompt:
    """A prompt and its meaning."""

    text: str
    category: str
    movers: tuple[Mover, ...]

    @property
    def meaning(self) -> tuple[Mover, ...]:
        """A key that two prompts share exactly when they ask for the same videos."""
        return tuple(sorted(self.movers, key=lambda m: m.phrase))


class MovingSlots(NamedTuple):
    """Prompts as arrays, one slot an object, in the order of the text; an unused slot has shape -1."""

    shape: np.ndarray  # [N, MAX_MOVERS], index into SHAPES
    color: np.ndarray  # [N, MAX_MOVERS], index into COLORS
    direction: np.ndarray  # [N, MAX_MOVERS, 2], unit (x, y), y down; 0 where the object stands
    speed: np.ndarray  # [N, MAX_MOVERS], index into SPEEDS; -1 is any speed


@functools.cache
def _slots(prompt: MovingPrompt) -> MovingSlots:
    shape, color, speed = (np.full(MAX_MOVERS, -1) for _ in range(3))
    direction = np.zeros((MAX_MOVERS, 2))
    for i, mover in enumerate(prompt.movers):
        shape[i], color[i] = SHAPES.index(mover.shape), list(COLORS).index(mover.color)
        if mover.direction is not None:
            direction[i] = DIRECTIONS[mover.direction]
        if mover.speed is not None:
            speed[i] = SPEEDS.index(mover.speed)
    return MovingSlots(shape, color, direction, speed)


def slots(prompts: Sequence[MovingPrompt]) -> MovingSlots:
    """What each prompt asks for, as arrays."""
    return MovingSlots(*(np.stack(column) for column in zip(*map(_slots, prompts), strict=True)))


def _prompt(category: str, *movers: Mover) -> MovingPrompt:
    return MovingPrompt(", ".join(m.phrase for m in movers), category, movers)


@functools.cache
def all_prompts() -> tuple[MovingPrompt, ...]:
    """Every prompt of the world, each text once, in a fixed order."""
    kinds = [(shape, color) for color in COLORS for shape in SHAPES]
    # Both attributes differ, so that a swap of colours or of motions is always an error.
    pairs = [(a, b) for a in kinds for b in kinds if a[0] != b[0] and a[1] != b[1]]
    return (
        *(_prompt("stand", Mover(*k)) for k in kinds),
        *(_prompt("direction", Mover(*k, d)) for k in kinds for d in DIRECTIONS),
        *(_prompt("speed", Mover(*k, d, s)) for k in kinds for d in DIRECTIONS for s in SPEEDS),
        *(_prompt("one_moves", Mover(*a, d), Mover(*b)) for a, b in pairs for d in DIRECTIONS),
        *(_prompt("one_moves", Mover(*a), Mover(*b, d)) for a, b in pairs for d in DIRECTIONS),
        *(
            _prompt("both_move", Mover(*a, d), Mover(*b, e))
            for a, b in pairs
            for d, e in itertools.product(DIRECTIONS, DIRECTIONS)
        ),
    )


@functools.cache
def _by_text() -> dict[str, MovingPrompt]:
    return {p.text: p for p in all_prompts()}


def parse(text: str) -> MovingPrompt:
    """The prompt whose text is `text`, exactly; raises ValueError naming the text and the nearest prompt."""
    prompt = _by_text().get(text)
    if prompt is None:
        near = difflib.get_close_matches(text, _by_text(), n=1, cutoff=0.0)[0]
        raise ValueError(f"not a prompt of the moving world: {text!r}; the nearest is {near!r}")
    return prompt


def image_name(prompt: MovingPrompt, seed: int) -> str:
    """The name of a first frame of the prompt: `moving:<seed>:<caption>`, as `Prompt.image` has it."""
    return f"moving:{seed}:{prompt.text}"


@functools.cache
def vocabulary() -> tuple[str, ...]:
    """Every word that occurs in a prompt, the comma among them, sorted."""
    return tuple(sorted({word for p in all_prompts() for word in p.text.replace(",", " ,").split()}))


@functools.cache
def split() -> tuple[tuple[MovingPrompt, ...], tuple[MovingPrompt, ...]]:
    """(train, held-out): a fixed split, about 80/20 in every category.

    It divides meanings, not only texts: no held-out prompt is a reordering of a training prompt.
    """
    return split_by_meaning(all_prompts(), CATEGORIES)
