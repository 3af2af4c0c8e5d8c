"""Every shipped pipeline is small and plain, draws what a prompt says, and has a recipe that made it."""

import warnings
from pathlib import Path

import pytest
import torch

from fastgrpo.commands.pretrain.recipe import EDITING, MOVING, WORDS, PretrainConfig
from fastgrpo.config.sections import load_settings
from fastgrpo.data.prompts import world_prompts
from fastgrpo.distributed.world import World
from fastgrpo.evaluation.heldout import draw
from fastgrpo.models import family_class, load_family
from fastgrpo.rewards import load_reward
from fastgrpo.shapes import moving_verifier, verifier, weights_path
from fastgrpo.shapes.world import eval_set

CONFIGS = Path(__file__).parents[2] / "configs"
ALONE = World(0, 1, torch.device("cpu"))
# A pipeline directory may weigh this much, all files together.
SIZE_LIMIT = 4_000_000
# Strict pass that a shipped pipeline reaches at least, of few images: below its measured rate by three deviations.
FLOORS = {
    "flux": 0.35, "flux_kontext": 0.45, "stable_diffusion": 0.55, "hunyuan_video": 0.25, "skyreels": 0.35,
    "words_flux": 0.1, "z_image": 0.2, "flux2": 0.1,
}  # fmt: skip


# Those that take longest, of the classes that the others are of.
LONG = ("skyreels", "words_flux")


def recipe_of(name: str) -> PretrainConfig:
    return load_settings(PretrainConfig, CONFIGS / f"pretrain-shapes-{name.replace('_', '-')}.yaml")


def test_every_shipped_pipeline_is_tested():
    shipped = {path.parent.name for path in weights_path("flux").parent.glob("*/model_index.json")}
    assert shipped == FLOORS.keys()


@pytest.mark.parametrize("name", list(FLOORS))
def test_shipped_weights_are_small_and_plain(name):
    files = [f for f in weights_path(name).rglob("*") if f.is_file()]
    # A tokenizer's chat template is text.
    assert {f.suffix for f in files} - {".jinja"} == {".json", ".safetensors"}
    assert sum(f.stat().st_size for f in files) <= SIZE_LIMIT


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.full) if n in LONG else n for n in FLOORS])
def test_shipped_pipeline_draws_held_out_prompts(name):
    recipe = recipe_of(name)
    config = recipe.evaluation(f"shapes:{name}", recipe.denoiser.guidance)
    world, count = recipe.world, len(recipe.world.categories)
    judge = moving_verifier if world.reward == MOVING.reward else verifier
    chosen = eval_set(world.prompts[1], 16 * count, 7, world.categories)
    prompts = world_prompts(world.module, chosen)
    images = draw(load_family(config.model, ALONE.device), prompts, config, ALONE)
    if world.reward in (EDITING.reward, WORDS.reward):
        reward = load_reward(config.rewards[0])
        assert reward.score(images, prompts, None).components["strict"].mean() >= FLOORS[name]
        # The same images as other edits of other source images, or as other words.
        assert reward.score(images.roll(count, 0), prompts, None).components["strict"].mean() <= 0.1
        return
    assert judge.verify(images, chosen).strict.mean() >= FLOORS[name]
    # The same images against prompts of another meaning, of their own category: the pictures follow the words.
    others = chosen[count:] + chosen[:count]
    differ = [a.meaning != b.meaning for a, b in zip(chosen, others, strict=True)]
    assert sum(differ) >= len(chosen) // 2
    assert judge.verify(images, others).strict[differ].mean() <= 0.1


@pytest.mark.parametrize("name", list(FLOORS))
def test_shipped_pipelines_are_what_diffusers_loads(name):
    from diffusers import DiffusionPipeline

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipeline = DiffusionPipeline.from_pretrained(weights_path(name))
    assert type(pipeline).__name__ in family_class(recipe_of(name).family).pipeline_classes
