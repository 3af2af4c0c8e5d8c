"""A tiny random FLUX and configs over it, for tests of the trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from fastgrpo.algorithms.layout import Layout, lay_out, rank_samples
from fastgrpo.algorithms.schedule import StepSchedule, schedule_steps
from fastgrpo.config import Config, validate
from fastgrpo.data.prompts import Prompt, load_prompts
from fastgrpo.models import Conditioning, ModelFamily, load_family


def tiny_config(path: Path | str, run_dir: Path | str = "runs/none", **sections: Any) -> Config:
    """A valid config over a pipeline directory; keyword arguments update whole sections."""
    data: dict[str, Any] = {
        "run": {"dir": str(run_dir), "seed": 7},
        "model": {"family": "flux", "path": str(path), "height": 32, "width": 32, "max_sequence_length": 10},
        "prompts": {"train": "shapes:train", "heldout": "shapes:heldout"},
        "rewards": [{"name": "shapes"}],
        "rollout": {"prompts_per_iteration": 2, "group_size": 3, "steps": 5, "shift": 2.0, "forward_batch": 4,
                    "trained": {"kind": "window", "size": 2, "start": 1}},
        "update": {"optimizer": {"lr": 1e-4}},
        "train": {"iterations": 2},
        "eval": {"every": 0},
        "checkpoint": {"every": 0},
        "telemetry": {"progress": False},
    }  # fmt: skip
    for name, values in sections.items():
        data[name] = {**data[name], **values} if isinstance(values, dict) and name in data else values
    return validate(data)


def tiny_rollout_inputs(
    config: Config, iteration: int = 0
) -> tuple[ModelFamily, StepSchedule, Layout, Conditioning, list[Prompt]]:
    """What a rollout of one rank takes, and its prompts."""
    family = load_family(config.model, torch.device("cpu"))
    prompts = load_prompts(config.prompts.train)[::40][: config.rollout.prompts_per_iteration]
    count = len(prompts) * config.rollout.group_size
    levels = family.noise_levels(config.rollout.steps, config.rollout.shift)
    schedule = schedule_steps(config.rollout, levels, count, iteration, config.run.seed)
    layout = lay_out(schedule, config.rollout, rank_samples(count, 1, 1, 0).reshape(-1))
    return family, schedule, layout, family.encode(prompts), prompts
