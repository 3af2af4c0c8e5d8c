"""eval.height, width, frames, guidance and steps: drawn as a model that was loaded with them would draw."""

import pytest
import torch
from support import tiny_images, tiny_video
from support.tiny import tiny_config
from support.tiny_images import image_config
from support.tiny_video import video_config

from fastgrpo.config import validate
from fastgrpo.data.prompts import Prompt, load_prompts
from fastgrpo.distributed.world import World
from fastgrpo.errors import ConfigError
from fastgrpo.evaluation.heldout import draw
from fastgrpo.models import family_class, load_family
from fastgrpo.models.resized import resized
from fastgrpo.preflight.checks import preflight

ALONE = World(0, 1, torch.device("cpu"))
PROMPTS = [Prompt("a red circle"), Prompt("a red circle left of a green square")]


def test_an_evaluation_at_another_size_is_that_of_a_model_of_that_size(tiny_flux):
    config = tiny_config(tiny_flux, eval={"height": 16, "width": 48, "guidance": 7.0, "steps": 3})
    family = load_family(config.model, ALONE.device)
    small = draw(family, PROMPTS, config, ALONE)
    assert small.shape == (2, 3, 16, 48)
    there = config.model.model_copy(update={"height": 16, "width": 48, "guidance": 7.0})
    plain = tiny_config(tiny_flux, eval={"steps": 3}).model_copy(update={"model": there})
    assert torch.equal(small, draw(load_family(there, ALONE.device), PROMPTS, plain, ALONE))
    # Training is where it was, its positions too.
    assert resized(family, config.model) is family
    trained = draw(family, PROMPTS, tiny_config(tiny_flux), ALONE)
    assert trained.shape == (2, 3, 32, 32)
    assert torch.equal(trained, draw(load_family(config.model, ALONE.device), PROMPTS, tiny_config(tiny_flux), ALONE))


def test_guidance_of_two_branches_may_be_on_in_evaluation_alone():
    """Negative prompts are encoded where training has none."""
    config = image_config("x", "sd3", model={"guidance": 1.0}, eval={"guidance": 4.0, "steps": 2})
    family = family_class("sd3")(tiny_images.build("sd3"), config.model, ALONE.device)
    assert not family.guided
    drawn = draw(family, PROMPTS, config, ALONE)
    plain = draw(
        family, PROMPTS, config.model_copy(update={"eval": config.eval.model_copy(update={"guidance": None})}), ALONE
    )
    assert (drawn - plain).abs().max() > 1e-3
    assert resized(family, config.evaluated_model).guided


def test_first_frames_are_encoded_at_the_size_that_is_drawn():
    config = video_config("x", "wan_i2v", eval={"height": 16, "frames": 5, "steps": 2, "every": 0})
    family = family_class("wan")(tiny_video.build("wan_i2v"), config.model, ALONE.device)
    prompts = load_prompts("moving:train")[:1]
    assert family.encode(prompts)["condition"].shape[2:] == (3, 4, 4)
    view = resized(family, config.evaluated_model)
    assert view.encode(prompts)["condition"].shape[2:] == (2, 2, 4)
    assert draw(family, prompts, config, ALONE).shape == (1, 3, 5, 16, 32)
    assert family.encode(prompts)["condition"].shape[2:] == (3, 4, 4)


def test_a_size_that_cannot_be_is_named_as_it_is_set(tiny_flux):
    config = tiny_config(tiny_flux, eval={"height": 33})
    with pytest.raises(ConfigError, match=r"^eval\.height: 33 is not a multiple of"):
        draw(load_family(config.model, ALONE.device), PROMPTS, config, ALONE)
    sized = config.model_copy(update={"eval": config.eval.model_copy(update={"every": 1})})
    assert [p for p in preflight(sized).problems if p.startswith("eval.height: 33 is not a multiple of")]
    assert not [p for p in preflight(tiny_config(tiny_flux)).problems if "eval" in p]
    split = {**config.model_dump(mode="json"), "parallel": {"context": 2}}
    with pytest.raises(ConfigError, match=r"eval\.height, width, frames: parallel\.context splits"):
        validate(split)
