"""An iteration on fake tensors, where reading a value on the host raises."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from fastgrpo.algorithms.layout import lay_out
from fastgrpo.algorithms.schedule import schedule_steps
from fastgrpo.config import Config
from fastgrpo.distributed.world import World
from fastgrpo.models import Conditioning, family_class
from fastgrpo.models.trainable import make_trainable
from fastgrpo.rollout.decode import decode
from fastgrpo.rollout.sampler import rollout
from fastgrpo.training.optimizer import OptimizerState
from fastgrpo.training.update import Updater
from fastgrpo_kernels.clipped_loss import FIELDS
from support.updates import run_update


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
    # What the family says that prompts are encoded to, as plans have it.
    assert family.encoded_shapes() == {name: s for name, s in encoded.items() if not name.startswith("negative_")}
    make_trainable(family)
    family.device = device = torch.device("cpu")
    prompts, samples = (
        config.rollout.prompts_per_iteration,
        config.rollout.prompts_per_iteration * config.rollout.group_size,
    )
    schedule = schedule_steps(config.rollout, family.noise_levels(config.rollout.steps, "pipeline"), samples, 0, 0)
    layout = lay_out(schedule, config.rollout, np.arange(samples))
    advantages = np.where(np.arange(samples) % 3 == 2, 0.0, np.linspace(-1, 1, samples))
    with FakeTensorMode():
        fake(family.policy)
        fake(pipeline.vae)
        tensors = {
            name: torch.empty(
                prompts, *shape, dtype=torch.bool if name.removeprefix("negative_") in family.mask_names else None
            )
            for name, shape in encoded.items()
        }
        conditioning = Conditioning(tensors, host)
        trajectory = rollout(family, schedule, layout, conditioning, config.rollout, 0, 0)
        images = decode(family, trajectory.latents, config.rollout.decode_batch)
        updater = Updater(family, config, World(0, 1, device), OptimizerState(family.policy, config.update, 1))
        result = run_update(updater, schedule, trajectory, conditioning, advantages)
    assert len(result.grad_norms) == config.update.optimizer_steps
    assert result.statistics.values.shape == (len(FIELDS),)
    return {"latents": trajectory.latents.shape, "images": images.shape, "x": trajectory.x.shape}
