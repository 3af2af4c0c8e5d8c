"""A Stable Diffusion pipeline of under two million parameters: diffusers' own classes, a closed vocabulary.

`StableDiffusionPipeline.from_pretrained` loads what `build_pipeline(...).save_pretrained` writes.
"""

from typing import Literal

import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from pydantic import Field

from fastgrpo.config.sections import Section
from fastgrpo.shapes.tiny_parts import SPECIAL_TOKENS, build_autoencoder, build_clip, build_tokenizer


class TinyStableDiffusionSizes(Section):
    """Sizes of the tiny Stable Diffusion; the defaults are those of the shipped weights."""

    image_size: int = 32
    text_length: int = 10
    latent_channels: int = 3
    vae_channels: list[int] = Field(default_factory=lambda: [16, 32, 48])
    # Channels of the UNet at 8×8 and at 4×4 latents; the latter alone attends to the text.
    unet_channels: list[int] = Field(default_factory=lambda: [32, 80])
    attention_head_dim: int = 32
    text_width: int = 64
    text_layers: int = 2
    prediction: Literal["epsilon", "v_prediction", "sample"] = "v_prediction"


def build_pipeline(words: tuple[str, ...], sizes: TinyStableDiffusionSizes, seed: int) -> StableDiffusionPipeline:
    """An untrained StableDiffusionPipeline in float32 whose tokenizer knows `words`; resets torch's global seed."""
    torch.manual_seed(seed)
    text_encoder = build_clip(sizes.text_width, sizes.text_layers, sizes.text_length, len(SPECIAL_TOKENS) + len(words))
    vae = build_autoencoder(sizes.image_size, sizes.latent_channels, sizes.vae_channels)
    # Its latents are only scaled: this pipeline knows no shift.
    vae.register_to_config(shift_factor=None)
    plain = len(sizes.unet_channels) - 1
    heads = tuple(max(1, width // sizes.attention_head_dim) for width in sizes.unet_channels)
    unet = UNet2DConditionModel(
        sample_size=sizes.image_size // 2 ** (len(sizes.vae_channels) - 1),
        in_channels=sizes.latent_channels,
        out_channels=sizes.latent_channels,
        down_block_types=("DownBlock2D",) * plain + ("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",) + ("UpBlock2D",) * plain,
        block_out_channels=tuple(sizes.unet_channels),
        layers_per_block=1,
        norm_num_groups=8,
        cross_attention_dim=sizes.text_width,
        # diffusers' name for the number of heads, for historical reasons.
        attention_head_dim=heads,  # pyright: ignore[reportArgumentType]
    )
    scheduler = DDIMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        clip_sample=False,
        set_alpha_to_one=False,
        prediction_type=sizes.prediction,
        timestep_spacing="trailing",
        steps_offset=1,
    )
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=build_tokenizer(words, sizes.text_length, start=True),  # pyright: ignore[reportArgumentType]
        unet=unet,
        scheduler=scheduler,  # pyright: ignore[reportArgumentType]
        safety_checker=None,  # pyright: ignore[reportArgumentType]
        feature_extractor=None,  # pyright: ignore[reportArgumentType]
        requires_safety_checker=False,
    )
    for module in (text_encoder, vae, unet):
        module.eval()
    return pipeline
