"""Activation checkpointing: the same gradients, less memory, and `auto` takes the least recomputation that fits."""

import functools

import pytest
import torch
from support.tiny import tiny_config, tiny_rollout_inputs

from fastgrpo.commands.train import train
from fastgrpo.config import load_config
from fastgrpo.distributed.activation import checkpoint_activations
from fastgrpo.errors import ConfigError
from fastgrpo.models.trainable import make_trainable
from fastgrpo.planning import plan as planning
from fastgrpo.planning.gpus import Gpu
from fastgrpo.planning.meter import Meter
from fastgrpo.training.trainer import Trainer


def evaluated(path, setting):
    """Gradients, FLOPs and bytes kept for backward of one forward and backward pass."""
    family, _, _, conditioning, _ = tiny_rollout_inputs(tiny_config(path))
    make_trainable(family)
    checkpoint_activations(family.blocks(family.denoiser), setting)
    x = torch.randn(2, *family.latent_shape, generator=torch.Generator().manual_seed(1))
    meter = Meter()
    with meter:
        v = family.predict(x, torch.tensor([0.9, 0.4]), conditioning)
        kept = meter.total
        v.square().sum().backward()
    grads = torch.cat([p.grad.flatten() for p in family.policy.parameters() if p.grad is not None])
    return grads, meter.cost.flops, kept


def test_selective_keeps_products_and_recomputes_the_rest(tiny_flux):
    none, selective, every = (evaluated(tiny_flux, setting) for setting in ("none", "selective", "all"))
    assert torch.equal(none[0], selective[0])
    assert torch.equal(none[0], every[0])
    assert none[1] == selective[1] < every[1]
    assert every[2] < selective[2] < none[2]


def test_auto_takes_the_least_recomputation_that_fits(tiny_flux, monkeypatch):
    monkeypatch.setattr(planning, "RESERVED", 0)
    monkeypatch.setattr(planning, "dry_run", functools.cache(planning.dry_run))
    monkeypatch.setattr(planning.Config, "__hash__", lambda self: hash(self.model.activation_checkpointing))
    roll = {"group_size": 8, "decode_batch": 1, "forward_batch": 16}
    needs, roomy = {}, Gpu("x", 10**12, 1.0, 1.0, 1.0)
    for setting in planning.LEAST_FIRST:
        config = tiny_config(tiny_flux, rollout=roll, model={"activation_checkpointing": setting})
        needs[setting] = planning.plan(config, roomy, 1).need
    assert needs["all"] < needs["selective"] < needs["none"]
    auto = tiny_config(tiny_flux, rollout=roll, model={"activation_checkpointing": "auto"})
    for setting, need in needs.items():
        monkeypatch.setattr(planning.Plan, "fits", property(lambda plan, most=need: plan.need <= most))
        assert planning.plan(auto, roomy, 1).config.model.activation_checkpointing == setting


def test_a_run_settles_auto_before_it_starts(tiny_flux, tmp_path):
    config = tiny_config(tiny_flux, tmp_path / "run", model={"activation_checkpointing": "auto"})
    with pytest.raises(ConfigError, match=r"auto needs a plan, which fastgrpo\.train and"):
        Trainer.from_config(config)
    assert not (tmp_path / "run" / "config.yaml").exists()
    assert train(config).iterations == 2
    assert load_config(tmp_path / "run" / "config.yaml").model.activation_checkpointing == "none"
