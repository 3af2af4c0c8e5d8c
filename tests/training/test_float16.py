"""model.dtype float16: float32 masters, a loss scale on the device, skipped steps counted, first ratio exactly 1."""

import json

import pytest
import torch
from support.runs import finished, metrics, weights
from support.tiny import tiny_config
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from fastgrpo.config import Update
from fastgrpo.training.optimizer import FIRST_LOSS_SCALE, OptimizerState


def stepped(scaling, bad=False):
    torch.manual_seed(0)
    layer = nn.Linear(4, 4)
    state = OptimizerState(layer, Update(max_grad_norm=0.5), 1, loss_scaling=scaling)
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(1))
    (layer(x) * (torch.inf if bad else 1.0)).square().sum().backward(state.seed(torch.ones(())))
    before = layer.weight.detach().clone()
    norm, skipped = state.step()
    return layer.weight.detach() - before, norm, skipped, state


def test_the_scale_changes_no_step():
    plain, scaled = stepped(False), stepped(True)
    assert torch.allclose(plain[0], scaled[0], atol=1e-8)
    assert plain[1].item() == pytest.approx(scaled[1].item())
    assert scaled[3].loss_scale is not None
    assert scaled[3].loss_scale.scale.item() == FIRST_LOSS_SCALE
    assert scaled[3].loss_scale.growth.item() == 1


def test_gradients_that_overflow_are_skipped_counted_and_halve_the_scale():
    moved, _, skipped, state = stepped(True, bad=True)
    assert skipped.item() == 1
    assert not moved.any()
    assert state.loss_scale is not None
    assert state.loss_scale.scale.item() == FIRST_LOSS_SCALE / 2
    assert state.loss_scale.growth.item() == 0


def test_no_step_asks_the_host():
    """Any read of a value raises here."""
    with FakeTensorMode():
        stepped(True, bad=True)


def test_a_run_in_float16_starts_at_ratio_one_and_resumes_to_the_bit(tiny_flux, tmp_path):
    def config(name, iterations, **run):
        return tiny_config(
            tiny_flux, tmp_path / name, model={"dtype": "float16"}, train={"iterations": iterations},
            checkpoint={"every": 1}, run={"dir": str(tmp_path / name), **run},
        )  # fmt: skip

    whole = finished(config("whole", 3))
    logged = metrics(tmp_path / "whole")
    assert all(line["ratio/first_max_deviation"] == 0 for line in logged)
    # Of three optimizer steps those count that moved something.
    assert whole.optimizer.loss_scale is not None
    scale = whole.optimizer.loss_scale.scale.item()
    skipped = sum(line["optimizer_steps/skipped"] for line in logged)
    assert scale == FIRST_LOSS_SCALE / 2**skipped
    assert all(
        p.dtype == torch.float32 and p.isfinite().all() for n, p in weights(whole).items() if n.startswith("model.")
    )
    finished(config("halves", 2))
    again = finished(config("halves", 3, resume=True))
    assert json.dumps(metrics(tmp_path / "halves")) == json.dumps(logged)
    for name, tensor in weights(whole).items():
        assert torch.equal(tensor, weights(again)[name])
