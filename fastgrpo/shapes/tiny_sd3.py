"""A Stable Diffusion 3.5 pipeline of about a million parameters: diffusers' own classes, a closed vocabulary.

`StableDiffusion3Pipeline.from_pretrained` loads what `build_pipeline(...).save_pretrained` writes.
"""

from typing import Any

import torch
from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel
from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import StableDiffusion3Pipeline
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from pydantic import Field, model_validator

from fastgrpo.config.sections import Section
from fastgrpo.errors import ConfigError
from fastgrpo.shapes.tiny_parts import (
    SPECIAL_TOKENS,
    build_autoencoder,
    build_projected_clip,
    build_t5,
    build_tokenizer,
)


class TinySD3Sizes(Section):
    """Sizes of the tiny Stable Diffusion 3.5."""

    image_size: int = 32
    text_length: int = 10
    latent_channels: int = 3
    vae_channels: list[int] = Field(default_factory=lambda: [16, 32, 48])
    attention_heads: int = 4
    attention_head_dim: int = 24
    layers: int = 5
    # Layers whose image tokens also attend among themselves alone, as in SD 3.5 medium.
    dual_attention_layers: list[int] = Field(default_factory=lambda: [0])
    # Of T5; each CLIP is half as wide, since the pipeline sets them side by side.
    text_width: int = 64
    text_layers: int = 2
    # false: text_encoder_3 is None, as many people load SD 3.
    t5: bool = True
    shift: float = 3.0

    @model_validator(mode="after")
    def _check(self) -> "TinySD3Sizes":
        if self.text_width % 32:
            raise ConfigError(f"sizes.text_width: {self.text_width} is not a multiple of 32, two heads of 16")
        return self


def build_pipeline(words: tuple[str, ...], sizes: TinySD3Sizes, seed: int) -> StableDiffusion3Pipeline:
    """An untrained StableDiffusion3Pipeline in float32 whose tokenizers know `words`; resets torch's global seed."""
    torch.manual_seed(seed)
    vocabulary, half = len(SPECIAL_TOKENS) + len(words), sizes.text_width // 2
    width = sizes.attention_heads * sizes.attention_head_dim
    side = sizes.image_size // 2 ** (len(sizes.vae_channels) - 1)
    clips = [build_projected_clip(half, sizes.text_layers, sizes.text_length, vocabulary) for _ in range(2)]
    transformer = SD3Transformer2DModel(
        sample_size=side,
        patch_size=2,
        in_channels=sizes.latent_channels,
        out_channels=sizes.latent_channels,
        num_layers=sizes.layers,
        attention_head_dim=sizes.attention_head_dim,
        num_attention_heads=sizes.attention_heads,
        joint_attention_dim=sizes.text_width,
        caption_projection_dim=width,
        pooled_projection_dim=2 * half,
        pos_embed_max_size=side,
        dual_attention_layers=tuple(sizes.dual_attention_layers),
        qk_norm="rms_norm",
    )
    parts: dict[str, Any] = {
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=sizes.shift),
        "vae": build_autoencoder(sizes.image_size, sizes.latent_channels, sizes.vae_channels),
        "text_encoder": clips[0],
        "tokenizer": build_tokenizer(words, sizes.text_length, start=True),
        "text_encoder_2": clips[1],
        "tokenizer_2": build_tokenizer(words, sizes.text_length, start=True),
        "text_encoder_3": build_t5(sizes.text_width, sizes.text_layers, vocabulary) if sizes.t5 else None,
        "tokenizer_3": build_tokenizer(words, sizes.text_length, start=False) if sizes.t5 else None,
        "transformer": transformer,
    }
    for part in parts.values():
        if isinstance(part, torch.nn.Module):
            part.eval()
    return StableDiffusion3Pipeline(**parts)
