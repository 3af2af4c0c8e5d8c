"""The verifier against ground truth: what it must pass, what it must not, and how the score falls in between."""

import itertools

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter

from fastgrpo.shapes.render import Scenes, draw, render_batch, sample_scenes
from fastgrpo.shapes.verifier import verify
from fastgrpo.shapes.world import CATEGORIES, COLORS, SHAPES, ShapesPrompt, all_prompts, eval_set, parse, vocabulary

N = 4800
_COLORS = list(COLORS)


def to_float(images: np.ndarray) -> np.ndarray:
    return images.transpose(0, 3, 1, 2).astype(np.float32) / 255


def decoded(images: np.ndarray, sigma: float = 0.6, noise: float = 0.03) -> np.ndarray:
    """Images as a small autoencoder might return them: blurred and noisy."""
    error = np.random.default_rng(9).normal(0, noise, images.shape).astype(np.float32)
    return gaussian_filter(images, (0, 0, sigma, sigma)) + error


def satisfies(scenes: Scenes, row: int, prompt: ShapesPrompt) -> bool:
    """The truth about a scene, from its numbers and not from its image."""
    there = [
        (SHAPES[s], _COLORS[c], xy)
        for s, c, xy in zip(scenes.shape[row], scenes.color[row], scenes.center[row], strict=True)
        if s >= 0
    ]
    wanted = [o for o in prompt.objects for _ in range(o.count)]
    if len(there) != len(wanted):
        return False
    for order in itertools.permutations(there):
        if all(s == o.shape and o.color in (None, c) for (s, c, _), o in zip(order, wanted, strict=True)):
            if prompt.relation is None:
                return True
            dx, dy = order[0][2] - order[1][2]
            lead, rest = {"left of": (-dx, dy), "right of": (dx, dy), "above": (-dy, dx), "below": (dy, dx)}[
                prompt.relation
            ]
            if lead > abs(rest):
                return True
    return False


def neighbours() -> dict[str, list[ShapesPrompt]]:
    """The hardest negatives of every prompt: one word changed, or the same words in another order."""
    prompts = all_prompts()
    numbers = {word: i for i, word in enumerate(vocabulary())}
    words = np.full((len(prompts), 9), -1, dtype=np.int8)
    for row, prompt in zip(words, prompts, strict=True):
        spelled = [numbers[word] for word in prompt.text.split()]
        row[: len(spelled)] = spelled
    bags = np.sort(words, 1)
    near = {}
    for row, bag, prompt in zip(words, bags, prompts, strict=True):
        changed = (words != row).sum(1)
        reordered = (bags == bag).all(1) & (changed > 0)
        same_length = (words < 0).sum(1) == (row < 0).sum()
        near[prompt.text] = [prompts[k] for k in np.flatnonzero(((changed == 1) & same_length) | reordered)]
    return near


@pytest.fixture(scope="module")
def truth():
    prompts = eval_set(all_prompts(), N, seed=11)
    rng = np.random.default_rng(12)
    scenes = sample_scenes(prompts, rng)
    return prompts, scenes, to_float(draw(scenes, rng))


@pytest.fixture(scope="module")
def views(truth):
    return {"rendered": truth[2], "decoded": decoded(truth[2])}


@pytest.fixture(scope="module")
def negatives(truth):
    """For every image a prompt that it does not show: by turns a random one and a neighbour of the true one."""
    prompts, scenes, _ = truth
    rng = np.random.default_rng(13)
    near = neighbours()
    wrong = []
    for i, prompt in enumerate(prompts):
        pool = prompts if i % 2 else near[prompt.text]
        candidates = (pool[k] for k in rng.choice(len(pool), min(8, len(pool)), replace=False, shuffle=False))
        wrong.append(next((p for p in candidates if not satisfies(scenes, i, p)), None))
    return wrong


@pytest.mark.parametrize("category", CATEGORIES)
@pytest.mark.parametrize("view, least", [("rendered", 0.999), ("decoded", 0.99)])
def test_ground_truth_passes(truth, views, category, view, least):
    prompts = truth[0]
    rows = [i for i, p in enumerate(prompts) if p.category == category]
    result = verify(views[view][rows], [prompts[i] for i in rows])
    assert result.strict.mean() >= least
    assert result.score.mean() > 0.98
    assert (result.found == [sum(o.count for o in prompts[i].objects) for i in rows]).mean() >= least


@pytest.mark.parametrize("view", ["rendered", "decoded"])
def test_another_prompt_does_not_pass(views, negatives, view):
    rows = [i for i, p in enumerate(negatives) if p is not None]
    assert len(rows) > 0.98 * N
    result = verify(views[view][rows], [negatives[i] for i in rows])
    for half in (0, 1):
        passed = result.strict[[i % 2 == half for i in rows]]
        assert passed.mean() <= 0.001
    assert result.score.mean() < 0.35


@pytest.mark.parametrize("sigma, noise, gain, least", [(0.8, 0.03, 1.0, 0.98), (0.6, 0.05, 0.75, 0.98)])
def test_a_poorer_decoder_is_still_read(truth, sigma, noise, gain, least):
    prompts, _, images = truth
    assert verify(gain * decoded(images[:1200], sigma, noise), prompts[:1200]).strict.mean() >= least


def degenerate_images(n: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(14)
    y, x = np.mgrid[:32, :32]
    palette = np.array(list(COLORS.values()), dtype=np.float32)[np.arange(n) % len(COLORS)] / 255
    dark = np.full(3, 0.11, dtype=np.float32)

    def painted(masks: np.ndarray) -> np.ndarray:
        masks = np.broadcast_to(masks, (n, 32, 32))[..., None]
        return (masks * palette[:, None, None] + (1 - masks) * dark).transpose(0, 3, 1, 2).astype(np.float32)

    pitch = (2 + np.arange(n) % 7)[:, None, None]
    scenes = [to_float(render_batch([parse(f"three {text}")] * n, rng)) for text in ("red circles", "blue triangles")]
    corners = [to_float(render_batch([parse(f"a {shape}")] * n, rng, size=16)) for shape in SHAPES]
    return {
        "black": np.zeros((n, 3, 32, 32), dtype=np.float32),
        "background": painted(np.zeros((32, 32))),
        "white": np.ones((n, 3, 32, 32), dtype=np.float32),
        "one colour": painted(np.ones((32, 32))),
        "noise": rng.random((n, 3, 32, 32), dtype=np.float32),
        "clouds": (0.5 + 2 * gaussian_filter(rng.normal(0, 1, (n, 3, 32, 32)), (0, 0, 2, 2))).astype(np.float32),
        "checkerboard": painted((x // pitch + y // pitch) % 2),
        "dots": painted(np.hypot(x % 8 - 3.5, y % 8 - 3.5) < 3),
        "stripes": painted(x // 3 % 2),
        "gradient": painted(x / 31),
        "every shape": np.concatenate([np.concatenate(corners[:2], 3), np.concatenate(corners[2:], 3)], 2),
        "crowd": np.maximum(*scenes),
    }


def test_degenerate_images_fail_and_score_low():
    prompts = eval_set(all_prompts(), 240, seed=15)
    for name, images in degenerate_images(240).items():
        result = verify(images, prompts)
        assert not result.strict.any(), name
        assert result.score.mean() < 0.2, name
        assert result.score.max() < 0.4, name


def paint(image: np.ndarray, box: tuple[slice, slice], color: tuple[float, ...]) -> np.ndarray:
    image = image.copy()
    image[(slice(None), *box)] = np.array(color, dtype=np.float32)[:, None, None]
    return image


@pytest.fixture(scope="module")
def red_square():
    """A red square of ten pixels in the lower right corner."""
    blank = np.full((3, 32, 32), 0.11, dtype=np.float32)
    return paint(blank, np.s_[18:28, 18:28], (0.9, 0.16, 0.16))


def scores(image: np.ndarray, *texts: str) -> list[float]:
    return verify(np.stack([image] * len(texts)), [parse(t) for t in texts]).score.tolist()


def test_credit_orders_answers_by_how_wrong_they_are(red_square):
    right, plain, color, shape, count, pair, both = scores(
        red_square,
        "a red square",
        "a square",
        "a blue square",
        "a red circle",
        "two red squares",
        "a red square and a green circle",
        "a blue circle",
    )
    assert right == plain == pytest.approx(1, abs=0.02)
    assert color == pytest.approx(0.3, abs=0.02)
    assert shape == pytest.approx(0.3, abs=0.02)
    assert count == pytest.approx(0.25, abs=0.02)
    assert pair == pytest.approx(0.25, abs=0.02)
    assert both == pytest.approx(0.1, abs=0.02)


def test_more_than_was_asked_for_costs(red_square):
    previous = scores(red_square, "a red square")[0]
    image = red_square
    for box in (np.s_[2:10, 2:10], np.s_[2:10, 14:22], np.s_[14:22, 2:10]):
        image = paint(image, box, (0.16, 0.8, 0.2))
        result = verify(image[None], [parse("a red square")])
        assert not result.strict[0]
        assert result.score[0] < 0.8 * previous
        previous = result.score[0]


@pytest.mark.parametrize("color", [(0.6, 0.6, 0.6), (1.0, 1.0, 1.0), (0.35, 0.12, 0.35), (0.7, 0.5, 0.3)])
def test_no_extra_object_is_too_pale_or_grey_to_count(red_square, color):
    assert not verify(paint(red_square, np.s_[3:11, 3:11], color)[None], [parse("a red square")]).strict[0]


def test_a_speck_is_forgiven(red_square):
    result = verify(paint(red_square, np.s_[4:6, 4:6], (0.16, 0.8, 0.2))[None], [parse("a red square")])
    assert result.strict[0]
    assert result.found[0] == 1


def test_the_score_moves_smoothly_between_colours_shapes_and_places(red_square):
    square = red_square[0] > 0.5
    y, x = np.mgrid[:32, :32] + 0.5
    circle = np.clip(6.2 - np.hypot(x - 23, y - 23), 0, 1)
    ramp = np.linspace(0, 1, 21)[:, None, None]
    red, yellow = np.array(COLORS["red"]) / 255, np.array(COLORS["yellow"]) / 255
    color = np.where(square[..., None], (red + (yellow - red) * ramp[..., None]), 0.11)[:, None]
    shape = (((1 - ramp) * square + ramp * circle)[..., None] * (red - 0.11) + 0.11)[:, None]
    for images, text in ((color, "a yellow square"), (shape, "a red circle")):
        result = verify(images.reshape(21, 32, 32, 3).transpose(0, 3, 1, 2), [parse(text)] * 21)
        credit = result.objects
        assert (np.diff(credit) > -0.01).all()
        assert np.diff(credit).max() < 0.25
        assert credit[-1] - credit[0] > 0.35
        assert np.logical_and(credit > credit[0] + 0.02, credit < credit[-1] - 0.02).sum() >= 3


def test_touching_objects_of_two_colours_are_two(red_square):
    y, x = np.mgrid[:32, :32] + 0.5
    circle = np.clip(5.5 - np.hypot(x - 13, y - 23), 0, 1)
    image = red_square + circle * (np.array(COLORS["cyan"])[:, None, None] / 255 - red_square)
    result = verify(image[None].astype(np.float32), [parse("a cyan circle and a red square")])
    assert result.found[0] == 2
    assert result.strict[0]


def test_relations_need_a_leading_axis(red_square):
    texts = [f"a green square {r} a red square" for r in ("left of", "right of", "above", "below")]
    images = np.stack([paint(red_square, np.s_[14:22, 2:10], (0.16, 0.8, 0.2))] * 4)
    # Squares alone are not a position prompt of the world: build the prompts from their parts.
    green, red = (parse(f"a {c} square").objects[0] for c in ("green", "red"))
    prompts = [ShapesPrompt(t, "position", (green, red), t[15:-13]) for t in texts]
    result = verify(images, prompts)
    assert result.strict.tolist() == [True, False, False, False]
    assert result.relation[0] > 0.9
    assert result.relation[1] == 0
    assert (result.score[1:] < 0.5).all()
    assert np.isnan(verify(red_square[None], [parse("a red square")]).relation[0])


def test_a_verdict_does_not_depend_on_the_batch_or_the_container(truth):
    prompts, _, images = truth
    images = decoded(images[:300])
    whole = verify(images, prompts[:300])
    alone = [verify(images[i : i + 1], prompts[i : i + 1]) for i in range(0, 300, 10)]
    np.testing.assert_allclose([r.score[0] for r in alone], whole.score[::10], atol=1e-5)
    tensor = verify(torch.from_numpy(images), prompts[:300])
    np.testing.assert_array_equal(tensor.score, whole.score)
    half = verify(torch.from_numpy(images).to(torch.bfloat16), prompts[:300])
    assert (half.strict == whole.strict).mean() >= 0.99


def test_larger_images_are_read_too():
    prompts = eval_set(all_prompts(), 300, seed=16)
    images = to_float(render_batch(prompts, np.random.default_rng(17), size=64))
    assert verify(images, prompts).strict.mean() >= 0.99


def test_a_broken_image_is_a_failed_sample_and_not_a_number(red_square):
    broken = red_square.copy()
    broken[1, 3, 3] = np.nan
    result = verify(np.stack([red_square, broken, red_square * np.inf]), [parse("a red square")] * 3)
    assert result.score[0] == pytest.approx(1, abs=0.02)
    assert np.isnan(result.score[1])
    assert not result.strict[1:].any()


@pytest.mark.parametrize("shape", [(1, 32, 32, 3), (3, 32, 32), (1, 3, 32, 16), (0, 3, 32, 32)], ids=str)
def test_a_wrong_layout_is_refused(shape):
    with pytest.raises(ValueError, match="images"):
        verify(np.zeros(shape, dtype=np.float32), [parse("a circle")] * shape[0])


def test_one_prompt_an_image():
    with pytest.raises(ValueError, match="prompts"):
        verify(np.zeros((2, 3, 32, 32), dtype=np.float32), [parse("a circle")])
