"""Rollout, decode and update of the image models at their real configurations, under FakeTensorMode: every shape and
keyword of the real thing, no host read, without its weights. Reduced depth here, whole in `make test-full`."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch
from support.fake_run import run_iteration
from support.tiny_images import image_config

from fastgrpo.config import Config
from fastgrpo.models import family_class

# Stable Diffusion 1.5 and XL, FLUX.1-dev, Stable Diffusion 3.5 large, Qwen-Image, Z-Image and FLUX.2-klein 9B, as their
# config.json files have them.
VAE = {
    "down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "latent_channels": 16,
    "use_quant_conv": False, "use_post_quant_conv": False,
}  # fmt: skip
SD_15 = {"cross_attention_dim": 768, "attention_head_dim": 8, "sample_size": 64}
SD_XL = {
    "cross_attention_dim": 2048, "attention_head_dim": (5, 10, 20), "sample_size": 128, "use_linear_projection": True,
    "block_out_channels": (320, 640, 1280), "transformer_layers_per_block": (1, 2, 10),
    "addition_embed_type": "text_time", "addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 2816,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
}  # fmt: skip
SD_35_LARGE = {
    "num_attention_heads": 38, "attention_head_dim": 64, "caption_projection_dim": 2432, "pos_embed_max_size": 192,
    "qk_norm": "rms_norm", "pooled_projection_dim": 2048, "joint_attention_dim": 4096,
}  # fmt: skip
FLUX = {"in_channels": 64, "guidance_embeds": True}
KLEIN_9B = {"num_attention_heads": 32, "joint_attention_dim": 12288, "guidance_embeds": False}
# kind: (family, whole depth, reduced depth, size, what a prompt is encoded to, billions of parameters)
REAL: dict[str, tuple[str, dict[str, Any], dict[str, Any], int, dict[str, tuple[int, ...]], float]] = {
    "sd15": ("stable_diffusion", {"layers_per_block": 2}, {"layers_per_block": 1}, 512, {"text": (77, 768)}, 0.86),
    "sdxl": (
        "stable_diffusion",
        {"layers_per_block": 2},
        {"layers_per_block": 1, "transformer_layers_per_block": 1},
        1024,
        {"text": (77, 2048), "pooled": (1280,)},
        2.57,
    ),
    "flux": (
        "flux",
        {"num_layers": 19, "num_single_layers": 38},
        {"num_layers": 1, "num_single_layers": 1},
        720,
        {"text": (512, 4096), "pooled": (768,)},
        11.9,
    ),
    "flux_kontext": (
        "flux_kontext",
        {"num_layers": 19, "num_single_layers": 38},
        {"num_layers": 1, "num_single_layers": 1},
        720,
        {"text": (512, 4096), "pooled": (768,), "source": (2025, 64)},
        11.9,
    ),
    "sd35_large": (
        "sd3", {"num_layers": 38}, {"num_layers": 2}, 1024, {"text": (77 + 256, 4096), "pooled": (2048,)}, 8.06
    ),
    "qwen_image": (
        "qwen_image", {"num_layers": 60}, {"num_layers": 1}, 720, {"text": (256, 3584), "mask": (256,)}, 20.4
    ),
    "qwen_2_1": (
        "qwen_image_2_1", {"num_layers": 32}, {"num_layers": 1}, 736, {"text": (256, 4096), "mask": (256,)}, 7.1
    ),
    "qwen_edit": (
        # With what its checkpoint 2511 has beside 2509.
        "qwen_image_edit", {"num_layers": 60, "zero_cond_t": True}, {"num_layers": 1, "zero_cond_t": True}, 720,
        {"text": (14 * 14 + 256, 3584), "mask": (14 * 14 + 256,), "source": (2025, 64)}, 20.4,
    ),
    "z_image": (
        "z_image", {"n_layers": 30}, {"n_layers": 1, "n_refiner_layers": 1}, 720,
        {"text": (256, 2560), "mask": (256,)}, 6.15,
    ),
    "flux2": (
        "flux2", {"num_layers": 8, "num_single_layers": 24}, {"num_layers": 1, "num_single_layers": 1}, 720,
        {"text": (512, 12288)}, 9.08,
    ),
}  # fmt: skip


@pytest.fixture(autouse=True)
def published_sizes(monkeypatch):
    """Tests of tiny pipelines in the same process shrink what the editing pipelines' encoder sees."""
    from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus

    monkeypatch.setattr(pipeline_qwenimage_edit_plus, "CONDITION_IMAGE_SIZE", 384 * 384)


def real_pipeline(kind: str, depth: dict[str, Any]) -> Any:
    """The pipeline as it is configured, of any depth, on the meta device."""
    flow = diffusers.FlowMatchEulerDiscreteScheduler
    with torch.device("meta"):
        if kind in ("sd15", "sdxl"):
            settings: Any = {"in_channels": 4, "out_channels": 4, **(SD_15 if kind == "sd15" else SD_XL), **depth}
            vae: Any = {**VAE, "latent_channels": 4, "use_quant_conv": True, "use_post_quant_conv": True}
            parts: dict[str, Any] = {
                "unet": diffusers.UNet2DConditionModel(**settings),
                "vae": diffusers.AutoencoderKL(**vae),
            }
        elif kind in ("flux", "flux_kontext"):
            settings, vae = {**FLUX, **depth}, {**VAE, "scaling_factor": 0.3611, "shift_factor": 0.1159}
            parts = {"transformer": diffusers.FluxTransformer2DModel(**settings), "vae": diffusers.AutoencoderKL(**vae)}
        elif kind == "sd35_large":
            settings, vae = {**SD_35_LARGE, **depth}, {**VAE, "scaling_factor": 1.5305, "shift_factor": 0.0609}
            parts = {"transformer": diffusers.SD3Transformer2DModel(**settings), "vae": diffusers.AutoencoderKL(**vae)}
        elif kind == "z_image":
            vae = {**VAE, "scaling_factor": 0.3611, "shift_factor": 0.1159}
            parts = {
                "transformer": diffusers.ZImageTransformer2DModel(**depth),
                "vae": diffusers.AutoencoderKL(**vae),
            }
        elif kind == "qwen_2_1":
            parts = {
                "transformer": diffusers.QwenImage21Transformer2DModel(**depth),
                "vae": diffusers.AutoencoderKLQwenImage21(),
            }
        elif kind == "flux2":
            settings = {**KLEIN_9B, **depth}
            parts = {
                "transformer": diffusers.Flux2Transformer2DModel(**settings),
                "vae": diffusers.AutoencoderKLFlux2(),
            }
        else:
            settings = {"guidance_embeds": False, **depth}
            parts = {
                "transformer": diffusers.QwenImageTransformer2DModel(**settings),
                "vae": diffusers.AutoencoderKLQwenImage(),
            }
    encoders = {
        "sd15": ("text_encoder", "tokenizer", "safety_checker", "feature_extractor"),
        "sd35_large": ("text_encoder", "text_encoder_2", "text_encoder_3", "tokenizer", "tokenizer_2", "tokenizer_3"),
        **dict.fromkeys(("qwen_image", "z_image", "flux2"), ("text_encoder", "tokenizer")),
        "qwen_2_1": ("text_encoder",),
        "qwen_edit": ("text_encoder", "tokenizer", "processor"),
    }
    parts |= dict.fromkeys(encoders.get(kind, ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")))
    if kind in ("sd15", "sdxl"):
        parts["scheduler"] = diffusers.DDIMScheduler(
            beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False, steps_offset=1,
            set_alpha_to_one=False,
        )  # fmt: skip
        if kind == "sd15":
            return diffusers.StableDiffusionPipeline(**parts, requires_safety_checker=False)
        return diffusers.StableDiffusionXLPipeline(**parts, add_watermarker=False)
    if kind in ("flux", "flux_kontext"):
        pipeline = diffusers.FluxPipeline if kind == "flux" else diffusers.FluxKontextPipeline
        return pipeline(**parts, scheduler=flow(shift=3.0, use_dynamic_shifting=True))
    if kind == "sd35_large":
        return diffusers.StableDiffusion3Pipeline(**parts, scheduler=flow(shift=3.0))
    if kind == "z_image":
        return diffusers.ZImagePipeline(**parts, scheduler=flow(shift=3.0))
    if kind == "flux2":
        return diffusers.Flux2KleinPipeline(**parts, scheduler=flow(shift=3.0, use_dynamic_shifting=True))
    dynamic: Any = {"max_image_seq_len": 8192, "max_shift": 0.9, "shift_terminal": 0.02, "use_dynamic_shifting": True}
    if kind == "qwen_2_1":
        parts |= family_class("qwen_image_2_1").word_tokenizers(256)
        return diffusers.QwenImage21Pipeline(**parts, scheduler=flow(use_dynamic_shifting=True))
    if kind == "qwen_edit":
        return diffusers.QwenImageEditPlusPipeline(**parts, scheduler=flow(**dynamic))
    return diffusers.QwenImagePipeline(**parts, scheduler=flow(**dynamic))


def config_of(kind: str, lora: dict[str, Any] | None) -> Config:
    """One prompt's pair of images, two trained steps."""
    family, _, _, size, encoded, _ = REAL[kind]
    # SD 3's text is a CLIP's 77 tokens, and T5's.
    # Qwen-Image-Edit's begins with the source as the encoder sees it.
    tokens = encoded["text"][0] - {"sd3": 77, "qwen_image_edit": 14 * 14}.get(family, 0)
    model = {"family": family, "guidance": 4.0, "height": size, "width": size, "lora": lora,
             "max_sequence_length": tokens}  # fmt: skip
    roll = {"prompts_per_iteration": 1, "group_size": 2, "steps": 3, "forward_batch": 2, "decode_batch": 1,
            "trained": {"kind": "window", "size": 2, "start": 0}}  # fmt: skip
    return image_config("unused", "flux", model=model, rollout=roll)


def encoded_of(kind: str) -> dict[str, tuple[int, ...]]:
    """Of a prompt, and where guidance has two branches, of its negative."""
    encoded = REAL[kind][4]
    negative = {f"negative_{name}": shape for name, shape in encoded.items()}
    return encoded if kind in ("flux", "flux_kontext") else encoded | negative


LATENTS = {
    "sd15": (4, 64, 64), "sdxl": (4, 128, 128), "flux": (2025, 64), "flux_kontext": (2025, 64),
    "sd35_large": (16, 128, 128), "qwen_image": (2025, 64), "qwen_2_1": (2116, 64), "qwen_edit": (2025, 64),
    "z_image": (16, 90, 90), "flux2": (128, 45, 45),
}  # fmt: skip


@pytest.mark.parametrize("kind", [pytest.param(k, marks=pytest.mark.full) if k == "sdxl" else k for k in REAL])
def test_reduced_depth_at_the_real_width(kind):
    shapes = run_iteration(real_pipeline(kind, REAL[kind][2]), config_of(kind, None), encoded_of(kind))
    size = REAL[kind][3]
    assert shapes["latents"] == (2, *LATENTS[kind])
    assert shapes["images"] == (2, 3, size, size)


@pytest.mark.full
@pytest.mark.parametrize("lora", [None, {"rank": 128, "alpha": 256.0}], ids=["full", "lora"])
@pytest.mark.parametrize("kind", REAL)
def test_the_whole_model(kind, lora):
    pipeline = real_pipeline(kind, REAL[kind][1])
    trained = pipeline.unet if kind in ("sd15", "sdxl") else pipeline.transformer
    assert sum(p.numel() for p in trained.parameters()) / 1e9 == pytest.approx(REAL[kind][5], rel=0.02)
    assert run_iteration(pipeline, config_of(kind, lora), encoded_of(kind))["latents"] == (2, *LATENTS[kind])
