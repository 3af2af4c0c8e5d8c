"""The hot path reads nothing back: rollout + decode, and update, run under FakeTensorMode, where any read raises."""

import pytest
import torch
from support.fake_run import run_iteration, tiny_pipeline
from support.tiny import tiny_config
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

WINDOW, SUBSET = {"kind": "window", "size": 2, "start": 0}, {"kind": "subset"}


# Each of the two settings once here; they do not meet in the code.
@pytest.mark.parametrize(
    "trained, noise",
    [
        (WINDOW, "keep"),
        (SUBSET, "regenerate"),
        pytest.param(WINDOW, "regenerate", marks=pytest.mark.full),
        pytest.param(SUBSET, "keep", marks=pytest.mark.full),
    ],
)
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
