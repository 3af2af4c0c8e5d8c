"""From a pipeline's directory to a training run and out again: what is exported draws what was trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from support.tiny_images import PROMPTS, build, by_pipeline, drawn, image_config, use_ddim

from fastgrpo.commands.main import main
from fastgrpo.commands.runs import apply_checkpoint, open_run
from fastgrpo.config import dump
from fastgrpo.models import load_family
from fastgrpo.training.trainer import Trainer

LORA = {"rank": 2, "alpha": 4.0}
SHORT = [("sd_v", None), ("qwen_image", None), *((kind, LORA) for kind in ("sd3", "z_image", "flux2", "flux_kontext"))]
LONG = [
    (kind, lora)
    for kind in (
        *("sd_v", "sdxl", "sd3", "qwen_image", "flux", "z_image", "flux2"),
        *("flux_kontext", "qwen_2_1", "qwen_edit", "qwen_edit_plus"),
    )
    for lora in (None, LORA)
]


@pytest.mark.parametrize(
    "kind, lora", [*SHORT, *(pytest.param(*case, marks=pytest.mark.full) for case in LONG if case not in SHORT)]
)
def test_a_run_with_cached_prompts_exports_what_its_pipeline_loads(tmp_path: Path, kind, lora):
    base, exported = tmp_path / "base", tmp_path / "exported"
    build(kind).save_pretrained(base)
    model = {"embedding_cache": str(tmp_path / "prompts"), "lora": lora}
    rate = {"optimizer": {"lr": 1e-2}}
    written = image_config(base, kind, tmp_path / "run", model=model, update=rate)
    (tmp_path / "run.yaml").write_text(dump(written))
    assert main(["train", str(tmp_path / "run.yaml")]) == 0
    assert main(["export", str(tmp_path / "run"), str(exported)]) == 0

    config, store, iteration = open_run(tmp_path / "run", "latest")
    assert iteration == 2
    family = load_family(config.model, torch.device("cpu"))
    before = drawn(family, config, PROMPTS[:2])
    apply_checkpoint(family, config, store, iteration)
    after = drawn(family, config, PROMPTS[:2])
    assert (after - before).abs().max() > 5e-4
    pipeline = diffusers.DiffusionPipeline.from_pretrained(base if lora else exported)
    if lora:
        pipeline.load_lora_weights(exported)
    assert (after - by_pipeline(use_ddim(pipeline), family, PROMPTS[:2])).abs().max() <= 1e-4


def test_a_unet_in_bfloat16_is_sharded_and_trains(tmp_path: Path):
    """Its convolutions lie channels last, and FSDP2, which bfloat16 runs by, takes no such weights."""
    build("sd_v").save_pretrained(tmp_path / "base")
    trainer = Trainer.from_config(
        image_config(tmp_path / "base", "sd_v", tmp_path / "run", model={"dtype": "bfloat16"})
    )
    weights: list[Any] = list(trainer.family.policy.parameters())
    before = [p.full_tensor().clone() for p in weights]
    trainer.run()
    after = [p.full_tensor() for p in weights]
    assert all(torch.isfinite(p).all() for p in after)
    assert any((p != q).any() for p, q in zip(before, after, strict=True))
