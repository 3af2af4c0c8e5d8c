"""Run directories with one checkpoint of random trained weights, without a training."""

from __future__ import annotations

from pathlib import Path

import torch

from fastgrpo.checkpoints.store import CheckpointStore
from fastgrpo.config import Config, dump
from fastgrpo.models import ModelFamily, load_family
from fastgrpo.models.trainable import make_trainable
from fastgrpo.training.optimizer import OptimizerState
from fastgrpo.training.state import training_tensors
from support import tiny_images, tiny_video

# alpha is not the rank.
LORA = {"rank": 2, "alpha": 6.0}


def config_of(kind: str, base: Path, run: Path, dtype: str, weights: str) -> Config:
    video = kind in tiny_video.MODELS
    sizes = {**(tiny_video.MODELS if video else tiny_images.MODELS)[kind], "dtype": dtype}
    model = {**sizes, "lora": None if weights == "full" else LORA}
    shift = "pipeline" if kind.startswith("sd") and kind != "sd3" else 2.0
    roll = {"steps": 3, "shift": shift, "trained": {"kind": "window", "size": 1}}
    if video:
        return tiny_video.video_config(base, kind, model={**model, "frames": 5}, run={"dir": str(run)}, rollout=roll)
    return tiny_images.image_config(base, kind, run, model=model, rollout=roll)


def written_run(tmp_path: Path, kind: str, dtype: str = "float32", weights: str = "lora") -> tuple[Config, ModelFamily]:
    """A run directory with one checkpoint of random trained weights, and the family that has them."""
    base, run = tmp_path / "base", tmp_path / "run"
    (tiny_video if kind in tiny_video.MODELS else tiny_images).build(kind).save_pretrained(base)
    config = config_of(kind, base, run, dtype, weights)
    family = load_family(config.model, torch.device("cpu"))
    make_trainable(family)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in family.policy.parameters():
            if p.requires_grad:
                p.add_(torch.randn(p.shape, generator=generator) * (0.2 if config.model.lora else 0.01))
    optimizer = OptimizerState(family.policy, config.update, 1)
    CheckpointStore.of_run(run).save(1, training_tensors(optimizer), {"best_iteration": None}, 1)
    (run / "config.yaml").write_text(dump(config))
    return config, family
