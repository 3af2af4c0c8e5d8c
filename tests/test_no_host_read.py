"""The hot path reads nothing back: rollout + decode, and update, run under FakeTensorMode, where any read raises."""

import numpy as np
import pytest
import torch
from tiny import tiny_config
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from fastgrpo.models import Conditioning
from fastgrpo.models.flux import Flux
from fastgrpo.objective import SUMMED
from fastgrpo.optimizer import OptimizerState
from fastgrpo.parallel import World
from fastgrpo.rollout import decode, lay_out, rollout
from fastgrpo.schedule import plan_rollout
from fastgrpo.update import Updater

# FLUX.1-dev's own configuration.
REAL_TRANSFORMER = {"in_channels": 64, "num_layers": 19, "num_single_layers": 38, "guidance_embeds": True}
REAL_VAE = {
    "down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "latent_channels": 16,
    "scaling_factor": 0.3611, "shift_factor": 0.1159, "use_quant_conv": False, "use_post_quant_conv": False,
}  # fmt: skip


def real_pipeline(double: int, single: int):
    """FLUX.1-dev as it is configured, of any depth, on the meta device."""
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

    depth = {"num_layers": double, "num_single_layers": single}
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    parts = dict.fromkeys(("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"))
    with torch.device("meta"):
        transformer, vae = FluxTransformer2DModel(**{**REAL_TRANSFORMER, **depth}), AutoencoderKL(**REAL_VAE)
    return FluxPipeline(scheduler=scheduler, vae=vae, transformer=transformer, **parts)


def tiny_pipeline():
    from fastgrpo.shapes import world
    from fastgrpo.shapes.tiny_flux import TinyFluxSizes, build_pipeline

    pipeline = build_pipeline(world.vocabulary(), TinyFluxSizes(), 0)
    pipeline.transformer.to("meta")
    pipeline.vae.to("meta")
    return pipeline


def fake(module: torch.nn.Module) -> None:
    """Gives a module on the meta device fake parameters and buffers on the CPU (inside the mode)."""
    for part in module.modules():
        for name, p in part._parameters.items():
            if p is not None:
                empty = torch.empty(p.shape, dtype=p.dtype, device="cpu")
                part._parameters[name] = torch.nn.Parameter(empty, requires_grad=p.requires_grad)
        for name, p in part._buffers.items():
            if p is not None:
                part._buffers[name] = torch.empty(p.shape, dtype=p.dtype, device="cpu")


def run_iteration(pipeline, config, text_width: int, pooled_width: int) -> dict[str, torch.Size]:
    """Rollout, decode and update of one iteration, given a reward vector, under FakeTensorMode."""
    family = Flux(pipeline, config.model, torch.device("meta"))
    if config.model.lora:
        family.add_lora()
    else:
        family.transformer.requires_grad_(True)
    family.device = device = torch.device("cpu")
    samples = config.rollout.prompts_per_iteration * config.rollout.group_size
    plan = plan_rollout(config.rollout, family.noise_levels(config.rollout.steps, "pipeline"), samples, 0, 0)
    layout = lay_out(plan, config.rollout, np.arange(samples))
    shape = (config.rollout.prompts_per_iteration, config.model.max_sequence_length, text_width)
    advantages = np.where(np.arange(samples) % 3 == 0, 0.0, np.linspace(-1, 1, samples))
    with FakeTensorMode():
        fake(family.transformer)
        fake(pipeline.vae)
        conditioning = Conditioning({"text": torch.empty(shape), "pooled": torch.empty(shape[0], pooled_width)})
        trajectory = rollout(family, plan, layout, conditioning, config.rollout, 0, 0)
        images = decode(family, trajectory.latents, config.rollout.decode_batch)
        updater = Updater(family, config, World(0, 1, device), OptimizerState(family.transformer, config.update, 1))
        result = updater.run(plan, trajectory, conditioning, advantages, np.ones(samples, bool), 0)
    assert len(result.grad_norms) == config.update.optimizer_steps
    assert result.statistics.sums.shape == (len(SUMMED),)
    return {"latents": trajectory.latents.shape, "images": images.shape, "x": trajectory.x.shape}


@pytest.mark.parametrize("trained", [{"kind": "window", "size": 2, "start": 0}, {"kind": "subset"}], ids=str)
@pytest.mark.parametrize("noise", ["keep", "regenerate"])
def test_tiny(tiny_flux, trained, noise):
    config = tiny_config(tiny_flux, rollout={"trained": trained, "noise": noise}, update={"optimizer_steps": 2})
    pipeline = tiny_pipeline()
    sizes = pipeline.transformer.config
    shapes = run_iteration(pipeline, config, sizes.joint_attention_dim, sizes.pooled_projection_dim)
    assert shapes["images"] == (6, 3, 32, 32)


@pytest.mark.parametrize(
    "depth", [(1, 1), pytest.param((19, 38), marks=pytest.mark.full)], ids=["one block of each", "12 B"]
)
@pytest.mark.parametrize("lora", [None, {"rank": 128, "alpha": 256.0}], ids=["full", "lora"])
def test_flux_at_its_real_size(tiny_flux, depth, lora):
    model = {"height": 720, "width": 720, "max_sequence_length": 512, "lora": lora}
    roll = {
        "steps": 3,
        "trained": {"kind": "window", "size": 2, "start": 0},
        "group_size": 2,
        "prompts_per_iteration": 1,
    }
    config = tiny_config(tiny_flux, model=model, rollout={**roll, "forward_batch": 2, "decode_batch": 1})
    shapes = run_iteration(real_pipeline(*depth), config, 4096, 768)
    assert shapes["latents"] == (2, 45 * 45, 64)
    assert shapes["images"] == (2, 3, 720, 720)


def test_the_mode_would_catch_a_read():
    with FakeTensorMode(), pytest.raises(DataDependentOutputException):
        torch.ones(()).item()
