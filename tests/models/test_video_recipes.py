"""The recipes of the real video models: they load, and the parity ones hold DanceGRPO's published numbers."""

import pytest

from fastgrpo.config import SubsetSteps, load_config
from fastgrpo.models import check_family

RECIPES = (
    "hunyuan-video-parity-32xh100",
    "hunyuan-video-fast-8xh100",
    "skyreels-parity-32xh100",
    "skyreels-fast-8xh100",
    "wan-2.1-1.3b-fast-8xh100",
)


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_loads_and_divides_over_its_ranks(name):
    config = load_config(f"configs/{name}.yaml")
    check_family(config)
    ranks = int(name.rsplit("-", 1)[-1].split("x")[0])
    samples = config.rollout.prompts_per_iteration * config.rollout.group_size
    assert samples % (ranks * config.update.optimizer_steps) == 0
    assert (config.model.frames - 1) % 4 == 0
    assert config.model.height % 16 == config.model.width % 16 == 0


@pytest.mark.parametrize(
    "name, guidance, shift, eta, size, iterations",
    [
        ("hunyuan-video-parity-32xh100", 6.018, 5.0, 0.25, (480, 480), 202),
        ("skyreels-parity-32xh100", 5.0, 7.0, 0.3, (400, 640), 121),
    ],
)
def test_parity_recipes_hold_the_published_numbers(name, guidance, shift, eta, size, iterations):
    config = load_config(f"configs/{name}.yaml")
    model, roll, update = config.model, config.rollout, config.update
    assert (model.guidance, roll.shift, roll.eta, config.train.iterations) == (guidance, shift, eta, iterations)
    assert (model.height, model.width) == size
    assert (model.frames, model.fps, roll.steps, roll.trained) == (53, 8, 16, SubsetSteps(fraction=0.6))
    assert (update.optimizer.lr, update.optimizer.weight_decay, update.max_grad_norm) == (1e-5, 1e-4, 1)
    assert config.objective.clip_low == config.objective.clip_high == 1e-4
    assert roll.shared_noise
