"""Rollout, decode and update of the video models at their real configurations, under FakeTensorMode: every shape and
keyword of the real thing, no host read, without its weights. Reduced depth here, whole in `make test-full`."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from support.fake_run import run_iteration
from support.tiny_video import video_config

WAN_14B = {"num_attention_heads": 40, "ffn_dim": 13824, "cross_attn_norm": True}
WAN_5B = {"num_attention_heads": 24, "ffn_dim": 14336, "cross_attn_norm": True, "in_channels": 48, "out_channels": 48}
WAN_5B_VAE = {
    "base_dim": 160, "decoder_base_dim": 256, "z_dim": 48, "in_channels": 12, "out_channels": 12, "patch_size": 2,
    "is_residual": True, "scale_factor_spatial": 16, "latents_mean": [0.0] * 48, "latents_std": [1.0] * 48,
}  # fmt: skip
# Text tokens, text width and what else a prompt is encoded to, of one prompt.
HUNYUAN_TEXT = {"text": (256, 4096), "pooled": (768,)}
LATENT_48 = (3, 48, 48)
# kind: (transformer of the real width, whole depth, conditioning, latent channels)
REAL: dict[str, tuple[dict[str, Any], dict[str, int], dict[str, tuple[int, ...]], int]] = {
    "hunyuan_video": ({}, {"num_layers": 20, "num_single_layers": 40}, HUNYUAN_TEXT, 16),
    "hunyuan_15": (
        {"task_type": "t2v"},
        {"num_layers": 54},
        {"text": (256, 3584), "glyphs": (256, 1472), "negative_text": (256, 3584), "negative_glyphs": (256, 1472)},
        32,
    ),
    "hunyuan_15_i2v": (
        {"task_type": "i2v"},
        {"num_layers": 54},
        {
            "text": (256, 3584),
            "glyphs": (256, 1472),
            "negative_text": (256, 3584),
            "negative_glyphs": (256, 1472),
            "first_frame": (32, 1, 24, 24),
            "image": (729, 1152),
        },
        32,
    ),
    "ltx2": (
        {},
        {"num_layers": 48},
        {
            "text": (256, 3840),
            "sound_text": (256, 3840),
            "negative_text": (256, 3840),
            "negative_sound_text": (256, 3840),
        },
        128,
    ),
    "skyreels": (
        {"in_channels": 32},
        {"num_layers": 20, "num_single_layers": 40},
        {**HUNYUAN_TEXT, "negative_text": (256, 4096), "negative_pooled": (768,), "first_frame": (16, 1, 48, 48)},
        16,
    ),
    "wan": (WAN_14B, {"num_layers": 40}, {"text": (512, 4096), "negative_text": (512, 4096)}, 16),
    "wan_two": (WAN_14B, {"num_layers": 40}, {"text": (512, 4096), "negative_text": (512, 4096)}, 16),
    "wan_i2v": (
        {**WAN_14B, "in_channels": 36, "image_dim": 1280, "added_kv_proj_dim": 5120},
        {"num_layers": 40},
        {"text": (512, 4096), "negative_text": (512, 4096), "condition": (20, *LATENT_48), "image": (257, 1280)},
        16,
    ),
    "wan_5b_i2v": (
        WAN_5B,
        {"num_layers": 30},
        {"text": (512, 4096), "negative_text": (512, 4096), "condition": (48, 1, 24, 24)},
        48,
    ),
}


def real_pipeline(kind: str, depth: dict[str, int]) -> Any:
    """The pipeline as it is configured, of any depth, on the meta device."""
    import diffusers

    family = "wan" if kind.startswith("wan") else "hunyuan_15" if kind.startswith("hunyuan_15") else kind
    settings: dict[str, Any] = {**REAL[kind][0], **depth}
    vae_settings: dict[str, Any] = WAN_5B_VAE if "5b" in kind else {}
    second: Any = None
    with torch.device("meta"):
        if family == "wan":
            transformer = diffusers.WanTransformer3DModel(**settings)
            second = diffusers.WanTransformer3DModel(**settings) if "two" in kind else None
            vae = diffusers.AutoencoderKLWan(**vae_settings)
        elif family == "ltx2":
            transformer = diffusers.LTX2VideoTransformer3DModel(**settings)
            vae = diffusers.AutoencoderKLLTX2Video(spatial_compression_ratio=32, temporal_compression_ratio=8)
        elif family == "hunyuan_15":
            transformer = diffusers.HunyuanVideo15Transformer3DModel(**settings)
            vae = diffusers.AutoencoderKLHunyuanVideo15()
        else:
            transformer = diffusers.HunyuanVideoTransformer3DModel(**settings)
            vae = diffusers.AutoencoderKLHunyuanVideo()
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=5.0)
    parts: dict[str, Any] = {"vae": vae, "transformer": transformer, "scheduler": scheduler}
    if family == "wan":
        pipeline = diffusers.WanImageToVideoPipeline if kind.endswith("i2v") else diffusers.WanPipeline
        parts |= {"tokenizer": None, "text_encoder": None, "expand_timesteps": "5b" in kind}
        # Two steps, one on each side.
        parts |= {"transformer_2": second, "boundary_ratio": 0.875} if second else {}
        return pipeline(**parts)
    if family == "ltx2":
        parts["scheduler"] = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift_terminal=0.1)
        parts |= dict.fromkeys(("audio_vae", "text_encoder", "tokenizer", "connectors", "vocoder"))
        return diffusers.LTX2Pipeline(**parts)
    parts |= dict.fromkeys(("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"))
    if family == "hunyuan_15":
        parts["guider"] = diffusers.ClassifierFreeGuidance()
        if not kind.endswith("i2v"):
            return diffusers.HunyuanVideo15Pipeline(**parts)
        parts |= {"image_encoder": None, "feature_extractor": None}
        return diffusers.HunyuanVideo15ImageToVideoPipeline(**parts)
    pipeline = diffusers.HunyuanSkyreelsImageToVideoPipeline if kind == "skyreels" else diffusers.HunyuanVideoPipeline
    return pipeline(**parts)


def run(kind: str, depth: dict[str, int], lora: dict[str, Any] | None) -> dict[str, torch.Size]:
    """One iteration of one prompt's pair of videos of 9 frames, 384 × 384."""
    tokens = REAL[kind][2]["text"][0]
    family = kind.split("_5b")[0].removesuffix("_two").removesuffix("_i2v").replace("hunyuan_15", "hunyuan_video_1_5")
    model = {"family": family, "guidance": 5.0, "max_sequence_length": tokens,
             "height": 384, "width": 384, "frames": 9, "lora": lora}  # fmt: skip
    roll = {"prompts_per_iteration": 1, "group_size": 2, "steps": 2, "forward_batch": 2, "decode_batch": 2,
            "trained": {"kind": "window", "size": 1, "start": 0}}  # fmt: skip
    config = video_config("unused", "wan", model=model, rollout=roll)
    lengths = {"text_length": np.array([37]), "negative_text_length": np.array([1]), "glyph_length": np.array([5]),
               "negative_glyph_length": np.array([0])}  # fmt: skip
    return run_iteration(real_pipeline(kind, depth), config, REAL[kind][2], lengths)


# One of Wan and of HunyuanVideo 1.5 here: its image to video takes all that its text to video takes.
SLOW = ("wan", "wan_two", "wan_5b_i2v", "hunyuan_15")


@pytest.mark.parametrize("kind", [pytest.param(k, marks=pytest.mark.full) if k in SLOW else k for k in REAL])
def test_one_layer_of_the_real_width(kind):
    shapes = run(kind, dict.fromkeys(REAL[kind][1], 1), None)
    assert shapes["images"] == (2, 3, 9, 384, 384)
    if kind == "ltx2":
        # 128 channels of two frames of 12 × 12 latents; at 8 frames a second, 28 tokens of sound.
        assert shapes["latents"] == (2, 128 * (2 * 12 * 12 + 28))
        return
    factor = 16 if "5b" in kind or "_15" in kind else 8
    assert shapes["latents"] == (2, REAL[kind][3], 3, 384 // factor, 384 // factor)


@pytest.mark.full
@pytest.mark.parametrize("lora", [None, {"rank": 64, "alpha": 128.0}], ids=["full", "lora"])
@pytest.mark.parametrize("kind", REAL)
def test_the_whole_model(kind, lora):
    pipeline = real_pipeline(kind, REAL[kind][1])
    size = sum(p.numel() for p in pipeline.transformer.parameters()) / 1e9
    assert {
        "hunyuan_video": 12.8,
        "skyreels": 12.8,
        "wan": 14.3,
        "wan_i2v": 16.4,
        "wan_5b_i2v": 5.0,
        "hunyuan_15": 8.3,
        "ltx2": 18.9,
        "hunyuan_15_i2v": 8.3,
    }[kind] == pytest.approx(size, abs=0.2)
    assert run(kind, REAL[kind][1], lora)["images"] == (2, 3, 9, 384, 384)
