"""Reward rises: a run of the shipped recipe, shortened, must learn. Minutes long."""

import json

import numpy as np
import pytest

from fastgrpo.commands.train import train
from fastgrpo.config import load_config

# Iterations of about a minute on two cores for images, four and five minutes for videos; the reward that is looked at,
# and of how many held-out samples.
RECIPES = {
    "shapes-flux": (60, "shapes", 240),
    "shapes-z-image": (90, "shapes", 240),
    "shapes-flux2": (120, "shapes", 240),
    "shapes-stable-diffusion": (64, "shapes", 240),
    "shapes-flux-kontext": (90, "editing", 240),
    "shapes-hunyuan-video": (70, "moving_shapes", 480),
    "shapes-skyreels": (100, "moving_shapes", 480),
}


@pytest.mark.full
@pytest.mark.parametrize("recipe", list(RECIPES))
def test_reward_rises_in_minutes(tmp_path, recipe):
    iterations, reward, samples = RECIPES[recipe]
    overrides = [
        f"run.dir={tmp_path}/run",
        f"train.iterations={iterations}",
        f"eval.every={iterations}",
        f"eval.images={samples}",
        "telemetry.progress=false",
    ]
    train(load_config(f"configs/{recipe}.yaml", overrides))
    # The same held-out prompts from the same initial noise, before and after: each sample beside its own.
    before, after = (
        np.array(json.loads((tmp_path / "run" / "eval" / f"{iteration:06d}.json").read_text())["values"][reward])
        for iteration in (0, iterations)
    )
    difference = after - before
    assert len(difference) == samples
    assert difference.mean() > 2 * difference.std(ddof=1) / np.sqrt(len(difference))
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert all(line["ratio/first_max_deviation"] == 0 for line in lines)
