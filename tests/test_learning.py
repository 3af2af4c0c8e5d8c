"""Reward rises: a run of the shipped recipe, shortened, must learn. Minutes long."""

import json

import numpy as np
import pytest

from fastgrpo.config import load_config
from fastgrpo.trainer import train

# Iterations of about a minute on two cores.
ITERATIONS = {"shapes-flux": 60, "shapes-stable-diffusion": 64}


@pytest.mark.full
@pytest.mark.parametrize("recipe", list(ITERATIONS))
def test_reward_rises_in_a_minute(tmp_path, recipe):
    iterations = ITERATIONS[recipe]
    overrides = [
        f"run.dir={tmp_path}/run",
        f"train.iterations={iterations}",
        "eval.every=0",
        # Prompts chosen by their spread get harder as training goes: the reward of all of them is what must rise.
        "prompts.select=epochs",
        "telemetry.progress=false",
    ]
    train(load_config(f"configs/{recipe}.yaml", overrides))
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    rewards = np.array([line["reward/mean"] for line in lines])
    # Prompts differ from iteration to iteration: compare quarters, against the noise within them.
    first, last = rewards[: iterations // 4], rewards[-iterations // 4 :]
    error = np.sqrt(first.var(ddof=1) / len(first) + last.var(ddof=1) / len(last))
    assert last.mean() - first.mean() > 2 * error
    assert all(line["ratio/first_max_deviation"] == 0 for line in lines)
