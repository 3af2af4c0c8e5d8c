"""A Z-Image pipeline of about a million parameters: diffusers' and transformers' own classes, a closed vocabulary.

`ZImagePipeline.from_pretrained` loads what `build_pipeline(...).save_pretrained` writes.
"""

from typing import Any

import torch
from diffusers.models.transformers.transformer_z_image import ZImageTransformer2DModel
from diffusers.pipelines.z_image.pipeline_z_image import ZImagePipeline
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from pydantic import Field, model_validator
from transformers import Qwen3Model

from fastgrpo.config.sections import Section
from fastgrpo.errors import ConfigError
from fastgrpo.shapes.tiny_parts import build_autoencoder, build_chat_tokenizer, build_qwen3


class TinyZImageSizes(Section):
    """Sizes of the tiny Z-Image."""

    image_size: int = 32
    # Of a prompt's words and the chat template's, of which there are eight.
    text_length: int = 18
    latent_channels: int = 3
    vae_channels: list[int] = Field(default_factory=lambda: [16, 32, 48])
    attention_heads: int = 4
    rope_axes: list[int] = Field(default_factory=lambda: [8, 8, 8])
    layers: int = 4
    refiner_layers: int = 1
    text_width: int = 64
    text_layers: int = 3
    # Of Z-Image-Turbo.
    shift: float = 3.0

    @model_validator(mode="after")
    def _check(self) -> "TinyZImageSizes":
        if self.text_width % 16:
            raise ConfigError(f"sizes.text_width: {self.text_width} is not a multiple of 16, the width of a head")
        return self


def build_pipeline(words: tuple[str, ...], sizes: TinyZImageSizes, seed: int) -> ZImagePipeline:
    """An untrained ZImagePipeline in float32 whose tokenizer knows `words`; resets torch's global seed."""
    torch.manual_seed(seed)
    tokenizer = build_chat_tokenizer(words, sizes.text_length)
    side = sizes.image_size // 2 ** len(sizes.vae_channels)
    transformer = ZImageTransformer2DModel(
        in_channels=sizes.latent_channels,
        dim=sizes.attention_heads * sum(sizes.rope_axes),
        n_layers=sizes.layers,
        n_refiner_layers=sizes.refiner_layers,
        n_heads=sizes.attention_heads,
        n_kv_heads=sizes.attention_heads,
        cap_feat_dim=sizes.text_width,
        axes_dims=sizes.rope_axes,
        # Text positions come before the image's; twice the side for larger images.
        axes_lens=[2 * (sizes.text_length + 32), 4 * side, 4 * side],
    )
    # What is drawn in place of padding, so that it matters.
    for pad in (transformer.x_pad_token, transformer.cap_pad_token):
        torch.nn.init.normal_(pad, std=0.5)
    parts: dict[str, Any] = {
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=sizes.shift),
        "vae": build_autoencoder(sizes.image_size, sizes.latent_channels, sizes.vae_channels),
        "text_encoder": build_qwen3(Qwen3Model, sizes.text_width, sizes.text_layers, len(tokenizer)),
        "tokenizer": tokenizer,
        "transformer": transformer,
    }
    for part in parts.values():
        if isinstance(part, torch.nn.Module):
            part.eval()
    return ZImagePipeline(**parts)
