"""Tiny random video pipelines of the real classes, and configs over them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from fastgrpo.config import Config, validate
from fastgrpo.shapes import moving_world
from fastgrpo.shapes.tiny_hunyuan_video import TinyHunyuanVideoSizes, build_pipeline, build_tokenizer

MODELS: dict[str, dict[str, Any]] = {
    "hunyuan_video": {"family": "hunyuan_video", "guidance": 6.018, "max_sequence_length": 14},
    "skyreels": {"family": "skyreels", "guidance": 3.0, "max_sequence_length": 14},
    "wan": {"family": "wan", "guidance": 3.0, "max_sequence_length": 14},
    "wan_5b": {"family": "wan", "guidance": 3.0, "max_sequence_length": 14},
    "wan_i2v": {"family": "wan", "guidance": 3.0, "max_sequence_length": 512},
    "wan_5b_i2v": {"family": "wan", "guidance": 3.0, "max_sequence_length": 14},
    "wan_two": {"family": "wan", "guidance": 3.0, "max_sequence_length": 14},
}


def build(kind: str, seed: int = 0) -> Any:
    """A random pipeline whose outputs are not nearly zero."""
    if kind in ("hunyuan_video", "skyreels"):
        sizes = TinyHunyuanVideoSizes(task="image" if kind == "skyreels" else "text", single_layers=1)
        return build_pipeline(moving_world.vocabulary(), sizes, seed)
    return build_wan(kind, seed)


def build_wan(kind: str, seed: int) -> Any:
    from diffusers import (
        AutoencoderKLWan,
        UniPCMultistepScheduler,
        WanImageToVideoPipeline,
        WanPipeline,
        WanTransformer3DModel,
    )
    from transformers import CLIPImageProcessorPil, CLIPVisionConfig, CLIPVisionModel, UMT5Config, UMT5EncoderModel

    torch.manual_seed(seed)
    from_image, per_token = kind.endswith("i2v"), "5b" in kind
    tokenizer = build_tokenizer(moving_world.vocabulary(), 512, template=False)
    text = UMT5Config(
        vocab_size=len(tokenizer), d_model=32, d_kv=16, d_ff=64, num_layers=2, num_heads=2, dropout_rate=0.0
    )
    z = 48 if per_token else 16
    statistics: dict[str, Any] = {"latents_mean": [0.1] * z, "latents_std": [1.5] * z}
    vae = AutoencoderKLWan(
        base_dim=8, z_dim=z, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True],
        **statistics,
    )  # fmt: skip
    image_dim = 32 if kind == "wan_i2v" else None
    transformers = [
        WanTransformer3DModel(
            patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=16,
            in_channels=z + 4 + z if kind == "wan_i2v" else z, out_channels=z, text_dim=32, freq_dim=32, ffn_dim=64,
            num_layers=2, cross_attn_norm=True, image_dim=image_dim, rope_max_seq_len=64,
            added_kv_proj_dim=32 if image_dim else None,
        )
        for _ in range(2 if kind == "wan_two" else 1)
    ]  # fmt: skip
    for module in transformers:
        torch.nn.init.normal_(module.proj_out.weight, std=0.3)
    parts: dict[str, Any] = {
        "tokenizer": tokenizer, "text_encoder": UMT5EncoderModel(text), "vae": vae,
        "scheduler": UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0, num_train_timesteps=1000
        ),
        "transformer": transformers[0], "transformer_2": transformers[1] if len(transformers) > 1 else None,
        "boundary_ratio": 0.8 if len(transformers) > 1 else None, "expand_timesteps": per_token,
    }  # fmt: skip
    if image_dim:
        vision = CLIPVisionConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=3,
            num_attention_heads=2,
            image_size=32,
            patch_size=8,
        )
        size = {"height": 32, "width": 32}
        parts |= {
            "image_encoder": CLIPVisionModel(vision),
            "image_processor": CLIPImageProcessorPil(size=size, crop_size=size),
        }
    for part in parts.values():
        if isinstance(part, torch.nn.Module):
            part.eval()
    return (WanImageToVideoPipeline if from_image else WanPipeline)(**parts)


def video_config(path: Path | str, kind: str, **sections: Any) -> Config:
    """A valid config over a pipeline directory; keyword arguments update whole sections."""
    data: dict[str, Any] = {
        "run": {"dir": "runs/none", "seed": 7},
        "model": {"path": str(path), "height": 32, "width": 32, "frames": 9, **MODELS[kind]},
        "prompts": {"train": "moving:train", "heldout": "moving:heldout"},
        "rewards": [{"name": "moving_shapes"}],
        "rollout": {"prompts_per_iteration": 2, "group_size": 2, "steps": 4, "forward_batch": 2, "decode_batch": 2,
                    "trained": {"kind": "window", "size": 2, "start": 1}},
        "update": {"optimizer": {"lr": 1e-4}},
        "train": {"iterations": 2}, "eval": {"every": 0}, "checkpoint": {"every": 0},
        "telemetry": {"progress": False},
    }  # fmt: skip
    for name, values in sections.items():
        data[name] = {**data[name], **values} if isinstance(values, dict) and name in data else values
    return validate(data)
