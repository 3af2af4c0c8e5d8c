"""The embedded world: prompts, their split, and the renderer."""

import hashlib
from collections import Counter

import numpy as np
import pytest

from fastgrpo.shapes.render import AREAS, CENTROIDS, DISTANCES, draw, render, render_batch, sample_scenes
from fastgrpo.shapes.world import (
    CATEGORIES,
    COLORS,
    MAX_OBJECTS,
    SHAPES,
    ObjectSpec,
    ShapesPrompt,
    all_prompts,
    eval_set,
    parse,
    slots,
    split,
    vocabulary,
)


def test_every_text_is_unique_and_parses_to_its_own_prompt():
    prompts = all_prompts()
    assert len({p.text for p in prompts}) == len(prompts)
    assert all(parse(p.text) is p for p in prompts)
    assert {p.category for p in prompts} == set(CATEGORIES)
    assert max(len(p.text.split()) for p in prompts) <= 9
    assert vocabulary() == tuple(sorted({w for p in prompts for w in p.text.split()}))


@pytest.mark.parametrize(
    "text, expected",
    [
        ("a circle", ShapesPrompt("a circle", "single_object", (ObjectSpec("circle"),))),
        ("two blue squares", ShapesPrompt("two blue squares", "counting", (ObjectSpec("square", "blue", 2),))),
        ("four crosses", ShapesPrompt("four crosses", "counting", (ObjectSpec("cross", None, 4),))),
        (
            "a red circle left of a green square",
            ShapesPrompt(
                "a red circle left of a green square",
                "position",
                (ObjectSpec("circle", "red"), ObjectSpec("square", "green")),
                "left of",
            ),
        ),
    ],
)
def test_a_text_means_what_it_says(text, expected):
    assert parse(text) == expected


@pytest.mark.parametrize("text", ["a red circel", "A red circle", "a red circle ", "", "five circles"])
def test_an_unknown_text_is_named(text):
    with pytest.raises(ValueError) as error:
        parse(text)
    assert repr(text) in str(error.value)


def test_meanings_coincide_exactly_for_reordered_prompts():
    def meaning(text):
        return parse(text).meaning

    assert meaning("a red circle left of a blue square") == meaning("a blue square right of a red circle")
    assert meaning("a circle above a square") == meaning("a square below a circle")
    assert meaning("a circle and a square") == meaning("a square and a circle")
    assert meaning("a circle left of a square") != meaning("a square left of a circle")
    assert meaning("a red circle and a blue square") != meaning("a blue circle and a red square")


def test_split_divides_meanings_in_every_category_and_leaves_no_new_word():
    train, held_out = split()
    assert sorted(p.text for p in train + held_out) == sorted(p.text for p in all_prompts())
    assert not {p.meaning for p in train} & {p.meaning for p in held_out}
    total, held = (Counter(p.category for p in part) for part in (all_prompts(), held_out))
    assert all(0.15 <= held[c] / total[c] <= 0.26 for c in CATEGORIES)
    assert {w for p in held_out for w in p.text.split()} <= {w for p in train for w in p.text.split()}


def test_split_never_changes():
    # The shipped weights were trained on one side of it.
    digest = hashlib.sha256("\n".join(p.text for p in split()[1]).encode()).hexdigest()
    assert digest[:16] == "9aed644f73b5627d"


def test_eval_set_is_balanced_nested_and_seeded():
    held_out = split()[1]
    chosen = eval_set(held_out, 100, seed=3)
    assert set(chosen) <= set(held_out)
    counts = Counter(p.category for p in chosen)
    assert set(counts) == set(CATEGORIES)
    assert max(counts.values()) - min(counts.values()) <= 1
    assert eval_set(held_out[::-1], 40, seed=3) == chosen[:40]
    assert eval_set(held_out, 100, seed=4) != chosen
    assert max(Counter(p for p in eval_set(held_out, 6 * 72, 0) if p.category == "color_attribution").values()) == 1
    with pytest.raises(ValueError, match="prompts"):
        eval_set([], 4, 0)


def test_slots_are_the_objects_in_order():
    shape, color, direction = slots([parse("three red crosses"), parse("a circle above a square")])
    assert shape.tolist() == [[3, 3, 3, -1], [0, 1, -1, -1]]
    assert color[0].tolist() == [0, 0, 0, -1]
    assert (color[1] == -1).all()
    assert direction.tolist() == [[0, 0], [0, -1]]


@pytest.mark.parametrize("index", range(len(SHAPES)), ids=SHAPES)
def test_areas_and_centroids_are_those_of_the_distances(index):
    grid = (np.arange(2000) + 0.5) / 500 - 2
    inside = DISTANCES[index](grid[None], grid[:, None], np.array(1.0)) < 0
    assert inside.mean() * 16 == pytest.approx(AREAS[index], rel=2e-3)
    assert (inside * grid[:, None]).sum() / inside.sum() == pytest.approx(CENTROIDS[index], abs=2e-3)


@pytest.mark.parametrize("size", [32, 64])
def test_scenes_obey_their_prompts(size):
    prompts = eval_set(all_prompts(), 1200, seed=1)
    scenes = sample_scenes(prompts, np.random.default_rng(0), size)
    wanted = slots(prompts)
    used = wanted.shape >= 0
    assert (scenes.shape == wanted.shape).all()
    assert (scenes.color == wanted.color)[wanted.color >= 0].all()
    assert set(scenes.color[used & (wanted.color < 0)]) == set(range(len(COLORS)))
    # Whole objects, at least two pixels of a 32-pixel image apart.
    reach = scenes.radius[..., None] * 1.08
    assert ((scenes.center - reach >= 0) & (scenes.center + reach <= size))[used].all()
    for i in range(MAX_OBJECTS):
        for j in range(i):
            gap = np.abs(scenes.center[:, i] - scenes.center[:, j]).max(-1) - (reach[:, i] + reach[:, j])[:, 0]
            assert (gap[used[:, i] & used[:, j]] >= 2 * size / 32).all()
    delta = scenes.center[:, 0] - scenes.center[:, 1]
    along = (delta * wanted.direction).sum(1)
    across = np.abs(delta).sum(1) - np.abs(along)
    assert (along > across)[wanted.direction.any(1)].all()


def test_images_show_their_scenes():
    prompts = eval_set(all_prompts(), 300, seed=2)
    rng = np.random.default_rng(5)
    scenes = sample_scenes(prompts, rng)
    images = draw(scenes, rng)
    assert images.shape == (300, 32, 32, 3)
    assert images.dtype == np.uint8
    palette = np.array(list(COLORS.values()))
    for i, k in zip(*np.nonzero(scenes.shape >= 0), strict=True):
        x, y = scenes.center[i, k].astype(int)
        assert (images[i, y, x] == palette[scenes.color[i, k]]).all()
    # The amount of paint is the area of the shapes: nothing is lost, and nothing is drawn besides.
    contrast = images[..., 0].astype(float) - np.median(images[..., 0], axis=(1, 2))[:, None, None]
    paint = palette[scenes.color][..., 0] - np.median(images[..., 0], axis=(1, 2))[:, None]
    area = np.where(scenes.shape >= 0, np.array(AREAS)[scenes.shape] * scenes.radius**2, 0)
    expected = (paint * area).sum(1)
    assert np.abs(contrast.sum((1, 2)) - expected).max() < 0.05 * np.abs(paint * area).sum(1).max()


def test_rendering_is_a_function_of_the_generator():
    prompts = eval_set(all_prompts(), 60, seed=0)
    first, again, other = (render_batch(prompts, np.random.default_rng(s)) for s in (7, 7, 8))
    assert (first == again).all()
    assert (first != other).any((1, 2, 3)).all()
    assert (
        render(prompts[0], np.random.default_rng(7)) == render_batch(prompts[:1], np.random.default_rng(7))[0]
    ).all()
