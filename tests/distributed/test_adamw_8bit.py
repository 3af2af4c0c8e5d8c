"""8-bit AdamW: near AdamW, in a quarter of its memory; skipped steps, missing packages and what a plan says of it."""

import importlib.util

import pytest
import torch
from support.tiny import tiny_config

from fastgrpo.config import Optimizer, Update
from fastgrpo.distributed.adamw_8bit import STATE_BYTES
from fastgrpo.errors import UserError
from fastgrpo.planning.dry_run import dry_run
from fastgrpo.training.optimizer import OptimizerState
from fastgrpo.training.trainer import Trainer

EIGHT = {"optimizer": {"lr": 1e-4, "kind": "adamw_8bit"}}


def optimized(kind, steps=20, spoiled=None):
    """A layer after some steps towards noisy targets; its optimizer, and the skips. One gradient may be not finite."""
    generator = torch.Generator().manual_seed(0)
    layer = torch.nn.Linear(100, 100)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(100, 100, generator=generator))
        layer.bias.zero_()
    config = Update(optimizer=Optimizer(kind=kind, lr=1e-2, weight_decay=0.1), max_grad_norm=1e9)
    state, skips, before = OptimizerState(layer, config, steps), [], {}
    for step in range(steps):
        x = torch.randn(32, 100, generator=generator)
        (layer(x) - x).square().mean().backward()
        if step == spoiled:
            assert layer.weight.grad is not None
            layer.weight.grad[3, 3] = float("nan")
            before = {name: t.clone() for name, t in _held(layer, state).items()}
        skips.append(float(state.step()[1]))
        if step == spoiled:
            assert all(torch.equal(t, before[name]) for name, t in _held(layer, state).items())
    return layer, state, skips


def _held(layer, state):
    return {"weight": layer.weight.detach(), "bias": layer.bias.detach(), **state.eight_bit.moments["weight"]}


def test_near_adamw_in_a_quarter_of_its_memory():
    full, *_ = optimized("adamw")
    eight, state, skips = optimized("adamw_8bit")
    assert not any(skips)
    # Every weight moves by about lr a step: 20 steps, 0.2.
    start = torch.randn(100, 100, generator=torch.Generator().manual_seed(0))
    moved, apart = (full.weight - start).norm(), (full.weight - eight.weight).norm()
    assert 0 < apart < 0.05 * moved
    assert torch.allclose(full.bias, eight.bias, rtol=0.01, atol=1e-3)
    assert state.eight_bit is not None
    held = sum(t.numel() * t.element_size() for t in state.eight_bit.moments["weight"].values())
    assert held == pytest.approx(STATE_BYTES * 100 * 100, rel=0.01)
    assert list(state.full) == ["bias"]


def test_a_gradient_that_is_not_finite_changes_nothing():
    layer, _, skips = optimized("adamw_8bit", 6, spoiled=3)
    assert skips == [0, 0, 0, 1, 0, 0]
    assert layer.weight.isfinite().all()


def test_a_missing_package_is_named_before_anything_loads(tiny_flux, tmp_path, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "bitsandbytes" else found(name))
    monkeypatch.setattr("fastgrpo.training.trainer.load_family", lambda *_: pytest.fail("weights loaded"))
    said = r"update\.optimizer\.kind: adamw_8bit: needs the package 'bitsandbytes'; .*'fastgrpo\[gpu\]'"
    with pytest.raises(UserError, match=said):
        Trainer.from_config(tiny_config(tiny_flux, tmp_path, update=EIGHT))


def test_a_plan_counts_its_moments(tiny_flux, tmp_path):
    planned = dry_run(tiny_config(tiny_flux, update=EIGHT)).phases[2].at_peak["optimizer"]
    trainer = Trainer.from_config(tiny_config(tiny_flux, tmp_path, update=EIGHT))
    eight = trainer.optimizer.eight_bit
    assert eight is not None
    held = [t for moments in eight.moments.values() for t in moments.values()] + list(eight.maps)
    held += [t for state in trainer.optimizer.adamw.state.values() for t in state.values()]
    assert planned == sum(t.numel() * t.element_size() for t in held)
