"""The editing world: its edits and scenes, and the verifier against ground truth and against what is not the edit."""

from collections import Counter

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter

from fastgrpo.config import RewardSpec
from fastgrpo.data.prompts import Prompt, load_prompts, open_image
from fastgrpo.rewards import load_reward
from fastgrpo.shapes import editing_world as world
from fastgrpo.shapes import world as still
from fastgrpo.shapes.editing_render import WAY, EditScenes, render_batch, sample_scenes, scene_of, source_image
from fastgrpo.shapes.editing_verifier import verify
from fastgrpo.shapes.editing_world import CATEGORIES, DIRECTIONS, all_prompts, image_name, parse_image

N = 400


def to_float(images: np.ndarray) -> np.ndarray:
    return images.transpose(0, 3, 1, 2).astype(np.float32) / 255


def decoded(images: np.ndarray) -> np.ndarray:
    """Images as a small autoencoder might return them: blurred and noisy."""
    error = np.random.default_rng(9).normal(0, 0.02, images.shape).astype(np.float32)
    return gaussian_filter(images, (0, 0, 0.5, 0.5)) + error


@pytest.fixture(scope="module")
def truth():
    """Prompts, their scenes, source images and results."""
    prompts = still.eval_set(all_prompts(), N, seed=11, categories=CATEGORIES)
    scenes = sample_scenes(prompts, np.random.default_rng(12))
    return prompts, scenes, to_float(scenes.draw(result=False)), to_float(scenes.draw(result=True))


def of(prompts, category):
    return np.array([p.category == category for p in prompts])


def test_edits_are_closed_distinct_and_parsed():
    prompts = all_prompts()
    assert len({(p.caption, p.text) for p in prompts}) == len(prompts) == 7560
    texts = {p.text for p in prompts}
    assert {"make the circle blue", "move the square left", "add a green cross", "remove the triangle"} <= texts
    for prompt in prompts[::90]:
        assert parse_image(image_name(prompt, 5)) == (prompt, 5)
    for name in ("moving:1:a red circle:x", "editing:x:a red circle:add a blue cross", "editing:1:a red circle:fly"):
        with pytest.raises(ValueError, match="not a source image of the editing world"):
            parse_image(name)
    # The words of the still world keep their places: a model that knows them can learn the others.
    assert world.vocabulary()[: len(still.vocabulary())] == still.vocabulary()
    assert {word for p in prompts for word in p.text.split()} <= set(world.vocabulary())


def test_split_divides_meanings_in_every_category():
    train, held_out = world.split()
    assert len(train) + len(held_out) == len(all_prompts())
    assert not {p.meaning for p in train} & {p.meaning for p in held_out}
    total, held = (Counter(p.category for p in part) for part in (all_prompts(), held_out))
    assert all(0.15 <= held[c] / total[c] <= 0.25 for c in CATEGORIES)


@pytest.mark.parametrize("part_name", ["train", "heldout"])
def test_the_prompt_sets_are_balanced_and_name_their_source_images(part_name):
    prompts = load_prompts(f"editing:{part_name}")
    counts = Counter(p.metadata["category"] for p in prompts)
    assert counts == dict.fromkeys(CATEGORIES, 160)
    assert len({p.image for p in prompts}) == len(prompts)
    image = prompts[3].image
    assert image is not None
    np.testing.assert_array_equal(np.asarray(open_image(image)), source_image(image))
    assert not np.array_equal(source_image(image), source_image(image.replace("editing:3:", "editing:4:")))


def test_scenes_change_the_edited_object_alone(truth):
    prompts, scenes, _, _ = truth
    wanted = world.slots(prompts)
    rows, edited = np.arange(N), wanted.edited
    stays = (wanted.source_shape >= 0) & (np.arange(world.MAX_SLOTS) != edited[:, None])
    for kept in (scenes.shape, scenes.color, scenes.center):
        np.testing.assert_array_equal(kept[0][stays], kept[1][stays])
    way = (scenes.center[1] - scenes.center[0])[rows, edited]
    moved = of(prompts, "move")
    along = (way * wanted.direction).sum(1)
    assert WAY[0] <= along[moved].min() <= along[moved].max() <= WAY[1]
    np.testing.assert_allclose(way[moved], along[moved, None] * wanted.direction[moved], atol=1e-9)
    assert not way[~moved].any()
    assert (scenes.shape[1][rows, edited][of(prompts, "remove")] == -1).all()
    for state in (0, 1):
        used = scenes.shape[state] >= 0
        low = (scenes.center[state] - scenes.radius[..., None]).min(-1)
        high = (scenes.center[state] + scenes.radius[..., None]).max(-1)
        assert low[used].min() >= 0
        assert high[used].max() <= 32


@pytest.mark.parametrize("view", ["rendered", "decoded"])
def test_ground_truth_passes_and_doing_nothing_does_not(truth, view):
    prompts, scenes, source, result = truth
    seen = decoded if view == "decoded" else np.asarray
    verdict, idle = verify(seen(result), prompts, scenes), verify(seen(source), prompts, scenes)
    for category in CATEGORIES:
        rows = of(prompts, category)
        assert verdict.strict[rows].mean() >= (1 if view == "rendered" else 0.97)
        assert verdict.edit[rows].mean() >= (0.95 if view == "rendered" else 0.85)
        assert verdict.preserve[rows].mean() >= (0.99 if view == "rendered" else 0.7)
        assert not idle.strict[rows].any()
        assert idle.edit[rows].mean() <= 0.05
        assert idle.preserve[rows].mean() >= (0.99 if view == "rendered" else 0.7)


def test_a_change_that_was_not_asked_for_is_seen(truth):
    """Another object painted over, moved or added: the edit still counts as done, what should stay does not."""
    prompts, scenes, _, result = truth
    wanted = world.slots(prompts)
    slot = np.arange(world.MAX_SLOTS)
    stays = (wanted.source_shape >= 0) & (slot != wanted.edited[:, None])
    rows = np.flatnonzero(stays.any(1))
    other = stays.argmax(1)[rows]
    chosen = [prompts[i] for i in rows]
    base = scenes[rows]

    def spoiled(change) -> np.ndarray:
        spoilt = EditScenes(
            base.shape.copy(), base.color.copy(), base.center.copy(), base.radius, base.background
        )  # fmt: skip
        change(spoilt)
        return to_float(spoilt.draw(result=True))

    index = np.arange(len(rows))

    def recolor(s):
        s.color[1][index, other] = (s.color[1][index, other] + 3) % len(still.COLORS)

    def remove(s):
        s.shape[1][index, other] = -1

    def shift(s):
        s.center[1][index, other] += np.where(s.center[1][index, other] > 16, -2.5, 2.5)

    whole = verify(result[rows], chosen, base)
    for change in (recolor, remove, shift):
        verdict = verify(spoiled(change), chosen, base)
        assert not verdict.strict.any()
        assert (verdict.preserve < whole.preserve - 0.3).mean() >= 0.95
        assert verdict.score.max() <= 0.5


def test_the_wrong_edit_of_the_right_object_does_not_pass(truth):
    """Every other edit of the same source image, as far as its scene is drawn alike, is refused."""
    prompts, scenes, _, _ = truth
    rows = np.flatnonzero(of(prompts, "recolor") | of(prompts, "add"))
    wanted = world.slots(prompts)
    wrong = scenes[rows]
    color = wrong.color.copy()
    index, edited = np.arange(len(rows)), wanted.edited[rows]
    before = np.where(wanted.source_shape[rows, edited] < 0, -1, color[0][index, edited])
    target = color[1][index, edited]
    other = (target + 1) % len(still.COLORS)
    color[1][index, edited] = np.where(other == before, (target + 2) % len(still.COLORS), other)
    drawn = EditScenes(wrong.shape, color, wrong.center, wrong.radius, wrong.background).draw(result=True)
    verdict = verify(to_float(drawn), [prompts[i] for i in rows], scenes[rows])
    assert not verdict.strict.any()
    assert verdict.edit.max() <= 0.7
    moves = np.flatnonzero(of(prompts, "move"))
    base = scenes[moves]
    center = base.center.copy()
    center[1] = 0.75 * center[0] + 0.25 * center[1]
    short = EditScenes(base.shape, base.color, center, base.radius, base.background).draw(result=True)
    assert not verify(to_float(short), [prompts[i] for i in moves], base).strict.any()


def test_one_image_is_judged_as_among_many_and_nan_is_not_judged(truth):
    prompts, scenes, _, result = truth
    images = torch.from_numpy(decoded(result))
    together = verify(images, prompts, scenes)
    for row in (0, 7, N - 1):
        alone = verify(images[row : row + 1], [prompts[row]], scenes[np.array([row])])
        assert (alone.score[0], alone.edit[0]) == (together.score[row], together.edit[row])
        assert alone.preserve[0] == together.preserve[row]
    broken = images[:2].clone()
    broken[0, 0, 0, 0] = float("nan")
    verdict = verify(broken, prompts[:2], scenes[np.arange(2)])
    assert np.isnan([verdict.score[0], verdict.edit[0], verdict.preserve[0]]).all()
    assert not verdict.strict[0]
    assert np.isfinite(verdict.score[1])


def test_an_image_of_another_size_is_judged_alike():
    prompts = still.eval_set(all_prompts(), 80, seed=3, categories=CATEGORIES)
    scenes = sample_scenes(prompts, np.random.default_rng(4), size=64)
    verdict = verify(to_float(scenes.draw(result=True, size=64)), prompts, scenes)
    assert verdict.strict.all()
    assert verdict.preserve.min() > 0.99


@pytest.mark.parametrize(
    "images, prompts, message",
    [
        (np.zeros((2, 32, 32, 3)), 2, "expected"),
        (np.zeros((0, 3, 32, 32)), 0, "expected"),
        (np.zeros((2, 3, 32, 32)), 1, "one an image"),
    ],
    ids=["channels last", "no images", "another number"],
)
def test_another_layout_or_number_is_refused(images, prompts, message):
    chosen = list(all_prompts()[:prompts])
    scenes = sample_scenes(chosen or [all_prompts()[0]], np.random.default_rng(0))
    with pytest.raises(ValueError, match=message):
        verify(images, chosen, scenes)


def test_the_reward_judges_the_image_that_the_prompt_names():
    prompts = load_prompts("editing:heldout")[:24]
    names = [p.image for p in prompts if p.image is not None]
    scenes = EditScenes.concatenate([scene_of(name) for name in names])
    results = torch.from_numpy(to_float(scenes.draw(result=True)))
    reward = load_reward(RewardSpec(name="editing"))
    scores = reward.score(results, prompts, None)
    assert scores.valid.all()
    assert (scores.components["strict"] == 1).all()
    assert scores.values.min() > 0.9
    # Held against another prompt's source image, the same results have changed what should have stayed.
    turned = reward.score(results.roll(4, 0), prompts, None)
    assert turned.components["strict"].mean() == 0
    strangers = [Prompt("fly", image=names[0]), Prompt(prompts[1].text), Prompt("x", image="somewhere.png")]
    assert not reward.score(results[:3], strangers, None).valid.any()


def test_a_batch_is_drawn_from_the_generator_alone():
    prompts = all_prompts()[:8]
    first, again = (render_batch(prompts, np.random.default_rng(5)) for _ in range(2))
    np.testing.assert_array_equal(first, again)
    assert set(DIRECTIONS) == {"left", "right", "up", "down"}
