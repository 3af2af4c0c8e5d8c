"""`make real-run-check`: its figures are those of the run's own files."""

import json

import pytest

from fastgrpo.commands.bench import load
from fastgrpo.config import load_config
from fastgrpo.planning.gpus import GPUS

real_run = load("real_run")
SMALL = ["rollout.prompts_per_iteration=2", "rollout.group_size=2", "rollout.steps=3", "rollout.forward_batch=2",
         "rollout.trained.size=1", "rollout.trained.start=0", "rollout.trained.move=fixed", "rollout.trained.stop=null",
         "eval.every=0", "eval.images=4", "eval.grid=2"]  # fmt: skip


def test_phases_are_medians_without_the_first_iteration():
    lines = [{"time/rollout": r, "time/update": 2.0} for r in (100.0, 1.0, 3.0, 2.0)]
    found = real_run.phase_seconds(lines)
    assert (found["rollout"], found["update"], found["reward"]) == (2.0, 2.0, 0.0)
    assert real_run.phase_seconds(lines[:1])["rollout"] == 100.0


def test_utilization_is_the_plans_work_over_the_measured_seconds():
    config = load_config("configs/shapes-stable-diffusion.yaml", SMALL)
    once = real_run.utilization(config, GPUS["h100"], 1, {"rollout": 1.0, "decode": 1.0, "update": 2.0})
    twice = real_run.utilization(config, GPUS["h100"], 1, {"rollout": 2.0, "decode": 2.0, "update": 4.0})
    assert once == pytest.approx(2 * twice)
    assert 0 < once < 1e-2


@pytest.mark.full
def test_one_command_gives_the_row(tmp_path, capsys):
    run = tmp_path / "run"
    real_run.main(
        ["configs/shapes-stable-diffusion.yaml", *SMALL, "--gpus", "1", "--iterations", "2", "--images", "4",
         "--run", str(run)]
    )  # fmt: skip
    found = json.loads((run / "real-run.json").read_text())
    summary = json.loads((run / "summary.json").read_text())
    assert (found["base"], found["tuned"]) == tuple(summary[m]["rewards"]["shapes"] for m in ("base", "tuned"))
    assert found["iterations"] == 2
    assert found["device"] == "cpu"
    assert found["utilization"] is None
    row = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("| shapes"))
    assert f"| 2 | {found['base']:.3f} | {found['tuned']:.3f} |" in row
