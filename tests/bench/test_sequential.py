"""The sequential baseline: it learns what ours learns, one row at a time, and the command reports both."""

import json

import numpy as np
import pytest
import torch
from support.tiny import tiny_config
from typer.testing import CliRunner

from fastgrpo.commands.bench import app, load
from fastgrpo.config import load_config
from fastgrpo.config.sections import dump_settings
from fastgrpo.errors import ConfigError
from fastgrpo.models.families.flux import Flux

sequential = load("sequential")


def test_the_baseline_takes_the_same_step_as_ours(tiny_flux, tmp_path, monkeypatch):
    path = tmp_path / "config.yaml"
    path.write_text(dump_settings(tiny_config(tiny_flux, rollout={"trained": {"kind": "subset"}})))
    rows = {name: [] for name in sequential.SIDES}
    norms = {}
    predict = Flux.predict
    for name, settings in sequential.SIDES.items():

        def counted(self, x, *args, seen=rows[name], **kwargs):
            seen.append(len(x))
            return predict(self, x, *args, **kwargs)

        monkeypatch.setattr(Flux, "predict", counted)
        bench = sequential.Bench(load_config(path, [*settings, f"run.dir={tmp_path / name}"]))
        bench.iterate()
        norms[name] = bench.result(0)
        lines = sequential.read_metrics(tmp_path / name)
        norms[name] = lines[0]["grad_norm"], lines[0]["reward/mean"]
    # 6 samples of 5 steps; 2 trained steps of each.
    assert rows["sequential"] == rows["uncheckpointed"] == [1] * (6 * 5 + 6 * 2)
    assert set(rows["ours"]) == {4}
    # Subtracted float32 log-probabilities cost the gradient some digits.
    assert np.allclose(norms["ours"], norms["sequential"], rtol=1e-3)
    assert norms["uncheckpointed"] == pytest.approx(norms["sequential"], rel=1e-6)


def test_the_command_gives_speedup_and_phases(tiny_flux, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(dump_settings(tiny_config(tiny_flux)))
    run = CliRunner().invoke(app, ["train", str(path), "--compare", "sequential", "--json", "--iterations", "1"])
    assert run.exit_code == 0, run.output
    result = json.loads(run.stdout)
    assert result["speedup"] == pytest.approx(result["sequential"]["seconds"] / result["ours"]["seconds"])
    again = result["uncheckpointed"]["seconds"] / result["ours"]["seconds"]
    assert result["speedup_uncheckpointed"] == pytest.approx(again)
    for side in ("ours", "sequential", "uncheckpointed"):
        assert {"rollout", "decode", "update", "reward", "total"} <= set(result[side]["phases"])
        # Processor time is that of this process alone, however many threads it has.
        assert 0 < result[side]["processor_seconds"] <= result[side]["seconds"] * 1.5 * torch.get_num_threads()
    lines = sequential.table(result).splitlines()
    assert [line.split()[0] for line in lines[-4:]] == ["iteration", "times", "processor", "times"]


def test_log_probabilities_know_the_ratio_alone(tiny_flux):
    with pytest.raises(ConfigError, match=r"rollout\.old_values: log_prob knows the ratio alone"):
        tiny_config(tiny_flux, rollout={"old_values": "log_prob"}, objective={"kl_weight": 0.1})


def test_no_host_read_with_log_probabilities(tiny_flux):
    from support.fake_run import run_iteration, tiny_pipeline

    config = tiny_config(tiny_flux, rollout={"old_values": "log_prob", "forward_batch": 1})
    pipeline = tiny_pipeline()
    sizes = pipeline.transformer.config
    encoded = {"text": (10, sizes.joint_attention_dim), "pooled": (sizes.pooled_projection_dim,)}
    run_iteration(pipeline, config, encoded)
    assert torch.is_grad_enabled()


def test_sides_of_a_recipe_take_turns(tiny_flux, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(dump_settings(tiny_config(tiny_flux)))
    sides = {name: [item for item in given if "batch" in item] for name, given in load("flow_grpo").SIDES.items()}
    assert sides["batch-3"] != sides["batch-16"]
    found = sequential.in_turns(path, ["eval.every=0"], {n: sides[n] for n in ("batch-3", "batch-16")}, 1, warm_up=0)
    assert all(result["processor_seconds"] > 0 for result in found.values())
    for name, given in load("flow_grpo").SIDES.items():
        config = load_config("configs/shapes-flux.yaml", [*load("flow_grpo").RECIPE, *given])
        assert config.rollout.shared_noise == (name == "prefix")
