"""The moving world: its prompts and scenes, and the video verifier against ground truth."""

import dataclasses
from collections import Counter

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter

from fastgrpo.config import RewardSpec
from fastgrpo.data.prompts import load_prompts, open_image
from fastgrpo.errors import ConfigError
from fastgrpo.rewards import load_reward
from fastgrpo.rewards.moving import MovingShapesReward
from fastgrpo.shapes import moving_world as world
from fastgrpo.shapes import world as still
from fastgrpo.shapes.moving_render import WAYS, draw, first_frame, render_batch, sample_scenes
from fastgrpo.shapes.moving_verifier import verify
from fastgrpo.shapes.moving_world import CATEGORIES, DIRECTIONS, FRAMES, SPEEDS, MovingPrompt, all_prompts, parse

N = 600
TEXTS = {p.text for p in all_prompts()}


def to_float(videos: np.ndarray) -> np.ndarray:
    return videos.transpose(0, 4, 1, 2, 3).astype(np.float32) / 255


def decoded(videos: np.ndarray) -> np.ndarray:
    """Videos as a small autoencoder might return them: blurred and noisy."""
    error = np.random.default_rng(9).normal(0, 0.03, videos.shape).astype(np.float32)
    return gaussian_filter(videos, (0, 0, 0, 0.6, 0.6)) + error


@pytest.fixture(scope="module")
def truth():
    prompts = still.eval_set(all_prompts(), N, seed=11, categories=CATEGORIES)
    rng = np.random.default_rng(12)
    scenes = sample_scenes(prompts, rng)
    return prompts, scenes, to_float(draw(scenes, rng))


@pytest.fixture(scope="module")
def views(truth):
    return {"rendered": truth[2], "decoded": decoded(truth[2])}


def neighbours(prompt: MovingPrompt) -> list[MovingPrompt]:
    """Other meanings that differ by one word, or that swap two objects' motions."""
    words = prompt.text.split()
    swaps = {"slowly": SPEEDS, "fast": SPEEDS}
    near = []
    for place, word in enumerate(words):
        bare = word.rstrip(",")
        options = next(
            (group for group in (still.COLORS, still.SHAPES, DIRECTIONS, swaps.get(bare, ())) if bare in group), ()
        )
        near += [" ".join([*words[:place], word.replace(bare, o), *words[place + 1 :]]) for o in options if o != bare]
    if len(prompt.movers) == 2:
        a, b = (p.split(" ") for p in prompt.text.split(", "))
        near.append(" ".join([*a[:3], *b[3:]]) + ", " + " ".join([*b[:3], *a[3:]]))
    there = [parse(t) for t in near if t in TEXTS]
    return [p for p in there if p.meaning != prompt.meaning]


def test_prompts_are_closed_distinct_and_parsed():
    prompts = all_prompts()
    assert len({p.text for p in prompts}) == len(prompts) == 8952
    assert all(parse(p.text) is p for p in prompts[::50])
    assert parse("a red circle moves right, a blue square stands").movers == (
        world.Mover("circle", "red", "right"),
        world.Mover("square", "blue"),
    )
    with pytest.raises(ValueError, match=r"'a red circle rolls'.*nearest is 'a red circle"):
        parse("a red circle rolls")


def test_split_divides_meanings_in_every_category():
    train, held_out = world.split()
    assert len(train) + len(held_out) == len(all_prompts())
    assert not {p.meaning for p in train} & {p.meaning for p in held_out}
    total, held = (Counter(p.category for p in part) for part in (all_prompts(), held_out))
    assert all(0.15 <= held[c] / total[c] <= 0.26 for c in CATEGORIES)


@pytest.mark.parametrize("part", ["train", "heldout"])
def test_the_prompt_sets_are_balanced_and_carry_first_frames(part):
    prompts = load_prompts(f"moving:{part}")
    counts = Counter(p.metadata["category"] for p in prompts)
    assert set(counts) == set(CATEGORIES)
    assert len(set(counts.values())) == 1
    image = prompts[1].image
    assert image is not None
    picture = np.asarray(open_image(image))
    assert picture.shape == (32, 32, 3)
    np.testing.assert_array_equal(picture, first_frame(prompts[1].text, 1))
    assert not np.array_equal(picture, first_frame(prompts[1].text, 2))


def test_a_prompt_set_can_be_of_some_categories_alone():
    prompts = load_prompts("moving:heldout:stand,speed")
    assert Counter(p.metadata["category"] for p in prompts) == {"stand": 160, "speed": 160}
    assert {p.text for p in prompts} <= {p.text for p in world.split()[1]}
    with pytest.raises(ConfigError, match="moving:train:sped: unknown category 'sped'; did you mean 'speed'"):
        load_prompts("moving:train:sped")


def test_scenes_move_as_their_prompts_say(truth):
    prompts, scenes, _ = truth
    for prompt, centers, radii in zip(prompts, scenes.center, scenes.radius, strict=True):
        for slot, mover in enumerate(prompt.movers):
            steps = np.diff(centers[:, slot], axis=0)
            np.testing.assert_allclose(steps, np.broadcast_to(steps[:1], steps.shape), atol=1e-9)
            way = steps.sum(0) @ DIRECTIONS.get(mover.direction or "", (0, 0))
            low, high = WAYS[SPEEDS.index(mover.speed)] if mover.speed else (WAYS.min(), WAYS.max())
            assert way == 0 if mover.direction is None else low <= way <= high
            inside = centers[:, slot] - radii[slot]
            assert inside.min() >= 0
            assert (centers[:, slot] + radii[slot]).max() <= 32
        if len(prompt.movers) == 2:
            gap = np.abs(centers[:, 0] - centers[:, 1]).max(-1) - radii.sum()
            assert gap.min() >= 2.5


@pytest.mark.parametrize("category", CATEGORIES)
@pytest.mark.parametrize("view", ["rendered", "decoded"])
def test_ground_truth_passes(truth, views, category, view):
    prompts, scenes, _ = truth
    rows = [i for i, p in enumerate(prompts) if p.category == category]
    result = verify(views[view][rows], [prompts[i] for i in rows])
    assert result.strict.mean() >= 0.995
    assert min(result.score.mean(), result.motion.mean(), result.objects.mean()) > 0.98
    assert result.aesthetics.mean() > 0.95
    way = scenes.center[rows, -1] - scenes.center[rows, 0]
    used = scenes.shape[rows] >= 0
    assert np.abs(result.way - way)[used].max() < 1.2


@pytest.mark.parametrize("view", ["rendered", "decoded"])
def test_another_prompt_does_not_pass(truth, views, view):
    prompts = truth[0]
    rng = np.random.default_rng(13)
    wrong = []
    for i, prompt in enumerate(prompts):
        near = neighbours(prompt) if i % 4 else [p for p in (prompts[i - 1],) if p.meaning != prompt.meaning]
        wrong.append(near[int(rng.integers(len(near)))] if near else None)
    rows = [i for i, p in enumerate(wrong) if p is not None]
    assert len(rows) > 0.95 * N
    result = verify(views[view][rows], [p for p in wrong if p is not None])
    assert result.strict.mean() <= 0.005
    assert result.score.mean() < 0.45


def corrupted(videos: np.ndarray) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(14)
    swapped = np.roll(videos, 1, axis=0)
    gone, other, noisy, flicker = (videos.copy() for _ in range(4))
    gone[:, :, 3:6] = 0.11
    other[:, :, 5:] = swapped[:, :, 5:]
    noisy[:] = rng.random(videos.shape)
    flicker[:, :, ::2] = 0.11
    return {
        "black": np.zeros_like(videos),
        "noise": noisy,
        "gone for three frames": gone,
        "another video from the middle": other,
        "every second frame empty": flicker,
        "frames shuffled": videos[:, :, rng.permutation(FRAMES)],
    }


def test_what_is_not_a_video_of_the_prompt_fails(truth):
    prompts, _, videos = truth
    rows = [i for i, p in enumerate(prompts) if p.category in ("direction", "both_move")][:200]
    chosen = [prompts[i] for i in rows]
    whole = verify(videos[rows], chosen)
    for name, broken in corrupted(videos[rows]).items():
        result = verify(broken, chosen)
        assert result.strict.mean() <= 0.005, name
        assert result.score.mean() < 0.6 * whole.score.mean(), name
    backwards = verify(np.ascontiguousarray(videos[rows][:, :, ::-1]), chosen)
    assert not backwards.strict.any()
    assert backwards.motion.mean() < 0.1
    assert backwards.aesthetics.mean() == pytest.approx(whole.aesthetics.mean(), abs=1e-6)


def test_jumps_cost_smoothness_and_flicker_costs_aesthetics(truth):
    prompts, _, _ = truth
    rows = [i for i, p in enumerate(prompts) if p.category == "direction"][:100]
    chosen = [prompts[i] for i in rows]
    jumpy = sample_scenes(chosen, np.random.default_rng(5))
    jumpy.center[:, 1::2] += 2.5 * np.sign(16 - jumpy.center[:, 1::2])
    result = verify(to_float(draw(jumpy, np.random.default_rng(6))), chosen)
    assert result.strict.mean() <= 0.01
    assert result.motion.mean() < 0.8
    assert result.objects.mean() > 0.95
    pulsing = sample_scenes(chosen, np.random.default_rng(5))
    frames = draw(pulsing, np.random.default_rng(6))
    pulsing.radius[:] *= 0.75
    frames[:, ::2] = draw(pulsing, np.random.default_rng(6))[:, ::2]
    assert verify(to_float(frames), chosen).aesthetics.mean() < 0.75


def test_a_verdict_does_not_depend_on_the_batch_and_nan_is_no_number(truth):
    prompts, _, videos = truth
    broken = videos[:70].copy()
    broken[3, 0, 2, 5, 5] = np.nan
    whole = verify(torch.from_numpy(broken), prompts[:70])
    assert np.isnan(whole.score[3])
    assert not whole.strict[3]
    for row in (0, 68):
        alone = verify(broken[row : row + 1], prompts[row : row + 1])
        assert alone.score[0] == pytest.approx(whole.score[row], abs=1e-5)


@pytest.mark.parametrize("shape", [(1, 3, 32, 32), (1, 3, 2, 32, 32), (1, 9, 3, 32, 32), (1, 3, 9, 32, 16)], ids=str)
def test_a_wrong_layout_is_refused(shape):
    with pytest.raises(ValueError, match="videos"):
        verify(np.zeros(shape, dtype=np.float32), [parse("a red circle stands")])


def test_larger_and_longer_videos_are_read_too():
    prompts = still.eval_set(all_prompts(), 60, seed=16, categories=CATEGORIES)
    videos = to_float(render_batch(prompts, np.random.default_rng(17), size=48, frames=13))
    assert verify(videos, prompts).strict.mean() >= 0.98


def test_the_rewards_are_the_verdicts_parts():
    rows = load_prompts("moving:train")[:4]
    samples = torch.from_numpy(to_float(render_batch([parse(p.text) for p in rows], np.random.default_rng(0))))
    samples[2] = 0
    result = verify(samples, [parse(p.text) for p in rows])
    for name, part in (("shapes", "score"), ("motion", "motion"), ("aesthetics", "aesthetics")):
        scores = load_reward(RewardSpec(name=f"moving_{name}")).score(samples, rows, 8.0)
        np.testing.assert_array_equal(scores.values, getattr(result, part))
        np.testing.assert_array_equal(scores.components["strict"], result.strict)
        assert scores.valid.all()
    unknown = [*rows[:3], type(rows[0])("a cat on a sofa")]
    assert MovingShapesReward().score(samples, unknown).valid.tolist() == [True, True, True, False]


@pytest.mark.parametrize("view", ["rendered", "decoded"])
def test_outlines_of_ground_truth_hold_in_every_frame(truth, views, view):
    prompts = truth[0]
    result = verify(views[view], prompts, outlines=True)
    assert result.strict.mean() >= 0.995
    assert result.shape.mean() > 0.98


@pytest.mark.parametrize("broken", ["rounded", "hollow", "pulsing", "one frame"])
def test_an_outline_that_loses_corners_fill_or_size_is_seen(truth, broken):
    prompts, _, videos = truth
    rows = [i for i, p in enumerate(prompts) if p.category == "direction" and p.movers[0].shape != "circle"][:60]
    chosen, whole = [prompts[i] for i in rows], videos[rows]
    scenes = sample_scenes(chosen, np.random.default_rng(5))
    if broken == "rounded":
        # The object's own colour within its blurred outline: sharp edges, no corners.
        soft = gaussian_filter(whole.max(axis=1, keepdims=True) - 0.11, (0, 0, 0, 2.4, 2.4))
        mask = ((soft / soft.max(axis=(3, 4), keepdims=True) - 0.45) * 6 + 0.5).clip(0, 1)
        spoiled = (0.11 + mask * (whole.max(axis=(3, 4), keepdims=True) - 0.11)).astype(np.float32)
    elif broken == "hollow":
        inner = to_float(draw(dataclasses.replace(scenes, radius=scenes.radius * 0.45), np.random.default_rng(6)))
        outer = to_float(draw(scenes, np.random.default_rng(6)))
        spoiled = np.where(inner.max(axis=1, keepdims=True) > 0.3, 0.11, outer).astype(np.float32)
    elif broken == "pulsing":
        spoiled = to_float(draw(scenes, np.random.default_rng(6)))
        small = to_float(draw(dataclasses.replace(scenes, radius=scenes.radius * 0.85), np.random.default_rng(6)))
        spoiled[:, :, ::2] = small[:, :, ::2]
    else:
        # A square where a cross or a triangle was, or the other way round, in the middle frame alone.
        other = dataclasses.replace(scenes, shape=np.where(scenes.shape >= 0, (scenes.shape + 1) % 4, -1))
        spoiled = to_float(draw(scenes, np.random.default_rng(6)))
        spoiled[:, :, 4] = to_float(draw(other, np.random.default_rng(6)))[:, :, 4]
    forgiving, strict = verify(spoiled, chosen), verify(spoiled, chosen, outlines=True)
    assert strict.strict.mean() <= 0.05
    assert strict.shape.mean() < verify(whole, chosen).shape.mean() - 0.03
    # What the verdict without outlines forgives.
    if broken in ("pulsing", "one frame"):
        assert forgiving.strict.mean() > 0.5


def test_a_reward_asks_for_outlines_where_told(truth):
    rows = load_prompts("moving:train")[:4]
    samples = torch.from_numpy(to_float(render_batch([parse(p.text) for p in rows], np.random.default_rng(0))))
    samples[1, :, 2:4] = torch.from_numpy(gaussian_filter(samples[1, :, 2:4].numpy(), (0, 0, 1.6, 1.6)))
    parsed = [parse(p.text) for p in rows]
    spec = RewardSpec(name="moving_shapes", options={"outlines": True})
    scores = load_reward(spec).score(samples, rows, 8.0)
    np.testing.assert_array_equal(scores.values, verify(samples, parsed, outlines=True).score)
    assert scores.components["shape"][1] < scores.components["shape"][0]
    with pytest.raises(ConfigError, match="outline"):
        load_reward(RewardSpec(name="moving_shapes", options={"outline": True}))
