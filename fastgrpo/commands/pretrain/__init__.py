"""Pretrains the embedded models from scratch: `fastgrpo pretrain configs/pretrain-shapes-<family>.yaml`.

Only prompts of the training splits are drawn; held-out prompts are for evaluation alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import diffusers.utils.logging
import torch
import transformers.utils.logging

from fastgrpo.commands.pretrain import autoencoder, denoiser
from fastgrpo.commands.pretrain.recipe import TINY, PretrainConfig
from fastgrpo.config.overrides import load_data
from fastgrpo.config.sections import dump_settings, validate_settings

__all__ = ["main"]


def main(config_path: str | Path, overrides: Sequence[str] = ()) -> Path:
    """Runs the recipe of a YAML file; returns the directory of the finished pipeline, or CLIP."""
    data = load_data(config_path, overrides)
    if data.get("family") == "clip":
        from fastgrpo.commands.pretrain.clip import run

        return run(data)
    config = validate_settings(PretrainConfig, data)
    torch.set_num_threads(config.threads)
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    (out / "config.yaml").write_text(dump_settings(config))
    pipeline = TINY[config.family].build(config)
    (autoencoder.train if config.init is None else autoencoder.take)(pipeline.vae, config)
    # The second stage learns the latents of the weights that are shipped.
    pipeline.vae.bfloat16().float()
    if config.init is None:
        denoiser.save_bfloat16(pipeline, out / "autoencoder")
    print(
        f"reconstructions: strict {autoencoder.strict_rate(pipeline.vae, config, config.eval.final_images):.4f}",
        flush=True,
    )
    denoiser.train(pipeline, config)
    return out / "final"
