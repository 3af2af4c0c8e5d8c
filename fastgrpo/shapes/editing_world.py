"""Edits of the embedded world's images: one object recoloured, moved, added or removed, and everything else kept.

The set of edits is closed: `all_prompts` enumerates it, `parse_image` inverts the name of a source image, `split`
divides it by meaning. Colours and shapes are those of the still world (`world.py`).
"""

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from fastgrpo.shapes.world import COLORS, SHAPES, ObjectSpec, split_by_meaning
from fastgrpo.shapes.world import vocabulary as still_vocabulary

DIRECTIONS: dict[str, tuple[int, int]] = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
CATEGORIES: tuple[str, ...] = ("recolor", "move", "add", "remove")
# Objects of a source image, and slots of an edit: those, and one that is added.
MAX_SOURCES = 2
MAX_SLOTS = MAX_SOURCES + 1


@dataclass(frozen=True)
class EditPrompt:
    """An edit and its meaning: the source image shows `source`, and the result shows `result`.

    Both have one entry a slot, in the same order: None in `source` is an object that is added, None in `result` one
    that is removed. `edited` is the slot that the text speaks of.
    """

    text: str
    category: str
    source: tuple[ObjectSpec | None, ...]
    result: tuple[ObjectSpec | None, ...]
    edited: int
    direction: str | None = None

    @property
    def meaning(self) -> tuple:
        """A key that two prompts share exactly when they ask for the same change of the same objects."""
        return self.text, tuple(sorted(o.phrase for o in self.source if o is not None))

    @property
    def caption(self) -> str:
        """What the source image shows: 'a red circle and a green cross'."""
        return " and ".join(o.phrase for o in self.source if o is not None)


class EditSlots(NamedTuple):
    """Edits as arrays, MAX_SLOTS slots each; a slot that is empty there has shape -1."""

    source_shape: np.ndarray  # [N, MAX_SLOTS], index into SHAPES
    source_color: np.ndarray  # [N, MAX_SLOTS], index into COLORS
    shape: np.ndarray  # [N, MAX_SLOTS], of the result
    color: np.ndarray  # [N, MAX_SLOTS], of the result
    edited: np.ndarray  # [N], the slot that changes
    direction: np.ndarray  # [N, 2], unit (x, y) of a move, y down; 0 where nothing moves


@functools.cache
def _slots(prompt: EditPrompt) -> EditSlots:
    before_shape, before_color, after_shape, after_color = (np.full(MAX_SLOTS, -1) for _ in range(4))
    sides = ((prompt.source, before_shape, before_color), (prompt.result, after_shape, after_color))
    for objects, shape, color in sides:
        for slot, spec in enumerate(objects):
            if spec is not None:
                assert spec.color is not None
                shape[slot], color[slot] = SHAPES.index(spec.shape), list(COLORS).index(spec.color)
    direction = (0, 0) if prompt.direction is None else DIRECTIONS[prompt.direction]
    edited, way = np.array(prompt.edited), np.array(direction, dtype=np.float64)
    return EditSlots(before_shape, before_color, after_shape, after_color, edited, way)


def slots(prompts: Sequence[EditPrompt]) -> EditSlots:
    """What each edit asks for, as arrays."""
    return EditSlots(*(np.stack(column) for column in zip(*map(_slots, prompts), strict=True)))


def _edits(source: tuple[ObjectSpec, ...]) -> list[EditPrompt]:
    """Every edit of an image of these objects, whose shapes differ: "the circle" names one."""
    edits = []
    for place, spec in enumerate(source):
        others = [ObjectSpec(spec.shape, color) for color in COLORS if color != spec.color]

        def changed(
            text: str,
            category: str,
            to: ObjectSpec | None,
            direction: str | None = None,
            place: int = place,
        ) -> EditPrompt:
            result = (*source[:place], to, *source[place + 1 :])
            return EditPrompt(text, category, source, result, place, direction)

        edits += [changed(f"make the {spec.shape} {to.color}", "recolor", to) for to in others]
        edits += [changed(f"move the {spec.shape} {way}", "move", spec, way) for way in DIRECTIONS]
        if len(source) > 1:
            edits.append(changed(f"remove the {spec.shape}", "remove", None))
    shapes = {spec.shape for spec in source}
    for new in (ObjectSpec(shape, color) for color in COLORS for shape in SHAPES if shape not in shapes):
        edits.append(EditPrompt(f"add {new.phrase}", "add", (*source, None), (*source, new), len(source)))
    return edits


@functools.cache
def all_prompts() -> tuple[EditPrompt, ...]:
    """Every edit of every set of objects, in a fixed order."""
    kinds = [ObjectSpec(shape, color) for color in COLORS for shape in SHAPES]
    pairs = [pair for pair in itertools.combinations(kinds, 2) if pair[0].shape != pair[1].shape]
    return tuple(edit for source in [*((kind,) for kind in kinds), *pairs] for edit in _edits(source))


@functools.cache
def _by_name() -> dict[tuple[str, str], EditPrompt]:
    return {(p.caption, p.text): p for p in all_prompts()}


def image_name(prompt: EditPrompt, seed: int) -> str:
    """The name of a source image of the edit: `editing:<seed>:<objects>:<edit>`, as `Prompt.image` has it."""
    return f"editing:{seed}:{prompt.caption}:{prompt.text}"


def parse_image(name: str) -> tuple[EditPrompt, int]:
    """The edit and the seed of a source image's name; raises ValueError for what is none."""
    kind, _, rest = name.partition(":")
    seed, _, rest = rest.partition(":")
    caption, _, text = rest.partition(":")
    prompt = _by_name().get((caption, text))
    if kind != "editing" or not seed.isdecimal() or prompt is None:
        raise ValueError(f"not a source image of the editing world: {name!r}")
    return prompt, int(seed)


@functools.cache
def vocabulary() -> tuple[str, ...]:
    """The still world's words, and after them every other word of an edit, sorted."""
    still = still_vocabulary()
    return (*still, *sorted({word for p in all_prompts() for word in p.text.split()} - set(still)))


@functools.cache
def split() -> tuple[tuple[EditPrompt, ...], tuple[EditPrompt, ...]]:
    """(train, held-out): a fixed split, about 80/20 in every category, by meaning: no held-out edit of the same objects
    is trained on."""
    return split_by_meaning(all_prompts(), CATEGORIES)
