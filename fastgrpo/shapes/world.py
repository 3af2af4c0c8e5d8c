"""Prompts of the embedded world: coloured shapes, in the six categories of GenEval (arXiv 2310.11513).

The prompt set is closed: `all_prompts` enumerates it, `parse` inverts it, `split` divides it by meaning.
"""

import difflib
import functools
import hashlib
import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np

# Near the corners of the RGB cube: mixing with the dark background under blur changes brightness, not hue.
COLORS: dict[str, tuple[int, int, int]] = {
    "red": (230, 40, 40),
    "green": (40, 200, 50),
    "blue": (45, 75, 240),
    "yellow": (240, 220, 40),
    "magenta": (220, 50, 220),
    "cyan": (40, 215, 225),
}
SHAPES: tuple[str, ...] = ("circle", "square", "triangle", "cross")
RELATIONS: tuple[str, ...] = ("left of", "right of", "above", "below")
COUNTS: dict[str, int] = {"two": 2, "three": 3, "four": 4}
CATEGORIES: tuple[str, ...] = (
    "single_object",
    "two_object",
    "counting",
    "colors",
    "position",
    "color_attribution",
)
MAX_OBJECTS = 4

_PLURALS = {"circle": "circles", "square": "squares", "triangle": "triangles", "cross": "crosses"}
_OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
_DIRECTION = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}


@dataclass(frozen=True)
class ObjectSpec:
    """One kind of object a prompt asks for; `color` None means that any colour is right, per object."""

    shape: str
    color: str | None = None
    count: int = 1

    @property
    def phrase(self) -> str:
        """The words of this object in a prompt: 'a circle', 'a red circle', 'two red circles'."""
        number = next((word for word, n in COUNTS.items() if n == self.count), "a")
        noun = self.shape if self.count == 1 else _PLURALS[self.shape]
        return " ".join(word for word in (number, self.color, noun) if word)


@dataclass(frozen=True)
class ShapesPrompt:
    """A prompt and its meaning; with a `relation`, `objects[0]` stands in that relation to `objects[1]`."""

    text: str
    category: str
    objects: tuple[ObjectSpec, ...]
    relation: str | None = None

    @property
    def meaning(self) -> tuple:
        """A key that two prompts share exactly when they ask for the same images."""
        if self.relation in ("right of", "below"):
            return self.objects[::-1], _OPPOSITE[self.relation]
        if self.relation is None:
            return tuple(sorted(self.objects, key=lambda o: o.phrase)), None
        return self.objects, self.relation


class Slots(NamedTuple):
    """Prompts as arrays, one slot an object, in the order of the text; an unused slot has shape -1."""

    shape: np.ndarray  # [N, MAX_OBJECTS], index into SHAPES
    color: np.ndarray  # [N, MAX_OBJECTS], index into COLORS; -1 is any colour
    direction: np.ndarray  # [N, 2], unit (x, y) from the second object to the first, y down; 0 without a relation


@functools.cache
def _slots(prompt: ShapesPrompt) -> Slots:
    specs = [o for o in prompt.objects for _ in range(o.count)]
    shape = np.full(MAX_OBJECTS, -1)
    color = np.full(MAX_OBJECTS, -1)
    shape[: len(specs)] = [SHAPES.index(o.shape) for o in specs]
    color[: len(specs)] = [-1 if o.color is None else list(COLORS).index(o.color) for o in specs]
    direction = _DIRECTION[prompt.relation] if prompt.relation is not None else (0, 0)
    return Slots(shape, color, np.array(direction, dtype=np.float64))


def slots(prompts: Sequence[ShapesPrompt]) -> Slots:
    """What each prompt asks for, as arrays."""
    return Slots(*(np.stack(column) for column in zip(*map(_slots, prompts), strict=True)))


def _prompt(category: str, *objects: ObjectSpec, relation: str | None = None) -> ShapesPrompt:
    text = f" {relation or 'and'} ".join(o.phrase for o in objects)
    return ShapesPrompt(text, category, objects, relation)


@functools.cache
def all_prompts() -> tuple[ShapesPrompt, ...]:
    """Every prompt of the world, each text once, in a fixed order."""
    plain = [ObjectSpec(shape) for shape in SHAPES]
    colored = [ObjectSpec(shape, color) for color in COLORS for shape in SHAPES]
    plain_pairs = list(itertools.permutations(plain, 2))
    # GenEval's attribution prompts: both attributes differ, so that a swap of colours is always an error.
    colored_pairs = [(a, b) for a in colored for b in colored if a.shape != b.shape and a.color != b.color]
    groups = [ObjectSpec(o.shape, o.color, n) for n in COUNTS.values() for o in plain + colored]
    return (
        *(_prompt("single_object", o) for o in plain),
        *(_prompt("two_object", a, b) for a, b in plain_pairs),
        *(_prompt("counting", o) for o in groups),
        *(_prompt("colors", o) for o in colored),
        *(_prompt("position", a, b, relation=r) for r in RELATIONS for a, b in plain_pairs + colored_pairs),
        *(_prompt("color_attribution", a, b) for a, b in colored_pairs),
    )


@functools.cache
def _by_text() -> dict[str, ShapesPrompt]:
    return {p.text: p for p in all_prompts()}


def parse(text: str) -> ShapesPrompt:
    """The prompt whose text is `text`, exactly; raises ValueError naming the text and the nearest prompt."""
    prompt = _by_text().get(text)
    if prompt is None:
        near = difflib.get_close_matches(text, _by_text(), n=1, cutoff=0.0)[0]
        raise ValueError(f"not a prompt of the shapes world: {text!r}; the nearest is {near!r}")
    return prompt


@functools.cache
def vocabulary() -> tuple[str, ...]:
    """Every word that occurs in a prompt, sorted."""
    return tuple(sorted({word for p in all_prompts() for word in p.text.split()}))


@functools.cache
def split() -> tuple[tuple[ShapesPrompt, ...], tuple[ShapesPrompt, ...]]:
    """(train, held-out): a fixed split, about 80/20 in every category.

    It divides meanings, not only texts: no held-out prompt is a reordering of a training prompt.
    """
    return split_by_meaning(all_prompts(), CATEGORIES)


def split_by_meaning(prompts: Sequence[Any], categories: Sequence[str]) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """(train, held-out) prompts of any world: of each category a fifth of the meanings is held out, by their hash."""
    held_out: set[tuple] = set()
    for category in categories:
        meanings = {p.meaning for p in prompts if p.category == category}
        ranked = sorted(meanings, key=lambda m: hashlib.sha256(repr(m).encode()).digest())
        held_out.update((category, m) for m in ranked[: max(1, round(len(ranked) / 5))])
    train = tuple(p for p in prompts if (p.category, p.meaning) not in held_out)
    return train, tuple(p for p in prompts if (p.category, p.meaning) in held_out)


class Captioned(Protocol):
    """A prompt of any world: its text, and the category it is drawn from."""

    @property
    def text(self) -> str: ...

    @property
    def category(self) -> str: ...


AnyPrompt = TypeVar("AnyPrompt", bound=Captioned)


def eval_set(
    prompts: Sequence[AnyPrompt], n: int, seed: int, categories: Sequence[str] = CATEGORIES
) -> list[AnyPrompt]:
    """`n` of `prompts`, the same number of each category to within one, repeated where a category has too few.

    Deterministic in `seed`; the set for a smaller `n` is a prefix of the set for a larger one.
    """
    shuffled = []
    for category in sorted({p.category for p in prompts}, key=categories.index):
        members = sorted((p for p in prompts if p.category == category), key=lambda p: p.text)
        random.Random(f"{seed} {category}").shuffle(members)
        shuffled.append(itertools.cycle(members))
    if not shuffled:
        raise ValueError("prompts: eval_set needs at least one prompt")
    return [next(shuffled[i % len(shuffled)]) for i in range(n)]
