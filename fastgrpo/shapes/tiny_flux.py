"""A FLUX or FLUX.1-Kontext pipeline of about a million parameters: diffusers' and transformers' own classes, a closed
vocabulary. Their `from_pretrained` loads what `build_pipeline(...).save_pretrained` writes.
"""

from typing import Literal

import torch
from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel
from diffusers.pipelines.flux.pipeline_flux import FluxPipeline
from diffusers.pipelines.flux.pipeline_flux_kontext import FluxKontextPipeline
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from pydantic import Field, model_validator

from fastgrpo.config.sections import Section
from fastgrpo.errors import ConfigError
from fastgrpo.shapes.tiny_parts import SPECIAL_TOKENS, build_autoencoder, build_clip, build_t5, build_tokenizer


class TinyFluxSizes(Section):
    """Sizes of the tiny FLUX; the defaults are those of the shipped weights."""

    task: Literal["text", "edit"] = "text"
    image_size: int = 32
    image_width: int | None = None  # as high as wide where none is given
    text_length: int = 10
    latent_channels: int = 3
    vae_channels: list[int] = Field(default_factory=lambda: [16, 32, 48])
    attention_heads: int = 4
    attention_head_dim: int = 24
    rope_axes: list[int] = Field(default_factory=lambda: [4, 10, 10])
    double_layers: int = 1
    single_layers: int = 4
    text_width: int = 64
    text_layers: int = 2
    shift: float = 3.0

    @property
    def width(self) -> int:
        """Columns of an image."""
        return self.image_size if self.image_width is None else self.image_width

    @model_validator(mode="after")
    def _check(self) -> "TinyFluxSizes":
        if sum(self.rope_axes) != self.attention_head_dim:
            raise ConfigError(
                f"sizes.rope_axes: {self.rope_axes} sums to {sum(self.rope_axes)}; "
                f"it must sum to sizes.attention_head_dim, {self.attention_head_dim}"
            )
        if self.text_width % 16:
            raise ConfigError(f"sizes.text_width: {self.text_width} is not a multiple of 16, the width of a head")
        return self


def build_pipeline(words: tuple[str, ...], sizes: TinyFluxSizes, seed: int) -> FluxPipeline | FluxKontextPipeline:
    """An untrained pipeline in float32 whose tokenizers know `words`; resets torch's global seed.

    task "text": a FluxPipeline; "edit": a FluxKontextPipeline.
    """
    torch.manual_seed(seed)
    vocabulary = len(SPECIAL_TOKENS) + len(words)
    clip = build_clip(sizes.text_width, sizes.text_layers, sizes.text_length, vocabulary)
    t5 = build_t5(sizes.text_width, sizes.text_layers, vocabulary)
    vae = build_autoencoder(sizes.image_size, sizes.latent_channels, sizes.vae_channels)
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=4 * sizes.latent_channels,
        num_layers=sizes.double_layers,
        num_single_layers=sizes.single_layers,
        attention_head_dim=sizes.attention_head_dim,
        num_attention_heads=sizes.attention_heads,
        joint_attention_dim=sizes.text_width,
        pooled_projection_dim=sizes.text_width,
        guidance_embeds=True,
        axes_dims_rope=tuple(sizes.rope_axes),  # pyright: ignore[reportArgumentType]
    )
    pipeline = (FluxKontextPipeline if sizes.task == "edit" else FluxPipeline)(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=sizes.shift, use_dynamic_shifting=False),
        vae=vae,
        text_encoder=clip,
        tokenizer=build_tokenizer(words, sizes.text_length, start=True),  # pyright: ignore[reportArgumentType]
        text_encoder_2=t5,
        tokenizer_2=build_tokenizer(words, sizes.text_length, start=False),  # pyright: ignore[reportArgumentType]
        transformer=transformer,
    )
    for module in (clip, t5, vae, transformer):
        module.eval()
    return pipeline
