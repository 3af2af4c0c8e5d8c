"""The hot path reads nothing back: rollout + decode, and update, run under FakeTensorMode, where any read raises."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from tiny import tiny_config
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from fastgrpo.config import Config
from fastgrpo.models import Conditioning, family_class
from fastgrpo.objective import SUMMED
from fastgrpo.optimizer import OptimizerState
from fastgrpo.parallel import World
from fastgrpo.rollout import decode, lay_out, rollout
from fastgrpo.schedule import plan_rollout
from fastgrpo.update import Updater


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
        # Qwen-Image's rotary frequencies are attributes.
        for name, value in vars(part).items():
            if isinstance(value, torch.Tensor):
                setattr(part, name, torch.empty(value.shape, dtype=value.dtype, device="cpu"))


def run_iteration(
    pipeline: Any, config: Config, encoded: Mapping[str, tuple[int, ...]], host: Mapping[str, np.ndarray] | None = None
) -> dict[str, torch.Size]:
    """Rollout, decode and update of one iteration, given a reward vector, under FakeTensorMode.

    pipeline: its trained components and VAE on the meta device. encoded: what a prompt is encoded to, by shape.
    """
    family = family_class(config.model.family)(pipeline, config.model, torch.device("meta"))
    family.make_trainable()
    family.device = device = torch.device("cpu")
    prompts, samples = (
        config.rollout.prompts_per_iteration,
        config.rollout.prompts_per_iteration * config.rollout.group_size,
    )
    plan = plan_rollout(config.rollout, family.noise_levels(config.rollout.steps, "pipeline"), samples, 0, 0)
    layout = lay_out(plan, config.rollout, np.arange(samples))
    advantages = np.where(np.arange(samples) % 3 == 2, 0.0, np.linspace(-1, 1, samples))
    with FakeTensorMode():
        fake(family.policy)
        fake(pipeline.vae)
        tensors = {name: torch.empty(prompts, *shape) for name, shape in encoded.items()}
        conditioning = Conditioning(tensors, host)
        trajectory = rollout(family, plan, layout, conditioning, config.rollout, 0, 0)
        images = decode(family, trajectory.latents, config.rollout.decode_batch)
        updater = Updater(family, config, World(0, 1, device), OptimizerState(family.policy, config.update, 1))
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
    encoded = {"text": (10, sizes.joint_attention_dim), "pooled": (sizes.pooled_projection_dim,)}
    shapes = run_iteration(pipeline, config, encoded)
    assert shapes["images"] == (6, 3, 32, 32)


def test_the_mode_would_catch_a_read():
    with FakeTensorMode(), pytest.raises(DataDependentOutputException):
        torch.ones(()).item()
