"""The recipes of the real models: they load, and the parity ones hold DanceGRPO's published numbers."""

import re
from pathlib import Path

import pytest

from fastgrpo.algorithms.objectives import forward_objective
from fastgrpo.algorithms.schedule import trained_steps
from fastgrpo.config import SubsetSteps, WindowSteps, load_config
from fastgrpo.models import check_family
from fastgrpo.preflight.checks import preflight

VIDEOS = (
    "hunyuan-video-parity-32xh100",
    "hunyuan-video-fast-8xh100",
    "hunyuan-video-720p-32xh100",
    "skyreels-parity-32xh100",
    "skyreels-fast-8xh100",
    "wan-2.1-1.3b-fast-8xh100",
    "wan-2.1-1.3b-lora-1x24gb",
    "hunyuan-video-1.5-lora-1x24gb",
    "hunyuan-video-1.5-fast-8xh100",
    "ltx2-parity-8xh100",
    "ltx2-fast-8xh100",
    "wan-2.2-a14b-parity-8xh100",
    "wan-2.2-a14b-fast-8xh100",
)


IMAGES = (
    "sd-parity-8xh100",
    "sd-fast-8xh100",
    "flux-parity-8xh100",
    "flux-lora-8xh100",
    "flux-lora-1x24gb",
    "sd-1x24gb",
    "flux-fast-8xh100",
    "flux-kontext-parity-8xh100",
    "flux-kontext-fast-8xh100",
    "flux-kontext-lora-1x24gb",
    "sd3.5-large-fast-8xh100",
    "sd3.5-medium-nft-8xh100",
    "sd3.5-medium-awm-8xh100",
    "qwen-image-parity-8xh100",
    "qwen-image-fast-8xh100",
    "qwen-image-2.1-parity-8xh100",
    "qwen-image-2.1-fast-8xh100",
    "qwen-image-edit-plus-parity-8xh100",
    "qwen-image-edit-plus-fast-8xh100",
    "z-image-turbo-parity-8xh100",
    "z-image-turbo-fast-8xh100",
    "z-image-turbo-lora-1x24gb",
    "qwen-image-2.1-lora-1x24gb",
    "flux2-klein-9b-parity-8xh100",
    "flux2-klein-9b-fast-8xh100",
    "flux2-klein-4b-lora-1x24gb",
)


@pytest.mark.parametrize("name", VIDEOS + IMAGES)
def test_a_recipe_loads_and_divides_over_its_ranks(name):
    config = load_config(f"configs/{name}.yaml")
    if config.parallel.context == 1:
        # Else tokens are counted by the pipeline's own files, which are on the hub; its plan has them (docs/scale.md).
        check_family(config)
    ranks = int(name.rsplit("-", 1)[-1].split("x")[0])
    samples = config.rollout.prompts_per_iteration * config.rollout.group_size
    assert samples % (ranks // config.parallel.context * config.update.optimizer_steps) == 0
    assert (config.model.frames - 1) % 4 == 0
    assert config.model.height % 16 == config.model.width % 16 == 0


@pytest.mark.parametrize("path", sorted(Path("configs").glob("*-[0-9]*x*.yaml")), ids=lambda p: p.stem)
def test_a_recipe_names_the_licence_of_its_model(path):
    said = " ".join(line.removeprefix("#").strip() for line in path.read_text().splitlines() if line.startswith("#"))
    model = load_config(path).model.path
    # Made of a published transformer and the parts of another model (docs/video.md).
    model = "Skywork/SkyReels-V1-Hunyuan-I2V" if model == "skyreels-v1-i2v" else model
    assert re.search(rf"Licence of {re.escape(model)}: \w", said)


def test_every_config_of_a_published_model_has_a_machine_in_its_name():
    """Those that the test above reads; the others are of the embedded worlds."""
    for path in set(Path("configs").glob("*.yaml")) - set(Path("configs").glob("*-[0-9]*x*.yaml")):
        assert path.stem.startswith(("shapes-", "pretrain-shapes-")), path


@pytest.mark.parametrize(
    "name, guidance, shift, eta, size, iterations",
    [
        ("hunyuan-video-parity-32xh100", 6.018, 5.0, 0.25, (480, 480), 202),
        ("skyreels-parity-32xh100", 5.0, 7.0, 0.3, (400, 640), 121),
    ],
)
def test_the_video_recipes_hold_the_published_numbers(name, guidance, shift, eta, size, iterations):
    config = load_config(f"configs/{name}.yaml")
    model, roll, update = config.model, config.rollout, config.update
    assert (model.guidance, roll.shift, roll.eta, config.train.iterations) == (guidance, shift, eta, iterations)
    assert (model.height, model.width) == size
    assert (model.frames, model.fps, roll.steps, roll.trained) == (53, 8, 16, SubsetSteps(fraction=0.6))
    assert (update.optimizer.lr, update.optimizer.weight_decay, update.max_grad_norm) == (1e-5, 1e-4, 1)
    assert config.objective.clip_low == config.objective.clip_high == 1e-4
    assert roll.shared_noise


# As DanceGRPO's scripts have them, for 8 GPUs: prompts a GPU, samples a prompt, samples of an optimizer step on one
# GPU, trained steps of each sample (its SD trainer trains the last step too), learning rate, largest gradient norm.
PUBLISHED = {
    "sd-parity-8xh100": (4, 16, 32, 50, 1e-5, 1.0),
    "flux-parity-8xh100": (2, 12, 12, 9, 1e-5, 0.01),
    "flux-lora-8xh100": (2, 12, 12, 6, 3e-4, 1.0),
    "qwen-image-parity-8xh100": (2, 12, 12, 11, 1e-5, 1.0),
}
# Guidance, steps, shift, η, side of the image, iterations, EMA.
SAMPLED = {
    "sd-parity-8xh100": (5.0, 50, "pipeline", 1.0, 512, 300, None),
    "flux-parity-8xh100": (3.5, 16, 3.0, 0.3, 720, 300, 0.995),
    "flux-lora-8xh100": (3.5, 12, 3.0, 0.3, 720, 301, None),
    "qwen-image-parity-8xh100": (1.0, 20, 3.0, 0.3, 720, 300, None),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_image_recipes_hold_the_published_numbers(name):
    config = load_config(f"configs/{name}.yaml")
    model, roll, update, objective = config.model, config.rollout, config.update, config.objective
    prompts, group, per_step, trained, lr, norm = PUBLISHED[name]
    assert (roll.prompts_per_iteration, roll.group_size) == (8 * prompts, group)
    samples = 8 * prompts * group
    assert samples // 8 // update.optimizer_steps == per_step
    assert update.optimizer_steps == 2
    chosen = trained_steps(roll, samples, 0, config.run.seed)
    assert set(chosen.sum(axis=0)) == {trained}
    assert (update.optimizer.lr, update.max_grad_norm, update.optimizer.weight_decay) == (lr, norm, 1e-4)
    assert (update.optimizer.beta1, update.optimizer.beta2, update.optimizer.eps) == (0.9, 0.999, 1e-8)
    assert (objective.clip_low, objective.clip_high, objective.kl_weight, config.advantage.clip) == (1e-4, 1e-4, 0, 5)
    assert roll.shared_noise
    side = SAMPLED[name][4]
    assert (model.height, model.width, model.frames) == (side, side, 1)
    sampled = (model.guidance, roll.steps, roll.shift, roll.eta, side, config.train.iterations, update.ema_decay)
    assert sampled == SAMPLED[name]
    # Where the model is told a whole number of a thousand levels.
    assert roll.truncate_timesteps is (model.family != "stable_diffusion")


# As Flow-Factory's examples/grpo/lora have them: steps, guidance of each transformer, side, frames, noise, rate.
FACTORY = {
    "z-image-turbo-parity-8xh100": (6, (0.0, None), 512, 1, 0.7, 3e-4),
    "flux2-klein-9b-parity-8xh100": (8, (4.0, None), 384, 1, 0.7, 3e-4),
    "qwen-image-2.1-parity-8xh100": (10, (1.0, None), 384, 1, 1.0, 3e-4),
    "qwen-image-edit-plus-parity-8xh100": (10, (4.0, None), 384, 1, 1.0, 3e-4),
    "wan-2.2-a14b-parity-8xh100": (10, (4.0, 3.0), 480, 5, 0.9, 1e-4),
}


@pytest.mark.parametrize("name", FACTORY)
def test_the_recipes_of_flow_factory_hold_its_numbers(name):
    config = load_config(f"configs/{name}.yaml")
    model, roll, update, objective = config.model, config.rollout, config.update, config.objective
    assert model.lora is not None
    assert (model.lora.rank, model.lora.alpha) == (64, 128)
    guidance = (model.guidance, model.guidance_2)
    assert (roll.steps, guidance, model.height, model.frames, roll.eta, update.optimizer.lr) == FACTORY[name]
    assert model.width == model.height
    assert (roll.prompts_per_iteration, roll.group_size, update.optimizer_steps) == (48, 16, 2)
    assert (roll.sampler, roll.shift) == ("flow_sde", "pipeline")
    assert roll.trained == WindowSteps(size=1, start=1, stop=4, move="random", every=1)
    assert (update.optimizer.weight_decay, update.max_grad_norm) == (1e-4, 1.0)
    assert (objective.clip_low, objective.clip_high, objective.kl_weight, config.advantage.clip) == (1e-4, 1e-4, 0, 5)
    assert update.ema_decay == 0.9


def test_the_recipe_of_ltx2_holds_flow_factorys_numbers():
    """Of its examples/grpo/lora/ltx2/t2av_pickscore."""
    config = load_config("configs/ltx2-parity-8xh100.yaml")
    model, roll, update, objective = config.model, config.rollout, config.update, config.objective
    assert model.lora is not None
    assert (model.lora.rank, model.lora.alpha) == (64, 128)
    assert (model.height, model.width, model.frames, model.fps, model.guidance) == (512, 768, 121, 24, 1.0)
    assert (roll.sampler, roll.eta, roll.steps, roll.shift) == ("cps", 0.8, 24, "pipeline")
    assert (roll.prompts_per_iteration, roll.group_size, update.optimizer_steps) == (48, 16, 2)
    assert roll.trained == WindowSteps(size=3, start=0, stop=10, move="random", every=1)
    assert {trained_steps(roll, 1, i, 0)[:, 0].nonzero()[0][0] for i in range(99)} == set(range(8))
    assert (update.optimizer.lr, update.optimizer.weight_decay, update.max_grad_norm) == (3e-4, 1e-4, 1.0)
    assert (objective.clip_low, objective.clip_high, objective.kl_weight) == (1e-4, 1e-4, 0)
    assert (config.advantage.clip, config.advantage.normalize, update.ema_decay) == (5, "global", 0.9)


def test_the_lora_recipe_is_the_published_one():
    lora = load_config("configs/flux-lora-8xh100.yaml").model.lora
    assert lora is not None
    assert (lora.rank, lora.alpha, lora.targets) == (128, 256, ["to_q", "to_k", "to_v", "to_out.0"])


@pytest.mark.parametrize("name", [name for name in IMAGES if "fast" in name])
def test_the_fast_recipes_do_what_makes_them_fast(name):
    """A window of trained steps, replayed several rows at once, after a prefix drawn once for a prompt's group."""
    roll = load_config(f"configs/{name}.yaml").rollout
    assert isinstance(roll.trained, WindowSteps)
    assert roll.trained.move == "progressive"
    assert roll.shared_noise
    assert roll.share_prefix
    assert roll.forward_batch >= 4
    assert roll.trained.size <= 8


@pytest.mark.parametrize("path", sorted(Path("configs").glob("*xh100.yaml")), ids=lambda p: p.stem)
def test_a_recipes_model_is_checked_without_it(path):
    """By the configs of the real models that this package has, their classes' defaults with them."""
    config = load_config(path)
    problems = preflight(config, 8).problems
    assert [p for p in problems if not p.startswith(("rewards", "prompts", "parallel", config.prompts.train))] == []


@pytest.mark.parametrize(
    "name, prompts, steps, times, most, kl, clip",
    [("nft", 48, 10, ("levels", 9), 0.5, 1e-4, 1.0), ("awm", 72, 14, ("strata", 6), 0.3, 5e-3, 5.0)],
)
def test_the_forward_recipes_hold_their_projects_numbers(name, prompts, steps, times, most, kl, clip):
    """DiffusionNFT's sd3_pickscore and AWM's geneval_sd3_no_cfg_1node."""
    config = load_config(f"configs/sd3.5-medium-{name}-8xh100.yaml")
    objective, roll, update = config.objective, config.rollout, config.update
    assert forward_objective(config) is not None
    assert (objective.kind, objective.kl, objective.kl_weight) == (name, "v", kl)
    assert (roll.prompts_per_iteration, roll.group_size, roll.steps, roll.shared_noise) == (prompts, 24, steps, False)
    assert (objective.times.draw, objective.times.count) == times
    assert (objective.old_decay.rate, objective.old_decay.most, config.model.guidance) == (0.001, most, 1.0)
    assert (update.optimizer.lr, update.max_grad_norm, update.optimizer_steps) == (3e-4, clip, 1)
    assert config.model.lora is not None
    assert (config.advantage.normalize, config.model.lora.rank, config.model.lora.alpha) == ("global", 32, 64)


@pytest.mark.parametrize("path", sorted(Path("configs").glob("*xh100.yaml")), ids=lambda p: p.stem)
def test_no_rank_of_several_loads_all_of_what_is_trained(path):
    config = load_config(path)
    assert (config.model.lora is not None) != (config.parallel.load == "sharded")
