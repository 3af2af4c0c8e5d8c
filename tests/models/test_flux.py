"""The FLUX family: levels as its scheduler has them, what is trained, what is kept."""

from typing import Any

import numpy as np
import pytest
import torch
from support.tiny import tiny_config

from fastgrpo.data.prompts import Prompt
from fastgrpo.errors import ConfigError
from fastgrpo.models import Conditioning, load_family
from fastgrpo.models.trainable import lora_disabled, make_trainable
from fastgrpo.shapes import world

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def family(tiny_flux):
    return load_family(tiny_config(tiny_flux).model, CPU)


@pytest.mark.parametrize(
    "settings",
    [{"shift": 3.0}, {"use_dynamic_shifting": True}, {"use_dynamic_shifting": True, "time_shift_type": "linear"}],
    ids=["static", "exponential", "linear"],
)
def test_noise_levels_are_the_schedulers(tiny_flux, settings):
    from diffusers import FlowMatchEulerDiscreteScheduler
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift

    family = load_family(tiny_config(tiny_flux).model, CPU)
    scheduler: Any = FlowMatchEulerDiscreteScheduler(**settings)
    family.pipeline.scheduler = scheduler
    c = scheduler.config
    mu = calculate_shift(16, c.base_image_seq_len, c.max_image_seq_len, c.base_shift, c.max_shift)
    scheduler.set_timesteps(sigmas=list(np.linspace(1.0, 1 / 10, 10)), mu=mu)
    levels = family.noise_levels(10, "pipeline")
    assert [*levels.start, levels.end[-1]] == pytest.approx(scheduler.sigmas.tolist(), abs=1e-6)
    assert levels.times == levels.start
    assert levels.end[:-1] == levels.start[1:]


def test_kept_embeddings_are_bounded(family):
    family.encode([Prompt(p.text) for p in world.all_prompts()[:40]], keep=8)
    assert len(family.embeddings.memory) <= 40
    family.encode([Prompt("a red circle")], keep=8)
    assert len(family.embeddings.memory) == 8


def test_conditioning_rows():
    rows = Conditioning({"a": torch.arange(6).reshape(3, 2)}).rows(np.array([2, 0, 2]))
    assert rows["a"].tolist() == [[4, 5], [0, 1], [4, 5]]


def test_trainable_parts_are_named_by_whole_dotted_parts(tiny_flux):
    parts = ["norm1.linear", "to_v"]
    family = load_family(tiny_config(tiny_flux, model={"trainable": parts}).model, CPU)
    make_trainable(family)
    trained = {name for name, p in family.denoiser.named_parameters() if p.requires_grad}
    assert trained == {
        name for name, _ in family.denoiser.named_parameters() if ".norm1.linear." in name or ".to_v." in name
    }
    assert trained
    wrong = load_family(tiny_config(tiny_flux, model={"trainable": ["norm1.liner"]}).model, CPU)
    with pytest.raises(ConfigError, match=r"model\.trainable: 'norm1.liner' matches no parameter"):
        make_trainable(wrong)


def test_lora_disabled_is_the_base(tiny_flux):
    family = load_family(tiny_config(tiny_flux, model={"lora": {"rank": 2}}).model, CPU)
    x, sigma = torch.randn(1, *family.latent_shape), torch.tensor([0.5])
    condition = family.encode([Prompt("a red circle")])
    with torch.no_grad():
        before = family.predict(x, sigma, condition)
        make_trainable(family)
        trained = [p for p in family.denoiser.parameters() if p.requires_grad]
        assert trained
        for p in trained:
            p.add_(0.05)
        assert not torch.allclose(before, family.predict(x, sigma, condition))
        with lora_disabled(family.policy):
            assert torch.equal(before, family.predict(x, sigma, condition))
        assert all(p.requires_grad for p in trained)
