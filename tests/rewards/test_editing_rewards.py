"""What an edit is held against: its source image, where nothing should change; and the sum of both terms."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastgrpo.config import RewardSpec
from fastgrpo.data.prompts import Prompt
from fastgrpo.errors import ConfigError
from fastgrpo.rewards import load_reward
from fastgrpo.rewards.images import source_images

SIZE = 32


@pytest.fixture
def source(tmp_path: Path) -> tuple[Prompt, torch.Tensor]:
    """A prompt with a random source image and a mask of its left half; the image as a sample."""
    pixels = np.random.default_rng(0).integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "source.png")
    mask = np.zeros((SIZE, SIZE), dtype=np.uint8)
    mask[:, : SIZE // 2] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    prompt = Prompt("make it blue", image=str(tmp_path / "source.png"), metadata={"mask": "mask.png"})
    return prompt, torch.from_numpy(pixels).permute(2, 0, 1).float()[None] / 255


def reward(**options):
    return load_reward(RewardSpec(name="preserve", options=options))


def test_what_is_kept_costs_nothing_and_what_the_mask_lets_change_neither(source):
    prompt, image = source
    left = image.clone()
    left[..., : SIZE // 2] = 0
    scores = reward().score(torch.cat([image, left]), [prompt] * 2, None)
    assert scores.values.tolist() == pytest.approx([1, 1])
    assert scores.components["distance"].tolist() == pytest.approx([0, 0])


def test_the_distance_is_the_mean_of_what_should_stay(source):
    prompt, image = source
    changed = (image + 0.1 * torch.rand(image.shape, generator=torch.Generator().manual_seed(1))).clamp(0, 1)
    expected = (changed - image).abs()[..., SIZE // 2 :].double().mean().item()
    scores = reward(limit=0.2).score(changed, [prompt], None)
    assert scores.components["distance"][0] == pytest.approx(expected, rel=1e-5)
    assert scores.values[0] == pytest.approx(1 - expected / 0.2, rel=1e-5)
    assert reward(limit=0.01).score(changed, [prompt], None).values[0] == 0


def test_without_a_mask_the_squares_that_differ_most_may(source):
    prompt, image = source
    plain = Prompt(prompt.text, image=prompt.image)
    four = image.clone()
    # 4 of 16 squares of 8 pixels.
    four[:, :, :8] = 1 - four[:, :, :8]
    five = four.clone()
    five[:, :, 8:16, :8] = 1 - five[:, :, 8:16, :8]
    scores = reward(changed=0.25).score(torch.cat([four, five]), [plain] * 2, None)
    assert scores.components["distance"][0] == 0
    square = (five - image).abs()[:, :, 8:16, :8].mean().item()
    rest = sorted((five - image).abs().mean(1)[0].unfold(0, 8, 8).unfold(1, 8, 8).mean((-1, -2)).flatten().tolist())
    assert scores.components["distance"][1] == pytest.approx(sum(rest[:12]) / 12, rel=1e-5)
    assert 0 < scores.components["distance"][1] <= square / 12 * 1.5
    whole = reward(changed=0.0).score(five, [plain], None).components["distance"][0]
    assert whole == pytest.approx((five - image).abs().mean().item(), rel=1e-5)


def test_a_sample_is_scored_alike_beside_others_and_sources_are_resized(source):
    prompt, _ = source
    other = Prompt("x", image=prompt.image)
    samples = torch.rand(4, 3, 48, 40, generator=torch.Generator().manual_seed(2))
    prompts = [prompt, other, prompt, other]
    together = reward().score(samples, prompts, None).values
    alone = [reward().score(samples[i : i + 1], prompts[i : i + 1], None).values[0] for i in range(4)]
    assert together.tolist() == pytest.approx(alone, abs=1e-7)
    with Image.open(prompt.image or "") as picture:
        resized = np.asarray(picture.resize((40, 48), Image.Resampling.LANCZOS))
    np.testing.assert_array_equal((source_images([prompt], samples)[0] * 255).round().permute(1, 2, 0).numpy(), resized)


def test_the_sum_of_an_edits_terms_is_weighted(source):
    prompt, image = source
    of = [
        {"name": "preserve", "weight": 0.25},
        {"name": "preserve", "label": "all", "weight": 0.75, "options": {"changed": 0.0, "mask": "none"}},
    ]
    composite = load_reward(RewardSpec(name="composite", options={"of": of, "aggregate": "reward"}))
    dark = image * 0.7
    scores = composite.score(dark, [prompt], None)
    parts = scores.components
    assert scores.values[0] == pytest.approx(0.25 * parts["preserve"][0] + 0.75 * parts["all"][0])
    assert parts["all"][0] != parts["preserve"][0]


def test_what_cannot_be_is_one_line(source):
    prompt, image = source
    with pytest.raises(ConfigError, match="has no image: an edit is judged beside"):
        reward().score(image, [Prompt("make it blue")], None)
    with pytest.raises(ConfigError, match="not videos"):
        reward().score(image[:, :, None], [prompt], None)
    with pytest.raises(ConfigError, match=r"nowhere\.png: cannot read the image"):
        reward().score(image, [Prompt("x", image=prompt.image, metadata={"mask": "nowhere.png"})], None)
    for options in ({"changed": 1.0}, {"limit": 0.0}, {"cell": 0}):
        with pytest.raises(ConfigError, match="changed: must be at least 0"):
            reward(**options)
