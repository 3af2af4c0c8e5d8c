"""What the doctor says of a machine, and that its self-test finds a rollout and an update that disagree."""

import importlib.util

import numpy as np
import pytest
import torch
from support.levels import flow_levels
from support.tiny import tiny_config

from fastgrpo.algorithms.schedule import schedule_steps
from fastgrpo.commands.doctor import q_floor, self_test
from fastgrpo.commands.main import main
from fastgrpo.config import dump
from fastgrpo_kernels import shift_moments


def test_the_machine_is_described_without_a_config(capsys, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "peft" else found(name))
    assert main(["doctor"]) == 0
    printed = capsys.readouterr().out
    assert torch.__version__ in printed
    assert "lacks peft" in printed
    assert "fastgrpo[train]" in printed


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_config_agrees_with_itself_exactly(tiny_flux, tmp_path, dtype):
    config = tiny_config(tiny_flux, tmp_path / "run", model={"dtype": dtype})
    result = self_test(config)
    assert result.log_ratio == 0
    assert result.update_seconds > 0
    assert [good for good, _ in result.findings(config)] == [True, True]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "objective, text",
    [
        ({"kind": "nft"}, "max |log-ratio| on policy is exactly 0"),
        ({"kind": "dpo"}, "max |log-ratio| on policy is exactly 0"),
        ({"kind": "awm", "clip_low": 0.5}, "max |log-ratio| on policy is exactly 0, 0.0% of the clip range 0.0001"),
    ],
    ids=lambda value: value["kind"] if isinstance(value, dict) else "",
)
def test_an_objective_of_the_forward_process_agrees_with_itself(tiny_flux, tmp_path, objective, text):
    rollout = {"shared_noise": False, "group_size": 4}
    config = tiny_config(tiny_flux, tmp_path / "run", objective=objective, rollout=rollout)
    assert list(self_test(config).findings(config)) == [(True, text)]


def test_a_rollout_and_an_update_that_disagree_are_found(tiny_flux, tmp_path, capsys, monkeypatch):
    from fastgrpo.models.families.flux import Flux

    predict = Flux.predict
    monkeypatch.setattr(
        Flux, "predict", lambda self, *args: predict(self, *args) * (1 + 1e-3 * torch.is_grad_enabled())
    )
    path = tmp_path / "config.yaml"
    path.write_text(dump(tiny_config(tiny_flux)))
    assert main(["doctor", str(path)]) == 1
    printed = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "rollout and update disagree" in printed


def test_a_threshold_in_the_rounding_noise_is_named(tiny_flux):
    config = tiny_config(tiny_flux, model={"dtype": "bfloat16"}, objective={"dppo_threshold": 1e-9})
    found = dict(self_test(config).findings(config))
    assert "objective.dppo_threshold 1e-09 is below three times that" in found[False]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_floor_is_what_rounding_adds_to_a_measured_q(tiny_flux, dtype):
    config = tiny_config(tiny_flux)
    levels = flow_levels([1.0, 0.8, 0.6, 0.4, 0.2, 0.0], "transformer")
    schedule = schedule_steps(config.rollout, levels, 4, 0, 0)
    step = int(np.flatnonzero(schedule.trained[:, 0])[0])
    _, b, s = schedule.transitions[step]
    generator = torch.Generator().manual_seed(0)
    old = torch.randn(4, 32, 8192, generator=generator)
    # Some roundings wide, so that the two are independent; no wider, for the cross term is this test's own noise.
    new = old + 5 * torch.finfo(dtype).eps * torch.randn(old.shape, generator=generator)
    coefficients = torch.full((4,), float(b), dtype=torch.float64), torch.full((4,), float(s), dtype=torch.float64)
    eps = torch.zeros_like(old)
    _, exact = shift_moments(new, old, *coefficients, eps)
    _, rounded = shift_moments(new.to(dtype).float(), old.to(dtype).float(), *coefficients, eps)
    floor = q_floor(old, np.full(4, step), schedule, dtype)
    assert (rounded - exact).mean().item() == pytest.approx(floor, rel=0.1)
